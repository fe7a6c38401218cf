"""Route netlink: one request at a time over a plain socket.

Messages are pyroute2's; the socket is not. The sockets of pyroute2 0.9 run an asyncio loop of
their own inside each call, so they cannot be used in a thread that already runs one, and they
do not tell when a dump was interrupted. Dumps are handed out as bytes with ``attributes()`` to
walk them: decoding 1,000 links into pyroute2 messages takes 0.2 s, walking them 0.02 s.

Source: Documentation/userspace-api/netlink/intro.rst. Netlink is in host byte order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Collection, Iterator

from pyroute2.netlink import (
    NETLINK_EXT_ACK,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
    nlmsg,
)

from offload.closing import Closing
from offload.kernel.netns import call_in

Attributes = dict[int, bytes]

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_LENGTH = struct.Struct("=I")  # the header's first field
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ATTRIBUTE_TYPE = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_ERROR = struct.Struct("=i")
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_BUFFER = 1 << 18  # bytes; a dump comes in pieces of at most 32 KiB
_TIMEOUT = 10.0  # seconds; the kernel answers before send() returns
_DUMP_ATTEMPTS = 20


class RouteSocket(Closing):
    """Requests over a socket of ``open_socket()``, which it closes.

    Safe to share between threads. ``close()`` is idempotent; nothing outlives it. Every method
    raises ``OSError`` with the kernel's errno and, where the kernel gives one, its own words.
    """

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened
        self._socket.settimeout(_TIMEOUT)
        self._lock = threading.Lock()
        self._sequence = 0

    def change(self, kind: int, flags: int, message: nlmsg, more: bytes = b"") -> None:
        """Send ``message`` as an RTM_… of ``kind`` and wait until the kernel has done it.

        ``more`` are encoded attributes that pyroute2 cannot encode.
        """
        with self._lock:
            self._send(kind, flags | NLM_F_ACK, message, more)
            for _ in self._replies():
                pass

    def get(self, kind: int, message: nlmsg) -> bytes:
        """The one message that answers a request: family header and attributes."""
        with self._lock:
            self._send(kind, NLM_F_ACK, message)
            replies = [body for _, body in self._replies() if body]
        if len(replies) != 1:
            raise OSError(errno.EPROTO, f"{len(replies)} answers to one netlink request")
        return replies[0]

    def dump(self, kind: int, message: nlmsg) -> list[bytes]:
        """All messages of a dump that no change interrupted; it is repeated until there is one."""
        for _ in range(_DUMP_ATTEMPTS):
            with self._lock:
                self._send(kind, NLM_F_DUMP, message)
                replies = list(self._replies())
            if not any(flags & NLM_F_DUMP_INTR for flags, _ in replies):
                return [body for _, body in replies if body]
        raise OSError(errno.EAGAIN, f"the network kept changing during {_DUMP_ATTEMPTS} dumps")

    def _send(self, kind: int, flags: int, message: nlmsg, more: bytes = b"") -> None:
        self._sequence += 1
        message["header"]["type"] = kind
        message["header"]["flags"] = flags | NLM_F_REQUEST
        message["header"]["sequence_number"] = self._sequence
        message["header"]["pid"] = 0
        message.reset()
        message.encode()
        data = bytes(message.data) + more
        self._socket.send(_LENGTH.pack(len(data)) + data[_LENGTH.size :])

    def _replies(self) -> Iterator[tuple[int, bytes]]:
        """Header flags and body of each reply, the last one without a body."""
        while True:
            for kind, flags, sequence, body in messages(self._socket.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue  # left over from a request that timed out
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    _raise_error(flags, body, echoes_request=kind == NLMSG_ERROR)
                    yield flags, b""
                    return
                yield flags, body

    def close(self) -> None:
        self._socket.close()


def open_socket(netns: str | None = None, groups: int = 0) -> socket.socket:
    """A bound route netlink socket in the current namespace or in the one behind ``netns``.

    ``groups`` is a mask of multicast groups to hear.
    """

    def body() -> socket.socket:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            opened.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            opened.bind((0, groups))
        except BaseException:
            opened.close()
            raise
        return opened

    return body() if netns is None else call_in(netns, body)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split what one receive gave into (type, flags, sequence, body)."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += _aligned(length)


def attributes(data: bytes, offset: int = 0) -> Attributes:
    """The attributes from ``offset`` on, by type. Of a type that repeats the last one is kept."""
    found: Attributes = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            raise OSError(errno.EPROTO, f"netlink attribute {kind} of {length} bytes")
        found[kind & _ATTRIBUTE_TYPE] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)
    return found


def apart(data: bytes, kinds: Collection[int], offset: int = 0) -> tuple[bytes, Attributes]:
    """``data`` without its attributes of these types, each there once at most, and these attributes."""
    found: Attributes = {}
    while len(found) < len(kinds) and offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if kind in kinds:
            found[kind] = data[offset + _ATTRIBUTE.size : offset + length]
            data = data[:offset] + data[offset + _aligned(length) :]
        else:
            offset += _aligned(max(length, _ATTRIBUTE.size))
    return data, found


def text(value: bytes) -> str:
    """A NUL-terminated string attribute."""
    return value.rstrip(b"\0").decode(errors="replace")


def number(value: bytes) -> int:
    """An unsigned integer attribute of whatever size the kernel sent."""
    return int.from_bytes(value, sys.byteorder)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _raise_error(flags: int, body: bytes, echoes_request: bool) -> None:
    """Raise what an NLMSG_ERROR or NLMSG_DONE carries; zero is success."""
    (negative,) = _ERROR.unpack_from(body)
    if negative == 0:
        return
    words = os.strerror(-negative)
    if flags & _NLM_F_ACK_TLVS:
        echoed = 0
        if echoes_request:  # whole, or its header alone when capped
            length, *_ = _HEADER.unpack_from(body, _ERROR.size)
            echoed = _HEADER.size if flags & _NLM_F_CAPPED else _aligned(length)
        said = attributes(body, _ERROR.size + echoed).get(_NLMSGERR_ATTR_MSG)
        words = f"{words}: {text(said)}" if said else words
    raise OSError(-negative, words)
