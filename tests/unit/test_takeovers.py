"""The files of takeovers: what waits, and what was confirmed."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.config import PortConfig
from offload.errors import OffloadError
from offload.model import Carried, CarriedAddress
from offload.portfiles import PortFile
from offload.takeover import Confirmation, HostNetwork
from offload.takeovers import (
    Former,
    Pending,
    Taken,
    clear_pending,
    confirm,
    confirmed,
    forget,
    load_pending,
    now,
    save_pending,
    taken,
)

MAC, OTHER = "02:aa:00:00:00:02", "02:aa:00:00:00:03"
TAKEN = Taken(MAC, ("192.0.2.1/24", "192.0.2.2/24"), ("192.0.2.1/24",))
PORT = PortConfig.model_validate({"switch": "ext0", "device": "web1", "mac": "02:15:5d:00:00:01", "vlan": 10})


def pending(**nics: Taken) -> Pending:
    return Pending("a boot", now() + 60, nics or {"eth1": TAKEN})


def test_what_waits_is_read_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "run" / "takeover.json"
    former = Former.of("version: 1", "a.yaml", {"web1": PortFile("keep", PORT)}, detached=True)
    one = Pending("a boot", 123.5, {"eth1": TAKEN}, former)
    save_pending(file, one)
    assert load_pending(file, "a boot") == one
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["takeover.json"]
    back = load_pending(file, "a boot")
    assert back is not None
    assert back.former is not None
    assert back.former.files() == {"web1": PortFile("keep", PORT)}


def test_what_waits_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file, first = tmp_path / "file", pending()
    save_pending(file, first)
    with file.open() as reading:
        save_pending(file, pending())
        assert first.token in reading.read()


def test_after_a_reboot_nothing_waits(tmp_path: Path) -> None:
    save_pending(tmp_path / "file", pending())
    assert load_pending(tmp_path / "file", "another boot") is None


def test_without_a_file_nothing_waits(tmp_path: Path) -> None:
    clear_pending(tmp_path / "file")
    assert load_pending(tmp_path / "file", "a boot") is None


def test_every_takeover_has_a_token_of_its_own() -> None:
    assert pending().token != pending().token


def test_time_runs_from_the_boot_on() -> None:
    waiting = pending().until(30)
    assert 29 < waiting.left() <= 30
    assert pending().until(-1).left() < 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"boot": 1}'])
def test_a_file_that_cannot_be_understood_is_told_of(tmp_path: Path, content: str) -> None:
    file = tmp_path / "file"
    file.write_text(content)
    with pytest.raises(OffloadError, match=f"{file}: not a takeover that waits"):
        load_pending(file, "a boot")
    file.write_text(content or "?")
    if content != "[]":
        with pytest.raises(OffloadError, match=f"{file}: not a list of confirmed takeovers"):
            confirmed(file)


def test_what_lasts_is_confirmed_and_forgotten_by_nic(tmp_path: Path) -> None:
    file = tmp_path / "state" / "takeovers.json"
    assert confirmed(file) == frozenset()
    confirm(file, pending(eth1=TAKEN, eth2=Taken(OTHER, ("203.0.113.1/24",), ("203.0.113.1/24",))))
    one = Confirmation(MAC, frozenset({"192.0.2.1/24"}))
    other = Confirmation(OTHER, frozenset({"203.0.113.1/24"}))
    assert confirmed(file) == {one, other}
    confirm(file, pending(eth1=Taken(MAC, ("192.0.2.9/24",), ("192.0.2.9/24",))))
    assert confirmed(file) == {Confirmation(MAC, frozenset({"192.0.2.9/24"})), other}
    forget(file, {MAC})
    assert confirmed(file) == {other}


def test_to_forget_what_was_never_confirmed_writes_nothing(tmp_path: Path) -> None:
    forget(tmp_path / "takeovers.json", {MAC})
    assert not (tmp_path / "takeovers.json").exists()


def test_what_has_to_be_confirmed_leaves_out_what_was() -> None:
    leased = CarriedAddress(1, 0, 0, 3600, 3600).as_value()
    network = HostNetwork(
        carried={
            Carried("eth1", 3, "192.0.2.1/24"): CarriedAddress(0, 0, 0, None, None).as_value(),
            Carried("eth1", 3, "192.0.2.2/24"): leased,
            Carried("eth2", 4, "203.0.113.1/24"): CarriedAddress(0, 0, 0, None, None).as_value(),
        },
        macs={"eth1": MAC, "eth2": OTHER},
        confirmed=frozenset({Confirmation(OTHER, frozenset({"203.0.113.1/24"}))}),
    )
    asked = {"eth1": ("192.0.2.2/24", "192.0.2.1/24"), "eth2": ("203.0.113.1/24",)}
    assert taken(network, asked) == {"eth1": TAKEN}
    assert taken(network, {"eth1": ("192.0.2.2/24",)}) == {"eth1": Taken(MAC, ("192.0.2.2/24",), ())}
