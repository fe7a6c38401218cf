"""Maps and sockets for the consumers of AF_XDP ports, over a unix socket per port.

Each port has a listening SOCK_SEQPACKET socket, ``Paths.hand_over(port)``, which is its owner's
(``af_xdp.owner``, else root's). Besides the file's mode the credentials of the peer are asked: nobody but
root and the owner gets anything. One message is one request, which gets one answer::

    /connect,HOST                       /host_ok, or /host_nak,REASON; always first; HOST does not matter
    /version                            0.1
    /xsk_map_fd,IFNAME                  /fd_ack with the XSKMAP, or /fd_nak,REASON
    /xsk_socket,IFNAME[,QUEUE[,FRAMES]] /fd_ack,JSON with AF_XDP socket and UMEM, or /fd_nak,REASON
    /channels                           JSON: a list of what there is, or /error,REASON
    /config_busy_poll,…                 /config_busy_poll_nak
    /fin                                /fin_ack, or /error,REASON when something was refused; the end
    anything else                       /nak

IFNAME is ``xsk0``, the software channel, or the NIC's name (``mode: hardware``). What comes with
``/fd_ack`` are file descriptors (SCM_RIGHTS). These words are those of the AF_XDP device plugin for
Kubernetes (its ``internal/udsserver``), which DPDK's ``use_cni`` speaks (``drivers/net/af_xdp``), but for
``/xsk_socket`` and ``/channels``, which are ours: with a socket from here a consumer needs no
privilege at all. On a NIC's queue such a socket only receives. The JSON is that of
``offload.xsk.bound.Particulars``; ``offload.xsk.handed`` is the other side.

The daemon keeps nothing of what it gives out: when the consumer ends, the kernel frees the queue.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from .channels import INNER
from .config import Config
from .errors import OffloadError, PrivilegeError, UsageError
from .kernel import unix
from .kernel.sockets import Parcel
from .paths import Paths

VERSION = "0.1"
REQUEST_BYTES = 256
DEFAULT_FRAMES, MIN_FRAMES, MAX_FRAMES = 4_096, 64, 16_384
"""Chunks of a UMEM, of 4 KiB each. The memory is the consumer's, and the daemon's limits apply to it."""
CONNECTIONS = 16
"""Connections of one port at a time; further ones are closed."""
REQUESTS = 64
"""Requests of one connection."""
PATIENCE = 10.0
"""Seconds that a connection may be silent."""

_THREADS = 4
_PAUSE = 1.0  # seconds until connections are taken again, when there was no descriptor left for one
_SHORT = 127
"""Bytes of an answer to words of DPDK, which has room for 128 and writes a terminator behind them."""
_LONG = 1_024
_DIGITS = 5

log = logging.getLogger(__name__)
Copy = Literal["auto", "copy", "zero-copy"]
T = TypeVar("T")

_COPY: Mapping[str, Copy] = {"auto": "auto", "require": "zero-copy", "off": "copy"}


@dataclass(frozen=True)
class Offer:
    """What the consumers of a port can have.

    ``owner``: uid and gid, besides root. ``nic``: whose queues, where they may have those. ``trusted``:
    they may put sockets of their own there.
    """

    owner: tuple[int, int] = (0, 0)
    nic: str | None = None
    copy: Copy = "auto"
    trusted: bool = False


class Supply(Protocol):
    """Who makes maps and sockets; ``offload.kernel.sockets`` has the real one. Used by several threads."""

    def channel(self, port: str, nic: str | None) -> dict[str, Any]: ...

    def map(self, port: str, nic: str | None) -> AbstractContextManager[Parcel]: ...

    def socket(
        self, port: str, nic: str | None, queue: int, frames: int, copy: Copy
    ) -> AbstractContextManager[Parcel]: ...


def offers(config: Config, users: Mapping[str, tuple[int, int] | None]) -> dict[str, Offer]:
    """Of each AF_XDP port. A port whose owner is none of ``users`` has none."""
    found = {}
    for name, port in config.ports.items():
        if port.af_xdp is None:
            continue
        owner = users.get(port.af_xdp.owner.user) if port.af_xdp.owner else (0, 0)
        if owner is not None:
            hardware = port.af_xdp.mode == "hardware"
            found[name] = Offer(
                owner=owner,
                nic=config.switches[port.switch].uplink if hardware else None,
                copy=_COPY[port.af_xdp.zero_copy],
                trusted=port.af_xdp.trusted,
            )
    return found


class HandOver:
    """The sockets of all ports. Belongs to the event loop in which ``follow`` was called first."""

    def __init__(self, paths: Paths, supply: Supply) -> None:
        self._paths = paths
        self._supply = supply
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hand-over")
        self._doors: dict[str, _Door] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def follow(self, offers: Mapping[str, Offer]) -> None:
        """Listen for the consumers of these ports, and of no others. Waits for nothing.

        A port whose socket cannot be made is logged, and tried again the next time.
        """
        for port, door in list(self._doors.items()):
            if port not in offers or offers[port].owner != door.offer.owner:
                self._ending |= self._doors.pop(port).close()
        ours = {self._paths.hand_over(port) for port in self._doors}
        unix.remove_sockets(self._paths.hand_over("").parent, keep=ours)
        for port, offer in offers.items():
            if port in self._doors:
                self._doors[port].offer = offer
                continue
            try:
                listening = unix.listen_for(self._paths.hand_over(port), offer.owner)
            except OffloadError as error:
                log.error("port %s: nothing can be handed over: %s", port, error)
                continue
            self._doors[port] = _Door(port, offer, listening, self._supply, self._threads)
        self._ending = {task for task in self._ending if not task.done()}

    async def close(self) -> None:
        """Hand nothing over any more; ends when everything that was begun is done, in some seconds."""
        self.follow({})
        await asyncio.gather(*self._ending)
        self._threads.shutdown()


class _Door:
    """The listening socket of a port, and who has come in. One hand-over at a time."""

    def __init__(
        self,
        port: str,
        offer: Offer,
        listening: socket.socket,
        supply: Supply,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.port = port
        self.offer = offer
        self.supply = supply
        self._threads = threads
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._visits: dict[asyncio.Task[None], socket.socket] = {}
        self._listening = listening
        listening.setblocking(False)
        self._open()

    def _open(self) -> None:
        if self._listening.fileno() >= 0:
            self._loop.add_reader(self._listening, self._let_in)

    def _let_in(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("port %s: cannot let a consumer in: %s", self.port, error.strerror)
            self._loop.remove_reader(self._listening)
            self._loop.call_later(_PAUSE, self._open)
            return
        if len(self._visits) >= CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        task = self._loop.create_task(_Visit(self, sock).serve())
        self._visits[task] = sock
        task.add_done_callback(self._visits.pop)

    async def in_turn(self, function: Callable[[], T]) -> T:
        """Run what may block in a thread, after what other consumers of this port asked for."""
        async with self._turn:
            return await self._loop.run_in_executor(self._threads, function)

    def close(self) -> set[asyncio.Task[None]]:
        """Let nobody in any more, and show out who is there; the tasks end soon."""
        self._loop.remove_reader(self._listening)
        self._listening.close()
        for sock in self._visits.values():
            if sock.fileno() >= 0:
                unix.hang_up(sock)
        return set(self._visits)


class _Visit:
    """One connection."""

    def __init__(self, door: _Door, sock: socket.socket) -> None:
        self._door = door
        self._socket = sock
        self._pid, self._uid = unix.credentials(sock)
        self._connected = False
        self._refused: str | None = None
        self._done = False

    def __str__(self) -> str:
        return f"uid {self._uid}, pid {self._pid}"

    async def serve(self) -> None:
        """Answer until the other side has enough, goes away or is silent for too long."""
        loop = asyncio.get_running_loop()
        with self._socket:
            try:
                for _ in range(REQUESTS):
                    async with asyncio.timeout(PATIENCE):
                        request = await loop.sock_recv(self._socket, REQUEST_BYTES + 1)
                    if not request:
                        return
                    if answer := await self._answer(request):
                        unix.send(self._socket, answer)
                    if self._done:
                        return
            except OSError:  # it went away; or TimeoutError
                return
            except Exception:
                log.exception("port %s: the hand-over to %s failed", self._door.port, self)

    async def _answer(self, request: bytes) -> bytes | None:
        """What to say; None when it has been said, together with file descriptors."""
        text = request.decode("ascii", "replace")
        words = [word.strip() for word in text.split(",")]
        if len(request) > REQUEST_BYTES or not (text.isascii() and text.isprintable()):
            words = [""]
        match words:
            case ["/connect", _] if why := self._stranger():
                self._done = True
                return _said("/host_nak", why, _SHORT)
            case ["/connect", _]:
                self._connected = True
                return b"/host_ok"
            case _ if not self._connected:
                self._done = True
                return b"/nak"
            case ["/version"]:
                return VERSION.encode()
            case ["/channels"]:
                return await self._channels()
            case ["/xsk_map_fd", ifname]:
                return await self._hand(ifname, lambda: self._map(ifname), _SHORT)
            case ["/xsk_socket", ifname, *numbers] if len(numbers) <= 2:
                what = ", queue ".join((ifname, *numbers[:1]))
                return await self._hand(what, lambda: self._made(ifname, numbers), _LONG)
            case ["/config_busy_poll", *_]:
                return b"/config_busy_poll_nak"
            case ["/fin"]:
                self._done = True
                # DPDK takes /fd_nak for a yes (it asks for strncmp() < 0) and would go on with descriptor 0.
                # An answer less than the one it waits for ends that, and is in its log.
                return _said("/error", self._refused, _SHORT) if self._refused else b"/fin_ack"
            case _:
                return b"/nak"

    def _stranger(self) -> str | None:
        """Why this peer gets nothing, if so."""
        owner, _ = self._door.offer.owner
        if self._uid in (0, owner):
            return None
        users = "root" if owner == 0 else f"root and uid {owner}"
        why = f"port {self._door.port} is not for uid {self._uid}: only for {users} (af_xdp.owner)"
        log.warning("%s; it was pid %d", why, self._pid)
        return why

    async def _channels(self) -> bytes:
        port, offer = self._door.port, self._door.offer
        supply = self._door.supply
        nics = [None, offer.nic] if offer.nic else [None]
        try:
            found = await self._door.in_turn(lambda: [supply.channel(port, nic) for nic in nics])
        except OffloadError as error:
            return _said("/error", str(error), _LONG)
        return json.dumps(found).encode()

    async def _hand(
        self, what: str, parcel: Callable[[], AbstractContextManager[Parcel]], limit: int
    ) -> bytes | None:
        def give() -> str:
            with parcel() as given:
                said = f",{json.dumps(given.particulars)}" if given.particulars else ""
                unix.send(self._socket, f"/fd_ack{said}".encode(), given.descriptors)
                given.handed_to(self._pid)
                return given.kind

        port = self._door.port
        try:
            kind = await self._door.in_turn(give)
        except OffloadError as error:
            log.warning("port %s: %s gets nothing of %s: %s", port, self, what, error)
            self._refused = str(error)
            return _said("/fd_nak", self._refused, limit)
        log.info("port %s: handed a %s of %s, to %s", port, kind, what, self)
        return None

    def _map(self, ifname: str) -> AbstractContextManager[Parcel]:
        nic, port = self._nic(ifname), self._door.port
        if nic and not self._door.offer.trusted:
            raise PrivilegeError(
                f"port {port} is not trusted with sockets of its own on {nic}: ask for /xsk_socket"
            )
        return self._door.supply.map(port, nic)

    def _made(self, ifname: str, numbers: Sequence[str]) -> AbstractContextManager[Parcel]:
        nic = self._nic(ifname)
        if not all(number.isdecimal() and len(number) <= _DIGITS for number in numbers):
            raise UsageError("/xsk_socket,IFNAME,QUEUE,FRAMES wants the last two as numbers")
        queue, frames = [*map(int, numbers), *(0, DEFAULT_FRAMES)[len(numbers) :]]
        if not MIN_FRAMES <= frames <= MAX_FRAMES:
            raise UsageError(f"{frames} frames: from {MIN_FRAMES} to {MAX_FRAMES} can be had")
        return self._door.supply.socket(self._door.port, nic, queue, frames, self._door.offer.copy)

    def _nic(self, ifname: str) -> str | None:
        """The NIC that is meant, None for the software channel."""
        if ifname == INNER:
            return None
        nic = self._door.offer.nic
        if ifname != nic:
            there = f"{INNER} and {nic}" if nic else f"{INNER} alone, without mode: hardware"
            raise UsageError(f"port {self._door.port} has {there}")
        return nic


def _said(word: str, why: str, limit: int) -> bytes:
    """An answer with its reason, on one line and no longer than ``limit`` bytes."""
    return " ".join(f"{word},{why}".split()).encode("ascii", "replace")[:limit]
