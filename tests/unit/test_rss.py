"""What is asked of a NIC about its RSS table, and what its answers mean. No privileges."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from offload.errors import KernelError, VerifyError
from offload.kernel import rss
from offload.kernel.ethtool import Channels, Ethtool

GET, SET, GET_CONTEXT = 0x38, 0x39, 0x46
BY_TURNS, IN_ROWS = (0, 1, 2, 3, 0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)


class Nic(Ethtool):
    """Has four RX queues. ``error`` is what it says to everything, ``deaf`` that it keeps its table."""

    def __init__(self, table: tuple[int, ...] = BY_TURNS, error: int = 0) -> None:
        self.table = table
        self.error = error
        self.deaf = False
        self.sent: list[tuple[int, ...]] = []

    def close(self) -> None:
        """There is no socket."""

    def channels(self, ifname: str) -> Channels:
        return Channels(0, 0, 4, 0, 0, 4)

    def run(self, ifname: str, command: bytes) -> bytes:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        number, size, *table = struct.unpack(f"={len(command) // 4}I", command)
        if size not in (0, len(self.table)) or size != len(table):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if number == SET:
            self.sent.append(tuple(table))
            default = (slot % 4 for slot in range(len(self.table)))
            self.table = self.table if self.deaf else tuple(table or default)
            return command
        assert number == GET
        shown = self.table if size else ()
        return struct.pack(f"={2 + size}I", GET, len(self.table), *shown)


def test_a_table_is_set_as_it_was_read() -> None:
    nic = Nic((0, 0, 0, 1, 2, 2, 3, 3))
    before = rss.spread(nic, "eth1")
    assert before == nic.table
    for table in ((0, 2, 3, 0, 2, 3, 0, 2), before):
        rss.set_spread(nic, "eth1", table)
        assert nic.table == nic.sent[-1] == table


@pytest.mark.parametrize("default", [BY_TURNS, IN_ROWS], ids=["the kernel's", "a driver's"])
def test_a_default_is_given_back_as_such(default: tuple[int, ...]) -> None:
    """Else the kernel would refuse to take queues away that the table names, and not use new ones."""
    nic = Nic(default)
    before = rss.spread(nic, "eth1")
    rss.set_spread(nic, "eth1", (0, 1, 2, 0, 1, 2, 0, 1))
    assert nic.sent[-1] == nic.table == (0, 1, 2, 0, 1, 2, 0, 1)
    for table in (before, default):
        rss.set_spread(nic, "eth1", table)
        assert nic.sent.pop() == ()
        assert rss.spread(nic, "eth1") == before == BY_TURNS


def test_a_table_that_is_not_there_afterwards() -> None:
    nic = Nic()
    nic.deaf = True
    with pytest.raises(VerifyError, match=r"^eth1: its RSS table is \(0, 1, 2, .*not \(0, 0, 0,"):
        rss.set_spread(nic, "eth1", (0,) * 8)
    with pytest.raises(KernelError, match=r"^eth1: cannot spread frames to the RX queues \[0, 3\]: Invalid"):
        rss.set_spread(nic, "eth1", (3, 0))


def test_a_nic_without_a_table() -> None:
    assert rss.spread(Nic(error=errno.EOPNOTSUPP), "eth1") == ()
    with pytest.raises(KernelError, match="cannot read its RSS table"):
        rss.spread(Nic(error=errno.ENODEV), "eth1")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (0, "yes"),
        (errno.ENOENT, "yes"),
        (errno.EINVAL, "yes"),
        (errno.EOPNOTSUPP, "no"),
        (errno.EIO, "unknown"),
    ],
)
def test_contexts(error: int, state: str) -> None:
    class Knowing(Nic):
        def run(self, ifname: str, command: bytes) -> bytes:
            assert struct.unpack("=6I", command) == (GET_CONTEXT, 0xFFFFFFFE, 0, 0, 0, 0)
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            return command

    found = rss.contexts(Knowing(error=error), "eth1")
    assert (found.state, bool(found.remedy)) == (state, state != "yes")
