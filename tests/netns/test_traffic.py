"""Where frames go, by traffic through a real daemon: the right VM, the bridge, and nowhere else. Needs root.

All tests share one site: five ports on one NIC that differ in who serves them. Each test counts
from where it found the counters.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from offload.client import Client
from tests.instance import Instance, config_of, vms_of
from tests.lab import (
    QUIET,
    TPID_8021AD,
    WIRE_MAC,
    Capture,
    Lab,
    Namespace,
    Tap,
    Vm,
    tag,
    test_frame,
    wait_until,
)

METRICS = "127.0.0.1:9808"
RING = 4096  # frames that a queue's CPU lets wait
QUEUED = {"web1": 0, "web2": 1, "web3": "nic", "tap1": 1}
"""Ports with a queue, and the CPU that serves it. The fifth port, web4, has none."""
MACS = {
    **{f"web{number}": f"02:15:5d:00:00:0{number}" for number in (1, 2, 3, 4)},
    "tap1": "02:15:5d:00:00:05",
}
NOBODY = "02:15:5d:00:00:99"
BROADCAST = "ff:ff:ff:ff:ff:ff"
GROUP = "33:33:00:00:00:16"
FOREIGN = {
    "vid 10": tag(10),
    "vid 4093, pcp 7": tag(4093, pcp=7, dei=1),
    "0 in 10": tag(10) + tag(0),
}
"""Tags of VLANs that no port is in."""
REFUSED = {
    "802.1ad": tag(10, tpid=TPID_8021AD),
    "802.1ad vid 0": tag(0, tpid=TPID_8021AD),
    "0 in 0": tag(0) + tag(0),
    "10 in 0": tag(0) + tag(10),
    "10 in 802.1ad": tag(10, tpid=TPID_8021AD) + tag(10),
    "802.1ad in 0": tag(0) + tag(10, tpid=TPID_8021AD),
    "three": tag(0) + tag(0) + tag(0),
}
"""Tags that no bridge may see."""


@dataclass(frozen=True)
class Site:
    """The laboratory, the daemon in it, and who is behind the ports."""

    lab: Lab
    instance: Instance
    vms: Mapping[str, Vm]
    tap: Tap

    def send(self, *frames: bytes, cpu: int = 0) -> None:
        """From the wire. The NIC receives on the CPU that sends."""
        with on_cpu(cpu):
            self.lab.wire.send(self.lab.wire_end, frames)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Mapping[str, Capture | Tap]]:
        """What arrives in each VM from now on, by port."""
        self.tap.forget()
        with contextlib.ExitStack() as stack:
            yield {
                **{name: stack.enter_context(vm.capture()) for name, vm in self.vms.items()},
                "tap1": self.tap,
            }

    def assert_delivered(self, expected: Mapping[str, list[bytes]], *frames: bytes, cpu: int = 0) -> None:
        """Send ``frames``; each port gets exactly what is expected of it, in order, and others nothing."""
        with self.listening() as ears:
            self.send(*frames, cpu=cpu)
            for name, wanted in expected.items():
                assert ears[name].wait_for(len(wanted)) == wanted, name
            end = time.monotonic() + QUIET
            while time.monotonic() < end:
                for name, ear in ears.items():
                    assert ear.frames() == expected.get(name, []), name
                time.sleep(0.02)

    def ports(self) -> dict[str, dict[str, Any]]:
        with Client(self.instance.paths.socket) as client:
            return {port.name: port.model_dump(mode="json") for port in client.ports()}

    def dropped(self, name: str) -> Counter[str]:
        return Counter(self.ports()[name]["counters"]["drops"])

    def vlan_drops(self) -> Counter[str]:
        """Frames that were dropped for their tags, by port; "wire" is where they came from the wire."""
        ports = self.ports().items()
        found = Counter({name: port["counters"]["drops"].get("vlan", 0) for name, port in ports})
        with Client(self.instance.paths.socket) as client:
            default = next(queue for queue in client.queues() if queue.id == 0)
        found["wire"] = default.drops_by_reason["vlan"]
        return found

    def tx(self, name: str) -> Counter[str]:
        """Packets that a port sent, by path."""
        paths = self.ports()[name]["counters"]["tx"]
        return Counter({path: tally["packets"] for path, tally in paths.items()})

    @property
    def bridge_vid(self) -> int:
        """The VID in which the bridge keeps untagged frames; 0 where this kernel's filters no VLANs."""
        with Client(self.instance.paths.socket) as client:
            return client.switches()[0].untagged_vid or 0

    def default_queue(self) -> Counter[str]:
        return Counter(self.instance.json("nics")[0]["default_queue"])

    def scrape(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels as they are written."""

        def get() -> str:
            with socket.create_connection((METRICS.split(":")[0], int(METRICS.split(":")[1])), 5) as client:
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                with client.makefile("r") as answer:
                    return answer.read().split("\n\n", 1)[1]

        lines = [line for line in self.lab.host.call(get).splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Threads that begin in this block run on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def stalled(cpu: int) -> Iterator[None]:
    """Nothing of normal priority runs on a CPU in this block, which is to be short."""
    spin = (
        f"import os; os.sched_setaffinity(0, {{{cpu}}});"
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10)); print(flush=True)\nwhile True: pass"
    )
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as spinner:
        assert spinner.stdout
        spinner.stdout.readline()
        try:
            yield
        finally:
            spinner.kill()


@pytest.fixture(scope="module")
def site(privilege: None) -> Iterator[Site]:
    """Four VMs on veth and one on a tap, all running. Scope: this file."""
    with Lab() as lab:
        vms = vms_of(lab, 4)
        tap = lab.tap("tap1")
        config = config_of(lab.nic, MACS) | {"metrics": {"listen": METRICS}}
        for name, cpu in QUEUED.items():
            config["ports"][name]["cpu"] = cpu
        config["ports"]["web4"]["queue"] = "off"
        lab.wire.ip(f"address add 192.0.2.1/24 dev {lab.wire_end}")
        with Instance(lab.host, config).start(speaking=vms.values()) as instance:
            tap.announce(MACS["tap1"])
            instance.wait_heard(MACS["tap1"])
            yield Site(lab, instance, vms, tap)


def frames_to(dst: str, tags: bytes = b"", first: int = 0) -> list[bytes]:
    """Frames of every length that is special: shorter than Ethernet's minimum, odd, the longest."""
    sizes = (26, 27, 59, 60, 61, 64, 127, 1000, 1499, 1513, 1514)
    return [test_frame(dst, WIRE_MAC, first + number, tags, size) for number, size in enumerate(sizes)]


# The right VM, and no other


@pytest.mark.parametrize("nic_cpu", [0, 1])
@pytest.mark.parametrize("name", MACS)
def test_the_right_vm_alone_gets_it_unchanged(site: Site, name: str, nic_cpu: int) -> None:
    frames = frames_to(MACS[name])
    site.assert_delivered({name: frames}, *frames, cpu=nic_cpu)


@pytest.mark.parametrize("dst", [BROADCAST, GROUP, "01:00:5e:00:00:fb"])
def test_a_group_frame_reaches_every_port_once_and_unchanged(site: Site, dst: str) -> None:
    frames = frames_to(dst)
    site.assert_delivered(dict.fromkeys(MACS, frames), *frames)


def test_unknown_unicast_reaches_the_bridge_and_no_port(site: Site) -> None:
    frames = frames_to(NOBODY)
    host = site.lab.host
    within = tag(site.bridge_vid) if site.bridge_vid else b""
    host.ip("link set ext0 promisc on")  # otherwise the bridge device hears only what is for the host
    try:
        with host.capture("ext0") as bridge:
            site.assert_delivered({}, *frames)
            assert bridge.wait_for(len(frames)) == frames_to(NOBODY, within)
    finally:
        host.ip("link set ext0 promisc off")


@pytest.mark.parametrize("tags", [b"", tag(0, pcp=5), tag(0, dei=1), tag(7, pcp=3)], ids=["", "p", "d", "7"])
@pytest.mark.parametrize("dst", [MACS["web4"], NOBODY, BROADCAST])
def test_a_miss_goes_to_the_bridge_bit_for_bit(site: Site, dst: str, tags: bytes) -> None:
    frames = frames_to(dst, tags)
    with site.lab.host.capture(site.lab.nic) as passed:
        site.send(*frames)
        assert passed.wait_for(len(frames)) == frames
        assert passed.extra(len(frames)) == []


# VLAN tags at untagged ports


@pytest.mark.parametrize("tags", [tag(0), tag(0, pcp=7, dei=1)], ids=["", "priority"])
@pytest.mark.parametrize("name", MACS)
def test_vid_0_is_untagged(site: Site, name: str, tags: bytes) -> None:
    site.assert_delivered({name: frames_to(MACS[name])}, *frames_to(MACS[name], tags))


def test_a_group_frame_with_vid_0_is_delivered_untagged(site: Site) -> None:
    for dst in (BROADCAST, GROUP):
        site.assert_delivered(dict.fromkeys(MACS, frames_to(dst)), *frames_to(dst, tag(0, pcp=6)))


def to_everybody(tags: bytes) -> list[bytes]:
    """A frame for each port, one for nobody and two for all."""
    targets = [*MACS.values(), NOBODY, BROADCAST, GROUP]
    return [test_frame(dst, WIRE_MAC, number, tags) for number, dst in enumerate(targets)]


@pytest.mark.parametrize("tags", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_vlan_reaches_no_untagged_port(site: Site, tags: bytes) -> None:
    """A bridge that filters VLANs drops them all and does not count that; the guards of ports do."""
    before = site.vlan_drops()
    site.assert_delivered({}, *to_everybody(tags))
    if not site.bridge_vid:  # its own frame, the broadcast and the multicast frame
        assert site.vlan_drops() - before == dict.fromkeys(MACS, 3)
    else:  # whoever has a filter on the NIC drops a second tag there
        assert site.vlan_drops() - before == dict.fromkeys(QUEUED if len(tags) > 4 else (), 1)


@pytest.mark.parametrize("tags", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_tag_reaches_no_port_and_no_bridge(site: Site, tags: bytes) -> None:
    """What filters find is dropped in XDP, all else before the bridge."""
    before = site.vlan_drops()
    site.assert_delivered({}, *to_everybody(tags))
    assert site.vlan_drops() - before == dict.fromkeys(QUEUED, 1) | {"wire": len(MACS) - len(QUEUED) + 3}


@pytest.mark.parametrize(
    ("name", "nic_cpu", "tags", "field", "at"),
    [
        pytest.param("web1", 0, tag(0) + tag(10), "vlan_nic", 0, id="two tags, NIC's CPU"),
        pytest.param("web3", 1, tag(3, tpid=TPID_8021AD), "vlan_nic", 1, id="802.1ad, NIC's CPU"),
        pytest.param("web2", 0, tag(0) + tag(10), "vlan_nic", 0, id="before it is queued"),
        pytest.param("web1", 0, tag(10), "vlan_bridge", 0, id="other VID, behind the bridge"),
        pytest.param("web4", 1, tag(10), "vlan_bridge", 1, id="no queue"),
    ],
)
def test_a_tag_is_dropped_and_counted_in_one_place(
    site: Site, name: str, nic_cpu: int, tags: bytes, field: str, at: int
) -> None:
    before = site.instance.per_cpu(name)
    site.assert_delivered({}, *[test_frame(MACS[name], WIRE_MAC, n, tags) for n in range(7)], cpu=nic_cpu)
    after = site.instance.per_cpu(name)
    moved = {
        (kind, cpu): after[cpu][kind] - before[cpu][kind]
        for cpu in range(len(after))
        for kind in ("vlan_nic", "vlan_queue", "vlan_bridge", "vlan_sent")
    }
    filtered = field == "vlan_bridge" and site.bridge_vid  # by the bridge, which counts nothing
    expected = {} if filtered else {(field, at): 7}
    assert {place: number for place, number in moved.items() if number} == expected


# Which CPU does the work


@pytest.mark.parametrize(
    ("name", "nic_cpu", "expected"),
    [
        pytest.param("web1", 0, {("direct", 0): 40}, id="queue's CPU is the NIC's"),
        pytest.param("web1", 1, {("queued", 1): 40, ("handed", 0): 40}, id="from 1 to 0"),
        pytest.param("web2", 0, {("queued", 0): 40, ("handed", 1): 40}, id="from 0 to 1"),
        pytest.param("tap1", 0, {("queued", 0): 40, ("handed", 1): 40}, id="tap"),
        pytest.param("web3", 0, {("direct", 0): 40}, id="nic on 0"),
        pytest.param("web3", 1, {("direct", 1): 40}, id="nic on 1"),
        pytest.param("web4", 1, {("bridged", 1): 40}, id="off"),
    ],
)
def test_the_queues_cpu_runs_it(
    site: Site, name: str, nic_cpu: int, expected: Mapping[tuple[str, int], int]
) -> None:
    before = site.instance.per_cpu(name)
    frames = [test_frame(MACS[name], WIRE_MAC, number) for number in range(40)]
    site.assert_delivered({name: frames}, *frames, cpu=nic_cpu)
    after = site.instance.per_cpu(name)
    moved = {
        (kind, cpu): after[cpu][kind]["packets"] - before[cpu][kind]["packets"]
        for cpu in range(len(after))
        for kind in ("direct", "queued", "handed", "returned", "bridged")
    }
    assert {place: number for place, number in moved.items() if number} == expected


# Counters


def test_every_frame_is_counted_once_by_path(site: Site) -> None:
    ports, default, samples = site.ports(), site.default_queue(), site.scrape()
    numbers = {"web1": 11, "web2": 22, "web3": 33, "tap1": 44, "web4": 55}
    sent = [
        test_frame(MACS[name], WIRE_MAC, size=100) for name, count in numbers.items() for _ in range(count)
    ]
    sent += [test_frame(BROADCAST, WIRE_MAC, size=200)] * 3
    sent += [test_frame(GROUP, WIRE_MAC, size=200)] * 2
    sent += [test_frame(NOBODY, WIRE_MAC)] * 6
    with site.listening() as ears:
        site.send(*sent)
        for name, count in numbers.items():
            ears[name].wait_for(count + 5)
    after, samples_after = site.ports(), site.scrape()

    for name, count in numbers.items():
        moved = {
            path: {unit: tally[unit] - ports[name]["counters"]["rx"][path][unit] for unit in tally}
            for path, tally in after[name]["counters"]["rx"].items()
        }
        none = {"packets": 0, "bytes": 0}
        groups = {"packets": 5, "bytes": 5 * 200}
        own = {"packets": count, "bytes": count * 100}
        if name == "web4":
            both = {"packets": count + 5, "bytes": count * 100 + 1000}
            assert moved == {"queue": none, "gro": none, "local": none, "bridge": both}
        else:
            assert moved == {"queue": own, "gro": none, "local": none, "bridge": groups}, name
        assert after[name]["counters"]["tx"] == ports[name]["counters"]["tx"], name
        assert after[name]["counters"]["drops"] == ports[name]["counters"]["drops"], name
        for path, tally in after[name]["counters"]["rx"].items():
            labels = f'{{direction="rx",path="{path}",port="{name}",switch="ext0"}}'
            assert samples_after[f"offload_port_packets_total{labels}"] == tally["packets"]
            assert samples_after[f"offload_port_bytes_total{labels}"] == tally["bytes"]

    misses = {"broadcast": 3, "multicast": 2, "no_filter": 6 + numbers["web4"]}
    assert site.default_queue() - default == misses
    for reason, count in misses.items():
        name = f'offload_default_queue_packets_total{{nic="{site.lab.nic}",reason="{reason}"}}'
        assert samples_after[name] - samples[name] == count
    by_queue = {
        name: samples_after[name] - value
        for name, value in samples.items()
        if name.startswith("offload_queue_packets_total")
    }
    assert sorted(by_queue.values()) == sorted([11, 22, 33, 44, sum(misses.values())])


def test_an_overrun_ring_is_accounted_for_frame_by_frame(site: Site) -> None:
    """The queue's CPU stands still for longer than its ring lasts."""
    number = RING + 1500
    before = site.ports()["web2"]["counters"]
    with site.listening() as ears:
        with stalled(1):
            site.send(*[test_frame(MACS["web2"], WIRE_MAC, seq) for seq in range(number)])
        delivered = len(ears["web2"].wait_for(RING // 2))
        while more := ears["web2"].extra(delivered):
            delivered += len(more)
        counters = site.ports()["web2"]["counters"]
    lost = Counter(counters["drops"]) - Counter(before["drops"])
    handed = counters["rx"]["queue"]["packets"] - before["rx"]["queue"]["packets"]
    assert lost["ring_full"] >= number - RING - 64  # what its CPU had taken out already
    assert handed + lost["ring_full"] == number
    assert delivered + lost["device_full"] == handed
    assert set(lost) <= {"ring_full", "device_full"}
    labels = '{port="web2",reason="ring_full",switch="ext0"}'
    assert site.scrape()[f"offload_port_drops_total{labels}"] == counters["drops"]["ring_full"]


def test_a_full_tap_shows(site: Site) -> None:
    """Nobody reads the tap. Its driver counts one drop per batch of frames that it refuses."""
    number = 1500
    before = site.ports()["tap1"]["counters"]
    site.tap.forget()
    site.send(*[test_frame(MACS["tap1"], WIRE_MAC, seq) for seq in range(number)])
    wait_until(
        lambda: (
            site.ports()["tap1"]["counters"]["rx"]["queue"]["packets"]
            == before["rx"]["queue"]["packets"] + number
        ),
        "all is handed over",
    )
    lost = site.dropped("tap1") - Counter(before["drops"])
    refused = number - len(site.tap.frames())
    assert 1 <= lost["device_full"] <= refused
    assert set(lost) == {"device_full"}


# Protocol stacks at both ends, with checksum offload as it comes


@pytest.mark.parametrize("name", ["web1", "web2", "web3", "web4"])
def test_ping_and_tcp_and_udp_both_ways(site: Site, name: str) -> None:
    wire, vm, address = site.lab.wire, site.vms[name].ns, f"192.0.2.1{name[-1]}"
    before = site.tx(name)
    assert_talk(wire, vm, address)
    assert_talk(vm, wire, "192.0.2.1")
    assert_sent_by(site, name, before, "bridge" if name == "web4" else "direct")


@pytest.mark.parametrize("name", ["web1", "web4"])
def test_vm_to_vm(site: Site, name: str) -> None:
    """Past the bridge, unless one of the two has ``queue: off``; never on the wire."""
    path = "bridge" if name == "web4" else "local"
    before, answers = site.tx(name), site.tx("web2")
    with site.lab.wire.capture(site.lab.wire_end) as wire:
        assert_talk(site.vms[name].ns, site.vms["web2"].ns, "192.0.2.12")
        assert not wire.matching(lambda frame: not frame[0] & 1)
    assert_sent_by(site, name, before, path)
    assert_sent_by(site, "web2", answers, path)


def assert_sent_by(site: Site, name: str, before: Counter[str], path: str) -> None:
    """Since ``before`` a port has sent all by one path, an ARP request now and then aside.

    Whoever only acknowledges sends few frames when segments are large.
    """
    sent = site.tx(name) - before
    assert sent.pop(path) >= 20
    assert set(sent) <= {"bridge"}
    assert sent["bridge"] <= 10


def assert_talk(client: Namespace, server: Namespace, address: str) -> None:
    """Echo requests, 4 MB over TCP and 200 datagrams over UDP all arrive, bit for bit."""
    client.run("ping", "-c3", "-i0.05", "-W2", address)
    stream = os.urandom(4 << 20)
    with (
        server.call(lambda: socket.create_server((address, 5201))) as listener,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        received = pool.submit(receive_all, listener)
        with client.call(lambda: socket.create_connection((address, 5201), 5)) as connection:
            connection.sendall(stream)
        assert received.result() == stream
    with (
        server.call(lambda: socket.socket(type=socket.SOCK_DGRAM)) as receiver,
        client.call(lambda: socket.socket(type=socket.SOCK_DGRAM)) as sender,
    ):
        receiver.bind((address, 5201))
        receiver.settimeout(5)
        for number in range(200):
            datagram = stream[number : number + 1 + 7 * number]
            sender.sendto(datagram, (address, 5201))
            assert receiver.recv(2048) == datagram


def receive_all(listener: socket.socket) -> bytes:
    """What one client sends until it is done."""
    listener.settimeout(5)
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(5)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
