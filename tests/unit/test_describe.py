"""Changes in plain words. Needs no privilege."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from offload.describe import describe
from offload.model import (
    AdminUp,
    Bridge,
    BridgePort,
    Change,
    DeviceResource,
    Fdb,
    Feature,
    Filter,
    Guard,
    Ipv6Disabled,
    Master,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    QueueCpu,
    Uplink,
)

MAC = "02:15:5d:00:00:01"


@dataclass(frozen=True, order=True)
class Novelty(DeviceResource):
    """A resource that nobody has words for."""


WEB1 = PortRecord("web1", 2, 3, 0, 1, 1514, 7).as_value()
ON_NIC = PortRecord("web1", 2, None, 0, 1, 1514, 7).as_value()
PAUSED = PortRecord("web1", 2, 3, 0, 0, 1514, 7).as_value()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Change(Bridge("br0"), None, True), "make the bridge br0"),
        (Change(Bridge("br0"), True, None), "remove the bridge br0"),
        (Change(Master("web1", 3), None, "br0"), "put web1 into the bridge br0"),
        (Change(Master("web1", 3), "br0", None), "take web1 out of the bridge br0"),
        (Change(Master("web1", 3), "br0", "br1"), "move web1 from the bridge br0 to br1"),
        (Change(Fdb("web1", 3, MAC), None, True), f"tell the bridge that {MAC} is at web1"),
        (Change(Fdb("web1", 3, MAC), True, None), f"forget on the bridge where {MAC} is"),
        (
            Change(Filter("eth1", 2, MAC, 0), None, 4),
            f"send frames for {MAC}, untagged, on eth1 to the queue of port 4",
        ),
        (
            Change(Filter("eth1", 2, MAC, 10), 4, None),
            f"send frames for {MAC}, VLAN 10, on eth1 to the default queue",
        ),
        (Change(PortSlot(4), None, WEB1), "serve port 4 (web1) with queue 2 on CPU 3"),
        (
            Change(PortSlot(4), WEB1, ON_NIC),
            "serve port 4 (web1) with queue 2 on the CPU where the NIC receives",
        ),
        (Change(PortSlot(4), WEB1, PAUSED), "serve port 4 (web1) through the bridge"),
        (Change(PortSlot(4), WEB1, None), "forget port 4 (web1)"),
        (Change(AdminUp("web1", 3), False, True), "set web1 up"),
        (Change(AdminUp("web1", 3), True, False), "set web1 down"),
        (Change(Promiscuous("eth1", 2), False, True), "switch promiscuous mode of eth1 on"),
        (Change(Feature("eth1", 2, "rx-gro"), True, False), "switch rx-gro of eth1 off"),
        (
            Change(PeerFeature("web1", 3, "rx-gro"), False, True),
            "switch rx-gro of the other end of web1 on",
        ),
        (Change(Ipv6Disabled("web1", 3), False, True), "switch IPv6 on web1 off"),
        (
            Change(BridgePort("web1", 3), (True, True), (True, False)),
            "switch address learning on and flooding of unknown addresses off at web1",
        ),
        (
            Change(Guard("web1", 3), None, (4, 0, "g")),
            "let only frames of its own, untagged, through to web1",
        ),
        (
            Change(Guard("web1", 3), (4, 0, "g"), (4, 10, "g")),
            "let only frames of its own, VLAN 10, through to web1",
        ),
        (Change(Guard("web1", 3), (4, 0, "g"), None), "take the guard at web1 away"),
        (
            Change(Uplink("eth1", 2), None, ("native", "ab")),
            "attach the XDP program on eth1 (native mode)",
        ),
        (
            Change(Uplink("eth1", 2), ("native", "ab"), ("native", "cd")),
            "replace the XDP program on eth1 (native mode)",
        ),
        (Change(Uplink("eth1", 2), ("native", "ab"), None), "take the XDP program off eth1"),
        (
            Change(QueueCpu("eth1", 2, 3), None, 2048),
            "let CPU 3 serve queues of eth1, with a ring of 2048 frames",
        ),
        (Change(QueueCpu("eth1", 2, 3), 2048, None), "take CPU 3 from the queues of eth1"),
        (Change(Novelty("eth1", 2), 1, 2), "change Novelty eth1"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_text(change: Change, text: str) -> None:
    assert describe(change).text == text


def test_names_and_values_are_plain() -> None:
    view = describe(Change(Filter("eth1", 2, MAC, 10), None, 4))
    assert (view.resource, view.before, view.after) == (f"Filter eth1 {MAC} 10", None, 4)
    assert describe(Change(Uplink("eth1", 2), None, ("native", ("a", None)))).after == ["native", ["a", None]]
