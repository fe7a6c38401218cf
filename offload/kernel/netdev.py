"""What a driver can do with XDP, and what serves its queues: the kernel's ``netdev`` netlink family.

Source: Documentation/netlink/specs/netdev.yaml. The family came with Linux 6.3, queues and NAPI
instances with 6.8. Generic netlink is in include/uapi/linux/genetlink.h; numbers are in host byte order.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag

from pyroute2.netlink import (
    CTRL_CMD_GETFAMILY,
    GENL_ID_CTRL,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)

from offload.errors import UnsupportedError
from offload.kernel.failures import explain
from offload.kernel.rtnl import Attributes, attributes, messages, number

_NETLINK_GENERIC = 16
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2
_NETDEV_CMD_DEV_GET = 1
_NETDEV_A_DEV_IFINDEX = 1
_NETDEV_A_DEV_XDP_FEATURES = 3
_NETDEV_CMD_QUEUE_GET = 10
_NETDEV_A_QUEUE_ID, _NETDEV_A_QUEUE_IFINDEX, _NETDEV_A_QUEUE_TYPE, _NETDEV_A_QUEUE_NAPI_ID = range(1, 5)
_NETDEV_QUEUE_TYPE_RX = 0
_NETDEV_CMD_NAPI_GET = 11
_NETDEV_A_NAPI_IFINDEX, _NETDEV_A_NAPI_ID, _NETDEV_A_NAPI_IRQ, _NETDEV_A_NAPI_PID = range(1, 5)
_NETDEV_A_NAPI_DEFER_HARD_IRQS = 5
_NETDEV_A_NAPI_GRO_FLUSH_TIMEOUT = 6
_NETDEV_A_NAPI_IRQ_SUSPEND_TIMEOUT = 7
_NETDEV_A_NAPI_THREADED = 8

_HEADER = struct.Struct("=IHHIIBBH")  # struct nlmsghdr, then struct genlmsghdr
_GENL_HEADER = 4  # bytes of struct genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # length, type


class XdpFeatures(IntFlag):
    """Values of ``enum netdev_xdp_act``. No bits: the driver has no native XDP."""

    BASIC = 1
    REDIRECT = 2
    NDO_XMIT = 4
    XSK_ZEROCOPY = 8
    HW_OFFLOAD = 16
    RX_SG = 32
    NDO_XMIT_SG = 64


@dataclass(frozen=True)
class Napi:
    """A NAPI instance, which takes frames out of queues. ``None``: none, or the kernel does not tell.

    ``irq`` is the interrupt that wakes it. ``pid`` is of its kernel thread, which Linux before 6.17 keeps
    when it is not ``threaded`` any more. ``defer_hard_irqs`` is how often it polls in vain before interrupts
    are let through again. The timeouts are in nanoseconds: for that polling, and for interrupts being kept
    off while a process polls.
    """

    id: int
    irq: int | None
    pid: int | None
    threaded: bool | None
    defer_hard_irqs: int | None
    gro_flush_timeout: int | None
    irq_suspend_timeout: int | None


def rx_queue_napis(device: str, ifindex: int) -> dict[int, int | None]:
    """The id of the NAPI instance of each RX queue, ``None`` where the driver does not tell.

    Nothing while the device is down. Raises UnsupportedError on a kernel that cannot say, KernelError
    when the device is gone.
    """
    found = _dump(device, ifindex, _NETDEV_CMD_QUEUE_GET, _NETDEV_A_QUEUE_IFINDEX)
    return {
        number(queue[_NETDEV_A_QUEUE_ID]): _optional(queue, _NETDEV_A_QUEUE_NAPI_ID)
        for queue in found
        if number(queue[_NETDEV_A_QUEUE_TYPE]) == _NETDEV_QUEUE_TYPE_RX
    }


def napis(device: str, ifindex: int) -> dict[int, Napi]:
    """The NAPI instances of a device by id, while it is up. Raises as ``rx_queue_napis``."""
    found = _dump(device, ifindex, _NETDEV_CMD_NAPI_GET, _NETDEV_A_NAPI_IFINDEX)
    return {napi.id: napi for napi in map(_napi, found)}


def _napi(found: Attributes) -> Napi:
    threaded = _optional(found, _NETDEV_A_NAPI_THREADED)
    return Napi(
        id=number(found[_NETDEV_A_NAPI_ID]),
        irq=_optional(found, _NETDEV_A_NAPI_IRQ),
        pid=_optional(found, _NETDEV_A_NAPI_PID),
        threaded=None if threaded is None else bool(threaded),
        defer_hard_irqs=_optional(found, _NETDEV_A_NAPI_DEFER_HARD_IRQS),
        gro_flush_timeout=_optional(found, _NETDEV_A_NAPI_GRO_FLUSH_TIMEOUT),
        irq_suspend_timeout=_optional(found, _NETDEV_A_NAPI_IRQ_SUSPEND_TIMEOUT),
    )


def _optional(found: Attributes, attribute: int) -> int | None:
    return number(found[attribute]) if attribute in found else None


def xdp_features(device: str, ifindex: int) -> XdpFeatures:
    """Return the XDP features of a device. Some drivers change them while they run: veth does.

    Raises UnsupportedError on a kernel that cannot say, KernelError when the device is gone.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as netlink:
        kind = _family()
        if kind is None:
            raise UnsupportedError("this kernel does not tell what drivers can do with XDP")
        try:
            wanted = struct.pack("=I", ifindex)
            found = _ask(netlink, kind, _NETDEV_CMD_DEV_GET, _NETDEV_A_DEV_IFINDEX, wanted)
        except OSError as error:
            raise explain(error, device, "ask for its XDP features") from error
    return XdpFeatures(number(found[_NETDEV_A_DEV_XDP_FEATURES]))


def redirects_frags() -> bool:
    """Whether XDP can redirect a frame of several buffers to a device: from Linux 6.3 on.

    Before, xdp_do_redirect() in net/core/filter.c drops it, after the program has decided. That was
    lifted ("bpf: devmap: check XDP features in __xdp_enqueue routine") together with the netlink family.
    """
    return _family() is not None


@functools.cache
def _family() -> int | None:
    """The number of the family ``netdev``, or ``None`` on a kernel without it. It does not come or go."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as netlink:
            found = _ask(netlink, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_NAME, b"netdev\0")
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise explain(error, "netlink", "look up the family netdev") from error
    return number(found[_CTRL_ATTR_FAMILY_ID])


def _dump(device: str, ifindex: int, command: int, attribute: int) -> list[Attributes]:
    """All answers about a device; ``attribute`` is what names it in the request."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as netlink:
        kind = _family()
        if kind is None:
            raise UnsupportedError(f"{device}: this kernel does not tell what serves its queues")
        try:
            _send(netlink, kind, NLM_F_DUMP, command, attribute, struct.pack("=I", ifindex))
            return list(_answers(netlink))
        except OSError as error:
            raise explain(error, device, "ask what serves its queues") from error


def _ask(netlink: socket.socket, kind: int, command: int, attribute: int, value: bytes) -> Attributes:
    """Send a request with one attribute; return the attributes of the answer or raise OSError."""
    _send(netlink, kind, 0, command, attribute, value)
    return next(_answers(netlink))


def _send(netlink: socket.socket, kind: int, flags: int, command: int, attribute: int, value: bytes) -> None:
    length = _ATTRIBUTE.size + len(value)
    payload = _ATTRIBUTE.pack(length, attribute) + value + bytes(-length % 4)
    header = _HEADER.pack(_HEADER.size + len(payload), kind, flags | NLM_F_REQUEST, 0, 0, command, 1, 0)
    netlink.send(header + payload)


def _answers(netlink: socket.socket) -> Iterator[Attributes]:
    """The attributes of each message up to the end of a dump. Raises OSError."""
    while True:
        for kind, _, _, body in messages(netlink.recv(65536)):
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                (code,) = struct.unpack_from("=i", body)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return
            yield attributes(body, _GENL_HEADER)
