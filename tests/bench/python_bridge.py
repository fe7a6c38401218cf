"""What the Python bridge carries, beside the kernel's, and what it loses when it is disturbed.

::

    python -m tests.bench.python_bridge [--quick] [--json FILE]

Two VMs (veth pairs, with nothing switched off) and a bridge between them. Small frames are sent by one
process with a call for each, on CPU 0; the Python bridge has CPU 1. TCP is one stream of iperf3, wherever
the scheduler puts it. Disturbances meet a stream of small frames at a fixed rate.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from tests.bench.machine import machine, sentence
from tests.lab import Lab, Stream, Vm, missing_privilege, test_frame
from tests.netns.conduit import Bridge, configured, member

ADDRESSES = (("web1", "02:15:5d:00:00:01", "192.0.2.11"), ("web2", "02:15:5d:00:00:02", "192.0.2.12"))
SENDER_CPU, BRIDGE_CPU = 0, 1
RATES = (500, 10_000)
"""Frames a second during a disturbance."""

DISTURBS = """
import os, time
from offload.bridge.extension import Extension, FORWARD

class Lab(Extension):
    def __init__(self, options, switch):
        self.file = options["file"]
        self.how = options["how"]

    def frame(self, frame):
        if os.path.exists(self.file):
            os.unlink(self.file)
            if self.how == "exits":
                os._exit(1)
            time.sleep(60)
        return FORWARD
"""


@dataclass(frozen=True)
class Carried:
    """``rate`` in frames a second of 64 bytes, median of the rounds; ``gbits`` of TCP a second; ``ping``: us.

    ``cpu`` is what the bridge's own process needs for such a frame, in us; a kernel bridge has none.
    """

    bridge: str
    offered: float
    rate: float
    gbits: float
    ping: float
    cpu: float | None = None


@dataclass(frozen=True)
class Disturbed:
    """What was lost of the frames that were sent at ``rate`` a second."""

    what: str
    rate: int
    sent: int
    lost: int


def pair(lab: Lab) -> list[Vm]:
    return [lab.vm(name, mac, f"{address}/24") for name, mac, address in ADDRESSES]


def arrived(vm: Vm) -> int:
    """Frames that the VM's interface has received."""

    def read() -> int:
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        return int(next(line for line in lines if "eth0:" in line).split(":")[1].split()[1])

    return vm.ns.call(read)


def flood(vm: Vm, to: Vm, seconds: float) -> tuple[float, float]:
    """Small frames as fast as one process sends them: offered and arrived, per second."""
    frame = test_frame(to.mac, vm.mac)

    def send() -> tuple[int, float]:
        os.sched_setaffinity(0, {SENDER_CPU})
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind(("eth0", 0))
            sent, begun = 0, time.perf_counter()
            while (took := time.perf_counter() - begun) < seconds:
                for _ in range(100):
                    sender.send(frame)
                sent += 100
            return sent, took

    before = arrived(to)
    sent, took = vm.ns.call(send)
    time.sleep(0.2)
    return sent / took, (arrived(to) - before) / took


def tcp(client: Vm, server: Vm, seconds: float) -> float:
    """Gbit a second of one stream."""
    process = server.ns.popen("iperf3", "-s", "-1")
    try:
        time.sleep(0.5)
        done = client.ns.run("iperf3", "-c", ADDRESSES[1][2], "-t", str(seconds), "-J")
    finally:
        process.kill()
        process.communicate()
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9


def ping(client: Vm) -> float:
    """Median round trip of a lone packet, in microseconds."""
    said = client.ns.run("ping", "-c", "50", "-i", "0.02", ADDRESSES[1][2]).stdout
    return median(float(word.partition("=")[2]) for word in said.split() if word.startswith("time=")) * 1000


def worked(pid: int) -> float:
    """CPU seconds of a process, in user space and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def carried(name: str, vms: Sequence[Vm], rounds: int, seconds: float) -> Carried:
    flood(vms[1], vms[0], 0.1)  # so that both are learnt
    floods = [flood(vms[0], vms[1], seconds) for _ in range(rounds)]
    streams = [tcp(vms[0], vms[1], seconds) for _ in range(rounds)]
    offered, rate = (median(column) for column in zip(*floods, strict=True))
    return Carried(name, offered, rate, median(streams), ping(vms[0]))


def python_bridge(rounds: int, seconds: float) -> Carried:
    with Lab() as lab:
        vms = pair(lab)
        with Bridge(lab, member(1, "web1"), member(2, "web2")) as bridge:
            bridge.stop()
            bridge.start(within=["taskset", "--cpu-list", str(BRIDGE_CPU)])
            bridge.connect({}, *vms)
            flood(vms[1], vms[0], 0.1)
            before, since = bridge.settled(), worked(bridge.state().pid)
            flood(vms[0], vms[1], 2 * seconds)
            cpu = worked(before.pid) - since
            frames = bridge.settled().members[0].rx_packets - before.members[0].rx_packets
            return replace(carried("Python bridge", vms, rounds, seconds), cpu=cpu / frames * 1e6)


def kernel_bridge(rounds: int, seconds: float) -> Carried:
    with Lab() as lab:
        vms = pair(lab)
        lab.host.ip("link add br0 type bridge")
        for vm in vms:
            lab.host.ip(f"link set {vm.device} master br0")
        lab.host.ip("link set br0 up")
        return carried("kernel bridge", vms, rounds, seconds)


def disturbed(what: str, rate: int, disturb: Callable[[Bridge], None], how: str = "exits") -> Disturbed:
    with Lab() as lab:
        vms = pair(lab)
        with Bridge(lab, member(1, "web1"), member(2, "web2"), installed={"disturbs": DISTURBS}) as bridge:
            trigger = str(bridge.directory / "trigger")
            bridge.connect({}, *vms)
            if how:
                bridge.tell(extensions=(configured("disturbs", file=trigger, how=how),))
                bridge.wait_for("the extension runs", lambda found: found.extensions)
            flood(vms[1], vms[0], 0.1)
            before = arrived(vms[1])
            with Stream(vms[0].ns, "eth0", vms[1].mac, vms[0].mac, rate=rate) as stream:
                stream.run_on(rate // 2)
                disturb(bridge)
                stream.run_on(rate * 3)
                sent = stream.stop()
            time.sleep(0.3)
            return Disturbed(what, rate, sent, sent - (arrived(vms[1]) - before))


def trigger(bridge: Bridge) -> None:
    (bridge.directory / "trigger").touch()


def kill_worker(bridge: Bridge) -> None:
    os.kill(bridge.state().pid, signal.SIGKILL)


def restart(bridge: Bridge) -> None:
    bridge.stop()
    bridge.start()


def disturbances() -> list[Disturbed]:
    found = []
    for rate in RATES:
        found.append(disturbed("an extension ends the process", rate, trigger))
        found.append(disturbed("an extension hangs", rate, trigger, "hangs"))
        found.append(disturbed("kill -9 of the worker", rate, kill_worker, ""))
        found.append(disturbed("the unit is restarted", rate, restart, ""))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.python_bridge", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    chosen = parser.parse_args(arguments)
    reason = missing_privilege()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 4
    rounds, seconds = (1, 1.0) if chosen.quick else (5, 2.0)
    carriers = [kernel_bridge(rounds, seconds), python_bridge(rounds, seconds)]
    print(sentence())
    print(f"{'':16} {'offered/s':>10} {'frames/s':>10} {'TCP Gbit/s':>11} {'ping us':>8} {'CPU us':>7}")
    for row in carriers:
        cpu = "" if row.cpu is None else f"{row.cpu:.1f}"
        rates = f"{row.offered:10,.0f} {row.rate:10,.0f} {row.gbits:11.1f}"
        print(f"{row.bridge:16} {rates} {row.ping:8.0f} {cpu:>7}")
    losses = disturbances()
    print(f"\n{'':32} {'frames/s':>9} {'sent':>7} {'lost':>6}")
    for loss in losses:
        print(f"{loss.what:32} {loss.rate:9,} {loss.sent:7,} {loss.lost:6,}")
    if chosen.json:
        figures = {"machine": machine(), "carried": [asdict(row) for row in carriers]}
        chosen.json.write_text(
            json.dumps(figures | {"disturbed": [asdict(loss) for loss in losses]}, indent=2)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
