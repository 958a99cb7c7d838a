"""A small run under any layout and the same run on one device in plain torch, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from lime_dist.config import Config, check_config, parse_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.lime.model import LimeChunk, model_loss, plain_model
from lime_dist.lime.values import gather_logical, initialize
from lime_dist.plan.run_plan import plan_run
from lime_dist.testing import Pieces, assemble, local_pieces, run_ranks
from lime_dist.training.optim import build_optimizer, set_lr
from lime_dist.training.rank import Rank

LR_FACTORS = (1.0, 0.5, 0.8)  # one a step: a rate that is not set anew shows

# Clipping acts at every step, and AdamW's eps lies above most clipped gradients. With a small eps the update
# is the gradient's sign: blind to a wrong scale, and for elements near zero nothing but rounding. With this one
# it is close to proportional to the gradient, and rates are such that three steps move most weights visibly.
BASE = {
    "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "optim": {"lr": 0.02, "router_lr": 0.1, "eps": 1e-3, "max_grad_norm": 0.5, "warmup_steps": 0},
    "data": {"seq_length": 6, "global_batch_size": 12},
    "pipeline": {"min_message": 0},  # as with large models: entries, sums and their gradients leave one by one
    "run": {"device": "cpu", "seed": 3, "timeout_seconds": 60},
}

SHORT = {
    "tp": "parallel.tp",
    "pp": "parallel.pp",
    "dp": "parallel.dp",
    "zero": "deepspeed.zero_optimization.stage",
    "layers": "model.num_layers",
    "heads": "model.num_heads",
    "kv": "model.num_kv_heads",
    "vocab": "model.vocab_size",
    "seq": "data.seq_length",
    "batch": "data.global_batch_size",
    "split": "pipeline.partition",
    "micro": "pipeline.num_microbatches",
    "size": "data.micro_batch_size",
    "pattern": "depth.pattern",
    "relay": "depth.policy=relay",
    "cost": "pipeline.boundary_cost",
    "sums32": "depth.partial_sum_dtype=fp32",
    "sp": "parallel.sequence_parallel=true",
    "gpipe": "pipeline.schedule=gpipe",
    "recompute": "parallel.recompute=layer",
    "llama": "depth.router=none",
    "untied": "model.tie_embeddings=false",
    "bf16": "run.dtype=bf16",
    "unclipped": "optim.max_grad_norm=0",
    "lr": "optim.lr",
    "eps": "optim.eps",
    "hidden": "depth.entry=hidden",
    "dynamic": "depth.router=dynamic",
    "policy": "depth.policy",
    "v": "parallel.virtual_stages",
    "warmup": "pipeline.warmup",
    "packed": "pipeline.min_message=256KiB",
}


def overrides(text: str) -> list[str]:
    """From words of `SHORT`, such as "tp=2 pp=3 sp split=[1,2,1]"."""
    words = (word.partition("=") for word in text.split())
    return [SHORT[name] + equals + value for name, equals, value in words]


def make_config(text: str = "", *more: str, **run: float) -> Config:
    """A checked config from words of `SHORT` and `more` whole overrides."""
    config = parse_config(BASE, [*overrides(text), *more, *(f"run.{name}={value}" for name, value in run.items())])
    return check_config(config, config.layout.world_size)


def write_short_documents(folder: Path) -> None:
    """Token files `train` and `valid` of 96 ids: a Zipf-like text, whose loss falls, so that a wrong or repeated batch shows."""
    generator = np.random.default_rng(5)
    for name, count in (("train", 40), ("valid", 15)):
        documents = [np.minimum(generator.zipf(1.3, generator.integers(20, 60)), 95) for _ in range(count)]
        with IndexedWriter(folder / name, vocab_size=96) as writer:
            for document in documents:
                writer.add_document(document)
            writer.commit({"vocab_size": 96, "tokens": sum(map(len, documents))})


def make_batches(config: Config, count: int = len(LR_FACTORS)) -> list[Tensor]:
    """Token ids [global batch, seq + 1], all different, so that a row that is lost or read twice shows."""
    generator = torch.Generator().manual_seed(7)
    shape = (config.data.global_batch_size, config.data.seq_length + 1)
    return [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(count)]


@dataclass
class Outcome:
    """A run of `LR_FACTORS` steps; tensors are logical ones, by name."""

    losses: list[float]
    grad_norms: list[float]  # before clipping
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]  # after the last


# ---- one device


def make_plain(config: Config) -> LimeChunk:
    model = plain_model(config.model, config.pattern)
    initialize(model, config.run.seed)
    return model


def run_plain(config: Config) -> Outcome:
    """The reference: plain model, torch's AdamW and clipping, the whole batch at once, fp32."""
    model = make_plain(config)
    optimizer = build_optimizer(model, config)
    outcome = Outcome([], [], {}, {})
    for step, batch in enumerate(make_batches(config)):
        optimizer.zero_grad()
        loss = model_loss(model, batch)
        loss.backward()
        if step == 0:
            outcome.gradients = {name: value.clone() for name, value in gather_logical(model, lambda p: p.grad).items()}
        outcome.losses.append(float(loss))
        clip = config.optim.max_grad_norm or float("inf")
        outcome.grad_norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        set_lr(optimizer, LR_FACTORS[step])
        optimizer.step()
    outcome.weights = {name: value.detach() for name, value in gather_logical(model, lambda p: p).items()}
    return outcome


# ---- ranks


@dataclass
class RankOutcome:
    losses: list[float]
    grad_norms: list[float]
    boundary_bytes: list[list[int]]
    gradients: Pieces
    weights: Pieces


def run_layout(config: Config, run: Callable[..., list] = run_ranks) -> tuple[Outcome, list[RankOutcome]]:
    """The same run on the layout's ranks, begun by `run`: put together, and as each rank saw it."""
    ranks = run(config, _run_rank, make_batches(config))
    whole = Outcome(
        ranks[0].losses,
        ranks[0].grad_norms,
        assemble([rank.gradients for rank in ranks]),
        assemble([rank.weights for rank in ranks]),
    )
    return whole, ranks


def _run_rank(rank: Rank, batches: list[Tensor]) -> RankOutcome:
    outcome = RankOutcome([], [], [], [], [])
    for step, batch in enumerate(batches):
        share = rank.accumulate(batch)
        if step == 0:
            outcome.gradients = local_pieces(rank, rank.optimizer.gradient)
        result = rank.update(share, LR_FACTORS[step])
        outcome.losses.append(result.loss)
        outcome.boundary_bytes.append(result.boundary_bytes)
        outcome.grad_norms.append(result.grad_norm)
    outcome.weights = local_pieces(rank, weight_of(rank))
    return outcome


def weight_of(rank: Rank) -> Callable[[nn.Parameter], Tensor]:
    """A parameter's values; under ZeRO 3 a rank holds a share of each."""
    return safe_get_full_fp32_param if rank.config.zero_stage == 3 else lambda parameter: parameter


# ---- comparing


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """For each tensor the largest difference, relative to its largest magnitude."""
    assert actual.keys() == expected.keys()
    return {name: float((actual[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of its largest magnitude; a tensor of zeros never is, nor are NaNs."""
    wrong = {name: value for name, value in differences(actual, expected).items() if not value < tolerance}
    assert not wrong


# fp32 has 24 bits (6e-8); a layout only changes the order in which some hundred products are summed, by which
# differences of 1e-6 of a tensor's largest magnitude were seen. Anything forgotten, counted twice or scaled wrongly is far above.
TOLERANCE = 1e-5
# Where eps is far above a gradient, an update multiplies what the gradient differs by with lr / eps = 20. In a row of the tied
# embedding 1.3e-5 was seen, on one kind of CPU.
OF_WEIGHTS = 3


def assert_equals_the_single_process(
    config: Config, run: Callable[..., list] = run_ranks, tolerance: float = TOLERANCE
) -> None:
    """Loss, gradient norm, every gradient, the weights after steps; ranks agree; bytes sent are those planned."""
    expected = run_plain(config)
    actual, ranks = run_layout(config, run)

    assert min(expected.grad_norms) > config.optim.max_grad_norm, "clipping would not show"
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=tolerance)
    assert_close(actual.gradients, expected.gradients, tolerance)
    assert_close(actual.weights, expected.weights, OF_WEIGHTS * tolerance)

    planned = [config.num_microbatches * count for count in plan_run(config).boundary_bytes]
    for rank in ranks:
        assert (rank.losses, rank.grad_norms) == (actual.losses, actual.grad_norms), "ranks disagree"
        assert rank.boundary_bytes == [planned] * len(rank.losses)
