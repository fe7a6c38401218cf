"""A switch takes over the NIC that carries the host's addresses: nobody is cut off, and it goes back.

The wire's namespace is the person at the far end. It holds TCP sessions to the host all the while.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import pytest

from offload.client import Client
from offload.config import parse
from offload.errors import KernelError, UsageError
from offload.kernel.system import System
from tests.instance import Instance, config_of
from tests.lab import Lab, Namespace, wait_until
from tests.snapshot import Snapshot, assert_unchanged, settled, snapshot

pytestmark = pytest.mark.slow

HOST4, HOST6 = "192.0.2.1", "2001:db8::1"
WIRE4, WIRE6 = "192.0.2.254", "2001:db8::fe"
BEYOND4, BEYOND6 = "198.51.100.7", "2001:db8:1::7"
"""Addresses that the host reaches through its default routes alone."""
EMPTY: dict[str, Any] = {"version": 1, "metrics": None}
SHORT = 6.0
"""Seconds until a takeover goes back, where a test waits for that."""


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A host whose NIC carries its addresses and its default routes."""
    made = make_lab(ipv6=True)
    host, wire, nic = made.host, made.wire, made.nic
    host.ip(f"address add {HOST4}/24 broadcast + dev {nic}")
    host.ip(f"address add 192.0.2.2/24 dev {nic} label {nic}:two")
    host.ip(f"address add {HOST6}/64 dev {nic}")
    host.ip(f"route add default via {WIRE4} dev {nic} src {HOST4} mtu 1400")
    host.ip(f"-6 route add default via {WIRE6} dev {nic} metric 10")
    wire.ip(f"address add {WIRE4}/24 dev {made.wire_end}")
    wire.ip(f"address add {WIRE6}/64 dev {made.wire_end}")
    for address in (f"{BEYOND4}/32", f"{BEYOND6}/128"):
        wire.ip(f"address add {address} dev lo")
    at_rest(made)
    return made


def at_rest(lab: Lab) -> None:
    """Wait until no device and no address is on its way any more."""
    settled(lab.host, lab.wire)
    for ns in (lab.host, lab.wire):
        wait_until(lambda ns=ns: "tentative" not in ns.ip("address"), "addresses are usable")  # type: ignore[misc]


@pytest.fixture
def instance(lab: Lab) -> Iterator[Instance]:
    """A daemon with nothing to do yet."""
    with Instance(lab.host, EMPTY) as made:
        yield made.start()


def taking(lab: Lab, **host: object) -> dict[str, Any]:
    """A config that takes the NIC over."""
    config = config_of(lab.nic, {})
    config["switches"]["ext0"]["host"] = {"interface": "ext0-host", **host}
    return config


def state(lab: Lab) -> Snapshot:
    """All of the host's network, its routes included."""
    found = snapshot(lab.host)
    for family in ("-4", "-6"):
        routes = json.loads(lab.host.ip(f"-json {family} route show table all"))
        found[f"routes {family}"] = "\n".join(sorted(json.dumps(route) for route in routes))
    return found


def apply(instance: Instance, config: dict[str, Any], within: float = 120) -> Any:
    with Client(instance.paths.socket) as client:
        return client.apply(json.dumps(config), "test", confirm_within=within)


def waits(instance: Instance) -> Any:
    """The takeover that ``status`` shows."""
    with Client(instance.paths.socket) as client:
        return client.status().takeover


def addresses(lab: Lab, device: str) -> set[str]:
    """A device's addresses without link-local ones."""
    (link,) = json.loads(lab.host.ip(f"-json address show dev {device}"))
    return {one["local"] for one in link["addr_info"] if one["scope"] == "global"}


def looked_at(instance: Instance, config: dict[str, Any]) -> set[str]:
    """The NICs whose addresses and routes are read for ``config``."""

    def ask() -> set[str]:
        with System(instance.paths, keep=False) as system:
            return set(system.facts(parse(json.dumps(config)), {}).host.macs)

    return instance.host.call(ask)


def addresses_taken_by(instance: Instance, config: dict[str, Any]) -> str:
    """What a dry run of ``config`` says."""
    with Client(instance.paths.socket) as client:
        return str([change.text for change in client.apply(json.dumps(config), "test", dry_run=True).changes])


def assert_taken(lab: Lab) -> None:
    """The addresses are on the host's interface alone, and everybody is reached through it."""
    assert addresses(lab, lab.nic) == set()
    assert addresses(lab, "ext0-host") == {HOST4, "192.0.2.2", HOST6}
    for family, to in (("-4", BEYOND4), ("-6", BEYOND6)):
        (route,) = json.loads(lab.host.ip(f"-json {family} route get {to}"))
        assert route["dev"] == "ext0-host"
        lab.host.run("ping", "-c", "1", "-W", "2", to)


class Session:
    """A TCP connection from the wire to the host, with an echo every few milliseconds till it is closed.

    ``gap`` is the longest that an answer took, in seconds.
    """

    def __init__(self, host: Namespace, wire: Namespace, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.gap = 0.0
        self.answers = 0
        self._ending = threading.Event()
        with ExitStack() as stack:
            listener = stack.enter_context(host.call(lambda: socket.socket(family)))
            listener.bind((address, 0))
            listener.listen()
            self._client = wire.call(lambda: socket.socket(family))
            self._client.settimeout(20)
            self._client.connect(listener.getsockname())
            self._server, _ = listener.accept()
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._echo = self._pool.submit(self._answer)
        self._asking = self._pool.submit(self._ask)

    def _answer(self) -> None:
        while data := self._server.recv(64):
            self._server.sendall(data)

    def _ask(self) -> None:
        while not self._ending.wait(0.005):
            asked = time.monotonic()
            self._client.sendall(b"x")
            assert self._client.recv(64) == b"x"
            self.gap = max(self.gap, time.monotonic() - asked)
            self.answers += 1

    def go_on(self, answers: int = 20) -> None:
        """Wait for so many answers more; raises what ended the session."""
        goal = self.answers + answers
        wait_until(lambda: self._asking.done() or self.answers >= goal, "the session goes on", 15)
        if self._asking.done():
            self._asking.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._asking.result()
        self._client.close()
        self._echo.result()
        self._server.close()
        self._pool.shutdown()


def test_sessions_survive_taking_over_confirmation_and_giving_back(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    record = instance.paths.takeovers
    with Session(lab.host, lab.wire, HOST4) as ipv4, Session(lab.host, lab.wire, HOST6) as ipv6:
        done = apply(instance, taking(lab), within=SHORT)
        asked = time.monotonic()
        assert done.takeover.nics == {lab.nic: [f"{HOST4}/24", "192.0.2.2/24", f"{HOST6}/64"]}
        assert_taken(lab)
        for session in (ipv4, ipv6):
            session.go_on()
        shown = waits(instance)
        assert shown.nics == done.takeover.nics
        assert 0 < shown.seconds_left <= SHORT

        said = instance.cli("confirm")
        assert said.stdout == f"kept: {HOST4}/24, 192.0.2.2/24, {HOST6}/64 of {lab.nic} taken over\n"
        assert waits(instance) is None
        wait_until(lambda: time.monotonic() > asked + SHORT + 1, "its time is over", SHORT + 2)
        assert_taken(lab)

        assert json.loads(record.read_text())
        apply(instance, EMPTY)
        assert_unchanged(before, lambda: state(lab))
        assert json.loads(record.read_text()) == [], "the next time it has to be confirmed again"
        for session in (ipv4, ipv6):
            session.go_on()
            # One segment that is lost is sent again after 0.2 s, the next time after 0.4 s.
            assert session.gap < 1


def test_what_nobody_confirms_goes_back(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    with Session(lab.host, lab.wire, HOST4) as session:
        apply(instance, taking(lab), within=SHORT)
        assert_taken(lab)
        wait_until(lambda: waits(instance) is None, "its time runs out", SHORT + 5)
        assert_unchanged(before, lambda: state(lab))
        session.go_on()
    status = instance.json("status")
    assert "taken back, because it was not confirmed" in status["config"]["load_error"]
    assert status["counts"]["switches"] == 0
    assert not instance.paths.pending.exists()
    assert not instance.paths.takeovers.exists()


def test_rollback_goes_back_to_the_config_before(lab: Lab, instance: Instance) -> None:
    """What else changed with the takeover goes back too."""
    vm = lab.vm("web1", mac="02:15:5d:00:00:01")
    inside = {"type": "internal", "host": {"interface": "int0-host", "addresses": ["203.0.113.1/24"]}}
    former = {**EMPTY, "switches": {"int0": inside}}
    apply(instance, former)
    at_rest(lab)
    before = state(lab)
    config = taking(lab)
    config["switches"] |= former["switches"]
    config["ports"] = {"web1": {"switch": "ext0", "device": vm.device, "mac": vm.mac}}
    apply(instance, config)
    assert_taken(lab)
    assert instance.cli("rollback").stdout.endswith("changes made\n")
    assert_unchanged(before, lambda: state(lab))
    with Client(instance.paths.socket) as client:
        assert [switch.name for switch in client.switches()] == ["int0"]
        assert client.ports() == []


def test_while_one_waits_nothing_else_is_applied(lab: Lab, instance: Instance) -> None:
    apply(instance, taking(lab))
    refused = instance.cli("apply", str(instance.write(EMPTY, "empty.yaml")), check=False)
    assert refused.returncode == 2
    assert "waits for its confirmation: `offload confirm` or `offload rollback` first" in refused.stderr
    assert_taken(lab)


@pytest.mark.parametrize("command", ["confirm", "rollback"])
def test_without_one_that_waits(lab: Lab, instance: Instance, command: str) -> None:
    refused = instance.cli(command, check=False)
    assert refused.returncode == 2
    assert "no takeover waits" in refused.stderr


def test_plan_and_dry_run_only_tell(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    file = str(instance.write(taking(lab), "taking.yaml"))
    for told in (instance.json("plan", file), instance.json("apply", "--dry-run", file)):
        texts = [change["text"] for change in told["changes"]]
        assert f"take the host's address {HOST4}/24 off {lab.nic}" in texts
        assert any("what shall stay belongs under `host:`" in warning for warning in told["warnings"])
        assert told["takeover"] is None
    assert_unchanged(before, lambda: state(lab))
    assert not instance.paths.pending.exists()


def test_a_failure_in_the_middle_leaves_everything_as_it_was(lab: Lab, instance: Instance) -> None:
    """The kernel refuses a route of the config when addresses and default routes have moved already."""
    before = state(lab)
    config = taking(lab, routes=[{"to": "203.0.113.0/24", "via": "203.0.113.254"}])
    with (
        Session(lab.host, lab.wire, HOST4) as session,
        pytest.raises(KernelError, match=r"lead the route to 203\.0\.113\.0/24 through it"),
    ):
        apply(instance, config)
    assert "lead default through ext0-host" in instance.log.read_text()
    assert_unchanged(before, lambda: state(lab))
    assert session.answers
    assert waits(instance) is None
    assert not instance.paths.pending.exists()


def test_the_watchdog_gives_back_what_a_dead_daemon_cannot(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    with Session(lab.host, lab.wire, HOST4) as session:
        apply(instance, taking(lab), within=SHORT)
        instance.stop(signal.SIGKILL)
        assert_taken(lab)
        wait_until(lambda: not instance.paths.pending.exists(), "the watchdog gives it back", SHORT + 20)
        assert_unchanged(before, lambda: state(lab))
        session.go_on()


@pytest.mark.timeout(180)
def test_the_watchdog_ends_a_daemon_that_hangs(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    apply(instance, taking(lab), within=SHORT)
    assert instance.process is not None
    instance.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not instance.paths.pending.exists(), "the watchdog gives it back", SHORT + 60)
    assert instance.process.wait(5) == -signal.SIGKILL
    instance.process = None
    assert_unchanged(before, lambda: state(lab))


def test_the_next_daemon_waits_on(lab: Lab, instance: Instance) -> None:
    """It was killed and started again, with the config that takes over."""
    apply(instance, taking(lab), within=60)
    instance.stop(signal.SIGKILL)
    instance.file = instance.write(taking(lab))
    instance.start()
    assert_taken(lab)
    assert 0 < waits(instance).seconds_left < 60
    with Client(instance.paths.socket) as client:
        client.confirm()
    assert waits(instance) is None
    assert_taken(lab)


def test_the_next_daemon_leaves_out_what_was_not_confirmed_in_time(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    apply(instance, taking(lab), within=60)
    instance.stop(signal.SIGKILL)
    pending = instance.paths.pending
    late = json.loads(pending.read_text()) | {"deadline": 0.0, "token": "of nobody"}
    pending.write_text(json.dumps(late))
    instance.file = instance.write(taking(lab))
    instance.start()
    assert waits(instance) is None
    assert not pending.exists()
    with Client(instance.paths.socket) as client:
        assert client.switches() == []
    assert_unchanged(before, lambda: state(lab))


def test_an_end_without_confirmation_gives_back(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    apply(instance, taking(lab))
    instance.stop()
    assert_unchanged(before, lambda: state(lab))
    assert not instance.paths.pending.exists()


def test_detach_all_gives_back(lab: Lab, instance: Instance) -> None:
    before = state(lab)
    apply(instance, taking(lab))
    instance.cli("detach", "--all")
    assert instance.process is not None
    assert instance.process.wait(10) == 0
    instance.process = None
    assert_unchanged(before, lambda: state(lab))
    assert not instance.paths.pending.exists()


def test_after_a_reboot_what_was_confirmed_is_taken_at_once(lab: Lab, instance: Instance) -> None:
    """After one, RUN_DIR is empty, and the host's own network manager has put the addresses on the NIC."""
    apply(instance, taking(lab))
    with Client(instance.paths.socket) as client:
        client.confirm()
    reboot(instance)
    assert addresses(lab, lab.nic) == {HOST4, "192.0.2.2", HOST6}
    instance.file = instance.write(taking(lab))
    instance.start()
    assert_taken(lab)
    assert waits(instance) is None

    reboot(instance)
    lab.host.ip(f"address add 192.0.2.99/24 dev {lab.nic}")
    instance.start()
    assert waits(instance).nics[lab.nic].count("192.0.2.99/24") == 1, "this one was never confirmed"


def test_a_first_start_has_to_be_confirmed_too(lab: Lab) -> None:
    before = state(lab)
    with Instance(lab.host, taking(lab)) as instance:
        instance.start()
        assert_taken(lab)
        assert waits(instance).nics.keys() == {lab.nic}
        with Client(instance.paths.socket) as client:
            client.rollback()
            assert client.switches() == []
            with pytest.raises(UsageError, match="no takeover waits"):
                client.rollback()
        assert_unchanged(before, lambda: state(lab))


def test_an_address_that_comes_later_is_no_reason_to_stop(lab: Lab, instance: Instance) -> None:
    """Somebody puts one on the NIC while it is an uplink: it stays there till the next apply."""
    apply(instance, taking(lab))
    with Client(instance.paths.socket) as client:
        client.confirm()
    lab.host.ip(f"address add 203.0.113.9/24 dev {lab.nic}")
    with Client(instance.paths.socket) as client:
        runs = client.status().reconcile.runs
        lab.host.ip(f"link set {lab.nic} alias touched")  # news, so that the daemon looks
        wait_until(lambda: client.status().reconcile.runs > runs, "the daemon has looked")
    assert addresses(lab, lab.nic) == {"203.0.113.9"}
    lab.vm("web1", "02:15:5d:00:00:01")
    with Client(instance.paths.socket) as client:
        assert client.nics()[0].problems == []
        spec: dict[str, Any] = {"switch": "ext0", "device": "web1", "mac": "02:15:5d:00:00:01"}
        for dry_run in (True, False):
            told = client.port_add("web1", spec, dry_run=dry_run)
            assert not [change for change in told.changes if "203.0.113.9" in change.text]
        assert client.port_set("web1", {"weight": 60}).takeover is None
        asking: dict[str, Any] = {"allow": {"link_local_protocols": True}}  # the switch is another then
        assert client.port_set("web1", asking).takeover is None
    assert addresses(lab, lab.nic) == {"203.0.113.9"}
    assert "203.0.113.9" in addresses_taken_by(instance, taking(lab))


def test_a_nic_is_looked_at_while_something_could_be_taken(lab: Lab, instance: Instance) -> None:
    """Otherwise nobody lists the host's routes, which may be very many."""
    alone = config_of(lab.nic, {})
    assert looked_at(instance, alone) == {lab.nic}
    apply(instance, taking(lab))
    assert looked_at(instance, taking(lab)) == {lab.nic}
    assert looked_at(instance, alone) == set()


def reboot(instance: Instance) -> None:
    """End the daemon and leave nothing of RUN_DIR; the kernel's part goes as a reboot would take it."""
    instance.stop()
    instance.cli("detach", "--all")
    for file in instance.paths.run_dir.iterdir():
        file.unlink()
