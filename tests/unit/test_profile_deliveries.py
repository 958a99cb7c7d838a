"""Messages on their way, from channels by hand: order, late receives, cards that two channels share, clocks that err."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from lime_dist.plan.messages import Cargo, Message
from lime_dist.plan.schedule import Action, Kind
from lime_dist.profiling.deliveries import Channel, Delivery, Received, Sent, deliver, times_alone, told_apart

MESSAGE = Message(cargo=Cargo.RESIDUAL, from_chunk=0, to_chunk=1, num_bytes=1000, leaves="behind", needed="before")


def make_channel(*times: tuple[float, float, float], ends: tuple[int, int] = (0, 1), needed: float = 0.0) -> Channel:
    """times: handed, posted and arrived of each message."""
    return Channel(
        sender=ends[0],
        receiver=ends[1],
        boundary=0,
        sent=[Sent(message=MESSAGE, ready=handed - 0.5, handed=handed) for handed, _, _ in times],
        received=[
            Received(
                order=10 * ends[0] + place,
                action=Action(Kind.FORWARD, ends[1], place),
                posted=posted,
                arrived=arrived,
                needed=needed,
                taken=max(needed, arrived),
            )
            for place, (_, posted, arrived) in enumerate(times)
        ],
    )


def on_links(*channels: Channel) -> list[Delivery]:
    found = deliver(channels)
    assert found.keys() == {(channel.receiver, each.order) for channel in channels for each in channel.received}
    return list(found.values())


def test_a_message_travels_from_when_it_is_handed_over_and_posted() -> None:
    (punctual,) = on_links(make_channel((2.0, 1.0, 5.0)))
    assert (punctual.started, punctual.arrived, punctual.transfer_seconds) == (2.0, 5.0, 3.0)
    assert (punctual.ready, punctual.handed, punctual.posted, punctual.message) == (1.5, 2.0, 1.0, MESSAGE)
    (late,) = on_links(make_channel((2.0, 4.0, 5.0)))
    assert (late.started, late.transfer_seconds) == (4.0, 1.0)


def test_messages_of_a_channel_go_one_after_another() -> None:
    first, second, third = on_links(make_channel((0.0, 0.0, 4.0), (1.0, 0.0, 6.0), (9.0, 0.0, 10.0)))
    assert [(each.started, each.arrived) for each in (first, second, third)] == [(0.0, 4.0), (4.0, 6.0), (9.0, 10.0)]
    assert second.transfer_seconds == 2.0


def test_a_receive_that_is_posted_late_holds_up_those_behind_it() -> None:
    first, second = on_links(make_channel((0.0, 3.0, 4.0), (0.0, 0.0, 6.0)))
    assert (first.started, second.started) == (3.0, 4.0)


@pytest.mark.parametrize("other", [(1, 2), (0, 2), (2, 1)], ids=["in and out", "both out", "both in"])
def test_messages_that_share_a_side_of_a_card_have_half_of_it_each(other: tuple[int, int]) -> None:
    """Of 0 -> 1 from 0 to 4, and another from 2 to 6. A card sends and receives at once."""
    one, two = on_links(make_channel((0.0, 0.0, 4.0)), make_channel((2.0, 0.0, 6.0), ends=other))
    shared = other != (1, 2)
    assert one.transfer_seconds == (3.0 if shared else 4.0)
    assert two.transfer_seconds == (3.0 if shared else 4.0)
    assert one.transfer_behind(3.0) == (0.75 if shared else 1.0)
    assert one.transfer_behind(4.0) == 0.0


def test_three_on_a_card_have_a_third_each() -> None:
    channels = [make_channel((0.0, 0.0, 3.0), ends=(0, receiver)) for receiver in (1, 2, 3)]
    assert [each.transfer_seconds for each in on_links(*channels)] == pytest.approx([1.0, 1.0, 1.0])


def test_what_a_message_takes_alone_is_told_by_those_that_were() -> None:
    """Three of 2 s, and one that took 5 s, for 2 of which an answer of the other way was on the cards."""
    channel = make_channel((0.0, 0.0, 2.0), (10.0, 0.0, 12.0), (20.0, 0.0, 22.0), (30.0, 0.0, 35.0))
    *quiet, beside, answer = on_links(channel, make_channel((31.0, 0.0, 33.0), ends=(1, 0)))
    assert [one.quiet for one in (*quiet, beside)] == [1.0, 1.0, 1.0, 0.6]
    alone = times_alone([*quiet, beside, answer])
    assert [told_apart(one, alone).transfer_seconds for one in (*quiet, beside)] == [2.0, 2.0, 2.0, 2.0]
    slow = replace(beside, quiet=1.0)
    assert told_apart(slow, alone).transfer_seconds == 5.0  # alone, so that the link itself was slow


def test_messages_that_follow_each_other_at_once_share_nothing() -> None:
    one, two = on_links(make_channel((0.0, 0.0, 4.0)), make_channel((4.0, 0.0, 6.0), ends=(0, 2)))
    assert (one.transfer_seconds, two.transfer_seconds) == (4.0, 2.0)


def test_an_arrival_before_its_handing_over_is_a_clock_that_errs() -> None:
    """It took no time, and does not hold up, nor hurry, the one behind it."""
    one, two = on_links(make_channel((2.0, 0.0, 1.0), (2.5, 0.0, 4.0)))
    assert (one.started, one.arrived, one.transfer_seconds) == (2.0, 2.0, 0.0)
    assert (two.started, two.arrived, two.transfer_seconds) == (2.5, 4.0, 1.5)


@pytest.mark.parametrize(
    ("needed", "exposed"), [(0.0, 3.0), (3.0, 2.0), (6.0, 0.0)], ids=["before it left", "on its way", "behind"]
)
def test_exposed_is_the_wait_once_the_sender_has_done_its_part(needed: float, exposed: float) -> None:
    (delivery,) = on_links(make_channel((2.0, 0.0, 5.0), needed=needed))
    assert delivery.exposed_seconds == exposed


def test_time_in_the_queue_of_a_channel_is_exposed_too() -> None:
    _, second = on_links(make_channel((0.0, 0.0, 4.0), (1.0, 0.0, 6.0)))
    assert second.exposed_seconds == 5.0


@pytest.mark.parametrize("seed", range(20))
def test_no_message_has_more_than_its_time_and_no_card_carries_more_than_it_can(seed: int) -> None:
    random = Random(seed)
    ends = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0)]
    deliveries = on_links(*(make_channel(*random_times(random), ends=each) for each in ends))
    alone = times_alone(deliveries)
    for delivery in (*deliveries, *(told_apart(one, alone) for one in deliveries)):
        assert 0 <= delivery.transfer_seconds <= delivery.link_seconds + 1e-12
        assert 0 <= delivery.quiet <= 1 + 1e-12
        assert delivery.transfer_behind(delivery.started) == pytest.approx(delivery.transfer_seconds)
        assert delivery.transfer_behind(delivery.arrived) == pytest.approx(0)
    for side in ("sender", "receiver"):
        for rank in range(3):
            own = [delivery for delivery in deliveries if getattr(delivery, side) == rank]
            busy = max(one.arrived for one in own) - min(one.started for one in own)
            assert sum(one.transfer_seconds for one in own) <= busy + 1e-9


def random_times(random: Random) -> list[tuple[float, float, float]]:
    handed, free, times = 0.0, 0.0, []
    for _ in range(random.randrange(1, 8)):
        handed += random.uniform(0, 3)
        posted = random.uniform(0, handed + 1)
        free = max(handed, posted, free) + random.choice([0.0, random.uniform(0, 2)])
        times.append((handed, posted, free))
    return times
