"""What `offload explain` says of frames that a NIC sorts into virtual functions, against what then happens.

There is no such NIC here: veth pairs are the functions, and the test does the sorting. What the NIC says of
itself is made up; the programs, and what they count, are real.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from offload.explain import MADE_UP, Sample
from offload.hardware import Function, Rule
from offload.kernel import ntuple, sriov
from offload.kernel.bpf import Program, RunResult
from offload.kernel.explain import Question, explain
from offload.model import MemberRow, PortRecord
from offload.paths import Paths
from offload.plan import BYPASS, RUNNING
from offload.views import ExplainView
from tests.bpf.loaded import flat
from tests.bpf.test_switch_live import BROADCAST, MACS, NETWORK, Net
from tests.lab import Lab, wait_until

pytestmark = pytest.mark.slow

WEB1, ACCESS = "web1", "web2"
VIDS = {WEB1: 0, ACCESS: 10}
FUNCTIONS = {WEB1: "eth1v0", ACCESS: "eth1v1"}


@dataclass
class Site:
    """A switch whose NIC has a virtual function for each of two VMs."""

    net: Net
    paths: Paths
    nic: int
    functions: dict[str, int] = field(default_factory=dict)

    def hardware(self) -> tuple[Function, ...]:
        return tuple(
            Function(index, MACS[name], VIDS[name], FUNCTIONS[name], ifindex)
            for index, (name, ifindex) in enumerate(self.functions.items())
        )

    def ask(self, **fields: Any) -> ExplainView:
        question = Question(**{"nic": self.net.lab.nic, "port": None} | fields)
        return self.net.do(lambda: explain(question, self.paths))

    def counters(self) -> dict[tuple[str, str], int]:
        """Packets by port, NIC or virtual function and counter."""
        plane = self.net.plane
        rows = plane.port_counters(len(self.net.ids))
        found = {name: rows[port] for name, port in self.net.ids.items()}
        found[self.net.lab.nic] = found[self.net.lab.nic] | plane.nic_counters(self.nic)
        found |= {FUNCTIONS[name]: plane.function_counters(at) for name, at in self.functions.items()}
        return {
            (row, name.removesuffix(".packets")): value
            for row, counted in found.items()
            for name, value in flat(counted)
            if not name.endswith(".bytes")
        }

    def set_port(self, name: str, **fields: Any) -> None:
        record = PortRecord(name, 1, None, VIDS[name], RUNNING | BYPASS, 1014, 0)
        ifindex = self.net.lab.host.ifindex(name)
        self.net.do(
            lambda: self.net.plane.set_port(
                self.net.ids[name], replace(record, **{"ifindex": ifindex} | fields)
            )
        )

    def serve(self, name: str, whom: str | None) -> None:
        port = None if whom is None else self.net.ids[whom]
        self.net.plane.set_function(self.functions[name], port, VIDS[name])

    def let(self, name: str, *, filtered: bool = True, up: bool = True) -> None:
        port = self.net.ids[name] if filtered else None
        self.net.plane.set_filter(self.nic, MACS[name], VIDS[name], port)
        self.net.lab.host.ip(f"link set {FUNCTIONS[name]} {'up' if up else 'down'}")
        wait_until(
            lambda: (f"{FUNCTIONS[name]}@" in self.net.lab.host.ip("link show up")) == up, "the link is set"
        )

    def arrive(self, sample: Sample, at: str | None) -> None:
        """As the NIC has it: in the function of VM ``at``, ``None`` for its own queue."""
        if sample.dst == BROADCAST:
            for name in FUNCTIONS:
                self.net.lab.host.send(f"{FUNCTIONS[name]}-nic", [sample.octets()])
        if at is None:
            self.net.lab.wire.send(self.net.lab.wire_end, [sample.octets()])
        else:
            sorted_there = sample.stripped() if VIDS[at] else sample
            self.net.lab.host.send(f"{FUNCTIONS[at]}-nic", [sorted_there.octets()])


@pytest.fixture(scope="module")
def site(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Scope: one module; tests put back what they change."""
    bpffs, state = tmp_path_factory.mktemp("bpf"), tmp_path_factory.mktemp("state")
    (state / "cache").symlink_to(cache)
    subprocess.run(["mount", "-t", "bpf", "bpf", bpffs], check=True)
    try:
        with Lab() as lab:
            net = Net(lab, bpffs, cache)
            try:
                yield prepared(net, Paths(state / "run", state, bpffs))
            finally:
                net.plane.remove_everything()
    finally:
        subprocess.run(["umount", bpffs], check=True)


def prepared(net: Net, paths: Paths) -> Site:
    host = net.lab.host
    net.open()
    site = Site(net, paths, host.ifindex(net.lab.nic))
    net.do(lambda: net.plane.attach(net.lab.nic, site.nic, "native"))
    for name, vid in VIDS.items():
        vm = net.add(name, pvid=vid)
        net.hear(vm)
        device = FUNCTIONS[name]
        host.ip(f"link add {device} type veth peer name {device}-nic")
        ifindex = site.functions[name] = host.ifindex(device)
        for end in (device, f"{device}-nic"):
            host.sysctl(f"net.ipv6.conf.{end}.disable_ipv6", 1, missing_ok=True)
            host.ip(f"link set {end} up")
        row = MemberRow(0, NETWORK, "function", pvid=vid)
        net.do(lambda d=device, i=ifindex, r=row: net.plane.set_member(d, i, r))  # type: ignore[misc]
        net.do(lambda d=device, i=ifindex: net.plane.attach_function(d, i, site.nic, "generic"))  # type: ignore[misc]
        put_back(site, name)
    return site


def put_back(site: Site, name: str) -> None:
    site.set_port(name)
    site.serve(name, name)
    site.let(name)


@dataclass(frozen=True)
class Case:
    """A frame, where the NIC has it, the verdict, the counters that move and a part of the reason.

    ``port`` are fields of the row of its port that are otherwise, ``serves`` is whom its function serves.
    """

    frame: dict[str, Any]
    at: str | None
    verdict: str
    counters: tuple[str, ...]
    vlan_action: str = "none"
    reason: str = ""
    port: dict[str, Any] = field(default_factory=dict)
    serves: str | None = ""
    filtered: bool = True
    up: bool = True


def to(name: str, *vids: int, **more: Any) -> dict[str, Any]:
    return {"dst": MACS[name], "vids": vids, **more}


BACK = ("eth1.tx_bridge",)
CASES = {
    "untagged": Case(to(WEB1), WEB1, "queue", ("web1.direct",), reason="its virtual function eth1v0"),
    "VLAN": Case(
        to(ACCESS, 10),
        ACCESS,
        "queue",
        ("web2.direct",),
        "strip",
        "eth1v1 and strips the tag, so that the VLAN rests on the hardware: it was read back as 10; a filter",
    ),
    "priority-tagged": Case(to(WEB1, 0), WEB1, "queue", ("web1.direct",), "strip"),
    "another VLAN": Case(to(ACCESS, 11), None, "bridge", ("eth1.no_filter", *BACK), reason="no filter on"),
    "broadcast": Case(
        {"dst": BROADCAST},
        None,
        "bridge",
        ("eth1v0.group", "eth1v1.group", "eth1.broadcast", *BACK),
        reason="eth1v0 and eth1v1 may have it too and drop theirs",
    ),
    "a tag behind": Case(
        to(ACCESS, 10, 20), ACCESS, "drop", ("eth1v1.stranger",), reason="port web2 must not get a second tag"
    ),
    "a tag behind VID 0": Case(to(WEB1, 0, 20), WEB1, "drop", ("web1.vlan_nic",), reason="a second tag"),
    "802.1ad": Case(
        to(WEB1, 5, service=True), WEB1, "drop", ("eth1v0.stranger",), reason="must not get an 802.1ad tag"
    ),
    "too long": Case(
        to(ACCESS, 10, size=1100), ACCESS, "bridge", ("eth1v1.passed", *BACK), reason="(1014 bytes): raise it"
    ),
    "paused": Case(
        to(WEB1),
        WEB1,
        "bridge",
        ("eth1v0.passed", *BACK),
        reason="port web1 takes nothing from its queue",
        port={"flags": BYPASS},
    ),
    "device away": Case(
        to(WEB1, 0),
        WEB1,
        "bridge",
        ("eth1v0.passed", *BACK),
        "strip",
        "the device of port web1 is away",
        {"flags": 0, "ifindex": 0},
    ),
    "serves nobody": Case(
        to(WEB1), WEB1, "drop", ("eth1v0.stranger",), reason="delivers to nobody", serves=None
    ),
    "serves another": Case(
        to(WEB1), WEB1, "drop", ("eth1v0.stranger",), reason="delivers to port web2", serves=ACCESS
    ),
    "no filter": Case(
        to(WEB1), WEB1, "drop", ("eth1v0.stranger",), reason="drops what no filter on eth1", filtered=False
    ),
    "down": Case(to(WEB1), WEB1, "drop", (), reason="eth1v0 is down, or without a link", up=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_explained_is_what_happens(site: Site, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sriov, "functions", lambda links, nic: site.hardware())
    concerned = case.at or WEB1
    site.set_port(concerned, **case.port)
    site.serve(concerned, concerned if case.serves == "" else case.serves)
    site.let(concerned, filtered=case.filtered, up=case.up)
    try:
        before = site.counters()
        view = site.ask(**case.frame)
        assert site.counters() == before, "asking changes nothing"
        assert (view.verdict, view.vlan_action) == (case.verdict, case.vlan_action), view
        counted = [f"{step.port or step.device}.{step.counter}" for step in view.steps if step.counter]
        assert counted == list(case.counters)
        assert case.reason in view.reason
        site.arrive(Sample(src=MADE_UP, **case.frame), case.at)

        def moved() -> set[str]:
            after = site.counters()
            by_bridge = ("bridged", "vlan_bridge", "merged_buffers")  # who gets it from there is its business
            return {
                f"{row}.{name}"
                for (row, name), value in after.items()
                if value == before[row, name] + 1 and name not in by_bridge
            }

        wait_until(lambda: moved() == {*case.counters}, f"what {view} says")
    finally:
        put_back(site, concerned)


@pytest.mark.parametrize(
    ("asked", "arrives", "told"),
    [
        pytest.param(None, 1, f"a rule in eth1 gives {MACS[WEB1]} untagged to RX queue 1; a", id="by rule"),
        pytest.param(0, 0, f"a filter on eth1 gives {MACS[WEB1]} untagged to port web1", id="as asked"),
    ],
)
def test_a_rule_says_on_which_rx_queue_it_arrives(
    site: Site, asked: int | None, arrives: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Rule(5, MACS[WEB1], None, 1)
    monkeypatch.setattr(ntuple, "rules", lambda ethtool, nic: (rule,))
    contexts = []
    really = Program.test_run

    def seen(program: Program, frame: bytes, *, ctx: bytes) -> RunResult:
        contexts.append(struct.unpack("=6I", ctx))  # struct xdp_md: rx_queue_index is the fifth
        return really(program, frame, ctx=ctx)

    monkeypatch.setattr(Program, "test_run", seen)
    view = site.ask(**to(WEB1), rx_queue=asked)
    assert (view.verdict, [step.program for step in view.steps]) == ("queue", ["uplink"])
    assert [context[4] for context in contexts] == [arrives]
    assert view.reason.startswith(told)
