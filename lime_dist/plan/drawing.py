"""The plan as a picture: stages side by side, a row for each layer, and what crosses each boundary. Plan in, SVG out.

A layer's box stands in its stage's column. To its right runs its raw entry, as far as that is carried; from the
left comes its partial sum. Vertical lines are reads: blue ones into a stage's own layers, orange ones into the sums
of later layers. Under each boundary stands the bundle, to scale. Lengths are in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from html import escape

from lime_dist.config import Config
from lime_dist.formats import format_bytes
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.stages import ChunkPlan, plan_transfer_of
from lime_dist.plan.table import format_layers
from lime_dist.plan.transfer import HopPlan, TransferPlan

MAX_SINGLE_ROWS = 16  # of more layers, those of a stage that fare alike share a row

INK, MUTED, PAPER, PANEL, FRAME = "#1f2937", "#5b6472", "#ffffff", "#f4f6f9", "#cfd6e0"
RESIDUAL, RAW, SUM = "#6b7280", "#1d63d8", "#c2570c"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"

MARGIN, STAGE_WIDTH, GAP, MIN_WIDTH = 28, 142, 88, 760  # GAP: between two stages, where the boundary is
PANEL_TOP, ROWS_TOP, ROW_HEIGHT = 84, 144, 27
LAYER_WIDTH, LAYER_HEIGHT, PILL_WIDTH, PILL_HEIGHT = 94, 20, 62, 18
BUS = 10  # from a stage's edge to its line of reads
CHART_WIDTH, CHART_HEIGHT = 40, 90


@dataclass(frozen=True)
class Row:
    """Layers of one chunk that fare alike: raw entries carried on to chunk `raw_until`, sums begun at chunk `sum_from`."""

    layers: tuple[int, ...]
    chunk: int
    raw_until: int
    sum_from: int

    @property
    def label(self) -> str:
        first, last, count = self.layers[0], self.layers[-1], len(self.layers)
        if count == 1:
            return f"layer {first}"
        return f"layers {first}–{last}" if last - first == count - 1 else f"{count} of {first}–{last}"

    def pill(self, noun: str, plural: str) -> str:
        return f"{noun} {self.layers[0]}" if len(self.layers) == 1 else f"{len(self.layers)} {plural}"


def plan_rows(transfer: TransferPlan) -> tuple[Row, ...]:
    """A row for each layer, or for each group of layers where there are many."""
    grouped = transfer.pattern.num_layers > MAX_SINGLE_ROWS
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, chunk in enumerate(transfer.chunk_of):
        fate = chunk, transfer.raw_until[layer], transfer.sum_from[layer]
        groups.setdefault(fate if grouped else (*fate, layer), []).append(layer)
    return tuple(Row(tuple(layers), *fate[:3]) for fate, layers in groups.items())


def draw_plan(config: Config) -> str:
    """The plan of a checked config as an SVG document."""
    return _Drawing(config).document()


class _Drawing:
    def __init__(self, config: Config):
        self.config = config
        self.plan = plan_run(config)
        self.chunks, self.shape = self.plan.chunks, self.plan.shape
        self.transfer, self.relay = self.plan.transfer, plan_transfer_of(config, "relay")
        self.rows = plan_rows(self.transfer)
        self.row_of = {layer: index for index, row in enumerate(self.rows) for layer in row.layers}
        self.panel_bottom = ROWS_TOP + len(self.rows) * ROW_HEIGHT + 12
        self.chart_bottom = self.panel_bottom + 24 + CHART_HEIGHT
        largest = max(map(self.shape.bundle_bytes, (*self.transfer.hops, *self.relay.hops)), default=1)
        self.pixels_per_byte = CHART_HEIGHT / largest

    def document(self) -> str:
        width = max(MIN_WIDTH, 2 * MARGIN + len(self.chunks) * (STAGE_WIDTH + GAP) - GAP)
        legend = self._legend()
        height = self.chart_bottom + 118 + 20 * len(legend)
        parts = [
            *self._headings(),
            *(part for chunk in self.chunks for part in self._chunk(chunk)),
            *(part for chunk in self.chunks for part in self._reads(chunk)),
            *(part for row in self.rows for part in self._row(row)),
            *(part for pair in zip(self.transfer.hops, self.relay.hops) for part in self._bundle(*pair)),
            *(part for line, (sample, text) in enumerate(legend) for part in self._legend_line(line, sample, text)),
            _text(MARGIN, height - 24, self._note(), size=11, fill=MUTED),
        ]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="{FONT}" role="img">\n{_rect(0, 0, width, height, PAPER, radius=10)}\n'
            + "\n".join(parts)
            + "\n</svg>\n"
        )

    def _headings(self) -> Iterator[str]:
        transfer = self.transfer
        on = f"{len(self.plan.stages)} stages" if len(self.plan.stages) > 1 else "1 stage"
        on += f" of {self.plan.virtual_stages} chunks" if self.plan.virtual_stages > 1 else ""
        title = f"{len(transfer.chunk_of)} layers on {on}, pattern {transfer.pattern.name}"
        counts = f"policy {self.config.depth.policy}: {transfer.num_crossings} entries and partial sums cross"
        if transfer.num_crossings < self.relay.num_crossings:
            counts += f", where relaying every entry takes {self.relay.num_crossings}"
        yield _text(MARGIN, 38, title, size=18, weight=600)
        yield _text(MARGIN, 60, counts, size=13, fill=MUTED)

    def _chunk(self, chunk: ChunkPlan) -> Iterator[str]:
        left, centre = _left(chunk.chunk), _left(chunk.chunk) + STAGE_WIDTH / 2
        yield _rect(left, PANEL_TOP, STAGE_WIDTH, self.panel_bottom - PANEL_TOP, PANEL, stroke=FRAME, radius=8)
        yield _text(centre, PANEL_TOP + 22, self._name(chunk), size=14, weight=600, anchor="middle")
        layers = f"layers {format_layers(chunk.layers)}" if len(chunk.layers) > 1 else f"layer {chunk.layers.start}"
        yield _text(centre, PANEL_TOP + 40, layers.replace("-", "–"), size=12, fill=MUTED, anchor="middle")
        held, flops = format_bytes(self._held_bytes(chunk)), chunk.routing_flops_per_token
        for line, text in enumerate((f"holds {held} of entries", f"{flops:,} routing", "FLOPs a token")):
            yield _text(centre, self.panel_bottom + 30 + 17 * line, text, size=11, fill=MUTED, anchor="middle")
        if not chunk.is_last:
            yield _arrow(left + STAGE_WIDTH, left + STAGE_WIDTH + GAP, PANEL_TOP + 30, RESIDUAL, width=5)
            yield _text(_boundary_centre(chunk.chunk), PANEL_TOP + 18, "residual", size=11, anchor="middle")

    def _name(self, chunk: ChunkPlan) -> str:
        stage_index = chunk.chunk % len(self.plan.stages)
        return f"stage {stage_index}" + (f", chunk {chunk.chunk}" if self.plan.virtual_stages > 1 else "")

    def _held_bytes(self, chunk: ChunkPlan) -> int:
        """Entries of all microbatches in flight, when they are most."""
        stage = self.plan.stages[chunk.chunk % len(self.plan.stages)]
        return max(counts.get(chunk.chunk, 0) for counts in stage.moments) * chunk.held_bytes

    def _reads(self, chunk: ChunkPlan) -> Iterator[str]:
        """Of received entries into own layers at the left edge, of any entries into later layers' sums at the right."""
        left, right = _left(chunk.chunk) + BUS, _left(chunk.chunk) + STAGE_WIDTH - BUS
        own = {reader: set(sources) - set(chunk.layers) for reader, sources in chunk.transfer.reads.items()}
        own = {reader: sources for reader, sources in own.items() if reader in chunk.layers and sources}
        if own:
            yield from self._bus(left, RAW, own)
            for y in self._heights(own):
                yield _arrow(left, _layer_left(chunk.chunk), y, RAW)
        later = {reader: sources for reader, sources in chunk.transfer.reads.items() if reader not in chunk.layers}
        if later:
            yield from self._bus(right, SUM, later)
            yield from (_circle(right, y, 3.5, SUM) for y in self._heights(later))

    def _bus(self, x: float, colour: str, sources_of: Mapping[int, Collection[int]]) -> Iterator[str]:
        """A vertical line past the rows of some readers and of their sources, with a dot at each source."""
        sources = self._heights({source for sources in sources_of.values() for source in sources})
        heights = [*sources, *self._heights(sources_of)]
        yield _line(x, min(heights), x, max(heights), colour, width=1.5)
        yield from (_circle(x, y, 3, RAW) for y in sources)

    def _row(self, row: Row) -> Iterator[str]:
        left, y = _layer_left(row.chunk), self._height(row.layers[0])
        if row.raw_until > row.chunk or self._is_summed(row, row.chunk):
            yield _line(left + LAYER_WIDTH, y, self._raw_end(row), y, RAW)
        if row.sum_from < row.chunk:
            yield _arrow(_left(row.sum_from) + STAGE_WIDTH - BUS, left, y, SUM)
        for boundary in range(row.chunk, row.raw_until):
            yield from _pill(boundary, y, row.pill("raw", "raw"), RAW)
        for boundary in range(row.sum_from, row.chunk):
            yield from _pill(boundary, y, row.pill("sum", "sums"), SUM)
        yield _rect(left, y - LAYER_HEIGHT / 2, LAYER_WIDTH, LAYER_HEIGHT, PAPER, stroke=INK, radius=4)
        hover = f"layers {format_layers(row.layers)}" if len(row.layers) > 1 else None
        yield _text(left + LAYER_WIDTH / 2, y + 4, row.label, size=11, anchor="middle", hover=hover)

    def _raw_end(self, row: Row) -> float:
        """A raw entry goes as far as the last line of reads that it is on."""
        left = _left(row.raw_until)
        return left + STAGE_WIDTH - BUS if self._is_summed(row, row.raw_until) else left + BUS

    def _is_summed(self, row: Row, chunk_index: int) -> bool:
        """Whether the chunk adds an entry of this row into the sum of a later chunk's layer."""
        chunk = self.chunks[chunk_index]
        later = [sources for reader, sources in chunk.transfer.reads.items() if reader not in chunk.layers]
        return any(set(row.layers) & set(sources) for sources in later)

    def _bundle(self, boundary: HopPlan, relayed: HopPlan) -> Iterator[str]:
        """The bundle's bytes as a stack, within the outline of what relaying would send."""
        shape, centre, bottom = self.shape, _boundary_centre(boundary.hop), self.chart_bottom
        bundle_bytes, relayed_bytes = shape.bundle_bytes(boundary), shape.bundle_bytes(relayed)
        yield from self._stack(boundary, centre - CHART_WIDTH / 2)
        if relayed_bytes > bundle_bytes:
            height = relayed_bytes * self.pixels_per_byte
            yield _outline(centre - CHART_WIDTH / 2, bottom - height, CHART_WIDTH, height)
        contents = f"raw entries of layers: {format_layers(boundary.raw_entries)}; "
        contents += f"partial sums for layers: {format_layers(boundary.partial_sums)}"
        size, ratio = format_bytes(bundle_bytes), f"{bundle_bytes / shape.residual_bytes:.1f} × residual"
        name = f"boundary {boundary.hop} > {boundary.hop + 1}"
        yield _text(centre, bottom + 18, size, size=13, weight=600, anchor="middle", hover=contents)
        yield _text(centre, bottom + 34, ratio, size=11, fill=MUTED, anchor="middle")
        yield _text(centre, bottom + 50, name, size=11, fill=MUTED, anchor="middle")

    def _stack(self, boundary: HopPlan, left: float) -> Iterator[str]:
        top = float(self.chart_bottom)
        for colour, size_bytes in (
            (RESIDUAL, self.shape.residual_bytes),
            (RAW, len(boundary.raw_entries) * self.shape.entry_bytes),
            (SUM, len(boundary.partial_sums) * self.shape.sum_bytes),
        ):
            height = size_bytes * self.pixels_per_byte
            top -= height
            if height:
                yield _rect(left, top, CHART_WIDTH, height, colour)

    def _legend(self) -> list[tuple[str | None, str]]:
        """Colour, None for the outline, and meaning of what is in the picture."""
        boundaries, shape = self.transfer.hops, self.shape
        entry, partial_sum = format_bytes(shape.entry_bytes), format_bytes(shape.sum_bytes)
        lines: list[tuple[str | None, str]] = []
        if boundaries:
            lines.append((RESIDUAL, f"residual stream, {format_bytes(shape.residual_bytes)}"))
        if any(boundary.raw_entries for boundary in boundaries):
            lines.append(
                (RAW, f"raw entry: a layer’s {shape.routing.entry_name}, carried to where they are read, {entry}")
            )
        if any(boundary.partial_sums for boundary in boundaries):
            lines.append((SUM, f"partial sum: entries added up early for one later layer, {partial_sum}"))
        if self.transfer.num_crossings < self.relay.num_crossings:
            lines.append((None, "what relaying every raw entry would send"))
        return lines

    def _legend_line(self, line: int, colour: str | None, text: str) -> Iterator[str]:
        y = self.chart_bottom + 84 + 20 * line
        yield _outline(MARGIN, y - 10, 12, 12) if colour is None else _rect(MARGIN, y - 10, 12, 12, colour, radius=2)
        yield _text(MARGIN + 20, y, text, size=12)

    def _note(self) -> str:
        tokens = f"{self.config.microbatch_size} × {self.config.data.seq_length} tokens"
        return (
            f"Bytes of one microbatch of {tokens} on one tensor rank, forward. "
            f"Held: by the microbatches in flight at the peak of {self.config.pipeline.schedule}."
        )

    def _height(self, layer: int) -> float:
        return ROWS_TOP + (self.row_of[layer] + 0.5) * ROW_HEIGHT

    def _heights(self, layers: Collection[int]) -> list[float]:
        return sorted({self._height(layer) for layer in layers})


# ---- places and shapes


def _left(column: int) -> float:
    return MARGIN + column * (STAGE_WIDTH + GAP)


def _layer_left(column: int) -> float:
    return _left(column) + (STAGE_WIDTH - LAYER_WIDTH) / 2


def _boundary_centre(boundary: int) -> float:
    return _left(boundary + 1) - GAP / 2


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    fill: str = INK,
    weight: int = 400,
    anchor: str = "start",
    hover: str | None = None,
) -> str:
    title = f"<title>{escape(hover)}</title>" if hover else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}">'
        f"{title}{escape(text)}</text>"
    )


def _rect(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none", radius: int = 0) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" stroke="{stroke}"/>'


def _outline(x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} fill="none" stroke="{MUTED}" stroke-dasharray="3 3"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 2) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"/>'


def _arrow(x1: float, x2: float, y: float, colour: str, width: float = 2) -> str:
    head = 2 + 2 * width
    tip = f"{x2:g},{y:g} {x2 - head:g},{y - head / 2:g} {x2 - head:g},{y + head / 2:g}"
    return f'{_line(x1, y, x2 - head, y, colour, width)}<polygon points="{tip}" fill="{colour}"/>'


def _circle(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>'


def _pill(boundary: int, y: float, text: str, colour: str) -> Iterator[str]:
    centre = _boundary_centre(boundary)
    yield _rect(centre - PILL_WIDTH / 2, y - PILL_HEIGHT / 2, PILL_WIDTH, PILL_HEIGHT, colour, radius=PILL_HEIGHT // 2)
    yield _text(centre, y + 4, text, size=11, fill=PAPER, anchor="middle")
