"""What a NIC can do, asked of the kernel and of its driver; no table of names has a say in it.

``capabilities`` is for people: slow, and each question is asked on its own, so that one that fails is one
answer less. ``hardware`` is what ``plan`` decides by, read in every reconciliation.

Sources: include/uapi/linux/ethtool.h, include/uapi/linux/if_link.h, PCI Local Bus Specification 3.0
section 6.8.2 (MSI-X), Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from ..config import QueuesConfig
from ..errors import KernelError, OffloadError, UnsupportedError
from ..hardware import Function, Hardware, How
from ..model import Link
from . import irq, netdev, ntuple, rss, sriov
from .bpf import AttachType, Program
from .compile import ProgramSpec
from .ethtool import Channels, Ethtool
from .failures import explained
from .host import Answer
from .links import Links
from .netdev import Napi, XdpFeatures
from .rtnl import RouteSocket, attributes, number, open_socket

TAG_STRIPPING = "rx-vlan-hw-parse"
PROBE = "offload doctor --probe"

_PCI = Path("/sys/bus/pci/devices")
_IRQ_AFFINITY = "/proc/irq/{}/smp_affinity_list"
_CAPABILITY_LIST = 0x34  # offset in PCI configuration space
_MSIX = 0x11  # capability id
_MSIX_CONTROL = struct.Struct("<H")  # message control: the table's size less one, in the low 11 bits
_IFINFO_SIZE = 16
_IFLA_MIN_MTU, _IFLA_MAX_MTU = 50, 51
_XDP_FLAGS_HW_MODE = 1 << 3
_BPF_PROG_TYPE_XDP = 6
_NO_NDO_BPF = "does not support XDP in native mode"
_NO_IRQS = Answer("unknown", "no interrupts are known to serve its RX queues; a device that is down has none")
_PASS = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)  # r0 = XDP_PASS; exit


# For people


def capabilities(nic: Link, ethtool: Ethtool, *, probe: bool = False) -> dict[str, Answer]:
    """What a NIC can do, by name; each answer says what it is about. Takes some milliseconds.

    ``probe`` may insert a rule that no frame fits, and delete it; nothing else is changed, and
    nothing that would reset the NIC is tried.
    """
    name = nic.name
    questions: dict[str, Callable[[], Answer]] = {
        "channels": partial(_channels, nic, ethtool),
        "rss_table": lambda: rss_table(rss.spread(ethtool, name)),
        "rss_contexts": partial(rss.contexts, ethtool, name),
        "steering_rules": partial(ntuple.probe if probe else ntuple.could_tell_without_trying, ethtool, name),
        "vlan_in_frame": lambda: vlan_in_frame(nic, ethtool.features(name)),
        "msix": lambda: msix(*_vectors(ethtool, name)),
        "numa": lambda: numa(numa_node(nic, ethtool), _nodes()),
        "mtu": lambda: mtu(*_mtu_limits(nic)),
        "xdp_mtu": partial(xdp_mtu, nic),
        "sriov": lambda: virtual_functions(sriov.total(name), sriov.made(name)),
        "irq_affinity": lambda: irq_affinity(_irqs_by_refusal(nic)),
        "irqs_stay": lambda: irqs_stay(_irqs(nic)),
        "napi_threads": lambda: napi_threads(irq.threaded(name)),
        "napi_settings": partial(_napi_settings, nic),
    }
    return _xdp(nic, probe) | {about: _asked(question) for about, question in questions.items()}


def _asked(question: Callable[[], Answer]) -> Answer:
    try:
        return question()
    except OffloadError as error:
        return Answer("unknown", str(error))


def _xdp(nic: Link, probe: bool) -> dict[str, Answer]:
    try:
        return xdp(nic, netdev.xdp_features(nic.name, nic.ifindex))
    except UnsupportedError as error:
        unknown = Answer("unknown", str(error), "boot Linux 6.3 or later")
        native = _asked(partial(_native_without_netlink, nic, unknown, probe))
    except OffloadError as error:
        unknown = native = Answer("unknown", str(error))
    return {
        "native_xdp": native,
        "xdp_frags": unknown,
        "xdp_redirect_target": unknown,
        "zero_copy": unknown,
    }


def xdp(nic: Link, features: XdpFeatures) -> dict[str, Answer]:
    """What a driver tells of XDP."""
    target = _told(XdpFeatures.NDO_XMIT, features)
    if target.state == "no" and features & XdpFeatures.BASIC and nic.xdp_mode != "native":
        # net/core/xdp.c, xdp_features_set_redirect_target(): some drivers say so while they have a program.
        target = Answer("unknown", "some drivers are one only while they have an XDP program")
    return {
        "native_xdp": _native(nic, features),
        "xdp_frags": _told(XdpFeatures.RX_SG, features),
        "xdp_redirect_target": target,
        "zero_copy": _told(XdpFeatures.XSK_ZEROCOPY, features),
    }


def _told(bit: XdpFeatures, features: XdpFeatures) -> Answer:
    return (
        Answer("yes", "its driver says so") if features & bit else Answer("no", "its driver does not say so")
    )


def _native(nic: Link, features: XdpFeatures) -> Answer:
    if features & XdpFeatures.BASIC and features & XdpFeatures.REDIRECT:
        return Answer("yes", "its driver has it, with redirection")
    lacks = "redirection" if features & XdpFeatures.BASIC else "it"
    return Answer("no", f"its driver lacks {lacks}", _generic(nic))


def _generic(nic: Link) -> str:
    return f"set nics.{nic.name}.xdp_mode: generic, which is slower, or use another NIC"


def _native_without_netlink(nic: Link, unknown: Answer, probe: bool) -> Answer:
    if nic.xdp_mode == "native":
        return Answer("yes", "it has a native program now")
    if not probe:
        return replace(unknown, remedy=PROBE)
    if _takes_bpf_commands(nic):
        return Answer("yes", "its driver has it; before Linux 6.3 nobody tells whether with redirection")
    return Answer("no", "its driver lacks it", _generic(nic))


def _takes_bpf_commands(nic: Link) -> bool:
    """Whether a driver has XDP at all, without attaching a program, which would reset most NICs.

    It is asked to offload a program that was not made for it. Where it has no ``ndo_bpf`` the kernel says so
    in these words, before it asks anybody (net/core/dev.c, dev_xdp_attach()); otherwise the driver refuses.
    """
    spec = ProgramSpec(_BPF_PROG_TYPE_XDP, _PASS, {}, {})
    with (
        Program.load("offload_probe", spec, {}, AttachType.XDP, frags=False) as program,
        RouteSocket(open_socket()) as route,
    ):
        settings = [["IFLA_XDP_FD", program.fd], ["IFLA_XDP_FLAGS", _XDP_FLAGS_HW_MODE]]
        message = _of_device(nic)
        message["attrs"] = [["IFLA_XDP", {"attrs": settings}]]
        with explained(nic.name, "ask its driver for XDP"):
            try:
                route.change(RTM_SETLINK, 0, message)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return True
                if error.errno == errno.EOPNOTSUPP and _NO_NDO_BPF in str(error):
                    return False
                raise
    raise KernelError(f"{nic.name}: its driver took a program that was not made for it")


def _channels(nic: Link, ethtool: Ethtool) -> Answer:
    try:
        return channels(ethtool.channels(nic.name))
    except UnsupportedError:
        state: Literal["yes", "no"] = "yes" if nic.rx_queues > 1 else "no"
        return Answer(state, f"{nic.rx_queues}, a number that its driver cannot change")


def channels(found: Channels) -> Answer:
    """Whether a NIC has, or can have, more than one RX queue."""
    most = found.max_rx + found.max_combined
    return Answer("yes" if most > 1 else "no", f"{found.rx_queues} of at most {most}")


def rss_table(table: Collection[int]) -> Answer:
    """Whether a NIC spreads frames to RX queues by a table that can be read."""
    if not table:
        return Answer("no", "its driver has none")
    queues = irq.format_cpu_list({*table})
    return Answer("yes", f"{len(table)} slots, to the RX queue{_s(len({*table}))} {queues}")


def vlan_in_frame(nic: Link, features: Mapping[str, tuple[bool, bool]]) -> Answer:
    """Whether VLAN tags stay in the frame, where XDP sees them, or can be made to.

    On a veth it is the sending end that keeps tags beside the frame; that end is set when it is taken.
    """
    active, fixed = features.get(TAG_STRIPPING, (False, True))
    if not active or nic.kind == "veth":
        return Answer("yes", "XDP sees them there")
    if fixed:
        return Answer(
            "no",
            f"{TAG_STRIPPING} is on and fixed: the NIC hides VLAN tags from XDP",
            "use another NIC, or see to it that no tagged frames reach this one",
        )
    return Answer("yes", f"{TAG_STRIPPING} is on; offload switches it off while it runs")


def msix(used: int, most: int | None) -> Answer:
    """Whether a NIC has several interrupts; ``most`` is the size of its table, ``None`` for not known."""
    if not used:
        return Answer("no", "it is no PCI device with such interrupts")
    told = f"{used} vector{_s(used)} in use" + (f" of {most}" if most else "")
    return Answer("yes" if used > 1 else "no", told)


def _vectors(ethtool: Ethtool, ifname: str) -> tuple[int, int | None]:
    """MSI-X vectors that a driver uses, and how many the device has. The latter is for root to read."""
    directory = _pci_directory(ethtool, ifname)
    if directory is None:
        return 0, None
    with explained(ifname, f"read {directory}", "root"):
        try:
            used = len(os.listdir(directory / "msi_irqs"))
        except FileNotFoundError:
            used = 0
        return used, msix_vectors((directory / "config").read_bytes())


def msix_vectors(config: bytes) -> int | None:
    """The size of the MSI-X table, from a PCI configuration space; ``None`` where it does not say."""
    at = config[_CAPABILITY_LIST] if len(config) > _CAPABILITY_LIST else 0
    seen: set[int] = set()
    while at and at not in seen and at + 4 <= len(config):
        seen.add(at)
        if config[at] == _MSIX:
            (control,) = _MSIX_CONTROL.unpack_from(config, at + 2)
            return int(control & 0x7FF) + 1
        at = config[at + 1]
    return None


def numa(node: int | None, nodes: int) -> Answer:
    """Whether a NIC is near some of the CPUs, and which."""
    if nodes < 2:
        return Answer("no", "this machine has one node: all CPUs are as near")
    if node is None:
        return Answer("unknown", "the firmware does not say which node the NIC is at")
    return Answer("yes", f"node {node} of {nodes}")


def numa_node(nic: Link, ethtool: Ethtool) -> int | None:
    """The NUMA node of a NIC, ``None`` where it is at none or nobody says."""
    directory = _pci_directory(ethtool, nic.name)
    if directory is None:
        return None
    with explained(nic.name, f"read {directory}/numa_node"):
        try:
            node = int((directory / "numa_node").read_text())
        except FileNotFoundError:  # a kernel without NUMA
            return None
    return node if node >= 0 else None


def _nodes() -> int:
    with explained("NUMA nodes", "list /sys/devices/system/node"):
        return sum(1 for _ in Path("/sys/devices/system/node").glob("node[0-9]*"))


def mtu(least: int, most: int) -> Answer:
    """The limits of a device's MTU. A driver without an upper one says 0."""
    if not most:
        return Answer("unknown", f"at least {least} bytes; its driver names no upper limit")
    return Answer("yes", f"{least} to {most} bytes")


def xdp_mtu(nic: Link) -> Answer:
    """Whether native XDP runs with the MTU that a device has. The kernel has no question for that."""
    if nic.xdp_mode == "native":
        return Answer("yes", f"it runs with {nic.mtu} bytes")
    return Answer("unknown", "only attaching a program tells, which resets many NICs")


def _mtu_limits(nic: Link) -> tuple[int, int]:
    with explained(nic.name, "read its MTU limits"), RouteSocket(open_socket()) as route:
        found = attributes(route.get(RTM_GETLINK, _of_device(nic)), _IFINFO_SIZE)
    return number(found.get(_IFLA_MIN_MTU, b"")), number(found.get(_IFLA_MAX_MTU, b""))


def virtual_functions(total: int, made: int) -> Answer:
    """Whether a NIC has SR-IOV."""
    if not total:
        return Answer("no", "none here", "if the NIC is known to have it: switch it on in the firmware")
    return Answer("yes", f"{total} virtual function{_s(total)}, {made} made")


def irq_affinity(irqs: Mapping[int, str]) -> Answer:
    """Whether we may move the interrupts of a NIC. Each comes with why not, or with an empty text."""
    if not irqs:
        return _NO_IRQS
    refused = {why: number for number, why in irqs.items() if why}
    if not refused:
        return Answer("yes", f"interrupt{_s(len(irqs))} {irq.format_cpu_list(irqs)} can be moved")
    told = "; ".join(f"interrupt {number}: {why}" for why, number in refused.items())
    return Answer("no", told, "run as root, or let its queues be served by the CPUs that they have")


def _irqs_by_refusal(nic: Link) -> dict[int, str]:
    return {number: _refusal(number) for number in sorted(_irqs(nic))}


def _refusal(number: int) -> str:
    """Why an interrupt cannot be moved; empty when it can.

    An empty write is refused with EIO where the kernel places the interrupt (kernel/irq/proc.c,
    write_irq_affinity()), and otherwise for being empty.
    """
    try:
        file = os.open(_IRQ_AFFINITY.format(number), os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        os.write(file, b"")
    except OSError as error:
        if error.errno in (errno.EIO, errno.EPERM):
            return "its driver lets the kernel place it"
    finally:
        os.close(file)
    return ""


def irqs_stay(irqs: Collection[int]) -> Answer:
    """Whether interrupts stay where they are put: irqbalance moves them."""
    if not irqs:
        return _NO_IRQS
    moved = irq.irqbalance(irqs)
    if moved is None:
        return Answer("yes", "irqbalance does not run")
    why, _, remedy = moved.partition(": ")
    return Answer("no", why, remedy)


def napi_threads(on: bool) -> Answer:
    """Whether kernel threads can do the work of a device's queues."""
    served = "they serve" if on else "they can be switched on; now its interrupts' CPUs serve"
    return Answer("yes", f"{served} its queues")


def _napi_settings(nic: Link) -> Answer:
    try:
        return napi_settings(netdev.napis(nic.name, nic.ifindex))
    except UnsupportedError as error:
        return Answer("no", str(error), "boot Linux 6.13 or later")


def napi_settings(found: Mapping[int, Napi]) -> Answer:
    """Whether each queue's NAPI instance has settings of its own."""
    if not found:
        return Answer("unknown", "its driver names no NAPI instance, or it is down")
    if all(one.gro_flush_timeout is None for one in found.values()):
        return Answer("no", "the device has them for all its queues", "boot Linux 6.13 or later")
    return Answer("yes", f"{len(found)} NAPI instance{_s(len(found))}")


def _pci_directory(ethtool: Ethtool, ifname: str) -> Path | None:
    """A device's directory in sysfs, in whichever namespace it is; ``None`` for what is not PCI."""
    address = ethtool.bus_address(ifname)
    directory = _PCI / address
    return directory if address and directory.is_dir() else None


def _of_device(nic: Link) -> ifinfmsg:
    message = ifinfmsg()
    message["index"] = nic.ifindex
    return message


def _s(count: int) -> str:
    return "" if count == 1 else "s"


# For the plan


def hardware(
    nic: Link,
    ethtool: Ethtool,
    links: Links,
    settings: QueuesConfig,
    *,
    functions_are_ours: bool,
    takes_rules: Answer | None = None,
) -> Hardware:
    """What a NIC offers for hardware queues, and what of it is in use.

    ``functions_are_ours``: we made the virtual functions that there are. ``takes_rules`` is what a trial
    with a rule has shown (``ntuple.probe``); without one, a driver that could take rules is believed to.
    """
    rules = ntuple.could_tell_without_trying(ethtool, nic.name)
    if takes_rules and takes_rules.state == "no":
        rules = takes_rules
    total = sriov.total(nic.name)
    made = sriov.made(nic.name) if total else 0
    rx_queues = ethtool.rx_queues(nic)
    how, why = way(nic.name, rx_queues, rules, total, made, settings, functions_are_ours=functions_are_ours)
    functions = _functions(links, nic) if how == "functions" and made else ()
    irqs = irq.queue_irqs(nic.name, nic.ifindex) if how == "rules" else {}
    served = {*_all(irqs), *(number for one in functions for number in one.irqs)}
    return Hardware(
        how=how,
        why=why,
        rx_queues=rx_queues,
        spread=rss.spread(ethtool, nic.name),
        rules=ntuple.rules(ethtool, nic.name),
        total_functions=total,
        functions=functions,
        irqs=irqs,
        affinity=_affinity(number for number in served if not _refusal(number)),
        napis=irq.queue_threads(nic.name, nic.ifindex) if how == "rules" else {},
        xps=irq.xps_queues(nic.name) if how == "rules" else (),
        local_cpus=irq.local_cpus(nic.name),
    )


def way(
    nic: str,
    rx_queues: int,
    rules: Answer,
    total: int,
    made: int,
    settings: QueuesConfig,
    *,
    functions_are_ours: bool,
) -> tuple[How | None, str]:
    """How a NIC can sort frames into hardware queues, or ``None`` and why not."""
    if rules.state != "no" and rx_queues > 1:
        return "rules", ""
    if total and settings.vf_xdp_mode and (not made or functions_are_ours):
        return "functions", ""
    no_rules = f"it has no steering rules ({rules.why})"
    if rules.state != "no":
        no_rules = f"it has one RX queue, which is the default queue's (`ethtool -L {nic} combined N`)"
    if not total:
        return None, f"{no_rules}, and no virtual functions"
    if made and not functions_are_ours:
        were, them = ("were", "them") if made > 1 else ("was", "it")
        return None, (
            f"{no_rules}, and its {made} virtual function{_s(made)} {were} made by somebody else: "
            f"`echo 0 > /sys/class/net/{nic}/device/sriov_numvfs` removes {them}"
        )
    return None, (
        f"{no_rules}, and its virtual functions are left alone: "
        f"nics.{nic}.queues.vf_xdp_mode: generic would use its {total}"
    )


def fingerprint(nic: Link, ethtool: Ethtool, links: Links) -> Hashable:
    """Something that is another one when somebody changed what ``hardware`` reads, but for the hardware."""
    try:
        functions = _functions(links, nic) if sriov.total(nic.name) and sriov.made(nic.name) else ()
        irqs = {*_irqs(nic), *(number for one in functions for number in one.irqs)}
        return (
            ethtool.rx_queues(nic),
            ntuple.rules(ethtool, nic.name),
            rss.spread(ethtool, nic.name),
            functions,
            tuple(_affinity(irqs).items()),
        )
    except OffloadError as error:
        return str(error)  # it goes away, for one


def _functions(links: Links, nic: Link) -> tuple[Function, ...]:
    """The virtual functions of a NIC, with the interrupts of those whose device is here."""
    return tuple(
        replace(
            one,
            irqs=_all(irq.queue_irqs(one.device, one.ifindex)),
            napis=tuple(irq.queue_threads(one.device, one.ifindex).values()),
        )
        if one.device is not None and one.ifindex is not None
        else one
        for one in sriov.functions(links, nic)
    )


def _irqs(nic: Link) -> tuple[int, ...]:
    return _all(irq.queue_irqs(nic.name, nic.ifindex))


def _all(irqs: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(number for numbers in irqs.values() for number in numbers)


def _affinity(irqs: Iterable[int]) -> dict[int, str]:
    return {number: irq.affinity(number) for number in sorted(irqs)}
