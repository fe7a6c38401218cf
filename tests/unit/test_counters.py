"""Telling lost frames from waiting ones. No privileges: the maps are lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any, cast

import pytest

from offload.config import Config
from offload.kernel import counters, load
from offload.kernel.counters import Meter
from offload.kernel.system import System
from offload.model import PortRecord, PortSlot, StationRow
from offload.plan import RING_SIZE, Desired, PortDecision

NOTHING = Config(version=1)
DESIRED = Desired(
    state={PortSlot(0): PortRecord("web1", 1, 0, 0, 0, 0, 0).as_value()},
    ports={"web1": PortDecision("web1", 0, "active", "queue", "eth1", None, None, False)},
    nic_problems={},
    refusals=(),
)


def row(queued: int, out: int) -> dict[str, Any]:
    tallies = {name: {"packets": 0, "bytes": 0} for name in ("queued", "handed", "returned")}
    tallies["queued"]["packets"], tallies["handed"]["packets"] = queued, out
    return {**tallies, "vlan_queue": 0}


class Maps:
    """Gives the rows one after the other, as dataplane and as links of a system with nothing else."""

    def __init__(
        self, rows: list[dict[str, Any]], stations: Sequence[dict[tuple[int, str, int], StationRow]] = ()
    ) -> None:
        self._rows: Iterator[dict[str, Any]] = iter(rows)
        self._stations = iter(stations)
        self.dataplane = self.links = self

    def port_counters(self, count: int) -> list[dict[str, Any]]:
        return [next(self._rows)] if count else []

    def queue_map_ids(self) -> set[int]:
        return {7}

    def snapshot(self) -> dict[str, Any]:
        return {}

    def networks(self) -> dict[int, Any]:
        return {}

    def functions(self) -> dict[int, Any]:
        return {}

    def stations(self) -> dict[tuple[int, str, int], StationRow]:
        return next(self._stations, {})

    def uplinks(self) -> dict[int, str]:
        return {}


def lost(
    monkeypatch: pytest.MonkeyPatch, *readings: tuple[dict[str, Any], dict[str, Any], bool]
) -> list[int]:
    """What a meter says after each reading: first row, second row, whether the threads slept between."""
    slept = iter([asleep for _, _, asleep in readings])
    monkeypatch.setattr(load, "threads", list)
    monkeypatch.setattr(counters, "_all_slept", lambda _: next(slept))
    meter = Meter(cast(System, Maps([each for first, second, _ in readings for each in (first, second)])))
    return [meter.read(NOTHING, DESIRED).lost[0] for _ in readings]


def test_moves_go_on_when_a_device_comes_anew() -> None:
    here = StationRow(port=0, ifindex=7, state="here", moves=1)
    away = StationRow(port=0, ifindex=7, state="away", moves=2)
    key = (0, "02:15:5d:00:00:01", 0)
    readings: list[dict[tuple[int, str, int], StationRow]] = [{key: here}, {key: away}, {}, {key: away}]
    meter = Meter(cast(System, Maps([row(0, 0)] * 8, readings)))
    assert [meter.read(NOTHING, DESIRED).moves[0] for _ in readings] == [0, 1, 1, 2]


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

    monkeypatch.setattr(load, "threads", list)
    monkeypatch.setattr(counters, "_all_slept", all_slept)
    assert [meter.read(NOTHING, DESIRED).lost[0] for _ in range(2)] == [10, 10]
    assert asked == [[7]]


def test_threads_that_sleep_in_turns_have_all_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each needs to be seen asleep once; one that never sleeps is not waited for without end."""
    seen = {8: [False, True, False], 9: [True, False, False], 10: [False]}
    looks = {pid: chain(asleep, repeat(False)) for pid, asleep in seen.items()}
    monkeypatch.setattr(load, "all_asleep", lambda pids: False not in [next(looks[pid]) for pid in pids])
    assert counters._all_slept([8, 9])
    assert not counters._all_slept([10])


@pytest.mark.parametrize(
    ("later", "expected"),
    [pytest.param(row(100, 60), 40, id="nothing-moves"), pytest.param(row(100, 70), 0, id="frames-come-out")],
)
def test_without_a_view_of_the_threads_a_quiet_while_decides(
    monkeypatch: pytest.MonkeyPatch, later: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr(load, "threads", lambda map_ids: [])
    meter = Meter(cast(System, Maps([row(100, 60), row(100, 60), later, later])))
    assert meter.read(NOTHING, DESIRED).lost[0] == expected
