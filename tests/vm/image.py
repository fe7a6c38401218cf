"""The root file system of the machines: Debian's packages as they are installed here, and ``.venv``.

Nothing is downloaded: what runs inside has the same versions as what runs outside. The image is kept, and
made anew when a package or ``.venv`` changes. The tree that is tested is not in it; every machine gets its
own (``pack``).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.vm.archive import CACHE, ROOT, locked, run
from tests.vm.kernels import make_disk

SIZE = 6 << 30
"""Bytes of the file system; only what is used takes room here."""
RIG = {"qemu-system-x86", "busybox-static", "zstd"}
"""What setup.sh installs for the machines themselves, and what nobody needs inside."""
OUTSIDE_ONLY = ("mypy*", "*__mypyc*", "ruff*", "pip", "pip-*", "setuptools*")
"""What of ``.venv`` stays outside."""
CONFIGURATION = ("alternatives", "ld.so.conf", "ld.so.conf.d", "localtime", "timezone")
"""What of /etc no package owns and programs look for."""
COMPILED = CACHE / "compiled"
"""BPF programs as machines compiled them, named by the digest of their sources: given to the next machine."""
COMPILED_SECONDS = 3 * 86400
"""For how long a compiled program is kept."""
NOT_THE_TREE = (".git", ".venv", ".cache", ".hypothesis", ".*_cache")


def base_image() -> Path:
    """The root disk, made if it is not there or is out of date (half a minute)."""
    packages = sorted(closure(wanted()))
    versions = run("dpkg-query", "-W", "-f", "${binary:Package} ${Version}\n", *packages)
    venv = ROOT / ".venv"
    state = hashlib.sha256(versions + Path(__file__).read_bytes() + str(ROOT).encode())
    for found in sorted((venv / "lib").glob("python*/site-packages/*.dist-info/RECORD")):
        state.update(found.read_bytes())
    image = CACHE / f"root-{state.hexdigest()[:16]}.img"
    with locked(CACHE / "root"):
        if not image.exists():
            for old in CACHE.glob("root-*.img"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=CACHE, prefix=".root-") as unfinished:
                tree = Path(unfinished) / "tree"
                tree.mkdir(mode=0o755)
                _fill(tree, packages)
                make_disk(tree, Path(unfinished) / "image", SIZE)
                (Path(unfinished) / "image").rename(image)
    return image


def pack(tree: Path, target: Path) -> None:
    """A tar of the working tree ``tree`` as it is now, to be unpacked at / of a machine.

    There it is at ``ROOT``, wherever it is here. This rig's own ``guest`` is at
    /rig, with ``COMPILED`` below it.
    """
    COMPILED.mkdir(parents=True, exist_ok=True)
    for old in COMPILED.iterdir():
        if old.stat().st_mtime < time.time() - COMPILED_SECONDS:
            old.unlink(missing_ok=True)
    exclude = [f"--exclude=./{name}" for name in NOT_THE_TREE]
    place = str(ROOT).lstrip("/")
    owner = ("--owner=0", "--group=0")
    move = (
        f"--transform=s,^\\.,{place},",
        "--transform=s,^guest,rig,",
        "--transform=s,^compiled,rig/compiled,",
    )
    rig = ("-C", Path(__file__).parent, "guest", "-C", CACHE, "compiled")
    run("tar", *exclude, *owner, *move, "-cf", target, "-C", tree, ".", *rig)


def wanted() -> list[str]:
    """What deploy/setup.sh installs for offload and its tests, by name, and what every Debian has."""
    own = run(ROOT / "deploy/setup.sh", "--dev", "--list").decode().split()
    format = "${binary:Package} ${Essential} ${Priority} ${db:Status-Status}\n"
    rows = [line.split() for line in run("dpkg-query", "-W", "-f", format).decode().splitlines()]
    base = [row[0] for row in rows if row[-1] == "installed" and ("yes" in row[1:] or "required" in row[1:])]
    return [*base, *(name for name in own if name not in RIG)]


def closure(names: Iterable[str]) -> set[str]:
    """These packages and all that they depend on, of those that are installed."""
    format = "${binary:Package}\t${Pre-Depends}, ${Depends}\t${Provides}\t${db:Status-Status}\n"
    providers: dict[str, list[str]] = {}
    depends: dict[str, list[str]] = {}
    for line in run("dpkg-query", "-W", "-f", format).decode().splitlines():
        package, needs, provides, status = line.split("\t")
        if status == "installed":
            depends[package] = list(_names(needs))
            for name in (package, package.partition(":")[0], *_names(provides)):
                providers.setdefault(name, []).append(package)
    found: set[str] = set()
    left = list(names)
    while left:
        for package in providers.get(left.pop(), ()):
            if package not in found:
                found.add(package)
                left.extend(depends[package])
    return found


def _names(relations: str) -> Iterator[str]:
    """Package names in a Depends or Provides field, without versions and architectures."""
    for relation in re.split(r"[,|]", relations):
        if name := re.match(r"\s*([a-z0-9][a-z0-9.+-]*)", relation):
            yield name[1]


def _fill(tree: Path, packages: list[str]) -> None:
    listed = run("dpkg-query", "-L", *packages).decode().splitlines()
    paths = {_without_links(Path(line)) for line in listed if line.startswith("/")}
    for source in [path for path in paths if path.suffix == ".py"]:
        paths.update(source.parent.glob(f"__pycache__/{source.stem}.*.pyc"))
    paths.update(Path("/etc", name) for name in CONFIGURATION)
    for alternative in Path("/var/lib/dpkg/alternatives").iterdir():
        link = Path(alternative.read_text().splitlines()[1])
        if link.resolve() in paths:
            paths.add(_without_links(link))
    paths.update(Path(link) for link in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"))
    there = sorted({str(path).lstrip("/") for path in paths if path.exists() or path.is_symlink()} - {""})
    names = "\0".join(there).encode()
    archive = run("tar", "-C", "/", "--null", "--no-recursion", "--files-from=-", "-cf", "-", stdin=names)
    run("tar", "-C", tree, "-xf", "-", stdin=archive)
    for name in CONFIGURATION:
        if Path("/etc", name).is_dir():
            shutil.copytree(Path("/etc", name), tree / "etc" / name, symlinks=True, dirs_exist_ok=True)
    for name in ("passwd", "group"):
        shutil.copy(f"/usr/share/base-passwd/{name}.master", tree / "etc" / name)
    # So that deploy/setup.sh, which the demo runs, finds there what it would install.
    (tree / "var/lib/dpkg/status").write_bytes(run("dpkg-query", "-s", *packages))
    (tree / "etc/hosts").write_text("127.0.0.1 localhost machine\n::1 localhost\n")
    run("ldconfig", "-r", tree)
    for directory in ("dev", "proc", "sys", "run", "tmp", "root", "usr/lib/modules"):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    venv = tree / str(ROOT).lstrip("/") / ".venv"
    shutil.copytree(ROOT / ".venv", venv, symlinks=True, ignore=shutil.ignore_patterns(*OUTSIDE_ONLY))


def _without_links(path: Path) -> Path:
    """The path with links in its directories resolved: /bin/ls is /usr/bin/ls where /bin is a link."""
    return path.parent.resolve() / path.name
