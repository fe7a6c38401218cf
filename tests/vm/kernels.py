"""The kernels that can be booted, and where they come from.

A new kernel is one line of ``KERNELS``. Debian's packages are unpacked under ``.cache/vm/``, never installed.
"""

from __future__ import annotations

import lzma
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.vm.archive import CACHE, Suite, locked, run

BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""What a kernel needs before it can read its disks."""


@dataclass(frozen=True)
class Kernel:
    """``name`` is the beginning of its version; ``suite`` the Debian suite that has it."""

    name: str
    suite: str


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("6.1", "bookworm"),
        Kernel("6.12", "bookworm-backports"),
        Kernel("7.2", "sid"),
    )
}


@dataclass(frozen=True)
class Boot:
    """Files to boot a kernel from: its image, an initramfs that finds the disks, a disk with its modules."""

    version: str
    kernel: Path
    initramfs: Path
    modules: Path


def boot_files(kernel: Kernel) -> Boot:
    """Fetch and prepare a kernel, unless that was done before.

    Raises ``RuntimeError`` when no package source leads to the suite, or the suite has no such kernel.
    """
    place = CACHE / "kernels" / kernel.name
    with locked(place):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{kernel.name}-") as unfinished:
                _prepare(kernel, Path(unfinished) / "boot")
                (Path(unfinished) / "boot").rename(place)
    version = (place / "version").read_text()
    init = _initramfs(place)
    return Boot(version, place / "vmlinuz", init, place / "modules.img")


def _prepare(kernel: Kernel, place: Path) -> None:
    tree = place / "tree"
    with Suite(kernel.suite) as suite:
        suite.unpack(tree, *_packages(kernel, suite))
    [modules] = [found.parent for found in tree.glob("**/lib/modules/*/kernel")]
    version = modules.name
    [image] = [*tree.glob(f"boot/vmlinuz-{version}"), *modules.glob("vmlinuz")]
    image.rename(place / "vmlinuz")
    (place / "version").write_text(version)
    base = modules.parents[2]
    run("depmod", "-b", base, version)
    _boot_modules(base, version, place / "boot-modules")
    disk = place / "modules.img"
    make_disk(modules.parent, disk, 1 << 30)
    shutil.rmtree(tree)


def make_disk(tree: Path, disk: Path, size: int) -> None:
    """An ext4 file system of ``size`` bytes (holes are not written) with the files of ``tree``."""
    with disk.open("wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d", tree, disk)


def _packages(kernel: Kernel, suite: Suite) -> list[str]:
    """The packages of the newest such kernel in the suite."""
    version = rf"{re.escape(kernel.name)}\.\d+(?:-\d+|\+deb\d+)-amd64"
    found = [
        match
        for name in suite.names("linux-")
        if (match := re.fullmatch(rf"linux-(image|base|binary|modules)-({version})", name))
    ]
    if not found:
        raise RuntimeError(f"Debian {kernel.suite} has no kernel {kernel.name} (any more): see {__file__}")
    newest = max(
        (match[2] for match in found), key=lambda text: [int(part) for part in re.findall(r"\d+", text)]
    )
    return [match[0] for match in found if match[2] == newest]


def _boot_modules(base: Path, version: str, target: Path) -> None:
    """Copy ``BOOT_MODULES`` and what they need, uncompressed and numbered in the order of loading."""
    target.mkdir()
    order: dict[Path, None] = {}
    for name in BOOT_MODULES:
        for line in run("modprobe", "-d", base, "-S", version, "--show-depends", name).decode().splitlines():
            if line.startswith("insmod "):
                order[Path(line.split()[1])] = None
    for number, module in enumerate(order):
        name = f"{number:02}-{module.name.partition('.')[0]}.ko"
        match module.suffix:
            case ".ko":
                data = module.read_bytes()
            case ".xz":
                data = lzma.decompress(module.read_bytes())
            case _:
                data = run("zstd", "-dcq", module)
        (target / name).write_bytes(data)


def _initramfs(place: Path) -> Path:
    """busybox, the modules above and ``guest/initramfs``; made anew for each start, for that is quick."""
    tree = place / "initramfs"
    with locked(tree):
        shutil.rmtree(tree, ignore_errors=True)
        for directory in ("bin", "dev", "proc", "root"):
            (tree / directory).mkdir(parents=True)
        shutil.copy("/bin/busybox", tree / "bin")
        shutil.copytree(place / "boot-modules", tree / "modules")
        shutil.copy(Path(__file__).with_name("guest") / "initramfs", tree / "init")
        files = "\n".join(str(file.relative_to(tree)) for file in sorted(tree.rglob("*"))) + "\n"
        archive = run("busybox", "cpio", "-o", "-H", "newc", cwd=tree, stdin=files.encode())
        (place / "initramfs.new").write_bytes(archive)
        (place / "initramfs.new").rename(place / "initramfs.cpio")
        shutil.rmtree(tree)
    return place / "initramfs.cpio"
