"""What the uplink's programs decide: a frame, the verdict, the frame afterwards, the counter that moves."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload.plan import FRAGS_POSSIBLE, GRO, GRO_TCP, NO_FRAGS, RUNNING, SOCKETS, TRUNK
from tests.bpf.loaded import (
    XDP_DROP,
    XDP_PASS,
    XDP_REDIRECT,
    Run,
    Vmq,
)
from tests.lab import TPID_8021AD, WIRE_MAC, Lab, tag, test_frame

PASS, DROP, REDIRECT = XDP_PASS, XDP_DROP, XDP_REDIRECT

UNTAGGED, ACCESS, TRUNKED, PAUSED, AWAY, NO_CPU, ELSEWHERE, HERE, TUN, JUMBO, SMALL, PLAIN_TRUNK = range(12)
XSK, MERGED, MERGED_TCP, MERGED_ELSEWHERE, MERGED_TRUNK, MERGED_PAUSED = range(12, 18)
"""Ports; ``mac_of`` gives their MACs."""


def mac_of(port: int) -> str:
    return f"02:15:5d:00:00:{port:02x}"


def to(port: int, tags: bytes = b"", size: int = 60) -> bytes:
    return test_frame(mac_of(port), WIRE_MAC, tags=tags, size=size)


def ip(port: int, version: int, protocol: int, tags: bytes = b"", fragment: int = 0) -> bytes:
    """A packet as far as the program looks: of this protocol, with IPv4's flags and fragment offset."""
    head = struct.pack("!BxHHHBB", 0x45, 46, 1, fragment, 64, protocol)
    if version == 6:
        head = struct.pack("!IHBB", 6 << 28, 6, protocol, 64)
    ethertype = 0x0800 if version == 4 else 0x86DD
    return test_frame(mac_of(port), WIRE_MAC, tags=tags, ethertype=ethertype)[: 14 + len(tags)] + head.ljust(
        46, b"\6"
    )


def untagged(frame: bytes) -> bytes:
    """The frame without the tag behind its MACs."""
    return frame[:12] + frame[16:]


@pytest.fixture
def vmq(vmq: Vmq, cpus: tuple[int, int]) -> Vmq:
    """The programs with one port of each kind. Scope: one test."""
    here, elsewhere = cpus
    vmq.serve(elsewhere)
    for port, vids, fields in [
        (UNTAGGED, [0], {}),
        (ACCESS, [10], {"pvid": 10}),
        (TRUNKED, [1, 10, 20], {"pvid": 1, "flags": RUNNING | TRUNK}),
        (PLAIN_TRUNK, [0, 10], {"flags": RUNNING | TRUNK}),
        (PAUSED, [0], {"flags": 0}),
        (AWAY, [0], {"ifindex": 0}),
        (NO_CPU, [0], {"cpu": 100_000}),
        (ELSEWHERE, [0], {"cpu": elsewhere}),
        (HERE, [0], {"cpu": here}),
        (TUN, [0], {"flags": RUNNING | NO_FRAGS | FRAGS_POSSIBLE, "max_len": 9014}),
        (JUMBO, [0], {"flags": RUNNING | FRAGS_POSSIBLE, "max_len": 9014}),
        (SMALL, [0], {"max_len": 100}),
        (MERGED, [0], {"flags": RUNNING | GRO}),
        (MERGED_TCP, [0], {"flags": RUNNING | GRO_TCP, "max_len": 100}),
        (MERGED_ELSEWHERE, [0], {"flags": RUNNING | GRO_TCP, "cpu": elsewhere}),
        (MERGED_TRUNK, [0, 10], {"flags": RUNNING | TRUNK | GRO_TCP}),
        (MERGED_PAUSED, [0], {"flags": GRO}),
        (XSK, [10], {"flags": RUNNING | SOCKETS, "pvid": 10, "cpu": elsewhere}),
    ]:
        vmq.set_port(port, **({"flags": RUNNING} | fields))
        for vid in vids:
            vmq.set_filter(mac_of(port), vid, port)
    return vmq


@dataclass(frozen=True)
class Case:
    """``counted`` is the counter that moves; ``after`` the frame afterwards, None for as it came.

    ``on_queue`` is the counter when the queue program gets the frame, ``on_queue_verdict`` its verdict and
    ``on_queue_after`` the frame then, where they are not those of the uplink program.
    """

    name: str
    frame: bytes
    verdict: int
    counted: str
    after: bytes | None = None
    on_queue: str | None = None
    on_queue_verdict: int | None = None
    on_queue_after: bytes | None = None


def delivered(name: str, port: int, frame: bytes, after: bytes | None = None) -> Case:
    return Case(name, frame, REDIRECT, f"{port}.direct", after, on_queue=f"{port}.handed")


def bridged(name: str, frame: bytes, reason: str) -> Case:
    """To the bridge for a reason that has nothing to do with a port."""
    return Case(name, frame, PASS, f"nic.{reason}")


def returned(name: str, port: int, frame: bytes, reason: str) -> Case:
    """To the bridge although there is a port for it."""
    return Case(name, frame, PASS, f"nic.{reason}", on_queue=f"{port}.returned")


def dropped(name: str, port: int, frame: bytes) -> Case:
    return Case(name, frame, DROP, f"{port}.vlan_nic", on_queue=f"{port}.vlan_queue")


def merged(name: str, port: int, frame: bytes) -> Case:
    """On the queue's CPU it is handed over: one that waited there while the port's delivery changed."""
    after = untagged(frame) if frame[12:14] == b"\x81\0" and port != MERGED_TRUNK else frame
    return Case(
        name,
        frame,
        PASS,
        f"{port}.left",
        on_queue=f"{port}.handed",
        on_queue_verdict=REDIRECT,
        on_queue_after=after,
    )


TCP, UDP, HOP_BY_HOP = 6, 17, 0
Q, AD = tag(10), tag(10, tpid=TPID_8021AD)

CASES = [
    delivered("untagged port, untagged frame", UNTAGGED, to(UNTAGGED)),
    delivered("untagged port, VID 0", UNTAGGED, to(UNTAGGED, tag(0)), to(UNTAGGED)),
    delivered("untagged port, VID 0 with PCP and DEI", UNTAGGED, to(UNTAGGED, tag(0, 7, 1)), to(UNTAGGED)),
    bridged("untagged port, VID 1", to(UNTAGGED, tag(1)), "no_filter"),
    bridged("untagged port, VID 10", to(UNTAGGED, Q), "no_filter"),
    bridged("untagged port, VID 4095", to(UNTAGGED, tag(4095)), "no_filter"),
    dropped("untagged port, two tags", UNTAGGED, to(UNTAGGED, Q + tag(20))),
    dropped("untagged port, VID 0 twice", UNTAGGED, to(UNTAGGED, tag(0) + tag(0))),
    dropped("untagged port, VID 0 over VID 10", UNTAGGED, to(UNTAGGED, tag(0) + Q)),
    dropped("untagged port, 802.1ad", UNTAGGED, to(UNTAGGED, AD)),
    dropped("untagged port, 802.1ad with VID 0", UNTAGGED, to(UNTAGGED, tag(0, tpid=TPID_8021AD))),
    dropped("untagged port, 802.1ad in 802.1Q", UNTAGGED, to(UNTAGGED, tag(0) + AD)),
    delivered("access port, its VID", ACCESS, to(ACCESS, Q), to(ACCESS)),
    delivered("access port, its VID with PCP and DEI", ACCESS, to(ACCESS, tag(10, 5, 1)), to(ACCESS)),
    bridged("access port, another VID", to(ACCESS, tag(20)), "no_filter"),
    bridged("access port, untagged", to(ACCESS), "no_filter"),
    bridged("access port, VID 0", to(ACCESS, tag(0)), "no_filter"),
    dropped("access port, 802.1ad with its VID", ACCESS, to(ACCESS, AD)),
    dropped("access port, its VID over another tag", ACCESS, to(ACCESS, Q + tag(20))),
    delivered("trunk, a VID of it keeps its tag", TRUNKED, to(TRUNKED, tag(10, 5, 1))),
    delivered("trunk, another VID of it", TRUNKED, to(TRUNKED, tag(20))),
    delivered("trunk, the native VID", TRUNKED, to(TRUNKED, tag(1)), to(TRUNKED)),
    delivered("trunk, two tags are the guest's business", TRUNKED, to(TRUNKED, Q + tag(30))),
    bridged("trunk, a VID that is not of it", to(TRUNKED, tag(30)), "no_filter"),
    bridged("trunk, untagged", to(TRUNKED), "no_filter"),
    dropped("trunk, 802.1ad", TRUNKED, to(TRUNKED, AD)),
    dropped("trunk, two tags, the outer one its native VID", TRUNKED, to(TRUNKED, tag(1) + tag(30))),
    dropped("untagged trunk, VID 0 over another tag", PLAIN_TRUNK, to(PLAIN_TRUNK, tag(0) + tag(30))),
    dropped("untagged trunk, two tags under a foreign VID", PLAIN_TRUNK, to(PLAIN_TRUNK, tag(30) + Q)),
    delivered("untagged trunk, two tags under its VID", PLAIN_TRUNK, to(PLAIN_TRUNK, Q + tag(30))),
    delivered("untagged trunk, VID 0", PLAIN_TRUNK, to(PLAIN_TRUNK, tag(0)), to(PLAIN_TRUNK)),
    bridged("broadcast", test_frame("ff:ff:ff:ff:ff:ff", WIRE_MAC), "broadcast"),
    bridged("broadcast, tagged twice", test_frame("ff:ff:ff:ff:ff:ff", WIRE_MAC, tags=Q + Q), "broadcast"),
    bridged("multicast", test_frame("01:00:5e:00:00:01", WIRE_MAC), "multicast"),
    bridged("nobody's MAC", to(200), "no_filter"),
    bridged("nobody's MAC, 802.1ad", to(200, AD), "no_filter"),
    bridged("ends in its tag", to(UNTAGGED, tag(0))[:16], "malformed"),
    returned("paused port", PAUSED, to(PAUSED), "paused"),
    returned("no device", AWAY, to(AWAY), "no_device"),
    returned("no device, VID 0 stays", AWAY, to(AWAY, tag(0)), "no_device"),
    returned("too long", SMALL, to(SMALL, size=101), "too_big"),
    returned("too long with a tag", SMALL, to(SMALL, tag(0), size=101), "too_big"),
    delivered("as long as it may be", SMALL, to(SMALL, size=100)),
    delivered("as long as it may be, and a tag", SMALL, to(SMALL, tag(0), size=100), to(SMALL, size=100)),
    returned("several buffers to a tap", TUN, to(TUN, size=5000), "frags"),
    delivered("one buffer to a tap", TUN, to(TUN, size=3000)),
    delivered("several buffers", JUMBO, to(JUMBO, size=5000)),
    delivered("several buffers, VID 0", JUMBO, to(JUMBO, tag(0), size=5000), to(JUMBO, size=5000)),
    returned("several buffers, too long", JUMBO, to(JUMBO, size=9015), "too_big"),
    delivered("the queue's CPU is this one", HERE, to(HERE)),
    merged("all frames are merged", MERGED, to(MERGED)),
    merged("all frames are merged, VID 0 stays", MERGED, to(MERGED, tag(0))),
    merged("TCP", MERGED_TCP, ip(MERGED_TCP, 4, TCP)),
    merged("TCP over IPv6", MERGED_TCP, ip(MERGED_TCP, 6, TCP)),
    merged("TCP, VID 0", MERGED_TCP, ip(MERGED_TCP, 4, TCP, tag(0))),
    merged("TCP over IPv6, VID 10", MERGED_TRUNK, ip(MERGED_TRUNK, 6, TCP, Q)),
    merged("a fragment of TCP", MERGED_TCP, ip(MERGED_TCP, 4, TCP, fragment=0x2001)),
    delivered("UDP", MERGED_TCP, ip(MERGED_TCP, 4, UDP)),
    delivered("UDP over IPv6", MERGED_TCP, ip(MERGED_TCP, 6, UDP)),
    delivered("IPv6 with an extension header", MERGED_TCP, ip(MERGED_TCP, 6, HOP_BY_HOP)),
    delivered("no IP", MERGED_TCP, to(MERGED_TCP)),
    delivered("no IP, and TCP's number where IP has it", MERGED_TCP, to(MERGED_TCP)[:14] + b"\6" * 46),
    delivered("TCP behind two tags", MERGED_TRUNK, ip(MERGED_TRUNK, 4, TCP, Q + tag(20))),
    delivered("ends in its IP header", MERGED_TCP, ip(MERGED_TCP, 4, TCP)[:33]),
    dropped("merged or not, 802.1ad", MERGED, to(MERGED, AD)),
    returned("merged or not, paused", MERGED_PAUSED, to(MERGED_PAUSED), "paused"),
    returned("merged or not, too long", MERGED_TCP, ip(MERGED_TCP, 4, TCP).ljust(101, b"\0"), "too_big"),
    merged("TCP, before it goes to the queue's CPU", MERGED_ELSEWHERE, ip(MERGED_ELSEWHERE, 4, TCP)),
    Case(
        "UDP goes to the queue's CPU",
        ip(MERGED_ELSEWHERE, 4, UDP),
        REDIRECT,
        f"{MERGED_ELSEWHERE}.queued",
        on_queue=f"{MERGED_ELSEWHERE}.handed",
    ),
    Case(
        "the queue's CPU is not set up",
        to(NO_CPU),
        PASS,
        "nic.no_cpu",
        on_queue=f"{NO_CPU}.handed",
        on_queue_verdict=REDIRECT,
    ),
    Case(
        "to the queue's CPU",
        to(ELSEWHERE),
        REDIRECT,
        f"{ELSEWHERE}.queued",
        on_queue=f"{ELSEWHERE}.handed",
    ),
]


def expected(counter: str, frame: bytes) -> dict[str, int]:
    """The counters that move when ``counter`` counts ``frame``."""
    if ".vlan_" in counter:
        return {counter: 1}
    return {f"{counter}.packets": 1, f"{counter}.bytes": len(frame)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_uplink(vmq: Vmq, case: Case) -> None:
    """On the NIC's CPU."""
    after = case.frame if case.after is None else case.after
    assert vmq.run(vmq.uplink, case.frame) == Run(case.verdict, after, expected(case.counted, case.frame))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_queue(vmq: Vmq, case: Case) -> None:
    """On the queue's CPU: the same answers, and counters of its own."""
    verdict = case.verdict if case.on_queue_verdict is None else case.on_queue_verdict
    after = case.on_queue_after or case.after or case.frame
    counted = expected(case.on_queue or case.counted, case.frame)
    assert vmq.run(vmq.twin, case.frame) == Run(verdict, after, counted)


def test_the_tag_stays_on_until_the_queue_s_cpu(vmq: Vmq) -> None:
    """So that the frame can still go to the bridge as it came."""
    frame = to(ELSEWHERE, tag(0))
    assert vmq.run(vmq.uplink, frame).frame == frame
    assert vmq.run(vmq.twin, frame).frame == untagged(frame)


def test_a_filter_that_went_while_the_frame_waited(vmq: Vmq) -> None:
    frame = to(ELSEWHERE)
    assert vmq.run(vmq.uplink, frame).verdict == REDIRECT
    vmq.set_filter(mac_of(ELSEWHERE), 0, UNTAGGED)
    assert vmq.run(vmq.twin, frame).moved == expected(f"{UNTAGGED}.handed", frame)


def test_empty_tables_send_everything_to_the_bridge(one_lab: Lab, cache: Path, cpus: tuple[int, int]) -> None:
    frame = to(UNTAGGED)
    with Vmq(one_lab.host, cache, cpus[0]) as empty:
        assert empty.run(empty.uplink, frame) == Run(PASS, frame, expected("nic.no_filter", frame))


def test_a_socket_of_the_rx_queue_comes_before_the_queue_s_cpu(vmq: Vmq) -> None:
    vmq.own_sockets(XSK)
    vmq.put_socket(0)
    run = vmq.run(vmq.uplink, to(XSK, Q))
    assert (run.verdict, run.frame) == (REDIRECT, to(XSK))
    assert run.moved == {f"{XSK}.socket.packets": 1, f"{XSK}.socket.bytes": 64}


def test_a_socket_of_another_rx_queue_is_none(vmq: Vmq) -> None:
    vmq.own_sockets(XSK)
    vmq.put_socket(1)
    run = vmq.run(vmq.uplink, to(XSK, Q))
    assert (run.verdict, run.frame) == (REDIRECT, to(XSK, Q))
    assert run.moved == {f"{XSK}.queued.packets": 1, f"{XSK}.queued.bytes": 64}


def test_without_sockets_of_its_own_a_port_is_like_others(vmq: Vmq) -> None:
    run = vmq.run(vmq.uplink, to(XSK, Q))
    assert run.moved == {f"{XSK}.queued.packets": 1, f"{XSK}.queued.bytes": 64}


def test_one_port_s_sockets_are_no_other_s(vmq: Vmq) -> None:
    vmq.own_sockets(XSK)
    vmq.put_socket(0)
    assert vmq.run(vmq.uplink, to(UNTAGGED)).moved == {
        f"{UNTAGGED}.direct.packets": 1,
        f"{UNTAGGED}.direct.bytes": 60,
    }


def test_on_the_queue_s_cpu_nobody_asks_for_sockets(vmq: Vmq) -> None:
    vmq.own_sockets(XSK)
    vmq.put_socket(0)
    run = vmq.run(vmq.twin, to(XSK, Q))
    assert (run.verdict, run.frame) == (REDIRECT, to(XSK))
    assert run.moved == {f"{XSK}.handed.packets": 1, f"{XSK}.handed.bytes": 64}
