"""What the controller takes, by the number of ports: time, memory, CPU.

Ports are veth pairs in one namespace, a thousand to a switch, and a NIC to each switch, for a bridge takes
1,023. All of the VMs have spoken. Times are those of the API, so no command has to start first.
"""

from __future__ import annotations

import socket
import struct
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import JsonValue

from offload.client import Client
from offload.kernel.bpf import Map, possible_cpus
from offload.kernel.dataplane import Dataplane
from tests.bench.cpu import of_process
from tests.bench.figures import Spread, spread
from tests.bench.generator import destination
from tests.bench.probes import flood
from tests.instance import Instance
from tests.lab import WIRE_MAC, Lab, Namespace, test_frame, wait_until

PER_SWITCH = 1000
PATIENCE = 600.0
"""Seconds that one request may take."""
FRAME_RATE = 5000
"""Frames per second from the wire to a port that is being added, and from its VM."""
POLL, REST = 0.0002, 30.0
"""Seconds between looks at a counter, and in which the daemon must come to rest after a change."""
NEW = "new1"
NEW_ADDRESS, WIRE_ADDRESS = "198.51.100.11", "198.51.100.1"
METRICS = "127.0.0.1:9808"
_U32 = struct.Struct("=I")


@dataclass(frozen=True)
class Reading:
    """What ``name`` came to with so many ports, in ``unit``."""

    name: str
    size: int
    unit: str
    spread: Spread


class Estate:
    """A host with so many VMs' devices, and an instance whose config has a port for each or none."""

    def __init__(self, lab: Lab, size: int) -> None:
        self.lab = lab
        self.size = size
        self.vms = lab.namespace("vms")
        self.nics = [lab.nic]
        for number in range(1, -(-size // PER_SWITCH)):
            self.nics.append(f"eth{number + 1}")
            lab.add_nic(self.nics[-1], f"wire{number}", number=number)
        self.new = lab.vm(NEW, destination(size + 1), f"{NEW_ADDRESS}/24")
        with self._batch(lab.host, "ip") as lines:
            for name, mac in self.ports():
                lines(f"link add {name} type veth peer name {name} address {mac} netns {self.vms.name}")
                lines(f"link set {name} up")
        with self._batch(self.vms, "ip") as lines:
            for name, _ in self.ports():
                lines(f"link set {name} up")

    def ports(self) -> Iterator[tuple[str, str]]:
        """Names, which the devices share, and MACs."""
        for number in range(1, self.size + 1):
            yield f"web{number}", destination(number)

    def config(self, *, ports: bool, **of_first: object) -> dict[str, Any]:
        """With all ports or none. ``of_first``: what is different about the first port."""
        config: dict[str, Any] = {
            "version": 1,
            "metrics": {"listen": METRICS},
            "nics": {nic: {} for nic in self.nics},
            "switches": {f"ext{at}": {"type": "external", "uplink": nic} for at, nic in enumerate(self.nics)},
            "ports": {},
        }
        for number, (name, mac) in enumerate(self.ports() if ports else ()):
            config["ports"][name] = {"switch": f"ext{number // PER_SWITCH}", "device": name, "mac": mac}
            if number == 0:
                config["ports"][name] |= of_first
        return config

    def announce(self) -> None:
        """Let every VM be heard."""

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
                for name, mac in self.ports():
                    sender.sendto(test_frame(mac, mac), (name, 0))

        self.vms.call(send)

    def bridge_by_hand(self) -> float:
        """Seconds to put all devices into plain bridges, with an entry for each MAC; undone afterwards."""
        began = time.monotonic()
        with self._batch(self.lab.host, "ip") as lines:
            for at, nic in enumerate(self.nics):
                lines(f"link add br{at} type bridge")
                lines(f"link set {nic} master br{at}")
            for number, (name, _) in enumerate(self.ports()):
                lines(f"link set {name} master br{number // PER_SWITCH}")
        with self._batch(self.lab.host, "bridge") as lines:
            for name, mac in self.ports():
                lines(f"fdb replace {mac} dev {name} master static")
        taken = time.monotonic() - began
        with self._batch(self.lab.host, "ip") as lines:
            for at in range(len(self.nics)):
                lines(f"link delete br{at}")
        return taken

    @contextmanager
    def _batch(self, ns: Namespace, command: str) -> Iterator[Callable[[str], None]]:
        """Lines for ip(8) or bridge(8), run at the end."""
        with tempfile.NamedTemporaryFile("w", suffix=".batch") as batch:
            yield lambda line: print(line, file=batch)
            batch.flush()
            ns.run(command, "-batch", batch.name, timeout=PATIENCE)


def measure(size: int, rounds: int, idle: float, spend: float) -> Iterator[Reading]:
    """Everything, for so many ports, as it is measured.

    ``idle`` is how many seconds the daemon is watched. What can be repeated is, ``rounds`` times at most,
    and not after ``spend`` seconds of it.
    """
    with Lab() as lab:
        estate = Estate(lab, size)

        def reading(name: str, unit: str, values: Sequence[float]) -> Reading:
            return Reading(name, size, unit, spread(values))

        yield reading("the same by hand: bridges, ip -batch", "s", [estate.bridge_by_hand()])
        none, all_of_them = estate.config(ports=False), estate.config(ports=True)
        other = estate.config(ports=True, allow={"dhcp_server": True})
        with (
            _instance(lab, none) as instance,
            Client(instance.paths.socket, PATIENCE) as client,
        ):
            texts = [instance.write(each, "next.yaml").read_text() for each in (none, all_of_them, other)]
            yield reading("apply of all ports", "s", [_timed(lambda: client.apply(texts[1], "config"))])
            instance.file.write_text(texts[1])
            estate.announce()
            macs = [mac for _, mac in estate.ports()]
            _wait_heard(client, macs)
            assert instance.process
            pid = instance.process.pid

            yield reading("memory", "MB", [instance.rss() / 1e6])
            _rest(pid)
            yield reading("CPU, idle", "%", [_share(pid, idle)])
            used = of_process(pid)
            scrapes = [_timed(lambda: _scrape(lab.host)) for _ in _bounded(rounds, spend)]
            yield reading("scrape", "s", scrapes)
            yield reading("CPU of a scrape", "s", [(of_process(pid) - used) / len(scrapes)])
            yield reading("memory after scrapes", "MB", [instance.rss() / 1e6])
            added = list(_additions(estate, instance, client, _bounded(rounds, spend)))
            yield reading("port add to the fast path", "s", [fast for fast, _, _ in added])
            yield reading("port add", "s", [answered for _, answered, _ in added])
            yield reading("one change: port set", "s", [changed for _, _, changed in added])
            applied = [
                _timed(partial(client.apply, texts[1 + at % 2], "config"))
                for at in _bounded(2 * rounds, spend, first=1)
            ]
            yield reading("one change: apply", "s", applied)

            instance.stop()
            yield reading("start, adopting", "s", [_timed(lambda: _start(instance))])
            instance.stop()
            _detach(instance)
            yield reading("start, cold", "s", [_timed(lambda: _start(instance))])


@contextmanager
def _instance(lab: Lab, config: dict[str, Any]) -> Iterator[Instance]:
    """One that runs, and that is given the time that many ports take to be taken out."""
    with Instance(lab.host, config) as instance:
        _start(instance)
        try:
            yield instance
        finally:
            instance.stop()
            _detach(instance)


def _start(instance: Instance) -> None:
    instance.start(ready=False)
    wait_until(instance.ready, "the daemon answers", PATIENCE)


def _detach(instance: Instance) -> None:
    words = (sys.executable, "-m", "offload", "detach", "--all", *instance.options)
    instance.host.run(*words, timeout=PATIENCE)


def _additions(
    estate: Estate, instance: Instance, client: Client, rounds: Iterable[int]
) -> Iterator[tuple[float, float, float]]:
    """Seconds to the first frame on the fast path, to the answer, and of a change to the port afterwards.

    A port is added while its VM speaks and the wire sends to it, and removed.
    """
    lab, new = estate.lab, estate.new
    lab.wire.ip(f"address add {WIRE_ADDRESS}/24 dev {lab.wire_end}")
    lab.wire.ip(f"neighbour replace {NEW_ADDRESS} lladdr {new.mac} dev {lab.wire_end}")
    new.ns.ip(f"neighbour replace {WIRE_ADDRESS} lladdr {WIRE_MAC} dev eth0")
    spec: dict[str, JsonValue] = {"switch": "ext0", "device": NEW, "mac": new.mac}
    looking = Dataplane(instance.paths.objects, instance.paths.cache, keep=False)
    with (
        ExitStack() as held,
        ThreadPoolExecutor(max_workers=1) as pool,
        Map.pinned(instance.paths.objects / "maps" / "port_counters") as counters,
        flood(lab.wire, NEW_ADDRESS, FRAME_RATE),
        flood(new.ns, WIRE_ADDRESS, FRAME_RATE),
    ):
        plane = lab.host.call(lambda: held.enter_context(looking))
        layout = plane.layouts["port_counters"]

        def fast() -> int:
            """Frames that the port got past the bridge."""
            raw = counters.lookup(_U32.pack(row), layout.size * possible_cpus())
            assert raw is not None
            rows = [layout.read(raw[at : at + layout.size]) for at in range(0, len(raw), layout.size)]
            return sum(each[kind]["packets"] for each in rows for kind in ("direct", "queued"))

        client.port_add(NEW, spec)
        row = next(number for number, record in plane.ports().items() if record.name == NEW)
        client.port_remove(NEW)
        for _ in rounds:
            before = fast()
            began = time.monotonic()
            answer = pool.submit(_timed, lambda: client.port_add(NEW, spec))
            while fast() in (0, before):  # a row that is given away anew may begin at 0
                assert time.monotonic() < began + PATIENCE, f"{NEW} does not come to the fast path"
                time.sleep(POLL)
            first, answered = time.monotonic() - began, answer.result()
            changed = _timed(lambda: client.port_set(NEW, {"allow": {"dhcp_server": True}}))
            assert plane.ports()[row].name == NEW
            client.port_remove(NEW)
            yield first, answered, changed


def _wait_heard(client: Client, macs: Sequence[str]) -> None:
    """Until all were heard, and the daemon has done what follows from it."""

    def heard() -> bool:
        ports = client.ports()
        return all(port.path == "queue" for port in ports)

    wait_until(heard, f"{len(macs)} VMs are heard", PATIENCE)


def _bounded(rounds: int, spend: float, first: int = 0) -> Iterator[int]:
    """Numbers of rounds: all, or one and those that begin within ``spend`` seconds."""
    end = time.monotonic() + spend
    for number in range(first, first + rounds):
        if number > first and time.monotonic() > end:
            return
        yield number


def _timed(what: Callable[[], object]) -> float:
    began = time.monotonic()
    what()
    return time.monotonic() - began


def _scrape(ns: Namespace) -> bytes:
    def get() -> bytes:
        with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=PATIENCE) as answer:
            return bytes(answer.read())

    return ns.call(get)


def _rest(pid: int) -> None:
    """Return when a daemon has taken less than a per cent of a CPU for a while, or does not come to rest.

    Between two looks it waits as long as the former took: 5 s with 10,000 ports.
    """
    end = time.monotonic() + REST
    while _share(pid, 6) > 1 and time.monotonic() < end:
        pass


def _share(pid: int, seconds: float) -> float:
    """Per cent of a CPU that a process takes."""
    used = of_process(pid)
    time.sleep(seconds)
    return (of_process(pid) - used) / seconds * 100
