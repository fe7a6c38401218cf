"""Writing pcapng, the capture format of Wireshark, as far as a switch needs it.

The format is that of draft-ietf-opsawg-pcapng: blocks of a type, a length, a body padded to four bytes, and
the length again, in this machine's byte order. Time is in nanoseconds since 1970.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Literal

_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_ORDER_MAGIC = 0x1A2B3C4D
_UNKNOWN_LENGTH = -1
_ETHERNET = 1  # LINKTYPE_ETHERNET
_NO_LIMIT = 0
_USER_APPLICATION, _NAME, _RESOLUTION, _FLAGS = 4, 2, 9, 2  # codes of options, each within its kind of block
_NANOSECONDS = 9  # powers of ten
_DIRECTIONS = {"in": struct.pack("=I", 1), "out": struct.pack("=I", 2)}  # bits 0 and 1 of epb_flags

SECTION_MAGIC = struct.pack("=I", _SECTION)
"""How every pcapng file begins, in either byte order."""


def section(application: str) -> bytes:
    """The block that a file begins with. More may follow: interfaces are then numbered from 0 again."""
    body = struct.pack("=IHHq", _ORDER_MAGIC, 1, 0, _UNKNOWN_LENGTH)
    return _block(_SECTION, body, [(_USER_APPLICATION, application.encode())])


def interface(name: str) -> bytes:
    """The block of an interface; its number is that of such blocks before it in the section."""
    body = struct.pack("=HHI", _ETHERNET, 0, _NO_LIMIT)
    return _block(_INTERFACE, body, [(_NAME, name.encode()), (_RESOLUTION, bytes([_NANOSECONDS]))])


def packet(number: int, time_ns: int, data: bytes | memoryview, direction: Literal["in", "out"]) -> bytes:
    """The block of a frame. ``in`` came in at the interface with this number, ``out`` left there."""
    length = len(data)
    head = struct.pack("=IIIII", number, time_ns >> 32, time_ns & 0xFFFFFFFF, length, length)
    return _block(_PACKET, b"".join((head, data, bytes(-length % 4))), [(_FLAGS, _DIRECTIONS[direction])])


def _block(kind: int, body: bytes, options: Iterable[tuple[int, bytes]]) -> bytes:
    parts = [body]
    for code, value in options:
        parts += [struct.pack("=HH", code, len(value)), value, bytes(-len(value) % 4)]
    parts.append(bytes(4))  # opt_endofopt
    length = 12 + sum(map(len, parts))
    return b"".join((struct.pack("=II", kind, length), *parts, struct.pack("=I", length)))
