"""More ports than the Intel 82576 has virtual functions, and what is left of these afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.inside.functions import COUNT, OwnCards, Site, config_of, own_cards, start

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def lab() -> Iterator[OwnCards]:
    """See ``own_cards``. Scope: one test."""
    with own_cards() as lab:
        yield lab


def test_eight_vms_and_two_functions(lab: OwnCards) -> None:
    """The heaviest have them, the others software queues; a freed one is handed on; everybody is reached."""
    weights = {f"web{n}": weight for n, weight in enumerate((10, 80, 50, 90, 20, 60, 30, 40), 1)}
    vms = {name: lab.vm(name, f"02:15:5d:00:00:0{name[-1]}") for name in weights}
    config = config_of(lab.nic, vms, vfs=2)
    for name, weight in weights.items():
        config["ports"][name]["weight"] = weight
    with start(lab, config, vms) as site:
        assert hardware(site) == {"web2", "web4"}
        reach_all(site)
        site.set(web2={"queue": "software"})
        assert hardware(site) == {"web4", "web6"}
        reach_all(site)


def hardware(site: Site) -> set[str]:
    return {name for name, queue in site.queues().items() if queue["kind"] == "hardware"}


def reach_all(site: Site) -> None:
    for name, vm in site.vms.items():
        with vm.capture() as seen:
            site.lab.wire.send(site.lab.wire_end, site.frames(name))
            assert sorted(seen.wait_for(COUNT, timeout=20)) == sorted(site.frames(name))


def test_detaching_gives_the_functions_back(lab: OwnCards) -> None:
    vms = {"web1": lab.vm("web1", "02:15:5d:00:00:01")}
    config = config_of(lab.nic, vms, vfs=1)
    functions = Path("/sys/class/net", lab.nic, "device/sriov_numvfs")
    with start(lab, config, vms) as site:
        assert functions.read_text() == "1\n"
        site.instance.cli("detach")
        assert functions.read_text() == "0\n"
        with vms["web1"].capture() as seen:
            lab.wait_link()
            site.lab.wire.send(site.lab.wire_end, site.frames("web1"))
            assert sorted(seen.wait_for(COUNT, timeout=20)) == sorted(site.frames("web1"))
