"""One run, one YAML: frozen dataclasses, dotted overrides, and one function that checks across fields.

Knows no framework: it answers on a login node in milliseconds.
"""

from lime_dist.config.checking import check_config, find_warnings
from lime_dist.config.reading import RUN_CONFIG, RUN_PLAN, dump_yaml, load_config, parse_config, recorded, to_dict
from lime_dist.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DepthConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    RunConfig,
    Source,
    SpikesConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DepthConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "RUN_CONFIG",
    "RUN_PLAN",
    "ParallelConfig",
    "PipelineConfig",
    "RunConfig",
    "Source",
    "SpikesConfig",
    "WandbConfig",
    "check_config",
    "dump_yaml",
    "find_warnings",
    "load_config",
    "parse_config",
    "recorded",
    "to_dict",
]
