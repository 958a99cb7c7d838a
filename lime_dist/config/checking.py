"""What cannot run is refused here, across fields, by a line that names the key and the fix."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Collection, Iterator
from typing import Any

from lime_dist.config.deepspeed_keys import (
    DEEPSPEED_VERSION,
    LOG_LEVELS,
    OWNED,
    PASSED_ON,
    ZERO,
    ZERO_BOOLEANS,
    ZERO_OWNED,
    ZERO_SECTIONS,
    ZERO_WHOLE_NUMBERS,
)
from lime_dist.config.ranges import MAX_MICROBATCHES, MAX_WORLD_SIZE, RANGES, numbers_of
from lime_dist.config.reading import nearest, shown_key
from lime_dist.config.schema import Config, DepthConfig, ModelConfig
from lime_dist.depth.key_value import ROUTER_INITS
from lime_dist.depth.kinds import OPTIONS, ROUTINGS, entries_with, options_of, routers_of
from lime_dist.errors import ConfigError, LayoutError, shown
from lime_dist.plan.schedule import SCHEDULE_NAMES, check_schedule


def check_config(config: Config, world_size: int | None = None) -> Config:
    """Refuse what cannot run, and settle `parallel.dp` from `world_size` (None: started alone).

    Raises: ConfigError, LayoutError, PlanError; each names the key and the fix.
    """
    _check_texts(config)
    _check_numbers(config)
    _check_model(config.model)
    _check_choices(config)
    _check_depth(config.depth)
    config = _settle_dp(config, world_size)
    _check_tensor_parallel(config)
    _ = config.chunks  # raises on its own keys
    _check_batch(config)
    _check_pipeline(config)
    _check_switches(config)
    _check_spikes(config)
    _check_profile(config)
    _check_deepspeed(config)
    _check_deepspeed_reports(config)
    return config


def find_warnings(config: Config) -> list[str]:
    """What trains, but hardly as it is meant: a line each."""
    warmup, steps, profiled = config.optim.warmup_steps, config.run.steps, config.profile.steps
    warnings = []
    if warmup >= steps and warmup > 0:
        warnings += [f"optim.warmup_steps: {warmup} is not below run.steps={steps}: the whole run is warm-up; lower it"]
    if profiled is not None and profiled[-1] > steps:
        warnings += [
            f"profile.steps: {profiled} ends after the last step (run.steps={steps}), so that there will be no profile; choose earlier steps"
        ]
    if profiled is None and config.profile.kernels:
        warnings += [
            "profile.kernels: has no effect without profile.steps, as no step is recorded; set profile.steps=[FIRST, LAST], or "
            "remove it"
        ]
    if (rule := next(_unused_rules(config), None)) is not None:
        warnings += [
            f"spikes.{rule}: has no effect before half of spikes.window={config.spikes.window} steps, and run.steps={steps}; lower "
            "spikes.window"
        ]
    if (reason := _no_router_maps(config)) is not None:
        warnings += [f"analysis.every: has no effect {reason}; set it to 0"]
    warnings += [
        f"depth.{key}: has no effect with depth.router=none; leave it out"
        for key in (*OPTIONS, "switch_at")
        if config.depth.router == "none" and getattr(config.depth, key) != getattr(DepthConfig(), key)
    ]
    return warnings


def _unused_rules(config: Config) -> Iterator[str]:
    if config.spikes.window // 2 >= config.run.steps:
        yield from (key for key in ("loss_sigma", "grad_norm_sigma") if getattr(config.spikes, key) is not None)


def _no_router_maps(config: Config) -> str | None:
    """Why `analysis.every` asks for maps that there will not be."""
    depth, every = config.depth, config.analysis.every
    if not every:
        return None
    if depth.router == "none":
        return "with depth.router=none, as there are no routers"
    if not depth.routing.ranks_edges:
        return f"with depth.router={depth.router}, as only static routers are learned and the same for all tokens (see `lime-dist analyze`)"
    return f"above run.steps={config.run.steps}" if every > config.run.steps else None


def _require(holds: bool, message: str, error: type[ConfigError] = ConfigError) -> None:
    if not holds:
        raise error(message)


MAX_PROFILED_STEPS = 1000  # a rank keeps what it records in memory until the last
MAX_TEXT = 1000  # letters; a path has fewer


def _check_texts(config: Config) -> None:
    for key, text in _texts(dataclasses.asdict(config), ""):
        _require(len(text) <= MAX_TEXT, f"{key}: {shown(text)} has {len(text)} letters; use at most {MAX_TEXT}")
        bad = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
        _require(bad is None, f"{key}: {shown(text)} holds the control character {bad!r}; remove it")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text below `value` with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{shown_key(name)}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{key}[{index}]")


def _check_model(model: ModelConfig) -> None:
    _require(
        model.hidden_size % (2 * model.num_heads) == 0,
        f"model.hidden_size: {model.hidden_size} must be a multiple of 2 * model.num_heads={2 * model.num_heads} (RoPE turns pairs)",
    )
    _require(
        model.num_heads % model.kv_heads == 0,
        f"model.num_kv_heads: {model.kv_heads} must divide model.num_heads={model.num_heads}",
    )


_CHOICES = {
    "checkpoint.on_full_disk": ("stop", "go_on"),
    "depth.policy": ("least", "relay"),
    "depth.router_init": ROUTER_INITS,
    "depth.heads": ("all", "same"),
    "depth.partial_sum_dtype": ("bundle", "fp32"),
    "parallel.recompute": ("none", "layer"),
    "pipeline.schedule": SCHEDULE_NAMES,
    "optim.lr_schedule": ("cosine", "linear", "constant", "wsd"),
    "data.samples": ("stream", "padded", "packed"),
    "run.dtype": ("fp32", "bf16"),
    "run.device": ("auto", "cpu", "cuda"),
}


def _lookup(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_choices(config: Config) -> None:
    of_depth = {"depth.router": (*routers_of(), "none"), "depth.entry": entries_with()}
    for key, known in (of_depth | _CHOICES).items():
        value = _lookup(config, key)
        _require(value in known, f"{key}: {shown(value)} is unknown; use {' or '.join(known)}")


def _check_depth(depth: DepthConfig) -> None:
    if depth.router == "none":
        return
    entries, routers = " or ".join(entries_with(depth.router)), " or ".join(routers_of(depth.entry))
    _require(
        (depth.entry, depth.router) in ROUTINGS,
        f"depth.router: {depth.router} with depth.entry={depth.entry}; set depth.entry={entries}, or depth.router={routers}",
    )
    _check_options(depth)
    if depth.routing.ranks_edges:
        return
    _require_ranked(depth, "pattern", depth.pattern, "top_p")
    for step, pattern in depth.switch_at.items():
        _require_ranked(
            depth, f"switch_at.{step}", pattern, "top_p", "budget"
        )  # a new run's budget goes without weights


def _require_ranked(depth: DepthConfig, key: str, pattern: str | dict[int, list[int]], *by_weights: str) -> None:
    _require(
        not str(pattern).startswith(by_weights),
        f"depth.{key}: {pattern} with depth.router={depth.router}, whose weights cannot rank edges; use another pattern",
    )


def _check_options(depth: DepthConfig) -> None:
    for key in OPTIONS:
        given, fits = getattr(depth, key), " or ".join(_kinds_with(key))
        _require(
            given == getattr(DepthConfig(), key) or key in options_of(ROUTINGS[depth.entry, depth.router]),
            f"depth.{key}: {shown(given)} needs {fits}; set those, or leave it out",
        )


def _kinds_with(option: str) -> list[str]:
    return [
        f"depth.entry={entry} depth.router={router}"
        for (entry, router), kind in ROUTINGS.items()
        if option in options_of(kind)
    ]


def _check_numbers(config: Config) -> None:
    for key, allowed in RANGES.items():
        if key.endswith(".weight"):
            continue
        for number in numbers_of(_lookup(config, key)):
            problem = allowed.problem(number)
            _require(problem is None, f"{key}: {problem}")
    for section in ("train", "valid"):
        for index, source in enumerate(getattr(config.data, section)):
            problem = RANGES[f"data.{section}.weight"].problem(source.weight)
            _require(problem is None, f"data.{section}[{index}].weight: {problem}")
    _require(len(config.optim.betas) == 2, f"optim.betas: {shown(config.optim.betas)} must be two numbers in [0, 1)")
    fraction = config.data.valid_fraction
    _require(
        not (fraction and config.data.valid),
        "data.valid_fraction: has no effect beside data.valid; remove one of them (data.valid= on the command line)",
    )


def _settle_dp(config: Config, world_size: int | None) -> Config:
    tp, pp, dp = config.parallel.tp, config.parallel.pp, config.parallel.dp
    if world_size is None:
        ranks = tp * pp * (dp or 1)
        _require(ranks <= MAX_WORLD_SIZE, f"parallel: {ranks} ranks; at most {MAX_WORLD_SIZE} are planned", LayoutError)
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


def _check_pipeline(config: Config) -> None:
    parallel, pipeline = config.parallel, config.pipeline
    _require(
        parallel.virtual_stages == 1 or parallel.pp > 1,
        f"parallel.virtual_stages: {parallel.virtual_stages} with parallel.pp=1; set it to 1, or parallel.pp to 2 or more",
        LayoutError,
    )
    _require(
        pipeline.warmup == "auto" or not isinstance(pipeline.warmup, str),
        f"pipeline.warmup: {shown(pipeline.warmup)} is unknown; use auto or a number of forwards",
    )
    _require(
        config.run.memory is None or bool(config.run.memory_bytes),
        f"run.memory: {shown(config.run.memory)} is no size; write 70GiB",
    )
    _require(
        pipeline.min_message_bytes is not None,
        f"pipeline.min_message: {shown(pipeline.min_message)} is no size; write 256KiB",
    )
    try:
        check_schedule(
            pipeline.schedule,
            num_stages=parallel.pp,
            num_microbatches=config.num_microbatches,
            virtual_stages=parallel.virtual_stages,
            warmup=pipeline.warmup if isinstance(pipeline.warmup, int) else None,
        )
    except ConfigError as error:
        if pipeline.num_microbatches is not None:
            raise
        raise type(error)(_of_microbatch_size(str(error), config)) from None


def _of_microbatch_size(message: str, config: Config) -> str:
    """A message on a number of microbatches that nobody set, but the size of one."""
    key, number = f"pipeline.num_microbatches: {config.num_microbatches} ", config.num_microbatches
    if config.data.micro_batch_size is None or not message.startswith(key):
        return message
    message = message.removeprefix(key).replace("; use ", "; make ")
    return f"data.micro_batch_size: {config.data.micro_batch_size} makes {number} microbatches, which {message}"


def _check_switches(config: Config) -> None:
    for step in config.depth.switch_at:
        _require(
            0 < step < config.run.steps,
            f"depth.switch_at: {step} must be a number of updates, at least 1 and below run.steps={config.run.steps}",
        )


def _check_profile(config: Config) -> None:
    steps = config.profile.steps
    if steps is None:
        return
    _require(
        len(steps) == 2 and steps[0] <= steps[1] < steps[0] + MAX_PROFILED_STEPS,
        f"profile.steps: {shown(steps)} must be the first and the last of at most {MAX_PROFILED_STEPS} steps, such as [10, 19]",
    )
    switch = next((step for step in config.depth.switch_at if steps[0] <= step < steps[1]), None)
    _require(
        switch is None,
        f"profile.steps: {steps} holds the switch of patterns at step {switch} (depth.switch_at); end before it or begin behind it",
    )


def _check_batch(config: Config) -> None:
    """The batch is cut evenly, by replicas and by `data.micro_batch_size` or else by `pipeline.num_microbatches`."""
    dp, batch, size, number = (
        config.layout.dp, config.data.global_batch_size, config.data.micro_batch_size, config.pipeline.num_microbatches,
    )  # fmt: skip
    key, unit = ("pipeline.num_microbatches", number or 1) if size is None else ("data.micro_batch_size", size)
    below = batch // (dp * unit) * dp * unit
    near = f"{below} or {below + dp * unit}" if below else str(dp * unit)
    _require(
        below == batch,
        f"data.global_batch_size: {batch} must be a multiple of parallel.dp={dp} x {key}={unit}; use {near}",
    )
    if size is None:
        return
    makes = batch // (dp * size)
    _require(
        number in (None, makes),
        f"pipeline.num_microbatches: {number}, but data.micro_batch_size={size} makes {makes} with data.global_batch_size={batch} "
        f"and parallel.dp={dp}; leave it out, or set data.micro_batch_size=null",
    )
    _require(
        makes <= MAX_MICROBATCHES,
        f"data.micro_batch_size: {size} makes {makes} microbatches; at most {MAX_MICROBATCHES} are planned, so raise it",
    )


def _check_spikes(config: Config) -> None:
    spikes = config.spikes
    _require(
        spikes.max_skips < spikes.window,
        f"spikes.max_skips: {spikes.max_skips} must be below spikes.window={spikes.window}, within which skipped steps are counted",
    )
    _require(
        not spikes.max_returns or config.checkpoint.every > 0,
        f"spikes.max_returns: {spikes.max_returns} with checkpoint.every=0, so that there is nothing to go back to; set "
        "checkpoint.every, or spikes.max_returns=0",
    )
    zenflow = config.deepspeed.get("zero_optimization", {})
    zenflow = zenflow.get("zenflow") if isinstance(zenflow, dict) else None
    _require(
        not (zenflow and (spikes.max_skips or spikes.max_returns)),
        "spikes.max_skips: ZenFlow updates some weights while the step is made, so that none can be skipped; remove "
        "deepspeed.zero_optimization.zenflow, or set spikes.max_skips=0 and spikes.max_returns=0",
    )


def _check_deepspeed(config: Config) -> None:
    for key in config.deepspeed:
        owner = OWNED.get(key)
        _require(owner is None, f"deepspeed.{key}: is set from {owner}; remove it and set that")
        _require(key in PASSED_ON, _unknown("deepspeed", key, PASSED_ON))
    zero = config.deepspeed.get("zero_optimization", {})
    _require(isinstance(zero, dict), "deepspeed.zero_optimization: must be a section, such as {stage: 1}")
    for key, value in zero.items():
        owner = ZERO_OWNED.get(key)
        _require(owner is None, f"deepspeed.zero_optimization.{key}: is set from {owner}; remove it and set that")
        _require(key in ZERO, _unknown("deepspeed.zero_optimization", key, ZERO))
        wanted = _wanted_by_zero(key, value)
        _require(wanted is None, f"deepspeed.zero_optimization.{key}: {shown(value)} must be {wanted}")
    stage = config.zero_stage
    highest = 1 if config.parallel.pp > 1 else 3
    _require(
        isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage <= highest,
        f"deepspeed.zero_optimization.stage: {shown(stage)} with parallel.pp={config.parallel.pp}; use 0 to {highest}"
        + (" (2 and 3 need parallel.pp=1)" if highest == 1 else ""),
    )
    _require(
        stage < 3 or config.pipeline.schedule != "gpipe" or config.num_microbatches == 1,
        "pipeline.schedule: gpipe under ZeRO 3 would keep the last microbatch's gradient only; use 1f1b",
    )


def _check_deepspeed_reports(config: Config) -> None:
    """Of what DeepSpeed would say of a run."""
    for key in ("comms_logger", "flops_profiler"):
        section = config.deepspeed.get(key, {})
        _require(
            isinstance(section, dict),
            f"deepspeed.{key}: {shown(section)} must be a section, such as {{enabled: true}}",
        )
    level = config.deepspeed.get("log_level", LOG_LEVELS[0])
    _require(level in LOG_LEVELS, f"deepspeed.log_level: {shown(level)} is unknown; use {' or '.join(LOG_LEVELS)}")
    _require(
        config.zero_stage >= 2 or not config.deepspeed.get("flops_profiler", {}).get("enabled"),
        f"deepspeed.flops_profiler: fails under ZeRO {config.zero_stage}, where DeepSpeed sees no backward pass; remove it, as "
        "`lime-dist plan` and metrics.jsonl have the FLOPs, or set deepspeed.zero_optimization.stage=2 (with parallel.pp=1)",
    )


def _unknown(section: str, key: Any, known: Collection[str]) -> str:
    return (
        f"{section}.{shown_key(key)}: DeepSpeed {DEEPSPEED_VERSION} has no such key{nearest(str(key), sorted(known))}"
    )


def _wanted_by_zero(key: str, value: Any) -> str | None:
    """What `key` takes, where `value` is not that."""
    if key in ZERO_BOOLEANS:
        return None if isinstance(value, bool) else "true or false"
    if key in ZERO_WHOLE_NUMBERS:
        lowest = int(key == "reduce_bucket_size")
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
        return None if fits else f"a whole number of at least {lowest}, such as 500000000"
    if key in ZERO_SECTIONS:
        return None if isinstance(value, dict) else "a section with keys"
    return None


def _with_dp(config: Config, dp: int) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=dp))
