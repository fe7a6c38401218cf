"""Grace periods in a hurry, while programs are attached and detached.

tcx waits for a grace period each time, and holds the lock of all network configuration meanwhile
(tcx_entry_sync(), include/net/tcx.h): 14 ms here, twice for each port. So does whoever removes a filter
(``Dataplane``). The kernel can do with expedited ones, of some 50 us, for an interrupt to each CPU that is at
work in it; it uses them by itself whenever a device goes (synchronize_net(), net/core/dev.c).
``rcu_expedited`` asks for them everywhere, and ``rcu_normal``, which real-time kernels set, forbids them
(Documentation/admin-guide/kernel-parameters.txt).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXPEDITED = Path("/sys/kernel/rcu_expedited")
NORMAL = Path("/sys/kernel/rcu_normal")


@contextmanager
def hurried(marker: Path) -> Iterator[None]:
    """Ask for expedited grace periods in the body, unless somebody has decided about them.

    The file ``marker`` is there meanwhile, so that after a death in the body ``settle`` knows of it.
    """
    ours = _ask(marker)
    try:
        yield
    finally:
        if ours:
            settle(marker)


def settle(marker: Path) -> None:
    """Take back what ``hurried`` asked for, if ``marker`` says that it was."""
    if marker.exists():
        with suppress(OSError):  # /sys was made read-only since
            EXPEDITED.write_text("0")
        marker.unlink(missing_ok=True)


def _ask(marker: Path) -> bool:
    """Whether it was asked for: not where the kernel has no such settings, or /sys is read-only."""
    try:
        if int(EXPEDITED.read_text()) or int(NORMAL.read_text()):
            return False
        marker.touch()
        EXPEDITED.write_text("1")
    except OSError:
        with suppress(OSError):
            marker.unlink(missing_ok=True)
        return False
    return True
