"""A machine as the words behind `--predict` describe it, and the rates that follow. Pure data."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path

from lime_dist.config.reading import is_override, nearest
from lime_dist.errors import ConfigError, shown
from lime_dist.formats import BINARY, DECIMAL, format_rate
from lime_dist.plan.costs import LinkSpeed, Rates
from lime_dist.plan.schedule import Kind

# The read is bound by memory: the paper's step times over LLaMA on one GPU (arXiv 2502.09245: some 1.4 % with 8 KV heads,
# 10.5 % with 32) are those of products that run at 1/15 and 1/8 of the rate of the model's others.
ROUTING_SLOWDOWN = 12
DEFAULT_RATE = 400e12
DEFAULT_LINKS = (50e9, 450e9)  # a 400 Gbit/s card for each GPU; NVLink
DEFAULT_LATENCY = 10e-6
DEFAULT_NODE_SIZE = 8
_MEANINGS = {"rate": "rate", "links": "speed of links", "latency": "time", "node": "number of ranks"}
EXAMPLES = {"rate": "400TFLOP/s", "links": "50GB/s,900GB/s", "latency": "10us", "node": "8"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """rate: FLOP/s that a device reaches on the model's matrix products. links: bytes/s between nodes, and within one.
    latency: seconds. node_size: ranks of a node."""

    rate: float = DEFAULT_RATE
    links: tuple[float, float] = DEFAULT_LINKS
    latency: float = DEFAULT_LATENCY
    node_size: int = DEFAULT_NODE_SIZE

    def rates(self) -> Rates:
        """With tensor collectives and the reduction over replicas by their bytes, and nothing for hosts, data and optimiser."""
        between, within = (LinkSpeed(bytes_per_second=speed, latency_seconds=self.latency) for speed in self.links)
        return Rates(
            seconds_per_flop=dict.fromkeys(Kind, 1 / self.rate),
            seconds_per_routing_flop=dict.fromkeys(Kind, ROUTING_SLOWDOWN / self.rate),
            between_nodes=between,
            within_node=within,
            node_size=self.node_size,
        )

    def __str__(self) -> str:
        between, within = map(format_rate, self.links)
        return (
            f"{_shown(self.rate)}FLOP/s a device whatever the microbatch's size, routing at 1/{ROUTING_SLOWDOWN} of it; links of "
            f"{between} between nodes and {within} within one of {self.node_size} ranks, {self.latency * 1e6:g} us a message; "
            "tensor collectives and the replicas' reduction by their bytes and not overlapped; nothing for data, optimiser and host"
        )


@dataclass(frozen=True, kw_only=True)
class Words:
    """What stood behind `--predict`. overrides: of the config. profile: a run's folder, or its profile."""

    machine: Machine
    profile: Path | None = None
    given: frozenset[str] = frozenset()  # words of the machine
    overrides: tuple[str, ...] = field(default=())

    @property
    def instead(self) -> str:
        """What was given in place of what a profile measured, in words."""
        return (
            f", with the given {' and '.join(sorted(self.given))} in place of what was measured" if self.given else ""
        )

    def on(self, rates: Rates) -> Rates:
        """Measured rates, with what was given in place of what was measured."""
        own = self.machine.rates()
        if "rate" in self.given:
            rates = replace(
                rates, seconds_per_flop=own.seconds_per_flop, seconds_per_routing_flop=own.seconds_per_routing_flop
            )
        if "links" in self.given:
            rates = replace(rates, between_nodes=own.between_nodes, within_node=own.within_node, links={})
        return replace(rates, node_size=own.node_size) if "node" in self.given else rates


def read_words(words: Sequence[str]) -> Words:
    """Raises: ConfigError for a word that is none, and for a value without its unit."""
    overrides = [word for word in words if is_override(word)]
    rest = [word for word in words if word not in overrides]
    profiles = [word for word in rest if "=" not in word]
    if len(profiles) > 1:
        raise ConfigError(f"--predict: {shown(profiles[1])}: a second profile; name one folder")
    values = dict(_read_word(word) for word in rest if "=" in word)
    if not profiles:
        _check_together(values.keys())
    elif "latency" in values and "links" not in values:
        raise ConfigError(
            f"--predict: latency without links; add links={EXAMPLES['links']}, or leave it to the profile"
        )
    return Words(
        machine=_machine(values),
        profile=Path(profiles[0]) if profiles else None,
        given=frozenset(values),
        overrides=tuple(overrides),
    )


def _check_together(given: Collection[str]) -> None:
    """Half of one machine and half of another would be none."""
    for one, other in (("rate", "links"), ("links", "rate")):
        if one in given and other not in given:
            raise ConfigError(f"--predict: {one} without {other}; add {other}={EXAMPLES[other]}")


def _machine(values: Mapping[str, tuple[float, ...]]) -> Machine:
    machine = Machine()
    if "rate" in values:
        machine = replace(machine, rate=values["rate"][0])
    if "links" in values:
        between, *within = values["links"]
        machine = replace(machine, links=(between, within[0] if within else between))
    if "latency" in values:
        machine = replace(machine, latency=values["latency"][0])
    return replace(machine, node_size=int(values["node"][0])) if "node" in values else machine


def _read_word(word: str) -> tuple[str, tuple[float, ...]]:
    name, _, text = word.partition("=")
    if name not in _READERS:
        raise ConfigError(f"--predict: {shown(name)}: unknown word{nearest(name, _READERS)}")
    most, read = _READERS[name]
    values = [read(part.strip()) for part in text.split(",")]
    numbers = tuple(value for value in values if value is not None)
    if len(numbers) < len(values) or len(values) > most:
        raise ConfigError(
            f"--predict: {name}={shown(text).strip(chr(39))} is no {_MEANINGS[name]}; write {name}={EXAMPLES[name]}"
        )
    return name, numbers


# ---- numbers with units; None for what is none

_PREFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BITS = {prefix + unit: size / 8 for prefix, size in _PREFIXES.items() for unit in ("b", "bit")}
_SPEEDS = {**DECIMAL, **BINARY, **_BITS}
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d{1,3})?)\s*"


def parse_rate(text: str) -> float | None:
    """FLOP/s of a text such as 400TFLOP/s."""
    found = re.fullmatch(_NUMBER + "([GTP])FLOP/s", text, re.ASCII)
    return _positive(float(found[1]) * _PREFIXES[found[2]]) if found else None


def parse_speed(text: str) -> float | None:
    """Bytes/s of a text such as 50GB/s, 46.6GiB/s, or 400Gb/s or 400Gbit/s."""
    found = re.fullmatch(_NUMBER + f"({'|'.join(_SPEEDS)})/s", text, re.ASCII)
    return _positive(float(found[1]) * _SPEEDS[found[2]]) if found else None


def parse_latency(text: str) -> float | None:
    """Seconds of a text such as 10us."""
    found = re.fullmatch(_NUMBER + "(ns|us|ms|s)", text, re.ASCII)
    seconds = float(found[1]) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]] if found else None
    return seconds if seconds is not None and isfinite(seconds) else None


def _parse_node(text: str) -> float | None:
    return _positive(float(text)) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


def _positive(number: float) -> float | None:
    return number if 0 < number and isfinite(number) else None


def _shown(number: float) -> str:
    """As `parse_rate` reads it, but for the unit."""
    prefix = next((one for one in "PTGM" if number >= _PREFIXES[one]), "k")
    return f"{number / _PREFIXES[prefix]:g} {prefix}"


_READERS: dict[str, tuple[int, Callable[[str], float | None]]] = {  # the most values, and how one is read
    "rate": (1, parse_rate),
    "links": (2, parse_speed),
    "latency": (1, parse_latency),
    "node": (1, _parse_node),
}
