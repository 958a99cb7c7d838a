"""What a kind of depth routing is to the plan, the config, checkpoints and the optimiser. Pure data.

A kind says what a layer leaves for later layers, its *entry*, and how a *reader*, a layer with a router, weighs the
entries of its sources. Each kind is a module beside this one, which `kinds.py` lists; how a layer reads is its other
half, a `lime.depth.Depth`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy

from lime_dist.plan.tensors import Cutter, Initial, LogicalTensor, ParameterSpec, Role


class ModelSizes(Protocol):
    """What a kind asks of `ModelConfig`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class Read:
    """One reader on one chunk; layers ascending.

    sources: all that it reads, its own layer last. here: those of them whose entries this chunk adds up.
    """

    reader: int
    sources: tuple[int, ...]
    here: tuple[int, ...]

    @property
    def router_name(self) -> str:
        return router_name(self.reader)


@dataclass(frozen=True)
class Routing(ABC):
    """One kind of depth routing. Its fields are those of the keys of `depth` that it takes.

    A reader has one router, the logical tensor `Read.router_name` of role `Role.ROUTER`, if its weights are learned.
    """

    name: ClassVar[str]  # in a plan's record
    entry_name: ClassVar[str]  # in words: a layer's ...
    # Whether sums over sources may cross stages in place of entries: only if they are of an entry's size, and their
    # weights are known before the reader's input is.
    presummable: ClassVar[bool]
    # Whether trained routers can rank edges: those that are learned, and the same for all tokens.
    ranks_edges: ClassVar[bool] = True
    decays_routers: ClassVar[bool] = False  # whether `optim.weight_decay` is for routers too

    @abstractmethod
    def entry_shape(self, model: ModelSizes, rows: int) -> tuple[int, int]:
        """(source heads, elements behind each) of the entry of `rows` tokens."""

    def own_attention(self, cut: Cutter, model: ModelSizes, layer: int) -> ParameterSpec:
        """Q, K and V of a layer that makes all of them of its own input, in one matrix."""
        sections = [queries(model, layer), *keys_values(model, layer, self.own_initial(model))]
        return cut.columns(f"{attention_prefix(layer)}qkv_proj.weight", sections)

    def own_initial(self, model: ModelSizes) -> Initial | None:
        """What K and V of such a layer begin with; None: as other matrices do."""
        return None

    def reader_parameters(self, cut: Cutter, model: ModelSizes, reader: int) -> Iterator[ParameterSpec]:
        """Of the attention of a layer with a router, but for the router and the output projection."""
        yield self.own_attention(cut, model, reader)

    @abstractmethod
    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec | None:
        """The parameter `name`: the reader's router over the sources that this chunk adds; None where nothing is learned.

        Of a presummable kind each chunk that adds some owns that slice of it; of others the reader's chunk adds all.
        """

    @abstractmethod
    def read_flops(self, model: ModelSizes) -> int:
        """Forward, of one source of one reader, a token, over the whole tensor group."""

    def kept_bytes(self, model: ModelSizes, num_sources: int, rows: int, element_bytes: int) -> int:
        """What the read of one reader keeps for its backward pass, besides entries and the keys and values that come of it.

        rows: tokens of a microbatch on a tensor rank.
        """
        return 0

    def source_weights(self, router: numpy.ndarray) -> numpy.ndarray:
        """What a trained router gives each source, [heads, sources, ...]; kinds that `ranks_edges` only."""
        return router

    def without_sources(self, router: numpy.ndarray, num_sources: int, places: list[int]) -> numpy.ndarray:
        """A whole router over `num_sources` cut to those at `places`."""
        return router[:, places]


def attention_prefix(layer: int) -> str:
    return f"layers.{layer}.self_attn."


def router_name(reader: int) -> str:
    return f"{attention_prefix(reader)}lime_router.weight"


def queries(model: ModelSizes, layer: int) -> LogicalTensor:
    shape = model.num_heads * model.head_dim, model.hidden_size
    return LogicalTensor(f"{attention_prefix(layer)}q_proj.weight", shape, Role.PROJECTION)


def keys_values(model: ModelSizes, layer: int, initial: Initial | None) -> list[LogicalTensor]:
    shape = model.kv_heads * model.head_dim, model.hidden_size
    names = (f"{attention_prefix(layer)}{name}.weight" for name in ("k_proj", "v_proj"))
    return [LogicalTensor(name, shape, Role.PROJECTION, initial) for name in names]
