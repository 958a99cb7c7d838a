"""How the layers of one chunk read earlier ones: the half of a kind of depth routing that runs on a device.

`depth/routing.py` is the other half, which sizes and names what this one holds. `model.DEPTHS` joins them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lime_dist.config import ModelConfig
from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.layers import Attention, OwnAttention
from lime_dist.lime.parts import Parts
from lime_dist.plan.transfer import ChunkTransfer


class Depth(ABC):
    """Of one chunk. Made once; the modules that it gives belong to the chunk.

    A layer leaves its entry and reads others' inside `Attention.project`, by the memory of the pass.
    """

    def __init__(self, model: ModelConfig, transfer: ChunkTransfer, layers: range, parts: Parts):
        self.model, self.transfer, self.layers, self.parts = model, transfer, layers, parts
        self.entries = transfer.own_entries(layers)
        self.partial_routers: dict[int, nn.Module] = {}  # of later chunks' readers, where sums are begun early

    def attention(self, layer: int) -> Attention:
        """A layer whose entry nothing reads is LLaMA's."""
        return self.routed(layer) if layer in self.entries else OwnAttention(self.model, layer, self.parts)

    @abstractmethod
    def routed(self, layer: int) -> Attention:
        """The attention of a layer that leaves an entry, and has a router if it is in `transfer.reads`."""

    def add_received(self, memory: DepthMemory, chain: Tensor) -> Tensor:
        """Before the chunk's layers: begin sums, or go on with them. Returns the chain behind it."""
        return chain

    def add_own(self, memory: DepthMemory, chain: Tensor) -> Tensor:
        """Behind the chunk's layers: the same, of the entries that they left."""
        return chain
