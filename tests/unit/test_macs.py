"""The allocator of ``mac: auto``: stable, unique, honest about the end of its range."""

from __future__ import annotations

import fcntl
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import pytest

from offload.config import parse
from offload.errors import ConfigError, OffloadError, PrivilegeError
from offload.macs import MacAllocator, MacRangeExhaustedError, resolve_auto

FIRST = "02:15:5d:00:00:fe"


def address(index: int) -> str:
    """The address ``index`` places after FIRST; the range crosses an octet."""
    return f"02:15:5d:00:{(0xFE + index) >> 8:02x}:{(0xFE + index) & 0xFF:02x}"


def allocator(path: Path, size: int = 4) -> MacAllocator:
    return MacAllocator(path, FIRST, address(size - 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "macs.json"


def test_addresses_are_given_in_order_and_stay(path: Path) -> None:
    assert allocator(path).assign(["b", "a"], ()) == {"b": address(0), "a": address(1)}
    again = allocator(path)
    assert again.assign(["a", "c", "b"], ()) == {"a": address(1), "c": address(2), "b": address(0)}
    assert again.held() == {"b": address(0), "a": address(1), "c": address(2)}


def test_an_address_of_the_config_is_never_given(path: Path) -> None:
    assert allocator(path).assign(["a"], {address(0), address(2)}) == {"a": address(1)}
    assert allocator(path).assign(["b"], {address(0), address(2)}) == {"b": address(3)}


def test_a_port_gives_way_to_the_config(path: Path) -> None:
    allocator(path).assign(["a", "b"], ())
    assert allocator(path).assign(["a", "b"], {address(0)}) == {"a": address(2), "b": address(1)}


def test_a_port_leaves_a_range_that_was_changed(path: Path) -> None:
    allocator(path).assign(["a", "b"], ())
    narrow = MacAllocator(path, address(1), address(2))
    assert narrow.assign(["a", "b"], ()) == {"a": address(2), "b": address(1)}


def test_what_a_port_holds_is_not_reused_while_it_is_away(path: Path) -> None:
    allocator(path).assign(["away"], ())
    assert allocator(path).assign(["a"], ()) == {"a": address(1)}


def test_release_makes_room(path: Path) -> None:
    full = allocator(path, size=1)
    full.assign(["a"], ())
    full.release("a")
    full.release("never-there")
    assert full.assign(["b"], ()) == {"b": address(0)}


def test_the_end_of_the_range_is_told_and_nothing_is_kept(path: Path) -> None:
    allocator(path, size=3).assign(["a"], ())
    with pytest.raises(MacRangeExhaustedError) as caught:
        allocator(path, size=3).assign(["b", "c"], {address(1), "02:ff:00:00:00:00"})
    assert str(caught.value) == (
        "config: mac_range: 02:15:5d:00:00:fe to 02:15:5d:00:01:00: no address is left for port c: "
        "of 3 in the range, 2 are held by ports with mac: auto and 1 are written in the config; "
        "widen the range, or remove ports"
    )
    assert caught.value.exit_code == 2
    assert allocator(path).held() == {"a": address(0)}


def test_an_address_on_the_network_is_not_given_anew_and_not_taken_away(path: Path) -> None:
    allocator(path).assign(["a"], ())
    heard = {address(0), address(1)}
    assert allocator(path).assign(["a", "b"], (), heard) == {"a": address(0), "b": address(2)}


def test_strangers_count_when_the_range_ends(path: Path) -> None:
    allocator(path, size=4).assign(["a"], ())
    with pytest.raises(MacRangeExhaustedError) as caught:
        allocator(path, size=4).assign(["b"], {address(1)}, {address(0), address(2), address(3)})
    assert (
        "of 4 in the range, 1 are held by ports with mac: auto, 1 are written in the config "
        "and 2 are used by others on the network; widen the range, or remove ports"
    ) in str(caught.value)
    assert allocator(path).held() == {"a": address(0)}


def test_asking_without_keeping_writes_nothing(path: Path) -> None:
    assert allocator(path).assign(["a"], (), keep=False) == {"a": address(0)}
    assert not path.parent.exists()


def test_a_range_of_none_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="must not be below"):
        MacAllocator(path, address(1), address(0))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"ports": []}',
        '{"ports": {"a": 1}}',
        '{"ports": {"a": "01:00:00:00:00:00"}}',
        "\udcff",
        json.dumps({"ports": {"a": FIRST, "b": FIRST}}),
    ],
    ids=["empty", "cut", "list", "no-ports", "ports-list", "number", "group", "not-utf8", "twice"],
)
def test_a_damaged_file_is_never_taken_for_an_empty_one(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(OffloadError, match=r"macs\.json: damaged"):
        allocator(path).assign(["a"], ())
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_a_crash_while_writing_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator(path).assign(["a"], ())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OffloadError, match="No space left on device"):
        allocator(path).assign(["b"], ())
    assert allocator(path).held() == {"a": address(0)}


def test_the_umask_says_who_may_read_the_file(path: Path) -> None:
    umask = os.umask(0o027)
    try:
        allocator(path).assign(["a"], ())
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_file_and_its_name_are_on_disk_when_an_address_is_given(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    allocator(path).assign(["a"], ())
    assert synced == ["macs.json.new", "state"]


def test_a_missing_privilege_is_told_as_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path.parent))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PrivilegeError, match="mac: auto keeps its addresses there"):
        allocator(path).assign(["a"], ())


def take(path: Path, worker: int) -> dict[str, str]:
    taken: dict[str, str] = {}
    for index in range(10):
        taken |= allocator(path, size=40).assign([f"{worker}-{index}"], ())
    return taken


def test_processes_never_get_the_same_address(path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        taken = [mac for given in pool.map(take, [path] * 4, range(4)) for mac in given.values()]
    assert sorted(taken) == [address(index) for index in range(40)]
    assert sorted(os.listdir(path.parent)) == ["macs.json", "macs.json.lock"]


def test_a_change_waits_for_the_lock(path: Path) -> None:
    allocator(path).assign(["a"], ())
    waiting = Thread(target=allocator(path).assign, args=(["b"], ()))
    with path.with_name("macs.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert set(allocator(path).held()) == {"a"}
    waiting.join(10)
    assert set(allocator(path).held()) == {"a", "b"}


CONFIG = """
version: 1
mac_range: {first: "02:15:5d:00:00:fe", last: "02:15:5d:00:01:01"}
nics: {eth1: {}}
switches:
  ext0: {type: external, uplink: eth1, host: {interface: h0, mac: "02:15:5d:00:01:00"}}
ports:
  a: {switch: ext0, device: a, mac: auto}
  b: {switch: ext0, device: b, mac: "02:15:5d:00:00:fe"}
  c: {switch: ext0, device: c}
"""


def test_auto_becomes_an_address_and_the_rest_stays(path: Path) -> None:
    config = parse(CONFIG)
    resolved = resolve_auto(config, allocator(path))
    assert {name: port.mac for name, port in resolved.ports.items()} == {
        "a": (address(1),),
        "b": (address(0),),
        "c": (address(3),),
    }
    assert config.ports["a"].mac == "auto"
    assert resolve_auto(config, allocator(path)) == resolved
    assert resolved.ports["b"] is config.ports["b"]


def test_auto_is_drawn_around_what_was_heard(path: Path) -> None:
    resolved = resolve_auto(parse(CONFIG), allocator(path, size=6), {address(1), address(3)})
    assert [resolved.ports[name].mac for name in "ac"] == [(address(4),), (address(5),)]


def test_a_plan_resolves_without_a_trace(path: Path) -> None:
    assert resolve_auto(parse(CONFIG), allocator(path), keep=False).ports["a"].mac == (address(1),)
    assert not path.parent.exists()
