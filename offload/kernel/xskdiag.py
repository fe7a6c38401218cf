"""AF_XDP sockets as the kernel lists them: ``ss --xdp`` in Python.

Source: include/uapi/linux/xdp_diag.h and net/xdp/xsk_diag.c (CONFIG_XDP_SOCKETS_DIAG, in Debian's
kernels a module that is loaded when somebody asks).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass

from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR

from ..xsk.abi import AF_XDP
from .failures import explain
from .netns import OWN_NETNS, call_in
from .rtnl import attributes, messages, number

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_SHOW_INFO, _SHOW_UMEM, _SHOW_STATS = 1 << 0, 1 << 2, 1 << 4
_INFO, _UID, _UMEM, _STATS = 1, 2, 5, 9  # XDP_DIAG_…
_UMEM_ZEROCOPY = 1 << 0

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIII")  # struct xdp_diag_req
_MESSAGE = struct.calcsize("=BBHIII")  # struct xdp_diag_msg
_TWO = struct.Struct("=II")
_UMEM_FORM = struct.Struct("=QIIIIIIII")
_STATS_FORM = struct.Struct("=6Q")


@dataclass(frozen=True)
class Listed:
    """A bound socket: its device and queue, who made it, and the frames that the kernel lost on it.

    ``rx_full``: the RX ring had no room; ``no_chunk``: the fill ring had none, or none that is long enough.
    """

    ifindex: int
    queue: int
    uid: int
    zero_copy: bool
    rx_full: int
    no_chunk: int


def listed(netns: str = OWN_NETNS) -> list[Listed] | None:
    """Every bound AF_XDP socket of the namespace ``netns``; ``None`` on a kernel that lists none."""
    if netns == OWN_NETNS:
        return _listed()
    return call_in(netns, _listed)


def _listed() -> list[Listed] | None:
    show = _SHOW_INFO | _SHOW_UMEM | _SHOW_STATS
    request = _REQUEST.pack(AF_XDP, 0, 0, 0, show, 0, 0)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 0, 0)
    found: list[Listed] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.send(header + request)
        while True:
            for kind, _, _, body in messages(netlink.recv(1 << 16)):
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", body)
                    if code in (-errno.ENOENT, -errno.EOPNOTSUPP):
                        return None
                    raise explain(OSError(-code, os.strerror(-code)), "AF_XDP", "list its sockets")
                found += _read(body)


def _read(body: bytes) -> list[Listed]:
    values = attributes(body, _MESSAGE)
    if _INFO not in values or _UMEM not in values:
        return []  # it is not bound yet
    ifindex, queue = _TWO.unpack_from(values[_INFO])
    dropped, _, full, *_ = _STATS_FORM.unpack_from(values[_STATS])
    return [
        Listed(
            ifindex=ifindex,
            queue=queue,
            uid=number(values.get(_UID, b"")),
            zero_copy=bool(_UMEM_FORM.unpack_from(values[_UMEM])[7] & _UMEM_ZEROCOPY),
            rx_full=full,
            no_chunk=dropped,
        )
    ]
