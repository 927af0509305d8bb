"""Before a job: whether all processes come, with equal code, and can write the run folder and reach each other."""
