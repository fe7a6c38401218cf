"""The laboratory itself: frames come out as they went in. Needs root."""

from __future__ import annotations

import os

from tests.lab import (
    WIRE_MAC,
    Lab,
    missing_privilege,
    remove_leftovers,
    seq_of,
    tag,
    test_frame,
    udp4,
)

MAC = "02:15:5d:00:00:01"


def test_a_tagged_frame_crosses_the_wire_bit_for_bit(lab: Lab) -> None:
    frame = test_frame(MAC, WIRE_MAC, seq=7, tags=tag(10, pcp=5))
    with lab.host.capture(lab.nic) as seen:
        lab.wire.send(lab.wire_end, [frame])
        assert seen.wait_for(1) == [frame]
    assert seq_of(frame) == 7


def test_a_vm_hears_nothing_until_somebody_speaks(lab: Lab) -> None:
    vm = lab.vm("web1", mac=MAC, address="192.0.2.11/24")
    with vm.capture() as seen:
        seen.assert_silent()
        lab.host.send("web1", [test_frame(MAC, WIRE_MAC, seq=number) for number in range(300)])
        assert [seq_of(frame) for frame in seen.wait_for(300)] == list(range(300))


def test_udp4_is_accepted_by_the_kernel(lab: Lab) -> None:
    vm = lab.vm("web1", mac=MAC, address="192.0.2.11/24")
    lab.host.send("web1", [udp4(MAC, WIRE_MAC, "192.0.2.11", "192.0.2.1", b"odd")])
    assert "UdpNoPorts" in (shown := vm.ns.run("nstat", "-az", "UdpNoPorts").stdout)
    assert shown.split("UdpNoPorts")[1].split()[0] == "1"


def test_tap_carries_frames_both_ways(lab: Lab) -> None:
    tap = lab.tap("tap1", queues=2)
    frame = test_frame(MAC, WIRE_MAC)
    with lab.host.capture("tap1") as seen:
        tap.send([frame])
        assert seen.wait_for(1) == [frame]
    lab.host.send("tap1", [frame])
    assert tap.wait_for(1) == [frame]
    assert sum(tap.by_queue) == 1


def test_nothing_is_left(lab: Lab) -> None:
    with Lab(queues=1) as other:
        names = [other.host.name, other.wire.name, other.vm("web1", mac=MAC).ns.name]
        assert all(os.path.exists(f"/run/netns/{name}") for name in names)
    other.close()
    assert not any(os.path.exists(f"/run/netns/{name}") for name in names)
    remove_leftovers()
    assert os.path.exists(lab.host.path)
    assert missing_privilege() is None
