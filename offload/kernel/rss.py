"""RSS of a NIC: the indirection table, which says to what RX queues it spreads frames.

The hash of a frame picks a slot of the table. Source of the layouts: include/uapi/linux/ethtool.h,
``struct ethtool_rxfh_indir`` and ``struct ethtool_rxfh``. Everything is in host byte order.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from offload.errors import UnsupportedError, VerifyError
from offload.kernel.ethtool import Ethtool
from offload.kernel.failures import explained
from offload.kernel.host import Answer

_GRXFHINDIR = 0x38
_SRXFHINDIR = 0x39
_GRSSH = 0x46

_TABLE = struct.Struct("=II")  # cmd, number of slots; the RX queue of each follows
_SLOT = struct.Struct("=I")
_RXFH = struct.Struct("=IIIIB3xI")  # cmd, context, size of table and of key, function, reserved
_NO_SUCH_CONTEXT = 0xFFFFFFFE  # the highest number that does not mean "make one"


def spread(ethtool: Ethtool, ifname: str) -> tuple[int, ...]:
    """The RX queue of each slot; empty where the NIC has no such table.

    A driver's own default is told as the kernel's, which is what it can be given back as.
    """
    try:
        with explained(ifname, "read its RSS table"):
            _, slots = _TABLE.unpack(ethtool.run(ifname, _TABLE.pack(_GRXFHINDIR, 0)))
            table = ethtool.run(ifname, _TABLE.pack(_GRXFHINDIR, slots) + bytes(_SLOT.size * slots))
    except UnsupportedError:
        return ()
    found = tuple(queue for (queue,) in _SLOT.iter_unpack(table[_TABLE.size :]))
    return _default(ethtool, ifname, found) or found


def set_spread(ethtool: Ethtool, ifname: str, table: Sequence[int]) -> None:
    """Set the RX queue of each slot; VerifyError when the NIC has another table afterwards.

    A table that is a default is set as the kernel's: then it follows the number of queues again, and the
    kernel does not refuse to lower that. A table that is named is the user's to the kernel for good, even if
    it is the driver's own (IFF_RXFH_CONFIGURED; net/ethtool/ioctl.c, ethtool_set_rxfh_indir).
    """
    default = _default(ethtool, ifname, table)
    chosen = () if default else table
    command = _TABLE.pack(_SRXFHINDIR, len(chosen)) + b"".join(map(_SLOT.pack, chosen))
    with explained(ifname, f"spread frames to the RX queues {sorted({*table})}"):
        ethtool.run(ifname, command)
    found = spread(ethtool, ifname)
    if found != (default or tuple(table)):
        raise VerifyError(
            f"{ifname}: its RSS table is {found}, and not {tuple(table)}: see `ethtool -x {ifname}`"
        )


def contexts(ethtool: Ethtool, ifname: str) -> Answer:
    """Whether a NIC can have RSS tables besides the one, by asking for such a table that there is not.

    Nobody looks for it where there cannot be any (net/ethtool/ioctl.c, ethtool_get_rxfh).
    """
    try:
        ethtool.run(ifname, _RXFH.pack(_GRSSH, _NO_SUCH_CONTEXT, 0, 0, 0, 0))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return Answer("no", "its driver has no RSS contexts", "nothing: VM queues do without")
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            return Answer(
                "unknown", f"asking for an RSS context: {error.strerror}", f"see `ethtool -x {ifname}`"
            )
    return Answer("yes", "its driver knows RSS contexts")


def _default(ethtool: Ethtool, ifname: str, table: Sequence[int]) -> tuple[int, ...]:
    """What the kernel makes by itself (ethtool_rxfh_indir_default); empty if ``table`` is no default.

    Some drivers begin with as even a table, but give each queue its slots in a row
    (drivers/net/ethernet/intel/igb/igb_main.c, igb_setup_mrqc; igc too).
    """
    try:
        queues = ethtool.channels(ifname).rx_queues
    except UnsupportedError:
        return ()
    slots = range(len(table))
    by_turns, in_rows = ([slot % queues for slot in slots], [slot * queues // len(table) for slot in slots])
    return tuple(by_turns) if list(table) in (by_turns, in_rows) else ()
