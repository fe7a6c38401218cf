"""The Python bridges' processes, and what they are told: files below ``RUN_DIR/bridges``.

Such a process lives without the controller: it is started once, in a session (or a systemd
unit) of its own, and finds out by itself when its roster is replaced. While it runs it
holds a lock on ``SWITCH.lock``, which has its process id inside (``offload.bridge.supervisor``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

from offload.bridge.membership import Configured, Member, Membership, Role, load, membership_file, write
from offload.bridge.state import state_file
from offload.config import conduit_inner
from offload.errors import KernelError
from offload.paths import Paths

_Entry = tuple[int, str, Role, tuple[int, ...], bool, tuple[str, ...], bool]
"""One device of a ``model.Roster``."""
_PATIENCE = 10.0
"""Seconds until a process that does not start or end is a failure."""


def rosters(paths: Paths) -> dict[str, tuple[object, ...]]:
    """What each bridge is told of its devices, by switch: the values of ``model.Roster``.

    Raises ConfigError for a file that is wrong, OffloadError for one that cannot be read.
    """
    found: dict[str, tuple[object, ...]] = {}
    for file in sorted(paths.bridges.glob("*.json")):
        if file.name.endswith(".stats.json"):
            continue
        told = load(paths.run_dir, file.stem)
        extensions = json.dumps([extension.entry() for extension in told.extensions])
        found[told.switch] = (tuple(map(_entry, told.members)), extensions)
    return found


def write_roster(paths: Paths, switch: str, value: tuple[object, ...] | None) -> None:
    """Replace a switch's file in one step; ``None`` removes it and what the process left beside it.

    Raises ConfigError when no bridge could read it.
    """
    if value is None:
        for left in (membership_file(paths.run_dir, switch), state_file(paths.run_dir, switch)):
            left.unlink(missing_ok=True)
        return
    paths.bridges.mkdir(mode=0o750, parents=True, exist_ok=True)
    entries, extensions = cast(tuple[tuple[_Entry, ...], str], value)
    told = Membership(
        switch,
        conduit_inner(switch),
        tuple(map(_member, entries)),
        tuple(Configured(entry.pop("name"), entry) for entry in json.loads(extensions)),
    )
    write(paths.run_dir, told)


def running(paths: Paths, switch: str) -> bool:
    """Whether the switch's process runs."""
    return _holder(paths.bridge_lock(switch)) is not None


def start(paths: Paths, switch: str) -> None:
    """Start the switch's process and wait until it has its lock."""
    paths.bridges.mkdir(mode=0o750, parents=True, exist_ok=True)
    if "INVOCATION_ID" in os.environ:
        # Under systemd, a child of ours would end with our unit.
        _systemctl("start", switch)
    else:
        with _log_file(paths, switch).open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "offload.bridge", "--run-dir", str(paths.run_dir), switch],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    _wait(paths, switch, there=True)


def stop(paths: Paths, switch: str) -> None:
    """End the switch's process and wait until it is gone; one that does not run is as it should be."""
    if "INVOCATION_ID" in os.environ:
        _systemctl("stop", switch)
    else:
        holder = _holder(paths.bridge_lock(switch))
        if holder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder, signal.SIGTERM)
    _wait(paths, switch, there=False)
    for left in (paths.bridge_lock(switch), _log_file(paths, switch)):
        left.unlink(missing_ok=True)


def _log_file(paths: Paths, switch: str) -> Path:
    return paths.bridges / f"{switch}.log"


def _holder(lock: Path) -> int | None:
    """The process that holds the lock, ``None`` when nobody does."""
    try:
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
            return None
    except FileNotFoundError:
        return None


def _systemctl(verb: str, switch: str) -> None:
    unit = f"offload-bridge@{switch}.service"
    done = subprocess.run(["systemctl", verb, unit], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise KernelError(f"could not {verb} {unit}: {done.stderr.strip()}")


def _wait(paths: Paths, switch: str, *, there: bool) -> None:
    end = time.monotonic() + _PATIENCE
    while running(paths, switch) != there:
        if time.monotonic() > end:
            log = _log_file(paths, switch)
            said = log.read_text()[-500:] if log.exists() else "journalctl tells why"
            raise KernelError(f"the Python bridge of {switch} does not {'start' if there else 'end'}: {said}")
        time.sleep(0.02)


def _entry(member: Member) -> _Entry:
    vids = tuple(sorted(member.vids))
    return (member.id, member.name, member.role, vids, member.flood, member.macs, member.link_local)


def _member(entry: _Entry) -> Member:
    port_id, name, role, vids, flood, macs, link_local = entry
    return Member(port_id, name, role, frozenset(vids), True, flood, macs, link_local)
