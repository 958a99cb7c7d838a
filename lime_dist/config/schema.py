"""The keys of a run's configuration: frozen dataclasses with their defaults, and what follows from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lime_dist.depth.key_value import NO_ROUTING
from lime_dist.depth.kinds import ROUTINGS, options_of
from lime_dist.depth.pattern import Pattern, none_pattern, parse_pattern, pattern_of_edges
from lime_dist.depth.routing import Routing
from lime_dist.formats import parse_bytes
from lime_dist.layout import Layout
from lime_dist.plan.partition import layers_of_stages, plan_partition


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the decoder; the names are those of Hugging Face's LLaMA where it has one."""

    num_layers: int  # decoder layers, each of attention and MLP
    hidden_size: int  # width of the residual stream; num_heads must divide it
    intermediate_size: int  # width of the MLP
    num_heads: int  # query heads of a layer; the head dimension is hidden_size / num_heads
    vocab_size: int  # token ids, as many as the tokenizer has
    num_kv_heads: int | None = None  # None: as many as num_heads (MHA); fewer, which divide them: GQA
    tie_embeddings: bool = True  # true: the output layer is the embedding's transpose; false: weights of its own
    rope_theta: float = 10000.0  # base of the rotary angles
    rms_norm_eps: float = 1e-6  # added to the mean square before the root, in every norm

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Who reads whom, and how it travels."""

    # static: learned weights | dynamic: weights from the reader's input | average: nothing learned | none (LLaMA)
    router: str = "static"
    entry: str = "kv"  # kv: raw keys and values (LIMe v2) | hidden: hidden states (LIMe v1)
    # Of v2: how its routers begin, on the own layer and on the others | uniform: at random on all. See depth/key_value.py.
    router_init: str = "identity_uniform"  # identity_uniform (the paper's) | uniform | identity_zero
    heads: str = "all"  # of v2: all: a head reads all heads of its sources | same: the same heads only
    # Of v1: each head's largest weights up to this share, and no others; None: all. See depth/hidden.py.
    head_top_p: float | None = None
    pattern: str | dict[int, list[int]] = "full"  # see depth/pattern.py; or reader: [earlier layers]
    pattern_name: str | None = None  # what edges in `pattern` are called; set when a text is resolved to them
    switch_at: dict[int, str | dict[int, list[int]]] = field(default_factory=dict)  # updates done: pattern from then on
    weights_from: str | None = None  # a step_N folder or a run's, whose routers choose the edges of budget and top_p
    policy: str = "least"  # least: the fewest tensors cross | relay: raw entries only
    partial_sum_dtype: str = "bundle"  # bundle: run.dtype | fp32

    @property
    def name(self) -> str:
        """The pattern as the user wrote it."""
        return self.pattern_name or str(self.pattern)

    @property
    def chosen_by_routers(self) -> bool:
        return self.name.startswith(("top_p:", "budget:"))

    @property
    def learns_routers(self) -> bool:
        return self.router not in ("none", "average")

    @property
    def is_chosen(self) -> bool:
        """Whether the same text may stand for other edges at another time: for other weights, bytes or stages."""
        return self.chosen_by_routers or "within_stage" in self.name

    @property
    def routing(self) -> Routing:
        """Of a checked config."""
        if self.router == "none":
            return NO_ROUTING
        kind = ROUTINGS[self.entry, self.router]
        return dataclasses.replace(kind, **{key: getattr(self, key) for key in options_of(kind)})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tp: int = 1  # tensor ranks, which share each layer's heads and MLP; divides model.num_kv_heads
    pp: int = 1  # pipeline stages
    dp: int | None = None  # None: as many replicas as the ranks allow, one when started alone
    virtual_stages: int = 1  # chunks of layers a stage: stage r of pp holds chunks r, r + pp, ...
    sequence_parallel: bool = False  # true: tensor ranks share the tokens between layers too; needs tp above 1
    recompute: str = "none"  # none: activations are kept | layer: each layer's are computed again in its backward


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    schedule: str = "1f1b"  # 1f1b (interleaved with virtual_stages above 1) | gpipe
    # Parts of a replica's share of the global batch. None: as many as data.micro_batch_size makes, or 1.
    num_microbatches: int | None = None
    # Forwards of the first stage before its first backward. None: the schedule's own number; auto: as many as hide transfers.
    warmup: int | str | None = None
    # Bytes, or a text such as 256KiB: smaller messages travel with the next of their kind; 0: each as soon as it is made.
    min_message: int | str = "256KiB"
    receives_ahead: int | None = None  # passes ahead of the running one; None: 1, where a warm-up is set 2
    # auto: as many layers in each, a remainder in the middle; or the number of layers of each chunk
    partition: str | list[int] = "auto"
    boundary_cost: list[float] | None = None  # what a byte over each boundary counts; None: the same everywhere

    @property
    def min_message_bytes(self) -> int | None:
        """None for what is no size."""
        return parse_bytes(str(self.min_message))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the defaults are the paper's (arXiv 2502.09245, appendix)."""

    lr: float = 1e-3  # the largest rate of all weights but the routers'
    router_lr: float = 1e-2  # the largest rate of the routers
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of the two moments' running means
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # times the rate; of projections, and of routers where their kind has it (depth/)
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it; 0: no clipping
    lr_schedule: str = "cosine"  # cosine | linear (to 0 after the last step) | constant | wsd (see cooldown_steps)
    decay_steps: int | None = None  # the step at which the schedule is at its end; None: run.steps
    cooldown_steps: int = 0  # of wsd (warm-up, stable, decay): the last ones, in which rates fall linearly
    warmup_steps: int = 200  # the first ones, in which rates rise linearly from 0; 0: none
    min_lr: float = 1e-6  # the least share of lr and router_lr that a schedule comes down to


@dataclass(frozen=True, kw_only=True)
class Source:
    """One token file (the prefix of a .bin/.idx pair) and its weight in the blend."""

    path: str  # without .bin or .idx
    weight: float = 1.0  # share of the samples, of the sum of all weights


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: list[Source] = field(default_factory=list)  # a prefix, or a list of {path: prefix, weight: number}
    valid: list[Source] = field(default_factory=list)  # empty: the last valid_fraction of train's documents
    valid_fraction: float = 0.0  # of train's documents, the last ones, held out where valid is empty; 0: none
    # A .model or tokenizer.json, of which the run keeps a copy in its folder; None: none is known.
    tokenizer: str | None = None
    seq_length: int = 2048  # tokens that the model reads of a sample
    # Documents joined and cut: stream | one whole document each: padded | as many as fit: packed
    samples: str = "stream"
    global_batch_size: int = 1  # sequences a step, over all replicas
    # Sequences that a replica puts through the stages at a time, whatever dp is; None: pipeline.num_microbatches says how many.
    micro_batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0  # steps; 0: only at the end
    batches: int = 8  # global batches of held-out text


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0  # steps; 0: only at the end
    keep: int = 2  # the last ones; older ones are removed
    keep_every: int = 0  # steps; those of every so many are never removed; 0: none
    on_full_disk: str = "stop"  # stop: with the checkpoints that are there | go_on: without saving, until there is room
    asynchronous: bool = False  # written behind training, which waits for a copy in host memory only
    resume: str = "auto"  # auto: the newest whole one in the run's folder | never | a step_N folder or a run's
    # Keys that may differ from the checkpoint's, though the run is another from there: see `checkpoint/changes.py`.
    allow_changes: list[str] = field(default_factory=list)
    # A step_N folder or a run's: where a new run's weights come from, without its optimiser; None: initial ones.
    weights_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class SpikesConfig:
    """When a step is bad, and what is done then; a loss or gradient norm that is not finite always is. See docs/failures.md.

    The defaults stop the run at the first bad step.
    """

    # Bad: so many standard deviations over the mean of the last good steps; None: never.
    loss_sigma: float | None = None
    grad_norm_sigma: float | None = None  # likewise, of the gradient norm before clipping
    window: int = 128  # good steps whose mean and deviation count, once there are half as many
    max_skips: int = 0  # bad steps within `window` that make no update; at the next one the run goes back
    max_returns: int = 0  # times that the run goes back to a checkpoint, past the batches since; then it stops


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    steps: list[int] | None = None  # [first, last] to record, see `lime-dist profile`; None: none
    kernels: bool = False  # by torch.profiler too, which slows these steps: all times are of slowed ones


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    every: int = 0  # steps between router maps in TensorBoard, which all ranks wait for; 0: never


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases beside TensorBoard, with the same values; WANDB_MODE=offline keeps them for `wandb sync`."""

    project: str | None = None  # None: not used
    entity: str | None = None  # a team; None: the one that WANDB_API_KEY belongs to
    name: str | None = None  # of the run; None: that of run.dir


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    # The run's folder: checkpoints, metrics, resolved config; on storage that all nodes share
    dir: str = "runs/default"
    steps: int = 100  # updates, those before a checkpoint included
    seed: int = 0  # of the initial weights and the order of the samples
    dtype: str = "fp32"  # fp32 | bf16: of weights and activations in a pass; the optimiser's are fp32
    device: str = "auto"  # auto: GPUs where there are | cpu | cuda
    # What a rank may take of its device, such as 70GiB; a plan that needs more is refused. None: no bound.
    memory: int | str | None = None
    timeout_seconds: float = 600.0  # a rank that waits longer for another ends the job
    # Of a device in run.dtype, dense, for MFU; None: by its name (training/peak_flops.py).
    peak_tflops: float | None = None
    log_every: int = 1  # steps between progress lines; metrics.jsonl has every step

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_bytes(str(self.memory))


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    depth: DepthConfig = DepthConfig()
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    spikes: SpikesConfig = SpikesConfig()
    run: RunConfig = RunConfig()
    profile: ProfileConfig = ProfileConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    wandb: WandbConfig = WandbConfig()
    deepspeed: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's own keys, passed through

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.parallel.tp, pp=self.parallel.pp, dp=self.parallel.dp or 1)

    @property
    def num_microbatches(self) -> int:
        """Of one replica in a step."""
        number, size = self.pipeline.num_microbatches, self.data.micro_batch_size
        if number is None:
            number = 1 if size is None else self.data.global_batch_size // (self.layout.dp * size)
        return number

    @property
    def microbatch_size(self) -> int:
        """Sequences that one replica puts through the stages at a time."""
        return self.data.global_batch_size // (self.layout.dp * self.num_microbatches)

    @property
    def pattern(self) -> Pattern:
        if self.depth.router == "none":
            return none_pattern(self.model.num_layers)
        if isinstance(self.depth.pattern, dict):
            name = self.depth.pattern_name or "edges"
            pattern = pattern_of_edges(self.depth.pattern, self.model.num_layers, name)
        else:
            pattern = parse_pattern(
                self.depth.pattern, self.model.num_layers, layers_of_stages(self.chunks, self.parallel.pp)
            )
        return dataclasses.replace(pattern, routing=self.depth.routing)

    def at_step(self, step: int) -> Config:
        """The config after `step` updates, with the pattern that `depth.switch_at` says for the next one."""
        due = [switch for switch in self.depth.switch_at if switch <= step]
        return self.with_pattern(self.depth.switch_at[max(due)]) if due else self

    def with_pattern(self, pattern: str | dict[int, list[int]], name: str | None = None) -> Config:
        return dataclasses.replace(self, depth=dataclasses.replace(self.depth, pattern=pattern, pattern_name=name))

    @property
    def chunks(self) -> tuple[range, ...]:
        """The layers of each chunk, in model order: chunk c is on stage c mod pp."""
        return plan_partition(
            self.model.num_layers, self.parallel.pp, self.pipeline.partition, self.parallel.virtual_stages
        )

    @property
    def partial_sum_dtype(self) -> str:
        return self.run.dtype if self.depth.partial_sum_dtype == "bundle" else self.depth.partial_sum_dtype

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 1)

    @property
    def tokens_per_step(self) -> int:
        return self.data.global_batch_size * self.data.seq_length
