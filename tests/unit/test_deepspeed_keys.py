"""The lists of DeepSpeed's keys are those of the installed DeepSpeed."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from enum import EnumMeta
from typing import Any, ClassVar

import deepspeed
import deepspeed.runtime.config
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.logging import log_levels

from lime_dist.config import deepspeed_keys as keys


class Recorder(dict):
    """A config that notes which keys are asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def test_top_level_keys() -> None:
    assert deepspeed.__version__.startswith(f"{keys.DEEPSPEED_VERSION}.")
    DeepSpeedConfig(Recorder(train_batch_size=1))
    removed: Mapping[str, str] = deepspeed.runtime.config._REMOVED_TOP_LEVEL_CONFIG_KEYS
    assert Recorder.asked - set(removed) == (set(keys.PASSED_ON) | set(keys.OWNED)) - set(removed)
    assert not set(removed) & keys.PASSED_ON


def test_log_levels() -> None:
    assert set(keys.LOG_LEVELS) == set(log_levels)


def test_zero_keys_and_what_they_take() -> None:
    found: dict[str, set[str]] = {"bool": set(), "int": set(), "section": set(), "stage": set()}
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        options = {*typing.get_args(field.annotation), field.annotation}
        kind = "bool" if bool in options else "int" if int in options else "section"
        kind = "stage" if isinstance(field.annotation, EnumMeta) else kind
        found[kind].add(field.alias or name)
    assert found == {
        "bool": set(keys.ZERO_BOOLEANS), "int": set(keys.ZERO_WHOLE_NUMBERS), "section": set(keys.ZERO_SECTIONS),
        "stage": {"stage"},
    }  # fmt: skip
