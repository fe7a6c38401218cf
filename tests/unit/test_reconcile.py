"""The reconciler over a kernel that is a dict: apply, undo, journal, verify. No privileges."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.config import Config, parse
from offload.errors import KernelError, OffloadError, VerifyError
from offload.journal import Era, Journal
from offload.model import (
    AdminUp,
    Bridge,
    BridgePort,
    Change,
    Ipv6Disabled,
    Master,
    Member,
    Promiscuous,
    Resource,
    State,
    Station,
    StationRow,
    Value,
)
from offload.plan import Facts
from offload.reconcile import Reconciler
from tests.unit.test_plan import CONFIG, ETH1, FACTS, WEB1, config, link

ERA = Era("boot", 1)


class DictKernel:
    """Holds settings; fails at the resource that ``breaks`` names, ignores the one that ``deaf`` names."""

    def __init__(self) -> None:
        self.state: dict[Resource, Value] = {
            AdminUp("eth1", 2): False,
            Promiscuous("eth1", 2): False,
            AdminUp("web1", 3): True,
        }
        self.breaks: Resource | None = None
        self.deaf: Resource | None = None
        self.done: list[Change] = []
        self.looks: list[str] = []
        self.doubtful: set[str] = set()

    def facts(
        self,
        config: Config,
        originals: State,
        *,
        detached: bool = False,
        failed: Mapping[str, str] | None = None,
        may_take: bool = False,
    ) -> Facts:
        self.looks.append("whole")
        return Facts(
            links=FACTS.links,
            online_cpus=(0,),
            digest="d1",
            detached=detached,
            own=frozenset(resource.name for resource in self.state if isinstance(resource, Bridge)),
            peers=FACTS.peers,
            failed=failed or {},
            networks={"ext0": 0},
        )

    def observe(self, facts: Facts, wanted: State, originals: State) -> dict[Resource, Value]:
        return {resource: value for resource, value in self.state.items() if value is not None}

    def facts_again(
        self,
        facts: Facts,
        devices: Collection[str],
        *,
        unless: Collection[str],
        ids: Mapping[str, int],
        stations: Iterable[tuple[int, str, int]],
    ) -> Facts | None:
        if self.doubtful.intersection({*devices, *unless}):
            return None
        self.looks.append(f"{sorted(devices)} {ids} {len([*stations])}")
        return facts

    def observe_again(self, facts: Facts, asked: Iterable[Resource]) -> dict[Resource, Value]:
        return {resource: self.state[resource] for resource in asked if resource in self.state}

    def hurry(self, changes: Collection[Change]) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def execute(self, change: Change) -> None:
        if change.resource == self.breaks and change.after is not None:
            raise KernelError(f"no {change.resource}")
        self.done.append(change)
        if change.resource == self.deaf:
            return
        if change.after is None:
            self.state.pop(change.resource, None)
        else:
            self.state[change.resource] = change.after


@pytest.fixture
def kernel() -> DictKernel:
    return DictKernel()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl", ERA)


def test_apply_reaches_what_is_wanted_and_then_rests(kernel: DictKernel, journal: Journal) -> None:
    reconciler = Reconciler(kernel, journal)
    result = reconciler.apply(config(), strict=True)
    assert result.desired.state.items() <= kernel.state.items()
    assert reconciler.apply(config(), strict=True).changes == ()


def test_plan_changes_nothing(kernel: DictKernel, journal: Journal) -> None:
    assert Reconciler(kernel, journal).plan(config()).changes
    assert (kernel.done, journal.originals()) == ([], {})


def test_settings_are_in_the_journal_before_the_first_change(kernel: DictKernel, tmp_path: Path) -> None:
    seen: list[dict[Resource, Value]] = []

    class Watching(DictKernel):
        def execute(self, change: Change) -> None:
            seen.append(Journal(tmp_path / "j", ERA).originals())
            super().execute(change)

    Reconciler(Watching(), Journal(tmp_path / "j", ERA)).apply(config(), strict=True)
    assert seen[0][AdminUp("eth1", 2)] is False
    assert seen[0][Promiscuous("eth1", 2)] is False
    assert seen[0][Bridge("ext0")] is None
    assert AdminUp("web1", 3) not in seen[0]  # it was up already


def test_taking_everything_out_restores_every_setting(kernel: DictKernel, journal: Journal) -> None:
    before = dict(kernel.state)
    reconciler = Reconciler(kernel, journal)
    reconciler.apply(config(), strict=True)
    reconciler.take_out(config(), everything=True)
    left = {key: value for key, value in kernel.state.items() if not isinstance(key, BridgePort)}
    assert before.items() <= left.items()
    assert {key for key in left if not isinstance(key, AdminUp | Promiscuous)} == {
        key for key in left if type(key).__name__ in ("Ipv6Disabled", "PeerFeature")
    }  # a dict that never held these settings cannot say what they were
    assert not [key for key in journal.originals() if key in before]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_a_failure_on_the_nic_undoes_everything(kernel: DictKernel, journal: Journal, strict: bool) -> None:
    before = dict(kernel.state)
    kernel.breaks = Promiscuous("eth1", 2)
    with pytest.raises(KernelError, match="Promiscuous"):
        Reconciler(kernel, journal).apply(config(), strict=strict)
    assert {key: value for key, value in kernel.state.items() if value} == {
        key: value for key, value in before.items() if value
    }
    assert not [key for key in journal.originals() if key in before or isinstance(key, Bridge)]


def test_a_failure_on_a_port_leaves_only_that_port_out(kernel: DictKernel, journal: Journal) -> None:
    kernel.breaks = Master("web1", 3)
    result = Reconciler(kernel, journal).apply(config(), strict=False)
    assert result.failed == {"web1": f"no {kernel.breaks}"}
    assert result.desired.ports["web1"].state == "failed"
    assert kernel.state[Master("eth1", 2)] == "ext0"


def test_any_number_of_ports_may_be_left_out(journal: Journal) -> None:
    names = [f"web{number}" for number in range(1, 8)]
    links = {"eth1": ETH1, **{name: link(name, 2 + place, kind="tun") for place, name in enumerate(names, 1)}}

    class NoPrograms(DictKernel):
        def facts(self, *arguments: Any, **options: Any) -> Facts:
            return replace(super().facts(*arguments, **options), links=links)

        def execute(self, change: Change) -> None:
            if isinstance(change.resource, Member) and change.resource.device in names:
                raise KernelError("no")
            super().execute(change)

    ports = "\n".join(
        f'  {name}: {{switch: ext0, device: {name}, mac: "02:15:5d:00:00:0{place}"}}'
        for place, name in enumerate(names, 1)
    )
    many = parse(CONFIG.partition("ports:")[0] + "ports:\n" + ports)
    result = Reconciler(NoPrograms(), journal).apply(many, strict=False)
    assert set(result.failed) == set(names)


def test_the_same_failure_refuses_a_config_whole(kernel: DictKernel, journal: Journal) -> None:
    kernel.breaks = Master("web1", 3)
    with pytest.raises(KernelError):
        Reconciler(kernel, journal).apply(config(), strict=True)
    assert Bridge("ext0") not in kernel.state


def test_a_failing_undo_does_not_hide_the_cause(kernel: DictKernel, journal: Journal) -> None:
    class Stuck(DictKernel):
        def execute(self, change: Change) -> None:
            if change.resource == Bridge("ext0") and change.after is None:
                raise KernelError("the bridge stays")
            super().execute(change)

    stuck = Stuck()
    stuck.breaks = Promiscuous("eth1", 2)
    with pytest.raises(KernelError, match="Promiscuous"):
        Reconciler(stuck, journal).apply(config(), strict=True)
    assert Master("eth1", 2) not in stuck.state  # the rest was undone all the same


def test_a_kernel_that_does_not_keep_what_was_set_is_told(kernel: DictKernel, journal: Journal) -> None:
    kernel.deaf = AdminUp("eth1", 2)
    with pytest.raises(VerifyError, match=r"AdminUp.*is False, shall be True"):
        Reconciler(kernel, journal).apply(config(), strict=True)


def test_who_is_heard_all_the_while_does_not_end_it(journal: Journal) -> None:
    """Each look finds another address at its port. What is left to do comes with the next news."""
    names = [f"web{number}" for number in range(1, 10)]
    links = {"eth1": ETH1, **{name: link(name, 2 + place, kind="tun") for place, name in enumerate(names, 1)}}

    class Talkative(DictKernel):
        def __init__(self) -> None:
            super().__init__()
            self.stations: dict[tuple[int, str, int], StationRow] = {}

        def facts(self, *arguments: Any, **options: Any) -> Facts:
            for resource, value in self.state.items():
                if isinstance(resource, Station) and isinstance(value, tuple):
                    key = (resource.network, resource.mac, resource.vid)
                    self.stations[key] = StationRow(*value)  # type: ignore[arg-type]
            silent = [key for key, row in self.stations.items() if row.state == "expected"]
            if silent:
                row = replace(self.stations[silent[0]], state="here")
                self.stations[silent[0]] = row
                self.state[Station(*silent[0])] = (row.port, row.ifindex, row.state)
            found = super().facts(*arguments, **options)
            return replace(found, links=links, stations=dict(self.stations))

    ports = "".join(
        f"  {name}: {{switch: ext0, device: {name}, mac: '02:15:5d:00:00:{place:02x}'}}\n"
        for place, name in enumerate(names, 1)
    )
    talkative = Talkative()
    many = parse(CONFIG.partition("ports:")[0] + "ports:\n" + ports)
    reconciler = Reconciler(talkative, journal)
    reconciler.apply(many, strict=True)
    assert "expected" in {row.state for row in talkative.stations.values()}
    for _ in names:
        result = reconciler.apply(many, strict=False)
    assert {port.path for port in result.desired.ports.values()} == {"queue"}


def test_detaching_and_putting_back(kernel: DictKernel, journal: Journal) -> None:
    reconciler = Reconciler(kernel, journal)
    reconciler.apply(config(), strict=True)
    attached = dict(kernel.state)
    reconciler.apply(config(), strict=False, detached=True)
    assert kernel.state[Master("web1", WEB1.ifindex)] == "ext0"
    assert "Uplink" not in {type(resource).__name__ for resource in kernel.state}
    reconciler.apply(config(), strict=True)
    assert kernel.state == attached


def test_unknown_errors_undo_too(kernel: DictKernel, journal: Journal) -> None:
    class Broken(DictKernel):
        def execute(self, change: Change) -> None:
            if change.resource == Master("eth1", ETH1.ifindex):
                raise ZeroDivisionError
            super().execute(change)

    broken = Broken()
    with pytest.raises(ZeroDivisionError):
        Reconciler(broken, journal).apply(config(), strict=True)
    assert Bridge("ext0") not in broken.state


def test_refusals_come_before_any_change(kernel: DictKernel, journal: Journal) -> None:
    with pytest.raises(OffloadError, match="CPU"):
        Reconciler(kernel, journal).apply(config(port="switch: ext0, cpu: 5,"), strict=True)
    assert kernel.done == []


GUARD = "switch: ext0, allow: {dhcp_server: true},"


def at_rest(kernel: DictKernel, journal: Journal) -> Reconciler:
    reconciler = Reconciler(kernel, journal)
    reconciler.apply(config(), strict=True)
    kernel.looks.clear()
    kernel.done.clear()
    return reconciler


def test_a_change_of_one_port_looks_at_that_port_before_and_after(
    kernel: DictKernel, journal: Journal
) -> None:
    reconciler = at_rest(kernel, journal)
    result = reconciler.apply(config(port=GUARD), strict=True, news=())
    assert kernel.looks == ["['web1'] {'web1': 0} 1"] * 2
    assert [change.resource for change in kernel.done] == [Member("web1", 3)]
    assert result.desired.state.items() <= kernel.state.items()
    assert reconciler.apply(config(), strict=True, news=()).changes, "what is known goes along with changes"
    assert "whole" not in kernel.looks


def test_after_a_look_at_everything_what_was_changed_is_looked_at_again(
    kernel: DictKernel, journal: Journal
) -> None:
    reconciler = at_rest(kernel, journal)
    result = reconciler.apply(config(port=GUARD), strict=True)
    assert kernel.looks == ["whole", "['web1'] {'web1': 0} 1"]
    assert result.ports is None
    assert result.desired.state.items() <= kernel.state.items()
    assert reconciler.apply(config(port=GUARD), strict=True, news=()).ports == set()
    kernel.deaf = Member("web1", 3)
    with pytest.raises(VerifyError, match="Member"):
        reconciler.apply(config(), strict=True)
    kernel.looks.clear()
    kernel.state[Promiscuous("eth1", 2)] = False
    reconciler.apply(config(port=GUARD), strict=True)
    assert kernel.looks == ["whole"] * 2


def test_a_queue_that_moves_is_looked_at_alone(kernel: DictKernel, journal: Journal) -> None:
    reconciler = at_rest(kernel, journal)
    result = reconciler.apply(config(), strict=False, news=(), moved={"web1": 1})
    assert kernel.looks == ["['web1'] {'web1': 0} 1"]
    assert (result.changes, result.facts.moved) == ((), {"web1": 1})
    result = reconciler.apply(config(), strict=False, news=(), merging={"web1": True})
    assert (result.facts.moved, result.facts.merging) == ({}, {"web1": True})
    assert "whole" not in kernel.looks


def test_what_somebody_did_to_a_device_is_found_with_the_news_of_it(
    kernel: DictKernel, journal: Journal
) -> None:
    reconciler = at_rest(kernel, journal)
    kernel.state[Master("web1", 3)] = "br0"
    assert not reconciler.apply(config(), strict=False, news=()).changes
    result = reconciler.apply(config(), strict=False, news={"web1"})
    place = Master("web1", 3)
    assert result.changes[0] == Change(place, "br0", None)
    assert Change(place, None, "ext0") in result.changes
    assert "whole" not in kernel.looks


def test_a_step_that_fails_on_what_was_known_is_tried_on_a_look_at_everything(
    kernel: DictKernel, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bridge that somebody deletes takes its devices out first: no port is left out for that."""
    reconciler = at_rest(kernel, journal)
    del kernel.state[Master("web1", 3)]
    execute = kernel.execute

    def fails_at_first(change: Change) -> None:
        if "whole" not in kernel.looks:
            raise KernelError("there is no device ext0 any more")
        execute(change)

    monkeypatch.setattr(kernel, "execute", fails_at_first)
    assert reconciler.apply(config(), strict=False, news={"web1"}).failed == {}
    assert kernel.state[Master("web1", 3)] == "ext0"


def test_a_port_is_read_back(kernel: DictKernel, journal: Journal) -> None:
    reconciler = at_rest(kernel, journal)
    kernel.deaf = Member("web1", 3)
    with pytest.raises(VerifyError, match="Member"):
        reconciler.apply(config(port=GUARD), strict=True, news=())


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        pytest.param({"news": None}, config(port=GUARD), id="whatever may be new"),
        pytest.param({"news": {"eth1"}}, config(port=GUARD), id="news of a NIC"),
        pytest.param({"news": {"docker0"}}, config(port=GUARD), id="another device is not as it was"),
        pytest.param({"news": {"web1"}}, config(), id="the port's device has gone"),
        pytest.param({"news": (), "detached": True}, config(), id="detached"),
        pytest.param({"news": ()}, config(queues="{eth1: {xdp_mode: generic}}"), id="another NIC's setting"),
        pytest.param({"news": ()}, config(port="switch: ext0, vlan: 7,"), id="the switch is another"),
    ],
)
def test_everything_is_looked_at(
    kernel: DictKernel, journal: Journal, options: dict[str, Any], changed: Config
) -> None:
    reconciler = at_rest(kernel, journal)
    kernel.doubtful = {"docker0"} | ({"web1"} if changed == config() else set())
    with contextlib.suppress(OffloadError):  # a dict is no NIC that changes its mode
        reconciler.apply(changed, strict=True, **options)
    assert "whole" in kernel.looks


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda reconciler: reconciler.take_out(config(), everything=True), id="taken out"),
        pytest.param(
            lambda reconciler: reconciler.apply(config(port=GUARD), strict=True, news=()), id="failed"
        ),
    ],
)
def test_nothing_is_known_after(
    kernel: DictKernel, journal: Journal, trouble: Callable[[Reconciler], object]
) -> None:
    reconciler = at_rest(kernel, journal)
    kernel.breaks = Member("web1", 3)
    with contextlib.suppress(KernelError):
        trouble(reconciler)
    kernel.breaks = None
    kernel.looks.clear()
    reconciler.apply(config(), strict=True, news=())
    assert "whole" in kernel.looks


def test_a_port_that_goes_gets_its_settings_back(kernel: DictKernel, journal: Journal) -> None:
    kernel.state[Ipv6Disabled("web1", 3)] = False
    base, _, web1 = CONFIG.partition("ports: {")
    both = parse(f"{base}ports: {{web2: {{switch: ext0, device: web2, mac: '02:15:5d:00:00:02'}}, {web1}")
    reconciler = Reconciler(kernel, journal)
    reconciler.apply(both, strict=True)
    assert kernel.state[Ipv6Disabled("web1", 3)] is True
    kernel.looks.clear()
    without = parse(f"{base}ports: {{web2: {{switch: ext0, device: web2, mac: '02:15:5d:00:00:02'}}}}")
    reconciler.apply(without, strict=True, news=())
    assert "whole" not in kernel.looks
    assert kernel.state[Ipv6Disabled("web1", 3)] is False
    assert Master("web1", 3) not in kernel.state


def test_many_ports_are_not_looked_at_one_by_one(kernel: DictKernel, journal: Journal) -> None:
    reconciler = at_rest(kernel, journal)
    ports = "".join(
        f"  new{at}: {{switch: ext0, device: new{at}, mac: '02:15:5d:00:01:{at:02x}'}}\n" for at in range(40)
    )
    many = parse(CONFIG.partition("ports:")[0] + "ports:\n" + ports)
    reconciler.apply(many, strict=True, news=())
    assert "whole" in kernel.looks


def test_a_plan_looks_at_everything_and_forgets_nothing(kernel: DictKernel, journal: Journal) -> None:
    reconciler = at_rest(kernel, journal)
    assert reconciler.plan(config(port=GUARD)).changes
    assert (kernel.looks, kernel.done) == (["whole"], [])
    reconciler.apply(config(port=GUARD), strict=True, news=())
    assert kernel.looks.count("whole") == 1
