"""What the fast path passes by: which ports are looked at, and reads that fail. No privileges."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from offload.config import parse
from offload.errors import KernelError
from offload.kernel import bypassed
from offload.kernel.bypassed import Place, look, places, warnings
from offload.kernel.rtnl import RouteSocket

CONFIG = """
version: 1
nics: {eth1: {}}
switches:
  ext0: {type: external, uplink: eth1}
  lab0: {type: private, bridge: python}
ports:
  web1: {switch: ext0, device: web1, mac: "02:15:5d:00:00:01"}
  web2: {switch: ext0, device: web2, mac: "02:15:5d:00:00:02", queue: "off"}
  db1: {switch: lab0, device: db1, mac: "02:15:5d:00:00:03"}
"""
WEB1 = {"web1": Place("web1", "ext0", "eth1")}


def test_ports_that_stay_on_the_bridge_pass_nothing_by() -> None:
    assert places(parse(CONFIG)) == {**WEB1, "db1": Place("db1", None, None)}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace what is read; what is not named finds nothing."""

    def replace(**answers: Any) -> None:
        nothing: dict[str, Any] = {"_chains": [], "_nft_tables": [], "_legacy_tables": [], "_disciplines": {}}
        for name, answer in (nothing | answers).items():

            def read(*_: object, answer: Any = answer) -> Any:
                if isinstance(answer, Exception):
                    raise answer
                return answer

            monkeypatch.setattr(bypassed, name, read)

    return replace


@pytest.mark.parametrize("name", ["_chains", "_legacy_tables", "_disciplines"])
def test_a_read_that_fails_is_told_and_the_others_are_done(name: str, reads: Callable[..., None]) -> None:
    rest = {} if name == "_disciplines" else {"_disciplines": {"web1": ["the tc qdisc tbf of web1"]}}
    reads(**{name: KernelError("nft: cannot list its chains: Operation not permitted")}, **rest)
    found = look(WEB1)
    assert set(found.ports) == ({"web1"} if rest else set())
    assert warnings(WEB1)[-1] == (
        "what the fast path passes by is not known in full: "
        "nft: cannot list its chains: Operation not permitted"
    )


def test_nft_is_not_started_where_the_bridge_family_has_no_chains(reads: Callable[..., None]) -> None:
    reads(_nft_tables=KernelError("started"))
    assert look(WEB1).unread == ()


@pytest.mark.parametrize(
    ("kind", "handle", "expected"),
    [
        pytest.param("cake", 0, {}, id="net.core.default_qdisc"),
        pytest.param("cake", 0x80010000, {"lo": ["the tc qdisc cake of lo"]}, id="set-by-somebody"),
        pytest.param("fq_codel", 0x80010000, {}, id="no-rules"),
    ],
)
def test_the_kernel_s_own_choice_of_a_qdisc_has_no_handle(
    kind: str, handle: int, expected: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = kind.encode() + b"\0"
    body = struct.pack("=B3xiIII", 0, socket.if_nametoindex("lo"), handle, 0xFFFFFFFF, 2)
    body += struct.pack("=HH", 4 + len(name), 1) + name
    monkeypatch.setattr(bypassed, "_nothing_at", lambda *_: False)
    monkeypatch.setattr(RouteSocket, "dump", lambda *_: [body])
    assert bypassed._disciplines({"lo"}, set()) == expected
    assert bypassed._disciplines(set(), {"lo"}) == {}


def test_a_program_that_is_not_installed_is_named_with_its_package() -> None:
    with pytest.raises(KernelError, match=r"not installed: apt install ebtables"):
        bypassed._printed("ebtables-legacy-of-nobody", "-L")


def test_what_a_program_said_when_it_failed_is_told() -> None:
    with pytest.raises(KernelError, match=r"`ls /nowhere-at-all` failed: .*No such file"):
        bypassed._printed("ls", "/nowhere-at-all")
