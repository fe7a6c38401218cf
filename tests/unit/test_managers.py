"""Who manages a device, told from trees of /proc and /run as the programs leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offload.kernel.managers import Manager, managers

OURS = "net:[4026531840]"
OTHER = "net:[4026532177]"
DEVICES = ("lo", "eth0", "eth1")


class Host:
    """A host below ``root``: its first process and we are in the same network namespace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process(1, "systemd", "/sbin/init")
        self.write(
            "proc/thread-self/net/dev", "Inter-|\n face |\n" + "".join(f"{d:>6}: 0\n" for d in DEVICES)
        )
        self.link("proc/thread-self/ns/net", OURS)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def link(self, path: str, target: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).symlink_to(target)

    def process(self, pid: int, comm: str, *argv: str, netns: str | None = OURS) -> None:
        self.write(f"proc/{pid}/comm", comm[:15] + "\n")
        self.write(f"proc/{pid}/cmdline", "".join(word + "\0" for word in argv))
        if netns is not None:
            self.link(f"proc/{pid}/ns/net", netns)

    def managers(self, name: str = "eth1", ifindex: int = 3) -> list[Manager]:
        return managers(name, ifindex, self.root)

    def names(self, name: str = "eth1", ifindex: int = 3) -> list[str]:
        return [manager.name for manager in self.managers(name, ifindex)]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def network_manager(host: Host, **process: str | None) -> None:
    host.process(500, "NetworkManager", "/usr/sbin/NetworkManager", "--no-daemon", **process)
    host.write("run/NetworkManager/devices/3", "[device]\nmanaged=true\nconnection-uuid=b1\nnm-owned=false\n")


def networkd(host: Host, **process: str | None) -> None:
    host.process(501, "systemd-networkd", "/lib/systemd/systemd-networkd", **process)
    host.write(
        "run/systemd/netif/links/3",
        "# This is private data. Do not parse.\nADMIN_STATE=configured\nOPER_STATE=routable\n"
        "NETWORK_FILE=/etc/systemd/network/20-wired.network\n",
    )


def test_nobody(host: Host) -> None:
    assert host.managers() == []


def test_network_manager(host: Host) -> None:
    network_manager(host)
    (manager,) = host.managers()
    assert manager.name == "NetworkManager"
    assert "devices/3: managed=true" in manager.evidence
    assert "nmcli device set eth1 managed no" in manager.remedy
    assert "match-device=interface-name:eth1\nmanaged=0" in manager.remedy
    assert host.names("eth2", 4) == []


@pytest.mark.parametrize("text", ["[device]\nmanaged=false\n", "[device]\nnm-owned=false\n", ""])
def test_network_manager_that_leaves_it_alone(host: Host, text: str) -> None:
    network_manager(host)
    host.write("run/NetworkManager/devices/3", text)
    assert host.managers() == []


def test_networkd(host: Host) -> None:
    networkd(host)
    (manager,) = host.managers()
    assert manager.name == "systemd-networkd"
    assert "ADMIN_STATE=configured, by /etc/systemd/network/20-wired.network" in manager.evidence
    assert "[Match]\nName=eth1\n\n[Link]\nUnmanaged=yes" in manager.remedy
    assert "netplan" not in manager.remedy
    assert host.names("eth2", 4) == []


@pytest.mark.parametrize(
    ("text", "managed"),
    [
        ("ADMIN_STATE=unmanaged", False),
        ("ADMIN_STATE=unmanaged\nNETWORK_FILE=/etc/systemd/network/05-offload-eth1.network", False),
        ("ADMIN_STATE=linger", False),
        ("ADMIN_STATE=pending", False),
        ("ADMIN_STATE=initialized", False),
        ("ADMIN_STATE=pending\nNETWORK_FILE=/etc/systemd/network/20-wired.network", True),
        ("ADMIN_STATE=configuring", True),
        ("ADMIN_STATE=failed", True),
    ],
)
def test_networkd_admin_states(host: Host, text: str, managed: bool) -> None:
    networkd(host)
    host.write("run/systemd/netif/links/3", text + "\n")
    assert bool(host.managers()) is managed


def test_netplan_is_named_behind_networkd(host: Host) -> None:
    networkd(host)
    host.write(
        "run/systemd/netif/links/3",
        "ADMIN_STATE=configured\nNETWORK_FILE=/run/systemd/network/10-netplan-eth1.network\n",
    )
    (manager,) = host.managers()
    assert manager.remedy.startswith("remove eth1 from /etc/netplan/*.yaml, then: netplan apply")


@pytest.mark.parametrize("start", [network_manager, networkd])
@pytest.mark.parametrize(("netns", "believed"), [(OURS, True), (OTHER, False), (None, True)])
def test_files_speak_of_their_writers_namespace(
    host: Host, start: Callable[..., None], netns: str | None, believed: bool
) -> None:
    start(host, netns=netns)
    assert bool(host.managers()) is believed


@pytest.mark.parametrize("start", [network_manager, networkd])
def test_files_of_a_process_that_ended_are_not_believed(host: Host, start: Callable[..., None]) -> None:
    start(host)
    for comm in host.root.glob("proc/50?/comm"):
        comm.unlink()
    assert host.managers() == []


@pytest.mark.parametrize("start", [network_manager, networkd])
def test_files_are_believed_where_processes_are_hidden(host: Host, start: Callable[..., None]) -> None:
    start(host)
    for comm in host.root.glob("proc/[0-9]*/comm"):
        comm.unlink()
    assert len(host.managers()) == 1


def test_ifupdown(host: Host) -> None:
    host.write("run/network/ifstate", "lo=lo\neth1=home\n")
    (manager,) = host.managers()
    assert manager.name == "ifupdown"
    assert "ifdown eth1" in manager.remedy
    assert "`auto eth1`" in manager.remedy
    assert host.names("eth11", 5) == []


def test_ifupdown_speaks_of_the_first_process_namespace(host: Host) -> None:
    host.write("run/network/ifstate", "eth1=eth1\n")
    (host.root / "proc/1/ns/net").unlink()
    assert host.names() == ["ifupdown"]
    host.link("proc/1/ns/net", OTHER)
    assert host.names() == []


@pytest.mark.parametrize(
    ("argv", "client"),
    [
        (["/sbin/dhclient", "-4", "-v", "-pf", "/run/dhclient.eth1.pid", "eth1"], "dhclient"),
        (["/sbin/dhclient", "eth0"], None),
        (["dhclient", "-4"], "dhclient"),
        (["dhcpcd", "eth1"], "dhcpcd"),
        (["dhcpcd", "-b", "eth0"], None),
        (["/usr/sbin/dhcpcd", "-b", "-q"], "dhcpcd"),
        (["dhcpcd: eth1 [ip4] [ip6]"], "dhcpcd"),
        (["dhcpcd: eth0 [ip4] [ip6]"], None),
        (["dhcpcd: gone0 [ip4] [ip6]"], None),
        (["dhcpcd: [manager] [ip4] [ip6]"], "dhcpcd"),
        (["dhcpcd: [master] [ip4]"], "dhcpcd"),
        (["dhcpcd: [network proxy]"], None),
        (["dhcpcd: [DHCP6 proxy] fe80::1"], None),
        (["udhcpc", "-i", "eth1", "-b"], "udhcpc"),
        (["udhcpc", "-ieth1"], "udhcpc"),
        (["udhcpc", "--interface=eth1"], "udhcpc"),
        (["/bin/busybox", "udhcpc", "-i", "eth1"], "udhcpc"),
        (["/bin/busybox"], None),
        (["udhcpc", "-i", "eth0"], None),
        (["udhcpc", "-b"], None),
        (["grep", "dhclient", "eth1"], None),
        ([], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_dhcp_clients(host: Host, argv: list[str], client: str | None) -> None:
    host.process(77, "whatever", *argv)
    assert host.names() == ([] if client is None else [client])


def test_udhcpc_takes_eth0_unless_told(host: Host) -> None:
    host.process(77, "udhcpc", "udhcpc", "-b")
    assert host.names("eth0", 2) == ["udhcpc"]


def test_a_dhcp_client_is_reported_once_with_its_process(host: Host) -> None:
    host.process(80, "dhcpcd", "dhcpcd: [privileged proxy] eth1 [ip4]")
    host.process(79, "dhcpcd", "dhcpcd: eth1 [ip4]")
    (manager,) = host.managers()
    assert manager.evidence == "process 79: dhcpcd: eth1 [ip4]"
    assert "`denyinterfaces eth1`" in manager.remedy


@pytest.mark.parametrize(("netns", "believed"), [(OTHER, False), (None, True)])
def test_dhcp_client_of_another_namespace(host: Host, netns: str | None, believed: bool) -> None:
    host.process(77, "dhclient", "dhclient", "eth1", netns=netns)
    found = host.managers()
    assert bool(found) is believed
    assert all("cannot be seen without CAP_SYS_PTRACE" in manager.evidence for manager in found)
