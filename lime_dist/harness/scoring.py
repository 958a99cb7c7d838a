"""How likely given tokens are after others, many at a time. Knows tokens only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from lime_dist.generate import batches_of_like_length
from lime_dist.lime.model import LimeChunk

_MAX_PADDING = 64  # of a sequence in a batch
_ROWS_AT_ONCE = 1 << 12  # whose logits are in memory together


@dataclass(frozen=True, kw_only=True)
class Window:
    """inputs: what the model sees. targets: what follows each of the last of them."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """log_likelihood: natural, of all targets. is_greedy: whether each is the likeliest token at its place."""

    log_likelihood: float
    is_greedy: bool


def window(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Window:
    """Both, cut on the left to `max_length` inputs. The continuation itself is not longer than that."""
    ids = [*context, *continuation][-(max_length + 1) :]
    return Window(inputs=tuple(ids[:-1]), targets=tuple(continuation))


@torch.no_grad()
def score_windows(model: LimeChunk, windows: Sequence[Window]) -> list[Score]:
    """In their order. Windows with the same inputs, such as answers of one token, share a pass."""
    asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, one in enumerate(windows):
        asked[one.inputs].append(index)
    inputs, scores = list(asked), dict[int, Score]()
    with tqdm(total=len(windows), unit=" requests", desc="log-likelihood", disable=None) as bar:
        for batch in batches_of_like_length(list(map(len, inputs)), _MAX_PADDING):
            rows = [inputs[place] for place in batch]
            indices = [(row, index) for row, place in enumerate(batch) for index in asked[inputs[place]]]
            found = _score_rows(model, rows, [(row, windows[index].targets) for row, index in indices])
            scores.update(zip((index for _, index in indices), found, strict=True))
            bar.update(len(indices))
    return [scores[index] for index in range(len(windows))]


def _score_rows(
    model: LimeChunk, rows: Sequence[Sequence[int]], asked: Sequence[tuple[int, Sequence[int]]]
) -> Iterator[Score]:
    """asked: a row, and the targets of its last tokens. Padded on the right, which nothing before it sees."""
    length = max(map(len, rows))
    tokens = torch.tensor([[*row, *(0,) * (length - len(row))] for row in rows], device=model.device)
    residual, _ = model(tokens, *tokens.shape, model.new_memory(tokens.numel()))
    ends = [(row * length + len(rows[row]), targets) for row, targets in asked]
    places = [place for end, targets in ends for place in range(end - len(targets), end)]
    log_likelihoods, greedy = _at_places(model, residual, places, [token for _, targets in ends for token in targets])
    counts = [len(targets) for _, targets in ends]
    for part, is_greedy in zip(log_likelihoods.split(counts), greedy.split(counts), strict=True):
        yield Score(log_likelihood=float(part.sum()), is_greedy=bool(is_greedy.all()))


def _at_places(
    model: LimeChunk, residual: Tensor, places: Sequence[int], targets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of each target its log-likelihood, fp64, and whether it is the likeliest; on the CPU."""
    log_likelihoods, greedy = [], []
    at, following = (torch.tensor(one, device=model.device).split(_ROWS_AT_ONCE) for one in (places, targets))
    for part, tokens in zip(at, following, strict=True):
        logits = model.whole_logits(residual[part]).float()
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        log_likelihoods.append((chosen - logits.logsumexp(-1)).double().cpu())
        greedy.append((logits.argmax(-1) == tokens).cpu())
    return torch.cat(log_likelihoods), torch.cat(greedy)
