"""Folders in Hugging Face's form, ours, LLaMA's and the LIMe authors', become checkpoints of the same model; others are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from checkpoint_stand_ins import write_checkpoint
from hugging_face_stand_ins import (
    MODELS,
    SIZES,
    distance,
    export,
    logits_of,
    own_model,
    some_tokens,
    transformers,
    write_run,
)
from safetensors.torch import load_file, save_file

from lime_dist.checkpoint.edges import first_weights, ready_plan
from lime_dist.checkpoint.reader import CheckpointReader, find_checkpoint
from lime_dist.cli.command_line import main
from lime_dist.config import Config, load_config
from lime_dist.generate import load_model
from lime_dist.hugging_face.importing import import_model
from lime_dist.lime.model import model_logits
from lime_dist.plan.parameters import logical_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5  # fp32: what differs is the order of sums


def weights_of(run: Path) -> tuple[Config, dict[str, numpy.ndarray]]:
    folder = find_checkpoint(run)
    assert folder is not None
    reader = CheckpointReader(folder)
    tensors = logical_tensors(reader.config.model, reader.config.pattern)
    return reader.config, {name: reader.array("weight", tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_an_export_comes_back(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", name)
    import_model(export(run, tmp_path / "hf", max_shard_size="20KiB"), tmp_path / "back")
    (before, expected), (after, found) = weights_of(run), weights_of(tmp_path / "back")
    assert found.keys() == expected.keys()
    assert all(numpy.array_equal(found[tensor], values) for tensor, values in expected.items())
    assert after.model.kv_heads == before.model.kv_heads and after.data.seq_length == before.data.seq_length
    assert after.pattern == before.pattern


def test_what_goes_on_from_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "same heads")
    import_model(export(run, tmp_path / "hf"), tmp_path / "back")
    overrides = [f"checkpoint.weights_from={tmp_path / 'back'}", f"run.dir={tmp_path / 'new'}"]
    config = ready_plan(load_config(tmp_path / "back" / "config.yaml", overrides)).config
    assert config.depth.heads == "same" and first_weights(config) == tmp_path / "back" / "checkpoints" / "step_000000"


def llama(folder: Path, **more: Any) -> Any:
    sizes = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=96, initializer_range=0.3, rope_theta=700.0, rms_norm_eps=1e-4)  # fmt: skip
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | more)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("as_lime", (None, "full", "first:1"))
def test_llamas(as_lime: str | None, tied: bool, tmp_path: Path) -> None:
    theirs = llama(tmp_path / "hf", tie_word_embeddings=tied)
    import_model(tmp_path / "hf", tmp_path / "run", as_lime)
    own, tokens = own_model(tmp_path / "run"), some_tokens(2, 11)
    assert distance(own.logits(tokens).detach(), logits_of(theirs, tokens)) < TOLERANCE
    assert own.config.depth.router == ("none" if as_lime is None else "static")
    assert own.config.pattern.num_edges == (0 if as_lime is None else 3)  # of three layers, first:1 is all


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    llama(tmp_path / "hf").to(dtype).save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, values in weights_of(tmp_path / "run")[1].items():
        expected = stored[name if name == "lm_head.weight" else f"model.{name}"]
        assert expected.dtype == dtype and torch.equal(torch.from_numpy(values), expected.float())


# ---- the authors' form


def golden_logits(folder: Path, run: Path) -> float:
    io = load_file(folder / "io.safetensors")
    model, _ = load_model(run / "checkpoints" / "step_000000", torch.device("cpu"))
    return distance(model_logits(model, io["tokens"][0, :, :-1].long()).detach(), io["logits"])


@pytest.mark.parametrize("name", ("mha4", "gqa4", "v1_static4", "v1_dynamic4", "llama4_gqa"))
def test_reference_numbers(name: str, tmp_path: Path) -> None:
    import_model(GOLDEN / name, tmp_path / "run")
    assert golden_logits(GOLDEN / name, tmp_path / "run") < TOLERANCE


def _interleaved(keys: torch.Tensor, values: torch.Tensor, heads: int) -> torch.Tensor:
    """As the authors' v2 keeps them: for each element of a head, K's before V's, the rows of all heads."""
    rows = [part.unflatten(0, (heads, -1))[head, element] for part in (keys, values)
            for element in range(len(part) // heads) for head in range(heads)]  # fmt: skip
    return torch.stack(rows)


def authors_folder(name: str, folder: Path) -> Path:
    """The weights of reference numbers under the names of the authors' code, beside the config.json of a LLaMA."""
    sizes, weights = (
        json.loads((GOLDEN / name / "config.json").read_text()),
        load_file(GOLDEN / name / "weights.safetensors"),
    )
    heads, is_v1 = sizes["num_kv_heads"], name.startswith("v1")
    for layer in range(sizes["num_layers"]):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        router = weights.pop(f"{attention}lime_router.weight", None)
        if is_v1 and router is not None:
            for letter in "kv":
                part = weights.pop(f"{attention}{letter}_proj.weight").unflatten(0, (heads, -1)).transpose(1, 2)
                weights[f"{attention}{letter}_proj_lime.lime_kv_proj"] = part[None].contiguous()
            weights[f"{attention}q_proj_default.weight"] = weights.pop(f"{attention}q_proj.weight")
            weights[f"{prefix}input_layernorm_lime.weight"] = weights.pop(f"{attention}depth_norm.weight")
            own = "dynamic_proj.0.weight" if name.startswith("v1_dynamic") else "static_weights"
            weights[f"{prefix}attention_router.{own}"] = router
        if not is_v1:
            pair = (weights.pop(f"{attention}{letter}_proj.weight") for letter in "kv")
            weights[f"{attention}kv_proj_weight"] = _interleaved(*pair, heads)
            if router is not None:
                weights[f"{attention}lime_router.static_weights"] = router.flatten(1)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": sizes["num_layers"], "num_key_value_heads": heads}
    config |= {key: sizes[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                                           "rope_theta", "rms_norm_eps", "tie_word_embeddings")}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ("mha4", "gqa4", "v1_static4", "v1_dynamic4"))
def test_the_authors_names(name: str, tmp_path: Path) -> None:
    import_model(authors_folder(name, tmp_path / "hf"), tmp_path / "run")
    assert golden_logits(GOLDEN / name, tmp_path / "run") < TOLERANCE


# ---- what is refused


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    return export(write_run(folder / "run", "last"), folder / "hf", max_shard_size="20KiB")


def keys(**changed: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return harm


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def weight_map(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return harm


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        held = load_file(shard(folder))
        change(held)
        save_file(held, shard(folder))

    return harm


def linked(folder: Path) -> None:
    path = shard(folder)
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)


def pickled_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def with_pipe(folder: Path) -> None:
    path = shard(folder)
    path.unlink()
    os.mkfifo(path)


def cut(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 100)


EMBEDDING = "model.embed_tokens.weight"
HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: no mapping"),
    "half a reference": (
        lambda folder: (folder / "config.json").write_text('{"num_layers": 2}'),
        "config.json: rope_theta: missing",
    ),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "other type": (keys(model_type="mistral"), "model_type: 'mistral' is neither llama nor lime"),
    "bias": (keys(attention_bias=True), "attention_bias: True is not supported"),
    "mlp bias": (keys(mlp_bias=True), "mlp_bias: True is not supported"),
    "activation": (keys(hidden_act="gelu"), "hidden_act: 'gelu' is not supported"),
    "rope scaling": (keys(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "rope parameters": (keys(rope_parameters={"rope_type": "llama3", "rope_theta": 1.0}), "rope_parameters"),
    "two thetas": (keys(rope_parameters={"rope_type": "default", "rope_theta": 77.0}), "rope_theta"),
    "sliding window": (keys(sliding_window=128), "sliding_window: 128 is not supported"),
    "quantized": (keys(quantization_config={"bits": 4}), "quantization_config"),
    "wide heads": (keys(head_dim=64), "head_dim: 64 times"),
    "text for a number": (keys(hidden_size="32"), "hidden_size: '32' must be a whole number"),
    "no size": (keys(vocab_size=None), "vocab_size: missing"),
    "true for a number": (keys(vocab_size=True), "vocab_size: True must be"),
    "huge layers": (keys(num_hidden_layers=10**12), "num_layers"),
    "more layers": (keys(num_hidden_layers=500, lime_sources=[[layer] for layer in range(500)], lime_pattern=None), "num_hidden_layers=500"),
    "huge width": (keys(hidden_size=2**20, head_dim=2**18), "has shape"),
    "huge vocabulary": (keys(vocab_size=10**23), "vocab_size"),
    "huge float": (keys(rope_theta=10**400), "rope_theta"),
    "no such layer": (keys(lime_sources=[[0], [0, 1], [7, 2], [3], [4]], lime_pattern=None), "layer 2 cannot read"),
    "sources of another pattern": (keys(lime_sources=[[0], [0, 1], [2], [3], [4]]), "lime_sources"),
    "blocks of another pattern": (keys(lime_blocks=[[0, 1]]), "lime_blocks"),
    "pattern of a file": (keys(lime_pattern="edges:/etc/passwd"), "lime_pattern"),
    "pattern of stages": (keys(lime_pattern="within_stage"), "lime_pattern"),
    "pattern is a number": (keys(lime_pattern=3), "lime_pattern: 3 must be"),
    "unknown router": (keys(lime_router="other"), "router: 'other' is unknown"),
    "no router": (keys(lime_router="none"), "lime_router: 'none' must be"),
    "tied": (keys(tie_word_embeddings=True), "lm_head.weight is not the embedding"),
    "missing shard": (lambda folder: shard(folder).unlink(), "No such file"),
    "pickles only": (pickled_only, "only pickled weights ('pytorch_model.bin')"),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("model*")], "no model.safetensors"),
    "cut short": (cut, "safetensors"),
    "linked": (linked, "no regular file"),
    "a pipe": (with_pipe, "no regular file"),
    "no map": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "outside": (weight_map(lambda names: names.update({EMBEDDING: "../run.safetensors"})), "is no file of this folder"),
    "absolute": (weight_map(lambda names: names.update({EMBEDDING: "/etc/passwd"})), "is no file of this folder"),
    "no text": (weight_map(lambda names: names.update({EMBEDDING: 3})), "is no file of this folder"),
    "not in its file": (weight_map(lambda names: names.update({"x": names[EMBEDDING]})), "'x' is not in model-00001"),
    "left out": (weight_map(lambda names: names.pop(EMBEDDING)), f"no tensor {EMBEDDING}"),
    "other shape": (tensors(lambda held: held.update({EMBEDDING: torch.zeros(95, 32)})), "has shape [95, 32]"),
    "other type of numbers": (tensors(lambda held: held.update({EMBEDDING: held[EMBEDDING].double()})), "is F64"),
    "not finite": (tensors(lambda held: held[EMBEDDING].fill_(float("nan"))), "is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_hostile_folders(harm: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(exported, tmp_path / "hf")
    change, expected = HARMS[harm]
    change(folder)
    assert main(["checkpoint", "import-hf", str(folder), "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lime-dist: ") and captured.err.count("\n") == 1 and expected in captured.err
    assert sorted(path.name for path in tmp_path.iterdir() if "model-" not in path.name) == ["hf"]


def test_more_tensors_than_the_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path / "hf", attention_bias=True)
    keys(attention_bias=False)(tmp_path / "hf")
    assert main(["checkpoint", "import-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")]) == 2
    assert "k_proj.bias is no tensor of the model" in capsys.readouterr().err


# ---- the commands


def run_command(*arguments: str | Path) -> int:
    return main(["checkpoint", *map(str, arguments)])


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", "full")
    assert run_command("export-hf", run, "--out", tmp_path / "hf", "--dtype", "bf16") == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert run_command("import-hf", tmp_path / "hf", "--out", tmp_path / "back") == 0
    assert "checkpoint.weights_from=" in capsys.readouterr().out
    for arguments, expected in (
        (("export-hf", run, "--out", tmp_path / "hf"), "--out: "),
        (("export-hf", tmp_path / "no", "--out", tmp_path / "new"), "neither a step_N folder"),
        (
            ("export-hf", run, "--out", tmp_path / "new", "--max-shard-size", "big"),
            "--max-shard-size: 'big' is no size",
        ),
        (
            ("export-hf", run, "--out", tmp_path / "new", "--tokenizer", "no.model"),
            "--tokenizer: no.model does not exist",
        ),
        (("import-hf", tmp_path / "hf", "--out", tmp_path / "back"), "--out: "),
        (("import-hf", tmp_path / "hf", "--out", tmp_path / "new", "--as-lime"), "--as-lime: the folder holds a LIMe"),
        (("import-hf", tmp_path / "hf", "--out", run / "checkpoints" / "step_000007" / "meta.json" / "x"), "--out: "),
    ):
        assert run_command(*arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_as_lime_of_a_pattern_that_stages_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path / "hf")
    assert run_command("import-hf", tmp_path / "hf", "--out", tmp_path / "run", "--as-lime", "within_stage") == 2
    assert "--as-lime: 'within_stage' is chosen by" in capsys.readouterr().err


def test_the_optimiser_is_not_there(tmp_path: Path) -> None:
    """A checkpoint with moments comes back with weights only, as step 0."""
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step_000007", 7, {"model": SIZES}, std=0.4)
    checkpoint = import_model(export(tmp_path / "run", tmp_path / "hf"), tmp_path / "back")
    reader = CheckpointReader(checkpoint)
    assert (reader.meta.step, reader.meta.samples_seen, checkpoint.name) == (0, 0, "step_000000")
