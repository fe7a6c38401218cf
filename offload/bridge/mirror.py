"""The extension ``mirror``: copies frames to a file that Wireshark reads, or out of an interface.

::

    extensions:
      - name: mirror
        file: /var/log/offload/web1.pcapng    # or interface: mon0
        members: [web1]                       # default: all
        vids: [0, 10]                         # default: all; 0 is untagged
        directions: [from, to]                # what the members send, what is for them; default: both
        max_megabytes: 100                    # then web1.pcapng becomes web1.pcapng.1, and so on
        files: 10                             # how many there are at most

In a file each member is an interface of its own: a frame from web1 to db1 is there twice, in at web1 and
out at db1, if both are mirrored. Out of an interface it is sent once. Files are written once a second. An
existing capture is added to; anything else is left alone, and the mirror off.

It sees what comes to the bridge, before any guard at the receiver. Frames that the fast path carries do
not come here: ``queue: off`` on a port brings them. A GSO frame is there in one piece of up to 64 KiB, and a
checksum that is still to be completed is there as it is.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from offload import __version__
from offload.bridge import pcapng
from offload.bridge.extension import Extension, Frame
from offload.errors import KernelError
from offload.kernel.packet import Sender

_OPTIONS = ("file", "interface", "members", "vids", "directions", "max_megabytes", "files")
_DIRECTIONS = ("from", "to")
_BUFFER = 1 << 18
"""Bytes that are written to the file before their second is over."""


log = logging.getLogger(__name__)


class _Out(Protocol):
    """Where copies go."""

    def copy(self, frame: Frame, came: bool, left: Sequence[str]) -> int:
        """Take a frame that is mirrored as one that ``came`` in, and as one that ``left`` for some.

        Returns how many copies were made.
        """

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Mirror(Extension):
    """See the module."""

    def __init__(self, options: Mapping[str, Any], switch: str) -> None:
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown option; there is: {', '.join(_OPTIONS)}")
        if ("file" in options) == ("interface" in options):
            raise ValueError("give either `file` or `interface`")
        self._members = _several(options, "members", str)
        self._vids = _several(options, "vids", int)
        directions = _several(options, "directions", str) or _DIRECTIONS
        if not set(directions) <= set(_DIRECTIONS):
            raise ValueError(f"directions: must be of {', '.join(_DIRECTIONS)}")
        self._from, self._to = (name in directions for name in _DIRECTIONS)
        megabytes, files = (
            _positive(options, key, value) for key, value in (("max_megabytes", 100), ("files", 10))
        )
        self._copies = self._lost = 0
        self._trouble = self._told = ""
        self._out: _Out = (
            Capture(Path(str(options["file"])), megabytes * 1_000_000, files, f"{switch}, mirrored")
            if "file" in options
            else _Interface(str(options["interface"]))
        )

    def watch(self, frame: Frame, to: Sequence[str]) -> None:
        if self._vids is not None and frame.vid not in self._vids:
            return
        members = self._members
        came = self._from and (members is None or frame.ingress in members)
        left = [name for name in to if members is None or name in members] if self._to else []
        if not came and not left:
            return
        try:
            self._copies += self._out.copy(frame, came, left)
        except KernelError as error:  # the interface is down, or full: it may get better
            self._lost += 1
            self._trouble = str(error)

    def second(self) -> None:
        self._out.flush()
        if self._trouble != self._told:
            log.warning("mirror: %s", self._trouble or "frames go out again")
        self._told, self._trouble = self._trouble, ""

    def counters(self) -> Mapping[str, int]:
        return {"copies": self._copies, "lost": self._lost}

    def close(self) -> None:
        self._out.close()


class _Interface:
    """Frames as they came, out of a device of the host."""

    def __init__(self, device: str) -> None:
        self._sender = Sender(device)

    def copy(self, frame: Frame, came: bool, left: Sequence[str]) -> int:
        self._sender.send([frame.offload, frame.data])
        return 1

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        self._sender.close()


class Capture:
    """A pcapng file of at most ``limit`` bytes and a frame.

    Older ones are kept as ``.1`` and so on, ``files`` in all. ``note`` is who wrote it.
    Raises OSError when it cannot be written, ValueError when it is something else.
    """

    def __init__(self, file: Path, limit: int, files: int, note: str) -> None:
        if not file.is_absolute():
            raise ValueError(f"file: {file}: must be an absolute path")
        self._file = file
        self._limit = limit
        self._files = files
        self._note = f"offload {__version__}: {note}"
        self._open()

    def _open(self) -> None:
        self._fd = os.open(
            self._file,
            os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
            0o640,
        )
        found = os.fstat(self._fd)
        start = os.pread(self._fd, 4, 0) if stat.S_ISREG(found.st_mode) else b"?"
        if start not in (b"", pcapng.SECTION_MAGIC):
            os.close(self._fd)
            raise ValueError(f"{self._file}: is no capture; move it away, or name another file")
        self._size = found.st_size
        self._numbers: dict[str, int] = {}
        self._buffer = bytearray(pcapng.section(self._note))

    def copy(self, frame: Frame, came: bool, left: Sequence[str]) -> int:
        if self._size + len(self._buffer) > self._limit:
            self._rotate()
        if came:
            self._add(frame, frame.ingress, "in")
        for name in left:
            self._add(frame, name, "out")
        if len(self._buffer) > _BUFFER:
            self.flush()
        return came + len(left)

    def _add(self, frame: Frame, name: str, direction: Literal["in", "out"]) -> None:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._numbers)
            self._buffer += pcapng.interface(name)
        self._buffer += pcapng.packet(number, frame.time_ns, frame.data, direction)

    def flush(self) -> None:
        """Write what is kept back, in whole blocks, so that the file can be read at any time."""
        while self._buffer:
            written = os.write(self._fd, self._buffer)
            self._size += written
            del self._buffer[:written]

    def _rotate(self) -> None:
        self.flush()
        os.close(self._fd)
        for number in range(self._files - 1, 0, -1):
            older = self._file if number == 1 else self._numbered(number - 1)
            with suppress(FileNotFoundError):
                os.replace(older, self._numbered(number))
        if self._files == 1:
            self._file.unlink()
        self._open()

    def _numbered(self, number: int) -> Path:
        return self._file.with_name(f"{self._file.name}.{number}")

    def close(self) -> None:
        self.flush()
        os.close(self._fd)


def _several(options: Mapping[str, Any], key: str, kind: type) -> Collection[Any] | None:
    """A list of the options as a set, ``None`` when it is not there."""
    values = options.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise ValueError(f"{key}: must be a list of {'names' if kind is str else 'numbers'}")
    return frozenset(values)


def _positive(options: Mapping[str, Any], key: str, default: int) -> int:
    value = options.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}: must be a number, 1 or more")
    return value
