"""What a driver says it can do with XDP: the kernel's ``netdev`` generic netlink family.

Source: Documentation/netlink/specs/netdev.yaml. The family came with Linux 6.3. Generic
netlink is in include/uapi/linux/genetlink.h; numbers are in host byte order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from enum import IntFlag

from pyroute2.netlink import CTRL_CMD_GETFAMILY, GENL_ID_CTRL, NLM_F_REQUEST, NLMSG_ERROR

from offload.errors import UnsupportedError
from offload.kernel.failures import explain
from offload.kernel.rtnl import Attributes, attributes, messages, number

_NETLINK_GENERIC = 16
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2
_NETDEV_CMD_DEV_GET = 1
_NETDEV_A_DEV_IFINDEX = 1
_NETDEV_A_DEV_XDP_FEATURES = 3

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


def xdp_features(device: str, ifindex: int) -> XdpFeatures:
    """Return the XDP features of a device. Some drivers change them while they run: veth does.

    Raises UnsupportedError on a kernel that cannot say, KernelError when the device is gone.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as netlink:
        kind = _family(netlink)
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
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as netlink:
        return _family(netlink) is not None


def _family(netlink: socket.socket) -> int | None:
    """The number of the family ``netdev``, or ``None`` on a kernel without it."""
    try:
        found = _ask(netlink, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_NAME, b"netdev\0")
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise explain(error, "netlink", "look up the family netdev") from error
    return number(found[_CTRL_ATTR_FAMILY_ID])


def _ask(netlink: socket.socket, kind: int, command: int, attribute: int, value: bytes) -> Attributes:
    """Send a request with one attribute; return the attributes of the answer or raise OSError."""
    length = _ATTRIBUTE.size + len(value)
    payload = _ATTRIBUTE.pack(length, attribute) + value + bytes(-length % 4)
    netlink.send(
        _HEADER.pack(_HEADER.size + len(payload), kind, NLM_F_REQUEST, 0, 0, command, 1, 0) + payload
    )
    ((answer, _, _, body),) = messages(netlink.recv(65536))
    if answer == NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", body)
        raise OSError(-code, os.strerror(-code))
    return attributes(body, _GENL_HEADER)
