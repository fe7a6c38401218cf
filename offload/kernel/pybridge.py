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
from collections.abc import Iterator
from pathlib import Path

from offload.config import conduit_inner
from offload.errors import KernelError
from offload.paths import Paths

_ENTRY = ("id", "name", "role", "vids", "flood", "macs", "link_local")
_PATIENCE = 10.0
"""Seconds until a process that does not start or end is a failure."""


def rosters(paths: Paths) -> dict[str, tuple[object, ...]]:
    """What each bridge is told of its devices, by switch: the values of ``model.Roster``."""
    found: dict[str, tuple[object, ...]] = {}
    for file in sorted(paths.bridges.glob("*.json")):
        if file.name.endswith(".stats.json"):
            continue
        document = json.loads(file.read_text())
        entries = [tuple(_value(entry[key]) for key in _ENTRY) for entry in document["members"]]
        found[str(document["switch"])] = (tuple(entries), json.dumps(document["extensions"]))
    return found


def write_roster(paths: Paths, switch: str, value: tuple[object, ...] | None) -> None:
    """Replace a switch's file in one step; ``None`` removes it and what the process left beside it."""
    file = paths.bridges / f"{switch}.json"
    if value is None:
        for left in (file, paths.bridges / f"{switch}.stats.json"):
            left.unlink(missing_ok=True)
        return
    paths.bridges.mkdir(mode=0o750, parents=True, exist_ok=True)
    entries, extensions = value
    document = {
        "version": 1,
        "switch": switch,
        "inner": conduit_inner(switch),
        "members": [{**dict(zip(_ENTRY, entry, strict=True)), "learn": True} for entry in _tuples(entries)],
        "extensions": json.loads(str(extensions)),
    }
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(document))
    draft.replace(file)


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
        with (paths.bridges / f"{switch}.log").open("ab") as log:
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
    for left in ("lock", "log"):
        (paths.bridges / f"{switch}.{left}").unlink(missing_ok=True)


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
            log = paths.bridges / f"{switch}.log"
            said = log.read_text()[-500:] if log.exists() else "journalctl tells why"
            raise KernelError(f"the Python bridge of {switch} does not {'start' if there else 'end'}: {said}")
        time.sleep(0.02)


def _tuples(entries: object) -> Iterator[tuple[object, ...]]:
    if not isinstance(entries, tuple):
        raise TypeError(f"{entries!r} are no devices")
    yield from entries


def _value(item: object) -> object:
    return tuple(item) if isinstance(item, list) else item
