"""What can go wrong, named for who has to act, with the remedy in the message."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

ENOTSUPP = 524
"""An errno of the kernel's own that some drivers let out; the C library does not know it."""


class XskError(OSError):
    """An AF_XDP operation failed. ``errno`` is the kernel's, ``str()`` says what to do.

    ``device`` and ``queue`` are those that it was about, or None.
    """

    def __init__(
        self, number: int, message: str, device: str | None = None, queue: int | None = None
    ) -> None:
        super().__init__(number, message)
        self.message = message
        self.device = device
        self.queue = queue

    def __str__(self) -> str:
        return self.message


class PrivilegeError(XskError):
    """The process lacks a capability, which the message names."""


class BusyError(XskError):
    """The queue, or the device's place for an XDP program, belongs to somebody else."""


class UnsupportedError(XskError):
    """This kernel or this driver cannot do what was asked."""


class DeviceError(XskError):
    """The device is not there, is down, or went away."""


class LimitError(XskError):
    """Not enough memory, or not enough that may be locked."""


_CLASSES: Mapping[int, type[XskError]] = {
    errno.EPERM: PrivilegeError,
    errno.EACCES: PrivilegeError,
    errno.EBUSY: BusyError,
    errno.EEXIST: BusyError,
    errno.EOPNOTSUPP: UnsupportedError,
    errno.EAFNOSUPPORT: UnsupportedError,
    errno.ENOPROTOOPT: UnsupportedError,
    errno.ENOSYS: UnsupportedError,
    ENOTSUPP: UnsupportedError,
    errno.ENODEV: DeviceError,
    errno.ENXIO: DeviceError,
    errno.ENETDOWN: DeviceError,
    errno.ENOBUFS: LimitError,
    errno.ENOMEM: LimitError,
}


def explain(
    number: int,
    doing: str,
    remedies: Mapping[int, str] | None = None,
    device: str | None = None,
    queue: int | None = None,
) -> XskError:
    """The error for an errno. ``doing`` completes "cannot …"; ``remedies`` has a sentence for each errno."""
    reason = "not supported by the driver" if number == ENOTSUPP else os.strerror(number)
    remedy = (remedies or {}).get(number)
    message = f"cannot {doing}: {reason}" + (f". {remedy}" if remedy else "")
    return _CLASSES.get(number, XskError)(number, message, device, queue)
