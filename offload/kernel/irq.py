"""Which CPUs serve a NIC's queues: interrupts, NAPI threads and XPS, read and set.

A NIC's interrupt wakes the queue's NAPI instance, and XDP runs on the CPU that it comes to; with threaded
NAPI, on the CPU that the instance's kernel thread is on. XPS names the CPUs whose frames leave by a TX queue.

Sources: Documentation/core-api/irq/irq-affinity.rst, Documentation/networking/scaling.rst and napi.rst,
kernel/irq/proc.c, net/core/net-sysfs.c. Sets of CPUs are the kernel's lists, as ``0-3,6``.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import KernelError, UnsupportedError, VerifyError
from ..model import Change, IrqAffinity, NapiAffinity, Xps
from .ethtool import Ethtool
from .failures import explain, explained
from .host import parse_cpu_list
from .netdev import Napi, napis, rx_queue_napis
from .sysfs import own_sysfs

_IRQS = Path("/proc/irq")
_PCI = Path("/sys/bus/pci/devices")
_FILE_OWNER = "root, or CAP_DAC_OVERRIDE"  # the kernel asks for nothing but access to the file
_REFUSED = {
    errno.EINVAL: "no such CPU is online",
    errno.ERANGE: "the machine has no such CPU",
    errno.ENOSPC: "it has no interrupt vector left",
}
_MASK_DIGITS = 8  # hex digits between the commas of a CPU mask

_RX_NAME = re.compile(r"^(?P<owner>.+?)[-:](?:tx-?rx|rxtx|rx|fp|input)[-.](?P<queue>\d+)$", re.IGNORECASE)
_MLX5_NAME = re.compile(r"^(?P<owner>mlx5_comp)(?P<queue>\d+)(?:@.*)?$")
_BARE_NAME = re.compile(r"^(?P<owner>.+)-(?P<queue>\d+)$")
_OTHER_QUEUES = re.compile(r":(?:fdir|ctrl)-|-(?:tx|xdp|ptp)-\d+$", re.IGNORECASE)


# Settings


def observe(resource: IrqAffinity | NapiAffinity | Xps) -> str | None:
    """The value of a setting; ``None`` where its interrupt, thread or queue is not there any more."""
    match resource:
        case IrqAffinity(device, ifindex, irq):
            return affinity(irq) if serves(device, ifindex, irq) else None
        case NapiAffinity(device, ifindex, napi):
            return napi_affinity(device, ifindex, napi)
        case Xps(device, _, tx_queue):
            return xps(device, tx_queue) if tx_queue in xps_queues(device) else None


def execute(change: Change) -> None:
    """Change a setting; one that was not there before is left as it is."""
    match change.resource, change.after:
        case _, None:
            return
        case IrqAffinity(device, _, irq), str(cpus):
            set_affinity(irq, cpus, device)
        case NapiAffinity(device, ifindex, napi), str(cpus):
            set_napi_affinity(device, ifindex, napi, cpus)
        case Xps(device, _, tx_queue), str(cpus):
            set_xps(device, tx_queue, cpus)
        case _:
            raise TypeError(f"{change} is no change of what CPUs serve")


# Interrupts


def queue_irqs(ifname: str, ifindex: int) -> dict[int, tuple[int, ...]]:
    """The interrupts that serve each RX queue of a device; empty where that cannot be told.

    So it is for a device without interrupts (veth) and for one that is down. Raises KernelError.
    """
    return irqs_by_napi(ifname, ifindex) or irqs_by_name(ifname)


def irqs_by_napi(ifname: str, ifindex: int) -> dict[int, tuple[int, ...]]:
    """As ``queue_irqs``, from the kernel; empty unless it tells of all queues."""
    try:
        queues = rx_queue_napis(ifname, ifindex)
        instances = napis(ifname, ifindex)
    except UnsupportedError:
        return {}
    found: dict[int, tuple[int, ...]] = {}
    for queue, napi in queues.items():
        irq = instances[napi].irq if napi in instances else None
        if irq is None:
            return {}
        found[queue] = (irq,)
    return found


def irqs_by_name(ifname: str) -> dict[int, tuple[int, ...]]:
    """As ``queue_irqs``, from the names that the driver gave to the interrupts of its PCI device."""
    return rx_irqs(_names(_message_irqs(ifname)))


def rx_irqs(names: Mapping[int, str]) -> dict[int, tuple[int, ...]]:
    """Interrupts by RX queue, from the names of all the interrupts of one device.

    What stands before the number is not looked at: it can be the name that the interface once had.
    Empty unless the names tell of a queue 0, and when several interfaces share the device.
    """
    numbered = {irq: name for irq, name in names.items() if not _OTHER_QUEUES.search(name)}
    for form in (_RX_NAME, _MLX5_NAME, _BARE_NAME):
        matches = {irq: match for irq, name in numbered.items() if (match := form.match(name))}
        queues = {int(match["queue"]): (irq,) for irq, match in sorted(matches.items())}
        owners = {match["owner"] for match in matches.values()}
        if matches:
            return dict(sorted(queues.items())) if 0 in queues and len(owners) == 1 else {}
    return {0: tuple(names)} if len(names) == 1 else {}


def _message_irqs(ifname: str) -> list[int]:
    """The MSI and MSI-X vectors of the PCI device that an interface is of."""
    directory = _pci_device(ifname) / "msi_irqs"
    with explained(ifname, f"read {directory}"):
        try:
            return sorted(int(name) for name in os.listdir(directory))
        except FileNotFoundError:
            return []


def _pci_device(ifname: str) -> Path:
    """Its directory in sysfs; there is none for what is not PCI. It does not depend on the namespace."""
    try:
        with Ethtool() as ethtool:
            address = ethtool.bus_address(ifname)
    except UnsupportedError:
        address = ""
    return _PCI / (address or "none")


def _names(irqs: Iterable[int]) -> dict[int, str]:
    """What the handlers of interrupts are called: the directories of /proc/irq/N."""
    found = {}
    for irq in irqs:
        try:
            with os.scandir(_IRQS / str(irq)) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            continue  # it has just been freed
        if names:
            found[irq] = names[0]
    return found


def serves(ifname: str, ifindex: int, irq: int) -> bool:
    """Whether an interrupt is this device's: one that was freed may be somebody else's now."""
    if (_pci_device(ifname) / "msi_irqs" / str(irq)).exists():
        return True
    return any(irq in irqs for irqs in irqs_by_napi(ifname, ifindex).values())


def affinity(irq: int) -> str:
    """The CPUs that may serve an interrupt. Raises KernelError when it is gone."""
    path = _affinity_file(irq)
    with explained(f"interrupt {irq}", f"read {path}", _FILE_OWNER):
        return path.read_text().strip()


def set_affinity(irq: int, cpus: str, device: str) -> None:
    """Let ``cpus`` serve an interrupt of ``device``; the next one goes there.

    Raises UnsupportedError when the kernel places the interrupt itself, PrivilegeError without access to
    the file, KernelError when the interrupt is gone or no CPU of them is online or has room for it,
    VerifyError when it reads back otherwise.
    """
    path = _affinity_file(irq)
    doing = f"let CPU {cpus} serve interrupt {irq} ({path})"
    with explained(device, doing, _FILE_OWNER):
        try:
            file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except PermissionError:
            if os.stat(path).st_mode & 0o222:
                raise
            raise _managed(device, irq) from None
    try:
        os.write(file, cpus.encode())
    except OSError as error:
        if error.errno in (errno.EIO, errno.EPERM):  # before and since Linux 6.12
            raise _managed(device, irq) from error
        if error.errno in _REFUSED:
            raise KernelError(f"{device}: cannot {doing}: {_REFUSED[error.errno]}") from error
        raise explain(error, device, doing, _FILE_OWNER) from error
    finally:
        os.close(file)
    _verify(device, doing, affinity(irq), cpus)


def _affinity_file(irq: int) -> Path:
    return _IRQS / str(irq) / "smp_affinity_list"


def _managed(device: str, irq: int) -> UnsupportedError:
    return UnsupportedError(
        f"{device}: cannot move interrupt {irq}: its driver lets the kernel place it, for good "
        f"({_affinity_file(irq)} refuses); let the queue have one of CPUs {affinity(irq)}"
    )


def interrupts() -> dict[int, tuple[int, ...]]:
    """How often each interrupt came since boot, by CPU number; 0 for a CPU that is offline."""
    path = Path("/proc/interrupts")
    with explained("interrupts", f"read {path}"):
        return parse_interrupts(path.read_text())


def parse_interrupts(text: str) -> dict[int, tuple[int, ...]]:
    """As ``interrupts``, of the text of /proc/interrupts."""
    header, *lines = text.splitlines()
    cpus = [int(word.removeprefix("CPU")) for word in header.split()]
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        if name.strip().isdigit():
            counts = dict(zip(cpus, map(int, rest.split()[: len(cpus)]), strict=True))
            found[int(name)] = tuple(counts.get(cpu, 0) for cpu in range(max(cpus) + 1))
    return found


# NAPI threads


def threaded(ifname: str) -> bool:
    """Whether kernel threads do the work of a device's queues, for all that the device has."""
    with _device_file(ifname, "threaded", "read") as path:
        return path.read_text().strip() != "0"


def queue_threads(ifname: str, ifindex: int) -> dict[int, int]:
    """By RX queue, the NAPI instance whose kernel thread does the queue's work, by id.

    Empty where the interrupt's CPU does it, and where the kernel does not tell: before Linux 6.8.
    """
    try:
        queues = rx_queue_napis(ifname, ifindex)
        instances = napis(ifname, ifindex)
    except UnsupportedError:
        return {}
    with_thread = {napi.id for napi in instances.values() if _thread(ifname, napi) is not None}
    return {queue: napi for queue, napi in queues.items() if napi in with_thread and napi is not None}


def napi_affinity(ifname: str, ifindex: int, napi: int) -> str | None:
    """The CPUs that the thread of a NAPI instance may run on; ``None`` when it has none."""
    try:
        instance = napis(ifname, ifindex).get(napi)
    except UnsupportedError:
        return None
    pid = _thread(ifname, instance) if instance else None
    if pid is None:
        return None
    with explained(ifname, f"read the CPUs of the thread of NAPI {napi}, process {pid}"):
        return format_cpu_list(os.sched_getaffinity(pid))


def set_napi_affinity(ifname: str, ifindex: int, napi: int, cpus: str) -> None:
    """Let the thread of a NAPI instance run on ``cpus`` only. Raises PrivilegeError without CAP_SYS_NICE."""
    instance = napis(ifname, ifindex).get(napi)
    pid = _thread(ifname, instance) if instance else None
    doing = f"let CPU {cpus} run the thread of NAPI {napi}"
    if pid is None:
        raise KernelError(f"{ifname}: cannot {doing}: it has none any more")
    with explained(ifname, doing, "CAP_SYS_NICE"):
        os.sched_setaffinity(pid, parse_cpu_list(cpus))
        _verify(ifname, doing, format_cpu_list(os.sched_getaffinity(pid)), cpus)


def _thread(ifname: str, napi: Napi) -> int | None:
    """The pid of the thread that does the work of a NAPI instance."""
    if napi.pid is None or not (threaded(ifname) if napi.threaded is None else napi.threaded):
        return None
    try:
        name = Path(f"/proc/{napi.pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The kernel counts processes from the first namespace on: in a container the number is another one's.
    return napi.pid if name.startswith("napi/") else None


# XPS


def xps_queues(ifname: str) -> tuple[int, ...]:
    """The TX queues that XPS can choose from, in order; none where the device has just one."""
    with _device_file(ifname, "queues", "read") as path:
        found = sorted(int(name.removeprefix("tx-")) for name in os.listdir(path) if name.startswith("tx-"))
    return tuple(found) if len(found) > 1 else ()


def xps(ifname: str, tx_queue: int) -> str:
    """The CPUs whose frames leave by a TX queue; empty where XPS names none."""
    with _device_file(ifname, _xps_file(tx_queue), "read") as path:
        mask = int(path.read_text().replace(",", ""), 16)
    return format_cpu_list(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)


def set_xps(ifname: str, tx_queue: int, cpus: str) -> None:
    """Let frames of ``cpus`` leave by a TX queue; empty: XPS shall not name it. Needs CAP_NET_ADMIN.

    Raises VerifyError when it reads back otherwise, as with CPUs that are offline.
    """
    digits = f"{sum(1 << cpu for cpu in _cpu_set(cpus)):x}"
    digits = digits.zfill(-(-len(digits) // _MASK_DIGITS) * _MASK_DIGITS)
    groups = (digits[at : at + _MASK_DIGITS] for at in range(0, len(digits), _MASK_DIGITS))
    with _device_file(ifname, _xps_file(tx_queue), "write") as path:
        path.write_text(",".join(groups))
    doing = f"send frames of CPUs {cpus or 'none'} by TX queue {tx_queue}"
    _verify(ifname, doing, xps(ifname, tx_queue), cpus)


def _xps_file(tx_queue: int) -> str:
    return f"queues/tx-{tx_queue}/xps_cpus"


@contextmanager
def _device_file(ifname: str, file: str, doing: str) -> Iterator[Path]:
    """A file of a device of this namespace in sysfs; errors name it."""
    with explained(ifname, f"{doing} /sys/class/net/{ifname}/{file}"), own_sysfs() as root:
        yield root / "class/net" / ifname / file


# CPUs


def local_cpus(ifname: str) -> tuple[int, ...]:
    """The CPUs of a NIC's own NUMA node; empty where the machine has one node, or its own is not known."""
    directory = _pci_device(ifname)
    with explained(ifname, f"read {directory}"):
        try:
            node = int((directory / "numa_node").read_text())
            cpus = parse_cpu_list((directory / "local_cpulist").read_text())
            nodes = parse_cpu_list(Path("/sys/devices/system/node/online").read_text())
        except FileNotFoundError:
            return ()  # no hardware, or a kernel without NUMA
    return cpus if node >= 0 and len(nodes) > 1 else ()


def format_cpu_list(cpus: Iterable[int]) -> str:
    """The inverse of ``host.parse_cpu_list``: ``(0, 1, 2, 3, 6)`` is ``0-3,6``; no CPUs are ``""``."""
    ranges: list[tuple[int, int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1] = ranges[-1][0], cpu
        else:
            ranges.append((cpu, cpu))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _cpu_set(cpus: str) -> set[int]:
    return set(parse_cpu_list(cpus)) if cpus else set()


def _verify(device: str, doing: str, found: str, wanted: str) -> None:
    if _cpu_set(found) != _cpu_set(wanted):
        raise VerifyError(f"{device}: cannot {doing}: afterwards it reads {found or 'none'!r}")


# irqbalance


def irqbalance(irqs: Collection[int] = (), root: Path = Path("/")) -> str | None:
    """How we know that irqbalance runs, which would move ``irqs`` away again, and what to do about it.

    ``root`` is where /proc and /run are looked for. Source: irqbalance(1) and its irqbalance.h.
    """
    evidence = _irqbalance_runs(root)
    if evidence is None:
        return None
    ban = " ".join(f"--banirq={irq}" for irq in sorted(irqs)) or "--banirq=N for each of these interrupts"
    return (
        f"irqbalance runs ({evidence}) and moves interrupts that were given to CPUs: keep it from them with "
        f'IRQBALANCE_ARGS="{ban}" in /etc/default/irqbalance (Red Hat: /etc/sysconfig/irqbalance), or with '
        "a --policyscript= that prints ban=true for them, as their numbers change; "
        "then `systemctl restart irqbalance`; or stop it: `systemctl disable --now irqbalance`"
    )


def _irqbalance_runs(root: Path) -> str | None:
    processes = [entry for entry in (root / "proc").iterdir() if entry.name.isdigit()]
    for process in processes:
        try:
            if (process / "comm").read_text().strip() == "irqbalance":
                return f"process {process.name}"
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    # Its socket can outlive it, and says something only where other people's processes are hidden.
    if all(process.name != "1" for process in processes):
        for path in (root / "run/irqbalance").glob("irqbalance*.sock"):
            return str(path)
    return None
