"""What the figures of a report say, in sentences; nothing that a figure does not show. No torch.

A figure that is None is not there: a layer without a router, a part that was left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

Row = Sequence[float | None]
STRONG = 1.5  # times what even weights would give


def describe(report: dict[str, Any]) -> list[str]:
    """Of the report of `report.analyze`, without its sentences."""
    return [
        *_of_text(report),
        *(_of_routers(report["routers"]) if report["routers"] else ()),
        *_of_spectra(report["spectra"]["entropy"]),
        *(_of_separability(report["separability"]) if report["separability"] else ()),
        *(_of_edges(report["edges"], report["held_out_loss"]) if report["edges"] else ()),
        *(f"Left out, {part}: {reason}." for part, reason in report["left_out"].items()),
    ]


def _of_text(report: dict[str, Any]) -> Iterator[str]:
    text, model = report["text"], report["model"]
    yield (
        f"Step {report['step']}, {model['num_layers']} layers, {model['edges']} edges ({model['pattern']}); held-out loss "
        f"{report['held_out_loss']:.4f} on {text['sequences']} sequences, {text['tokens']} tokens."
        if report["routers"] or model["edges"]
        else f"Step {report['step']}, {model['num_layers']} layers without routers; held-out loss {report['held_out_loss']:.4f} on "
        f"{text['sequences']} sequences, {text['tokens']} tokens."
    )


# ---- routers


def _of_routers(routers: dict[str, Any]) -> Iterator[str]:
    own, mean = routers["own_share"], routers["mean"]
    readers = [layer for layer, share in enumerate(own) if share is not None]
    shares = {layer: own[layer] for layer in readers}
    low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    even = sum(1 / _count(mean[layer]) for layer in readers) / len(readers)
    leading = [layer for layer in readers if mean[layer][layer] == max(_known(mean[layer]))]
    share = sum(shares.values()) / len(shares)
    strength = "Strong" if 2 * len(leading) > len(readers) and share > STRONG * even else "No strong"
    yield (
        f"{strength} diagonal: the own layer has the largest |R| in {len(leading)} of {len(readers)} readers, on average "
        f"{share:.0%} of sum |R| (even weights would give {even:.0%}), from {shares[low]:.0%} in layer {low} "
        f"to {shares[high]:.0%} in layer {high}."
    )
    yield from _of_favourites(mean, [layer for layer in readers if _count(mean[layer]) > 2])
    expected = routers["expected_source"]
    last = readers[-1]
    yield f"Layer {last} reads on average from layer {expected[last]:.1f}; even weights over all layers up to it would give {last / 2:.1f}."


def _of_favourites(mean: Sequence[Row], readers: list[int]) -> Iterator[str]:
    """Which earlier layer each reader that has a choice reads most, the own layer aside."""
    if not readers:
        return
    favourite = {reader: max(range(reader), key=lambda source: mean[reader][source] or 0.0) for reader in readers}
    preceding = [reader for reader, source in favourite.items() if source == reader - 1 and reader > 1]
    counts = Counter(source for reader, source in favourite.items() if reader not in preceding)
    parts = [
        f"layer {source} for readers {_listed(r for r in readers if favourite[r] == source and r not in preceding)}"
        for source, _ in counts.most_common(3)
    ]
    if preceding:
        parts.append(f"the preceding layer for readers {_listed(preceding)}")
    yield f"The earlier layer with the largest |R| is {'; '.join(parts)}."


def _listed(layers: Iterator[int] | list[int]) -> str:
    """Ascending layers, with runs of three or more as first-last."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _count(row: Row) -> int:
    return len(_known(row))


def _known(row: Row) -> list[float]:
    return [value for value in row if value is not None]


# ---- representations

_NAMES = {"hidden_states": "hidden states", "values": "values"}


def _of_spectra(entropy: dict[str, dict[str, Row]]) -> Iterator[str]:
    values, raw = entropy["values"]["mean"], entropy["raw_values"]["mean"]
    both = [
        (routed, own) for routed, own in zip(values, raw) if routed is not None and own is not None and routed != own
    ]
    for kind, name in _NAMES.items():
        yield _range(f"Renyi entropy of {name}", entropy[kind]["mean"], "{:.2f}")
    if both:
        higher = sum(routed > own for routed, own in both)
        gain = sum(routed - own for routed, own in both) / len(both)
        yield f"Routed values have the higher entropy than the layer's raw ones in {higher} of {len(both)} layers, on average by {gain:+.2f}."


def _range(what: str, row: Row, form: str) -> str:
    layers = [layer for layer, value in enumerate(row) if value is not None]
    low, high = min(layers, key=lambda layer: row[layer] or 0.0), max(layers, key=lambda layer: row[layer] or 0.0)
    figures = {layer: form.format(row[layer]) for layer in (low, high, layers[-1])}
    return f"{what}: lowest {figures[low]} in layer {low}, highest {figures[high]} in layer {high}, {figures[layers[-1]]} in the last."


def _of_separability(found: dict[str, Any]) -> Iterator[str]:
    for kind, name in _NAMES.items():
        yield _range(
            f'"is/are/was/were" told apart by {name} (chance {found["chance"]:.0%})', found[kind]["mean"], "{:.0%}"
        )


# ---- edges


def _of_edges(edges: list[dict[str, Any]], loss: float) -> Iterator[str]:
    parts = [
        f"{kept['rule']} ({kept['edges']} edges, {kept['weight_share']:.0%} of |R|) {kept['loss'] - loss:+.4f}"
        for kept in edges
        if kept["rule"] in ("heaviest 0%", "heaviest 25%", "heaviest 50%", "heaviest 90%")
    ]
    yield f"Held-out loss with only some edges kept, not trained on, which costs more than training with them: {'; '.join(parts)}."
