"""The states of a queue, and what is told when they change. Needs no privilege."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from offload.lifecycle import FOUND, KEPT, Key, Life, Standing, standings, state_of
from offload.model import Filter, Resource, SteeringRule, Value
from offload.plan import Desired, PortDecision
from offload.queues import Queue
from offload.views import QueueEvent

WEB1 = PortDecision("web1", 0, "active", "queue", "eth1", Queue(1, 2), None, False)
HARD = replace(WEB1, queue=Queue(1, 2, slot=0), queue_device="eth1v0", queue_standing=True)
NOW = datetime(2024, 5, 17, 12, 30, tzinfo=UTC)
LATER = NOW + timedelta(seconds=5)
KEY: Key = ("eth1", 1)
RUNNING = Standing("web1", "software", "running", 2)
ALLOCATED = replace(RUNNING, state="allocated")
SET = replace(RUNNING, state="set")
PAUSED = replace(RUNNING, state="paused", reason="web1 is down")


@pytest.mark.parametrize(
    ("decision", "fields", "filters", "state"),
    [
        pytest.param(WEB1, {"queue": None, "path": "bridge"}, False, "undefined", id="none"),
        pytest.param(WEB1, {"state": "waiting", "path": "bridge"}, False, "allocated", id="device-away"),
        pytest.param(WEB1, {"path": "bridge"}, False, "allocated", id="not-heard"),
        pytest.param(WEB1, {"state": "failed", "path": "bridge"}, False, "allocated", id="failed"),
        pytest.param(WEB1, {"path": "bridge"}, True, "set", id="cpu-offline"),
        pytest.param(WEB1, {}, True, "running", id="running"),
        pytest.param(WEB1, {"path": "af_xdp"}, True, "running", id="sockets"),
        pytest.param(WEB1, {"state": "paused", "path": "bridge"}, True, "paused", id="down"),
        pytest.param(WEB1, {"state": "paused", "path": "bridge"}, False, "paused", id="down-not-heard"),
        pytest.param(
            HARD,
            {"state": "waiting", "path": "bridge", "queue_standing": False},
            False,
            "allocated",
            id="hardware-device-away",
        ),
        pytest.param(HARD, {"queue_standing": False}, True, "set", id="hardware-not-sorted-there"),
        pytest.param(HARD, {"path": "bridge"}, True, "set", id="hardware-cpu-offline"),
        pytest.param(HARD, {}, True, "running", id="hardware"),
        pytest.param(HARD, {"state": "paused", "path": "bridge"}, True, "paused", id="hardware-down"),
    ],
)
def test_states(decision: PortDecision, fields: Mapping[str, Any], filters: bool, state: str) -> None:
    assert state_of(replace(decision, **fields), filters=filters) == state


def test_every_queue_has_its_own_standing() -> None:
    ports = {
        "web1": WEB1,
        "web2": replace(HARD, name="web2", port_id=1, queue=Queue(2, None, slot=0)),
        "web3": replace(WEB1, name="web3", port_id=2, nic="eth2", path="bridge", reason="not heard yet"),
        "waits": replace(WEB1, name="waits", port_id=3, queue=None, wants_queue=True),
    }
    shares: dict[str, Mapping[Resource, Value]] = {
        "web1": {Filter("eth1", 4, "02:15:5d:00:00:00", 0): 0},
        "web2": {Filter("eth1", 4, "02:15:5d:00:00:01", 0): 1},
        "web3": {SteeringRule("eth2", 5, "02:15:5d:00:00:03", 0): 2},  # an RX queue, and no port's id
        "waits": {},
    }
    state = {resource: value for share in shares.values() for resource, value in share.items()}
    desired = Desired(state, ports, {}, (), shares=shares)
    web2 = {("eth1", 2): Standing("web2", "hardware", "running", None)}
    assert standings(desired) == {
        ("eth1", 1): Standing("web1", "software", "running", 2),
        **web2,
        ("eth2", 1): Standing("web3", "software", "allocated", 2),
    }
    assert standings(desired, {"web2", "waits", "gone"}) == web2


def follow(life: Life, *seen: Mapping[Key, Standing], **why: str) -> list[tuple[str, str, str]]:
    """Port, before and after of all events on the way; ``why`` has reasons by port."""
    return [
        (event.port, event.before, event.after)
        for now in seen
        for event in life.follow(now, LATER, why=why or None)
    ]


@pytest.fixture
def life() -> Life:
    """A life that has seen no queue yet, but has looked."""
    life = Life()
    assert life.follow({}, NOW) == ()
    return life


def test_each_step_that_was_seen_is_told_once(life: Life) -> None:
    states = (ALLOCATED, ALLOCATED, SET, RUNNING, RUNNING, PAUSED, RUNNING, ALLOCATED)
    assert follow(life, *({KEY: standing} for standing in states), {}, {}) == [
        ("web1", "undefined", "allocated"),
        ("web1", "allocated", "set"),
        ("web1", "set", "running"),
        ("web1", "running", "paused"),
        ("web1", "paused", "running"),
        ("web1", "running", "allocated"),
        ("web1", "allocated", "freed"),
    ]


def test_steps_that_nobody_saw_are_not_made_up(life: Life) -> None:
    assert follow(life, {KEY: RUNNING}, {}, {KEY: PAUSED}) == [
        ("web1", "undefined", "running"),
        ("web1", "running", "freed"),
        ("web1", "undefined", "paused"),
    ]


def test_a_queue_of_another_port_is_freed_first(life: Life) -> None:
    """As when a port is renamed, or the waiting one with the highest weight gets what was freed."""
    assert follow(
        life,
        {KEY: RUNNING, ("eth1", 2): replace(RUNNING, port="web2")},
        {KEY: replace(ALLOCATED, port="web3"), ("eth2", 1): replace(RUNNING, port="web2")},
    ) == [
        ("web1", "undefined", "running"),
        ("web2", "undefined", "running"),
        ("web1", "running", "freed"),
        ("web2", "running", "freed"),
        ("web3", "undefined", "allocated"),
        ("web2", "undefined", "running"),
    ]


def only(events: tuple[QueueEvent, ...]) -> QueueEvent:
    (event,) = events
    return event


@pytest.mark.parametrize(
    ("before", "after", "why", "text"),
    [
        pytest.param(
            None, ALLOCATED, None, "web1: software queue 1 of eth1 is allocated, on CPU 2", id="allocated"
        ),
        pytest.param(
            None,
            Standing("web1", "hardware", "running", None),
            None,
            "web1: hardware queue 1 of eth1 is running, on the NIC's CPU",
            id="hardware",
        ),
        pytest.param(
            RUNNING,
            PAUSED,
            None,
            "web1: queue 1 of eth1 is paused, was running: web1 is down",
            id="reason-of-the-port",
        ),
        pytest.param(
            replace(PAUSED),
            replace(RUNNING, reason="another of its addresses is away"),
            None,
            "web1: queue 1 of eth1 is running, was paused",
            id="no-reason-to-run",
        ),
        pytest.param(
            RUNNING,
            replace(RUNNING, cpu=3),
            "81 % -> 44 %",
            "moved web1 from CPU 2 to 3: 81 % -> 44 %",
            id="moved",
        ),
        pytest.param(
            RUNNING, replace(RUNNING, cpu=None), None, "moved web1 from CPU 2 to the NIC's CPU", id="to-nic"
        ),
        pytest.param(
            replace(RUNNING, cpu=None), RUNNING, None, "moved web1 from the NIC's CPU to CPU 2", id="from-nic"
        ),
        pytest.param(
            RUNNING,
            replace(RUNNING, kind="hardware"),
            None,
            "web1: queue 1 of eth1 is a hardware queue now, was a software one",
            id="other-kind",
        ),
        pytest.param(
            PAUSED,
            Standing("web1", "hardware", "running", 1),
            None,
            "web1: queue 1 of eth1 is running, was paused; web1: queue 1 of eth1 is a hardware queue now, "
            "was a software one; moved web1 from CPU 2 to 1",
            id="all-at-once",
        ),
        pytest.param(
            RUNNING, None, "queue: off", "web1: queue 1 of eth1 is freed, was running: queue: off", id="freed"
        ),
    ],
)
def test_an_event_in_plain_words(
    before: Standing | None, after: Standing | None, why: str | None, text: str, life: Life
) -> None:
    life.follow({KEY: before} if before else {}, NOW)
    event = only(life.follow({KEY: after} if after else {}, LATER, {"web1": why} if why else {}))
    assert event.text == text
    assert (event.time, event.nic, event.queue, event.port) == (LATER, "eth1", 1, "web1")
    assert (event.cpu_before, event.cpu) == (before and before.cpu, after and after.cpu)
    assert [event.kind] == [one.kind for one in (after or before,) if one]


def test_a_reason_that_changes_is_no_event(life: Life) -> None:
    life.follow({KEY: PAUSED}, NOW)
    assert life.follow({KEY: replace(PAUSED, reason="the other end of web1 is down")}, LATER) == ()


def test_the_first_look_tells_each_queue_once_and_says_so() -> None:
    """Whether the daemon is new here or was started anew: it has not seen what came before."""
    life = Life()
    events = life.follow({("eth1", 2): replace(PAUSED, port="web2"), KEY: RUNNING}, NOW, {"web1": "other"})
    assert [(event.queue, event.before, event.after, event.why) for event in events] == [
        (1, "undefined", "running", FOUND),
        (2, "undefined", "paused", FOUND),
    ]
    assert life.follow({("eth1", 2): replace(PAUSED, port="web2"), KEY: RUNNING}, LATER) == ()


def test_since_is_when_the_state_began(life: Life) -> None:
    life.follow({KEY: RUNNING}, NOW)
    life.follow({KEY: replace(RUNNING, cpu=3, kind="hardware")}, LATER)
    assert life.since == {KEY: NOW}
    life.follow({KEY: PAUSED}, LATER)
    assert life.since == {KEY: LATER}
    life.follow({KEY: replace(PAUSED, port="web2")}, NOW)
    assert life.since == {KEY: NOW}
    life.follow({}, LATER)
    assert life.since == {}


def test_the_newest_events_are_kept(life: Life) -> None:
    for number in range(KEPT + 5):
        life.follow({KEY: replace(RUNNING, cpu=number)}, NOW)
    assert [event.cpu for event in life.events] == [*range(5, KEPT + 5)]


def test_queues_of_other_ports_are_as_they_were() -> None:
    """Some ports are looked at: one stays, one has another queue, one has none any more, one is new."""
    others = {("eth1", number): replace(RUNNING, port=f"web{number}") for number in range(1, 6)}
    life = Life()
    life.follow(others, NOW)
    seen = {
        ("eth1", 2): replace(RUNNING, port="web2"),
        ("eth1", 7): replace(RUNNING, port="web3"),
        ("eth1", 8): replace(RUNNING, port="web8"),
    }
    events = life.follow(seen, LATER, ports={"web2", "web3", "web4", "web8"})
    assert [(event.port, event.queue, event.after) for event in events] == [
        ("web3", 3, "freed"),
        ("web4", 4, "freed"),
        ("web3", 7, "running"),
        ("web8", 8, "running"),
    ]
    whole = {key: one for key, one in others.items() if key[1] not in (3, 4)} | seen
    assert life.since == {key: LATER if key[1] > 6 else NOW for key in whole}
    assert life.follow(whole, LATER) == ()
