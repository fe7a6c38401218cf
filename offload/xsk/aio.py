"""AF_XDP sockets in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from .socket import PROBE_SECONDS, ROOM_SECONDS, Batch, Socket


class AsyncSocket:
    """A ``Socket`` whose waits let other tasks run, for one task that receives and one that sends.

    ::

        with Socket.open("eth0", mode="native") as socket:
            async for batch in AsyncSocket(socket):
                ...

    The socket stays open. What of it does not wait can be used beside this.
    """

    def __init__(self, socket: Socket) -> None:
        self.socket = socket

    async def receive(self, count: int = 64) -> Batch:
        """As ``Socket.receive``; waits for a frame. When cancelled it has taken none."""
        while not (batch := self.socket.receive(count, timeout=0)):
            await self._readable()
        return batch

    async def __aiter__(self) -> AsyncIterator[Batch]:
        """Batches for ever; each is closed when the next one is asked for."""
        while True:
            with await self.receive() as batch:
                yield batch

    async def send(self, frames: Iterable[bytes | memoryview]) -> None:
        """As ``Socket.send``, all of them."""
        rest = list(frames)
        while rest:
            del rest[: self.socket.send(rest, timeout=0)]
            if rest:  # no event tells that the kernel has freed what was sent
                await asyncio.sleep(ROOM_SECONDS)

    async def _readable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self.socket.fileno()
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await ready.wait()
        except TimeoutError:
            self.socket.bound.wake_rx()  # raises when the device is gone
        finally:
            loop.remove_reader(fd)
