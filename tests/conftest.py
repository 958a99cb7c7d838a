"""Every test may fork ranks: a child hangs in its first threaded CPU operation if the parent has run one."""

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core warns otherwise, once a layer and rank

import torch

torch.set_num_threads(1)
