"""What this host can do: probes that answer yes, no, or could not tell.

A probe tries the thing itself where that harms nobody; versions prove little,
because distributions carry features back.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from offload.errors import KernelError
from offload.kernel.netns import CLONE_NEWNET, call_in

BPF_FS_MAGIC = 0xCAFE4A11  # include/uapi/linux/magic.h
BCC_LIBRARY = "libbcc.so.0"
_BPF_TCX_INGRESS = 46  # include/uapi/linux/bpf.h
_THREAD_NETNS = "/proc/thread-self/ns/net"
_LOOPBACK = 1  # the ifindex of lo, in every network namespace
_STATFS_SIZE = 256  # bytes; no architecture's struct statfs is longer

# Bits of include/uapi/linux/capability.h, each with what offload needs it for.
_CAPABILITIES: dict[str, tuple[int, str]] = {
    "cap_net_admin": (12, "attach programs to devices and change devices, bridges and offloads"),
    "cap_net_raw": (13, "open AF_XDP and packet sockets"),
    "cap_sys_admin": (
        21,
        "look at programs of other people, and enter the namespace that holds a veth's other end",
    ),
    "cap_sys_nice": (23, "put the threads of NAPI on the CPUs of their queues"),
    "cap_perfmon": (38, "let the verifier accept pointer arithmetic in the programs"),
    "cap_bpf": (39, "load programs and create maps"),
}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Answer:
    """What a probe found: ``why`` is the evidence, ``remedy`` what to do unless the answer is yes."""

    state: Literal["yes", "no", "unknown"]
    why: str
    remedy: str = ""


def probe(pin_dir: Path) -> dict[str, Answer]:
    """Ask everything. Nothing that was there before is changed; takes about 0.3 seconds."""
    bridge, vlan_filtering = bridges()
    return {
        "kernel": Answer("yes", f"Linux {os.uname().release}"),
        "btf": btf(),
        "bpffs": bpffs(pin_dir),
        "bridge": bridge,
        "bridge_vlan_filtering": vlan_filtering,
        "tcx": tcx(),
        "libbpf": libbpf(),
        "bcc": bcc(),
        **capabilities(),
    }


def boot_id() -> str:
    """Return the kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def netns_inode() -> int:
    """Return the inode number of the calling thread's network namespace."""
    return os.stat(_THREAD_NETNS).st_ino


def online_cpus() -> tuple[int, ...]:
    """Return the CPUs that are online, in order.

    A container's or a service's CPU set does not narrow this: the kernel threads
    that serve queues run on any online CPU. Raises KernelError where sysfs does not say.
    """
    path = Path("/sys/devices/system/cpu/online")
    try:
        return parse_cpu_list(path.read_text())
    except (OSError, ValueError) as error:
        raise KernelError(f"{path}: {error}; is sysfs mounted on /sys?") from error


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Expand the kernel's notation for CPUs: ``0-3,6`` is ``(0, 1, 2, 3, 6)``."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def btf() -> Answer:
    """Whether the kernel describes its types, which libbpf asks for."""
    path = Path("/sys/kernel/btf/vmlinux")
    if path.exists():
        return Answer("yes", f"{path} exists")
    return Answer("no", f"{path} does not exist", "boot a kernel with CONFIG_DEBUG_INFO_BTF=y")


def bpffs(pin_dir: Path) -> Answer:
    """Whether ``pin_dir`` is, or would be made, on a mounted BPF file system."""
    # Unlike Path.exists(), this takes a directory that we may not look into for absent.
    place = next(parent for parent in (pin_dir, *pin_dir.parents) if os.path.exists(parent))
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.statfs(os.fsencode(place), buffer) != 0:
        return Answer("unknown", f"{place}: {os.strerror(ctypes.get_errno())}")
    # f_type is the first member of struct statfs, a long on all but s390.
    if ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF == BPF_FS_MAGIC:
        return Answer("yes", f"{place} is on a BPF file system")
    standard = Path("/sys/fs/bpf")
    mount_point = standard if pin_dir.is_relative_to(standard) else pin_dir
    make = "" if mount_point == standard else f"mkdir -p {mount_point} && "
    return Answer(
        "no",
        f"{place} is not on a BPF file system",
        f"{make}mount -t bpf bpf {mount_point} (`ip netns exec` mounts a fresh /sys that has none, "
        "and what is mounted there is seen nowhere else: `nsenter --net=/run/netns/NAME` keeps /sys)",
    )


def bridges() -> tuple[Answer, Answer]:
    """Whether the kernel has bridges, and whether they filter VLANs.

    Makes a bridge in a network namespace of a thread; both are gone when this returns.
    """
    no_bridge = Answer("no", "the kernel cannot make a bridge", "boot a kernel with CONFIG_BRIDGE")
    no_filtering = Answer(
        "no",
        "a bridge with vlan_filtering 1 cannot be made",
        "nothing for untagged ports; VLANs on `bridge: kernel` need CONFIG_BRIDGE_VLAN_FILTERING=y",
    )
    try:
        filtering = call_in(_THREAD_NETNS, _try_bridges)
    except (OSError, NetlinkError) as error:
        could_not = Answer("unknown", f"no namespace to try it in: {error}", "run as root")
        return could_not, could_not
    if filtering is None:
        return no_bridge, no_filtering
    yes = Answer("yes", "a bridge was made in a namespace of its own")
    return yes, Answer("yes", "vlan_filtering 1 was read back") if filtering else no_filtering


def _try_bridges() -> bool | None:
    """Return whether a new bridge filters VLANs, None when there are no bridges. Moves the thread."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    name = f"probe{secrets.token_hex(4)}"
    with IPRoute() as netlink:
        for options in ({"br_vlan_filtering": 1}, {}):
            try:
                netlink.link("add", ifname=name, kind="bridge", **options)
            except NetlinkError as error:
                if error.code != errno.EOPNOTSUPP:
                    raise
                continue
            (link,) = netlink.link("get", ifname=name)
            return bool(link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_BR_VLAN_FILTERING"))
    return None


def tcx() -> Answer:
    """Whether tc programs can be attached by tcx links, which the kernel has from 6.6 on.

    Asks for the tcx programs on lo: a kernel that does not know tcx refuses the question.
    """
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        return Answer("unknown", str(error), "apt install libbpf1")
    count = ctypes.c_uint32(0)
    if library.bpf_prog_query(_LOOPBACK, _BPF_TCX_INGRESS, 0, None, None, ctypes.byref(count)) == 0:
        return Answer("yes", "the kernel lists tcx programs")
    code = ctypes.get_errno()
    if code == errno.EINVAL:
        return Answer("no", "the kernel does not know tcx", "boot Linux 6.6 or later")
    return Answer("unknown", f"listing tcx programs: {os.strerror(code)}", "run as root")


def libbpf() -> Answer:
    """Whether libbpf 1.x can be loaded."""
    return _loads("libbpf.so.1", "apt install libbpf1")


def bcc() -> Answer:
    """Whether this interpreter finds the distribution's bcc and its library, without importing either.

    The package of that name on PyPI is another one.
    """
    remedy = "apt install python3-bpfcc, and make the venv with --system-site-packages from /usr/bin/python3"
    spec = importlib.util.find_spec("bcc")
    if spec is None:
        return Answer("no", f"{sys.executable} finds no module bcc", remedy)
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "libbcc.py").exists() for place in places):
        return Answer("no", f"{spec.origin} is another package named bcc", f"pip uninstall bcc; {remedy}")
    return _loads(BCC_LIBRARY, "apt install libbpfcc")


def _loads(library: str, remedy: str) -> Answer:
    """Load a library in a child, because libbcc would leave LLVM's 100 MB in this process."""
    script = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    child = subprocess.run(
        [sys.executable, "-I", "-c", script, library], capture_output=True, text=True, check=False
    )
    if child.returncode == 0:
        return Answer("yes", f"{library} loads")
    return Answer("no", child.stderr.strip().rpartition("\n")[2] or f"{library} does not load", remedy)


def capabilities() -> dict[str, Answer]:
    """Which of the capabilities that offload uses this process has in effect."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    return {name: _capability(name, effective) for name in _CAPABILITIES}


def _capability(name: str, effective: int) -> Answer:
    bit, purpose = _CAPABILITIES[name]
    if effective >> bit & 1:
        return Answer("yes", f"{name.upper()} is in effect: {purpose}")
    return Answer(
        "no",
        f"{name.upper()} is missing; without it offload cannot {purpose}",
        f"run as root, or add {name.upper()} to AmbientCapabilities= of the service",
    )
