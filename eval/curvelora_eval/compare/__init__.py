"""Is one adapter better than another on the same rows? Paired differences, and plain words where the rows do not tell.

`load` reads evaluation folders and refuses what is broken, `check` refuses what does not compare, `paired` has the
statistics, `verdict` the rule, `build` puts a comparison together, `text` and `forest` show it.
"""
