"""ProsQA: the graph's statistics, what follows from it and what does not, and the answer's path."""

from __future__ import annotations

import re
from random import Random
from statistics import mean

import pytest

from lime_dist.data.tasks.examples import Example
from lime_dist.data.tasks.prosqa import CONCEPTS, ENTITIES, NUM_NODES, ProsQA, draw_graph, shortest_path

TASK = ProsQA()
PINNED = " Henry is a torpus. Every torpus is a shimpus. Every shimpus is a jimpus. Henry is a jimpus."


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    draw = Random("prosqa")
    return [TASK.generate(draw, index) for index in range(400)]


def facts_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+) is a (\w+)\.", text)


def asked(example: Example) -> tuple[str, str, str]:
    entity, first, second = re.search(r" Is (\w+) a (\w+) or (\w+)\?$", example.prompt).groups()
    return entity, first, second


def reached(facts: list[tuple[str, str]], start: str) -> set[str]:
    found, new = {start}, {start}
    while new:
        new = {child for parent, child in facts if parent in new} - found
        found |= new
    return found


def test_one_of_the_two_follows_and_the_answer_names_it(examples: list[Example]) -> None:
    for example in examples:
        entity, *concepts = asked(example)
        follows = [concept for concept in concepts if concept in reached(facts_of(example.prompt), entity)]
        assert len(follows) == 1
        assert example.answer.endswith(f" {entity} is a {follows[0]}.")


def test_both_are_leaves_and_the_other_follows_from_another_entity(examples: list[Example]) -> None:
    for example in examples:
        facts = facts_of(example.prompt)
        parents = {parent for parent, _ in facts}
        entity, *concepts = asked(example)
        assert not parents & set(concepts)
        (other,) = set(concepts) - {example.answer.split()[-1].rstrip(".")}
        assert any(other in reached(facts, start) for start in parents & set(ENTITIES) - {entity})


def test_the_answer_is_a_shortest_path_of_the_prompts_facts(examples: list[Example]) -> None:
    for example in examples:
        facts, steps = facts_of(example.prompt), facts_of(example.answer)
        *path, conclusion = steps
        assert set(path) <= set(facts)
        assert all(before[1] == after[0] for before, after in zip(path, path[1:]))
        assert conclusion == (path[0][0], path[-1][1])
        assert len(path) == len(shortest_path(facts, *conclusion)) - 1 == TASK.group(example.prompt)


def test_statistics(examples: list[Example]) -> None:
    """About 23 nodes, 36 edges and a shortest path of 3.8; of 400 graphs the standard errors are 0.1, 0.3 and 0.05."""
    facts = [facts_of(example.prompt) for example in examples]
    assert mean(len({name for fact in each for name in fact}) for each in facts) == pytest.approx(23.5, abs=0.8)
    assert mean(map(len, facts)) == pytest.approx(35, abs=1.5)
    assert mean(TASK.group(example.prompt) for example in examples) == pytest.approx(3.8, abs=0.2)
    assert {TASK.group(example.prompt) for example in examples} == {3, 4, 5, 6}


def test_entities_are_those_without_parents(examples: list[Example]) -> None:
    for example in examples:
        facts = facts_of(example.prompt)
        children = {child for _, child in facts}
        assert children <= set(CONCEPTS)
        assert {parent for parent, _ in facts} - children <= set(ENTITIES)
        assert set(re.findall(r"Every (\w+)", example.prompt)).isdisjoint(ENTITIES)
    assert len(CONCEPTS) == len(set(CONCEPTS)) >= NUM_NODES <= len(set(ENTITIES)) == len(ENTITIES)


def test_neither_place_nor_order_tells_the_answer(examples: list[Example]) -> None:
    firsts = [asked(example)[1] == example.answer.split()[-1].rstrip(".") for example in examples]
    assert mean(firsts) == pytest.approx(0.5, abs=0.1)
    starts = [facts_of(example.prompt)[0][0] == asked(example)[0] for example in examples]
    assert mean(starts) < 0.3, "sentences are not shuffled"


def test_labels_say_which_of_the_first_two_is_an_ancestor() -> None:
    draw = Random(3)
    for _ in range(100):
        graph = draw_graph(draw, NUM_NODES)
        for node, label in enumerate(graph.labels):
            first, second = (bool(shortest_path(graph.edges, root, node)) for root in (0, 1))
            assert label == first + 2 * second
        assert len(set(graph.edges)) == len(graph.edges)
        assert all(parent < child for parent, child in graph.edges)


def test_the_verdict() -> None:
    answer = " Tom is a bimpus. Every bimpus is a zorpus. Tom is a zorpus."
    assert TASK.is_right(answer, answer)
    assert TASK.is_right(answer, " Tom is a zorpus.")  # the conclusion alone counts
    for wrong in ("", " Tom is a bimpus.", " Tom is a zorpus", " Every bimpus is a zorpus.", answer + " Tom"):
        assert not TASK.is_right(answer, wrong), wrong


def test_examples_are_pinned() -> None:
    """A change here changes what a seed gives."""
    assert TASK.generate(Random("pinned"), 0).answer == PINNED
