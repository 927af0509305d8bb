"""The bridge to lm-evaluation-harness: our rows and texts as its local tasks, our models as its model."""
