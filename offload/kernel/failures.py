"""The one place where an errno of the network stack becomes an error for a person."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from offload.errors import KernelError, OffloadError, PrivilegeError, UnsupportedError

_READ_ONLY = "/proc or /sys is read-only here: run outside the container, or mount it writable"
_UNSUPPORTED = {
    errno.EOPNOTSUPP: "this kernel or driver does not have it",
    errno.EAFNOSUPPORT: "this kernel does not have it",
}
_REMEDY = {
    errno.ENODEV: "the device is gone: see `ip link`",
    errno.ENXIO: "the device is gone: see `ip link`",
    errno.ENOENT: "it is not there any more",
    errno.EEXIST: "the name is taken: choose another, or remove what has it",
    errno.EBUSY: "something else holds the device: see `ip -details link`",
    errno.EXFULL: "the bridge is full: it takes 1023 ports",
    errno.ELOOP: "a bridge cannot be a port of a bridge",
    errno.ENETDOWN: "the device is down: `ip link set DEVICE up`",
    errno.ENOBUFS: "the kernel has no memory for it",
    errno.ENOMEM: "the kernel has no memory for it",
    errno.ETIMEDOUT: "the kernel did not answer in time",
}


def explain(error: OSError, device: str, doing: str, privilege: str = "CAP_NET_ADMIN") -> OffloadError:
    """The error for a person: ``device: cannot DOING: what the kernel said (remedy)``.

    ``privilege`` is what the operation needs, should that be what was missing.
    """
    code = error.errno or 0
    said = f"{device}: cannot {doing}: {error.strerror or error}"
    if code in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"{said} (needs {privilege}: run as root, or give the service that capability)")
    if code == errno.EROFS:
        return PrivilegeError(f"{said} ({_READ_ONLY})")
    if code in _UNSUPPORTED:
        return UnsupportedError(f"{said} ({_UNSUPPORTED[code]})")
    return KernelError(f"{said} ({_REMEDY[code]})" if code in _REMEDY else said)


@contextmanager
def explained(device: str, doing: str, privilege: str = "CAP_NET_ADMIN") -> Iterator[None]:
    """Turn an ``OSError`` of the body into the error of ``explain``, with its cause kept."""
    try:
        yield
    except OSError as error:
        raise explain(error, device, doing, privilege) from error
