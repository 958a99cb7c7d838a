"""ProsQA: which of two conclusions follows from a graph of "is a" sentences; the answer spells the shortest path.

The graph is that of Hao et al. 2024 (arXiv 2412.06769, appendix), which has about 23 nodes, 36 edges and a shortest path of
3.8. What they leave open is chosen to match: the number of nodes, and how often each length of the path is asked for.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from lime_dist.data.tasks.examples import Example, Task, draw_below, draw_order, draw_weighted

NUM_NODES = 26  # two or three of them have no edge, hence no sentence
MEAN_PARENTS = 1.5
PATH_LENGTHS = {3: 0.45, 4: 0.35, 5: 0.15, 6: 0.05}  # of mean 3.8

ENTITIES = (
    "Alex", "Anna", "Bella", "Carl", "Clara", "Daniel", "Davis", "Emma", "Ethan", "Fiona", "Grace", "Henry", "Ivan", "Jack",
    "James", "Julia", "Karen", "Leo", "Lucas", "Maria", "Nora", "Oliver", "Oscar", "Paul", "Rosa", "Sally", "Simon", "Tessa",
    "Victor", "Wendy",
)  # fmt: skip
_ONSETS = "b br d f g gr h j k l m n p r s sh st t v w y z".split()
CONCEPTS = tuple(f"{onset}{ending}" for ending in ("impus", "orpus") for onset in _ONSETS)

_FACT = re.compile(r"(?:Every )?(\w+) is a (\w+)\.")
_QUESTION = re.compile(r"Is (\w+) a (\w+) or (\w+)\?")
_FROM_FIRST, _FROM_SECOND = 1, 2  # bits of a label


class ProsQA(Task):
    name = "prosqa"
    group_name = "steps"
    words = tuple(
        f"{space}{word}"
        for words, spaces in (((*ENTITIES, "Every"), ("", " ")), ((*CONCEPTS, "is", "a", "or", "Is"), (" ",)))
        for word in words
        for space in spaces
    )
    characters = ".?"
    sizes = {"train": 17_886, "valid": 300, "test": 500}

    def generate(self, draw: Random, index: int) -> Example:
        length = list(PATH_LENGTHS)[draw_weighted(draw, list(PATH_LENGTHS.values()))]
        while (question := find_question(draw, draw_graph(draw, NUM_NODES), length)) is None:
            pass
        return _write(draw, question)

    def group(self, prompt: str) -> int:
        """The edges of the shortest path between the entity and the one of the two concepts that it reaches."""
        asked = _QUESTION.search(prompt)
        assert asked is not None
        entity, *concepts = asked.groups()
        edges: list[tuple[str, str]] = _FACT.findall(prompt[: asked.start()])
        paths = (shortest_path(edges, entity, concept) for concept in concepts)
        (path,) = (path for path in paths if path)
        return len(path) - 1

    def is_right(self, answer: str, generated: str) -> bool:
        return _conclusion(generated) == _conclusion(answer)


def _conclusion(text: str) -> str:
    """The last sentence, with its full stop."""
    return text.strip().split(". ")[-1]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes 0, 1, ..., edges from parent to child, and of which of the nodes 0 and 1 each is a descendant, as bits."""

    labels: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]

    def leaves(self, label: int) -> list[int]:
        parents = {parent for parent, _ in self.edges}
        return [node for node, own in enumerate(self.labels) if own == label and node > 1 and node not in parents]


def draw_graph(draw: Random, num_nodes: int) -> Graph:
    labels, depths, edges = [_FROM_FIRST, _FROM_SECOND], [0, 0], []
    for node in range(2, num_nodes):
        wanted = _draw_poisson(draw, MEAN_PARENTS)
        candidates = _candidates(draw.random(), labels)
        parents = _draw_parents(draw, candidates, [1.5 * depths[candidate] + 1 for candidate in candidates], wanted)
        edges += [(parent, node) for parent in parents]
        labels.append(0)
        for parent in parents:
            labels[node] |= labels[parent]
        depths.append(1 + min(depths[parent] for parent in parents) if parents else 0)
    return Graph(labels=tuple(labels), edges=tuple(edges))


def _candidates(chance: float, labels: Sequence[int]) -> list[int]:
    """Those that make the new node no descendant of node 1, or none of node 0, or any."""
    allowed = {0, _FROM_FIRST} if chance <= 0.35 else {0, _FROM_SECOND} if chance <= 0.7 else {0, 1, 2, 3}
    return [node for node, label in enumerate(labels) if label in allowed]


def _draw_parents(draw: Random, candidates: list[int], weights: list[float], wanted: int) -> list[int]:
    """Different ones, by weight."""
    parents: list[int] = []
    while candidates and len(parents) < wanted:
        place = draw_weighted(draw, weights)
        parents.append(candidates[place])
        candidates = candidates[:place] + candidates[place + 1 :]
        weights = weights[:place] + weights[place + 1 :]
    return parents


def _draw_poisson(draw: Random, mean: float) -> int:
    """By inversion."""
    place, count, share = draw.random(), 0, math.exp(-mean)
    while place >= share and share > 0:
        place -= share
        count += 1
        share *= mean / count
    return count


@dataclass(frozen=True, kw_only=True)
class Question:
    """Whether node 0 is the last node of `path` or the `other` one."""

    graph: Graph
    path: list[int]
    other: int


def find_question(draw: Random, graph: Graph, length: int) -> Question | None:
    """One whose answer takes `length` edges, between a leaf of node 0's alone and one of node 1's, if the graph has it."""
    paths = [shortest_path(graph.edges, 0, leaf) for leaf in graph.leaves(_FROM_FIRST)]
    paths = [path for path in paths if len(path) == length + 1]
    others = graph.leaves(_FROM_SECOND)
    if not paths or not others:
        return None
    return Question(graph=graph, path=paths[draw_below(draw, len(paths))], other=others[draw_below(draw, len(others))])


def shortest_path(edges: Iterable[tuple[object, object]], start: object, end: object) -> list:
    """The nodes from `start` to `end`, by breadth-first search; empty where there is no way."""
    children = defaultdict(list)
    for parent, child in edges:
        children[parent].append(child)
    before: dict[object, object] = {start: None}
    queue = deque([start])
    while queue and end not in before:
        node = queue.popleft()
        for child in children[node]:
            if child not in before:
                before[child] = node
                queue.append(child)
    path = [end] if end in before else []
    while path and path[-1] != start:
        path.append(before[path[-1]])
    return path[::-1]


def _write(draw: Random, question: Question) -> Example:
    names = _draw_names(draw, question.graph)
    facts = [_fact(names[parent], names[child]) for parent, child in question.graph.edges]
    facts = [facts[place] for place in draw_order(draw, len(facts))]
    entity, concept, other = (names[node] for node in (0, question.path[-1], question.other))
    first, second = (concept, other) if draw.random() < 0.5 else (other, concept)
    steps = [_fact(names[node], names[child]) for node, child in zip(question.path, question.path[1:])]
    return Example(
        prompt=f"{' '.join(facts)} Is {entity} a {first} or {second}?",
        answer=f" {' '.join(steps)} {_fact(entity, concept)}",
    )


def _draw_names(draw: Random, graph: Graph) -> list[str]:
    """A different name for each node: an entity's where it has no parents."""
    children = {child for _, child in graph.edges}
    entities = iter([ENTITIES[place] for place in draw_order(draw, len(ENTITIES))])
    concepts = iter([CONCEPTS[place] for place in draw_order(draw, len(CONCEPTS))])
    return [next(concepts if node in children else entities) for node in range(len(graph.labels))]


def _fact(subject: str, concept: str) -> str:
    return f"{subject} is a {concept}." if subject in ENTITIES else f"Every {subject} is a {concept}."
