"""A guest's root file system: busybox, the modules of virtio-net and a shell that the test talks to.

The archive is a cpio in "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst of the
kernel), written here because it takes no more than a header per file.
"""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

MODULES = ("virtio_pci", "virtio_net")
COMMANDS_ON = "ttyS1"
"""The serial line where the guest takes commands; the kernel's own messages are on ttyS0."""

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in {modules}; do insmod /modules/$module.ko; done
ip link set lo up
stty -F /dev/{line} raw -echo
exec </dev/{line} >/dev/{line} 2>&1
echo; echo "--- 0"
while read -r command; do
    (eval "$command") </dev/null
    echo; echo "--- $?"
done
"""

_UDHCPC = """#!/bin/sh
case $1 in
deconfig)
    ip address flush dev "$interface"
    ip link set "$interface" up
    ;;
bound | renew)
    ip address add "$ip/$mask" dev "$interface"
    echo "$ip from $serverid" >/lease
    ;;
esac
"""


def initramfs(version: str, disk: Path, busybox: Path = Path("/bin/busybox")) -> bytes:
    """The archive for the kernel of this version, whose modules are on ``disk``, an ext4 file system.

    ``busybox`` must be linked statically.
    """
    drivers = _drivers(version, disk)
    archive = _Archive()
    for directory in ("bin", "dev", "etc", "modules", "proc", "run", "sys", "www"):
        archive.add(directory, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    archive.add("etc/udhcpc", stat.S_IFREG | 0o755, _UDHCPC.encode())
    for name, content in drivers.items():
        archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, content)
    init = _INIT.format(modules=" ".join(drivers), line=COMMANDS_ON)
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    return archive.close()


def _drivers(version: str, disk: Path) -> dict[str, bytes]:
    """Names and contents of ``MODULES`` and what they need, in the order in which they load."""
    lines = _read(disk, f"{version}/modules.dep").decode().splitlines()
    needs = {path: after.split() for path, _, after in (line.partition(":") for line in lines)}
    order: dict[str, None] = {}
    for path in needs:
        if Path(path).stem in MODULES:
            order |= dict.fromkeys([*reversed(needs[path]), path])
    return {Path(path).stem: _read(disk, f"{version}/{path}") for path in order}


def _read(disk: Path, path: str) -> bytes:
    """A file of a file system that is not mounted."""
    content = subprocess.run(["debugfs", "-R", f"cat {path}", disk], capture_output=True, check=True).stdout
    assert content, f"there is no {path} on {disk}"
    return content


class _Archive:
    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._files = 0

    def add(self, path: str, mode: int, content: bytes = b"") -> None:
        self._files += 1
        name = path.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (4 numbers), length of the name, checksum
        fields = (self._files, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [_padded(header + name), _padded(content)]

    def close(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
