"""Round trips under load, and beside a neighbour that is flooded. See ``latency.c``.

The prober, who is on the wire, and the VM that answers are processes with real-time priority on CPU 0, so
that they wait for the network and not for each other; the flooder shares that CPU. A queue on a CPU of its
own has CPU 1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.bench.contest import Comparison, Contestant, Figure, Round
from tests.bench.figures import percentile
from tests.bench.frames import GENERATOR_CPU, OTHER_CPU, Frames, StackSink, built
from tests.bench.generator import Generator
from tests.bench.wire import BRIDGE, mirred
from tests.instance import Instance, config_of, shared_cache
from tests.lab import WIRE_MAC, Lab, Namespace, Vm

PROBES, PROBE_RATE = 2000, 5000
"""Probes of a round, and probes per second."""
PATIENCE = 2e8
"""Nanoseconds that the last answer is waited for."""
ECHO_PORT, FLOOD_PORT = 7, 9
SPURT = 100_000
"""Frames between two looks at whether to go on."""
LOAD = 100_000
"""Frames per second beside the probes."""
WIRE_ADDRESS, VM_ADDRESS, FLOODED_ADDRESS, DECOY_ADDRESS = (
    "192.0.2.1",
    "192.0.2.11",
    "192.0.2.12",
    "198.51.100.1",
)
VM_MAC, FLOODED_MAC = "02:15:5d:00:00:01", "02:15:5d:00:00:02"
_REAL_TIME = ("chrt", "--fifo", "10")
_LEVELS = (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))

LATENCIES = tuple(
    Figure(key, label, "us", 1e-3, less_is_better=True)
    for key, label in (("p99", "p99"), ("p50", "p50"), ("p999", "p99.9"))
)
ISOLATION = (
    Figure("p99_growth", "p99", "grew by", less_is_better=True),
    Figure("p50_growth", "p50", "grew by", less_is_better=True),
    Figure("p999_growth", "p99.9", "grew by", less_is_better=True),
    Figure("answered", "answered", "of 1"),
    Figure("flood_per_s", "flood", "Mpps", 1e-6),
    Figure("nic_dropped", "NIC drops", "frames", less_is_better=True),
)


@dataclass(frozen=True)
class Beside:
    """A load: what comes for the VM beside the probes, in frames per second."""

    name: str
    rate: int


@dataclass(frozen=True)
class Neighbours:
    """A load: one VM is flooded with all that a sender can."""

    name: str = "flooded"


Connect = Callable[[ExitStack, Lab, Sequence[Vm]], None]


def bridge(held: ExitStack, lab: Lab, vms: Sequence[Vm]) -> None:
    lab.host.ip("link add br0 type bridge")
    for device in (lab.nic, *(vm.device for vm in vms)):
        lab.host.ip(f"link set {device} master br0")
    lab.host.ip("link set br0 up")
    lab.host.run("ethtool", "-K", lab.nic, "gro", "on")


def ours(cpus: Sequence[int | str], held: ExitStack, lab: Lab, vms: Sequence[Vm]) -> None:
    """A queue for each VM, served by the CPU that is given for it."""
    config = config_of(lab.nic, {vm.device: vm.mac for vm in vms})
    for vm, cpu in zip(vms, cpus, strict=True):
        config["ports"][vm.device]["cpu"] = cpu
    held.enter_context(Instance(lab.host, config)).start(speaking=vms)


def latency(budget: float) -> Comparison[Beside]:
    """Round trips wire, VM, wire."""

    def contestant(name: str, connect: Connect) -> Contestant[Beside]:
        def set_up(held: ExitStack) -> Callable[[Beside], Round]:
            lab, _ = _laboratory(held, connect, {VM_ADDRESS: VM_MAC})

            def run(load: Beside) -> Round:
                with flood(lab.wire, VM_ADDRESS, load.rate) if load.rate else ExitStack():
                    probes = _ping(lab.wire)
                return Round(probes.seconds, further=probes.levels())

            return run

        return Contestant(name, set_up)

    contestants = [
        contestant(BRIDGE, bridge),
        contestant("tc redirect, both ways", _redirected),
        contestant("ours, cpu: nic", partial(ours, ["nic"])),
        contestant(f"ours, queue on CPU {OTHER_CPU}", partial(ours, [OTHER_CPU])),
    ]
    loads = [Beside("idle", 0), Beside(f"{LOAD:,} frames/s beside", LOAD)]
    title = "Round trip wire, VM, wire"
    return Comparison("latency", title, contestants, loads, LATENCIES, {"bridge": BRIDGE}, budget)


def isolation(budget: float) -> Comparison[Neighbours]:
    """A VM whose neighbour is flooded, to the same VM while the flood goes elsewhere.

    The quiet case has the same sender on CPU 0, whose frames end in a namespace of their own; and
    in both cases somebody computes on CPU 1.
    """

    def contestant(name: str, connect: Connect) -> Contestant[Neighbours]:
        def set_up(held: ExitStack) -> Callable[[Neighbours], Round]:
            lab, _ = _laboratory(held, connect, {VM_ADDRESS: VM_MAC, FLOODED_ADDRESS: FLOODED_MAC})
            decoy = _decoy(held, lab)
            to_decoy = Torrent(held, lab.wire, decoy, DECOY_ADDRESS)
            to_neighbour = Torrent(held, lab.wire, lab.wire_end, FLOODED_ADDRESS)

            def run(load: Neighbours) -> Round:
                dropped = _dropped(lab)
                with _burner():
                    with to_decoy.flowing():
                        quiet = _ping(lab.wire)
                    with to_neighbour.flowing():
                        flooded = _ping(lab.wire)
                further = {
                    "answered": len(flooded.ns) / flooded.sent,
                    "answered_quiet": len(quiet.ns) / quiet.sent,
                    "flood_per_s": to_neighbour.rate,
                    "nic_dropped": float(_dropped(lab) - dropped),
                }
                for level, value in flooded.levels().items():
                    further[f"{level}_growth"] = value / quiet.levels()[level]
                    further[level], further[f"{level}_quiet"] = value, quiet.levels()[level]
                return Round(flooded.seconds, further=further)

            return run

        return Contestant(name, set_up)

    contestants = [
        contestant(BRIDGE, bridge),
        contestant(f"ours, the flooded queue on CPU {OTHER_CPU}", partial(ours, ["nic", OTHER_CPU])),
        contestant("ours, both on the NIC's CPU", partial(ours, ["nic", "nic"])),
    ]
    loads = [Neighbours()]
    title = "Round trip of a VM whose neighbour is flooded, to what it is when the flood goes elsewhere"
    return Comparison("isolation", title, contestants, loads, ISOLATION, {"bridge": BRIDGE}, budget)


def _laboratory(held: ExitStack, connect: Connect, addresses: dict[str, str]) -> tuple[Lab, list[Vm]]:
    """VMs by address, with their MACs; the first answers probes, and nobody reads what floods bring."""
    program = built("latency")
    lab = held.enter_context(Lab())
    lab.wire.ip(f"address add {WIRE_ADDRESS}/24 dev {lab.wire_end}")
    vms = []
    for number, (address, mac) in enumerate(addresses.items(), 1):
        vm = lab.vm(f"web{number}", mac, f"{address}/24")
        StackSink(held, vm.ns, address, FLOOD_PORT)
        lab.wire.ip(f"neighbour replace {address} lladdr {mac} dev {lab.wire_end}")
        vms.append(vm)
    connect(held, lab, vms)
    echo = [str(program), "echo", VM_ADDRESS, str(ECHO_PORT)]
    held.enter_context(running(vms[0].ns, [*_REAL_TIME, *echo]))
    return lab, vms


def _redirected(held: ExitStack, lab: Lab, vms: Sequence[Vm]) -> None:
    for source, target in ((lab.nic, vms[0].device), (vms[0].device, lab.nic)):
        mirred(lab, source, target)
    lab.host.run("ethtool", "-K", lab.nic, "gro", "on")


def _decoy(held: ExitStack, lab: Lab) -> str:
    """Another place that a flood can go to from the wire; returns the device that leads there."""
    decoy = lab.namespace("decoy")
    lab.wire.ip(f"link add decoy0 type veth peer name eth0 address {FLOODED_MAC} netns {decoy.name}")
    decoy.run("ethtool", "-K", "eth0", "gro", "on")  # without it a veth takes no frames from the generator
    decoy.ip(f"address add {DECOY_ADDRESS}/24 dev eth0")
    decoy.ip("link set eth0 up")
    lab.wire.ip("address add 198.51.100.2/24 dev decoy0")
    lab.wire.ip("link set decoy0 up")
    StackSink(held, decoy, DECOY_ADDRESS, FLOOD_PORT)
    return "decoy0"


class Torrent:
    """Frames of 64 bytes for a VM, as many as CPU 0 can send. ``rate`` is per second, of the last time."""

    def __init__(self, held: ExitStack, ns: Namespace, device: str, address: str) -> None:
        self._generator = held.enter_context(Generator(shared_cache()))
        self._generator.set_device("outlets", 0, ns, device)
        self._frame = Frames("64 bytes").frame(FLOODED_MAC, WIRE_MAC, address, WIRE_ADDRESS)
        self._ending = threading.Event()
        self.rate = 0.0

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """They come for as long as this is held."""
        self._ending.clear()
        with ThreadPoolExecutor(max_workers=1) as pool:
            done = pool.submit(self._send)
            try:
                yield
            finally:
                self._ending.set()
            done.result()

    def _send(self) -> None:
        os.sched_setaffinity(0, {GENERATOR_CPU})
        began, sent = time.monotonic(), 0
        while not self._ending.is_set():
            self._generator.send(0, 1, SPURT, self._frame)
            sent += SPURT
        self.rate = sent / (time.monotonic() - began)


@dataclass(frozen=True)
class Probes:
    """Round trips that came back, in ns."""

    sent: int
    ns: Sequence[float]
    seconds: float

    def levels(self) -> dict[str, float]:
        ordered = sorted(self.ns) or [PATIENCE]
        return {name: percentile(ordered, share) for name, share in _LEVELS}


def _ping(ns: Namespace) -> Probes:
    words = ["ping", VM_ADDRESS, str(ECHO_PORT), str(PROBE_RATE), str(PROBES)]
    began = time.monotonic()
    done = ns.run("taskset", "-c", str(GENERATOR_CPU), *_REAL_TIME, str(built("latency")), *words)
    told = json.loads(done.stdout)
    return Probes(told["sent"], told["ns"], time.monotonic() - began)


@contextmanager
def flood(ns: Namespace, address: str, rate: int) -> Iterator[list[dict[str, Any]]]:
    """Somebody sends to port 9; what he tells in the end is in the list then."""
    told: list[dict[str, Any]] = []
    words = [str(built("latency")), "flood", address, str(FLOOD_PORT), str(rate)]
    began = time.monotonic()
    with running(ns, words) as process:
        yield told
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        told.append({**json.loads(output), "seconds": time.monotonic() - began})


@contextmanager
def running(ns: Namespace, words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process on CPU 0 that is at work; it is ended if it has not ended."""
    command = ns.argv("setpriv", "--pdeathsig", "KILL", "taskset", "-c", str(GENERATOR_CPU), *words)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stderr
            if "ready" not in (said := process.stderr.readline()):
                raise RuntimeError(f"{' '.join(words)}: {said}{process.stderr.read()}")
            yield process
        finally:
            process.kill()


@contextmanager
def _burner() -> Iterator[None]:
    """Somebody computes on CPU 1."""
    endless = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "taskset",
        "-c",
        str(OTHER_CPU),
        "sh",
        "-c",
        "while :; do :; done",
    ]
    with subprocess.Popen(endless) as process:
        try:
            yield
        finally:
            process.kill()


def _dropped(lab: Lab) -> int:
    """Frames that the NIC dropped before anybody saw them."""
    (link,) = json.loads(lab.host.ip(f"-json -statistics link show {lab.nic}"))
    return int(link["stats64"]["rx"]["dropped"])
