"""What logical tensors are called, and how they lie, in the files of others. Pure data but for numpy.

Hugging Face's names are the logical ones behind `model.`, but for the head. The LIMe authors' code keeps K and V, the routers
and, in v1, queries and norms in parameters of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy

from lime_dist.config import ModelConfig
from lime_dist.plan.tensors import LogicalTensor, Role

_PREFIX = "model."
_HEAD = "lm_head.weight"


def published_name(logical_name: str) -> str:
    """As in Hugging Face's LLaMA."""
    return logical_name if logical_name == _HEAD else f"{_PREFIX}{logical_name}"


def logical_name(published: str) -> str:
    return published.removeprefix(_PREFIX)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a logical tensor is found: the tensor `name` of `shape`, and what `take` makes of its values."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[numpy.ndarray], numpy.ndarray] = lambda values: values


def stored_as_published(tensor: LogicalTensor) -> Stored:
    return Stored(name=published_name(tensor.name), shape=tensor.shape)


# ---- the authors' code


V2_KEYS_VALUES, V1_KEYS = "self_attn.kv_proj_weight", "self_attn.k_proj_lime.lime_kv_proj"
_V1_STATIC, _V1_DYNAMIC = "attention_router.static_weights", "attention_router.dynamic_proj.0.weight"


def v1_readers(names: Collection[str]) -> list[int]:
    """The layers with a router in a state dict of the authors' v1."""
    ends = (f".{_V1_STATIC}", f".{_V1_DYNAMIC}")
    return sorted(int(part) for name in names if name.endswith(ends) and (part := name.split(".")[2]).isdecimal())


def has_dynamic_routers(names: Collection[str]) -> bool:
    return any(name.endswith(_V1_DYNAMIC) for name in names)


def stored_in_v2(tensor: LogicalTensor, model: ModelConfig) -> Stored:
    """K and V are one matrix whose rows go over (K and V, element of a head), and within each over the heads."""
    plain = stored_as_published(tensor)
    layer, _, own = plain.name.partition(".self_attn.")
    if own in ("k_proj.weight", "v_proj.weight"):
        return replace(
            plain,
            name=f"{layer}.{V2_KEYS_VALUES}",
            shape=(2 * tensor.shape[0], model.hidden_size),
            take=_half_of_v2(model, second=own.startswith("v")),
        )
    if tensor.role is Role.ROUTER:
        heads, sources, _ = tensor.shape
        name = f"{layer}.self_attn.lime_router.static_weights"
        return replace(
            plain, name=name, shape=(heads, sources * heads), take=lambda values: values.reshape(tensor.shape)
        )
    return plain


def _half_of_v2(model: ModelConfig, *, second: bool) -> Callable[[numpy.ndarray], numpy.ndarray]:
    def take(values: numpy.ndarray) -> numpy.ndarray:
        half = values.reshape(2, model.head_dim, model.kv_heads, model.hidden_size)[int(second)]
        return half.swapaxes(0, 1).reshape(-1, model.hidden_size)

    return take


def stored_in_v1(tensor: LogicalTensor, model: ModelConfig, readers: Collection[int]) -> Stored:
    """K and V of a reader are [1, heads, hidden, head_dim], used from the left."""
    plain = stored_as_published(tensor)
    if not any(tensor.name.startswith(f"layers.{reader}.") for reader in readers):
        return plain
    layer, _, own = plain.name.partition(".self_attn.")
    if own in ("k_proj.weight", "v_proj.weight"):
        shape = (1, model.kv_heads, model.hidden_size, model.head_dim)
        name = f"{layer}.self_attn.{own[0]}_proj_lime.lime_kv_proj"
        return replace(
            plain, name=name, shape=shape, take=lambda values: values[0].swapaxes(1, 2).reshape(tensor.shape)
        )
    names = {
        "q_proj.weight": "self_attn.q_proj_default.weight",
        "depth_norm.weight": "input_layernorm_lime.weight",
        "lime_router.weight": _V1_STATIC if tensor.shape[0] == model.kv_heads else _V1_DYNAMIC,
    }
    return replace(plain, name=f"{layer}.{names[own]}") if own in names else plain


def derived_names(num_layers: int) -> Iterator[str]:
    """Buffers of old files that follow from the config."""
    yield "model.rotary_emb.inv_freq"
    for layer in range(num_layers):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
