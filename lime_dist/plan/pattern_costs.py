"""Patterns side by side, on one model and layout: what each sends, holds and computes, and LLaMA, over which LIMe costs it. Pure data.

Whether edges come from a file or from weights it does not know: `compared_configs` says what is compared, and whoever can read
those resolves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lime_dist.config import Config
from lime_dist.depth.kinds import routers_of
from lime_dist.formats import format_bytes, format_si
from lime_dist.plan.parameters import router_parameters, total_parameters
from lime_dist.plan.predict import without_limit
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.table import POLICIES, align_columns

MAX_NAME_WIDTH = 24  # so that lines stay within the table's width
COMPARED_PATTERNS = (
    "full",
    "first:2",
    "first:4",
    "last:2",
    "last:4",
    "first:2+last:2",
    "stride:2",
    "stride:4",
    "within_stage",
    "within_stage+first:2",
)


def compared_configs(plan: RunPlan, patterns: Sequence[str] = ()) -> list[Config]:
    """LLaMA, then each pattern under each policy, as the run would plan them with its own warm-up and without `run.memory`.

    patterns: as `depth.pattern` takes them; none for `COMPARED_PATTERNS`, a block a chunk where these are of one size, and the
    run's own.
    """
    config = without_limit(replace(plan.config, pipeline=replace(plan.config.pipeline, warmup=plan.warmup)))
    llama = replace(config, depth=replace(config.depth, router="none"))
    usual = (*COMPARED_PATTERNS, *_equal_blocks(config))
    compared = [config.with_pattern(pattern) for pattern in dict.fromkeys(patterns or usual)]
    is_known = config.depth.router == "none" or config.depth.pattern in usual
    compared += [] if patterns or is_known else [config]
    return [llama, *(_routed(one, policy) for one in compared for policy in POLICIES)]


def _equal_blocks(config: Config) -> list[str]:
    """A block may not span chunks."""
    first, *others = {len(chunk) for chunk in config.chunks}
    return [f"block:{first}"] if first > 1 and not others else []


def _routed(config: Config, policy: str) -> Config:
    depth = config.depth
    router = routers_of(depth.entry)[0] if depth.router == "none" else depth.router
    return replace(config, depth=replace(depth, router=router, policy=policy))


def pattern_cost(config: Config) -> dict[str, Any]:
    """What a run of the resolved config costs. LLaMA's pattern is none, under no policy. Raises: PlanError.

    crossings: entries and partial sums over all hops; tensors: with the residual. largest_bundle_bytes: over one hop;
    busiest_boundary_bytes: over all hops of one boundary, of which there are several with virtual stages. memory_bytes: of the
    rank that needs most.
    """
    plan = plan_run(config)
    pattern, bundles_bytes = plan.transfer.pattern, [chunk.sent_bytes for chunk in plan.chunks[:-1]]
    return {
        "pattern": pattern.name,
        "policy": None if config.depth.router == "none" else config.depth.policy,
        "edges": pattern.num_edges,
        "crossings": plan.transfer.num_crossings,
        "tensors": plan.transfer.num_crossings + len(bundles_bytes),
        "largest_bundle_bytes": max(bundles_bytes, default=0),
        "ratio_to_residual": max(bundles_bytes, default=0) / plan.shape.residual_bytes,
        "busiest_boundary_bytes": max(plan.boundary_bytes, default=0),
        "bytes_per_microbatch": sum(bundles_bytes),
        "memory_bytes": max(memory.total_bytes for memory in plan.memory),
        "total_parameters": total_parameters(config.model, pattern),
        "router_parameters": router_parameters(config.model, pattern),
        "model_flops_per_token": plan.model_flops_per_token,
    }


def compare_table(costs: Sequence[dict[str, Any]]) -> str:
    """For people: LLaMA's line, then a line for each pattern and policy."""
    llama = costs[0]
    head = (
        "pattern",
        "policy",
        "tensors",
        "a microbatch",
        "one boundary",
        "x LLaMA",
        "memory/rank",
        "parameters",
        "FLOPs/token",
    )
    rows = [
        (
            _short_name(cost["pattern"]) if cost is not llama else "LLaMA",
            cost["policy"] or "-",
            str(cost["tensors"]),
            format_bytes(cost["bytes_per_microbatch"]),
            format_bytes(cost["busiest_boundary_bytes"]),
            _ratio(cost["busiest_boundary_bytes"], llama["busiest_boundary_bytes"]),
            format_bytes(cost["memory_bytes"]),
            *(_sizes(cost) if cost is llama else _growth(cost, llama)),
        )
        for cost in costs
    ]
    said = "sent in all and over the busiest boundary; memory of the largest rank; parameters and FLOPs as more than LLaMA's"
    return "\n".join([said, *align_columns(head, rows)])


def _sizes(llama: dict[str, Any]) -> tuple[str, str]:
    return f"{llama['total_parameters']:,}", format_si(llama["model_flops_per_token"])


def _growth(cost: dict[str, Any], llama: dict[str, Any]) -> tuple[str, str]:
    flops = cost["model_flops_per_token"] / llama["model_flops_per_token"] - 1
    return f"{cost['total_parameters'] - llama['total_parameters']:+,}", f"{100 * flops:+.2f} %"


def _ratio(count: int, base: int) -> str:
    return f"{count / base:.2f}" if base else "-"


def _short_name(name: str) -> str:
    """Of a long one the middle is left out: the ends of paths tell them apart."""
    half = (MAX_NAME_WIDTH - 3) // 2
    return name if len(name) <= MAX_NAME_WIDTH else f"{name[:half]}...{name[-half:]}"
