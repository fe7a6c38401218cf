"""Reading the counters of everything at one moment, and telling loss from frames under way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plan import RING_SIZE, Desired
from ..report import Reading
from .system import System

_PATIENCE = 0.05
"""Seconds to wait for the queues' CPUs to be done with what was sent to them."""


class Meter:
    """Reads counters. Keeps what was found lost, so that the figure never goes back."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._lost: dict[tuple[int, str], int] = {}

    def read(self, desired: Desired) -> Reading:
        """The counters now. Takes up to 50 ms longer while frames are on their way between CPUs.

        A cpumap's ring tells nobody when it is full. What was sent to it, less what has come out
        once its thread slept (which it does only over an empty ring), is what it lost. While a
        thread does not sleep, a ring's worth of the difference may still be waiting.
        """
        plane = self._system.dataplane
        names = {decision.port_id: decision.name for decision in desired.ports.values()}
        count = max(names, default=-1) + 1
        first = plane.port_counters(count)
        known = {port_id: self._lost.get((port_id, name), 0) for port_id, name in names.items()}
        waiting = 0
        if any(_missing(first[port_id], first[port_id]) > lost for port_id, lost in known.items()):
            waiting = 0 if self._all_done(count) else RING_SIZE
        second = plane.port_counters(count)
        lost = {
            port_id: max(known[port_id], _missing(first[port_id], second[port_id]) - waiting)
            for port_id in names
        }
        self._lost = {(port_id, name): lost[port_id] for port_id, name in names.items()}
        links = self._system.links.snapshot()
        uplinks = {name: link.ifindex for name, link in links.items() if link.ifindex in plane.uplinks()}
        return Reading(
            links=links,
            ports={port_id: second[port_id] for port_id in names},
            nics={name: plane.nic_counters(ifindex) for name, ifindex in uplinks.items()},
            lost=lost,
            programs={name: plane.program(ifindex) for name, ifindex in uplinks.items()},
            filters={name: len(plane.nic(ifindex).classifier) for name, ifindex in uplinks.items()},
            drivers={name: self._system.driver(name) for name in uplinks},
        )

    def _all_done(self, count: int) -> bool:
        """Whether the queues' CPUs have dealt with everything that was sent to them before this call.

        Where their threads cannot be seen, as in a container, a while without any frame has to do.
        """
        plane = self._system.dataplane
        threads = _threads(plane.queue_map_ids())
        if threads:
            return _all_slept(threads)
        before = plane.port_counters(count)
        time.sleep(_PATIENCE)
        return plane.port_counters(count) == before


def _missing(sent: Mapping[str, Any], received: Mapping[str, Any]) -> int:
    came_out = received["handed"]["packets"] + received["returned"]["packets"] + received["vlan_queue"]
    return int(sent["queued"]["packets"] - came_out)


def _threads(map_ids: set[int]) -> set[Path]:
    """The kernel threads of these cpumaps, ``cpumap/CPU/map:ID`` (kernel/bpf/cpumap.c), below /proc."""
    return {path for path in Path("/proc").glob("[0-9]*") if _map_of(path) in map_ids}


def _all_slept(threads: set[Path]) -> bool:
    """Whether each of these threads is seen asleep at some time from now on, within ``_PATIENCE``."""
    end = time.monotonic() + _PATIENCE
    while True:
        threads = {path for path in threads if not _sleeps(path)}
        if not threads:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(_PATIENCE / 20)


def _map_of(process: Path) -> int | None:
    try:
        name = (process / "comm").read_text()
    except OSError:  # it has ended
        return None
    return int(name.rpartition(":")[2]) if name.startswith("cpumap/") else None


def _sleeps(process: Path) -> bool:
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True  # it has ended, and emptied its ring before
    return state == "S"
