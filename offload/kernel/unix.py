"""The listening ends of our unix sockets: the API's, and those of consumers of AF_XDP ports."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Container, Sequence
from pathlib import Path

from offload.errors import ForeignError, KernelError, PrivilegeError, UsageError

_BACKLOG = 64
_UCRED = struct.Struct("=iII")  # struct ucred, include/linux/socket.h


def listen(path: Path, mode: int = 0o660) -> socket.socket:
    """A listening stream socket at ``path`` with the permissions ``mode``.

    It is bound under a temporary name and renamed when its permissions are right,
    so that nobody can connect before that. A socket that a dead process left at
    ``path`` is replaced. The file outlives the process; remove it after closing.

    Raises ForeignError when a living process answers at ``path`` or when it is not a
    socket, PrivilegeError when the directory may not be written, UsageError when
    the path is longer than the 107 bytes of ``sun_path``, KernelError otherwise.
    """
    _refuse_taken(path)
    return _listening(path, socket.SOCK_STREAM, mode)


def listen_for(path: Path, owner: tuple[int, int]) -> socket.socket:
    """A listening SOCK_SEQPACKET socket at ``path``, which uid and gid ``owner`` and root may connect to.

    Its directory is made where it is missing. Unless ``owner`` is root, everybody may pass it and the one
    above it, not list them. Errors as with ``listen``, except that whoever answers there is replaced:
    the caller holds the run directory, and need not have the right to connect to a user's socket.
    """
    directory = path.parent
    try:
        directory.mkdir(mode=0o711, exist_ok=True)
        directory.chmod(0o711)  # less the umask until now
        if owner != (0, 0):
            directory.parent.chmod(stat.S_IMODE(directory.parent.stat().st_mode) | stat.S_IXOTH)
        if path.exists() and not path.is_socket():
            raise ForeignError(f"{path}: is not a socket; move it away")
    except OSError as error:
        raise _explain(error, path) from error
    return _listening(path, socket.SOCK_SEQPACKET, 0o600, owner)


def send(sock: socket.socket, message: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send a message with copies of file descriptors (SCM_RIGHTS).

    Raises OSError when the other side went away, or ``sock`` does not block and has no room.
    """
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))
    sock.sendmsg([message], [rights] if descriptors else [])


def hang_up(sock: socket.socket) -> None:
    """End a connection for whoever reads from either end of it; ``sock`` stays open."""
    with contextlib.suppress(OSError):  # the other side was faster
        sock.shutdown(socket.SHUT_RDWR)


def remove_sockets(directory: Path, keep: Container[Path]) -> None:
    """Remove the sockets in a directory that are not to be kept; other files stay."""
    for file in directory.glob("*"):
        if file not in keep and file.is_socket():
            file.unlink(missing_ok=True)


def credentials(connected: socket.socket) -> tuple[int, int]:
    """Process id and uid of whoever connected a unix socket, as they were then (SO_PEERCRED)."""
    pid, uid, _ = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def _listening(
    path: Path, kind: socket.SocketKind, mode: int, owner: tuple[int, int] | None = None
) -> socket.socket:
    new = path.with_name(f"{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        new.unlink(missing_ok=True)
        sock.bind(str(new))
        new.chmod(mode)
        if owner:
            os.chown(new, *owner)
        sock.listen(_BACKLOG)
        new.rename(path)
    except OSError as error:
        sock.close()
        new.unlink(missing_ok=True)
        raise _explain(error, path) from error
    return sock


def _refuse_taken(path: Path) -> None:
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _explain(error, path) from error
    if not stat.S_ISSOCK(kind):
        raise ForeignError(f"{path}: is not a socket; move it away, or choose another --run-dir")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody is there, if busy
        except OSError as error:
            raise _explain(error, path) from error
    raise ForeignError(
        f"{path}: another offload answers there; stop it first (systemctl stop offload), "
        "or give this one its own --run-dir, --state-dir and --pin-dir"
    )


def _explain(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PrivilegeError(f"{path}: may not make a socket there ({error.strerror}); run as root")
    if error.errno is None:
        return UsageError(
            f"{path}: too long for a unix socket (107 bytes at most); choose a shorter --run-dir"
        )
    return KernelError(f"{path}: {error.strerror}")
