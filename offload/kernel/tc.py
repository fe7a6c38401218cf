"""The guard program on kernels without tcx (before 6.6): a cls_bpf filter under clsact.

Unlike a link, a filter has no pin: it lives with the device. Ours are told by their name, which
ends in the program's digest.
"""

from __future__ import annotations

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import KernelError

_EGRESS = 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS), include/uapi/linux/pkt_sched.h
_NAME = "offload_guard_"
_PRIORITY = 0xC0F
_HANDLE = 1


def attach_classic(device: str, ifindex: int, program_fd: int, digest: str) -> None:
    """Add the clsact qdisc where it is missing, and our filter to its egress, in place of an older one."""
    try:
        with IPRoute() as ip:
            if not any(q.get_attr("TCA_KIND") == "clsact" for q in ip.get_qdiscs(ifindex)):
                ip.tc("add", "clsact", ifindex)
            ip.tc(
                "replace-filter",
                "bpf",
                ifindex,
                fd=program_fd,
                name=_NAME + digest,
                handle=_HANDLE,
                parent=_EGRESS,
                prio=_PRIORITY,
                protocol=0x0003,  # ETH_P_ALL
                direct_action=True,
            )
    except NetlinkError as error:
        raise KernelError(f"could not attach the tc program to {device}: {error}") from error


def classic_on(ifindex: int) -> str | None:
    """The digest of our filter's program on this device, or ``None`` without one."""
    try:
        with IPRoute() as ip:
            names = [
                str(options.get_attr("TCA_BPF_NAME"))
                for found in ip.get_filters(ifindex, parent=_EGRESS)
                if (options := found.get_attr("TCA_OPTIONS")) is not None
            ]
    except NetlinkError:
        return None  # the device has gone, or has no clsact
    return next((name.removeprefix(_NAME) for name in names if name.startswith(_NAME)), None)


def detach_classic(ifindex: int) -> None:
    """Take our filter off; the qdisc stays, for others may use it. Nothing happens when it is not there."""
    try:
        if classic_on(ifindex) is not None:
            with IPRoute() as ip:
                ip.tc("del-filter", "bpf", ifindex, parent=_EGRESS, prio=_PRIORITY, protocol=0x0003)
    except NetlinkError as error:
        raise KernelError(f"could not take the tc program off device {ifindex}: {error}") from error
