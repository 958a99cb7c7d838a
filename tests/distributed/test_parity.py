"""`lime-dist parity` passes on the authors' numbers and on others of the same form, under any layout, and fails when
one of them is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from common import overrides
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lime_dist.cli.command_line import main
from lime_dist.config import check_config, parse_config
from lime_dist.lime.model import model_logits, model_loss, plain_model
from lime_dist.lime.values import gather_logical, initialize, specified_parameters
from lime_dist.plan.tensors import Role
from lime_dist.training.parity import TOLERANCES, run_parity

GOLDEN = Path(__file__).parents[1] / "golden" / "mha4"
TIMEOUT = timedelta(seconds=100)
LAYOUTS = (
    "tp=4 sp",
    "pp=2 micro=4 recompute zero=0",
    "pp=3 micro=8 relay",
    "pp=4 micro=4 gpipe",
    "dp=2 micro=2 zero=3",
    "tp=2 pp=2 dp=2 micro=2",
    "tp=2 pp=3 split=[1,1,2] sp micro=2",
    "pp=2 v=2 micro=4",
    "tp=2 pp=2 v=2 sp micro=2 relay recompute",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_authors_numbers(layout: str) -> None:
    report = run_parity(GOLDEN, overrides(layout), TIMEOUT)
    assert report["passed"], report


KINDS = ("gqa4", "v1_static4", "v1_dynamic4", "llama4_gqa")
OF_EACH_KIND = (  # every two of a number of stages, of tensor ranks, of replicas and a policy meet
    "tp=2 dp=2",
    "pp=2 dp=2 micro=2 relay",
    "pp=2 tp=2 micro=4",
    "pp=3 micro=4",
    "pp=3 tp=2 dp=2 micro=2 relay",
    "pp=4 tp=2 micro=2 relay",
    "pp=4 dp=2 micro=4",
)


@pytest.mark.parametrize("layout", OF_EACH_KIND)
@pytest.mark.parametrize("kind", KINDS)
def test_authors_numbers_of_each_kind(kind: str, layout: str) -> None:
    report = run_parity(GOLDEN.parent / kind, overrides(layout), TIMEOUT)
    assert report["passed"], report


@pytest.mark.product
@pytest.mark.parametrize("policy", ["least", "relay"])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["mha4", *KINDS])
def test_authors_numbers_under_every_layout(kind: str, pp: int, tp: int, dp: int, policy: str) -> None:
    layout = [f"parallel.pp={pp}", f"parallel.tp={tp}", f"parallel.dp={dp}", f"depth.policy={policy}"]
    report = run_parity(GOLDEN.parent / kind, [*layout, "pipeline.num_microbatches=2"], TIMEOUT)
    assert report["passed"], report


def test_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(GOLDEN), "parallel.pp=2", "pipeline.num_microbatches=2", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report.keys() == {"layout", "passed", "grad_worst", *TOLERANCES}
    assert (report["layout"]["pp"], report["layout"]["partition"], report["passed"]) == (2, [2, 2], True)
    assert all(0 <= report[name] <= tolerance for name, tolerance in TOLERANCES.items())


# ---- changed numbers


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture(autouse=True)
def one_thread_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of a single rank wait for each other busily, which takes long where cores are shared."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The authors' numbers, of three updates only."""
    copy = Path(shutil.copytree(GOLDEN, tmp_path / "copy"))

    def shorten(io: dict[str, Tensor]) -> None:
        io.update({name: io[name][:3] for name in ("tokens", "loss_trace", "grad_norm_trace")})

    edit(copy / "io.safetensors", shorten)
    return copy


ROUTER = "model.layers.2.self_attn.lime_router.weight"
# file, tensor, index of one element, what is added to it, the numbers that must be found wrong
CHANGES = {
    "nothing": ("weights", ROUTER, (0, 0, 0), 0.0, set()),
    "a router's weight": ("weights", ROUTER, (0, 1, 2), 0.05, set(TOLERANCES)),
    "an embedding": ("weights", "model.embed_tokens.weight", (3, 5), 0.02, set(TOLERANCES)),
    "a gradient": ("grads", ROUTER, (1, 0, 3), 1e-4, {"grad_max_rel_err"}),
    "the gradient of the tied embedding": ("grads", "model.embed_tokens.weight", (95, 0), 1e-4, {"grad_max_rel_err"}),
    "a logit": ("io", "logits", (7, 31, 95), 1e-4, {"logits_max_abs_err"}),
    "the loss": ("io", "loss", (0,), 1e-4, {"loss_abs_err"}),
    "the last loss": ("io", "loss_trace", (2,), 1e-3, {"trace_max_abs_err"}),
    "the last gradient norm": ("io", "grad_norm_trace", (2,), 1e-3, {"grad_norm_max_rel_err"}),
    "not a number": ("grads", ROUTER, (0, 0, 0), float("nan"), {"grad_max_rel_err"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_numbers_fail(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, tensor, index, amount, wrong = CHANGES[name]
    edit(copy / f"{file}.safetensors", lambda tensors: tensors[tensor][index].add_(amount))
    code = main(["parity", str(copy), "--json"])
    report = json.loads(capfd.readouterr().out)
    assert {name for name, tolerance in TOLERANCES.items() if not report[name] <= tolerance} == wrong, report
    assert (code, report["passed"]) == ((1, False) if wrong else (0, True))
    if wrong == {"grad_max_rel_err"}:
        assert f"model.{report['grad_worst']}" == tensor


def test_batches_in_another_order_fail(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(copy / "io.safetensors", lambda io: io.update(tokens=io["tokens"][[0, 2, 1]]))
    assert main(["parity", str(copy)]) == 1
    printed = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if "TOO LARGE" in line] == [
        "trace_max_abs_err",
        "grad_norm_max_rel_err",
    ]
    assert printed[-1] == "FAILED"


# ---- numbers of the plain model, of other sizes

OTHER_SIZES = {
    "num_layers": 5, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 8, "num_kv_heads": 2,
    "vocab_size": 50, "rope_theta": 500.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
OPTIMIZER = {
    "lr": 2e-3, "router_lr": 2e-2, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2, "max_grad_norm": 0.3,
    "schedule": "constant",
}  # fmt: skip
UNDECAYED = (Role.ROUTER, Role.NORM, Role.EMBEDDING)


def write_reference(folder: Path, router: str) -> None:
    """Three updates on one device, two sequences of seven tokens each."""
    names = {"num_attention_heads": "num_heads", "tie_word_embeddings": "tie_embeddings"}
    sizes = {names.get(name, name): value for name, value in OTHER_SIZES.items()}
    config = check_config(parse_config({"model": sizes, "depth": {"router": router}}))
    model = plain_model(config.model, config.pattern)
    initialize(model, seed=11)
    groups = [
        {
            "params": [parameter],
            "lr": OPTIMIZER["router_lr" if spec.role is Role.ROUTER else "lr"],
            "weight_decay": 0.0 if spec.role in UNDECAYED else OPTIMIZER["weight_decay"],
        }
        for spec, parameter in specified_parameters(model)
    ]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER["betas"], eps=OPTIMIZER["eps"])
    tokens = torch.randint(50, (3, 2, 8), generator=torch.Generator().manual_seed(2))

    weights, losses, norms, gradients = logical(model, lambda p: p), [], [], {}
    logits = model_logits(model, tokens[0, :, :-1]).detach()
    for batch in tokens:
        optimizer.zero_grad()
        loss = model_loss(model, batch)
        loss.backward()
        gradients = gradients or logical(model, lambda p: p.grad)
        losses.append(float(loss))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_grad_norm"])))
        optimizer.step()
    assert min(norms) > OPTIMIZER["max_grad_norm"], "clipping would not show"

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**OTHER_SIZES, "optimizer": OPTIMIZER}))
    save_file(weights, folder / "weights.safetensors")
    save_file(gradients, folder / "grads.safetensors")
    traces = {"loss_trace": torch.tensor(losses).double(), "grad_norm_trace": torch.tensor(norms).double()}
    save_file(
        {"tokens": tokens, "logits": logits, "loss": torch.tensor(losses[:1]), **traces}, folder / "io.safetensors"
    )


def logical(model: nn.Module, local_of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Under Hugging Face's names."""
    tensors = gather_logical(model, local_of)
    return {
        name if name == "lm_head.weight" else f"model.{name}": value.detach().clone() for name, value in tensors.items()
    }


@pytest.mark.parametrize("router", ["static", "none"])
@pytest.mark.parametrize(
    "layout",
    [
        "tp=2 pp=3",  # fourteen tokens, seven a tensor rank
        "tp=2 pp=3 micro=2 sp",  # seven tokens: a row of padding on the second
        "dp=2 pp=2 relay",
        "tp=2 pp=2 v=2 micro=2",
    ],
)
def test_other_numbers(layout: str, router: str, tmp_path: Path) -> None:
    write_reference(tmp_path / "reference", router)
    report = run_parity(tmp_path / "reference", overrides(layout), TIMEOUT)
    assert report["passed"], report
