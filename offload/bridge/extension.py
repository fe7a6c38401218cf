"""The public interface of extensions: Python classes that see, and may steer, the frames of the default path.

An extension is a class of any installed package, named by an entry point::

    [project.entry-points."offload.extensions"]
    quiet-hours = "my_package:QuietHours"

and switched on in the config, where keys beside ``name`` are its options::

    switches:
      ext0:
        bridge: python
        extensions:
          - {name: quiet-hours, from: 22, to: 6, members: [web1]}

It is made once in the bridge's process, with the options and the name of the switch, and is asked about
each frame::

    class QuietHours(Extension):
        \"\"\"Keep the wire quiet at night, but for one monitoring station.\"\"\"

        def __init__(self, options: Mapping[str, Any], switch: str) -> None:
            self._hours = range(options["from"], 24), range(options["to"])
            self._members = frozenset(options["members"])

        def frame(self, frame: Frame) -> Verdict:
            night = any(time.localtime().tm_hour in hours for hours in self._hours)
            if not night or frame.ingress not in self._members:
                return FORWARD
            return redirect("monitor") if frame.ethertype == 0x0800 else DROP

Extensions are asked in the order of the config. The first verdict that is not FORWARD stands, and later
ones are not asked. What the fast path carries never comes here: ``queue: off`` on a port brings all its
frames to the bridge.

Every frame waits for the extensions. One that raises is logged and counted, and the frame goes on as if it
were not there; after ten failures within a minute it is off. One that ends the process, or keeps a frame
for longer than a second, is off at once, and the bridge goes on without it. Off lasts until its entry in
the config changes or the bridge is restarted. An extension may start threads, and answers for them; it may
not fork.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

GROUP = "offload.extensions"
"""The entry point group."""


class Frame:
    """A frame that came into the switch.

    ``ingress`` is the name of the member that it came from, ``vid`` its VLAN (0: none), ``dst`` and ``src``
    are the six octets of each address, ``ethertype`` is what follows the addresses or the VLAN tag.
    ``time_ns`` is when it came, in nanoseconds of the wall clock.

    ``data`` is all of it from the destination address on, without FCS, with its VLAN tag if it has one. It
    may be a GSO frame of up to 64 KiB that is cut into segments later, and its checksum may be one that is
    completed later: ``offload`` is the ``struct virtio_net_hdr`` that says so. Both are views of memory
    that is used again: they may be read during the call only, so copy what is to be kept
    (``bytes(frame.data)``).
    """

    __slots__ = ("data", "dst", "ethertype", "ingress", "offload", "src", "time_ns", "vid")

    def __init__(
        self,
        ingress: str,
        vid: int,
        dst: bytes,
        src: bytes,
        ethertype: int,
        data: memoryview,
        offload: memoryview,
        time_ns: int,
    ) -> None:
        self.ingress = ingress
        self.vid = vid
        self.dst = dst
        self.src = src
        self.ethertype = ethertype
        self.data = data
        self.offload = offload
        self.time_ns = time_ns


@dataclass(frozen=True)
class Verdict:
    """What becomes of a frame. ``member`` is the name of whom it is redirected to."""

    kind: Literal["forward", "drop", "redirect"]
    member: str = ""


FORWARD = Verdict("forward")
"""Switch it as if nobody had asked."""
DROP = Verdict("drop")


@cache
def redirect(member: str) -> Verdict:
    """To this member alone, whatever the frame's destination, if the member is in the frame's VLAN."""
    return Verdict("redirect", member)


class Extension(Protocol):
    """What an extension may define. Derive from it to have the rest; what is not defined costs nothing."""

    def __init__(self, options: Mapping[str, Any], switch: str) -> None:
        """Raise ValueError, with words for the operator, when the options are wrong."""

    def frame(self, frame: Frame) -> Verdict:
        """Decide. Called before the switch learns anything from the frame."""
        return FORWARD

    def watch(self, frame: Frame, to: Sequence[str]) -> None:
        """See a frame on its way to the members ``to``, which are none when it is dropped."""
        return

    def second(self) -> None:
        """Called about once a second, for what need not be done at every frame."""
        return

    def counters(self) -> Mapping[str, int]:
        """Numbers for the operator, shown beside the bridge's own."""
        return {}

    def close(self) -> None:
        """The bridge ends, or goes on without this extension. Not called when the process dies."""
        return
