"""Training runs compared fairly: what a depth pattern gains over another, or over LLaMA, by the runs' own records. No torch."""
