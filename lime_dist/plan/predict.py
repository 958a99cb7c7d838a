"""Step times of a run and of the same run with other settings, simulated, before any rank starts. Pure data.

A setting is what a user can paste: overrides of the config. Those of depth (`depth.pattern`, `depth.router`) change the model;
the others change only how it is trained, but for a pattern that is chosen by stages or bytes, which is another on other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

from lime_dist.config import Config, check_config, parse_config
from lime_dist.config.reading import to_dict
from lime_dist.errors import ConfigError, LayoutError
from lime_dist.formats import format_bytes
from lime_dist.plan.costs import Rates, costs_of, pass_seconds
from lime_dist.plan.flops import ChunkFlops, chunk_flops
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.schedule import Kind
from lime_dist.plan.shape import BundleShape, plan_shape
from lime_dist.plan.simulate import Simulated, simulate_long
from lime_dist.plan.stages import plan_transfer_of
from lime_dist.plan.table import MAX_WIDTH, align_columns
from lime_dist.plan.transfer import ChunkTransfer

# arXiv 2502.09245v2, 150M parameters: validation perplexity over that of the full pattern, in per cent.
PERPLEXITY = {
    "none": 3.36,
    "last:2": 2.22,
    "last:4": 1.51,
    "last:6": 1.31,
    "first:2": 0.30,
    "first:4": 0.20,
    "first:6": 0.40,
    "full": 0.0,
}
QUALITY_NOTE = (
    "quality: perplexity over the full pattern's in the paper (arXiv 2502.09245, 150M parameters), whose last j may count the "
    "layer's own entry; last:j here reads j earlier ones"
)
HEAD = ("setting", "step", "against today", "bubble", "exposed", "memory/rank", "quality")
PATTERNS = ("first:2", "first:4", "last:4", "within_stage+first:2", "block:4")
SHOWN = 8  # of the other settings, the fastest
WORTH_IT = 0.01  # of a step: less is not advised
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """changes: of a config, value by key. keeps_model: whether the same model is trained."""

    changes: Mapping[str, str]
    keeps_model: bool = True

    def __str__(self) -> str:
        return " ".join(f"'{key}={value}'" if "[" in value else f"{key}={value}" for key, value in self.changes.items())

    def of(self, config: Config) -> Config:
        """Raises: ConfigError where it does not fit."""
        overrides = [f"{key}={value}" for key, value in self.changes.items()]
        if "depth.pattern" in self.changes:
            overrides.append("depth.pattern_name=null")
        return check_config(parse_config(to_dict(config), overrides))

    def and_then(self, other: Setting) -> Setting:
        return Setting(changes={**self.changes, **other.changes}, keeps_model=self.keeps_model and other.keeps_model)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """memory_bytes: of the fullest rank. fits: `run.memory`, if that is set."""

    setting: Setting
    plan: RunPlan
    simulated: Simulated
    fits: bool

    @property
    def step_seconds(self) -> float:
        return self.simulated.step_seconds

    @property
    def memory_bytes(self) -> int:
        return max(memory.total_bytes for memory in self.plan.memory)

    @property
    def perplexity(self) -> float | None:
        """Per cent over the full pattern's; None where the paper has no such pattern."""
        depth = self.plan.config.depth
        return PERPLEXITY.get("none" if depth.router == "none" else depth.name)

    def against(self, other: Prediction) -> float:
        """How much longer the step is, as a share."""
        return self.step_seconds / other.step_seconds - 1


def plan_unlimited(config: Config) -> RunPlan:
    """Whether or not it fits `run.memory`, which `pipeline.warmup=auto` still minds where it can."""
    try:
        return plan_run(config)
    except LayoutError:
        return plan_run(without_limit(config))


def without_limit(config: Config) -> Config:
    return replace(config, run=replace(config.run, memory=None))


def predict(config: Config, rates: Rates, setting: Setting) -> Prediction:
    """Of a checked config. Raises: ConfigError where the setting does not fit it."""
    plan, limit = plan_unlimited(setting.of(config)), config.run.memory_bytes
    fits = limit is None or all(memory.total_bytes <= limit for memory in plan.memory)
    return predict_plan(plan, rates, setting, fits=fits)


def predict_plan(plan: RunPlan, rates: Rates, setting: Setting, *, fits: bool) -> Prediction:
    return Prediction(setting=setting, plan=plan, simulated=simulate_long(plan, costs_of(plan, rates)), fits=fits)


# ---- other settings


def options(config: Config, rates: Rates) -> Iterator[tuple[str, Setting]]:
    """Single changes of a checked config, each with the name of what it is about; some may not fit it."""
    depth, pipeline, parallel = config.depth, config.pipeline, config.parallel
    if depth.router != "none":
        others = [pattern for pattern in PATTERNS if pattern != depth.name]
        yield from (("depth", Setting(changes={"depth.pattern": one}, keeps_model=False)) for one in others)
        yield "depth", Setting(changes={"depth.router": "none"}, keeps_model=False)
    for number in _microbatch_numbers(config):
        yield "microbatches", Setting(changes=microbatches(config, number, config.layout.dp))
    if parallel.pp == 1:
        return
    if depth.router != "none":
        yield "policy", Setting(changes={"depth.policy": "relay" if depth.policy == "least" else "least"})
    yield from _warmups(config)
    for virtual_stages in {1, 2, 4} - {parallel.virtual_stages}:
        changes = {"parallel.virtual_stages": str(virtual_stages)} | _reset(config, partition=True)
        yield "virtual stages", Setting(changes=changes, keeps_model=not depth.is_chosen)
    schedule = "gpipe" if pipeline.schedule == "1f1b" else "1f1b"
    yield "schedule", Setting(changes={"pipeline.schedule": schedule} | _reset(config))
    yield from _partitions(config, rates)


def microbatches(config: Config, number: int, dp: int) -> dict[str, str]:
    """Changes with which each of `dp` replicas has `number` of them, by the key that `config` says it with."""
    if config.data.micro_batch_size is None:
        return {"pipeline.num_microbatches": str(number)}
    changes = {"data.micro_batch_size": str(config.data.global_batch_size // (dp * number))}
    return changes if config.pipeline.num_microbatches is None else changes | {"pipeline.num_microbatches": "null"}


def _microbatch_numbers(config: Config) -> Iterator[int]:
    """Half, twice and four times as many, where the batch can be cut so."""
    number, sequences = config.num_microbatches, config.data.global_batch_size // config.layout.dp
    for other in (number // 2, 2 * number, 4 * number):
        if other and sequences % other == 0 and number % 2 * (other < number) == 0:
            yield other


def _warmups(config: Config) -> Iterator[tuple[str, Setting]]:
    if config.pipeline.schedule != "1f1b" or config.parallel.virtual_stages > 1:
        return
    for warmup in ("auto", None):
        if config.pipeline.warmup != warmup:
            yield "warm-up", Setting(changes={"pipeline.warmup": warmup or "null"})


def _reset(config: Config, *, partition: bool = False) -> dict[str, str]:
    """What would not fit another schedule, or other chunks."""
    changes = {} if config.pipeline.warmup is None else {"pipeline.warmup": "null"}
    return changes | ({"pipeline.partition": "auto"} if partition and config.pipeline.partition != "auto" else {})


def _partitions(config: Config, rates: Rates) -> Iterator[tuple[str, Setting]]:
    keeps_model = not config.depth.is_chosen
    if config.pipeline.partition != "auto":
        yield "partition", Setting(changes={"pipeline.partition": "auto"}, keeps_model=keeps_model)
    counts = balanced_counts(config, rates)
    if counts != [len(layers) for layers in config.chunks]:
        text = str(counts).replace(" ", "")
        yield "partition", Setting(changes={"pipeline.partition": text}, keeps_model=keeps_model)


def balanced_counts(config: Config, rates: Rates) -> list[int]:
    """Layers of each chunk, moved one by one from the slowest stage to a faster one as long as that helps."""
    counts = [len(layers) for layers in config.chunks]
    seconds = _stage_seconds(config, rates, counts)
    while True:
        tried = [(one, _stage_seconds(config, rates, one)) for one in _moved(counts, seconds)]
        better = min(tried, key=lambda one: max(one[1]), default=(counts, seconds))
        if max(better[1]) >= max(seconds) * (1 - 1e-9):
            return counts
        counts, seconds = better


def _moved(counts: list[int], seconds: list[float]) -> Iterator[list[int]]:
    """With a layer of the slowest stage's longest chunk on the shortest chunk of one of the fastest three."""
    num_stages = len(seconds)

    def chunks(stage: int) -> range:
        return range(stage, len(counts), num_stages)

    order = sorted(range(num_stages), key=seconds.__getitem__)
    giver = max(chunks(order[-1]), key=counts.__getitem__)
    if counts[giver] == 1:
        return
    for stage in order[:-1][:3]:
        taker = min(chunks(stage), key=counts.__getitem__)
        yield [count - (chunk == giver) + (chunk == taker) for chunk, count in enumerate(counts)]


def _stage_seconds(config: Config, rates: Rates, counts: list[int]) -> list[float]:
    """Of a microbatch forward and backward."""
    config = replace(config, pipeline=replace(config.pipeline, partition=counts))
    transfer, shape = plan_transfer_of(config), plan_shape(config)
    chunks = [_ChunkWork(layers, transfer.chunk(chunk), shape, config) for chunk, layers in enumerate(config.chunks)]
    seconds = [sum(sum(pass_seconds(config, rates, chunk, kind)) for kind in Kind) for chunk in chunks]
    return [sum(seconds[stage :: config.parallel.pp]) for stage in range(config.parallel.pp)]


@dataclass(frozen=True)
class _ChunkWork:
    """Without the messages, which take longest to plan."""

    layers: range
    transfer: ChunkTransfer
    shape: BundleShape
    config: Config

    @property
    def flops(self) -> ChunkFlops:
        return chunk_flops(self.config, self.transfer, self.layers)


# ---- today's and others


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """today: the config as it is. singles: one change each, the fastest first. combination: of changes that keep the model, where
    more than one helps."""

    today: Prediction
    singles: tuple[Prediction, ...]
    combination: Prediction | None

    @property
    def shown(self) -> list[Prediction]:
        more = [] if self.combination is None else [self.combination]
        return [self.today, *self.singles[:SHOWN], *more]

    @property
    def best_of_the_same_model(self) -> Prediction | None:
        """That fits and is worth it."""
        return self._best(lambda one: one.setting.keeps_model)

    @property
    def best_pattern(self) -> Prediction | None:
        """Of those whose loss of quality is known and small."""
        return self._best(lambda one: not one.setting.keeps_model and _is_cheap(one))

    def _best(self, suits: Callable[[Prediction], bool]) -> Prediction | None:
        suiting = [one for one in (*self.singles, self.combination) if one is not None and one.fits and suits(one)]
        best = min(suiting, key=lambda one: one.step_seconds, default=None)
        is_wanted = best is not None and (not self.today.fits or best.against(self.today) <= -WORTH_IT)
        return best if is_wanted else None


def _is_cheap(one: Prediction) -> bool:
    return one.perplexity is not None and one.perplexity < PERPLEXITY["last:6"]


def compare_settings(config: Config, rates: Rates, progress: Progress = lambda text: None) -> Comparison:
    """Of a checked config with its edges."""
    today = predict(config, rates, Setting(changes={}))
    named = [*_predictions(today, config, rates, set(), progress)]
    combination = _combine(today, config, rates, named, progress)
    singles = sorted((one for _, one in named), key=lambda one: one.step_seconds)
    return Comparison(today=today, singles=tuple(singles), combination=combination)


def _predictions(
    start: Prediction, config: Config, rates: Rates, without: set[str], progress: Progress
) -> Iterator[tuple[str, Prediction]]:
    """Of `start` with one more change each, but for those of the names in `without`."""
    for name, option in options(start.plan.config, rates):
        if name in without:
            continue
        progress(f"{option}")
        try:
            yield name, predict(config, rates, start.setting.and_then(option))
        except ConfigError:
            continue  # it does not fit this model and batch


def _combine(
    today: Prediction, config: Config, rates: Rates, named: list[tuple[str, Prediction]], progress: Progress
) -> Prediction | None:
    """One change after another, each time the one with which the step is shortest. Those that hurt alone are not tried."""
    useless = {name for name, _ in named} - {name for name, one in named if _helps(one, today)}
    best, used, candidates = today, useless, named
    while True:
        helpful = [(name, one) for name, one in candidates if one.fits and _helps(one, best)]
        if not helpful:
            return best if len(best.setting.changes) > 1 and len(used - useless) > 1 else None
        name, best = min(helpful, key=lambda one: one[1].step_seconds)
        used = used | {name}
        candidates = [*_predictions(best, config, rates, used, progress)]


def _helps(one: Prediction, start: Prediction) -> bool:
    return one.setting.keeps_model and one.against(start) < -WORTH_IT / 4


# ---- text and JSON


def prediction_report(comparison: Comparison, assumptions: str) -> dict[str, Any]:
    today = comparison.today
    return {
        "assumptions": assumptions,
        "today": _report(today, today),
        "settings": [_report(one, today) for one in comparison.singles],
        "combination": None if comparison.combination is None else _report(comparison.combination, today),
        "first": advice(comparison),
    }


def _report(one: Prediction, today: Prediction) -> dict[str, Any]:
    return {
        "changes": dict(one.setting.changes),
        "step_seconds": one.step_seconds,
        "against_today": one.against(today),
        "bubble_share": one.simulated.bubble_share,
        "exposed_seconds": one.simulated.exposed_seconds,
        "memory_bytes": one.memory_bytes,
        "fits_memory": one.fits,
        "changes_model": not one.setting.keeps_model,
        "perplexity_over_full_percent": one.perplexity,
    }


def prediction_table(comparison: Comparison, assumptions: str) -> str:
    rows = [HEAD, *(_row(one, comparison.today) for one in comparison.shown)]
    width = max(len(row[0]) for row in rows)
    head, *others = [(row[0].ljust(width), *row[1:]) for row in rows]
    notes = (advice(comparison), f"assumed: {assumptions}", QUALITY_NOTE)
    return "\n".join([*align_columns(head, others), "", *map(wrapped, notes)])


def wrapped(note: str) -> str:
    return fill(note, width=MAX_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _row(one: Prediction, today: Prediction) -> tuple[str, ...]:
    return (
        str(one.setting) or "as it is",
        format_seconds(one.step_seconds),
        "" if one is today else f"{one.against(today):+.1%}".replace("%", " %"),
        f"{one.simulated.bubble_share:.1%}".replace("%", " %"),
        f"{one.simulated.exposed_seconds * 1e3:.1f} ms",
        format_bytes(one.memory_bytes) + ("" if one.fits else " (over run.memory)"),
        _quality(one),
    )


def _quality(one: Prediction) -> str:
    if one.setting.keeps_model:
        return "same model"
    known = "not known" if one.perplexity is None else f"+{one.perplexity:.2f} %"
    return f"{known}, changes the model"


def format_seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def advice(comparison: Comparison) -> str:
    """One sentence: what to try first."""
    today, same, pattern = comparison.today, comparison.best_of_the_same_model, comparison.best_pattern
    begin = "" if today.fits else "today's setting is over run.memory; "
    if same is not None:
        return f"{begin}try first: {_gain(same, today)}, and the model stays as it is{_or_else(pattern, same, today)}"
    if pattern is not None:
        nothing = "helps by 1 %" if today.fits else "fits"
        return f"{begin}nothing that keeps the model {nothing}; {_gain(pattern, today)} for {_price(pattern, today)}"
    return "nothing here is 1 % faster and fits: keep today's setting" if today.fits else "nothing here fits run.memory"


def _gain(one: Prediction, today: Prediction) -> str:
    return f"{one.setting} ({one.against(today):+.1%})".replace("%", " %")


def _or_else(pattern: Prediction | None, same: Prediction, today: Prediction) -> str:
    if pattern is None or pattern.against(same) > -WORTH_IT:
        return ""
    return f"; {_gain(pattern, today)} alone is faster, for {_price(pattern, today)}"


def _price(pattern: Prediction, today: Prediction) -> str:
    assert pattern.perplexity is not None
    return f"{pattern.perplexity - (today.perplexity or 0.0):+.2f} % perplexity in the paper"
