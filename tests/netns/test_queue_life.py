"""The states of VM queues as operators see them, while devices and ports come and go. Needs root."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from offload.client import Client
from offload.views import QueueEvent
from tests.instance import Instance, config_of, vms_of
from tests.lab import Lab, Vm, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def contended(lab: Lab) -> Iterator[tuple[Lab, Instance, Vm]]:
    """Two VMs that have been heard, and one queue, which web1 has."""
    vms = vms_of(lab, 2)
    with Instance(lab.host, config(lab.nic, **vms)) as instance:
        yield lab, instance.start(speaking=vms.values()), vms["web2"]


def config(nic: str, **vms: Vm) -> dict[str, Any]:
    """One queue for all; web2 is the last to get it."""
    asked = config_of(nic, {name: vm.mac for name, vm in vms.items()}, cpu=0)
    asked["nics"][nic] = {"queues": {"max": 1}}
    asked["ports"]["web2"]["weight"] = 50
    return asked


def events(instance: Instance) -> list[QueueEvent]:
    with Client(instance.paths.socket) as client:
        return client.events()


def test_a_queue_from_its_allocation_till_another_port_has_it(contended: tuple[Lab, Instance, Vm]) -> None:
    lab, instance, web2 = contended
    expected = [("web1", "undefined", "allocated"), ("web1", "allocated", "running")]

    def told(*steps: tuple[str, str, str]) -> None:
        expected.extend(steps)
        wait_until(lambda: len(events(instance)) >= len(expected), f"told: {steps}")
        assert [(event.port, event.before, event.after) for event in events(instance)] == expected
        now = next(view for view in instance.json("queues") if view["id"] == 1)
        last = events(instance)[-1].model_dump(mode="json")
        assert (now["ports"], now["state"], now["since"]) == ([last["port"]], last["after"], last["time"])

    told()
    lab.host.ip("link set web1 down")
    told(("web1", "running", "paused"))
    assert events(instance)[-1].why == "web1 is down"
    lab.host.ip("link set web1 up")
    told(("web1", "paused", "running"))
    lab.host.ip("link delete web1")
    told(("web1", "running", "allocated"))
    instance.cli("apply", str(instance.write(config(lab.nic, web2=web2), "without-web1.yaml")))
    told(("web1", "allocated", "freed"), ("web2", "undefined", "running"))
    log = instance.log.read_text()
    assert [event.text for event in events(instance) if event.text not in log] == []
