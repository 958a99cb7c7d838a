"""Small checkpoints of every kind of model, and their exports as `transformers` loads them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import write_checkpoint
from torch import Tensor

# Before transformers is imported: the code of the exported folders is copied there, and nothing is looked for elsewhere.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="lime-dist-modules-")
os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from lime_dist.api import Model, load_model  # noqa: E402
from lime_dist.hugging_face.export import Export, export_checkpoint  # noqa: E402

# What this release calls it.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
)
SIZES = {
    "num_layers": 5,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 96,
}
UNTIED = {"tie_embeddings": False}
V1 = {"entry": "hidden"}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # keys of model, of depth
    "full": ({}, {}),
    "mha untied": ({"num_kv_heads": 4, "rope_theta": 500.0, "rms_norm_eps": 1e-3, **UNTIED}, {}),
    "one kv head": ({"num_kv_heads": 1}, {"pattern": "first:2"}),
    "one layer": ({"num_layers": 1}, {}),
    "last": (UNTIED, {"pattern": "last:2"}),
    "stride": ({}, {"pattern": "stride:3+last:2"}),
    "block": ({}, {"pattern": "block:2"}),
    "block and first": (UNTIED, {"pattern": "block:2+first:1"}),
    "edges": ({}, {"pattern": {2: [0], 4: [1, 2]}}),
    "named edges": ({}, {"pattern": {1: [0], 3: [0, 2]}, "pattern_name": "top_p:0.9"}),
    "same heads": ({}, {"heads": "same"}),
    "average": ({}, {"router": "average", "pattern": "first:1"}),
    "v1": ({"num_kv_heads": 4}, V1),
    "v1 grouped": (UNTIED, {**V1, "pattern": "block:2"}),
    "v1 top_p": ({}, {**V1, "head_top_p": 0.7}),
    "v1 dynamic": ({}, {**V1, "router": "dynamic", "pattern": "first:2"}),
    "v1 dynamic top_p": ({"num_kv_heads": 4}, {**V1, "router": "dynamic", "head_top_p": 0.5}),
    "v1 average": ({}, {**V1, "router": "average"}),
    "llama": ({}, {"router": "none"}),
    "llama untied": ({"num_kv_heads": 4, "rms_norm_eps": 1e-3, "rope_theta": 500.0, **UNTIED}, {"router": "none"}),
}


def write_run(folder: Path, name: str) -> Path:
    """A run's folder with one checkpoint of random weights."""
    model, depth = MODELS[name]
    tree = {"model": SIZES | model, "depth": depth, "data": {"seq_length": 64}}
    write_checkpoint(folder / "checkpoints" / "step_000007", 7, tree, std=0.4)
    return folder


def export(run: Path, out: Path, **more: Any) -> Path:
    export_checkpoint(Export(checkpoint=run, out=out, **more))
    return out


def own_model(run: Path) -> Model:
    return load_model(run, device="cpu")


def their_model(folder: Path) -> Any:
    """Every tensor was found, and no other."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


def some_tokens(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())
