"""The guard program on kernels without tcx (before 6.6): a cls_bpf filter under clsact.

Unlike a link, a filter has no pin: it lives with the device. Ours are told by their name, which
holds the program's digest, and says whether the clsact qdisc is ours as well.
"""

from __future__ import annotations

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import KernelError

_INGRESS = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS), include/uapi/linux/pkt_sched.h
_EGRESS = 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)
_NAME = "offload_guard_"
_OWN_QDISC = "_own_qdisc"
_PRIORITY = 0xC0F
_HANDLE = 1


def attach_classic(device: str, ifindex: int, program_fd: int, digest: str) -> None:
    """Add the clsact qdisc where it is missing, and our filter to its egress, in place of an older one."""
    try:
        with IPRoute() as ip:
            own_qdisc = (_filter_name(ip, ifindex) or "").endswith(_OWN_QDISC)
            if not any(q.get_attr("TCA_KIND") == "clsact" for q in ip.get_qdiscs(ifindex)):
                ip.tc("add", "clsact", ifindex)
                own_qdisc = True
            ip.tc(
                "replace-filter",
                "bpf",
                ifindex,
                fd=program_fd,
                name=_NAME + digest + (_OWN_QDISC if own_qdisc else ""),
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
            name = _filter_name(ip, ifindex)
    except NetlinkError:
        return None  # the device has gone, or has no clsact
    return name.removeprefix(_NAME).removesuffix(_OWN_QDISC) if name else None


def detach_classic(ifindex: int) -> None:
    """Take our filter off, and the qdisc too if we added it and nobody else uses it.

    Nothing happens when the filter is not there.
    """
    if classic_on(ifindex) is None:
        return
    try:
        with IPRoute() as ip:
            own_qdisc = (_filter_name(ip, ifindex) or "").endswith(_OWN_QDISC)
            ip.tc("del-filter", "bpf", ifindex, parent=_EGRESS, prio=_PRIORITY, protocol=0x0003)
            if own_qdisc and not any(ip.get_filters(ifindex, parent=side) for side in (_INGRESS, _EGRESS)):
                ip.tc("del", "clsact", ifindex)
    except NetlinkError as error:
        raise KernelError(f"could not take the tc program off device {ifindex}: {error}") from error


def _filter_name(ip: IPRoute, ifindex: int) -> str | None:
    """The name of our filter on this device, or ``None`` without one."""
    names = (
        str(options.get_attr("TCA_BPF_NAME"))
        for found in ip.get_filters(ifindex, parent=_EGRESS)
        if (options := found.get_attr("TCA_OPTIONS")) is not None
    )
    return next((name for name in names if name.startswith(_NAME)), None)
