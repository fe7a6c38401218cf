"""Changes in plain words. Needs no privilege."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from offload.describe import describe
from offload.model import (
    AdminUp,
    Bridge,
    BridgePort,
    BridgeVlans,
    Change,
    Conduit,
    DeviceResource,
    Fdb,
    Feature,
    Filter,
    FunctionAddress,
    FunctionPort,
    Functions,
    HostPair,
    Ipv6Disabled,
    IrqAffinity,
    Master,
    Member,
    MemberRow,
    NapiAffinity,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    PythonBridge,
    QueueCpu,
    Route,
    RouteTarget,
    Spread,
    Station,
    SteeringRule,
    Uplink,
    Xps,
)

MAC = "02:15:5d:00:00:01"


@dataclass(frozen=True, order=True)
class Novelty(DeviceResource):
    """A resource that nobody has words for."""


WEB1 = PortRecord("web1", 2, 3, 0, 1, 1514, 7).as_value()
PORT = MemberRow(4, 0, "port", bypass=True).as_value("s")
GUARDED = MemberRow(4, 0, "port", pvid=10, allow=frozenset({"dhcp_server"})).as_value("s")
SILENT = MemberRow(0, 0, "silent").as_value("s")
TARGET = RouteTarget("h0", "192.0.2.254", None, 3, 0).as_value()
ON_NIC = PortRecord("web1", 2, None, 0, 1, 1514, 7).as_value()
PAUSED = PortRecord("web1", 2, 3, 0, 0, 1514, 7).as_value()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Change(Bridge("br0"), None, "plain"), "make the bridge br0"),
        (Change(Bridge("br0"), "plain", None), "remove the bridge br0"),
        (Change(Master("web1", 3), None, "br0"), "put web1 into the bridge br0"),
        (Change(Master("web1", 3), "br0", None), "take web1 out of the bridge br0"),
        (Change(Master("web1", 3), "br0", "br1"), "move web1 from the bridge br0 to br1"),
        (Change(Fdb("web1", 3, MAC, 0), None, True), f"tell the bridge that {MAC} is at web1"),
        (Change(Fdb("web1", 3, MAC, 10), True, None), f"forget on the bridge where {MAC}, VLAN 10, is"),
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
            Change(BridgePort("web1", 3), (True, True, 0), (True, False, 0)),
            "switch address learning on, flooding of unknown addresses off and "
            "link-local protocols off at web1",
        ),
        (
            Change(BridgeVlans("web1", 3), (0, ()), (4094, (10, 20))),
            "let the bridge carry VLANs 10, 20 tagged and 4094 untagged at web1",
        ),
        (Change(Member("web1", 3), None, PORT), "switch what web1 sends and gets: untagged"),
        (
            Change(Member("web1", 3), PORT, GUARDED),
            "change how to switch what web1 sends and gets: VLAN 10, allowing dhcp_server, "
            "all of it through the bridge",
        ),
        (Change(Member("web1", 3), PORT, None), "take the switch programs off web1"),
        (Change(Member("br0", 9), None, SILENT), "keep the host from hearing and speaking on br0"),
        (Change(Conduit("sw0", "sw0-py"), None, True), "make sw0, a veth pair to a Python bridge"),
        (Change(PythonBridge("sw0"), None, True), "start the Python bridge of sw0"),
        (
            Change(HostPair("h0", "h0-sw"), None, ("auto", 1500)),
            "make the host's interface h0, with h0-sw at the switch",
        ),
        (Change(Station(0, MAC, 10), None, (4, 3, "expected")), f"expect {MAC}, VLAN 10, at port 4"),
        (
            Change(Station(0, MAC, 10), (4, 3, "expected"), (4, 3, "here")),
            f"note that {MAC}, VLAN 10, of port 4 is here",
        ),
        (Change(Route("0.0.0.0/0", 254, 0, 0), None, TARGET), "lead default through h0 via 192.0.2.254"),
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
        (Change(Functions("eth1", 2), 0, 7), "make 7 virtual functions of eth1"),
        (Change(Functions("eth1", 2), 7, 0), "remove the virtual functions of eth1"),
        (
            Change(FunctionPort("eth1v0", 5), None, ("eth1", 3, 10, "generic", "ab")),
            "attach the XDP program on the virtual function eth1v0 (generic mode) for frames of port 3, "
            "VLAN 10",
        ),
        (
            Change(FunctionPort("eth1v0", 5), ("eth1", 3, 10, "generic", "ab"), None),
            "take the XDP program off the virtual function eth1v0",
        ),
        (
            Change(FunctionAddress("eth1", 2, 0), None, (MAC, 10)),
            f"let eth1 sort frames for {MAC}, VLAN 10, into its virtual function 0",
        ),
        (
            Change(FunctionAddress("eth1", 2, 0), (MAC, 10), None),
            "let eth1 sort nothing into its virtual function 0",
        ),
        (
            Change(SteeringRule("eth1", 2, MAC, 0), None, 3),
            f"let eth1 sort frames for {MAC} into RX queue 3",
        ),
        (Change(SteeringRule("eth1", 2, MAC, 10), 3, None), f"remove the rule of eth1 for {MAC}, VLAN 10"),
        (
            Change(Spread("eth1", 2), (0, 1), (0, 0)),
            "let eth1 spread the other frames over its RX queues 0",
        ),
        (Change(IrqAffinity("eth1", 2, 43), "0-3", "2"), "serve interrupt 43 of eth1 on CPU 2"),
        (Change(NapiAffinity("eth1", 2, 8193), "0-3", "2"), "run the thread of NAPI 8193 of eth1 on CPU 2"),
        (Change(Xps("eth1", 2, 1), "", "2"), "send what CPU 2 sends to eth1 by TX queue 1"),
        (Change(Xps("eth1", 2, 1), "2", ""), "let TX queue 1 of eth1 belong to no CPU"),
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
