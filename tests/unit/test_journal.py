"""The journal: what is written is there after a crash, and nothing else is believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from offload import model
from offload.errors import OffloadError
from offload.journal import Era, Journal
from offload.model import DeviceResource, Feature, Master, Promiscuous, Resource, Value

ERA = Era("0c8b2b0c-0000-4000-8000-000000000001", 4026531840)
GRO = Feature("eth1", 3, "rx-gro")
STRIP = Feature("eth1", 3, "rx-vlan-hw-parse")
RESOURCES = [
    item
    for item in vars(model).values()
    if isinstance(item, type) and issubclass(item, Resource) and item not in (Resource, DeviceResource)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def sample(kind: type[Resource]) -> Resource:
    """A resource of this kind, each field filled by its declared type."""
    values = {"str": "eth1", "int": 7}
    return kind(**{field.name: values[str(field.type)] for field in fields(kind)})


@pytest.mark.parametrize("kind", RESOURCES, ids=lambda kind: kind.__name__)
def test_every_resource_comes_back_equal(kind: type[Resource], path: Path) -> None:
    Journal(path, ERA).record(sample(kind), True)
    assert Journal(path, ERA).originals() == {sample(kind): True}


@pytest.mark.parametrize(
    "before", [None, True, False, 0, 1, "br0", "", (), (True, False), ("native", 3, (None, "é"))], ids=repr
)
def test_every_value_comes_back_equal_and_of_its_type(before: Value, path: Path) -> None:
    Journal(path, ERA).record(GRO, before)
    assert repr(Journal(path, ERA).originals()[GRO]) == repr(before)


def test_settings_of_a_device_are_found(path: Path) -> None:
    journal = Journal(path, ERA)
    other = Promiscuous("eth2", 4)
    journal.record_all({GRO: True, other: False, STRIP: True})
    journal.forget([STRIP])
    assert journal.originals_of([3]) == Journal(path, ERA).originals_of([3, 9]) == {GRO: True}
    assert journal.originals_of([3, 4]) == {GRO: True, other: False}


def test_first_value_wins(path: Path) -> None:
    journal = Journal(path, ERA)
    journal.record(GRO, True)
    journal.record(GRO, False)
    Journal(path, ERA).record(GRO, False)
    assert journal.originals() == Journal(path, ERA).originals() == {GRO: True}


def test_reading_makes_no_file(path: Path) -> None:
    assert Journal(path, ERA).originals() == {}
    assert not path.parent.exists()


def test_others_cannot_read_it(path: Path) -> None:
    Journal(path, ERA).record(GRO, True)
    assert path.parent.stat().st_mode & 0o777 == 0o750
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_directory_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Journal(tmp_path / "journal.jsonl", ERA).record(GRO, True)
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_file_and_directory_are_synced_before_record_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", watch)
    journal = Journal(path, ERA)
    journal.record(GRO, True)
    assert synced == [path.parent.parent, path, path.parent]
    journal.record(STRIP, True)
    assert synced[3:] == [path]


def test_a_crash_at_any_byte_of_an_append_loses_only_that_entry(path: Path) -> None:
    journal = Journal(path, ERA)
    journal.record(GRO, True)
    whole = len(path.read_bytes())
    journal.record(STRIP, True)
    content = path.read_bytes()
    for length in range(whole, len(content)):
        path.write_bytes(content[:length])
        survivor = Journal(path, ERA)
        assert survivor.originals() == {GRO: True}
        survivor.record(Master("eth1", 3), None)
        assert Journal(path, ERA).originals() == {GRO: True, Master("eth1", 3): None}


def test_an_append_that_fails_leaves_the_journal_usable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, ERA)
    journal.record(GRO, True)
    write = os.write

    def disk_full(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", no_space)
        return write(descriptor, data[:5])

    def no_space(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", disk_full)
    with pytest.raises(OSError, match="No space"):
        journal.record(STRIP, True)
    assert journal.originals() == {GRO: True}
    journal.record(STRIP, False)
    assert Journal(path, ERA).originals() == {GRO: True, STRIP: False}


@pytest.mark.parametrize(
    "elsewhere",
    [Era("0c8b2b0c-0000-4000-8000-000000000002", ERA.netns), Era(ERA.boot_id, 4026532000)],
    ids=["another-boot", "another-namespace"],
)
def test_entries_of_another_era_are_not_believed(elsewhere: Era, path: Path) -> None:
    Journal(path, elsewhere).record(GRO, False)
    here = Journal(path, ERA)
    assert here.originals() == {}
    here.record(GRO, True)
    assert Journal(path, ERA).originals() == {GRO: True}
    assert Journal(path, elsewhere).originals() == {GRO: False}


def test_forget_drops_what_was_given_back_and_earlier_boots(path: Path) -> None:
    before = Era("earlier", ERA.netns)
    beside = Era(ERA.boot_id, 4026532000)
    for era in (before, beside, ERA):
        Journal(path, era).record(GRO, True)
    journal = Journal(path, ERA)
    journal.record(STRIP, False)
    journal.forget([GRO, Promiscuous("eth1", 3)])
    assert journal.originals() == Journal(path, ERA).originals() == {STRIP: False}
    assert Journal(path, beside).originals() == {GRO: True}
    assert Journal(path, before).originals() == {}
    journal.record(GRO, False)
    assert Journal(path, ERA).originals() == {GRO: False, STRIP: False}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_crash_before_the_rename_keeps_the_old_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, ERA)
    journal.record(GRO, True)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            journal.forget([GRO])
    assert Journal(path, ERA).originals() == {GRO: True}
    Journal(path, ERA).forget([GRO])
    assert Journal(path, ERA).originals() == {}


def without_boot(entry: dict[str, object]) -> object:
    return {key: value for key, value in entry.items() if key != "boot"}


@pytest.mark.parametrize(
    "damage",
    [
        without_boot,
        lambda entry: [entry],
        lambda entry: entry | {"type": "Journal"},
        lambda entry: entry | {"type": "Link"},
        lambda entry: entry | {"fields": entry["fields"] | {"ifindex": "3"}},
        lambda entry: entry | {"fields": entry["fields"] | {"extra": 1}},
        lambda entry: entry | {"fields": {"device": "eth1", "ifindex": 3}},
        lambda entry: entry | {"fields": None},
        lambda entry: entry | {"before": {"a": 1}},
        lambda entry: entry | {"before": 1.5},
    ],
    ids=[
        "no-boot",
        "list",
        "no-such-type",
        "not-a-resource",
        "field-of-wrong-type",
        "field-too-many",
        "field-missing",
        "no-fields",
        "dict-value",
        "float-value",
    ],
)
def test_a_line_that_is_not_an_entry_is_an_error(
    damage: Callable[[dict[str, object]], object], path: Path
) -> None:
    journal = Journal(path, ERA)
    journal.record(GRO, True)
    good = path.read_text()
    journal.record(STRIP, True)
    path.write_text(good + json.dumps(damage(json.loads(good))) + "\n" + good)
    with pytest.raises(OffloadError, match=rf"{path}:2: "):
        Journal(path, ERA)


def test_rubbish_in_the_middle_is_an_error(path: Path) -> None:
    Journal(path, ERA).record(GRO, True)
    path.write_bytes(b"\xff\x00{\r\n" + path.read_bytes())
    with pytest.raises(OffloadError, match=rf"{path}:1: "):
        Journal(path, ERA)


@pytest.mark.parametrize("name", ["Link", "Change", "Mapping", "os", "Nothing"])
def test_only_resources_of_the_model_are_made(name: str, path: Path) -> None:
    Journal(path, ERA).record(GRO, True)
    path.write_text(path.read_text().replace("Feature", name))
    with pytest.raises(OffloadError, match=f"unknown resource '{name}'"):
        Journal(path, ERA)
