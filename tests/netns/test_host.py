"""Probes of the host and its devices, against what this kernel really does. Needs root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.doctor import Finding, diagnose
from offload.errors import KernelError, UnsupportedError
from offload.kernel import host
from offload.kernel.bpf import AttachType, Link, Program
from offload.kernel.compile import ProgramSpec
from offload.kernel.links import Links
from offload.kernel.managers import managers
from offload.kernel.netdev import XdpFeatures, redirects_frags, xdp_features
from offload.kernel.netns import identity
from offload.kernel.programs import describe
from offload.paths import Paths
from tests.lab import Lab, wait_until

BPF_PROG_TYPE_XDP = 6
RETURN_XDP_PASS = bytes.fromhex("b700000002000000 9500000000000000")
TELLS_XDP_FEATURES = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 3)


@pytest.fixture
def pins(lab: Lab) -> Iterator[Path]:
    """A directory of this test's own on the BPF file system. Scope: one test."""
    directory = Path("/sys/fs/bpf") / lab.host.name
    directory.mkdir()
    yield directory
    for pin in directory.iterdir():
        pin.unlink()
    directory.rmdir()


def ask_without_privilege(question: str) -> dict[str, str]:
    """The answer that an unprivileged process gets from a probe of ``host``."""
    script = (
        "import dataclasses, json, sys; from pathlib import Path; from offload.kernel import host; "
        f"print(json.dumps(dataclasses.asdict({question})))"
    )
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
    done = subprocess.run([*drop, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


def test_bridge_answers_are_what_ip_finds(lab: Lab) -> None:
    def can_make(name: str, *options: str) -> bool:
        argv = ["ip", "link", "add", name, "type", "bridge", *options]
        return lab.host.run(*argv, check=False).returncode == 0

    bridge, filtering = host.bridges()
    assert bridge.state == ("yes" if can_make("b1") else "no")
    assert filtering.state == ("yes" if can_make("b2", "vlan_filtering", "1") else "no")


def test_bridge_probe_leaves_the_namespace_alone(lab: Lab) -> None:
    before = lab.host.call(host.netns_inode)
    with Links(lab.host.path) as links, links.events() as events:
        state = lab.host.call(host.bridges)
        assert [event for event in events.drain() if event.name.startswith("probe")] == []
        assert set(links.snapshot()) == {"lo", lab.nic}
    assert state == host.bridges()
    assert lab.host.call(host.netns_inode) == before == identity(lab.host.path)[1] != host.netns_inode()


def test_bridge_probe_works_inside_an_event_loop(privilege: None) -> None:
    async def ask() -> str:
        return host.bridges()[0].state

    assert asyncio.run(ask()) == host.bridges()[0].state != "unknown"


def test_without_privilege_bridges_cannot_be_told(privilege: None) -> None:
    answer = ask_without_privilege("host.bridges()[1]")
    assert answer["state"] == "unknown"
    assert "not permitted" in answer["why"]


def test_without_privilege_tcx_cannot_be_told(privilege: None) -> None:
    assert host.tcx().state != "unknown"
    assert ask_without_privilege("host.tcx()")["state"] in ("unknown", "no")


def test_missing_capabilities_are_named(privilege: None) -> None:
    assert {answer.state for answer in host.capabilities().values()} == {"yes"}
    answer = ask_without_privilege("host.capabilities()['cap_bpf']")
    assert answer["state"] == "no"
    assert answer["why"] == "CAP_BPF is missing; without it offload cannot load programs and create maps"


def test_bpffs_is_lost_inside_ip_netns_exec(lab: Lab) -> None:
    script = (
        "from pathlib import Path; from offload.kernel.host import bpffs; "
        "answer = bpffs(Path('/sys/fs/bpf/offload')); print(answer.state, answer.remedy)"
    )
    assert host.bpffs(Path("/sys/fs/bpf/offload")).state == "yes"
    assert lab.host.run(sys.executable, "-c", script).stdout == "yes \n"
    exec_in = ["ip", "netns", "exec", lab.host.name, sys.executable, "-c", script]
    told = subprocess.run(exec_in, capture_output=True, text=True, check=True).stdout
    assert told.startswith("no mount -t bpf bpf /sys/fs/bpf (")


def test_this_machine_has_what_the_tests_need(privilege: None) -> None:
    answers = host.probe(Path("/sys/fs/bpf/offload"))
    assert [
        name for name in ("btf", "bpffs", "bridge", "libbpf", "bcc") if answers[name].state != "yes"
    ] == []


def test_what_drivers_can_do_is_told_from_linux_6_3_on() -> None:
    assert redirects_frags() is TELLS_XDP_FEATURES


@pytest.mark.skipif(TELLS_XDP_FEATURES, reason="this kernel tells what drivers can do with XDP")
def test_an_older_kernel_cannot_tell_xdp_features(lab: Lab) -> None:
    with pytest.raises(UnsupportedError, match="does not tell"):
        xdp_features("lo", 1)
    native = findings(lab, Paths())["native_xdp"]
    assert native.level == "warn"
    assert native.message.startswith("native XDP: could not tell")


@pytest.mark.skipif(not TELLS_XDP_FEATURES, reason="Linux before 6.3 does not tell")
def test_xdp_features(lab: Lab) -> None:
    index = lab.host.ifindex(lab.nic)
    veth = lab.host.call(lambda: xdp_features(lab.nic, index))
    assert XdpFeatures.BASIC | XdpFeatures.REDIRECT | XdpFeatures.RX_SG in veth
    assert lab.host.call(lambda: xdp_features("lo", 1)) == XdpFeatures(0)
    with pytest.raises(KernelError, match="gone0"):
        lab.host.call(lambda: xdp_features("gone0", 9999))


def test_a_foreign_program_is_described(lab: Lab, pins: Path) -> None:
    spec = ProgramSpec(BPF_PROG_TYPE_XDP, RETURN_XDP_PASS, {}, {})
    index = lab.host.ifindex(lab.nic)
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(Program.load("pass_all", spec, {}, AttachType.XDP, frags=False))
        create = lambda: Link.create(program, index, AttachType.XDP, doing="attach")  # noqa: E731
        link = stack.enter_context(lab.host.call(create))
        found = describe(program.info().id, pins)
        assert (found.name, found.pins) == ("pass_all", ())
        link.pin(pins / "link")
        program.pin(pins / "program")
        assert describe(program.info().id, pins).pins == (str(pins / "link"), str(pins / "program"))
        foreign = findings(lab, Paths())["xdp_program"]
        own = findings(lab, Paths(pin_dir=pins))["xdp_program"]
    assert foreign.level == "fail"
    assert f"pass_all, pinned at {pins}/link" in foreign.message
    assert (own.level, own.remedy) == ("ok", "")
    with pytest.raises(KernelError, match="BPF program 4294967295"):
        describe(2**32 - 1, pins)


def findings(lab: Lab, paths: Paths) -> dict[str, Finding]:
    report = lab.host.call(lambda: diagnose(paths, [lab.nic]))
    return {finding.check: finding for finding in report.findings if finding.subject == lab.nic}


def test_doctor_on_a_veth_nic(lab: Lab) -> None:
    found = findings(lab, Paths())
    untold = set() if TELLS_XDP_FEATURES else {"native_xdp"}
    assert {finding.check for finding in found.values() if finding.level != "ok"} == untold
    assert {"native_xdp", "vlan_in_frame", "xdp_program", "manager", "peer_queues"} < set(found)
    assert found["driver"].message == "driver veth"
    lab.host.run("ethtool", "-L", lab.nic, "rx", "2")
    lab.host.ip("link add br7 type bridge")
    lab.host.ip(f"link set {lab.nic} master br7")
    found = findings(lab, Paths())
    assert found["channels"].message == "several RX queues: yes: 2 of at most 4"
    assert found["peer_queues"].level == found["master"].level == "fail"
    assert "2 RX queues here, 4 TX queues at the other end" in found["peer_queues"].message
    assert "in the bridge br7" in found["master"].message


def test_a_dhcp_client_is_seen_in_its_own_namespace_only(lab: Lab, tmp_path: Path) -> None:
    client = tmp_path / "dhclient"
    client.symlink_to("/bin/sleep")
    index = lab.host.ifindex(lab.nic)
    # sleep fails on a word that is no number, so the device's name goes where sleep takes it: argv[0].
    with subprocess.Popen(
        lab.host.argv("bash", "-c", f"exec -a 'dhclient {lab.nic}' {client} 30"), stdout=subprocess.DEVNULL
    ) as process:
        try:
            cmdline = Path(f"/proc/{process.pid}/cmdline")
            wait_until(lambda: cmdline.read_bytes().startswith(b"dhclient"), "the client runs")
            here = lab.host.call(lambda: managers(lab.nic, index))
            elsewhere = lab.wire.call(lambda: managers(lab.nic, index))
        finally:
            process.kill()
    assert [manager.name for manager in here] == ["dhclient"]
    assert elsewhere == []
