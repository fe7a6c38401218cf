"""VLAN ports on the fast path, with real tagged frames on the wire. Needs root.

A kernel bridge without VLAN filtering cannot carry VLANs, so the daemon refuses such
ports there; what the programs do with them is shown here on the data plane alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.kernel.dataplane import Dataplane
from offload.model import PortRecord
from offload.plan import RUNNING, TRUNK
from tests.instance import BPFFS, shared_cache
from tests.lab import TPID_8021AD, Lab, Vm, seq_of, tag, test_frame

SENDER = "02:15:5d:ff:00:01"
ACCESS, TRUNKED = "02:15:5d:00:00:0a", "02:15:5d:00:00:14"


@pytest.fixture
def vms(lab: Lab) -> Iterator[dict[str, Vm]]:
    """An access port of VLAN 10 and a trunk of 20 and native 30, served by queues on two CPUs."""
    vms = {mac: lab.vm(device, mac) for device, mac in (("web1", ACCESS), ("web2", TRUNKED))}
    for vm in vms.values():
        vm.ns.run("ethtool", "-K", "eth0", "gro", "on")
    with tempfile.TemporaryDirectory(dir=BPFFS) as pins:
        plane = Dataplane(Path(pins) / "v1", shared_cache())
        nic = lab.host.ifindex(lab.nic)

        def set_up() -> None:
            plane.open()
            plane.attach(lab.nic, nic, "native")
            for port_id, (vm, pvid, flags, vids) in enumerate(
                ((vms[ACCESS], 10, RUNNING, (10,)), (vms[TRUNKED], 30, RUNNING | TRUNK, (20, 30)))
            ):
                plane.set_queue_cpu(nic, port_id, 512)
                device = lab.host.ifindex(vm.device)
                plane.set_port(
                    port_id, PortRecord(vm.device, port_id + 1, port_id, pvid, flags, 1514, device)
                )
                for vid in vids:
                    plane.set_filter(nic, vm.mac, vid, port_id)

        try:
            lab.host.call(set_up)
            yield vms
        finally:
            lab.host.call(lambda: plane.detach(nic))
            plane.remove_everything()


CASES = [
    pytest.param(ACCESS, tag(10), b"", id="access-gets-its-vlan-untagged"),
    pytest.param(ACCESS, tag(10, pcp=5, dei=1), b"", id="priority-is-not-part-of-the-vid"),
    pytest.param(ACCESS, tag(11), None, id="another-vlan"),
    pytest.param(ACCESS, b"", None, id="untagged-to-an-access-port"),
    pytest.param(ACCESS, tag(0), None, id="priority-tagged-to-an-access-port"),
    pytest.param(ACCESS, tag(10) + tag(20), None, id="a-second-tag"),
    pytest.param(ACCESS, tag(10, tpid=TPID_8021AD), None, id="802.1ad"),
    pytest.param(TRUNKED, tag(20), tag(20), id="trunk-keeps-the-tag"),
    pytest.param(TRUNKED, tag(20) + tag(7), tag(20) + tag(7), id="trunk-keeps-both-tags"),
    pytest.param(TRUNKED, tag(30), b"", id="native-vlan-untagged"),
    pytest.param(TRUNKED, tag(21), None, id="not-a-vlan-of-the-trunk"),
    pytest.param(TRUNKED, b"", None, id="untagged-to-a-trunk"),
]


@pytest.mark.parametrize(("mac", "sent", "received"), CASES)
def test_tags_on_the_wire(
    lab: Lab, vms: dict[str, Vm], mac: str, sent: bytes, received: bytes | None
) -> None:
    """Five frames with tags as ``sent`` come as ``received``, or not at all; nobody else gets any.

    There is no bridge here, so a frame that is not for the fast path ends in the host's stack.
    """
    with vms[mac].capture() as right, vms[ACCESS if mac == TRUNKED else TRUNKED].capture() as wrong:
        lab.wire.send(lab.wire_end, [test_frame(mac, SENDER, seq, sent) for seq in range(5)])
        if received is None:
            right.assert_silent()
        else:
            expected = [test_frame(mac, SENDER, seq, received) for seq in range(5)]
            assert sorted(right.wait_for(5), key=lambda frame: seq_of(frame) or 0) == expected
        wrong.assert_silent()
