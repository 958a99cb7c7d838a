"""A synthetic task as files: examples as JSON lines, a tokenizer, and token files whose loss mask covers the answers.

Files are a function of the task, the sizes and the seed. No prompt comes twice, in one file or in two; the held-out files
are made first, so that they are the same for any number of training examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from lime_dist.data.checksums import file_digest
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.meta import meta_values
from lime_dist.data.output_files import prepare_outputs, written_whole
from lime_dist.data.tasks.examples import Example, Task
from lime_dist.data.tokenizer import Tokenizer, list_tokenizer, load_tokenizer, require_eos
from lime_dist.errors import DataError

_TRIES = 10_000  # for an example that is not there yet


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """What one split's files hold; the longest example is in tokens, the end of the document included."""

    prefix: Path
    num_examples: int
    num_tokens: int
    longest: int

    def __str__(self) -> str:
        return f"{self.prefix}: {self.num_examples:,} examples, {self.num_tokens:,} tokens, the longest example {self.longest}"


def build_task(
    task: Task,
    out_dir: Path,
    sizes: Mapping[str, int],
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> list[TaskFile]:
    """Write, for each split, its examples and token files, and `tokenizer.model` unless a tokenizer is given.

    sizes: examples of each kind. Raises: DataError when a file exists, or when the task has not as many different examples.
    """
    made = out_dir / "tokenizer.model"
    outputs = [out_dir / f"{split}.jsonl" for split in sizes]
    prepare_outputs([made, *outputs] if tokenizer is None else outputs, overwrite=overwrite)
    if tokenizer is None:
        list_tokenizer(made, words=task.words, characters=task.characters)
    encoder = load_tokenizer(tokenizer or made)
    require_eos(encoder)
    written, held_out = {}, set[str]()
    for split in sorted(sizes, key=lambda split: split == "train"):
        draw, count = Random(f"{task.name} {split} {seed}"), sizes[split] * task.num_kinds
        examples = _draw_examples(task, draw, split, count, held_out)
        written[split] = _write_split(task, out_dir / split, encoder, examples, overwrite=overwrite)
    return [written[split] for split in sizes]


def _draw_examples(task: Task, draw: Random, split: str, count: int, held_out: set[str]) -> Iterator[Example]:
    """No prompt twice, and none that asks the same as one of `held_out`, in canonical form, to which a held-out split's are added."""
    seen: set[str] = set()
    asked_before = frozenset(held_out)
    for index in tqdm(range(count), unit=" examples", desc=split, disable=None):
        drawn = (task.generate(draw, index) for _ in range(_TRIES))
        fresh = (one for one in drawn if one.prompt not in seen and task.canonical(one.prompt) not in asked_before)
        example = next(fresh, None)
        if example is None:
            raise DataError(f"--{split}: the task has hardly more than these {index} examples for it; ask for fewer")
        seen.add(example.prompt)
        if split != "train":
            held_out.add(task.canonical(example.prompt))
        yield example


def _write_split(
    task: Task, prefix: Path, tokenizer: Tokenizer, examples: Iterator[Example], *, overwrite: bool
) -> TaskFile:
    lengths = []
    with (
        IndexedWriter(prefix, vocab_size=tokenizer.vocab_size, overwrite=overwrite, masked=True) as writer,
        written_whole(prefix.with_name(f"{prefix.name}.jsonl")) as partial,
        partial.open("w", encoding="utf-8") as lines,
    ):
        for example in examples:
            lines.write(json.dumps(asdict(example)) + "\n")
            tokens, mask = encode_example(tokenizer, example)
            writer.add_document(tokens, mask)
            lengths.append(len(tokens))
        writer.commit(
            meta_values(
                vocab_size=tokenizer.vocab_size,
                tokenizer_sha256=file_digest(tokenizer.path),
                num_documents=len(lengths),
                num_tokens=sum(lengths),
                task=task.name,
            )
        )
    return TaskFile(prefix=prefix, num_examples=len(lengths), num_tokens=sum(lengths), longest=max(lengths))


def encode_example(tokenizer: Tokenizer, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [num_tokens] of prompt, answer and end, and the loss mask, which is 1 from the answer on."""
    prompt, answer = tokenizer.encode_all([example.prompt, example.answer])
    tokens = [*prompt, *answer, require_eos(tokenizer)]
    return np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= len(prompt)
