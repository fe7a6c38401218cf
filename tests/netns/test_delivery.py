"""TCP that is merged (GRO) on its way from the wire to a VM, and what else comes there. Needs root.

Every transfer is compared byte for byte, and says by which path its packets came.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.instance import Instance
from tests.instance import config_of as instance_config
from tests.lab import QUIET, TEST_ETHERTYPE, WIRE_MAC, Lab, Stream, Tap, seq_of, tag, test_frame, wait_until
from tests.tcp import BLOCK, End, config_of, ends_of, mac_of, transfer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

BLOCKS = 16
FRAMES = BLOCKS * len(BLOCK) // 1500
"""That a transfer has at least."""
NIC_CPU, OTHER_CPU = 0, 1


@dataclass(frozen=True)
class Site:
    lab: Lab
    ends: Mapping[str, End]
    instance: Instance

    def rx(self, name: str = "web1") -> dict[str, int]:
        paths = self.instance.port(name)["counters"]["rx"]
        return {path: traffic["packets"] for path, traffic in paths.items()}

    def transfer(self, sink: str = "web1", blocks: int = BLOCKS) -> dict[str, int]:
        """TCP from the wire, sent on ``NIC_CPU``; returns what came by each path."""
        before = self.rx(sink)
        with on_cpu(NIC_CPU):  # a veth receives on the CPU that sends
            transfer(self.ends["wire"], self.ends[sink], blocks)
        after = self.rx(sink)
        return {path: after[path] - before[path] for path in after}

    def pieces(self, name: str = "web1") -> int:
        return sum(row["merged_buffers"] for row in self.instance.per_cpu(name))


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})  # threads that are started now have it too
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.fixture
def run(privilege: None) -> Iterator[Callable[..., Site]]:
    """Start a daemon whose ports have these keys, and let both VMs be heard. Scope: one test."""
    with contextlib.ExitStack() as stack:

        def start(bridge: str = "kernel", **port: object) -> Site:
            lab = stack.enter_context(Lab())
            ends = ends_of(lab)
            config = config_of(lab, bridge, "auto")
            for name in ("web1", "web2"):
                config["ports"][name] |= port
            instance = stack.enter_context(Instance(lab.host, config)).start()
            for name in ("web1", "web2"):
                ends[name].ns.run("ping", "-c", "1", "-W", "5", "192.0.2.1")
            instance.wait_heard(mac_of("web1"), mac_of("web2"))
            return Site(lab, ends, instance)

        yield start


QUEUES = {
    "nic": {"cpu": "nic"},
    "own-cpu": {"cpu": OTHER_CPU},
    "python-bridge": {"cpu": "nic", "bridge": "python"},
}


@pytest.mark.parametrize("fields", QUEUES.values(), ids=QUEUES.keys())
def test_merged_on_the_way(run: Callable[..., Site], fields: Mapping[str, object]) -> None:
    """To the right VM, past the bridge, few large packets; the other VM gets nothing."""
    site = run(delivery="gro", **fields)
    port = site.instance.port("web1")
    assert (port["delivery_asked"], port["delivery"], port["path"], port["reason"]) == (
        "gro",
        "gro",
        "queue",
        None,
    )
    before = site.rx("web2")
    came = site.transfer()
    assert came["gro"] > FRAMES
    assert came["queue"] == 0
    assert came["bridge"] <= 2  # an ARP request
    assert site.pieces() < came["gro"] / 4
    assert site.rx("web2") == before
    assert port["counters"]["drops"] == {}
    queue = next(queue for queue in site.instance.json("queues") if queue["ports"] == ["web1"])
    assert queue["packets"] >= came["gro"]


def test_a_tap_without_offloads_gets_frames_of_its_mtu(privilege: None) -> None:
    """What was merged is taken apart again. The VM is a tap as well, with a cable of ours between the two."""
    with Lab() as lab, contextlib.ExitStack() as held:
        lab.wire.ip(f"address add 192.0.2.1/24 dev {lab.wire_end}")
        vm = lab.namespace("vm")
        outer, inner = lab.tap("tap1"), held.enter_context(contextlib.closing(Tap(vm, "eth0", 1)))
        vm.ip(f"link set eth0 address {mac_of('web1')} up")
        vm.ip("address add 192.0.2.11/24 dev eth0")
        longest = held.enter_context(cable(outer, inner))
        config = instance_config(lab.nic, {"tap1": mac_of("web1")}, delivery="gro", cpu="nic")
        instance = held.enter_context(Instance(lab.host, config)).start()
        vm.run("ping", "-c", "1", "-W", "5", "192.0.2.1")
        instance.wait_heard(mac_of("web1"))
        ends = {"wire": End(lab.wire, "192.0.2.1", lab.nic), "tap1": End(vm, "192.0.2.11", "tap1")}
        site = Site(lab, ends, instance)
        came = site.transfer("tap1", blocks=4)
        assert came["gro"] > 4 * len(BLOCK) // 1500
        assert site.pieces("tap1") < came["gro"] / 2
        assert 1400 < longest() <= 1514


@contextlib.contextmanager
def cable(one: Tap, other: Tap) -> Iterator[Callable[[], int]]:
    """Carries frames between two taps; the answer is how long the longest one from ``one`` was."""
    ended = threading.Event()
    lengths = [0]

    def carry() -> None:
        ways = {one.fileno(): other.fileno(), other.fileno(): one.fileno()}
        while not ended.is_set():
            for source in select.select([*ways], [], [], 0.1)[0]:
                with contextlib.suppress(BlockingIOError):
                    frame = os.read(source, 65536)
                    os.write(ways[source], frame)
                    if source == one.fileno():
                        lengths.append(max(lengths.pop(), len(frame)))

    carrier = threading.Thread(target=carry)
    carrier.start()
    try:
        yield lambda: lengths[0]
    finally:
        ended.set()
        carrier.join()


def test_frames_of_all_kinds_keep_their_place(run: Callable[..., Site], bridge_filters_vlans: bool) -> None:
    """What cannot be merged comes as it was sent, in order, without a VID 0 tag; other VLANs do not come."""
    site = run(delivery="gro", cpu="nic")
    wire, web1, web2 = site.lab.wire, site.ends["web1"], site.ends["web2"]
    plain = [test_frame(mac_of("web1"), WIRE_MAC, seq, tag(0) if seq % 2 else b"") for seq in range(100)]
    astray = [
        test_frame(mac_of("web1"), WIRE_MAC, 200, tag(10)),
        test_frame(mac_of("web1"), WIRE_MAC, 201, tag(0) * 2),
    ]
    with web1.ns.capture("eth0") as seen, web2.ns.capture("eth0") as other:
        wire.send(site.lab.wire_end, [*astray, *plain])
        arrived = seen.wait_for(100)
        assert [seq_of(frame) for frame in arrived] == list(range(100))
        assert all(frame[12:14] == TEST_ETHERTYPE.to_bytes(2, "big") for frame in arrived)
        assert seen.extra(100, QUIET) == []
        other.assert_silent()
    # In XDP, and behind the bridge, unless that itself stops what is in another VLAN.
    assert site.instance.port("web1")["counters"]["drops"] == {"vlan": 1 if bridge_filters_vlans else 2}


def test_auto_merges_bulk_and_stops_when_nothing_merges(run: Callable[..., Site]) -> None:
    """TCP alone goes another way, and comes back when it is small segments that cannot be merged."""
    site = run(delivery="auto", cpu="nic")
    assert site.instance.port("web1")["delivery"] == "frames"
    assert site.transfer()["gro"] == 0

    def merged() -> bool:
        site.transfer()
        return bool(site.instance.port("web1")["delivery"] == "tcp")

    wait_until(merged, "bulk is seen", 40)
    assert site.transfer()["queue"] == 0
    before = site.rx()
    frames = [test_frame(mac_of("web1"), WIRE_MAC, seq) for seq in range(50)]
    site.lab.wire.send(site.lab.wire_end, frames)
    wait_until(lambda: site.rx()["queue"] == before["queue"] + 50, "other frames go as they come")
    segment = tcp_segment()
    ended = threading.Event()

    def flood() -> Iterator[bytes]:
        while not ended.is_set():
            yield segment

    flooding = threading.Thread(target=lambda: site.lab.wire.send(site.lab.wire_end, flood()))
    flooding.start()
    try:
        site.instance.wait_port("web1", 40, delivery="frames")
    finally:
        ended.set()
        flooding.join()
    assert "frames became one" in site.instance.log.read_text()


def tcp_segment() -> bytes:
    """An acknowledgement that nobody waits for, to web1."""
    ip = bytes.fromhex("4500002800000000 4006f6b8 c0000201 c000020b")
    tcp = bytes.fromhex("00010001 00000000 00000000 50100000 00000000")
    frame = test_frame(mac_of("web1"), WIRE_MAC, ethertype=0x0800)
    return frame[:14] + (ip + tcp).ljust(46, b"\0")


@pytest.fixture
def changeable(run: Callable[..., Site]) -> Site:
    """web1 is a port that `port set` can change, with its queue on the NIC's CPU. Scope: one test."""
    site = run(cpu="nic")
    config = json.loads(site.instance.file.read_text())
    del config["ports"]["web1"]
    site.instance.cli("apply", str(site.instance.write(config)))
    mac = mac_of("web1")
    site.instance.cli(*f"port add web1 --switch ext0 --device web1 --mac {mac} --cpu nic".split())
    site.ends["web1"].ns.run("ping", "-c", "1", "-W", "5", "192.0.2.1")
    site.instance.wait_port("web1", path="queue")
    return site


def test_port_set_loses_and_reorders_no_frame(changeable: Site) -> None:
    lab, instance = changeable.lab, changeable.instance
    with changeable.ends["web1"].ns.capture("eth0") as seen:
        with Stream(lab.wire, lab.wire_end, mac_of("web1"), cpu=NIC_CPU) as stream:
            for way in ("gro", "frames", "gro", "auto"):
                stream.run_on(50)
                instance.cli("port", "set", "web1", "--delivery", way)
            stream.run_on(50)
        numbered = seen.wait_for(stream.sent, wanted=lambda frame: seq_of(frame) is not None)
        arrived = [seq_of(frame) for frame in numbered]
    assert arrived == list(range(stream.sent))
    assert instance.port("web1")["counters"]["drops"] == {}
    assert "overtaken" not in instance.log.read_text()


def test_port_set_under_bulk_tcp(changeable: Site) -> None:
    """A stream without a pause arrives whole, and is hardly disturbed."""
    ended = threading.Event()
    paths: dict[str, int] = {}

    def bulk() -> None:
        while not ended.is_set():
            for path, packets in changeable.transfer().items():
                paths[path] = paths.get(path, 0) + packets

    def more_than(packets: int) -> bool:
        return sum(paths.values()) > packets

    started = disturbed(changeable)
    running = threading.Thread(target=bulk)
    running.start()
    try:
        for way in ("gro", "frames"):
            changeable.instance.cli("port", "set", "web1", "--delivery", way)
            assert changeable.instance.port("web1")["delivery"] == way
            goal = sum(paths.values()) + 2 * FRAMES
            wait_until(partial(more_than, goal), "TCP goes on", 40)
    finally:
        ended.set()
        running.join()
    sent_again, disordered = (
        after - before for after, before in zip(disturbed(changeable), started, strict=True)
    )
    print(f"{paths}, {sent_again} segments sent again, {disordered} out of order")
    assert min(paths["gro"], paths["queue"]) > FRAMES
    assert changeable.instance.port("web1")["counters"]["drops"] == {}
    assert disordered < 128  # what two polls of the NIC bring


def disturbed(site: Site) -> tuple[int, int]:
    """Segments that the wire has sent again, and that web1 has got out of order."""
    return (counted(site.ends["wire"], "TcpRetransSegs"), counted(site.ends["web1"], "TcpExtTCPOFOQueue"))


def counted(end: End, name: str) -> int:
    """A counter of an end's stack."""
    return int(json.loads(end.ns.run("nstat", "-asz", "--json", name).stdout)["kernel"][name])


def test_generic_xdp_says_why_it_merges_nothing(privilege: None) -> None:
    with Lab() as lab:
        ends_of(lab)
        config: dict[str, Any] = config_of(lab, "kernel", "auto")
        config["nics"][lab.nic] = {"xdp_mode": "generic"}
        config["ports"]["web1"]["delivery"] = "gro"
        with Instance(lab.host, config) as instance:
            port = instance.start().wait_port("web1", state="active")
            assert (port["delivery"], port["reason"]) == (
                "frames",
                f"delivery: frames: {lab.nic} has XDP in generic mode, for which the kernel leaves GRO out",
            )
