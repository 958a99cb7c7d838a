"""What an entry is, how a reader weighs entries, and what follows from it for sizes and plans. Pure data."""

from __future__ import annotations

from enum import Enum


class Routing(Enum):
    """KEY_VALUE: LIMe v2 (arXiv 2502.09245v2); the others v1 (arXiv 2502.09245v1), whose entries are hidden states."""

    KEY_VALUE = "kv"  # a layer's raw keys and values, under fixed signed weights for each pair of heads
    HIDDEN_STATIC = "hidden, static"  # a layer's input, under a fixed softmax over the sources for each head
    HIDDEN_DYNAMIC = "hidden, dynamic"  # the same, with weights that follow from the reader's own input

    @property
    def presummable(self) -> bool:
        """Whether sums over sources may cross stages in place of entries.

        A reader of hidden states has a mix for each KV head, each as large as an entry, and weights that follow
        from the reader's input are not known before it: entries cross as they are.
        """
        return self is Routing.KEY_VALUE

    @property
    def entry_name(self) -> str:
        """In words: a layer's ..."""
        return "keys and values" if self is Routing.KEY_VALUE else "normalised input"

    def entry_shape(self, *, rows: int, hidden_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """(source heads, elements behind each) of the entry of `rows` tokens."""
        if self is Routing.KEY_VALUE:
            return num_kv_heads, 2 * rows * head_dim
        return 1, rows * hidden_size
