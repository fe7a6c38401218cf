"""The demo: real traffic to four VMs, through VM queues and then through the bridge alone.

Started by ``demo.sh``, in a mount namespace where /run and /sys/fs/bpf are fresh. The network::

    peer namespace          host namespace                 a namespace per VM
    wire0 ================= eth1, four queues
    192.0.2.1               web1, web2, db1, app1 ======== eth0, 192.0.2.11 ...

``offload run`` is started in the host namespace, and everything that is told of it comes from
its command line and its metrics. Exit code: 0 when every frame took the path it should, 1 when not
or when something failed, 128 and the signal's number after a signal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from offload.kernel.netns import call_in

REPOSITORY = Path(__file__).resolve().parents[1]
PROMETHEUS = REPOSITORY / ".cache/prometheus/usr/bin/prometheus"
RUN = Path("/run/demo")
CONFIG = RUN / "offload.yaml"
BRIDGE_CONFIG = RUN / "bridge-only.yaml"
LOG = RUN / "offload.log"
METRICS = "127.0.0.1:9808"
PROMETHEUS_AT = "127.0.0.1:9090"
PEER, PEER_ADDRESS = "wire0", "192.0.2.1"
NIC, NIC_QUEUES = "eth1", 4
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 20
"""Seconds until something that should have happened is a failure."""

TCP_LISTEN = "0A"
"""State of a socket in /proc/net/tcp: include/net/tcp_states.h."""

PINGS = 25
PINGS_AFTER = 50
"""More of them, which nobody counts: ping does not wait for its last answers longer than two round trips, and
on a machine that boots others meanwhile one can take a second.
"""
TCP_SECONDS = 1
UDP_SECONDS = 1
UDP_RATE = "40M"
"""Bits per second each way: loss at this rate is a fault, not a full machine."""


@dataclass(frozen=True)
class Vm:
    """A VM: ``name`` is its port, its device on the host and its namespace."""

    name: str
    mac: str
    address: str


VMS = tuple(
    Vm(name, f"02:15:5d:00:00:{number:02x}", f"192.0.2.{10 + number}")
    for number, name in enumerate(("web1", "web2", "db1", "app1"), 1)
)


@dataclass(frozen=True)
class Traffic:
    """What the tools measured between the peer and one VM. Rates in bit/s, loss in per cent, time in ms."""

    tcp_in: float
    tcp_out: float
    udp_in_loss: float
    udp_out_loss: float
    ping_loss: float
    ping_ms: float


@dataclass(frozen=True)
class Row:
    """One VM on one path: what ``offload ports`` says of it, and what the tools measured."""

    vm: str
    path: str
    cpu: str
    by_queue: int
    by_bridge: int
    sent_direct: int
    dropped: int
    traffic: Traffic


class DemoError(Exception):
    """The demo cannot go on."""


class Interrupted(BaseException):
    """A signal that asks to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def main() -> int:
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    began = time.monotonic()
    try:
        with ExitStack() as undo:
            try:
                rows = demonstrate(undo)
            finally:
                ignore_signals()
                _say("taking everything down")
    except Interrupted as interrupted:
        print("demo: interrupted, and taken down", file=sys.stderr)
        return 128 + interrupted.number
    except (DemoError, OSError, subprocess.SubprocessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    faults = list(_faults(rows))
    for fault in faults:
        print(f"demo: {fault}", file=sys.stderr)
    _say(f"done in {time.monotonic() - began:.0f} s")
    if not faults:
        print(NEXT)
    return 1 if faults else 0


NEXT = """
Where to go next
  README.md                   "Quick start" takes a real NIC; what else is there, and what is not
  deploy/offload.yaml         a config to begin with
  sudo deploy/test.sh --fast  the tests, on this machine
  deploy/prometheus/          alerts, and a scrape job for your Prometheus"""


def demonstrate(undo: ExitStack) -> list[Row]:
    """The demo from the first namespace to the last table. What it makes is taken down by ``undo``."""
    cpus = os.cpu_count() or 1
    _say(f"a network of its own: a NIC with {NIC_QUEUES} queues, a peer, {len(VMS)} VMs; {cpus} CPUs")
    build(undo)
    CONFIG.write_text(config())
    BRIDGE_CONFIG.write_text(config("queue: off"))
    print(f"\n{CONFIG}:\n" + "".join(f"    {line}\n" for line in config().splitlines()))

    _say(f"offload run --config {CONFIG}")
    start_daemon(undo)
    prometheus = start_prometheus(undo)

    _say("traffic through the VM queues: ping, then TCP each way, then UDP both ways at once")
    queued = measure()
    for command in (("ports",), ("queues",), ("nics",)):
        show(*command)

    _say(f"the same on the bridge alone: offload apply {BRIDGE_CONFIG} (queue: off at each port)")
    print(f"    {offload('apply', str(BRIDGE_CONFIG)).splitlines()[-1]}")
    bridged = measure()

    rows = [row for pair in zip(queued, bridged, strict=True) for row in pair]
    _say("each VM, in a queue of its own and on the bridge alone")
    table(rows)
    print(REMARKS)
    if prometheus:
        _say("what Prometheus has scraped meanwhile")
        wait(partial(_scraped_after, time.time()), "Prometheus", prometheus)
        prometheus_table()
    else:
        _say(f"what Prometheus would scrape, from http://{METRICS}/metrics")
        for line in fetch(f"http://{METRICS}/metrics").splitlines():
            if line.startswith("offload_port_packets_total") and 'direction="rx"' in line:
                print(f"    {line}")
        print()
    _say("offload detach --all")
    print(f"    {offload('detach', '--all').splitlines()[-1]}")
    return rows


REMARKS = """
CPU: the one that serves the VM's queue; on the bridge it is the one where the NIC received the frame.
BY QUEUE (merged ones among them), BY BRIDGE: frames to the VM, as counted in the kernel. An ARP request is a
broadcast, and those always take the bridge; so does what comes for a VM that has not sent anything yet. IN is
towards the VM.
Rates on veth say little of a real NIC, and here sender and receiver share the CPUs: the demo shows which way
frames go and that they arrive. README.md, "Speed", says how to measure.
"""


# The network


def build(undo: ExitStack) -> None:
    """Make the namespaces and the veth pairs. They go when their namespaces do."""
    RUN.mkdir()
    for name in ("peer", "host", *(vm.name for vm in VMS)):
        run("ip", "netns", "add", name)
        undo.callback(run, "ip", "netns", "delete", name, check=False)
        run(*inside(name), "ip", "link", "set", "lo", "up")
        # Nothing is to be counted but what the demo sends.
        for scope in ("all", "default"):
            sysctl(name, f"net/ipv6/conf/{scope}/disable_ipv6", "1")
    # Where this is on, iptables judges bridged frames as if they were routed: not what is to be shown here.
    for hook in ("iptables", "ip6tables", "arptables"):
        sysctl("host", f"net/bridge/bridge-nf-call-{hook}", "0")

    queues = ["numrxqueues", str(NIC_QUEUES), "numtxqueues", str(NIC_QUEUES)]
    pair = ["type", "veth", "peer", "name", PEER, *queues, "netns", "peer"]
    run(*inside("host"), "ip", "link", "add", NIC, *queues, *pair)
    # A wire carries whole checksums and frames of MTU size; a veth leaves both to whoever needs them.
    run(*inside("peer"), "ethtool", "-K", PEER, "tx", "off", "tso", "off", "gso", "off")
    run(*inside("peer"), "ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", PEER)
    run(*inside("peer"), "ip", "link", "set", PEER, "up")
    run(*inside("host"), "ip", "link", "set", NIC, "up")
    for vm in VMS:
        other_end = ["peer", "name", "eth0", "address", vm.mac, "netns", vm.name]
        run(*inside("host"), "ip", "link", "add", vm.name, "type", "veth", *other_end)
        run(*inside("host"), "ip", "link", "set", vm.name, "up")
        run(*inside(vm.name), "ip", "address", "add", f"{vm.address}/24", "dev", "eth0")
        run(*inside(vm.name), "ip", "link", "set", "eth0", "up")
        server = start(undo, vm.name, "iperf3", "--server", "--version4", log=RUN / f"{vm.name}.log")
        wait(partial(_listens, server.pid), f"the iperf3 server of {vm.name}", server)


def config(port_key: str = "") -> str:
    """A config for the network; ``port_key`` is one more key of every port."""
    extra = f", {port_key}" if port_key else ""
    ports = "\n".join(
        f'  {vm.name}: {{switch: ext0, device: {vm.name}, mac: "{vm.mac}"{extra}}}' for vm in VMS
    )
    return f"""\
version: 1
metrics: {{listen: "{METRICS}"}}
nics:
  {NIC}: {{xdp_mode: native}}
switches:
  ext0: {{type: external, uplink: {NIC}}}
ports:
{ports}
"""


def start_daemon(undo: ExitStack) -> None:
    """Start ``offload run``. When the demo ends before its time, ``detach --all`` is left to ``undo``."""
    undo.callback(offload, "detach", "--all", check=False)
    daemon = start(undo, "host", "offload", "run", "--config", str(CONFIG), log=LOG)
    wait(Path("/run/offload/api.sock").exists, "the daemon", daemon)


def start_prometheus(undo: ExitStack) -> subprocess.Popen[bytes] | None:
    """Start a real Prometheus and wait for its first scrape; ``None`` if ``setup.sh`` could unpack none."""
    if not PROMETHEUS.exists():
        return None
    scrape = {"job_name": "offload", "static_configs": [{"targets": [METRICS]}]}
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    file = RUN / "prometheus.yml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    options = [
        f"--config.file={file}",
        f"--storage.tsdb.path={RUN / 'prometheus'}",
        f"--web.listen-address={PROMETHEUS_AT}",
        f"--web.console.templates={RUN}",
        f"--web.console.libraries={RUN}",
    ]
    server = start(undo, "host", str(PROMETHEUS), *options, log=RUN / "prometheus.log")
    _say(f"a Prometheus begins to scrape http://{METRICS}/metrics, once a second")
    wait(partial(_scraped_after, 0), "Prometheus", server)
    return server


# Traffic


def measure() -> list[Row]:
    """Send traffic to and from each VM in turn; what the ports counted meanwhile stands beside it."""
    rows = []
    for vm in VMS:
        before = port(vm.name)
        traffic = exchange(vm)
        row = _row(before, port(vm.name), traffic)
        rows.append(row)
        print(
            f"    {vm.name:5} {row.path:7} "
            f"TCP {traffic.tcp_in / 1e9:5.2f} Gbit/s to it, {traffic.tcp_out / 1e9:5.2f} from it; "
            f"frames by queue {row.by_queue:,}, by bridge {row.by_bridge:,}, "
            f"straight from it to {NIC} {row.sent_direct:,}"
        )
    print()
    return rows


def exchange(vm: Vm) -> Traffic:
    """Ping, TCP and UDP between the peer and ``vm``."""
    ping = ("ping", "-c", str(PINGS + PINGS_AFTER), "-i", "0.02", vm.address)
    pinged = run(*inside("peer"), *ping, check=False)
    tcp_in = iperf(vm, "--time", str(TCP_SECONDS))
    tcp_out = iperf(vm, "--time", str(TCP_SECONDS), "--reverse")
    both_ways = ("--udp", "--bitrate", UDP_RATE, "--length", "1200", "--bidir", "--time", str(UDP_SECONDS))
    udp = iperf(vm, *both_ways)
    ping_loss, ping_ms = _ping_result(pinged)
    return Traffic(
        tcp_in=tcp_in["sum_received"]["bits_per_second"],
        tcp_out=tcp_out["sum_received"]["bits_per_second"],
        udp_in_loss=udp["sum"]["lost_percent"],
        udp_out_loss=udp["sum_bidir_reverse"]["lost_percent"],
        ping_loss=ping_loss,
        ping_ms=ping_ms,
    )


def iperf(vm: Vm, *options: str) -> dict[str, Any]:
    """The ``end`` part of iperf3's report."""
    told = run(*inside("peer"), "iperf3", "--json", "--client", vm.address, *options, check=False)
    try:
        report = json.loads(told)
    except ValueError:
        raise DemoError(f"iperf3 to {vm.name}: {told}") from None
    if "error" in report:
        raise DemoError(f"iperf3 to {vm.name}: {report['error']}")
    end: dict[str, Any] = report["end"]
    return end


def _ping_result(text: str) -> tuple[float, float]:
    """Loss of the first ``PINGS`` in per cent, and their mean time in ms, from what ``ping`` prints."""
    answers = {int(seq): float(ms) for seq, ms in re.findall(r"icmp_seq=(\d+) .*time=([\d.]+) ms", text)}
    if "packets transmitted" not in text:
        raise DemoError(f"ping: {text}")
    times = [ms for seq, ms in answers.items() if seq <= PINGS]
    return 100 * (1 - len(times) / PINGS), statistics.mean(times) if times else math.nan


def port(name: str) -> dict[str, Any]:
    """One port as ``offload ports --json`` has it."""
    (view,) = json.loads(offload("ports", name, "--json"))
    found: dict[str, Any] = view
    return found


def _row(before: dict[str, Any], after: dict[str, Any], traffic: Traffic) -> Row:
    def gained(direction: str, path: str) -> int:
        was, now = (
            view["counters"][direction].get(path, {"packets": 0})["packets"] for view in (before, after)
        )
        return int(now - was)

    queue = after["queue"]
    return Row(
        vm=after["name"],
        path=after["path"],
        cpu=str(queue["cpu"]) if queue else "-",
        by_queue=gained("rx", "queue") + gained("rx", "gro"),
        by_bridge=gained("rx", "bridge"),
        sent_direct=gained("tx", "direct"),
        dropped=sum(after["counters"]["drops"].values()) - sum(before["counters"]["drops"].values()),
        traffic=traffic,
    )


def _faults(rows: Sequence[Row]) -> Iterator[str]:
    """What is not as it should be. Rows come in pairs: in a queue, then on the bridge."""
    for number, row in enumerate(rows):
        path, idle = ("bridge", row.by_queue) if number % 2 else ("queue", row.by_bridge)
        busy = row.by_bridge if number % 2 else row.by_queue
        if row.path != path:
            yield f"{row.vm} is on path {row.path}, and should be on {path}"
        # A broadcast now and then takes the bridge, and what comes before the VM has been heard.
        if busy < 1000 or idle > busy // 100:
            yield f"{row.vm}, on path {path}: {row.by_queue} frames by queue, {row.by_bridge} by bridge"
        if (row.sent_direct >= 1000) != (path == "queue"):
            yield f"{row.vm}, on path {path}: {row.sent_direct} frames from it went straight to {NIC}"
        if row.traffic.ping_loss:
            yield f"{row.vm}, on path {path}: {row.traffic.ping_loss:g} % of the pings were lost"


# Tables


def table(rows: Sequence[Row]) -> None:
    """Every VM twice, in its queue and on the bridge."""
    heads = "VM|PATH|CPU|BY QUEUE|BY BRIDGE|DROPS|TCP IN|TCP OUT|UDP LOSS IN|OUT|PING LOSS|TIME"
    lines = [tuple(heads.split("|"))]
    for row in rows:
        traffic = row.traffic
        lines.append(
            (
                *(row.vm, row.path, row.cpu, f"{row.by_queue:,}", f"{row.by_bridge:,}", str(row.dropped)),
                *(f"{rate / 1e9:.2f} Gbit/s" for rate in (traffic.tcp_in, traffic.tcp_out)),
                *(f"{loss:.2f} %" for loss in (traffic.udp_in_loss, traffic.udp_out_loss, traffic.ping_loss)),
                f"{traffic.ping_ms:.2f} ms",
            )
        )
    _columns(lines)


def prometheus_table() -> None:
    """Frames of each VM by path, and the most that each path carried in a second, out of PromQL."""
    frames = by_path('sum by (port, path) (offload_port_packets_total{direction="rx"})')
    most = by_path('max_over_time(irate(offload_port_bytes_total{direction="rx"}[3s])[5m:1s]) * 8')
    lines = [("PORT", "PATH", "offload_port_packets_total", "irate(offload_port_bytes_total), the most")]
    for vm in VMS:
        for path in ("queue", "gro", "bridge"):
            key = (vm.name, path)
            if path == "gro" and not frames.get(key):
                continue
            lines.append((*key, f"{frames[key]:,.0f}", f"{most[key] * 1e-9:.2f} Gbit/s"))
    _columns(lines)
    print()


def by_path(expression: str) -> dict[tuple[str, str], float]:
    """The answer to a PromQL query by port and path."""
    return {
        (series["metric"]["port"], series["metric"]["path"]): float(series["value"][1])
        for series in query(expression)
    }


def query(expression: str) -> list[dict[str, Any]]:
    """The answer of Prometheus: an instant vector."""
    parameters = urllib.parse.urlencode({"query": expression})
    answer = json.loads(fetch(f"http://{PROMETHEUS_AT}/api/v1/query?{parameters}"))
    series: list[dict[str, Any]] = answer["data"]["result"]
    return series


def _scraped_after(moment: float) -> bool:
    """Whether a scrape that began after ``moment``, in seconds since the epoch, has succeeded."""
    with contextlib.suppress(OSError):  # it does not listen yet
        return any(float(series["value"][1]) > moment for series in query("timestamp(offload_build_info)"))
    return False


def show(*arguments: str) -> None:
    """A reading command of ``offload``, and what it prints."""
    print(f"$ offload {' '.join(arguments)}")
    print(offload(*arguments))


def _columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        # Names to the left, figures to the right.
        cells = [
            f"{cell:<{width}}" if number < 2 else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print(f"    {'  '.join(cells)}".rstrip())


def _say(text: str) -> None:
    print(f"demo: {text}")


# Processes


def inside(namespace: str) -> list[str]:
    """The start of a command line that runs in a network namespace. Unlike ``ip netns exec`` it leaves
    /sys alone, where the pins are."""
    return ["nsenter", f"--net=/run/netns/{namespace}", "--"]


def run(*argv: str, check: bool = True) -> str:
    """Run a command to its end; its output. With ``check`` a failure is one of the demo."""
    # A session of its own: Ctrl-C is for the demo, which then takes everything down in order.
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=60, check=False, start_new_session=True
    )
    if check and done.returncode != 0:
        command = " ".join(argv[argv.index("--") + 1 :] if "--" in argv else argv)
        raise DemoError(f"{command}: exit {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def offload(*arguments: str, check: bool = True) -> str:
    """Run ``offload`` beside the daemon; its output."""
    return run(*inside("host"), "offload", *arguments, check=check)


def start(undo: ExitStack, namespace: str, *argv: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a program in a namespace; ``undo`` ends it, and so does the end of the demo, however it comes."""
    with log.open("wb") as output:
        program = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *inside(namespace), *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    undo.callback(_end, program)
    return program


def _end(program: subprocess.Popen[bytes]) -> None:
    program.terminate()
    try:
        program.wait(10)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


def wait(condition: Callable[[], bool], what: str, program: subprocess.Popen[bytes]) -> None:
    """Poll until ``condition()``; a ``DemoError`` when the program ends before, or when it takes too long."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if program.poll() is not None:
            raise DemoError(f"{what} ended with {program.returncode}: {_tail()}")
        if time.monotonic() > end:
            raise DemoError(f"{what} is not ready after {PATIENCE} s: {_tail()}")
        time.sleep(0.02)


def _tail() -> str:
    """The ends of all logs."""
    logs = [(log.name, log.read_text(errors="replace").splitlines()[-20:]) for log in RUN.glob("*.log")]
    return "".join(f"\n{name}: {line}" for name, lines in logs for line in lines)


def _listens(pid: int) -> bool:
    """Whether somebody in a process's network namespace listens on a TCP port."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[3] == TCP_LISTEN for line in lines)


def sysctl(namespace: str, key: str, value: str) -> None:
    """Write a ``net/`` sysctl of a namespace, if this kernel has it."""

    def write() -> None:
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/sys", key).write_text(value)

    call_in(f"/run/netns/{namespace}", write)


def fetch(url: str) -> str:
    """A page from the host namespace."""

    def get() -> str:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    return call_in("/run/netns/host", get)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def ignore_signals() -> None:
    """Let no second Ctrl-C stop the taking down."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
