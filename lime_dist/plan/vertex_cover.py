"""The least vertex cover of a bipartite graph with weights, by its largest flow (Koenig's theorem). Pure.

Right nodes are numbered, and sets of them are bit masks. Left nodes are known by the masks of their neighbours, as those
with the same neighbours are in the cover together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cover:
    """left: the neighbours of the left nodes in it. right: the right nodes in it."""

    left: frozenset[int]
    right: int


def least_cover(weights: Mapping[int, int], right_weight: int) -> Cover:
    """Of the least covers the one with the most on the left.

    weights: of the left nodes, by their neighbours. right_weight: of each right node.
    """
    flow = _Flow(weights, right_weight)
    for left in weights:
        flow.send_all(left)
    return Cover(frozenset(left for left in weights if left not in flow.reached_left), flow.reached_right)


def bits(mask: int) -> Iterator[int]:
    """The numbers in a mask, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


class _Flow:
    """From left nodes, which have their weights, to right nodes, which take `right_weight` each.

    reached_left, reached_right: the nodes that what is left over could go to, without an end to it.
    """

    def __init__(self, weights: Mapping[int, int], right_weight: int):
        self._supply, self._right_weight = dict(weights), right_weight
        self._room: dict[int, int] = {}  # of right nodes that have been given something
        self._full = 0
        self._given: dict[int, dict[int, int]] = {}  # to right nodes, by left node
        self.reached_left: set[int] = set()
        self.reached_right = 0

    def send_all(self, left: int) -> None:
        """As much as can go, which later calls do not change: they come to nothing that it could not go to."""
        while self._supply[left]:
            path = self._path(left)
            if not path:
                return
            self._send(path)

    def _path(self, start: int) -> list[tuple[int, int]]:
        """The shortest one to room, from its end: each left node gives to its right node what it gave to the next pair's."""
        came_to_left: dict[int, int] = {}
        came_to_right: dict[int, int] = {}
        waiting, seen = deque([start]), self.reached_right
        while waiting:
            left = waiting.popleft()
            if with_room := left & ~self._full & ~seen:
                came_to_right[end := next(bits(with_room))] = left
                return _back(end, came_to_left, came_to_right)
            for right in bits(left & ~seen):
                came_to_right[right] = left
                for giver in self._given[right]:
                    if giver != start and giver not in came_to_left:
                        came_to_left[giver] = right
                        waiting.append(giver)
            seen |= left
        self.reached_left |= {start, *came_to_left}
        self.reached_right = seen
        return []

    def _send(self, path: list[tuple[int, int]]) -> None:
        (_, end), (start, _) = path[0], path[-1]
        returned = [(left, right) for (left, _), (_, right) in zip(path, path[1:])]
        room = self._room.get(end, self._right_weight)
        amount = min(self._supply[start], room, *(self._given[right][left] for left, right in returned))
        self._supply[start] -= amount
        self._room[end] = room - amount
        self._full |= (room == amount) << end
        for left, right in path:
            self._give(left, right, amount)
        for left, right in returned:
            self._give(left, right, -amount)

    def _give(self, left: int, right: int, amount: int) -> None:
        given = self._given.setdefault(right, {})
        given[left] = given.get(left, 0) + amount
        if not given[left]:
            del given[left]


def _back(end: int, came_to_left: Mapping[int, int], came_to_right: Mapping[int, int]) -> list[tuple[int, int]]:
    path = [(came_to_right[end], end)]
    while path[-1][0] in came_to_left:
        right = came_to_left[path[-1][0]]
        path.append((came_to_right[right], right))
    return path
