"""All analyses of one checkpoint as one JSON object; docs/analysis.md lists its keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from lime_dist.analysis.activations import KINDS, mean_token_weights
from lime_dist.analysis.edge_cuts import mean_loss, measure_cuts
from lime_dist.analysis.loss_curve import loss_curve
from lime_dist.analysis.occurrences import WORDS, find_occurrences
from lime_dist.analysis.probe import (
    MAX_OCCURRENCES,
    MIN_OCCURRENCES,
    PROBED,
    Examples,
    collect_examples,
    separability,
)
from lime_dist.analysis.routers import RouterMap, map_of_magnitudes, map_of_routers
from lime_dist.analysis.sentences import describe
from lime_dist.analysis.spectra import ALPHA, Spectrum, Spread, measure_spectra
from lime_dist.analysis.text import SEQUENCES_AT_ONCE, Text, open_text
from lime_dist.checkpoint.own_tokenizer import load_tokenizer_of, own_tokenizer
from lime_dist.checkpoint.reader import CheckpointReader, get_checkpoint
from lime_dist.config import Config
from lime_dist.data.marks import token_ids
from lime_dist.data.tokenizer import Tokenizer
from lime_dist.depth.routing import router_name
from lime_dist.generate import load_model, single_device
from lime_dist.lime.model import LimeChunk
from lime_dist.plan.parameters import logical_tensors

DIGITS = 6  # of every figure
MAX_SEARCHED_TOKENS = 20 * 10**6  # for words, where the text has few of them: some ten seconds


@dataclass(frozen=True, kw_only=True)
class Options:
    """text: instead of the run's held-out data. batches: of SEQUENCES_AT_ONCE sequences. tokenizer: instead of the run's own."""

    text: Path | None = None
    batches: int = 8
    tokenizer: Path | None = None
    device: str = "auto"


def analyze(path: Path, options: Options) -> dict[str, Any]:
    """path: a run's folder, for its newest checkpoint, or a step_N folder. Raises: LimeDistError."""
    folder = get_checkpoint(path)
    model, config = load_model(folder, single_device(options.device))
    tokenizer = _find_tokenizer(folder, config, options.tokenizer)
    text = open_text(config, options.text, tokenizer)
    batches = text.batches(options.batches, model.device)
    inputs = [token_ids(values[:, :-1]) for values in batches]
    left_out: dict[str, str] = {}
    router_map = _router_map(folder, model, config, inputs, left_out)
    step = CheckpointReader(folder).meta.step
    report = {
        "run": str(path),
        "checkpoint": str(folder),
        "step": step,
        "loss_curve": loss_curve(folder, step),
        "model": _model_facts(config),
        "text": {
            "source": text.source,
            "sequences": sum(map(len, batches)),
            "tokens": sum(tokens.numel() for tokens in inputs),
        },
        "held_out_loss": mean_loss(model, batches),
        "routers": _router_report(router_map),
        "spectra": _spectra_report(measure_spectra(model, inputs), config.model.num_layers),
        "separability": _separability_report(model, text, tokenizer, left_out),
        "edges": _edges_report(model, config, router_map, batches),
        "left_out": left_out,
    }
    rounded = _rounded(report)
    return rounded | {"sentences": describe(rounded)}


def _find_tokenizer(folder: Path, config: Config, given: Path | None) -> Tokenizer | None:
    """The run's may lie elsewhere by now; one that was given must be there."""
    path = given or own_tokenizer(folder, config)
    return load_tokenizer_of(config, path) if path is not None and (given or path.is_file()) else None


def _model_facts(config: Config) -> dict[str, Any]:
    model, depth = config.model, config.depth
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "router": depth.router,
        "entry": depth.entry,
        "pattern": depth.name,
        "edges": config.pattern.num_edges,
        "stages": config.parallel.pp,
    }


# ---- routers


def _router_map(
    folder: Path, model: LimeChunk, config: Config, inputs: Sequence[Tensor], left_out: dict[str, str]
) -> RouterMap | None:
    pattern, tensors = config.pattern, logical_tensors(config.model, config.pattern)
    readers = [layer for layer in range(pattern.num_layers) if router_name(layer) in tensors]
    if not readers:
        left_out["routers"] = left_out["edges"] = (
            f"depth.router={config.depth.router}, {pattern.num_edges} edges: no weights are learned"
        )
        return None
    if not pattern.routing.ranks_edges:
        return map_of_magnitudes(pattern, mean_token_weights(model, inputs))
    reader = CheckpointReader(folder)
    return map_of_routers(pattern, {layer: reader.array("weight", tensors[router_name(layer)]) for layer in readers})


def _router_report(router_map: RouterMap | None) -> dict[str, Any] | None:
    if router_map is None:
        return None
    return {
        "mean": router_map.mean,
        "by_head": router_map.by_head,
        "own_share": router_map.own_share,
        "expected_source": router_map.expected_source,
    }


# ---- representations


def _spectra_report(spectra: Mapping[str, Mapping[int, Spectrum]], num_layers: int) -> dict[str, Any]:
    return {
        "alpha": ALPHA,
        **{
            name: {
                kind: _by_layer(
                    {layer: getattr(found, name) for layer, found in spectra.get(kind, {}).items()}, num_layers
                )
                for kind in KINDS
            }
            for name in ("entropy", "effective_rank")
        },
    }


def _by_layer(figures: Mapping[int, Spread], num_layers: int) -> dict[str, list[float | None]]:
    """None for a layer that has none."""
    layers = [figures.get(layer) for layer in range(num_layers)]
    return {
        "mean": [None if found is None else found.mean for found in layers],
        "std": [None if found is None else found.std for found in layers],
    }


def _separability_report(
    model: LimeChunk, text: Text, tokenizer: Tokenizer | None, left_out: dict[str, str]
) -> dict[str, Any] | None:
    if tokenizer is None:
        left_out["separability"] = "the run's data.tokenizer is not here to find words with; give --tokenizer"
        return None
    searched = islice(text.sequences(), 1 + MAX_SEARCHED_TOKENS // text.seq_length)
    occurrences, counts = find_occurrences(searched, tokenizer.id_texts(), limit=MAX_OCCURRENCES)
    used = len(occurrences) // len(WORDS)
    if used < MIN_OCCURRENCES:
        found = ", ".join(f"{word} {count}" for word, count in counts.items())
        left_out["separability"] = (
            f"the text has too few of the words ({found}): {MIN_OCCURRENCES} of each are needed; give --text with a longer one"
        )
        return None
    examples = collect_examples(
        model, occurrences, lambda index: token_ids(text.sequence(index)[:-1]), sequences_at_once=SEQUENCES_AT_ONCE
    )
    return {
        "occurrences": counts,
        "used_of_each": used,
        "chance": 1 / len(WORDS),
        **{kind: _accuracies(examples, kind, model.config.num_layers) for kind in PROBED},
    }


def _accuracies(examples: Examples, kind: str, num_layers: int) -> dict[str, list[float | None]]:
    found = {layer: separability(values, examples.labels) for layer, values in examples.features[kind].items()}
    return _by_layer(found, num_layers)


# ---- edges


def _edges_report(
    model: LimeChunk, config: Config, router_map: RouterMap | None, batches: Sequence[Tensor]
) -> list[dict[str, Any]] | None:
    if router_map is None:
        return None
    return [asdict(kept) for kept in measure_cuts(model, config, router_map.edge_weights, batches)]


def _rounded(value: Any) -> Any:
    """JSON has no nan: such a figure is None."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, numpy.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
