"""Programs of Debian's packages with everything they need, run from where they were unpacked.

::

    suricata = unpacked("suricata", "trixie", "suricata")
    subprocess.run(suricata.command("usr/bin/suricata", "--build-info"))
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.vm.archive import ROOT, Suite, locked, run

CACHE = ROOT / ".cache/consumers"
FETCH_TIME = 300
"""Seconds for a test that may have to fetch first: 15 where the archive is near."""


@dataclass(frozen=True)
class Tree:
    """A directory with packages and all their dependencies, the C library among them."""

    root: Path

    def command(self, program: str, *arguments: str) -> list[str]:
        """The command line that runs ``program``, a path below ``root``, with the tree's own libraries."""
        return [
            str(self._loader),
            "--library-path",
            str(self._libraries),
            str(self.root / program),
            *arguments,
        ]

    def library(self, name: str) -> str:
        """The name that a shared library of the tree is loaded by: the shortest with a version in it."""
        return min((file.name for file in self._libraries.glob(f"{name}.so.*")), key=len)

    @property
    def _loader(self) -> Path:
        [found] = self.root.glob("usr/lib*/ld-linux*.so.*")
        return found

    @property
    def _libraries(self) -> Path:
        [found] = (file.parent for file in self.root.glob("usr/lib/*/libc.so.6"))
        return found


class _Archive(Suite):
    """A suite that also knows what a package needs."""

    def needed(self, *packages: str) -> list[str]:
        """``packages`` and everything that they depend on; headers and the like only where asked for."""
        asked = ("--no-install-recommends", "--yes", "--print-uris", "-oDebug::NoLocking=1", "install")
        told = run("apt-get", *self._options, *asked, *packages).decode()
        names = re.findall(r"^'\S+' ([^_\s]+)_", told, re.MULTILINE)
        return [name for name in names if name in packages or not name.endswith("-dev")]


def unpacked(name: str, suite: str, *packages: str) -> Tree:
    """The newest of these packages in a Debian suite, fetched unless that was done before.

    Raises ``RuntimeError`` with apt's words when they cannot be had.
    """
    place = CACHE / name
    with locked(place):
        if not place.exists():
            with (
                tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{name}-") as unfinished,
                _Archive(suite) as archive,
            ):
                archive.unpack(Path(unfinished) / "tree", *archive.needed(*packages))
                (Path(unfinished) / "tree").rename(place)
    return Tree(place)
