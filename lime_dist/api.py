"""For notebooks and scripts: a config, its plan, and the whole model on one device, new or of any run's checkpoint.

`import lime_dist` gives these names and loads torch when the first of them is used. Training is a command
(`lime-dist train`), as it needs ranks. A mistake raises a `LimeDistError`, whose text names the key and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lime_dist.checkpoint.edges import ready_plan, resolve_pattern
from lime_dist.checkpoint.own_tokenizer import load_tokenizer_of, own_tokenizer
from lime_dist.checkpoint.reader import get_checkpoint
from lime_dist.config import Config, check_config, parse_config
from lime_dist.config import load_config as read_config
from lime_dist.data.tokenizer import Tokenizer
from lime_dist.errors import ConfigError
from lime_dist.generate import (
    Sampling,
    continue_ids,
    encode_prompt,
    require_new_tokens,
    single_device,
    warn_of_length,
    whole_model,
)
from lime_dist.generate import load_model as load_checkpoint
from lime_dist.lime.model import LimeChunk, model_logits, model_loss
from lime_dist.lime.values import initialize
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.table import plan_report, stage_table


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or nested mappings; `overrides` as on the command line, such as "parallel.pp=4".

    Raises: ConfigError.
    """
    if isinstance(source, Mapping):
        return check_config(parse_config(source, overrides))
    return check_config(read_config(source, overrides))


class Plan(dict[str, Any]):
    """What `lime-dist plan --json` prints, by the same keys; as text, the table of stages and boundaries."""

    def __init__(self, plan: RunPlan):
        super().__init__(plan_report(plan))
        self._plan = plan

    def __str__(self) -> str:
        return stage_table(self._plan)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What a notebook shows."""
        printer.text(str(self))


def build_plan(config: Config) -> Plan:
    """What each stage would hold and what would cross each boundary; nothing is allocated.

    Raises: ConfigError, PlanError, and CheckpointError where the run has a checkpoint that `config` does not fit.
    """
    return Plan(ready_plan(config))


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """The whole model on one device.

    network: the torch module, with the usual parameters, gradients and state.
    tokenizer: None where there is none: the run's folder has no copy, and the config names no file that is here.
    """

    network: LimeChunk
    config: Config
    tokenizer: Tokenizer | None

    def logits(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """[batch, seq, vocab_size] of token ids [batch, seq]."""
        return model_logits(self.network, self._on_device(tokens))

    def loss(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Mean next-token cross entropy, in nats, of token ids [batch, seq + 1]."""
        return model_loss(self.network, self._on_device(tokens))

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        add_bos: bool = False,
    ) -> str:
        """The prompt with its continuation, as `lime-dist generate` prints it.

        temperature 0: the likeliest token; top_k 0 and top_p 1: no limit. add_bos: for a model of documents that begin
        with BOS. Raises: ConfigError, DataError.
        """
        if self.tokenizer is None:
            raise ConfigError("data.tokenizer: the model has none; give load_model(..., tokenizer=FILE)")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        require_new_tokens(max_new_tokens)
        ids = encode_prompt(self.tokenizer, prompt, add_bos=add_bos)
        warn_of_length(self.config, len(ids), max_new_tokens)
        return "".join(continue_ids(self.network, self.tokenizer, ids, sampling, max_new_tokens))

    def _on_device(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        return torch.as_tensor(tokens, dtype=torch.long, device=self.network.device)


def build_model(config: Config, *, device: str = "auto", tokenizer: str | Path | None = None) -> Model:
    """The model with the initial weights of `run.seed`, which are those of a training under any layout.

    device: auto, cpu or cuda. tokenizer: instead of data.tokenizer. Raises: LimeDistError.
    """
    config = resolve_pattern(check_config(config))
    network = whole_model(config, single_device(device))
    initialize(network, config.run.seed)
    own = Path(config.data.tokenizer) if config.data.tokenizer is not None else None
    return Model(network=network, config=config, tokenizer=_find_tokenizer(config, tokenizer, own))


def load_model(path: str | Path, *, device: str = "auto", tokenizer: str | Path | None = None) -> Model:
    """The model of a checkpoint, whatever layout wrote it: a step_N folder, or a run's folder for its newest.

    device: auto, cpu or cuda. tokenizer: instead of the run's own. Raises: LimeDistError.
    """
    folder = get_checkpoint(Path(path))
    network, config = load_checkpoint(folder, single_device(device))
    own = own_tokenizer(folder, config)
    return Model(network=network, config=config, tokenizer=_find_tokenizer(config, tokenizer, own))


def _find_tokenizer(config: Config, given: str | Path | None, own: Path | None) -> Tokenizer | None:
    """A run's tokenizer may lie elsewhere by now, and logits need none; one that was given must be there."""
    if given is not None:
        return load_tokenizer_of(config, Path(given))
    return load_tokenizer_of(config, own) if own is not None and own.is_file() else None
