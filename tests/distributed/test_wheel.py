"""The wheel: it holds the whole package, and works where the repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "lime_dist", "configs", "tests/golden")
LARGEST_BYTES = 5 << 20
LINKED = ("configs", "reference_numbers/mha4", "reference_numbers/gqa4")
TRAINING = """
lime-dist init samples
lime-dist plan samples/quickstart.yaml
lime-dist data build-corpus --out corpus
head -n 60 corpus/train.jsonl > small.jsonl
lime-dist data train-tokenizer --input small.jsonl --vocab-size 512 --out tokenizer
lime-dist data tokenize --input small.jsonl --tokenizer tokenizer.model --out tokens
lime-dist train samples/quickstart.yaml model.vocab_size=512 model.hidden_size=48 model.intermediate_size=96 \
  data.train=tokens data.valid=tokens data.tokenizer=tokenizer.model eval.batches=1 run.dir=run run.steps=2
lime-dist generate run --prompt "The function" --max-new-tokens 4
lime-dist parity --list
lime-dist parity mha4 parallel.pp=2
lime-dist submit samples/quickstart.yaml --cluster samples/clusters/quickstart.yaml model.vocab_size=512 \
  data.train=tokens data.valid=tokens data.tokenizer=tokenizer.model --dry-run
python -m lime_dist --version
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What it printed. Without PYTHONPATH, so that only installed packages are found."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves files beside its sources, and the next one would pack them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, source / name)
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source, cwd=out
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lime_dist/")}
    folders = [ROOT / "lime_dist", *(ROOT / "lime_dist" / name for name in LINKED)]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"lime_dist/cluster/job.sh", "lime_dist/configs/clusters/cpu.yaml"} <= packed
    assert wheel.stat().st_size < LARGEST_BYTES


def test_it_trains_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    found = run(python, "-c", "import lime_dist; print(lime_dist.__file__)", cwd=work)
    assert Path(found.strip()).is_relative_to(own)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    said = run("bash", "-euc", TRAINING, cwd=work, PATH=path, OMP_NUM_THREADS="1")
    assert "pattern full, policy least" in said and "step 2/2" in said and "The function" in said
    assert "gqa4\nmha4\n" in said and "\npassed\n" in said
