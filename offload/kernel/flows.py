"""Reading what goes to ports, frame by frame and merged, as often as there is something to learn."""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Mapping

from ..delivery import Sample
from ..plan import PortDecision
from .bpf import possible_cpus
from .dataplane import Dataplane
from .links import Links

_ENOUGH = 10_000
"""Frames that a NIC must have received since the last reading; nothing else is looked at till then."""
_SHARE = 0.02
"""How much of its time this may take: with very many ports or CPUs there are fewer readings."""
_COUNTED = {
    "frames": (("direct", "packets"), ("handed", "packets")),
    "octets": (("direct", "bytes"), ("handed", "bytes")),
    "left": (("left", "packets"),),
    "pieces": (("merged_buffers", None),),
}
"""The fields of ``struct port_counters`` that a sample is made of."""


class Flows:
    """Takes samples, each of the time since the one before. Reads only."""

    def __init__(self, plane: Dataplane, links: Links) -> None:
        self._plane = plane
        self._links = links
        layout = plane.layouts["port_counters"]
        self._words = layout.per_cpu_size(1) // 8
        self._row = self._words * possible_cpus()
        places = layout.read(b"".join(struct.pack("=Q", number) for number in range(self._words)))
        self._places = {
            name: [places[field][unit] if unit else places[field] for field, unit in fields]
            for name, fields in _COUNTED.items()
        }
        self._received: dict[str, int] = {}
        self._last: dict[str, list[int]] = {}
        self._not_before = 0.0

    def busy(self, nics: Mapping[str, int]) -> set[str]:
        """The NICs, of ``nics`` with their ifindexes, that have received enough since they were named."""
        if time.monotonic() < self._not_before:
            return set()
        received = {name: self._frames(ifindex) for name, ifindex in nics.items()}
        more = {name: abs(count - self._received.get(name, 0)) for name, count in received.items()}
        busy = {name for name, frames in more.items() if frames >= _ENOUGH}
        self._received |= {name: received[name] for name in busy}
        return busy

    def sample(self, ports: Collection[PortDecision]) -> dict[str, Sample]:
        """Samples by port; none of a port that was not read before."""
        began = time.monotonic()
        last, now = self._last, self._read(ports)
        self._last = last | now
        self._not_before = time.monotonic() + (time.monotonic() - began) / _SHARE
        return {
            name: Sample(*(max(0, after - before) for before, after in zip(last[name], counted, strict=True)))
            for name, counted in now.items()
            if name in last
        }

    def _frames(self, ifindex: int) -> int:
        link = self._links.at(ifindex)
        return link.rx_packets if link else 0

    def _read(self, ports: Collection[PortDecision]) -> dict[str, list[int]]:
        """The fields of a sample as they stand, over all CPUs."""
        raw = self._plane.raw_port_counters(max(port.port_id for port in ports) + 1)
        words = memoryview(raw).cast("Q")
        return {
            port.name: [
                sum(sum(row[place :: self._words]) for place in places) for places in self._places.values()
            ]
            for port in ports
            for row in [words[port.port_id * self._row : (port.port_id + 1) * self._row]]
        }
