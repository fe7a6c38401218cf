"""DNS servers of a device, where systemd-resolved runs: it asks those of the device that has the address.

Elsewhere servers are in /etc/resolv.conf, which is the host's and no device's, so nothing has to move with
an address. Formats: systemd src/resolve/resolved-link.c (``link_save_user``), resolvectl(1). A
device's settings stay with resolved until the device goes, and without an address they are not used.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ..errors import KernelError
from ..model import LinkDns

_PATIENCE = 20.0  # seconds
_ROOT = Path("/")


def settings(ifindex: int, root: Path = _ROOT) -> tuple[object, ...] | None:
    """The value of a device's ``LinkDns``; ``None`` where resolved has no servers for it, or does not run.

    resolved knows the devices of the first process's network namespace alone. ``root`` is where /proc
    and /run are looked for.
    """
    if not _is_ours(root) or shutil.which("resolvectl") is None:
        return None
    try:
        lines = (root / f"run/systemd/resolve/netif/{ifindex}").read_text().splitlines()
    except FileNotFoundError:
        return None
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    servers = tuple(found.get("SERVERS", "").split())
    if not servers:
        return None
    default_route = {"yes": True, "no": False}.get(found.get("DEFAULT_ROUTE", ""))
    return (servers, tuple(found.get("DOMAINS", "").split()), default_route)


def set_up(resource: LinkDns, value: object) -> None:
    """Give a device these settings, or none of its own. Raises ``KernelError`` with what resolvectl says."""
    device = resource.interface
    if not isinstance(value, tuple):
        _resolvectl("revert", device)
        return
    servers, domains, default_route = value
    _resolvectl("dns", device, *servers)
    _resolvectl("domain", device, *(domains or ("",)))
    if default_route is not None:
        _resolvectl("default-route", device, "yes" if default_route else "no")


def _is_ours(root: Path) -> bool:
    try:
        return (root / "proc/1/ns/net").readlink() == (root / "proc/thread-self/ns/net").readlink()
    except OSError:
        return False


def _resolvectl(*arguments: str) -> None:
    command = ["resolvectl", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise KernelError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")
