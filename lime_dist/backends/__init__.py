"""The only importers of megatron-core and DeepSpeed."""
