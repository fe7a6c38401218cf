"""Features of devices and of the far ends of veths, on the real kernel. Needs root.

The ``ethtool`` program is the second opinion.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.errors import KernelError, UnsupportedError
from offload.kernel.ethtool import PEER_GRO, PEER_TAG_INSERTION, Channels, Ethtool, Peers
from offload.kernel.links import Links
from offload.kernel.netns import identity
from tests.lab import Lab, Namespace, wait_until, xdp_pass

MAC = "02:15:5d:00:00:01"
REPOSITORY = Path(__file__).resolve().parents[2]
# ethtool(8) shows these under names of its own.
PROGRAM_NAMES = {"rx-gro": "generic-receive-offload", "tx-vlan-hw-insert": "tx-vlan-offload"}


@pytest.fixture
def host(lab: Lab) -> Iterator[Ethtool]:
    """Settings of the devices in the lab's host namespace."""
    with Ethtool(lab.host.path) as opened:
        yield opened


@pytest.fixture
def links(lab: Lab) -> Iterator[Links]:
    with Links(lab.host.path) as opened:
        yield opened


def shown_by_program(ns: Namespace, device: str) -> dict[str, tuple[bool, bool]]:
    lines = ns.run("ethtool", "-k", device).stdout.splitlines()[1:]
    cells = [line.strip().split(": ") for line in lines]
    return {name: (value.startswith("on"), "[fixed]" in value) for name, value in cells}


def test_features_are_those_that_the_program_shows(lab: Lab, host: Ethtool) -> None:
    shown = shown_by_program(lab.host, lab.nic)
    found = host.features(lab.nic)
    same = set(found) & set(shown)
    assert len(same) > 30
    assert {name: found[name] for name in same} == {name: shown[name] for name in same}
    for name, programs_name in PROGRAM_NAMES.items():
        assert found[name] == shown[programs_name]
    assert found["loopback"] == (False, True)


@pytest.mark.parametrize("feature", [PEER_GRO, *PEER_TAG_INSERTION])
def test_a_feature_is_switched_alone(lab: Lab, host: Ethtool, feature: str) -> None:
    before = host.features(lab.nic)
    on = not before[feature][0]
    host.set_feature(lab.nic, feature, on)
    host.set_feature(lab.nic, feature, on)
    assert host.features(lab.nic) == {**before, feature: (on, False)}
    host.set_feature(lab.nic, feature, not on)
    assert host.features(lab.nic) == before


def test_a_fixed_feature_is_refused(lab: Lab, host: Ethtool) -> None:
    with pytest.raises(UnsupportedError, match=r"^eth1: cannot switch loopback on: it is fixed"):
        host.set_feature(lab.nic, "loopback", True)
    host.set_feature(lab.nic, "loopback", False)
    with pytest.raises(UnsupportedError, match="no such feature in this kernel"):
        host.set_feature(lab.nic, "rx-tea", True)


def test_a_device_that_is_gone_is_named(host: Ethtool) -> None:
    with pytest.raises(KernelError, match=r"^gone0: cannot read its features: No such device"):
        host.features("gone0")


def test_driver_and_channels(lab: Lab, host: Ethtool) -> None:
    lab.tap("tap1")
    assert host.driver(lab.nic) == "veth"
    assert host.driver("tap1") == "tun"
    lab.host.run("ethtool", "-L", lab.nic, "rx", "2")
    channels = host.channels(lab.nic)
    assert channels == Channels(rx=2, tx=4, combined=0, max_rx=4, max_tx=4, max_combined=0)
    assert (channels.rx_queues, channels.tx_queues) == (2, 4)
    with pytest.raises(UnsupportedError, match=r"^lo: cannot read its channels"):
        host.channels("lo")


def test_the_far_end_is_found_by_name_of_its_namespace(lab: Lab, links: Links) -> None:
    vms = [lab.vm(f"web{number}", mac=f"02:15:5d:00:00:0{number}") for number in (1, 2, 3)]
    own = identity("/proc/thread-self/ns/net")
    found = links.snapshot()
    peers = Peers(links)
    for vm in vms:
        peer = peers.find(found[vm.device])
        assert (peer.device, peer.ifname) == (vm.device, "eth0")
        assert peer.netns is not None
        assert identity(peer.netns) == identity(vm.ns.path)
    peer = peers.find(found["web2"])
    peer.set_feature(PEER_GRO, True)
    for feature in PEER_TAG_INSERTION:
        peer.set_feature(feature, False)
    shown = [shown_by_program(vm.ns, "eth0") for vm in vms]
    assert [features["generic-receive-offload"][0] for features in shown] == [False, True, False]
    assert [features["tx-vlan-offload"][0] for features in shown] == [True, False, True]
    assert [features["tx-vlan-stag-hw-insert"][0] for features in shown] == [True, False, True]
    assert identity("/proc/thread-self/ns/net") == own, "this thread stayed where it was"


def test_a_recycled_namespace_id_is_noticed(lab: Lab, links: Links) -> None:
    """The id of a deleted namespace goes to the next one; what was remembered must not be used."""
    first, second = lab.vm("web1", mac=MAC), lab.namespace("second")
    peers = Peers(links)
    before = links.snapshot()["web1"]
    peers.find(before)
    lab.unplug(first)
    lab.delete_namespace(first.ns)
    give_id = ["ip", "netns", "set", second.name, str(before.peer_netnsid)]
    wait_until(lambda: lab.host.run(*give_id, check=False).returncode == 0, "the id is free again")
    lab.host.ip(f"link add web1 type veth peer name inner netns {second.name}")
    after = links.snapshot()["web1"]
    assert after.peer_netnsid == before.peer_netnsid
    peer = peers.find(after)
    assert peer.ifname == "inner"
    assert peer.netns == second.path


def test_the_far_end_is_found_through_a_process(lab: Lab, links: Links) -> None:
    """A namespace without a name, as containers have."""
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as process:
        try:
            wait_for_own_namespace(process.pid)
            lab.host.ip(f"link add web1 type veth peer name eth0 netns {process.pid}")
            peer = Peers(links).find(links.snapshot()["web1"])
            assert peer.netns == f"/proc/{process.pid}/ns/net"
            peer.set_feature(PEER_GRO, True)
            assert peer.features()[PEER_GRO] == (True, False)
        finally:
            process.kill()


def test_a_far_end_nobody_can_reach_says_what_to_run(lab: Lab, links: Links) -> None:
    """Only a socket holds the namespace: it has neither a name nor a process."""
    vm = lab.vm("web1", mac=MAC)
    with contextlib.closing(vm.ns.capture("eth0")):
        lab.delete_namespace(vm.ns)
        with pytest.raises(KernelError, match=r"^web1: .*`ethtool -K eth0 rx-gro on tx-vlan-hw-insert off "):
            Peers(links).find(links.snapshot()["web1"])


def test_a_refusal_inside_names_both_ends_and_the_command(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    peer = Peers(links).find(links.snapshot()["web1"])
    with pytest.raises(UnsupportedError, match=r"^web1: other end eth0: .*`ethtool -K eth0 loopback on`"):
        peer.set_feature("loopback", True)


def test_without_privilege_the_command_is_shown(lab: Lab) -> None:
    lab.vm("web1", mac=MAC)
    script = (
        "from offload.kernel.ethtool import Peers\n"
        "from offload.kernel.links import Links\n"
        "from offload.errors import PrivilegeError\n"
        "links = Links()\n"
        "try:\n"
        "    Peers(links).find(links.snapshot()['web1'])\n"
        "except PrivilegeError as error:\n"
        "    print(error)\n"
    )
    keep = "+net_admin"
    argv = ["setpriv", f"--bounding-set=-all,{keep}", f"--inh-caps=-all,{keep}", "--clear-groups"]
    done = subprocess.run(
        lab.host.argv(*argv, sys.executable, "-c", script),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        timeout=30,
        check=False,
    )
    assert done.stdout.startswith("web1: "), done
    assert "needs CAP_SYS_ADMIN" in done.stdout, done
    assert "`ethtool -K eth0 rx-gro on" in done.stdout, done


def test_napi_ready(lab: Lab, links: Links) -> None:
    vm, with_xdp, generic = (lab.vm(name, mac=MAC) for name in ("web1", "web2", "web3"))
    lab.tap("tap1")
    peers = Peers(links)

    def ready(device: str) -> bool:
        return peers.napi_ready(links.snapshot()[device])

    assert ready("tap1") is True
    assert ready("web1") is False
    peers.find(links.snapshot()["web1"]).set_feature(PEER_GRO, True)
    assert ready("web1") is True
    vm.ns.ip("link set eth0 down")
    assert ready("web1") is False
    xdp_pass(with_xdp.ns, "eth0")
    assert ready("web2") is True
    xdp_pass(generic.ns, "eth0", native=False)
    assert ready("web3") is False


def test_a_far_end_in_the_same_namespace(lab: Lab, links: Links) -> None:
    lab.host.ip("link add here0 type veth peer name here1")
    peer = Peers(links).find(links.snapshot()["here0"])
    assert (peer.ifname, peer.netns) == ("here1", lab.host.path)
    peer.set_feature(PEER_GRO, True)
    assert shown_by_program(lab.host, "here1")["generic-receive-offload"] == (True, False)
    assert shown_by_program(lab.host, "here0")["generic-receive-offload"] == (False, False)


def wait_for_own_namespace(pid: int) -> None:
    own = identity("/proc/self/ns/net")
    wait_until(lambda: identity(f"/proc/{pid}/ns/net") != own, "a namespace of its own")
