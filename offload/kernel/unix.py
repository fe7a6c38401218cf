"""The listening end of the API's unix socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from offload.errors import ForeignError, KernelError, PrivilegeError, UsageError

_BACKLOG = 64


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
    new = path.with_name(f"{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        new.unlink(missing_ok=True)
        sock.bind(str(new))
        new.chmod(mode)
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
        return PrivilegeError(f"{path}: may not make the API's socket there ({error.strerror}); run as root")
    if error.errno is None:
        return UsageError(
            f"{path}: too long for a unix socket (107 bytes at most); choose a shorter --run-dir"
        )
    return KernelError(f"{path}: {error.strerror}")
