"""What a daemon owes its surroundings: readiness told to systemd, and being the only one."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ForeignError, OffloadError, PrivilegeError


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


@contextmanager
def claimed(pins: Path, *, keep: bool) -> Iterator[None]:
    """Hold a directory of pinned objects against a second daemon, for the network namespace we are in.

    Pins go by ifindex, which in another namespace means another device. So the namespace is
    noted beside them, as a symbolic link: a BPF file system takes no other file. ``keep`` false
    holds nothing and notes nothing. Raises ForeignError when the pins are somebody else's.
    """
    here = os.readlink("/proc/thread-self/ns/net")
    note = pins / "netns"
    there = os.readlink(note) if note.is_symlink() else here
    if there != here:
        raise ForeignError(
            f"{pins} is in use in another network namespace ({there}, this one is {here}): "
            "run offload there (`nsenter --net=/run/netns/NAME`), or name another --pin-dir; "
            f"if that one is gone, `rm -r {pins}`"
        )
    if not keep:
        yield
        return
    try:
        pins.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(pins, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PrivilegeError(f"{pins} cannot be made or opened: {error.strerror}; run as root") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ForeignError(
                f"another offload is using {pins}: use its --run-dir too, or name another --pin-dir"
            ) from error
        if not note.is_symlink():
            note.symlink_to(here)
        yield
    finally:
        os.close(descriptor)
