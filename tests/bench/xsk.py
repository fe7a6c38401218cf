"""How fast offload.xsk takes frames of 64 bytes: beside a C program, and a plain AF_PACKET socket.

::

    python -m tests.bench.xsk [--quick] [--json FILE]

CPU 0 is the NIC: it runs the device's XDP program on frames as a driver would (BPF_PROG_TEST_RUN with live
frames; a veth pair before it would cost more than what is measured). The program redirects to
the socket of a process on CPU 1, or passes frames on to the kernel, which gives them to its AF_PACKET socket.
The process drops them, or forwards them out of a veth pair, at whose other end they are counted. The
processes are ``python -m offload.xsk``, ``xsk_consumer.c`` and ``xsk_packet.py``; the first two have the
same rings and batches, and spin as long before they sleep.

A process is started for each burst; the bursts of all take turns, there and back, round after round,
with real-time priority so that others on the machine do not count. A rate is frames taken, by the time
that CPU 0 was at it; ratios are taken within a round; the median over the rounds is shown.

Where nothing is lost, CPU 0 is the limit and not the process. So there is another figure for the two in
Python: how fast frames are taken that wait in the socket already, while nobody sends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

from offload import xsk
from offload.kernel.bpf import F_TEST_XDP_LIVE_FRAMES
from offload.kernel.compile import compiled_file
from offload.xsk import libc
from tests.bench.generator import FRAME, Bare, Objects
from tests.bench.machine import machine, sentence
from tests.lab import ETH_P_ALL, SO_RCVBUFFORCE, Lab, missing_privilege

OF_PACKET, OF_C = 10.0, 0.5
"""Aims: offload.xsk in proportion to AF_PACKET, and to C where frames are dropped."""
NIC_CPU, CONSUMER_CPU = 0, 1
BATCH = 256
WAITING = 2000
"""Frames that wait: fewer than the RX ring has room for."""
WARM_UP = 50_000
"""Frames of the burst that is not counted, and that the length of the others is set by."""
PACKET, C, XSK = "AF_PACKET in Python", "AF_XDP in C", "offload.xsk"
PROGRAMS = (PACKET, C, XSK)
WORKS = ("drop", "forward")
OUT = "out0"
_PROG_TEST_RUN = 10  # include/uapi/linux/bpf.h
_TEST_RUN = struct.Struct("=IIIIQQIIIIQQIIII")
"""That part of union bpf_attr. No output may be asked for with a context and live frames."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Burst:
    """What one burst gave: frames sent, taken by the process, and arrived where they were forwarded to."""

    sent: int
    taken: int
    arrived: int
    seconds: float

    def rate(self, work: str) -> float:
        """Frames per second that were dropped, or that arrived."""
        return (self.taken if work == "drop" else self.arrived) / self.seconds


class Site:
    """One program's laboratory: the device that frames come to, and the one to forward to."""

    def __init__(self, held: ExitStack, program: str, consumer: Path) -> None:
        self.program = program
        self.lab: Lab = held.enter_context(Lab(queues=1))
        self._consumer = consumer
        self._sink = held.enter_context(Bare(consumer.parent))
        end = self.lab.vm(OUT, mac="02:15:5d:00:00:00")
        self._sink.attach("sink", end.ns, "eth0")
        device = compiled_file(Path(__file__).with_name("xsk_device.c"), {}, consumer.parent)
        objects = held.enter_context(Objects(device))
        verdict = "pass" if program == PACKET else "redirect"
        objects.attach(verdict, self.lab.host, self.lab.nic)
        self._nic = objects.programs[verdict].fd
        self._pin = Path("/sys/fs/bpf", self.lab.host.name)
        objects.maps["xsks"].pin(self._pin)
        held.callback(self._pin.unlink)

    def burst(self, work: str, frames: int) -> Burst:
        """Send so many frames to the program while it does its work."""
        argv = ("taskset", "-c", str(CONSUMER_CPU), *self._argv(work))
        process = subprocess.Popen(
            self.lab.host.argv(*argv), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            try:
                assert process.stderr is not None
                if "ready" not in process.stderr.readline():
                    raise RuntimeError(f"{self.program} failed: {process.stderr.read()}")
                before = self._sink.sunk()
                seconds = self.arrive(frames)
            finally:
                process.send_signal(signal.SIGINT)
            taken = json.load(process.stdout)["frames"] if process.stdout else 0
        return Burst(frames, taken, self._sink.sunk() - before, seconds)

    def insert(self, bound: xsk.BoundSocket) -> None:
        """Give the device's frames to this socket."""
        with xsk.XskMap.pinned(self._pin) as xsks:
            xsks.insert(0, bound)

    def arrive(self, frames: int) -> float:
        """Let frames come to the device; returns the seconds it took, as the kernel counts them."""
        came = struct.pack("=IIIIII", 0, len(FRAME), 0, self.lab.host.ifindex(self.lab.nic), 0, 0)
        data, context = (ctypes.create_string_buffer(raw, len(raw)) for raw in (FRAME, came))
        attributes = _TEST_RUN.pack(
            *(self._nic, 0, len(FRAME), 0, ctypes.addressof(data), 0, frames, 0),
            *(len(came), 0, ctypes.addressof(context), 0, F_TEST_XDP_LIVE_FRAMES, 0, 0, 0),
        )
        result = ctypes.create_string_buffer(attributes, len(attributes))
        self.lab.host.call(lambda: libc.bpf(_PROG_TEST_RUN, result))
        nanoseconds: int = _TEST_RUN.unpack(result.raw)[7]
        return nanoseconds * frames / 1e9

    def _argv(self, work: str) -> tuple[str, ...]:
        nic, forwards = self.lab.nic, work == "forward"
        if self.program == PACKET:
            return (sys.executable, "-m", "tests.bench.xsk_packet", nic, *([OUT] if forwards else []))
        if self.program == C:
            return (str(self._consumer), str(self._pin), nic, *([OUT] if forwards else []))
        to = ("--to", OUT) if forwards else ()
        pin = ("--map", str(self._pin), "--index", "0")
        return (sys.executable, "-m", "offload.xsk", work, "--device", nic, *pin, "--json", *to)


@dataclass(frozen=True)
class Contest:
    """One program doing one work."""

    site: Site
    work: str
    bursts: list[Burst] = field(default_factory=list)

    def rates(self) -> list[float]:
        return [burst.rate(self.work) for burst in self.bursts]


@dataclass(frozen=True)
class Result:
    """Medians over the rounds; rate and quartiles are in frames per second, ``of_`` are ratios of rates."""

    program: str
    work: str
    rate: float
    low_quartile: float
    high_quartile: float
    of_packet: float
    of_c: float
    sent: int
    lost: int


@dataclass(frozen=True)
class Waiting:
    """Frames per second that are taken when they wait already, medians over the rounds."""

    packet: float
    xsk: float
    ratio: float


def measure(rounds: int, seconds: float) -> tuple[list[Result], Waiting]:
    """Bursts of about ``seconds`` for every program and work, ``rounds`` times."""
    with ExitStack() as held:
        cache = Path(held.enter_context(tempfile.TemporaryDirectory()))
        consumer = compiled(cache)
        sites = [Site(held, name, consumer) for name in PROGRAMS]
        packet, _, ours = sites
        contests = [Contest(site, work) for work in WORKS for site in sites]
        turns = []
        for contest in contests:
            warm = contest.site.burst(contest.work, WARM_UP)
            turns.append((contest, int(WARM_UP * seconds / warm.seconds)))
        for _ in range(rounds):
            for contest, frames in turns:
                contest.bursts.append(contest.site.burst(contest.work, frames))
            turns.reverse()
        waiting = _waiting(packet, ours, rounds)
    return [_result(contest, contests) for contest in contests], waiting


def _waiting(packet: Site, ours: Site, rounds: int) -> Waiting:
    with (
        packet.lab.host.call(lambda: _packet_socket(packet.lab.nic)) as receiver,
        xsk.Umem() as umem,
        ours.lab.host.call(lambda: xsk.BoundSocket.bind(umem, ours.lab.nic)) as bound,
        xsk.Socket(bound, rx_chunks=umem.shape.frames) as taker,
    ):
        ours.insert(bound)
        buffer = bytearray(2 * len(FRAME))

        def receive() -> int:
            try:
                return 1 if receiver.recv_into(buffer) else 0
            except BlockingIOError:
                return 0

        pairs = [(_taken(packet, receive), _taken(ours, lambda: taker.drop(BATCH))) for _ in range(rounds)]
    packets, ours_all = zip(*pairs, strict=True)
    return Waiting(median(packets), median(ours_all), median(mine / theirs for theirs, mine in pairs))


def _packet_socket(device: str) -> socket.socket:
    receiver = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    receiver.bind((device, ETH_P_ALL))
    return receiver


def _taken(site: Site, take: Callable[[], int]) -> float:
    """Frames per second at which ``take``, which tells how many it took, empties its socket."""
    site.arrive(WAITING)
    began, frames = time.perf_counter(), 0
    while some := take():
        frames += some
    seconds = time.perf_counter() - began
    if frames != WAITING:
        raise RuntimeError(f"{frames} of {WAITING} frames waited in {site.program}")
    return frames / seconds


def compiled(directory: Path) -> Path:
    """The C program, built."""
    program = directory / "xsk_consumer"
    source = Path(__file__).with_name("xsk_consumer.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


def _result(contest: Contest, contests: Sequence[Contest]) -> Result:
    low, middle, high = quantiles(contest.rates(), n=4)
    ratios = {}
    for other in contests:
        if other.work == contest.work:
            pairs = zip(contest.rates(), other.rates(), strict=True)
            ratios[other.site.program] = median(mine / theirs for mine, theirs in pairs)
    return Result(
        program=contest.site.program,
        work=contest.work,
        rate=middle,
        low_quartile=low,
        high_quartile=high,
        of_packet=ratios[PACKET],
        of_c=ratios[C],
        sent=sum(burst.sent for burst in contest.bursts),
        lost=sum(burst.sent - round(burst.rate(contest.work) * burst.seconds) for burst in contest.bursts),
    )


def show(results: Sequence[Result], waiting: Waiting) -> None:
    """Print the table for people."""
    print(f"{'':28}  {'Mpps':^18}  {'ratio to':^18}")
    print(f"{'':28}  median  quartiles   AF_PACKET       C    lost")
    for result in results:
        print(
            f"{result.work:8}{result.program:20}  {result.rate / 1e6:6.2f}  "
            f"{result.low_quartile / 1e6:4.2f}-{result.high_quartile / 1e6:4.2f}  "
            f"{result.of_packet:9.2f}  {result.of_c:6.2f}  {result.lost / result.sent:6.1%}"
        )
    print(
        f"\nFrames that wait already: AF_PACKET {waiting.packet / 1e6:.2f} Mpps, "
        f"offload.xsk {waiting.xsk / 1e6:.2f} Mpps, {waiting.ratio:.1f} times as many."
    )
    print(f"\nAims of offload.xsk: {OF_PACKET:g} times AF_PACKET, and, dropping, {OF_C} of C.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare ways to take frames, 64 bytes each.")
    parser.add_argument("--quick", action="store_true", help="less than a minute, and less certain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    if reason := missing_privilege():
        print(f"xsk: {reason}", file=sys.stderr)
        return 4
    if CONSUMER_CPU not in os.sched_getaffinity(0) or shutil.which("gcc") is None:
        print("xsk: this takes two CPUs, 0 and 1, and gcc", file=sys.stderr)
        return 3
    os.sched_setaffinity(0, {NIC_CPU})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is taken down then too
    rounds, seconds = (7, 0.2) if arguments.quick else (21, 0.2)
    print(f"64-byte frames, {rounds} rounds of {seconds} s each. {sentence()}\n")
    results, waiting = measure(rounds, seconds)
    show(results, waiting)
    if arguments.json:
        document = {
            "benchmark": "xsk",
            "frame_bytes": 64,
            "machine": machine(),
            "rounds": rounds,
            "burst_seconds": seconds,
            "aims": {"of_packet": OF_PACKET, "of_c_drop": OF_C},
            "results": [asdict(result) for result in results],
            "waiting": asdict(waiting),
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
