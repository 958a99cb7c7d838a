"""The ways to make samples of documents, by the value of `data.samples`."""

from __future__ import annotations

from typing import Any

from lime_dist.data.example_source import PackedSource, PaddedSource
from lime_dist.data.sample_source import SampleSource
from lime_dist.data.stream_source import StreamSource

SOURCES: dict[str, type[SampleSource[Any]]] = {"stream": StreamSource, "padded": PaddedSource, "packed": PackedSource}
