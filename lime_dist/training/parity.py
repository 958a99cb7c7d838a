"""`lime-dist parity`: this installation, under any layout, against reference numbers in a folder.

The folder holds `config.json`, `weights.safetensors`, `grads.safetensors` and `io.safetensors`: Hugging
Face's LLaMA names, a `lime_router` of shape [H_kv (reader), sources, H_kv (source)] a layer (LIMe v1: [heads, sources], or
[heads * sources, hidden] where `depth.router` is dynamic, and the reader's `depth_norm`), the first batch's logits, loss and
gradients, and the loss and gradient norm of every update from those weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lime_dist.backends.zero_state import set_weights
from lime_dist.checkpoint.edges import ready_plan
from lime_dist.config import Config, parse_config
from lime_dist.errors import ConfigError, DataError, one_line
from lime_dist.hugging_face.config_json import reference_model_keys
from lime_dist.hugging_face.names import logical_name
from lime_dist.lifecycle.local_ranks import run_local_ranks
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.tensors import LogicalTensor
from lime_dist.testing import Pieces, assemble, local_pieces, on_rank
from lime_dist.training.rank import Rank

# fp32 with 24 bits: what differs between layouts is the order of sums only. The trace lets such
# differences grow over the updates: of the grouped-query model, half a last bit of the initial weights moves the
# gradient norm of two later steps by 1e-4, and its loss by no more than 2e-6.
TOLERANCES = {
    "logits_max_abs_err": 1e-5,
    "loss_abs_err": 1e-5,
    "grad_max_rel_err": 1e-5,
    "trace_max_abs_err": 1e-4,
    "grad_norm_max_rel_err": 5e-4,
}


@dataclass(frozen=True)
class Reference:
    """A folder's numbers, under this project's names."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    tokens: Tensor  # [steps, batch, seq + 1]
    logits: Tensor  # [batch, seq, vocab]
    loss: float
    loss_trace: Tensor  # [steps]
    grad_norm_trace: Tensor  # [steps]


def read_reference(folder: Path) -> Reference:
    """Raises: DataError when a file or something in it is missing or unreadable."""
    try:
        return _read_reference(folder)
    except KeyError as error:
        raise _incomplete(folder / "io.safetensors", error) from None


def _incomplete(path: Path, error: KeyError) -> DataError:
    return DataError(f"reference {path}: no {error.args[0]} in it; give a folder of reference numbers")


def _read_reference(folder: Path) -> Reference:
    io = _tensors(folder / "io.safetensors")
    return Reference(
        folder=folder,
        config=_json(folder / "config.json"),
        weights=_own_names(_tensors(folder / "weights.safetensors")),
        gradients=_own_names(_tensors(folder / "grads.safetensors")),
        tokens=io["tokens"].long(),
        logits=io["logits"],
        loss=float(io["loss"]),
        loss_trace=io["loss_trace"].double(),
        grad_norm_trace=io["grad_norm_trace"].double(),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"reference {path}: {one_line(error)}; give a folder of reference numbers") from None


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"reference {path}: {one_line(error)}; give a folder of reference numbers") from None


def _own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {logical_name(name): tensor for name, tensor in tensors.items()}


def reference_plan(reference: Reference, overrides: Sequence[str]) -> RunPlan:
    """The run that made the numbers, with the user's layout on top. Raises: ConfigError."""
    try:
        tree = _reference_tree(reference)
    except KeyError as error:
        raise _incomplete(reference.folder / "config.json", error) from None
    plan = ready_plan(parse_config(tree, overrides))
    config = plan.config
    if (
        config.data.global_batch_size != reference.tokens.shape[1]
        or config.data.seq_length != reference.tokens.shape[2] - 1
    ):
        raise ConfigError("data: the batch and sequence are the reference's; leave data.* out")
    return plan


def _reference_tree(reference: Reference) -> dict[str, Any]:
    sizes, optimizer = reference.config, reference.config["optimizer"]
    if optimizer["schedule"] != "constant":
        raise ConfigError(
            f"reference: optimizer.schedule is {optimizer['schedule']!r}; only constant rates can be compared"
        )
    return {
        "model": reference_model_keys(sizes),
        "depth": _reference_depth(reference),
        "optim": {
            "lr": optimizer["lr"],
            "router_lr": optimizer["router_lr"],
            "betas": optimizer["betas"],
            "eps": optimizer["eps"],
            "weight_decay": optimizer["weight_decay"],
            "max_grad_norm": optimizer["max_grad_norm"],
            "lr_schedule": "constant",
            "warmup_steps": 0,
        },
        "data": {"seq_length": reference.tokens.shape[2] - 1, "global_batch_size": reference.tokens.shape[1]},
        "run": {"steps": reference.tokens.shape[0], "timeout_seconds": 120},
    }


def _reference_depth(reference: Reference) -> dict[str, Any]:
    """Folders of LIMe v2 and LLaMA need not say what they are."""
    has_routers = any(name.endswith("lime_router.weight") for name in reference.weights)
    return reference.config.get("depth", {"router": "static" if has_routers else "none"})


@dataclass(frozen=True)
class _RankReport:
    logits: list[tuple[int, Tensor]]  # first row of the batch, [rows, seq, vocab]
    gradients: Pieces
    losses: list[float]
    grad_norms: list[float]


def _report(config: Config, reference: Reference) -> _RankReport:
    return on_rank(config, _compare_on_rank, reference)


def _compare_on_rank(rank: Rank, reference: Reference) -> _RankReport:
    """Collective: world."""
    set_weights(rank.optimizer, rank.stage, lambda tensor: reference.weights[tensor.name])
    logits = rank.logits(reference.tokens[0])
    losses, grad_norms, gradients = [], [], []
    for step, tokens in enumerate(reference.tokens):
        share = rank.accumulate(tokens)
        if step == 0:
            gradients = local_pieces(rank, rank.optimizer.gradient)
        result = rank.update(share, 1.0)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
    return _RankReport(logits, gradients, losses, grad_norms)


def run_parity(folder: Path, overrides: Sequence[str], timeout: timedelta) -> dict[str, Any]:
    """The differences, and whether all lie within TOLERANCES. Starts its own ranks.

    Raises: ConfigError, DataError; RankFailed when a rank fails.
    """
    reference = read_reference(folder)
    plan = reference_plan(reference, overrides)
    config = plan.config
    _check_names(reference, logical_tensors(config.model, config.pattern))
    reports = run_local_ranks(_report, plan, reference, timeout=timeout)
    differences = _differences(reference, reports)
    layout = {
        **asdict(config.parallel),
        "schedule": config.pipeline.schedule,
        "num_microbatches": config.num_microbatches,
        "partition": [len(layers) for layers in config.chunks],
        "zero_stage": config.zero_stage,
        "dtype": config.run.dtype,
    }
    passed = all(differences[name] <= tolerance for name, tolerance in TOLERANCES.items())
    return {"layout": layout, **differences, "passed": passed}


def _check_names(reference: Reference, expected: dict[str, LogicalTensor]) -> None:
    for what, tensors in (("weights", reference.weights), ("grads", reference.gradients)):
        unmatched = set(tensors) ^ set(expected)
        if unmatched:
            raise DataError(f"reference {what}: {sorted(unmatched)[0]} does not fit config.json; check the folder")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != expected[name].shape:
                raise DataError(
                    f"reference {what}: {name} has shape {list(tensor.shape)}, config.json says {list(expected[name].shape)}"
                )


def _differences(reference: Reference, reports: list[_RankReport]) -> dict[str, Any]:
    gradients = assemble([report.gradients for report in reports])
    relative = {name: _relative(gradients[name], expected) for name, expected in reference.gradients.items()}
    worst = max(relative, key=relative.__getitem__)
    losses = torch.tensor(reports[0].losses, dtype=torch.float64)
    norms = torch.tensor(reports[0].grad_norms, dtype=torch.float64)
    return {
        "logits_max_abs_err": _logits_difference(reference.logits, reports),
        "loss_abs_err": abs(reports[0].losses[0] - reference.loss),
        "grad_max_rel_err": relative[worst],
        "grad_worst": worst,
        "trace_max_abs_err": float((losses - reference.loss_trace).abs().max()),
        "grad_norm_max_rel_err": float(((norms - reference.grad_norm_trace) / reference.grad_norm_trace).abs().max()),
    }


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the tensor's largest magnitude; infinite where either is not a number."""
    difference = float(
        (actual - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    )
    return math.inf if math.isnan(difference) else difference


def _logits_difference(expected: Tensor, reports: list[_RankReport]) -> float:
    actual = torch.full_like(expected, float("nan"))
    for report in reports:
        for row, logits in report.logits:
            actual[row : row + len(logits)] = logits
    difference = (actual - expected).abs().max()
    return math.inf if difference.isnan() else float(difference)
