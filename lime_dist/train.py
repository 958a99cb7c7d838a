"""The training run of one rank: resume, step, evaluate, save. Collective: world."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lime_dist.backends.megatron import Groups
from lime_dist.checkpoint.files import set_aside_after, step_folder
from lime_dist.checkpoint.save_load import FULL_DISK, load_checkpoint, naming_full_disk, save_checkpoint
from lime_dist.config import Config, dump_yaml
from lime_dist.data.dataset import TokenSamples
from lime_dist.ending import DONE, REQUEUE, write_outcome
from lime_dist.errors import CheckpointError, ConfigError, TrainingDiverged
from lime_dist.launcher import Place
from lime_dist.metrics import Metrics, Stopwatch
from lime_dist.optim import lr_factor
from lime_dist.ownership import Ownership
from lime_dist.rank import Rank, join_world
from lime_dist.resolve import checkpoints_of, evaluated_config, resume_folder, resumed_config
from lime_dist.startup import Start, agree_on_start, check_alike, decide_start
from lime_dist.stopping import StopRequest, stop_request
from lime_dist.watch.pulse import Pulse
from lime_dist.watch.watchdog import Watchdog


class SampleBatch:
    """Consecutive samples, read when sliced, so that each rank reads only its own rows."""

    def __init__(self, samples: TokenSamples, start: int):
        self._samples, self._start = samples, start

    def __getitem__(self, rows: slice) -> Tensor:
        """int64 [rows, seq + 1]."""
        return self._samples.batch(self._start + rows.start, rows.stop - rows.start)


def open_training_data(config: Config) -> TokenSamples:
    return _open(config, config.data.train, (0.0, 1.0 - config.data.valid_fraction), "data.train")


def open_held_out_data(config: Config) -> TokenSamples | None:
    """`data.valid`, or the documents kept back from `data.train`, or None."""
    if config.data.valid:
        return _open(config, config.data.valid, (0.0, 1.0), "data.valid")
    if config.data.valid_fraction:
        return _open(config, config.data.train, (1.0 - config.data.valid_fraction, 1.0), "data.train")
    return None


def _open(config: Config, sources: list, split: tuple[float, float], key: str) -> TokenSamples:
    return TokenSamples(
        [(source.path, source.weight) for source in sources],
        seq_length=config.data.seq_length,
        seed=config.run.seed,
        split=split,
        vocab_size=config.model.vocab_size,
        key=key,
    )


def train(config: Config, place: Place) -> int:
    """Train to `run.steps` on this rank, or until a signal asks to stop; returns the exit code (`ending.py`)."""
    stop = stop_request()
    pulse = Pulse()
    with Watchdog(config, place, pulse), naming_full_disk(Path(config.run.dir), checkpoints_of(config)):
        run = TrainingRun(config, *join_world(config, place), stop, pulse)
        code, reason = run.train()
    write_outcome(code, reason)  # by every rank, as each node's launcher may have a file of its own
    return code


def evaluate(config: Config, place: Place, checkpoint: Path | None = None) -> dict[str, Any] | None:
    """Held-out loss of a checkpoint (default: what training would resume from); the report on rank 0.

    Raises: CheckpointError, ConfigError.
    """
    held_out = open_held_out_data(config)
    if held_out is None:
        raise ConfigError("data.valid: no held-out text; name a token file there or set data.valid_fraction")
    groups, device = join_world(config, place)
    check_alike(config, device)
    start = decide_start(config, device, lambda: checkpoint or resume_folder(config), evaluated_config)
    if start.folder is None:
        raise CheckpointError(
            f"run.dir: no checkpoint under {checkpoints_of(config)}; train first or give --checkpoint"
        )
    rank = Rank(start.config, groups, device)
    meta = load_checkpoint(rank, start.folder)
    loss = evaluate_batches(rank, held_out)
    dist.barrier()
    if not rank.is_logger:
        return None
    return {"checkpoint": str(start.folder), "step": meta.step, "eval_loss": loss, "perplexity": math.exp(loss)}


class TrainingRun:
    """One rank's part in the run; counts the steps and samples done."""

    def __init__(self, config: Config, groups: Groups, device: torch.device, stop: StopRequest, pulse: Pulse):
        self.config, self._groups, self._device, self._stop, self._pulse = config, groups, device, stop, pulse
        check_alike(config, device)
        self._samples = open_training_data(config)
        self._held_out = open_held_out_data(config)
        self.step = self.samples_seen = self._saved_step = self._pattern_since = 0
        start = agree_on_start(config, device)
        if start.folder is None:
            self.rank = Rank(config, groups, device, pulse)
        else:
            self._load(start)
        self._metrics = self._owner = None
        if self.rank.is_logger:
            self._open_run_folder(start.folder)

    def _load(self, start: Start) -> None:
        """A rank with the checkpoint's weights, and the pattern that the run has reached."""
        self.rank = Rank(start.config, self._groups, self._device, self._pulse)
        meta = load_checkpoint(self.rank, start.folder)
        self.step = self._saved_step = self._pattern_since = meta.step
        self.samples_seen = meta.samples_seen

    def train(self) -> tuple[int, str]:
        """The exit code, and the reason in a few words."""
        config, watch, code = self.config, Stopwatch(), DONE
        if self.step == 0:
            self._evaluate()
        while self.step < config.run.steps and code == DONE:
            if self.step in config.depth.switch_at and self._pattern_since < self.step:
                self._switch_pattern()
            watch.lap()
            self._train_step(watch)
            is_last = self.step == config.run.steps
            if is_last or _is_due(self.step, config.eval.every):
                self._evaluate()
            code = REQUEUE if self._agree_to_stop() and not is_last else DONE
            if is_last or code == REQUEUE or _is_due(self.step, config.checkpoint.every):
                self._save()
        if self._metrics is not None:
            self._metrics.close()
        dist.barrier()
        asked = f"{self._stop.signal_name or 'stop asked of another rank'} at " if code == REQUEUE else ""
        return code, f"{asked}step {self.step} of {config.run.steps}"

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop, so that all leave behind the same step. Collective: world."""
        asked = torch.tensor(int(self._stop.signal_name is not None), device=self._device)
        dist.all_reduce(asked)
        return bool(asked.item())

    def _switch_pattern(self) -> None:
        """Save, and go on from there with the next pattern: cut edges are dropped, the others keep their moments."""
        folder = step_folder(checkpoints_of(self.config), self.step) if self._saved_step == self.step else self._save()
        del self.rank
        self._load(decide_start(self.config, self._device, lambda: folder, resumed_config))
        if self._metrics is not None:
            pattern = self.rank.config.pattern
            print(
                f"step {self.step}: pattern {self.config.depth.switch_at[self.step]}, {pattern.num_edges} edges",
                flush=True,
            )

    def _train_step(self, watch: Stopwatch) -> None:
        config = self.config
        self._pulse.begin_step(self.step + 1)
        factor = lr_factor(config.optim, self.step, config.run.steps)
        # No random number is drawn after the initial weights today; whatever will draw one stays resumable.
        torch.manual_seed(hash((config.run.seed, self.step, dist.get_rank())) % 2**63)
        try:
            result = self.rank.train_step(SampleBatch(self._samples, self.samples_seen), factor)
        except TrainingDiverged as error:
            raise self._diverged(f"step {self.step + 1}: {error}, so it was not taken") from None
        self.step += 1
        self.samples_seen += config.data.global_batch_size
        if self._metrics is not None:
            self._metrics.step(
                step=self.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=config.optim.lr * factor,
                tokens=config.tokens_per_step,
                step_seconds=watch.lap(),
                boundary_bytes=result.boundary_bytes,
            )

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what}; start again from step {self._saved_step} with a lower optim.lr or a longer optim.warmup_steps"
        )

    def _evaluate(self) -> None:
        if self._held_out is None:
            return
        watch = Stopwatch()
        loss = evaluate_batches(self.rank, self._held_out)
        if self._metrics is not None:
            self._metrics.evaluation(step=self.step, eval_loss=loss, eval_seconds=watch.lap())

    def _save(self) -> Path:
        watch = Stopwatch()
        self._pulse.beat("save")
        if self._owner is not None:
            self._owner.check()
        if self._metrics is not None:
            self._metrics.flush_to_disk()  # a checkpoint must not be whole before the records of its steps are
        try:
            folder = save_checkpoint(
                self.rank, checkpoints_of(self.config), step=self.step, samples_seen=self.samples_seen
            )
        except TrainingDiverged as error:
            raise self._diverged(f"step {self.step}: {error}, so it was not saved") from None
        self._saved_step = self.step
        if self._metrics is not None:
            self._metrics.saved(step=self.step, folder=folder, save_seconds=watch.lap())
        return folder

    def _open_run_folder(self, resumed_from: Path | None) -> None:
        run_dir = Path(self.config.run.dir)
        self._owner = _take_run(run_dir)
        set_aside_after(checkpoints_of(self.config), self.step)
        (run_dir / "config.yaml").write_text(dump_yaml(self.config))
        if resumed_from is not None:
            print(f"resumed from {resumed_from}, step {self.step} of {self.config.run.steps}", flush=True)
        self._metrics = Metrics(
            run_dir, first_step=self.step, num_steps=self.config.run.steps, log_every=self.config.run.log_every
        )


def _take_run(run_dir: Path) -> Ownership:
    """Raises: ConfigError where nothing can be written; OSError for a full disk."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return Ownership(run_dir)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise ConfigError(f"run.dir: {run_dir}: {error.strerror or error}; name a folder that can be written") from None


def evaluate_batches(rank: Rank, held_out: TokenSamples) -> float:
    """Mean loss over the first `eval.batches` global batches of the held-out text. Collective: world."""
    size = rank.config.data.global_batch_size
    return rank.evaluate([SampleBatch(held_out, index * size) for index in range(rank.config.eval.batches)])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
