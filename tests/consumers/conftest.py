"""Fixtures of the tests with real consumers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.consumers import dpdk
from tests.consumers.consumer import Channel, Port
from tests.consumers.packages import Tree, unpacked
from tests.instance import Instance, config_of
from tests.lab import WIRE_MAC, Lab

MAC = "02:15:5d:00:00:01"


@pytest.fixture(scope="session")
def dpdk_tree() -> Tree:
    """DPDK, fetched if need be. Scope: the whole run."""
    return dpdk.fetched()


@pytest.fixture(scope="session")
def suricata_tree() -> Tree:
    """Suricata 7, the first with AF_XDP, fetched if need be. Scope: the whole run."""
    return unpacked("suricata", "trixie", "suricata")


@pytest.fixture(scope="module")
def port(privilege: None) -> Iterator[Port]:
    """An AF_XDP port on a NIC, which root and the user nobody may consume. Scope: one module."""
    with Lab() as lab:
        af_xdp = {"mode": "software", "owner": {"user": "nobody"}}
        config = config_of(lab.nic, {})
        config["ports"]["vm1"] = {"switch": "ext0", "mac": MAC, "af_xdp": af_xdp}
        with Instance(lab.host, config).start() as instance:
            # As /run is; access(2), which testpmd asks first, heeds no capability.
            instance.directory.chmod(0o711)
            [shown] = instance.port("vm1")["af_xdp"]["channels"]
            channel = Channel(
                netns=str(instance.paths.namespace("vm1")),
                ifname=shown["ifname"],
                queue=shown["queue"],
                map_path=shown["map_path"],
                hand_over=instance.paths.hand_over("vm1"),
            )
            yield Port(MAC, channel, lab.wire, lab.wire_end, WIRE_MAC)
