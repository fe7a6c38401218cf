"""The switch's programs on real devices: tags beside the frame, segments still to be made, and who gets what.

Behind them is a bridge without VLAN filtering, which hands tags on as they are. Every test runs with
tcx links, and those that say so with classic filters too.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from offload.kernel.bpf import Link
from offload.kernel.bypassed import Place, look
from offload.kernel.dataplane import Dataplane
from offload.model import MemberRow, NetworkRow, News, PortRecord, Role, StationRow
from offload.plan import BYPASS, RUNNING
from tests.bpf.loaded import flat, skb
from tests.lab import (
    QUIET,
    SOL_PACKET,
    TPID_8021AD,
    WIRE_MAC,
    Lab,
    Namespace,
    Vm,
    seq_of,
    tag,
    test_frame,
    udp4,
    wait_until,
)

pytestmark = pytest.mark.slow

T = TypeVar("T")

MACS = {f"web{number}": f"02:15:5d:00:00:{number:02x}" for number in range(1, 6)}
HOST_MAC = "02:15:5d:00:00:aa"
BROADCAST = "ff:ff:ff:ff:ff:ff"
NETWORK = 7
PACKET_QDISC_BYPASS = 20  # include/uapi/linux/if_packet.h


class Net:
    """A switch: a bridge, the lab's NIC as uplink, and the VMs of ``add``. Port ids go from 0, the NIC's."""

    def __init__(self, lab: Lab, bpffs: Path, cache: Path) -> None:
        self.lab = lab
        self.pins = bpffs / "v4"
        self.plane = Dataplane(self.pins, cache)
        self.ids: dict[str, int] = {}
        lab.host.ip("link add br0 type bridge mcast_snooping 0")
        lab.host.ip("link set br0 up")

    def do(self, work: Callable[[], T]) -> T:
        return self.lab.host.call(work)

    def open(self, conduit: int = 0, **network: Any) -> None:
        """Make the network, and the NIC its uplink."""
        self.do(self.plane.open)
        row = {"uplink": 0, "untagged": 0, "ask_bridge": False} | network
        self.plane.set_network(NETWORK, NetworkRow(name="ext0", conduit=conduit, **row))
        self.member(self.lab.nic, "uplink")

    def member(self, device: str, role: Role = "port", mac: str | None = None, **fields: Any) -> int:
        """Make a device a port of the switch; returns its ifindex. ``vids`` makes it a trunk of them."""
        port = self.ids.setdefault(device, len(self.ids))
        ifindex = self.lab.host.ifindex(device)
        vids = fields.pop("vids", None)
        row = MemberRow(port, NETWORK, role, trunk=vids is not None, **({"bypass": True} | fields))
        self.do(
            lambda: self.plane.set_port(port, PortRecord(device, 0, None, 0, RUNNING | BYPASS, 1514, ifindex))
        )
        if vids is not None:
            self.plane.set_trunk(port, frozenset(vids))
        own = frozenset() if row.pvid is None else frozenset({row.pvid})
        for vid in own.union(vids or ()):
            if mac:
                self.plane.set_station(NETWORK, mac, vid, StationRow(port, ifindex))
        self.do(lambda: self.plane.set_member(device, ifindex, row))
        if role != "conduit":
            self.lab.host.ip(f"link set {device} master br0")
        return ifindex

    def add(self, device: str, address: str | None = None, **fields: Any) -> Vm:
        """A VM whose port it is."""
        vm = self.lab.vm(device, MACS[device], address)
        # Until a new link is seen to be up its queue takes frames, and loses them.
        wait_until(lambda: "state UP" in vm.ns.ip("link show dev eth0"), f"the link of {device} is up")
        self.member(device, mac=vm.mac, **fields)
        return vm

    def hear(self, vm: Vm, tags: bytes = b"") -> None:
        """Let a VM send a frame that reaches nobody; returns when it has told that the VM is here."""
        vm.send([test_frame(vm.mac, vm.mac, tags=tags)])
        wait_until(lambda: self.states(vm.mac).count("here") > 0, f"{vm.device} is heard")

    def states(self, mac: str) -> list[str]:
        return [row.state for (_, found, _), row in self.plane.stations().items() if found == mac]

    def counts(self, device: str) -> dict[str, int]:
        """What has moved of a port's counters."""
        return {name: value for name, value in flat(self.plane.port_counters(16)[self.ids[device]]) if value}


@pytest.fixture
def net(lab: Lab, bpffs: Path, cache: Path) -> Iterator[Net]:
    """Scope: one test."""
    made = Net(lab, bpffs, cache)
    yield made
    made.plane.remove_everything()


@pytest.fixture(params=["tcx", "classic"])
def both(net: Net, request: pytest.FixtureRequest) -> Net:
    """``net``, once with tcx links and once as on a kernel that has none. Scope: one test."""
    if request.param == "classic":
        net.plane.tc.tcx = False
    return net


# Tags

WAYS = [
    pytest.param({}, b"", {}, b"", b"", id="untagged"),
    pytest.param({}, tag(0, 5), {}, b"", b"", id="priority-tagged"),
    pytest.param({"pvid": 10}, b"", {"pvid": 10}, b"", tag(10), id="access"),
    pytest.param({"pvid": 10}, tag(0, 5), {"pvid": 10}, b"", tag(10, 5), id="access, priority-tagged"),
    pytest.param({"pvid": 10}, b"", {"vids": [10]}, tag(10), tag(10), id="access to trunk"),
    pytest.param({"vids": [10]}, tag(10, 3), {"pvid": 10}, b"", tag(10, 3), id="trunk to access"),
    pytest.param({"vids": [10]}, tag(10, 3), {"vids": [10]}, tag(10, 3), tag(10, 3), id="trunk to trunk"),
    pytest.param({"vids": [10]}, b"", {}, b"", b"", id="untagged of a trunk"),
    pytest.param({"vids": [10], "pvid": 1}, b"", {"pvid": 1}, b"", tag(1), id="native to access"),
    pytest.param({"pvid": 1}, b"", {"vids": [10], "pvid": 1}, b"", tag(1), id="access to native"),
    pytest.param(
        {"vids": [10]}, tag(10) + tag(30), {"vids": [10]}, tag(10) + tag(30), tag(10) + tag(30), id="two tags"
    ),
]


@pytest.mark.parametrize(("sender", "sent", "receiver", "received", "on_the_wire"), WAYS)
def test_tags(
    both: Net, sender: Any, sent: bytes, receiver: Any, received: bytes, on_the_wire: bytes
) -> None:
    """Unicast past the bridge, broadcast by it, and unicast straight to the wire: each the same, and once."""
    both.open()
    one, other = both.add("web1", **sender), both.add("web2", **receiver)
    both.hear(other, received)
    targets = [other.mac, BROADCAST, WIRE_MAC]
    with other.capture() as inside, both.lab.wire.capture(both.lab.wire_end) as outside:
        one.send([test_frame(dst, one.mac, seq, tags=sent) for seq, dst in enumerate(targets)])
        got = inside.wait_for(2)
        assert got + inside.extra(2) == [
            test_frame(dst, one.mac, seq, tags=received) for seq, dst in enumerate(targets[:2])
        ]
        wired = outside.wait_for(2)
        assert sorted(wired + outside.extra(2)) == sorted(
            test_frame(targets[seq], one.mac, seq, tags=on_the_wire) for seq in (1, 2)
        )
    assert both.counts("web1") == {
        **{f"tx_{way}.packets": 1 for way in ("local", "direct", "bridge")},
        **{f"tx_{way}.bytes": 60 + len(sent) for way in ("local", "direct", "bridge")},
    }
    size = 60 + len(on_the_wire)
    counted = {
        f"{way}.{unit}": n for way in ("local", "bridged") for unit, n in (("packets", 1), ("bytes", size))
    }
    assert {name: both.counts("web2")[name] for name in counted} == counted


REFUSED = [
    pytest.param({}, tag(10), id="untagged port, a VID"),
    pytest.param({}, tag(0) + tag(10), id="untagged port, VID 0 over a VID"),
    pytest.param({}, tag(10, tpid=TPID_8021AD), id="untagged port, 802.1ad"),
    pytest.param({}, tag(0, tpid=TPID_8021AD), id="untagged port, 802.1ad with VID 0"),
    pytest.param({"pvid": 10}, tag(10), id="access port, its VID"),
    pytest.param({"vids": [10]}, tag(20), id="trunk, another VID"),
    pytest.param({"vids": [10], "pvid": 1}, tag(1) + tag(10), id="trunk, a tag under its native VID"),
    pytest.param({"vids": [10], "pvid": None}, b"", id="trunk without a native VID, untagged"),
    pytest.param({"vids": [10]}, tag(10, tpid=TPID_8021AD), id="trunk, 802.1ad"),
]


@pytest.mark.parametrize(("sender", "sent"), REFUSED)
def test_what_a_port_may_not_send(net: Net, sender: Any, sent: bytes) -> None:
    net.open()
    vm, others = net.add("web1", **sender), [net.add("web2"), net.add("web3", pvid=10)]
    for other in others:
        net.hear(other)
    captures = [other.capture() for other in others] + [net.lab.wire.capture(net.lab.wire_end)]
    vm.send([test_frame(dst, vm.mac, tags=sent) for dst in (MACS["web2"], MACS["web3"], BROADCAST, WIRE_MAC)])
    wait_until(lambda: net.counts("web1") == {"vlan_sent": 4}, "the four frames are dropped for their tags")
    for capture in captures:
        capture.assert_silent()
        capture.close()


@pytest.mark.parametrize(
    ("receiver", "sent", "received"),
    [
        pytest.param({}, b"", b"", id="untagged port, untagged"),
        pytest.param({}, tag(0, 5), b"", id="untagged port, VID 0"),
        pytest.param({}, tag(10), None, id="untagged port, a VID"),
        pytest.param({}, tag(0) + tag(10), None, id="untagged port, VID 0 over a VID"),
        pytest.param({}, tag(10) + tag(20), None, id="untagged port, two tags"),
        pytest.param({"pvid": 10}, tag(10, 5), b"", id="access port, its VID"),
        pytest.param({"pvid": 10}, b"", None, id="access port, untagged"),
        pytest.param({"pvid": 10}, tag(0), None, id="access port, VID 0"),
        pytest.param({"pvid": 10}, tag(10) + tag(20), None, id="access port, its VID over another tag"),
        pytest.param({"pvid": 10}, tag(10, tpid=TPID_8021AD), None, id="access port, 802.1ad"),
        pytest.param({"vids": [10]}, tag(10, 5), tag(10, 5), id="trunk, a VID of it"),
        pytest.param({"vids": [10]}, tag(10) + tag(30), tag(10) + tag(30), id="trunk, two tags"),
        pytest.param({"vids": [10], "pvid": 1}, tag(1), b"", id="trunk, its native VID"),
        pytest.param(
            {"vids": [10], "pvid": 1}, tag(1) + tag(30), None, id="trunk, a tag under its native VID"
        ),
        pytest.param({"vids": [10], "pvid": None}, b"", None, id="trunk without a native VID, untagged"),
    ],
)
def test_what_the_wire_brings(both: Net, receiver: Any, sent: bytes, received: bytes | None) -> None:
    """By the bridge, unicast and broadcast. ``received``: the tags then, None when nothing may come."""
    both.open()
    vm = both.add("web1", **receiver)
    with vm.capture() as capture:
        both.lab.wire.send(
            both.lab.wire_end, [test_frame(dst, WIRE_MAC, tags=sent) for dst in (vm.mac, BROADCAST)]
        )
        if received is None:

            def dropped() -> int:
                counts = {**both.counts("web1"), **both.counts(both.lab.nic)}
                return counts.get("vlan_bridge", 0) + counts.get("vlan_sent", 0)

            wait_until(lambda: dropped() == 2, "both frames are dropped for their tags")
            capture.assert_silent()
        else:
            assert capture.wait_for(2) == [
                test_frame(dst, WIRE_MAC, tags=received) for dst in (vm.mac, BROADCAST)
            ]


# Who hears what


def test_nobody_hears_what_is_for_others(both: Net) -> None:
    """Flooded unicast, and what was for a port that has moved."""
    both.open()
    vm, other = both.add("web1"), both.add("web2")
    with vm.capture() as mine, other.capture() as theirs:
        both.lab.wire.send(
            both.lab.wire_end, [test_frame(MACS["web3"], WIRE_MAC), test_frame(vm.mac, WIRE_MAC, 1)]
        )
        assert [seq_of(frame) for frame in mine.wait_for(1)] == [1]
        theirs.assert_silent()
        both.lab.wire.send(both.lab.wire_end, [test_frame(BROADCAST, vm.mac, 2)])
        both.lab.wire.send(both.lab.wire_end, [test_frame(vm.mac, WIRE_MAC, 3)])
        assert [seq_of(frame) for frame in mine.wait_for(2)] == [1, 2]
        assert [seq_of(frame) for frame in theirs.wait_for(1)] == [2]
        assert mine.extra(2) == []


def test_a_frame_to_oneself_reaches_nobody(both: Net) -> None:
    both.open()
    vm, other = both.add("web1"), both.add("web2")
    with vm.capture() as mine, other.capture() as theirs, both.lab.wire.capture(both.lab.wire_end) as outside:
        both.hear(vm)
        for capture in (mine, theirs, outside):
            capture.assert_silent()


def send_once(device: str, frame: bytes, *options: int) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        for option in options:
            sender.setsockopt(SOL_PACKET, option, 1)
        sender.bind((device, 0))
        sender.send(frame)


@pytest.mark.parametrize("device", ["web1", "br0"])
def test_the_host_cannot_speak_on_the_switch_s_devices(both: Net, device: str) -> None:
    """Not on a port's, where it is counted, and not on the bridge's."""
    both.open()
    vm = both.add("web1")
    bridge = both.lab.host.ifindex("br0")
    both.do(lambda: both.plane.set_member("br0", bridge, MemberRow(0, NETWORK, "silent")))
    with vm.capture() as capture, both.lab.wire.capture(both.lab.wire_end) as outside:
        with pytest.raises(OSError, match="No buffer space"):  # so the sender learns of a drop
            both.do(lambda: send_once(device, test_frame(BROADCAST, HOST_MAC)))
        capture.assert_silent()
        outside.assert_silent()
    assert both.counts("web1") == ({"host": 1} if device == "web1" else {})


def test_the_host_does_not_hear_on_the_bridge_s_device(both: Net) -> None:
    both.open()
    vm = both.add("web1")
    both.lab.host.ip("address add 192.0.2.1/24 dev br0")
    bridge = both.lab.host.ifindex("br0")
    datagram = udp4(BROADCAST, vm.mac, "255.255.255.255", "192.0.2.2", b"heard", dport=5001)
    with both.do(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as listener:
        listener.bind(("0.0.0.0", 5001))
        listener.settimeout(5)
        vm.send([datagram])
        assert listener.recv(64) == b"heard"
        both.do(lambda: both.plane.set_member("br0", bridge, MemberRow(0, NETWORK, "silent")))
        vm.send([datagram])
        listener.settimeout(QUIET)
        with pytest.raises(TimeoutError):
            listener.recv(64)


def test_the_host_s_interface(both: Net) -> None:
    """Reached past the bridge by a VM and from the wire, and the other way round."""
    both.open()
    vm = both.add("web1")
    both.lab.host.ip(f"link add ext0-host address {HOST_MAC} type veth peer name ext0-host-sw")
    for end in ("ext0-host", "ext0-host-sw"):
        both.lab.host.ip(f"link set {end} up")
    both.member("ext0-host-sw", "host", mac=HOST_MAC)
    with vm.capture() as inside, both.lab.wire.capture(both.lab.wire_end) as outside:
        both.hear(vm)
        frames = [test_frame(dst, HOST_MAC, seq) for seq, dst in enumerate((vm.mac, WIRE_MAC))]
        both.lab.host.send("ext0-host", frames)
        assert inside.wait_for(1) == frames[:1]
        assert outside.wait_for(1) == frames[1:]
    with both.lab.host.capture("ext0-host") as heard:
        vm.send([test_frame(HOST_MAC, vm.mac, 1)])
        both.lab.wire.send(both.lab.wire_end, [test_frame(HOST_MAC, WIRE_MAC, 2)])
        assert {seq_of(frame) for frame in heard.wait_for(2)} == {1, 2}
        assert heard.extra(2) == []
    assert both.counts("ext0-host-sw") == {
        "local.packets": 2,
        "local.bytes": 120,
        "tx_local.packets": 1,
        "tx_local.bytes": 60,
        "tx_direct.packets": 1,
        "tx_direct.bytes": 60,
    }
    assert both.counts(both.lab.nic) == {"tx_local.packets": 1, "tx_local.bytes": 60}


@pytest.fixture
def generic(both: Net) -> Net:
    """A switch with the host's interface ``ext0-host``; XDP on its NIC is generic. Scope: one test."""
    both.open()
    nic = both.lab.host.ifindex(both.lab.nic)
    both.do(lambda: both.plane.attach(both.lab.nic, nic, "generic"))
    both.lab.host.ip(f"link add ext0-host address {HOST_MAC} type veth peer name ext0-host-sw")
    for end in ("ext0-host", "ext0-host-sw"):
        both.lab.host.ip(f"link set {end} up")
    return both


@pytest.mark.parametrize("vlan", [0, 10], ids=["untagged", "in a VLAN"])
def test_a_nic_in_generic_xdp_mode(generic: Net, vlan: int) -> None:
    """The header is read, and never the payload: that would name another sender here, and a forbidden tag."""
    vm, tags = generic.add("web1", pvid=vlan), tag(vlan) if vlan else b""
    generic.member("ext0-host-sw", "host", mac=HOST_MAC, pvid=vlan)
    generic.hear(vm)
    generic.lab.host.send("ext0-host", [test_frame(WIRE_MAC, HOST_MAC)])
    wait_until(lambda: generic.states(HOST_MAC) == ["here"], "the host is heard")
    inner = test_frame(HOST_MAC, vm.mac, 1, tags=tag(5, tpid=TPID_8021AD))
    disguised = test_frame(BROADCAST, WIRE_MAC, tags=tags)[: 14 + len(tags)] + inner
    with vm.capture() as inside, generic.lab.host.capture("ext0-host") as heard:
        generic.lab.wire.send(
            generic.lab.wire_end, [disguised, to_host := test_frame(HOST_MAC, WIRE_MAC, 2, tags=tags)]
        )
        whole = disguised[:12] + disguised[12 + len(tags) :]
        assert inside.wait_for(1) == [whole]
        assert heard.wait_for(2) == [whole, test_frame(HOST_MAC, WIRE_MAC, 2)]
    assert generic.states(vm.mac) == ["here"]
    generic.lab.wire.send(generic.lab.wire_end, [test_frame(BROADCAST, vm.mac, 3, tags=tags)])
    wait_until(lambda: generic.states(vm.mac) == ["away"], "the VM is away")
    counted = generic.counts(generic.lab.nic)
    assert (counted["tx_local.packets"], counted["tx_local.bytes"]) == (1, len(to_host))
    assert (counted["tx_bridge.packets"], counted["tx_bridge.bytes"]) == (2, len(disguised) + len(to_host))


def test_tcp_over_a_nic_in_generic_xdp_mode(generic: Net) -> None:
    """Its segments are shared with the sender's queue, and so are copied for XDP."""
    length = 1 << 20
    generic.member("ext0-host-sw", "host", mac=HOST_MAC)
    generic.lab.host.ip("address add 192.0.2.1/24 dev ext0-host")
    generic.lab.wire.ip(f"address add 192.0.2.2/24 dev {generic.lab.wire_end}")
    generic.lab.wire.ip(f"neighbour add 192.0.2.1 lladdr {HOST_MAC} dev {generic.lab.wire_end}")
    thread, taken = receive(generic.lab.host, length)
    generic.lab.wire.call(lambda: transmit("192.0.2.1", length))
    thread.join(20)
    assert taken == [length]
    assert generic.counts(generic.lab.nic)["tx_local.bytes"] > length


def test_a_tap(both: Net) -> None:
    both.open()
    vm, tap = both.add("web1"), both.lab.tap("tap1")
    both.member("tap1", mac=MACS["web2"], pvid=0)
    tap.send([test_frame(MACS["web2"], MACS["web2"]), test_frame(vm.mac, MACS["web2"])])
    both.hear(vm)
    with vm.capture() as capture:
        tap.send(
            [
                test_frame(vm.mac, MACS["web2"], 1, tags=tag(0)),
                test_frame(vm.mac, MACS["web2"], 2, tags=tag(5)),
            ]
        )
        tap.send([test_frame(vm.mac, WIRE_MAC, 3)])
        vm.send([test_frame(MACS["web2"], vm.mac, 4)])
        assert capture.wait_for(1) == [test_frame(vm.mac, MACS["web2"], 1)]
        assert capture.extra(1) == []
    assert tap.wait_for(1) == [test_frame(MACS["web2"], vm.mac, 4)]
    counts = both.counts("tap1")
    assert (counts["vlan_sent"], counts["spoofed"], counts["local.packets"]) == (1, 1, 1)


# Segments


def receive(ns: Namespace, length: int) -> tuple[threading.Thread, list[int]]:
    """A TCP server in a namespace that takes ``length`` bytes."""
    taken: list[int] = []

    def body() -> None:
        with socket.create_server(("0.0.0.0", 5001)) as server:
            ready.set()
            connection, _ = server.accept()
            with connection:
                total = 0
                while total < length and (part := connection.recv(1 << 20)):
                    total += len(part)
                taken.append(total)

    ready = threading.Event()
    thread = threading.Thread(target=lambda: ns.call(body))
    thread.start()
    assert ready.wait(5)
    return thread, taken


def transmit(address: str, length: int) -> float:
    """Send ``length`` bytes; returns Gbit/s."""
    block = os.urandom(1 << 16)
    start = time.monotonic()
    with socket.create_connection((address, 5001), timeout=20) as connection:
        for _ in range(length // len(block)):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    return length * 8 / (time.monotonic() - start) / 1e9


@pytest.mark.parametrize("vlan", [0, 10], ids=["untagged", "in a VLAN"])
def test_tcp_between_ports_with_all_offloads_on(both: Net, vlan: int) -> None:
    """Every byte arrives, in segments that were never cut, with checksums that were never made."""
    both.open()
    one = both.add("web1", "192.0.2.1/24", pvid=vlan)
    other = both.add("web2", "192.0.2.2/24", pvid=vlan)
    length = 64 << 20
    both.hear(other)
    with other.capture() as seen:
        thread, taken = receive(other.ns, length)
        rate = one.ns.call(lambda: transmit("192.0.2.2", length))
        thread.join(20)
        longest = max(len(frame) for frame in seen.frames())
    assert taken == [length]
    assert longest > 10_000
    print(f"{rate:.1f} Gbit/s, longest frame {longest} bytes")
    sent, received = both.counts("web1"), both.counts("web2")
    assert sent["tx_local.packets"] >= length // 1448
    assert received["local.packets"] == sent["tx_local.packets"]
    assert not any(name in sent for name in ("spoofed", "vlan_sent", "guard_ra", "guard_dhcp"))


# Programs in place


def attachments(net: Net, device: str) -> dict[str, int]:
    """Ids of the tcx links on a device, by side."""
    found = {}
    for pin in (net.pins / "members" / str(net.lab.host.ifindex(device))).iterdir():
        with Link.pinned(pin) as link:
            found[pin.name.partition("-")[0]] = link.info().id
    return found


def another_version(net: Net) -> None:
    net.plane.tc.close()
    net.do(net.plane.tc.open)
    digest = "0123abcd" if net.plane.switch_digest != "0123abcd" else "4567cdef"
    net.plane.tc.artifact = replace(net.plane.tc.artifact, digest=digest)


def test_another_version_takes_over_under_traffic(both: Net) -> None:
    """No frame is lost, none passes by the programs, none takes another path."""
    both.open()
    one, other = both.add("web1"), both.add("web2")
    rows = {
        device: both.do(both.plane.members)[both.lab.host.ifindex(device)][0] for device in ("web1", "web2")
    }
    both.hear(other)
    count = 40_000
    frames = [test_frame(other.mac, one.mac, seq) for seq in range(count)]
    before = attachments(both, "web1") if both.plane.tc.tcx else {}

    def replace_all() -> None:
        for device, row in rows.items():
            both.plane.set_member(device, socket.if_nametoindex(device), row)

    with other.capture() as seen:
        sender = threading.Thread(target=lambda: one.send(frames))
        sender.start()
        replaced = 0
        while sender.is_alive():
            another_version(both)
            both.do(replace_all)
            replaced += 1
        sender.join()
        assert [seq_of(frame) for frame in seen.wait_for(count)] == list(range(count))
    assert replaced > 1
    found = both.do(both.plane.members)
    for device, row in rows.items():
        assert found[both.lab.host.ifindex(device)] == (row, both.plane.switch_digest)
    assert (attachments(both, "web1") if both.plane.tc.tcx else {}) == before
    assert both.counts("web1")["tx_local.packets"] == count
    assert both.counts("web2")["local.packets"] == count


def test_a_program_that_is_missing_is_seen_and_put_back(both: Net) -> None:
    both.open()
    both.add("web1")
    index = both.lab.host.ifindex("web1")
    row, digest = both.do(both.plane.members)[index]
    assert digest == both.plane.switch_digest
    for side in ("ingress", "egress"):
        if both.plane.tc.tcx:
            (pin,) = (both.pins / "members" / str(index)).glob(f"{side}-*")
            with Link.pinned(pin) as link:
                link.detach()
        else:
            both.lab.host.run("tc", "filter", "delete", "dev", "web1", side)
        assert both.do(both.plane.members)[index] == (row, "")
        both.do(lambda: both.plane.set_member("web1", index, row))
        assert both.do(both.plane.members)[index] == (row, digest)


def test_our_own_programs_are_nothing_that_frames_pass_by(both: Net) -> None:
    both.open()
    both.add("web1")
    found = both.do(lambda: look({"web1": Place("web1", "br0", both.lab.nic)}))
    assert (found.ports, found.unread) == ({}, ())


def test_another_role_brings_its_own_programs(both: Net) -> None:
    both.open()
    both.add("web1")
    index = both.lab.host.ifindex("web1")
    row = MemberRow(both.ids["web1"], NETWORK, "uplink")
    both.do(lambda: both.plane.set_member("web1", index, row))
    assert both.do(both.plane.members)[index] == (row, both.plane.switch_digest)
    assert {side: each.program for side, each in both.do(lambda: both.plane.tc.on(index)).items()} == {
        "ingress": "wire"
    }


def test_a_member_that_is_cleared_is_nobody_s(both: Net) -> None:
    both.open()
    vm = both.add("web1")
    index = both.lab.host.ifindex("web1")
    both.do(lambda: both.plane.clear_member(index))
    both.do(lambda: both.plane.clear_member(index))
    assert index not in both.do(both.plane.members)
    assert both.do(lambda: both.plane.tc.on(index)) == {}
    assert not (both.pins / "members" / str(index)).exists()
    foreign = test_frame(BROADCAST, WIRE_MAC, tags=tag(10))
    with both.lab.wire.capture(both.lab.wire_end) as outside:
        vm.send([foreign])
        assert outside.wait_for(1) == [foreign]


FILTER = "protocol all u32 match u32 0 0 flowid :1"


@pytest.mark.parametrize(
    ("before", "meanwhile", "stays"),
    [
        pytest.param("", "", False, id="ours"),
        pytest.param("", f"filter add dev web1 ingress {FILTER}", True, id="ours-with-somebodys-filter"),
        pytest.param(
            "", f"filter add dev web1 egress prio 9 {FILTER}", True, id="ours-with-somebodys-egress"
        ),
        pytest.param("qdisc add dev web1 clsact", "", True, id="somebodys"),
    ],
)
def test_the_qdisc_goes_with_the_classic_filters_if_it_came_with_them(
    net: Net, before: str, meanwhile: str, stays: bool
) -> None:
    net.plane.tc.tcx = False
    net.open()
    net.lab.vm("web1", MACS["web1"])
    if before:
        net.lab.host.run("tc", *before.split())
    index = net.member("web1")
    another_version(net)
    row, _ = net.do(net.plane.members)[index]
    net.do(lambda: net.plane.set_member("web1", index, row))
    assert net.do(net.plane.members)[index] == (row, net.plane.switch_digest)
    if meanwhile:
        net.lab.host.run("tc", *meanwhile.split())
    net.do(lambda: net.plane.clear_member(index))
    assert net.do(lambda: net.plane.tc.on(index)) == {}
    assert ("clsact" in net.lab.host.run("tc", "qdisc", "show", "dev", "web1").stdout) is stays
    if "egress" in meanwhile:
        assert "pref 9" in net.lab.host.run("tc", "filter", "show", "dev", "web1", "egress").stdout


def test_this_kernel_has_tcx_or_says_why_not(net: Net) -> None:
    """By trying: a kernel that has it accepts a link, one that has not cannot."""
    net.open()
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert net.do(lambda: net.plane.tc.tcx) is (release >= (6, 6))


# Devices that go


def test_a_device_that_vanishes_leaves_its_frames_to_the_bridge(both: Net) -> None:
    """The kernel takes it out of the devmap: nobody has to have noticed yet."""
    both.open()
    one, other = both.add("web1"), both.add("web2")
    both.hear(other)
    index = both.lab.host.ifindex("web2")
    one.send([test_frame(other.mac, one.mac)])
    wait_until(lambda: both.counts("web1").get("tx_local.packets") == 1, "the frame is handed over")
    both.lab.unplug(other)
    with both.lab.wire.capture(both.lab.wire_end) as outside:
        sent = test_frame(other.mac, one.mac, 1)
        one.send([sent])
        assert outside.wait_for(1) == [sent], "flooded"
    assert both.counts("web1")["tx_bridge.packets"] == 1
    live = {both.lab.host.ifindex(name) for name in ("web1", both.lab.nic)}
    both.do(lambda: both.plane.forget_gone(live))
    assert index not in both.do(both.plane.members)
    assert not (both.pins / "members" / str(index)).exists()


def test_a_device_that_vanishes_before_it_is_cleared(both: Net) -> None:
    both.open()
    vm = both.add("web1")
    index = both.lab.host.ifindex("web1")
    both.lab.unplug(vm)
    assert both.do(both.plane.members)[index][1] == ""
    both.do(lambda: both.plane.clear_member(index))
    assert index not in both.do(both.plane.members)


# News


def test_news_wake_who_waits(net: Net) -> None:
    net.open()
    vm = net.add("web1")
    assert net.plane.drain_news() == []
    assert select.select([net.plane.news_fd()], [], [], QUIET)[0] == []
    net.hear(vm)
    assert select.select([net.plane.news_fd()], [], [], 5)[0] == [net.plane.news_fd()]
    net.lab.wire.send(net.lab.wire_end, [test_frame(BROADCAST, vm.mac)])
    wait_until(lambda: net.states(vm.mac) == ["away"], "the VM is away")
    told = net.plane.drain_news()
    assert told == [News(NETWORK, net.ids["web1"], state, vm.mac, 0) for state in ("here", "away")]
    assert select.select([net.plane.news_fd()], [], [], QUIET)[0] == []


def test_news_in_an_event_loop(net: Net) -> None:
    """Each of a hundred flips wakes the loop or is drained with one that did."""
    net.open()
    vm = net.add("web1")
    told: list[News] = []
    flips = 100

    async def listen() -> None:
        done = asyncio.Event()

        def readable() -> None:
            told.extend(net.plane.drain_news())
            if len(told) >= flips:
                done.set()

        loop = asyncio.get_running_loop()
        loop.add_reader(net.plane.news_fd(), readable)
        await asyncio.gather(asyncio.to_thread(move), asyncio.wait_for(done.wait(), 10))
        loop.remove_reader(net.plane.news_fd())

    def move() -> None:
        for _ in range(flips // 2):
            net.hear(vm)
            net.lab.wire.send(net.lab.wire_end, [test_frame(BROADCAST, vm.mac)])
            wait_until(lambda: net.states(vm.mac) == ["away"], "the VM is away")

    asyncio.run(listen())
    assert [each.state for each in told] == ["here", "away"] * (flips // 2)


def test_more_news_than_the_ring_holds(net: Net) -> None:
    """The table has the last state, and the ring goes on once it was read."""
    net.open()
    vm = net.add("web1")
    frames = [test_frame(BROADCAST, vm.mac)]
    run = net.plane.tc.program("sent").test_run
    wire = net.plane.tc.program("wire").test_run
    here, there = skb(net.lab.host.ifindex("web1"), 1), skb(net.lab.host.ifindex(net.lab.nic), 1)

    def flip() -> None:
        for _ in range(2_000):
            run(frames[0], ctx=here)
            wire(frames[0], ctx=there)

    net.do(flip)
    told = net.plane.drain_news()
    assert 1_000 < len(told) < 4_000
    assert net.plane.stations()[NETWORK, vm.mac, 0].moves == 4_000
    net.hear(vm)
    assert [each.state for each in net.plane.drain_news()] == ["here"]


# The Python bridge's conduit


@pytest.fixture
def conduit(both: Net) -> Net:
    """A switch whose bridge is behind a conduit with the ends ``ext0`` and ``ext0-py``. Scope: one test."""
    host = both.lab.host
    host.ip("link add ext0 type veth peer name ext0-py")
    for end in ("ext0", "ext0-py"):
        host.ip(f"link set {end} up")
    both.open(conduit=host.ifindex("ext0"))
    both.do(lambda: both.plane.set_member("ext0", host.ifindex("ext0"), MemberRow(0, NETWORK, "conduit")))
    both.do(
        lambda: both.plane.set_member("ext0-py", host.ifindex("ext0-py"), MemberRow(0, NETWORK, "silent"))
    )
    return both


def to_port(port: int, frame: bytes) -> bytes:
    """As a Python bridge sends it."""
    return frame[:12] + struct.pack("!HH", TPID_8021AD, port) + frame[12:]


def test_what_goes_to_a_python_bridge(conduit: Net) -> None:
    """The port that it comes from outside, its VLAN's tag inside. Known unicast does not go there."""
    one = conduit.add("web1", vids=[10])
    other = conduit.add("web2", pvid=10)
    conduit.hear(other)
    with conduit.lab.host.capture("ext0-py") as bridge, other.capture() as inside:
        one.send([test_frame(BROADCAST, one.mac, 1), test_frame(BROADCAST, one.mac, 2, tags=tag(10, 5))])
        other.send([test_frame(BROADCAST, other.mac, 3)])
        conduit.lab.wire.send(conduit.lab.wire_end, [test_frame(BROADCAST, WIRE_MAC, 4, tags=tag(10))])
        one.send([test_frame(other.mac, one.mac, 5, tags=tag(10))])
        assert bridge.wait_for(4) == [
            to_port(1, test_frame(BROADCAST, one.mac, 1)),
            to_port(1, test_frame(BROADCAST, one.mac, 2, tags=tag(10, 5))),
            to_port(2, test_frame(BROADCAST, other.mac, 3, tags=tag(10))),
            to_port(0, test_frame(BROADCAST, WIRE_MAC, 4, tags=tag(10))),
        ]
        assert inside.wait_for(1) == [test_frame(other.mac, one.mac, 5)]
        assert bridge.extra(4) == []


def test_what_a_python_bridge_sends(conduit: Net) -> None:
    """To the port that it names, if that may have it, and to nobody else."""
    one, other = conduit.add("web1"), conduit.add("web2", pvid=10)
    stranger = conduit.lab.vm("web3", MACS["web3"])
    ifindex = conduit.lab.host.ifindex("web3")
    record = PortRecord("web3", 0, None, 0, BYPASS, 1514, ifindex)
    conduit.do(lambda: conduit.plane.set_port(9, record))
    conduit.do(lambda: conduit.plane.set_member("web3", ifindex, MemberRow(9, NETWORK + 1, "port")))
    sent = [
        to_port(1, test_frame(BROADCAST, WIRE_MAC, 1)),
        to_port(2, test_frame(BROADCAST, WIRE_MAC, 2, tags=tag(10, 5))),
        to_port(1, test_frame(BROADCAST, WIRE_MAC, 3, tags=tag(10))),
        to_port(0, test_frame(WIRE_MAC, one.mac, 4, tags=tag(10))),
        to_port(9, test_frame(BROADCAST, WIRE_MAC, 5)),
        to_port(12, test_frame(BROADCAST, WIRE_MAC, 6)),
        test_frame(BROADCAST, WIRE_MAC, 7),
        test_frame(BROADCAST, WIRE_MAC, 8, tags=tag(1)),
    ]
    captures = [vm.capture() for vm in (one, other, stranger)]
    with conduit.lab.wire.capture(conduit.lab.wire_end) as outside:
        for frame in sent:
            conduit.do(lambda frame=frame: send_once("ext0-py", frame, PACKET_QDISC_BYPASS))  # type: ignore[misc]
        assert outside.wait_for(1) == [test_frame(WIRE_MAC, one.mac, 4, tags=tag(10))]
        got = [captures[0].wait_for(1), captures[1].wait_for(1)]
        assert got == [[test_frame(BROADCAST, WIRE_MAC, 1)], [test_frame(BROADCAST, WIRE_MAC, 2)]]
        assert [each.extra(1) for each in (outside, *captures[:2])] == [[], [], []]
        captures[2].assert_silent()
    assert conduit.counts("web1") == {"bridged.packets": 1, "bridged.bytes": 60, "vlan_bridge": 1}
    for capture in captures:
        capture.close()


def test_a_port_id_takes_all_bits_of_the_tag(conduit: Net) -> None:
    """Those of the priority too."""
    conduit.ids["web1"] = 0x3ABC
    vm = conduit.add("web1")
    with conduit.lab.host.capture("ext0-py") as bridge, vm.capture() as inside:
        there, back = test_frame(BROADCAST, vm.mac, 1), test_frame(BROADCAST, WIRE_MAC, 2)
        vm.send([there])
        assert bridge.wait_for(1) == [to_port(0x3ABC, there)]
        conduit.do(lambda: send_once("ext0-py", to_port(0x3ABC, back), PACKET_QDISC_BYPASS))
        assert inside.wait_for(1) == [back]


def test_only_the_bridge_s_own_way_leads_into_a_conduit_s_inner_end(conduit: Net) -> None:
    with pytest.raises(OSError, match="No buffer space"):
        conduit.do(lambda: send_once("ext0-py", to_port(0, test_frame(BROADCAST, HOST_MAC))))
