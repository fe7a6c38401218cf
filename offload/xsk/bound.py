"""AF_XDP sockets bound to a queue: made, adopted from another process, asked for their state.

Nothing here looks at frames, and this module does without NumPy. That is for programs which only make
sockets and hand them over. ``Socket`` sends and receives on what is made here.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from . import abi, libc
from .closing import Closing
from .errors import ENOTSUPP, XskError, explain
from .ringmap import RingMap
from .umem import Umem, UmemShape

Copy = Literal["auto", "copy", "zero-copy"]
"""Who moves frames: the kernel's choice, always the kernel (XDP_COPY), or the NIC (XDP_ZEROCOPY)."""

_CREATE = {
    errno.EPERM: "CAP_NET_RAW is needed in the network namespace of the device",
    errno.EAFNOSUPPORT: "This kernel was built without CONFIG_XDP_SOCKETS",
}
_REGISTER = {
    errno.ENOBUFS: "The UMEM is more than may be locked: raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=), "
    "make the UMEM smaller, or run with CAP_IPC_LOCK",
    errno.ENOMEM: "There is not enough memory for the UMEM: make it smaller",
    errno.EINVAL: "This kernel does not take chunks of that size",
}
_BUSY_POLL = {
    errno.EPERM: "CAP_NET_ADMIN is needed for busy polling",
    errno.ENOPROTOOPT: "Busy polling for AF_XDP needs Linux 5.11",
}
_MAP = {
    errno.EINVAL: "The socket has no such ring, or one with fewer entries",
    errno.EBUSY: "Before Linux 6.4 the rings of a socket that is bound already cannot be mapped",
}
_WAKEUP = {
    errno.ENETDOWN: "The device is down, or gone: make a new socket when it is back",
    errno.ENXIO: "The device is gone: make a new socket when it is back",
}
_BUSY_AGAIN = 0.005  # seconds
_TRY_LATER = (errno.EAGAIN, errno.EBUSY, errno.ENOBUFS)


@dataclass(frozen=True)
class RingSizes:
    """Entries of each ring, powers of two. Without an ``rx`` or a ``tx`` ring (0) nothing goes that way.

    Whoever has a socket that was bound without a TX ring can never send on it, and nobody can add
    one. ``fill`` and ``completion`` are None for rings that hold every frame of the UMEM, so that they
    never overflow.
    """

    rx: int = 2048
    tx: int = 2048
    fill: int | None = None
    completion: int | None = None

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size is not None and (size < 0 or size & (size - 1)):
                raise ValueError(f"the {name} ring has {size} entries: must be a power of two")
        if not self.rx and not self.tx:
            raise ValueError("a socket needs an RX ring or a TX ring")
        if self.fill == 0 or self.completion == 0:
            raise ValueError("the kernel wants a fill and a completion ring, even if one is not used")

    def complete(self, frames: int) -> RingSizes:
        """The same with every size set, for a UMEM of so many frames."""
        enough = 1 << (frames - 1).bit_length()
        return RingSizes(self.rx, self.tx, self.fill or enough, self.completion or enough)


@dataclass(frozen=True)
class BusyPoll:
    """Let this process drive the NIC's queue (SO_PREFER_BUSY_POLL), no interrupt.

    microseconds  how long one system call may poll
    budget        most frames that one poll takes

    It wants ``napi_defer_hard_irqs`` and ``gro_flush_timeout`` of the device set (Linux's
    Documentation/networking/napi.rst), and CAP_NET_ADMIN when the socket is made.
    """

    microseconds: int = 20
    budget: int = 64


@dataclass(frozen=True)
class Statistics:
    """What the kernel lost on a socket, since it was bound.

    rx_dropped                RX: too long for a chunk, or no memory
    rx_invalid_descs          fill ring: an address that is not in the UMEM
    tx_invalid_descs          TX ring: a descriptor that is wrong
    rx_ring_full              RX: the program did not take frames from the RX ring in time
    rx_fill_ring_empty_descs  RX: the program gave back no frames in time
    tx_ring_empty_descs       how often the kernel found nothing to send; no loss
    """

    rx_dropped: int
    rx_invalid_descs: int
    tx_invalid_descs: int
    rx_ring_full: int
    rx_fill_ring_empty_descs: int
    tx_ring_empty_descs: int


@dataclass(frozen=True)
class Particulars:
    """What a user of a socket has to know and cannot ask the kernel: goes along when it is handed over.

    ``device`` and ``queue`` are where it is bound, as named in the namespace of whoever bound it.
    """

    device: str
    queue: int
    umem: UmemShape
    rings: RingSizes
    need_wakeup: bool
    multi_buffer: bool

    def document(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """From ``document()``. Raises ValueError for anything else."""
        values = dict(document)
        try:
            umem, rings = UmemShape(**values.pop("umem")), RingSizes(**values.pop("rings"))
            return cls(umem=umem, rings=rings, **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the particulars of an AF_XDP socket: {error}") from error


class BoundSocket(Closing):
    """An AF_XDP socket, the UMEM it uses, and its rings in memory.

    ``rx`` and ``tx`` are None when the socket has no such ring. The rings belong to one user at a time:
    a process that hands the socket over may only look at ``filled``.

    ``close`` lets go of the socket; the queue is free when nobody else has it. The UMEM stays open.
    """

    rx: RingMap | None
    tx: RingMap | None
    fill: RingMap
    completion: RingMap

    def __init__(self, sock: socket.socket, umem: Umem, particulars: Particulars) -> None:
        """A socket that has its rings; closes it when that fails. Use ``bind`` or ``adopt``."""
        self.umem = umem
        self.particulars = particulars
        self._socket = sock
        self._held = ExitStack()
        self._held.enter_context(sock)
        try:
            self._map_rings(particulars.rings.complete(particulars.umem.frames))
        except BaseException:
            self._held.close()
            raise
        if umem.registrar < 0:
            umem.registrar = sock.fileno()
            self._held.callback(setattr, umem, "registrar", -1)

    def _map_rings(self, rings: RingSizes) -> None:
        raw = self._socket.getsockopt(abi.SOL_XDP, abi.XDP_MMAP_OFFSETS, abi.MMAP_OFFSETS.size)
        offsets = abi.MMAP_OFFSETS.unpack(raw)

        def mapped(name: str, size: int | None, place: int, first: int, entry: int) -> RingMap:
            assert size
            with _explained(f"map the {name} ring of {size} entries", _MAP, self._where):
                ring = RingMap(self.fileno(), place, offsets[first : first + 4], size, entry)
            return self._held.enter_context(ring)

        frame, address = abi.DESCRIPTOR.size, abi.ADDRESS.size
        self.rx = mapped("RX", rings.rx, abi.XDP_PGOFF_RX_RING, 0, frame) if rings.rx else None
        self.tx = mapped("TX", rings.tx, abi.XDP_PGOFF_TX_RING, 4, frame) if rings.tx else None
        self.fill = mapped("fill", rings.fill, abi.XDP_UMEM_PGOFF_FILL_RING, 8, address)
        place = abi.XDP_UMEM_PGOFF_COMPLETION_RING
        self.completion = mapped("completion", rings.completion, place, 12, address)

    @classmethod
    def bind(
        cls,
        umem: Umem,
        device: str,
        queue: int = 0,
        *,
        rings: RingSizes | None = None,
        copy: Copy = "auto",
        need_wakeup: bool = True,
        multi_buffer: bool = False,
        busy_poll: BusyPoll | None = None,
        patience: float = 1.0,
    ) -> Self:
        """Make a socket and bind it to a queue of ``device`` in the thread's network namespace.

        The first socket of a UMEM registers it. One that is bound later shares it (XDP_SHARED_UMEM)
        on another queue or device, and has ``copy``, ``need_wakeup`` and ``multi_buffer`` of the first.

        need_wakeup   the kernel says when it wants to be woken, instead of being called every time
        multi_buffer  frames longer than a chunk come in several descriptors (XDP_USE_SG, Linux 6.6)
        patience      seconds to wait for a queue that is busy: the kernel takes some milliseconds
                      to free the queue of a socket that was closed

        Raises PrivilegeError, BusyError, UnsupportedError, DeviceError, LimitError or another XskError.
        """
        rings = (rings or RingSizes()).complete(umem.shape.frames)
        particulars = Particulars(device, queue, umem.shape, rings, need_wakeup, multi_buffer)
        where = (device, queue)
        with _explained(f"make an AF_XDP socket for {device}", _CREATE, where):
            sock = socket.socket(abi.AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            if umem.registrar >= 0:
                flags, shared = abi.XDP_SHARED_UMEM, umem.registrar
            else:
                flags, shared = _bind_flags(copy, need_wakeup, multi_buffer), 0
                with _explained(f"register a UMEM of {umem.shape.size} bytes", _REGISTER, where):
                    _register(sock, umem)
            with _explained(f"make rings for {device}", _REGISTER, where):
                _make_rings(sock, rings)
            if busy_poll is not None:
                with _explained(f"have {device} polled", _BUSY_POLL, where):
                    _set_busy_poll(sock, busy_poll)
        except BaseException:
            sock.close()
            raise
        made = cls(sock, umem, particulars)  # kernels before 6.4 map no ring of a socket that is bound
        try:
            remedies = _bind_remedies(copy, multi_buffer)
            with _explained(f"bind to queue {queue} of {device}", remedies, where):
                address = (abi.AF_XDP, flags, _ifindex(device), queue, shared)
                _bind(sock, abi.SOCKADDR_XDP.pack(*address), patience)
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def adopt(cls, fd: int, umem: Umem, particulars: Particulars) -> Self:
        """A socket that another process bound; takes over ``fd``. Needs Linux 6.4, and no privilege.

        ``umem`` is that process's memory, see ``Umem.adopt``. Raises XskError when ``fd`` is no bound
        AF_XDP socket, or its rings are not those of ``particulars``.
        """
        sock = socket.socket(abi.AF_XDP, socket.SOCK_RAW, 0, fileno=fd)
        where = (particulars.device, particulars.queue)
        try:
            with _explained("take over a socket", {errno.EOPNOTSUPP: "It is not an AF_XDP socket"}, where):
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) != abi.AF_XDP:
                    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        except BaseException:
            sock.close()
            raise
        return cls(sock, umem, particulars)

    def fileno(self) -> int:
        """For select and poll, for XSKMAPs, and to hand over; -1 after ``close``."""
        return self._socket.fileno()

    @property
    def _where(self) -> tuple[str, int]:
        return self.particulars.device, self.particulars.queue

    @property
    def zero_copy(self) -> bool:
        """Whether the NIC moves the frames, as the kernel tells."""
        (flags,) = struct.unpack("=I", self._socket.getsockopt(abi.SOL_XDP, abi.XDP_OPTIONS, 4))
        return bool(flags & abi.XDP_OPTIONS_ZEROCOPY)

    @property
    def busy_polled(self) -> bool:
        """Whether it was bound with ``busy_poll``."""
        return self._socket.getsockopt(socket.SOL_SOCKET, abi.SO_PREFER_BUSY_POLL) != 0

    def statistics(self) -> Statistics:
        """What was lost so far."""
        raw = self._socket.getsockopt(abi.SOL_XDP, abi.XDP_STATISTICS, abi.STATISTICS.size)
        return Statistics(*abi.STATISTICS.unpack(raw))

    def wake_tx(self) -> bool:
        """Have the kernel send what is in the TX ring. False: it sent a part, wake it again.

        Raises DeviceError when the device is down or gone.
        """
        return self._wake("send on", lambda: self._socket.send(b"", socket.MSG_DONTWAIT))

    def wake_rx(self) -> bool:
        """Have the kernel fill the RX ring, by polling the NIC where that is set; else as ``wake_tx``."""
        return self._wake("receive on", lambda: self._socket.recv(1, socket.MSG_DONTWAIT))

    def _wake(self, doing: str, call: Callable[[], object]) -> bool:
        try:
            call()
        except OSError as error:
            if error.errno in _TRY_LATER:
                return False
            device, queue = self._where
            raise explain(error.errno or 0, f"{doing} {device}", _WAKEUP, device, queue) from error
        return True

    def close(self) -> None:
        self._held.close()


def _bind(sock: socket.socket, address: bytes, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            return libc.bind(sock.fileno(), address)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
        time.sleep(_BUSY_AGAIN)


def _bind_flags(copy: Copy, need_wakeup: bool, multi_buffer: bool) -> int:
    flags = {"auto": 0, "copy": abi.XDP_COPY, "zero-copy": abi.XDP_ZEROCOPY}[copy]
    flags |= abi.XDP_USE_NEED_WAKEUP if need_wakeup else 0
    return flags | (abi.XDP_USE_SG if multi_buffer else 0)


def _bind_remedies(copy: Copy, multi_buffer: bool) -> dict[int, str]:
    invalid = "There is no such queue (`ethtool -l` tells how many there are)"
    if multi_buffer:
        invalid += ", or this kernel has no multi-buffer sockets (they need Linux 6.6)"
    if copy == "zero-copy":
        invalid += ", or the driver has no zero copy for it"
    return {
        errno.EBUSY: "The queue already has an owner, who holds it with another UMEM: stop that one, "
        "or take another queue",
        errno.EOPNOTSUPP: "The driver has no zero copy here, or not with these settings: do without it",
        ENOTSUPP: "The driver has no zero copy here: do without it",
        errno.EINVAL: invalid,
        errno.ENODEV: "There is no such device in this network namespace",
        errno.ENETDOWN: "The device is down: set it up",
    }


def _ifindex(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError as error:  # which has no errno
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from error


def _register(sock: socket.socket, umem: Umem) -> None:
    shape = umem.shape
    flags = abi.XDP_UMEM_UNALIGNED_CHUNK_FLAG if shape.unaligned else 0
    value = (umem.address, shape.size, shape.chunk_size, shape.headroom, flags, 0)
    sock.setsockopt(abi.SOL_XDP, abi.XDP_UMEM_REG, abi.UMEM_REG.pack(*value))


def _make_rings(sock: socket.socket, rings: RingSizes) -> None:
    assert rings.fill
    assert rings.completion
    sock.setsockopt(abi.SOL_XDP, abi.XDP_UMEM_FILL_RING, rings.fill)
    sock.setsockopt(abi.SOL_XDP, abi.XDP_UMEM_COMPLETION_RING, rings.completion)
    if rings.rx:
        sock.setsockopt(abi.SOL_XDP, abi.XDP_RX_RING, rings.rx)
    if rings.tx:
        sock.setsockopt(abi.SOL_XDP, abi.XDP_TX_RING, rings.tx)
        with suppress(OSError):  # older kernels send 32 frames a call, and so do rings that small
            sock.setsockopt(abi.SOL_XDP, abi.XDP_MAX_TX_SKB_BUDGET, rings.tx)


def _set_busy_poll(sock: socket.socket, busy_poll: BusyPoll) -> None:
    sock.setsockopt(socket.SOL_SOCKET, abi.SO_PREFER_BUSY_POLL, 1)
    sock.setsockopt(socket.SOL_SOCKET, abi.SO_BUSY_POLL, busy_poll.microseconds)
    sock.setsockopt(socket.SOL_SOCKET, abi.SO_BUSY_POLL_BUDGET, busy_poll.budget)


@contextmanager
def _explained(doing: str, remedies: Mapping[int, str], where: tuple[str, int]) -> Iterator[None]:
    try:
        yield
    except XskError:
        raise
    except OSError as error:
        raise explain(error.errno or 0, doing, remedies, *where) from error
