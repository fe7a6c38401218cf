"""Netlink's framing, against a kernel whose answers were written beforehand. Needs no privilege."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from pyroute2.netlink import NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_NEWLINK, RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from offload.kernel.rtnl import RouteSocket, apart, attributes

ACK_TLVS = 0x200
CAPPED = 0x100


class Kernel:
    """The far end of a RouteSocket: ``say`` queues one datagram."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def say(self, *parts: bytes) -> None:
        self._end.send(b"".join(parts))

    def requests(self) -> int:
        """How many requests have come."""
        self._end.setblocking(False)
        count = 0
        while True:
            try:
                self._end.recv(4096)
            except BlockingIOError:
                return count
            count += 1


@pytest.fixture
def pair() -> Iterator[tuple[RouteSocket, Kernel]]:
    ours, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with RouteSocket(ours) as route, far:
        yield route, Kernel(far)


def message(kind: int, sequence: int, body: bytes, flags: int = 0) -> bytes:
    padding = bytes(-len(body) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body + padding


def error(sequence: int, code: int, flags: int = 0, rest: bytes = b"") -> bytes:
    return message(NLMSG_ERROR, sequence, struct.pack("=i", -code) + rest, flags)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def done(sequence: int, code: int = 0, flags: int = 0) -> bytes:
    return message(NLMSG_DONE, sequence, struct.pack("=i", -code), flags)


@pytest.mark.parametrize("where", ["message", "end"])
def test_an_interrupted_dump_is_repeated(pair: tuple[RouteSocket, Kernel], where: str) -> None:
    route, kernel = pair
    kernel.say(message(RTM_NEWLINK, 1, b"half", NLM_F_DUMP_INTR if where == "message" else 0))
    kernel.say(done(1, flags=NLM_F_DUMP_INTR if where == "end" else 0))
    kernel.say(message(RTM_NEWLINK, 2, b"all1"), message(RTM_NEWLINK, 2, b"all2"))
    kernel.say(done(2))
    assert route.dump(RTM_GETLINK, ifinfmsg()) == [b"all1", b"all2"]
    assert kernel.requests() == 2


def test_a_dump_that_is_always_interrupted_fails(
    pair: tuple[RouteSocket, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    route, kernel = pair
    monkeypatch.setattr("offload.kernel.rtnl._DUMP_ATTEMPTS", 3)
    for sequence in (1, 2, 3):
        kernel.say(done(sequence, flags=NLM_F_DUMP_INTR))
    with pytest.raises(OSError, match="kept changing"):
        route.dump(RTM_GETLINK, ifinfmsg())


def test_an_error_at_the_end_of_a_dump_is_raised(pair: tuple[RouteSocket, Kernel]) -> None:
    route, kernel = pair
    kernel.say(message(RTM_NEWLINK, 1, b"some"), done(1, errno.EMSGSIZE))
    with pytest.raises(OSError, match="Message too long"):
        route.dump(RTM_GETLINK, ifinfmsg())


def test_what_answers_an_older_request_is_skipped(pair: tuple[RouteSocket, Kernel]) -> None:
    route, kernel = pair
    kernel.say(error(99, errno.EBUSY))
    kernel.say(error(1, 0))
    route.change(RTM_SETLINK, 0, ifinfmsg())


@pytest.mark.parametrize(
    ("flags", "echo"),
    [
        pytest.param(ACK_TLVS, struct.pack("=IHHII", 21, RTM_SETLINK, 0, 1, 0) + b"12345\0\0\0", id="whole"),
        pytest.param(ACK_TLVS | CAPPED, struct.pack("=IHHII", 21, RTM_SETLINK, 0, 1, 0), id="capped"),
    ],
)
def test_the_kernel_s_own_words_are_in_the_error(
    pair: tuple[RouteSocket, Kernel], flags: int, echo: bytes
) -> None:
    route, kernel = pair
    kernel.say(error(1, errno.EBUSY, flags, echo + attribute(1, b"already taken\0")))
    with pytest.raises(OSError, match="already taken") as raised:
        route.change(RTM_SETLINK, 0, ifinfmsg())
    assert raised.value.errno == errno.EBUSY


def test_attributes_are_walked_with_their_padding() -> None:
    data = attribute(3, b"eth1\0") + attribute(0x8000 | 18, b"nested!") + attribute(4, b"")
    assert attributes(b"skip" + data, 4) == {3: b"eth1\0", 18: b"nested!", 4: b""}


def test_an_attribute_without_length_is_refused() -> None:
    with pytest.raises(OSError, match="attribute 7 of 0 bytes"):
        attributes(struct.pack("=HH", 0, 7))


def test_some_attributes_are_taken_apart() -> None:
    head, kept = b"head", attribute(3, b"eth1\0") + attribute(9, b"12345678")
    data = (
        head
        + attribute(3, b"eth1\0")
        + attribute(7, bytes(5))
        + attribute(9, b"12345678")
        + attribute(23, b"ab")
    )
    assert apart(data, (7, 23), len(head)) == (head + kept, {7: bytes(5), 23: b"ab"})
    assert apart(head + kept, (7, 23), len(head)) == (head + kept, {})
