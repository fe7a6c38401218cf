"""VLANs of a kernel bridge, on kernels whose bridge filters them. Needs root.

Elsewhere such a config is refused, which is shown here as well. How frames fare is the
matrix's subject; here it is what is set, and that the bridge keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from offload.kernel import host
from offload.kernel.links import Links, PortVlans
from tests.instance import Instance, config_of
from tests.lab import Lab, Vm, tag, test_frame

MAC, OTHER_MAC = "02:15:5d:00:00:01", "02:15:5d:00:00:02"
SENDER = "02:15:5d:ff:00:01"


@pytest.fixture(scope="module")
def filtering() -> bool:
    answer = host.bridges()[1]
    assert answer.state != "unknown", answer.why
    return answer.state == "yes"


@pytest.fixture
def links(lab: Lab, filtering: bool) -> Iterator[Links]:
    if not filtering:
        pytest.skip("this kernel's bridge filters no VLANs (CONFIG_BRIDGE_VLAN_FILTERING)")
    with Links(lab.host.path) as opened:
        yield opened


def shown_by_bridge(lab: Lab, device: str) -> dict[int, list[str]]:
    """Flags by VID, ranges taken apart, as the ``bridge`` program shows them."""
    (shown,) = json.loads(lab.host.run("bridge", "-json", "vlan", "show", "dev", device).stdout)
    return {
        vid: entry.get("flags", [])
        for entry in shown["vlans"]
        for vid in range(entry["vlan"], entry.get("vlanEnd", entry["vlan"]) + 1)
    }


def test_vlans_of_a_port_are_set_changed_and_read(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    bridge = links.create_bridge("ext0", "ours", vlan_filtering=True)
    assert links.snapshot()["ext0"].vlan_filtering is True
    port = lab.host.ifindex("web1")
    links.set_master(port, bridge)
    assert links.bridge_vlans()[port] == (0, ())
    before: PortVlans = (0, ())
    for after in [(4094, (10, 20, 21, 22)), (4094, (10, 22)), (3000, (5,)), (0, (5, 6)), (0, ())]:
        links.set_bridge_vlans(port, before, after)
        assert links.bridge_vlans()[port] == after
        before = untagged, tagged = after
        expected: dict[int, list[str]] = {vid: [] for vid in tagged}
        if untagged:
            expected[untagged] = ["PVID", "Egress Untagged"]
        if expected:
            assert shown_by_bridge(lab, "web1") == expected
    links.set_bridge_vlans(port, before, everything := (0, tuple(range(1, 4095))))
    assert links.bridge_vlans()[port] == everything
    links.set_master(port, links.create_bridge("ext1", "ours", vlan_filtering=True))
    assert links.bridge_vlans()[port] == (0, ()), (
        "the old bridge's VLANs stay behind, as a plan takes for granted"
    )


def test_static_entries_are_of_one_vlan(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=OTHER_MAC)
    bridge = links.create_bridge("ext0", "ours", vlan_filtering=True)
    port = lab.host.ifindex("web1")
    links.set_master(port, bridge)
    links.set_bridge_vlans(port, (0, ()), (4094, (10,)))
    for vid in (10, 4094):
        links.add_fdb(port, MAC, vid)
    assert links.static_fdb() == {(port, MAC, 10), (port, MAC, 4094)}
    links.del_fdb(port, MAC, 10)
    links.del_fdb(port, MAC, 10)
    assert links.static_fdb() == {(port, MAC, 4094)}


@pytest.fixture
def vms(lab: Lab) -> dict[str, Vm]:
    return {"web1": lab.vm("web1", MAC), "web2": lab.vm("web2", OTHER_MAC)}


def vlans_config(lab: Lab, vms: dict[str, Vm]) -> dict[str, Any]:
    config = config_of(lab.nic, {name: vm.mac for name, vm in vms.items()})
    config["ports"]["web1"]["vlan"] = 10
    config["ports"]["web2"]["vlan"] = {"trunk": ["20-29"], "native": 5}
    return config


def test_a_vlan_is_refused_where_it_would_leak(lab: Lab, filtering: bool, vms: dict[str, Vm]) -> None:
    if filtering:
        pytest.skip("this kernel's bridge filters VLANs")
    with Instance(lab.host, vlans_config(lab, vms)) as instance:
        result = instance.cli("plan", str(instance.file), check=False)
    assert result.returncode == 3
    assert "VLAN 5 would leak: use `bridge: python`" in result.stderr


def test_modes_live_and_changed(lab: Lab, links: Links, vms: dict[str, Vm]) -> None:
    """An access port and a trunk behind one bridge; then the access port's VLAN is another one."""
    config = vlans_config(lab, vms)
    with Instance(lab.host, config).start() as instance:
        vms["web1"].announce()
        vms["web2"].announce(tag(20))
        instance.wait_port("web1", path="queue")
        assert shown_by_bridge(lab, lab.nic) == {
            **{vid: [] for vid in (5, 10, *range(20, 30))},
            4094: ["PVID", "Egress Untagged"],
        }
        assert shown_by_bridge(lab, "web1") == {10: []}
        assert shown_by_bridge(lab, "web2") == {vid: [] for vid in (5, *range(20, 30))}
        reach(lab, vms["web1"], sent=tag(10), received=b"")
        config["ports"]["web1"]["vlan"] = 25
        instance.cli("apply", str(instance.write(config)))
        assert shown_by_bridge(lab, "web1") == {25: []}
        vms["web1"].announce()
        reach(lab, vms["web1"], sent=tag(25), received=b"")
        with vms["web1"].capture() as seen:
            lab.wire.send(lab.wire_end, [test_frame(MAC, SENDER, 1, tag(10))])
            seen.assert_silent()
        instance.cli("detach", "--all")
    assert "ext0" not in links.snapshot()


def reach(lab: Lab, vm: Vm, sent: bytes, received: bytes) -> None:
    """Broadcast through the bridge, and unicast by whatever path, tagged as given."""
    for dst in ("ff:ff:ff:ff:ff:ff", vm.mac):
        with vm.capture() as seen:
            lab.wire.send(lab.wire_end, [test_frame(dst, SENDER, 7, sent)])
            assert seen.wait_for(1) == [test_frame(dst, SENDER, 7, received)]
