"""Signs of life: what each rank last did, written once a second, and the end of a run that stands still. No torch."""
