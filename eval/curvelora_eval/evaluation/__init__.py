"""`curvelora eval --task`: what is asked of which models, the work, and its results (docs/evaluation.md)."""
