"""The distributed matrix: every method under every engine, on every base, against one process on the same global batches."""
