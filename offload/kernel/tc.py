"""The guard program on kernels without tcx (before 6.6): a cls_bpf filter under clsact.

Unlike a link, a filter has no pin: it lives with the device. Ours are told by name and priority.
"""

from __future__ import annotations

from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import KernelError

_EGRESS = 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS), include/uapi/linux/pkt_sched.h
_NAME = "offload_guard"
_PRIORITY = 0xC0F


def attach_classic(device: str, ifindex: int, program_fd: int) -> None:
    """Add the clsact qdisc where it is missing, and our filter to its egress."""
    try:
        with IPRoute() as ip:
            if not any(q.get_attr("TCA_KIND") == "clsact" for q in ip.get_qdiscs(ifindex)):
                ip.tc("add", "clsact", ifindex)
            ip.tc(
                "add-filter",
                "bpf",
                ifindex,
                fd=program_fd,
                name=_NAME,
                parent=_EGRESS,
                prio=_PRIORITY,
                protocol=0x0003,  # ETH_P_ALL
                direct_action=True,
            )
    except NetlinkError as error:
        raise KernelError(f"could not attach the tc program to {device}: {error}") from error


def _ours(ip: IPRoute, ifindex: int) -> list[Any]:
    return [
        found
        for found in ip.get_filters(ifindex, parent=_EGRESS)
        if (options := found.get_attr("TCA_OPTIONS")) is not None
        and options.get_attr("TCA_BPF_NAME") == _NAME
    ]


def has_classic(ifindex: int) -> bool:
    """Whether our filter is on this device."""
    try:
        with IPRoute() as ip:
            return bool(_ours(ip, ifindex))
    except NetlinkError:
        return False  # the device has gone, or has no clsact


def detach_classic(ifindex: int) -> None:
    """Take our filter off; the qdisc stays, for others may use it. Nothing happens when it is not there."""
    try:
        with IPRoute() as ip:
            if _ours(ip, ifindex):
                ip.tc("del-filter", "bpf", ifindex, parent=_EGRESS, prio=_PRIORITY, protocol=0x0003)
    except NetlinkError as error:
        raise KernelError(f"could not take the tc program off device {ifindex}: {error}") from error
