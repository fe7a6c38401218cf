"""Every kind of switch, sender, receiver, VLAN mode, address, path and tag against the rules. Needs root.

A test is a cell of ``matrix.cells``: one frame, which must come to everybody whom ``matrix.oracle``
names, with the tags it says, and to nobody else on any switch, wire or device of the host. Cells are
chosen so that each pair of values is tried; ``--long`` tries all of them. The frames of a site's cells
are sent in batches before its first test, because waiting is what takes the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.instance import Instance
from tests.lab import Lab
from tests.netns.matrix.cells import (
    GROUPS,
    STRANGER,
    UNKNOWN,
    Bridge,
    Cell,
    Sending,
    every,
    odd_sendings,
    sending_of,
    some,
    topology,
    uses_vlans,
)
from tests.netns.matrix.oracle import Frame
from tests.netns.matrix.site import Heard, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BRIDGES: tuple[Bridge, ...] = ("kernel", "python")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        choose = every if metafunc.config.getoption("long") else some
        metafunc.parametrize("cell", [cell for bridge in BRIDGES for cell in choose(bridge)], ids=str)


@pytest.fixture(scope="module")
def kernel_site(bridge_filters_vlans: bool) -> Iterator[Site]:
    with Site(topology("kernel", bridge_filters_vlans), "kernel") as site:
        yield site


@pytest.fixture(scope="module")
def python_site(privilege: None) -> Iterator[Site]:
    with Site(topology("python"), "python") as site:
        yield site


@pytest.fixture(scope="module")
def site_of(request: pytest.FixtureRequest) -> Callable[[Bridge], Site]:
    """``site_of(bridge)`` is the site of that bridge, made when first asked for."""

    def site(bridge: Bridge) -> Site:
        found = request.getfixturevalue(f"{bridge}_site")
        assert isinstance(found, Site)
        return found

    return site


@pytest.fixture(scope="module")
def outcome_of(
    request: pytest.FixtureRequest, site_of: Callable[[Bridge], Site], bridge_filters_vlans: bool
) -> Callable[[Cell], tuple[Heard, Heard] | None]:
    """What should have been heard in a cell, and what was; ``None`` where a bridge without VLANs needs them.

    The first of a site's cells sends the frames of all that were chosen.
    """
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    chosen: list[Cell] = [call.params["cell"] for call in calls if call and "cell" in call.params]

    def possible(cell: Cell) -> bool:
        return cell.bridge == "python" or bridge_filters_vlans or not uses_vlans(cell)

    @cache
    def outcomes(bridge: Bridge) -> dict[Sending, tuple[Heard, Heard]]:
        cells = (cell for cell in chosen if cell.bridge == bridge and possible(cell))
        return site_of(bridge).run(sending_of(cell) for cell in cells)

    return lambda cell: outcomes(cell.bridge)[sending_of(cell)] if possible(cell) else None


def test_cell(cell: Cell, outcome_of: Callable[[Cell], tuple[Heard, Heard] | None]) -> None:
    outcome = outcome_of(cell)
    if outcome is None:
        pytest.skip("this kernel's bridge has no VLAN filtering")
    due, heard = outcome
    assert _shown(heard) == _shown(due), sending_of(cell)


@pytest.mark.parametrize("bridge", BRIDGES)
def test_nothing_else_of_the_host_speaks(bridge: Bridge, site_of: Callable[[Bridge], Site]) -> None:
    """Out of bridges, the ports' ends and what else a switch is made of, the host reaches nobody."""
    site = site_of(bridge)
    devices = site.hosts_devices()
    assert len(devices) >= sum(end.role != "wire" for _, end in site.ends)
    vms = [end.name for _, end in site.ends if end.name.endswith(("-u1", "-u2"))]
    sendings = [
        Sending(device, Frame(dst, STRANGER))
        for device in devices
        for dst in (*GROUPS.values(), *map(site.mac, vms), UNKNOWN)
    ]
    results = site.run(sendings)
    assert {sending: heard for sending, (_, heard) in results.items() if heard} == {}


@pytest.mark.parametrize("bridge", BRIDGES)
def test_ports_that_were_not_heard_and_ports_that_may_spoof(
    bridge: Bridge, site_of: Callable[[Bridge], Site]
) -> None:
    """What the bridge floods reaches those whom it is for, and not the other ports."""
    results = site_of(bridge).run(odd_sendings(bridge))
    wrong = {
        f"{sending.sender} from {sending.frame.src} to {sending.frame.dst}": (_shown(heard), _shown(due))
        for sending, (due, heard) in results.items()
        if heard != due
    }
    assert wrong == {}


PATHS = [
    # sender, receiver, and what the frame counts as: of whom, which way, on which path
    ("ext-w", "ext-u1", [("ext-u1", "rx", "queue")]),
    ("ext-w", "ext-u2", [("ext-u2", "rx", "bridge")]),
    ("ext-u1", "ext-u3", [("ext-u1", "tx", "local"), ("ext-u3", "rx", "local")]),
    ("ext-u1", "ext-u4", [("ext-u1", "tx", "bridge"), ("ext-u4", "rx", "bridge")]),
    ("ext-u2", "ext-u3", [("ext-u2", "tx", "bridge"), ("ext-u3", "rx", "bridge")]),
    ("ext-u1", "nobody", [("ext-u1", "tx", "direct")]),
    ("ext-u2", "nobody", [("ext-u2", "tx", "bridge")]),
    ("priv-u1", "priv-u3", [("priv-u1", "tx", "local"), ("priv-u3", "rx", "local")]),
    ("priv-u2", "priv-u4", [("priv-u2", "tx", "bridge"), ("priv-u4", "rx", "bridge")]),
]


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize(("sender", "receiver", "expected"), PATHS, ids=lambda value: str(value)[:9])
def test_path(
    sender: str,
    receiver: str,
    expected: list[tuple[str, str, str]],
    bridge: Bridge,
    site_of: Callable[[Bridge], Site],
) -> None:
    """Cells with and without a queue do go different ways: one frame, counted there and nowhere else."""
    site = site_of(bridge)
    before = site.counted()
    sending = Sending(sender, Frame(site.mac(receiver), site.mac(sender)))
    assert site.run([sending])[sending][0] or receiver == "nobody"
    assert site.counted() - before == Counter(expected)


def test_vlans_are_refused_on_a_bridge_without_them(lab: Lab, bridge_filters_vlans: bool) -> None:
    """Else cells could be skipped that this kernel can do."""
    config = {
        "version": 1,
        "metrics": None,
        "switches": {"priv": {"type": "private"}},
        "ports": {"web1": {"switch": "priv", "device": "web1", "mac": "02:15:5d:00:00:01", "vlan": 10}},
    }
    with Instance(lab.host, config) as instance:
        code = instance.cli("plan", str(instance.file), check=False).returncode
    assert code == (0 if bridge_filters_vlans else 3)


def _shown(heard: Heard) -> list[str]:
    """In order, and for people."""
    return sorted(f"{name}: {octets.hex()} x {number}" for (name, octets), number in heard.items())
