"""A checkpoint as lm-eval's `LM`: what its tasks ask of a model, answered on one device in batches.

As lm-eval's own class for transformers does it, but for two things: a document of a perplexity task has its BOS as context only,
and where the tokenizer joins the end of a context with the whole continuation, their one token is what is scored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lime_dist.errors import DataError, shown
from lime_dist.harness.decoding import Decoding, Room, read_decoding, write_answers
from lime_dist.harness.prompt_encoder import PromptEncoder
from lime_dist.harness.scoring import score_windows, window
from lime_dist.lime.model import LimeChunk


class CheckpointModel(TemplateLM):
    """Progress is shown by what scores and decodes."""

    def __init__(self, model: LimeChunk, encoder: PromptEncoder, room: Room):
        super().__init__()
        self._model, self._encoder, self._room = model, encoder, room
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self._encoder.eos

    @property
    def prefix_token_id(self) -> int:
        return self._encoder.prefix

    @property
    def max_length(self) -> int:
        return self._room.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._encoder.tokenizer.encode(string) if add_special_tokens is False else self._encoder.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Raises: DataError for a task with an empty continuation."""
        for request in requests:
            if not request.args[1]:
                raise DataError(f"--harness: task {request.task_name} scores an empty text; mend it or leave it out")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if continuation_ids:
            return context_ids, continuation_ids
        whole = self.tok_encode(context + continuation)
        return whole[:-1] or [self.prefix_token_id], whole[-1:]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        """Raises: DataError for a continuation that is longer than the model's context."""
        for texts, _ids, continuation in requests:
            if len(continuation) > self.max_length:
                raise DataError(
                    f"--harness: {len(continuation)} tokens are to be scored at once, data.seq_length is {self.max_length}; "
                    f"leave out the task with {shown(texts)}"
                )
        windows = [window(context, continuation, self.max_length) for _texts, context, continuation in requests]
        return [(score.log_likelihood, score.is_greedy) for score in score_windows(self._model, windows)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Every token of a text once, in windows one after the other; the last has as much context as there is room for."""
        places, asked = [], []
        for place, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                places.append(place)
                asked.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for place, (log_likelihood, _) in zip(places, self._loglikelihood_tokens(asked), strict=True):
            totals[place] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        alike: dict[Decoding, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[read_decoding(request.args[1], self._room)].append(place)
        texts: dict[int, str] = {}
        for decoding, places in alike.items():
            prompts = [self._prompt(requests[place].args[0], decoding) for place in places]
            answers = write_answers(self._model, self._encoder.tokenizer, prompts, decoding)
            texts.update(zip(places, answers, strict=True))
        return [texts[place] for place in range(len(requests))]

    def _prompt(self, context: str, decoding: Decoding) -> list[int]:
        """Cut on the left to leave room for the answer."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-(self.max_length - decoding.max_new_tokens) :]
