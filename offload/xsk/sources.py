"""Where the tools' sockets come from: each kind of source opens a socket that receives."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import handed
from .bound import BoundSocket, RingSizes
from .bpf import Mode, Redirect, XskMap
from .socket import Socket
from .umem import Umem, UmemShape


@dataclass(frozen=True)
class Wanted:
    """What is asked of a socket. ``settings`` are those of ``BoundSocket.bind``."""

    shape: UmemShape
    huge_pages: bool = False
    receives: bool = True
    sends: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rings(self) -> RingSizes:
        """Rings that hold half of the UMEM's frames."""
        size = 1 << ((self.shape.frames // 2).bit_length() - 1)
        return RingSizes(rx=size if self.receives else 0, tx=size if self.sends else 0)


class Source(Protocol):
    """Opens a socket; ``held`` closes whatever was opened for it.

    With ``partner`` the socket shares that one's UMEM, if this kind of source can do that.
    """

    def open(self, wanted: Wanted, held: ExitStack, partner: Socket | None = None) -> Socket: ...


@dataclass(frozen=True)
class Queue:
    """A queue of a device, with a program of our own, or the map of somebody else's.

    With neither ``mode`` nor ``pinned`` nothing is directed to the socket: it can only send.
    """

    device: str
    queue: int
    mode: Mode | None = None
    pinned: tuple[Path, int] | None = None
    """Path of a pinned XSKMAP, and the index in it."""

    def open(self, wanted: Wanted, held: ExitStack, partner: Socket | None = None) -> Socket:
        target = self._target(held)
        if partner is None:
            umem = held.enter_context(Umem(wanted.shape, huge_pages=wanted.huge_pages))
        else:
            umem = partner.bound.umem
        bound = BoundSocket.bind(umem, self.device, self.queue, rings=wanted.rings, **wanted.settings)
        found = Socket(held.enter_context(bound), partner.frames if partner else None)
        if target is not None:
            xsks, index = target
            xsks.insert(index, bound)
        return found

    def _target(self, held: ExitStack) -> tuple[XskMap, int] | None:
        if self.pinned is not None:
            path, index = self.pinned
            return held.enter_context(XskMap.pinned(path)), index
        if self.mode is not None:
            # Before there is a socket: to attach a program may reset the NIC.
            redirect = held.enter_context(Redirect(self.device, self.mode, entries=self.queue + 1))
            return redirect.map, self.queue
        return None


@dataclass(frozen=True)
class HandedOver:
    """What a provider at the unix socket ``path`` hands over, ready made: see ``handed``.

    ``device`` None: the provider's first. Of what is wanted, the number of frames counts.
    """

    path: Path
    device: str | None
    queue: int

    def open(self, wanted: Wanted, held: ExitStack, partner: Socket | None = None) -> Socket:
        with handed.connect(self.path) as provider:
            device = self.device or provider.channels()[0].ifname
            bound = provider.socket(device, self.queue, wanted.shape.frames)
        held.enter_context(bound)
        if wanted.sends and bound.tx is None:
            raise ValueError(f"the socket of {device} can only receive: name a device that sends, too")
        return Socket(bound)
