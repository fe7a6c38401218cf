"""A machine that QEMU emulates, with a kernel of ``kernels.py``; commands run inside it as root.

Example::

    with Machine(KERNELS["6.1"]) as machine:
        assert machine.run("uname", "-r").stdout.startswith("6.1.")

There is no network to the outside. Whatever is written inside is gone with the machine.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.vm.archive import ROOT
from tests.vm.emulator import emulator
from tests.vm.image import COMPILED, base_image, pack
from tests.vm.kernels import Kernel, boot_files
from tests.vm.nics import Nic, wired
from tests.vm.wires import TapWire

CPUS = 2
MEMORY = 2800
"""MiB of a machine. QEMU itself takes some 300 MiB more.

From 2,816 on, QEMU's q35 has memory above 4 GiB and puts 64-bit BARs far above that, and then virtual
functions of the emulated 82576 do not answer their driver.
"""
BOOT_SECONDS = 180
"""An emulated machine that has two CPUs for itself takes ten."""
TSC_KHZ = 12_000_000
"""What the kernel is told of its time stamp counter.

QEMU passes the host's counter through, at 2 to 4 GHz, so that a second inside lasts 3 to 6 outside: about
as much as emulation slows the work. So every deadline, of the tests and of the product, means inside what
it means outside.
"""


@dataclass(frozen=True)
class Result:
    """How a command ended: negative is a signal's number, 127 that there is no such command."""

    exit_code: int
    stdout: str
    stderr: str


class MachineError(Exception):
    """The machine did not start, stopped, or did not answer in time. The message ends with its console."""


class NoAnswerError(MachineError):
    """It did not answer in time."""


class Machine:
    """A context manager: booted when entered, ended when left.

    ``tree`` is the working tree that is tested (``ROOT`` inside, wherever it is outside). ``log`` is a file
    that gets the console; without it the console is seen in errors only. Of each of ``nics`` there are two,
    joined by a wire.
    """

    def __init__(
        self, kernel: Kernel, tree: Path = ROOT, log: Path | None = None, nics: Iterable[Nic] = ()
    ) -> None:
        self.kernel = kernel
        self._nics = tuple(nics)
        self._tree = tree
        self._directory = Path(tempfile.mkdtemp(prefix="offload-vm-"))
        self._console = log or self._directory / "console"
        self._console.parent.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._unread = b""
        self._wires = contextlib.ExitStack()

    def start(self) -> Self:
        """Boot it. An emulator that aborts, or whose kernel does not come up, is started again.

        QEMU's CPUs run side by side while the booting kernel moves devices in memory; now and then one of
        them looks up a place that is not there any more: an assertion of ``iotlb_to_section`` in its
        ``system/physmem.c``. And on a busy machine now and then an emulated CPU sleeps on ("rcu_preempt
        detected stalls").
        """
        for last in (False, False, True):
            try:
                self._boot()
                break
            except NoAnswerError:
                if last:
                    raise
                self._end()
            except MachineError:
                if last or self._exit_code() != -signal.SIGABRT:
                    raise
        return self

    def _exit_code(self) -> int | None:
        """Of QEMU: negative is a signal's number; ``None`` while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process:
                return self._process.wait(5)
        return None

    def _boot(self) -> None:
        boot = boot_files(self.kernel)
        root = base_image()
        tree = self._directory / "tree.tar"
        pack(self._tree, tree)
        self._wires.close()
        taps = {
            nic.name: self._wires.enter_context(TapWire(nic.pairs)).fds for nic in self._nics if nic.pairs > 1
        }
        if self._socket is not None:
            self._socket.close()
        self._socket, theirs = socket.socketpair()
        self._unread = b""
        command = [
            *("setpriv", "--pdeathsig", "KILL", "--", *emulator()),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"),
            *("-smp", str(CPUS), "-m", str(MEMORY)),
            *("-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)),
            "-append",
            " ".join(
                (
                    *("console=ttyS0", "loglevel=5", "panic=-1", "mitigations=off", f"offload.tree={ROOT}"),
                    *("hpet=disable", "clocksource=tsc", "tsc=reliable", f"tsc_early_khz={TSC_KHZ}"),
                )
            ),
            *("-serial", f"file:{self._console}"),
            *_disk(root, "snapshot=on,cache=unsafe"),
            *_disk(boot.modules, "readonly=on"),
            *_disk(tree, "readonly=on"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=offload"),
            *("-chardev", f"socket,id=agent,fd={theirs.fileno()}"),
            *(option for nic in self._nics for option in wired(nic, taps.get(nic.name, ()))),
        ]
        with theirs, (self._directory / "qemu").open("wb") as said:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[theirs.fileno(), *(fd for ends in taps.values() for end in ends for fd in end)],
                env=os.environ | {"TMPDIR": str(self._directory)},
            )
        self.run("true", timeout=BOOT_SECONDS)

    def run(
        self,
        *argv: str,
        timeout: float = 600,
        env: Mapping[str, str] | None = None,
        show: Callable[[str, bytes], object] = lambda stream, data: None,
    ) -> Result:
        """Run a command in ``ROOT`` inside, to its end.

        ``timeout`` is in seconds outside. ``show`` gets "stdout" or "stderr" and what was written there,
        as it comes. Raises ``MachineError`` when the machine itself fails or the time is over.
        """
        assert self._socket is not None, "the machine is not started"
        request = {"argv": argv, "env": dict(env or {})}
        with contextlib.suppress(BrokenPipeError):  # what follows says that it has stopped
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        end = time.monotonic() + timeout
        said = {"stdout": b"", "stderr": b""}
        while "exit" not in (message := self._message(end)):
            for stream, text in message.items():
                data = base64.b64decode(text)
                said[stream] += data
                show(stream, data)
        out, err = (said[stream].decode(errors="replace") for stream in ("stdout", "stderr"))
        return Result(message["exit"], out, err)

    def _message(self, end: float) -> dict[str, Any]:
        assert self._socket is not None
        while b"\n" not in self._unread:
            self._socket.settimeout(max(0.01, end - time.monotonic()))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise NoAnswerError(f"{self}: no answer in time\n{self.console()}") from None
            except ConnectionResetError:
                data = b""
            if not data:
                raise MachineError(f"{self} has stopped, QEMU with {self._exit_code()}\n{self.console()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def keep_compiled(self) -> None:
        """Bring the BPF programs that were compiled inside out to ``COMPILED``, for the next machine."""
        there = set(self.run("ls", "/rig/compiled").stdout.split())
        for name in there - {file.name for file in COMPILED.iterdir()}:
            unfinished = self._directory / name
            unfinished.write_text(self.run("cat", f"/rig/compiled/{name}").stdout)
            shutil.move(unfinished, COMPILED / name)

    def console(self) -> str:
        """The end of what the kernel said, and what QEMU did."""
        said = ""
        for file in (self._directory / "qemu", self._console):
            if file.exists():
                said += file.read_bytes().decode(errors="replace")[-6000:]
        return said

    def kill(self) -> None:
        """End it at once, from any thread; a ``run`` that waits raises. Files are left to ``close``."""
        if self._process is not None:
            self._process.kill()

    def _end(self) -> None:
        self.kill()
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """End it and remove its files. Idempotent."""
        self._end()
        if self._socket is not None:
            self._socket.close()
        self._wires.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __str__(self) -> str:
        return f"machine with Linux {self.kernel.name}"

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _disk(file: Path, options: str) -> list[str]:
    return ["-drive", f"file={file},format=raw,if=virtio,{options}"]
