"""LIMe in a pipeline that knows nothing of it: a stage takes (residual, *entries) and returns both with its own entries added.

The layers, the initial values and the loss are those of `LimeChunk`; only the depth memory is another. It is plain autograd
over the entries of the tuple, without a copy of any: what a user of `torch.distributed.pipelining` or of DeepSpeed's
PipelineModule writes. Knows neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lime_dist.config import Config
from lime_dist.depth.pattern import parse_pattern
from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.model import LimeChunk
from lime_dist.lime.parts import Parts
from lime_dist.plan.transfer import plan_transfer


class TupleMemory:
    """Stands in for `DepthMemory` where every layer reads all so far; entries are [H_kv, 2 * tokens * head_dim]."""

    def __init__(self, received: Sequence[Tensor]):
        self._num_received = len(received)
        self.entries = list(received)
        self._sums: dict[int, Tensor] = {}

    def start(self) -> Tensor:
        """Autograd orders the operations here, so the chain is empty."""
        return torch.empty(0)

    def write(self, layer: int, entry: Tensor, chain: Tensor) -> Tensor:
        """`entry`: [H_kv, 2, tokens, head_dim], any strides."""
        assert layer == len(self.entries), "every layer writes, in order"
        self.entries.append(entry.flatten(1))
        return chain

    def runs_before(self) -> tuple[range, ...]:
        """The received entries."""
        return (range(self._num_received),) if self._num_received else ()

    def runs_made(self) -> tuple[range, ...]:
        """None: no sum is begun before its reader."""
        return ()

    def layers_of(self, run: range) -> tuple[int, ...]:
        return tuple(run)

    def add_to_sums(
        self, weights: Mapping[int, Tensor], sources: Mapping[int, tuple[int, ...]], run: range, chain: Tensor
    ) -> Tensor:
        for reader, router in weights.items():
            self._sums[reader] = self._mix(router, sources[reader], self._sums.get(reader))
        return chain

    def read(self, reader: int, router: Tensor, sources: tuple[int, ...], chain: Tensor) -> Tensor:
        """sum_{i, h'} router[h, i, h'] * entry_i[h'] over all layers so far: [H_kv, 2 * tokens * head_dim]."""
        mixed = self._mix(router, sources, self._sums.pop(reader, None))
        assert mixed is not None  # a reader has sources
        return mixed

    def _mix(self, router: Tensor, sources: Sequence[int], mixed: Tensor | None) -> Tensor:
        for column, source in enumerate(sources):
            weights, entry = router[:, column], self.entries[source]
            mixed = weights @ entry if mixed is None else torch.addmm(mixed, weights, entry)
        return cast(Tensor, mixed)


class TupleStage(nn.Module):
    """One stage of a checked config's model, full pattern, over one tensor rank."""

    def __init__(self, config: Config, stage_index: int, parts: Parts):
        super().__init__()
        pattern = parse_pattern("full", config.model.num_layers)
        plan = plan_transfer(pattern, config.chunks, num_stages=config.parallel.pp, policy="relay")
        self.chunk = LimeChunk(config.model, plan.chunk(stage_index), config.chunks[stage_index], parts)
        self._parts = parts
        self._size = config.microbatch_size, config.data.seq_length

    def forward(self, inputs: Tensor, *entries: Tensor) -> Any:
        """inputs: token ids [batch, seq] on the first stage, elsewhere the residual [tokens, hidden].

        Returns the residual and all entries so far; on the last stage the logits [tokens, vocabulary].
        """
        memory = TupleMemory(entries)
        residual, _ = self.chunk(inputs, *self._size, cast(DepthMemory, memory))
        return self.chunk.logits(residual) if self.chunk.is_last else (residual, *memory.entries)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over a microbatch."""
        return self._parts.cross_entropy(logits, targets.flatten()).mean()
