"""XSKMAPs, and a program that redirects to one, through the bpf(2) system call alone.

A queue's frames reach a socket only when the device's XDP program redirects them to an XSKMAP's
entry that holds the socket. ``XskMap.pinned`` opens the map of somebody else's program;
``Redirect`` is a minimal program for a device that has none. This module does without NumPy.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, Self

from . import libc
from .closing import Closing
from .errors import explain

Mode = Literal["native", "generic"]
"""Where XDP runs: in the driver, or, slower and on any device, after the kernel made an skb."""

# include/uapi/linux/bpf.h and if_link.h
_MAP_CREATE, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _OBJ_PIN, _OBJ_GET = 0, 2, 3, 5, 6, 7
_LINK_CREATE = 28
_XSKMAP = 17
_PROG_TYPE_XDP, _ATTACH_XDP = 6, 37
_XDP_HAS_FRAGS = 1 << 5
_MODE_FLAGS = {"generic": 1 << 1, "native": 1 << 2}

_DENIED = "CAP_BPF and CAP_NET_ADMIN are needed"
_PRIVILEGE = {errno.EPERM: _DENIED, errno.EACCES: _DENIED}
_OPEN = {
    errno.ENOENT: "Nothing is pinned there; note that `ip netns exec` hides pins behind a /sys of its own",
    errno.EPERM: "CAP_BPF is needed, and the right to open the file",
    errno.EACCES: "The file may not be opened by this user",
}
_ELEMENT = {
    errno.EPERM: "The map may not be changed by this process: CAP_BPF is needed on most hosts",
    errno.E2BIG: "The map has fewer entries",
    errno.EOPNOTSUPP: "The socket is not bound",
    errno.EBADF: "The socket is closed",
}
_ATTACH = {
    **_PRIVILEGE,
    errno.EBUSY: "It already has an XDP program, which is left alone: detach that one, or use its XSKMAP",
    errno.EEXIST: "It already has an XDP program, which is left alone: detach that one, or use its XSKMAP",
    errno.EOPNOTSUPP: "The driver has no native XDP: generic mode works on any device",
    errno.ENODEV: "There is no such device in this network namespace",
    errno.EINVAL: "The driver refuses it as the device is set: too large an MTU or too many queues",
}


class Bound(Protocol):
    """What can be put into an XSKMAP: anything with the descriptor of a bound AF_XDP socket."""

    def fileno(self) -> int: ...


class XskMap(Closing):
    """An XSKMAP: sockets by index, for a program to redirect to. What is in it cannot be read.

    A socket leaves the map when it is closed everywhere. ``close`` lets go of the map, which lives on
    with the programs that use it and with its pin.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, entries: int) -> Self:
        """A map of ``entries`` empty places. Raises PrivilegeError without CAP_BPF."""
        attributes = struct.pack("=IIIII8x16s", _XSKMAP, 4, 4, entries, 0, b"xsks")
        return cls(_bpf(_MAP_CREATE, attributes, "make an XSKMAP", _PRIVILEGE))

    @classmethod
    def pinned(cls, path: Path) -> Self:
        """The map pinned at ``path``. Raises PrivilegeError, or XskError when there is no XSKMAP."""
        doing = f"open the XSKMAP pinned at {path}"
        name = ct.create_string_buffer(os.fsencode(path))
        fd = _bpf(_OBJ_GET, struct.pack("=QII", ct.addressof(name), 0, 0), doing, _OPEN)
        found = cls(fd)
        if found._type() != _XSKMAP:
            found.close()
            raise explain(errno.EINVAL, doing, {errno.EINVAL: "What is pinned there is not an XSKMAP"})
        return found

    def _type(self) -> int:
        """The map's type, or -1 for what is no map."""
        with open(f"/proc/self/fdinfo/{self.fd}") as lines:
            types = [int(line.split()[1]) for line in lines if line.startswith("map_type:")]
        return types[0] if types else -1

    def insert(self, index: int, sock: Bound) -> None:
        """Put a bound socket at ``index``, in place of what was there.

        Raises XskError: EINVAL or E2BIG for an index that the map does not have, EOPNOTSUPP for a
        socket that is not bound or has no RX ring.
        """
        key, value = struct.pack("=I", index), struct.pack("=I", sock.fileno())
        _element(_MAP_UPDATE, self.fd, key, value, f"put a socket into entry {index} of the XSKMAP")

    def remove(self, index: int) -> None:
        """Empty the place ``index``; it may be empty already. Raises XskError, as ``insert`` does."""
        _element(_MAP_DELETE, self.fd, struct.pack("=I", index), b"", f"empty entry {index} of the XSKMAP")

    def pin(self, path: Path) -> None:
        """Keep the map under this name, which must be free and on a bpffs, until the file is removed."""
        name = ct.create_string_buffer(os.fsencode(path))
        attributes = struct.pack("=QII", ct.addressof(name), self.fd, 0)
        _bpf(_OBJ_PIN, attributes, f"pin the XSKMAP at {path}", _PRIVILEGE)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Redirect(Closing):
    """A program on a device: frames of queue N go to the socket at N of ``map``, if there is one.

    All other frames go on to the network stack. The program is held by a link, so it
    goes with ``close``, or with the process, and can be replaced by nobody else.
    """

    def __init__(self, device: str, mode: Mode, entries: int = 64) -> None:
        """Attach to ``device`` of the thread's network namespace; ``entries`` is more than its last queue.

        Raises BusyError when it has a program, UnsupportedError when the driver has no native XDP,
        DeviceError, PrivilegeError, or another XskError.
        """
        self._link = -1
        self.map = XskMap.create(entries)
        try:
            program = _load(self.map)
            try:
                self._link = _attach(program, device, mode)
            finally:
                os.close(program)
        except BaseException:
            self.map.close()
            raise

    def close(self) -> None:
        if self._link >= 0:
            os.close(self._link)
            self._link = -1
        self.map.close()


def _load(target: XskMap) -> int:
    code = b"".join(
        (
            _instruction(0x61, dst=2, src=1, offset=16),  # r2 = ctx->rx_queue_index
            _instruction(0x18, dst=1, src=1, value=target.fd),  # r1 = the map, in two slots
            _instruction(0),
            _instruction(0xB7, dst=3, value=2),  # r3 = XDP_PASS, where the map has nothing
            _instruction(0x85, value=51),  # r0 = bpf_redirect_map(r1, r2, r3)
            _instruction(0x95),  # return r0
        )
    )
    text, terms = ct.create_string_buffer(code, len(code)), ct.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16sIIIIQIIQI4x",
        *(_PROG_TYPE_XDP, len(code) // 8, ct.addressof(text), ct.addressof(terms)),
        *(0, 0, 0, 0),  # no log, any kernel version
        *(_XDP_HAS_FRAGS, b"to_xsk", 0, _ATTACH_XDP),
        *(0, 0, 0, 0, 0, 0, 0),  # no BTF
    )
    return _bpf(_PROG_LOAD, attributes, "load a program that redirects to the XSKMAP", _PRIVILEGE)


def _instruction(code: int, *, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """struct bpf_insn."""
    return struct.pack("=BBhi", code, src << 4 | dst, offset, value)


def _attach(program: int, device: str, mode: Mode) -> int:
    doing = f"attach an XDP program to {device} in {mode} mode"
    try:
        ifindex = socket.if_nametoindex(device)
    except OSError as error:  # which has no errno
        raise explain(errno.ENODEV, doing, _ATTACH, device) from error
    attributes = struct.pack("=IIII", program, ifindex, _ATTACH_XDP, _MODE_FLAGS[mode])
    return _bpf(_LINK_CREATE, attributes, doing, _ATTACH, device)


def _element(command: int, map_fd: int, key: bytes, value: bytes, doing: str) -> None:
    at_key, at_value = ct.create_string_buffer(key, len(key)), ct.create_string_buffer(value, 4)
    # To delete, the kernel wants no value at all.
    attributes = struct.pack(
        "=I4xQQQ", map_fd, ct.addressof(at_key), ct.addressof(at_value) if value else 0, 0
    )
    _bpf(command, attributes, doing, _ELEMENT)


def _bpf(
    command: int, attributes: bytes, doing: str, remedies: Mapping[int, str], device: str | None = None
) -> int:
    try:
        return libc.bpf(command, ct.create_string_buffer(attributes, len(attributes)))
    except OSError as error:
        raise explain(error.errno or 0, doing, remedies, device) from error
