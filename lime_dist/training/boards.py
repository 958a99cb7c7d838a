"""Where charts of a run are drawn: TensorBoard, and what else takes the same values. Knows no run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Board(Protocol):
    """torch's SummaryWriter, as far as it is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...
    def add_text(self, tag: str, text_string: str, global_step: int, /) -> Any: ...
    def add_figure(self, tag: str, figure: Any, global_step: int, /) -> Any: ...
    def flush(self) -> Any: ...
    def close(self) -> Any: ...


class Boards:
    """Several as one."""

    def __init__(self, boards: Sequence[Board]):
        self._boards = boards

    def add_scalar(self, name: str, value: float, step: int) -> None:
        for board in self._boards:
            board.add_scalar(name, value, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        for board in self._boards:
            board.add_text(name, text, step)

    def add_figure(self, name: str, figure: Any, step: int) -> None:
        for board in self._boards:
            board.add_figure(name, figure, step)

    def flush(self) -> None:
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        for board in self._boards:
            board.close()
