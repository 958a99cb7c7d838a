"""What is done with checkpoints beside training: look into one, verify, compare, convert and average. Needs no ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy

from lime_dist.checkpoint.chunk_files import tensor_path
from lime_dist.checkpoint.edges import check_same_model
from lime_dist.checkpoint.reader import CheckpointReader, find_run, get_checkpoint
from lime_dist.checkpoint.whole_writer import write_whole
from lime_dist.config import recorded, to_dict
from lime_dist.depth.pattern import lost_edges
from lime_dist.errors import CheckpointError
from lime_dist.formats import format_bytes

Done = Callable[[int], Any]  # told of bytes as they are read


def open_checkpoint(path: Path) -> CheckpointReader:
    """path: a step_N folder, or a run's, for its newest. Raises: CheckpointError."""
    return CheckpointReader(get_checkpoint(path))


def tensor_bytes(reader: CheckpointReader) -> int:
    return sum(chunk.box.num_elements * 4 for chunk in reader.all_chunks())


# ---- inspect


def description(reader: CheckpointReader) -> dict[str, Any]:
    """What `lime-dist checkpoint inspect --json` prints. Reads no tensor."""
    config, meta = reader.config, reader.meta
    stems = list(meta.files)
    return {
        "checkpoint": str(reader.folder),
        "format": meta.format,
        "run": str(find_run(reader.folder) or config.run.dir),
        "step": meta.step,
        "samples_seen": meta.samples_seen,
        "tokens_seen": (meta.samples_seen - meta.spikes.samples_passed_over) * config.data.seq_length,
        "written_by": {
            "tp": config.layout.tp,
            "pp": config.layout.pp,
            "dp": config.layout.dp,
            "zero_stage": config.zero_stage,
        },
        "versions": dict(meta.origin.versions),
        "tokenizer_sha256": meta.origin.tokenizer,
        "pattern": config.depth.name,
        "router": config.depth.router,
        "entry": config.depth.entry,
        "dtype": "fp32",
        "kinds": list(reader.kinds),
        "parameters": sum(prod(tensor.shape) for tensor in reader.tensors.values()),
        "files": len(stems),
        "bytes": sum(tensor_path(reader.folder, stem).stat().st_size for stem in stems),
        "tensors": {name: list(tensor.shape) for name, tensor in reader.tensors.items()},
        "config": to_dict(config),
    }


def description_text(reader: CheckpointReader) -> str:
    facts = description(reader)
    layout, kinds = facts["written_by"], facts["kinds"]
    lines = [
        f"{facts['checkpoint']}: step {facts['step']:,}, {facts['samples_seen']:,} samples, {facts['tokens_seen']:,} tokens",
        f"of run {facts['run']}, written by tp={layout['tp']} pp={layout['pp']} dp={layout['dp']} ZeRO {layout['zero_stage']}; loads on any",
        f"{facts['parameters']:,} parameters, {facts['dtype']}: {', '.join(kinds)}; {format_bytes(facts['bytes'])} in {facts['files']} files"
        + ("" if reader.has_checksums else "; without checksums: `lime-dist checkpoint convert` adds them"),
        f"pattern {facts['pattern']}, router {facts['router']}, entry {facts['entry']}",
        *_origin_lines(facts),
        "",
    ]
    width = max(map(len, facts["tensors"]))
    return "\n".join([*lines, *(f"{name:{width}}  {shape}" for name, shape in facts["tensors"].items())])


def _origin_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["versions"]:
        yield "with " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    if facts["tokenizer_sha256"] is not None:
        yield f"text of the tokenizer with SHA-256 {facts['tokenizer_sha256']}"


# ---- verify


def verify(reader: CheckpointReader, done: Done) -> Iterator[str]:
    """Reads all of it; what is wrong with each damaged chunk."""
    for chunk in reader.all_chunks():
        try:
            reader.read(chunk)
        except CheckpointError as error:
            yield str(error)
        done(chunk.box.num_elements * 4)


# ---- diff


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a tensor in two checkpoints: the largest, and the largest magnitude in the first. None where only one has it."""

    key: str
    largest: float | None
    magnitude: float | None


def config_differences(left: CheckpointReader, right: CheckpointReader) -> list[str]:
    """A line for each key."""
    ours, theirs = recorded(left.config), recorded(right.config)
    return [
        f"{section}.{key}: {value} | {theirs[section].get(key)}"
        for section, keys in ours.items()
        for key, value in keys.items()
        if theirs[section].get(key) != value
    ]


def tensor_differences(left: CheckpointReader, right: CheckpointReader) -> Iterator[Difference]:
    """Those that are not equal to the bit."""
    for kind in left.kinds if set(left.kinds) <= set(right.kinds) else right.kinds:
        for name in left.tensors | right.tensors:
            ours, theirs = left.tensors.get(name), right.tensors.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                yield Difference(key=f"{kind}:{name}", largest=None, magnitude=None)
                continue
            first, second = left.array(kind, ours), right.array(kind, theirs)
            if not numpy.array_equal(first.view(numpy.uint32), second.view(numpy.uint32)):
                largest, magnitude = float(abs(first - second).max()), float(abs(first).max())
                yield Difference(key=f"{kind}:{name}", largest=largest, magnitude=magnitude)


# ---- convert, average


def convert(reader: CheckpointReader, out: Path, done: Done) -> None:
    """The same in the present form, with checksums."""

    def tensors() -> Iterator[Any]:
        for kind in reader.kinds:
            for tensor in reader.tensors.values():
                values = reader.array(kind, tensor)
                done(values.nbytes)
                yield kind, tensor, values

    meta = reader.meta
    write_whole(out, reader.config, tensors(), step=meta.step, samples_seen=meta.samples_seen)


def average(readers: Sequence[CheckpointReader], out: Path, done: Done) -> None:
    """The mean of the weights, summed in fp64; of the step and the position of the last. Without optimiser state."""
    first, *others = readers
    for other in others:
        check_same_model(other.folder, other.config, first.config, "checkpoint")
        if lost_edges(first.config.pattern, other.config.pattern) or lost_edges(
            other.config.pattern, first.config.pattern
        ):
            raise CheckpointError(
                f"checkpoint {other.folder}: it has other edges than {first.folder}; average checkpoints of one pattern"
            )

    def tensors() -> Iterator[Any]:
        for tensor in first.tensors.values():
            total = numpy.zeros(tensor.shape, numpy.float64)
            for reader in readers:
                total += reader.array("weight", tensor)
                done(4 * total.size)
            yield "weight", tensor, (total / len(readers)).astype(numpy.float32)

    last = readers[-1].meta
    write_whole(out, readers[-1].config, tensors(), step=last.step, samples_seen=last.samples_seen)
