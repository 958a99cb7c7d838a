"""The fastest layouts of a number of ranks for a model and its batch. Pure data.

Every layout has a step time that it cannot beat: the products of its slowest stage, the way of the first microbatch to that
stage and of the last one back, and what its links carry. Layouts are simulated in that order until none that is left can be
among the fastest.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import accumulate, product
from typing import Any

from lime_dist.config import Config
from lime_dist.errors import ConfigError, LayoutError
from lime_dist.formats import format_bytes, format_si
from lime_dist.plan.costs import Costs, Rates, costs_of
from lime_dist.plan.flops import BACKWARD_FACTOR, layer_flops_per_token
from lime_dist.plan.partition import plan_partition
from lime_dist.plan.predict import (
    Prediction,
    Progress,
    Setting,
    format_seconds,
    microbatches,
    plan_unlimited,
    predict_plan,
    wrapped,
)
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Kind
from lime_dist.plan.shape import DTYPE_BYTES
from lime_dist.plan.table import align_columns

VIRTUAL_STAGES = (1, 2, 4)
SHOWN = 10
HEAD = ("step", "tokens/s", "of the rate", "bubble", "exposed", "memory/rank", "setting")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """best: those that fit `run.memory`, the fastest first. num_layouts: that the model and its batch allow. num_simulated: of
    those, that could be among the fastest."""

    num_ranks: int
    best: tuple[Prediction, ...]
    num_layouts: int
    num_simulated: int


def sweep(config: Config, rates: Rates, num_ranks: int, progress: Progress = lambda text: None) -> Sweep:
    """Of a checked config with `run.memory`; its model, batch and depth routing stay as they are.

    Raises: ConfigError without that limit, or where no layout is within it.
    """
    limit = config.run.memory_bytes
    if limit is None:
        raise ConfigError("--sweep: needs what a rank may take of its device; set run.memory=70GiB")
    candidates = [_Candidate(sizes) for sizes in _layouts(config, num_ranks, rates.node_size)]
    waiting = [(_bound(config, rates, one.sizes), index, one) for index, one in enumerate(candidates)]
    heapify(waiting)
    best: list[tuple[float, int, Prediction]] = []
    while waiting and (len(best) < SHOWN or waiting[0][0] < best[SHOWN - 1][0]):
        bound, index, one = heappop(waiting)
        progress(f"{one.sizes}: at least {format_seconds(bound)}, {len(waiting)} layouts are left")
        if one.plan is None:
            one.plan = _find_plan(config, one.sizes)
            if one.plan is not None and one.memory_bytes <= limit:
                heappush(waiting, (max(bound, _planned_bound(one.plan, costs_of(one.plan, rates))), index, one))
        else:
            found = one.predicted(config, rates)
            insort(best, (found.step_seconds, index, found))
    if not best:
        raise _none_fits(config, num_ranks, [one.memory_bytes for one in candidates if one.plan is not None])
    return Sweep(
        num_ranks=num_ranks,
        best=tuple(one for _, _, one in best[:SHOWN]),
        num_layouts=len(candidates),
        num_simulated=len(best),
    )


def _none_fits(config: Config, num_ranks: int, needs: list[int]) -> ConfigError:
    if not needs:
        return LayoutError(
            f"--sweep: no layout of {num_ranks} ranks suits the model and data.global_batch_size="
            f"{config.data.global_batch_size}; give another number of ranks"
        )
    return LayoutError(
        f"run.memory: {config.run.memory}, but a rank of the smallest layout of {num_ranks} ranks needs about "
        f"{format_bytes(min(needs))}; raise run.memory or the number of ranks"
    )


# ---- layouts


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    tp: int
    pp: int
    dp: int
    virtual_stages: int
    num_microbatches: int

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} dp={self.dp}, {self.virtual_stages} chunks a stage, {self.num_microbatches} microbatches"

    def setting(self, config: Config) -> Setting:
        changes = {
            "parallel.tp": str(self.tp),
            "parallel.pp": str(self.pp),
            "parallel.dp": str(self.dp),
            "parallel.virtual_stages": str(self.virtual_stages),
            **microbatches(config, self.num_microbatches, self.dp),
        }
        is_sequence_parallel = self.tp > 1 and (config.parallel.sequence_parallel or config.parallel.tp == 1)
        if is_sequence_parallel != config.parallel.sequence_parallel:
            changes["parallel.sequence_parallel"] = str(is_sequence_parallel).lower()
        return Setting(changes=changes | self._of_pipeline(config))

    def _of_pipeline(self, config: Config) -> dict[str, str]:
        """The warm-up as the memory allows; what was set for other stages goes."""
        pipeline = config.pipeline
        takes_warmup = pipeline.schedule == "1f1b" and self.virtual_stages == 1 and self.pp > 1
        warmup = "auto" if takes_warmup else "null"
        changes = {} if warmup == (pipeline.warmup or "null") else {"pipeline.warmup": warmup}
        if pipeline.partition != "auto":
            changes["pipeline.partition"] = "auto"
        return changes | ({"pipeline.boundary_cost": "null"} if pipeline.boundary_cost is not None else {})


def _layouts(config: Config, num_ranks: int, node_size: int) -> Iterator[_Sizes]:
    """All that the ranks, heads, layers and the batch can be divided into."""
    model, batch = config.model, config.data.global_batch_size
    for tp, pp in product(_divisors(num_ranks), repeat=2):
        if tp > node_size or any(size % tp for size in (model.kv_heads, model.num_heads, model.intermediate_size)):
            continue
        if pp > model.num_layers or num_ranks % (tp * pp) or batch % (num_ranks // (tp * pp)):
            continue
        dp = num_ranks // (tp * pp)
        for virtual_stages in VIRTUAL_STAGES if pp > 1 else (1,):
            if pp * virtual_stages > model.num_layers:
                continue
            for number in _divisors(batch // dp):
                yield _Sizes(tp=tp, pp=pp, dp=dp, virtual_stages=virtual_stages, num_microbatches=number)


def _divisors(number: int) -> list[int]:
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


@dataclass
class _Candidate:
    """plan: None until it is looked at, or where it does not fit the model."""

    sizes: _Sizes
    plan: RunPlan | None = None

    @property
    def memory_bytes(self) -> int:
        """Of the fullest rank."""
        assert self.plan is not None
        return max(memory.total_bytes for memory in self.plan.memory)

    def predicted(self, config: Config, rates: Rates) -> Prediction:
        assert self.plan is not None
        return predict_plan(self.plan, rates, self.sizes.setting(config), fits=True)


def _find_plan(config: Config, sizes: _Sizes) -> RunPlan | None:
    try:
        return plan_unlimited(sizes.setting(config).of(config))
    except ConfigError:
        return None  # its microbatches do not suit its stages, or ZeRO's stage its pipeline


# ---- what a layout cannot beat


def _bound(config: Config, rates: Rates, sizes: _Sizes) -> float:
    """Seconds of a step before it is planned: routing as if it were spread evenly, no latency, no waits."""
    tokens = config.tokens_per_step / (sizes.dp * sizes.num_microbatches)
    chunks = _chunk_seconds(config, rates, sizes, tokens)
    first, stages = chunks[: sizes.pp], [sum(chunks[stage :: sizes.pp]) for stage in range(sizes.pp)]
    even = sizes.num_microbatches * (sum(chunks) + _routing_seconds(config, rates, sizes, tokens)) / sizes.pp
    passes = max(even, _passes_seconds(first, stages, sizes.num_microbatches))
    return max(passes, _wire_seconds(config, rates, sizes, tokens)) + _reduction_seconds(config, rates, sizes)


def _passes_seconds(first: Sequence[float], stages: Sequence[float], num_microbatches: int) -> float:
    """first, stages: forward and backward of a microbatch, through each stage's first chunk and through all."""
    ways = accumulate(first, initial=0.0)  # of the first one to each stage, and of the last one back
    return max(way + num_microbatches * seconds for way, seconds in zip(ways, stages))


def _planned_bound(plan: RunPlan, costs: Costs) -> float:
    """The same of a plan: every pass and every message counted, no waits."""
    num_stages, number = len(plan.stages), plan.num_microbatches
    chunks = [sum(sum(costs.runs[chunk.chunk, kind]) for kind in Kind) for chunk in plan.chunks]
    stages = [sum(chunks[stage::num_stages]) for stage in range(num_stages)]
    wires = [0.0] * num_stages
    for chunk in plan.chunks:
        for message in (message for kind in Kind for message in chunk.sent[kind]):
            way = message.from_chunk % num_stages, message.to_chunk % num_stages
            wires[way[0]] += number * message.num_bytes / costs.links[way].bytes_per_second
    return max(_passes_seconds(chunks[:num_stages], stages, number), *wires) + max(costs.end_seconds)


def _chunk_seconds(config: Config, rates: Rates, sizes: _Sizes, tokens: float) -> list[float]:
    """Of a microbatch forward and backward."""
    model, recomputed = config.model, config.parallel.recompute == "layer"
    forward, backward = rates.seconds_per_flop[Kind.FORWARD], rates.seconds_per_flop[Kind.BACKWARD]
    share = tokens / sizes.tp
    layer = share * layer_flops_per_token(model, config.data.seq_length)
    seconds = layer * (forward + (BACKWARD_FACTOR + recomputed) * backward)
    if sizes.tp > 1:
        num_bytes = 2 * (sizes.tp - 1) / sizes.tp * tokens * model.hidden_size * DTYPE_BYTES[config.run.dtype]
        seconds += 2 * (2 + recomputed) * num_bytes / rates.link(sizes.tp - 1).bytes_per_second
    head = share * 2 * model.hidden_size * model.vocab_size * (forward + BACKWARD_FACTOR * backward)
    chunks = [
        len(layers) * seconds for layers in plan_partition(model.num_layers, sizes.pp, "auto", sizes.virtual_stages)
    ]
    return [*chunks[:-1], chunks[-1] + head]


def _routing_seconds(config: Config, rates: Rates, sizes: _Sizes, tokens: float) -> float:
    """Of a microbatch through all stages: every edge is added once, somewhere."""
    pattern = config.pattern
    num_reads = sum(len(sources) for layer, sources in enumerate(pattern.sources) if pattern.has_router(layer))
    seconds = rates.seconds_per_routing_flop
    factor = seconds[Kind.FORWARD] + BACKWARD_FACTOR * seconds[Kind.BACKWARD]
    return tokens / sizes.tp * num_reads * pattern.routing.read_flops(config.model) * factor


def _wire_seconds(config: Config, rates: Rates, sizes: _Sizes, tokens: float) -> float:
    """Of the residuals that the busiest card sends, over the quicker link: activations one way, and gradients the other."""
    if sizes.pp == 1:
        return 0.0
    num_ways = 2 if sizes.pp > 2 or sizes.virtual_stages > 1 else 1
    num_bytes = tokens / sizes.tp * config.model.hidden_size * DTYPE_BYTES[config.run.dtype]
    quickest = max(link.bytes_per_second for link in (rates.within_node, rates.between_nodes, *rates.links.values()))
    return sizes.num_microbatches * (sizes.virtual_stages * num_ways - (num_ways > 1)) * num_bytes / quickest


def _reduction_seconds(config: Config, rates: Rates, sizes: _Sizes) -> float:
    """Of the layers' gradients over the replicas, in bf16 at the least."""
    if sizes.dp == 1:
        return 0.0
    model = config.model
    query_size, kv_size = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    layer = model.hidden_size * (2 * query_size + 2 * kv_size + 3 * model.intermediate_size)
    num_bytes = 2 * layer * (model.num_layers // sizes.pp) / sizes.tp
    return 2 * (sizes.dp - 1) / sizes.dp * num_bytes / rates.link(sizes.dp * sizes.tp - 1).bytes_per_second


# ---- text and JSON


def sweep_report(found: Sweep, rates: Rates, assumptions: str) -> dict[str, Any]:
    return {
        "assumptions": assumptions,
        "ranks": found.num_ranks,
        "layouts": found.num_layouts,
        "layouts_simulated": found.num_simulated,
        "best": [_report(one, rates, found.num_ranks) for one in found.best],
    }


def _report(one: Prediction, rates: Rates, num_ranks: int) -> dict[str, Any]:
    return {
        "changes": dict(one.setting.changes),
        "step_seconds": one.step_seconds,
        "tokens_per_second": one.plan.config.tokens_per_step / one.step_seconds,
        "share_of_rate": share_of_rate(one, rates, num_ranks),
        "bubble_share": one.simulated.bubble_share,
        "exposed_seconds": one.simulated.exposed_seconds,
        "memory_bytes": one.memory_bytes,
    }


def share_of_rate(one: Prediction, rates: Rates, num_ranks: int) -> float:
    """Of what the ranks would do without a wait, or anything but the products that `model_flops_per_token` counts."""
    forward, backward = rates.seconds_per_flop[Kind.FORWARD], rates.seconds_per_flop[Kind.BACKWARD]
    seconds_per_flop = (forward + BACKWARD_FACTOR * backward) / (1 + BACKWARD_FACTOR)
    products = one.plan.model_flops_per_token * one.plan.config.tokens_per_step * seconds_per_flop
    return products / (num_ranks * one.step_seconds)


def sweep_table(found: Sweep, rates: Rates, assumptions: str) -> str:
    rows = [HEAD, *(_row(one, rates, found.num_ranks) for one in found.best)]
    width = max(len(row[-1]) for row in rows)
    head, *others = [(*row[:-1], row[-1].ljust(width)) for row in rows]
    notes = (
        f"the fastest of {found.num_layouts} layouts of {found.num_ranks} ranks, of which {found.num_simulated} had to be "
        f"simulated; try first: {found.best[0].setting}",
        f"assumed: {assumptions}",
    )
    return "\n".join([*(line.rstrip() for line in align_columns(head, others)), "", *map(wrapped, notes)])


def _row(one: Prediction, rates: Rates, num_ranks: int) -> tuple[str, ...]:
    report = _report(one, rates, num_ranks)
    return (
        format_seconds(one.step_seconds),
        format_si(report["tokens_per_second"]),
        f"{report['share_of_rate']:.1%}".replace("%", " %"),
        f"{report['bubble_share']:.1%}".replace("%", " %"),
        f"{report['exposed_seconds'] * 1e3:.1f} ms",
        format_bytes(one.memory_bytes),
        str(one.setting),
    )
