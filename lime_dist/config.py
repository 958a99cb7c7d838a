"""One run, one YAML: frozen dataclasses, dotted overrides, and one function that checks across fields.

Knows no framework: it answers on a login node in milliseconds. A key that does not exist is refused
with the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lime_dist.depth.pattern import Pattern, none_pattern, parse_pattern, pattern_of_edges
from lime_dist.depth.routing import Routing
from lime_dist.errors import ConfigError, LayoutError, one_line
from lime_dist.layout import Layout
from lime_dist.pipeline.partition import plan_partition
from lime_dist.pipeline.schedule import SCHEDULE_NAMES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the decoder; the names are those of Hugging Face's LLaMA where it has one."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    num_kv_heads: int | None = None  # None: as many as num_heads (MHA)
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Who reads whom, and how it travels."""

    router: str = "static"  # static: learned weights | dynamic: weights from the reader's input | none (LLaMA)
    entry: str = "kv"  # kv: raw keys and values (LIMe v2) | hidden: hidden states (LIMe v1)
    pattern: str | dict[int, list[int]] = "full"  # see depth/pattern.py; or reader: [earlier layers]
    pattern_name: str | None = None  # what edges in `pattern` are called; set when a text is resolved to them
    switch_at: dict[int, str | dict[int, list[int]]] = field(default_factory=dict)  # updates done: pattern from then on
    weights_from: str | None = None  # a checkpoint whose routers choose the edges of budget and top_p
    policy: str = "least"  # least: the fewest tensors cross | relay: raw entries only
    partial_sum_dtype: str = "bundle"  # bundle: run.dtype | fp32

    @property
    def routing(self) -> Routing:
        if self.entry == "kv" or self.router == "none":
            return Routing.KEY_VALUE
        return Routing.HIDDEN_DYNAMIC if self.router == "dynamic" else Routing.HIDDEN_STATIC


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tp: int = 1
    pp: int = 1
    dp: int | None = None  # None: as many replicas as the ranks allow, one when started alone
    virtual_stages: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"  # none | layer


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    schedule: str = "1f1b"
    num_microbatches: int = 1
    partition: str | list[int] = "auto"
    boundary_cost: list[float] | None = None  # what a byte over each boundary counts; None: the same everywhere


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the defaults are the paper's (arXiv 2502.09245, appendix)."""

    lr: float = 1e-3
    router_lr: float = 1e-2
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0  # 0: no clipping
    lr_schedule: str = "cosine"  # cosine | constant
    warmup_steps: int = 200
    min_lr_ratio: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One token file (the prefix of a .bin/.idx pair) and its weight in the blend."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: list[Source] = field(default_factory=list)
    valid: list[Source] = field(default_factory=list)  # empty: the last valid_fraction of train's documents
    valid_fraction: float = 0.0
    tokenizer: str | None = None
    seq_length: int = 2048
    global_batch_size: int = 1  # sequences a step, over all replicas


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0  # steps; 0: only at the end
    batches: int = 8  # global batches of held-out text


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0  # steps; 0: only at the end
    keep: int = 2
    resume: str = "auto"  # auto: the newest whole one in the run's folder | never | a checkpoint's folder


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = "runs/default"
    steps: int = 100
    seed: int = 0
    dtype: str = "fp32"  # fp32 | bf16
    device: str = "auto"  # auto | cpu | cuda
    timeout_seconds: float = 600.0  # a rank that waits longer for another ends the job
    log_every: int = 1  # steps between progress lines; metrics.jsonl has every step


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
    run: RunConfig = RunConfig()
    deepspeed: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's own keys, passed through

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.parallel.tp, pp=self.parallel.pp, dp=self.parallel.dp or 1)

    @property
    def microbatch_size(self) -> int:
        """Sequences that one replica puts through the stages at a time."""
        return self.data.global_batch_size // (self.layout.dp * self.pipeline.num_microbatches)

    @property
    def pattern(self) -> Pattern:
        if self.depth.router == "none":
            return none_pattern(self.model.num_layers)
        if isinstance(self.depth.pattern, dict):
            name = self.depth.pattern_name or "edges"
            pattern = pattern_of_edges(self.depth.pattern, self.model.num_layers, name)
        else:
            pattern = parse_pattern(self.depth.pattern, self.model.num_layers, self.stages)
        return dataclasses.replace(pattern, routing=self.depth.routing)

    def at_step(self, step: int) -> Config:
        """The config after `step` updates, with the pattern that `depth.switch_at` says for the next one."""
        due = [switch for switch in self.depth.switch_at if switch <= step]
        return self.with_pattern(self.depth.switch_at[max(due)]) if due else self

    def with_pattern(self, pattern: str | dict[int, list[int]], name: str | None = None) -> Config:
        return dataclasses.replace(self, depth=dataclasses.replace(self.depth, pattern=pattern, pattern_name=name))

    @property
    def stages(self) -> tuple[range, ...]:
        """The layers of each stage."""
        return plan_partition(self.model.num_layers, self.parallel.pp, self.pipeline.partition)

    @property
    def partial_sum_dtype(self) -> str:
        return self.run.dtype if self.depth.partial_sum_dtype == "bundle" else self.depth.partial_sum_dtype

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 1)

    @property
    def tokens_per_step(self) -> int:
        return self.data.global_batch_size * self.data.seq_length


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML). Does not `check_config`.

    Raises: ConfigError.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}; give the path of a YAML file") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: must hold sections such as `model:` and `run:`")
    return parse_config(tree, overrides)


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build the dataclasses from nested mappings. Raises: ConfigError."""
    tree = {name: dict(section) if isinstance(section, Mapping) else section for name, section in tree.items()}
    for override in overrides:
        _apply_override(tree, override)
    return _build(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to the same `Config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def with_dp(config: Config, dp: int) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=dp))


# ---- reading


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: {one_line(error)}") from None
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = {}
        elif not isinstance(child, Mapping):
            raise ConfigError(f"override {key}: {section} is not a section")
        node[section] = dict(child)
        node = node[section]
    node[name] = value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: must be a section with keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{prefix}{name}: unknown key{_nearest(str(name), fields)}")
    missing = [
        name
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: missing; add it")
    return cls(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, f"{key}.")
    if hint == list[Source]:
        return [_source(item, f"{key}[{index}]") for index, item in enumerate(_as_list(value))]
    converted = _convert_any(_options(hint), value)
    if converted is _MISMATCH:
        raise ConfigError(f"{key}: {value!r} is not {' or '.join(map(_type_name, _options(hint)))}")
    return converted


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _convert_any(options: tuple[Any, ...], value: Any) -> Any:
    """`value` as the first of `options` that fits, or _MISMATCH."""
    converted = (_convert_plain(option, value) for option in options)
    return next((result for result in converted if result is not _MISMATCH), _MISMATCH)


_MISMATCH = object()


def _convert_plain(option: Any, value: Any) -> Any:
    """`value` as `option`, or _MISMATCH. YAML reads 1e-3 as text, so numbers are tried for text as well."""
    if option is type(None):
        return None if value is None else _MISMATCH
    if option is bool or isinstance(value, bool):
        return value if option is bool and isinstance(value, bool) else _MISMATCH
    if option is float:
        try:
            return float(value) if isinstance(value, (int, float, str)) else _MISMATCH
        except ValueError:
            return _MISMATCH
    if typing.get_origin(option) is list:
        (item_type,) = typing.get_args(option)
        items = [_convert_plain(item_type, item) for item in value] if isinstance(value, (list, tuple)) else [_MISMATCH]
        return _MISMATCH if any(item is _MISMATCH for item in items) else items
    if typing.get_origin(option) is dict:
        return _convert_mapping(typing.get_args(option), value)
    return value if isinstance(value, option) else _MISMATCH


def _convert_mapping(types_: tuple[Any, Any], value: Any) -> Any:
    """A mapping whose keys and values fit; JSON makes text of whole-number keys, so these are turned back."""
    if value is None or not isinstance(value, Mapping):
        return {} if value is None else _MISMATCH
    key_type, value_type = types_
    if key_type is int:
        value = {int(key) if str(key).isdigit() else key: item for key, item in value.items()}
    if value_type is Any:
        return dict(value)
    items = {key: _convert_any(_options(value_type), item) for key, item in value.items()}
    fits = all(isinstance(key, key_type) for key in items) and not any(item is _MISMATCH for item in items.values())
    return items if fits else _MISMATCH


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is not None:
        return str(option)
    return {
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "bool": "true or false",
        "NoneType": "null",
    }.get(option.__name__, option.__name__)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _source(item: Any, key: str) -> Source:
    if isinstance(item, str):
        return Source(path=item)
    return _build(Source, item, f"{key}.")


# ---- checking


def check_config(config: Config, world_size: int | None = None) -> Config:
    """Refuse what cannot run, and settle `parallel.dp` from `world_size` (None: started alone).

    Raises: ConfigError, LayoutError, PlanError; each names the key and the mend.
    """
    _check_model(config.model)
    _check_choices(config)
    _check_depth(config.depth)
    _check_numbers(config)
    config = _settle_dp(config, world_size)
    _check_tensor_parallel(config)
    _ = config.stages  # raises on its own keys
    _check_switches(config)
    _check_batch(config)
    _check_deepspeed(config)
    return config


def _require(holds: bool, message: str, error: type[ConfigError] = ConfigError) -> None:
    if not holds:
        raise error(message)


def _check_model(model: ModelConfig) -> None:
    for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "vocab_size", "kv_heads"):
        shown = "num_kv_heads" if name == "kv_heads" else name
        _require(getattr(model, name) >= 1, f"model.{shown}: {getattr(model, name)} must be at least 1")
    _require(
        model.hidden_size % (2 * model.num_heads) == 0,
        f"model.hidden_size: {model.hidden_size} must be a multiple of 2 * model.num_heads={2 * model.num_heads} (RoPE turns pairs)",
    )
    _require(
        model.num_heads % model.kv_heads == 0,
        f"model.num_kv_heads: {model.kv_heads} must divide model.num_heads={model.num_heads}",
    )


_CHOICES = {
    "depth.router": ("static", "dynamic", "none"),
    "depth.entry": ("kv", "hidden"),
    "depth.policy": ("least", "relay"),
    "depth.partial_sum_dtype": ("bundle", "fp32"),
    "parallel.recompute": ("none", "layer"),
    "pipeline.schedule": SCHEDULE_NAMES,
    "optim.lr_schedule": ("cosine", "constant"),
    "run.dtype": ("fp32", "bf16"),
    "run.device": ("auto", "cpu", "cuda"),
}


def _lookup(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_choices(config: Config) -> None:
    for key, known in _CHOICES.items():
        value = _lookup(config, key)
        _require(value in known, f"{key}: {value!r} is unknown; use {' or '.join(known)}")
    _require(config.parallel.virtual_stages == 1, "parallel.virtual_stages: only 1 is supported; set it to 1")


def _check_depth(depth: DepthConfig) -> None:
    if depth.router != "dynamic":
        return
    _require(
        depth.entry == "hidden",
        f"depth.router: dynamic with depth.entry={depth.entry}; set depth.entry=hidden, or depth.router=static",
    )
    for key, pattern in (("pattern", depth.pattern), *((f"switch_at.{at}", p) for at, p in depth.switch_at.items())):
        _require(
            not str(pattern).startswith("top_p"),
            f"depth.{key}: {pattern} with depth.router=dynamic, whose weights are different for each token; use another pattern",
        )


_AT_LEAST = {
    "parallel.tp": 1, "parallel.pp": 1, "pipeline.num_microbatches": 1, "data.seq_length": 1,
    "data.global_batch_size": 1, "run.steps": 1, "run.seed": 0, "run.log_every": 1, "run.timeout_seconds": 1,
    "optim.lr": 0, "optim.router_lr": 0, "optim.eps": 0, "optim.weight_decay": 0, "optim.max_grad_norm": 0,
    "optim.warmup_steps": 0, "optim.min_lr_ratio": 0, "eval.every": 0, "eval.batches": 1,
    "checkpoint.every": 0, "checkpoint.keep": 1,
}  # fmt: skip


def _check_numbers(config: Config) -> None:
    for key, least in _AT_LEAST.items():
        value = _lookup(config, key)
        _require(value >= least, f"{key}: {value} must be at least {least}")
    betas = config.optim.betas
    _require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas), f"optim.betas: {betas} must be two numbers in [0, 1)"
    )
    fraction = config.data.valid_fraction
    _require(0 <= fraction < 1, f"data.valid_fraction: {fraction} must lie in [0, 1)")
    for source in (*config.data.train, *config.data.valid):
        _require(source.weight > 0, f"data: weight {source.weight} of {source.path} must be above 0")


def _settle_dp(config: Config, world_size: int | None) -> Config:
    tp, pp, dp = config.parallel.tp, config.parallel.pp, config.parallel.dp
    _require(dp is None or dp >= 1, f"parallel.dp: {dp} must be at least 1, or null for all that the ranks allow")
    if world_size is None:
        return with_dp(config, dp or 1)
    if dp is None:
        dp = world_size // (tp * pp)
    _require(
        dp >= 1 and tp * pp * dp == world_size,
        f"parallel: tp={tp} x pp={pp} x dp={max(dp, 1)} needs {tp * pp * max(dp, 1)} ranks, {world_size} were started; "
        "change parallel.tp, parallel.pp or parallel.dp, or the number of ranks",
        LayoutError,
    )
    return with_dp(config, dp)


def _check_tensor_parallel(config: Config) -> None:
    model, tp = config.model, config.parallel.tp
    for key, size in (
        ("num_kv_heads", model.kv_heads),
        ("num_heads", model.num_heads),
        ("intermediate_size", model.intermediate_size),
    ):
        _require(
            size % tp == 0, f"parallel.tp: {tp} does not divide model.{key}={size}; change one of them", LayoutError
        )
    _require(
        tp > 1 or not config.parallel.sequence_parallel,
        "parallel.sequence_parallel: needs parallel.tp above 1; set it to false",
        LayoutError,
    )


def _check_switches(config: Config) -> None:
    for step in config.depth.switch_at:
        _require(
            isinstance(step, int) and 0 < step < config.run.steps,
            f"depth.switch_at: {step!r} must be a number of updates below run.steps={config.run.steps}",
        )


def _check_batch(config: Config) -> None:
    dp, microbatches, batch = config.layout.dp, config.pipeline.num_microbatches, config.data.global_batch_size
    _require(
        batch % (dp * microbatches) == 0,
        f"data.global_batch_size: {batch} must be a multiple of parallel.dp={dp} x pipeline.num_microbatches={microbatches}",
    )


# DeepSpeed keys that follow from this project's own; each with the key that sets it.
_OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.global_batch_size and pipeline.num_microbatches",
    "gradient_accumulation_steps": "pipeline.num_microbatches",
    "managed_gradient_accumulation": "pipeline.num_microbatches",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.lr_schedule",
    "fp16": "run.dtype",
    "bf16": "run.dtype",
    "bfloat16": "run.dtype",
    "amp": "run.dtype",
    "torch_autocast": "run.dtype",
    "data_types": "run.dtype",
    "pipeline": "pipeline",
    "tensor_parallel": "parallel.tp",
    "activation_checkpointing": "parallel.recompute",
    "tensorboard": "run.dir",
}


def _check_deepspeed(config: Config) -> None:
    for key, owner in _OWNED_DEEPSPEED_KEYS.items():
        _require(key not in config.deepspeed, f"deepspeed.{key}: is set from {owner}; remove it and set that")
    zero = config.deepspeed.get("zero_optimization", {})
    _require(isinstance(zero, dict), "deepspeed.zero_optimization: must be a section, such as {stage: 1}")
    stage = config.zero_stage
    highest = 1 if config.parallel.pp > 1 else 3
    _require(
        isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage <= highest,
        f"deepspeed.zero_optimization.stage: {stage!r} with parallel.pp={config.parallel.pp}; use 0 to {highest}"
        + (" (2 and 3 need parallel.pp=1)" if highest == 1 else ""),
    )
    _require(
        stage < 3 or config.pipeline.schedule != "gpipe" or config.pipeline.num_microbatches == 1,
        "pipeline.schedule: gpipe under ZeRO 3 would keep the last microbatch's gradient only; use 1f1b",
    )
