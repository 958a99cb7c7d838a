"""Weights & Biases beside TensorBoard: a thread sends the same values, and training never waits for it but a while at the end.

What fails there (no network, no key, a service that died) costs the charts, never the run: one line says so.
"""

from __future__ import annotations

import io
import secrets
import sys
import threading
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lime_dist.config import Config, WandbConfig, to_dict
from lime_dist.errors import ConfigError, one_line

CLOSE_SECONDS = 20.0  # how long a run that ends waits for what is not sent yet
_ID_FILE = "wandb_id"  # in the run's folder: a run that is started again goes on in the same one of W&B


def require_wandb(config: Config) -> None:
    """Raises: ConfigError where the config asks for what is not installed."""
    if config.wandb.project and not is_installed():
        raise ConfigError(
            "wandb.project: needs the wandb library; pip install 'lime_dist[wandb]', or leave the key out"
        )


def is_installed() -> bool:
    """The library itself: a folder `wandb` of its runs, where a command is started, could be imported as well."""
    try:
        return bool(version("wandb"))
    except PackageNotFoundError:
        return False


class WandbBoard:
    """A `Board`, whose values go out a step at a time."""

    def __init__(self, config: Config, run_dir: Path, *, goes_on: bool):
        self._settings, self._tree, self._run_dir = config.wandb, to_dict(config), run_dir
        self._id = _run_id(run_dir) if goes_on else _new_id(run_dir)
        self._row: dict[str, Any] = {}
        self._rows: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(name, value, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self._add(name, text, step)

    def add_figure(self, name: str, figure: Any, step: int) -> None:
        """Drawn here, as others use the figure after."""
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        self._add(name, picture, step)

    def flush(self) -> None:
        if self._row and not self._failed:
            self._rows.put(self._row)
        self._row = {}

    def close(self) -> None:
        self.flush()
        self._rows.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._give_up(
                f"not all is sent after {CLOSE_SECONDS:.0f} s; `wandb sync` sends what {self._run_dir}/wandb has of it"
            )

    def _add(self, name: str, value: Any, step: int) -> None:
        if self._row.get("step", step) != step:
            self.flush()
        self._row |= {"step": step, name: value}

    # ---- on the thread

    def _send(self) -> None:
        try:
            run = _begin(self._settings, self._tree, self._run_dir, self._id)
            for row in iter(self._rows.get, None):
                run.log({name: _shown(value) for name, value in row.items()})
            run.finish()
        except Exception as error:  # of any kind that its many parts may raise
            self._give_up(f"{one_line(error)}; the run goes on without it, with TensorBoard and metrics.jsonl")

    def _give_up(self, why: str) -> None:
        """Said once, by whichever of the two threads is first."""
        if not self._failed:
            self._failed = True
            print(f"lime-dist: warning: wandb: {why}", file=sys.stderr, flush=True)


def _begin(settings: WandbConfig, tree: Mapping[str, Any], run_dir: Path, run_id: str) -> Any:
    """Its run. A step may come twice, where training went back: so it is a value like the others, and W&B's own only counts."""
    import wandb

    quiet = wandb.Settings(silent=True, console="off")
    wandb.setup(settings=quiet)  # before it could ask for a key at a terminal
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or run_dir.absolute().name,
        id=run_id,
        resume="allow",
        reinit="create_new",
        dir=str(run_dir),
        config=dict(tree),
        settings=quiet,
    )
    run.define_metric("*", step_metric="step")
    return run


def _shown(value: Any) -> Any:
    import wandb

    if isinstance(value, str):
        return wandb.Html(f"<pre>{escape(value)}</pre>", inject=False)
    if isinstance(value, io.BytesIO):
        from PIL import Image  # with matplotlib, which drew it

        return wandb.Image(Image.open(value))
    return value


def _run_id(run_dir: Path) -> str:
    """That of the run so far. A copy of a run's folder, beside which the first one still lies, is another run from there."""
    known, _, folder = _read_id(run_dir).partition(" ")
    is_copy = folder != str(run_dir.absolute()) and bool(folder) and _read_id(Path(folder)).startswith(known)
    return known if known and not is_copy else _new_id(run_dir)


def _read_id(run_dir: Path) -> str:
    """The id and the folder that it was made for."""
    path = run_dir / _ID_FILE
    return path.read_text().strip() if path.is_file() else ""


def _new_id(run_dir: Path) -> str:
    new = secrets.token_hex(8)
    (run_dir / _ID_FILE).write_text(f"{new} {run_dir.absolute()}\n")
    return new
