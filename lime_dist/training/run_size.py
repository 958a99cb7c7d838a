"""How large a run is, as it says at its start: parameters, tokens and epochs. No torch."""

from __future__ import annotations

from typing import Protocol

from lime_dist.config import Config
from lime_dist.formats import format_si
from lime_dist.plan.parameters import router_parameters, total_parameters


class Text(Protocol):
    """What trains. num_tokens: all of it. samples_per_epoch: of each source, before it starts again."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def samples_per_epoch(self) -> tuple[int, ...]: ...


def size_lines(config: Config, text: Text | None) -> list[str]:
    """Of the model and of the run; text: None where it is not known."""
    of_text = "" if text is None else f"; training text of {format_si(text.num_tokens)} tokens"
    of_run = "" if text is None else f": {_epochs(config, text)}"
    a_step, steps = config.tokens_per_step, config.run.steps
    return [
        f"{_parameters(config)}{of_text}",
        f"{format_si(a_step)} tokens a step, {format_si(a_step * steps)} in {steps:,} steps{of_run}",
    ]


def _parameters(config: Config) -> str:
    routers = router_parameters(config.model, config.pattern)
    of_routers = f", {routers:,} of them in routers" if routers else ""
    return f"{total_parameters(config.model, config.pattern):,} parameters{of_routers}"


def _epochs(config: Config, text: Text) -> str:
    """Of the sources of a blend the fewest and the most."""
    sources, samples = config.data.train, config.run.steps * config.data.global_batch_size
    whole = sum(source.weight for source in sources)
    epochs = [
        samples * source.weight / whole / of_source
        for source, of_source in zip(sources, text.samples_per_epoch, strict=True)
    ]
    fewest, most = (f"{number:.2f}" for number in (min(epochs), max(epochs)))
    return f"{most} epochs" if fewest == most else f"{fewest} to {most} epochs of the sources"
