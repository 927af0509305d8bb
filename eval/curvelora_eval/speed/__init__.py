"""How fast rows are scored: the engine of `curvelora eval` beside the loop of the papers' scripts, in one process."""
