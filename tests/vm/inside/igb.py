"""Native XDP and AF_XDP on the Intel 82576, by its real driver, with two queues."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from offload import xsk
from tests.lab import NIC_MAC, VERSION, WIRE_MAC, seq_of, tag, test_frame, udp4
from tests.vm.inside.cards import Cards

QUEUES = (0, 1)
COUNT = 40
ZERO_COPY_SINCE = (6, 14)
"""Linux's igb of this version has AF_XDP zero copy: commit 2c6196013f84 for RX."""
RINGS = xsk.RingSizes(rx=1024, tx=64)

needs_zero_copy = pytest.mark.skipif(
    VERSION < ZERO_COPY_SINCE, reason="igb has no zero copy before Linux 6.14"
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Cards]:
    """Two cards on a wire. Scope: one module."""
    with Cards("igb") as lab:
        yield lab


@contextmanager
def program(lab: Cards) -> Iterator[xsk.Redirect]:
    """A native XDP program on the NIC that gives each queue's frames to its socket."""
    with lab.host.call(lambda: xsk.Redirect(lab.nic, "native")) as redirect:
        lab.wait_link()
        yield redirect
    lab.wait_link()


@contextmanager
def sockets(lab: Cards, copy: xsk.Copy) -> Iterator[list[xsk.Socket]]:
    """The program, and a socket on every queue, with one UMEM for all."""
    with program(lab) as redirect, xsk.Umem(xsk.UmemShape(frames=2048)) as umem, ExitStack() as held:
        found: list[xsk.Socket] = []
        for queue in QUEUES:
            bind = partial(xsk.BoundSocket.bind, umem, lab.nic, queue, rings=RINGS, copy=copy)
            shared = found[0].frames if found else None
            bound = lab.host.call(bind)
            found.append(held.enter_context(xsk.Socket(bound, shared, rx_chunks=600)))
            redirect.map.insert(queue, bound)
        yield found


def arriving(mac: str = NIC_MAC) -> list[bytes]:
    """IP, so that RSS has a say in its queue."""
    return [
        udp4(mac, WIRE_MAC, "192.0.2.1", f"192.0.2.{2 + number}", b"%64d" % number) for number in range(COUNT)
    ]


def take(socket: xsk.Socket, count: int) -> list[bytes]:
    """The next ``count`` frames, in no order, for the far card has two TX queues; AssertionError without."""
    frames: list[bytes] = []
    while len(frames) < count:
        with socket.receive(timeout=5) as batch:
            assert batch, f"{len(frames)} of {count} frames came"
            frames += [bytes(frame) for frame in batch]
    return frames


def silent(socket: xsk.Socket) -> bool:
    with socket.receive(timeout=0.2) as batch:
        return len(batch) == 0


def check_receiving(lab: Cards, found: list[xsk.Socket]) -> None:
    """What RSS puts into a queue comes to its socket, and nothing of it to the other one."""
    for queue, other in ((0, 1), (1, 0)):
        lab.receive_on(queue)
        before = lab.counter(f"rx_queue_{queue}_packets")
        lab.wire.send(lab.wire_end, arriving())
        assert sorted(take(found[queue], COUNT)) == sorted(arriving())
        assert silent(found[other])
        assert lab.counter(f"rx_queue_{queue}_packets") - before == COUNT


def test_frames_without_a_socket_go_on_to_the_stack(lab: Cards) -> None:
    with program(lab), lab.host.capture(lab.nic) as seen:
        for queue in QUEUES:
            lab.receive_on(queue)
            lab.wire.send(lab.wire_end, arriving())
            assert sorted(seen.wait_for(COUNT)) == sorted(arriving())
            seen.forget()


@pytest.mark.parametrize("copy", ["copy", pytest.param("zero-copy", marks=needs_zero_copy)])
def test_both_queues_have_a_socket(lab: Cards, copy: xsk.Copy) -> None:
    with sockets(lab, copy) as found:
        assert [socket.zero_copy for socket in found] == [copy == "zero-copy"] * 2
        check_receiving(lab, found)
        with lab.wire.capture(lab.wire_end) as seen:
            for queue, socket in enumerate(found):
                socket.send([test_frame(WIRE_MAC, NIC_MAC, COUNT * queue + seq) for seq in range(COUNT)])
                assert socket.drain(timeout=5)
            assert {seq_of(frame) for frame in seen.wait_for(2 * COUNT)} == set(range(2 * COUNT))


@pytest.mark.skipif(VERSION >= ZERO_COPY_SINCE, reason="igb has zero copy since Linux 6.14")
def test_zero_copy_is_refused(lab: Cards) -> None:
    with pytest.raises(xsk.UnsupportedError) as refusal, sockets(lab, "zero-copy"):
        pass
    assert refusal.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("copy", ["copy", pytest.param("zero-copy", marks=needs_zero_copy)])
def test_a_queue_that_the_card_does_not_have(lab: Cards, copy: xsk.Copy) -> None:
    with xsk.Umem() as umem, pytest.raises(xsk.XskError) as refusal:
        lab.host.call(lambda: xsk.BoundSocket.bind(umem, lab.nic, 2, copy=copy))
    assert refusal.value.errno == errno.EINVAL


def test_tags_reach_xdp_when_the_card_does_not_strip_them(lab: Cards) -> None:
    """And foreign MACs when it is promiscuous, which also lets every VLAN in."""
    stranger = "02:15:5d:00:00:99"
    tagged = [test_frame(stranger, WIRE_MAC, seq, tags=tag(10)) for seq in range(COUNT)]
    lab.host.ip(f"link set {lab.nic} promisc on")
    try:
        with sockets(lab, "auto") as found:
            assert found[0].zero_copy == (VERSION >= ZERO_COPY_SINCE)
            for stripping, expected in (
                ("on", [frame[:12] + frame[16:] for frame in tagged]),
                ("off", tagged),
            ):
                lab.host.run("ethtool", "-K", lab.nic, "rxvlan", stripping)
                lab.wait_link()
                lab.wire.send(lab.wire_end, tagged)
                assert sorted(take(found[0], COUNT)) == sorted(expected)
    finally:
        lab.host.run("ethtool", "-K", lab.nic, "rxvlan", "on")
        lab.host.ip(f"link set {lab.nic} promisc off")
