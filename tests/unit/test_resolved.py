"""DNS settings of a device at systemd-resolved, with its files and ``resolvectl`` made by the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.errors import KernelError
from offload.kernel import resolved
from offload.model import LinkDns

STATE = """# This is private data. Do not parse.
LLMNR=yes
DNSSEC=no
DEFAULT_ROUTE=yes
SERVERS=192.0.2.53 2001:db8::53
DOMAINS=example.org ~.
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system where resolved runs in our namespace and knows the device 3."""
    for process in ("1", "thread-self"):
        (tmp_path / "proc" / process / "ns").mkdir(parents=True)
        (tmp_path / "proc" / process / "ns" / "net").symlink_to("net:[1]")
    netif = tmp_path / "run/systemd/resolve/netif"
    netif.mkdir(parents=True)
    (netif / "3").write_text(STATE)
    return tmp_path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``resolvectl`` that writes its arguments to this file, and fails for the device ``bad``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "calls"
    program = programs / "resolvectl"
    program.write_text(
        f'#!/bin/sh\n[ "$2" = bad ] && {{ echo Unknown interface >&2; exit 1; }}\n'
        f'printf "[%s]" "$@" >> {log}; echo >> {log}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return log


def test_what_resolved_has_for_a_device(root: Path, calls: Path) -> None:
    assert resolved.settings(3, root) == (("192.0.2.53", "2001:db8::53"), ("example.org", "~."), True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [("DEFAULT_ROUTE=no\n", False), ("", None)],
    ids=["no", "not-said"],
)
def test_whether_resolved_asks_a_device_by_default(
    root: Path, calls: Path, line: str, expected: bool | None
) -> None:
    (root / "run/systemd/resolve/netif/3").write_text(f"SERVERS=192.0.2.53\n{line}")
    assert resolved.settings(3, root) == (("192.0.2.53",), (), expected)


@pytest.mark.parametrize("content", [None, "LLMNR=yes\n", "SERVERS=\n"])
def test_a_device_without_servers(root: Path, calls: Path, content: str | None) -> None:
    state = root / "run/systemd/resolve/netif/3"
    state.unlink()
    if content is not None:
        state.write_text(content)
    assert resolved.settings(3, root) is None


def test_in_another_namespace_numbers_are_other_devices(root: Path, calls: Path) -> None:
    own = root / "proc/thread-self/ns/net"
    own.unlink()
    own.symlink_to("net:[2]")
    assert resolved.settings(3, root) is None


def test_without_resolvectl_nothing_can_move(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    assert resolved.settings(3, root) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param(
            (("192.0.2.53", "2001:db8::53"), ("example.org", "~."), False),
            "[dns][ext0-host][192.0.2.53][2001:db8::53]\n[domain][ext0-host][example.org][~.]\n"
            "[default-route][ext0-host][no]\n",
            id="all",
        ),
        pytest.param(
            (("192.0.2.53",), (), None), "[dns][ext0-host][192.0.2.53]\n[domain][ext0-host][]\n", id="servers"
        ),
        pytest.param(None, "[revert][ext0-host]\n", id="none"),
    ],
)
def test_what_resolvectl_is_told(calls: Path, value: object, said: str) -> None:
    resolved.set_up(LinkDns("ext0-host"), value)
    assert calls.read_text() == said


def test_what_resolvectl_says_is_told(calls: Path) -> None:
    with pytest.raises(KernelError, match=r"resolvectl dns bad 192\.0\.2\.53: Unknown interface"):
        resolved.set_up(LinkDns("bad"), (("192.0.2.53",), (), None))
