// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The inner end of an AF_XDP port's veth pair, alone in a namespace of its own: whatever the NIC, the
 * bridge or another port hands to the port arrives here as the VM shall have it.
 *
 * channel XDP, one instance per port
 *   1. somebody has put a socket of this RX queue into `xsks` -> socket
 *   2. nobody has                                             -> drop: it belongs to nobody else
 *
 * taken   never attached. Run with a queue's number for a frame it tells whether that has a socket,
 *         which user space cannot read from the map: XDP_REDIRECT if so.
 */
#include <linux/bpf.h>
#include "abi.h"

/* The sockets, by RX queue. A consumer puts its own in; the kernel takes it out when it is closed. */
BPF_XSKMAP(xsks, MAX_CHANNEL_QUEUES);
/* What became of the frames: one row. */
BPF_TABLE("percpu_array", __u32, struct channel_counters, channel_counters, 1);

static __always_inline void count(struct tally *tally, __u32 length)
{
	tally->packets++;
	tally->bytes += length;
}

int channel(struct xdp_md *ctx)
{
	struct channel_counters *counters;
	__u32 zero = 0;
	int verdict;

	counters = channel_counters.lookup(&zero);
	if (!counters)
		return XDP_ABORTED;
	verdict = xsks.redirect_map(ctx->rx_queue_index, XDP_DROP);
	count(verdict == XDP_REDIRECT ? &counters->handed : &counters->no_consumer, bpf_xdp_get_buff_len(ctx));
	return verdict;
}

int taken(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (data + sizeof(__u32) > end)
		return XDP_ABORTED;
	return xsks.redirect_map(*(__u32 *)data, XDP_PASS);
}
