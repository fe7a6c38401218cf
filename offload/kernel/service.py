"""What a daemon owes its surroundings: readiness told to systemd, and being alone."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OffloadError, PrivilegeError


def notify(state: str) -> None:
    """Send ``state`` (``READY=1``, ``STATUS=…``) to systemd; nothing happens without it. See sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.send(state.encode())


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, which is made where it is missing, against a second daemon."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise PrivilegeError(
            f"{run_dir} cannot be written: run as root, or name another --run-dir"
        ) from error
    except OSError as error:
        raise OffloadError(f"{run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OffloadError(
            f"another offload is using {run_dir}: stop it, or name another --run-dir"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)
