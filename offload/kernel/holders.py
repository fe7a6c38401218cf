"""Who holds the sockets that were handed over, and how full their rings are.

The kernel tells nobody how full the rings of an AF_XDP socket are; they are memory of its holder. While that
process lives, its descriptor is borrowed for a moment (pidfd_getfd(2)), the rings are looked at, and it is
let go at once: a socket that is held here any longer would outlive its holder.
"""

from __future__ import annotations

import ctypes as ct
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paths import Paths
from ..xsk.abi import XDP_RING_NEED_WAKEUP
from ..xsk.bound import BoundSocket, Particulars
from ..xsk.errors import XskError
from ..xsk.umem import Umem

_PIDFD_GETFD = 438  # the same on all machines (include/uapi/asm-generic/unistd.h)

_libc = ct.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Levels:
    """A socket as it is now: entries in each ring, whether the kernel waits to be woken, and what it lost.

    ``filled`` has ``fill``, ``completion``, and those of ``rx`` and ``tx`` that the socket has.
    ``wants_waking`` is by ring, ``fill`` and ``tx``. ``lost`` is by ring as in ``AfXdpChannel``.
    """

    zero_copy: bool
    filled: Mapping[str, int]
    wants_waking: Mapping[str, bool]
    lost: Mapping[str, int]


class Holders:
    """The processes that sockets of AF_XDP ports were handed to; kept in a file for the next daemon."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def note(
        self, port: str, device: str, queue: int, pid: int, inode: int, particulars: Mapping[str, Any]
    ) -> None:
        """The process ``pid`` has the socket ``inode`` from now on."""
        known = self._read(port)
        known[f"{device}/{queue}"] = {"pid": pid, "inode": inode, "particulars": dict(particulars)}
        file = self._file(port)
        draft = file.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(known))
        draft.replace(file)

    def levels(self, port: str, device: str, queue: int) -> Levels | None:
        """What its holder's socket is like now; ``None`` when nobody has one that was handed over."""
        held = self._read(port).get(f"{device}/{queue}")
        if held is None:
            return None
        particulars = Particulars.of(held["particulars"])
        # It may have ended; and some kernels map no rings of a socket that is bound.
        with suppress(OSError, XskError), Umem(particulars.umem) as stand_in:
            descriptor = _borrowed(held["pid"], held["inode"])
            if descriptor is not None:
                # Only the rings are looked at: the memory of the frames is its holder's alone.
                with BoundSocket.adopt(descriptor, stand_in, particulars) as socket:
                    return _levels(socket)
        return None

    def forget(self, port: str) -> None:
        self._file(port).unlink(missing_ok=True)

    def _file(self, port: str) -> Path:
        return self._paths.hand_over(port).with_suffix(".json")

    def _read(self, port: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._file(port).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found


def _borrowed(pid: int, inode: int) -> int | None:
    """A descriptor of the process's socket ``inode``, ``None`` when it has none."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(entry) == f"socket:[{inode}]":
                return _get(pid, int(entry.name), inode)
    return None


def _get(pid: int, number: int, inode: int) -> int | None:
    pidfd = os.pidfd_open(pid)
    try:
        found = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
        if found < 0:
            code = ct.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(pidfd)
    if os.fstat(found).st_ino == inode:
        return int(found)
    os.close(found)  # the number is another file's meanwhile
    return None


def _levels(socket: BoundSocket) -> Levels:
    rings = {"rx": socket.rx, "fill": socket.fill, "tx": socket.tx, "completion": socket.completion}
    lost = socket.statistics()
    return Levels(
        zero_copy=socket.zero_copy,
        filled={name: ring.filled for name, ring in rings.items() if ring},
        wants_waking={
            name: bool(ring.flags.value & XDP_RING_NEED_WAKEUP)
            for name, ring in (("fill", socket.fill), ("tx", socket.tx))
            if ring
        },
        lost={"rx": lost.rx_ring_full, "fill": lost.rx_dropped},
    )
