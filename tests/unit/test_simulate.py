"""The simulator of a step against hand counts and textbook formulas, and what operations cost against the plan's FLOPs and layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from random import Random

import pytest

from lime_dist.config import check_config, parse_config
from lime_dist.plan.costs import Costs, LinkSpeed, MoveCost, Rates, costs_of, parameter_count
from lime_dist.plan.operations import Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.schedule import Kind
from lime_dist.plan.simulate import Simulated, simulate, simulate_long

BASE = {
    "model": {"num_layers": 8, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"pp": 4},
    "pipeline": {"num_microbatches": 12, "min_message": 0},
    "data": {"seq_length": 64, "global_batch_size": 12},
    "run": {"device": "cpu"},
}
LLAMA = "depth.router=none"
PASS = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0}  # seconds of a stage
BOTH = sum(PASS.values())


def make_plan(*overrides: str) -> RunPlan:
    return plan_run(check_config(parse_config(BASE, overrides)))


def with_microbatches(number: int, *overrides: str) -> RunPlan:
    return make_plan(f"pipeline.num_microbatches={number}", f"data.global_batch_size={number}", *overrides)


def make_costs(plan: RunPlan, seconds: Mapping[Kind, float] = PASS, speed: float = inf, latency: float = 0.0) -> Costs:
    """seconds: of a stage's passes, split over its chunks and their RUNs evenly. speed: bytes a second of every link."""
    num_stages = len(plan.stages)
    boundaries = range(num_stages if plan.virtual_stages > 1 else num_stages - 1)
    ways = [(stage, (stage + 1) % num_stages) for stage in boundaries]
    link = LinkSpeed(bytes_per_second=speed, latency_seconds=latency)
    runs = {}
    for chunk in plan.chunks:
        for kind in Kind:
            count = sum(operation.verb is Verb.RUN for operation in chunk.operations[kind])
            runs[chunk.chunk, kind] = (seconds[kind] / plan.virtual_stages / count,) * count
    return Costs(
        runs=runs,
        links=dict.fromkeys([*ways, *((behind, before) for before, behind in ways)], link),
        data_seconds=(0.0,) * num_stages,
        end_seconds=(0.0,) * num_stages,
    )


def residual_speed(plan: RunPlan, seconds: float) -> float:
    """Of links that carry a residual in so long."""
    return plan.shape.residual_bytes / seconds


# ---- the order of passes


@pytest.mark.parametrize("schedule", ("1f1b", "gpipe"))
@pytest.mark.parametrize(("pp", "number"), [(1, 3), (2, 2), (4, 12), (8, 9)])
def test_step_time_is_the_textbooks(schedule: str, pp: int, number: int) -> None:
    plan = with_microbatches(number, LLAMA, f"parallel.pp={pp}", f"pipeline.schedule={schedule}")
    simulated = simulate(plan, make_costs(plan))
    assert simulated.step_seconds == pytest.approx((number + pp - 1) * BOTH)
    assert simulated.bubble_share == pytest.approx((pp - 1) / (number + pp - 1))


@pytest.mark.parametrize("virtual_stages", (1, 2, 4))
def test_virtual_stages_divide_the_bubble(virtual_stages: int) -> None:
    plan = make_plan(LLAMA, "model.num_layers=16", f"parallel.virtual_stages={virtual_stages}")
    simulated = simulate(plan, make_costs(plan))
    assert simulated.step_seconds == pytest.approx((12 + 3 / virtual_stages) * BOTH)


def test_a_slow_stage_holds_up_the_others() -> None:
    plan = with_microbatches(12, LLAMA)
    costs = make_costs(plan)
    slow = replace(costs, runs=costs.runs | {(1, kind): (2 * PASS[kind],) for kind in Kind})
    simulated = simulate(plan, slow)
    # Ahead of its 24 passes' worth a forward of the first stage, behind them a backward; between, a wait for the first gradient.
    assert simulated.step_seconds == pytest.approx(24 * BOTH + BOTH + 2)
    assert simulated.stages[1].bubble < min(simulated.stages[stage].bubble for stage in (0, 2, 3))


# ---- messages


def test_a_slow_link_shows_as_transfer_and_a_late_sender_as_dependency() -> None:
    plan = with_microbatches(1, LLAMA, "parallel.pp=2")
    quick = simulate(plan, make_costs(plan))
    slow = simulate(plan, make_costs(plan, speed=residual_speed(plan, 0.5), latency=0.25))
    assert (quick.stages[1].dependency, quick.stages[1].transfer) == (1.0, 0.0)
    assert (slow.stages[1].dependency, slow.stages[1].transfer, slow.stages[1].queue) == (1.0, 0.75, 0.0)
    # The first stage's wait: for a forward that comes late by the link, and its own way back.
    assert (slow.stages[0].dependency, slow.stages[0].transfer) == (0.75 + BOTH, 0.75)
    assert slow.step_seconds == quick.step_seconds + 2 * 0.75
    assert slow.links[0, 1].busy_seconds == slow.links[0, 1].exposed_seconds == 0.75


def test_messages_that_share_a_card_take_twice_as_long() -> None:
    """Counted by hand, a residual a second and nothing computed. Stage 1 of three gets F2 and the gradient B0 in
    [2, 4], and sends B0 and F2 on in [4, 6]; alone each would take one second, and the step six."""
    plan = with_microbatches(3, LLAMA, "parallel.pp=3", "model.num_layers=9", "pipeline.receives_ahead=3")
    simulated = simulate(plan, make_costs(plan, {kind: 0.0 for kind in Kind}, residual_speed(plan, 1.0)))
    assert simulated.step_seconds == pytest.approx(8.0)
    assert simulated.links[1, 2].busy_seconds == pytest.approx(4.0)
    assert sum(stage.queue for stage in simulated.stages) > 1.0


def test_a_message_leaves_when_its_receive_is_posted() -> None:
    """The first gradient is ready at 5, when the first of three forwards ends; its receive is posted at 10, ahead of the third."""
    plan = with_microbatches(3, LLAMA, "parallel.pp=2", "pipeline.warmup=3", "pipeline.receives_ahead=1")
    costs = make_costs(plan, {kind: 0.0 for kind in Kind})
    runs = costs.runs | {(0, Kind.FORWARD): (5.0,)}
    back = LinkSpeed(bytes_per_second=residual_speed(plan, 7.0))
    simulated = simulate(plan, replace(costs, runs=runs, links=costs.links | {(1, 0): back}))
    assert simulated.step_seconds == pytest.approx(10 + 3 * 7)
    assert simulated.stages[0].transfer == pytest.approx(2 + 7 + 7)


def test_eager_warmup_hides_what_1f1b_exposes() -> None:
    def exposed(*overrides: str) -> Simulated:
        plan = with_microbatches(16, LLAMA, *overrides)
        return simulate(plan, make_costs(plan, speed=residual_speed(plan, 0.8)))

    plain, eager = exposed(), exposed("pipeline.warmup=7")
    assert eager.step_seconds < plain.step_seconds - 5
    assert eager.step_seconds == pytest.approx((16 + 3) * BOTH + 6 * 0.8)  # one transfer at a time there and back
    assert eager.exposed_seconds < plain.exposed_seconds


def test_bytes_are_the_plans_and_relay_moves_more_than_least() -> None:
    totals = {}
    for policy in ("least", "relay"):
        plan = make_plan(f"depth.policy={policy}", "parallel.pp=8")
        simulated = simulate(plan, make_costs(plan, speed=1e6))
        for stage, num_bytes in enumerate(plan.boundary_bytes):
            for way in ((stage, stage + 1), (stage + 1, stage)):
                assert simulated.links[way].num_bytes == num_bytes * plan.num_microbatches
        totals[policy] = sum(link.num_bytes for link in simulated.links.values())
    assert totals["relay"] > totals["least"]


def test_a_message_takes_time_of_the_host_at_each_end() -> None:
    plan = with_microbatches(1, LLAMA, "parallel.pp=2")
    size = plan.shape.residual_bytes
    moves = {Verb.SEND: MoveCost(seconds=0.5), Verb.AWAIT: MoveCost(seconds_per_byte=0.25 / size)}
    simulated = simulate(plan, replace(make_costs(plan), moves=moves))
    assert [stage.host for stage in simulated.stages] == [0.75, 0.75]
    assert simulated.step_seconds == 2 * BOTH + 2 * 0.75


# ---- the machine


def test_a_burst_passes_at_once_where_the_cards_were_idle() -> None:
    """GPipe of one microbatch: each residual, and each gradient, meets cards that have been idle for a pass."""
    plan = with_microbatches(1, LLAMA)
    link = LinkSpeed(bytes_per_second=residual_speed(plan, 0.4), burst_bytes=plan.shape.residual_bytes / 4)
    costs = make_costs(plan)
    costs = replace(costs, links=dict.fromkeys(costs.links, link))
    assert simulate(plan, costs).step_seconds == pytest.approx(4 * BOTH + 6 * 0.3)


def test_a_burst_is_saved_for_while_the_cards_are_idle() -> None:
    """Two microbatches of no computing: the second residual follows the first at once, when nothing has been saved."""
    plan = with_microbatches(2, LLAMA, "parallel.pp=2", "pipeline.schedule=gpipe")
    speed = residual_speed(plan, 1.0)
    link = LinkSpeed(bytes_per_second=speed, burst_bytes=plan.shape.residual_bytes / 2)
    costs = make_costs(plan, dict.fromkeys(Kind, 0.0))
    step = simulate(plan, replace(costs, links=dict.fromkeys(costs.links, link))).step_seconds
    assert step == pytest.approx(0.5 + 1.0 + 0.5 + 1.0)  # both residuals, then both gradients over idle sides


def test_passes_that_vary_make_steps_longer_than_their_mean() -> None:
    plan = make_plan(LLAMA)
    even = make_costs(plan)
    varied = replace(even, variation=(0.5, 1.5))
    assert simulate(plan, replace(even, variation=(1.0,))) == simulate(plan, even)
    step = simulate(plan, varied).step_seconds
    assert simulate(plan, even).step_seconds * 1.05 < step < simulate(plan, even).step_seconds * 1.5
    assert simulate(plan, varied).step_seconds == step  # the same draws each time
    parts = [stage.total for stage in simulate(plan, varied).stages]
    assert parts == pytest.approx([step] * 4)


def test_stages_share_cores() -> None:
    plan = with_microbatches(12, LLAMA)
    costs = make_costs(plan)
    steps = {cores: simulate(plan, replace(costs, cores=cores)).step_seconds for cores in (None, 4.0, 2.0, 1.0)}
    assert steps[4.0] == steps[None]
    assert steps[1.0] == pytest.approx(4 * 12 * BOTH)  # one core is never idle
    assert 2 * 12 * BOTH < steps[2.0] < 2 * steps[None]
    alone = with_microbatches(1, LLAMA)  # never two at once
    assert simulate(alone, replace(make_costs(alone), cores=1.0)).step_seconds == pytest.approx(4 * BOTH)


def test_the_parts_of_every_stage_add_up_to_the_step() -> None:
    random = Random(0)
    for _ in range(40):
        pp, virtual_stages = random.choice([2, 3, 4]), random.choice([1, 1, 2])
        number = pp * random.randint(1, 4)
        plan = with_microbatches(
            number,
            "model.num_layers=12",
            f"parallel.pp={pp}",
            f"parallel.virtual_stages={virtual_stages}",
            f"pipeline.schedule={random.choice(['1f1b', 'gpipe'])}",
            f"depth.policy={random.choice(['least', 'relay'])}",
            f"depth.pattern={random.choice(['full', 'first:2', 'last:3'])}",
            f"pipeline.receives_ahead={random.choice([1, 2, 5])}",
        )
        costs = replace(
            make_costs(
                plan, speed=plan.shape.residual_bytes / random.choice([0.01, 0.3, 3.0]), latency=random.random()
            ),
            data_seconds=tuple(random.random() for _ in range(pp)),
            end_seconds=tuple(random.random() for _ in range(pp)),
            moves={verb: MoveCost(seconds=0.1 * random.random()) for verb in Verb if random.random() < 0.7},
            cores=random.choice([None, 1.5, 2.0]),
        )
        simulated = simulate(plan, costs)
        work = sum(map(sum, (costs.runs[chunk, kind] for chunk, kind in costs.runs))) * number
        assert sum(stage.compute for stage in simulated.stages) >= work * (1 - 1e-9)
        for stage in simulated.stages:
            assert stage.total == pytest.approx(simulated.step_seconds, rel=1e-9)
            assert min(vars(stage).values()) >= -1e-9
        exposed = sum(stage.exposed for stage in simulated.stages)
        assert exposed == pytest.approx(sum(link.exposed_seconds for link in simulated.links.values()))


@pytest.mark.parametrize(
    "overrides", [(), ("pipeline.warmup=7",), ("parallel.virtual_stages=2",), ("pipeline.schedule=gpipe",), (LLAMA,)]
)
@pytest.mark.parametrize("transfer_seconds", (0.01, 0.2, 1.0))
def test_long_steps_go_on_as_shorter_ones(overrides: tuple[str, ...], transfer_seconds: float) -> None:
    plan = with_microbatches(120, *overrides)
    costs = make_costs(plan, speed=residual_speed(plan, transfer_seconds), latency=0.01)
    whole, long = simulate(plan, costs), simulate_long(plan, costs)
    assert long != whole
    assert long.step_seconds == pytest.approx(whole.step_seconds, rel=0.01)
    for one, other in zip(whole.stages, long.stages):
        assert other.total == pytest.approx(long.step_seconds, rel=1e-9)
        assert other.compute == pytest.approx(one.compute)
        assert other.exposed == pytest.approx(one.exposed, abs=0.02 * whole.step_seconds)
    for way, link in whole.links.items():
        assert long.links[way].num_bytes == link.num_bytes


# ---- costs

RATES = Rates(
    seconds_per_flop={Kind.FORWARD: 1e-9, Kind.BACKWARD: 2e-9},
    seconds_per_routing_flop={Kind.FORWARD: 3e-9, Kind.BACKWARD: 4e-9},
    within_node=LinkSpeed(bytes_per_second=100.0),
    between_nodes=LinkSpeed(bytes_per_second=10.0),
)
AT_ONCE = LinkSpeed(bytes_per_second=inf)
WITHOUT_COLLECTIVES = replace(RATES, within_node=AT_ONCE, between_nodes=AT_ONCE)


def test_runs_take_as_long_as_the_plans_flops() -> None:
    plan = make_plan("parallel.tp=2")
    costs = costs_of(plan, WITHOUT_COLLECTIVES)
    tokens = 64 / 2
    for chunk in plan.chunks:
        flops = chunk.flops
        forward = tokens * ((flops.layers + flops.head) * 1e-9 + flops.routing * 3e-9)
        backward = 2 * tokens * ((flops.layers + flops.head) * 2e-9 + flops.routing * 4e-9)
        assert sum(costs.runs[chunk.chunk, Kind.FORWARD]) == pytest.approx(forward)
        assert sum(costs.runs[chunk.chunk, Kind.BACKWARD]) == pytest.approx(backward)
    again = costs_of(make_plan("parallel.tp=2", "parallel.recompute=layer"), WITHOUT_COLLECTIVES)
    assert again.runs[0, Kind.FORWARD] == costs.runs[0, Kind.FORWARD]
    assert sum(again.runs[0, Kind.BACKWARD]) == pytest.approx(1.5 * sum(costs.runs[0, Kind.BACKWARD]))


def test_a_pass_is_split_at_its_points() -> None:
    """Two layers a stage: the first entry is made after a quarter of the layers, the second after three."""
    plan = make_plan()
    costs = costs_of(plan, RATES)
    chunk = plan.chunks[0]
    until = [operation.until for operation in chunk.operations[Kind.FORWARD] if operation.verb is Verb.RUN]
    whole = sum(costs.runs[0, Kind.FORWARD])
    assert until == [0, 1, "behind"]
    assert [seconds / whole for seconds in costs.runs[0, Kind.FORWARD]] == pytest.approx([0.25, 0.5, 0.25])


def test_the_head_is_at_the_end_of_a_forward_and_the_beginning_of_a_backward() -> None:
    plan, larger = make_plan(), make_plan("model.vocab_size=192")
    more = 64 * plan.chunks[-1].flops.head
    for kind, place, seconds in ((Kind.FORWARD, -1, 1e-9 * more), (Kind.BACKWARD, 0, 2 * 2e-9 * more)):
        runs, longer = costs_of(plan, RATES).runs[3, kind], costs_of(larger, RATES).runs[3, kind]
        added = [other - one for one, other in zip(runs, longer, strict=True)]
        assert len(runs) > 1 and added[place] == pytest.approx(seconds) == pytest.approx(sum(added))


def test_links_within_a_node_are_told_from_those_between() -> None:
    def speeds(*overrides: str, node_size: int) -> list[float]:
        costs = costs_of(make_plan(LLAMA, *overrides), replace(RATES, node_size=node_size))
        return [costs.links[way].bytes_per_second for way in sorted(costs.links) if way[0] < way[1]]

    assert speeds(node_size=8) == [100.0, 100.0, 100.0]
    assert speeds(node_size=2) == [100.0, 10.0, 100.0]
    assert speeds("parallel.tp=2", node_size=2) == [10.0, 10.0, 10.0]
    assert speeds("parallel.tp=2", node_size=4) == [100.0, 10.0, 100.0]
    known = replace(RATES, links={(1, 2): LinkSpeed(bytes_per_second=7.0)})
    assert costs_of(make_plan(LLAMA), known).links[1, 2].bytes_per_second == 7.0
    assert (3, 0) in costs_of(make_plan(LLAMA, "parallel.virtual_stages=2"), RATES).links


def test_tensor_collectives_and_the_end_are_counted_by_their_bytes() -> None:
    plan = make_plan(LLAMA, "parallel.tp=2", "parallel.dp=2", "data.global_batch_size=24")
    bare, priced = costs_of(plan, WITHOUT_COLLECTIVES), costs_of(plan, RATES)
    residual = 64 * 32 * 4
    added = sum(priced.runs[0, Kind.FORWARD]) - sum(bare.runs[0, Kind.FORWARD])
    assert added == pytest.approx(2 * 2 * residual / 100.0)  # two layers, two all-reduces each, of 2 (tp - 1) / tp = 1
    lime = make_plan("parallel.tp=2", "parallel.dp=2", "data.global_batch_size=24")
    more = sum(costs_of(lime, RATES).runs[1, Kind.FORWARD])
    more -= sum(costs_of(lime, WITHOUT_COLLECTIVES).runs[1, Kind.FORWARD])
    assert more == pytest.approx(added + 2 * 2 * 0.5 * lime.shape.entry_bytes / 100.0)
    count = parameter_count(plan, plan.stages[0])
    assert bare.end_seconds[0] == 0 and priced.end_seconds[0] == pytest.approx(4 * count / 100.0)
