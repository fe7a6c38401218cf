"""AF_XDP sockets for Python: frames of a network device in memory that the program and the kernel share.

It needs Linux 5.11 or later on x86-64 or arm64, NumPy, and libatomic (Debian: ``libatomic1``). It uses
system calls alone: no libbpf, no compiler. It is a part of ``offload`` that imports nothing else of it.

Receiving, on a device that has no XDP program yet::

    from offload import xsk

    with xsk.Socket.open("eth1", queue=0, mode="native") as socket:
        for batch in socket:                  # waits; each batch is given back when the next comes
            for frame in batch:               # a memoryview of the frame where it lies
                print(bytes(frame[:14]).hex())

Many at a time, without a step of Python for each::

    ethernet = socket.frames.at(xsk.ETHERNET)            # Ethernet headers at every byte of the memory
    with socket.receive(256, timeout=1.0) as batch:
        ethertypes = ethernet["ethertype"][batch.addresses]
        print(int(batch.lengths.sum()), "bytes,", int((ethertypes == 0x86DD).sum()), "of them IPv6")

Sending, and sending back what came, without copying it::

    socket.send([frame, another])             # copies them to the shared memory
    socket.transmit(batch)                    # from where it is; the batch is the kernel's then

In asyncio::

    async for batch in xsk.AsyncSocket(socket):
        ...

The parts, of which ``Socket.open`` makes all at once:

==================  =====================================================================================
``Umem``            the memory, divided into chunks; a memfd, which can be handed to another process
``BoundSocket``     a socket bound to a queue; sockets that share a Umem forward frames without copying
``Redirect``        a small XDP program that hands a queue's frames to a socket, for a device without one
``XskMap``          the map through which somebody else's XDP program hands frames to a socket
``Socket``          receives and sends batches on a BoundSocket; its rings are NumPy arrays
``Frames``          which chunks are free, and views of their contents
==================  =====================================================================================

With a program and a map of somebody else, and everything chosen::

    with (
        xsk.Umem(xsk.UmemShape(frames=16384, chunk_size=4096), huge_pages=True) as umem,
        xsk.BoundSocket.bind(umem, "eth1", 3, copy="zero-copy", busy_poll=xsk.BusyPoll()) as bound,
        xsk.Socket(bound) as socket,
        xsk.XskMap.pinned(Path("/sys/fs/bpf/xsks")) as xsks,
    ):
        xsks.insert(3, bound)

In another process, without privileges, given a socket's descriptor, that of its memory, and its particulars
(``bound.fileno()``, ``umem.fd`` and ``bound.particulars.document()``, sent with ``socket.send_fds``)::

    particulars = xsk.Particulars.of(document)
    umem = xsk.Umem.adopt(memory_fd, particulars.umem)
    socket = xsk.Socket(xsk.BoundSocket.adopt(socket_fd, umem, particulars))

What is promised:

- Whatever is opened is a context manager. ``close`` may be called twice, and views that are still held stay
  valid memory, though it is not the kernel's any more.
- One thread uses a socket, or the sockets of one Umem, at a time.
- Indices of rings are read and written in the order that x86-64 and arm64 need: see ``offload.xsk.atomic``.
- Errors are ``XskError``, an OSError that names device, queue and remedy: BusyError for a queue or device
  that has an owner, PrivilegeError, UnsupportedError, DeviceError, LimitError. ValueError is for arguments
  that cannot mean anything.
- XDP's mode is never chosen silently, and nobody's program is ever replaced.

``python -m offload.xsk drop|dump|echo|forward --help`` are tools made with it. Whoever only makes
sockets and hands them over needs no NumPy: it is loaded when ``Socket``, ``AsyncSocket``, ``Batch``,
``Frames``, ``ETHERNET``, ``DESCRIPTOR`` or a ring is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .bound import BoundSocket, BusyPoll, Copy, Particulars, RingSizes, Statistics
from .bpf import Mode, Redirect, XskMap
from .errors import BusyError, DeviceError, LimitError, PrivilegeError, UnsupportedError, XskError
from .umem import Umem, UmemShape

if TYPE_CHECKING:
    from .aio import AsyncSocket
    from .frames import ETHERNET, Frames
    from .rings import DESCRIPTOR, ConsumerRing, ProducerRing
    from .socket import Batch, Socket

__all__ = [
    "DESCRIPTOR",
    "ETHERNET",
    "AsyncSocket",
    "Batch",
    "BoundSocket",
    "BusyError",
    "BusyPoll",
    "ConsumerRing",
    "Copy",
    "DeviceError",
    "Frames",
    "LimitError",
    "Mode",
    "Particulars",
    "PrivilegeError",
    "ProducerRing",
    "Redirect",
    "RingSizes",
    "Socket",
    "Statistics",
    "Umem",
    "UmemShape",
    "UnsupportedError",
    "XskError",
    "XskMap",
]

_WITH_NUMPY = {
    "AsyncSocket": "aio",
    "Batch": "socket",
    "ConsumerRing": "rings",
    "DESCRIPTOR": "rings",
    "ETHERNET": "frames",
    "Frames": "frames",
    "ProducerRing": "rings",
    "Socket": "socket",
}


def __getattr__(name: str) -> Any:
    """Load what needs NumPy when it is first asked for."""
    if name not in _WITH_NUMPY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WITH_NUMPY[name]}", __name__), name)
