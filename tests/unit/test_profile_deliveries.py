"""Messages on their way, from channels by hand: order, late receives, cards that two channels share, clocks that err."""

from __future__ import annotations

from random import Random

import pytest

from lime_dist.plan.messages import Cargo, Message
from lime_dist.plan.schedule import Action, Kind
from lime_dist.profiling.deliveries import Channel, Delivery, Received, Sent, deliver

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
    assert one.transfer_behind(3.0) == (0.5 if shared else 1.0)
    assert one.transfer_behind(4.0) == 0.0


def test_three_on_a_card_have_a_third_each() -> None:
    channels = [make_channel((0.0, 0.0, 3.0), ends=(0, receiver)) for receiver in (1, 2, 3)]
    assert [each.transfer_seconds for each in on_links(*channels)] == pytest.approx([1.0, 1.0, 1.0])


def test_messages_that_follow_each_other_at_once_share_nothing() -> None:
    one, two = on_links(make_channel((0.0, 0.0, 4.0)), make_channel((4.0, 0.0, 6.0), ends=(0, 2)))
    assert (one.transfer_seconds, two.transfer_seconds) == (4.0, 2.0)


def test_an_arrival_before_its_handing_over_is_a_clock_that_errs() -> None:
    """It took no time, and does not hold up, nor hurry, the one behind it."""
    one, two = on_links(make_channel((2.0, 0.0, 1.0), (2.5, 0.0, 4.0)))
    assert (one.started, one.arrived, one.transfer_seconds, one.shares) == (2.0, 2.0, 0.0, ())
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
def test_shares_lie_end_to_end_and_sum_to_the_cards(seed: int) -> None:
    """Any number of channels: of each message's time on its link the shares are a partition, and no card carries more than it can."""
    random = Random(seed)
    ends = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0)]
    deliveries = on_links(*(make_channel(*random_times(random), ends=each) for each in ends))
    for delivery in deliveries:
        moments = [delivery.started, *(share.end for share in delivery.shares)]
        assert [share.begin for share in delivery.shares] == moments[:-1]
        assert moments[-1] == delivery.arrived
        assert 0 <= delivery.transfer_seconds <= delivery.arrived - delivery.started + 1e-12
        assert delivery.transfer_behind(delivery.started) == pytest.approx(delivery.transfer_seconds)
    for moment in [random.uniform(0, 20) for _ in range(200)]:
        for side in ("sender", "receiver"):
            load = [0.0, 0.0, 0.0]
            for delivery in deliveries:
                load[getattr(delivery, side)] += sum(
                    share.part for share in delivery.shares if share.begin <= moment < share.end
                )
            assert max(load) <= 1 + 1e-9


def random_times(random: Random) -> list[tuple[float, float, float]]:
    handed, free, times = 0.0, 0.0, []
    for _ in range(random.randrange(1, 8)):
        handed += random.uniform(0, 3)
        posted = random.uniform(0, handed + 1)
        free = max(handed, posted, free) + random.choice([0.0, random.uniform(0, 2)])
        times.append((handed, posted, free))
    return times
