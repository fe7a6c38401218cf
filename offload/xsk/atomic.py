"""Loads and stores of ring indices that other CPUs see in the right order, on x86-64 and on arm64.

A ring is safe when whoever follows an index to an entry reads the entry after the index, and whoever
publishes an index writes the entry before it (the kernel's side is in ``net/xdp/xsk_queue.h``: it uses
``smp_load_acquire`` and ``smp_store_release``). Plain Python guarantees neither: arm64 reorders both.

So indices are read and written by ``__atomic_load_4`` and ``__atomic_store_4`` of libatomic, GCC's
run-time library. It takes the memory order as an argument that its code does not look at: what it
does is sequentially consistent, which is acquire and release and more. On arm64 that is ``ldar`` and
``stlr``, on x86-64 ``mov`` and ``xchg``. The compiler cannot move NumPy's accesses across, since
to it these are calls of unknown functions through a pointer.

After publishing entries one asks whether the other side went to sleep. The load of its flag must not
be done before the store of the index (StoreLoad), which acquire and release do not promise. ``fence``
stands between them: ``atomic_thread_fence`` of the same library, ``dmb ish`` on arm64 and
a locked instruction on x86-64.

Each is one call of a tenth of a microsecond, needed once per batch of frames, not per frame.
"""

from __future__ import annotations

import ctypes as ct
from typing import Any

_ACQUIRE, _RELEASE, _SEQ_CST = 2, 3, 5  # GCC's memory orders, __ATOMIC_*

try:
    # PyDLL keeps the interpreter's lock: giving it up would take longer than the call.
    _library = ct.PyDLL("libatomic.so.1")
except OSError as error:
    raise ImportError("libatomic.so.1 is missing: install the distribution's libatomic1") from error

# Without argtypes, which would double the time of a call. Words are passed by ``ctypes.byref``.
_load = _library["__atomic_load_4"]
_load.restype = ct.c_uint32
_store = _library["__atomic_store_4"]
_store.restype = None
_fence = _library["atomic_thread_fence"]
_fence.restype = None


class Word:
    """A 32-bit word in shared memory."""

    __slots__ = ("_at", "_word")

    def __init__(self, word: ct.c_uint32) -> None:
        self._word = word
        self._at: Any = ct.byref(word)

    def load(self) -> int:
        """The value; what the other side wrote before it is visible from now on."""
        value: int = _load(self._at, _ACQUIRE)
        return value

    def store(self, value: int) -> None:
        """Set the value, 0 to 2**32 - 1, after everything that was written before."""
        _store(self._at, value, _RELEASE)


def fence() -> None:
    """Everything before this is visible to others before anything behind it is done."""
    _fence(_SEQ_CST)
