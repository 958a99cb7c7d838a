"""A user's mistake ends in exit code 2 and one line that names the key and the fix; `plan` starts without torch."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

import lime_dist.training.run  # noqa: F401  (at its first import DeepSpeed runs a compiler, which must not be taken for our output)
from lime_dist.checkpoint.boxes import Box
from lime_dist.checkpoint.checking import FORMAT, meta_text
from lime_dist.checkpoint.chunk_files import chunk_key, write_chunks
from lime_dist.cli.command_line import main
from lime_dist.config import parse_config, to_dict
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.tokenizer import train_tokenizer
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import KINDS

REPOSITORY = Path(__file__).parents[2]
BASE = {
    "model": {
        "num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 96,
    },
    "data": {"train": "train", "valid": "valid", "seq_length": 8, "global_batch_size": 12},
    "eval": {"batches": 2},
    "optim": {"warmup_steps": 0},
    "run": {"dir": "run", "device": "cpu", "steps": 2, "timeout_seconds": 60},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run needs, and damaged copies of it."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "list.yaml").write_text("- model\n- run\n")
    (folder / "broken.yaml").write_text("model: {num_layers: 4\nrun: [")
    (folder / "twice.yaml").write_text("run:\n  steps: 1\n  steps: 2\n")
    (folder / "dates.yaml").write_text(yaml.safe_dump(BASE).replace("num_layers: 4", "num_layers: 2026-11-25"))
    (folder / "float.yaml").write_text("optim:\n  lr: !!float x\n")
    (folder / "bool.yaml").write_text("model:\n  tie_embeddings: !!bool maybe\n")
    laughs = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    (folder / "laughs.yaml").write_text("\n".join(["a0: &a0 [1]", *laughs]))
    (folder / "no_model.yaml").write_text(yaml.safe_dump({**BASE, "model": {"num_layers": 4}}))
    for name in ("train", "valid"):
        write_tokens(folder / name)
    for part in ("bin", "idx"):
        copy_tokens(folder / "train", folder / f"short_{part}")
        os.truncate(folder / f"short_{part}.{part}", os.path.getsize(folder / f"train.{part}") - 3)
    copy_tokens(folder / "train", folder / "lone")
    (folder / "lone.bin").unlink()
    (folder / "text.txt").write_text("".join(f"line {line} of a text to read\n" for line in range(200)))
    train_tokenizer([folder / "text.txt"], folder / "wide", vocab_size=300, workers=1)
    write_checkpoint(folder / "step_000001")
    write_checkpoint(folder / "last_1", "depth.pattern=last:1")
    (folder / "earlier" / "checkpoints").mkdir(parents=True)
    write_checkpoint(folder / "earlier" / "checkpoints" / "step_000001")
    return folder


def write_tokens(prefix: Path) -> None:
    tokens = np.arange(500) % 96
    with IndexedWriter(prefix, vocab_size=96) as writer:
        writer.add_document(tokens)
        writer.commit({"vocab_size": 96, "tokens": len(tokens)})


def copy_tokens(prefix: Path, copy: Path) -> None:
    for end in (".bin", ".idx", ".meta.json"):
        shutil.copy(f"{prefix}{end}", f"{copy}{end}")


def write_checkpoint(folder: Path, *overrides: str) -> None:
    """A checkpoint of BASE's model after one step, in one file."""
    folder.mkdir()
    config = parse_config(BASE, overrides)
    chunks = {
        chunk_key(kind, tensor.name, Box((0,) * len(tensor.shape), tensor.shape)): np.zeros(tensor.shape, np.float32)
        for tensor in logical_tensors(config.model, config.pattern).values()
        for kind in KINDS
    }
    files = {"all": write_chunks(folder, "all", chunks)}
    meta = {"format": FORMAT, "step": 1, "samples_seen": 12, "config": to_dict(config), "files": files}
    (folder / "meta.json").write_bytes(meta_text(meta))


@pytest.fixture(autouse=True)
def in_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def check_mistake(code: int, capfd: pytest.CaptureFixture[str], said: str, ranks_may_start: bool = False) -> None:
    """Exactly one line on stderr; where ranks may have to find the mistake, after the line that says that they start."""
    lines = capfd.readouterr().err.splitlines()
    if ranks_may_start and lines[:1] and lines[0].startswith("starting "):
        del lines[0]
    assert code == 2 and len(lines) == 1, (code, lines)
    assert re.match(f"lime-dist: {said}", lines[0]), lines[0]


# arguments after `train run.yaml`: what is said
TRAIN = {
    # keys and values
    "modle.num_layers=4": r"modle: unknown key; did you mean model\?",
    "parallel.ppp=2": r"parallel\.ppp: unknown key; did you mean pp\?",
    "optim.zzz=1": r"optim\.zzz: unknown key; known: lr, router_lr",
    "model.num_layers=four": r"model\.num_layers: 'four' is not a whole number",
    "run.steps": r"override 'run\.steps': write section\.key=value",
    "run.steps=[": r"override run\.steps: ",
    "depth.pattern=last": r"depth\.pattern: 'last' is not a pattern; use full, first:j",
    "depth.policy=most": r"depth\.policy: 'most' is unknown; use least or relay",
    "data.train=[{path: train, wieght: 2}]": r"data\.train\[0\]\.wieght: unknown key; did you mean weight\?",
    "run.steps=2026-11-25": r"run\.steps: '2026-11-25' is not a whole number",
    "run.steps=0b_": r"override run\.steps: line 1: '0b_' is no int",
    "optim.lr=.inf": r"optim\.lr: inf must be at most 10000",
    "run.timeout_seconds=.inf": r"run\.timeout_seconds: inf must be at most 2592000",
    "model.num_layers=100000": r"model\.num_layers: 100000 must be at most 512",
    f"run.dir={'x' * 100_000}": r"run\.dir: 'x{30,40}\.\.\.x+' has 100000 letters; use at most 1000",
    f"run.dir={'x' * 900}": r"run\.dir: 'x{30,40}\.\.\.x+': File name too long; name a folder",
    f"run.steps={'[' * 1000}": r"override run\.steps: line 1: nested more than 20 deep",
    "model.intermediate_size=4000000 model.hidden_size=1048576": r"memory: all ranks need about .* TiB, this machine has .*; lower",
    "depth.switch_at={1: nonsense}": r"depth\.switch_at\.1: 'nonsense' is not a pattern",
    # layouts
    "parallel.tp=4": r"parallel\.tp: 4 does not divide model\.num_kv_heads=2; change one",
    "parallel.tp=3 model.num_kv_heads=4": r"parallel\.tp: 3 does not divide model\.num_kv_heads=4; change one",
    "parallel.tp=2 model.intermediate_size=45": r"parallel\.tp: 2 does not divide model\.intermediate_size=45; change",
    "model.num_kv_heads=3": r"model\.num_kv_heads: 3 must divide model\.num_heads=4",
    "parallel.pp=5": r"parallel\.pp: 5 stages for model\.num_layers=4; use at most 4",
    "parallel.pp=2 pipeline.partition=[1,2]": r"pipeline\.partition: \[1, 2\] must be .* add up to model\.num_layers=4",
    "parallel.pp=2 pipeline.partition=[4,0]": r"pipeline\.partition: 0 must be at least 1",
    "parallel.pp=2 pipeline.partition=[4]": r"pipeline\.partition: \[4\] has 1 stages, parallel\.pp is 2; give one count",
    "pipeline.partition=even": r"pipeline\.partition: 'even' .*auto",
    "pipeline.partition=x": r"pipeline\.partition: 'x' .*auto",
    "parallel.dp=2 pipeline.num_microbatches=5": (
        r"data\.global_batch_size: 12 must be a multiple of parallel\.dp=2 x pipeline\.num_microbatches=5"
    ),
    "parallel.sequence_parallel=true": r"parallel\.sequence_parallel: needs parallel\.tp above 1; set it to false",
    "parallel.pp=3 --nproc 2": r"parallel: tp=1 x pp=3 x dp=1 needs 3 ranks, 2 were started; change parallel\.tp",
    "parallel.pp=3 --nproc 4": r"parallel: tp=1 x pp=3 x dp=1 needs 3 ranks, 4 were started; change parallel\.tp",
    "parallel.dp=1 --nproc 2": r"parallel: tp=1 x pp=1 x dp=1 needs 1 ranks, 2 were started; change parallel\.tp",
    "--nproc 0": r"parallel: .* 0 were started; change",
    "run.device=cuda": r"run\.device: cuda, 1 ranks, but 0 GPUs here; set run\.device=cpu",
    # DeepSpeed
    "parallel.pp=2 deepspeed.zero_optimization.stage=2": (
        r"deepspeed\.zero_optimization\.stage: 2 with parallel\.pp=2; use 0 to 1 \(2 and 3 need parallel\.pp=1\)"
    ),
    "deepspeed.zero_optimization.stage=4": r"deepspeed\.zero_optimization\.stage: 4 with parallel\.pp=1; use 0 to 3",
    "deepspeed.zero_optimization=1": r"deepspeed\.zero_optimization: must be a section",
    "deepspeed.train_batch_size=4": r"deepspeed\.train_batch_size: is set from data\.global_batch_size; remove it",
    "deepspeed.bf16.enabled=true": r"deepspeed\.bf16: is set from run\.dtype; remove it",
    # files
    "data.train=[]": r"data\.train: empty; name the prefix of a token file",
    "data.train=nothing": r"data\.train: nothing\.idx does not exist; make it with lime-dist data tokenize",
    "data.valid=nothing": r"data\.valid: nothing\.idx does not exist; make it with",
    "data.train=lone": r"data\.train: lone\.bin does not exist; make it with",
    "data.train=short_bin": r"data\.train: short_bin\.bin has \d+ bytes, its \.idx says \d+; run lime-dist data tokenize",
    "data.valid=short_idx": r"data\.valid: short_idx\.idx has \d+ bytes, its header says \d+; run lime-dist data tokenize",
    "model.vocab_size=64": r"data\.train: train was tokenized to 96 ids, model\.vocab_size is 64; set",
    "data.tokenizer=no.model": r"data\.tokenizer: no\.model does not exist; train one with",
    "data.tokenizer=wide.model": r"model\.vocab_size: 96, but data\.tokenizer wide\.model has 300 ids; set model\.vocab_size=300",
    "data.tokenizer=text.txt": r"(data\.)?tokenizer: text\.txt is not a SentencePiece model; give the \.model file",
    "checkpoint.resume=step_999999": r"checkpoint\.resume: step_999999: neither a step_N folder nor a run's folder",
    "checkpoint.weights_from=nowhere": r"checkpoint\.weights_from: nowhere: neither a step_N folder nor a run's folder",
    "depth.weights_from=nowhere depth.pattern=top_p:0.9": r"depth\.weights_from: nowhere: neither a step_N folder nor",
}

# The same, found by the ranks: what BASE's checkpoint does not fit.
RESUME = {
    "model.hidden_size=64": r"checkpoint .*step_000001: saved with .* or another run.dir",
    "model.num_layers=5": r"checkpoint .*step_000001: .*model",
    "model.num_layers=3": r"checkpoint .*step_000001: .*model",
    "model.tie_embeddings=false": r"checkpoint .*step_000001: .*model",
    "model.rope_theta=500": r"checkpoint .*step_000001: .*model",
    "depth.router=none": r"checkpoint .*step_000001: .*depth",
    "checkpoint.resume=last_1": r"checkpoint last_1: layer 2 of the model reads layer 0, .* use its depth\.pattern",
}

# whole command lines
LONG = "a" * 300  # more than a name may have
OTHERS = {
    f"train run.yaml data.train={LONG}": r"'a{30,}.*: File name too long; give a path that can be used",
    f"train run.yaml data.tokenizer={LONG}": r"'a{30,}.*: File name too long; give",
    f"generate {LONG} --prompt x": r"'a{30,}.*: File name too long; give",
    f"status {LONG}": r"'a{30,}.*: File name too long; give",
    f"logs {LONG}": r"'a{30,}.*: File name too long; give",
    f"init {LONG}": r".*a{30,}.*: File name too long; ",
    f"plan {LONG}": r"config a{30,}.*: File name too long; give",
    "plan run.yaml depth.pattern=edges": r"depth\.pattern: edges without a file; write edges:FILE",
    "train none.yaml": r"config none\.yaml: No such file or directory; give the path of a YAML file",
    "train broken.yaml": r"config broken\.yaml: not valid YAML: .* line \d",
    "train twice.yaml": r"config twice\.yaml: line 3: the key 'steps' appears twice in its section",
    "train dates.yaml": r"model\.num_layers: '2026-11-25' is not a whole number",
    "plan float.yaml": r"config float\.yaml: line 2: 'x' is no float that can be read",
    "plan bool.yaml": r"config bool\.yaml: line 2: 'maybe' is no bool that can be read",
    "train laughs.yaml --dry-run": r"config laughs\.yaml: line \d+: more than 300000 values",
    "train list.yaml": r"config list\.yaml: must hold sections such as `model:`",
    "train no_model.yaml": r"model\.hidden_size: missing; add it",
    "train . --dry-run": r"config \.: a folder without config\.yaml; give a YAML file, or the folder of a run that began",
    "plan run.yaml parallel.pp=9": r"parallel\.pp: 9 stages .* use at most 4",
    "eval run.yaml data.valid=[] --checkpoint step_000001": r"data\.valid: no held-out text; name a token file",
    "eval run.yaml": r"run\.dir: no checkpoint under run/checkpoints; train first or give --checkpoint",
    "eval run.yaml --checkpoint nowhere": r"checkpoint nowhere: neither a step_N folder nor a run's folder",
    "generate nowhere --prompt a": r"checkpoint nowhere: neither a step_N folder nor a run's folder .*; train first",
    "generate step_000001 --prompt a": r"data\.tokenizer: the run names none; give --tokenizer",
    "generate step_000001 --prompt a --tokenizer wide.model": (
        r"--tokenizer: wide\.model has 300 ids, the model 96; give the run's own"
    ),
    "generate step_000001 --prompt a --tokenizer no.model": r"tokenizer: no\.model does not exist; make it",
    "generate step_000001 --prompt a --top-p 2": r"--top-p: must be above 0 and at most 1",
    "generate step_000001 --prompt a --top-p 0": r"--top-p: must be above 0 and at most 1",
    "generate step_000001 --prompt a --top-k -1": r"--top-k: must be at least 0",
    "generate step_000001 --prompt a --temperature -1": r"--temperature: must be at least 0 and finite",
    "generate step_000001 --prompt a --temperature inf": r"--temperature: must be at least 0 and finite",
    "generate step_000001 --prompt a --seed -1": r"--seed: must be from 0 to 2\^32 - 1, as run\.seed",
    "generate step_000001 --prompt a --max-new-tokens -3": r"--max-new-tokens: -3 must be at least 1",
    "generate nowhere --prompt a --max-new-tokens 0": r"--max-new-tokens: 0 must be at least 1",  # before it is looked for
    "generate step_000001 --prompt \udcff": r"--prompt: is no text in UTF-8; convert it",
    "generate step_000001 --prompt a --device cuda": r"--device: cuda, but there is no GPU here; use cpu",
    "parity nowhere": r"reference nowhere: no such folder; give one of reference numbers, or gqa4 or ",
    "parity": r"parity: no reference numbers named; give gqa4 or ",
    "parity mha4 parallel.tp=3": r"parallel\.tp: 3 does not divide model\.num_kv_heads=4; change one",
    "parity {golden} parallel.tp=3": r"parallel\.tp: 3 does not divide model\.num_kv_heads=4; change one",
    "parity {golden} parallel.ppp=3": r"parallel\.ppp: unknown key; did you mean pp\?",
}
FOUND_BY_RANKS = {
    "eval run.yaml data.valid=[] --checkpoint step_000001",
    "eval run.yaml",
}


@pytest.mark.parametrize("arguments", TRAIN)
def test_train(arguments: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [arguments] if "{" in arguments else arguments.split()
    check_mistake(main(["train", "run.yaml", *words]), capfd, TRAIN[arguments])
    assert not Path("run").exists(), "something was written before the mistake was found"


@pytest.mark.parametrize("override", RESUME)
def test_checkpoint_of_another_model(override: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(["train", "run.yaml", "checkpoint.resume=step_000001", override, f"run.dir={tmp_path}/run"])
    check_mistake(code, capfd, RESUME[override], ranks_may_start=True)


@pytest.mark.parametrize(
    "words",
    [
        "checkpoint.resume=step_000001",
        "checkpoint.resume=last_1 depth.pattern=last:1",
        "checkpoint.resume=earlier",  # a run's folder: its newest
    ],
)
def test_the_checkpoint_itself_is_sound(words: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    assert main(["train", "run.yaml", *words.split(), f"run.dir={tmp_path}/run"]) == 0
    assert "step 1 of 2" in capfd.readouterr().out


def test_a_runs_folder_is_evaluated(capfd: pytest.CaptureFixture[str]) -> None:
    """As a step_N folder; `generate` and `analyze` take both too."""
    for given in ("earlier", "earlier/checkpoints/step_000001"):
        assert main(["eval", "run.yaml", "--checkpoint", given]) == 0
        assert '"checkpoint": "earlier/checkpoints/step_000001", "step": 1' in capfd.readouterr().out


def test_what_runs_but_is_hardly_meant_is_said(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """62 held-out sequences, 5 batches of 12 of them are all new."""
    unmeant = {
        "optim.warmup_steps=5": "optim.warmup_steps: 5 is not below run.steps=2",
        "profile.kernels=true": "profile.kernels: has no effect without profile.steps",
        "eval.batches=6": "eval.batches: 6 batches are 72 samples",
    }
    for overrides, said in (["eval.batches=5"], []), ([*unmeant], [*unmeant.values()]):
        assert main(["train", "run.yaml", f"run.dir={tmp_path}/{len(said)}", *overrides]) == 0
        warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
        assert len(warnings) == len(said)
        assert all(line.startswith(f"lime-dist: warning: {text}") for line, text in zip(warnings, said, strict=True))


def test_what_a_profile_does_not_use_is_no_warning(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It records steps of its own, of the initial weights."""
    overrides = ("profile.kernels=true", "optim.warmup_steps=5")
    assert main(["profile", "run.yaml", f"run.dir={tmp_path}/run", *overrides, "--steps=1"]) == 0
    assert "warning: " not in capfd.readouterr().err
    assert list(tmp_path.glob("run/profile/*/rank_0.kernels.json.gz"))


@pytest.mark.parametrize("line", OTHERS)
def test_command(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = line.format(golden=REPOSITORY / "tests" / "golden" / "mha4").split()
    check_mistake(main(words), capfd, OTHERS[line], ranks_may_start=line in FOUND_BY_RANKS)


def test_data_too_short_for_a_sample(capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["train", "run.yaml", "data.seq_length=500", "parallel.dp=2"])
    check_mistake(code, capfd, r"data\.train: train has 500 tokens, .*; lower data\.seq_length")


def without(tensor: str) -> Callable[[Path], None]:
    return lambda path: save_file({name: value for name, value in load_file(path).items() if name != tensor}, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


REFERENCE_DAMAGES = {
    "no config": ("config.json", Path.unlink),
    "cut config": ("config.json", cut),
    "empty config": ("config.json", lambda path: path.write_text("{}")),
    "config without a rate": ("config.json", lambda path: path.write_text(path.read_text().replace("router_lr", "x"))),
    "cut weights": ("weights.safetensors", cut),
    "no gradients": ("grads.safetensors", Path.unlink),
    "cut traces": ("io.safetensors", cut),
    "no logits": ("io.safetensors", without("logits")),
}


@pytest.mark.parametrize("name", REFERENCE_DAMAGES)
def test_damaged_reference(name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, damage = REFERENCE_DAMAGES[name]
    folder = Path(shutil.copytree(REPOSITORY / "tests" / "golden" / "mha4", tmp_path / "copy"))
    damage(folder / file)
    check_mistake(main(["parity", str(folder)]), capfd, f"reference .*/{file}: .*; give a folder of reference numbers")


def test_reference_of_other_sizes(capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["parity", str(REPOSITORY / "tests" / "golden" / "mha4"), "model.hidden_size=128"])
    check_mistake(
        code, capfd, r"reference weights: embed_tokens\.weight has shape \[96, 64\], config\.json says \[96, 128\]"
    )


# ---- under a launcher: the process is itself a rank


def run_as_launched(environment: dict[str, str], arguments: list[str]) -> int:
    """`main` in a forked child, as a rank ends its process."""

    def child() -> None:
        os.environ.update(environment)
        sys.exit(main(arguments))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "still running"
    return process.exitcode


PLACE = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({}, "--nproc 2", r"--nproc: a launcher has started this already; leave --nproc out"),
        ({}, "parallel.pp=3", r"parallel: .* needs 3 ranks, 2 were started; change parallel\.tp"),
        ({"WORLD_SIZE": "many"}, "", r"environment: RANK is set but WORLD_SIZE is not a number; start with"),
        ({"MASTER_PORT": ""}, "parallel.pp=2", r"environment: MASTER_PORT is not set; export it"),
        ({"MASTER_ADDR": ""}, "parallel.pp=2", r"environment: MASTER_ADDR is not set; export it"),
        ({}, "parallel.pp=2 run.device=cuda", r"run\.device: cuda with 0 GPUs here, .* set run\.device=cpu"),
    ],
    ids=str,
)
def test_launched(changes: dict[str, str], arguments: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = run_as_launched(PLACE | changes, ["train", "run.yaml", *arguments.split()])
    check_mistake(code, capfd, said)


def test_master_port_in_use(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        port = str(occupant.getsockname()[1])
        code = run_as_launched(PLACE | {"MASTER_PORT": port}, ["train", "run.yaml", "parallel.pp=2"])
    check_mistake(code, capfd, rf"environment: MASTER_PORT={port} is in use on this host; set another")


# ---- what must answer on a login node


def test_help_plan_and_dry_run_import_no_torch() -> None:
    code = """
import sys
from lime_dist.cli.command_line import main

for arguments in (["--help"], ["train", "--help"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
assert main(["plan", "run.yaml", "--json"]) == 0
assert main(["plan", "run.yaml", "parallel.pp=4"]) == 0
assert main(["train", "run.yaml", "parallel.pp=4", "--dry-run"]) == 0
assert main(["train", "run.yaml", "data.train=nothing"]) == 2
sys.exit(" ".join({"torch", "megatron", "deepspeed", "tensorboard"} & set(sys.modules)) or None)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "boundary" in result.stdout and "num_layers: 4" in result.stdout
