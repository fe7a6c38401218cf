"""A guest moves between two hosts, each with its controller, under a running TCP session. Needs root.

::

    host:   near, the guest's tap   eth1 ===\
                                             learning switch === client
    other:  far, the guest's tap    eth1 ===/

The guest moves as QEMU moves one: at the destination the tap is there before the guest, at the source
after it; in between the guest stands still; where it runs again it announces itself.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from offload.client import Client
from offload.closing import Closing
from tests.instance import Instance, config_of
from tests.lab import (
    TEST_ETHERTYPE,
    Namespace,
    Session,
    Stream,
    Tap,
    TwoHosts,
    Vm,
    mac_bytes,
    seq_of,
    test_frame,
    wait_until,
)

pytestmark = [pytest.mark.slow]

GUEST = "02:15:5d:00:00:01"
NEAR = "02:15:5d:00:00:11"
FAR = "02:15:5d:00:00:12"
CLIENT = "02:15:5d:00:00:21"
GUEST_ADDRESS = "192.0.2.11"
RATE = 500
"""Frames per second of a stream to the guest."""
STANDSTILL = 0.05
"""Seconds in which the guest runs nowhere."""
STREAMS = struct.pack("!H", TEST_ETHERTYPE)
BROADCAST = b"\xff" * 6
ETH_P_RARP = 0x8035  # include/uapi/linux/if_ether.h


def announcement(mac: str) -> bytes:
    """The frame that QEMU sends for a guest that has moved (``net/announce.c``): RARP, "request reverse"."""
    own = mac_bytes(mac)
    head = struct.pack("!HHHBBH", ETH_P_RARP, 1, 0x0800, 6, 4, 3)
    return (BROADCAST + own + head + own + bytes(4) + own + bytes(4)).ljust(60, b"\0")


class Guest(Closing):
    """A guest whose stack is in ``ns`` and which runs behind one tap at a time, or behind none.

    A thread carries its frames. What comes out of a tap of another host is collected in ``stray``.
    Between the orders of the test the thread is at rest, so that each frame belongs to one side of them.
    """

    def __init__(self, lab: TwoHosts) -> None:
        self.ns = lab.namespace("guest")
        self._stack = Tap(self.ns, "eth0", 1)
        self.ns.ip(f"link set eth0 address {GUEST} up")
        self.ns.ip(f"address add {GUEST_ADDRESS}/24 dev eth0")
        self.stray: dict[Namespace, list[bytes]] = defaultdict(list)
        self._taps: dict[Namespace, Tap] = {}
        self._host: Namespace | None = None
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._carrying = self._pool.submit(self._carry)

    def plug(self, host: Namespace) -> None:
        """Make the tap on a host."""
        with self._at_rest():
            self._taps[host] = Tap(host, "web1", 1)

    def unplug(self, host: Namespace) -> None:
        """Take the tap of a host away."""
        with self._at_rest():
            self._taps.pop(host).close()

    def stop(self) -> None:
        """Stand still."""
        with self._at_rest():
            self._host = None

    def run(self, host: Namespace, first: bytes | None = None) -> None:
        """Run on a host, and send ``first`` before anything else."""
        with self._at_rest():
            self._host = host
            if first:
                self._taps[host].send([first])

    def say(self, frame: bytes) -> None:
        """Send a frame from where it runs."""
        with self._at_rest():
            assert self._host
            self._taps[self._host].send([frame])

    def forget(self) -> None:
        """What came out of the wrong tap so far did not."""
        with self._at_rest():
            self.stray.clear()

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        self._ending.set()
        self._carrying.result()
        self._ending.clear()
        try:
            yield
        finally:
            self._carrying = self._pool.submit(self._carry)

    def _carry(self) -> None:
        while not self._ending.is_set():
            running = [self._stack] if self._host else []  # what it had to say waits while it stands still
            select.select([*self._taps.values(), *running], [], [], 0.01)
            for host, tap in self._taps.items():
                if host is self._host:
                    self._stack.send(tap.take())
                    tap.send(self._stack.take())
                else:
                    self.stray[host] += tap.take()

    def close(self) -> None:
        with self._at_rest():
            for tap in (self._stack, *self._taps.values()):
                tap.close()
            self._taps.clear()
            self._host = None
        self._ending.set()
        self._pool.shutdown()


@contextlib.contextmanager
def echo_server(ns: Namespace, address: str, port: int) -> Iterator[None]:
    """A TCP server for one client, which gets back what it sends. Raises what went wrong."""

    def serve() -> None:
        listener.settimeout(10)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30)
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    with (
        ns.call(lambda: socket.create_server((address, port))) as listener,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        serving = pool.submit(serve)
        yield
        serving.result()


@dataclass(frozen=True)
class Site:
    """Two hosts with a VM and a controller each, and the guest that moves between them."""

    lab: TwoHosts
    guest: Guest
    vms: dict[Namespace, Vm]
    instances: dict[Namespace, Instance]
    queue: str

    def wait_runs(self, host: Namespace) -> None:
        """Wait until a host has heard the guest from its port, and the port has what it asked for."""
        path = "queue" if self.queue == "auto" else "bridge"
        self._wait(host, ("here",), path, {GUEST, self.vms[host].mac})

    def wait_elsewhere(self, host: Namespace) -> None:
        """Wait until the guest does not run on a host, as far as that host knows."""
        self._wait(host, ("expected", "away"), "bridge", {self.vms[host].mac})

    def _wait(self, host: Namespace, states: Sequence[str], path: str, filters: set[str]) -> None:
        def shown() -> bool:
            with Client(self.instances[host].paths.socket) as client:
                port = next(port for port in client.ports() if port.name == "web1")
                (nic,) = client.nics()
                sorted_out = {entry.mac for queue in client.queues() for entry in queue.filters}
            return (
                port.state == "active"
                and [station.state in states for station in port.stations] == [True]
                and port.path == path
                and sorted_out == (filters if self.queue == "auto" else set())
                and nic.filters == len(sorted_out)
            )

        wait_until(shown, f"the guest in {host.name} is {' or '.join(states)}, its path {path}", 20)


@pytest.fixture(params=["kernel", "python"])
def bridge(request: pytest.FixtureRequest) -> str:
    """Every kind of bridge."""
    kind: str = request.param
    return kind


@pytest.fixture(params=["auto", "off"])
def site(request: pytest.FixtureRequest, privilege: None, bridge: str) -> Iterator[Site]:
    """The guest runs on ``host``; its tap on ``other`` is there, too. Scope: one test."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(TwoHosts())
        lab.client.ip(f"link set eth0 address {CLIENT}")
        lab.client.ip("address add 192.0.2.21/24 dev eth0")
        vms = {
            lab.host: lab.vm("near", NEAR, "192.0.2.12/24"),
            lab.other: lab.vm("far", FAR, "192.0.2.13/24", host=lab.other),
        }
        guest = stack.enter_context(Guest(lab))
        instances = {}
        for host, vm in vms.items():
            config = config_of(lab.nic, {"web1": GUEST, vm.device: vm.mac}, queue=request.param)
            config["switches"]["ext0"]["bridge"] = bridge
            instances[host] = stack.enter_context(Instance(host, config)).start()
            instances[host].hear(vm)
            guest.plug(host)
        stack.callback(guest.stop)  # before its taps are set down
        site = Site(lab, guest, vms, instances, request.param)
        for host in vms:
            site.wait_elsewhere(host)
        # Both bridges have passed it on, or a late one would undo what the first move teaches them.
        with contextlib.ExitStack() as ears:
            heard = [ears.enter_context(vm.capture()) for vm in vms.values()]
            guest.run(lab.host, announcement(GUEST))
            for ear in heard:
                ear.wait_for(1, wanted=lambda frame: frame == announcement(GUEST))
        site.wait_runs(lab.host)
        yield site


@contextlib.contextmanager
def streams_to_guest(site: Site) -> Iterator[Mapping[str, Stream]]:
    """The client and a VM on either host send to the guest; by source address."""
    senders = {CLIENT: site.lab.client, **{vm.mac: vm.ns for vm in site.vms.values()}}
    with contextlib.ExitStack() as stack:
        yield {src: stack.enter_context(Stream(ns, "eth0", GUEST, src, RATE)) for src, ns in senders.items()}


def run_on(streams: Mapping[str, Stream], frames: int = 50) -> None:
    for stream in streams.values():
        stream.run_on(frames)


def next_of(streams: Mapping[str, Stream]) -> dict[str, int]:
    """The first number of each stream that is not on its way yet."""
    return {src: stream.sent + 1 for src, stream in streams.items()}


def numbers(frames: list[bytes]) -> dict[str, list[int]]:
    """The numbers of the streams' frames among these, by source address, in order."""
    found: dict[str, list[int]] = {CLIENT: [], NEAR: [], FAR: []}
    for frame in frames:
        number = seq_of(frame) if frame[12:14] == STREAMS and frame[:6] == mac_bytes(GUEST) else None
        if number is not None:
            found[frame[6:12].hex(":")].append(number)
    return {src: sorted(of_src) for src, of_src in found.items()}


def move(
    site: Site, source: Namespace, destination: Namespace, *, announced: bool, device_goes: bool
) -> None:
    """Move the guest, and show where frames go until it runs again and from then on.

    ``announced``: its announcement is the first that it says; otherwise a frame to the client is.
    ``device_goes``: the source's tap goes before the guest runs again; otherwise it stays.
    """
    guest, lab = site.guest, site.lab
    guest.forget()
    site.wait_elsewhere(destination)
    vms = [(vm.ns, "eth0") for vm in site.vms.values()]
    with contextlib.ExitStack() as stack:
        ears = [
            stack.enter_context(ns.capture(device))
            for ns, device in ((source, lab.nic), (lab.client, "eth0"), *vms)
        ]
        seen = stack.enter_context(guest.ns.capture("eth0"))

        def assert_arrived(begin: Mapping[str, int], end: Mapping[str, int]) -> None:
            """Of the frames from ``begin`` on and before ``end`` each has reached the guest, once."""

            def found() -> dict[str, list[int]]:
                heard = numbers(seen.frames())
                return {src: [n for n in heard[src] if begin[src] <= n < end[src]] for src in begin}

            wanted = {src: list(range(begin[src], end[src])) for src in begin}
            with contextlib.suppress(AssertionError):
                wait_until(lambda: found() == wanted, "all arrive")
            assert found() == wanted

        with streams_to_guest(site) as streams:
            run_on(streams)
            begun = next_of(streams)
            run_on(streams)
            # The tap at the destination takes nothing from the guest at the source.
            assert_arrived(begun, {src: stream.sent for src, stream in streams.items()})
            site.wait_elsewhere(destination)

            guest.stop()
            if device_goes:
                guest.unplug(source)
            time.sleep(STANDSTILL)
            if announced:
                guest.run(destination, announcement(GUEST))
            else:
                guest.run(destination, test_frame(CLIENT, GUEST))
                site.wait_runs(destination)
                guest.say(announcement(GUEST))
            for ear in ears:
                ear.wait_for(1, wanted=lambda frame: frame == announcement(GUEST))
            known = next_of(streams)
            run_on(streams)
            site.wait_runs(destination)
            if not device_goes:
                site.wait_elsewhere(source)
            run_on(streams)
        assert_arrived(known, {src: stream.sent for src, stream in streams.items()})
        late = numbers(guest.stray[source])
        assert not [src for src in late if any(number >= known[src] for number in late[src])]


def test_there_and_back(site: Site) -> None:
    """Twice: the tap at the source outlives the guest there; and it goes while the guest stands still."""
    here, there = site.lab.host, site.lab.other
    with (
        echo_server(site.guest.ns, GUEST_ADDRESS, 5201),
        Session(site.lab.client, GUEST_ADDRESS, 5201) as remote,
        echo_server(site.guest.ns, GUEST_ADDRESS, 5202),
        Session(site.vms[here].ns, GUEST_ADDRESS, 5202) as local,
    ):
        for device_goes in (False, True):
            for source, destination in ((here, there), (there, here)):
                move(site, source, destination, announced=source is here, device_goes=device_goes)
                remote.run_on()
                local.run_on()
                if device_goes:
                    site.guest.plug(source)


def test_the_source_lets_go_at_once(site: Site) -> None:
    """Its controller stands still: what hears the announcement is what forwards frames."""
    guest, source, destination = site.guest, site.lab.host, site.lab.other
    near = site.vms[source]
    to_guest = [test_frame(GUEST, NEAR, number) for number in range(20)]
    from_wire = [test_frame(GUEST, CLIENT, number) for number in range(20)]
    with guest.ns.capture("eth0") as seen, near.capture() as ear, stopped(site.instances[source]):
        guest.stop()
        guest.run(destination, announcement(GUEST))
        ear.wait_for(1, wanted=lambda frame: frame == announcement(GUEST))
        # A switch that floods still sends the guest's frames to the source, too.
        site.lab.wire.send(site.lab.wire_end, from_wire)
        near.send(to_guest)
        assert seen.wait_for(len(to_guest), wanted=lambda frame: seq_of(frame) is not None) == to_guest
    site.wait_elsewhere(source)
    guest.stop()
    assert numbers(guest.stray[source]) == numbers([])


@contextlib.contextmanager
def stopped(instance: Instance) -> Iterator[None]:
    """A controller does nothing in this block."""
    assert instance.process
    instance.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        instance.process.send_signal(signal.SIGCONT)
