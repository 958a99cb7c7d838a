"""A checkpoint, of weights alone, from a folder in Hugging Face's form or the LIMe authors'.

All that the folder says is checked before anything of its sizes is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import yaml

from lime_dist.checkpoint.reader import step_folder
from lime_dist.checkpoint.safe_files import file_size, read_json
from lime_dist.checkpoint.whole_writer import write_whole
from lime_dist.config import Config, DepthConfig, to_dict
from lime_dist.data.special_tokens import CONFIG_NAME, is_json
from lime_dist.data.tokenizer import load_tokenizer
from lime_dist.errors import CheckpointError, ConfigError, DataError, LimeDistError
from lime_dist.hugging_face import config_json
from lime_dist.hugging_face.config_json import Described, describe
from lime_dist.hugging_face.names import (
    V1_KEYS,
    V2_KEYS_VALUES,
    Stored,
    derived_names,
    has_dynamic_routers,
    published_name,
    stored_as_published,
    stored_in_v1,
    stored_in_v2,
    v1_readers,
)
from lime_dist.hugging_face.new_folder import new_folder
from lime_dist.hugging_face.published_weights import PublishedWeights
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import LogicalTensor, Role

_TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # the first that is there; the config beside it names BOS and EOS
_Place = Callable[[LogicalTensor], Stored | None]  # where its values are; None: it begins with the own layer alone


def import_model(folder: Path, out: Path, as_lime: str | None = None) -> Path:
    """Write a run's folder `out` with a checkpoint, config.yaml and, where there is one, the tokenizer; the checkpoint's folder.

    as_lime: the pattern with which a LLaMA becomes a LIMe model of the same logits. Raises: CheckpointError, ConfigError.
    """
    try:
        described, weights = describe(read_json(folder / "config.json")), PublishedWeights(folder)
        described, place = _form(described, weights, as_lime)
        config = described.config()
        _check_depth(config, weights)
        tensors = logical_tensors(config.model, config.pattern)
        places = {name: place(tensor) for name, tensor in tensors.items()}
        _check_tensors(places, config, weights)
    except LimeDistError as error:
        raise type(error)(str(error) if str(folder) in str(error) else f"{folder}/{error}") from None
    tokenizer = _find_tokenizer(folder, config)
    if tokenizer is not None:
        config = replace(config, data=replace(config.data, tokenizer=str((out / tokenizer.name).absolute())))
    with new_folder("--out", out) as partial:
        values = (("weight", tensor, _values(tensor, places[name], weights)) for name, tensor in tensors.items())
        write_whole(step_folder(partial / "checkpoints", 0), config, values, step=0, samples_seen=0)
        (partial / "config.yaml").write_text(yaml.safe_dump(_keys(config), sort_keys=False), encoding="utf-8")
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, partial)
    return step_folder(out / "checkpoints", 0)


# ---- what the folder holds


def _form(described: Described, weights: PublishedWeights, as_lime: str | None) -> tuple[Described, _Place]:
    """What the names say of a model whose config.json is LLaMA's, and where its tensors are."""
    names = weights.names
    found, place = _authors_form(described, names)
    if as_lime is None:
        return found, place
    if found is not described:
        raise ConfigError("--as-lime: the folder holds a LIMe model already; leave it out")

    def beside_routers(tensor: LogicalTensor) -> Stored | None:
        return None if tensor.role is Role.ROUTER else place(tensor)

    return config_json.as_lime(described, as_lime), beside_routers


def _authors_form(described: Described, names: set[str]) -> tuple[Described, _Place]:
    model = described.config().model
    if described.depth["router"] == "none" and any(name.endswith(V2_KEYS_VALUES) for name in names):
        full = replace(described, depth={"router": "static"})
        return full, lambda tensor: stored_in_v2(tensor, model)
    if described.depth["router"] == "none" and any(name.endswith(V1_KEYS) for name in names):
        readers = v1_readers(names)
        depth = config_json.v1_depth(dynamic=has_dynamic_routers(names), readers=readers)
        return replace(described, depth=depth), lambda tensor: stored_in_v1(tensor, model, readers)
    return described, stored_as_published


def _check_depth(config: Config, weights: PublishedWeights) -> None:
    """Before anything is made for each layer. Raises: CheckpointError."""
    norms = sum(name.endswith(".input_layernorm.weight") for name in weights.names)
    if config.model.num_layers != norms:
        raise CheckpointError(
            f"{weights.folder}: {norms} layers in its files, num_hidden_layers={config.model.num_layers} in its config.json; "
            "correct config.json or give another folder"
        )


def _check_tensors(places: dict[str, Stored | None], config: Config, weights: PublishedWeights) -> None:
    """All that the model has is there as it should be, and nothing else. Raises: CheckpointError."""
    expected = {stored.name for stored in places.values() if stored is not None}
    for stored in filter(None, places.values()):
        weights.check(stored)
    unknown = weights.names - expected - set(derived_names(config.model.num_layers))
    head, embedding = published_name("lm_head.weight"), places["embed_tokens.weight"]
    if config.model.tie_embeddings and head in unknown and embedding is not None:
        _check_tied(replace(embedding, name=head), embedding, weights)
        unknown.discard(head)
    if unknown:
        raise CheckpointError(
            f"{weights.folder}: {sorted(unknown)[0]} is no tensor of the model in its config.json; correct config.json or "
            "give another folder"
        )


def _check_tied(head: Stored, embedding: Stored, weights: PublishedWeights) -> None:
    weights.check(head)
    if not numpy.array_equal(weights.read(head), weights.read(embedding)):
        raise CheckpointError(
            f"{weights.folder}: lm_head.weight is not the embedding, though tie_word_embeddings is true in its config.json; "
            "set it to false"
        )


def _values(tensor: LogicalTensor, stored: Stored | None, weights: PublishedWeights) -> numpy.ndarray:
    if stored is not None:
        return weights.read(stored)
    router = numpy.zeros(tensor.shape, dtype=numpy.float32)
    router[:, -1] = numpy.eye(tensor.shape[0], dtype=numpy.float32)
    return router


# ---- what is written


def _find_tokenizer(folder: Path, config: Config) -> Path | None:
    """The one beside the weights, if it is of this model. Raises: CheckpointError, DataError."""
    path = next((folder / name for name in _TOKENIZERS if os.path.lexists(folder / name)), None)
    if path is None:
        return None
    file_size(path)
    ids = load_tokenizer(path).vocab_size
    if ids > config.model.vocab_size:
        raise DataError(
            f"{path}: {ids} ids, the model has {config.model.vocab_size}; remove it or give the model's own"
        )
    return path if ids == config.model.vocab_size else None


def _copy_tokenizer(tokenizer: Path, out: Path) -> None:
    config = tokenizer.with_name(CONFIG_NAME)
    for path in (tokenizer, config) if is_json(tokenizer) and os.path.lexists(config) else (tokenizer,):
        file_size(path)
        shutil.copyfile(path, out / path.name)


def _keys(config: Config) -> dict[str, Any]:
    """For config.yaml: the model, what of `depth` is not the default, and the tokenizer."""
    every, usual = to_dict(config), to_dict(replace(config, depth=DepthConfig()))
    depth = {key: value for key, value in every["depth"].items() if value != usual["depth"][key]}
    tokenizer = {"data": {"tokenizer": config.data.tokenizer}} if config.data.tokenizer else {}
    return {"model": every["model"], "depth": depth} | tokenizer
