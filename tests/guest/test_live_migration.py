"""A guest moves between two hosts as QEMU's ``migrate`` does it, under a running TCP session. Needs root.

``tests/netns/test_migration.py`` shows where each single frame goes; here the order of events is QEMU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from tests.guest.guest import Guest, Image
from tests.instance import Instance, config_of
from tests.lab import Namespace, Session, TwoHosts, Vm, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]

MAC = "02:15:5d:00:00:01"
ADDRESS = "192.0.2.11"
CLIENT_ADDRESS = "192.0.2.21"
PORT = 5201


@dataclass(frozen=True)
class Site:
    """Two hosts, each with a controller and a VM of its own."""

    lab: TwoHosts
    instances: dict[Namespace, Instance]
    vms: dict[Namespace, Vm]

    def where(self, host: Namespace) -> tuple[str, str]:
        """Where a host has heard the guest, or why it has not, and the path to it."""
        port = self.instances[host].port("web1")
        states = [station["state"] for station in port["stations"]]
        return ", ".join(states) or f"{port['state']}: {port['reason']}", port["path"]

    def wait(self, host: Namespace, state: str, path: str) -> None:
        """Wait until a host has heard the guest there, and the path to it is that one."""
        seen: list[tuple[str, str]] = []

        def there() -> bool:
            seen.append(self.where(host))
            return seen[-1] == (state, path)

        try:
            wait_until(there, f"{state} in {host.name}", 60)
        finally:
            print(f"{host.name}:", *(" by ".join(one) for one, _ in groupby(seen)), sep="\n  ")

    def past_the_bridge(self, host: Namespace) -> int:
        """Frames that the guest's tap on a host got from the queue and from other ports."""
        paths = self.instances[host].port("web1")["counters"]["rx"]
        return sum(tally["packets"] for path, tally in paths.items() if path != "bridge")


@pytest.fixture
def site(privilege: None) -> Iterator[Site]:
    """See ``Site``. Scope: one test."""
    with ExitStack() as stack:
        lab = stack.enter_context(TwoHosts())
        lab.client.ip(f"address add {CLIENT_ADDRESS}/24 dev eth0")
        vms = {
            lab.host: lab.vm("near", "02:15:5d:00:00:11", "192.0.2.12/24"),
            lab.other: lab.vm("far", "02:15:5d:00:00:12", "192.0.2.13/24", host=lab.other),
        }
        instances = {}
        for host, vm in vms.items():
            config = config_of(lab.nic, {"web1": MAC, vm.device: vm.mac})
            instances[host] = stack.enter_context(Instance(host, config)).start()
        yield Site(lab, instances, vms)


def test_qemu_moves_it_there_and_back(site: Site, image: Image, tmp_path: Path) -> None:
    lab = site.lab
    with ExitStack() as guests:
        guest = guests.enter_context(Guest(lab.host, "web1", MAC, image))
        site.instances[lab.host].wait_port("web1", state="active")
        guest.run(f"ip address add {ADDRESS}/24 dev eth0; ip link set eth0 up; ping -c 1 {CLIENT_ADDRESS}")
        guest.run(f"nc -ll -p {PORT} -e cat >/dev/null 2>&1 &")
        guest.run(f"until netstat -ltn | grep -q :{PORT}; do sleep 0.1; done")
        with Session(lab.client, ADDRESS, PORT) as session:
            for source, destination in ((lab.host, lab.other), (lab.other, lab.host)):
                site.wait(source, "here", "queue")
                incoming = tmp_path / destination.name
                moved = guests.enter_context(Guest(destination, "web1", MAC, image, incoming))
                site.instances[destination].wait_port("web1", state="active")
                session.run_on()
                assert site.where(source) == ("here", "queue")
                state, path = site.where(destination)
                assert state in ("expected", "away")
                assert path == "bridge"

                guest.migrate(incoming)
                site.wait(destination, "here", "queue")
                site.wait(source, "away", "bridge")
                before = site.past_the_bridge(source)
                session.run_on()
                for vm in site.vms.values():
                    vm.ns.run("ping", "-c", "3", "-i", "0.2", "-W", "5", ADDRESS)
                assert site.past_the_bridge(source) == before
                guest.close()
                site.instances[source].wait_port("web1", state="waiting")
                session.run_on()
                guest = moved
        assert ADDRESS in guest.run("ip address show eth0")
