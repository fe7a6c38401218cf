"""The config's parser: what it makes of a good file, and every word it says about a bad one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offload import config as config_module
from offload.config import (
    Config,
    PortConfig,
    VlanMode,
    channel_outer,
    cpus_named,
    dump,
    merge_ports,
    parse,
    parse_mac,
    parse_port,
    split_listen,
    warnings,
    with_channels,
)
from offload.document import MAX_BYTES, load
from offload.errors import ConfigError, Problem, UsageError

EXAMPLE = Path(__file__).parents[2] / "deploy" / "offload.yaml"

CONTRACT = """
version: 1
metrics: {listen: "127.0.0.1:9808"}
mac_range: {first: "02:15:5d:00:00:00", last: "02:15:5d:00:00:ff"}
nics:
  eth1:
    xdp_mode: native
    queues: {cpus: [1, 2, 3], rebalance: true}
switches:
  ext0:
    type: external
    uplink: eth1
    host: {interface: ext0-host, addresses: [192.0.2.1/24]}
    bridge: kernel
ports:
  web1:
    switch: ext0
    device: web1
    mac: "02:15:5d:00:00:01"
    vlan: {trunk: [10, 20, "100-199"], native: 1}
    queue: auto
    cpu: auto
    delivery: auto
    weight: 100
    allow: {mac_spoofing: false, dhcp_server: false, router_advertisement: false, link_local_protocols: false}
  db1:
    switch: ext0
    af_xdp: {mode: auto, zero_copy: auto, trusted: false, owner: {user: qemu}}
    mac: auto
"""

BASE = """
version: 1
mac_range: {first: "02:15:5d:00:00:00", last: "02:15:5d:00:00:ff"}
nics: {eth1: {}, eth2: {}}
switches:
  ext0: {type: external, uplink: eth1}
  ext1: {type: external, uplink: eth2}
ports:
"""


def with_ports(*ports: str) -> str:
    """A good config around these lines; each is a port in flow style, the first named p0."""
    return BASE + "".join(f"  p{index}: {{{port}}}\n" for index, port in enumerate(ports))


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(dedent(text))
    return [str(problem) for problem in caught.value.problems]


def one_port(port: str) -> PortConfig:
    return parse(with_ports(f"switch: ext0, {port}")).ports["p0"]


# --- good files ----------------------------------------------------------------------------------


def test_the_contract_s_example_is_read_as_it_says() -> None:
    config = parse(CONTRACT)
    assert config.metrics is not None
    assert config.metrics.listen == "127.0.0.1:9808"
    assert config.nics["eth1"].queues.cpus == (1, 2, 3)
    assert config.nics["eth1"].queues.rebalance
    assert config.switches["ext0"].host is not None
    assert config.switches["ext0"].host.addresses == ("192.0.2.1/24",)
    web1, db1 = config.ports["web1"], config.ports["db1"]
    assert web1.mac == ("02:15:5d:00:00:01",)
    assert web1.vlan == VlanMode(1, frozenset({10, 20, *range(100, 200)}))
    assert db1.mac == "auto"
    assert db1.device is None
    assert db1.af_xdp is not None
    assert db1.af_xdp.owner is not None
    assert db1.af_xdp.owner.user == "qemu"


def test_what_is_left_out_has_its_default() -> None:
    config = parse(with_ports("switch: ext0, device: p0"))
    assert config.metrics is not None
    assert config.metrics.listen == "127.0.0.1:9808"
    assert config.nics["eth1"].xdp_mode == "native"
    assert config.nics["eth1"].queues.cpus is None
    assert config.switches["ext0"].bridge == "kernel"
    port = config.ports["p0"]
    assert (port.mac, port.queue, port.cpu, port.delivery, port.weight) == (
        "auto",
        "auto",
        "auto",
        "auto",
        100,
    )
    assert port.vlan == VlanMode(native=0)
    assert not port.allow.mac_spoofing


def test_the_shipped_example_is_good_and_supported() -> None:
    config = parse(EXAMPLE.read_text(), str(EXAMPLE))
    assert (len(config.nics), len(config.switches), len(config.ports)) == (1, 1, 2)


def test_metrics_can_be_off() -> None:
    assert parse("version: 1\nmetrics: null").metrics is None


def test_sections_may_be_empty() -> None:
    assert parse("version: 1\nnics:\nswitches:\nports:\n") == Config(version=1)


@pytest.mark.parametrize("head", ["", "%YAML 1.1\n---\n", "\ufeff"], ids=["plain", "yaml-1.1", "bom"])
def test_off_and_macs_stay_text_in_any_yaml_version(head: str) -> None:
    text = head + with_ports("switch: ext0, device: p0, queue: off, mac: 02:15:59:00:00:01")
    port = parse(text).ports["p0"]
    assert port.queue == "off"
    assert port.mac == ("02:15:59:00:00:01",)


@pytest.mark.parametrize(
    ("written", "mac"),
    [
        pytest.param("02:15:5D:00:00:0A", ("02:15:5d:00:00:0a",), id="capitals"),
        pytest.param("02-15-5d-00-00-0a", ("02:15:5d:00:00:0a",), id="dashes"),
        pytest.param(
            "[02:15:5d:00:00:0a, 02-15-5d-00-00-0b]", ("02:15:5d:00:00:0a", "02:15:5d:00:00:0b"), id="list"
        ),
        pytest.param("auto", "auto", id="auto"),
    ],
)
def test_macs_are_normalised(written: str, mac: object) -> None:
    assert one_port(f"device: p0, mac: {written}").mac == mac


@pytest.mark.parametrize(
    ("written", "cpu"), [("3", 3), ("auto", "auto"), ("nic", "nic")], ids=["number", "auto", "nic"]
)
def test_cpu(written: str, cpu: object) -> None:
    assert one_port(f"device: p0, cpu: {written}").cpu == cpu


def test_models_are_frozen() -> None:
    config = parse(CONTRACT)
    with pytest.raises(ValueError, match="frozen"):
        config.ports["web1"].weight = 1


def test_the_port_model_describes_itself_for_the_api() -> None:
    assert set(PortConfig.model_json_schema()["properties"]) == set(PortConfig.model_fields)


# --- VLANs ---------------------------------------------------------------------------------------

VLANS = [
    pytest.param("-", None, VlanMode(), (0,), id="untagged"),
    pytest.param("10", 10, VlanMode(10), (10,), id="access"),
    pytest.param(
        "trunk:10,20", {"trunk": [10, 20]}, VlanMode(None, frozenset({10, 20})), (10, 20), id="trunk"
    ),
    pytest.param(
        "trunk:10/native:1",
        {"trunk": [10], "native": 1},
        VlanMode(1, frozenset({10})),
        (1, 10),
        id="native-outside",
    ),
    pytest.param(
        "trunk:10-12/native:11",
        {"trunk": ["10-12"], "native": 11},
        VlanMode(11, frozenset({10, 11, 12})),
        (10, 11, 12),
        id="native-inside",
    ),
    pytest.param(
        "trunk:1-4094", {"trunk": ["1-4094"]}, VlanMode(None, frozenset(range(1, 4095))), None, id="all"
    ),
]


@pytest.mark.parametrize(("text", "plain", "mode", "vids"), VLANS)
def test_vlan_forms(text: str, plain: object, mode: VlanMode, vids: tuple[int, ...] | None) -> None:
    assert VlanMode.parse(text) == mode
    assert str(mode) == text
    assert mode.plain() == plain
    assert one_port(f"device: p0, vlan: {json.dumps(plain)}").vlan == mode
    assert vids is None or mode.vids == vids


def test_none_is_untagged_on_the_command_line() -> None:
    assert VlanMode.parse("none") == VlanMode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "VID 0 means untagged"),
        ("4095", "VID 4095 is reserved"),
        ("9999", "1 to 4094"),
        ("ten", "trunk:10,20/native:1"),
        ("trunk:", "a range such as"),
        ("trunk:10,20-15", "must not be above the last"),
        ("trunk:10/native:", "1 to 4094"),
        ("trunk:10/native:0", "VID 0 means untagged"),
        ("trunk:10,10", "in the list already"),
    ],
    ids=lambda value: value.replace(" ", "-"),
)
def test_vlan_forms_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        VlanMode.parse(text)
    assert text in str(caught.value)


# --- bad files: one value ------------------------------------------------------------------------

MAC_FORM = 'must be a MAC address such as "02:15:5d:00:00:01"'
INTERFACE_FORM = "an interface name is 1 to 15 bytes without '/', ':' or a space, and not '.' or '..'"
VID_0 = "VID 0 means untagged (IEEE 802.1Q): leave vlan out for an untagged port"
VID_4095 = "VID 4095 is reserved (IEEE 802.1Q): use 1 to 4094"
GROUP = "a group address cannot be a port's: the lowest bit of the first octet must be 0"

BAD_PORTS = {
    "unknown-key": ("devcie: 1", ["devcie: 1: unknown key; did you mean device?"]),
    "unknown-key-unlike-any": (
        "zzz: 1",
        [f"zzz: 1: unknown key; allowed are {', '.join(PortConfig.model_fields)}"],
    ),
    "unknown-guard": (
        "allow: {mac_spoof: true}",
        ["allow.mac_spoof: true: unknown key; did you mean mac_spoofing?"],
    ),
    "guard-not-bool": (
        "allow: {dhcp_server: yes}",
        ["allow.dhcp_server: yes: must be true or false (in YAML 1.2 yes, no, on and off are text)"],
    ),
    "queue": (
        "queue: hardwre",
        ["queue: hardwre: must be auto, hardware, software or off; did you mean hardware?"],
    ),
    "delivery": ("delivery: 5", ["delivery: 5: must be auto, frames or gro"]),
    "weight-high": ("weight: 101", ["weight: 101: must be at most 100"]),
    "weight-low": ("weight: -1", ["weight: -1: must be at least 0"]),
    "weight-text": ('weight: "50"', ['weight: "50": must be a whole number']),
    "weight-fraction": ("weight: 1.5", ["weight: 1.5: must be a whole number"]),
    "weight-bool": ("weight: true", ["weight: true: must be a whole number"]),
    "cpu-negative": ("cpu: -1", ["cpu: -1: must be the number of a CPU, 0 or more, auto, or nic"]),
    "cpu-text": ("cpu: all", ["cpu: all: must be the number of a CPU, 0 or more, auto, or nic"]),
    "cpu-bool": ("cpu: true", ["cpu: true: must be the number of a CPU, 0 or more, auto, or nic"]),
    "mac-group": ('mac: "01:00:5e:00:00:01"', [f'mac: "01:00:5e:00:00:01": {GROUP}']),
    "mac-zero": (
        "mac: 00:00:00:00:00:00",
        ["mac: 00:00:00:00:00:00: the all-zero address cannot be a port's"],
    ),
    "mac-short": ("mac: 02:15:5d", [f"mac: 02:15:5d: {MAC_FORM}, a list of them, or auto"]),
    "mac-mixed": ("mac: 02:15-5d:00:00:01", [f"mac: 02:15-5d:00:00:01: {MAC_FORM}, a list of them, or auto"]),
    "mac-number": ("mac: 021500000001", [f"mac: 021500000001: {MAC_FORM}, a list of them, or auto"]),
    "mac-null": ("mac: ", [f"mac: (empty): {MAC_FORM}, a list of them, or auto"]),
    "mac-list-empty": ("mac: []", [f"mac: []: {MAC_FORM}, a list of them, or auto"]),
    "mac-list": (
        "mac: [02:15:5d:00:00:01, x, auto, 02-15-5D-00-00-01]",
        [
            f"mac[1]: x: {MAC_FORM}",
            f"mac[2]: auto: {MAC_FORM}",
            "mac[3]: 02-15-5D-00-00-01: is in the list already",
        ],
    ),
    "vlan-0": ("vlan: 0", [f"vlan: 0: {VID_0}"]),
    "vlan-4095": ("vlan: 4095", [f"vlan: 4095: {VID_4095}"]),
    "vlan-4096": ("vlan: 4096", ["vlan: 4096: must be a VID, 1 to 4094"]),
    "vlan-negative": ("vlan: -1", ["vlan: -1: must be a VID, 1 to 4094"]),
    "vlan-bool": ("vlan: true", ["vlan: true: must be a VID, 1 to 4094"]),
    "vlan-text": (
        "vlan: ten",
        ["vlan: ten: must be a VID, or {trunk: [10, 20, ...], native: 1}; leave it out for untagged"],
    ),
    "vlan-trunk": (
        'vlan: {trunk: [0, "9-1", x, 10], natve: 1, native: 4095}',
        [
            "vlan.natve: 1: unknown key; did you mean native?",
            f"vlan.trunk[0]: 0: {VID_0}",
            'vlan.trunk[1]: "9-1": the first VID of a range must not be above the last',
            'vlan.trunk[2]: x: must be a VID or a range such as "100-199"',
            f"vlan.native: 4095: {VID_4095}",
        ],
    ),
    "vlan-trunk-missing": (
        "vlan: {native: 1}",
        ["vlan.trunk: must be a list of VIDs and ranges, with at least one"],
    ),
    "af-xdp-too": ("af_xdp: {}", ["device: both are there: exactly one of device and af_xdp"]),
}


@pytest.mark.parametrize(("port", "expected"), BAD_PORTS.values(), ids=BAD_PORTS)
def test_a_bad_value_of_a_port(port: str, expected: list[str]) -> None:
    text = with_ports(f"switch: ext0, device: p0, {port}")
    assert problems_of(text) == [f"ports.p0.{problem}" for problem in expected]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a b", "a/b", "eth0:1", "x" * 16, "ü" * 8, "à", "a\\x00", "\\ud800"],
    ids=["empty", "dot", "dots", "space", "slash", "colon", "16", "16-bytes", "byte-a0", "nul", "surrogate"],
)
def test_a_device_name_that_the_kernel_would_refuse(name: str) -> None:
    assert problems_of(with_ports(f'switch: ext0, device: "{name}"')) == [
        f'ports.p0.device: "{name}": {INTERFACE_FORM}'
    ]


@pytest.mark.parametrize("name", ["x" * 15, "é" * 7, "eth1.100", "a@b", "-"])
def test_a_device_name_that_the_kernel_takes(name: str) -> None:
    assert one_port(f'device: "{name}"').device == name


@pytest.mark.parametrize("name", ["-x", "a b", "x" * 64, "é", "a/b"])
def test_a_bad_port_name(name: str) -> None:
    assert problems_of(BASE + f'  "{name}": {{switch: ext0, device: p}}') == [
        f"ports.{json.dumps(name) if name != '-x' and name != 'x' * 64 else name}: "
        "a name is 1 to 63 letters, digits, '_', '.' and '-', a letter or digit first"
    ]


BAD_FILES = {
    "version-missing": ("nics: {}", ["version: missing: must be 1"]),
    "version-2": ("version: 2", ["version: 2: must be 1: this version of offload reads no other"]),
    "version-bool": ("version: true", ["version: true: must be 1: this version of offload reads no other"]),
    "top-key": ("version: 1\nport: {}", ["port: {}: unknown key; did you mean ports?"]),
    "not-a-mapping": ("- 1", ["line 1: a list: must be a mapping that starts with version: 1"]),
    "empty": ("", ["line 1: null: must be a mapping that starts with version: 1"]),
    "section-list": ("version: 1\nnics: [eth1]", ["nics: [eth1]: must be a mapping"]),
    "xdp-mode": (
        "version: 1\nnics: {eth1: {xdp_mode: nativ}}",
        ["nics.eth1.xdp_mode: nativ: must be native or generic; did you mean native?"],
    ),
    "cpus": (
        "version: 1\nnics: {eth1.5: {queues: {cpus: [0, -1, x, 0], max: -1}}}",
        [
            'nics."eth1.5".queues.cpus[1]: -1: must be the number of a CPU, 0 or more',
            'nics."eth1.5".queues.cpus[2]: x: must be the number of a CPU, 0 or more',
            'nics."eth1.5".queues.cpus[3]: 0: is in the list already',
            'nics."eth1.5".queues.max: -1: must be at least 0',
        ],
    ),
    "cpus-empty": (
        "version: 1\nnics: {eth1: {queues: {cpus: []}}}",
        ["nics.eth1.queues.cpus: []: must be a list of CPUs, or absent for any CPU"],
    ),
    "listen-port": (
        'version: 1\nmetrics: {listen: "127.0.0.1:70000"}',
        [
            'metrics.listen: "127.0.0.1:70000": must be host:port, such as 127.0.0.1:9808 or [::]:9808; '
            "the port is 1 to 65535"
        ],
    ),
    "listen-brackets": (
        'version: 1\nmetrics: {listen: "2001:db8::1:9808"}',
        [
            'metrics.listen: "2001:db8::1:9808": must be host:port, such as 127.0.0.1:9808 or [::]:9808; '
            "an IPv6 address stands in brackets"
        ],
    ),
    "range-backwards": (
        "version: 1\nmac_range: {first: 02:00:00:00:00:02, last: 02:00:00:00:00:01}",
        ["mac_range.last: 02:00:00:00:00:01: must not be below mac_range.first, 02:00:00:00:00:02"],
    ),
    "range-group": (
        "version: 1\nmac_range: {first: 03:00:00:00:00:00, last: 03:00:00:00:00:01}",
        [f"mac_range.first: 03:00:00:00:00:00: {GROUP}", f"mac_range.last: 03:00:00:00:00:01: {GROUP}"],
    ),
    "range-mixed": (
        "version: 1\nmac_range: {first: 02:00:00:00:00:00, last: 06:00:00:00:00:00}",
        [
            "mac_range.last: 06:00:00:00:00:00: must begin with 02 like mac_range.first: "
            "there are group addresses in between"
        ],
    ),
    "range-half": (
        "version: 1\nmac_range: {first: 02:00:00:00:00:00}",
        [f"mac_range.last: missing: {MAC_FORM}"],
    ),
    "uplink-missing": (
        "version: 1\nswitches: {s: {type: external}}",
        ["switches.s.uplink: missing: an external switch needs the NIC that it shares"],
    ),
    "uplink-unlisted": (
        "version: 1\nnics: {eth1: }\nswitches: {s: {type: external, uplink: eth2}}",
        ["switches.s.uplink: eth2: must be listed under nics; did you mean eth1?"],
    ),
    "uplink-no-nics": (
        "version: 1\nswitches: {s: {type: external, uplink: eth2}}",
        ["switches.s.uplink: eth2: must be listed under nics"],
    ),
    "uplink-shared": (
        "version: 1\nnics: {eth1: {}}\n"
        "switches: {a: {type: external, uplink: eth1}, b: {type: external, uplink: eth1}}",
        ["switches.b.uplink: eth1: must be a NIC of its own: switches.a has this one"],
    ),
    "uplink-shared-and-unlisted": (
        "version: 1\nswitches: {a: {type: external, uplink: eth1}, b: {type: external, uplink: eth1}}",
        [
            "switches.a.uplink: eth1: must be listed under nics",
            "switches.b.uplink: eth1: must be listed under nics",
            "switches.b.uplink: eth1: must be a NIC of its own: switches.a has this one",
        ],
    ),
    "uplink-of-private": (
        "version: 1\nnics: {eth1: {}}\nswitches: {s: {type: private, uplink: eth1, host: {interface: h}}}",
        [
            "switches.s.uplink: eth1: must be absent: a switch of type private has no uplink",
            "switches.s.host: {interface: h}: must be absent: the host has no part in a private switch; "
            "use type: internal",
        ],
    ),
    "uplink-of-internal": (
        "version: 1\nnics: {eth1: {}}\nswitches: {s: {type: internal, uplink: eth1}}",
        [
            "switches.s.uplink: eth1: must be absent: a switch of type internal has no uplink",
            "switches.s.host: missing: an internal switch joins the host to its VMs; "
            "without it use type: private",
        ],
    ),
    "host-on-a-python-bridge": (
        "version: 1\nnics: {eth1: {}}\n"
        "switches: {s: {type: external, uplink: eth1, bridge: python, host: {interface: h}}}",
        [
            "switches.s.host: {interface: h}: must be absent with bridge: python: "
            "the host's own traffic shall not hang on a process; use bridge: kernel"
        ],
    ),
    "extensions-of-a-kernel-bridge": (
        "version: 1\nswitches: {s: {type: private, extensions: [{name: mirror}]}}",
        [
            "switches.s.extensions: [{name: mirror}]: must be absent: "
            "only a switch with bridge: python has extensions"
        ],
    ),
    "derived-names-that-clash": (
        "version: 1\nswitches: {s: {type: internal, host: {interface: h}}, h-sw: {type: private}}",
        ["switches.h-sw: must not be the name of another interface: switches.s.host.interface has this one"],
    ),
    "hosts-mac-is-a-ports": (
        'version: 1\nswitches: {s: {type: internal, host: {interface: h, mac: "02:15:5d:00:00:01"}}}\n'
        'ports: {a: {switch: s, device: a, mac: "02:15:5d:00:00:01"}}',
        ['ports.a.mac: "02:15:5d:00:00:01": must be unique on switches.s (untagged): switches.s.host has it'],
    ),
    "switch-type": (
        "version: 1\nswitches: {s: {}}",
        ["switches.s.type: missing: must be private, internal or external"],
    ),
    "switch-named-as-nic": (
        "version: 1\nnics: {eth1: {}}\nswitches: {eth1: {type: external, uplink: eth1}}",
        ["switches.eth1: must not be the name of another interface: nics.eth1 has this one"],
    ),
    "switch-name-long": (
        "version: 1\nswitches: {a-switch-with-a-name: {type: private}}",
        [f"switches.a-switch-with-a-name: {INTERFACE_FORM}"],
    ),
    "host": (
        "version: 1\nswitches: {s: {type: internal, host: "
        "{addresses: [192.0.2.1], vlan: 0, mac: x, routes: [{via: y}]}}}",
        [
            "switches.s.host.interface: missing: must be a name for the host's interface",
            "switches.s.host.addresses[0]: 192.0.2.1: "
            "must be an address with its prefix length, such as 192.0.2.1/24",
            f"switches.s.host.vlan: 0: {VID_0}",
            f"switches.s.host.mac: x: {MAC_FORM}",
            "switches.s.host.routes[0].to: missing: must be default or a network",
            "switches.s.host.routes[0].via: y: must be an address such as 192.0.2.254",
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file(text: str, expected: list[str]) -> None:
    assert problems_of(text) == expected


# --- bad files: what values mean to each other ---------------------------------------------------

A = 'mac: "02:15:5d:00:00:0a"'

CLASHES = {
    "mac": (
        [f"switch: ext0, device: a, {A}", f"switch: ext0, device: b, {A}"],
        ['ports.p1.mac: "02:15:5d:00:00:0a": must be unique on nics.eth1 (untagged): ports.p0 has it'],
    ),
    "mac-vid": (
        [
            f"switch: ext0, device: a, {A}, vlan: {{trunk: [10, 11, 12, 20]}}",
            f"switch: ext0, device: b, {A}, vlan: 20",
            "switch: ext0, device: c, mac: [02:15:5d:00:00:0b, 02:15:5d:00:00:0a], "
            "vlan: {trunk: [11-14], native: 10}",
        ],
        [
            'ports.p1.mac: "02:15:5d:00:00:0a": must be unique on nics.eth1 (VID 20): ports.p0 has it',
            "ports.p2.mac[1]: 02:15:5d:00:00:0a: must be unique on nics.eth1 (VID 10-12): ports.p0 has it",
        ],
    ),
    "device": (
        ["switch: ext0, device: a", "switch: ext1, device: a"],
        ["ports.p1.device: a: must be a device of its own: ports.p0.device has this one"],
    ),
    "device-is-uplink": (
        ["switch: ext0, device: eth2"],
        ["ports.p0.device: eth2: must be a device of its own: nics.eth2 has this one"],
    ),
    "device-is-switch": (
        ["switch: ext0, device: ext1"],
        ["ports.p0.device: ext1: must be a device of its own: switches.ext1 has this one"],
    ),
    "no-such-switch": (
        ["switch: ext2, device: a", "switch: lan, device: b"],
        [
            "ports.p0.switch: ext2: must be listed under switches; did you mean ext1?",
            "ports.p1.switch: lan: must be listed under switches; there are ext0, ext1",
        ],
    ),
    "neither-end": (["switch: ext0"], ["ports.p0.device: missing: exactly one of device and af_xdp"]),
    "no-switch": (["device: a"], ["ports.p0.switch: missing: must be the name of a switch"]),
}


@pytest.mark.parametrize(("ports", "expected"), CLASHES.values(), ids=CLASHES)
def test_ports_that_clash(ports: list[str], expected: list[str]) -> None:
    assert problems_of(with_ports(*ports)) == expected


def test_one_mac_may_be_on_two_nics_and_in_two_vlans() -> None:
    ports = [
        f"switch: ext0, device: a, {A}",
        f"switch: ext1, device: b, {A}",
        f"switch: ext0, device: c, {A}, vlan: 10",
    ]
    assert len(parse(with_ports(*ports)).ports) == 3


def test_auto_needs_a_range() -> None:
    text = with_ports("switch: ext0, device: a").replace("mac_range", "metrics: null #")
    assert problems_of(text) == [
        "ports.p0.mac: auto: needs mac_range to draw from: "
        "set mac_range: {first: ..., last: ...}, or an address here"
    ]


@pytest.mark.parametrize(("count", "good"), [(1022, True), (1023, False)], ids=["fits", "one-more"])
def test_a_bridge_takes_1023_devices(count: int, good: bool) -> None:
    text = with_ports(*(f"switch: ext0, device: d{index}" for index in range(count)))
    if good:
        assert len(parse(text).ports) == count
    else:
        assert problems_of(text) == [
            "switches.ext0: has 1024 devices, uplink included; a kernel bridge takes 1023: "
            "move ports to another switch"
        ]


def test_a_nic_takes_65536_filters() -> None:
    ports = [f"switch: ext0, device: d{index}, vlan: {{trunk: [1-4094]}}" for index in range(16)]
    assert len(parse(with_ports(*ports, "switch: ext0, device: e, vlan: {trunk: [1-32]}")).ports) == 17
    assert problems_of(with_ports(*ports, "switch: ext0, device: e, vlan: {trunk: [1-33]}")) == [
        "nics.eth1: has 65537 filters (addresses times VIDs of its ports); at most 65536"
    ]


def test_every_problem_is_told_at_once() -> None:
    """Of the document, of single values and between entries; none that only follows from another."""
    text = """
        version: 1
        metrcs: {}
        mac_range: {first: 02:00:00:00:00:00, last: x}
        nics: {eth1: {xdp_mode: fast}}
        switches:
          ext0: {type: external, uplink: eth1, bridge: ovs}
          ext1: {type: external, uplink: eth1}
        ports:
          a: {switch: ext0, device: x, weight: 200}
          b: {switch: ext1, device: y, mac: 02:00:00:00:00:01, mac: 02:00:00:00:00:02}
          c: {switch: ext2, device: y, mac: 02:00:00:00:00:03}
          d: {switch: ext0, device: z, mac: auto}
        """
    assert problems_of(text) == [
        "ports.b.mac: duplicate key on line 11; it is already on line 11",
        f"mac_range.last: x: {MAC_FORM}",
        "nics.eth1.xdp_mode: fast: must be native or generic",
        "switches.ext0.bridge: ovs: must be kernel or python",
        "ports.a.weight: 200: must be at most 100",
        "metrcs: {}: unknown key; did you mean metrics?",
        "ports.c.switch: ext2: must be listed under switches; did you mean ext1?",
        "ports.c.device: y: must be a device of its own: ports.b.device has this one",
    ]


def test_a_duplicate_key_leaves_the_first_value_in_place() -> None:
    assert problems_of(with_ports("switch: ext0, device: a, weight: 200, weight: [1, x]")) == [
        "ports.p0.weight: duplicate key on line 9; it is already on line 9",
        "ports.p0.weight: 200: must be at most 100",
    ]


def test_a_byte_order_mark_shifts_no_value() -> None:
    (problem,) = problems_of("\ufeffversion: 234")
    assert problem.startswith("version: 234: ")


def test_a_range_of_one_address_is_a_range() -> None:
    text = "version: 1\nmac_range: {first: 02:00:00:00:00:01, last: 02:00:00:00:00:01}"
    assert parse(text).mac_range is not None


def test_the_error_names_its_source_and_asks_the_operator() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("version: 3", "/etc/offload/offload.yaml")
    assert str(caught.value).startswith("/etc/offload/offload.yaml: version: 3: must be 1")
    assert caught.value.exit_code == 2


# --- bad YAML ------------------------------------------------------------------------------------

BAD_YAML = {
    "syntax": ("version: 1\nnics: {eth1\n", "line 3, column 1: YAML syntax: "),
    "colon": ("a: b: c", "line 1, column 5: YAML syntax: mapping values are not allowed here"),
    "tab": ("version: 1\nnics:\n\teth1: {}", "line 3, column 1: YAML syntax: "),
    "control-character": ("version: 1\nnics: \x01", "line 2: YAML syntax: character U+0001 is not allowed"),
    "escape": ('a: "\\UFFFFFFFF"', "the file: YAML syntax: an escape sequence stands for no character"),
    "yaml-version": ("%YAML 1.7\n---\nversion: 1", "the file: YAML syntax: version "),
    "duplicate": ("version: 1\nnics: {}\nnics: {}", "nics: duplicate key on line 3; it is already on line 2"),
    "anchor": ("a: &x 1", "line 1, column 4: anchors and aliases are not allowed"),
    "alias": ("version: 1\nnics: *x", "line 2, column 7: anchors and aliases are not allowed"),
    "object": ("a: !!python/object:os.system x", "line 1, column 4: tags are not allowed"),
    "tag": ("a: !!str 1", "line 1, column 4: tags are not allowed"),
    "two-documents": ("version: 1\n---\nversion: 1", "line 2, column 1: one document only"),
    "deep": ("[" * 5000, "line 1, column 18: nested more than 16 levels deep"),
    "complex-key": ("? [a]\n: 1", "line 1, column 3: a key must be text"),
    "merge-key": ("version: 1\n<<: {nics: {}}", '"<<": {nics: {}}: unknown key'),
}


@pytest.mark.parametrize(("text", "expected"), BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml(text: str, expected: str) -> None:
    (problem,) = problems_of(text)
    assert expected in problem


def test_an_alias_bomb_is_refused_before_it_is_expanded() -> None:
    bomb = "a: &a [x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
    )
    assert "anchors and aliases" in problems_of(bomb)[0]


def test_more_than_8_mib_is_refused() -> None:
    assert problems_of("#" * (MAX_BYTES + 1)) == ["size: at most 8 MiB"]
    assert problems_of("é" * (MAX_BYTES // 2 + 1)) == ["size: at most 8 MiB"]


def test_a_long_value_is_shown_cut() -> None:
    (problem,) = problems_of(f"version: {'x' * 500}")
    assert problem.startswith("version: " + "x" * 59 + "…: must be 1")


# --- single ports --------------------------------------------------------------------------------


def test_a_port_file_and_a_request_give_the_same_port() -> None:
    mapping: Mapping[str, object] = {
        "switch": "ext0",
        "device": "x",
        "vlan": {"trunk": [10, "20-29"]},
        "cpu": 2,
    }
    text = "switch: ext0\ndevice: x\nvlan: {trunk: [10, 20-29]}\ncpu: 2\n"
    assert parse_port("x", mapping, "request") == parse_port("x", text, "x.yaml")


@pytest.mark.parametrize(
    ("name", "port", "expected"),
    [
        pytest.param(
            "x", "device: d\ndevice: d\nswitch: s", "ports.x.device: duplicate key on line 2", id="duplicate"
        ),
        pytest.param("x", "", "ports.x: null: must be a mapping", id="empty"),
        pytest.param("x", {"switch": 1, "device": "d"}, "ports.x.switch: 1: must be text", id="type"),
        pytest.param("x", {"switch": "s"}, "ports.x.device: missing: exactly one of", id="no-end"),
        pytest.param("x y", {"switch": "s", "device": "d"}, 'ports."x y": a name is', id="name"),
        pytest.param(
            "x", {"switch": "s", "device": "d", "mac": ["zz"]}, "ports.x.mac[0]: zz: must be", id="mac"
        ),
    ],
)
def test_a_bad_port(name: str, port: str | dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_port(name, port, "x.yaml")
    assert str(caught.value.problems[0]).startswith(expected)
    assert str(caught.value).startswith("x.yaml: ")


def test_the_config_file_wins_over_a_port_file() -> None:
    config = parse(with_ports("switch: ext0, device: a"))
    extra = {
        "p0": parse_port("p0", {"switch": "ext1", "device": "b"}, "p0.yaml"),
        "p9": parse_port("p9", {"switch": "ext1", "device": "c"}, "p9.yaml"),
    }
    merged = merge_ports(config, extra)
    assert {name: port.device for name, port in merged.ports.items()} == {"p0": "a", "p9": "c"}
    assert set(config.ports) == {"p0"}


def test_merged_ports_are_checked_against_the_whole() -> None:
    config = parse(with_ports(f"switch: ext0, device: a, {A}"))
    extra = {"p9": parse_port("p9", {"switch": "ext0", "device": "a", "mac": "02:15:5d:00:00:0a"}, "p9.yaml")}
    with pytest.raises(ConfigError) as caught:
        merge_ports(config, extra, "ports.d")
    assert [str(problem) for problem in caught.value.problems] == [
        "ports.p9.device: a: must be a device of its own: ports.p0.device has this one",
        "ports.p9.mac: 02:15:5d:00:00:0a: must be unique on nics.eth1 (untagged): ports.p0 has it",
    ]


FEW_MACS = [f"02:15:5d:00:00:0{number}" for number in range(9)]
FEW_PORTS = st.fixed_dictionaries(
    {
        "switch": st.sampled_from(["ext0", "lan0"]),
        "mac": st.lists(st.sampled_from(FEW_MACS), min_size=1, max_size=2, unique=True),
    },
    optional={
        "vlan": st.sampled_from([10, {"trunk": [10, 20], "native": 10}]),
        "queue": st.sampled_from(["hardware", "off"]),
    },
).flatmap(
    lambda port: st.one_of(
        st.sampled_from(["a", "b", "p1-xsk", "h0"]).map(lambda device: {**port, "device": device}),
        st.sampled_from(["hardware", "software"]).map(lambda mode: {**port, "af_xdp": {"mode": mode}}),
    )
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["p1", "p2", "p3", "ext0-py"]), st.none() | FEW_PORTS), max_size=20
)


@given(CHANGES)
@settings(max_examples=300)
def test_what_has_not_changed_need_not_be_compared(
    changes: list[tuple[str, dict[str, object] | None]],
) -> None:
    """Ports come, change and go one by one; what clashes is refused, and the others stay."""
    base = parse(
        """
        version: 1
        nics: {eth1: {queues: {cpus: [0]}}}
        switches:
          ext0: {type: external, uplink: eth1, bridge: python}
          lan0: {type: internal, host: {interface: h0, mac: "02:15:5d:00:00:03", vlan: 10}}
        ports: {p0: {switch: ext0, device: z, mac: "02:15:5d:00:00:00"}}
        """
    )
    known, files = merge_ports(base, {}), dict[str, PortConfig]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(config_module, "MAX_BRIDGE_PORTS", 3)
        patched.setattr(config_module, "MAX_FILTERS", 6)
        for name, port in changes:
            after = {other: file for other, file in files.items() if other != name}
            if port:
                with suppress(ConfigError):  # it is wrong by itself
                    after[name] = parse_port(name, port, name)
            try:
                whole = merge_ports(base, after)
            except ConfigError as error:
                with pytest.raises(ConfigError, match=f"^{re.escape(str(error))}$"):
                    merge_ports(base, after, known=known)
            else:
                known, files = merge_ports(base, after, known=known), after
                assert known == whole


# --- what this version does with it --------------------------------------------------------------


def test_frames_for_an_af_xdp_socket_are_never_merged() -> None:
    for way in ("auto", "frames"):
        parse(with_ports(f"switch: ext0, af_xdp: {{}}, delivery: {way}"))
    with pytest.raises(ConfigError) as caught:
        parse(with_ports("switch: ext0, af_xdp: {}, delivery: gro"))
    assert "ports.p0.delivery: gro: must be auto or frames" in str(caught.value)


@pytest.mark.parametrize("bridge", ["python", "kernel"])
def test_a_python_bridge_knows_its_devices_by_name(bridge: str) -> None:
    text = f"""
    version: 1
    nics: {{eth1: {{}}}}
    switches: {{ext0: {{type: external, uplink: eth1, bridge: {bridge}}}}}
    ports: {{eth1: {{switch: ext0, device: a, mac: "02:15:5d:00:00:01"}}}}
    """
    if bridge == "python":
        assert problems_of(text) == [
            "ports.eth1: a Python bridge calls another device eth1: rename this port"
        ]
    else:
        parse(text)


AF_XDP = {
    "hardware-needs-a-nic": (
        ["switch: priv0, af_xdp: {mode: hardware}"],
        ["ports.p0.af_xdp.mode: hardware: must be software or auto: its switch has no NIC"],
    ),
    "one-owner-of-a-nic": (
        ["switch: ext0, af_xdp: {mode: hardware}", "switch: ext0, af_xdp: {mode: hardware}"],
        [
            "ports.p1.af_xdp.mode: hardware: must be software or auto: ports.p0 has the queues of eth1, "
            "which does not steer, so that one port alone can have sockets there"
        ],
    ),
    "zero-copy-of-a-veth": (
        ["switch: ext0, af_xdp: {zero_copy: require}"],
        [
            "ports.p0.af_xdp.zero_copy: require: only a NIC's own queue can do without copying: "
            "mode: hardware with it, or zero_copy: auto"
        ],
    ),
    "nobody-to-trust": (
        ["switch: ext0, af_xdp: {trusted: true}"],
        [
            "ports.p0.af_xdp.trusted: true: must be absent: only with mode: hardware is there a queue of "
            "the NIC to trust somebody with"
        ],
    ),
    "no-way-there": (
        ["switch: ext0, queue: off, af_xdp: {mode: hardware}"],
        [
            "ports.p0.queue: off: must not be off with af_xdp.mode: hardware: the NIC's sockets would get no "
            "frame"
        ],
    ),
    "its-end-has-a-name": (
        ["switch: ext0, af_xdp: {}", "switch: ext0, device: p0-xsk"],
        ["ports.p1.device: p0-xsk: must be a device of its own: ports.p0.af_xdp has this one"],
    ),
}


@pytest.mark.parametrize(("ports", "expected"), AF_XDP.values(), ids=AF_XDP)
def test_what_af_xdp_does_not_go_with(ports: list[str], expected: list[str]) -> None:
    given = [f'{port}, mac: "02:15:5d:00:00:0{number}"' for number, port in enumerate(ports, 1)]
    text = with_ports(*given).replace("switches:", "switches:\n  priv0: {type: private}", 1)
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert [str(problem) for problem in caught.value.problems] == expected


QUEUES = {
    "no-nic": (
        "switch: priv0, device: a, queue: hardware",
        "ports.p0.queue: hardware: must be auto, software or off: its switch has no NIC",
    ),
    "not-its-cpu": (
        "switch: ext0, device: a, cpu: 1",
        "ports.p0.cpu: 1: must be of nics.eth1.queues.cpus: 0, 2; or auto, or nic",
    ),
}


@pytest.mark.parametrize(("port", "expected"), QUEUES.values(), ids=QUEUES)
def test_what_a_queue_cannot_be(port: str, expected: str) -> None:
    text = with_ports(f'{port}, mac: "02:15:5d:00:00:01"')
    text = text.replace("switches:", "switches:\n  priv0: {type: private}", 1)
    text = text.replace("eth1: {}", "eth1: {queues: {cpus: [0, 2]}}")
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert [str(problem) for problem in caught.value.problems] == [expected]


def test_several_hardware_ports_have_a_nic_each() -> None:
    text = with_ports('switch: ext0, mac: "02:15:5d:00:00:01", af_xdp: {mode: hardware, zero_copy: require}')
    assert parse(text).ports["p0"].af_xdp is not None


def test_with_channels_every_port_has_a_device() -> None:
    config = with_channels(parse(with_ports("switch: ext0, af_xdp: {}", "switch: ext0, device: a")))
    assert [port.device for port in config.ports.values()] == ["p0-xsk", "a"]
    assert channel_outer("a-name-of-many-letters") == "a-name-of-m-xsk"


def test_warnings_are_given_once_each() -> None:
    one = parse(CONTRACT.replace("cpus: [1, 2, 3]", "cpus: [1]"))
    assert warnings(one) == ["nics.eth1.queues.rebalance: queues.cpus has one CPU, so no queue can move"]
    assert warnings(parse(CONTRACT)) == []
    assert warnings(parse("version: 1")) == []


def test_the_cpus_that_a_config_names() -> None:
    config = parse(with_ports("switch: ext0, device: a, cpu: 7", "switch: ext0, device: b, cpu: nic"))
    assert cpus_named(config) == {"ports.p0.cpu": 7}
    assert cpus_named(parse(CONTRACT)) == {f"nics.eth1.queues.cpus[{index}]": index + 1 for index in range(3)}


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9808", "127.0.0.1", 9808),
        ("[2001:db8::1]:80", "2001:db8::1", 80),
        ("[::]:80", "::", 80),
        ("localhost:1", "localhost", 1),
        ("metrics.example:65535", "metrics.example", 65535),
    ],
)
def test_listen(text: str, host: str, port: int) -> None:
    assert split_listen(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    ["", "9808", ":9808", "a:", "a:0", "a:65536", "::1:80", "[::1]", "[x]:1", "300.1.1.1:1", "-a:1", "a b:1"],
)
def test_bad_listen(text: str) -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        split_listen(text)


# --- any input -----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["trunk", "native", "mode", "owner", "user"]) | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def problems_found_by(read: Callable[[], object]) -> tuple[Problem, ...]:
    """What ``read`` finds wrong. Any exception other than ConfigError comes through."""
    try:
        read()
    except ConfigError as error:
        str(error).encode()
        return error.problems
    return ()


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="{}[]:,-?!&*#|>'\"%@` \t\n\\~<=.01xU", max_size=60))
def test_junk_is_a_config_error(text: str) -> None:
    problems_found_by(lambda: parse(text))


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_a_damaged_config_is_a_config_error(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(CONTRACT)))
    length = data.draw(st.integers(0, 12))
    junk = data.draw(st.text(alphabet="{}[]:,-?!&*#|>'\"% \t\n~0129axUN", max_size=4))
    problems_found_by(lambda: parse(CONTRACT[:start] + junk + CONTRACT[start + length :]))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*PortConfig.model_fields, "x"]), JSON, max_size=6))
def test_a_request_of_any_shape_is_a_config_error(mapping: dict[str, object]) -> None:
    problems_found_by(lambda: parse_port("web1", mapping, "request"))


MACS = st.integers(1, 2**40 - 1).map(lambda number: "02:" + number.to_bytes(5, "big").hex(":"))
VIDS = st.integers(1, 4094)
VLAN_MODES = (
    st.just(VlanMode())
    | VIDS.map(VlanMode)
    | st.builds(VlanMode, st.none() | VIDS, st.frozensets(VIDS, min_size=1, max_size=6))
)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True)
PORTS = st.fixed_dictionaries(
    {
        "switch": st.just("ext0"),
        "mac": st.just("auto") | st.lists(MACS, min_size=1, max_size=3, unique=True),
        "vlan": VLAN_MODES.map(VlanMode.plain),
        "queue": st.sampled_from(["auto", "hardware", "software", "off"]),
        "cpu": st.sampled_from(["auto", "nic"]) | st.integers(0, 1023),
        "weight": st.integers(0, 100),
        "allow": st.fixed_dictionaries({}, optional={"mac_spoofing": st.booleans()}),
    }
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(NAMES, PORTS, max_size=4))
def test_what_is_dumped_is_read_back_the_same(ports: dict[str, dict[str, object]]) -> None:
    whole: dict[str, object] = {
        "version": 1,
        "metrics": None,
        "mac_range": {"first": "02:00:00:00:00:00", "last": "02:ff:ff:ff:ff:ff"},
        "nics": {"null": {}},
        "switches": {"ext0": {"type": "external", "uplink": "null"}},
        "ports": {name: {**port, "device": f"d{index}"} for index, (name, port) in enumerate(ports.items())},
    }
    problems = problems_found_by(lambda: parse(json.dumps(whole)))
    assert all("must be unique" in str(problem) for problem in problems)
    assume(not problems)
    config = parse(json.dumps(whole))
    assert parse(dump(config)) == config
    for name, port in config.ports.items():
        assert parse_port(name, dump(port), name) == port


@given(VLAN_MODES)
def test_every_vlan_mode_has_a_text_form(mode: VlanMode) -> None:
    assert VlanMode.parse(str(mode)) == mode


@given(MACS)
def test_a_normal_mac_stays(mac: str) -> None:
    assert parse_mac(mac) == mac == parse_mac(mac.upper().replace(":", "-"))


def test_numbers_are_decimal_and_all_else_is_text() -> None:
    text = "[010, 0x10, 1_0, 1e3, 1.5, 99999999999999999999, yes, 2001-01-01, ~, True, '1']"
    expected = [10, "0x10", "1_0", "1e3", "1.5", "99999999999999999999", "yes", "2001-01-01", None, True, "1"]
    assert load(text, "x").data == expected


def test_the_limits_are_those_of_the_kernel_and_of_the_classifier() -> None:
    assert config_module.MAX_BRIDGE_PORTS == 1023
    assert config_module.MAX_FILTERS == 65536
