"""What the program on a virtual function decides: a frame that the NIC sorted there, and its fate."""

from __future__ import annotations

import pytest

from offload.plan import GRO, RUNNING
from tests.bpf.loaded import XDP_DROP, XDP_PASS, XDP_REDIRECT, Vmq
from tests.lab import TPID_8021AD, WIRE_MAC, tag, test_frame

OWN, OTHER, ACCESS, PAUSED, AWAY, SMALL, ELSEWHERE, MERGED = range(8)


def to(port: int, tags: bytes = b"") -> bytes:
    return test_frame(f"02:15:5d:00:00:{port:02x}", WIRE_MAC, tags=tags)


@pytest.fixture
def vmq(vmq: Vmq, cpus: tuple[int, int]) -> Vmq:
    """The programs with one port of each kind. Scope: one test."""
    vmq.serve(cpus[1])
    for port, vid, fields in [
        (OWN, 0, {}),
        (OTHER, 0, {}),
        (ACCESS, 10, {"pvid": 10}),
        (PAUSED, 0, {"flags": 0}),
        (AWAY, 0, {"ifindex": 0}),
        (SMALL, 0, {"max_len": 50}),
        (ELSEWHERE, 0, {"cpu": cpus[1]}),
        (MERGED, 0, {"flags": RUNNING | GRO}),
    ]:
        vmq.set_port(port, **({"flags": RUNNING} | fields))
        vmq.set_filter(f"02:15:5d:00:00:{port:02x}", vid, port)
    return vmq


BROADCAST = test_frame("ff:ff:ff:ff:ff:ff", WIRE_MAC)
MULTICAST = test_frame("01:00:5e:00:00:05", WIRE_MAC)
CASES = {
    "its port's": (OWN, 0, to(OWN), XDP_REDIRECT, f"{OWN}.direct"),
    "priority-tagged": (OWN, 0, to(OWN, tag(0, 5)), XDP_REDIRECT, f"{OWN}.direct"),
    "of its VLAN, without the tag": (ACCESS, 10, to(ACCESS), XDP_REDIRECT, f"{ACCESS}.direct"),
    "broadcast": (OWN, 0, BROADCAST, XDP_DROP, "function.group"),
    "multicast": (OWN, 0, MULTICAST, XDP_DROP, "function.group"),
    "another port's": (OWN, 0, to(OTHER), XDP_DROP, "function.stranger"),
    "nobody's": (OWN, 0, to(0x99), XDP_DROP, "function.stranger"),
    "too short": (OWN, 0, to(OWN)[:12] + b"\x81\x00", XDP_DROP, "function.stranger"),
    "tagged": (OWN, 0, to(OWN, tag(10)), XDP_DROP, "function.stranger"),
    "a tag behind the one taken off": (ACCESS, 10, to(ACCESS, tag(10)), XDP_DROP, "function.stranger"),
    "VID 0 behind the tag taken off": (ACCESS, 10, to(ACCESS, tag(0)), XDP_DROP, "function.stranger"),
    "of another VLAN": (ACCESS, 11, to(ACCESS), XDP_DROP, "function.stranger"),
    "untagged on an access port's": (ACCESS, 0, to(ACCESS), XDP_DROP, "function.stranger"),
    "a VID 0 tag of 802.1ad": (OWN, 0, to(OWN, tag(0, tpid=TPID_8021AD)), XDP_DROP, f"{OWN}.vlan_nic"),
    "two tags": (OWN, 0, to(OWN, tag(0) + tag(10)), XDP_DROP, f"{OWN}.vlan_nic"),
    "paused": (PAUSED, 0, to(PAUSED), XDP_PASS, "function.passed"),
    "device away": (AWAY, 0, to(AWAY), XDP_PASS, "function.passed"),
    "too long": (SMALL, 0, to(SMALL), XDP_PASS, "function.passed"),
    "its interrupt is on another CPU": (ELSEWHERE, 0, to(ELSEWHERE), XDP_REDIRECT, f"{ELSEWHERE}.direct"),
    "merged on the NIC": (MERGED, 0, to(MERGED), XDP_REDIRECT, f"{MERGED}.direct"),
}


@pytest.mark.parametrize(("serves", "vid", "frame", "verdict", "counted"), CASES.values(), ids=CASES)
def test_function(vmq: Vmq, serves: int, vid: int, frame: bytes, verdict: int, counted: str) -> None:
    vmq.let_serve(serves, vid)
    run = vmq.run(vmq.function, frame)
    length = {} if "vlan_nic" in counted else {f"{counted}.bytes": max(len(frame), 14)}
    moved = {counted if not length else f"{counted}.packets": 1} | length
    assert (run.verdict, run.moved) == (verdict, moved)
    if verdict == XDP_REDIRECT:
        assert run.frame == to(serves)
    elif verdict == XDP_PASS:
        assert run.frame == frame


def test_a_function_that_serves_nobody_delivers_nothing(vmq: Vmq) -> None:
    vmq.let_serve(0xFFFFFFFF)
    for frame in (to(OWN), to(OTHER), to(0x99)):
        assert vmq.run(vmq.function, frame).verdict == XDP_DROP
