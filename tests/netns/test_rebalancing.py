"""Busy queues move to an idle CPU, and no frame is lost on the way. Needs root and two CPUs.

Thresholds and pauses are the product's own. How busy the CPUs are is told by a file in the place of the
daemon's ``/proc/stat``, so that whoever else works on this machine does not decide what happens. What
the queues' threads take is real: the guest is made slower until its queue is worth moving.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import pytest

from offload.client import Client
from offload.kernel.dataplane import Dataplane
from offload.kernel.load import threads
from offload.rebalance import BUSY, NIC_PAUSE
from tests.instance import Instance, config_of, vms_of
from tests.lab import Capture, Lab, Namespace, Stream, seq_of, wait_until
from tests.slow_guest import SlowGuest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        len(os.sched_getaffinity(0)) < 2, reason="this machine has one CPU, so no queue can move"
    ),
]

RATE = 500
"""Frames a second to a VM: so few that none is lost while others keep a CPU for half a second."""
SETTLED = 120.0
"""Seconds in which a queue must have moved; ten would do on a machine with nothing else to do."""
IDLE, WORKING = (0.2, 0.1), (0.9, 0.6)
"""Share of a CPU's time that it is at work, and in softirqs."""
HERTZ = 100


class ProcStat:
    """A context manager that writes a ``/proc/stat`` of two CPUs, which ``load`` says how busy they are."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.load = {0: IDLE, 1: IDLE}
        self._ticks = {cpu: [0.0] * 8 for cpu in self.load}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ending.wait(0.02):
            now = time.monotonic()
            for cpu, (busy, softirq) in self.load.items():
                parts = {2: busy - softirq, 3: 1 - busy, 6: softirq}  # system, idle, softirq
                for place, share in parts.items():
                    self._ticks[cpu][place] += share * (now - last) * HERTZ
            last = now
            self._write()

    def _write(self) -> None:
        lines = [f"cpu{cpu} " + " ".join(f"{ticks:08.0f}" for ticks in self._ticks[cpu]) for cpu in self.load]
        with self.file.open("r+") as file:  # in place and of one length: the file is mounted
            file.write("\n".join(["cpu  " + "0 " * 8, *lines, ""]))

    def __enter__(self) -> Self:
        self.file.touch()
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


@dataclass(frozen=True)
class Seeing(Namespace):
    """A namespace in which processes see ``instead`` in the place of the file ``seen``."""

    instead: Path
    seen: str

    def argv(self, *argv: str) -> list[str]:
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        return super().argv(
            "unshare", "--mount", "sh", "-c", script, "sh", str(self.instead), self.seen, *argv
        )


def test_queues_follow_a_load_that_shifts_and_lose_nothing(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    """First CPU 1 is busy, then CPU 0. web3 and web4 are on CPU 1, and web4 is pinned there; web1 is on 0.

    In the end CPU 0 is still busy, but web3, which came last, has to stay for half a minute.
    """
    lab = make_lab()
    vms = vms_of(lab, 4)
    config = config_of(lab.nic, {name: vm.mac for name, vm in vms.items()})
    config["nics"][lab.nic] = {"queues": {"cpus": [0, 1], "rebalance": True}}
    config["ports"]["web4"]["cpu"] = 1
    with contextlib.ExitStack() as stack:
        stat = stack.enter_context(ProcStat(tmp_path / "stat"))
        instance = stack.enter_context(Instance(Seeing(lab.host.name, stat.file, "/proc/stat"), config))
        instance.start(speaking=vms.values())
        assert places(instance) == {"web1": 0, "web2": 0, "web3": 1, "web4": 1}
        seen = {name: stack.enter_context(vms[name].capture()) for name in ("web1", "web3", "web4")}
        streams = {
            name: stack.enter_context(Stream(lab.wire, lab.wire_end, vms[name].mac, rate=RATE))
            for name in seen
        }
        prefer(instance, lab, cpu=1)
        stat.load = {0: IDLE, 1: WORKING}
        began = time.monotonic()
        with contextlib.ExitStack() as slow:
            while places(instance)["web3"] == 1:
                assert time.monotonic() < began + SETTLED, "web3 did not move"
                slow.enter_context(SlowGuest(vms["web3"], 10))
                time.sleep(1)
        stat.load = {0: WORKING, 1: IDLE}
        wait_until(lambda: places(instance)["web1"] == 1, "web1 moves", SETTLED)
        for stream in streams.values():
            stream.run_on(100)
            stream.stop()
        late = {name: reordered(seen[name], stream.sent) for name, stream in streams.items()}
        assert places(instance) == {"web1": 1, "web2": 0, "web3": 0, "web4": 1}
        first, second = moves(instance)
        assert first[1:4] == ("web3", 1, 0)
        assert second[1:4] == ("web1", 0, 1)
        assert min(first[4], second[4]) > 100 * BUSY
        assert (second[0] - first[0]).total_seconds() > NIC_PAUSE - 0.5
        assert [instance.port(name)["counters"]["drops"] for name in vms] == [{}] * 4
        assert "ERROR" not in instance.log.read_text()
    print(f"of {sum(stream.sent for stream in streams.values())} frames 0 lost; out of order: {late}")


def test_a_cpu_that_goes_away_hands_its_queues_over_and_loses_nothing(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    """No netlink message tells of it. What waits for a CPU that serves no more still comes out."""
    lab = make_lab()
    vms = vms_of(lab, 2)
    online = tmp_path / "online"
    online.write_text("0-1\n")
    config = config_of(lab.nic, {name: vm.mac for name, vm in vms.items()})
    config["nics"][lab.nic] = {"queues": {"cpus": [0, 1]}}
    config["ports"]["web1"]["cpu"] = 0
    host = Seeing(lab.host.name, online, "/sys/devices/system/cpu/online")
    with Instance(host, config) as instance, vms["web2"].capture() as seen:
        instance.start(speaking=vms.values())
        assert places(instance) == {"web1": 0, "web2": 1}
        with SlowGuest(vms["web2"], 40), Stream(lab.wire, lab.wire_end, vms["web2"].mac, rate=RATE) as stream:
            stream.run_on(100)
            with online.open("r+") as file:  # at no time is it empty
                file.write("0  ")
            wait_until(lambda: places(instance) == {"web1": 0, "web2": 0}, "web2 moves", SETTLED)
            wait_until(
                lambda: "take CPU 1 from the queues" in instance.log.read_text(), "CPU 1 is released", SETTLED
            )
            stream.run_on(100)
            stream.stop()
        reordered(seen, stream.sent)
        assert instance.port("web2")["counters"]["drops"] == {}


def prefer(instance: Instance, lab: Lab, cpu: int) -> None:
    """Let the thread that serves a CPU's queues have it before others: it must get the time that it wants."""

    def find() -> list[int]:
        with Dataplane(instance.paths.objects, instance.paths.cache, keep=False) as plane:
            return threads(plane.queue_map_ids(), cpu)

    for thread in lab.host.call(find):
        os.setpriority(os.PRIO_PROCESS, thread, -15)


def places(instance: Instance) -> Mapping[str, int | None]:
    """The CPU of each queue."""
    with Client(instance.paths.socket) as client:
        return {port.name: port.queue.cpu for port in client.ports() if port.queue}


def moves(instance: Instance) -> list[tuple[datetime, str, int, int, int]]:
    """When which queue went from which CPU to which, and how busy the first was, in per cent."""
    line = r"^(\S+ \S+) INFO moved (\S+) from CPU (\d) to (\d): (\d+) % -> \d+ %"
    return [
        (datetime.fromisoformat(when.replace(",", ".")), port, int(source), int(target), int(load))
        for when, port, source, target, load in re.findall(line, instance.log.read_text(), re.MULTILINE)
    ]


def reordered(seen: Capture, sent: int) -> int:
    """How many frames came after a later one. Every one must have arrived, once."""
    arrived = [number for frame in seen.wait_for(sent, 30) if (number := seq_of(frame)) is not None]
    assert sorted(arrived) == list(range(sent))
    latest, late = -1, 0
    for number in arrived:
        late += number < latest
        latest = max(latest, number)
    return late
