"""Checkpoints to and from the files of Hugging Face's `transformers`, which is not needed for it."""
