"""Who else manages a device: what would undo our settings, or lose its addresses to them.

Formats: NetworkManager src/core/nm-config.c (``nm_config_device_state_write``), systemd
src/network/networkd-state-file.c (``link_save``), ifupdown main.c (``update_state``),
dhcpcd src/privsep*.c (process titles).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_COMM_LENGTH = 15  # TASK_COMM_LEN without its terminator
_DHCP_CLIENTS = ("dhclient", "dhcpcd", "udhcpc")


@dataclass(frozen=True)
class Manager:
    """Something that manages a device: its name, how we know, and how to end it."""

    name: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class _Process:
    """``words`` is the command line, split at NUL and blanks; ``netns`` is None where we may not look."""

    pid: int
    comm: str
    words: tuple[str, ...]
    netns: str | None


def managers(name: str, ifindex: int, root: Path = Path("/")) -> list[Manager]:
    """Return who manages the device ``name`` of our network namespace.

    ``root`` is where /proc, /run and /sys are looked for. A manager's files speak of the
    namespace that its process is in: they are believed when such a process runs in ours,
    and when we cannot see in which one it runs.
    """
    own = _netns(root / "proc/thread-self")
    everyone = list(_processes(root))
    processes = [process for process in everyone if own is None or process.netns in (own, None)]
    running = {process.comm for process in processes}
    # Where hidepid= hides other people's processes, the first one included, nothing can be told.
    hidden = all(process.pid != 1 for process in everyone)
    found: list[Manager | None] = []
    if hidden or "NetworkManager" in running:
        found.append(_network_manager(name, ifindex, root))
    if hidden or "systemd-networkd"[:_COMM_LENGTH] in running:
        found.append(_networkd(name, ifindex, root))
    # ifupdown leaves no process behind; it ran where the system's first process is, if anywhere.
    system = _netns(root / "proc/1")
    if None in (own, system) or own == system:
        found.append(_ifupdown(name, root))
    found.extend(_dhcp_clients(name, root, processes))
    return [manager for manager in found if manager is not None]


def _network_manager(name: str, ifindex: int, root: Path) -> Manager | None:
    path = root / f"run/NetworkManager/devices/{ifindex}"
    if _settings(path).get("managed") != "true":
        return None
    return Manager(
        "NetworkManager",
        f"{path}: managed=true",
        f"nmcli device set {name} managed no; to keep it so, write to "
        f"/etc/NetworkManager/conf.d/90-offload-{name}.conf:\n"
        f"[device-offload-{name}]\nmatch-device=interface-name:{name}\nmanaged=0",
    )


def _networkd(name: str, ifindex: int, root: Path) -> Manager | None:
    path = root / f"run/systemd/netif/links/{ifindex}"
    settings = _settings(path)
    state = settings.get("ADMIN_STATE")
    # A link that waits for udev is pending; it is managed if a .network file has matched it.
    undecided = state in ("pending", "initialized") and "NETWORK_FILE" in settings
    if not undecided and state not in ("configuring", "configured", "failed"):
        return None
    network_file = settings.get("NETWORK_FILE", "")
    remedy = (
        f"write to /etc/systemd/network/05-offload-{name}.network:\n"
        f"[Match]\nName={name}\n\n[Link]\nUnmanaged=yes\nthen: networkctl reload"
    )
    if "netplan" in network_file:
        remedy = f"remove {name} from /etc/netplan/*.yaml, then: netplan apply; or {remedy}"
    by = f", by {network_file}" if network_file else ""
    return Manager("systemd-networkd", f"{path}: ADMIN_STATE={state}{by}", remedy)


def _ifupdown(name: str, root: Path) -> Manager | None:
    path = root / "run/network/ifstate"
    if name not in _settings(path):
        return None
    return Manager(
        "ifupdown",
        f"{path} lists {name}",
        f"ifdown {name} (not over a connection that uses {name}), then remove `auto {name}`, "
        f"`allow-hotplug {name}` and `iface {name} …` from /etc/network/interfaces and interfaces.d",
    )


def _dhcp_clients(name: str, root: Path, processes: Iterable[_Process]) -> Iterator[Manager]:
    devices = _devices(root)
    seen: set[str] = set()
    for process in processes:
        program, arguments = _program(process.words)
        client = program.rstrip(":")
        if client in _DHCP_CLIENTS and client not in seen and _serves(program, arguments, name, devices):
            seen.add(client)
            evidence = f"process {process.pid}: {' '.join(process.words)}"
            if process.netns is None:
                evidence += "; its network namespace cannot be seen without CAP_SYS_PTRACE"
            yield Manager(client, evidence, _release(client, name))


def _program(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a command line's program, without directory and without busybox, and its arguments."""
    names = [word.rpartition("/")[2] for word in words]
    if names[:1] == ["busybox"]:
        names, words = names[1:], words[1:]
    return (names[0], words[1:]) if names else ("", ())


def _serves(program: str, arguments: tuple[str, ...], name: str, devices: set[str]) -> bool:
    """Whether a DHCP client's arguments name the device, or no device at all where that means all."""
    match program:
        case "udhcpc":
            # -i eth1, -ieth1 or --interface=eth1; without any of them it takes eth0.
            named = {re.sub(r"^(-i|--interface=)", "", argument) for argument in arguments}
            return name in named or (name == "eth0" and not named & devices)
        case "dhcpcd:":
            # A title that dhcpcd gave itself: it names its device, or says that it serves them all.
            return name in arguments or not {"[manager]", "[master]"}.isdisjoint(arguments)
        case _:
            return name in arguments or devices.isdisjoint(arguments)


def _devices(root: Path) -> set[str]:
    """Return the names of our namespace's devices. (/sys may show those of another one.)"""
    lines = (root / "proc/thread-self/net/dev").read_text().splitlines()[2:]
    return {line.partition(":")[0].strip() for line in lines}


def _release(program: str, name: str) -> str:
    match program:
        case "dhcpcd":
            return f"add `denyinterfaces {name}` to /etc/dhcpcd.conf, then: dhcpcd --release {name}"
        case "dhclient":
            return f"dhclient -r {name} (not over a connection that uses {name})"
        case _:
            return "kill its process, and take it out of what started it"


def _processes(root: Path) -> Iterator[_Process]:
    """Every process that we may look at, by pid. One that ends while we look is left out."""
    for directory in sorted((root / "proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            comm = (directory / "comm").read_text().strip()
            words = (directory / "cmdline").read_text(errors="replace").replace("\0", " ").split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        yield _Process(int(directory.name), comm, tuple(words), _netns(directory))


def _netns(process: Path) -> str | None:
    """Return the identity of a process's network namespace, None where we may not look or it ended."""
    try:
        return str((process / "ns/net").readlink())
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return None


def _settings(path: Path) -> dict[str, str]:
    """Return the ``key=value`` lines of a file; nothing when there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in lines)
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}
