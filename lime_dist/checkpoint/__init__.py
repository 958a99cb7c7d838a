"""Checkpoints in terms of logical tensors: they know the model, not the layout that wrote them."""
