"""The kernel's AF_XDP interface: ``include/uapi/linux/if_xdp.h``, and what of ``socket.h`` goes with it.

Everything is in the byte order of the machine. Options that an older kernel does not know are
answered with ENOPROTOOPT, flags with EINVAL.
"""

from __future__ import annotations

import struct

AF_XDP = 44
SOL_XDP = 283

# Options at SOL_XDP.
XDP_MMAP_OFFSETS = 1
XDP_RX_RING = 2
XDP_TX_RING = 3
XDP_UMEM_REG = 4
XDP_UMEM_FILL_RING = 5
XDP_UMEM_COMPLETION_RING = 6
XDP_STATISTICS = 7
XDP_OPTIONS = 8
XDP_MAX_TX_SKB_BUDGET = 9  # Linux 6.17

# Flags of bind.
XDP_SHARED_UMEM = 1 << 0
XDP_COPY = 1 << 1
XDP_ZEROCOPY = 1 << 2
XDP_USE_NEED_WAKEUP = 1 << 3
XDP_USE_SG = 1 << 4  # Linux 6.6

XDP_UMEM_UNALIGNED_CHUNK_FLAG = 1 << 0
XDP_RING_NEED_WAKEUP = 1 << 0
XDP_OPTIONS_ZEROCOPY = 1 << 0
XDP_PKT_CONTD = 1 << 0
"""In a descriptor's options: the frame goes on in the next descriptor."""

# Where each ring is in the socket's file, for mmap.
XDP_PGOFF_RX_RING = 0
XDP_PGOFF_TX_RING = 0x80000000
XDP_UMEM_PGOFF_FILL_RING = 0x100000000
XDP_UMEM_PGOFF_COMPLETION_RING = 0x180000000

XSK_UNALIGNED_BUF_OFFSET_SHIFT = 48
XSK_UNALIGNED_BUF_ADDR_MASK = (1 << XSK_UNALIGNED_BUF_OFFSET_SHIFT) - 1

XDP_PACKET_HEADROOM = 256
"""Bytes that the kernel keeps free before a received frame, besides the headroom asked for (``bpf.h``)."""
XDP_UMEM_MIN_CHUNK_SIZE = 2048  # net/xdp/xdp_umem.c; the largest is a page
MAX_DESCRIPTORS = 18
"""Descriptors of one frame at most: MAX_SKB_FRAGS + 1, as kernels are built by default."""

# asm-generic/socket.h, which Python's socket module lacks. The same on x86-64 and arm64.
SO_BUSY_POLL = 46
SO_PREFER_BUSY_POLL = 69
SO_BUSY_POLL_BUDGET = 70

SOCKADDR_XDP = struct.Struct("=HHIII")
"""struct sockaddr_xdp: family, flags, ifindex, queue, fd of the socket whose UMEM is shared."""
UMEM_REG = struct.Struct("=QQIIII")
"""struct xdp_umem_reg: address, bytes, chunk size, headroom, flags, bytes of TX metadata."""
MMAP_OFFSETS = struct.Struct("=16Q")
"""struct xdp_mmap_offsets: producer, consumer, descriptors, flags; of RX, TX, fill, completion ring."""
STATISTICS = struct.Struct("=6Q")
"""struct xdp_statistics, see ``Statistics``."""
DESCRIPTOR = struct.Struct("=QII")
"""struct xdp_desc, the entry of RX and TX rings: address in the UMEM, bytes, options."""
ADDRESS = struct.Struct("=Q")
"""The entry of fill and completion rings: an address in the UMEM."""
