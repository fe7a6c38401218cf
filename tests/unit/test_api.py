"""The API over a real unix socket. Needs no privilege."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from offload import api
from offload.client import Client, NoDaemonError
from offload.errors import (
    ConfigError,
    ForeignError,
    KernelError,
    OffloadError,
    PrivilegeError,
    Problem,
    UnsupportedError,
    UsageError,
    VerifyError,
)
from offload.views import StatusView
from tests.unit.fake_service import (
    CHANGES,
    DB1,
    EVENTS,
    LAB,
    NIC,
    QUEUES,
    STATUS,
    SWITCH,
    TAKEOVER,
    WEB1,
    FakeService,
    leaked_sockets,
    served,
    wait_until,
)

PROBLEMS = [Problem("ports.web1.vlan", "4095", "1 to 4094"), Problem("nics", "", "at least one")]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeService, Path]]:
    """A served service and its socket. Scope: this module, because stopping takes a fifth of a second."""
    service = FakeService()
    path = tmp_path_factory.mktemp("run") / "api.sock"
    with served(service, path):
        yield service, path


@pytest.fixture
def service(daemon: tuple[FakeService, Path]) -> FakeService:
    """The service, as if it were new."""
    daemon[0].reset()
    return daemon[0]


@pytest.fixture
def path(daemon: tuple[FakeService, Path]) -> Path:
    """The socket that the service is behind."""
    return daemon[1]


@pytest.fixture
def refused() -> Iterator[None]:
    """For tests that fail to connect."""
    with leaked_sockets():
        yield


@pytest.fixture
def http(path: Path) -> Iterator[httpx.Client]:
    """Plain HTTP to the service, for what the client would never send."""
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://offload", timeout=10) as client:
        yield client


@pytest.fixture
def client(path: Path) -> Iterator[Client]:
    with Client(path, patience=10) as client:
        yield client


def test_views_arrive_as_they_were_sent(client: Client) -> None:
    assert client.status() == STATUS
    assert client.nics() == [NIC]
    assert client.switches() == [SWITCH, LAB]
    assert client.ports() == [WEB1, DB1]
    assert client.queues() == QUEUES
    assert client.events() == EVENTS


def test_changes_hand_every_argument_on(client: Client, service: FakeService) -> None:
    assert client.apply("version: 1", "x.yaml", dry_run=True, confirm_within=30).changes == CHANGES
    client.port_add("web1", {"switch": "ext0", "vlan": {"trunk": [10], "native": 1}}, keep=True)
    client.port_set("web1", {"vlan": None}, dry_run=True)
    client.port_remove("web1", dry_run=True)
    client.port_remove("web1")
    assert client.confirm() == TAKEOVER
    client.rollback()
    client.detach(everything=True)
    assert service.calls == [
        ("apply", "version: 1", "x.yaml", True, 30.0),
        ("port_add", "web1", {"switch": "ext0", "vlan": {"trunk": [10], "native": 1}}, True, False),
        ("port_set", "web1", {"vlan": None}, True),
        ("port_remove", "web1", True),
        ("port_remove", "web1", False),
        ("confirm",),
        ("rollback",),
        ("detach", True),
    ]


@pytest.mark.parametrize(
    ("error", "http_status"),
    [
        (ConfigError(PROBLEMS, "x.yaml"), 422),
        (UsageError("web1: is in the config file"), 409),
        (UnsupportedError("no VLAN filtering"), 501),
        (PrivilegeError("CAP_BPF is missing"), 403),
        (ForeignError("eth1: has a program of xdp-filter"), 409),
        (KernelError("eth1: device or resource busy"), 500),
        (VerifyError("eth1: promiscuity is off"), 500),
        (OffloadError("failed"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_come_back_as_what_they_were(
    error: OffloadError, http_status: int, http: httpx.Client, client: Client, service: FakeService
) -> None:
    service.refusal = error
    answer = http.get("/v1/ports")
    assert answer.status_code == http_status
    assert answer.json()["exit_code"] == error.exit_code
    with pytest.raises(OffloadError) as caught:
        client.ports()
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


def test_config_errors_keep_every_problem(client: Client, service: FakeService) -> None:
    service.refusal = ConfigError(PROBLEMS, "x.yaml")
    with pytest.raises(ConfigError) as caught:
        client.apply("version: 1", "x.yaml")
    assert caught.value.problems == tuple(PROBLEMS)
    assert caught.value.source == "x.yaml"


def test_a_bug_in_the_service_is_answered_and_does_not_end_it(path: Path, service: FakeService) -> None:
    service.refusal = ZeroDivisionError("oh \ud800")
    with (
        Client(path) as client,
        pytest.raises(OffloadError, match=r"a bug in offload, .*: ZeroDivisionError"),
    ):
        client.ports()
    service.refusal = None
    with Client(path) as client:
        assert client.ports() == [WEB1, DB1]


@pytest.mark.parametrize(
    ("body", "http_status", "message"),
    [
        (b"", 422, "body"),
        (b"{", 400, "JSON"),
        (b"[" * 100_000, 400, ""),
        (b"\xff\xfe", 400, ""),
        (b'{"text": "x", "sorce": "y"}', 422, "body.sorce"),
        (b'{"text": 1}', 422, "body.text"),
        (b'{"text": "\\ud800"}', 422, "not what JSON allows"),
        (b'{"text": "x", "dry_run": "no"}', 422, "body.dry_run"),
        (b'{"text": "x", "dry_run": null}', 422, "body.dry_run"),
        (b"[]", 422, "body"),
    ],
    ids=["empty", "cut", "deep", "not-utf8", "unknown-key", "number", "surrogate", "word", "null", "list"],
)
def test_bad_requests_are_refused_and_reach_nobody(
    body: bytes, http_status: int, message: str, http: httpx.Client, service: FakeService
) -> None:
    answer = http.put("/v1/config", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == http_status
    problem = answer.json()
    assert problem["error"] == "UsageError"
    assert problem["exit_code"] == 2
    assert message in problem["message"]
    assert service.calls == []


@pytest.mark.parametrize("spec", ['{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1e999}'], ids=ascii)
def test_values_that_json_does_not_have_are_refused(
    spec: str, http: httpx.Client, service: FakeService
) -> None:
    answer = http.post(
        "/v1/ports", content=f'{{"name": "p", "spec": {spec}}}', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert service.calls == []


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_that_is_too_long_is_refused(
    announced: bool, http: httpx.Client, service: FakeService
) -> None:
    parts = [b'{"text": "', b"x" * api.MAX_BODY, b'"}']
    content = b"".join(parts) if announced else iter(parts)
    answer = http.put("/v1/config", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert str(api.MAX_BODY) in answer.json()["message"]
    assert service.calls == []


def test_a_body_within_the_limit_is_taken(client: Client, service: FakeService) -> None:
    client.apply("x" * (api.MAX_BODY - 1000), "big.yaml")
    assert len(service.calls) == 1


@pytest.mark.parametrize(("method", "path_", "status"), [("GET", "/v2", 404), ("PUT", "/v1/ports", 405)])
def test_unknown_routes_have_a_problem_body(method: str, path_: str, status: int, http: httpx.Client) -> None:
    answer = http.request(method, path_)
    assert answer.status_code == status
    assert answer.json()["error"] == "UsageError"


def test_openapi_describes_every_field(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    undescribed = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        if not name.endswith("ValidationError")
        for field, about in schema.get("properties", {}).items()
        if "description" not in about
    ]
    assert {"PortView", "QueueEvent"} <= schemas.keys()
    assert undescribed == []


def test_the_socket_is_for_owner_and_group_and_goes_away(service: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with served(service, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert list(tmp_path.iterdir()) == []


def test_the_socket_of_a_dead_daemon_is_replaced(service: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with served(service, path), Client(path) as client:
        assert client.status() == STATUS


def test_a_living_daemon_is_not_pushed_aside(service: FakeService, path: Path, client: Client) -> None:
    with pytest.raises(ForeignError, match="another offload answers there"):
        api.serve(api.build(FakeService()), path)
    assert client.status() == STATUS


def test_the_next_daemon_may_come_while_the_last_request_is_answered(tmp_path: Path) -> None:
    class Slow(FakeService):
        async def status(self) -> StatusView:
            await asyncio.sleep(0.5)
            return await super().status()

    path = tmp_path / "api.sock"
    slow = Slow()
    with Client(path) as client, ThreadPoolExecutor(1) as pool:
        with served(slow, path) as server:
            last = pool.submit(client.status)
            wait_until(lambda: bool(server.server_state.tasks), "the request is under way")
            server.stop()
            wait_until(lambda: not path.exists(), "the name is free")
            assert not last.done()
            following = api.serve(api.build(FakeService()), path)
        assert last.result() == STATUS
        assert path.is_socket()
        following.close()


def test_a_file_in_place_of_the_socket_stays(service: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    path.write_text("mine")
    with pytest.raises(ForeignError, match="is not a socket"):
        api.serve(api.build(service), path)
    assert path.read_text() == "mine"


def test_a_run_dir_that_is_too_long_is_named(service: FakeService, tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    directory.mkdir()
    with pytest.raises(UsageError, match="too long for a unix socket"):
        api.serve(api.build(service), directory / "api.sock")


def test_signal_handlers_stay_the_caller_s(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = api.serve(api.build(FakeService()), tmp_path / "api.sock")
    with server.capture_signals():
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    server.close()
    server.close()
    assert not (tmp_path / "api.sock").exists()


@pytest.mark.usefixtures("refused")
def test_no_daemon_names_the_socket_and_the_remedy(tmp_path: Path) -> None:
    with Client(tmp_path / "api.sock") as client, pytest.raises(NoDaemonError) as caught:
        client.status()
    assert str(tmp_path / "api.sock") in str(caught.value)
    assert "systemctl start offload" in str(caught.value)


@pytest.mark.usefixtures("refused")
def test_a_socket_that_may_not_be_opened_is_a_missing_privilege(path: Path) -> None:
    path.chmod(0)
    mine = os.geteuid()
    with Client(path) as client:
        if mine == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(PrivilegeError, match="may not be opened"):
                client.status()
        finally:
            os.seteuid(mine)
            path.chmod(0o660)


def test_an_answer_of_another_version_is_an_error_not_a_guess(path: Path, service: FakeService) -> None:
    with Client(path) as client:
        client._ask("GET", "/v1/status", type(STATUS))
        with pytest.raises(OffloadError, match="is it of another version"):
            client._ask("GET", "/v1/status", type(NIC))
