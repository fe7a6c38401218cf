"""Open vSwitch with AF_XDP ports, as Debian builds it: installed, or unpacked as ``tests.consumers`` does.

Its datapath is a thread in user space that has CPU 1 and never sleeps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.bench.contest import Unavailable
from tests.bench.frames import OTHER_CPU
from tests.consumers.packages import Tree, unpacked
from tests.lab import Namespace, wait_until

NAME = "Open vSwitch, AF_XDP ports"
_START_TIME = 30.0
_PLACES = {
    "ovs-vswitchd": "usr/lib/openvswitch-switch",
    "ovsdb-server": "usr/sbin",
    "ovsdb-tool": "usr/bin",
    "ovs-vsctl": "usr/bin",
    "ovs-ofctl": "usr/bin",
}
_SCHEMA = "usr/share/openvswitch/vswitch.ovsschema"
_PORT = "type=afxdp options:xdp-mode=native options:n_rxq=1"


class Switch:
    """A bridge ``br0`` of Open vSwitch between devices of ``host``. Raises ``Unavailable`` with the reason.

    ``pid`` is of the process that forwards. ``held`` ends it, and its database with it.
    """

    def __init__(self, held: ExitStack, host: Namespace, *devices: str) -> None:
        self._host = host
        self._tree = None if shutil.which("ovs-vswitchd") else _fetched()
        self._directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="offload-ovs-")))
        kinds = ("RUN", "LOG", "DB", "SYSCONF")
        self._environment = os.environ | {f"OVS_{kind}DIR": str(self._directory) for kind in kinds}
        if self._tree:
            [programs] = self._tree.root.glob("usr/lib/*/bpf")
            self._environment["LIBXDP_OBJECT_PATH"] = str(programs)
        database, remote = self._directory / "conf.db", f"unix:{self._directory / 'db.sock'}"
        schema = (self._tree.root if self._tree else Path("/")) / _SCHEMA
        self._run("ovsdb-tool", "create", str(database), str(schema))
        self._start(held, "ovsdb-server", str(database), f"--remote=p{remote}")
        wait_until(lambda: (self._directory / "db.sock").exists(), "the database answers", _START_TIME)
        self._configure("--no-wait", "init")
        self._configure(
            "--no-wait", "set", "Open_vSwitch", ".", f"other_config:pmd-cpu-mask={1 << OTHER_CPU}"
        )
        self.pid = self._start(held, "ovs-vswitchd", remote)
        bridge = ("add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev", "fail_mode=secure")
        self._configure(*bridge)
        for number, device in enumerate(devices, 1):
            port = ("add-port", "br0", device, "--", "set", "interface", device, f"ofport_request={number}")
            self._configure(*port, *_PORT.split())
            if error := self._configure("get", "interface", device, "error").strip(' \n"[]'):
                raise Unavailable(f"{device}: {error}")

    def forward(self, mac: str, port: int) -> None:
        """Frames for ``mac`` go to the device of that number, from 1 in the order given."""
        self._run("ovs-ofctl", "add-flow", "br0", f"dl_dst={mac},actions=output:{port}")

    def _configure(self, *words: str) -> str:
        return self._run("ovs-vsctl", "--timeout=20", f"--db=unix:{self._directory / 'db.sock'}", *words)

    def _command(self, program: str, *words: str) -> list[str]:
        if self._tree is None:
            return self._host.argv(program, *words)
        return self._host.argv(*self._tree.command(f"{_PLACES[program]}/{program}", *words))

    def _run(self, program: str, *words: str) -> str:
        command = self._command(program, *words)
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{program}: {done.stderr.strip()}")
        return done.stdout

    def _start(self, held: ExitStack, program: str, *words: str) -> int:
        """Its process id. It does not outlive this one."""
        within = ["setpriv", "--pdeathsig", "KILL", "--"]
        log = held.enter_context((self._directory / f"{program}.out").open("w"))
        command: Sequence[str] = [*within, *self._command(program, *words)]
        process = held.enter_context(subprocess.Popen(command, env=self._environment, stdout=log, stderr=log))
        held.callback(process.kill)  # it may be stopped
        return process.pid


def _fetched() -> Tree:
    try:
        return unpacked("openvswitch", "trixie", "openvswitch-switch")
    except (RuntimeError, OSError) as error:
        raise Unavailable(f"it is not installed, and cannot be fetched: {error}") from error
