"""The commands that start ranks: train, eval, parity; and plan, generate. Nothing heavy is imported until one runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lime_dist.checkpoint import commands as checkpoint_commands
from lime_dist.checkpoint.edges import ready_plan, ready_to_evaluate, resolve_pattern, resume_folder
from lime_dist.cli.given_paths import writing
from lime_dist.cli.samples import find_reference, reference_names
from lime_dist.config import Config, check_config, dump_yaml, find_warnings, load_config
from lime_dist.config.ranges import RANGES
from lime_dist.config.reading import is_override, shown_key
from lime_dist.data.commands import add_special_tokens
from lime_dist.errors import CheckpointError, ConfigError, LimeDistError, one_line
from lime_dist.hugging_face import commands as hugging_face_commands
from lime_dist.lifecycle.ending import FAILED, NEVER_RESTART, write_outcome
from lime_dist.lifecycle.launcher import (
    Place,
    find_place,
    launch_kernels_in_order,
    require_address,
    require_rendezvous,
    warn,
)
from lime_dist.lifecycle.stopping import leaving_when_asked, stop_request
from lime_dist.plan.costs import Rates
from lime_dist.plan.machine import Words, read_words
from lime_dist.plan.run_plan import RunPlan, plan_run


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the commands; each sets `run`, a handler from the parsed arguments to the exit code."""
    _add_train(subparsers)
    _add_plan(subparsers)
    _add_eval(subparsers)
    _add_generate(subparsers)
    _add_parity(subparsers)
    _add_checkpoint(subparsers)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run, or the run's folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a key, such as parallel.pp=4")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="local ranks when no launcher started this (default: tp * pp * dp)"
    )


def _add_train(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train", help="train a model; alone, under torchrun, srun or DeepSpeed's launcher")
    add_config(parser)
    add_nproc(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, the stage table and the size of the run, and stop",
    )
    parser.set_defaults(run=_train)


def _add_plan(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("plan", help="what each stage holds and what crosses each boundary")
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--compare",
        nargs="*",
        metavar="PATTERN",
        help="what each pattern would cost over LLaMA, side by side: first:2, top_p:0.9, first:1+stride:3 (default: a choice)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: an .svg file")
    parser.add_argument(
        "--predict",
        nargs="*",
        metavar="WORD",
        help="step time of this and of other settings, simulated: rate=400TFLOP/s of a device, links=50GB/s,900GB/s between "
        "nodes and within one, latency=10us, node=8 ranks; or a run's folder, for what was measured there",
    )
    parser.add_argument(
        "--sweep",
        type=_positive,
        metavar="N",
        help="with --predict: the fastest layouts of N ranks that fit run.memory",
    )
    parser.set_defaults(run=_plan)


def _add_eval(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "eval", help="loss of a checkpoint on the held-out text, accuracy on its task, or tasks of lm-eval"
    )
    add_config(parser)
    add_nproc(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a step_N folder, or a run's (default: the newest of the config's run.dir)",
    )
    parser.add_argument(
        "--task", action="store_true", help="continue each held-out example greedily, on one device; how many are right"
    )
    parser.add_argument(
        "--harness",
        metavar="TASKS",
        help="tasks of EleutherAI's lm-eval, such as hellaswag,arc_easy, on one device; CONFIG may be a step_N folder then",
    )
    of_both = parser.add_argument_group("with --task or --harness")
    of_both.add_argument("--limit", type=_positive, metavar="N", help="the first N examples only (default: all)")
    of_both.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="of an answer (default: twice as many as the longest answer has, or as the harness's task says)",
    )
    of_both.add_argument("--json", action="store_true", help="print JSON")
    of_task = parser.add_argument_group("with --task")
    of_task.add_argument("--split", metavar="PREFIX", help="examples (default: data.valid)")
    of_harness = parser.add_argument_group("with --harness")
    of_harness.add_argument("--harness-path", type=Path, metavar="FOLDER", help="YAML files of tasks of your own")
    of_harness.add_argument(
        "--num-fewshot", type=_count, metavar="N", help="solved examples in each prompt (default: as the task says)"
    )
    of_harness.add_argument(
        "--add-bos", action="store_true", help="begin texts with BOS (default: as the meta files of data.train say)"
    )
    parser.set_defaults(run=_eval)


def _add_generate(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("generate", help="continue a prompt with a checkpoint, on one device")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_N folder, or a run's folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a .model or tokenizer.json (default: the run's data.tokenizer)"
    )
    add_special_tokens(parser)
    parser.add_argument(
        "--add-bos", action="store_true", help="begin with BOS, as documents of data tokenize --add-bos do"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token (default: 1)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that sum to P (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.set_defaults(run=_generate)


def _add_parity(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("parity", help="compare this installation, under any layout, with reference numbers")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="NAME",
        help="reference numbers: mha4 or another that --list names, or a folder of your own",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="the layout, such as parallel.pp=3 parallel.tp=2"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--list", action="store_true", help="the names of the reference numbers that are here")
    parser.add_argument("--timeout", type=_seconds, default=600, metavar="SECONDS", help="give up after (default: 600)")
    parser.set_defaults(run=_parity)


def _add_checkpoint(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "checkpoint", help="look into checkpoints, verify and convert them, Hugging Face's form too"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    checkpoint_commands.add_parsers(commands)
    hugging_face_commands.add_parsers(commands)


def _seconds(text: str) -> float:
    problem = RANGES["run.timeout_seconds"].problem(float(text))
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return float(text)


def _positive(text: str) -> int:
    problem = RANGES["parallel.dp"].problem(int(text))
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return int(text)


def _count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return int(text)


# ---- handlers


def _plan(args: argparse.Namespace) -> int:
    from lime_dist.plan.pattern_costs import compare_table
    from lime_dist.plan.table import plan_report, stage_table

    if args.predict is not None:
        return _predict(args)
    if args.sweep is not None:
        raise ConfigError("--sweep: is part of a prediction; add --predict")
    words = args.compare or []
    overrides = [*args.overrides, *filter(is_override, words)]
    plan = _ready_to_train(load_config(args.config, overrides))
    patterns = [word for word in words if not is_override(word)]
    costs = [] if args.compare is None else _pattern_costs(plan, patterns)
    if args.plot is not None:
        _plot(plan, args.plot)
    if args.json:
        print(json.dumps(plan_report(plan) | ({"compare": costs} if costs else {})))
    else:
        print(stage_table(plan) + (f"\n\n{compare_table(costs)}" if costs else ""))
    return 0


def _pattern_costs(plan: RunPlan, patterns: list[str]) -> list[dict[str, Any]]:
    """Of each, with the edges that the run would choose now: by `depth.weights_from`, or by its own checkpoint.

    Raises: ConfigError for a pattern that it cannot have.
    """
    from lime_dist.plan.pattern_costs import compared_configs

    depth = plan.config.depth
    trained = None if depth.weights_from or depth.router == "none" else resume_folder(plan.config)
    return [_pattern_cost(config, trained) for config in compared_configs(plan, patterns)]


def _pattern_cost(config: Config, trained: Path | None) -> dict[str, Any]:
    from lime_dist.plan.pattern_costs import pattern_cost

    try:
        return pattern_cost(resolve_pattern(check_config(config), trained))
    except (ConfigError, CheckpointError) as error:
        problem = str(error).removeprefix("depth.pattern: ")
        raise ConfigError(f"--compare {shown_key(config.depth.name)}: {problem}") from None


def _predict(args: argparse.Namespace) -> int:
    from lime_dist.plan.predict import compare_settings, prediction_report, prediction_table, without_limit
    from lime_dist.plan.sweep import sweep, sweep_report, sweep_table

    for option in ("compare", "plot"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}: is of the plan, which --predict does not show; give one of them")
    words = read_words(args.predict)
    loaded = load_config(args.config, [*args.overrides, *words.overrides])
    rates, assumptions = _rates(words, loaded)
    # A layout that does not fit `run.memory` is what a prediction may mend.
    unlimited = ready_plan(without_limit(loaded)).config
    config = replace(unlimited, run=loaded.run)
    check_config(config)
    warn(find_warnings(config))
    if args.sweep is not None:
        found = sweep(config, rates, args.sweep, _progress())
        report, text = {"sweep": sweep_report(found, rates, assumptions)}, sweep_table(found, rates, assumptions)
    else:
        comparison = compare_settings(config, rates, _progress())
        report, text = prediction_report(comparison, assumptions), prediction_table(comparison, assumptions)
    print(json.dumps({"predict": report}) if args.json else text)
    return 0


def _rates(words: Words, config: Config) -> tuple[Rates, str]:
    """What the prediction of `config` goes by, and in words. Raises: ProfileError, ConfigError."""
    if words.profile is None:
        return words.machine.rates(), str(words.machine)
    from lime_dist.profiling.analysis import Analysis
    from lime_dist.profiling.calibration import measured_rates

    analysis = Analysis.read(words.profile)
    _check_same_model(words.profile, analysis.profile.plan.config, config)
    return words.on(measured_rates(analysis.profile, analysis.timelines)), f"{analysis}{words.instead}"


def _check_same_model(folder: Path, profiled: Config, config: Config) -> None:
    for key in ("model.num_layers", "model.hidden_size", "model.intermediate_size", "model.num_heads", "model.num_kv_heads",
                "model.vocab_size", "data.seq_length", "run.dtype"):  # fmt: skip
        section, name = key.split(".")
        theirs, own = (getattr(getattr(one, section), name) for one in (profiled, config))
        if theirs != own:
            raise ConfigError(
                f"--predict: {folder} is a profile of another model ({key}: {theirs}, here {own}); record one of this config"
            )


def _progress() -> Callable[[str], None]:
    """A line on stderr every other second."""
    last = time.monotonic()

    def show(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 2:
            last = time.monotonic()
            print(f"lime-dist: {text}", file=sys.stderr, flush=True)

    return show


def _plot(plan: RunPlan, path: Path) -> None:
    from lime_dist.plan.drawing import draw_plan

    if path.suffix != ".svg":
        raise ConfigError(f"--plot: {path} must end in .svg")
    with writing("--plot", path):
        path.write_text(draw_plan(plan), encoding="utf-8")


def _train(args: argparse.Namespace) -> int:
    if args.dry_run:
        return _dry_run(args)
    return ended(ready_on_ranks(args, _ready_to_start, "train"))


def _ready_to_start(config: Config, world_size: int | None) -> RunPlan:
    from lime_dist.training.wandb_board import require_wandb

    require_wandb(config)
    return _ready_to_train(config, world_size)


def _ready_to_train(config: Config, world_size: int | None = None) -> RunPlan:
    """As `ready_plan`; of other commands the warnings would be wrong: `profile` has steps of its own, `eval` none."""
    plan = ready_plan(config, world_size)
    warn(find_warnings(plan.config))
    return plan


_Ready = Callable[[Config, int | None], RunPlan]  # `ready_plan`, or the same for an evaluation


def ready_on_ranks(args: argparse.Namespace, ready: _Ready, function: str, *more: Any) -> Any:
    """As `_on_ranks`; signals are heard from here on, before the slow imports."""
    with _signals_heard():
        from lime_dist.preflight.input_files import check_files

        plan = _resolve(args, ready)
        check_files(plan.config)
        return _on_ranks(plan, function, *more)


@contextmanager
def _signals_heard() -> Iterator[None]:
    if find_place() is None:
        with leaving_when_asked():
            yield
    else:
        stop_request().is_alone = True
        yield


def ended(code: int) -> int:
    """A rank leaves at once: interpreter shutdown takes seconds, which a scheduler that has sent TERM may not give."""
    if find_place() is not None:
        from lime_dist.lifecycle.local import leave

        leave(code)
    return code


def _dry_run(args: argparse.Namespace) -> int:
    from lime_dist.plan.table import stage_table
    from lime_dist.preflight.input_files import find_training_text
    from lime_dist.training.run_size import size_lines

    plan = _ready_to_train(load_config(args.config, args.overrides), args.nproc)
    print(dump_yaml(plan.config))
    print(stage_table(plan), "", *size_lines(plan.config, find_training_text(plan.config)), sep="\n")
    return 0


def _eval(args: argparse.Namespace) -> int:
    if args.harness is not None:
        return _eval_harness(args)
    _refuse_options(args, "--harness", "harness_path", "num_fewshot", "add_bos")
    if args.task:
        return _eval_task(args)
    _refuse_options(args, "--task", "split")
    _refuse_options(args, "--task or --harness", "limit", "max_new_tokens", "json")
    ready = partial(ready_to_evaluate, checkpoint=args.checkpoint)
    code, report = ready_on_ranks(args, ready, "evaluate", args.checkpoint)
    if report is not None:
        print(json.dumps(report))
    return ended(code)


def _refuse_options(args: argparse.Namespace, needed: str, *options: str) -> None:
    for option in options:
        if getattr(args, option) is not None and getattr(args, option) is not False:
            raise ConfigError(f"--{option.replace('_', '-')}: needs {needed}; add it, or leave this out")


def _require_one_device(args: argparse.Namespace, option: str) -> None:
    place = find_place()
    if args.nproc is not None or (place is not None and place.world_size > 1):
        raise ConfigError(f"{option}: runs on one device; start it alone, without a launcher or --nproc")


def _eval_task(args: argparse.Namespace) -> int:
    from lime_dist.task_accuracy import TaskRequest, judge_checkpoint

    _require_one_device(args, "--task")
    request = TaskRequest(
        checkpoint=args.checkpoint, split=args.split, limit=args.limit, max_new_tokens=args.max_new_tokens
    )
    accuracy = judge_checkpoint(load_config(args.config, args.overrides), request)
    print(json.dumps(accuracy.report()) if args.json else accuracy)
    return 0


def _eval_harness(args: argparse.Namespace) -> int:
    if args.task:
        raise ConfigError("--harness: --task is another evaluation; give one of them")
    _refuse_options(args, "--task", "split")
    _require_one_device(args, "--harness")
    if find_spec("lm_eval") is None:
        raise ConfigError("--harness: needs the lm-eval library; pip install 'lime_dist[harness]'")
    from lime_dist.harness.evaluation import HarnessRequest, evaluate_checkpoint, find_evaluated, keep_report

    request = HarnessRequest(
        asked=args.harness,
        folder=args.harness_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        add_bos=args.add_bos,
    )
    report = evaluate_checkpoint(*find_evaluated(args.config, args.overrides, args.checkpoint), request)
    print(json.dumps(report.report(), allow_nan=False) if args.json else report)
    print(f"lime-dist: {keep_report(report)}", file=sys.stderr)
    return 0


def _resolve(args: argparse.Namespace, ready: _Ready) -> RunPlan:
    """The plan for the ranks that a launcher has started, or for --nproc."""
    place = find_place()
    if place is not None and args.nproc is not None:
        raise ConfigError("--nproc: a launcher has started this already; leave --nproc out")
    world_size = place.world_size if place is not None else args.nproc
    return ready(load_config(args.config, args.overrides), world_size)


def _on_ranks(plan: RunPlan, function: str, *args: Any) -> Any:
    """Run `training.run.<function>(plan, place, *args)` here if a launcher started this, else on local ranks; rank 0's result."""
    place = find_place()
    if place is not None:
        require_rendezvous()
        require_address(place)
        if plan.config.run.device != "cpu":
            launch_kernels_in_order(plan.layout)
        from lime_dist.training import run

        return _as_launched_rank(getattr(run, function), plan, place, args)
    from lime_dist.lifecycle.local_ranks import run_local_ranks

    return run_local_ranks(_as_local_rank, plan, function, *args, shared_import="lime_dist.training.run")[0]


def _as_local_rank(config: Config, function: str, *args: Any) -> Any:
    stop_request()  # before the slow imports of a fresh interpreter
    from lime_dist.training import run

    return getattr(run, function)(plan_run(config), find_place(), *args)


def _as_launched_rank(function: Callable[..., Any], plan: RunPlan, place: Place, args: tuple) -> Any:
    """An error ends the process at once, so that the launcher sees it and stops the other ranks."""
    from lime_dist.lifecycle.local import leave

    try:
        return function(plan, place, *args)
    except LimeDistError as error:
        if write_outcome(NEVER_RESTART, error):
            print(f"lime-dist: {one_line(error)}", file=sys.stderr)
        leave(NEVER_RESTART)
    except Exception as error:
        traceback.print_exc()
        reason = f"rank {place.rank} ({plan.layout.coordinate(place.rank)}) failed: {one_line(error)}"
        print(f"lime-dist: {reason}", file=sys.stderr)
        write_outcome(FAILED, reason)
        leave(FAILED)


def _generate(args: argparse.Namespace) -> int:
    from lime_dist.data.special_tokens import SpecialTokens
    from lime_dist.generate import Prompt, Sampling, generate_text

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    named = SpecialTokens(bos=args.bos, eos=args.eos)
    prompt = Prompt(text=args.prompt, tokenizer=args.tokenizer, named=named, add_bos=args.add_bos)
    for piece in generate_text(
        args.checkpoint, prompt, sampling, max_new_tokens=args.max_new_tokens, device=args.device
    ):
        print(piece, end="", flush=True)
    print()
    return 0


def _parity(args: argparse.Namespace) -> int:
    if args.list:
        print("\n".join(reference_names()))
        return 0
    if args.folder is None:
        raise ConfigError(f"parity: no reference numbers named; give {' or '.join(reference_names())}, or a folder")
    folder = find_reference(args.folder)
    from lime_dist.training.parity import TOLERANCES, run_parity

    report = run_parity(folder, args.overrides, timedelta(seconds=args.timeout))
    if args.json:
        print(json.dumps(report))
        return 0 if report["passed"] else 1
    print("layout: " + ", ".join(f"{key}={value}" for key, value in report["layout"].items()))
    for name, tolerance in TOLERANCES.items():
        verdict = "ok" if report[name] <= tolerance else "TOO LARGE"
        worst = f"  ({report['grad_worst']})" if name == "grad_max_rel_err" else ""
        print(f"{name:>24}  {report[name]:.2e}  tolerance {tolerance:.0e}  {verdict}{worst}")
    print("passed" if report["passed"] else "FAILED")
    return 0 if report["passed"] else 1
