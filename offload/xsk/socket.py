"""Sending and receiving on an AF_XDP socket, many frames at a time."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Self

import numpy as np
from numpy.typing import NDArray

from . import abi
from .bound import BoundSocket, Copy, RingSizes, Statistics
from .bpf import Mode, Redirect
from .closing import Closing
from .frames import Frames
from .rings import ADDRESS, DESCRIPTOR, Addresses, ConsumerRing, Entries, ProducerRing
from .umem import Umem, UmemShape

_KICKS = 64  # calls that send 2048 frames on kernels that send 32 in each
_ROWS = 64  # descriptors that are collected before they go into the TX ring
ROOM_SECONDS = 50e-6
"""How often a program that waits for room to send looks again."""
PROBE_SECONDS = 1.0
"""How often a waiting program looks whether the device is still there."""


class Batch(Closing):
    """Frames that came in, to be read in place. They are the program's until ``close``.

    ``for frame in batch`` gives each as a memoryview of the UMEM; one that came in several
    descriptors is joined, which copies it. ``addresses`` and ``lengths`` are for NumPy: of each
    descriptor, where its bytes begin in the UMEM and how many there are. After ``close``, or after the batch
    was sent, the memory belongs to the kernel and will be written.
    """

    def __init__(self, frames: Frames, descriptors: Entries, receiver: Socket | None = None) -> None:
        """``receiver`` gets the chunks when the batch is closed."""
        self.frames = frames
        self._receiver = receiver
        self.descriptors: Entries = descriptors.view(DESCRIPTOR)
        """A copy of the RX ring's entries."""
        self._raw = descriptors
        self._ours = True

    @property
    def addresses(self) -> Addresses:
        return self.frames.data(self.descriptors["addr"])

    @property
    def starts(self) -> Addresses:
        """As ``addresses``, of each frame's first descriptor alone: where its headers are."""
        ends = self.descriptors["options"] & abi.XDP_PKT_CONTD == 0
        return self.addresses[np.concatenate(([True], ends[:-1]))] if len(ends) else self.addresses

    @property
    def lengths(self) -> NDArray[np.uint32]:
        lengths: NDArray[np.uint32] = self.descriptors["len"]
        return lengths

    def __len__(self) -> int:
        """Frames, not descriptors."""
        return len(self._raw) - int(np.count_nonzero(self.descriptors["options"] & abi.XDP_PKT_CONTD))

    def __iter__(self) -> Iterator[memoryview]:
        memory = memoryview(self.frames.memory)
        parts: list[memoryview] = []
        fields = (self.addresses, self.lengths, self.descriptors["options"])
        for at, length, options in zip(*(field.tolist() for field in fields), strict=True):
            part = memory[at : at + length]
            if options & abi.XDP_PKT_CONTD:
                parts.append(part)
            elif parts:
                yield memoryview(b"".join((*parts, part)))
                parts.clear()
            else:
                yield part

    def close(self) -> None:
        """Give the chunks back. Does nothing after ``Socket.transmit``."""
        if self._ours:
            self._ours = False
            self.frames.give(self.descriptors["addr"])
            if self._receiver is not None:
                self._receiver.refill()

    def hand_over(self) -> Entries:
        """The descriptors for a TX ring; the chunks are no longer this batch's.

        Raises ValueError when they were not before.
        """
        if not self._ours:
            raise ValueError("the batch was closed or sent already")
        self._ours = False
        return self._raw


class Socket(Closing):
    """An AF_XDP socket to send and receive on, for one thread.

    ``rx``, ``tx``, ``fill`` and ``completion`` are its rings, for programs that move descriptors themselves;
    ``frames`` says which chunks are free. A chunk is always somebody's: free, in a ring, the kernel's, or
    the program's. Of those in this socket's fill and RX rings there are ``rx_chunks`` at most.

    Not safe for several threads at once, nor for several sockets of one UMEM in different threads.
    """

    def __init__(
        self, bound: BoundSocket, frames: Frames | None = None, rx_chunks: int | None = None
    ) -> None:
        """Takes over ``bound``, and gives the kernel chunks to receive into.

        ``frames`` is that of the sockets that share the UMEM; without it this is the only one.
        ``rx_chunks`` is by default all of them, or half for a socket that sends, too.

        Raises ValueError when somebody used the socket before: which chunks the kernel still has
        cannot be known then.
        """
        self.bound = bound
        self.rx = ConsumerRing(bound.rx, DESCRIPTOR) if bound.rx else None
        self.tx = ProducerRing(bound.tx, DESCRIPTOR) if bound.tx else None
        self.fill = ProducerRing(bound.fill, ADDRESS)
        self.completion = ConsumerRing(bound.completion, ADDRESS)
        self._posted = _unused(bound)
        self.frames = frames or Frames(bound.umem, self.fill.addr[: self._posted])
        everything = bound.umem.shape.frames
        if rx_chunks is None:
            rx_chunks = everything // 2 if self.tx else everything
        self.rx_chunks = rx_chunks if self.rx else 0
        self.unfinished = 0
        """Descriptors that were given to the TX ring and are not sent yet."""
        self.spin = 0.0
        """Seconds that ``wait`` keeps looking before it sleeps: 0.0001 does well for fast traffic.

        Waking a sleeper costs the CPU that receives the time of many frames.
        """
        self._busy = bound.busy_polled
        self._poll = select.poll()
        self._poll.register(bound, select.POLLIN)
        self.refill()

    @classmethod
    def open(
        cls,
        device: str,
        queue: int = 0,
        *,
        mode: Mode,
        copy: Copy = "auto",
        rings: RingSizes | None = None,
        shape: UmemShape | None = None,
        multi_buffer: bool = False,
    ) -> Self:
        """All that is needed on a device without an XDP program: program, UMEM and socket.

        The program goes with ``close``, or with the process. For more settings, or with a program of
        somebody else, make a Umem, a BoundSocket and a Redirect or an XskMap. Raises what those raise.
        """
        with ExitStack() as held:
            umem = held.enter_context(Umem(shape))
            # First the program: attaching one may reset the NIC.
            redirect = held.enter_context(Redirect(device, mode, entries=queue + 1))
            bound = BoundSocket.bind(umem, device, queue, rings=rings, copy=copy, multi_buffer=multi_buffer)
            found = cls(held.enter_context(bound))
            redirect.map.insert(queue, bound)
            found._held = held.pop_all()
        return found

    _held: ExitStack | None = None

    def fileno(self) -> int:
        """For select and poll: readable when frames are in the RX ring."""
        return self.bound.fileno()

    @property
    def zero_copy(self) -> bool:
        """Whether the NIC moves the frames, as the kernel tells."""
        return self.bound.zero_copy

    def statistics(self) -> Statistics:
        """What the kernel lost so far."""
        return self.bound.statistics()

    def receive(self, count: int = 64, timeout: float | None = None) -> Batch:
        """The next frames, ``count`` descriptors at most, and no frame in parts.

        Waits until there is one, ``timeout`` seconds at most; then the batch is empty. Close the batch
        when its frames are done with, else the kernel runs out of chunks. Raises DeviceError when
        the device is down or gone, ValueError without an RX ring.
        """
        rx = self._receiving()
        self.refill()
        if not rx.available() and not self.wait(timeout):
            return Batch(self.frames, rx.raw[:0], self)
        found = rx.take(count)
        if self.bound.particulars.multi_buffer:
            while found.view(DESCRIPTOR)["options"][-1] & abi.XDP_PKT_CONTD and rx.available():
                found = np.concatenate((found, rx.take(1)))
        self._posted -= len(found)
        return Batch(self.frames, found, self)

    def __iter__(self) -> Iterator[Batch]:
        """Batches for ever; each is closed when the next one is asked for."""
        while True:
            with self.receive() as batch:
                yield batch

    def drop(self, count: int = 64) -> int:
        """Give the next descriptors, ``count`` at most, straight back to be received into; returns how many.

        The fastest way to get rid of frames. It does not wait.
        """
        rx = self._receiving()
        span = rx.span(count)
        dropped = self.fill.put(rx.addr[span])
        rx.release(dropped)
        self._wake_fill()
        return dropped

    def relay(self, source: Socket, count: int = 64) -> int:
        """Send what ``source`` received, ``count`` descriptors at most; returns how many. It does not wait.

        From where it is, if both sockets share a UMEM and its Frames, or are the same one; otherwise it is
        copied. Raises DeviceError, and ValueError for frames longer than a chunk of this socket's UMEM.
        """
        tx, rx = self._sending(), source._receiving()
        self.reclaim()
        shared = source.frames is self.frames
        room = tx.free(count) if shared else min(tx.free(count), self.frames.free)
        span = rx.span(min(count, room))
        moved: int = span.stop - span.start
        if not moved:
            source.refill()
            return 0
        if shared:
            tx.put(rx.raw[span])
        else:
            copies = rx.entries[span].copy()
            copies["addr"] = self.frames.copy(source.frames, source.frames.data(rx.addr[span]), copies["len"])
            tx.put(copies.view(tx.raw.dtype))
            source.frames.give(rx.addr[span])
        rx.release(moved)
        source._posted -= moved
        self.unfinished += moved
        source.refill()
        self.kick()
        return moved

    def transmit(self, batch: Batch, timeout: float | None = None) -> bool:
        """Send a received batch from where it is. False if there was no room for ``timeout`` seconds.

        The batch is of this socket, or of one that shares its UMEM and Frames, and is no longer
        the program's if the answer is True. Raises ValueError for others, or one closed already.
        """
        tx = self._sending()
        if batch.frames is not self.frames:
            raise ValueError("the batch is of a socket with another UMEM")
        if not self._room(len(batch.descriptors), timeout, chunks=0):
            return False
        self.unfinished += tx.put(batch.hand_over())
        self.kick()
        return True

    def send(self, frames: Iterable[bytes | memoryview], timeout: float | None = None) -> int:
        """Copy frames to the UMEM and send them; returns how many the kernel was given.

        They are fewer when there is no room for the next one for ``timeout`` seconds. Raises ValueError
        for a frame that is too long, or without a TX ring, and DeviceError.
        """
        tx = self._sending()
        rows: list[tuple[int, int, int]] = []
        sent = 0
        try:
            for frame in frames:
                parts = self._parts(frame)
                if len(rows) >= _ROWS or not self._fits(len(parts), len(rows)):
                    self._submit(tx, rows)
                    if not self._room(len(parts), timeout):
                        break
                self._write(parts, rows)
                sent += 1
        finally:
            self._submit(tx, rows)
        return sent

    def _parts(self, frame: bytes | memoryview) -> list[memoryview]:
        """A frame divided into what fits a chunk."""
        view = memoryview(frame).cast("B")
        size = self.frames.shape.chunk_size
        most = abi.MAX_DESCRIPTORS if self.bound.particulars.multi_buffer else 1
        if not 0 < len(view) <= size * most:
            raise ValueError(f"a frame of {len(view)} bytes: 1 to {size * most} can be sent here")
        return [view[at : at + size] for at in range(0, len(view), size)]

    def _write(self, parts: list[memoryview], rows: list[tuple[int, int, int]]) -> None:
        """Copy a frame to free chunks, and add its descriptors to ``rows``."""
        addresses = self.frames.take(len(parts)).tolist()
        for address, part in zip(addresses, parts, strict=True):
            self.frames.memory[address : address + len(part)] = part
            rows.append((address, len(part), abi.XDP_PKT_CONTD))
        rows[-1] = (*rows[-1][:2], 0)

    def _submit(self, tx: ProducerRing, rows: list[tuple[int, int, int]]) -> None:
        if rows:
            self.unfinished += tx.put(np.array(rows, DESCRIPTOR).view(tx.raw.dtype))
            rows.clear()
            self.kick()

    def _fits(self, count: int, queued: int = 0, chunks: int | None = None) -> bool:
        """Whether there is room for ``count`` descriptors behind those queued, and as many free chunks."""
        wanted = count if chunks is None else chunks
        return self._sending().free(queued + count) >= queued + count and self.frames.free >= wanted

    def _room(self, count: int, timeout: float | None, chunks: int | None = None) -> bool:
        """Wait until it fits."""
        return self._sent_until(lambda: self._fits(count, chunks=chunks), timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is something to receive, ``timeout`` seconds at most; whether there is.

        With busy polling this polls the NIC all the time, without sleeping. Raises DeviceError.
        """
        rx, end = self._receiving(), _deadline(timeout)
        spun = min(time.monotonic() + self.spin, end)
        while not rx.available():
            if time.monotonic() < spun:
                continue
            left = end - time.monotonic()
            if left <= 0:
                return False
            if self._busy:
                self.bound.wake_rx()
            else:
                self._sleep(left)
        return True

    def _sleep(self, seconds: float) -> None:
        """Until something can be received; the kernel is woken for that where it sleeps."""
        if not self._poll.poll(min(seconds, PROBE_SECONDS) * 1000):
            self.bound.wake_rx()  # poll does not tell that the device is gone; this does

    def refill(self) -> None:
        """Give the kernel free chunks to receive into, up to ``rx_chunks``; what was sent is free."""
        if self.unfinished:
            self.reclaim()
        count = min(self.rx_chunks - self._posted, self.frames.free)
        if count > 0:
            chunks = self.frames.take(count)
            posted = self.fill.put(chunks)
            self.frames.give(chunks[posted:])
            self._posted += posted
        self._wake_fill()

    def _wake_fill(self) -> None:
        if self.fill.needs_wakeup:
            self.bound.wake_rx()

    def reclaim(self) -> int:
        """Take back the chunks that were sent, and free them; returns how many."""
        sent = self.completion.take(self.completion.size)
        self.frames.give(sent.view(ADDRESS))
        self.unfinished -= len(sent)
        return len(sent)

    def kick(self) -> None:
        """Have the kernel send what is in the TX ring, if it waits to be told. Raises DeviceError."""
        tx = self._sending()
        always = not self.bound.particulars.need_wakeup
        for _ in range(_KICKS):
            if not (always or tx.needs_wakeup) or self.bound.wake_tx():
                return

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything was sent, ``timeout`` seconds at most; whether it was."""
        return self._sent_until(lambda: not self.unfinished, timeout)

    def _sent_until(self, enough: Callable[[], bool], timeout: float | None) -> bool:
        """Have the kernel send until that is ``enough``, ``timeout`` seconds at most; whether it is."""
        end = _deadline(timeout)
        self.reclaim()
        while not enough():
            if time.monotonic() >= end:
                return False
            self.kick()
            time.sleep(ROOM_SECONDS)
            self.reclaim()
        return True

    def _receiving(self) -> ConsumerRing:
        if self.rx is None:
            raise ValueError("this socket was bound without an RX ring: it can only send")
        return self.rx

    def _sending(self) -> ProducerRing:
        if self.tx is None:
            raise ValueError("this socket was bound without a TX ring: it can only receive")
        return self.tx

    def close(self) -> None:
        """Let go of the socket, and what ``open`` made. What is not sent yet may be lost: see ``drain``."""
        self.bound.close()
        if self._held is not None:
            self._held.close()


def _unused(bound: BoundSocket) -> int:
    """How many chunks the fill ring was given before, all of which are still to be seen in it."""
    counts = [ring.consumer.value for ring in (bound.rx, bound.completion) if ring is not None]
    counts += [bound.tx.producer.value] if bound.tx is not None else []
    filled = bound.fill.producer.value
    if any(counts) or filled > bound.fill.size:
        raise ValueError("the socket was used before: which chunks the kernel has is not known any more")
    return filled


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
