"""The watchdog of a takeover: takes it back when its time runs out and no daemon has done so.

``python -m offload.takeover_watch TOKEN RUN_DIR STATE_DIR PIN_DIR`` returns when the watch stands, in a
process of its own that is no child of the daemon's and outlives it. It ends when the
takeover with this token was confirmed or taken back.

Once the time is up, the daemon is asked; if there is none, everything is done here. A daemon that
neither answers nor ends is killed: a host that cannot be reached is worse than one without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

from .client import Client, NoDaemonError
from .errors import OffloadError
from .kernel import host
from .paths import Paths
from .takeovers import load_pending

log = logging.getLogger(__name__)

_POLL = 0.5  # seconds
_GRACE = 3.0
"""Seconds beyond the deadline that are the daemon's own."""
_PATIENCE = 30.0
"""Seconds that the daemon has for it when it is asked."""
_ATTEMPTS = 10
_PAUSE = 3.0  # seconds between two attempts


def main(token: str, paths: Paths) -> int:
    """Watch over the takeover ``token``; the exit code, 1 if it could not be taken back."""
    daemon = os.pidfd_open(os.getppid())
    # The caller waits for its child: when that ends, a grandchild watches.
    if os.fork():
        return 0
    os.setsid()
    boot = host.boot_id()
    while (pending := load_pending(paths.pending, boot)) and pending.token == token:
        if pending.left() > -_GRACE:
            time.sleep(_POLL)
        else:
            return _take_back(token, boot, paths, daemon)
    return 0


def _take_back(token: str, boot: str, paths: Paths, daemon: int) -> int:
    from . import operate

    for _ in range(_ATTEMPTS):
        try:
            _ask(paths, daemon)
        except NoDaemonError:
            try:
                operate.roll_back_without_daemon(paths)
            except OffloadError as error:
                log.error("could not take the takeover back: %s", error)
        except OffloadError as error:
            log.error("the daemon could not take the takeover back: %s", error)
        pending = load_pending(paths.pending, boot)
        if pending is None or pending.token != token:
            return 0
        time.sleep(_PAUSE)
    return 1


def _ask(paths: Paths, daemon: int) -> None:
    """Let the daemon do it. Raises NoDaemonError when there is none, or none any more."""
    try:
        with Client(paths.socket, _PATIENCE) as client:
            client.rollback()
    except NoDaemonError:
        raise
    except OffloadError as error:
        log.error("the daemon is killed, because it did not take the takeover back: %s", error)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(daemon, signal.SIGKILL)
        raise NoDaemonError("the daemon was killed") from error


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s takeover: %(message)s")
    sys.exit(main(sys.argv[1], Paths(*map(Path, sys.argv[2:5]))))
