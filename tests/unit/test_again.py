"""Deciding again about a few ports comes to what deciding about all of them does. Pure, no privileges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from offload.config import Config, parse
from offload.hardware import Hardware
from offload.model import (
    Member,
    MemberRow,
    Network,
    PortRecord,
    PortSlot,
    Station,
    StationRow,
    StationState,
)
from offload.plan import Desired, Facts, desire, desire_again
from tests.unit.test_plan import ETH1, link

CONFIG = """
version: 1
nics: {eth1: {}}
switches: {ext0: {type: external, uplink: eth1}, lan0: {type: private}}
ports:
  web1: {switch: ext0, device: web1, mac: "02:15:5d:00:00:01", vlan: 7}
  web2: {switch: ext0, device: web2, mac: "02:15:5d:00:00:02"}
  web3: {switch: lan0, device: web3, mac: "02:15:5d:00:00:03"}
  web5: {switch: ext0, device: web5, mac: "02:15:5d:00:00:05"}
  web6: {switch: lan0, device: web6, mac: "02:15:5d:00:00:06"}
"""
WEB4 = '  web4: {switch: ext0, device: web4, mac: "02:15:5d:00:00:04"}\n'
NAMES = ("web1", "web2", "web3", "web4", "web5", "web6")
DEVICES = {name: link(name, 10 + at, kind="tun") for at, name in enumerate(NAMES)}
HOST = Facts(links={"eth1": ETH1, **DEVICES}, online_cpus=(0, 1), vlan_filtering=True)


def settled(config: Config, facts: Facts = HOST) -> tuple[Facts, Desired]:
    """What is read back when all that was decided is done, and every VM but web3's was heard."""
    desired = desire(config, facts)
    held, networks, members, stations = {}, {}, {}, {}
    for resource, value in desired.state.items():
        match resource, value:
            case PortSlot(port_id), tuple():
                held[PortRecord.of(value).name] = (port_id, PortRecord.of(value))
            case Network(number), (str(name), *_):
                networks[name] = number
            case Member(_, ifindex), (*_, str(digest)):
                members[ifindex] = (MemberRow.of(value), digest)
            case Station(number, mac, vid), (int(port), int(ifindex), _):
                state: StationState = "expected" if mac.endswith("3") else "here"
                stations[number, mac, vid] = StationRow(port, ifindex, state, 0, 1)
    facts = replace(facts, held=held, networks=networks, members=members, stations=stations)
    return facts, desire(config, facts)


def changed(text: str, old: str, new: str) -> Config:
    assert old in text
    return parse(text.replace(old, new))


def heard(facts: Facts) -> Facts:
    rows = {at: replace(row, state="here") for at, row in facts.stations.items()}
    return replace(facts, stations=rows)


def with_device(name: str, **changes: Any) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, links={**facts.links, name: replace(facts.links[name], **changes)})


def cpu_of(facts: Facts, name: str) -> int | None:
    return facts.held[name][1].cpu


def same(facts: Facts) -> Facts:
    return facts


@pytest.mark.parametrize(
    ("config", "news", "names", "around"),
    [
        pytest.param(
            changed(CONFIG, "device: web2,", "device: web2, allow: {dhcp_server: true},"),
            same,
            {"web2"},
            {"ext0"},
            id="a guard",
        ),
        pytest.param(
            changed(CONFIG, "device: web2,", "device: web2, queue: off,"),
            same,
            {"web2"},
            {"ext0"},
            id="no queue",
        ),
        pytest.param(
            changed(CONFIG, "device: web2,", "device: web2, cpu: 0,"), same, {"web2"}, {"ext0"}, id="a CPU"
        ),
        pytest.param(changed(CONFIG, "00:02", "00:09"), same, {"web2"}, {"ext0"}, id="a MAC"),
        pytest.param(parse(CONFIG + WEB4), same, {"web4"}, {"ext0"}, id="a new port"),
        pytest.param(parse(CONFIG.partition("  web6")[0]), same, {"web6"}, {"lan0"}, id="a port less"),
        pytest.param(parse(CONFIG), heard, {"web3"}, {"lan0"}, id="a VM is heard"),
        pytest.param(parse(CONFIG), with_device("web2", up=False), {"web2"}, {"ext0"}, id="a device is down"),
        pytest.param(
            parse(CONFIG), with_device("web2", master_name="br0"), {"web2"}, {"ext0"}, id="a device is taken"
        ),
        pytest.param(
            parse(CONFIG),
            lambda facts: replace(facts, moved={"web2": 0 if cpu_of(facts, "web2") else 1}),
            {"web2"},
            {"ext0"},
            id="a queue moves",
        ),
        pytest.param(
            parse(CONFIG),
            lambda facts: replace(facts, merging={"web2": True}),
            {"web2"},
            {"ext0"},
            id="TCP merges",
        ),
        pytest.param(
            changed(CONFIG, "ext0, device: web2", "lan0, device: web2"),
            same,
            {"web2"},
            {"ext0", "lan0"},
            id="another switch",
        ),
    ],
)
def test_it_agrees(config: Config, news: Callable[[Facts], Facts], names: set[str], around: set[str]) -> None:
    facts, before = settled(parse(CONFIG))
    now = news(facts)
    whole, again = desire(config, now), desire_again(config, now, names, around, before)
    assert whole != before, "the change is none"
    assert again
    desired, about = again
    assert {each.name: getattr(desired, each.name) for each in fields(Desired)} == {
        each.name: getattr(whole, each.name) for each in fields(Desired)
    }
    differing = {
        resource
        for resource in whole.state.keys() | before.state.keys()
        if whole.state.get(resource) != before.state.get(resource)
    }
    assert differing <= about
    assert not {resource for resource in about if getattr(resource, "device", "") == "web1"}


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        pytest.param(CONFIG, "device: web2,", "device: web2, vlan: 8,", id="a new VLAN"),
        pytest.param(CONFIG, ", vlan: 7}", "}", id="a VLAN less"),
        pytest.param(
            CONFIG, "device: web2,", "device: web2, allow: {mac_spoofing: true},", id="the bridge is asked"
        ),
        pytest.param(
            CONFIG,
            "device: web2,",
            "device: web2, allow: {link_local_protocols: true},",
            id="the wire lets link-local frames in",
        ),
        pytest.param(
            CONFIG.replace("{eth1: {}}", "{eth1: {queues: {max: 1}}}"),
            "device: web1,",
            "device: web1, queue: off,",
            id="another port has the queue then",
        ),
        pytest.param(
            CONFIG.replace("type: private", "type: private, bridge: python"),
            "device: web3,",
            "device: web3, weight: 50,",
            id="a Python bridge is told of all ports",
        ),
    ],
)
def test_it_is_about_more_than_a_few_ports(text: str, old: str, new: str) -> None:
    facts, before = settled(parse(text))
    config = changed(text, old, new)
    names = {name for name, port in config.ports.items() if port != parse(text).ports[name]}
    assert desire_again(config, facts, names, {config.ports[name].switch for name in names}, before) is None


@pytest.mark.parametrize("settings", ["{queues: {max: 5}}", "{queues: {cpus: [1]}}"])
@pytest.mark.parametrize("more", ["", WEB4])
def test_a_nic_with_settings_of_its_own(settings: str, more: str) -> None:
    text = CONFIG.replace("{eth1: {}}", f"{{eth1: {settings}}}")
    facts, before = settled(parse(text))
    config = changed(text + more, "device: web2,", "device: web2, weight: 10,")
    again = desire_again(config, facts, {"web2", *(["web4"] if more else [])}, {"ext0"}, before)
    assert again
    assert again[0] == desire(config, facts)


def test_a_nic_that_sorts_is_told_of_all_ports() -> None:
    nic = Hardware(how="rules", rx_queues=4)
    facts, before = settled(parse(CONFIG), replace(HOST, hardware={"eth1": nic}))
    config = changed(CONFIG, "device: web2,", "device: web2, allow: {dhcp_server: true},")
    assert desire_again(config, facts, {"web2"}, {"ext0"}, before) is None


def test_what_was_refused_is_looked_at_whole() -> None:
    facts, before = settled(changed(CONFIG, "device: web1,", "device: web1, cpu: 9,"))
    assert before.refusals
    assert desire_again(parse(CONFIG), facts, {"web1"}, {"ext0"}, before) is None
