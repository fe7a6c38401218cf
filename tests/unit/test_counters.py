"""Telling lost frames from waiting ones. No privileges: the maps are lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from offload.kernel import counters
from offload.kernel.counters import Meter
from offload.kernel.system import System
from offload.plan import RING_SIZE, Desired, PortDecision

DESIRED = Desired(
    state={},
    ports={"web1": PortDecision("web1", 0, "active", "queue", "eth1", None, None, False)},
    nic_problems={},
    refusals=(),
)


def row(queued: int, out: int) -> dict[str, Any]:
    tallies = {
        name: {"packets": 0, "bytes": 0} for name in ("direct", "queued", "handed", "returned", "bridged")
    }
    tallies["queued"]["packets"], tallies["handed"]["packets"] = queued, out
    return {**tallies, "vlan_nic": 0, "vlan_queue": 0, "vlan_bridge": 0}


class Maps:
    """Gives the rows one after the other, as dataplane and as links of a system with nothing else."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows: Iterator[dict[str, Any]] = iter(rows)
        self.dataplane = self.links = self

    def port_counters(self, count: int) -> list[dict[str, Any]]:
        return [next(self._rows)] if count else []

    def queue_map_ids(self) -> set[int]:
        return {7}

    def snapshot(self) -> dict[str, Any]:
        return {}

    def uplinks(self) -> dict[int, str]:
        return {}


def lost(
    monkeypatch: pytest.MonkeyPatch, *readings: tuple[dict[str, Any], dict[str, Any], bool]
) -> list[int]:
    """What a meter says after each reading: first row, second row, whether the threads slept between."""
    slept = iter([asleep for _, _, asleep in readings])
    monkeypatch.setattr(counters, "_threads", lambda map_ids: map_ids)
    monkeypatch.setattr(counters, "_all_slept", lambda _: next(slept))
    meter = Meter(cast(System, Maps([each for first, second, _ in readings for each in (first, second)])))
    return [meter.read(DESIRED).lost[0] for _ in readings]


def test_frames_that_came_out_meanwhile_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost(monkeypatch, (row(100, 60), row(140, 100), True)) == [0]


def test_what_has_not_come_out_of_an_empty_ring_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost(monkeypatch, (row(100, 60), row(100, 90), True)) == [10]


def test_a_ring_that_is_not_empty_may_hold_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, more = row(1000, 0), row(RING_SIZE + 30, 0)
    assert lost(monkeypatch, (waiting, waiting, False), (more, more, False)) == [0, 30]


def test_the_figure_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = (row(100, 90), row(100, 90), True), (row(200, 100), row(200, 200), False)
    assert lost(monkeypatch, *readings) == [10, 10]


def test_nothing_new_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = (row(100, 90), row(100, 90), True), (row(100, 90), row(100, 90), False)
    assert lost(monkeypatch, readings[0]) == [10]
    meter = Meter(cast(System, Maps([row(100, 90)] * 4)))
    asked: list[object] = []

    def all_slept(threads: object) -> bool:
        asked.append(threads)
        return True

    monkeypatch.setattr(counters, "_threads", lambda map_ids: map_ids)
    monkeypatch.setattr(counters, "_all_slept", all_slept)
    assert [meter.read(DESIRED).lost[0] for _ in range(2)] == [10, 10]
    assert asked == [{7}]


@pytest.mark.parametrize(
    ("later", "expected"),
    [pytest.param(row(100, 60), 40, id="nothing-moves"), pytest.param(row(100, 70), 0, id="frames-come-out")],
)
def test_without_a_view_of_the_threads_a_quiet_while_decides(
    monkeypatch: pytest.MonkeyPatch, later: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr(counters, "_threads", lambda map_ids: set())
    meter = Meter(cast(System, Maps([row(100, 60), row(100, 60), later, later])))
    assert meter.read(DESIRED).lost[0] == expected
