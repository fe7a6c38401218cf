"""Starting the process that takes a takeover back when nobody else does."""

from __future__ import annotations

import subprocess
import sys

from ..errors import OffloadError
from ..paths import Paths

_PATIENCE = 30.0  # seconds


def watch(token: str, paths: Paths) -> None:
    """Start ``offload.takeover_watch`` for the takeover ``token``; it stands when this returns.

    It is in a session of its own and no child of ours, and it outlives us. Raises ``OffloadError``
    when it cannot be started: then nothing may be taken over.
    """
    command = [
        *(sys.executable, "-m", "offload.takeover_watch", token),
        *map(str, (paths.run_dir, paths.state_dir, paths.pin_dir)),
    ]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OffloadError(f"the watchdog of the takeover does not start: {error}") from error
    if done.returncode != 0:
        raise OffloadError(
            f"the watchdog of the takeover does not start: exit {done.returncode}; see the log"
        )
