"""Addresses for ports with ``mac: auto``, drawn from the host's range and kept in a file.

A port keeps its address for as long as it holds it: over restarts, reboots and changes of
everything else. It is given another one only when its address now stands in the config
as another port's, or lies outside a range that was changed. Nobody is given an address
that is in use on the network.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from offload.config import Config, mac_octets, parse_mac
from offload.errors import ConfigError, OffloadError, PrivilegeError, Problem
from offload.files import replace_durably


class MacRangeExhaustedError(ConfigError):
    """The range has no free address; the operator widens it or removes ports."""


class MacAllocator:
    """Addresses by port name in the JSON file ``path``, from ``first`` to ``last`` inclusive.

    Safe between processes: each change holds a lock file beside ``path``, is written to a
    new file, synced, and renamed over the old one. Raises ConfigError when the range is
    none, PrivilegeError or OffloadError when the file cannot be read or written.
    """

    def __init__(self, path: Path, first: str, last: str) -> None:
        if first > last:
            raise ConfigError(
                [Problem("mac_range.last", last, f"must not be below mac_range.first, {first}")]
            )
        self._path = path
        self._first = _number(first)
        self._last = _number(last)

    def held(self) -> Mapping[str, str]:
        """Every port name that holds an address, whether or not its port exists now."""
        with _errors_of(self._path):
            return self._read()

    def assign(
        self,
        names: Collection[str],
        taken: Collection[str],
        heard: Collection[str] = (),
        *,
        keep: bool = True,
    ) -> dict[str, str]:
        """An address for each of ``names``: all of them or none.

        ``taken`` are addresses that nobody may have. ``heard`` are in use on the network: they are not
        given anew, but who holds one keeps it, as it may well be the one who was heard. With ``keep`` false
        the answer is what would be given now, and nothing is written. Raises MacRangeExhaustedError.
        """
        if not keep:
            with _errors_of(self._path):
                return self._with(self._read(), names, taken, heard)[0]
        with self._locked() as held:
            given, after = self._with(held, names, taken, heard)
            if after != held:
                self._write(after)
            return given

    def release(self, name: str) -> None:
        """Makes the address of ``name`` free for others; a name without one is fine."""
        with self._locked() as held:
            if name in held:
                self._write({port: mac for port, mac in held.items() if port != name})

    def _with(
        self, held: Mapping[str, str], names: Collection[str], taken: Collection[str], heard: Collection[str]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """What ``names`` get, and everything that is held after that."""
        asking, blocked = set(names), set(taken)
        after = {name: mac for name, mac in held.items() if name not in asking or self._fits(mac, blocked)}
        used = {*blocked, *after.values(), *heard}
        free = (mac for number in range(self._first, self._last + 1) if (mac := _text(number)) not in used)
        for name in names:
            if name in after:
                continue
            found = next(free, None)
            if found is None:
                raise self._exhausted(name, blocked, set(heard) - blocked - set(after.values()))
            after[name] = found
        return {name: after[name] for name in names}, after

    def _fits(self, mac: str, blocked: Collection[str]) -> bool:
        return self._first <= _number(mac) <= self._last and mac not in blocked

    def _exhausted(
        self, name: str, taken: Collection[str], strange: Collection[str]
    ) -> MacRangeExhaustedError:
        size = self._last - self._first + 1
        fixed, foreign = self._within(taken), self._within(strange)
        used = [
            f"{size - fixed - foreign} are held by ports with mac: auto",
            f"{fixed} are written in the config",
            *([f"{foreign} are used by others on the network"] if foreign else []),
        ]
        reason = (
            f"no address is left for port {name}: of {size} in the range, {', '.join(used[:-1])} "
            f"and {used[-1]}; widen the range, or remove ports"
        )
        shown = f"{_text(self._first)} to {_text(self._last)}"
        return MacRangeExhaustedError([Problem("mac_range", shown, reason)])

    def _within(self, macs: Collection[str]) -> int:
        return sum(self._first <= _number(mac) <= self._last for mac in macs)

    @contextmanager
    def _locked(self) -> Iterator[dict[str, str]]:
        # Each write replaces the file itself, so the lock needs one that stays.
        with _errors_of(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_name(self._path.name + ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self._read()

    def _read(self) -> dict[str, str]:
        try:
            held = {
                name: parse_mac(mac) for name, mac in json.loads(self._path.read_bytes())["ports"].items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(self._path) from error
        if len(set(held.values())) != len(held):
            raise _damaged(self._path)
        return held

    def _write(self, held: Mapping[str, str]) -> None:
        replace_durably(self._path, json.dumps({"ports": held}, indent=1).encode(), 0o666)


def resolve_auto(
    config: Config, allocator: MacAllocator, heard: Collection[str] = (), *, keep: bool = True
) -> Config:
    """``config`` with an address for every ``mac: auto``; none of those ``heard`` is drawn.

    With ``keep`` false nothing is written, for a plan. Raises MacRangeExhaustedError.
    """
    asking = [name for name, port in config.ports.items() if port.mac == "auto"]
    taken = {mac for port in config.ports.values() if port.mac != "auto" for mac in port.mac}
    hosts = (switch.host for switch in config.switches.values())
    taken.update(host.mac for host in hosts if host is not None and host.mac is not None)
    given = allocator.assign(asking, taken, heard, keep=keep)
    ports = {
        name: port.model_copy(update={"mac": (given[name],)}) if name in given else port
        for name, port in config.ports.items()
    }
    return config.model_copy(update={"ports": ports})


def _number(mac: str) -> int:
    return int.from_bytes(mac_octets(mac), "big")


def _text(number: int) -> str:
    return number.to_bytes(6, "big").hex(":")


def _damaged(path: Path) -> OffloadError:
    return OffloadError(f"{path}: damaged: restore it, or remove it to have addresses given anew")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        needs = "mac: auto keeps its addresses there"
        raise PrivilegeError(f"{error.filename or path}: no permission: {needs}") from error
    except OSError as error:
        raise OffloadError(f"{error.filename or path}: {error.strerror}") from error
