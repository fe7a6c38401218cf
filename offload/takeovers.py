"""What is known of takeovers over the life of a process: which one waits, and which were confirmed.

One that waits is ``RUN_DIR/takeover.json``: on disk before the first address moves, and gone when it was
confirmed or taken back. The daemon, its watchdog and the next daemon all go by that
file. What was confirmed is ``STATE_DIR/takeovers.json``, which survives a reboot.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from .config import dump, parse_port
from .errors import OffloadError, PrivilegeError
from .files import replace_durably
from .portfiles import PortFile
from .takeover import Confirmation, HostNetwork

DEFAULT_WITHIN = 120
"""Seconds in which a takeover has to be confirmed."""


@dataclass(frozen=True)
class StoredPort:
    """A port of a file: the directory that it is in, and the file's text."""

    source: Literal["keep", "run"]
    text: str


@dataclass(frozen=True)
class Former:
    """The config that was in force before, to go back to."""

    text: str
    source: str
    detached: bool
    ports: Mapping[str, StoredPort] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, source: str, files: Mapping[str, PortFile], *, detached: bool) -> Former:
        ports = {name: StoredPort(file.source, dump(file.port)) for name, file in files.items()}
        return cls(text, source, detached, ports)

    def files(self) -> dict[str, PortFile]:
        """The ports of files, as ``portfiles.load`` gave them."""
        return {
            name: PortFile(port.source, parse_port(name, port.text, f"port {name}"))
            for name, port in self.ports.items()
        }


@dataclass(frozen=True)
class Taken:
    """What is taken from one NIC: its permanent MAC, the addresses, and those that have no lifetime."""

    mac: str
    addresses: tuple[str, ...]
    lasting: tuple[str, ...]


@dataclass(frozen=True)
class Pending:
    """A takeover that waits for its confirmation until ``deadline``, in seconds since boot.

    ``token`` tells it from every other one. Without ``former`` nothing was in force before. ``boot``
    is the kernel's random id of the boot that it belongs to.
    """

    boot: str
    deadline: float
    nics: Mapping[str, Taken]
    former: Former | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def left(self) -> float:
        """Seconds until it is taken back; negative when it should have been."""
        return self.deadline - now()

    def until(self, within: float) -> Pending:
        """The same with ``within`` seconds from now on."""
        return replace(self, deadline=now() + within)


_PENDING = TypeAdapter(Pending)
_CONFIRMED = TypeAdapter(list[Confirmation])


def now() -> float:
    """Seconds since boot; time in suspend counts."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def taken(network: HostNetwork, nics: Mapping[str, tuple[str, ...]]) -> dict[str, Taken]:
    """What a plan takes from ``nics``, addresses by NIC, without what was confirmed before."""
    found = {}
    for nic, addresses in nics.items():
        if not network.is_confirmed(nic):
            on = {address: how for address, how in network.addresses(nic).items() if address in addresses}
            lasting = tuple(address for address, how in on.items() if how.valid is None)
            found[nic] = Taken(network.macs[nic], tuple(on), lasting)
    return found


def load_pending(path: Path, boot: str) -> Pending | None:
    """The takeover that waits, if one does in this boot. Raises ``OffloadError`` when it cannot be read."""
    content = _read(path)
    if content is None:
        return None
    try:
        pending = _PENDING.validate_json(content)
    except ValidationError as error:
        raise OffloadError(
            f"{path}: not a takeover that waits ({error.error_count()} errors): `offload detach --all` "
            "gives all addresses back; then remove this file"
        ) from error
    return pending if pending.boot == boot else None


def save_pending(path: Path, pending: Pending) -> None:
    """Write down that a takeover waits; on disk when this returns."""
    _write(path, _PENDING.dump_json(pending))


def clear_pending(path: Path) -> None:
    """No takeover waits any more. Idempotent."""
    path.unlink(missing_ok=True)


def confirmed(path: Path) -> frozenset[Confirmation]:
    """Every takeover that was confirmed. Raises ``OffloadError`` when the file cannot be read."""
    content = _read(path)
    if content is None:
        return frozenset()
    try:
        return frozenset(_CONFIRMED.validate_json(content))
    except ValidationError as error:
        raise OffloadError(
            f"{path}: not a list of confirmed takeovers: remove it, and confirm the next takeover again"
        ) from error


def confirm(path: Path, pending: Pending) -> None:
    """Remember that what waits was confirmed; on disk when this returns."""
    new = [Confirmation(one.mac, frozenset(one.lasting)) for one in pending.nics.values()]
    macs = {row.mac for row in new}
    kept = [row for row in confirmed(path) if row.mac not in macs]
    _save_confirmed(path, [*kept, *new])


def forget(path: Path, macs: Collection[str]) -> None:
    """Takeovers of these NICs, by permanent MAC, have to be confirmed again; on disk when this returns."""
    before = confirmed(path)
    kept = [row for row in before if row.mac not in macs]
    if len(kept) < len(before):
        _save_confirmed(path, kept)


def _save_confirmed(path: Path, rows: Iterable[Confirmation]) -> None:
    _write(path, _CONFIRMED.dump_json(sorted(rows, key=lambda row: row.mac)))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise PrivilegeError(f"{path} may not be read: run as root") from error
    except OSError as error:
        raise OffloadError(f"{path}: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    """Replace a file as a whole, so that a crash leaves the old one or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        replace_durably(path, content, 0o600)
    except PermissionError as error:
        raise PrivilegeError(f"{path} may not be written: run as root") from error
    except OSError as error:
        raise OffloadError(f"{path}: {error.strerror}") from error
