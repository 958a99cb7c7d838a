"""A checkpoint as a folder that `transformers` loads. Needs torch, for bf16 and the files; transformers is not needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lime_dist.checkpoint.edges import saved_config
from lime_dist.checkpoint.own_tokenizer import own_tokenizer
from lime_dist.checkpoint.reader import CheckpointReader
from lime_dist.checkpoint.upkeep import open_checkpoint
from lime_dist.config import Config
from lime_dist.data.output_files import with_usual_rights
from lime_dist.data.special_tokens import is_json
from lime_dist.errors import ConfigError, DataError, one_line, shown
from lime_dist.formats import parse_bytes
from lime_dist.hugging_face.config_json import MODULE_FILE, config_json
from lime_dist.hugging_face.names import published_name
from lime_dist.hugging_face.new_folder import new_folder
from lime_dist.hugging_face.tokenizer_json import token_ids, tokenizer_files
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import LogicalTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_TOKENIZER = "none"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_MODEL = "tokenizer.model"


@dataclass(frozen=True, kw_only=True)
class Export:
    """checkpoint: a step_N folder, or a run's for its newest. tokenizer: instead of the run's own; none: without."""

    checkpoint: Path
    out: Path
    dtype: str = "fp32"
    max_shard_size: str = "4GiB"
    tokenizer: str | None = None


def export_checkpoint(export: Export) -> Config:
    """Write `export.out`, which must be new or empty; it appears when it is whole. Returns the config of the checkpoint.

    At most the tensors of one shard are in memory. Raises: CheckpointError, ConfigError, DataError.
    """
    max_bytes = _shard_bytes(export.max_shard_size)
    reader = open_checkpoint(export.checkpoint)
    config = saved_config(reader)
    tokenizer = _find_tokenizer(reader.folder, config, export.tokenizer)
    files = _small_files(config, export.dtype, tokenizer)
    with new_folder("--out", export.out) as partial:
        for name, values in files.items():
            (partial / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if tokenizer is not None and not is_json(tokenizer):
            shutil.copyfile(tokenizer, partial / TOKENIZER_MODEL)
        if config.depth.router != "none":
            shutil.copyfile(Path(__file__).with_name(MODULE_FILE), partial / MODULE_FILE)
        _write_weights(partial, reader, config, DTYPES[export.dtype], max_bytes)
    return config


def _shard_bytes(text: str) -> int:
    found = parse_bytes(text)
    if not found:
        raise ConfigError(f"--max-shard-size: {shown(text)} is no size; write 4GiB")
    return found


def _find_tokenizer(checkpoint: Path, config: Config, given: str | None) -> Path | None:
    """Raises: DataError where it is missing or has another number of ids than the model."""
    if given == NO_TOKENIZER:
        return None
    path = own_tokenizer(checkpoint, config) if given is None else Path(given)
    if path is None:
        return None
    if not path.is_file():
        raise DataError(f"--tokenizer: {path} does not exist; give the run's own, or none to leave it out")
    from lime_dist.data.tokenizer import load_tokenizer

    ids = load_tokenizer(path).vocab_size
    if ids != config.model.vocab_size:
        raise DataError(
            f"--tokenizer: {path} has {ids} ids, the model {config.model.vocab_size}; give the run's own, or none"
        )
    return path


def _small_files(config: Config, dtype: str, tokenizer: Path | None) -> dict[str, dict[str, Any]]:
    ids = {} if tokenizer is None else token_ids(tokenizer)
    described = config_json(config, dtype=str(DTYPES[dtype]).removeprefix("torch."), token_ids=ids)
    padding = {"pad_token_id": ids["eos_token_id"]} if "eos_token_id" in ids else {}
    files: dict[str, dict[str, Any]] = {"config.json": described, "generation_config.json": {**ids, **padding}}
    return files if tokenizer is None else files | tokenizer_files(tokenizer, config.data.seq_length)


# ---- weights


def _write_weights(folder: Path, reader: CheckpointReader, config: Config, dtype: torch.dtype, max_bytes: int) -> None:
    tensors = list(logical_tensors(config.model, config.pattern).values())
    shards = list(plan_shards(tensors, dtype.itemsize, max_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {
            published_name(tensor.name): torch.from_numpy(reader.array("weight", tensor)).to(dtype) for tensor in shard
        }
        try:
            with with_usual_rights(folder / name):
                save_file(values, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ConfigError(f"--out: {folder}: {one_line(error)}; free space or name another folder") from None
        weight_map |= dict.fromkeys(values, name)
    if len(shards) > 1:
        size = dtype.itemsize * sum(prod(tensor.shape) for tensor in tensors)
        _write_index(folder, weight_map, size)


def _write_index(folder: Path, weight_map: Mapping[str, str], size: int) -> None:
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def plan_shards(tensors: Sequence[LogicalTensor], element_bytes: int, max_bytes: int) -> Iterator[list[LogicalTensor]]:
    """The tensors in their order, as many a file as fit; a larger one is alone."""
    shard: list[LogicalTensor] = []
    size = 0
    for tensor in tensors:
        own = element_bytes * prod(tensor.shape)
        if shard and size + own > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += own
    yield shard
