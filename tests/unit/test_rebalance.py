"""What is measured of queues, and when they move because of it. Needs no root."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest

from offload.kernel.abi import Layout
from offload.kernel.cpus import Ticks
from offload.kernel.load import _Reading, _Span
from offload.plan import PortDecision
from offload.queues import Queue
from offload.rebalance import (
    BUSY,
    GAIN,
    NIC_PAUSE,
    QUEUE_PAUSE,
    STREAK,
    TELL_PAUSE,
    Balance,
    Load,
    Move,
    Sample,
    Stuck,
    decide,
)

Queues = Mapping[str, tuple[int | None, float]]
"""CPU and share by port."""


def sample(second: int, busy: Mapping[int, float], queues: Queues) -> Sample:
    loads = {port: Load(cpu, share, 1000.0, 60_000.0) for port, (cpu, share) in queues.items()}
    return Sample(float(second - 1), float(second), busy, loads)


def steady(busy: Mapping[int, float], queues: Queues, seconds: int = STREAK) -> list[Sample]:
    return [sample(second, busy, queues) for second in range(1, seconds + 1)]


def moved(decision: Move | Stuck | None) -> tuple[str, int, int] | None:
    return (decision.port, decision.source, decision.target) if isinstance(decision, Move) else None


TWO = {"web1": (0, 0.30), "web2": (0, 0.45)}
"""Two queues that keep CPU 0 busy."""


@pytest.mark.parametrize(
    ("busy", "queues", "cpus", "wanted"),
    [
        pytest.param({0: 0.8, 1: 0.1}, TWO, [0, 1], ("web1", 0, 1), id="the one that evens the loads out"),
        pytest.param({0: 0.8, 1: 0.1, 2: 0.0}, TWO, [0, 1, 2], ("web2", 0, 2), id="to the idlest CPU"),
        pytest.param({0: BUSY, 1: 0.1}, TWO, [0, 1], None, id="not over the threshold"),
        pytest.param({0: 0.8, 1: 0.1}, {"a": (0, 0.8)}, [0, 1], "stuck", id="it would fill the other CPU"),
        pytest.param({0: 0.8, 1: 0.1}, {"a": (0, 0.09)}, [0, 1], "stuck", id="it would not help enough"),
        pytest.param({0: 0.8, 1: 0.42}, TWO, [0, 1], "stuck", id="the other CPU has no room"),
        pytest.param({0: 0.8, 1: 0.0}, TWO, [0], "stuck", id="not outside queues.cpus"),
        pytest.param({0: 0.8}, TWO, [0, 1], "stuck", id="not to an offline CPU"),
        pytest.param({0: 0.8, 1: 0.0}, {"pin": (0, 0.5)}, [0, 1], "stuck", id="pinned queues stay"),
        pytest.param(
            {0: 0.9, 1: 0.0}, {**TWO, "pin": (0, 0.4)}, [0, 1], ("web2", 0, 1), id="past a pinned one"
        ),
        pytest.param({0: 0.9, 1: 0.0}, {"pin": (None, 0.9)}, [0, 1], None, id="the NIC's CPU is no CPU"),
        pytest.param({0: 0.0, 1: 0.9}, {"web1": (0, 0.2)}, [0, 1], None, id="busy without queues of ours"),
        pytest.param(
            {0: 0.8, 1: 0.95, 2: 0.0},
            {"web1": (0, 0.3), "web2": (1, 0.3)},
            [0, 1, 2],
            ("web2", 1, 2),
            id="off the busiest first",
        ),
        pytest.param(
            {0: 0.95, 1: 0.8, 2: 0.0},
            {"pin": (0, 0.9), "web1": (1, 0.3)},
            [0, 1, 2],
            ("web1", 1, 2),
            id="the second where the busiest is stuck",
        ),
    ],
)
def test_where_a_queue_goes(
    busy: Mapping[int, float],
    queues: Queues,
    cpus: list[int],
    wanted: tuple[str, int, int] | Literal["stuck"] | None,
) -> None:
    decision = decide(steady(busy, queues), cpus, {"pin"}, {}, STREAK)
    assert ("stuck" if isinstance(decision, Stuck) else moved(decision)) == wanted


def test_a_move_tells_what_it_does() -> None:
    decision = decide(
        steady({2: 0.81, 3: 0.07}, {"web1": (2, 0.37), "web2": (2, 0.4)}), [2, 3], (), {}, STREAK
    )
    assert isinstance(decision, Move)
    assert decision.why == "81 % -> 44 % (it took 37 % for 1,000 frames/s, 0 Mbit/s)"


@pytest.mark.parametrize(
    ("why", "cpus", "pinned"),
    [
        ("CPU 0 is 80 % busy and no queue can leave it: all of its queues are pinned", [0, 1], {"a"}),
        (
            "CPU 0 is 80 % busy and no queue can leave it: queues.cpus has no other CPU that is online",
            [0, 7],
            (),
        ),
        (
            "CPU 0 is 80 % busy and no queue can leave it: no move would lower the higher of two loads by "
            "10 points; the queue that takes most, a, takes 75 %",
            [0, 1],
            (),
        ),
    ],
    ids=["pinned", "alone", "in vain"],
)
def test_why_nothing_moves_is_said(why: str, cpus: list[int], pinned: set[str]) -> None:
    decision = decide(steady({0: 0.8, 1: 0.1}, {"a": (0, 0.75)}), cpus, pinned, {}, STREAK)
    assert isinstance(decision, Stuck)
    assert str(decision) == why


# Hysteresis


def test_three_samples_in_a_row_must_say_so() -> None:
    history = steady({0: 0.9, 1: 0.0}, TWO, 6)
    calm = sample(5, {0: 0.6, 1: 0.0}, TWO)
    assert decide(history[:2], [0, 1], (), {}, 2) is None
    assert decide([*history[:4], calm, history[5]], [0, 1], (), {}, 6) is None
    assert moved(decide(history, [0, 1], (), {}, 6))


def test_none_of_them_may_be_missing_or_old() -> None:
    history = steady({0: 0.9, 1: 0.0}, TWO, 5)
    assert decide([history[0], *history[2:4]], [0, 1], (), {}, 4) is None
    assert decide(history, [0, 1], (), {}, 60) is None
    stretched = [replace(each, began=each.began * 60, ended=each.ended * 60) for each in history]
    assert decide(stretched, [0, 1], (), {}, 300) is None


def test_a_queue_that_has_just_come_is_left_alone() -> None:
    """Its first samples say little, and what it took elsewhere nothing."""
    history = steady({0: 0.9, 1: 0.0}, {"web1": (0, 0.4)})
    history[0] = sample(1, {0: 0.9, 1: 0.0}, {"web1": (1, 0.4)})
    assert decide(history, [0, 1], (), {}, STREAK) is None


def test_a_cpu_that_went_away_is_no_target() -> None:
    history = steady({0: 0.9, 1: 0.0}, TWO)
    history[1] = sample(2, {0: 0.9}, TWO)
    assert isinstance(decide(history, [0, 1], (), {}, STREAK), Stuck)


def test_a_nic_and_a_queue_rest_after_a_move() -> None:
    history = [sample(second, {0: 0.9, 1: 0.0}, TWO) for second in range(1, 60)]
    at = {
        second: moved(decide(history[:second], [0, 1], (), {"web2": 10.0}, second))
        for second in range(10, 60)
    }
    assert {second for second in at if at[second] is None} == set(range(10, 10 + int(NIC_PAUSE)))
    by_web2 = {second for second, what in at.items() if what and what[0] == "web2"}
    assert by_web2 == set(range(10 + int(QUEUE_PAUSE), 60))


def test_a_resting_queue_is_no_trouble_to_tell() -> None:
    history = steady({0: 0.9, 1: 0.0}, {"web1": (0, 0.4)})
    assert decide(history, [0, 1], (), {"web1": STREAK - NIC_PAUSE}, STREAK) is None


# Many samples


def test_the_same_trouble_is_told_once_a_minute() -> None:
    balance = Balance()
    told = [
        second
        for second in range(1, 130)
        if balance.judge(sample(second, {0: 0.9, 1: 0.0}, {"a": (0, 0.05)}), [0, 1], ())
    ]
    assert told == [STREAK, STREAK + int(TELL_PAUSE), STREAK + 2 * int(TELL_PAUSE)]


@pytest.mark.parametrize("seed", range(5))
def test_a_load_that_flaps_moves_queues_no_more_than_it_may(seed: int) -> None:
    """Ten minutes in which other work jumps between two CPUs, while four queues follow."""
    chance = random.Random(seed)
    balance, where = Balance(), {"web1": 0, "web2": 0, "web3": 1, "pin": 0}
    share, moves, worst = 0.15, [], 0.0
    extra = dict.fromkeys((0, 1), 0.0)
    for second in range(1, 601):
        if chance.random() < 0.1:
            extra = dict(zip((0, 1), chance.sample([0.0, 0.6], 2), strict=True))
        busy = {cpu: min(1.0, extra[cpu] + share * list(where.values()).count(cpu)) for cpu in (0, 1)}
        queues = {port: (cpu, share) for port, cpu in where.items()}
        match balance.judge(sample(second, busy, queues), [0, 1], {"pin"}):
            case Move() as move:
                assert move.before == pytest.approx(busy[move.source], abs=0.31)
                where[move.port] = move.target
                moves.append((second, move.port))
                worst = max(worst, move.after)
    assert moves, "such a load must move something"
    assert all(later - earlier >= NIC_PAUSE for (earlier, _), (later, _) in pairwise(moves))
    for port in where:
        own = [second for second, which in moves if which == port]
        assert all(later - earlier >= QUEUE_PAUSE for earlier, later in pairwise(own)), port
    assert worst <= 1.0 - GAIN
    assert where["pin"] == 0


# Measuring

TALLY = ["tally", [["packets", "unsigned long long"], ["bytes", "unsigned long long"]], "struct"]
KINDS = ("socket", "direct", "left", "queued", "handed", "returned")
LAYOUT = Layout(
    ["port_counters", [*([kind, TALLY] for kind in KINDS), ["vlan_queue", "unsigned long long"]], "s"]
)
NIC, CPUS = 7, 2


def port(name: str, port_id: int, cpu: int | None) -> PortDecision:
    return PortDecision(name, port_id, "active", "queue", "eth1", Queue(port_id + 1, cpu), None, False)


def reading(
    at: float,
    frames: Mapping[tuple[int, int, str], int],
    cpus: Mapping[int, Ticks],
    threads: Mapping[tuple[int, int], int],
    missed: tuple[int, int] = (0, 0),
) -> _Reading:
    """``frames`` of 100 bytes by port, CPU and counter; ``missed`` by CPU."""
    words = [0] * (3 * CPUS * (LAYOUT.size // 8))
    for (port_id, cpu, kind), packets in frames.items():
        place = (port_id * CPUS + cpu) * (LAYOUT.size // 8) + 2 * KINDS.index(kind)
        words[place : place + 2] = packets, 100 * packets
    to_bridge = [word for packets in missed for word in (packets, 1500 * packets)]
    counters, bridged = (memoryview(array("Q", each)) for each in (words, to_bridge))
    return _Reading(at, cpus, counters, {NIC: bridged}, threads, {NIC: at / 10})


def test_a_queue_takes_its_part_of_a_thread_or_of_the_softirqs() -> None:
    """CPU 0 is the NIC's: 600 frames there, 300 of them are sent on to CPU 1, and 150 go to the bridge."""
    frames = {
        (0, 0, "queued"): 100, (0, 1, "handed"): 90, (0, 1, "returned"): 10,
        (1, 0, "queued"): 200, (1, 1, "handed"): 300,
        (2, 0, "direct"): 100, (2, 0, "left"): 50,
    }  # fmt: skip
    last = reading(10.0, {}, {0: Ticks(5000, 100, 50), 1: Ticks(5000, 0, 0)}, {(NIC, 1): 1000})
    now = reading(
        12.0, frames, {0: Ticks(5200, 220, 130), 1: Ticks(5200, 150, 0)}, {(NIC, 1): 1100}, missed=(150, 9)
    )
    span = _Span(last, now, LAYOUT, CPUS)
    found = span.sample(NIC, [port("web1", 0, 1), port("web2", 1, 1), port("web3", 2, 0)])
    assert (found.began, found.ended, found.busy) == (10.0, 12.0, {0: 0.6, 1: 0.75})
    assert found.program == pytest.approx(0.1)
    assert found.queues == {
        "web1": Load(1, 0.5 * 100 / 400, 50.0, 5000.0),
        "web2": Load(1, 0.5 * 300 / 400, 150.0, 15_000.0),
        "web3": Load(0, 0.4 * 150 / 600, 75.0, 7500.0),
    }
    assert span.sample(NIC, [port("web3", 2, None)]).queues["web3"].share == pytest.approx(0.1)


def test_what_went_backwards_counts_for_nothing() -> None:
    """A port that was made anew counts from zero; a CPU's idle time may be put right; a CPU may go."""
    last = reading(1.0, {(0, 1, "handed"): 500}, {1: Ticks(100, 50, 0), 0: Ticks(1, 1, 1)}, {(NIC, 1): 9})
    now = reading(2.0, {(0, 1, "handed"): 20}, {1: Ticks(200, 49, 0)}, {})
    found = _Span(last, now, LAYOUT, CPUS).sample(NIC, [port("web1", 0, 1)])
    assert found.busy == {1: 0.0}
    assert found.queues == {"web1": Load(1, 0.0, 0.0, 0.0)}
