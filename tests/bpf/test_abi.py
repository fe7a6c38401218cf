"""What C and Python must agree on: layouts, constants, and where a key is in the filter table."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import pytest

from offload import classifier, plan
from offload.classifier import BUCKET_BITS, KEY_BITS, unmix
from offload.config import AllowConfig
from offload.kernel import dataplane
from offload.kernel.abi import Layout
from offload.kernel.compile import Artifact, compiled, sources
from tests.bpf.loaded import DEFINES, MAX_PORTS, XDP_PASS, XDP_REDIRECT, Vmq, flat
from tests.lab import WIRE_MAC, tag, test_frame

XDP_PATHS = ["socket", "direct", "queued", "handed", "returned", "left", "merged"]
TC_PATHS = ["bridged", "local", "tx_local", "tx_direct", "tx_bridge"]
DROPS = ["vlan_nic", "vlan_queue", "vlan_bridge", "vlan_sent", "spoofed", "guard_dhcp", "guard_ra"]
REASONS = ["broadcast", "multicast", "no_filter", "malformed", "paused", "no_device", "no_cpu", "too_big"]


def tallies(*names: str) -> list[str]:
    return [f"{name}.{unit}" for name in names for unit in ("packets", "bytes")]


LAYOUTS = {
    "ports": ("=IHHIHH", ["cpu", "pvid", "flags", "ifindex", "max_len", "queue"]),
    "port_counters": (
        "=34Q",
        [*tallies(*XDP_PATHS), "merged_buffers", *tallies(*TC_PATHS), *DROPS, "link_local", "host"],
    ),
    "nic_counters": ("=18Q", tallies(*REASONS, "frags")),
    "served": ("=IHH", ["port", "vid", "unused"]),
    "function_counters": ("=6Q", tallies("group", "stranger", "passed")),
    "channel_counters": ("=4Q", tallies("handed", "no_consumer")),
    "members": ("=IIHHHH", ["port", "network", "role", "flags", "pvid", "unused"]),
    "networks": ("=IIHHI", ["uplink", "conduit", "untagged", "flags", "unused"]),
    "stations": ("=IIIIQ", ["port", "ifindex", "state", "moves", "since"]),
}
"""Map: its value as ``struct`` has it (no padding anywhere), and the fields in order."""


def switch(cache: Path) -> Artifact:
    return compiled("switch.c", dataplane.SWITCH_DEFINES, cache)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_pinned(name: str, cache: Path) -> None:
    """A change here is a change of what is pinned: the pin directory's version must change with it."""
    channel = compiled("channel.c", {"MAX_CHANNEL_QUEUES": 1}, cache)
    spec = {**switch(cache).maps, **compiled("vmq.c", DEFINES, cache).maps, **channel.maps}[name]
    pinned, fields = LAYOUTS[name]
    layout = Layout(spec.value)
    assert spec.value_size == layout.size == struct.calcsize(pinned)
    raw = random.Random(1).randbytes(layout.size)  # no two fields read alike
    assert dict(flat(layout.read(raw))) == dict(zip(fields, struct.unpack(pinned, raw), strict=True))


def test_layouts_with_arrays_are_pinned(cache: Path) -> None:
    maps = switch(cache).maps
    key, trunk, news = Layout(maps["stations"].key), Layout(maps["trunks"].value), Layout(maps["news"].value)
    assert (key.size, maps["stations"].key_size) == (12, 12)
    assert key.read(bytes(range(12))) == {"network": 0x03020100, "mac": (4, 5, 6, 7, 8, 9), "vid": 0x0B0A}
    assert (trunk.size, maps["trunks"].value_size) == (512, 512)
    assert trunk.read(bytes(512)) == {"words": (0,) * 64}
    assert news.size == 20
    assert news.read(bytes(range(20))) == {
        "network": 0x03020100,
        "port": 0x07060504,
        "state": 0x0B0A0908,
        "vid": 0x0D0C,
        "mac": (14, 15, 16, 17, 18, 19),
    }


def test_a_bucket_is_half_a_cache_line(cache: Path) -> None:
    spec = compiled("vmq.c", DEFINES, cache).maps["classifier"]
    assert (spec.key_size, spec.value_size, spec.max_entries) == (4, 32, classifier.BUCKETS)


@pytest.mark.parametrize("name", ["ports", "port_counters"])
def test_maps_of_both_files_are_alike(name: str, cache: Path) -> None:
    vmq = compiled("vmq.c", {**dataplane.SWITCH_DEFINES, "MAX_CPUS": 1, "MAX_NIC_QUEUES": 4}, cache)
    assert switch(cache).maps[name] == vmq.maps[name]


def test_padding_is_refused() -> None:
    hole = [
        "row",
        [["a", "unsigned char"], ["__pad_1", ["char", [3]]], ["b", "unsigned int"]],
        "struct_packed",
    ]
    with pytest.raises(ValueError, match="padding"):
        Layout(hole)


CONSTANT = r"^#define (\w+)[ \t]+\(?(0x[0-9a-f]+|\d+)u?l*(?: << (\d+))?\)?[ \t]*(?:/\*.*)?$"


def defined(header: str) -> dict[str, int]:
    """The integer constants that a header of ours defines: numbers, and shifted numbers."""
    found = re.findall(CONSTANT, (sources() / header).read_text(), re.MULTILINE)
    return {name: int(number, 0) << int(shift or 0) for name, number, shift in found}


def test_port_flags_are_the_same() -> None:
    assert {name: value for name, value in defined("abi.h").items() if name.startswith("PORT_")} == {
        "PORT_RUNNING": plan.RUNNING,
        "PORT_TRUNK": plan.TRUNK,
        "PORT_NO_FRAGS": plan.NO_FRAGS,
        "PORT_FRAGS_POSSIBLE": plan.FRAGS_POSSIBLE,
        "PORT_BYPASS": plan.BYPASS,
        "PORT_SOCKETS": plan.SOCKETS,
        "PORT_GRO": plan.GRO,
        "PORT_GRO_TCP": plan.GRO_TCP,
    }


def test_the_switch_s_numbers_are_the_same() -> None:
    ours = {f"MEMBER_{role.upper()}": number for role, number in dataplane.ROLES.items()}
    ours |= {f"STATION_{state.upper()}": number for number, state in enumerate(dataplane.STATES)}
    ours |= {name: bit for name, bit in vars(dataplane).items() if re.match("MEMBER_|NETWORK_", name)}
    ours |= {ALLOW_NAMES[name]: bit for name, bit in dataplane.ALLOWED.items()}
    prefixes = ("MEMBER_", "STATION_", "NETWORK_", "ALLOW_")
    assert {name: value for name, value in defined("abi.h").items() if name.startswith(prefixes)} == ours


ALLOW_NAMES = {
    "mac_spoofing": "ALLOW_SPOOFING",
    "dhcp_server": "ALLOW_DHCP",
    "router_advertisement": "ALLOW_RA",
    "link_local_protocols": "ALLOW_LINK_LOCAL",
}


def test_what_a_port_may_be_allowed_is_what_the_config_says() -> None:
    assert set(dataplane.ALLOWED) == set(AllowConfig.model_fields)


@pytest.mark.parametrize("name", ["CPU_OF_NIC", "NO_PORT"])
def test_words_for_nothing_are_the_same(name: str) -> None:
    assert defined("abi.h")[name] == vars(dataplane)[name]


@pytest.mark.parametrize(
    "name", ["BUCKET_BITS", "BUCKET_SLOTS", "VALUE_BITS", "KEY_BITS", "MIX_FACTOR", "MIX_SHIFT", "FOLD_SHIFT"]
)
def test_the_table_s_constants_are_the_same(name: str) -> None:
    ours = vars(classifier)
    assert defined("classifier.h")[name] == ours.get(name, ours.get(f"_{name}"))


def test_every_port_id_fits_a_slot() -> None:
    assert dataplane.MAX_PORTS < 1 << classifier.VALUE_BITS


def test_every_port_id_fits_a_tag() -> None:
    """In which a Python bridge is told of it."""
    assert dataplane.MAX_PORTS <= 1 << 16


def random_filters(rng: random.Random, count: int) -> dict[tuple[bytes, int], int]:
    """Unicast MACs and VIDs, and the port of each."""
    return {
        (bytes([rng.getrandbits(8) & 0xFE]) + rng.randbytes(5), rng.randrange(1, 4095)): rng.randrange(
            MAX_PORTS
        )
        for _ in range(count)
    }


def test_c_finds_what_python_wrote(vmq: Vmq) -> None:
    """Thousands of random keys in a table that is half full, and as many that are not in it."""
    rng = random.Random(7)
    for _ in range(50_000):
        vmq.classifier.set(unmix(rng.getrandbits(KEY_BITS)), MAX_PORTS)  # no such port
    for port_id in range(MAX_PORTS):
        vmq.set_port(port_id, flags=plan.RUNNING | plan.TRUNK)
    present = random_filters(rng, 2_000)
    for (mac, vid), port_id in present.items():
        vmq.set_filter(mac.hex(":"), vid, port_id)
    absent = [key for key in random_filters(rng, 2_000) if key not in present]

    def verdicts(keys: list[tuple[bytes, int]]) -> list[int]:
        frames = [test_frame(mac.hex(":"), WIRE_MAC, tags=tag(vid)) for mac, vid in keys]
        return vmq.on_cpu(lambda: [vmq.uplink.test_run(frame).verdict for frame in frames])

    before = vmq.counts()
    assert set(verdicts(list(present))) == {XDP_REDIRECT}
    assert set(verdicts(absent)) == {XDP_PASS}
    after = vmq.counts()
    for port_id in range(MAX_PORTS):
        wanted = sum(1 for found in present.values() if found == port_id)
        assert after[f"{port_id}.direct.packets"] == wanted
    assert after["nic.no_filter.packets"] - before["nic.no_filter.packets"] == len(absent)


@pytest.mark.parametrize("slot", range(classifier.BUCKET_SLOTS))
@pytest.mark.parametrize("choice", [0, 1], ids=["first bucket", "second bucket"])
def test_c_looks_at_every_slot(vmq: Vmq, slot: int, choice: int) -> None:
    """A word put there by hand, beside words of other keys."""
    vmq.set_port(5, flags=plan.RUNNING)
    mac = "02:15:5d:00:00:01"
    mixed = classifier.mix(classifier.filter_key(mac, 0))
    remainder = mixed >> BUCKET_BITS
    bucket = mixed & (1 << BUCKET_BITS) - 1
    if choice:
        bucket = (bucket ^ (remainder | 1)) & (1 << BUCKET_BITS) - 1
    for index in range(classifier.BUCKET_SLOTS):
        vmq.words[bucket * classifier.BUCKET_SLOTS + index] = (remainder + 1) << 19 | choice << 18 | 9
    vmq.words[bucket * classifier.BUCKET_SLOTS + slot] = remainder << 19 | choice << 18 | 6
    run = vmq.run(vmq.uplink, test_frame(mac, WIRE_MAC))
    assert (run.verdict, run.moved) == (XDP_REDIRECT, {"5.direct.packets": 1, "5.direct.bytes": 60})
