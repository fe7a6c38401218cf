"""What the switch's programs decide: a frame, the verdict, and everything that is counted and changed.

BPF_PROG_TEST_RUN has tags in the frame and shows none that stand beside it afterwards. How it is
with tags beside the frame, and where frames go, is in ``test_switch_live.py``.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload.kernel.bpf import RunResult
from offload.kernel.dataplane import Dataplane
from offload.model import MemberRow, NetworkRow, News, PortRecord, StationRow, StationState
from offload.plan import BYPASS, GRO, GRO_TCP, RUNNING
from tests.bpf.loaded import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, Counts, Run, flat, skb
from tests.instance import BPFFS
from tests.lab import TPID_8021AD, Lab, mac_bytes, tag, test_frame

PASS, DROP, REDIRECT = TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT

EXTERNAL, PRIVATE, ASKING, WRAPPED = range(4)
"""Networks; ``ASKING`` has a port with addresses that nobody declared, ``WRAPPED`` a Python bridge."""

ALL = frozenset({"mac_spoofing", "dhcp_server", "router_advertisement", "link_local_protocols"})


@dataclass(frozen=True)
class Device:
    """A member: its row, the VIDs of a trunk, and its port's flags, longest frame and station's state."""

    name: str
    row: dict[str, Any]
    trunk: frozenset[int] | None = None
    flags: int = BYPASS | RUNNING
    max_len: int = 1514
    state: StationState = "here"
    gone: bool = False


NATIVE = frozenset({1, 10, 20})
DEVICES = [
    Device("plain", {}),
    Device("access", {"pvid": 10}),
    Device("trunk", {"pvid": 1, "trunk": True}, NATIVE),
    Device("bare-trunk", {"pvid": None, "trunk": True}, frozenset({10, 20})),
    Device("open-trunk", {"pvid": 0, "trunk": True}, frozenset({10, 20})),
    Device("free", {"allow": ALL}),
    Device("spoofer", {"allow": frozenset({"mac_spoofing"})}),
    Device("dhcp", {"allow": frozenset({"dhcp_server"})}),
    Device("router", {"allow": frozenset({"router_advertisement"})}),
    Device("lldp", {"allow": frozenset({"link_local_protocols"})}),
    Device("slow", {"bypass": False}, flags=RUNNING),
    Device("quiet", {}, state="expected"),
    Device("moved", {}, state="away"),
    Device("gone", {}, gone=True),
    Device("small", {}, max_len=100),
    Device("merged", {}, flags=BYPASS | RUNNING | GRO),
    Device("merged-tcp", {"pvid": 10}, flags=BYPASS | RUNNING | GRO_TCP, max_len=100),
    Device("merged-paused", {}, flags=BYPASS | GRO),
    Device("merged-slow", {"bypass": False}, flags=RUNNING | GRO),
    Device("merged-away", {}, flags=BYPASS | RUNNING | GRO, state="away"),
    Device("peer", {}),
    Device("peer-access", {"pvid": 10}),
    Device("host", {"role": "host"}),
    Device("nic", {"role": "uplink"}),
    Device("lone", {"network": PRIVATE}),
    Device("asker", {"network": ASKING}),
    Device("wrapped", {"network": WRAPPED}),
    Device("wrapped-peer", {"network": WRAPPED}),
    Device("wrapped-nic", {"network": WRAPPED, "role": "uplink"}),
    Device("conduit", {"network": WRAPPED, "role": "conduit"}),
    Device("silent", {"role": "silent"}),
    Device("function", {"role": "function", "of": "nic"}),
    Device("function-10", {"role": "function", "of": "nic", "pvid": 10}),
]
IDS = {device.name: number for number, device in enumerate(DEVICES)}
UNTAGGED_VID = 4001
FOREIGN, ELSEWHERE = "02:aa:00:00:00:99", "02:aa:00:00:00:01"
BROADCAST, MULTICAST, LLDP = "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "01:80:c2:00:00:0e"


def mac_of(name: str) -> str:
    return f"02:15:5d:00:01:{IDS[name]:02x}"


def vids_of(device: Device) -> frozenset[int]:
    """Of the stations of a device's port: 0 is the untagged network."""
    pvid = device.row.get("pvid", 0)
    return (device.trunk or frozenset()) | (frozenset() if pvid is None else frozenset({pvid}))


class Switches:
    """Every kind of device in one namespace, with the programs on it. ``run`` is one frame through one."""

    def __init__(self, lab: Lab, plane: Dataplane) -> None:
        self._lab = lab
        self._plane = plane
        names = ["nobody", *IDS]
        for name in names:
            lab.host.ip(f"link add {name} type bridge")
        self._ifindex = {name: lab.host.ifindex(name) for name in names}
        lab.host.call(self._set_up)
        self.reset()

    def _set_up(self) -> None:
        plane = self._plane
        plane.tc.close()
        plane.tc.open()  # in this namespace: it was opened before there was one
        nic = IDS["nic"]
        plane.set_network(EXTERNAL, NetworkRow("ext0", nic, 0, UNTAGGED_VID, False))
        plane.set_network(PRIVATE, NetworkRow("prv0", None, 0, 0, False))
        plane.set_network(ASKING, NetworkRow("ask0", nic, 0, 0, True))
        conduit = self._ifindex["conduit"]
        plane.set_network(WRAPPED, NetworkRow("wrp0", IDS["wrapped-nic"], conduit, 0, False))
        for device in DEVICES:
            number, ifindex = IDS[device.name], self._ifindex[device.name]
            row: dict[str, Any] = {"network": EXTERNAL, "role": "port", "bypass": True} | device.row
            port = IDS[row.pop("of", device.name)]
            plane.set_member(device.name, ifindex, MemberRow(port, **row))
            if device.trunk:
                plane.set_trunk(number, device.trunk)

    def reset(self) -> None:
        """Ports and stations as ``DEVICES`` has them, and no news."""
        self._lab.host.call(self._reset)

    def _reset(self) -> None:
        for device in DEVICES:
            number, ifindex = IDS[device.name], self._ifindex[device.name]
            there = 0 if device.gone else ifindex
            self._plane.set_port(
                number, PortRecord(device.name, 0, None, 0, device.flags, device.max_len, there)
            )
            if device.row.get("role", "port") not in ("port", "host"):
                continue
            for vid in vids_of(device):
                station = StationRow(number, ifindex, device.state)
                self._plane.set_station(
                    device.row.get("network", EXTERNAL), mac_of(device.name), vid, station
                )
        self._plane.drain_news()

    def run(self, program: str, device: str, frame: bytes, **fields: int) -> Run:
        """``fields`` are of struct __sk_buff; the frame came in by some other device unless they say so."""
        before = self._counts()
        fields = {"ifindex": self._ifindex[device], "ingress_ifindex": 1} | fields
        context = skb(**fields)

        def work() -> RunResult:
            return self._plane.tc.program(program).test_run(frame, ctx=context)

        result = self._lab.host.call(work)
        after = self._counts()
        moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        return Run(result.verdict, result.frame, moved)

    def _counts(self) -> Counts:
        rows = self._plane.port_counters(len(DEVICES))
        return {
            f"{DEVICES[at].name}.{name}": value for at, row in enumerate(rows) for name, value in flat(row)
        }

    def news(self) -> list[News]:
        return self._plane.drain_news()

    def station(self, name: str, vid: int = 0, network: int = EXTERNAL) -> StationRow:
        return self._plane.stations()[network, mac_of(name), vid]

    def port_flags(self, name: str) -> int:
        return self._plane.ports()[IDS[name]].flags


@pytest.fixture(scope="module")
def everything(privilege: None, cache: Path) -> Iterator[Switches]:
    """Scope: one module; what tests change is put back by ``switches``."""
    with (
        Lab() as lab,
        tempfile.TemporaryDirectory(dir=BPFFS) as pins,
        Dataplane(Path(pins) / "v4", cache) as plane,
    ):
        yield Switches(lab, plane)
        plane.remove_everything()


@pytest.fixture
def switches(everything: Switches) -> Switches:
    """The switches as ``DEVICES`` has them. Scope: one test."""
    everything.reset()
    return everything


def frame(src: str, dst: str, tags: bytes = b"", size: int = 60) -> bytes:
    """From a device's MAC, or a MAC, to another."""
    source, target = (name if ":" in name else mac_of(name) for name in (src, dst))
    return test_frame(target, source, tags=tags, size=size)


@dataclass(frozen=True)
class Case:
    """``counted`` is the counter that moves, "" for none; ``after`` the frame then, None for as it came."""

    name: str
    device: str
    frame: bytes
    verdict: int
    counted: str
    after: bytes | None = None


def expected(counted: str, frame: bytes) -> Counts:
    if not counted:
        return {}
    if counted.split(".")[1] in DROP_REASONS:
        return {counted: 1}
    return {f"{counted}.packets": 1, f"{counted}.bytes": len(frame)}


DROP_REASONS = ("vlan_sent", "vlan_bridge", "spoofed", "guard_dhcp", "guard_ra", "link_local", "host")


def check(run: Run, case: Case) -> None:
    if case.verdict == DROP:  # what is dropped has no after
        assert (run.verdict, run.moved) == (DROP, expected(case.counted, case.frame))
        return
    after = case.frame if case.after is None else case.after
    assert run == Run(case.verdict, after, expected(case.counted, case.frame))


# What a port sends

Q, AD = tag(10), tag(10, tpid=TPID_8021AD)


def bridged(name: str, src: str, dst: str, tags: bytes = b"", after: bytes | None = None) -> Case:
    return Case(name, src, frame(src, dst, tags), PASS, f"{src}.tx_bridge", after)


def handed(name: str, src: str, dst: str, tags: bytes = b"", after: bytes | None = None) -> Case:
    return Case(name, src, frame(src, dst, tags), REDIRECT, f"{src}.tx_local", after)


def direct(name: str, src: str, dst: str, tags: bytes = b"", after: bytes | None = None) -> Case:
    return Case(name, src, frame(src, dst, tags), REDIRECT, f"{src}.tx_direct", after)


def refused(name: str, src: str, tags: bytes, reason: str = "vlan_sent") -> Case:
    return Case(name, src, frame(src, BROADCAST, tags), DROP, f"{src}.{reason}")


SENT_TAGS = [
    bridged("untagged port, untagged", "plain", BROADCAST),
    bridged("untagged port, VID 0", "plain", BROADCAST, tag(0), frame("plain", BROADCAST)),
    bridged(
        "untagged port, VID 0 with PCP and DEI", "plain", BROADCAST, tag(0, 7, 1), frame("plain", BROADCAST)
    ),
    refused("untagged port, VID 1", "plain", tag(1)),
    refused("untagged port, VID 4095", "plain", tag(4095)),
    refused("untagged port, the bridge's own VID", "plain", tag(UNTAGGED_VID)),
    refused("untagged port, VID 0 over a tag", "plain", tag(0) + Q),
    refused("untagged port, VID 0 over 802.1ad", "plain", tag(0) + AD),
    refused("untagged port, 802.1ad", "plain", AD),
    refused("untagged port, 802.1ad with VID 0", "plain", tag(0, tpid=TPID_8021AD)),
    bridged("access port, untagged", "access", BROADCAST),
    bridged("access port, VID 0", "access", BROADCAST, tag(0, 5), frame("access", BROADCAST)),
    refused("access port, its own VID", "access", Q),
    refused("access port, another VID", "access", tag(20)),
    refused("access port, 802.1ad with its VID", "access", AD),
    bridged("trunk, untagged is native", "trunk", BROADCAST),
    bridged("trunk, VID 0 is native", "trunk", BROADCAST, tag(0), frame("trunk", BROADCAST)),
    bridged("trunk, the native VID tagged", "trunk", BROADCAST, tag(1)),
    bridged("trunk, a VID of it with PCP", "trunk", BROADCAST, tag(20, 5)),
    bridged("trunk, a second tag under a VID of it", "trunk", BROADCAST, Q + tag(30)),
    refused("trunk, a second tag under the native VID", "trunk", tag(1) + tag(30)),
    refused("trunk, a second tag under VID 0", "trunk", tag(0) + tag(10)),
    refused("trunk, another VID", "trunk", tag(30)),
    refused("trunk, VID 4095", "trunk", tag(4095)),
    refused("trunk, 802.1ad", "trunk", AD),
    bridged("trunk without a native VID, a VID of it", "bare-trunk", BROADCAST, Q),
    refused("trunk without a native VID, untagged", "bare-trunk", b""),
    refused("trunk without a native VID, VID 0", "bare-trunk", tag(0)),
    bridged("trunk with untagged frames, untagged", "open-trunk", BROADCAST),
    bridged("trunk with untagged frames, a VID of it", "open-trunk", BROADCAST, tag(20)),
    refused("trunk with untagged frames, VID 0 over a tag", "open-trunk", tag(0) + Q),
    Case(
        "802.1ad, where everything is allowed", "free", frame("free", BROADCAST, AD), DROP, "free.vlan_sent"
    ),
]

SENT_FROM = [
    Case("a foreign address", "plain", frame(FOREIGN, BROADCAST), DROP, "plain.spoofed"),
    Case("another port's address", "plain", frame("peer", BROADCAST), DROP, "plain.spoofed"),
    Case("its address in another VLAN", "plain", frame("access", "peer"), DROP, "plain.spoofed"),
    Case("a group address", "plain", frame("03:15:5d:00:01:00", BROADCAST), DROP, "plain.spoofed"),
    Case("a foreign address, allowed", "spoofer", frame(FOREIGN, BROADCAST), PASS, "spoofer.tx_bridge"),
    Case("another port's address, allowed", "spoofer", frame("peer", BROADCAST), PASS, "spoofer.tx_bridge"),
    Case("LLDP", "plain", frame("plain", LLDP), DROP, "plain.link_local"),
    Case("BPDU", "plain", frame("plain", "01:80:c2:00:00:00"), DROP, "plain.link_local"),
    Case(
        "BPDU from a foreign address", "plain", frame(FOREIGN, "01:80:c2:00:00:0f"), DROP, "plain.link_local"
    ),
    Case(
        "beyond the link-local block", "plain", frame("plain", "01:80:c2:00:00:10"), PASS, "plain.tx_bridge"
    ),
    Case("LLDP, allowed", "lldp", frame("lldp", LLDP), PASS, "lldp.tx_bridge"),
]

SENT_TO = [
    bridged("broadcast", "plain", BROADCAST),
    bridged("multicast", "plain", MULTICAST),
    handed("a port that was heard", "plain", "peer"),
    handed("the host", "plain", "host"),
    handed("host to a port", "host", "peer"),
    handed("in a VLAN", "access", "peer-access"),
    handed("from a trunk into a VLAN", "trunk", "peer-access", Q),
    handed("from a VLAN to a trunk", "access", "trunk"),
    direct("a port that is in another VLAN", "plain", "access"),
    direct("nobody's address", "plain", ELSEWHERE),
    direct("nobody's address, in a VLAN", "access", ELSEWHERE),
    direct("a port that has moved", "plain", "moved"),
    direct("host to the wire", "host", ELSEWHERE),
    bridged("a port that was not heard yet", "plain", "quiet"),
    bridged("a port whose device is gone", "plain", "gone"),
    bridged("a port that must be reached by the bridge", "plain", "slow"),
    bridged("a port with a smaller MTU, and room", "slow", "small"),
    bridged("from a port that must use the bridge", "slow", "peer"),
    bridged("from a port that must use the bridge, to the wire", "slow", ELSEWHERE),
    bridged("nobody's address on a private network", "lone", ELSEWHERE),
    bridged("another network's address", "lone", "peer"),
    bridged("nobody's address where one has to ask", "asker", ELSEWHERE),
    Case("its own address", "plain", frame("plain", "plain"), DROP, "plain.tx_local"),
    Case("its own address, by the bridge", "slow", frame("slow", "slow"), DROP, "slow.tx_local"),
    Case(
        "no longer than the port takes",
        "plain",
        frame("plain", "small", size=100),
        REDIRECT,
        "plain.tx_local",
    ),
    Case("longer than the port takes", "plain", frame("plain", "small", size=101), PASS, "plain.tx_bridge"),
    Case(
        "longer than the wire takes", "plain", frame("plain", ELSEWHERE, size=1515), PASS, "plain.tx_bridge"
    ),
    Case("nobody's device", "nobody", frame(FOREIGN, BROADCAST, AD), PASS, ""),
]


@pytest.mark.parametrize("case", SENT_TAGS + SENT_FROM + SENT_TO, ids=lambda case: case.name)
def test_sent(switches: Switches, case: Case) -> None:
    check(switches.run("sent", case.device, case.frame), case)


def test_a_large_frame_counts_as_the_segments_that_it_will_be(switches: Switches) -> None:
    large = frame("plain", "small", size=1400)
    run = switches.run("sent", "plain", large, gso_segs=20, gso_size=70)
    assert run.verdict == REDIRECT, "what will be cut up is not too long"
    assert run.moved == {"plain.tx_local.packets": 20, "plain.tx_local.bytes": 1400}
    refused = switches.run("sent", "plain", frame(FOREIGN, BROADCAST), gso_segs=20, gso_size=70)
    assert refused.moved == {"plain.spoofed": 20}


# Guards


def ip4(protocol: int, payload: bytes, options: bytes = b"", fragment: int = 0) -> bytes:
    """``fragment`` is the offset in units of 8 bytes; MF is above."""
    words = 5 + len(options) // 4
    length = 4 * words + len(payload)
    fixed = struct.pack("!BBHHHBBH", 4 << 4 | words, 0, length, 1, fragment, 64, protocol, 0)
    return b"\x08\x00" + fixed + bytes(8) + options + payload


def ip6(following: int, payload: bytes) -> bytes:
    return b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(payload), following, 255) + bytes(32) + payload


def extension(following: int, words: int = 0) -> bytes:
    """A hop-by-hop, routing or destination header of 8 bytes and ``words`` times 8 more."""
    return bytes([following, words]) + bytes(6 + 8 * words)


def fragment6(following: int, offset: int = 0, more: bool = True) -> bytes:
    return struct.pack("!BBHI", following, 0, offset << 3 | more, 7)


def udp(source: int) -> bytes:
    return struct.pack("!HHHH", source, 68, 8, 0)


UDP, TCP, ICMP, ICMPV6, ESP, NOTHING = 17, 6, 1, 58, 50, 59
HOP, ROUTING, FRAGMENT, AUTH, DESTINATION, MOBILITY = 0, 43, 44, 51, 60, 135
MORE = 0x2000
DHCP4, DHCP6 = ip4(UDP, udp(67)), ip6(UDP, udp(547))
RA4, REDIRECT4 = ip4(ICMP, bytes([9, 0, 0, 0])), ip4(ICMP, bytes([5, 1, 0, 0]))
RA6, REDIRECT6 = ip6(ICMPV6, bytes([134, 0, 0, 0])), ip6(ICMPV6, bytes([137, 0, 0, 0]))
RA = bytes([134, 0, 0, 0])
AH = bytes([ICMPV6, 4]) + bytes(22)  # (4 + 2) * 4 bytes

DHCP_FRAMES = {
    "DHCP": DHCP4,
    "DHCP behind IPv4 options": ip4(UDP, udp(67), options=bytes(40)),
    "DHCP, first fragment": ip4(UDP, udp(67), fragment=MORE),
    "DHCPv6": DHCP6,
    "DHCPv6 behind an extension header": ip6(DESTINATION, extension(UDP, 2) + udp(547)),
}
ROUTER_FRAMES = {
    "ICMP router advertisement": RA4,
    "ICMP redirect": REDIRECT4,
    "ICMP redirect behind options": ip4(ICMP, bytes([5, 1, 0, 0]), options=bytes(4)),
    "router advertisement": RA6,
    "redirect": REDIRECT6,
    "router advertisement behind hop-by-hop": ip6(HOP, extension(ICMPV6) + RA),
    "router advertisement behind routing": ip6(ROUTING, extension(ICMPV6, 2) + RA),
    "router advertisement behind authentication": ip6(AUTH, AH + RA),
    "router advertisement behind mobility": ip6(MOBILITY, extension(ICMPV6) + RA),
    "router advertisement in an atomic fragment": ip6(FRAGMENT, fragment6(ICMPV6, more=False) + RA),
    "router advertisement in a first fragment": ip6(FRAGMENT, fragment6(ICMPV6) + RA),
    "router advertisement behind eight headers": ip6(
        HOP, extension(DESTINATION) * 7 + extension(ICMPV6) + RA
    ),
}
HIDDEN_FRAMES = {
    "more headers than anybody sends": ip6(HOP, extension(DESTINATION) * 8 + extension(ICMPV6) + RA),
    "a first fragment without its upper header": ip6(FRAGMENT, fragment6(ICMPV6)),
    "a first fragment that ends in an extension header": ip6(FRAGMENT, fragment6(DESTINATION)),
    "an extension header longer than the frame": ip6(DESTINATION, extension(ICMPV6)[:1] + b"\xff" + RA),
    "an IPv4 fragment without its upper header": ip4(UDP, b"", fragment=MORE),
    "an IPv6 header that is cut": RA6[:6],
    "an IPv4 header that is cut": DHCP4[:8],
}
HARMLESS_FRAMES = {
    "DHCP client": ip4(UDP, udp(68)),
    "DHCPv6 client": ip6(UDP, udp(546)),
    "TCP": ip4(TCP, udp(67) + bytes(12)),
    "TCP over IPv6": ip6(TCP, udp(547) + bytes(12)),
    "ping": ip4(ICMP, bytes([8, 0, 0, 0])),
    "router solicitation": ip6(ICMPV6, bytes([133, 0, 0, 0])),
    "neighbour advertisement": ip6(ICMPV6, bytes([136, 0, 0, 0])),
    "a later IPv4 fragment": ip4(UDP, udp(67), fragment=MORE | 185),
    "a later IPv6 fragment": ip6(FRAGMENT, fragment6(ICMPV6, offset=185) + RA),
    "ESP": ip6(ESP, RA),
    "no next header": ip6(NOTHING, RA),
    "ARP": b"\x08\x06" + bytes(28),
    "another EtherType": b"\x88\xb5" + RA4[2:],
}


def packet(src: str, body: bytes, tags: bytes = b"") -> bytes:
    """To everybody."""
    return mac_bytes(BROADCAST) + mac_bytes(mac_of(src)) + tags + body


def sent_by(device: str, frames: dict[str, bytes], reason: str) -> list[Any]:
    return [pytest.param(device, body, reason, id=f"{name}, {device}") for name, body in frames.items()]


@pytest.mark.parametrize(
    ("device", "body", "reason"),
    [
        *sent_by("plain", DHCP_FRAMES, "guard_dhcp"),
        *sent_by("router", DHCP_FRAMES, "guard_dhcp"),
        *sent_by("dhcp", DHCP_FRAMES, ""),
        *sent_by("plain", ROUTER_FRAMES, "guard_ra"),
        *sent_by("dhcp", ROUTER_FRAMES, "guard_ra"),
        *sent_by("router", ROUTER_FRAMES, ""),
        *sent_by("plain", HIDDEN_FRAMES, "guard_ra"),
        *sent_by("dhcp", HIDDEN_FRAMES, "guard_ra"),
        *sent_by("router", HIDDEN_FRAMES, "guard_dhcp"),
        *sent_by("free", HIDDEN_FRAMES, ""),
        *sent_by("plain", HARMLESS_FRAMES, ""),
    ],
)
def test_guards(switches: Switches, device: str, body: bytes, reason: str) -> None:
    """All of them behind a VID 0 tag: without one the kernel makes no frame with half an IP header."""
    sent = packet(device, body, tag(0))
    if reason:
        case = Case("", device, sent, DROP, f"{device}.{reason}")
    else:
        case = Case("", device, sent, PASS, f"{device}.tx_bridge", packet(device, body))
    check(switches.run("sent", device, sent), case)


@pytest.mark.parametrize(
    ("device", "tags"),
    [
        pytest.param("plain", b"", id="no tag"),
        pytest.param("trunk", tag(10, 7, 1), id="a tag"),
        pytest.param("trunk", tag(10) + tag(30), id="two tags"),
        pytest.param("trunk", tag(10) + AD, id="802.1ad inside"),
    ],
)
@pytest.mark.parametrize(("body", "reason"), [(DHCP4, "guard_dhcp"), (RA6, "guard_ra")], ids=["DHCP", "RA"])
def test_guards_look_through_tags(
    switches: Switches, device: str, tags: bytes, body: bytes, reason: str
) -> None:
    sent = packet(device, body, tags)
    check(switches.run("sent", device, sent), Case("", device, sent, DROP, f"{device}.{reason}"))


def test_three_tags_hide_what_is_behind_them(switches: Switches) -> None:
    sent = packet("trunk", ip4(TCP, udp(1)), tag(10) * 3)
    check(switches.run("sent", "trunk", sent), Case("", "trunk", sent, DROP, "trunk.guard_ra"))


# What the wire brings

WIRE = [
    Case("broadcast", "nic", frame(ELSEWHERE, BROADCAST), PASS, "nic.tx_bridge"),
    Case("unicast to a port", "nic", frame(ELSEWHERE, "peer"), PASS, "nic.tx_bridge"),
    Case("unicast to nobody", "nic", frame(ELSEWHERE, FOREIGN), PASS, "nic.tx_bridge"),
    Case("unicast to the host", "nic", frame(ELSEWHERE, "host"), REDIRECT, "nic.tx_local"),
    Case("to a port that has frames merged", "nic", frame(ELSEWHERE, "merged"), REDIRECT, "nic.tx_local"),
    Case(
        "the same, VID 0",
        "nic",
        frame(ELSEWHERE, "merged", tag(0)),
        REDIRECT,
        "nic.tx_local",
        frame(ELSEWHERE, "merged"),
    ),
    Case("the same, in its VLAN", "nic", frame(ELSEWHERE, "merged-tcp", Q), REDIRECT, "nic.tx_local"),
    Case("the same, in no VLAN of its", "nic", frame(ELSEWHERE, "merged", Q), PASS, "nic.tx_bridge"),
    Case("the same, too long", "nic", frame(ELSEWHERE, "merged-tcp", Q, size=101), PASS, "nic.tx_bridge"),
    Case("the same, paused", "nic", frame(ELSEWHERE, "merged-paused"), PASS, "nic.tx_bridge"),
    Case("the same, not past the bridge", "nic", frame(ELSEWHERE, "merged-slow"), PASS, "nic.tx_bridge"),
    Case("the same, away", "nic", frame(ELSEWHERE, "merged-away"), PASS, "nic.tx_bridge"),
    Case("to the host in another VLAN", "nic", frame(ELSEWHERE, "host", Q), PASS, "nic.tx_bridge"),
    Case("too long for the host", "nic", frame(ELSEWHERE, "host", size=1515), PASS, "nic.tx_bridge"),
    Case("a VID", "nic", frame(ELSEWHERE, BROADCAST, tag(10, 5)), PASS, "nic.tx_bridge"),
    Case("two tags", "nic", frame(ELSEWHERE, BROADCAST, Q + tag(20)), PASS, "nic.tx_bridge"),
    Case(
        "VID 0",
        "nic",
        frame(ELSEWHERE, BROADCAST, tag(0, 7)),
        PASS,
        "nic.tx_bridge",
        frame(ELSEWHERE, BROADCAST),
    ),
    Case("VID 0 over a tag", "nic", frame(ELSEWHERE, BROADCAST, tag(0) + Q), DROP, "nic.vlan_sent"),
    Case("802.1ad", "nic", frame(ELSEWHERE, BROADCAST, AD), DROP, "nic.vlan_sent"),
    Case(
        "the bridge's own VID", "nic", frame(ELSEWHERE, BROADCAST, tag(UNTAGGED_VID)), DROP, "nic.vlan_sent"
    ),
    Case("nobody's device", "nobody", frame(ELSEWHERE, BROADCAST, AD), PASS, ""),
]


@pytest.mark.parametrize("case", WIRE, ids=lambda case: case.name)
def test_wire(switches: Switches, case: Case) -> None:
    check(switches.run("wire", case.device, case.frame), case)


# What goes towards a port


def delivered(name: str, device: str, frame: bytes, after: bytes | None = None) -> Case:
    return Case(name, device, frame, PASS, f"{device}.bridged", after)


def kept_out(name: str, device: str, tags: bytes) -> Case:
    return Case(name, device, frame(ELSEWHERE, device, tags), DROP, f"{device}.vlan_bridge")


def to(device: str, tags: bytes = b"") -> bytes:
    return frame(ELSEWHERE, device, tags)


GUARD = [
    delivered("untagged port, untagged", "plain", to("plain")),
    delivered("untagged port, broadcast", "plain", frame(ELSEWHERE, BROADCAST)),
    delivered("untagged port, VID 0", "plain", to("plain", tag(0, 7, 1)), to("plain")),
    kept_out("untagged port, VID 1", "plain", tag(1)),
    kept_out("untagged port, VID 4095", "plain", tag(4095)),
    kept_out("untagged port, 802.1ad", "plain", AD),
    kept_out("untagged port, 802.1ad with VID 0", "plain", tag(0, tpid=TPID_8021AD)),
    kept_out("untagged port, VID 0 over a tag", "plain", tag(0) + Q),
    kept_out("untagged port, VID 0 over 802.1ad", "plain", tag(0) + AD),
    delivered("access port, its VID", "access", to("access", tag(10, 7, 1)), to("access")),
    kept_out("access port, untagged", "access", b""),
    kept_out("access port, VID 0", "access", tag(0)),
    kept_out("access port, another VID", "access", tag(20)),
    kept_out("access port, 802.1ad with its VID", "access", AD),
    kept_out("access port, its VID over another tag", "access", Q + tag(20)),
    delivered("trunk, a VID of it keeps its tag", "trunk", to("trunk", tag(20, 5))),
    delivered("trunk, the native VID", "trunk", to("trunk", tag(1)), to("trunk")),
    delivered("trunk, two tags", "trunk", to("trunk", Q + tag(30))),
    kept_out("trunk, the native VID over another tag", "trunk", tag(1) + tag(30)),
    kept_out("trunk, untagged", "trunk", b""),
    kept_out("trunk, another VID", "trunk", tag(30)),
    kept_out("trunk, 802.1ad", "trunk", AD),
    kept_out("trunk without a native VID, untagged", "bare-trunk", b""),
    delivered("trunk without a native VID, a VID of it", "bare-trunk", to("bare-trunk", Q)),
    delivered("trunk with untagged frames, untagged", "open-trunk", to("open-trunk")),
    Case("flooded unicast of nobody's", "plain", frame(ELSEWHERE, FOREIGN), DROP, ""),
    Case("flooded unicast of another port's", "plain", frame(ELSEWHERE, "peer"), DROP, ""),
    Case("its address, which has moved", "moved", frame(ELSEWHERE, "moved"), DROP, ""),
    delivered("its address, not heard yet", "quiet", frame(ELSEWHERE, "quiet")),
    delivered("nobody's address, where anything may be behind", "spoofer", frame(ELSEWHERE, FOREIGN)),
    Case("another port's, where anything may be behind", "spoofer", frame(ELSEWHERE, "peer"), DROP, ""),
    Case("LLDP", "plain", frame(ELSEWHERE, LLDP), DROP, "plain.link_local"),
    delivered("LLDP, allowed", "lldp", frame(ELSEWHERE, LLDP)),
    delivered("to the host", "host", frame(ELSEWHERE, "host")),
    Case("nobody's device", "nobody", frame(ELSEWHERE, FOREIGN, AD), PASS, ""),
]


@pytest.mark.parametrize("case", GUARD, ids=lambda case: case.name)
def test_guard(switches: Switches, case: Case) -> None:
    check(switches.run("guard", case.device, case.frame), case)


@pytest.mark.parametrize("device", ["plain", "free", "host"])
def test_what_the_host_itself_sends_to_a_port_is_dropped(switches: Switches, device: str) -> None:
    run = switches.run("guard", device, frame(ELSEWHERE, BROADCAST), ingress_ifindex=0)
    assert (run.verdict, run.moved) == (DROP, {f"{device}.host": 1})


# Stations


def test_a_port_that_speaks_is_here(switches: Switches) -> None:
    assert switches.run("sent", "quiet", frame("quiet", "quiet")).verdict == DROP
    station = switches.station("quiet")
    assert (station.state, station.moves) == ("here", 1)
    assert station.since > 0
    assert switches.news() == [News(EXTERNAL, IDS["quiet"], "here", mac_of("quiet"), 0)]
    switches.run("sent", "quiet", frame("quiet", BROADCAST))
    assert switches.station("quiet") == station, "told once"
    assert switches.news() == []


def test_a_station_of_a_vlan_is_told_with_its_vid(switches: Switches) -> None:
    switches.run("wire", "nic", frame("trunk", BROADCAST, tag(20)))
    assert switches.news() == [News(EXTERNAL, IDS["trunk"], "away", mac_of("trunk"), 20)]
    assert [switches.station("trunk", vid).state for vid in (1, 10, 20)] == ["here", "here", "away"]


@pytest.mark.parametrize("name", ["peer", "quiet"])
def test_a_port_that_is_heard_from_the_wire_is_away(switches: Switches, name: str) -> None:
    """The fast path ends at once; the announcement itself goes on."""
    assert switches.port_flags(name) & RUNNING
    run = switches.run("wire", "nic", frame(name, BROADCAST))
    assert (run.verdict, run.moved) == (PASS, {"nic.tx_bridge.packets": 1, "nic.tx_bridge.bytes": 60})
    assert switches.port_flags(name) == BYPASS
    assert (switches.station(name).state, switches.station(name).moves) == ("away", 1)
    assert switches.news() == [News(EXTERNAL, IDS[name], "away", mac_of(name), 0)]
    switches.run("wire", "nic", frame(name, BROADCAST))
    assert switches.news() == []
    assert switches.run("sent", "plain", frame("plain", name)).moved.keys() == {
        "plain.tx_direct.packets",
        "plain.tx_direct.bytes",
    }


def test_a_port_that_comes_back(switches: Switches) -> None:
    switches.run("sent", "moved", frame("moved", BROADCAST))
    assert switches.station("moved").state == "here"
    assert switches.run("sent", "plain", frame("plain", "moved")).verdict == REDIRECT


def test_what_is_dropped_moves_nobody(switches: Switches) -> None:
    for sent in (frame("quiet", LLDP), frame("quiet", BROADCAST, tag(7)), packet("quiet", RA6)):
        assert switches.run("sent", "quiet", sent).verdict == DROP
    for sent in (frame("peer", BROADCAST, AD), frame("peer", BROADCAST, tag(UNTAGGED_VID))):
        assert switches.run("wire", "nic", sent).verdict == DROP
    switches.run("wire", "nic", frame("peer", BROADCAST, tag(10)))  # of no station in that VLAN
    switches.run("sent", "spoofer", frame("quiet", BROADCAST))
    assert switches.news() == []
    assert (switches.station("quiet").state, switches.station("peer").state) == ("expected", "here")


def test_the_host_that_speaks_by_the_wire_is_not_reached_directly(switches: Switches) -> None:
    switches.run("wire", "nic", frame("host", BROADCAST))
    assert switches.run("wire", "nic", frame(ELSEWHERE, "host")).verdict == PASS


# The Python bridge


@pytest.mark.parametrize(
    ("device", "program", "sent", "verdict", "counted"),
    [
        pytest.param("wrapped", "sent", frame("wrapped", BROADCAST), REDIRECT, "tx_bridge", id="broadcast"),
        pytest.param("wrapped", "sent", frame("wrapped", "wrapped-peer"), REDIRECT, "tx_local", id="local"),
        pytest.param("wrapped-nic", "wire", frame(ELSEWHERE, BROADCAST), REDIRECT, "tx_bridge", id="wire"),
    ],
)
def test_with_a_python_bridge(
    switches: Switches, device: str, program: str, sent: bytes, verdict: int, counted: str
) -> None:
    run = switches.run(program, device, sent)
    assert run == Run(verdict, sent, expected(f"{device}.{counted}", sent))


def test_only_what_has_a_port_to_go_out_of_leaves_a_conduit(switches: Switches) -> None:
    """The tags stand in the frame here, and the program asks for them beside it."""
    assert switches.run("unwrap", "conduit", frame(ELSEWHERE, BROADCAST)).verdict == DROP
    assert switches.run("unwrap", "conduit", frame(ELSEWHERE, BROADCAST, Q)).verdict == DROP


def test_a_silent_device(switches: Switches) -> None:
    run = switches.run("silence", "silent", frame(ELSEWHERE, BROADCAST))
    assert (run.verdict, run.moved) == (DROP, {})


STRAYED = {
    "its port's": ("function", frame(ELSEWHERE, "plain"), REDIRECT, b""),
    "of its VLAN": ("function-10", frame(ELSEWHERE, "access"), REDIRECT, tag(10)),
    "of its VLAN, with a priority": (
        "function-10",
        frame(ELSEWHERE, "access", tag(0, 5)),
        REDIRECT,
        tag(10, 5),
    ),
    "priority-tagged": ("function", frame(ELSEWHERE, "plain", tag(0, 5)), REDIRECT, b""),
    "still tagged": ("function-10", frame(ELSEWHERE, "access", tag(10)), DROP, None),
    "of another VLAN": ("function", frame(ELSEWHERE, "access"), DROP, None),
    "nobody's": ("function", frame(ELSEWHERE, FOREIGN), DROP, None),
    "broadcast": ("function", frame(ELSEWHERE, BROADCAST), DROP, None),
    "multicast": ("function", frame(ELSEWHERE, MULTICAST), DROP, None),
    "of no device of ours": ("nobody", frame(ELSEWHERE, "plain"), DROP, None),
}


@pytest.mark.parametrize(("device", "came", "verdict", "tags"), STRAYED.values(), ids=STRAYED)
def test_what_a_virtual_function_gives_to_its_nic(
    switches: Switches, device: str, came: bytes, verdict: int, tags: bytes | None
) -> None:
    """With the tag that the NIC had taken off. A test run shows tags in the frame."""
    run = switches.run("strayed", device, came)
    assert (run.verdict, run.moved) == (verdict, {})
    if tags is not None:
        bare = came[:12] + came[16:] if came[12:14] == b"\x81\x00" else came
        assert run.frame[:12] + run.frame[-len(bare) + 12 :] == bare
        assert run.frame[12 : len(run.frame) - len(bare) + 12] in (tags, b"")
