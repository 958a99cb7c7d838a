"""What the model costs in operations. Pure data. A multiply-add counts as two; norms, softmax and rotations are not counted.

Counted as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) and torchtitan, with LIMe's routing on top: the matrix
products of the model as it is written down, attention over the whole sequence though half of it is masked, and a backward pass
as two forward passes. What `parallel.recompute` computes again is not counted, so that figures of runs can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.config import Config, ModelConfig
from lime_dist.plan.transfer import ChunkTransfer

BACKWARD_FACTOR = 2  # the gradients of a product's two factors
STEP_FACTOR = 1 + BACKWARD_FACTOR


@dataclass(frozen=True, kw_only=True)
class ChunkFlops:
    """Forward, a token, over the whole tensor group.

    layers: projections of attention (Q, K, V and output), attention itself and SwiGLU of all the chunk's layers.
    routing: see `routing_flops_per_token`. head: of the last chunk; the embedding is a look-up.
    """

    layers: int
    routing: int
    head: int

    @property
    def total(self) -> int:
        return self.layers + self.routing + self.head


def chunk_flops(config: Config, transfer: ChunkTransfer, layers: range) -> ChunkFlops:
    model = config.model
    return ChunkFlops(
        layers=len(layers) * layer_flops_per_token(model, config.data.seq_length),
        routing=routing_flops_per_token(model, transfer),
        head=2 * model.hidden_size * model.vocab_size if layers.stop == model.num_layers else 0,
    )


def layer_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward, of one layer without its routing: 2 (2 h H d + 2 h H_kv d + 3 h i) + 4 s H d.

    h: hidden size, H and H_kv: query and KV heads, d: their size, i: intermediate size, s: sequence length. A reader of
    LIMe v1 has as many: it makes keys and values of each head's mixture in place of its input.
    """
    query_size, kv_size = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    projections = 2 * model.hidden_size * (2 * query_size + 2 * kv_size)
    feed_forward = 2 * model.hidden_size * 3 * model.intermediate_size
    attention = 4 * seq_length * query_size
    return projections + feed_forward + attention


def routing_flops_per_token(model: ModelConfig, transfer: ChunkTransfer) -> int:
    """Forward, over the whole tensor group: what a chunk adds to its own readers' sums and to partial sums."""
    num_reads = sum(len(sources) for sources in transfer.reads.values())
    return num_reads * transfer.pattern.routing.read_flops(model)
