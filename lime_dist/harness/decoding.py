"""How a task wants its answers written, and writing them: greedily many at a time, or sampled one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from lime_dist.data.tokenizer import Tokenizer, require_eos
from lime_dist.errors import ConfigError, shown
from lime_dist.generate import IsOver, Sampling, continue_all, generate_ids
from lime_dist.lime.model import LimeChunk

_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
_SAME_AS_NONE = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
_DEFAULT_NEW_TOKENS = 256  # lm-eval's own


@dataclass(frozen=True, kw_only=True)
class Room:
    """max_length: tokens that the model sees at once. max_new_tokens: at most, whatever a task asks for; None: as it asks."""

    max_length: int
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """stops: texts that end an answer and are no part of it."""

    stops: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


def read_decoding(given: Mapping[str, Any], room: Room) -> Decoding:
    """From a task's `generation_kwargs`. Raises: ConfigError."""
    values: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), _DEFAULT_NEW_TOKENS))
    for key in values.keys() - _KNOWN:
        if values[key] != _SAME_AS_NONE.get(key):
            raise ConfigError(f"generation_kwargs.{key}: {shown(values[key])} cannot be done here; leave the task out")
    max_new_tokens = min(values["max_gen_toks"], room.max_new_tokens or values["max_gen_toks"])
    if not 0 < max_new_tokens < room.max_length:
        raise ConfigError(
            f"generation_kwargs.max_gen_toks: {max_new_tokens} leaves no room for a prompt within data.seq_length="
            f"{room.max_length}; give --max-new-tokens, from 1 to {room.max_length - 1}"
        )
    stops = tuple(stop for stop in values["until"] if stop)
    return Decoding(stops=stops, max_new_tokens=max_new_tokens, sampling=_sampling(values))


def _sampling(values: Mapping[str, Any]) -> Sampling:
    if not values["do_sample"]:
        return Sampling(temperature=0.0)
    return Sampling(
        temperature=float(values.get("temperature", 0.0)),
        top_k=max(0, int(values.get("top_k", 0))),
        top_p=float(values.get("top_p", 1.0)),
    )


def write_answers(
    model: LimeChunk, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[str]:
    """The text after each prompt, up to the end-of-sequence token or a stop. Sampled ones differ though prompts are equal."""
    is_over = _stops_in(tokenizer, decoding.stops)
    if decoding.sampling.temperature == 0:
        eos, most = require_eos(tokenizer), decoding.max_new_tokens
        continuations = continue_all(model, prompts, eos=eos, max_new_tokens=most, is_over=is_over)
    else:
        continuations = [
            _sampled(model, tokenizer, prompt, replace(decoding, sampling=replace(decoding.sampling, seed=seed)))
            for seed, prompt in enumerate(prompts)
        ]
    texts = [_text_after(tokenizer, *pair) for pair in zip(prompts, continuations, strict=True)]
    return [_before_stops(text, decoding.stops) for text in texts]


def _sampled(model: LimeChunk, tokenizer: Tokenizer, prompt: Sequence[int], decoding: Decoding) -> list[int]:
    continuation: list[int] = []
    is_over = _stops_in(tokenizer, decoding.stops)
    for token in generate_ids(model, list(prompt), decoding.sampling, decoding.max_new_tokens):
        if token == tokenizer.eos_id:
            break
        continuation.append(token)
        if is_over is not None and is_over(continuation):
            break
    return continuation


def _stops_in(tokenizer: Tokenizer, stops: Sequence[str]) -> IsOver | None:
    def is_over(continuation: Sequence[int]) -> bool:
        text = tokenizer.decode(continuation)
        return any(stop in text for stop in stops)

    return is_over if stops else None


def _text_after(tokenizer: Tokenizer, prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """With the space that it may begin with, which many tokenizers drop from a text's first token."""
    return tokenizer.decode([*prompt, *continuation])[len(tokenizer.decode(prompt)) :]


def _before_stops(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
