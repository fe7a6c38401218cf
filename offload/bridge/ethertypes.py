"""The extension ``ethertypes``: lets only certain EtherTypes into the switch. An example to start from.

::

    extensions:
      - {name: ethertypes, allow: [0x0800, 0x0806, 0x86dd], members: [web1]}

``members``: whose frames are looked at; everybody's without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.bridge.extension import DROP, FORWARD, Extension, Frame, Verdict


class EtherTypes(Extension):
    """Drops what is not allowed, and counts it by EtherType."""

    def __init__(self, options: Mapping[str, Any], switch: str) -> None:
        unknown = options.keys() - {"allow", "members"}
        allowed = options.get("allow")
        if unknown or not isinstance(allowed, list) or not all(isinstance(item, int) for item in allowed):
            raise ValueError("options are `allow`, a list of EtherTypes, and `members`, a list of names")
        self._allowed = frozenset(allowed)
        self._members = frozenset(options["members"]) if "members" in options else None
        self._dropped: dict[str, int] = {}

    def frame(self, frame: Frame) -> Verdict:
        if frame.ethertype in self._allowed or (
            self._members is not None and frame.ingress not in self._members
        ):
            return FORWARD
        name = f"{frame.ethertype:#06x}"
        self._dropped[name] = self._dropped.get(name, 0) + 1
        return DROP

    def counters(self) -> Mapping[str, int]:
        return self._dropped
