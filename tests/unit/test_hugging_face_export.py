"""What transformers loads of an export computes what the checkpoint's own model does, cached and in batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_stand_ins import (
    CACHE,
    MODELS,
    SIZES,
    distance,
    export,
    logits_of,
    own_model,
    some_tokens,
    their_model,
    transformers,
    write_run,
)
from safetensors import safe_open

from lime_dist.api import Model
from lime_dist.generate import Sampling, generate_ids

# fp32: what differs is the order of sums.
TOLERANCE = 1e-5
NEW = 10
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    folder = tmp_path_factory.mktemp("exported")
    run = write_run(folder / "run", request.param)
    return own_model(run), their_model(export(run, folder / "hf"))


def test_logits(both: tuple[Model, Any]) -> None:
    own, theirs = both
    tokens = some_tokens(3, 17)
    assert distance(logits_of(theirs, tokens), own.logits(tokens).detach()) < TOLERANCE
    is_llama = own.config.depth.router == "none"
    assert (type(theirs) is transformers.LlamaForCausalLM) == is_llama
    assert type(theirs).__name__ == ("LlamaForCausalLM" if is_llama else "LimeForCausalLM")


def test_generation_is_ours(both: tuple[Model, Any]) -> None:
    own, theirs = both
    tokens = some_tokens(1, 5)
    expected = list(generate_ids(own.network, tokens[0].tolist(), GREEDY, NEW))
    for use_cache in (True, False):
        found = theirs.generate(tokens, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
        assert found[0, 5:].tolist() == expected
    assert own.config.model.num_layers == 1 or len(set(expected)) > 1, "a constant continuation would show little"


@torch.no_grad()
def test_logits_through_the_cache(both: tuple[Model, Any]) -> None:
    _, theirs = both
    tokens, cache, pieces = some_tokens(2, 9), transformers.DynamicCache(config=theirs.config), []
    for part in tokens.split((4, 1, 3, 1), dim=1):
        pieces.append(theirs(part, use_cache=True, **{CACHE: cache}).logits)
    assert distance(torch.cat(pieces, dim=1), logits_of(theirs, tokens)) < TOLERANCE
    sizes = theirs.config  # the cache is LLaMA's size
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert len(held) == 2 * sizes.num_hidden_layers
    assert {tensor.shape for tensor in held} == {(2, sizes.num_key_value_heads, 9, sizes.head_dim)}


def test_left_padded_batches(both: tuple[Model, Any]) -> None:
    """Each sequence goes on as it does alone."""
    _, theirs = both
    lengths, longest = (3, 8, 6), 8
    prompts = [some_tokens(length, seed=length) for length in lengths]
    tokens, mask = torch.zeros(2, 3, longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    found = theirs.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(prompts):
        alone = theirs.generate(prompt[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert found[row, longest:].tolist() == alone[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", "mha untied")


def test_other_ways_to_decode(run: Path, tmp_path: Path) -> None:
    """A cache of fixed length, beams, and text that is padded on the right."""
    theirs = their_model(export(run, tmp_path / "hf"))
    tokens = some_tokens(2, 6)
    greedy = theirs.generate(tokens, max_new_tokens=NEW, do_sample=False)
    fixed = theirs.generate(
        tokens, max_new_tokens=NEW, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(greedy, fixed)
    beams = theirs.generate(tokens, max_new_tokens=NEW, do_sample=False, num_beams=3)
    uncached = theirs.generate(tokens, max_new_tokens=NEW, do_sample=False, num_beams=3, use_cache=False)
    assert torch.equal(beams, uncached)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    padded = theirs(tokens, attention_mask=mask).logits.detach()
    assert distance(padded[1, :4], logits_of(theirs, tokens[1:, :4])[0]) < TOLERANCE
    assert bool(padded.isfinite().all())


def test_it_goes_on_training(run: Path, tmp_path: Path) -> None:
    own, theirs = own_model(run), their_model(export(run, tmp_path / "hf"))
    tokens = some_tokens(2, 12)
    output = theirs(tokens, labels=tokens)
    assert float(output.loss) == pytest.approx(float(own.loss(tokens)), rel=TOLERANCE)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_saved_again_it_is_the_same(run: Path, tmp_path: Path) -> None:
    theirs = their_model(export(run, tmp_path / "hf"))
    theirs.save_pretrained(tmp_path / "again")
    tokens = some_tokens(1, 8)
    assert torch.equal(logits_of(their_model(tmp_path / "again"), tokens), logits_of(theirs, tokens))


def test_hidden_states(run: Path, tmp_path: Path) -> None:
    theirs = their_model(export(run, tmp_path / "hf"))
    states = theirs(some_tokens(1, 4), output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(1, 4, SIZES["hidden_size"])] * (SIZES["num_layers"] + 1)


def test_bf16(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "hf", dtype="bf16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    exact = their_model(export(run, tmp_path / "exact"))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in theirs.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact.state_dict()[name].to(torch.bfloat16))


def test_shards(run: Path, tmp_path: Path) -> None:
    limit = 16 * 1024
    folder = export(run, tmp_path / "hf", max_shard_size="16KiB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    sizes = []
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            assert {index["weight_map"][key] for key in file.keys()} == {name}
            sizes.append(sum(4 * file.get_tensor(key).numel() for key in file.keys()))
    assert max(sizes) <= limit and sum(sizes) == index["metadata"]["total_size"]
    whole = export(run, tmp_path / "whole")
    assert not (whole / "model.safetensors.index.json").exists()
    tokens = some_tokens(1, 8)
    assert torch.equal(logits_of(their_model(folder), tokens), logits_of(their_model(whole), tokens))


def test_the_code_needs_no_lime_dist(run: Path, tmp_path: Path) -> None:
    source = (export(run, tmp_path / "hf") / "modeling_lime.py").read_text()
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {name.split(".")[0] for name in imports} == {"__future__", "typing", "torch", "transformers"}
