"""A distribution's kernel in QEMU on a tap: DHCP from the wire, TCP both ways, and a second guest.

What the guests' virtio-net can do (checksums, segmentation) is on, as QEMU gives it. Needs root and QEMU.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.guest.guest import COMMAND_TIME, Guest, Image
from tests.instance import Instance, config_of
from tests.lab import Lab, Namespace

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]

MACS = {"web1": "02:15:5d:00:00:01", "web2": "02:15:5d:00:00:02"}
WIRE_ADDRESS = "192.0.2.1"
FIRST_ADDRESS = "192.0.2.11"
SECOND_ADDRESS = "192.0.2.2"
BULK = 8 << 20
"""Bytes of a transfer."""
HANDED_OUT = [f"192.0.2.{number}" for number in range(100, 110)]
"""What the real server on the wire gives out."""
UDHCPD = (
    *("start 192.0.2.200", "end 192.0.2.209", "opt subnet 255.255.255.0"),
    *("interface eth0", "lease_file /run/leases"),
)
"""The second guest's server: its configuration, by lines."""


@dataclass(frozen=True)
class Site:
    """A guest behind ``web1``, the daemon, and the config that it runs with."""

    lab: Lab
    instance: Instance
    guest: Guest
    config: dict[str, Any]

    def apply(self, port: str, **changes: object) -> None:
        """Give the daemon the config with these changes to a port; without any, as it was."""
        ports = self.config["ports"]
        changed = {**self.config, "ports": {**ports, port: {**ports[port], **changes}}}
        self.instance.cli("apply", str(self.instance.write(changed, "changed.yaml")))

    def dropped(self, port: str) -> Counter[str]:
        """Frames of a port that were dropped so far, by reason."""
        return Counter(self.instance.port(port)["counters"]["drops"])

    def carried(self, port: str) -> Counter[str]:
        """Bytes that a port got and sent so far, by direction and path."""
        counters = self.instance.port(port)["counters"]
        return Counter(
            {f"{way} {path}": tally["bytes"] for way in ("rx", "tx") for path, tally in counters[way].items()}
        )


@pytest.fixture(scope="module")
def site(image: Image) -> Iterator[Site]:
    """See ``Site``. Scope: this file."""
    with Lab() as lab:
        lab.wire.ip(f"address add {WIRE_ADDRESS}/24 dev {lab.wire_end}")
        config = config_of(lab.nic, MACS)
        with (
            Instance(lab.host, config).start() as instance,
            Guest(lab.host, "web1", MACS["web1"], image) as guest,
        ):
            instance.wait_port("web1", state="active")
            yield Site(lab, instance, guest, config)


@pytest.fixture
def as_configured(site: Site) -> Iterator[Site]:
    """The site, whose config is as it was when the test is over. Scope: one test."""
    yield site
    site.apply("web1")


@pytest.fixture(scope="module")
def second(site: Site, image: Image) -> Iterator[Guest]:
    """A guest behind ``web2`` with an address of its own choice. Scope: this file."""
    with Guest(site.lab.host, "web2", MACS["web2"], image) as guest:
        site.instance.wait_port("web2", state="active")
        guest.run(f"ip address add {SECOND_ADDRESS}/24 dev eth0 && ip link set eth0 up")
        yield guest


@contextlib.contextmanager
def dhcp_server(ns: Namespace, device: str) -> Iterator[None]:
    """The distribution's dnsmasq."""
    options = (
        *("conf-file=/dev/null", "pid-file=", "log-facility=-", "leasefile-ro", "port=0", "no-ping"),
        *(f"interface={device}", "bind-interfaces", f"dhcp-range={HANDED_OUT[0]},{HANDED_OUT[-1]}"),
    )
    command = ns.argv("dnsmasq", "--keep-in-foreground", *(f"--{option}" for option in options))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            for line in server.stderr:  # until it serves
                if "started" in line:
                    break
            yield
        finally:
            server.terminate()


def lease(guest: Guest, *options: str) -> tuple[str, str] | None:
    """Ask for an address anew: the address and its server's, or None without an answer in 3 seconds."""
    asked = f"rm -f /lease; udhcpc -i eth0 -n -q -t 3 -T 1 -s /etc/udhcpc {' '.join(options)}"
    guest.run(asked, check=False)
    address, _, server = guest.run("cat /lease", check=False).partition(" from ")
    return (address, server) if server else None


@contextlib.contextmanager
def web_server(ns: Namespace, address: str, content: bytes) -> Iterator[None]:
    """Whatever is asked of port 80 at ``address``, ``content`` is the answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ns.call(lambda: http.server.ThreadingHTTPServer((address, 80), Handler))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


def fetch(ns: Namespace, address: str) -> bytes:
    """The file ``data`` of the web server at ``address``."""
    connection = http.client.HTTPConnection(address, timeout=COMMAND_TIME)
    ns.call(connection.connect)
    connection.request("GET", "/data")
    content = connection.getresponse().read()
    connection.close()
    return content


def offer_data(guest: Guest) -> str:
    """Let a guest serve random bytes as ``data``; returns their SHA-256."""
    guest.run(f"test -f /www/data || dd if=/dev/urandom of=/www/data bs=65536 count={BULK >> 16}")
    guest.run("pidof httpd || httpd -h /www")
    return guest.run("sha256sum </www/data").split()[0]


def test_an_address_by_dhcp_from_the_wire(site: Site) -> None:
    with dhcp_server(site.lab.wire, site.lab.wire_end):
        leased = lease(site.guest)
    assert leased
    address, server = leased
    assert server == WIRE_ADDRESS
    assert address in HANDED_OUT
    site.lab.wire.run("ping", "-c", "3", "-i", "0.2", "-W", "5", address)


@pytest.mark.parametrize(
    ("queue", "paths"),
    [("auto", {"rx queue", "tx direct"}), ("off", {"rx bridge", "tx bridge"})],
    ids=["auto", "off"],
)
def test_tcp_both_ways(as_configured: Site, queue: str, paths: set[str]) -> None:
    """Each side connects to the other once and gets a file, over the port's paths and no others."""
    site, wire = as_configured, as_configured.lab.wire
    site.apply("web1", queue=queue)
    site.guest.run(f"ip address replace {FIRST_ADDRESS}/24 dev eth0; ip link set eth0 up")
    wire.run("ping", "-c", "1", "-W", "5", FIRST_ADDRESS)
    site.instance.wait_port("web1", path="queue" if queue == "auto" else "bridge")
    wanted, content = offer_data(site.guest), os.urandom(BULK)
    before = site.carried("web1")
    assert hashlib.sha256(fetch(wire, FIRST_ADDRESS)).hexdigest() == wanted
    with web_server(wire, WIRE_ADDRESS, content):
        got = site.guest.run(f"wget -q -O - http://{WIRE_ADDRESS}/data | sha256sum").split()[0]
    assert got == hashlib.sha256(content).hexdigest()
    assert used(site.carried("web1") - before) == paths


def test_tcp_between_two_guests(site: Site, second: Guest) -> None:
    """Checksums are partial and segments large all the way, as virtio-net made them."""
    site.guest.run(f"ip address replace {FIRST_ADDRESS}/24 dev eth0; ip link set eth0 up")
    site.guest.run(f"ping -c 1 {SECOND_ADDRESS}")
    before = site.carried("web1")
    for server, address, client in (
        (site.guest, FIRST_ADDRESS, second),
        (second, SECOND_ADDRESS, site.guest),
    ):
        wanted = offer_data(server)
        assert client.run(f"wget -q -O - http://{address}/data | sha256sum").split()[0] == wanted
    assert used(site.carried("web1") - before) == {"rx local", "tx local"}


def used(carried: Counter[str]) -> set[str]:
    """The paths of a transfer: those that carried more than ARP and the like."""
    assert carried.total() > 2 * BULK
    return {path for path, number in carried.items() if number > BULK // 100}


@pytest.fixture
def rogue(second: Guest) -> Iterator[Guest]:
    """The second guest runs a DHCP server. Scope: one test."""
    lines = "".join(f"{line}\\n" for line in UDHCPD)
    second.run(f"printf '{lines}' >/etc/udhcpd.conf; touch /run/leases")
    second.run("udhcpd -f -a 1 /etc/udhcpd.conf >/run/udhcpd 2>&1 & echo $! >/run/pid")
    second.run("until grep -q started /run/udhcpd; do sleep 0.1; done")
    yield second
    second.run("kill $(cat /run/pid)")


@pytest.mark.parametrize("broadcast", [False, True], ids=["unicast", "broadcast"])
def test_a_guest_that_runs_a_dhcp_server(as_configured: Site, rogue: Guest, broadcast: bool) -> None:
    """Its answers are dropped and counted; the real server's arrive. Then it is allowed to, live."""
    site, options = as_configured, ["-B"] if broadcast else []
    with dhcp_server(site.lab.wire, site.lab.wire_end):
        for _ in range(3):
            leased = lease(site.guest, *options)
            assert leased
            assert leased[1] == WIRE_ADDRESS
    dropped = site.dropped("web2")["guard_dhcp"]
    assert dropped > 0
    assert lease(site.guest, *options) is None  # the wire's server has gone
    assert site.dropped("web2")["guard_dhcp"] > dropped

    site.apply("web2", allow={"dhcp_server": True})
    dropped = site.dropped("web2")["guard_dhcp"]
    leased = lease(site.guest, *options)
    assert leased
    assert leased[1] == SECOND_ADDRESS
    assert site.dropped("web2")["guard_dhcp"] == dropped

    site.apply("web2")
    assert lease(site.guest, *options) is None
    assert site.dropped("web2")["guard_dhcp"] > dropped
