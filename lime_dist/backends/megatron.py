"""megatron-core: the process groups and the tensor-parallel parts of the model.

Nothing else imports it, and nothing else knows that it asks CUDA for the current device.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    all_to_all,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lime_dist.layout import Coordinate, Layout
from lime_dist.plan.parameters import padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups that this rank belongs to.

    Forward and backward traffic between stages use a group each, so that neither waits behind the other; wrap_forward and
    wrap_backward, between the last stage and the first, are there with virtual stages only: of two stages each is the
    other's next, and a group of two ranks must not carry messages both ways.
    embedding: the first and the last stage of this pipeline; None on the stages between.
    """

    layout: Layout
    coordinate: Coordinate
    tp: ProcessGroup
    dp: ProcessGroup
    pp_forward: ProcessGroup
    pp_backward: ProcessGroup
    wrap_forward: ProcessGroup | None
    wrap_backward: ProcessGroup | None
    model: ProcessGroup
    embedding: ProcessGroup | None


def create_groups(layout: Layout, device: torch.device, timeout: timedelta, *, ring: bool = False) -> Groups:
    """ring: messages go from the last stage on to the first, too.

    Collective: world; `torch.distributed` must be initialised with `layout.world_size` ranks.
    """
    if device.type == "cpu":
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]  # megatron-core allocates on its answer
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    forward, backward = (_pipeline_group(layout, timeout) for _ in range(2))
    wrap_forward, wrap_backward = (_pipeline_group(layout, timeout) if ring else None for _ in range(2))
    return Groups(
        layout=layout,
        coordinate=layout.coordinate(dist.get_rank()),
        tp=parallel_state.get_tensor_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        pp_forward=forward,
        pp_backward=backward,
        wrap_forward=wrap_forward,
        wrap_backward=wrap_backward,
        model=parallel_state.get_model_parallel_group(),
        embedding=parallel_state.get_embedding_group() if parallel_state.is_rank_in_embedding_group() else None,
    )


def _pipeline_group(layout: Layout, timeout: timedelta) -> ProcessGroup:
    pipelines = [
        [
            layout.global_rank(Coordinate(pp_rank=pp_rank, dp_rank=dp_rank, tp_rank=tp_rank))
            for pp_rank in range(layout.pp)
        ]
        for dp_rank in range(layout.dp)
        for tp_rank in range(layout.tp)
    ]
    group, _ = dist.new_subgroups_by_enumeration(pipelines, timeout=timeout)
    return group


class DeepSpeedMpu:
    """The groups as DeepSpeed asks for them; "model parallel" is tensor x pipeline, over which it clips."""

    def __init__(self, groups: Groups):
        self._groups = groups

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups.model)

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._groups.dp

    def get_data_parallel_rank(self) -> int:
        return self._groups.coordinate.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.layout.dp


class _Column(ColumnParallelLinear):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows)[0]


class _Row(RowParallelLinear):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows)[0]


class _Embedding(VocabParallelEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [tokens] -> residual [rows, hidden]; megatron-core scatters over the second of two dimensions."""
        if self.reduce_scatter_embeddings:
            return super().forward(ids.unsqueeze(0)).squeeze(1)
        return super().forward(ids)


class _Head(_Column):
    """Logits over this rank's share of the padded vocabulary; padding at -inf, so that it never counts."""

    def __init__(self, hidden_size: int, vocab_size: int, rows: int, tied: nn.Parameter | None, **kwargs):
        super().__init__(hidden_size, rows, skip_weight_param_allocation=tied is not None, **kwargs)
        if tied is not None:
            self.weight = tied
        local_rows = rows // self.tp_group.size()
        self._real_columns = max(0, min(local_rows, vocab_size - self.tp_group.rank() * local_rows))

    def forward(self, rows: Tensor) -> Tensor:
        logits = super().forward(rows)
        logits[:, self._real_columns :] = float("-inf")
        return logits


class MegatronParts:
    """`lime.parts.Parts` over a tensor group."""

    def __init__(self, groups: Groups, *, sequence_parallel: bool, dtype: torch.dtype, device: torch.device):
        self._group, self._sequence_parallel = groups.tp, sequence_parallel
        self.tp_size, self.tp_rank = groups.layout.tp, groups.coordinate.tp_rank
        self.dtype, self.device = dtype, device
        self._config = ModelParallelConfig(
            tensor_model_parallel_size=self.tp_size,
            sequence_parallel=sequence_parallel,
            params_dtype=dtype,
            use_cpu_initialization=device.type == "cpu",
            perform_initialization=False,  # lime.weights fills them, the same under every layout
        )

    def _arguments(self) -> dict:
        return {"config": self._config, "init_method": nn.init.zeros_, "tp_group": self._group}

    def vocab_rows(self, vocab_size: int) -> int:
        return padded_vocab_size(vocab_size, self.tp_size)

    def column_linear(self, inputs: int, outputs: int) -> nn.Module:
        return _Column(inputs, outputs, bias=False, **self._arguments())

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        return _Row(inputs, outputs, bias=False, input_is_parallel=True, skip_bias_add=False, **self._arguments())

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return _Embedding(
            self.vocab_rows(vocab_size),
            hidden_size,
            reduce_scatter_embeddings=self._sequence_parallel,
            **self._arguments(),
        )

    def head(self, hidden_size: int, vocab_size: int, tied: nn.Parameter | None) -> nn.Module:
        return _Head(hidden_size, vocab_size, self.vocab_rows(vocab_size), tied, bias=False, **self._arguments())

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits.float(), targets)

    def gather_logits(self, logits: Tensor, vocab_size: int) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits, group=self._group)[:, :vocab_size]

    def heads_to_tokens(self, kv: Tensor) -> Tensor:
        if self.tp_size == 1:
            return kv
        blocks = kv.unflatten(2, (self.tp_size, -1)).permute(2, 0, 1, 3, 4)
        return all_to_all(self._group, blocks.contiguous()).flatten(0, 1)

    def tokens_to_heads(self, kv: Tensor) -> Tensor:
        if self.tp_size == 1:
            return kv
        blocks = all_to_all(self._group, kv.unflatten(0, (self.tp_size, -1)))
        return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def residual_to_tokens(self, residual: Tensor) -> Tensor:
        if self.tp_size == 1 or self._sequence_parallel:
            return residual
        return scatter_to_sequence_parallel_region(residual, group=self._group)

    def gather_heads(self, projection: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(projection, group=self._group) if self.tp_size > 1 else projection

    def for_residual(self, parameter: Tensor) -> Tensor:
        return self.for_tokens(parameter) if self._sequence_parallel else parameter

    # The sum is taken inside the backward pass, and not once a step as in Megatron, so that it is done
    # before any ZeRO stage reduces or cuts the gradient.
    def for_tokens(self, parameter: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(parameter, group=self._group) if self.tp_size > 1 else parameter
