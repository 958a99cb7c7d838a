"""The edges of a start: chosen once by files, stages, budgets or trained routers, and from then on the checkpoint's.

A resolved config holds the edges themselves, so that a checkpoint loads on other stages and without the
files that chose them. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lime_dist.checkpoint.changes import require_same_run
from lime_dist.checkpoint.checking import read_meta
from lime_dist.checkpoint.reader import CheckpointReader, find_latest, find_sound, get_checkpoint
from lime_dist.config import Config, check_config
from lime_dist.config.reading import read_yaml, shown_key
from lime_dist.depth.pattern import Pattern, lost_edges, pattern_of_edges
from lime_dist.depth.routing import router_name
from lime_dist.errors import CheckpointError, ConfigError, PlanError, shown
from lime_dist.formats import parse_bytes
from lime_dist.plan.checker import check_run
from lime_dist.plan.choice import EdgeChoice
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.selection import EdgeWeights, mean_magnitudes, prior_weights, select_budget, select_top_p
from lime_dist.plan.shape import plan_shape

# With its edges, and how they were chosen where they were by routers or bytes.
_Chosen = tuple[Config, EdgeChoice | None]


@dataclass(frozen=True)
class _Weights:
    """Of the edges that may be chosen: those of the routers of `trained`, a checkpoint that goes on, or of `depth.weights_from`."""

    config: Config
    trained: Path | None

    @property
    def how(self) -> str:
        folder = self.trained or self.config.depth.weights_from
        return f"by the routers of {folder}" if folder else "by nearness, as depth.weights_from names no checkpoint"

    @cached_property
    def of_routers(self) -> EdgeWeights | None:
        """None where nothing was trained. Read when asked for: they may be large, and are not always needed."""
        if self.trained is not None:
            return router_weights(self.trained, self.config)
        if self.config.depth.weights_from:
            unread = dict.fromkeys(prior_weights(self.config.model.num_layers), 0.0)
            folder = get_checkpoint(Path(self.config.depth.weights_from), "depth.weights_from:")
            return unread | dict(router_weights(folder, self.config))
        return None


def ready_plan(config: Config, world_size: int | None = None) -> RunPlan:
    """`check_config`, and the plan of the run as it would start: its edges are chosen now, or those of its checkpoint.

    Raises: ConfigError, PlanError, LayoutError, CheckpointError; PlanDefect for a mistake of ours.
    """
    config = check_config(config, world_size)
    _check_folders(config)
    folder = resume_folder(config)
    started, choice = _choose(config) if folder is None else _go_on(config, folder)
    if folder is None:
        _check_first_weights(started)
    plan = _checked_plan(started)  # raises what is left: patterns, costs and memory that do not fit the stages
    check_switches(config, started.pattern, step=0 if folder is None else read_meta(folder).step)
    return replace(plan, choice=choice)


def ready_to_evaluate(config: Config, world_size: int | None = None, *, checkpoint: Path | None = None) -> RunPlan:
    """The same for an evaluation of `checkpoint`, or of the one that a start would go on from: with its own edges.

    Raises: ConfigError, PlanError, LayoutError, CheckpointError; PlanDefect for a mistake of ours.
    """
    config = check_config(config, world_size)
    _check_folders(config)
    return _checked_plan(evaluated_config(config, evaluated_checkpoint(config, checkpoint)))


def evaluated_checkpoint(config: Config, given: Path | None) -> Path:
    """Of the folder that is given, a step_N or a run's, or the one that the run would go on from. Raises: CheckpointError."""
    if given is not None:
        return get_checkpoint(given)
    folder = resume_folder(config)
    if folder is None:
        raise CheckpointError(
            f"run.dir: no checkpoint under {checkpoints_of(config)}; train first or give --checkpoint"
        )
    return folder


def _checked_plan(config: Config) -> RunPlan:
    plan = plan_run(config)
    check_run(plan)
    return plan


def checkpoints_of(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"


def _check_folders(config: Config) -> None:
    """Before ranks start: checkpoints can be made and found. A link to a folder, such as scratch storage, is as good."""
    path = checkpoints_of(config)
    with _naming_path("run.dir", config.run.dir):
        is_folder = path.is_dir() or not os.path.lexists(path)
    if not is_folder:
        problem = "a link that leads to no folder" if path.is_symlink() else "a file"
        raise CheckpointError(f"checkpoint {path}: is {problem}; remove it or name another run.dir")
    with _naming_path("checkpoint.resume", config.checkpoint.resume):
        _ = _named_to_resume(config)


@contextmanager
def _naming_path(key: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}: {shown(path)}: {error.strerror}; name a folder that can be read") from None


def resume_folder(config: Config) -> Path | None:
    """The checkpoint to continue from, as this host sees it, or None for a fresh start; a damaged one is passed over.

    Raises: CheckpointError where all are damaged.
    """
    return find_sound(checkpoints_of(config)) if config.checkpoint.resume == "auto" else _named_to_resume(config)


def _named_to_resume(config: Config) -> Path | None:
    """Raises: CheckpointError where `checkpoint.resume` names a folder without a checkpoint."""
    resume = config.checkpoint.resume
    return None if resume in ("auto", "never") else get_checkpoint(Path(resume), "checkpoint.resume:")


def resumes(config: Config) -> bool:
    """Whether there is a checkpoint to continue from, as this host sees it, be it damaged or not."""
    if config.checkpoint.resume == "auto":
        return find_latest(checkpoints_of(config)) is not None
    return config.checkpoint.resume != "never"


def first_weights(config: Config) -> Path | None:
    """The checkpoint of `checkpoint.weights_from`, with whose weights a new run begins; None: with initial ones.

    Raises: CheckpointError where there is none.
    """
    given = config.checkpoint.weights_from
    if given is None:
        return None
    return get_checkpoint(Path(given), "checkpoint.weights_from:")


def _check_first_weights(config: Config) -> None:
    """Before ranks start: they are of this model, with all the edges that it reads."""
    folder = first_weights(config)
    if folder is None:
        return
    saved = saved_config(CheckpointReader(folder))
    check_same_model(folder, saved, config, "checkpoint.weights_from")
    missing = lost_edges(config.pattern, saved.pattern)
    if missing:
        raise CheckpointError(
            f"checkpoint.weights_from: {config.depth.name} has {missing} edges that {folder} ({saved.depth.name}) lacks; set "
            f"depth.pattern={saved.depth.name}, or one with fewer edges"
        )


def resumed_config(config: Config, folder: Path) -> Config:
    """`config` as it goes on from the checkpoint `folder`, with the edges that its next update has.

    At a step of `depth.switch_at` a run saves first, so a checkpoint of that step has the edges from before.

    Edges that were chosen (by routers, bytes or stages) are chosen once: from then on they are the checkpoint's, whatever
    the stages or the routers are now. A run loses edges at a step of `depth.switch_at` only.
    Raises: CheckpointError where it would lose others; PlanError, ConfigError.
    """
    return _go_on(config, folder)[0]


def _go_on(config: Config, folder: Path) -> _Chosen:
    """See `resumed_config`."""
    reader = CheckpointReader(folder)
    saved, step = saved_config(reader), reader.meta.step
    check_same_model(folder, saved, config)
    require_same_run(folder, saved, config, step=step)
    due = config.at_step(step)
    is_switch = step in config.depth.switch_at
    if due.depth.name == saved.depth.name and due.depth.is_chosen and not is_switch:
        return _chosen_before(due.with_pattern(saved.depth.pattern, saved.depth.pattern_name), f"checkpoint {folder}")
    due, choice = _choose(due, folder)
    lost = lost_edges(saved.pattern, due.pattern)
    if lost and not is_switch:
        raise CheckpointError(
            f"depth.pattern: {due.depth.name} lacks {lost} of the {saved.pattern.num_edges} edges of checkpoint {folder} "
            f"({saved.depth.name}); set depth.pattern={saved.depth.name}, or depth.switch_at={{{step}: {due.depth.name}}} to drop them"
        )
    return due, choice


def check_same_model(folder: Path, saved: Config, config: Config, instead: str = "run.dir") -> None:
    """instead: of what another one would mend it. Raises: CheckpointError when the run's model is another than the saved one."""
    facts = {
        f"model.{item.name}": (getattr(saved.model, item.name), getattr(config.model, item.name))
        for item in fields(config.model)
    }
    facts["model.num_kv_heads"] = saved.model.kv_heads, config.model.kv_heads
    facts |= {
        f"depth.{key}": (getattr(saved.depth, key), getattr(config.depth, key)) for key in ("router", "entry", "heads")
    }
    for key, (theirs, ours) in facts.items():
        if theirs != ours:
            raise CheckpointError(
                f"checkpoint {folder}: saved with {key}={theirs}, the run has {ours}; set {key}={theirs} or another {instead}"
            )


def evaluated_config(config: Config, folder: Path) -> Config:
    """`config` with the checkpoint's own edges: the model that was trained. Raises: CheckpointError."""
    saved = saved_config(CheckpointReader(folder))
    check_same_model(folder, saved, config)
    return config.with_pattern(saved.depth.pattern, saved.depth.pattern_name)


def check_switches(config: Config, before: Pattern, *, step: int) -> None:
    """See that the run can make the switches to come. before: the pattern of the update after `step`.

    Raises: ConfigError, which names the switch, for a pattern that cannot be read, does not fit the stages, or reads what the
    one before it does not.
    """
    for at, pattern in sorted(config.depth.switch_at.items()):
        try:
            after = _switched_pattern(config.at_step(at))
        except ConfigError as error:
            own, told = f"depth.switch_at.{at}", str(error)
            is_named = told.startswith("depth.pattern")
            raise type(error)(told.replace("depth.pattern", own, 1) if is_named else f"{own}: {told}") from None
        if after is None or at <= step:
            continue
        if (added := lost_edges(after, before)) > 0:
            raise PlanError(
                f"depth.switch_at.{at}: {shown(pattern)} has {added} edges that the pattern before it lacks; edges can only be dropped"
            )
        before = after


def _switched_pattern(config: Config) -> Pattern | None:
    """None where trained routers will choose among the edges that are there. Raises: ConfigError."""
    if config.depth.chosen_by_routers:
        kind, _, argument = config.depth.name.partition(":")
        untrained = replace(config, depth=replace(config.depth, weights_from=None))
        _ = _share(argument) if kind == "top_p" else _budget(config, argument, _Weights(untrained, trained=None))
        return None
    resolved = resolve_pattern(config)
    _checked_plan(resolved)
    return resolved.pattern


def resolve_pattern(config: Config, trained: Path | None = None) -> Config:
    """`depth.pattern` as edges where it is a file, a budget, top_p or depends on the stages.

    trained: the checkpoint that goes on, whose routers choose among its edges, in place of `depth.weights_from`.
    """
    return _choose(config, trained)[0]


def _choose(config: Config, trained: Path | None = None) -> _Chosen:
    """See `resolve_pattern`."""
    text = config.depth.pattern
    if config.depth.router == "none":
        return config, None
    if not isinstance(text, str):
        return _chosen_before(config, "the config")
    kind, _, argument = text.partition(":")
    if kind not in _KINDS:
        return (config.with_pattern(config.pattern.edges, text) if config.depth.is_chosen else config), None
    weights = _Weights(config, trained)
    chosen = config.with_pattern(_KINDS[kind](config, argument, weights).edges, text)
    if not chosen.depth.chosen_by_routers:
        return chosen, None
    return chosen, EdgeChoice(pattern=chosen.pattern, weights=weights.of_routers, how=weights.how)


def _chosen_before(config: Config, holder: str) -> _Chosen:
    """Its edges are there already; by what they were chosen is told no more."""
    if not config.depth.chosen_by_routers:
        return config, None
    return config, EdgeChoice(pattern=config.pattern, weights=None, how=f"at an earlier start, as {holder} has them")


def _edges(config: Config, argument: str, _: _Weights) -> Pattern:
    """A YAML file: a mapping of each reader to the earlier layers that it reads."""

    def is_layer(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    if not argument:
        raise PlanError("depth.pattern: edges without a file; write edges:FILE")
    try:
        edges: dict[Any, Any] = read_yaml(argument, "edges file", "readers and their sources, such as 3: [0, 2]")
    except ConfigError as error:
        raise PlanError(f"depth.pattern: {error}") from None
    if not all(
        is_layer(reader) and isinstance(sources, list) and all(map(is_layer, sources))
        for reader, sources in edges.items()
    ):
        raise PlanError(
            f"depth.pattern: edges file {argument}: must map each reader to a list of layers, such as 3: [0, 2]"
        )
    return pattern_of_edges(edges, config.model.num_layers)


def _budget_bytes(argument: str) -> int:
    budget_bytes = parse_bytes(argument)
    if budget_bytes is None:
        raise PlanError(
            f"depth.pattern: budget:{shown_key(argument)} needs bytes, such as budget:4194304 or budget:4MiB"
        )
    return budget_bytes


def _share(argument: str) -> float:
    try:
        share = float(argument)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise PlanError(
            f"depth.pattern: top_p:{shown_key(argument)} needs a share above 0 and at most 1, such as top_p:0.9"
        )
    return share


def _budget(config: Config, argument: str, weights: _Weights) -> Pattern:
    budget_bytes = _budget_bytes(argument)
    return select_budget(
        weights.of_routers or prior_weights(config.model.num_layers),
        config.chunks,
        num_stages=config.parallel.pp,
        policy=config.depth.policy if config.depth.routing.presummable else "relay",
        bundle_bytes=plan_shape(config).bundle_bytes,
        budget_bytes=budget_bytes,
    )


def _top_p(config: Config, argument: str, weights: _Weights) -> Pattern:
    top_p = _share(argument)
    known = weights.of_routers
    if known is None:
        raise PlanError("depth.weights_from: top_p chooses by trained routers; name a checkpoint")
    return select_top_p(known, config.model.num_layers, top_p)


_KINDS: dict[str, Callable[[Config, str, _Weights], Pattern]] = {"edges": _edges, "budget": _budget, "top_p": _top_p}


def router_weights(folder: Path, config: Config) -> EdgeWeights:
    """What the trained routers of a checkpoint give every edge, such as mean |R|: see `Routing.source_weights`.

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
    if not pattern.routing.ranks_edges:
        raise CheckpointError(
            f"depth.weights_from: the routers of {folder} ({saved.depth.router}) cannot rank edges; name a checkpoint of router static"
        )
    tensors = logical_tensors(saved.model, pattern)
    routers = {
        layer: pattern.routing.source_weights(reader.array("weight", tensors[router_name(layer)]))
        for layer in range(pattern.num_layers)
        if pattern.has_router(layer)
    }
    return mean_magnitudes(routers, dict(enumerate(pattern.sources)))


def saved_config(reader: CheckpointReader) -> Config:
    """The config of the run that wrote the checkpoint, with the pattern that its weights have."""
    return reader.config
