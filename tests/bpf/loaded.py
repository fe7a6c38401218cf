"""The uplink's programs as plain XDP programs, with maps of their own and no pins.

BPF_PROG_TEST_RUN refuses programs that were loaded for a cpumap, so ``queue`` is loaded a second time
as XDP on the same maps: the twin that the tests run.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from offload.classifier import Classifier, filter_key
from offload.closing import Closing
from offload.kernel.abi import Layout
from offload.kernel.bpf import AttachType, Map, MapType, Program, possible_cpus
from offload.kernel.compile import Artifact, compiled
from offload.kernel.dataplane import CPU_OF_NIC, grace_period
from offload.xsk.bound import BoundSocket
from offload.xsk.umem import Umem, UmemShape
from tests.lab import Namespace

MAX_PORTS = 64
DEFINES = {"MAX_PORTS": MAX_PORTS, "MAX_CPUS": 1, "MAX_NIC_QUEUES": 4, "QUEUE_CPUS": 1}
LOOPBACK = 1
"""The ifindex of ``lo`` in every namespace: a device for rows that only need one to be there."""

XDP_DROP, XDP_PASS, XDP_REDIRECT = 1, 2, 4
TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT = 0xFFFFFFFF, 2, 7

_U32 = struct.Struct("=I")
_PAIR = struct.Struct("=II")

T = TypeVar("T")
Counts = dict[str, int]


@dataclass(frozen=True)
class Run:
    """One frame through one program: what was decided, the frame afterwards, and what was counted.

    ``moved`` has every counter of every port and of the NIC that is not what it was:
    ``"3.direct.packets": 1`` for port 3, ``"nic.broadcast.bytes": 60`` for the NIC, ``"function.…"`` for
    the virtual function.
    """

    verdict: int
    frame: bytes
    moved: Counts


class _Objects(Closing):
    """Handles that are let go together."""

    def __init__(self) -> None:
        self._held = ExitStack()

    def close(self) -> None:
        self._held.close()

    def _maps(self, artifact: Artifact, **entries: int) -> dict[str, Map]:
        made: dict[str, Map] = {}
        of_maps = [name for name, spec in artifact.maps.items() if spec.type == MapType.ARRAY_OF_MAPS]
        for name in [*(artifact.maps.keys() - of_maps), *of_maps]:
            like = made["nic_sockets"] if name in of_maps else None
            created = Map.create(name, artifact.maps[name], entries.get(name), like)
            made[name] = self._held.enter_context(created)
        return made

    def _load(
        self, artifact: Artifact, name: str, maps: dict[str, Map], attach: AttachType, frags: bool
    ) -> Program:
        return self._held.enter_context(
            Program.load(name, artifact.programs[name], maps, attach, frags=frags)
        )


class Vmq(_Objects):
    """``vmq.c`` as one NIC has it. Programs run on ``cpu``, in ``ns``, where devices are looked up too."""

    def __init__(self, ns: Namespace, cache: Path, cpu: int) -> None:
        super().__init__()
        self._ns = ns
        self.cpu = cpu
        artifact = compiled("vmq.c", DEFINES, cache)
        self.layouts = {n: Layout(s.value) for n, s in artifact.maps.items() if not isinstance(s.value, str)}
        self.maps = self._maps(artifact, cpus=possible_cpus())
        self.uplink = self._load(artifact, "uplink", self.maps, AttachType.XDP, frags=True)
        self.twin = self._load(artifact, "queue", self.maps, AttachType.XDP, frags=True)
        self.queue = self._load(artifact, "queue", self.maps, AttachType.XDP_CPUMAP, frags=True)
        self.function = self._load(artifact, "function", self.maps, AttachType.XDP, frags=True)
        memory = self.maps["classifier"].mapped()
        self._held.callback(memory.close)
        self.words = memoryview(memory).cast("Q")
        self._held.callback(self.words.release)
        self.classifier = Classifier(self.words, grace_period)

    def set_port(self, port_id: int, ifindex: int = LOOPBACK, **fields: int) -> None:
        """Write a row of the port table and its device. An ``ifindex`` of 0 leaves the device slot empty."""
        row = {"cpu": CPU_OF_NIC, "pvid": 0, "flags": 0, "max_len": 1514, "queue": port_id + 1} | fields
        self.maps["ports"].update(_U32.pack(port_id), self.layouts["ports"].pack(ifindex=ifindex, **row))
        if ifindex:
            devices = self.maps["devices"]
            self._ns.call(lambda: devices.update(_U32.pack(port_id), _PAIR.pack(ifindex, 0)))

    def own_sockets(self, port_id: int) -> None:
        """Let a port have the sockets of the map ``nic_sockets``."""
        self.maps["sockets"].update(_U32.pack(port_id), _U32.pack(self.maps["nic_sockets"].fd))

    def put_socket(self, queue: int) -> None:
        """A socket of ``lo``, whose queue 0 a test run plays, for one of the queues."""
        umem = self._held.enter_context(Umem(UmemShape(frames=64)))
        bound = self._ns.call(lambda: BoundSocket.bind(umem, "lo", copy="copy"))
        self.maps["nic_sockets"].update(_U32.pack(queue), _U32.pack(self._held.enter_context(bound).fileno()))

    def serve(self, cpu: int) -> None:
        """Let ``cpu`` serve queues."""
        self.maps["cpus"].update(_U32.pack(cpu), _PAIR.pack(64, self.queue.fd))

    def let_serve(self, port_id: int, vid: int = 0) -> None:
        """Let the virtual function serve a port."""
        row = self.layouts["served"].pack(port=port_id, vid=vid, unused=0)
        self.maps["served"].update(_U32.pack(0), row)

    def set_filter(self, mac: str, vid: int, port_id: int) -> None:
        self.classifier.set(filter_key(mac, vid), port_id)

    def run(self, program: Program, frame: bytes) -> Run:
        """One frame through ``program``. Once only: a second run would see what the first has stripped."""
        before = self.counts()
        result = self.on_cpu(lambda: program.test_run(frame))
        after = self.counts()
        moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        return Run(result.verdict, result.frame, moved)

    def on_cpu(self, work: Callable[[], T]) -> T:
        """``work()`` in the namespace, on the CPU that plays the NIC's."""

        def body() -> T:
            os.sched_setaffinity(0, {self.cpu})
            return work()

        return self._ns.call(body)

    def counts(self) -> Counts:
        """Every counter by name, as ``Run.moved`` has them."""
        ports = self._totals("port_counters", MAX_PORTS)
        found = {f"{port_id}.{name}": value for port_id in ports for name, value in flat(ports[port_id])}
        for label, name in (("nic", "nic_counters"), ("function", "function_counters")):
            found |= {f"{label}.{row}": value for row, value in flat(self._totals(name, 1)[0])}
        return found

    def _totals(self, name: str, rows: int) -> dict[int, dict[str, Any]]:
        layout = self.layouts[name]
        size = layout.size * possible_cpus()
        raw = self.maps[name].read_first(rows, size)
        return {row: layout.total(raw[row * size : (row + 1) * size]) for row in range(rows)}


def skb(ifindex: int, ingress_ifindex: int, gso_segs: int = 0, gso_size: int = 0) -> bytes:
    """``struct __sk_buff`` of ``include/uapi/linux/bpf.h``, as far as a test run may set it."""
    context = bytearray(192)
    for offset, value in ((36, ingress_ifindex), (40, ifindex), (164, gso_segs), (176, gso_size)):
        struct.pack_into("=I", context, offset, value)
    return bytes(context)


def flat(counters: dict[str, Any]) -> Iterable[tuple[str, int]]:
    """Counters of a ``Layout`` with dots in the names of the nested ones."""
    for name, value in counters.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", number) for inner, number in value.items())
        else:
            yield name, value
