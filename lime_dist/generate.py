"""Text from a checkpoint, on one device, with a cache of routed keys and values: the size of LLaMA's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lime_dist.checkpoint.edges import saved_config
from lime_dist.checkpoint.own_tokenizer import load_tokenizer_of, own_tokenizer
from lime_dist.checkpoint.reader import CheckpointReader, get_checkpoint
from lime_dist.checkpoint.saved_weights import SavedWeights
from lime_dist.config import Config
from lime_dist.config.ranges import RANGES
from lime_dist.data.special_tokens import AS_THE_FILE_SAYS, SpecialTokens
from lime_dist.data.tokenizer import Tokenizer, require_bos
from lime_dist.errors import ConfigError, DataError
from lime_dist.lifecycle.launcher import warn
from lime_dist.lime.layers import KeyValueCache
from lime_dist.lime.model import LimeChunk, plain_model
from lime_dist.lime.parts import PlainParts
from lime_dist.lime.values import load

_BATCH_TOKENS = 1 << 15  # of sequences that go through the model together; keeps the cache small
IsOver = Callable[[Sequence[int]], bool]  # whether a continuation needs no more tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0: the likeliest token. top_k 0 and top_p 1: no limit."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, fix in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
            ("top-k", self.top_k >= 0, "at least 0"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", RANGES["run.seed"].problem(self.seed) is None, "from 0 to 2^32 - 1, as run.seed"),
        ):
            if not holds:
                raise ConfigError(f"--{name}: must be {fix}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """tokenizer: instead of the run's own. named: its BOS and EOS. add_bos: as documents with BOS begin."""

    text: str
    tokenizer: Path | None = None
    named: SpecialTokens = AS_THE_FILE_SAYS
    add_bos: bool = False

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError:  # the command line's bytes come so
            raise DataError("--prompt: is no text in UTF-8; convert it, or set the terminal to UTF-8") from None


def generate_text(
    checkpoint: Path, prompt: Prompt, sampling: Sampling, *, max_new_tokens: int, device: str
) -> Iterator[str]:
    """The prompt, then its continuation piece by piece, up to the end-of-sequence token.

    checkpoint: a step_N folder, or a run's folder for its newest. Raises: CheckpointError, DataError, ConfigError.
    """
    require_new_tokens(max_new_tokens)
    folder = get_checkpoint(checkpoint)
    model, config = load_model(folder, single_device(device))
    path = prompt.tokenizer or own_tokenizer(folder, config)
    if path is None:
        raise ConfigError("data.tokenizer: the run names none; give --tokenizer")
    tokenizer = load_tokenizer_of(config, path, prompt.named)
    ids = encode_prompt(tokenizer, prompt.text, add_bos=prompt.add_bos)
    warn_of_length(config, len(ids), max_new_tokens)
    yield from continue_ids(model, tokenizer, ids, sampling, max_new_tokens)


def require_new_tokens(max_new_tokens: int) -> None:
    """Raises: ConfigError."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: {max_new_tokens} must be at least 1")


def warn_of_length(config: Config, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """A line where the model may have to read more tokens than it ever did in training."""
    trained, longest = config.data.seq_length, num_prompt_tokens + max_new_tokens - 1
    if longest > trained:
        key = "--prompt" if num_prompt_tokens > trained else "--max-new-tokens"
        warn(
            [
                f"{key}: the text may reach {longest} tokens, but the model was trained on {trained} at most (data.seq_length); "
                "what lies beyond may make no sense"
            ]
        )


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_bos: bool) -> list[int]:
    """At least one id: BOS for an empty text. Raises: DataError where that is needed and the tokenizer has none."""
    ids = tokenizer.encode(text)
    return [require_bos(tokenizer), *ids] if add_bos or not ids else ids


def continue_ids(
    model: LimeChunk, tokenizer: Tokenizer, ids: list[int], sampling: Sampling, max_new_tokens: int
) -> Iterator[str]:
    """The text of `ids`, then its continuation piece by piece, up to the end-of-sequence token."""
    ids = list(ids)
    shown = tokenizer.decode(ids)
    yield shown
    for token in generate_ids(model, ids, sampling, max_new_tokens):
        if token == tokenizer.eos_id:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # an unfinished UTF-8 character
            yield text[len(shown) :]
            shown = text


def load_model(folder: Path, device: torch.device) -> tuple[LimeChunk, Config]:
    """The whole model of a checkpoint in the run's dtype, whatever layout wrote it. Raises: CheckpointError."""
    config = saved_config(CheckpointReader(folder))
    saved = SavedWeights(folder, config)
    model = whole_model(config, device)
    load(model, lambda tensor: saved.tensor("weight", tensor))
    return model.eval(), config


def whole_model(config: Config, device: torch.device) -> LimeChunk:
    """In the run's dtype, but fp32 on the CPU; its weights are not set."""
    dtype = torch.bfloat16 if config.run.dtype == "bf16" and device.type == "cuda" else torch.float32
    return plain_model(config.model, config.pattern, PlainParts(dtype, device))


@torch.no_grad()
def generate_ids(model: LimeChunk, prompt: list[int], sampling: Sampling, max_new_tokens: int) -> Iterator[int]:
    """Token ids after `prompt`; the prompt in one pass, then a token a pass."""
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    cache, new_ids = KeyValueCache(), prompt
    for _ in range(max_new_tokens):
        tokens = torch.tensor([new_ids], device=model.device)
        residual, _ = model(tokens, *tokens.shape, model.new_memory(tokens.numel()), cache=cache)
        token = sample(model.whole_logits(residual[-1:])[0].float(), sampling, generator)
        yield token
        new_ids = [token]


@torch.no_grad()
def generate_greedily(
    model: LimeChunk,
    prompts: Sequence[Sequence[int]],
    *,
    eos: int,
    max_new_tokens: int,
    is_over: IsOver | None = None,
) -> list[list[int]]:
    """For each prompt the likeliest token, again and again, up to `eos`, which is left out, or as `is_over` says.

    As `generate_ids` at temperature 0, of all at once: while some of a longer prompt is left, its own next token goes on in
    place of the likeliest, so that no padding is needed. A sequence that has ended is dropped from the batch.
    """
    continuations: list[list[int]] = [[] for _ in prompts]
    shortest = min(map(len, prompts))
    cache, going = KeyValueCache(), list(range(len(prompts)))
    new_ids = torch.tensor([list(prompt[:shortest]) for prompt in prompts], device=model.device)
    while going:
        residual, _ = model(new_ids, *new_ids.shape, model.new_memory(new_ids.numel()), cache=cache)
        last = residual.unflatten(0, tuple(new_ids.shape))[:, -1]
        likeliest = model.whole_logits(last).float().argmax(-1).tolist()
        following: list[int | None] = []
        for sequence, token in zip(going, likeliest, strict=True):
            prompt, continuation = prompts[sequence], continuations[sequence]
            if cache.length < len(prompt):
                following.append(prompt[cache.length])
                continue
            if token != eos:
                continuation.append(token)
            ends = (
                token == eos or len(continuation) == max_new_tokens or (is_over is not None and is_over(continuation))
            )
            following.append(None if ends else token)
        goes_on = [token is not None for token in following]
        if not all(goes_on):
            cache.keep(torch.tensor(goes_on, device=model.device))
        going = [sequence for sequence, on in zip(going, goes_on) if on]
        new_ids = torch.tensor([[token] for token in following if token is not None], device=model.device)
    return continuations


def continue_all(
    model: LimeChunk,
    prompts: Sequence[Sequence[int]],
    *,
    eos: int,
    max_new_tokens: int,
    is_over: IsOver | None = None,
) -> list[list[int]]:
    """As `generate_greedily`, of any number of prompts, in their order."""
    continuations: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), unit=" examples", desc="decode", disable=None) as bar:
        for batch in batches_of_like_length(list(map(len, prompts)), max_new_tokens):
            alike = [prompts[index] for index in batch]
            generated = generate_greedily(model, alike, eos=eos, max_new_tokens=max_new_tokens, is_over=is_over)
            for index, continuation in zip(batch, generated, strict=True):
                continuations[index] = continuation
            bar.update(len(batch))
    return continuations


def batches_of_like_length(lengths: Sequence[int], slack: int) -> Iterator[list[int]]:
    """Indices of sequences by length. A batch's longest has at most `slack` tokens more than its shortest, and there is
    memory for as many behind it.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        num_tokens = (len(batch) + 1) * (lengths[index] + slack)
        if batch and (num_tokens > _BATCH_TOKENS or lengths[index] > lengths[batch[0]] + slack):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from fp32 logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens up to the one that reaches `top_p` (Holtzman et al. 2020)."""
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, kept)


def single_device(name: str, key: str = "--device") -> torch.device:
    """auto, cpu or cuda. Raises: ConfigError, which names `key`, where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}: cuda, but there is no GPU here; use cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
