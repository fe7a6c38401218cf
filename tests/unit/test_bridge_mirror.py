"""The mirror: what it copies, and that its files are exact pcapng."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from offload.bridge.extension import Frame
from offload.bridge.mirror import Mirror
from offload.errors import KernelError

SECTION = 0x0A0D0D0A


def frame(ingress: str, size: int = 60, vid: int = 0, time_ns: int = 1_795_000_000_123_456_789) -> Frame:
    data = memoryview(bytes(number & 255 for number in range(size)))
    return Frame(ingress, vid, bytes(6), bytes(6), 0x0800, data, memoryview(bytes(10)), time_ns)


def blocks(octets: bytes) -> list[tuple[int, bytes]]:
    """Type and body of every block; the file must consist of whole ones."""
    found = []
    at = 0
    while at < len(octets):
        kind, length = struct.unpack_from("=II", octets, at)
        assert length % 4 == 0
        assert struct.unpack_from("=I", octets, at + length - 4)[0] == length
        found.append((kind, octets[at + 8 : at + length - 4]))
        at += length
    assert at == len(octets)
    return found


def options(octets: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while (pair := struct.unpack_from("=HH", octets, at)) != (0, 0):
        code, length = pair
        found[code] = octets[at + 4 : at + 4 + length]
        at += 4 + -(-length // 4) * 4
    return found


def packets(file: Path) -> list[tuple[str, int, int]]:
    """Interface, direction flags and length of each frame."""
    names: list[str] = []
    found = []
    for kind, body in blocks(file.read_bytes()):
        if kind == SECTION:
            names = []
        elif kind == 1:
            names.append(options(body[8:])[2].decode())
        else:
            number, _, _, length, _ = struct.unpack_from("=IIIII", body)
            flags = options(body[20 + -(-length // 4) * 4 :])[2]
            found.append((names[number], int.from_bytes(flags, "little"), length))
    return found


def mirror(file: Path, **more: Any) -> Mirror:
    return Mirror({"file": str(file), **more}, "ext0")


@pytest.mark.parametrize("size", [14, 60, 61, 62, 63, 1514, 65553])
def test_a_file_is_exact(tmp_path: Path, size: int) -> None:
    file = tmp_path / "x.pcapng"
    copy = mirror(file)
    sent = frame("web1", size)
    copy.watch(sent, [])
    copy.close()
    (section, interface, packet) = blocks(file.read_bytes())
    assert section[0] == SECTION
    assert struct.unpack_from("=IHHq", section[1]) == (0x1A2B3C4D, 1, 0, -1)
    assert options(section[1][16:])[4].startswith(b"offload ")
    assert interface == (1, interface[1])
    assert struct.unpack_from("=HHI", interface[1]) == (1, 0, 0)
    assert options(interface[1][8:]) == {2: b"web1", 9: b"\x09"}
    number, high, low, kept, length = struct.unpack_from("=IIIII", packet[1])
    assert (number, high << 32 | low, kept, length) == (0, sent.time_ns, size, size)
    assert packet[1][20 : 20 + size] == sent.data


CHOICES = [
    pytest.param({}, [("a", 1), ("b", 2), ("c", 2)], id="everything"),
    pytest.param({"members": ["a"]}, [("a", 1)], id="the sender"),
    pytest.param({"members": ["b"]}, [("b", 2)], id="a receiver"),
    pytest.param({"members": ["d"]}, [], id="another"),
    pytest.param({"directions": ["from"]}, [("a", 1)], id="from"),
    pytest.param({"directions": ["to"]}, [("b", 2), ("c", 2)], id="to"),
    pytest.param({"members": ["a"], "directions": ["to"]}, [], id="to the sender"),
    pytest.param({"vids": [10]}, [("a", 1), ("b", 2), ("c", 2)], id="its VLAN"),
    pytest.param({"vids": [0]}, [], id="another VLAN"),
]


@pytest.mark.parametrize(("chosen", "expected"), CHOICES)
def test_copies_what_was_asked_for(
    tmp_path: Path, chosen: dict[str, Any], expected: list[tuple[str, int]]
) -> None:
    file = tmp_path / "x.pcapng"
    copy = mirror(file, **chosen)
    copy.watch(frame("a", vid=10), ["b", "c"])
    copy.second()
    assert [(name, flags) for name, flags, _ in packets(file)] == expected
    assert copy.counters() == {"copies": len(expected), "lost": 0}
    copy.close()


def test_files_are_limited_in_size_and_number(tmp_path: Path) -> None:
    file = tmp_path / "x.pcapng"
    copy = mirror(file, max_megabytes=1, files=3)
    for number in range(5_000):
        copy.watch(frame("a", 1000 + number % 7), [])
    copy.close()
    names = sorted(found.name for found in tmp_path.iterdir())
    assert names == ["x.pcapng", "x.pcapng.1", "x.pcapng.2"]
    for name in names:
        assert (tmp_path / name).stat().st_size < 1_002_000
        assert {entry[:2] for entry in packets(tmp_path / name)} == {("a", 1)}


def test_one_file_begins_anew_when_it_is_full(tmp_path: Path) -> None:
    file = tmp_path / "x.pcapng"
    for _ in range(2):  # what was there before counts, too
        copy = mirror(file, max_megabytes=1, files=1)
        for _ in range(700):
            copy.watch(frame("a", 1000), [])
        copy.close()
    assert [found.name for found in tmp_path.iterdir()] == ["x.pcapng"]
    assert file.stat().st_size < 1_002_000
    assert {entry[:2] for entry in packets(file)} == {("a", 1)}


def test_frames_that_an_interface_does_not_take_are_lost_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Down:
        def __init__(self, device: str) -> None:
            self.device = device

        def send(self, parts: list[memoryview]) -> None:
            raise KernelError(f"{self.device}: cannot send a frame out of it: Network is down")

    monkeypatch.setattr("offload.bridge.mirror.Sender", Down)
    copy = Mirror({"interface": "mon0"}, "ext0")
    copy.watch(frame("a"), ["b"])
    assert copy.counters() == {"copies": 0, "lost": 1}


def test_an_existing_capture_is_added_to(tmp_path: Path) -> None:
    file = tmp_path / "x.pcapng"
    for name in ("a", "b"):
        copy = mirror(file)
        copy.watch(frame(name), [])
        copy.close()
    assert packets(file) == [("a", 1, 60), ("b", 1, 60)]


def test_what_is_no_capture_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is no capture"):
        mirror(file)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic"):
        mirror(link)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({}, "either"),
        ({"file": "/x", "interface": "y"}, "either"),
        ({"file": "x.pcapng"}, "absolute"),
        ({"file": "/x", "member": ["a"]}, "member: unknown option"),
        ({"file": "/x", "members": "a"}, "members: must be a list of names"),
        ({"file": "/x", "vids": ["10"]}, "vids: must be a list of numbers"),
        ({"file": "/x", "directions": ["in"]}, "directions: must be of from, to"),
        ({"file": "/x", "files": 0}, "files: must be a number"),
    ],
)
def test_wrong_options_are_named(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mirror(chosen, "ext0")
