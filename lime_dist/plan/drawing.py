"""The plan as a picture: chunks side by side, a row for each layer, and what crosses each hop. Plan in, SVG out.

A layer's box stands in its chunk's column. To its right runs its raw entry, as far as that is carried; from the
left comes its partial sum. Vertical lines are reads: blue ones into a chunk's own layers, orange ones into the sums
of later layers. Under each hop stands the bundle, to scale. With virtual stages the chunks of a stage have one tint, and a
dashed box is an entry that the stage has kept since an earlier one of them. Lengths are in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass

from lime_dist.formats import format_bytes
from lime_dist.plan import svg
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.stages import ChunkPlan, plan_transfer_of
from lime_dist.plan.table import format_layers
from lime_dist.plan.transfer import HopPlan, TransferPlan

MAX_SINGLE_ROWS = 16  # of more layers, those of a stage that fare alike share a row

MUTED, PAPER, PANEL, FRAME = "#5b6472", "#ffffff", "#f4f6f9", "#cfd6e0"
RESIDUAL, RAW, SUM = "#6b7280", "#1d63d8", "#c2570c"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"

MARGIN, COLUMN_WIDTH, GAP, MIN_WIDTH = 28, 142, 88, 760  # GAP: between two columns, where the hop is
PANEL_TOP, ROWS_TOP, ROW_HEIGHT = 84, 144, 27
LAYER_WIDTH, LAYER_HEIGHT, PILL_WIDTH, PILL_HEIGHT = 94, 20, 62, 18
TINT_LIGHTNESS = 0.94
BUS = 10  # from a column's edge to its line of reads
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
        return _counted(self.layers, noun, plural)


def _counted(layers: Sequence[int], noun: str, plural: str) -> str:
    return f"{noun} {layers[0]}" if len(layers) == 1 else f"{len(layers)} {plural}"


def plan_rows(transfer: TransferPlan) -> tuple[Row, ...]:
    """A row for each layer, or for each group of layers where there are many."""
    grouped = transfer.pattern.num_layers > MAX_SINGLE_ROWS
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, chunk in enumerate(transfer.chunk_of):
        fate = chunk, transfer.raw_until[layer], transfer.sum_from[layer]
        groups.setdefault(fate if grouped else (*fate, layer), []).append(layer)
    return tuple(Row(tuple(layers), *fate[:3]) for fate, layers in groups.items())


def draw_plan(plan: RunPlan) -> str:
    """An SVG document."""
    return _Drawing(plan).document()


class _Drawing:
    def __init__(self, plan: RunPlan):
        self.config, self.plan = plan.config, plan
        self.chunks, self.shape = self.plan.chunks, self.plan.shape
        self.is_virtual = self.plan.virtual_stages > 1
        self.transfer, self.relay = self.plan.transfer, plan_transfer_of(plan.config, "relay")
        self.rows = plan_rows(self.transfer)
        self.row_of = {layer: index for index, row in enumerate(self.rows) for layer in row.layers}
        self.panel_bottom = ROWS_TOP + len(self.rows) * ROW_HEIGHT + 12
        self.chart_bottom = self.panel_bottom + 24 + CHART_HEIGHT
        largest = max(map(self.shape.bundle_bytes, (*self.transfer.hops, *self.relay.hops)), default=1)
        self.pixels_per_byte = CHART_HEIGHT / largest

    def document(self) -> str:
        width = max(MIN_WIDTH, 2 * MARGIN + len(self.chunks) * (COLUMN_WIDTH + GAP) - GAP)
        legend = self._legend()
        height = self.chart_bottom + 118 + 20 * len(legend)
        parts = [
            *self._headings(),
            *(part for chunk in self.chunks for part in self._chunk(chunk)),
            *(part for chunk in self.chunks for part in self._reads(chunk)),
            *(part for chunk in self.chunks for part in self._kept(chunk)),
            *(part for row in self.rows for part in self._row(row)),
            *(part for pair in zip(self.transfer.hops, self.relay.hops) for part in self._bundle(*pair)),
            *(part for line, (sample, text) in enumerate(legend) for part in self._legend_line(line, sample, text)),
            svg.text(MARGIN, height - 24, self._note(), size=11, fill=MUTED),
        ]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="{FONT}" role="img">\n{svg.rect(0, 0, width, height, PAPER, radius=10)}\n'
            + "\n".join(parts)
            + "\n</svg>\n"
        )

    def _headings(self) -> Iterator[str]:
        transfer = self.transfer
        on = f"{len(self.plan.stages)} stages" if len(self.plan.stages) > 1 else "1 stage"
        on += f" of {self.plan.virtual_stages} chunks" if self.is_virtual else ""
        title = f"{len(transfer.chunk_of)} layers on {on}, pattern {transfer.pattern.name}"
        counts = f"policy {self.config.depth.policy}: {transfer.num_crossings} entries and partial sums cross"
        if transfer.num_crossings < self.relay.num_crossings:
            counts += f", where relaying every entry takes {self.relay.num_crossings}"
        yield svg.text(MARGIN, 38, title, size=18, weight=600)
        yield svg.text(MARGIN, 60, counts, size=13, fill=MUTED)

    def _chunk(self, chunk: ChunkPlan) -> Iterator[str]:
        left, centre = _left(chunk.chunk), _left(chunk.chunk) + COLUMN_WIDTH / 2
        panel = self._tint(chunk) if self.is_virtual else PANEL
        yield svg.rect(left, PANEL_TOP, COLUMN_WIDTH, self.panel_bottom - PANEL_TOP, panel, stroke=FRAME, radius=8)
        yield svg.text(
            centre, PANEL_TOP + 22, f"stage {self._stage_of(chunk.chunk)}", size=14, weight=600, anchor="middle"
        )
        layers = f"layers {format_layers(chunk.layers)}" if len(chunk.layers) > 1 else f"layer {chunk.layers.start}"
        contents = (f"chunk {chunk.chunk}: " if self.is_virtual else "") + layers.replace("-", "–")
        yield svg.text(
            centre, PANEL_TOP + 40, contents, size=11 if self.is_virtual else 12, fill=MUTED, anchor="middle"
        )
        held, flops = format_bytes(self._held_bytes(chunk)), chunk.flops.routing
        for line, text in enumerate((f"holds {held} of entries", f"{flops:,} routing", "FLOPs a token")):
            yield svg.text(centre, self.panel_bottom + 30 + 17 * line, text, size=11, fill=MUTED, anchor="middle")
        if not chunk.is_last:
            yield svg.arrow(left + COLUMN_WIDTH, left + COLUMN_WIDTH + GAP, PANEL_TOP + 30, RESIDUAL, width=5)
            yield svg.text(_hop_centre(chunk.chunk), PANEL_TOP + 18, "residual", size=11, anchor="middle")

    def _stage_of(self, chunk_index: int) -> int:
        return chunk_index % len(self.plan.stages)

    def _tint(self, chunk: ChunkPlan) -> str:
        """The same for all chunks of a stage."""
        red, green, blue = hls_to_rgb(self._stage_of(chunk.chunk) / len(self.plan.stages), TINT_LIGHTNESS, 0.6)
        return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"

    def _held_bytes(self, chunk: ChunkPlan) -> int:
        """Entries of all microbatches in flight, when they are most."""
        stage = self.plan.stages[self._stage_of(chunk.chunk)]
        return max(counts.get(chunk.chunk, 0) for counts in stage.moments) * chunk.held_bytes

    def _reads(self, chunk: ChunkPlan) -> Iterator[str]:
        """Of received and kept entries into own layers at the left edge, of any entries into later sums at the right."""
        left, right = _left(chunk.chunk) + BUS, _left(chunk.chunk) + COLUMN_WIDTH - BUS
        own, later = self._own_reads(chunk), self._later_reads(chunk)
        if own:
            yield from self._bus(left, RAW, own)
            for y in self._heights(own):
                yield svg.arrow(left, _layer_left(chunk.chunk), y, RAW)
        if later:
            yield from self._bus(right, SUM, later)
            yield from (svg.circle(right, y, 3.5, SUM) for y in self._heights(later))

    def _own_reads(self, chunk: ChunkPlan) -> dict[int, set[int]]:
        own = {reader: set(sources) - set(chunk.layers) for reader, sources in chunk.transfer.reads.items()}
        return {reader: sources for reader, sources in own.items() if reader in chunk.layers and sources}

    def _later_reads(self, chunk: ChunkPlan) -> dict[int, set[int]]:
        return {reader: set(sources) for reader, sources in chunk.transfer.reads.items() if reader not in chunk.layers}

    def _kept(self, chunk: ChunkPlan) -> Iterator[str]:
        """The entries read from where they are kept, with a line to each line of reads that they are on."""
        left, right = _layer_left(chunk.chunk), _layer_left(chunk.chunk) + LAYER_WIDTH
        own, later = _all_sources(self._own_reads(chunk)), _all_sources(self._later_reads(chunk))
        for since, entries in chunk.transfer.kept.items():
            for layers in self._by_row(entries):
                y = self._height(layers[0])
                if own & set(layers):
                    yield svg.dashes(_left(chunk.chunk) + BUS, left, y, RAW)
                if later & set(layers):
                    yield svg.dashes(right, _left(chunk.chunk) + COLUMN_WIDTH - BUS, y, RAW)
                yield from self._kept_box(chunk.chunk, layers, f"here since chunk {since}")

    def _kept_box(self, chunk_index: int, layers: Sequence[int], hover: str) -> Iterator[str]:
        left, y = _layer_left(chunk_index), self._height(layers[0])
        yield svg.outline(left, y - LAYER_HEIGHT / 2, LAYER_WIDTH, LAYER_HEIGHT, RAW, radius=4)
        hover = f"entries of layers {format_layers(layers)}, {hover}"
        text = _counted(layers, "kept", "kept")
        yield svg.text(left + LAYER_WIDTH / 2, y + 4, text, size=11, fill=RAW, anchor="middle", hover=hover)

    def _by_row(self, layers: Collection[int]) -> list[list[int]]:
        rows: dict[int, list[int]] = {}
        for layer in layers:
            rows.setdefault(self.row_of[layer], []).append(layer)
        return list(rows.values())

    def _bus(self, x: float, colour: str, sources_of: Mapping[int, Collection[int]]) -> Iterator[str]:
        """A vertical line past the rows of some readers and of their sources, with a dot at each source."""
        sources = self._heights(_all_sources(sources_of))
        heights = [*sources, *self._heights(sources_of)]
        yield svg.line(x, min(heights), x, max(heights), colour, width=1.5)
        yield from (svg.circle(x, y, 3, RAW) for y in sources)

    def _row(self, row: Row) -> Iterator[str]:
        left, y = _layer_left(row.chunk), self._height(row.layers[0])
        if row.raw_until > row.chunk or self._is_summed(row, row.chunk):
            yield svg.line(left + LAYER_WIDTH, y, self._raw_end(row), y, RAW)
        if row.sum_from < row.chunk:
            yield svg.arrow(_left(row.sum_from) + COLUMN_WIDTH - BUS, left, y, SUM)
        if row.raw_until > row.chunk and not self._is_read(row, row.raw_until):
            yield from self._kept_box(row.raw_until, row.layers, "for a later chunk")
        for hop in range(row.chunk, row.raw_until):
            yield from _pill(hop, y, row.pill("raw", "raw"), RAW)
        for hop in range(row.sum_from, row.chunk):
            yield from _pill(hop, y, row.pill("sum", "sums"), SUM)
        yield svg.rect(left, y - LAYER_HEIGHT / 2, LAYER_WIDTH, LAYER_HEIGHT, PAPER, stroke=svg.INK, radius=4)
        hover = f"layers {format_layers(row.layers)}" if len(row.layers) > 1 else None
        yield svg.text(left + LAYER_WIDTH / 2, y + 4, row.label, size=11, anchor="middle", hover=hover)

    def _raw_end(self, row: Row) -> float:
        """A raw entry goes as far as the last line of reads that it is on; to be kept, where it is on none."""
        left = _left(row.raw_until)
        if not self._is_read(row, row.raw_until):
            return _layer_left(row.raw_until)
        return left + COLUMN_WIDTH - BUS if self._is_summed(row, row.raw_until) else left + BUS

    def _is_read(self, row: Row, chunk_index: int) -> bool:
        return bool(set(row.layers) & _all_sources(self.chunks[chunk_index].transfer.reads))

    def _is_summed(self, row: Row, chunk_index: int) -> bool:
        """Whether the chunk adds an entry of this row into the sum of a later chunk's layer."""
        return bool(set(row.layers) & _all_sources(self._later_reads(self.chunks[chunk_index])))

    def _bundle(self, hop: HopPlan, relayed: HopPlan) -> Iterator[str]:
        """The bundle's bytes as a stack, within the outline of what relaying would send."""
        shape, centre, bottom = self.shape, _hop_centre(hop.hop), self.chart_bottom
        bundle_bytes, relayed_bytes = shape.bundle_bytes(hop), shape.bundle_bytes(relayed)
        yield from self._stack(hop, centre - CHART_WIDTH / 2)
        if relayed_bytes > bundle_bytes:
            height = relayed_bytes * self.pixels_per_byte
            yield svg.outline(centre - CHART_WIDTH / 2, bottom - height, CHART_WIDTH, height, MUTED)
        contents = f"raw entries of layers: {format_layers(hop.raw_entries)}; "
        contents += f"partial sums for layers: {format_layers(hop.partial_sums)}"
        size, ratio = format_bytes(bundle_bytes), f"{bundle_bytes / shape.residual_bytes:.1f} × residual"
        name = f"boundary {hop.hop} > {hop.hop + 1}"
        if self.is_virtual:
            name = f"hop {hop.hop}: stage {self._stage_of(hop.hop)} > {self._stage_of(hop.hop + 1)}"
        yield svg.text(centre, bottom + 18, size, size=13, weight=600, anchor="middle", hover=contents)
        yield svg.text(centre, bottom + 34, ratio, size=11, fill=MUTED, anchor="middle")
        yield svg.text(centre, bottom + 50, name, size=11, fill=MUTED, anchor="middle")

    def _stack(self, hop: HopPlan, left: float) -> Iterator[str]:
        top = float(self.chart_bottom)
        for colour, size_bytes in (
            (RESIDUAL, self.shape.residual_bytes),
            (RAW, len(hop.raw_entries) * self.shape.entry_bytes),
            (SUM, len(hop.partial_sums) * self.shape.sum_bytes),
        ):
            height = size_bytes * self.pixels_per_byte
            top -= height
            if height:
                yield svg.rect(left, top, CHART_WIDTH, height, colour)

    def _legend(self) -> list[tuple[_Sample, str]]:
        """Sample and meaning of what is in the picture."""
        hops, shape = self.transfer.hops, self.shape
        entry, partial_sum = format_bytes(shape.entry_bytes), format_bytes(shape.sum_bytes)
        lines: list[tuple[_Sample, str]] = []
        if hops:
            lines.append((_filled(RESIDUAL), f"residual stream, {format_bytes(shape.residual_bytes)}"))
        if any(hop.raw_entries for hop in hops):
            raw = f"raw entry: a layer’s {shape.routing.entry_name}, carried to where they are read, {entry}"
            lines.append((_filled(RAW), raw))
        if any(hop.partial_sums for hop in hops):
            lines.append((_filled(SUM), f"partial sum: entries added up early for one later layer, {partial_sum}"))
        if any(chunk.transfer.kept for chunk in self.chunks):
            lines.append((_dashed(RAW), "kept: read from where an earlier chunk of the same stage made or received it"))
        if self.transfer.num_crossings < self.relay.num_crossings:
            lines.append((_dashed(MUTED), "what relaying every raw entry would send"))
        return lines

    def _legend_line(self, line: int, sample: _Sample, text: str) -> Iterator[str]:
        y = self.chart_bottom + 84 + 20 * line
        yield sample(MARGIN, y - 10)
        yield svg.text(MARGIN + 20, y, text, size=12)

    def _note(self) -> str:
        tokens = f"{self.config.microbatch_size} × {self.config.data.seq_length} tokens"
        peak = "when the chunk has most, under" if self.is_virtual else "at the peak of"
        return (
            f"Bytes of one microbatch of {tokens} on one tensor rank, forward. "
            f"Held: by the microbatches in flight {peak} {self.config.pipeline.schedule}."
        )

    def _height(self, layer: int) -> float:
        return ROWS_TOP + (self.row_of[layer] + 0.5) * ROW_HEIGHT

    def _heights(self, layers: Collection[int]) -> list[float]:
        return sorted({self._height(layer) for layer in layers})


def _all_sources(sources_of: Mapping[int, Collection[int]]) -> set[int]:
    return {source for sources in sources_of.values() for source in sources}


# ---- places and samples

_Sample = Callable[[float, float], str]  # of the legend: a small square with its upper left corner there


def _filled(colour: str) -> _Sample:
    return lambda x, y: svg.rect(x, y, 12, 12, colour, radius=2)


def _dashed(colour: str) -> _Sample:
    return lambda x, y: svg.outline(x, y, 12, 12, colour)


def _left(column: int) -> float:
    return MARGIN + column * (COLUMN_WIDTH + GAP)


def _layer_left(column: int) -> float:
    return _left(column) + (COLUMN_WIDTH - LAYER_WIDTH) / 2


def _hop_centre(hop: int) -> float:
    return _left(hop + 1) - GAP / 2


def _pill(hop: int, y: float, text: str, colour: str) -> Iterator[str]:
    centre = _hop_centre(hop)
    yield svg.rect(
        centre - PILL_WIDTH / 2, y - PILL_HEIGHT / 2, PILL_WIDTH, PILL_HEIGHT, colour, radius=PILL_HEIGHT // 2
    )
    yield svg.text(centre, y + 4, text, size=11, fill=PAPER, anchor="middle")
