"""What bonds can be uplinks, against a kernel's own answer. Needs root, and a kernel with bonding.

``python -m tests.vm 6.12 -- python -m pytest tests/netns/test_bonds.py`` boots one.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from offload.bonds import HASHES, MODES, refusals
from offload.kernel.bonds import read_bond
from offload.kernel.ethtool import Ethtool
from offload.kernel.links import Links
from tests.lab import Lab, xdp_pass

HASHED = ("balance-xor", "802.3ad")
CASES = [
    *((mode, "layer2") for mode in MODES if mode not in HASHED),
    *itertools.product(HASHED, HASHES),
]


@pytest.fixture(scope="module")
def bonding(privilege: None) -> None:
    """Skip where no bond can be made."""
    with Lab() as lab:
        made = lab.host.run("ip", "link", "add", "probe0", "type", "bond", check=False)
    if made.returncode != 0:
        pytest.skip(f"this kernel has no bonds: {made.stderr.strip()}")


@pytest.mark.usefixtures("bonding")
@pytest.mark.parametrize(("mode", "hash_policy"), CASES, ids=["-".join(case) for case in CASES])
def test_a_bond_is_refused_when_the_kernel_would(lab: Lab, mode: str, hash_policy: str) -> None:
    host = lab.host
    host.ip(f"link add bond0 type bond mode {mode}")
    if mode in HASHED:
        host.ip(f"link set bond0 type bond xmit_hash_policy {hash_policy}")
    for device in ("web1", "web2"):
        lab.vm(device, mac=f"02:15:5d:00:00:0{device[-1]}")
        host.ip(f"link set {device} down")
        host.ip(f"link set {device} master bond0")

    with Links(host.path) as netlink, Ethtool(host.path) as ethtool:
        links = netlink.snapshot()
        bond = host.call(partial(read_bond, links["bond0"], links, netlink, ethtool))
        assert host.call(partial(read_bond, links["web1"], links, netlink, ethtool)) is None
    assert bond is not None
    assert (bond.mode, bond.hash, set(bond.members)) == (mode, hash_policy, {"web1", "web2"})
    refused = list(refusals("bond0", links, "native", bond))
    (told,) = refusals("web1", links, "native", None)
    assert "name bond0 as the uplink" in str(told)
    if refused:
        with pytest.raises(OSError, match="cannot attach XDP to bond0"):
            xdp_pass(host, "bond0")
    else:
        xdp_pass(host, "bond0")
