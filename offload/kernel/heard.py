"""Addresses that the switches have heard of somebody."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..bridge import state
from .links import Links


def heard(switches: Collection[str], run_dir: Path) -> frozenset[str]:
    """MAC addresses that the bridges of ``switches`` have learnt, lower-case with colons.

    A bridge forgets an address some minutes after its last frame. Needs no privilege but to read in
    ``run_dir``. Raises OffloadError when something cannot be read.
    """
    return _kernel_bridges(switches) | _python_bridges(switches, run_dir)


def _kernel_bridges(switches: Collection[str]) -> frozenset[str]:
    with Links() as links:
        members = {link.ifindex for link in links.snapshot().values() if link.master_name in switches}
        return frozenset(mac for ifindex, mac in links.learned_fdb() if ifindex in members)


def _python_bridges(switches: Collection[str], run_dir: Path) -> frozenset[str]:
    found: set[str] = set()
    for switch in switches:
        try:
            bridge = state.read(run_dir, switch)
        except FileNotFoundError:
            continue  # it has none, or one that has not begun
        if bridge.running:
            found |= {station.mac for station in bridge.stations if station.age is not None}
    return frozenset(found)
