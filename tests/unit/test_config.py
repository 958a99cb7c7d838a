"""Reading, overriding and checking a run's configuration; every refusal names the key."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from checkpoint_stand_ins import MODEL as CHECKPOINT
from checkpoint_stand_ins import write_checkpoint

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.cluster.schema import load_cluster
from lime_dist.config import (
    Config,
    ModelConfig,
    Source,
    check_config,
    dump_yaml,
    find_warnings,
    load_config,
    parse_config,
    recorded,
    to_dict,
)
from lime_dist.config.paths import with_absolute_paths
from lime_dist.config.ranges import RANGES
from lime_dist.errors import ConfigError, LayoutError, PlanError
from lime_dist.plan.run_plan import plan_run

MODEL = {
    "num_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 8,
    "num_kv_heads": 4,
    "vocab_size": 100,
}


def make_config(*overrides: str) -> Config:
    return parse_config({"model": MODEL}, overrides)


# ---- reading


def test_defaults_and_sizes_that_follow() -> None:
    config = check_config(make_config("data.seq_length=16", "data.global_batch_size=6", "pipeline.num_microbatches=3"))
    assert (config.model.kv_heads, config.model.head_dim) == (4, 8)
    assert (config.layout.world_size, config.zero_stage) == (1, 1)
    assert (config.microbatch_size, config.tokens_per_step) == (2, 96)
    assert config.pattern.sources[7] == tuple(range(8))
    assert ModelConfig(**{**MODEL, "num_kv_heads": None}).kv_heads == 8
    assert not any(make_config("depth.router=none").pattern.has_router(layer) for layer in range(8))


OVERRIDES = [  # override, where it goes, value
    ("optim.lr=1e-3", "optim.lr", 1e-3),  # which YAML reads as text
    ("optim.lr=2", "optim.lr", 2.0),
    ("parallel.sequence_parallel=true", "parallel.sequence_parallel", True),
    ("parallel.dp=null", "parallel.dp", None),
    ("parallel.dp=3", "parallel.dp", 3),
    ("pipeline.partition=[3, 5]", "pipeline.partition", [3, 5]),
    ("pipeline.partition=auto", "pipeline.partition", "auto"),
    ("depth.pattern=first:2", "depth.pattern", "first:2"),
    ("depth.pattern={3: [0, 1]}", "depth.pattern", {3: [0, 1]}),
    ("optim.betas=[0.8, 1e-1]", "optim.betas", [0.8, 0.1]),
    ("data.train=a", "data.train", [Source(path="a")]),
    ("data.train=[a, {path: b, weight: 2}]", "data.train", [Source(path="a"), Source(path="b", weight=2.0)]),
    ("data.train=null", "data.train", []),
    ("deepspeed.zero_optimization.stage=0", "deepspeed", {"zero_optimization": {"stage": 0}}),
    ("run.dir=a=b", "run.dir", "a=b"),
    ("model.num_kv_heads=null", "model.num_kv_heads", None),
    ("run.peak_tflops=989", "run.peak_tflops", 989.0),
]


def get_key(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(("override", "key", "value"), OVERRIDES)
def test_overrides(override: str, key: str, value: Any) -> None:
    found = get_key(make_config(override), key)
    assert found == value and type(found) is type(value)


def test_overrides_change_one_key_and_the_last_one_wins() -> None:
    tree = {"model": MODEL, "optim": {"lr": 0.5, "eps": 0.25}, "deepspeed": {"a": {"b": 1, "c": 2}}}
    config = parse_config(tree, ["optim.lr=0.1", "optim.lr=0.2", "deepspeed.a.b=3"])
    assert (config.optim.lr, config.optim.eps) == (0.2, 0.25)
    assert config.deepspeed == {"a": {"b": 3, "c": 2}}
    assert tree["optim"] == {"lr": 0.5, "eps": 0.25} and tree["deepspeed"] == {"a": {"b": 1, "c": 2}}, "the caller's"


UNREADABLE = [  # override, how the message begins
    ("optim.lrr=1", "optim.lrr: unknown key; did you mean lr?"),
    ("optimm.lr=1", "optimm: unknown key; did you mean optim?"),
    ("parallel.zzz=1", "parallel.zzz: unknown key; known: tp, pp, dp"),
    ("data.train=[{path: a, wieght: 2}]", "data.train[0].wieght: unknown key; did you mean weight?"),
    ("data.train=[{weight: 2}]", "data.train[0].path: missing"),
    ("data.train=[3]", "data.train[0]: must be a section with keys, not 3"),
    ("model.num_layers=2.5", "model.num_layers: 2.5 is not a whole number"),
    ("model.num_layers=true", "model.num_layers: True is not a whole number"),
    ("model.num_layers=null", "model.num_layers: None is not a whole number"),
    ("model.tie_embeddings=1", "model.tie_embeddings: 1 is not true or false"),
    ("model.num_kv_heads=two", "model.num_kv_heads: 'two' is not a whole number or null"),
    ("optim.lr=fast", "optim.lr: 'fast' is not a number"),
    ("optim.lr=true", "optim.lr: True is not a number"),
    ("optim.betas=0.9", "optim.betas: 0.9 is not list[float]"),
    ("run.dir=3", "run.dir: 3 is not a text"),
    ("pipeline.partition=2", "pipeline.partition: 2 is not a text or list[int]"),
    ("pipeline.partition=[1, x]", "pipeline.partition: [1, 'x'] is not a text or list[int]"),
    ("deepspeed=3", "deepspeed: 3 is not "),
    ("model=3", "model: must be a section with keys, not 3"),
    ("model.num_layers.x=3", "override model.num_layers.x: num_layers is not a section"),
    ("model.num_layers", "override 'model.num_layers': write section.key=value"),
    ("=3", "override '=3': write section.key=value"),
    ("optim.betas=[0.9", "override optim.betas: "),
]


@pytest.mark.parametrize(("override", "message"), UNREADABLE)
def test_what_cannot_be_read_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(override)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in MODEL if name != "num_kv_heads"])
def test_the_models_sizes_have_no_defaults(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.{name}: missing; add it"):
        parse_config({"model": {key: value for key, value in MODEL.items() if key != name}})
    with pytest.raises(ConfigError, match="^model: missing; add it"):
        parse_config({})


FILES = [
    (None, "No such file or directory; give the path of a YAML file"),
    ("model: [", "not valid YAML: "),
    ("- a", "must hold sections such as `model:` and `run:`"),
    ("run: {steps: 3}", None),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str | None, message: str | None) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    expected = f"config {path}: {message}" if message else "model: missing; add it"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    config = check_config(
        make_config(
            "parallel.tp=2", "parallel.dp=3", "data.global_batch_size=6", "data.train=[a, {path: b, weight: 0.5}]",
            "pipeline.partition=[8]", "optim.eps=1e-12", "deepspeed.zero_optimization.stage=2", "run.dir='7'",
        )
    )  # fmt: skip
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == with_absolute_paths(config)
    assert to_dict(load_config(path)) == recorded(config)


def test_paths_are_written_as_they_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(
        "data.train=data/a", "data.valid=[{path: ../b, weight: 2}]", "data.tokenizer=/elsewhere/t.model", "run.dir=runs/x",
        "checkpoint.weights_from=runs/y", "depth.weights_from=runs/z",
        "depth.switch_at={1: 'edges:e.yaml', 2: 'first:2', 3: {4: [0]}}",
    )  # fmt: skip
    written = with_absolute_paths(config)
    assert written.data.train[0].path == f"{tmp_path}/data/a" and written.data.valid[0].path == f"{tmp_path}/../b"
    assert (written.data.tokenizer, written.run.dir) == ("/elsewhere/t.model", f"{tmp_path}/runs/x")
    assert (written.checkpoint.weights_from, written.depth.weights_from) == (f"{tmp_path}/runs/y", f"{tmp_path}/runs/z")
    assert written.depth.switch_at == {1: f"edges:{tmp_path}/e.yaml", 2: "first:2", 3: {4: [0]}}
    assert (written.checkpoint.resume, written.data.valid[0].weight) == ("auto", 2.0)
    assert with_absolute_paths(make_config("checkpoint.resume=runs/y")).checkpoint.resume == f"{tmp_path}/runs/y"
    assert with_absolute_paths(written) == written


def test_a_runs_config_is_of_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(make_config("run.dir=/where/it/was")))
    assert load_config(path).run.dir == "/where/it/was"
    (tmp_path / "owner").write_text("a start that has begun here")
    assert load_config(path).run.dir == str(tmp_path)
    assert load_config(path, ["run.dir=other"]).run.dir == "other"
    path.rename(tmp_path / "mine.yaml")
    assert load_config(tmp_path / "mine.yaml").run.dir == "/where/it/was"


# ---- microbatches


def test_the_size_of_microbatches_says_how_many(tmp_path: Path) -> None:
    """For any number of replicas, from what a run wrote too."""
    words = "data.global_batch_size=96", "data.micro_batch_size=4"
    for dp in (1, 2, 8):
        config = check_config(make_config(*words), dp)
        assert (config.num_microbatches, config.microbatch_size) == (24 // dp, 4)
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_yaml(config))
        again = check_config(load_config(path, ["parallel.dp=3"]), 3)
        assert (again.num_microbatches, again.microbatch_size) == (8, 4)
        assert plan_run(again).num_microbatches == 8
    both = check_config(make_config(*words, "pipeline.num_microbatches=24"))
    assert (both.num_microbatches, both.microbatch_size) == (24, 4)
    assert check_config(make_config("data.global_batch_size=96")).microbatch_size == 96


def test_every_key_is_keyword_only_and_frozen() -> None:
    def walk(value: Any) -> None:
        if is_dataclass(value):
            assert all(item.kw_only for item in fields(value)) and value.__dataclass_params__.frozen
            for item in fields(value):
                walk(getattr(value, item.name))

    walk(make_config())


# ---- checking

REFUSED = [  # overrides, error, how the message begins
    ("model.num_layers=0", ConfigError, "model.num_layers: 0 must be at least 1"),
    ("model.num_kv_heads=0", ConfigError, "model.num_kv_heads: 0 must be at least 1"),
    ("model.vocab_size=-1", ConfigError, "model.vocab_size: -1 must be at least 1"),
    ("model.hidden_size=72", ConfigError, "model.hidden_size: 72 must be a multiple of 2 * model.num_heads=16"),
    ("model.num_kv_heads=3", ConfigError, "model.num_kv_heads: 3 must divide model.num_heads=8"),
    ("depth.router=learned", ConfigError, "depth.router: 'learned' is unknown; use static or dynamic or average or none"),
    ("depth.router=dynamic", ConfigError, "depth.router: dynamic with depth.entry=kv; set depth.entry=hidden"),
    ("depth.entry=state", ConfigError, "depth.entry: 'state' is unknown; use kv or hidden"),
    ("depth.policy=most", ConfigError, "depth.policy: 'most' is unknown; use least or relay"),
    ("depth.partial_sum_dtype=fp64", ConfigError, "depth.partial_sum_dtype: 'fp64' is unknown; use bundle or fp32"),
    ("depth.pattern=middle", PlanError, "depth.pattern: 'middle' is not a pattern"),
    ("depth.pattern={3:[3]}", PlanError, "depth.pattern: layer 3 cannot read layer 3"),
    ("depth.pattern={8:[0]}", PlanError, "depth.pattern: reader 8 is outside the 8 layers"),
    ("depth.pattern=first:0", PlanError, "depth.pattern: 'first:0' needs a whole number"),
    ("parallel.recompute=full", ConfigError, "parallel.recompute: 'full' is unknown; use none or layer"),
    ("parallel.virtual_stages=2", LayoutError, "parallel.virtual_stages: 2 with parallel.pp=1; set it to 1"),
    ("parallel.tp=0", ConfigError, "parallel.tp: 0 must be at least 1"),
    ("parallel.pp=0", ConfigError, "parallel.pp: 0 must be at least 1"),
    ("parallel.dp=0", ConfigError, "parallel.dp: 0 must be at least 1"),
    ("parallel.pp=9", LayoutError, "parallel.pp: 9 stages for model.num_layers=8; use at most 8"),
    ("parallel.tp=3", LayoutError, "parallel.tp: 3 does not divide model.num_kv_heads=4"),
    ("parallel.tp=8", LayoutError, "parallel.tp: 8 does not divide model.num_kv_heads=4"),
    ("parallel.tp=2 model.intermediate_size=97", LayoutError, "parallel.tp: 2 does not divide model.intermediate_size=97"),
    ("parallel.sequence_parallel=true", LayoutError, "parallel.sequence_parallel: needs parallel.tp above 1"),
    ("pipeline.schedule=zb", ConfigError, "pipeline.schedule: 'zb' is unknown; use 1f1b or gpipe"),
    ("pipeline.num_microbatches=0", ConfigError, "pipeline.num_microbatches: 0 must be at least 1"),
    ("parallel.pp=2 pipeline.partition=[8]", LayoutError, "pipeline.partition: [8] has 1 stages, parallel.pp is 2"),
    ("parallel.pp=2 pipeline.partition=[4,5]", LayoutError, "pipeline.partition: [4, 5] must be counts of at least 1"),
    ("pipeline.partition=even", LayoutError, "pipeline.partition: "),
    ("parallel.pp=2 pipeline.boundary_cost=[1,2]", PlanError, "pipeline.boundary_cost: [1.0, 2.0] must be 1 numbers"),
    ("parallel.pp=2 pipeline.boundary_cost=[-1]", ConfigError, "pipeline.boundary_cost: -1.0 must be above 0"),
    ("data.seq_length=0", ConfigError, "data.seq_length: 0 must be at least 1"),
    ("data.global_batch_size=3 pipeline.num_microbatches=2", ConfigError, "data.global_batch_size: 3 must be a multiple of parallel.dp=1 x pipeline.num_microbatches=2"),
    ("data.global_batch_size=4 parallel.dp=3", ConfigError, "data.global_batch_size: 4 must be a multiple of parallel.dp=3 x pipeline.num_microbatches=1; use 3 or 6"),
    ("data.global_batch_size=50 parallel.dp=3 data.micro_batch_size=4", ConfigError, "data.global_batch_size: 50 must be a multiple of parallel.dp=3 x data.micro_batch_size=4; use 48 or 60"),
    ("data.global_batch_size=3 data.micro_batch_size=4", ConfigError, "data.global_batch_size: 3 must be a multiple of parallel.dp=1 x data.micro_batch_size=4; use 4"),
    ("data.global_batch_size=48 parallel.dp=3 data.micro_batch_size=4 pipeline.num_microbatches=8", ConfigError, "pipeline.num_microbatches: 8, but data.micro_batch_size=4 makes 4 with data.global_batch_size=48 and parallel.dp=3; leave it out, or set data.micro_batch_size=null"),
    ("data.global_batch_size=16384 data.micro_batch_size=1", ConfigError, "data.micro_batch_size: 1 makes 16384 microbatches; at most 8192"),
    ("data.micro_batch_size=0", ConfigError, "data.micro_batch_size: 0 must be at least 1"),
    ("parallel.pp=4 parallel.virtual_stages=2 data.global_batch_size=36 data.micro_batch_size=4", ConfigError, "data.micro_batch_size: 4 makes 9 microbatches, which cannot be split into 2 equal rounds, as parallel.virtual_stages=2 over 4 stages asks; make 8 or 10"),
    ("data.valid_fraction=0.1 data.valid=v", ConfigError, "data.valid_fraction: has no effect beside data.valid; remove"),
    ("data.valid_fraction=1", ConfigError, "data.valid_fraction: 1.0 must be below 1"),
    ('data.train=[{"path":"a","weight":0}]', ConfigError, "data.train[0].weight: 0.0 must be above 0"),
    ("optim.lr=-1", ConfigError, "optim.lr: -1.0 must be at least 0"),
    ("optim.lr=.nan", ConfigError, "optim.lr: nan must be at least 0"),
    ("optim.betas=[0.9]", ConfigError, "optim.betas: [0.9] must be two numbers in [0, 1)"),
    ("optim.betas=[0.9,1.0]", ConfigError, "optim.betas: 1.0 must be below 1"),
    ("optim.lr_schedule=step", ConfigError, "optim.lr_schedule: 'step' is unknown; use cosine or linear or constant or wsd"),
    ("depth.router_init=zero", ConfigError, "depth.router_init: 'zero' is unknown; use identity_uniform or uniform or identity_zero"),
    ("depth.heads=some", ConfigError, "depth.heads: 'some' is unknown; use all or same"),
    ("depth.entry=hidden depth.heads=same", ConfigError, "depth.heads: 'same' needs depth.entry=kv depth.router=static; set those, or leave it out"),
    ("depth.router=average depth.router_init=uniform", ConfigError, "depth.router_init: 'uniform' needs depth.entry=kv depth.router=static;"),
    ("depth.head_top_p=0.9", ConfigError, "depth.head_top_p: 0.9 needs depth.entry=hidden depth.router=static or depth.entry=hidden depth.router=dynamic;"),
    ("depth.entry=hidden depth.head_top_p=0", ConfigError, "depth.head_top_p: 0.0 must be above 0"),
    ("depth.entry=hidden depth.head_top_p=1.1", ConfigError, "depth.head_top_p: 1.1 must be at most 1"),
    ("depth.router=average depth.pattern=top_p:0.9", ConfigError, "depth.pattern: top_p:0.9 with depth.router=average, whose weights cannot rank edges"),
    ("optim.max_grad_norm=-1", ConfigError, "optim.max_grad_norm: -1.0 must be at least 0"),
    ("run.dtype=fp16", ConfigError, "run.dtype: 'fp16' is unknown; use fp32 or bf16"),
    ("run.device=tpu", ConfigError, "run.device: 'tpu' is unknown; use auto or cpu or cuda"),
    ("run.steps=0", ConfigError, "run.steps: 0 must be at least 1"),
    ("run.timeout_seconds=0", ConfigError, "run.timeout_seconds: 0.0 must be at least 1"),
    ("checkpoint.keep=0", ConfigError, "checkpoint.keep: 0 must be at least 1"),
    ("deepspeed.zero_optimization.stage=4", ConfigError, "deepspeed.zero_optimization.stage: 4 with parallel.pp=1; use 0 to 3"),
    ("deepspeed.zero_optimization.stage=2 parallel.pp=2", ConfigError, "deepspeed.zero_optimization.stage: 2 with parallel.pp=2; use 0 to 1 (2 and 3 need parallel.pp=1)"),
    ("deepspeed.zero_optimization.stage=3 pipeline.schedule=gpipe pipeline.num_microbatches=2 data.global_batch_size=2", ConfigError, "pipeline.schedule: gpipe under ZeRO 3"),
    ("deepspeed.zero_optimization.stage=two", ConfigError, "deepspeed.zero_optimization.stage: 'two' with"),
    ("deepspeed.zero_optimization.stage=true", ConfigError, "deepspeed.zero_optimization.stage: True with"),
    ("deepspeed.comms_logger=3", ConfigError, "deepspeed.comms_logger: 3 must be a section"),
    ("deepspeed.flops_profiler=true", ConfigError, "deepspeed.flops_profiler: True must be a section"),
    ("deepspeed.flops_profiler.enabled=true", ConfigError, "deepspeed.flops_profiler: fails under ZeRO 1, where"),
    ("deepspeed.flops_profiler.enabled=true deepspeed.zero_optimization.stage=0", ConfigError, "deepspeed.flops_profiler: fails under ZeRO 0"),
    ("deepspeed.log_level=loud", ConfigError, "deepspeed.log_level: 'loud' is unknown; use debug or info"),
    ("deepspeed.log_level={a:1}", ConfigError, "deepspeed.log_level: {'a:1': None} is unknown; use debug or info"),
    ("deepspeed.zero_optimization=2", ConfigError, "deepspeed.zero_optimization: must be a section"),
    ("deepspeed.train_batch_size=8", ConfigError, "deepspeed.train_batch_size: is set from data.global_batch_size"),
    ("deepspeed.train_micro_batch_size_per_gpu=8", ConfigError, "deepspeed.train_micro_batch_size_per_gpu: is set from data.micro_batch_size"),
    ("deepspeed.gradient_accumulation_steps=8", ConfigError, "deepspeed.gradient_accumulation_steps: is set from pipeline.num_microbatches"),
    ("deepspeed.gradient_clipping=1", ConfigError, "deepspeed.gradient_clipping: is set from optim.max_grad_norm"),
    ("deepspeed.zero_optimization.compute_grad_norm=true", ConfigError, "deepspeed.zero_optimization.compute_grad_norm: is set from optim.max_grad_norm"),
    ("deepspeed.optimizer.type=Adam", ConfigError, "deepspeed.optimizer: is set from optim"),
    ("deepspeed.bf16.enabled=true", ConfigError, "deepspeed.bf16: is set from run.dtype"),
    ("deepspeed.wall_clock_brakedown=true", ConfigError, "deepspeed.wall_clock_brakedown: DeepSpeed 0.19 has no such key; did you mean wall_clock_breakdown?"),
    ("deepspeed.zero_optimization.reduce_bucket_sizes=5", ConfigError, "deepspeed.zero_optimization.reduce_bucket_sizes: DeepSpeed 0.19 has no such key; did you mean reduce_bucket_size?"),
    ("deepspeed.zero_optimization.reduce_bucket_size=5e8", ConfigError, "deepspeed.zero_optimization.reduce_bucket_size: '5e8' must be a whole number of at least 1"),
    ("deepspeed.zero_optimization.reduce_bucket_size=0", ConfigError, "deepspeed.zero_optimization.reduce_bucket_size: 0 must be a whole number"),
    ("deepspeed.zero_optimization.overlap_comm=3", ConfigError, "deepspeed.zero_optimization.overlap_comm: 3 must be true or false"),
    ("model.rope_theta=0", ConfigError, "model.rope_theta: 0.0 must be above 0"),
    ("model.rms_norm_eps=-1e-6", ConfigError, "model.rms_norm_eps: -1e-06 must be above 0"),
    ("model.num_layers=3000", ConfigError, "model.num_layers: 3000 must be at most 512"),
    ("model.num_layers=100000", ConfigError, "model.num_layers: 100000 must be at most 512"),
    ("parallel.tp=4 parallel.dp=1000000", LayoutError, "parallel: 4000000 ranks; at most 1000000"),
    ("optim.lr=.inf", ConfigError, "optim.lr: inf must be at most 10000"),
    ("optim.lr=1e999", ConfigError, "optim.lr: inf must be at most 10000"),
    ("optim.min_lr=1.5", ConfigError, "optim.min_lr: 1.5 must be at most 1"),
    ("spikes.loss_sigma=0", ConfigError, "spikes.loss_sigma: 0.0 must be above 0"),
    ("spikes.grad_norm_sigma=-1", ConfigError, "spikes.grad_norm_sigma: -1.0 must be above 0"),
    ("spikes.window=1", ConfigError, "spikes.window: 1 must be at least 2"),
    ("spikes.max_skips=-1", ConfigError, "spikes.max_skips: -1 must be at least 0"),
    ("spikes.max_skips=128", ConfigError, "spikes.max_skips: 128 must be below spikes.window=128"),
    ("spikes.max_skips=two", ConfigError, "spikes.max_skips: 'two' is not a whole number"),
    ("spikes.max_skip=2", ConfigError, "spikes.max_skip: unknown key; did you mean max_skips?"),
    ("spikes.max_returns=1", ConfigError, "spikes.max_returns: 1 with checkpoint.every=0, so that there is nothing to go back to"),
    ("optim.betas=[-0.1,0.9]", ConfigError, "optim.betas: -0.1 must be at least 0"),
    ("optim.eps=.inf", ConfigError, "optim.eps: inf must be at most 1"),
    ("run.timeout_seconds=.inf", ConfigError, "run.timeout_seconds: inf must be at most 2592000"),
    ("run.timeout_seconds=.nan", ConfigError, "run.timeout_seconds: nan must be at least 1"),
    ("run.seed=4294967296", ConfigError, "run.seed: 4294967296 must be at most 4294967295"),
    ("parallel.pp=2 pipeline.boundary_cost=[.inf]", ConfigError, "pipeline.boundary_cost: inf must be at most 1000000000"),
    ('data.valid=[{"path":"v","weight":.nan}]', ConfigError, "data.valid[0].weight: nan must be above 0"),
    ('run.dir="a\\0b"', ConfigError, "run.dir: 'a\\x00b' holds the control character"),
    (f"run.dir={'x' * 100_000}", ConfigError, "run.dir: 'xxx"),
    (f"run.dir={'x' * 1000}", ConfigError, "run.dir: 'xxx"),  # which the file system refuses
    ("depth.pattern=first:²", PlanError, "depth.pattern: 'first:²' needs a whole number"),
    ("depth.pattern=edges:/dev/null/x", PlanError, "depth.pattern: edges file /dev/null/x: Not a directory"),
    ("depth.switch_at={'5':'middle'}", PlanError, "depth.switch_at.5: 'middle' is not a pattern"),
    ("depth.switch_at={'5':'first:0'}", PlanError, "depth.switch_at.5: 'first:0' needs a whole number"),
    ("depth.switch_at={'5':{'8':[0]}}", PlanError, "depth.switch_at.5: reader 8 is outside the 8 layers"),
    ("depth.switch_at={'5':'top_p:1.5'}", PlanError, "depth.switch_at.5: top_p:1.5 needs a share above 0 and at most 1"),
    ("depth.switch_at={'5':'top_p:nan'}", PlanError, "depth.switch_at.5: top_p:nan needs a share"),
    ("depth.switch_at={'5':'budget:much'}", PlanError, "depth.switch_at.5: budget:much needs bytes"),
    ("depth.switch_at={'5':'edges:nothing.yaml'}", PlanError, "depth.switch_at.5: edges file nothing.yaml: No such file"),
    ("depth.pattern=first:1 depth.switch_at={'5':'first:2'}", PlanError, "depth.switch_at.5: 'first:2' has 5 edges that the pattern before it lacks"),
    ("depth.pattern=first:1 depth.switch_at={'5':'top_p:0.9','6':'first:2'}", PlanError, "depth.switch_at.6: 'first:2' has 5 edges"),
    ("parallel.pp=2 depth.switch_at={'5':'block:3'}", PlanError, "depth.switch_at.5: the block of layers 3 to 5 spans a stage boundary"),
    ("depth.switch_at={'100':'first:2'}", ConfigError, "depth.switch_at: 100 must be a number of updates, at least 1 and below run.steps=100"),
    ("depth.switch_at={'-5':'first:2'}", ConfigError, "depth.switch_at: -5 must be a number of updates, at least 1"),
    ("depth.switch_at={'5x':'first:2'}", ConfigError, "depth.switch_at: '5x' is not a whole number"),
    ("depth.switch_at={'5.5':'first:2'}", ConfigError, "depth.switch_at: '5.5' is not a whole number"),
    ("depth.switch_at={'05':'first:2','5':'first:1'}", ConfigError, "depth.switch_at.5: appears twice; remove one of them"),
    ("depth.switch_at=first:2", ConfigError, "depth.switch_at: 'first:2' is not steps with a pattern each, such as {10000: first:2}"),
    ("depth.switch_at={'5':3}", ConfigError, "depth.switch_at.5: 3 is not a text or readers with their earlier layers, such as {3: [0, 2]}"),
    ("depth.switch_at.5=", ConfigError, "depth.switch_at.5: None is not a text or readers with their earlier layers"),
    ("depth.switch_at={'5':{'3':['x']}}", ConfigError, "depth.switch_at.5: {'3': ['x']} is not a text or readers"),
    ("depth.switch_at={'5':{'3':[0],'03':[1]}}", ConfigError, "depth.switch_at.5: {'03': [1], '3': [0]} is not a text or readers"),
    ("depth.pattern=", ConfigError, "depth.pattern: None is not a text or readers with their earlier layers"),
    ("parallel.pp=2 depth.switch_at={'5':'budget:1'}", PlanError, "depth.switch_at.5: budget of 1 bytes is below the residual's"),
    ("depth.router=average depth.switch_at={'5':'budget:1MiB'}", ConfigError, "depth.switch_at.5: budget:1MiB with depth.router=average, whose weights cannot rank edges"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "error", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_run_is_refused_by_key(overrides: str, error: type[ConfigError], message: str) -> None:
    with pytest.raises(error) as refusal:
        ready_plan(make_config(*overrides.split()))
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


ALLOWED = (
    "parallel.pp=8 deepspeed.zero_optimization.stage=0",
    "deepspeed.zero_optimization.stage=3 parallel.tp=4 parallel.sequence_parallel=true",
    "deepspeed.flops_profiler.enabled=true deepspeed.zero_optimization.stage=2",
    "deepspeed.flops_profiler.enabled=false deepspeed.comms_logger.enabled=true deepspeed.log_level=info",
    "deepspeed.zero_optimization.reduce_bucket_size=1000 deepspeed.wall_clock_breakdown=true",
    "parallel.pp=3 pipeline.partition=[1,6,1] pipeline.boundary_cost=[1,2.5]",
    "model.hidden_size=16",
    "optim.max_grad_norm=0",
)


@pytest.mark.parametrize("overrides", ALLOWED)
def test_what_can_run_is_not_refused(overrides: str) -> None:
    check_config(make_config(*overrides.split()))


def test_every_number_has_a_range() -> None:
    def is_number(hint: Any) -> bool:
        return get_origin(hint) is not dict and bool({int, float, list[int], list[float]} & {hint, *get_args(hint)})

    sections = {item.name: get_type_hints(Config)[item.name] for item in fields(Config) if item.name != "deepspeed"}
    keys = {
        f"{name}.{key}"
        for name, cls in sections.items()
        for key, hint in get_type_hints(cls).items()
        if is_number(hint)
    }
    assert keys | {"data.train.weight", "data.valid.weight"} == set(RANGES)


@pytest.mark.parametrize("key", sorted(RANGES))
@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "-1", "9223372036854775807", "1e308"])
def test_no_number_is_taken_that_makes_no_sense(key: str, text: str) -> None:
    if key in ("optim.lr", "optim.router_lr", "optim.weight_decay", "optim.max_grad_norm") and text[0] in "91":
        return  # large, but finite
    key, value = (
        (key.removesuffix(".weight"), f"[{{path: a, weight: {text}}}]") if key.endswith("weight") else (key, text)
    )
    value = f"[{text}]" if key in ("optim.betas", "pipeline.boundary_cost", "pipeline.partition") else value
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}"):
        check_config(make_config(f"{key}={value}"))


@pytest.mark.parametrize(
    "override",
    ["optim.lr", "run.dir", "model.num_layers", "depth.pattern", "depth.router", "deepspeed", "x", "deepspeed.y"],
)
@pytest.mark.parametrize("value", ["z" * 100_000, "[" + "1, " * 10_000 + "1]", "{" + "a" * 1000 + ": 1}"])
def test_a_long_value_is_shown_short(override: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        ready_plan(make_config(f"{override}={value}"))
    assert str(error.value).startswith(override) and len(str(error.value)) <= 300


def test_warm_up_beyond_the_run_is_warned_of() -> None:
    assert find_warnings(make_config("run.steps=100", "optim.warmup_steps=99")) == []
    assert find_warnings(make_config("run.steps=100", "optim.warmup_steps=100")) == [
        "optim.warmup_steps: 100 is not below run.steps=100: the whole run is warm-up; lower it"
    ]


def test_kernels_of_no_steps_are_warned_of() -> None:
    (warning,) = find_warnings(make_config("profile.kernels=true", "optim.warmup_steps=0"))
    assert warning.startswith("profile.kernels: has no effect without profile.steps")
    assert find_warnings(make_config("profile.kernels=true", "profile.steps=[10, 19]", "optim.warmup_steps=0")) == []


def test_switches_of_a_model_without_routers_are_warned_of() -> None:
    config = check_config(make_config("depth.router=none", "depth.switch_at={'5':'first:2'}", "optim.warmup_steps=0"))
    assert find_warnings(config) == ["depth.switch_at: has no effect with depth.router=none; leave it out"]


def test_switches_to_come_are_checked_against_the_edges_of_the_checkpoint(tmp_path: Path) -> None:
    """Not against what the run once began with, and not those that are behind it."""
    write_checkpoint(tmp_path / "checkpoints" / "step_000007", tree=CHECKPOINT | {"depth": {"pattern": "last:1"}})

    def start(*overrides: str) -> None:
        ready_plan(parse_config(CHECKPOINT, [f"run.dir={tmp_path}", "depth.pattern=last:1", *overrides]))

    start("depth.switch_at={'8':{'2':[1]}}")
    start("depth.pattern=full", "depth.switch_at={'3':'last:1'}")
    with pytest.raises(PlanError, match=r"^depth\.switch_at\.8: 'full' has 1 edges that the pattern before it lacks"):
        start("depth.switch_at={'8':'full'}")


def test_rules_of_no_effect_are_warned_of() -> None:
    settled = ("optim.warmup_steps=0", "spikes.loss_sigma=6")
    (warning,) = find_warnings(make_config(*settled, "run.steps=64"))
    assert warning.startswith("spikes.loss_sigma: has no effect before half of spikes.window=128 steps")
    assert find_warnings(make_config(*settled, "run.steps=65")) == []


def test_zenflow_can_skip_no_step() -> None:
    zenflow = "deepspeed.zero_optimization.zenflow={topk_ratio: 0.1}"
    with pytest.raises(ConfigError, match="spikes.max_skips: ZenFlow updates some weights while the step is made"):
        check_config(make_config(zenflow, "spikes.max_skips=1"))
    check_config(make_config(zenflow))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("depth.router=none", "with depth.router=none, as there are no routers"),
        ("depth.router=average", "with depth.router=average, as only static routers"),
        ("depth.router=dynamic depth.entry=hidden", "with depth.router=dynamic, as only static routers"),
        ("run.steps=9", "above run.steps=9"),
    ],
)
def test_router_maps_that_will_not_be_are_warned_of(overrides: str, said: str) -> None:
    settled = ("optim.warmup_steps=0", *overrides.split())
    (warning,) = find_warnings(make_config("analysis.every=10", *settled))
    assert warning.startswith(f"analysis.every: has no effect {said}")
    assert find_warnings(make_config(*settled)) == []
    assert find_warnings(make_config("analysis.every=10", "optim.warmup_steps=0")) == []


def test_a_file_and_its_line_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  steps: 3\n  steps: 4\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert (
        str(error.value) == f"config {path}: line 3: the key 'steps' appears twice in its section; remove one of them"
    )


def test_edges_and_cluster_files_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    for text, said in (
        ("3: [0]\n3: [1]", "line 2: the key 3 appears twice"),
        ("3: !!float x", "line 1: 'x' is no float"),
    ):
        path.write_text(text)
        with pytest.raises(PlanError, match=f"^depth.pattern: edges file {path}: {said}"):
            ready_plan(make_config(f"depth.pattern=edges:{path}"))
        with pytest.raises(ConfigError, match=f"^cluster file {path}: {said}"):
            load_cluster(path)
    path.write_text("true: [0]")
    with pytest.raises(PlanError, match=f"^depth.pattern: edges file {path}: must map each reader"):
        ready_plan(make_config(f"depth.pattern=edges:{path}"))


# ---- replicas

WORLDS = [  # overrides, ranks started, dp
    ("", None, 1),
    ("parallel.dp=2 data.global_batch_size=2", None, 2),
    ("", 1, 1),
    ("data.global_batch_size=6", 6, 6),
    ("parallel.tp=2 parallel.pp=3 data.global_batch_size=2", 12, 2),
    ("parallel.dp=2 parallel.pp=2 data.global_batch_size=2", 4, 2),
]


@pytest.mark.parametrize(("overrides", "world_size", "dp"), WORLDS)
def test_replicas_are_settled_by_the_ranks(overrides: str, world_size: int | None, dp: int) -> None:
    config = check_config(make_config(*overrides.split()), world_size)
    assert config.parallel.dp == config.layout.dp == dp


MISFITS = [
    ("parallel.tp=2", 3, "parallel: tp=2 x pp=1 x dp=1 needs 2 ranks, 3 were started"),
    ("parallel.pp=4", 2, "parallel: tp=1 x pp=4 x dp=1 needs 4 ranks, 2 were started"),
    ("parallel.dp=2", 3, "parallel: tp=1 x pp=1 x dp=2 needs 2 ranks, 3 were started"),
]


@pytest.mark.parametrize(("overrides", "world_size", "message"), MISFITS)
def test_ranks_that_do_not_fit_are_refused(overrides: str, world_size: int, message: str) -> None:
    with pytest.raises(LayoutError) as error:
        check_config(make_config(overrides), world_size)
    assert str(error.value).startswith(message)
