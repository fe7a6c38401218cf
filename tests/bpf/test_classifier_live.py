"""The filter table while it changes: real frames on one CPU, the writer on another.

A *nomad* is a key that is always in the table, and is displaced again and again: its two buckets
are full of settlers, so that a newcomer to the one drives it to the other. The reader sends the
nomads' frames through the uplink program, always those of the nomad whose turn comes next. Every
one of them must reach its own VM.
"""

from __future__ import annotations

import os
import struct
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from offload.classifier import (
    BUCKET_BITS,
    BUCKET_SLOTS,
    BUCKETS,
    VALUE_BITS,
    Classifier,
    filter_key,
    mix,
    unmix,
)
from offload.kernel.bpf import XDP_FLAGS_DRV_MODE, AttachType, Link, Map, Program, possible_cpus
from offload.kernel.compile import Artifact, compiled_file
from offload.kernel.dataplane import grace_period
from offload.plan import RUNNING
from tests.bpf.loaded import Vmq
from tests.lab import WIRE_MAC, Lab, Vm, mac_bytes, test_frame, wait_until

NOMADS = 1024
VMS = 2
SETTLERS = 9
"""The port of all keys but the nomads': no frame is for it."""
BURST = 200_000
"""Frames that the reader sends at one go. Live frames take some 30 ms to set up."""

_U32 = struct.Struct("=I")


def buckets_of(key: int) -> tuple[int, int]:
    mixed = mix(key)
    return mixed & (BUCKETS - 1), (mixed ^ (mixed >> BUCKET_BITS | 1)) & (BUCKETS - 1)


def key_in(first: int, second: int, number: int) -> int:
    """A key whose buckets are ``first`` and ``second`` (one even, one odd), another for each ``number``."""
    return unmix((number << BUCKET_BITS | first ^ second) << BUCKET_BITS | first)


@dataclass
class Nomad:
    """A key that is displaced ``displaced`` times; its frames belong to VM ``vm``."""

    vm: int
    mac: str
    buckets: tuple[int, int]
    displaced: int = 0


@dataclass
class Arena:
    """A table of nomads and settlers. ``turn`` is the nomad that is being displaced."""

    table: Classifier
    nomads: list[Nomad] = field(default_factory=list)
    turn: memoryview = field(default_factory=lambda: memoryview(array("Q", [0])))

    def __post_init__(self) -> None:
        # Two buckets that are full and stay full: nobody finds room where the nomad is not in the way.
        self._full = (0, 1)
        for number in range(2 * BUCKET_SLOTS):
            self.table.set(key_in(*self._full, number), SETTLERS)
        taken = set(self._full)
        number = 0
        while len(self.nomads) < NOMADS:
            number += 1
            vm = len(self.nomads) % VMS
            nomad = Nomad(vm, f"02:{number.to_bytes(4).hex(':')}:{vm:02x}", (0, 0))
            nomad.buckets = buckets_of(filter_key(nomad.mac, 0))
            if taken.isdisjoint(nomad.buckets):
                taken.update(nomad.buckets)
                self._settle(nomad)
                self.nomads.append(nomad)

    def _settle(self, nomad: Nomad) -> None:
        self.table.set(filter_key(nomad.mac, 0), nomad.vm)
        for bucket in nomad.buckets:
            for number in range(BUCKET_SLOTS - 1):
                self.table.set(self._settler(bucket, number), SETTLERS)

    def _settler(self, bucket: int, number: int) -> int:
        return key_in(bucket, self._full[~bucket & 1], number)

    def stir(self, rounds: int) -> None:
        """In each round a newcomer is inserted, a nomad is displaced by it, and the newcomer is removed."""
        for number in range(rounds):
            self.turn[0] = number
            nomad = self.nomads[number % NOMADS]
            newcomer = self._settler(nomad.buckets[nomad.displaced & 1], BUCKET_SLOTS)
            self.table.set(newcomer, SETTLERS)
            nomad.displaced += 1
            self.table.remove(newcomer)


class Reader:
    """Sends frames to the nomads whose turn it is, on the CPU that plays the NIC's, until told to stop."""

    def __init__(self, vmq: Vmq, arena: Arena, cache: Path) -> None:
        self._vmq = vmq
        self._held = ExitStack()
        self._stop = threading.Event()
        artifact = compiled_file(Path(__file__).with_name("feeder.c"), {"NOMADS": NOMADS}, cache)
        self._maps = {
            name: self._held.enter_context(Map.create(name, spec)) for name, spec in artifact.maps.items()
        }
        spec = artifact.programs["feed"]
        program = Program.load("feed", spec, self._maps, AttachType.XDP, frags=True)
        self._feeder = self._held.enter_context(program)
        self._maps["next"].update(_U32.pack(0), _U32.pack(vmq.uplink.fd))
        for number, nomad in enumerate(arena.nomads):
            self._maps["nomads"].update(_U32.pack(number), mac_bytes(nomad.mac).ljust(8, b"\0"))
        memory = self._maps["turn"].mapped()
        self._held.callback(memory.close)
        arena.turn = memoryview(memory).cast("Q")
        self._held.callback(arena.turn.release)

    @property
    def fed(self) -> dict[int, int]:
        """Frames by the VM that they were for."""
        return counts_by_row(self._maps["fed"])

    def _read(self) -> None:
        frame = test_frame("02:00:00:00:00:00", WIRE_MAC)
        while not self._stop.is_set():
            self._feeder.test_run(frame, repeat=BURST, live=True)

    @contextmanager
    def reading(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(self._vmq.on_cpu, self._read)
            try:
                wait_until(lambda: bool(self.fed), "the first frame")
                yield
            finally:
                self._stop.set()
            done.result()

    def close(self) -> None:
        self._held.close()


def counts_by_row(counters: Map) -> dict[int, int]:
    """The rows of a per-CPU array of 256 numbers that are not zero, summed over CPUs."""
    words = memoryview(counters.read_first(256, 8 * possible_cpus())).cast("Q")
    sums = {row: sum(words[row * possible_cpus() : (row + 1) * possible_cpus()]) for row in range(256)}
    return {row: count for row, count in sums.items() if count}


class Counted(Classifier):
    """The product's writer; counts the keys that it displaces, and the grace periods."""

    displacements = 0
    graces = 0

    def __init__(self, words: memoryview) -> None:
        super().__init__(words, self._wait)

    def _wait(self) -> None:
        self.graces += 1
        grace_period()

    def _displace(self, path: list[int]) -> int:
        self.displacements += len(path) - 1
        return super()._displace(path)


class ClearsFirst(Counted):
    """Wrong: a displaced key is in neither bucket for a moment."""

    def _displace(self, path: list[int]) -> int:
        self.displacements += len(path) - 1
        for source, target in zip(path[-2::-1], path[:0:-1], strict=True):
            word = self._words[source]
            self._words[source] = 0
            self._words[target] = word ^ 1 << VALUE_BITS
        return path[0]


class Sinks:
    """What arrives at each VM, by the VM that it was for. XDP at the VM's end takes every frame."""

    def __init__(self, vms: list[Vm], cache: Path) -> None:
        artifact = compiled_file(Path(__file__).with_name("sink.c"), {}, cache)
        self._held = ExitStack()
        self._maps = [self._sink(vm, artifact) for vm in vms]

    def _sink(self, vm: Vm, artifact: Artifact) -> Map:
        received = self._held.enter_context(Map.create("received", artifact.maps["received"]))
        spec, maps = artifact.programs["sink"], {"received": received}
        program = self._held.enter_context(Program.load("sink", spec, maps, AttachType.XDP, frags=True))
        ifindex = vm.ns.ifindex("eth0")

        def attach() -> Link:
            flags = XDP_FLAGS_DRV_MODE
            return Link.create(program, ifindex, AttachType.XDP, flags=flags, doing="attach the sink")

        self._held.enter_context(vm.ns.call(attach))
        return received

    def received(self) -> list[dict[int, int]]:
        """Per VM: frames by the VM that they were for."""
        return [counts_by_row(received) for received in self._maps]

    def close(self) -> None:
        self._held.close()


@pytest.fixture
def sinks(one_lab: Lab, vmq: Vmq, cache: Path) -> Iterator[Sinks]:
    """Two VMs with ports of their own, and a port for the settlers. Scope: one test."""
    vms = [one_lab.vm(f"live{number}", mac=f"02:15:5d:00:01:{number:02x}") for number in range(VMS)]
    for number, vm in enumerate(vms):
        vmq.set_port(number, one_lab.host.ifindex(vm.device), flags=RUNNING)
    vmq.set_port(SETTLERS, flags=RUNNING)
    sinks = Sinks(vms, cache)
    yield sinks
    sinks.close()
    for vm in vms:
        one_lab.unplug(vm)
        one_lab.delete_namespace(vm.ns)


@pytest.fixture
def writer_cpu(cpus: tuple[int, int]) -> Iterator[int]:
    """The test itself runs on the CPU that is not the NIC's. Scope: one test."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpus[1]})
    yield cpus[1]
    os.sched_setaffinity(0, before)


def packets(vmq: Vmq) -> dict[str, int]:
    """All packet counters that are not zero."""
    return {name: count for name, count in vmq.counts().items() if count and name.endswith(".packets")}


@pytest.mark.usefixtures("writer_cpu")
def test_no_frame_goes_astray(vmq: Vmq, sinks: Sinks, cache: Path) -> None:
    """100,000 insertions, displacements and removals under live frames: none missed, none misdelivered."""
    rounds = 100_000
    table = Counted(vmq.words)
    arena = Arena(table)
    filters = dict(table)
    reader = Reader(vmq, arena, cache)
    with closing(reader):
        with reader.reading():
            arena.stir(rounds)
        fed = reader.fed

    assert packets(vmq) == {f"{vm}.direct.packets": fed[vm] for vm in range(VMS)}
    for vm, received in enumerate(sinks.received()):
        assert set(received) == {vm}
        assert received[vm] > fed[vm] / 2, "most frames did not arrive at all"
    assert table.displacements == rounds
    assert sum(fed.values()) > rounds, "less than a frame for each displacement"
    assert dict(table) == filters
    assert table.graces < rounds / NOMADS + 2, "more than a grace period per turn of all nomads"


@pytest.mark.usefixtures("writer_cpu")
def test_a_writer_that_clears_first_is_caught(vmq: Vmq, sinks: Sinks, cache: Path) -> None:
    """The same with a writer that has the two stores the wrong way round: frames are missed."""
    arena = Arena(ClearsFirst(vmq.words))
    reader = Reader(vmq, arena, cache)
    with closing(reader):
        with reader.reading():
            arena.stir(20_000)
        fed = reader.fed
    counted = packets(vmq)
    assert counted["nic.no_filter.packets"] > 0
    assert sum(counted.values()) == sum(fed.values())
