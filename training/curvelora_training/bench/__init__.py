"""The Sinter lab: what a nonlinearity costs, whether it is stable, and whether it is there at all, beside QLoRA."""
