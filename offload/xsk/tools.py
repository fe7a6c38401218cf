"""What the tools do with sockets; ``__main__`` is their command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .frames import ETHERNET
from .socket import Batch, Socket

_PATIENCE = 0.1
"""Seconds after which a tool that waits looks whether it shall end."""
_ROOM = 0.1
"""Seconds that an answer waits for room in the TX ring before it is dropped."""


class Run:
    """How long a tool runs: until ``stop``, or so many frames or seconds."""

    def __init__(self, count: int | None = None, seconds: float | None = None) -> None:
        self._count = count
        self._began = time.monotonic()
        self._end = None if seconds is None else self._began + seconds
        self._stopped = False
        self.frames = 0

    def stop(self) -> None:
        self._stopped = True

    def goes_on(self) -> bool:
        if self._stopped or (self._count is not None and self.frames >= self._count):
            return False
        return self._end is None or time.monotonic() < self._end

    def at_most(self, batch: int) -> int:
        """How many frames may be asked for, ``batch`` at most."""
        return batch if self._count is None else min(batch, self._count - self.frames)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began


@dataclass(frozen=True)
class Summary:
    """What a tool did. ``sent`` is what was given to be sent, None for tools that do not send."""

    frames: int
    sent: int | None
    seconds: float
    zero_copy: bool
    lost: dict[str, int]

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "frames_per_second": self.rate}


def drop(socket: Socket, run: Run, batch: int) -> Summary:
    """Count frames, and drop them."""
    multi_buffer = socket.bound.particulars.multi_buffer
    while run.goes_on():
        if multi_buffer:
            with socket.receive(run.at_most(batch), _PATIENCE) as frames:
                run.frames += len(frames)
        elif dropped := socket.drop(run.at_most(batch)):
            run.frames += dropped
        else:
            socket.wait(_PATIENCE)
    return summary(socket, run)


def dump(socket: Socket, run: Run, batch: int, show: Callable[[int, memoryview], None]) -> Summary:
    """Call ``show`` with the time, in nanoseconds since 1970, and the bytes of each frame.

    The time is that at which a batch was read.
    """
    while run.goes_on():
        with socket.receive(run.at_most(batch), _PATIENCE) as frames:
            now = time.time_ns()
            for frame in frames:
                show(now, frame)
            run.frames += len(frames)
    return summary(socket, run)


def echo(socket: Socket, run: Run, batch: int) -> Summary:
    """Send frames back where they came from, with their MACs swapped."""
    ethernet = socket.frames.at(ETHERNET)
    destinations, sources = ethernet["dst"], ethernet["src"]

    def swap(frames: Batch) -> None:
        at = frames.starts
        destinations[at], sources[at] = sources[at], destinations[at]

    sent = 0
    while run.goes_on():
        with socket.receive(run.at_most(batch), _PATIENCE) as frames:
            run.frames += (received := len(frames))
            swap(frames)
            if received and socket.transmit(frames, _ROOM):
                sent += received
    socket.drain(_ROOM)
    return summary(socket, run, sent)


def forward(source: Socket, sink: Socket, run: Run, batch: int) -> Summary:
    """Send what comes to ``source`` out of ``sink``; if both share a UMEM, no frame is copied here."""
    while run.goes_on():
        if moved := sink.relay(source, run.at_most(batch)):
            run.frames += moved
        elif not source.wait(_PATIENCE) or sink.unfinished:
            sink.kick()
    sink.drain(_ROOM)
    return summary(source, run, run.frames)


def summary(socket: Socket, run: Run, sent: int | None = None) -> Summary:
    """What a run did, and what the kernel lost during it."""
    told = asdict(socket.statistics())
    del told["tx_ring_empty_descs"]  # it looked for something to send, and lost nothing
    return Summary(run.frames, sent, run.elapsed, socket.zero_copy, told)
