"""The guard on kernels without tcx: a cls_bpf filter under clsact, made to be used here too. Needs root."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import KernelError
from offload.kernel.bpf import Link
from offload.kernel.dataplane import Dataplane
from tests.instance import BPFFS, shared_cache
from tests.lab import Lab, tag, test_frame

SENDER, MAC = "02:15:5d:ff:00:01", "02:15:5d:00:00:01"


def no_tcx(*_: object, **__: object) -> Link:
    """What ``bpf_link_create`` answers before Linux 6.6."""
    raise KernelError("could not attach") from OSError(22, "Invalid argument")


def send_once(device: str, frame: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((device, 0))
        sender.send(frame)


@pytest.fixture
def plane(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataplane]:
    """A data plane that takes this kernel for one without tcx. Scope: one test."""
    monkeypatch.setattr(Link, "create", no_tcx)
    with tempfile.TemporaryDirectory(dir=BPFFS) as pins:
        opened = Dataplane(Path(pins) / "v1", shared_cache())
        lab.host.call(opened.open)
        yield opened
        opened.remove_everything()


def test_the_classic_guard_admits_and_drops_alike(lab: Lab, plane: Dataplane) -> None:
    vm = lab.vm("web1", MAC)
    index = lab.host.ifindex("web1")
    lab.host.call(lambda: plane.set_guard("web1", index, 3, 0))
    assert lab.host.call(plane.guards) == {index: (3, 0, plane.guard_digest)}
    with vm.capture() as capture:
        lab.host.send("web1", [test_frame(MAC, SENDER, tags=tags) for tags in (b"", tag(0))])
        with pytest.raises(OSError, match="No buffer space"):  # so the sender learns of a drop
            lab.host.call(lambda: send_once("web1", test_frame(MAC, SENDER, tags=tag(10))))
        plain = test_frame(MAC, SENDER)
        assert capture.wait_for(2) == [plain, plain]
        assert capture.extra(2) == []
    counters = plane.port_counters(4)[3]
    assert (counters["bridged"]["packets"], counters["vlan_bridge"]) == (2, 1)
    lab.host.call(lambda: plane.clear_guard(index))
    assert lab.host.call(plane.guards) == {}
    with vm.capture() as capture:
        lab.host.send("web1", [test_frame(MAC, SENDER, tags=tag(10))])
        capture.wait_for(1)


FILTER = "protocol all u32 match u32 0 0 flowid :1"


@pytest.mark.parametrize(
    ("before", "meanwhile", "stays"),
    [
        pytest.param("", "", False, id="ours"),
        pytest.param("", f"filter add dev web1 ingress {FILTER}", True, id="ours-with-somebodys-filter"),
        pytest.param("qdisc add dev web1 clsact", "", True, id="somebodys"),
    ],
)
def test_the_qdisc_goes_with_the_guard_if_it_came_with_it(
    lab: Lab, plane: Dataplane, before: str, meanwhile: str, stays: bool
) -> None:
    lab.vm("web1", MAC)
    index = lab.host.ifindex("web1")
    if before:
        lab.host.run("tc", *before.split())
    lab.host.call(lambda: plane.set_guard("web1", index, 3, 0))
    plane.guard = replace(plane.guard, digest="another version")
    lab.host.call(lambda: plane.set_guard("web1", index, 3, 0))
    assert lab.host.call(plane.guards) == {index: (3, 0, plane.guard_digest)}
    if meanwhile:
        lab.host.run("tc", *meanwhile.split())
    lab.host.call(lambda: plane.clear_guard(index))
    assert lab.host.call(plane.guards) == {}
    assert ("clsact" in lab.host.run("tc", "qdisc", "show", "dev", "web1").stdout) is stays
