"""What it costs to move a queue to another CPU under load, and what it brings.

::

    python -m tests.bench.rebalance [--quick] [--json FILE]

First one queue is moved to and fro while numbered frames come in, with and without waiting for a moment at
which none of its frames is under way: frames lost, frames that came after a later one, time that a move
took. Then a daemon has three busy queues on one CPU, at first as much as that can bear and then more, and
is left to itself. The frames are sent on CPU 0. The VMs are slow (``tests.slow_guest``), or one Python
sender could not keep a CPU busy. Other work on the machine shows in the second part: to be told what
rebalancing can do, let there be none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from offload.client import Client
from offload.kernel.load import all_asleep, threads
from tests.bench.generator import FIRST, RING, offload_on
from tests.bench.machine import machine, sentence
from tests.instance import Instance, config_of, shared_cache, vms_of
from tests.lab import Capture, Lab, Stream, missing_privilege, seq_of, wait_until
from tests.slow_guest import SlowGuest

SLOWNESS = 20
SLOWER = 60
"""For the daemon's queues: few frames are a great load, and sending them takes little of the other CPU."""
MOVES = 10
"""Moves of one kind before it is the other kind's turn."""
BUSY_QUEUE = 0.4
"""Share of a CPU that the queue takes which is moved to and fro."""
QUEUES = 3
LOADS = {"as much as one CPU can bear": 0.85, "more than that": 1.2}
"""What the daemon's queues take together."""
AT_ONCE, DRAINED = "at once", "when nothing is under way"
PATIENCE = 40.0
"""Seconds in which the daemon is to move a queue."""


@dataclass(frozen=True)
class Moves:
    """Moves of one kind. ``late`` frames came after a later one. ``waited``: moves without a quiet moment.

    ``dropped`` are frames for which a ring had no room, ``lost`` all others that did not arrive.
    """

    kind: str
    moves: int
    sent: int
    dropped: int
    lost: int
    late: int
    waited: int
    milliseconds: float


@dataclass(frozen=True)
class Settled:
    """A daemon left to itself. ``seconds`` till a queue had moved, ``None``: none did.

    ``before`` and ``after`` are frames a second that arrived. ``dropped`` are those for which a ring
    had no room, ``lost`` all others that did not arrive.
    """

    load: str
    seconds: float | None
    told: str
    before: float
    after: float
    sent: int
    dropped: int
    lost: int
    late: int


def arrivals(seen: Capture) -> tuple[int, int]:
    """How many numbered frames came, and how many of them after a later one."""
    count, latest, late = 0, -1, 0
    for frame in seen.frames():
        if (number := seq_of(frame)) is not None:
            count += 1
            late += number < latest
            latest = max(latest, number)
    return count, late


def settle(seen: Capture) -> None:
    """Return when nothing has come for a while."""
    known = len(seen.frames())
    while extra := len(seen.extra(known, 2.0)):
        known += extra


class Queue:
    """A port of a lab whose queue is on CPU 1, and which takes ``cost`` seconds of it for a frame."""

    def __init__(self, held: ExitStack, slowness: int) -> None:
        self.lab = held.enter_context(Lab())
        self.vm = self.lab.vm("web1", FIRST)
        self.vm.ns.run("ethtool", "-K", "eth0", "gro", "on")
        self.plane = offload_on(held, shared_cache(), self.lab, "web1", filters=1, ports=1, cpu=1)
        self.plane.set_queue_cpu(self.lab.host.ifindex(self.lab.nic), 0, RING)
        held.enter_context(SlowGuest(self.vm, slowness))
        self.cost = self._cost()

    def stream(self, rate: float) -> Stream:
        return Stream(self.lab.wire, self.lab.wire_end, self.vm.mac, rate=int(rate))

    def _cost(self) -> float:
        """Measured on a second of frames."""
        (thread,) = threads(self.plane.queue_map_ids(), 1)
        with self.stream(1000) as stream:
            stream.run_on(100)
            sent, ran = stream.sent, _nanoseconds(thread)
            stream.run_on(1000)
            return (_nanoseconds(thread) - ran) / 1e9 / (stream.sent - sent)

    def moved(self, kind: str, moves: int) -> Moves:
        """Move the queue to and fro while it takes ``BUSY_QUEUE`` of a CPU."""
        no_room = self._no_room()
        with self.vm.capture() as seen:
            with self.stream(BUSY_QUEUE / self.cost) as stream:
                taken, waited = self.lab.host.call(partial(self._to_and_fro, kind, moves, stream))
            settle(seen)
            arrived, late = arrivals(seen)
        dropped = self._no_room() - no_room
        lost = stream.sent - arrived - dropped
        return Moves(kind, moves, stream.sent, dropped, lost, late, waited, 1000 * median(taken))

    def _to_and_fro(self, kind: str, moves: int, stream: Stream) -> tuple[list[float], int]:
        """Seconds that each move took, and in how many there was no quiet moment."""
        record = self.plane.ports()[0]
        taken, waited = [], 0
        for number in range(moves):
            stream.run_on(200)
            source, target = (1, 0) if number % 2 == 0 else (0, 1)
            row, there = replace(record, cpu=target), threads(self.plane.queue_map_ids(), source)
            began = time.monotonic()
            if kind == DRAINED:
                waited += not self.plane.move_port(0, row, partial(all_asleep, there))
            else:
                self.plane.set_port(0, row)
            taken.append(time.monotonic() - began)
        stream.run_on(200)
        return taken, waited

    def _no_room(self) -> int:
        """Frames for which the ring of a CPU or of the VM's device had no room."""
        (counted,) = self.plane.port_counters(1)
        came_out = counted["handed"]["packets"] + counted["returned"]["packets"]
        (shown,) = json.loads(self.vm.ns.ip("-j -s link show eth0"))
        return int(counted["queued"]["packets"] - came_out + shown["stats64"]["rx"]["dropped"])


def _nanoseconds(process: int) -> int:
    """Time that a process had a CPU (kernel: Documentation/scheduler/sched-stats.rst)."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0])


def left_alone(load: str, cost: float, seconds: float) -> Settled:
    """A daemon with ``QUEUES`` busy queues on CPU 1, for ``seconds`` before a queue moves and after."""
    with ExitStack() as held:
        lab = held.enter_context(Lab())
        vms = vms_of(lab, 2 * QUEUES)
        config = config_of(lab.nic, {name: vm.mac for name, vm in vms.items()})
        config["nics"][lab.nic] = {"queues": {"cpus": [0, 1]}}
        instance = held.enter_context(Instance(lab.host, config)).start(speaking=vms.values())
        client = held.enter_context(Client(instance.paths.socket))
        busy = _on(client, 1, vms)
        for name in busy:
            held.enter_context(SlowGuest(vms[name], SLOWER))
        seen = {name: held.enter_context(vms[name].capture()) for name in busy}
        rate = int(LOADS[load] / QUEUES / cost)
        streams = [
            held.enter_context(Stream(lab.wire, lab.wire_end, vms[name].mac, rate=rate)) for name in busy
        ]
        time.sleep(1)
        before = _throughput(seen.values(), seconds)
        config["nics"][lab.nic]["queues"]["rebalance"] = True
        instance.cli("apply", str(instance.write(config)))
        began = time.monotonic()
        settled = None
        with suppress(AssertionError):
            wait_until(lambda: bool(_on(client, 0, busy)), "a queue moves", PATIENCE)
            settled = time.monotonic() - began
        after = _throughput(seen.values(), seconds)
        sent = sum(stream.stop() for stream in streams)
        for each in seen.values():
            settle(each)
        counts = [arrivals(each) for each in seen.values()]
        dropped = sum(sum(instance.port(name)["counters"]["drops"].values()) for name in busy)
        told = re.findall(r"moved .*|CPU \d is .* busy and .*", instance.log.read_text())
        arrived = sum(count for count, _ in counts)
        late = sum(late for _, late in counts)
        lost = sent - arrived - dropped
        return Settled(load, settled, told[0] if told else "", before, after, sent, dropped, lost, late)


def _on(client: Client, cpu: int, names: Collection[str]) -> list[str]:
    """The ports of ``names`` whose queue is on a CPU.

    Asked a few times a second at most, for asking takes time of the CPU that is to be idle.
    """
    time.sleep(0.2)
    return [
        port.name
        for port in client.ports()
        if port.name in names and port.queue is not None and port.queue.cpu == cpu
    ]


def _throughput(seen: Collection[Capture], seconds: float) -> float:
    """Frames a second that arrive."""
    before, began = sum(len(each.frames()) for each in seen), time.monotonic()
    time.sleep(seconds)
    return (sum(len(each.frames()) for each in seen) - before) / (time.monotonic() - began)


def total(moves: Sequence[Moves]) -> Moves:
    """Of several rounds: sums, and the median time."""
    return Moves(
        kind=moves[0].kind,
        moves=sum(one.moves for one in moves),
        sent=sum(one.sent for one in moves),
        dropped=sum(one.dropped for one in moves),
        lost=sum(one.lost for one in moves),
        late=sum(one.late for one in moves),
        waited=sum(one.waited for one in moves),
        milliseconds=median(one.milliseconds for one in moves),
    )


def show_moves(moves: Sequence[Moves]) -> None:
    """Print the first table for people."""
    heads = f"{'moves':>7}{'frames':>9}{'dropped':>9}{'lost':>6}{'late':>6}{'not quiet':>11}{'ms':>7}"
    print(f"{'a queue is moved':28}{heads}")
    for one in moves:
        frames = f"{one.sent:9,}{one.dropped:9,}{one.lost:6}{one.late:6}"
        print(f"{one.kind:28}{one.moves:7}{frames}{one.waited:11}{one.milliseconds:7.1f}")


def show_settled(settled: Sequence[Settled]) -> None:
    """Print the second one."""
    heads = f"{'settled':>9}{'frames/s':>20}{'ratio':>7}{'dropped':>9}{'lost':>6}{'late':>6}"
    print(f"\n{'a daemon left to itself':28}{heads}")
    for each in settled:
        when = "never" if each.seconds is None else f"{each.seconds:.1f} s"
        rates = f"{each.before:,.0f} -> {each.after:,.0f}"
        numbers = f"{each.after / each.before:7.2f}{each.dropped:9,}{each.lost:6}{each.late:6}"
        print(f"{each.load:28}{when:>9}{rates:>20}{numbers}\n    {each.told}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Move busy queues between CPUs.")
    parser.add_argument("--quick", action="store_true", help="half a minute, and less certain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    if reason := missing_privilege() or ("" if (os.cpu_count() or 1) > 1 else "two CPUs are needed"):
        print(f"rebalance: {reason}", file=sys.stderr)
        return 4
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is taken down then too
    rounds, seconds = (4, 2.0) if arguments.quick else (20, 5.0)
    print(sentence())
    with ExitStack() as held:
        queue = Queue(held, SLOWNESS)
        print(f"A frame costs its queue {1e6 * queue.cost:.0f} us of CPU time.\n")
        found = [queue.moved(kind, MOVES) for _ in range(rounds) for kind in (AT_ONCE, DRAINED)]
    moves = [total([one for one in found if one.kind == kind]) for kind in (AT_ONCE, DRAINED)]
    show_moves(moves)
    with ExitStack() as held:
        cost = Queue(held, SLOWER).cost
    print(f"\nNow a frame costs {1e6 * cost:.0f} us.")
    settled = [left_alone(load, cost, seconds) for load in LOADS]
    show_settled(settled)
    if arguments.json:
        document = {
            "benchmark": "rebalance",
            "machine": machine(),
            "moves": [asdict(one) for one in moves],
            "settled": [asdict(each) for each in settled],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
