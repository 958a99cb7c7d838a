"""SLURM: what a cluster is, submitting a run to it, and looking at the run there. No torch."""
