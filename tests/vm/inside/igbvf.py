"""Virtual functions of the Intel 82576 as hardware queues, by the real drivers igb and igbvf.

The counters of the devices say where the card has sorted a frame.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from offload.errors import ForeignError
from offload.hardware import Function
from offload.kernel import sriov
from offload.kernel.dataplane import Dataplane
from offload.kernel.explain import Question, explain
from offload.kernel.links import Links
from offload.model import Link, MemberRow, NetworkRow, PortRecord, StationRow
from offload.paths import Paths
from offload.plan import RUNNING
from tests.instance import shared_cache
from tests.lab import WIRE_MAC, Stream, Vm, seq_of, tag, test_frame, wait_until
from tests.vm.inside.cards import LINK_SECONDS, Cards

pytestmark = pytest.mark.timeout(300)

COUNT = 20
WEB1, WEB2 = "02:15:5d:00:00:01", "02:15:5d:00:00:02"
MACS, VIDS, UPLINK = (WEB1, WEB2), (0, 10), 2
"""By port and by virtual function: the first is without a VLAN. The NIC is a port as well."""
BROADCAST = "ff:ff:ff:ff:ff:ff"
QUIET = 1.0
"""Seconds that an emulated card is watched for what must not come."""

T = TypeVar("T")


@dataclass
class Site:
    """A NIC with two virtual functions, each of which serves a VM."""

    lab: Cards
    plane: Dataplane
    vms: tuple[Vm, Vm]
    functions: tuple[Function, ...]

    def do(self, work: Callable[[], T]) -> T:
        """``work()`` where the devices are."""
        return self.lab.host.call(work)

    def nic(self) -> Link:
        return link_of(self.lab, self.lab.nic)

    def device(self, index: int) -> tuple[str, int]:
        """Name and ifindex of a virtual function's device."""
        device, ifindex = self.functions[index].device, self.functions[index].ifindex
        assert device is not None
        assert ifindex is not None
        return device, ifindex

    def steer(self, index: int, mac: str | None, vid: int = 0) -> None:
        self.do(lambda: sriov.set_address(self.nic(), index, mac, vid))

    def run_port(self, port: int, running: bool) -> None:
        ifindex = self.lab.host.ifindex(self.vms[port].device)
        flags = RUNNING if running else 0
        record = PortRecord(f"web{port + 1}", port + 1, None, VIDS[port], flags, 1514, ifindex)
        self.do(lambda: self.plane.set_port(port, record))

    def counts(self) -> tuple[int, int, int]:
        """Frames that the card has sorted into the NIC itself and into its two virtual functions."""
        own = sum(self.lab.counter(f"rx_queue_{queue}_packets") for queue in range(2))
        first, second = (link_of(self.lab, self.device(index)[0]).rx_packets for index in range(2))
        return own, first, second

    def send(self, mac: str, tags: bytes = b"") -> list[bytes]:
        sent = [test_frame(mac, WIRE_MAC, seq, tags) for seq in range(COUNT)]
        self.lab.wire.send(self.lab.wire_end, sent)
        return sent

    def dropped(self, index: int) -> dict[str, int]:
        """Packets that a virtual function did not deliver, by reason."""
        counters = self.plane.function_counters(self.device(index)[1])
        return {name: tally["packets"] for name, tally in counters.items()}


def link_of(lab: Cards, name: str) -> Link:
    with Links(lab.host.path) as links:
        return links.snapshot()[name]


def bare(frame: bytes) -> bytes:
    """The frame without the tag behind its MACs."""
    return frame[:12] + frame[16:]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Scope: one module; tests leave it as it was."""
    subprocess.run(["modprobe", "igbvf"], check=True)
    pins = tmp_path_factory.mktemp("bpf")
    with ExitStack() as undo:
        lab = undo.enter_context(Cards("igb"))
        subprocess.run(["mount", "-t", "bpf", "bpf", pins], check=True)
        undo.callback(lambda: subprocess.run(["umount", pins], check=True))
        lab.host.run("ethtool", "-K", lab.nic, "rxvlan", "off", "rx-vlan-filter", "off")
        lab.wait_link()
        undo.callback(lab.host.call, lambda: sriov.unmake(lab.nic))
        yield start(lab, pins, undo)


def start(lab: Cards, pins: Path, undo: ExitStack) -> Site:
    """Everything in the order in which it is to be: virtual functions, XDP on the NIC, ports, addresses."""
    nic = link_of(lab, lab.nic)
    lab.host.call(lambda: sriov.make(nic, len(MACS)))
    plane = lab.host.call(lambda: undo.enter_context(Dataplane(pins / "v4", shared_cache())))
    lab.host.call(lambda: plane.attach(lab.nic, nic.ifindex, "native"))
    undo.callback(lab.host.call, lambda: plane.detach(nic.ifindex))
    with Links(lab.host.path) as links:
        functions = lab.host.call(lambda: sriov.functions(links, nic))
    vms = (lab.vm("web1", WEB1), lab.vm("web2", WEB2))
    site = Site(lab, plane, vms, functions)
    uplink = PortRecord("uplink", 0, None, 0, 0, 1514, nic.ifindex)
    lab.host.call(lambda: plane.set_port(UPLINK, uplink))
    plane.set_network(0, NetworkRow("ext0", UPLINK, 0, 0, False))
    for port, (mac, vid) in enumerate(zip(MACS, VIDS, strict=True)):
        device, ifindex = site.device(port)
        lab.host.sysctl(f"net.ipv6.conf.{device}.disable_ipv6", 1, missing_ok=True)
        vms[port].ns.run("ethtool", "-K", "eth0", "gro", "on")
        site.run_port(port, True)
        plane.set_filter(nic.ifindex, mac, vid, port)
        plane.set_station(0, mac, vid, StationRow(port, lab.host.ifindex(vms[port].device), "here"))
        member = MemberRow(UPLINK, 0, "function", pvid=vid)
        lab.host.call(lambda d=device, i=ifindex, m=member: plane.set_member(d, i, m))  # type: ignore[misc]
        lab.host.call(lambda d=device, i=ifindex: plane.attach_function(d, i, nic.ifindex, "generic"))  # type: ignore[misc]
        plane.set_function(ifindex, port, vid)
        lab.host.ip(f"link set {device} up")
        undo.callback(plane.clear_member, ifindex)
    lab.wait_link()
    wait_until(
        lambda: all(link_of(lab, site.device(index)[0]).running for index in range(2)),
        "the virtual functions have a link",
        LINK_SECONDS,
    )
    for index, (mac, vid) in enumerate(zip(MACS, VIDS, strict=True)):
        site.steer(index, mac, vid)
    return site


def test_what_was_made_reads_back(site: Site) -> None:
    nic = site.nic()
    with Links(site.lab.host.path) as links:
        found = site.do(lambda: sriov.functions(links, nic))
        assert [(one.index, one.mac, one.vid) for one in found] == [(0, WEB1, 0), (1, WEB2, 10)]
        assert [(one.device, one.ifindex) for one in found] == [site.device(0), site.device(1)]
        site.steer(1, None)
        try:
            assert [(one.mac, one.vid) for one in site.do(lambda: sriov.functions(links, nic))] == [
                (WEB1, 0),
                ("", 0),
            ]
        finally:
            site.steer(1, WEB2, 10)
    assert site.do(lambda: (sriov.made(nic.name), sriov.total(nic.name))) == (2, 7)
    assert Path("/sys/bus/pci/devices/0000:01:00.0/sriov_drivers_autoprobe").read_text().strip() == "1"
    with pytest.raises(ForeignError, match=r"eth1.*2 virtual functions"):
        site.do(lambda: sriov.make(nic, 3))
    assert site.do(lambda: sriov.made(nic.name)) == 2


@pytest.mark.parametrize("promiscuous", ["off", "on"])
@pytest.mark.parametrize("port", [0, 1], ids=["untagged", "VLAN 10"])
def test_its_mac_and_vlan_reach_the_vm(site: Site, port: int, promiscuous: str) -> None:
    """By its virtual function, and by nothing else: a bridge makes the NIC promiscuous."""
    site.lab.host.ip(f"link set {site.lab.nic} promisc {promiscuous}")
    try:
        before, direct = site.counts(), site.plane.port_counters(2)
        with site.vms[port].capture() as seen, site.vms[1 - port].capture() as other:
            sent = site.send(MACS[port], tag(10) if VIDS[port] else b"")
            came = seen.wait_for(COUNT, LINK_SECONDS)
            assert sorted(came) == sorted(bare(frame) if VIDS[port] else frame for frame in sent)
            assert seen.extra(COUNT, QUIET) == []
            other.assert_silent()
        expected = [0, 0, 0]
        expected[1 + port] = COUNT
        moved = [now - then for now, then in zip(site.counts(), before, strict=True)]
        assert moved == expected
        now = site.plane.port_counters(2)
        assert now[port]["direct"]["packets"] - direct[port]["direct"]["packets"] == COUNT
        assert now[1 - port] == direct[1 - port]
    finally:
        site.lab.host.ip(f"link set {site.lab.nic} promisc off")


@pytest.mark.parametrize(
    ("mac", "tags"),
    [(WEB1, tag(10)), (WEB1, tag(11)), (WEB2, b""), (WEB2, tag(11))],
    ids=["tagged to the untagged one", "VID 11 to it", "untagged to VLAN 10", "VID 11 to VLAN 10"],
)
def test_its_mac_in_another_vlan_reaches_nobody(site: Site, mac: str, tags: bytes) -> None:
    before = site.counts()
    with site.vms[0].capture() as one, site.vms[1].capture() as two:
        site.send(mac, tags)
        one.assert_silent(QUIET)
        two.assert_silent()
    assert site.counts()[1:] == before[1:]


def test_it_is_explained_as_the_card_reads_back(site: Site, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(shared_cache())
    paths = Paths(tmp_path / "run", tmp_path, site.plane.pins.parent)
    question = Question(nic=site.lab.nic, port=None, dst=WEB2, vids=(10,))
    view = site.do(lambda: explain(question, paths))
    device, _ = site.device(1)
    assert (view.verdict, view.port, view.vlan_action) == ("queue", "web2", "strip")
    assert [(step.program, step.device, step.counter) for step in view.steps] == [
        ("function", device, "direct")
    ]
    assert f"{device} and strips the tag, so that the VLAN rests on the hardware: it was read" in view.reason


def test_a_broadcast_comes_once(site: Site) -> None:
    """To the NIC, from where the bridge would take it to the VMs; the virtual function's copy is dropped."""
    before = site.dropped(0)
    with site.lab.host.capture(site.lab.nic) as nic, site.vms[0].capture() as vm:
        sent = site.send(BROADCAST)
        assert sorted(nic.wait_for(COUNT, LINK_SECONDS)) == sorted(sent)
        assert nic.extra(COUNT, QUIET) == []
        vm.assert_silent()
    wait_until(lambda: site.dropped(0)["group"] == before["group"] + COUNT, "the copies are counted")
    assert site.dropped(0) == before | {"group": before["group"] + COUNT}


@pytest.mark.parametrize("port", [0, 1], ids=["untagged", "VLAN 10"])
def test_a_paused_port_s_frames_come_to_the_nic_as_from_the_wire(site: Site, port: int) -> None:
    before = site.counts()
    site.run_port(port, False)
    try:
        with site.lab.host.capture(site.lab.nic) as nic, site.vms[port].capture() as vm:
            sent = site.send(MACS[port], tag(10, 5) if VIDS[port] else b"")
            came = nic.wait_for(COUNT, LINK_SECONDS)
            wanted = [frame[:14] + b"\x00\x0a" + frame[16:] if VIDS[port] else frame for frame in sent]
            assert sorted(came) == sorted(wanted)
            assert nic.extra(COUNT, QUIET) == []
            vm.assert_silent()
    finally:
        site.run_port(port, True)
    assert site.counts()[0] == before[0]
    assert site.counts()[1 + port] == before[1 + port] + COUNT


def test_an_address_moves_while_frames_come(site: Site) -> None:
    """Into a running virtual function and out of it: none is lost, none comes twice."""
    before = site.counts()
    with (
        site.vms[0].capture() as seen,
        Stream(site.lab.wire, site.lab.wire_end, WEB1, rate=1000) as stream,
    ):
        for mac in (None, WEB1, None, WEB1):
            stream.run_on(200)
            site.steer(0, mac)
        stream.run_on(200)
        sent = stream.stop()
        came = [seq_of(frame) for frame in seen.wait_for(sent, LINK_SECONDS)]
        assert sorted(number for number in came if number is not None) == list(range(sent))
        assert seen.extra(sent, QUIET) == []
    own, first, second = (now - then for now, then in zip(site.counts(), before, strict=True))
    assert min(own, first) > COUNT
    assert (own + first, second) == (sent, 0)
