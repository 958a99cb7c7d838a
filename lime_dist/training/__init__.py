"""The run of one rank: its world, its step, optimiser, metrics."""
