"""A real daemon for tests: ``offload run`` in a namespace, with directories of its own.

Compiled programs are shared between instances of one test run, so that only the first one compiles.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload.client import Client
from offload.kernel.bpf import Map, possible_cpus
from offload.kernel.dataplane import Dataplane
from offload.paths import Paths
from tests.lab import Lab, Namespace, Vm, wait_until

BPFFS = Path("/sys/fs/bpf")


@cache
def shared_cache() -> Path:
    """Where compiled programs are kept: in OFFLOAD_COMPILED if that is set, else for the test run."""
    if kept := os.environ.get("OFFLOAD_COMPILED"):
        return Path(kept)
    directory = Path(tempfile.mkdtemp(prefix="offload-cache-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def config_of(nic: str, vms: Mapping[str, str], **port: object) -> dict[str, Any]:
    """A config with one external switch ``ext0`` on ``nic`` and a port per VM: device name to MAC.

    ``port`` holds further keys that every port gets. No metrics are served.
    """
    return {
        "version": 1,
        "metrics": None,
        "nics": {nic: {}},
        "switches": {"ext0": {"type": "external", "uplink": nic}},
        "ports": {
            device: {"switch": "ext0", "device": device, "mac": mac, **port} for device, mac in vms.items()
        },
    }


class Instance:
    """A context manager; on leaving, the daemon is ended and everything of its is taken out.

    ``paths`` are the instance's directories. Configs are dicts, written as JSON, which is YAML.
    """

    def __init__(self, host: Namespace, config: Mapping[str, Any]) -> None:
        self.host = host
        self.directory = Path(tempfile.mkdtemp(prefix="offload-test-"))
        self.paths = Paths(self.directory / "run", self.directory / "state", BPFFS / self.directory.name)
        self.paths.state_dir.mkdir()
        self.paths.cache.symlink_to(shared_cache())
        self.file = self.write(config)
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, config: Mapping[str, Any], name: str = "config.yaml") -> Path:
        """Write a config file beside the others; returns its path."""
        file = self.directory / name
        file.write_text(json.dumps(config))
        return file

    @property
    def options(self) -> list[str]:
        paths = self.paths
        return [
            *("--run-dir", str(paths.run_dir)),
            *("--state-dir", str(paths.state_dir)),
            *("--pin-dir", str(paths.pin_dir)),
        ]

    def start(self, *, ready: bool = True, speaking: Iterable[Vm] = ()) -> Self:
        """Start the daemon; with ``ready`` wait until it answers, then let ``speaking`` be heard."""
        command = [sys.executable, "-m", "offload", "run", "--config", str(self.file), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*self.host.argv(), *command], stdout=log, stderr=log)
        if ready:
            process = self.process
            wait_until(lambda: self.ready() or process.poll() is not None, "the daemon answers", 60)
            assert process.poll() is None, self.log.read_text()
            self.hear(*speaking)
        return self

    def hear(self, *vms: Vm) -> None:
        """Let VMs speak on their ports, and wait till all that follows from it is done.

        What has not been heard yet has no filter. Also a device that was made anew must speak again.
        """
        for vm in vms:
            vm.announce()
        self.wait_heard(*(vm.mac for vm in vms))

    def wait_heard(self, *macs: str) -> None:
        """Wait till these addresses were heard from their ports, and nothing is left to do for ``file``."""

        def done() -> bool:
            with Client(self.paths.socket) as client:
                stations = [station for port in client.ports() for station in port.stations]
                here = {station.mac for station in stations if station.state == "here"}
                left = client.apply(self.file.read_text(), str(self.file), dry_run=True).changes
            return here.issuperset(macs) and not left

        if macs:
            wait_until(done, f"{', '.join(macs)} are heard", 30)

    def ready(self) -> bool:
        """Whether somebody answers. The socket is there before that, and after a daemon was killed."""
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(1)
            client.connect(str(self.paths.socket))
            client.sendall(b"GET /openapi.json HTTP/1.0\r\n\r\n")
            return bool(client.recv(1))
        return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon; what it set up stays. Returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(20)
        self.process = None
        return code

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``offload ARGUMENTS`` of this instance in the host's namespace."""
        command = [*self.host.argv(), sys.executable, "-m", "offload", *arguments, *self.options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert not check or result.returncode == 0, f"{arguments}: {result.stderr}"
        return result

    def json(self, *arguments: str) -> Any:
        """The document that ``offload ARGUMENTS --json`` prints."""
        return json.loads(self.cli(*arguments, "--json").stdout)

    def port(self, name: str) -> dict[str, Any]:
        """One entry of what ``offload ports --json`` prints, asked for without starting a process."""
        with Client(self.paths.socket) as client:
            return next(view for view in client.ports() if view.name == name).model_dump(mode="json")

    def wait_port(self, name: str, timeout: float = 10, **fields: object) -> dict[str, Any]:
        """Wait until a port shows these values; returns it."""

        def shown() -> bool:
            with Client(self.paths.socket) as client:
                port = next(port for port in client.ports() if port.name == name)
            return all(getattr(port, key) == value for key, value in fields.items())

        wait_until(shown, f"port {name} shows {fields}", timeout)
        return self.port(name)

    def per_cpu(self, name: str) -> list[dict[str, Any]]:
        """A port's row of ``port_counters`` on every CPU, as the programs wrote it (``bpf/abi.h``)."""

        def read() -> list[dict[str, Any]]:
            with (
                Dataplane(self.paths.objects, self.paths.cache, keep=False) as plane,
                Map.pinned(self.paths.objects / "maps" / "port_counters") as counters,
            ):
                row = next(number for number, record in plane.ports().items() if record.name == name)
                layout = plane.layouts["port_counters"]
                raw = counters.lookup(row.to_bytes(4, sys.byteorder), layout.size * possible_cpus())
            assert raw is not None
            return [layout.read(raw[at : at + layout.size]) for at in range(0, len(raw), layout.size)]

        return self.host.call(read)

    def rss(self) -> int:
        """Resident memory of the daemon in bytes."""
        assert self.process is not None
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.stop()
        if self.paths.pin_dir.exists():
            self.cli("detach", "--all", check=False)
        shutil.rmtree(self.paths.pin_dir, ignore_errors=True)
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.log.exists():
            sys.stderr.write(self.log.read_text()[-8000:])
        self.close()


def vms_of(lab: Lab, count: int) -> dict[str, Vm]:
    """``count`` VMs with MACs 02:15:5d:00:00:01 … and addresses 192.0.2.11 …, by device name ``web1`` …."""
    return {
        f"web{number}": lab.vm(f"web{number}", f"02:15:5d:00:00:{number:02x}", f"192.0.2.{10 + number}/24")
        for number in range(1, count + 1)
    }
