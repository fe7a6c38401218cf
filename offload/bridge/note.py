"""What the worker leaves where its supervisor finds it, even when it dies in the middle of something."""

from __future__ import annotations

import mmap

_RUNNING, _CALLS, _BEATS, _POSITION = range(4)


class Note:
    """A page of memory that parent and child share. Each value has one writer: the worker."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._calls = 0

    def enter(self, extension: int) -> None:
        """The worker is about to call the ``extension``th extension, counted from 0."""
        self._calls += 1
        self._words[_CALLS] = self._calls
        self._words[_RUNNING] = extension + 1

    def leave(self) -> None:
        """The call has returned."""
        self._words[_RUNNING] = 0

    def beat(self) -> None:
        """The worker's loop has come round."""
        self._words[_BEATS] += 1

    @property
    def running(self) -> int | None:
        """The extension that is in a call, or was when the worker died."""
        return self._words[_RUNNING] - 1 if self._words[_RUNNING] else None

    @property
    def progress(self) -> tuple[int, int]:
        """Changes while the worker gets on: calls of extensions, rounds of the loop."""
        return self._words[_CALLS], self._words[_BEATS]

    @property
    def position(self) -> int:
        """The first slot of the ring that is not dealt with."""
        return self._words[_POSITION]

    @position.setter
    def position(self, slot: int) -> None:
        self._words[_POSITION] = slot
