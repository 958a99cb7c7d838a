"""What cannot run is refused here, across fields, by a line that names the key and the mend."""

from __future__ import annotations

import dataclasses
from typing import Any

from lime_dist.config.schema import Config, DepthConfig, ModelConfig
from lime_dist.errors import ConfigError, LayoutError
from lime_dist.pipeline.schedule import SCHEDULE_NAMES


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
    _require(
        not (fraction and config.data.valid),
        "data.valid_fraction: has no effect beside data.valid; remove one of them (data.valid= on the command line)",
    )
    for source in (*config.data.train, *config.data.valid):
        _require(source.weight > 0, f"data: weight {source.weight} of {source.path} must be above 0")


def _settle_dp(config: Config, world_size: int | None) -> Config:
    tp, pp, dp = config.parallel.tp, config.parallel.pp, config.parallel.dp
    _require(dp is None or dp >= 1, f"parallel.dp: {dp} must be at least 1, or null for all that the ranks allow")
    if world_size is None:
        return _with_dp(config, dp or 1)
    if dp is None:
        dp = world_size // (tp * pp)
    _require(
        dp >= 1 and tp * pp * dp == world_size,
        f"parallel: tp={tp} x pp={pp} x dp={max(dp, 1)} needs {tp * pp * max(dp, 1)} ranks, {world_size} were started; "
        "change parallel.tp, parallel.pp or parallel.dp, or the number of ranks",
        LayoutError,
    )
    return _with_dp(config, dp)


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


def _with_dp(config: Config, dp: int) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=dp))
