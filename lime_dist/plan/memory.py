"""What one rank of each stage needs of its device's memory, in bytes. Pure data: the one place that estimates it.

Counts tensors, as the code that makes them holds them: `lime/` (activations), `backends/deepspeed.py` (gradients,
optimiser), `pipeline/executor.py` (what waits and travels). It refuses to know what is not a tensor of ours: the CUDA
context, NCCL's buffers, what the allocator keeps unused, a kernel's workspace.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4: what each operation keeps for its backward pass),
with SwiGLU in place of their MLP, grouped queries, RMSNorm, no dropout, and `F.scaled_dot_product_attention`, whose
fused kernels keep one number a row in place of the tokens x tokens matrix. (On a GPU, fp32 with grouped queries has no
fused kernel, and that matrix is not counted here.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod

from lime_dist.config import Config
from lime_dist.plan.parameters import padded_vocab_size, plan_parameters
from lime_dist.plan.stages import ChunkPlan, StagePlan

FP32 = 4
MOMENTS = 2  # AdamW's

# DeepSpeed's defaults of keys under `zero_optimization`.
REDUCE_BUCKET_ELEMENTS = 500_000_000
MAX_LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on one rank of a stage; the parts that count microbatches count those in flight at the peak.

    gradients: as they lie while microbatches pass.
    activations: what autograd keeps, and a layer computed again under `parallel.recompute`.
    sums: partial sums, and those of this stage's readers.
    logits: on the last stage.
    buffers: bundles that come, go or wait; gradients of entries, sums and logits; ZeRO's buckets.
    update: what the optimiser's step takes for itself, when all that microbatches hold is free again.
    staged: what a save behind training copies to host memory, so beside the total.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    entries: int
    sums: int
    logits: int
    buffers: int
    update: int
    staged: int = 0

    @property
    def total_bytes(self) -> int:
        """At the peak, which is in a pass or in the update."""
        passing = self.activations + self.entries + self.sums + self.logits + self.buffers
        return self.weights + self.gradients + self.optimizer + max(passing, self.update)

    def report(self) -> dict[str, int]:
        """The parts by name, and their `total`."""
        return {part.name: getattr(self, part.name) for part in fields(self)} | {"total": self.total_bytes}


class MemoryEstimate:
    """Of one rank of each stage of a checked config, under any warm-up. `run.device: auto` is taken for a GPU.

    chunks: all of them, in model order.
    """

    def __init__(self, config: Config, chunks: Sequence[ChunkPlan]):
        num_stages = config.parallel.pp
        self._stages = [_StageEstimate(config, chunks[index::num_stages]) for index in range(num_stages)]

    def of(self, stages: Sequence[StagePlan]) -> tuple[StageMemory, ...]:
        return tuple(estimate.memory(stage) for estimate, stage in zip(self._stages, stages, strict=True))


class _StageEstimate:
    """What the chunks alone say is worked out once, here."""

    def __init__(self, config: Config, chunks: Sequence[ChunkPlan]):
        self._config, self._model, self._chunks = config, config.model, chunks
        self._shape = chunks[0].shape
        self._element, self._tp, self._dp = self._shape.element_bytes, config.parallel.tp, config.layout.dp
        self._rows = self._shape.rows * self._tp  # tokens of a microbatch, padded
        self._residual_rows = self._shape.rows if config.parallel.sequence_parallel else self._rows
        self._residual = self._residual_rows * self._model.hidden_size * self._element
        self._recomputes = config.parallel.recompute == "layer"
        self._on_gpu = config.run.device != "cpu"
        self._parameters = self._parameter_sizes()
        self._layers = {chunk.chunk: [sum(self._layer(chunk, layer)) for layer in chunk.layers] for chunk in chunks}
        self._kept = {chunk.chunk: self._kept_of(chunk) for chunk in chunks}
        self._held = {chunk.chunk: chunk.held_bytes for chunk in chunks}
        self._sums = {chunk.chunk: len(chunk.transfer.summed_readers) * self._shape.sum_bytes for chunk in chunks}
        self._always = sum(self._buffers())

    def memory(self, stage: StagePlan) -> StageMemory:
        """At the moment when it is most."""
        count, zero = sum(self._parameters), self._config.zero_stage
        gradients = FP32 * count // (self._dp if zero >= 2 else 1)
        return max(
            (
                StageMemory(
                    weights=self._weights(count),
                    gradients=gradients,
                    optimizer=self._optimizer(count),
                    activations=self._activations(in_flight),
                    entries=sum(number * self._held[chunk] for chunk, number in in_flight.items()),
                    sums=self._sums_in_flight(in_flight),
                    logits=FP32 * in_flight[self._last.chunk] * self._logit_elements(),
                    buffers=self._always
                    + self._received(stage.receives_ahead, sum(in_flight.values()))
                    + self._sent(in_flight),
                    update=max(0, self._update(count) - gradients),
                    staged=self._staged(),
                )
                for in_flight in stage.moments
            ),
            key=lambda memory: memory.total_bytes,
        )

    @property
    def _last(self) -> ChunkPlan:
        return self._chunks[-1]

    # ---- weights to moments: `backends/deepspeed.py`

    def _parameter_sizes(self) -> list[int]:
        """Elements of each parameter of a tensor rank, padding and tied copies included."""
        vocab_rows = padded_vocab_size(self._model.vocab_size, self._tp)
        return [
            prod(spec.shape)
            for chunk in self._chunks
            for spec in plan_parameters(
                self._model, chunk.transfer, chunk.layers, tp=self._tp, tp_rank=0, vocab_rows=vocab_rows
            )
        ]

    def _weights(self, count: int) -> int:
        """ZeRO 3 keeps a share of each parameter, and so many parameters whole at a time."""
        if self._config.zero_stage < 3:
            return count * self._element
        return count * self._element // self._dp + self._element * min(
            count, self._zero_key("stage3_max_live_parameters", MAX_LIVE_ELEMENTS)
        )

    def _optimizer(self, count: int) -> int:
        """fp32 masters and moments, shared by the replicas from ZeRO 1 on; without it fp32 weights are the masters."""
        if self._config.zero_stage:
            return (1 + MOMENTS) * FP32 * count // self._dp
        masters = 0 if self._element == FP32 else 1
        return (masters + MOMENTS) * FP32 * count

    def _update(self, count: int) -> int:
        """Gradients and what the step makes of them; AdamW's `foreach` makes a root of the second moments, in fp32."""
        share, zero = FP32 * count // self._dp, self._config.zero_stage
        if zero >= 2:
            return (3 if zero == 2 else 2) * share  # the gradients, under ZeRO 2 a flat copy of them, the root
        in_bf16 = self._element * count if self._element < FP32 else 0
        if zero == 0:
            return in_bf16 + 2 * FP32 * count
        sums_and_copy = in_bf16 + FP32 * count  # in `finish_gradients`
        bucket = min(count, self._zero_key("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
        return max(sums_and_copy, self._element * (count + bucket), 2 * share)

    def _staged(self) -> int:
        """fp32 weights and moments, of the replica with the largest share: `checkpoint/staging.py`."""
        if not self._config.checkpoint.asynchronous:
            return 0
        by_parameter = max(sum(self._parameters[first :: self._dp]) for first in range(self._dp))
        share = sum(self._parameters) // self._dp if self._config.zero_stage else by_parameter
        return (1 + MOMENTS) * FP32 * share

    def _zero_key(self, key: str, default: int) -> int:
        return int(self._config.deepspeed.get("zero_optimization", {}).get(key, default))

    # ---- what autograd keeps of one microbatch: `lime/`

    def _activations(self, in_flight: Mapping[int, int]) -> int:
        kept = sum(number * self._kept[chunk] for chunk, number in in_flight.items())
        if not self._recomputes:
            return kept
        return kept + max(map(max, self._layers.values()))

    def _kept_of(self, chunk: ChunkPlan) -> int:
        """Of one microbatch; with `recompute` the input of each layer."""
        ends = self._norm() if chunk.is_last else self._residual  # the final norm, or the output
        if self._recomputes:
            return len(chunk.layers) * self._residual + ends
        return sum(self._layers[chunk.chunk]) + ends

    def _layer(self, chunk: ChunkPlan, layer: int) -> Iterator[int]:
        yield 2 * self._norm()
        yield sum(self._attention(chunk, layer))
        # SwiGLU: the gate and the other half, silu of the gate, the product.
        yield 4 * self._rows * self._model.intermediate_size // self._tp * self._element

    def _norm(self) -> int:
        """RMSNorm: its input, its output (which the next product keeps), 1 / rms. On a CPU it is made of several
        operations in fp32, which keep the input as fp32 and the normed rows before the gain."""
        elements = self._residual_rows * self._model.hidden_size
        inside = self._element if self._on_gpu else 2 * FP32
        return elements * (inside + self._element) + self._residual_rows * FP32

    def _attention(self, chunk: ChunkPlan, layer: int) -> Iterator[int]:
        """Rotated queries and keys, values, the output, the log of each row's sum.

        Values are a view, which keeps all of what they are part of: the layer's own projection or the routed entry.
        """
        heads, kv_heads, head_dim = self._model.num_heads, self._model.kv_heads, self._model.head_dim
        sources = chunk.transfer.reads.get(layer)
        values_of = 2 * kv_heads if sources else heads + 2 * kv_heads
        yield (2 * heads + kv_heads + values_of) * head_dim // self._tp * self._rows * self._element
        yield heads // self._tp * self._rows * FP32
        if sources:
            yield self._shape.routing.kept_bytes(self._model, len(sources), self._shape.rows, self._element)

    def _logit_elements(self) -> int:
        """Of one microbatch; Megatron's cross entropy writes the fp32 softmax over the logits."""
        vocab_rows = padded_vocab_size(self._model.vocab_size, self._tp) // self._tp
        return self._rows * vocab_rows if self._last.is_last else 0

    # ---- what waits and travels: `pipeline/executor.py`

    def _buffers(self) -> Iterator[int]:
        """All but what `_received` and `_sent` count."""
        yield self._element * max(self._parameters)  # a parameter's gradient, before it is added to the sum
        yield self._element * self._logit_elements()  # the logits, then their gradient, beside the softmax
        yield self._gradients_of_entries()
        if self._config.parallel.sequence_parallel and self._tp > 1:
            yield self._rows * self._model.hidden_size * self._element  # Megatron's buffer of gathered rows
        if self._config.zero_stage >= 2:
            yield self._buckets()

    def _gradients_of_entries(self) -> int:
        """Of the microbatch that goes back, and of those entries to which its later chunks have added already."""
        return sum(self._held.values()) + max(self._sums.values())

    def _sums_in_flight(self, in_flight: Mapping[int, int]) -> int:
        if self._recomputes:
            return sum(number * self._sums[chunk] for chunk, number in in_flight.items())
        return max(self._sums.values())

    def _received(self, actions_ahead: int, num_in_flight: int) -> int:
        """Of the actions ahead: depth memories and residuals of forwards to come, gradients of what was sent for backwards."""
        passes = self._config.num_microbatches * len(self._chunks)
        ahead = max(
            self._held[chunk.chunk] + self._sums[chunk.chunk] + (0 if chunk.is_first else self._shape.residual_bytes)
            for chunk in self._chunks
        )
        forwards = min((actions_ahead + 1) // 2, passes - num_in_flight)
        return forwards * ahead + (actions_ahead // 2 + 1) * max(chunk.sent_bytes for chunk in self._chunks)

    def _sent(self, in_flight: Mapping[int, int]) -> int:
        """Views keep whole buffers until the next send finds that they have left; gloo tells only at the step's end.

        What is in flight has its backward pass, and what that sends, before it: so it is most at the last such moment.
        """
        sent = [self._sent_of(chunk) for chunk in self._chunks]
        if self._on_gpu:
            return max(map(sum, sent))
        forwards = backwards = self._config.num_microbatches
        return sum(
            forwards * forward + (backwards - in_flight[chunk.chunk]) * backward
            for chunk, (forward, backward) in zip(self._chunks, sent)
        ) - max(forward for forward, _ in sent)

    def _sent_of(self, chunk: ChunkPlan) -> tuple[int, int]:
        """By a forward and by a backward pass."""
        held, sums = self._held[chunk.chunk], self._sums[chunk.chunk]
        forward = self._residual + (held if chunk.transfer.sent.raw_entries else 0)
        forward += sums if chunk.transfer.sent.partial_sums else 0
        backward = self._residual + (held if chunk.transfer.received.raw_entries else 0)
        backward += sums if chunk.transfer.received.partial_sums else 0
        return (0 if chunk.is_last else forward), (0 if chunk.is_first else backward)

    def _buckets(self) -> int:
        """DeepSpeed makes them of full size however few gradients there are; two under ZeRO 2 with `overlap_comm`."""
        if not self._zero_key("contiguous_gradients", True):
            return 0
        count = 2 if self._config.zero_stage == 2 and self._zero_key("overlap_comm", False) else 1
        return count * self._element * self._zero_key("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)
