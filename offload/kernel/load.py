"""Measuring what each queue takes of its CPU, second by second.

CPU time comes from ``/proc/stat`` and ``/proc/PID/stat`` (proc(5)), in ticks of 10 ms: what is measured
over a second is exact to one or two points. A queue's share is

- of the time of the kernel thread that serves the queues of its NIC on its CPU: as much as its share of the
  frames that came out there;
- of the time that its CPU spent in softirqs, where the NIC's own CPU handed its frames over: as much as its
  share of all frames that programs on NICs saw on that CPU.

What a guest does for its frames is in neither, save on a veth, where the queue's CPU does it.
"""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError
from ..plan import PortDecision
from ..rebalance import Load, Sample
from .abi import Layout
from .bpf import Map, possible_cpus
from .cpus import Ticks, cpu_ticks, part_of
from .dataplane import Dataplane

_HERTZ = os.sysconf("SC_CLK_TCK")
_UTIME = 11
"""Place in /proc/PID/stat behind the name; the time in the kernel follows."""

_ON_NIC_CPU = ("socket", "direct", "left")
_ON_QUEUE_CPU = ("handed", "returned")
"""Fields of ``struct port_counters``: what the CPU of the NIC or of the queue was done with."""


@dataclass(frozen=True)
class _Reading:
    """Everything at one moment.

    ``counters`` are 64-bit words by port, CPU and field; ``missed`` by NIC what it sent to the bridge, by
    CPU and reason. ``threads`` are ticks by NIC and CPU, ``programs`` seconds by NIC.
    """

    at: float
    cpus: Mapping[int, Ticks]
    counters: memoryview
    missed: Mapping[int, memoryview]
    threads: Mapping[tuple[int, int], int]
    programs: Mapping[int, float | None]


class Sampler:
    """Takes samples, each of the time since the one before. Reads only."""

    def __init__(self, plane: Dataplane) -> None:
        self._plane = plane
        self._layout = plane.layouts["port_counters"]
        self._cpus = possible_cpus()
        self._last: _Reading | None = None
        self._pids: dict[tuple[int, int], int] = {}

    def forget(self) -> None:
        """Begin anew: the next reading is the first one."""
        self._last = None

    def sample(self, ports: Collection[PortDecision], nics: Mapping[str, int]) -> dict[str, Sample]:
        """Samples by NIC; none where there is nothing to compare with.

        ``nics`` are ifindexes by name; those without our program are left out. ``ports`` are all that there
        are. Raises ``KernelError`` where the threads that serve queues cannot be seen, as in a container.
        """
        uplinks = self._plane.uplinks()
        queued: dict[str, list[PortDecision]] = {nic: [] for nic, index in nics.items() if index in uplinks}
        for port in ports:
            if port.queue and port.nic in queued:
                queued[port.nic].append(port)
        cpus = cpu_ticks()
        served = {
            (nics[nic], port.queue.cpu)
            for nic, its in queued.items()
            for port in its
            if port.queue and port.queue.cpu in cpus
        }
        now = _Reading(
            at=time.monotonic(),
            cpus=cpus,
            counters=self._counters(max((port.port_id for port in ports), default=-1) + 1),
            missed={ifindex: self._missed(ifindex) for ifindex in uplinks},
            threads=self._threads(served),
            programs={nics[nic]: self._plane.program(nics[nic])[2] for nic in queued},
        )
        last, self._last = self._last, now
        if last is None or len(last.counters) != len(now.counters) or last.missed.keys() != now.missed.keys():
            return {}
        span = _Span(last, now, self._layout, self._cpus)
        return {nic: span.sample(nics[nic], its) for nic, its in queued.items() if nics[nic] in last.programs}

    def _counters(self, ports: int) -> memoryview:
        with Map.pinned(self._plane.pins / "maps" / "port_counters") as counters:
            raw = counters.read_first(ports, self._layout.per_cpu_size(self._cpus)) if ports else b""
        return memoryview(raw).cast("Q")

    def _missed(self, ifindex: int) -> memoryview:
        size = self._plane.layouts["nic_counters"].per_cpu_size(self._cpus)
        raw = self._plane.nic(ifindex).maps["nic_counters"].lookup(bytes(4), size)
        if raw is None:
            raise KernelError("the counters of a NIC are gone")
        return memoryview(raw).cast("Q")

    def _threads(self, served: Collection[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """Ticks of the threads that serve these CPUs of these NICs."""
        maps = {nic: self._plane.nic(nic).maps["cpus"].id() for nic, _ in served}
        ticks = {(nic, cpu): self._ticks(maps[nic], cpu) for nic, cpu in served}
        if None in ticks.values():
            self._pids = dict(_cpumap_threads())
            ticks = {(nic, cpu): self._ticks(maps[nic], cpu) for nic, cpu in served}
        found = {at: number for at, number in ticks.items() if number is not None}
        for _, cpu in ticks.keys() - found.keys():
            raise KernelError(
                f"the kernel thread that serves queues on CPU {cpu} is not to be seen, so that nothing is "
                "known of their load: the daemon needs the host's process ids"
            )
        return found

    def _ticks(self, map_id: int, cpu: int) -> int | None:
        pid = self._pids.get((map_id, cpu))
        stat = _stat(pid) if pid else None
        if stat is None or stat[0] != f"cpumap/{cpu}/map:{map_id}":
            return None  # it has ended, and another may have its number
        return sum(map(int, stat[1][_UTIME : _UTIME + 2]))


class _Span:
    """What was between two readings of the same ports and NICs."""

    def __init__(self, last: _Reading, now: _Reading, layout: Layout, possible: int) -> None:
        self._last, self._now = last, now
        self._seconds = now.at - last.at
        self._place = _places(layout)
        self._width = layout.per_cpu_size(1) // 8
        self._row = self._width * possible
        self._possible = possible
        self._cpus = {cpu: now.cpus[cpu].since(last.cpus[cpu]) for cpu in last.cpus.keys() & now.cpus.keys()}

    def sample(self, nic: int, ports: Collection[PortDecision]) -> Sample:
        """Of a NIC and its ports that have queues."""
        ran = self._last.programs[nic], self._now.programs[nic]
        return Sample(
            began=self._last.at,
            ended=self._now.at,
            busy={cpu: part_of(ticks.busy, ticks.all) for cpu, ticks in self._cpus.items()},
            queues=self._loads(nic, ports),
            program=None if ran[0] is None or ran[1] is None else (ran[1] - ran[0]) / self._seconds,
        )

    def _loads(self, nic: int, ports: Collection[PortDecision]) -> dict[str, Load]:
        cpu_of = {port.name: port.queue.cpu if port.queue else None for port in ports}
        through = {port.name: self._of_port(port.port_id, "packets", *_ON_QUEUE_CPU) for port in ports}
        served: Counter[int | None] = Counter()
        for name, cpu in cpu_of.items():
            served[cpu] += through[name]
        seen = {cpu: self._seen(cpu) for cpu in self._cpus}
        loads = {}
        for port in ports:
            cpu = cpu_of[port.name]
            share = self._thread(nic, cpu) * part_of(through[port.name], served[cpu])
            for on in self._cpus.keys() & ({cpu} if cpu is not None else self._cpus):
                softirq = part_of(self._cpus[on].softirq, self._cpus[on].all)
                share += softirq * part_of(self._direct(port.port_id, on), seen[on])
            delivered = ("socket", "direct", "left", *_ON_QUEUE_CPU)
            loads[port.name] = Load(
                cpu=cpu,
                share=share,
                packets=self._of_port(port.port_id, "packets", *delivered) / self._seconds,
                bytes=self._of_port(port.port_id, "bytes", *delivered) / self._seconds,
            )
        return loads

    def _thread(self, nic: int, cpu: int | None) -> float:
        """How much of a CPU the thread took that serves the NIC's queues there."""
        if cpu is None or (nic, cpu) not in self._last.threads or (nic, cpu) not in self._now.threads:
            return 0.0  # it is the NIC's CPU, or offline, or was so a second ago
        ticks = self._now.threads[nic, cpu] - self._last.threads[nic, cpu]
        return part_of(ticks, self._seconds * _HERTZ)

    def _of_port(self, port_id: int, unit: str, *kinds: str) -> int:
        """Frames or bytes of a port, over all CPUs."""
        first, end = port_id * self._row, (port_id + 1) * self._row
        return sum(self._grown(slice(first + self._place[kind][unit], end, self._width)) for kind in kinds)

    def _direct(self, port_id: int, cpu: int) -> int:
        """Frames of a port that a NIC's CPU handed over itself."""
        first = port_id * self._row + cpu * self._width
        places = (first + self._place[kind]["packets"] for kind in _ON_NIC_CPU)
        return sum(self._grown(slice(place, place + 1)) for place in places)

    def _seen(self, cpu: int) -> int:
        """Frames that programs on NICs saw on a CPU."""
        first = cpu * self._width
        places = (first + self._place[kind]["packets"] for kind in (*_ON_NIC_CPU, "queued"))
        total = sum(self._grown(slice(place, None, self._row)) for place in places)
        for nic, now in self._now.missed.items():
            width = len(now) // self._possible
            packets = slice(cpu * width, (cpu + 1) * width, 2)  # each tally is packets and bytes
            total += sum(now[packets]) - sum(self._last.missed[nic][packets])
        return total

    def _grown(self, where: slice) -> int:
        """How much counters have grown: those of a port that was made anew began at zero."""
        return max(0, sum(self._now.counters[where]) - sum(self._last.counters[where]))


def threads(map_ids: Collection[int], cpu: int | None = None) -> list[int]:
    """Process ids of the threads that serve these cpumaps, on one CPU or on all."""
    return [pid for (map_id, on), pid in _cpumap_threads() if map_id in map_ids and cpu in (None, on)]


def all_asleep(pids: Collection[int]) -> bool:
    """Whether these threads sleep, which they do only over an empty ring. No, where none is seen.

    One that has ended has emptied its ring before.
    """
    return bool(pids) and all((stat := _stat(pid)) is None or stat[1][0] == "S" for pid in pids)


def _cpumap_threads() -> Iterator[tuple[tuple[int, int], int]]:
    """Map id and CPU of every thread that serves a cpumap, and its process id (kernel/bpf/cpumap.c)."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "comm").read_text().strip()
        except OSError:
            continue  # it has ended
        match name.split("/"):
            case ["cpumap", cpu, map_id]:
                yield (int(map_id.removeprefix("map:")), int(cpu)), int(path.name)


def _stat(pid: int) -> tuple[str, list[str]] | None:
    """A process's name and what /proc says behind it, from its state on; ``None`` when it has ended."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return None
    return name.partition("(")[2], rest.split()


def _places(layout: Layout) -> Mapping[str, Any]:
    """At which word of a struct of 64-bit counters each of them stands."""
    return layout.read(b"".join(struct.pack("=Q", number) for number in range(layout.size // 8)))
