"""Runs compared, from their folders to what is printed, drawn and refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from run_records import LLAMA, write_run

from lime_dist.cli.command_line import main
from lime_dist.comparison.comparing import compare_runs
from lime_dist.comparison.comparison_plots import band_of
from lime_dist.comparison.curves import Curve
from lime_dist.comparison.run_folders import read_run
from lime_dist.config import check_config, load_config
from lime_dist.plan.parameters import total_parameters
from lime_dist.plan.run_plan import plan_run

EVALUATED = range(0, 41, 4)
LIME_LOSS, LLAMA_LOSS = 0.5, 0.4  # what a loss has lost after all steps, on the way straight


def falling(by: float, start: float = 4.0) -> dict[int, float]:
    return {step: start - by * step / 40 for step in EVALUATED}


def write_pair(folder: Path, seeds: Sequence[int] = (1, 2, 3), *overrides: str) -> list[str]:
    """LIMe and LLaMA; LIMe's loss falls further, and each seed starts elsewhere, by as much in both."""
    runs = []
    for name, router, by in (("lime", "static", LIME_LOSS), ("llama", "none", LLAMA_LOSS)):
        for seed in seeds:
            settings = (f"depth.router={router}", f"run.seed={seed}", *overrides)
            runs += [write_run(folder / f"{name}_{seed}", *settings, evaluations=falling(by, 4 + seed / 10))]
    return [str(run) for run in runs]


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["compare", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["compare", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def step_flops(run: str) -> int:
    return plan_run(check_config(load_config(Path(run) / "config.yaml"))).model_flops_per_step


def mean(found: Mapping[str, Any] | None) -> float:
    assert found is not None
    return found["mean"]


def test_the_figures_of_three_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_pair(tmp_path)
    found = report(capsys, *runs)
    lime, llama = found["variants"]
    assert (lime["name"], llama["name"], found["reference"]) == ("LIMe, full", "LLaMA", "LIMe, full")
    assert (found["metric"], found["window_steps"], found["warnings"]) == ("eval_loss", 1, [])
    # Starts 4.1, 4.2 and 4.3: deviation 0.1, over sqrt(3).
    assert lime["final_loss"] == {
        "mean": pytest.approx(3.7),
        "standard_error": pytest.approx(0.0577, abs=1e-4),
        "count": 3,
    }
    assert llama["final_difference"] == {
        "mean": pytest.approx(0.1),
        "standard_error": pytest.approx(0, abs=1e-9),
        "count": 3,
    }
    assert mean(llama["perplexity_ratio"]) == pytest.approx(1.10517, abs=1e-5)
    # LIMe has lost 0.4 after 32 of its 40 steps, each of which costs a little more than LLaMA's.
    dear, cheap = step_flops(runs[0]), step_flops(runs[3])
    assert found["equal_flops"] == 40 * cheap
    assert mean(lime["equal_flops_loss"]) == pytest.approx(4.2 - LIME_LOSS * cheap / dear)
    assert mean(llama["reference_flops_to_final_loss"]["saving"]) == pytest.approx(1 - 32 * dear / (40 * cheap))
    assert llama["flops_to_final_loss_of_reference"] == {"shares": {"1": None, "2": None, "3": None}, "saving": None}


def test_sizes_are_those_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_pair(tmp_path, [1])[0]
    config = check_config(load_config(Path(run) / "config.yaml"))
    (variant,) = report(capsys, run)["variants"]
    assert variant["parameters"] == total_parameters(config.model, config.pattern)
    assert variant["model_flops_per_token"] == plan_run(config).model_flops_per_token
    assert variant["runs"] == [
        {
            "folder": run,
            "seed": 1,
            "steps": 40,
            "tokens": 40 * config.tokens_per_step,
            "model_flops": 40 * plan_run(config).model_flops_per_step,
            "final_loss": pytest.approx(3.6),
        }
    ]


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_pair(tmp_path)
    assert main(["compare", *runs]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Held-out loss (eval_loss), each evaluation as it is; 6 runs; the reference is LIMe, full." in printed.out
    assert "LLaMA       3.8000 ± 0.0577  +0.1000 ± 0.0000   1.1052 ± 0.0000" in printed.out
    assert "[LIMe, full] takes 18.8 ± 0.0 % fewer FLOPs to the final loss of [LLaMA] (3 seeds)" in printed.out
    assert "[LLaMA] differs from the reference in depth.router none (static)" in printed.out


def test_the_better_one_takes_fewer_flops_whichever_is_named_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lime, llama = write_pair(tmp_path, [1])
    assert main(["compare", llama, lime]) == 0
    printed = capsys.readouterr().out
    assert "[LIMe, full] takes 18.8 % fewer FLOPs to the final loss of [LLaMA] (one seed)" in printed
    assert "3.6000, one seed  -0.1000, one seed  0.9048, one seed" in printed
    assert "±" not in printed.partition("\n\n")[2]


def test_a_final_loss_that_some_seed_never_reaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lime = [write_run(tmp_path / f"a{seed}", f"run.seed={seed}", evaluations=falling(0.4)) for seed in (1, 2)]
    llama = [
        write_run(tmp_path / f"b{seed}", LLAMA, f"run.seed={seed}", evaluations=falling(by))
        for seed, by in ((1, 0.1), (2, 0.5))
    ]
    assert main(["compare", *map(str, [*lime, *llama])]) == 0
    assert "[LIMe, full]: the final loss of [LLaMA] was not reached by 1 of 2 seeds" in capsys.readouterr().out


def test_no_seed_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lime = write_run(tmp_path / "a", "run.seed=1", evaluations=falling(0.5))
    llama = write_run(tmp_path / "b", LLAMA, "run.seed=2", evaluations=falling(0.4))
    assert main(["compare", str(lime), str(llama)]) == 0
    printed = capsys.readouterr()
    assert "[LIMe, full] and [LLaMA] have no seed in common" in printed.out
    assert "3.6000, one seed        none              none" in printed.out
    assert "run.seed: the variants have other seeds (LIMe, full: 1; LLaMA: 2)" in printed.err


def test_train_loss_is_the_mean_of_a_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 steps: 1/20 of 400. The last 20 of every second 3 and 5 are 4 in the mean."""
    run = write_run(tmp_path / "a", "run.steps=400", loss=lambda step: 3.0 if step % 2 else 5.0)
    found = report(capsys, str(run))
    assert (found["metric"], found["window_steps"]) == ("loss", 20)
    assert found["variants"][0]["final_loss"]["mean"] == 4.0
    assert main(["compare", str(run)]) == 0
    assert "Train loss, the mean of the last 20 steps; 1 run;" in capsys.readouterr().out


def test_evaluations_count_only_where_all_runs_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = write_run(tmp_path / "a", evaluations=falling(0.5))
    once = write_run(tmp_path / "b", LLAMA, evaluations={40: 3.0})
    assert report(capsys, str(both), str(once))["metric"] == "loss"
    line = refused(capsys, both, once, "--metric", "eval_loss")
    assert line == (
        f"lime-dist: {once}: has 1 of the two evaluations that a curve needs; set data.valid, or compare by --metric loss"
    )


def names(*folders: Path) -> list[str]:
    return [variant.name for variant in compare_runs([read_run(folder) for folder in folders]).variants]


def test_what_changes_no_number_makes_no_variant(tmp_path: Path) -> None:
    changes = (
        "parallel.pp=2", "pipeline.num_microbatches=3", "checkpoint.every=5", "analysis.every=5", "profile.steps=[2,3]", "run.log_every=5",
        "run.timeout_seconds=5", "run.memory=1GiB", "run.peak_tflops=3", "run.device=cpu", "depth.policy=relay",
        "deepspeed.zero_optimization.stage=0", "model.num_kv_heads=2",
    )  # fmt: skip
    runs = [write_run(tmp_path / f"{seed}", f"run.seed={seed}", change) for seed, change in enumerate(changes)]
    assert names(*runs) == ["LIMe, full"]


def test_the_same_setting_written_otherwise_is_the_same_variant(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "model.num_kv_heads=4", "depth.pattern={3: [0]}"),
        write_run(
            tmp_path / "b",
            "run.seed=2",
            "model.num_kv_heads=null",
            "depth.pattern={3: [0]}",
            "depth.weights_from=elsewhere",
            "depth.pattern_name=top_p:0.9",
            "depth.partial_sum_dtype=fp32",
        ),
    ]
    assert names(*runs) == ["LIMe, edges"]


def test_llama_has_no_pattern(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", LLAMA),
        write_run(tmp_path / "b", LLAMA, "run.seed=2", "depth.pattern=first:2", "optim.router_lr=0.1"),
    ]
    assert names(*runs) == ["LLaMA"]


def test_names_tell_variants_apart(tmp_path: Path) -> None:
    settings: dict[str, tuple[str, ...]] = {
        "LIMe, full, optim.lr=0.001": (),
        "LIMe, full, optim.lr=0.1": ("optim.lr=0.1",),
        "LIMe, first:2": ("depth.pattern=first:2", "optim.lr=0.1"),
        "LIMe, edges": ("depth.pattern={3: [0]}",),
        "LIMe, no edges": ("depth.pattern={}",),
        "LIMe hidden dynamic, full": ("depth.entry=hidden", "depth.router=dynamic", "model.num_kv_heads=4"),
        "LIMe, full, heads=same": ("depth.heads=same",),
        "LIMe average, full": ("depth.router=average",),
        "LLaMA": (LLAMA,),
    }
    runs = [write_run(tmp_path / str(index), *overrides) for index, overrides in enumerate(settings.values())]
    assert names(*runs) == list(settings)


def test_runs_that_begin_with_other_weights_are_other_variants(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", LLAMA, "run.seed=1"),
        write_run(tmp_path / "b", LLAMA, "run.seed=2", "checkpoint.weights_from=runs/c"),
    ]
    assert names(*runs) == ["LLaMA, checkpoint.weights_from=none", "LLaMA, checkpoint.weights_from=runs/c"]


def test_names_that_keys_do_not_tell_apart_have_a_folder(tmp_path: Path) -> None:
    long = "x" * 200
    runs = [write_run(tmp_path / name, f"data.train=[{long}{name}{long}]") for name in "ab"]
    assert [name[-len(str(run)) - 3 :] for name, run in zip(names(*runs), runs)] == [f" ({run})" for run in runs]


def test_lines_are_short_whatever_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pair(tmp_path / "long", range(1000, 1012), f"data.train={'y' * 300}")
    assert main(["compare", *pairs, *write_pair(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert "12 seeds" in printed


UNFAIR = {
    "data.train=other": "data.train: the variants were not given the same text (LIMe, full: train; LLaMA: other)",
    "data.valid=other": "data.valid: the variants were not given the same text (LIMe, full: valid; LLaMA: other)",
    "data.seq_length=24": "data.seq_length: the variants were not given the same text (LIMe, full: 12; LLaMA: 24)",
    "data.global_batch_size=6": "data.global_batch_size: the variants take different numbers of tokens a step (LIMe, full: 144; LLaMA: 72)",
    "run.steps=44": "run.steps: the learning rates of the variants follow different schedules (LIMe, full: 40; LLaMA: 44)",
    "data.samples=packed": "data.samples: the variants were not given the same text (LIMe, full: stream; LLaMA: packed)",
    "optim.min_lr=0.1": "optim.min_lr: the learning rates of the variants follow different schedules (LIMe, full: 1e-06; LLaMA: 0.1)",
    "optim.lr_schedule=constant": "optim.lr_schedule: the learning rates of the variants follow different schedules (LIMe, full: cosine; LLaMA: constant)",
    "eval.batches=3": "eval.batches: the variants were evaluated on different numbers of tokens (LIMe, full: 288; LLaMA: 432)",
}


@pytest.mark.parametrize("change", UNFAIR)
def test_what_is_unfair_is_warned_of(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lime = write_run(tmp_path / "a", evaluations=falling(0.5))
    llama = write_run(tmp_path / "b", LLAMA, change, evaluations=falling(0.4))
    assert main(["compare", str(lime), str(llama)]) == 0
    assert f"lime-dist: warning: {UNFAIR[change]}" in capsys.readouterr().err.splitlines()


def test_seeds_are_in_order_whatever_is_named_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / f"a{seed}", f"run.seed={seed}")) for seed in (10, 2, 1)]
    (variant,) = report(capsys, *runs)["variants"]
    assert [run["seed"] for run in variant["runs"]] == [1, 2, 10]


def test_unequal_seeds_and_unfinished_runs_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lime = [write_run(tmp_path / f"a{seed}", f"run.seed={seed}", evaluations=falling(0.5)) for seed in (1, 2)]
    llama = write_run(tmp_path / "b", LLAMA, "run.seed=1", evaluations=falling(0.4), num_steps=36)
    found = report(capsys, *map(str, [*lime, llama]))
    assert found["warnings"] == [
        "run.seed: the variants have unequal numbers of seeds (LIMe, full: 1 2; LLaMA: 1)",
        f"{llama}: has not finished: 36 of 40 steps",
    ]
    assert found["equal_flops"] == 36 * step_flops(str(llama))


def test_few_evaluations_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", evaluations={0: 4.0, 40: 3.0})
    (warning,) = report(capsys, str(run))["warnings"]
    assert warning.startswith(f"{run}: has 2 evaluations, between which losses are only guessed;")


def test_two_runs_of_one_seed_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, "run.seed=5") for name in "ab"]
    assert refused(capsys, *runs) == (
        f"lime-dist: {runs[1]}: is the same run as {runs[0]}, with the same run.seed=5; leave one out"
    )


def drop_lines(run: Path, steps: Sequence[int]) -> None:
    path = run / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] not in steps]
    path.write_text("\n".join(kept))


def test_a_folder_without_what_is_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, tmp_path) == (
        f"lime-dist: {tmp_path}: has no config.yaml; name the folder of a run (run.dir) that has begun to train"
    )
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").unlink()
    assert refused(capsys, run) == (
        f"lime-dist: {run}: metrics.jsonl has no steps with loss, tokens_seen and model_flops; name a run that has "
        "trained, with this version, or leave it out"
    )
    (run / "config.yaml").write_text("model: {num_layer: 3}")
    assert refused(capsys, run) == (
        f"lime-dist: {run}: its config.yaml cannot be read: model.num_layer: unknown key; did you mean num_layers?"
    )


def test_missing_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    drop_lines(run, [0, 1, 2])
    assert f"{run}: metrics.jsonl lacks step 1; a run that went on from another folder's checkpoint" in refused(
        capsys, run
    )


def test_a_cut_last_step_is_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", evaluations=falling(0.5))
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 40, "loss"', '{"ste'))
    found = report(capsys, str(run))
    assert found["variants"][0]["final_loss"]["mean"] == falling(0.5)[36]
    assert f"{run}: has not finished: 39 of 40 steps" in found["warnings"]


def test_losses_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + '{"step": 40, "eval_loss": null}\n')
    assert refused(capsys, run) == f"lime-dist: {run}: the loss at step 40 is not finite; leave this run out"


def test_an_evaluation_does_not_hide_the_loss_of_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", loss=lambda step: math.nan if step == 20 else 4.0, evaluations={20: 3.0, 40: 2.0})
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace("NaN", "null"))
    assert refused(capsys, run) == f"lime-dist: {run}: the loss at step 20 is not finite; leave this run out"


def test_a_skipped_step_without_a_loss_has_that_of_the_step_before(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", loss=lambda step: math.nan if step == 20 else 5.0 - step / 100)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace("NaN", "null") + '{"step": 20, "spike": "skipped", "bad_step": 20}\n')
    assert read_run(run).losses[18:21] == (4.81, 4.81, 4.79)


def test_the_picture_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, svg, html = write_pair(tmp_path), tmp_path / "a.svg", tmp_path / "a.html"
    unfair = write_run(tmp_path / "other", "depth.pattern=first:2", "data.train=<b>", evaluations=falling(0.3))
    assert main(["compare", *runs, str(unfair), "--svg", str(svg), "--html", str(html)]) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [f"wrote {svg}", f"wrote {html}"]
    texts = ["".join(node.itertext()).strip() for node in ElementTree.parse(svg).iter() if node.tag.endswith("}text")]
    assert {"steps", "tokens", "model FLOPs", "held-out loss", "LIMe, full", "LLaMA", "LIMe, first:2"} <= set(texts)
    page = html.read_text()
    assert page.count("<svg") == 1 and page.count("<table>") == 2
    assert "[LIMe, full] takes 18.8 ± 0.0 % fewer FLOPs" in page
    assert "LIMe, first:2: &lt;b&gt;" in page and "<b>" not in page


def test_lines_are_means_where_all_seeds_have_losses() -> None:
    def curve(steps: tuple[int, ...], losses: tuple[float, ...]) -> Curve:
        return Curve(steps=steps, tokens=tuple(10 * step for step in steps), flops=steps, losses=losses)

    band = band_of([curve((0, 2, 4), (5.0, 3.0, 1.0)), curve((1, 2, 3), (8.0, 7.0, 6.0))], "tokens")
    assert (band.at.tolist(), band.mean.tolist()) == ([10, 20, 30], [6.0, 5.0, 4.0])
    assert (band.low.tolist(), band.high.tolist()) == ([4.0, 3.0, 2.0], [8.0, 7.0, 6.0])


def test_a_curve_has_the_tokens_and_flops_of_all_steps_so_far(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", evaluations={0: 4.0, 10: 3.0})
    curve, flops = read_run(run).curve("eval_loss", 1), step_flops(str(run))
    assert (curve.steps, curve.tokens, curve.flops) == ((0, 10), (0, 10 * 144), (0, 10 * flops))


def test_a_long_run_is_drawn_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "run.steps=20000", loss=lambda step: 3 + step % 7 / 10)
    assert main(["compare", str(run), "--svg", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").stat().st_size < 200_000


@pytest.mark.parametrize("option", ["--svg", "--html"])
def test_files_that_cannot_be_written_are_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, suffix = write_run(tmp_path / "a"), option[2:]
    assert refused(capsys, run, option, tmp_path / "b.txt").endswith(f"b.txt must end in .{suffix}")
    missing = tmp_path / "none" / f"b.{suffix}"
    assert refused(capsys, run, option, missing) == (
        f"lime-dist: {option}: {missing}: No such file or directory; give a file that can be written"
    )


WITHOUT_TORCH = """
import sys
from lime_dist.cli.command_line import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


def test_runs_are_compared_without_torch(tmp_path: Path) -> None:
    arguments = ["compare", *write_pair(tmp_path, [1]), "--html", str(tmp_path / "a.html")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
