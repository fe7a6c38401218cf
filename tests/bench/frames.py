"""Frames at full speed: what is sent, who counts what arrives, and how a burst is one round.

The generator runs on CPU 0, and so do the device that it sends into and all that follows, except
what has a CPU of its own, which is 1. The generator's own work is part of every figure, and
the same in all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from tests.bench.contest import Round, Unavailable
from tests.bench.cpu import Meter
from tests.bench.generator import Bare, Generator
from tests.instance import shared_cache
from tests.lab import Namespace, tag, udp4

GENERATOR_CPU, OTHER_CPU = 0, 1
BURST = 0.1
"""Seconds that a burst takes, about."""
WARM_UP = 50_000
"""Frames of the first burst, which is not counted, and which the length of the others is set by."""
FCS = 4
PORT = 9
"""The UDP port that frames are for."""
_HEADERS = 14 + 20 + 8  # Ethernet, IPv4, UDP


@dataclass(frozen=True)
class Frames:
    """A load. ``size`` is in bytes on the wire, FCS included and the tag not; ``vid`` ``None``: no tag.

    Destinations are drawn at random, uniformly or ``skewed`` (see ``generator.HOT``). ``refused``: the IP
    header is of no version that there is, so that a stack takes the frame and drops it at once.
    """

    name: str
    size: int = 64
    destinations: int = 1
    skewed: bool = False
    vid: int | None = None
    refused: bool = False

    def frame(self, dst: str, src: str, dst_ip: str, src_ip: str) -> bytes:
        """One such frame: UDP, with correct checksums."""
        tags = b"" if self.vid is None else tag(self.vid)
        made = udp4(dst, src, dst_ip, src_ip, bytes(self.size - FCS - _HEADERS), PORT, PORT, tags)
        at = 14 + len(tags)
        return made[:at] + b"\x05" + made[at + 1 :] if self.refused else made


@dataclass(frozen=True)
class Journey:
    """Who sends to whom."""

    src: str
    src_ip: str
    dst: str
    dst_ip: str


class Sink(Protocol):
    """Counts what arrives."""

    def count(self) -> int: ...


class XdpSink:
    """An XDP program at a device that drops all it gets."""

    def __init__(self, held: ExitStack, ns: Namespace, device: str) -> None:
        self._bare = held.enter_context(Bare(shared_cache()))
        self._bare.attach("sink", ns, device)

    def count(self) -> int:
        return self._bare.sunk()


class StackSink:
    """A protocol stack with a UDP socket that nobody reads: full, it drops. IPv4 packets are counted."""

    def __init__(self, held: ExitStack, ns: Namespace, address: str, port: int = PORT) -> None:
        self._ns = ns

        def bind() -> socket.socket:
            receiver = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the kernel's least
            receiver.bind((address, port))
            return receiver

        ns.call(bind)

    def count(self) -> int:
        text = self._ns.call(lambda: Path("/proc/thread-self/net/snmp").read_text())
        names, values = re.findall(r"^Ip: (.*)$", text, re.MULTILINE)
        return int(dict(zip(names.split(), values.split(), strict=True))["InReceives"])


class ConsumerSink:
    """A process on CPU 1 that takes frames from an AF_XDP socket: ``xsk_consumer.c``."""

    def __init__(self, held: ExitStack, netns: Path, device: str, map_path: str) -> None:
        command = ["taskset", "-c", str(OTHER_CPU), str(built("xsk_consumer")), map_path, device]
        within = ["nsenter", f"--net={netns}", "--", "setpriv", "--pdeathsig", "KILL", "--"]
        pipe = subprocess.PIPE
        self._process = held.enter_context(
            subprocess.Popen([*within, *command], stdout=pipe, stderr=pipe, text=True)
        )
        held.callback(self._process.send_signal, signal.SIGINT)
        assert self._process.stderr
        if "ready" not in (said := self._process.stderr.readline()):
            raise RuntimeError(f"the consumer failed: {said}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def count(self) -> int:
        assert self._process.stdout
        self._process.send_signal(signal.SIGUSR1)
        return int(json.loads(self._process.stdout.readline())["frames"])


class Track:
    """A path that was set up: sends bursts in at one end, ``device``, and has a sink at the other.

    ``spinning`` are processes on it that never sleep. They are stopped while others have their turn.
    """

    def __init__(
        self,
        held: ExitStack,
        ns: Namespace,
        device: str,
        journey: Journey,
        sink: Sink,
        meter: Meter,
        spinning: Sequence[int] = (),
    ) -> None:
        self._generator = held.enter_context(Generator(shared_cache()))
        self._generator.set_device("outlets", 0, ns, device)
        self._journey = journey
        self._sink = sink
        self._meter = meter
        self._spinning = spinning
        self._signal(signal.SIGSTOP)
        self._lengths: dict[Frames, int] = {}

    def __call__(self, load: Frames) -> Round:
        usual = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {GENERATOR_CPU})
        self._signal(signal.SIGCONT)
        try:
            found = self._burst(load, self._lengths.get(load, WARM_UP))
            self._lengths.setdefault(load, max(1, int(WARM_UP * BURST / found.seconds)))
            return found
        finally:
            self._signal(signal.SIGSTOP)
            os.sched_setaffinity(0, usual)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._spinning:
            os.kill(pid, number)

    def _burst(self, load: Frames, frames: int) -> Round:
        journey = self._journey
        frame = load.frame(journey.dst, journey.src, journey.dst_ip, journey.src_ip)
        before, worked = self._sink.count(), self._meter.seconds()
        seconds = self._generator.send(0, load.destinations, frames, frame, load.skewed)
        arrived = self._settled() - before
        used = self._meter.seconds() - worked
        return Round(seconds, used, arrived, arrived * (len(frame) + FCS), frames)

    def _settled(self) -> int:
        """The count when no more come."""
        count = -1
        while count != (now := self._sink.count()):
            count = now
            time.sleep(0.01)
        return count


@cache
def built(name: str) -> Path:
    """A C program of this directory, compiled. Raises ``Unavailable`` without a compiler."""
    if shutil.which("gcc") is None:
        raise Unavailable("gcc is not installed")
    program = shared_cache() / name
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program
