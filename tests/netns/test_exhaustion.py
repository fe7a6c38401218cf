"""More VMs than queues: who has one, who waits, and that all of them are reached all the time. Needs root."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from offload.client import Client
from tests.instance import Instance, config_of, vms_of
from tests.lab import WIRE_MAC, Capture, Lab, Stream, Vm, seq_of, test_frame, wait_until

WEIGHTS = {
    "web1": 10,
    "web2": 90,
    "web3": 50,
    "web4": 90,
    "web5": 20,
    "web6": 60,
    "web7": 0,
    "web8": 30,
}
MOST = 2


@dataclass(frozen=True)
class Site:
    lab: Lab
    instance: Instance
    vms: Mapping[str, Vm]
    config: dict[str, Any]

    def holders(self) -> set[str]:
        """The ports that have a queue; every other one says why it has none."""
        with Client(self.instance.paths.socket) as client:
            ports = client.ports()
        waiting = {port.name: port.reason for port in ports if port.queue is None}
        assert waiting.pop("web7", None) in ("weight: 0", None)
        assert set(waiting.values()) <= {"no queue is left: queues.max of the NIC is reached", "queue: off"}
        assert all(port.path == "queue" for port in ports if port.queue)
        return {port.name for port in ports if port.queue}

    def set(self, **queues: str) -> None:
        for name, queue in queues.items():
            self.config["ports"][name]["queue"] = queue
        self.instance.file = self.instance.write(self.config)
        self.instance.cli("apply", str(self.instance.file))
        self.instance.hear(*(self.vms[name] for name in self.config["ports"]))

    def check_all_are_reached(self) -> None:
        """A frame from the wire for each comes to it, and to nobody else."""
        with ExitStack() as stack:
            seen: dict[str, Capture] = {
                name: stack.enter_context(vm.capture()) for name, vm in self.vms.items()
            }
            frames = {
                name: test_frame(vm.mac, WIRE_MAC, seq) for seq, (name, vm) in enumerate(self.vms.items())
            }
            self.lab.wire.send(self.lab.wire_end, frames.values())
            for name, capture in seen.items():
                assert [seq_of(frame) for frame in capture.wait_for(1)] == [seq_of(frames[name])]
                assert capture.extra(1) == []


@pytest.fixture
def site(privilege: None) -> Iterator[Site]:
    """Eight VMs on a NIC with two queues for them. Scope: one test."""
    with Lab() as lab:
        vms = vms_of(lab, len(WEIGHTS))
        config = config_of(lab.nic, {name: vm.mac for name, vm in vms.items()})
        config["nics"][lab.nic] = {"queues": {"max": MOST}}
        for name, weight in WEIGHTS.items():
            config["ports"][name]["weight"] = weight
        with Instance(lab.host, config) as instance:
            yield Site(lab, instance.start(speaking=vms.values()), vms, config)


def waiting_of(site: Site) -> int:
    with Client(site.instance.paths.socket) as client:
        [nic] = client.nics()
    return nic.queues_waiting


def test_the_heaviest_have_the_queues_and_a_freed_one_is_handed_on(site: Site) -> None:
    assert site.holders() == {"web2", "web4"}
    assert waiting_of(site) == 5  # web7 wants none
    site.check_all_are_reached()

    # A stream to the next in line: it goes from the bridge to a queue, and back, with nothing lost.
    with site.vms["web6"].capture() as seen:
        with Stream(site.lab.wire, site.lab.wire_end, site.vms["web6"].mac) as stream:
            stream.run_on(50)
            site.set(web2="off")
            assert site.holders() == {"web4", "web6"}
            stream.run_on(50)
            site.set(web4="off")
            assert site.holders() == {"web3", "web6"}
            # Who comes back waits like others: nobody is put out of a queue.
            site.set(web2="auto", web4="auto")
            assert site.holders() == {"web3", "web6"}
            assert waiting_of(site) == 5
            site.set(web6="off")
            assert site.holders() == {"web2", "web3"}
            stream.run_on(50)
        arrived = sorted(seq_of(frame) or 0 for frame in seen.wait_for(stream.sent))
        assert arrived == list(range(stream.sent))
    site.check_all_are_reached()


def test_a_port_that_goes_leaves_its_queue_to_who_waits_longest(site: Site) -> None:
    """Among equals that is who came first, whatever its name."""
    for name in ("web3", "web6"):
        site.config["ports"][name]["weight"] = 30  # as web8, which is older by then
    later = {name: site.config["ports"].pop(name) for name in ("web3", "web6")}
    site.set(web8="auto")
    site.config["ports"] = {**later, **site.config["ports"]}
    site.set(web2="off")
    wait_until(lambda: site.holders() == {"web4", "web8"}, "the oldest has the queue", 10)
