"""The paper's own way to keep entries, in plain autograd: the yardstick of `lime-dist bench depth`.

As in the pseudocode of arXiv 2502.09245v2, appendix E: the keys and values of all layers so far are one
buffer, which every layer grows by `cat` and multiplies with its router. Each product keeps the buffer that
it has read, so a model of L layers holds 2 + ... + L = L(L+1)/2 - 1 entries for its backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lime_dist.lime.depth_memory import Run


class GrowingCat:
    """Stands in for `DepthMemory` where one stage holds all layers and every layer reads all so far.

    The chain that passes from layer to layer is the buffer itself, [n * H_kv, 2 (K, V), tokens, head_dim].
    """

    def __init__(self, num_tokens: int, head_dim: int, *, dtype: torch.dtype, device: torch.device):
        self._empty = torch.empty(0, 2, num_tokens, head_dim, dtype=dtype, device=device)

    def start(self) -> Tensor:
        """The buffer before the first layer."""
        return self._empty

    def write(self, layer: int, entry: Tensor, chain: Tensor) -> Tensor:
        """The buffer with `entry` ([H_kv, 2, tokens, head_dim], any strides) behind those of the layers before."""
        assert chain.shape[0] == layer * entry.shape[0], "every layer writes, in order"
        return torch.cat((chain, entry))

    def read(self, reader: int, router: Tensor, sources: tuple[int, ...], chain: Tensor) -> Tensor:
        """sum_{i, h'} router[h, i, h'] * entry_i[h'] over all layers so far: [H_kv, 2 * tokens * head_dim]."""
        assert sources == tuple(range(reader + 1)), "every layer reads all layers so far"
        return torch.mm(router.flatten(1), chain.flatten(1))

    def runs_before(self) -> tuple[Run, ...]:
        """None: there are no other stages to read from."""
        return ()

    runs_made = runs_before  # nor any to add up for
