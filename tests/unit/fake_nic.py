"""A NIC with steering rules that is none, for ``Ethtool`` and for the ethtool program."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.kernel.ethtool import Ethtool

NAME = "fake0"
LCNT, RULE, LALL, DEL, INS = range(0x2E, 0x33)
SPECIAL = 0x80000000

# struct ethtool_rxnfc in a 64-bit process. The ethtool program, which is built with the kernel's header,
# is the judge of these.
SIZE = 192
DATA, SPEC, LOCATION, NUMBER, LOCATIONS = 8, 16, 176, 184, 188
SPEC_END = 184

_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")


class FakeNic(Ethtool):
    """Keeps rules as they are given, without a look at what they say.

    ``special``: it finds locations by itself, the highest first. ``refuse`` gives an errno, or 0, for each
    rule to be kept; ``distort`` may change it. ``feature`` is whether ntuple is on, and whether that is
    fixed. ``asked`` are all requests so far.
    """

    def __init__(self, size: int = 8, special: bool = False) -> None:
        self.size = size
        self.special = special
        self.feature = (True, False)
        self.refuse: Callable[[bytes], int] = lambda rule: 0
        self.distort: Callable[[bytes], bytes] = lambda rule: rule
        self.kept: dict[int, bytes] = {}
        self.asked: list[bytes] = []

    def close(self) -> None:
        """There is no socket."""

    def features(self, ifname: str) -> dict[str, tuple[bool, bool]]:
        return {"rx-ntuple-filter": self.feature}

    def run(self, ifname: str, command: bytes) -> bytes:
        assert ifname == NAME
        assert len(command) >= SIZE, "the kernel reads and writes as much"
        self.asked.append(command)
        reply = bytearray(command)
        (number,) = _U32.unpack_from(command)
        (location,) = _U32.unpack_from(command, LOCATION)
        if number in (RULE, DEL) and location not in self.kept:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        match number:
            case 0x2E:
                _U64.pack_into(reply, DATA, self.size | (SPECIAL if self.special else 0))
                _U32.pack_into(reply, NUMBER, len(self.kept))
            case 0x30:
                self._list(reply)
            case 0x2F:
                reply[SPEC:SPEC_END] = self.kept[location]
            case 0x31:
                del self.kept[location]
            case 0x32:
                self._keep(location, reply)
            case _:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return bytes(reply)

    def _list(self, reply: bytearray) -> None:
        (room,) = _U32.unpack_from(reply, NUMBER)
        if room < len(self.kept):
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        _U64.pack_into(reply, DATA, self.size)
        _U32.pack_into(reply, NUMBER, len(self.kept))
        for at, location in enumerate(self.kept):
            _U32.pack_into(reply, LOCATIONS + 4 * at, location)

    def _keep(self, location: int, reply: bytearray) -> None:
        if self.special and location == 0xFFFFFFFF:
            free = [place for place in range(self.size) if place not in self.kept]
            location = free[-1] if free else self.size
        error = errno.ENOSPC if location >= self.size else self.refuse(bytes(reply[SPEC:SPEC_END]))
        if error:
            raise OSError(error, os.strerror(error))
        _U32.pack_into(reply, LOCATION, location)
        self.kept[location] = self.distort(bytes(reply[SPEC:SPEC_END]))


def build(directory: Path) -> Path:
    """Compile what lets the ethtool program talk to such a NIC."""
    library = directory / "fake_nic.so"
    source = Path(__file__).with_suffix(".c")
    options = ("-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *options, "-o", library, source], check=True)
    return library


@contextmanager
def program(nic: FakeNic, library: Path) -> Iterator[Callable[..., str]]:
    """Runs the ethtool program, for which ``nic`` is the device fake0; returns what it says."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = threading.Thread(target=_serve, args=(ours, nic))
    server.start()

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["ethtool", *arguments],
            env={
                "PATH": "/usr/sbin:/sbin:/usr/bin:/bin",
                "LD_PRELOAD": str(library),
                "FAKE_NIC": str(theirs.fileno()),
            },
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        yield run
    finally:
        theirs.close()
        server.join()
        ours.close()


def _serve(ours: socket.socket, nic: FakeNic) -> None:
    while command := ours.recv(65536):
        try:
            answer = struct.pack("=i", 0) + nic.run(NAME, command)
        except OSError as error:
            answer = struct.pack("=i", error.errno or errno.EIO)
        ours.send(answer)
