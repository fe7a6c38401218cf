"""Reading the counters of everything at one moment, and telling loss from frames under way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..plan import Desired
from ..report import Reading
from .system import System

_UNDER_WAY = 0.05
"""Seconds after which a frame that was sent to a queue's CPU has been dealt with, or lost.

A full ring of 4,096 frames takes a queue's CPU a few milliseconds.
"""


class Meter:
    """Reads counters. Keeps what was found lost, so that the figure never goes back."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._lost: dict[tuple[int, str], int] = {}

    def read(self, desired: Desired) -> Reading:
        """The counters now. Takes 50 ms longer while frames are on their way between CPUs.

        A cpumap's ring tells nobody when it is full. What was sent to it, less what came
        out of it a moment later, is what it lost.
        """
        plane = self._system.dataplane
        names = {decision.port_id: decision.name for decision in desired.ports.values()}
        count = max(names, default=-1) + 1
        first = plane.port_counters(count)
        if any(_missing(row, row) > 0 for row in first):
            time.sleep(_UNDER_WAY)
        second = plane.port_counters(count)
        lost = {}
        for port_id, name in names.items():
            found = max(self._lost.get((port_id, name), 0), _missing(first[port_id], second[port_id]))
            self._lost[port_id, name] = lost[port_id] = found
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


def _missing(sent: Mapping[str, Any], received: Mapping[str, Any]) -> int:
    came_out = received["handed"]["packets"] + received["returned"]["packets"] + received["vlan_queue"]
    return int(sent["queued"]["packets"] - came_out)
