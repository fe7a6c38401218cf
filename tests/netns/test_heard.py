"""Addresses that bridges have learnt, on the real kernel. Needs root."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from offload.bridge import state
from offload.bridge.membership import Membership, write
from offload.bridge.state import STALE, BridgeState, StationState
from offload.kernel.heard import heard
from offload.kernel.links import Links
from offload.kernel.netns import call_in
from tests.lab import DEADLINE, WIRE_MAC, Lab, test_frame

STRANGER = "02:15:5d:00:00:77"


def test_what_a_bridge_has_learnt_is_heard_and_static_entries_are_not(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm("web1", mac="02:15:5d:00:00:01")
    for bridge, member in (("ext0", "eth1"), ("other", "web1")):
        lab.host.ip(f"link add {bridge} type bridge mcast_snooping 0")
        lab.host.ip(f"link set {member} master {bridge}")
        lab.host.ip(f"link set {bridge} up")
    lab.host.run("bridge", "fdb", "add", "02:15:5d:00:00:99", "dev", "eth1", "master", "static")
    lab.wire.send("wire0", [test_frame("02:aa:00:00:00:ff", STRANGER, seq=1)])
    vm.ns.send("eth0", [test_frame(WIRE_MAC, vm.mac, seq=1)])

    with Links(lab.host.path) as links:
        devices = links.snapshot()
        wanted = {(devices["eth1"].ifindex, STRANGER), (devices["web1"].ifindex, vm.mac)}
        deadline = time.monotonic() + DEADLINE
        while links.learned_fdb() != wanted:
            assert time.monotonic() < deadline, links.learned_fdb()
            time.sleep(0.01)
    assert call_in(lab.host.path, lambda: heard(["ext0"], tmp_path)) == {STRANGER}
    assert call_in(lab.host.path, lambda: heard(["ext0", "other"], tmp_path)) == {STRANGER, vm.mac}
    assert call_in(lab.host.path, lambda: heard([], tmp_path)) == frozenset()


@pytest.mark.parametrize(("age", "expected"), [(0.0, {STRANGER}), (2 * STALE, set())], ids=["runs", "ended"])
def test_what_a_running_python_bridge_has_learnt_is_heard(
    lab: Lab, tmp_path: Path, age: float, expected: set[str]
) -> None:
    """What was declared to it was not heard of anybody."""
    write(tmp_path, Membership("ext0", "ext0-py"))
    stations = [StationState(STRANGER, 0, "eth1", 1.0), StationState("02:15:5d:00:00:01", 0, "web1", None)]
    told = BridgeState("ext0", 1, time.time() - age, "ext0-py", bound=True)
    for _ in state.write(tmp_path, told, stations):
        pass
    assert call_in(lab.host.path, lambda: heard(["ext0"], tmp_path)) == expected
    assert call_in(lab.host.path, lambda: heard(["other"], tmp_path)) == frozenset()
