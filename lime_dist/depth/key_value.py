"""LIMe v2 (arXiv 2502.09245v2): raw keys and values, under fixed signed weights for each pair of heads. Pure data.

`lime/key_value.py` is the read.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.depth.routing import ModelSizes, Read, Routing
from lime_dist.plan.tensors import Cutter, LogicalTensor, ParameterSpec, Role, Uniform


@dataclass(frozen=True)
class KeyValueRouting(Routing):
    """Routers [H_kv (reader head), sources, H_kv (source head)]."""

    name = "kv"
    entry_name = "keys and values"
    presummable = True

    def entry_shape(self, model: ModelSizes, rows: int) -> tuple[int, int]:
        return model.kv_heads, 2 * rows * model.head_dim

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec:
        """Begins as in the authors' code: identity on the own layer, elsewhere uniform(-b, b), b = sqrt(3 / (sources * H_kv))."""
        num_heads, num_sources = model.kv_heads, len(read.sources)
        initial = Uniform(bound=(3.0 / (num_sources * num_heads)) ** 0.5, own_identity=True)
        tensor = LogicalTensor(read.router_name, (num_heads, num_sources, num_heads), Role.ROUTER, initial)
        return cut.places(name, tensor, [read.sources.index(source) for source in read.here])

    def read_flops(self, model: ModelSizes) -> int:
        """A product [H_kv, H_kv] x [H_kv, 2 head_dim] (arXiv 2502.09245v2, eq. 3), two operations a multiply-add."""
        return 2 * model.kv_heads * model.kv_heads * 2 * model.head_dim


KEY_VALUE = KeyValueRouting()
