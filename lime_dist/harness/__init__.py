"""EleutherAI's lm-eval over checkpoints. The library is of the extra `harness`: nothing here is imported without need."""
