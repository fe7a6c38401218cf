"""Debian's packages, unpacked below ``.cache/vm/`` and never installed; what is made there is made once."""

from __future__ import annotations

import fcntl
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/vm"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Debian's own keys: apt takes no suite that is not signed with one of them."""


class Suite:
    """One Debian suite, from the mirror that the machine's own Debian comes from.

    A context manager: what apt keeps of the suite is gone at the end. Its methods raise ``RuntimeError``
    with apt's words when the suite or a package cannot be had.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        CACHE.mkdir(parents=True, exist_ok=True)
        self._directory = tempfile.TemporaryDirectory(dir=CACHE, prefix=".apt-")

    def names(self, prefix: str) -> list[str]:
        """The packages whose names begin so."""
        return run("apt-cache", *self._options, "pkgnames", prefix).decode().split()

    def unpack(self, tree: Path, *packages: str) -> None:
        """The newest of each of these packages into the directory ``tree``, which is made."""
        tree.mkdir(parents=True, exist_ok=True)
        place = Path(self._directory.name)
        run("apt-get", *self._options, "download", *packages, cwd=place)
        for package in place.glob("*.deb"):
            run("dpkg-deb", "--extract", package, tree)
            package.unlink()

    def __enter__(self) -> Self:
        try:
            self._options = _private_apt(self._name, Path(self._directory.name) / "apt")
            run("apt-get", *self._options, "--error-on=any", "update")
        except BaseException:
            self._directory.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.cleanup()


def _private_apt(suite: str, place: Path) -> list[str]:
    """Options that show apt this suite alone, from the mirror that the machine's own Debian comes from."""
    wanted = ("indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Identifier: Packages")
    configured = [line.split() for line in run("apt-get", *wanted).decode().splitlines()]
    own = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    mirrors = [
        uri for uri, codename, component in configured if own and (codename, component) == (own[1], "main")
    ]
    if not mirrors:
        raise RuntimeError("apt has no source for this machine's own Debian release")
    (place / "lists/partial").mkdir(parents=True)
    (place / "cache/archives/partial").mkdir(parents=True)
    (place / "suite.sources").write_text(
        f"Types: deb\nURIs: {mirrors[0]}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYS}\n"
    )
    options = {
        "Dir::Etc::SourceList": place / "suite.sources",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": place / "lists",
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": place / "cache",
        "APT::Sandbox::User": "root",
    }
    return ["-q", *(f"-o{key}={value}" for key, value in options.items())]


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the right to make ``place``; another process that wants it waits."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(*argv: str | Path, cwd: Path | None = None, stdin: bytes | None = None) -> bytes:
    """Run a command to its end; RuntimeError with its words when it fails."""
    done = subprocess.run(argv, capture_output=True, check=False, cwd=cwd, input=stdin)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit {done.returncode}: {said}")
    return done.stdout
