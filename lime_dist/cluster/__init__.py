"""Running on SLURM: describe a cluster, submit a run to it."""
