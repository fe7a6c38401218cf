"""What the benchmarks send with, send through, and count with. See ``generator.c`` and ``bare.c``."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from offload.closing import Closing
from offload.kernel.bpf import XDP_FLAGS_DRV_MODE, AttachType, Link, Map, Program, possible_cpus
from offload.kernel.compile import Artifact, compiled_file
from offload.kernel.dataplane import Dataplane
from offload.model import PortRecord
from offload.plan import RUNNING, TRUNK
from tests.lab import WIRE_MAC, Lab, Namespace, mac_bytes, test_frame

FIRST = "02:15:5d:00:00:00"
FRAME = test_frame(FIRST, WIRE_MAC)
"""64 bytes on the wire: 60, and the FCS."""
HOT, SHARE = 0.01, 922
"""Skewed: of the destinations, one in a hundred gets 922 of 1,024 frames, nine in ten."""
MAX_OUTLETS = 16
RING = 2048
"""Frames that wait for a queue's own CPU at most."""
_U32 = struct.Struct("=I")
_STREAM = struct.Struct("=QQQIIII")  # struct stream
_DEVICE = struct.Struct("=II")  # struct bpf_devmap_val: ifindex, program


def destination(number: int) -> str:
    """The MAC that is ``number`` (0 to 2**24 - 1) behind ``FIRST``."""
    return FIRST[:9] + number.to_bytes(3).hex(":")


class Objects(Closing):
    """Maps and programs of one C file, loaded as often as this is made. All of it goes with ``close``."""

    def __init__(self, artifact: Artifact, **entries: int) -> None:
        self._held = ExitStack()
        self.maps: Mapping[str, Map] = {
            name: self._held.enter_context(Map.create(name, spec, entries.get(name)))
            for name, spec in artifact.maps.items()
        }
        self.programs: Mapping[str, Program] = {
            name: self._held.enter_context(Program.load(name, spec, self.maps, AttachType.XDP, frags=True))
            for name, spec in artifact.programs.items()
        }

    def attach(self, name: str, ns: Namespace, device: str) -> None:
        """Put a program on a device in native mode, until ``close``."""
        ifindex = ns.ifindex(device)
        doing = f"attach {name} to {device}"

        def create() -> Link:
            program = self.programs[name]
            return Link.create(program, ifindex, AttachType.XDP, flags=XDP_FLAGS_DRV_MODE, doing=doing)

        self._held.enter_context(ns.call(create))

    def set_device(self, map_name: str, row: int, ns: Namespace, device: str) -> None:
        """Write a device into a devmap. The kernel looks for it in the caller's namespace."""
        value = _DEVICE.pack(ns.ifindex(device), 0)
        ns.call(lambda: self.maps[map_name].update(_U32.pack(row), value))

    def close(self) -> None:
        self._held.close()


class Generator(Objects):
    """Sends frames at full speed from the CPU that calls, or feeds them to a program.

    A frame's destination is drawn from its own and the MACs that follow it, ``destinations`` in all. Where
    there are more than one, the frame's ends with three bytes of 0. ``skewed``: see ``HOT``.
    """

    def __init__(self, cache: Path) -> None:
        source = Path(__file__).with_name("generator.c")
        super().__init__(compiled_file(source, {"MAX_OUTLETS": MAX_OUTLETS}, cache))

    def send(
        self, outlet: int, destinations: int, frames: int, frame: bytes = FRAME, skewed: bool = False
    ) -> float:
        """Send ``frames`` out of the device in row ``outlet`` of ``outlets``; returns the seconds it took.

        That is the kernel's figure, whole nanoseconds per frame. It leaves out making and freeing the
        frames' memory (which waits for a grace period), and the time that other tasks had the CPU for.
        """
        self._begin(frame, destinations, outlet, skewed)
        result = self.programs["generate"].test_run(frame, repeat=frames, live=True)
        return result.nanoseconds * frames / 1e9

    def nanoseconds(
        self, program: Program, frames: int, destinations: int = 1, first: str = FIRST
    ) -> tuple[int, int]:
        """Verdict of the last frame, and mean time per frame with the drawing of its destination."""
        frame = mac_bytes(first) + FRAME[6:]
        self._begin(frame, destinations)
        self.maps["fed"].update(_U32.pack(0), _U32.pack(program.fd))
        result = self.programs["feed"].test_run(frame, repeat=frames)
        return result.verdict, result.nanoseconds

    def _begin(self, frame: bytes, destinations: int, outlet: int = 0, skewed: bool = False) -> None:
        start, following = (int.from_bytes(frame[at : at + 8], "little") for at in (0, 8))
        hot, share = max(1, int(destinations * HOT)), SHARE if skewed else 0
        row = _STREAM.pack(1, start, following, destinations, hot, share, outlet)
        self.maps["streams"].update(_U32.pack(0), row)


class Bare(Objects):
    """The programs to compare with."""

    def __init__(self, cache: Path) -> None:
        super().__init__(compiled_file(Path(__file__).with_name("bare.c"), {}, cache))

    def sunk(self) -> int:
        """Frames that ``sink`` dropped so far."""
        values = self.maps["sunk"].lookup(_U32.pack(0), 8 * possible_cpus())
        assert values is not None
        return sum(memoryview(values).cast("Q"))


def offload_on(
    held: ExitStack,
    cache: Path,
    lab: Lab,
    device: str,
    filters: int,
    ports: int,
    cpu: int | None = None,
    vid: int = 0,
    trunk: bool = False,
) -> Dataplane:
    """Our program on the lab's NIC: ``filters`` filters dealt out to ``ports`` ports, all of one device.

    ``cpu`` is the queues' CPU, or None for the NIC's. The filters are for ``vid``, of whose frames
    an access port takes the tag off, and a ``trunk`` none. ``held`` takes everything away again.
    """
    dataplane = held.enter_context(Dataplane(Path("/sys/fs/bpf", lab.host.name), cache))
    held.callback(dataplane.remove_everything)
    nic = lab.host.ifindex(lab.nic)
    target = lab.host.ifindex(device)

    flags = RUNNING | (TRUNK if trunk else 0)

    def fill() -> None:
        dataplane.attach(lab.nic, nic, "native")
        if cpu is not None:
            dataplane.set_queue_cpu(nic, cpu, RING)
        for number in range(ports):
            row = PortRecord(f"vm{number}", number + 1, cpu, 0 if trunk else vid, flags, 1514, target)
            dataplane.set_port(number, row)
        for number in range(filters):
            dataplane.set_filter(nic, destination(number), vid, number % ports)

    lab.host.call(fill)
    return dataplane
