"""The QEMU that emulates the machines: newer than Debian 12's own, which has no igb."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.vm.archive import CACHE, Suite, locked, run

SUITE = "bookworm-backports"
PACKAGES = ("qemu-system-x86", "qemu-system-data", "seabios")
"""The program and what it boots with. Its libraries are those of Debian 12's own QEMU, which deploy/setup.sh
installs.
"""


def emulator() -> list[str | Path]:
    """The beginning of QEMU's command line. QEMU is fetched unless that was done before (some seconds).

    Raises ``RuntimeError`` when it cannot be had or does not start.
    """
    place = CACHE / "qemu"
    with locked(place):
        if not place.exists():
            try:
                with (
                    tempfile.TemporaryDirectory(dir=CACHE, prefix=".qemu-") as unfinished,
                    Suite(SUITE) as suite,
                ):
                    tree = Path(unfinished) / "tree"
                    suite.unpack(tree, *PACKAGES)
                    run(*_command(tree), "--version")
                    tree.rename(place)
            except RuntimeError as error:
                raise RuntimeError(f"no emulator from Debian {SUITE}: {error}") from error
    return _command(place)


def _command(tree: Path) -> list[str | Path]:
    share = tree / "usr/share"
    return [tree / "usr/bin/qemu-system-x86_64", "-L", share / "qemu", "-L", share / "seabios"]
