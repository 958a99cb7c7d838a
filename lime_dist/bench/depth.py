"""`lime-dist bench depth`: what depth routing costs, against the paper's growing `cat` and against the LLaMA twin.

Two parts, at grouped-query and at multi-head shape, each with its backward pass:

- *routed read*: the depth memory alone. Every layer leaves its entry and reads the mix of all so far.
- *whole step*: the model on one microbatch, gradients added to those of earlier ones. No optimizer step and
  a small vocabulary: both cost every way the same and would only bring the ratios closer to 1.

The ways take turns, and a ratio is the median of the ratios within each round, so that other work on the
machine slows both sides alike. Memory leaves out what is there before the forward pass: weights, their
gradients, and the inputs of the routed read.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lime_dist.bench.reference import GrowingCat
from lime_dist.config import ModelConfig
from lime_dist.depth.pattern import none_pattern, parse_pattern
from lime_dist.errors import ConfigError
from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.model import LimeStage, plain_model
from lime_dist.lime.parts import PlainParts
from lime_dist.lime.values import initialize
from lime_dist.plan.transfer import plan_transfer

OURS, CAT, LLAMA = "lime_dist", "growing `cat`", "LLaMA"
COMPARISONS = ((OURS, CAT), (OURS, LLAMA), (CAT, LLAMA))
NUM_HEADS, KV_HEADS = 32, (8, 32)  # of the paper's 1B models, as is an intermediate size of 4 x the hidden size
VOCAB_SIZE = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20

Forward = Callable[[], tuple[list[Tensor], list[Tensor | None]]]  # roots of the backward pass, and their gradients


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A microbatch is one sequence of `num_tokens`."""

    num_layers: int = 16
    hidden_size: int = 1024
    num_tokens: int = 512

    def __post_init__(self) -> None:
        if self.num_layers < 2:
            raise ConfigError(f"--layers: {self.num_layers} leaves no earlier layer to read; use 2 or more")
        if self.hidden_size % (2 * NUM_HEADS):
            raise ConfigError(f"--hidden-size: {self.hidden_size} is not a multiple of {2 * NUM_HEADS}")

    def model(self, kv_heads: int) -> ModelConfig:
        return ModelConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_heads=NUM_HEADS,
            num_kv_heads=kv_heads,
            vocab_size=VOCAB_SIZE,
        )


# ---- what is measured


def read_ways(sizes: Sizes, kv_heads: int, dtype: torch.dtype, device: torch.device) -> dict[str, Forward]:
    """The depth memory alone, between projections [tokens, 2 * H_kv * head_dim] and routed entries."""
    tokens, head_dim = sizes.num_tokens, sizes.model(kv_heads).head_dim
    layers = range(sizes.num_layers)
    factory: dict[str, Any] = {"dtype": dtype, "device": device}
    projections = [torch.randn(tokens, 2 * kv_heads * head_dim, requires_grad=True, **factory) for _ in layers]
    routers = [torch.randn(kv_heads, layer + 1, kv_heads, requires_grad=True, **factory) for layer in layers]
    gradient = torch.randn(kv_heads, 2, tokens, head_dim, **factory)

    def read_all(memory: DepthMemory | GrowingCat) -> tuple[list[Tensor], list[Tensor | None]]:
        token, routed = memory.start(), []
        for layer in layers:
            entry = projections[layer].unflatten(-1, (2, kv_heads, head_dim)).permute(2, 1, 0, 3)
            token = memory.write(layer, entry, token)
            if layer:
                mixed = memory.read(layer, routers[layer], tuple(layers[: layer + 1]), token)
                routed.append(mixed.view(gradient.shape))
        return routed, [gradient] * len(routed)

    alone = plan_transfer(parse_pattern("full", len(layers)), (layers,), policy="relay").chunk(0)

    def new_memory() -> DepthMemory:
        return DepthMemory(
            alone,
            own_entries=layers,
            blocks=(),
            num_kv_heads=kv_heads,
            row_size=2 * tokens * head_dim,
            sum_dtype=dtype,
            **factory,
        )

    return {OURS: lambda: read_all(new_memory()), CAT: lambda: read_all(GrowingCat(tokens, head_dim, **factory))}


def step_ways(sizes: Sizes, kv_heads: int, dtype: torch.dtype, device: torch.device) -> dict[str, Forward]:
    """The model and its twin without routers, on the same tokens."""
    config, num_tokens = sizes.model(kv_heads), sizes.num_tokens
    lime, llama = (
        plain_model(config, pattern, PlainParts(dtype, device))
        for pattern in (parse_pattern("full", sizes.num_layers), none_pattern(sizes.num_layers))
    )
    initialize(lime, seed=0)
    initialize(llama, seed=0)
    inputs, targets = torch.randint(VOCAB_SIZE, (2, 1, num_tokens), device=device)

    def loss(model: LimeStage, memory: DepthMemory | GrowingCat) -> tuple[list[Tensor], list[Tensor | None]]:
        return [model(inputs, 1, num_tokens, memory, targets)[0]], [None]

    return {
        OURS: lambda: loss(lime, lime.new_memory(num_tokens)),
        CAT: lambda: loss(lime, GrowingCat(num_tokens, config.head_dim, dtype=dtype, device=device)),
        LLAMA: lambda: loss(llama, llama.new_memory(num_tokens)),
    }


PARTS = {"routed read": read_ways, "whole step": step_ways}


# ---- how it is measured


@dataclass
class Cost:
    """Of one way: wall time of each round; bytes alive between forward and backward pass; most bytes alive at once."""

    held_bytes: int
    peak_bytes: int
    seconds: list[float] = field(default_factory=list)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made while it is on and still alive, and their peak; on any device.

    Exact for what torch operations return, blind to what a kernel allocates for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = _storages((args, kwargs))
        for key, storage in _storages(result).items():
            if key not in given:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage.nbytes()).atexit = False

    def _remove(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}


class CudaBytes:
    """What the CUDA allocator has handed out since entering, and its peak."""

    def __enter__(self) -> CudaBytes:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated() - self._before

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


def measure_memory(forward: Forward, device: torch.device) -> Cost:
    """One forward and backward pass; `held` leaves out the results of the forward pass themselves."""
    with CudaBytes() if device.type == "cuda" else LiveBytes() as memory:
        roots, gradients = forward()
        held = memory.live - sum(root.nbytes for root in roots)
        torch.autograd.backward(roots, gradients)
    return Cost(held, memory.peak)


def measure_seconds(forward: Forward, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    torch.autograd.backward(*forward())
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    ways: dict[str, Forward], repeats: int, device: torch.device, label: str, progress: Callable[[str], None]
) -> dict[str, Cost]:
    """Warm up, measure memory once, then time `repeats` rounds in which the ways take turns."""
    progress(label + "warm-up")
    for forward in ways.values():
        torch.autograd.backward(*forward())  # makes the gradients of the leaves, to which all later passes add
    progress(label + "memory")
    costs = {way: measure_memory(forward, device) for way, forward in ways.items()}
    for repeat in range(repeats):
        progress(f"{label}round {repeat + 1} of {repeats}")
        for way, forward in ways.items():
            costs[way].seconds.append(measure_seconds(forward, device))
    return costs


# ---- what is reported


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One way against another: ratios below 1 mean cheaper, pairs are (this way, the other)."""

    part: str
    kv_heads: int
    way: str
    against: str
    time_ratio: float
    time_ratio_range: tuple[float, float]  # lowest and highest round
    milliseconds: tuple[float, float]  # medians
    held_mib: tuple[float, float]
    peak_mib: tuple[float, float]


def compare(part: str, kv_heads: int, costs: dict[str, Cost]) -> list[Comparison]:
    return [
        _comparison(part, kv_heads, way, against, costs[way], costs[against])
        for way, against in COMPARISONS
        if way in costs and against in costs
    ]


def _comparison(part: str, kv_heads: int, way: str, against: str, cost: Cost, other: Cost) -> Comparison:
    ratios = [mine / theirs for mine, theirs in zip(cost.seconds, other.seconds, strict=True)]
    return Comparison(
        part=part,
        kv_heads=kv_heads,
        way=way,
        against=against,
        time_ratio=median(ratios),
        time_ratio_range=(min(ratios), max(ratios)),
        milliseconds=(1e3 * median(cost.seconds), 1e3 * median(other.seconds)),
        held_mib=(cost.held_bytes / MIB, other.held_bytes / MIB),
        peak_mib=(cost.peak_bytes / MIB, other.peak_bytes / MIB),
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """All comparisons of one run, and what they were measured on."""

    sizes: Sizes
    repeats: int
    dtype: str
    device: str
    num_threads: int
    torch_version: str
    comparisons: list[Comparison]

    def to_markdown(self) -> str:
        """A table for the README: each ratio with the two figures behind it."""
        header = (
            "part",
            "KV heads",
            "way : other",
            "time (lowest to highest round)",
            "held for the backward pass",
            "peak",
        )
        rows = (header, ("---",) * len(header), *map(_cells, self.comparisons))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{self._circumstances()}"

    def _circumstances(self) -> str:
        sizes = self.sizes
        return (
            f"Forward and backward pass of {sizes.num_layers} layers, hidden size {sizes.hidden_size:,}, "
            f"{NUM_HEADS} heads, {sizes.num_tokens:,} tokens; {self.dtype}, {self.device}, {self.num_threads} threads, "
            f"torch {self.torch_version}; median of {self.repeats} rounds. Below 1: the first of the two is cheaper."
        )


def _cells(comparison: Comparison) -> tuple[str, ...]:
    lowest, highest = comparison.time_ratio_range
    return (
        comparison.part,
        f"{comparison.kv_heads} of {NUM_HEADS}",
        f"{comparison.way} : {comparison.against}",
        f"**{comparison.time_ratio:.2f}** ({lowest:.2f} to {highest:.2f}), {_pair(comparison.milliseconds)} ms",
        *(f"**{pair[0] / pair[1]:.2f}**, {_pair(pair)} MiB" for pair in (comparison.held_mib, comparison.peak_mib)),
    )


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:,.0f} : {pair[1]:,.0f}"


def run_depth(sizes: Sizes, *, repeats: int, dtype: str, device: str, progress: Callable[[str], None]) -> Report:
    """Measure every part at every head shape. device: cpu, cuda or auto.

    Raises: ConfigError for a GPU that is not there.
    """
    place = _device(device)
    torch.manual_seed(0)
    comparisons = []
    for kv_heads in KV_HEADS:
        for part, ways_of in PARTS.items():
            label = f"{part}, {kv_heads} of {NUM_HEADS} KV heads: "
            progress(label + "build")
            ways = ways_of(sizes, kv_heads, DTYPES[dtype], place)
            comparisons += compare(part, kv_heads, measure(ways, repeats, place, label, progress))
    return Report(
        sizes=sizes,
        repeats=repeats,
        dtype=dtype,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        num_threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        comparisons=comparisons,
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: cuda, but there is no GPU here; use cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
