"""Patterns that depend on more than the number of layers, made explicit: files, stages, budgets, trained routers.

A resolved config holds the edges themselves, so that a checkpoint loads on other stages and without the
files that chose them. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from lime_dist.checkpoint.files import CheckpointReader
from lime_dist.config import Config, check_config, parse_config
from lime_dist.config.reading import parse_bytes
from lime_dist.depth.pattern import Pattern, pattern_of_edges
from lime_dist.depth.routing import Routing
from lime_dist.depth.selection import EdgeWeights, mean_magnitudes, prior_weights, select_budget, select_top_p, softmax
from lime_dist.errors import CheckpointError, PlanError, one_line
from lime_dist.lime.parameters import logical_tensors
from lime_dist.pipeline.bundle import plan_run_transfer, plan_shape


def ready_config(config: Config, world_size: int | None = None) -> Config:
    """`check_config`, and the pattern made explicit. Raises: ConfigError, PlanError, CheckpointError."""
    config = resolve_pattern(check_config(config, world_size))
    plan_run_transfer(config)  # raises what is left: patterns and costs that do not fit the stages
    return config


def resolve_pattern(config: Config, weights_from: Path | None = None) -> Config:
    """`depth.pattern` as edges where it is a file, a budget, top_p or depends on the stages.

    weights_from: the checkpoint whose routers choose, in place of `depth.weights_from`.
    """
    text = config.depth.pattern
    if config.depth.router == "none" or not isinstance(text, str):
        return config
    kind, _, argument = text.partition(":")
    if kind in _KINDS:
        weights = weights_from or (Path(config.depth.weights_from) if config.depth.weights_from else None)
        return config.with_pattern(_KINDS[kind](config, argument, weights).edges, text)
    return config.with_pattern(config.pattern.edges, text) if "within_stage" in text else config


def _edges(config: Config, argument: str, _: Path | None) -> Pattern:
    """A YAML file: a mapping of each reader to the earlier layers that it reads."""
    try:
        edges = yaml.safe_load(Path(argument).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise PlanError(f"depth.pattern: edges file {argument}: {one_line(error)}; give a YAML file") from None
    if not isinstance(edges, dict) or not all(
        isinstance(reader, int) and isinstance(sources, list) and all(isinstance(source, int) for source in sources)
        for reader, sources in edges.items()
    ):
        raise PlanError(
            f"depth.pattern: edges file {argument}: must map each reader to a list of layers, such as 3: [0, 2]"
        )
    return pattern_of_edges(edges, config.model.num_layers)


def _budget(config: Config, argument: str, weights_from: Path | None) -> Pattern:
    budget_bytes = parse_bytes(argument)
    if budget_bytes is None:
        raise PlanError(f"depth.pattern: budget:{argument} needs bytes, such as budget:4194304 or budget:4MiB")
    weights = prior_weights(config.model.num_layers) if weights_from is None else router_weights(weights_from, config)
    return select_budget(
        weights,
        config.stages,
        policy=config.depth.policy if config.depth.routing.presummable else "relay",
        bundle_bytes=plan_shape(config).bundle_bytes,
        budget_bytes=budget_bytes,
    )


def _top_p(config: Config, argument: str, weights_from: Path | None) -> Pattern:
    try:
        top_p = float(argument)
    except ValueError:
        top_p = 0.0
    if not 0 < top_p <= 1:
        raise PlanError(f"depth.pattern: top_p:{argument} needs a share above 0 and at most 1, such as top_p:0.9")
    if weights_from is None:
        raise PlanError("depth.weights_from: top_p chooses by trained routers; name a checkpoint")
    return select_top_p(router_weights(weights_from, config), config.model.num_layers, top_p)


_KINDS: dict[str, Callable[[Config, str, Path | None], Pattern]] = {"edges": _edges, "budget": _budget, "top_p": _top_p}


def router_weights(folder: Path, config: Config) -> EdgeWeights:
    """Mean |R| of every edge of a checkpoint, or its mean share of the softmax; edges that it does not have count nothing.

    Raises: CheckpointError when it has no fixed routers or another number of layers.
    """
    reader = CheckpointReader(folder)
    saved = saved_config(reader)
    if saved.model.num_layers != config.model.num_layers or saved.depth.router == "none":
        raise CheckpointError(
            f"depth.weights_from: {folder} has {saved.model.num_layers} layers and router {saved.depth.router}; "
            f"name a LIMe checkpoint of {config.model.num_layers} layers"
        )
    pattern = saved.pattern
    if pattern.routing is Routing.HIDDEN_DYNAMIC:
        raise CheckpointError(
            f"depth.weights_from: the routers of {folder} have other weights for each token; name a checkpoint of router static"
        )
    tensors = logical_tensors(saved.model, pattern)
    routers = {
        layer: reader.array("weight", tensors[f"layers.{layer}.self_attn.lime_router.weight"])
        for layer in range(pattern.num_layers)
        if pattern.has_router(layer)
    }
    if pattern.routing is Routing.HIDDEN_STATIC:
        routers = {layer: softmax(router) for layer, router in routers.items()}
    return dict.fromkeys(prior_weights(pattern.num_layers), 0.0) | mean_magnitudes(
        routers, dict(enumerate(pattern.sources))
    )


def saved_config(reader: CheckpointReader) -> Config:
    """The config of the run that wrote the checkpoint, with the pattern that its weights have."""
    return parse_config(reader.meta.config)
