"""The training run of one rank: resume, step, evaluate, save. Collective: world."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

import lime_dist
from lime_dist.backends.megatron import Groups
from lime_dist.checkpoint.changes import find_changes
from lime_dist.checkpoint.checking import Origin
from lime_dist.checkpoint.edges import (
    checkpoints_of,
    first_weights,
    resumed_config,
)
from lime_dist.checkpoint.full_disk import FULL_DISK, FullDisk
from lime_dist.checkpoint.loading import load_checkpoint, load_weights
from lime_dist.checkpoint.own_tokenizer import tokenizer_file
from lime_dist.checkpoint.reader import (
    CheckpointReader,
    find_before,
    find_checkpoints,
    set_aside_after,
    set_damaged_aside,
    take_back_replaced,
)
from lime_dist.checkpoint.safe_files import flush_to_disk
from lime_dist.checkpoint.saving import Progress, Saver
from lime_dist.config import RUN_CONFIG, RUN_PLAN, Config, dump_yaml
from lime_dist.data.dataset import TokenSamples
from lime_dist.data.kept_tokenizer import keep_tokenizer
from lime_dist.errors import CheckpointError, ConfigError, TrainingDiverged
from lime_dist.lifecycle.ending import DONE, REQUEUE
from lime_dist.lifecycle.ownership import Ownership
from lime_dist.lifecycle.pulse import Pulse
from lime_dist.plan.record import plan_record
from lime_dist.plan.run_plan import RunPlan
from lime_dist.profiling.profiler import Profiler
from lime_dist.training.agreement import tell_all
from lime_dist.training.batches import BatchReader
from lime_dist.training.held_out import evaluate_batches
from lime_dist.training.joint_stop import JointStop, between_parts
from lime_dist.training.metrics import Metrics, Stopwatch
from lime_dist.training.optim import lr_factor, rates
from lime_dist.training.peak_flops import find_peak_tflops
from lime_dist.training.peak_memory import peak_name
from lime_dist.training.rank import Rank
from lime_dist.training.router_pictures import gather_router_map
from lime_dist.training.run_data import open_held_out_data, open_training_data, training_tokenizer
from lime_dist.training.run_size import size_lines
from lime_dist.training.spikes import Action, SpikeState, Verdict, judge_step, returned, skipped, stopped
from lime_dist.training.startup import Start, agree_on_start, before_a_switch, decide_start, plan_of
from lime_dist.training.wandb_board import WandbBoard
from lime_dist.training.world import open_writers_group


class TrainingRun:
    """One rank's part in the run; counts the steps and samples done. Raises: Stopped when made while asked to stop."""

    rank: Rank

    def __init__(self, plan: RunPlan, groups: Groups, device: torch.device, stop: JointStop, pulse: Pulse):
        self._groups, self._device, self._stop, self._pulse = groups, device, stop, pulse
        self.config = config = plan.config
        between = between_parts(stop, pulse)
        between()
        self._samples = open_training_data(config, between)
        self._held_out = open_held_out_data(config, between)
        self.step = self.samples_seen = self._saved_step = 0
        self._spikes = SpikeState()
        self._saved: Path | None = None  # where `_saved_step` is
        self._switched_step: int | None = None
        start = self._begin(plan)
        between()
        self._samples.prepare(self.samples_seen, between)
        self._profiler = self._new_profiler()
        self._metrics: Metrics | None = None
        self._owner: Ownership | None = None
        self._lacks_records = False
        if self.rank.is_logger:
            self._open_run_folder(start.folder)
        self._evaluated_step = tell_all(self._metrics and self._metrics.evaluated_step, device)
        self._saver = self._open_saver()

    def _open_saver(self) -> Saver:
        writers = open_writers_group(self.config) if self.config.checkpoint.asynchronous else None
        origin = Origin(versions=_versions(), tokenizer=training_tokenizer(self.config))
        return Saver(checkpoints_of(self.config), writers=writers, check_owner=self._check_owner, origin=origin)

    def _begin(self, plan: RunPlan) -> Start:
        """With the newest whole checkpoint, or from the first weights."""
        if dist.get_rank() == 0:
            take_back_replaced(checkpoints_of(self.config))
        start = self._load_newest(lambda: agree_on_start(self.config, self._device), plan)
        if start.folder is None:
            self.rank = Rank(plan, self._groups, self._device, self._pulse)
            self._load_first_weights()
        return start

    def _load_newest(self, find: Callable[[], Start], plan: RunPlan) -> Start:
        """Of the checkpoints that `find` gives, one after the other, the first whose tensors are sound; those before it are set
        aside. Without a folder where there is none."""
        start = find()
        while start.folder is not None and (damage := self._damage_at(start, plan)) is not None:
            self._set_aside(start.folder, damage)
            self._drop_rank()
            start = find()
        return start

    def _drop_rank(self) -> None:
        """DeepSpeed's engine is in circles: else two lie in memory, and the old one ends within the new one's imports."""
        del self.rank
        gc.collect()

    def _damage_at(self, start: Start, plan: RunPlan) -> CheckpointError | None:
        """What the checkpoint could not be loaded for. Raises: CheckpointError where the user named it."""
        try:
            self._load(start, plan)
        except CheckpointError as error:
            if self.config.checkpoint.resume != "auto":
                raise
            return error.with_traceback(None)  # which holds the rank
        return None

    def _set_aside(self, folder: Path, problem: CheckpointError) -> None:
        """A checkpoint that is damaged, where there is an older one to go on from. Raises: `problem`, where there is none."""
        if not tell_all(len(find_checkpoints(folder.parent)) > 1, self._device):
            raise problem
        if dist.get_rank() == 0:
            _warn(set_damaged_aside(folder, problem))
        dist.barrier()

    def _set_later_ones_aside(self) -> None:
        for line in set_aside_after(checkpoints_of(self.config), self.step):
            _warn(line)

    def _load_first_weights(self) -> None:
        """Those of another run, where the config names one."""
        folder = first_weights(self.config)
        if folder is not None:
            load_weights(self.rank, folder)
            if self.rank.is_logger:
                print(f"weights from {folder}", flush=True)

    def _load(self, start: Start, plan: RunPlan) -> None:
        """A rank with the checkpoint's weights, and the pattern that the run has reached. plan: of an earlier pattern, perhaps."""
        assert start.folder is not None
        self.rank = Rank(plan_of(start.config, plan), self._groups, self._device, self._pulse)
        meta = load_checkpoint(self.rank, start.folder)
        self.step = self._saved_step = meta.step
        self._saved = start.folder
        self.samples_seen, self._spikes = meta.samples_seen, meta.spikes

    def _new_profiler(self) -> Profiler | None:
        """Of the steps to come."""
        steps = self.config.profile.steps
        if steps is None or self.step >= steps[0]:
            return None
        return Profiler(self.rank, first=steps[0], last=steps[-1])

    def train(self) -> tuple[int, str]:
        """The exit code, and the reason in a few words."""
        config, watch = self.config, Stopwatch()
        code = self._evaluate_and_agree(self._stop.agreed())
        with self._saver, self._batch_reader() as batches:
            while self.step < config.run.steps and code == DONE:
                if self.step in config.depth.switch_at and self._switched_step != self.step:
                    self._switch_pattern()
                stopping, verdict = self._train_step(batches, watch)
                has_returned = verdict.action is Action.RETURN
                if has_returned:
                    self._go_back(verdict)
                    batches.stop = self._last_sample
                code = self._evaluate_and_agree(stopping)
                # After a return, so that a start from there passes over the batches too, and counts it.
                is_due = has_returned or _is_due(self.step, config.checkpoint.every)
                self._save_if_due(is_due, is_leaving=self._is_last_step or code == REQUEUE)
        if self._profiler is not None:
            self._profiler.close()
        self._record("close", Metrics.close)
        asked = f"{self._stop.cause} at " if code == REQUEUE else ""
        return code, f"{asked}step {self.step} of {config.run.steps}"

    @property
    def _is_last_step(self) -> bool:
        return self.step == self.config.run.steps

    def _evaluate_and_agree(self, stopping: bool) -> int:
        """What is due after a step, and before the first one; REQUEUE when all leave here with work left.

        stopping: whether any rank was asked to stop by the end of the step; an evaluation leaves time for it to be asked.
        """
        is_whole = True
        if self._held_out is not None and self._evaluation_is_due():
            is_whole = self._evaluate(self._held_out)
            stopping = self._stop.agreed() or stopping  # the step may have told of a save that failed
        return REQUEUE if stopping and not (self._is_last_step and is_whole) else DONE

    def _evaluation_is_due(self) -> bool:
        """An evaluation that the start before was too short for is still due here."""
        is_due = self.step == 0 or self._is_last_step or _is_due(self.step, self.config.eval.every)
        return is_due and self._evaluated_step != self.step

    def _record(self, phase: str, write: Callable[[Metrics], None]) -> None:
        """A piece of work on all ranks, though one writes: a disk that hangs under it must name that one."""
        self._pulse.beat(phase)
        if self._metrics is not None:
            self._write(partial(write, self._metrics))
        self._pulse.finish()

    def _write(self, work: Callable[[], None]) -> None:
        """Of one rank. Raises: OSError for a full disk where the run is not to go on."""
        try:
            work()
        except OSError as error:
            if error.errno not in FULL_DISK or not self._bears_full_disk:
                raise
            error.__traceback__ = None  # TensorBoard raises the same one at every step
            self._warn_of_records(error)

    def _warn_of_records(self, error: OSError) -> None:
        """Once, as each step has some."""
        if not self._lacks_records:
            _warn(f"run.dir: {self.config.run.dir}: {error.strerror}; metrics of steps to come may be lost")
        self._lacks_records = True

    @property
    def _bears_full_disk(self) -> bool:
        return self.config.checkpoint.on_full_disk == "go_on"

    def _switch_pattern(self) -> None:
        """Save, and go on from there with the next pattern: cut edges are dropped, the others keep their moments."""
        folder = self._saved_here()
        self._reload(decide_start(self.config, self._device, lambda: folder, resumed_config))
        self._switched_step = self.step
        if self._metrics is not None:
            self._write(self._write_plan)
            pattern = self.rank.config.pattern
            print(
                f"step {self.step}: pattern {self.config.depth.switch_at[self.step]}, {pattern.num_edges} edges",
                flush=True,
            )

    def _reload(self, start: Start) -> None:
        """Go on from a checkpoint within this process."""
        plan = self._leave_rank()
        self._load(start, plan)
        self._follow_new_rank()

    def _leave_rank(self) -> RunPlan:
        """Its plan is what stays of it."""
        plan = self.rank.run_plan
        del self._profiler
        self._drop_rank()
        return plan

    def _follow_new_rank(self) -> None:
        self._switched_step = None
        self._profiler = self._new_profiler()

    def _go_back(self, verdict: Verdict) -> None:
        """To the last checkpoint of before the first of the bad steps, and past the batches since. Raises: TrainingDiverged."""
        self._unless_disk_is_full(self._settle)
        first_bad, bad_step, samples_seen = verdict.state.bad_steps[0], self.step, self.samples_seen
        checkpoints = checkpoints_of(self.config)
        find = partial(
            decide_start, self.config, self._device, lambda: find_before(checkpoints, first_bad), before_a_switch
        )
        start = find()
        if start.folder is not None:
            start = self._load_newest(find, self._leave_rank())
        if start.folder is None:
            self._record("record", lambda metrics: metrics.spike(stopped(bad_step, verdict)))
            raise self._diverged(
                f"step {bad_step}: {verdict.reason}, and there is no checkpoint of before step {first_bad} to go back to"
            )
        self._follow_new_rank()
        self._spikes = self._spikes.returned(verdict.state, samples_seen - self.samples_seen)
        self.samples_seen = samples_seen
        self._saved = None  # the checkpoint that is there knows nothing of the return
        if self._owner is not None:
            self._check_owner()
            self._write(self._set_later_ones_aside)
            self._write(self._write_plan)
        self._record("record", Metrics.close)
        if self._metrics is not None:
            self._metrics = self._open_metrics()
        event = returned(
            self.config.spikes, step=self.step, bad_step=bad_step, reason=verdict.reason, state=self._spikes
        )
        self._record("record", lambda metrics: metrics.spike(event))
        self._evaluated_step = tell_all(self._metrics and self._metrics.evaluated_step, self._device)

    def _write_plan(self) -> None:
        path = Path(self.config.run.dir) / RUN_PLAN
        path.write_text(json.dumps(plan_record(self.rank.run_plan)))

    def _batch_reader(self) -> BatchReader:
        size = self.config.data.global_batch_size
        return BatchReader(self._samples.batch, self.rank.rows(), size, self._last_sample, self._samples.num_targets)

    @property
    def _last_sample(self) -> int:
        """Behind all that the steps to come take, unless they lead back."""
        return self.samples_seen + (self.config.run.steps - self.step) * self.config.data.global_batch_size

    def _judge(self, loss: float, grad_norm: float) -> Verdict:
        return judge_step(self.config.spikes, self._spikes, self.step + 1, loss, grad_norm)

    def _train_step(self, batches: BatchReader, watch: Stopwatch) -> tuple[bool, Verdict]:
        """Whether any rank was asked to stop, and what was done about the step. Raises: TrainingDiverged."""
        config = self.config
        self._pulse.begin_step(self.step + 1)
        if self._profiler is not None:
            self._profiler.begin(self.step + 1)
        watch.lap()
        factor = lr_factor(config.optim, self.step, config.run.steps)
        # No random number is drawn after the initial weights today; whatever will draw one stays resumable.
        torch.manual_seed(hash((config.run.seed, self.step, dist.get_rank())) % 2**63)
        result = self.rank.train_step(batches.batch(self.samples_seen), factor, self._wants_stop, self._judge)
        verdict = result.verdict
        if verdict.action is Action.STOP:
            self._give_up(verdict)
        self.step += 1
        self._spikes = verdict.state
        self.samples_seen += config.data.global_batch_size
        self._record(
            "record",
            lambda metrics: metrics.step(
                step=self.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                **rates(config, factor),
                tokens=config.tokens_per_step,
                tokens_seen=(self.samples_seen - self._spikes.samples_passed_over) * config.data.seq_length,
                model_flops=self.rank.run_plan.model_flops_per_step,
                step_seconds=watch.lap(),
                boundary_bytes=result.boundary_bytes,
                peak_memory={peak_name(self._device): result.peak_bytes},
                spikes=self._spikes.counts,
            ),
        )
        if verdict.action is Action.SKIP:
            event = skipped(config.spikes, self.step, verdict)
            self._record("record", lambda metrics: metrics.spike(event))
        self._note_saved()
        self._end_profiled_step()
        if _is_due(self.step, config.analysis.every):
            self._picture_routers()
        if self._saver.failure is None:  # else that says why all leave
            self._stop.heard(result.stop_asked)
        return result.stop_asked, verdict

    def _wants_stop(self) -> bool:
        """A save that could not be written stops the run where the next one is due: at once, as if it were asked to."""
        failure = self._saver.failure
        is_borne = self._bears_full_disk and isinstance(failure, FullDisk)
        return self._stop.asked_here() or (failure is not None and not is_borne)

    def _give_up(self, verdict: Verdict) -> NoReturn:
        step, returns = self.step + 1, self._spikes.num_returns
        self._record("record", lambda metrics: metrics.spike(stopped(step, verdict)))
        tried = f", after {returns} returns (spikes.max_returns)" if returns else ""
        raise self._diverged(f"step {step}: {verdict.reason}, so it was not taken{tried}")

    def _picture_routers(self) -> None:
        router_map = gather_router_map(self.rank)
        if router_map is not None:
            self._record("record", lambda metrics: metrics.router_map(self.step, router_map.mean))

    def _end_profiled_step(self) -> None:
        folder = self._profiler.end() if self._profiler is not None else None
        if folder is not None:
            self._profiler = None
            self._record("profile", lambda metrics: metrics.profiled(folder))

    def _diverged(self, what: str) -> TrainingDiverged:
        """Collective: world, as the checkpoint to go on from may still be in the making."""
        with suppress(FullDisk):
            self._settle()
        return TrainingDiverged(
            f"{what}; start again from step {self._saved_step} with a lower optim.lr or a longer optim.warmup_steps"
        )

    def _evaluate(self, held_out: TokenSamples) -> bool:
        """Whether the evaluation was not left for a stop; a part of it is not recorded."""
        watch = Stopwatch()
        loss = evaluate_batches(self.rank, held_out, self._stop)
        if loss is None:
            return False
        self._record(
            "record",
            lambda metrics: metrics.evaluation(step=self.step, eval_loss=loss, eval_seconds=watch.lap()),
        )
        self._evaluated_step = self.step
        return True

    def _save_if_due(self, is_due: bool, *, is_leaving: bool) -> None:
        """A run that leaves waits for what it has written, and must have written it."""
        if is_due or is_leaving:
            self._unless_disk_is_full(self._settle)
        if is_leaving:
            self._save(behind=False)
        elif is_due:
            self._unless_disk_is_full(partial(self._save, behind=True))

    def _save(self, *, behind: bool) -> None:
        """Raises: TrainingDiverged, FullDisk, on all ranks."""
        progress = Progress(self.step, self.samples_seen, self._spikes)
        try:
            self._saver.save(self.rank, progress, behind=behind, prepare=self._prepare_save)
        except TrainingDiverged as error:
            raise self._diverged(f"step {self.step}: {error}, so it was not saved") from None
        self._note_saved()

    def _prepare_save(self) -> None:
        """A checkpoint must not be whole before the records of its steps are."""
        self._check_owner()
        if self._metrics is not None:
            self._write(self._metrics.flush_to_disk)

    def _unless_disk_is_full(self, work: Callable[[], None]) -> None:
        """Raises: FullDisk, on all ranks, where the run is not to go on without saving."""
        try:
            work()
        except FullDisk as error:
            if not self._bears_full_disk:
                raise
            if self.rank.is_logger:
                _warn(
                    f"not saved: {error.reason}; the run goes on from step {self.step}, the last whole checkpoint is of step {self._saved_step}"
                )

    def _saved_here(self) -> Path:
        """The whole checkpoint of this step."""
        self._unless_disk_is_full(self._settle)
        if self._saved is None or self._saved_step != self.step:
            self._save(behind=False)
        assert self._saved is not None
        return self._saved

    def _settle(self) -> None:
        """What is being saved is whole on return. Raises: FullDisk, on all ranks."""
        self._saver.settle(self._pulse)
        self._note_saved()

    def _note_saved(self) -> None:
        """Not collective: each rank has its own moment at which it knows."""
        for saved in self._saver.take_saved():
            self._saved_step, self._saved = saved.step, saved.folder
            if self._metrics is not None:
                facts = {"seconds": saved.seconds, "wait_seconds": saved.wait_seconds}
                self._write(partial(self._metrics.saved, step=saved.step, folder=saved.folder, **facts))

    def _check_owner(self) -> None:
        """Raises: RunTaken on the first rank where another start has the run."""
        if self._owner is not None:
            self._owner.check()

    def _open_run_folder(self, resumed_from: Path | None) -> None:
        run_dir = Path(self.config.run.dir)
        self._owner = _take_run(run_dir, checkpoints_of(self.config))
        self._set_later_ones_aside()
        if (tokenizer := tokenizer_file(self.config)) is not None:
            keep_tokenizer(tokenizer, run_dir)
        (run_dir / RUN_CONFIG).write_text(dump_yaml(self.config))
        self._write_plan()
        if resumed_from is not None:
            print(f"resumed from {resumed_from}, step {self.step} of {self.config.run.steps}", flush=True)
            if changes := find_changes(CheckpointReader(resumed_from).config, self.config):
                print(f"changed since then: {', '.join(map(str, changes))}", flush=True)
        print(*size_lines(self.rank.config, self._samples), sep="\n", flush=True)
        self._metrics = self._open_metrics()
        self._metrics.config(dump_yaml(self.config), step=self.step)

    def _open_metrics(self) -> Metrics:
        return Metrics(
            Path(self.config.run.dir),
            first_step=self.step,
            num_steps=self.config.run.steps,
            log_every=self.config.run.log_every,
            peak_flops=_peak_flops(self.config, self._device),
            more_boards=[WandbBoard(self.config, Path(self.config.run.dir), goes_on=self.step > 0)]
            if self.config.wandb.project
            else [],
        )


def _versions() -> dict[str, str]:
    """Of what makes the numbers."""
    packages = ("torch", "deepspeed", "megatron-core")
    return {"lime_dist": lime_dist.__version__, **{name: version(name) for name in packages}}


def _warn(line: str) -> None:
    print(f"lime-dist: warning: {line}", file=sys.stderr, flush=True)


def _peak_flops(config: Config, device: torch.device) -> float | None:
    """Of all ranks, as if all devices were like this one."""
    tflops = config.run.peak_tflops
    if tflops is None and device.type == "cuda":
        tflops = find_peak_tflops(torch.cuda.get_device_name(device), config.run.dtype)
    return None if tflops is None else tflops * 1e12 * config.layout.world_size


def _take_run(run_dir: Path, checkpoints: Path) -> Ownership:
    """Raises: ConfigError where nothing can be written; OSError for a full disk."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _flush_path(run_dir)
        return Ownership(run_dir)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise ConfigError(
            f"run.dir: {error.filename or run_dir}: {error.strerror or error}; name a folder that can be written"
        ) from None


def _flush_path(run_dir: Path) -> None:
    """The run's folder and all above it, which may be new too: else a power cut takes the whole run, checkpoints and all."""
    flush_to_disk(run_dir)
    for folder in run_dir.resolve().parents:
        with suppress(OSError):  # not new, where it cannot be read or lies on a disk that is only read
            flush_to_disk(folder)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
