"""`config.json` of Hugging Face's form from and to the keys `model` and `depth`. Pure data.

What it says that this model has not is refused by its name: nothing of it is left out in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lime_dist.config import Config, check_config, parse_config
from lime_dist.depth.pattern import Pattern
from lime_dist.errors import ConfigError, LimeDistError, PlanError, one_line, shown

LLAMA, LIME = "llama", "lime"
MODULE_FILE = "modeling_lime.py"
_MODULE = MODULE_FILE.removesuffix(".py")

# ---- writing


def config_json(config: Config, *, dtype: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """Of the model of `config`. dtype: float32 | bfloat16. token_ids: such as bos_token_id, of the tokenizer."""
    model = config.model
    sizes = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": config.data.seq_length,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        "bos_token_id": None,  # else LLaMA's own, which are others
        "eos_token_id": None,
    }
    return _kind(config) | sizes | dict(token_ids)


def _kind(config: Config) -> dict[str, Any]:
    if config.depth.router == "none":
        # Releases of transformers read one or the other place of rope_theta.
        rope = {"rope_type": "default", "rope_theta": config.model.rope_theta}
        return {"architectures": ["LlamaForCausalLM"], "model_type": LLAMA, "rope_parameters": rope}
    depth, pattern = config.depth, config.pattern
    edges = depth.is_chosen or not isinstance(depth.pattern, str)
    return {
        "architectures": ["LimeForCausalLM"],
        "model_type": LIME,
        "auto_map": {
            "AutoConfig": f"{_MODULE}.LimeConfig",
            "AutoModel": f"{_MODULE}.LimeModel",
            "AutoModelForCausalLM": f"{_MODULE}.LimeForCausalLM",
        },
        "lime_router": depth.router,
        "lime_entry": depth.entry,
        "lime_heads": depth.heads,
        "lime_head_top_p": depth.head_top_p,
        "lime_sources": [list(sources) for sources in pattern.sources],
        "lime_blocks": [[block[0], block[-1]] for block in pattern.blocks],
        "lime_pattern": None if edges else depth.pattern,  # None: the edges are what there is
        "lime_pattern_name": depth.name if depth.is_chosen else depth.pattern_name,
    }


# ---- reading


_SIZES = {  # key -> (key of `model`, of which type, what LLaMA's config.json may leave out)
    "num_hidden_layers": ("num_layers", int, None),
    "hidden_size": ("hidden_size", int, None),
    "intermediate_size": ("intermediate_size", int, None),
    "num_attention_heads": ("num_heads", int, None),
    "num_key_value_heads": ("num_kv_heads", int, "heads"),
    "vocab_size": ("vocab_size", int, None),
    "tie_word_embeddings": ("tie_embeddings", bool, False),
    "rms_norm_eps": ("rms_norm_eps", float, 1e-6),
}
_OF_REFERENCES = {"num_hidden_layers": "num_layers", "num_key_value_heads": "num_kv_heads"}
_DEFAULT_THETA = 10000.0
_LONGEST = 2**22  # tokens; `data.seq_length` takes no more

# Key -> the values with which the model is ours.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": (),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "is_decoder": (True, False),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "num_local_experts": (),
    "num_experts": (),
}


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a config.json says: the keys `model` and `depth`, and the longest text that the model was made for."""

    model: dict[str, Any]
    depth: dict[str, Any] = field(default_factory=lambda: {"router": "none"})
    seq_length: int | None = None
    sources: Any = None  # of `lime_sources` and `lime_blocks`, to compare with
    blocks: Any = None

    def config(self, more: Mapping[str, Any] | None = None) -> Config:
        """Checked. Raises: ConfigError, which names config.json."""
        data = {} if self.seq_length is None else {"seq_length": self.seq_length}
        tree = {"model": self.model, "depth": self.depth, "data": data | dict(more or {})}
        try:
            config = check_config(parse_config(tree))
            pattern = config.pattern
        except LimeDistError as error:
            raise ConfigError(f"config.json: {one_line(error)}") from None
        if self.sources is not None:
            _check_pattern(pattern, self.sources, self.blocks)
        return config


def describe(values: Any) -> Described:
    """Raises: ConfigError, which names the key of config.json."""
    if not isinstance(values, Mapping):
        raise ConfigError("config.json: no mapping of keys; give a folder that transformers reads")
    if "model_type" not in values and "num_layers" in values:
        return _describe_reference(values)
    kind = values.get("model_type")
    if kind not in (LLAMA, LIME):
        raise ConfigError(
            f"config.json: model_type: {shown(kind)} is neither {LLAMA} nor {LIME}; give a folder of these"
        )
    _check_features(values)
    model = _sizes(values) | {"rope_theta": _rope_theta(values)}
    _check_head_dim(values, model)
    if kind == LLAMA:
        return Described(model=model, seq_length=_seq_length(values))
    return Described(
        model=model,
        depth=_depth(values),
        seq_length=_seq_length(values),
        sources=values.get("lime_sources"),
        blocks=values.get("lime_blocks", []),
    )


def _describe_reference(values: Mapping[str, Any]) -> Described:
    depth = values.get("depth")
    if depth is not None and not isinstance(depth, Mapping):
        raise _wrong("depth", depth, "a mapping with router and entry")
    try:
        model = reference_model_keys(values)
    except KeyError as error:
        raise ConfigError(f"config.json: {error.args[0]}: missing; add it") from None
    return Described(model=model, depth=dict(depth or {"router": "static"}))


def reference_model_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model` from the config.json of a folder of reference numbers. Raises: ConfigError, KeyError for none."""
    theta = values["rope_theta"]
    names = {key: _OF_REFERENCES.get(key, key) for key in _SIZES}
    return _sizes({key: values[name] for key, name in names.items()}) | {
        "rope_theta": _number("rope_theta", theta, float)
    }


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, (own, kind, default) in _SIZES.items():
        value = values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"config.json: {key}: missing; add it")
            found[own] = None if default == "heads" else default
        else:
            found[own] = _number(key, value, kind)
    return found


def _number(key: str, value: Any, kind: type) -> Any:
    fits = isinstance(value, bool) if kind is bool else isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not fits:
        raise _wrong(key, value, {int: "a whole number", float: "a number", bool: "true or false"}[kind])
    try:
        return kind(value)
    except OverflowError:
        raise _wrong(key, value, "a finite number") from None


def _wrong(key: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"config.json: {key}: {shown(value)} must be {wanted}; correct it")


def _check_features(values: Mapping[str, Any]) -> None:
    for key, fitting in _REFUSED.items():
        value = values.get(key)
        if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if key == "rope_scaling" and isinstance(value, Mapping) and _is_default_rope(value):
            continue
        if value is not None and not any(type(value) is type(one) and value == one for one in fitting):
            raise ConfigError(f"config.json: {key}: {shown(value)} is not supported here; import a model without it")
    rope = values.get("rope_parameters")
    if rope is not None and not (isinstance(rope, Mapping) and _is_default_rope(rope)):
        raise ConfigError(
            f"config.json: rope_parameters: {shown(rope)} is not supported here; import a model of rope_type default"
        )


def _is_default_rope(rope: Mapping[str, Any]) -> bool:
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor", "factor"}
    kinds = {rope.get("rope_type", "default"), rope.get("type", "default")} if _are_plain(rope) else {None}
    whole = all(rope.get(key) in (None, 1, 1.0) for key in ("partial_rotary_factor", "attention_factor", "factor"))
    return kinds == {"default"} and whole and set(rope) <= known


def _are_plain(rope: Mapping[str, Any]) -> bool:
    return all(isinstance(value, (str, int, float, type(None))) for value in rope.values())


def _rope_theta(values: Mapping[str, Any]) -> float:
    """It stands beside the other keys, or in `rope_parameters`. Raises: ConfigError, also where the two differ."""
    rope = values.get("rope_parameters") or {}
    found = [value for value in (values.get("rope_theta"), rope.get("rope_theta")) if value is not None]
    thetas = {_number("rope_theta", value, float) for value in found}
    if len(thetas) > 1:
        raise ConfigError(f"config.json: rope_theta: {shown(sorted(thetas))} are two values; remove the wrong one")
    return thetas.pop() if thetas else _DEFAULT_THETA


def _check_head_dim(values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    head_dim, hidden, heads = values.get("head_dim"), model["hidden_size"], model["num_heads"]
    if head_dim is not None and (
        isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim * heads != hidden
    ):
        raise ConfigError(
            f"config.json: head_dim: {shown(head_dim)} times num_attention_heads={shown(heads)} is not "
            f"hidden_size={shown(hidden)}, which is not supported here; import another model"
        )


def _seq_length(values: Mapping[str, Any]) -> int | None:
    longest = values.get("max_position_embeddings")
    if longest is None:
        return None
    longest = _number("max_position_embeddings", longest, int)
    return min(longest, _LONGEST)


def _depth(values: Mapping[str, Any]) -> dict[str, Any]:
    missing = next((key for key in ("lime_router", "lime_entry", "lime_sources") if values.get(key) is None), None)
    if missing is not None:
        raise ConfigError(f"config.json: {missing}: missing; add it")
    if values["lime_router"] == "none":
        raise _wrong("lime_router", "none", "static, dynamic or average")
    pattern, name = values.get("lime_pattern"), values.get("lime_pattern_name")
    if pattern is None:
        pattern = _edges(values["lime_sources"])
    elif not isinstance(pattern, str) or "within_stage" in pattern or pattern.startswith(("edges", "budget", "top_p")):
        raise _wrong("lime_pattern", pattern, "a pattern that no file, stage or router chooses")
    depth = {"router": values["lime_router"], "entry": values["lime_entry"], "pattern": pattern, "pattern_name": name}
    return depth | {"heads": values.get("lime_heads") or "all", "head_top_p": values.get("lime_head_top_p")}


def _edges(sources: Any) -> dict[int, list[int]]:
    if not isinstance(sources, list) or not all(_is_layers(layers) for layers in sources):
        raise _wrong("lime_sources", sources, "a list of layers for each layer")
    return {reader: layers[:-1] for reader, layers in enumerate(sources) if len(layers) > 1}


def _is_layers(layers: Any) -> bool:
    return isinstance(layers, list) and all(type(layer) is int for layer in layers)


def _check_pattern(pattern: Pattern, sources: Any, blocks: Any) -> None:
    """What the model of an export goes by is what a run would make of the pattern. Raises: ConfigError."""
    own = [list(layers) for layers in pattern.sources], [[block[0], block[-1]] for block in pattern.blocks]
    for key, found, expected in zip(("lime_sources", "lime_blocks"), (sources, blocks), own, strict=True):
        if found != expected:
            raise ConfigError(
                f"config.json: {key}: {shown(found)} is not what lime_pattern says, {shown(expected)}; correct one of them"
            )


def as_lime(described: Described, pattern: str) -> Described:
    """A LLaMA as the LIMe model of `pattern`. Raises: ConfigError."""
    if described.depth["router"] != "none":
        raise ConfigError("--as-lime: the folder holds a LIMe model already; leave it out")
    if "within_stage" in pattern or pattern.startswith(("edges", "budget", "top_p")):
        raise PlanError(
            f"--as-lime: {shown(pattern)} is chosen by files, stages or routers; give one such as full or first:2"
        )
    depth = {"router": "static", "entry": "kv", "pattern": pattern}
    return Described(model=described.model, depth=depth, seq_length=described.seq_length)


def v1_depth(*, dynamic: bool, readers: Collection[int]) -> dict[str, Any]:
    """Of the authors' v1, where layers from one on read all before them."""
    edges = {reader: list(range(reader)) for reader in readers}
    return {"router": "dynamic" if dynamic else "static", "entry": "hidden", "pattern": edges}
