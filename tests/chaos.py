"""Chaos: one thing after another happens to a NIC and its ports while frames are under way.

An event is a context manager: entered it happens, left it is taken back, as far as that is for people to do
and not for the product. Numbered frames run to every VM meanwhile, some of them with a wrong VLAN. Judged is:

- at any time: nobody gets another VM's frame, or one of another VLAN, or one twice, or one with a tag;
- within a deadline after every step: nothing is left to do, and a burst to every VM that can be reached
  arrives whole, by the path that its port shows;
- where the product promises it: no frame is lost. Elsewhere losses are counted, not judged.

A run is repeated with its seed, which it prints: ``OFFLOAD_CHAOS_SEED=7``.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from offload.client import Client
from offload.closing import Closing
from offload.errors import OffloadError
from offload.views import PortView
from tests.instance import Instance, config_of, vms_of
from tests.lab import (
    WIRE_MAC,
    Lab,
    Listener,
    Namespace,
    Vm,
    mac_bytes,
    seq_of,
    tag,
    test_frame,
    udp4,
    wait_until,
)

MOVABLE = "web1"
"""The port that ``port add`` made, so that it may be set and removed."""
STRAY = 1 << 40
"""Added to the number of a frame that is nobody's: it has a VM's MAC and a wrong VLAN."""
STRAY_EVERY = 5
"""Each how many frames one such follows."""
OTHER_VID = 20
BURST = 20
FEW = 20
"""Frames to each VM: what runs before, during and after an event, at least."""
PAUSE = 0.005
"""Seconds between two frames to the same VM."""
OF_ANOTHER_VLAN = "is of another VLAN"
TAGS = (b"\x81\x00", b"\x88\xa8")
CANNOT_SEND = (errno.ENETDOWN, errno.ENXIO, errno.ENODEV)

T = TypeVar("T")


def seed() -> int:
    """The one that was asked for, or a new one."""
    return int(os.environ.get("OFFLOAD_CHAOS_SEED") or random.randrange(1_000_000))


def sequence(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    """All of ``items`` in random order, then all of them in another one, without end."""
    while True:
        yield from rng.sample(items, len(items))


def fault(frame: bytes, mac: str, arrived: set[int]) -> str | None:
    """What is wrong with a frame that came to the VM with ``mac``, which got the numbers ``arrived`` before.

    Frames that are not of these tests are nobody's fault.
    """
    number = seq_of(frame)
    if number is None:
        return None
    if frame[:6] != mac_bytes(mac):
        return f"number {number} is for {frame[:6].hex(':')}"
    if number >= STRAY:
        return f"number {number - STRAY} {OF_ANOTHER_VLAN}"
    if frame[12:14] in TAGS:
        return f"number {number} has the tag {frame[12:16].hex()}"
    return f"number {number} came twice" if number in arrived else None


@dataclass(frozen=True)
class Guest:
    """A VM with what is to come to it: frames of VLAN ``vid`` (0: untagged), by ``path`` when all is well."""

    vm: Vm
    vid: int
    path: str

    def frame(self, number: int) -> bytes:
        return _frame(self.vm.mac, number, tag(self.vid) if self.vid else b"")

    def stray(self, number: int) -> bytes:
        """A frame with the VM's MAC that is not of its VLAN."""
        return _frame(self.vm.mac, STRAY + number, b"" if self.vid and number % 2 else tag(OTHER_VID))


def _frame(mac: str, number: int, tags: bytes) -> bytes:
    """Some are of IP, which RSS spreads; the VM's stack drops it, for it is for another host."""
    if number % 3 == 0:
        return test_frame(mac, WIRE_MAC, number, tags=tags)
    payload = test_frame(mac, WIRE_MAC, number)[14:]
    return udp4(mac, WIRE_MAC, "198.51.100.1", f"203.0.113.{1 + number % 200}", payload, tags=tags)


class Ear(Closing):
    """What comes to a VM, on whichever device it has."""

    def __init__(self, guest: Guest) -> None:
        self.mac = guest.vm.mac
        self.arrived: set[int] = set()
        self.faults: list[str] = []
        self._listener = Listener(guest.vm.ns)

    def hear(self) -> set[int]:
        """The numbers that have arrived so far."""
        for _, frame in self._listener.read():
            if wrong := fault(frame, self.mac, self.arrived):
                self.faults.append(wrong)
            elif (number := seq_of(frame)) is not None:
                self.arrived.add(number)
        return self.arrived

    def close(self) -> None:
        self._listener.close()


class Traffic(Closing):
    """Numbered frames from the wire to every guest, till closed. ``sent`` are those that could be sent."""

    def __init__(self, wire: Namespace, device: str, guests: Mapping[str, Guest]) -> None:
        self.sent: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()
        self._device, self._guests = device, guests
        self._sending = threading.Lock()
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._done = self._pool.submit(wire.call, self._run)
        self.wire = wire

    def _run(self) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            while not self._ending.wait(PAUSE):
                with self._sending:
                    for name in self._guests:
                        self._send(sender, name)

    def _send(self, sender: socket.socket, name: str) -> None:
        """Send the guest's next frame. A number whose frame could not be sent is left out."""
        number = self.numbers[name]
        self.numbers[name] += 1
        frames = [self._guests[name].frame(number)]
        if number % STRAY_EVERY == 0:
            frames.insert(0, self._guests[name].stray(number))
        try:
            for frame in frames:
                sender.sendto(frame, (self._device, 0))
        except OSError as error:
            if error.errno not in (*CANNOT_SEND, errno.ENOBUFS):
                raise
            if error.errno in CANNOT_SEND:
                return
        self.sent[name] += 1

    def paused(self) -> AbstractContextManager[object]:
        """Nothing is sent meanwhile but by ``burst``."""
        return self._sending

    def burst(self, name: str) -> set[int]:
        """Send some frames at once, while paused; returns their numbers."""
        first = self.numbers[name]
        self.numbers[name] += BURST
        self.sent[name] += BURST
        numbers = range(first, first + BURST)
        self.wire.send(self._device, [self._guests[name].frame(number) for number in numbers])
        return set(numbers)

    def run_on(self, frames: int = FEW) -> None:
        """Return when this many frames more were tried to each guest."""
        goal = min(self.numbers.values(), default=0) + frames
        wait_until(
            lambda: self._done.done() or min(self.numbers.values(), default=0) >= goal, "frames run", 30
        )
        if self._done.done():
            self._done.result()

    def close(self) -> None:
        self._ending.set()
        self._pool.shutdown()


@dataclass
class Site:
    """A lab with a daemon and guests, by the names of their ports.

    ``patience`` is in seconds. ``lost`` is how many frames were, up to the last ``drain``.
    """

    lab: Lab
    instance: Instance
    guests: Mapping[str, Guest]
    traffic: Traffic
    ears: Mapping[str, Ear]
    patience: float
    lost: int = 0

    def guest(self, rng: random.Random) -> tuple[str, Guest]:
        return rng.choice(list(self.guests.items()))

    def ports(self) -> dict[str, PortView]:
        with self.client() as client:
            return {port.name: port for port in client.ports()}

    def client(self) -> Client:
        return Client(self.instance.paths.socket)

    def add_movable(self) -> None:
        vm = self.guests[MOVABLE].vm
        with self.client() as client:
            client.port_add(MOVABLE, {"switch": "ext0", "device": vm.device, "mac": vm.mac})

    def reconcile(self) -> None:
        """Hand the daemon its config once more."""
        file = self.instance.file
        with self.client() as client:
            client.apply(file.read_text(), str(file))

    def left_to_do(self) -> list[str]:
        """What ``offload plan`` would say."""
        file = self.instance.file
        with self.client() as client:
            changes = client.apply(file.read_text(), str(file), dry_run=True).changes
        return [change.text for change in changes]

    def wired(self) -> bool:
        """Whether the NIC and the other end of its wire have a link."""
        ends = ((self.lab.host, self.lab.nic), (self.lab.wire, self.lab.wire_end))
        shown = (ns.run("ip", "link", "show", device, check=False).stdout for ns, device in ends)
        return all("LOWER_UP" in one for one in shown)

    def settle(self) -> None:
        """Wait till nothing is left to do."""
        left: list[str] = []

        def nothing() -> bool:
            left[:] = self.left_to_do()
            return not left

        self.wait_for(nothing, lambda: f"left to do: {left}")

    def heal(self) -> None:
        """Wait till nothing is left to do and every port is as it was in the beginning."""
        self.settle()
        wrong: list[str] = []

        def well() -> bool:
            found = self.ports()
            wrong[:] = [
                f"{name} is {port.state}, path {port.path}: {port.reason}"
                for name, guest in self.guests.items()
                for port in (found[name],)
                if (port.state, port.path) != ("active", guest.path)
            ]
            return not wrong and self.wired()

        self.wait_for(well, lambda: str(wrong or "no link"))
        self.settle()

    def wait_bridged(self) -> None:
        """Wait till no path is the NIC's any more."""
        paths: dict[str, str] = {}

        def bridged() -> bool:
            paths.update((name, port.path) for name, port in self.ports().items())
            return set(paths.values()) == {"bridge"}

        self.wait_for(bridged, lambda: str(paths))

    def wait_for(self, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        """Like ``wait_until``, but an error of the daemon's is one more reason to wait."""
        end = time.monotonic() + self.patience
        told = ""
        while True:
            try:
                if condition():
                    return
                told = what()
            except OffloadError as error:
                told = str(error)
            assert time.monotonic() < end, f"after {self.patience} s: {told}"
            time.sleep(0.05)

    def check_arrival(self) -> None:
        """A burst to every guest whose port is active arrives whole, by the path that the port shows."""
        with self.traffic.paused():
            if not self.wired():
                return
            self.drain()
            before = self.ports()
            for name, port in before.items():
                if port.state == "active":
                    self._check_burst(name, port)

    def _check_burst(self, name: str, before: PortView) -> None:
        numbers = self.traffic.burst(name)
        ear = self.ears[name]
        try:
            wait_until(lambda: numbers <= ear.hear(), "the burst", 5)
        except AssertionError:
            raise AssertionError(
                f"{len(numbers - ear.arrived)} of {BURST} frames to {name} are lost: {self.ports()[name]}"
            ) from None
        after = self.ports()[name]
        assert after.path == before.path
        carried = Counter(_packets(after))
        carried.subtract(_packets(before))
        assert +carried == {before.path: BURST}, f"{name}, whose path is {before.path}: {carried}"

    def drain(self) -> None:
        """Wait till whatever is under way has arrived; what has not for half a second is lost."""
        quiet, missing = time.monotonic(), self.missing()
        while missing != self.lost and time.monotonic() < quiet + 0.5:
            time.sleep(0.01)
            if (now := self.missing()) != missing:
                quiet, missing = time.monotonic(), now
        self.lost = missing

    def missing(self) -> int:
        """Frames that were sent and have not arrived yet."""
        return sum(self.traffic.sent.values()) - sum(len(ear.hear()) for ear in self.ears.values())

    def check_faults(self, details: str, opened: bool = False) -> None:
        """Nothing was delivered wrongly since the last time, frames of other VLANs aside if ``opened``."""
        told = []
        with self.traffic.paused():
            self.drain()
            for name, ear in self.ears.items():
                told += [f"to {name}: {wrong}" for wrong in ear.faults]
                ear.faults.clear()
        wrong = [one for one in told if not (opened and one.endswith(OF_ANOTHER_VLAN))]
        assert not wrong, f"{details}: {len(wrong)} delivered wrongly: {wrong[:3]}"


@dataclass(frozen=True)
class Event:
    """Something that happens: a context manager that gives details of it, for people.

    ``lossless``: the product promises that no frame is lost. ``cut``: the daemon cannot plan till it is
    over, for its NIC is away. ``untold``: the kernel tells nobody, so that the product puts it right when
    it next has something to do. ``opens``: root has taken off what keeps other VLANs away, so that their
    frames may come to a VM till the product has put it right.
    """

    happen: Callable[[Site, random.Random], AbstractContextManager[str]]
    lossless: bool = False
    cut: bool = False
    untold: bool = False
    opens: bool = False

    @property
    def name(self) -> str:
        return self.happen.__name__.replace("_", " ")


@dataclass
class Tally:
    """What trials of one kind of event came to."""

    trials: int = 0
    lost: int = 0
    seconds: list[float] = field(default_factory=list)


def run(site: Site, events: Sequence[Event], number: int, seconds: float) -> None:
    """Let every event happen once, and go on till so many seconds are over. Prints what was lost when.

    ``number`` is the seed. An AssertionError names it, the event and its place in the sequence.
    """
    print(f"\nOFFLOAD_CHAOS_SEED={number}")
    rng = random.Random(number)
    tallies = {event.name: Tally() for event in events}
    end = time.monotonic() + seconds
    for place, event in enumerate(sequence(events, rng), 1):
        if place > len(events) and time.monotonic() > end:
            break
        try:
            _trial(site, event, rng, tallies[event.name])
        except Exception as error:
            raise AssertionError(f"seed {number}, event {place}, {event.name}: {error}") from error
    for name, tally in tallies.items():
        longest = max(tally.seconds)
        print(f"{name:36} {tally.trials:3} times, {tally.lost:5} frames lost, well again in {longest:4.1f} s")
    print(f"{sum(site.traffic.sent.values())} frames sent, {site.lost} of them lost, none delivered wrongly")


def _trial(site: Site, event: Event, rng: random.Random, tally: Tally) -> None:
    before = site.lost
    site.traffic.run_on()
    with event.happen(site, rng) as details:
        print(f"{event.name}: {details}", flush=True)
        site.traffic.run_on()
        if event.untold:
            site.reconcile()
        if not event.cut:
            site.settle()
            site.check_faults(details, event.opens)
            site.check_arrival()
        site.traffic.run_on()
    began = time.monotonic()
    site.heal()
    tally.seconds.append(time.monotonic() - began)
    site.traffic.run_on()
    site.check_arrival()
    site.check_faults(details)
    lost = site.lost - before
    tally.trials += 1
    tally.lost += lost
    assert not (event.lossless and lost), f"{details}: {lost} frames lost"


def _packets(port: PortView) -> dict[str, int]:
    """What came to a port, by path."""
    return {path: count.packets for path, count in port.counters.rx.items()}


@contextmanager
def site(lab: Lab, vid: int, patience: float) -> Iterator[Site]:
    """A daemon with three guests, to whom frames run. ``vid`` is web2's VLAN, and 0 where it has none."""
    vms = vms_of(lab, 3)
    guests = {
        MOVABLE: Guest(vms[MOVABLE], 0, "queue"),
        "web2": Guest(vms["web2"], vid, "queue"),
        "web3": Guest(vms["web3"], 0, "bridge"),
    }
    config = config_of(lab.nic, {name: vms[name].mac for name in ("web2", "web3")})
    config["ports"]["web3"]["queue"] = "off"
    if vid:
        config["ports"]["web2"]["vlan"] = vid
    with ExitStack() as stack:
        instance = stack.enter_context(Instance(lab.host, config)).start()
        ears = {name: stack.enter_context(Ear(guest)) for name, guest in guests.items()}
        traffic = stack.enter_context(Traffic(lab.wire, lab.wire_end, guests))
        site = Site(lab, instance, guests, traffic, ears, patience)
        site.add_movable()
        wait_until(site.wired, "there is a link", patience)
        instance.hear(*vms.values())
        site.heal()
        with traffic.paused():
            site.drain()  # no event has lost what came before its VM was there
        yield site
