"""Capture files that tcpdump and Wireshark read: pcap with nanoseconds, in this machine's byte order.

The format is that of draft-ietf-opsawg-pcap.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_MAGIC = 0xA1B23C4D  # nanoseconds
_ETHERNET = 1  # LINKTYPE_ETHERNET
_LONGEST = 262144


class Writer:
    """Writes a capture to an open file, which the caller closes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.write(struct.pack("=IHHiIII", _MAGIC, 2, 4, 0, 0, _LONGEST, _ETHERNET))

    def write(self, time_ns: int, frame: memoryview) -> None:
        """Add an Ethernet frame; ``time_ns`` is in nanoseconds since 1970."""
        seconds, nanoseconds = divmod(time_ns, 10**9)
        self._file.write(struct.pack("=IIII", seconds, nanoseconds, len(frame), len(frame)))
        self._file.write(frame)
