"""LIMe v2 (arXiv 2502.09245v2): raw keys and values, under fixed signed weights for each pair of heads. Pure data.

With the ablations of its routers, and LLaMA, which is the same model without them. `lime/key_value.py` is the read.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.depth.routing import ModelSizes, Read, Routing
from lime_dist.plan.tensors import Cutter, Initial, LogicalTensor, ParameterSpec, Role, Uniform

ROUTER_INITS = ("identity_uniform", "uniform", "identity_zero")


@dataclass(frozen=True)
class KeyValueEntries(Routing):
    """What the kinds have in common whose entries are raw keys and values."""

    entry_name = "keys and values"
    presummable = True

    def entry_shape(self, model: ModelSizes, rows: int) -> tuple[int, int]:
        return model.kv_heads, 2 * rows * model.head_dim

    def own_initial(self, model: ModelSizes) -> Initial | None:
        """Of every layer, the first included: kaiming_uniform(a = sqrt 5), as torch's linear layers begin."""
        return Uniform(bound=model.hidden_size**-0.5)

    def read_flops(self, model: ModelSizes) -> int:
        """Each head's own source head: a multiply-add an element, two operations."""
        return 2 * model.kv_heads * 2 * model.head_dim


@dataclass(frozen=True)
class KeyValueRouting(KeyValueEntries):
    """Routers [H_kv (reader head), sources, H_kv (source head)]; [H_kv, sources] where a head reads the same heads only.

    router_init: identity_uniform, as in the authors' code: identity on the own layer, elsewhere uniform(-b, b) with
    b = sqrt(3 / inputs), inputs: the source heads that a head reads, over all sources. uniform: on the own layer too.
    identity_zero: identity on the own layer, elsewhere 0.
    heads: all | same.
    """

    router_init: str = ROUTER_INITS[0]
    heads: str = "all"

    name = "kv"

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec:
        num_heads, num_sources = model.kv_heads, len(read.sources)
        shape = (num_heads, num_sources, num_heads) if self.heads == "all" else (num_heads, num_sources)
        inputs = num_sources * num_heads if self.heads == "all" else num_sources
        bound = 0.0 if self.router_init == "identity_zero" else (3.0 / inputs) ** 0.5
        initial = Uniform(bound=bound, own_identity=self.router_init != "uniform")
        tensor = LogicalTensor(read.router_name, shape, Role.ROUTER, initial)
        return cut.places(name, tensor, [read.sources.index(source) for source in read.here])

    def read_flops(self, model: ModelSizes) -> int:
        """A product [H_kv, H_kv] x [H_kv, 2 head_dim] (arXiv 2502.09245v2, eq. 3), two operations a multiply-add."""
        return super().read_flops(model) * (model.kv_heads if self.heads == "all" else 1)


@dataclass(frozen=True)
class AverageKeyValue(KeyValueEntries):
    """The mean over the sources of each head's own keys and values; nothing is learned."""

    name = "kv, average"
    ranks_edges = False

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> None:
        return None


@dataclass(frozen=True)
class NoRouting(AverageKeyValue):
    """LLaMA, where no layer reads another's entry. K and V begin as in Hugging Face's, so that comparisons are fair."""

    name = "none"

    def own_initial(self, model: ModelSizes) -> Initial | None:
        return None


KEY_VALUE, KEY_VALUE_AVERAGE, NO_ROUTING = KeyValueRouting(), AverageKeyValue(), NoRouting()
