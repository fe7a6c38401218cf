// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Readers for a filter table that changes: every frame is sent to the key that
 * the writer is at, or to the one after it, and then through the program under
 * test as if it had come so. Nothing of the product.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>

/* Where the writer is: written through a memory mapping. */
BPF_F_TABLE("array", __u32, __u64, turn, 1, BPF_F_MMAPABLE);
/* Destination MACs in the writer's order, as little-endian numbers. */
BPF_TABLE("array", __u32, __u64, nomads, NOMADS);
/* Frames by the last byte of their destination, which says whose they are. */
BPF_TABLE("percpu_array", __u32, __u64, fed, 256);
/* Slot 0: the program under test. */
BPF_TABLE("prog", __u32, __u32, next, 1);

int feed(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	__u32 zero = 0, whose, at;
	__u64 *place, *nomad, *count;

	if ((void *)(eth + 1) > end)
		return XDP_ABORTED;
	place = turn.lookup(&zero);
	if (!place)
		return XDP_ABORTED;
	at = (*(volatile __u64 *)place + (bpf_get_prandom_u32() & 1)) & (NOMADS - 1);
	nomad = nomads.lookup(&at);
	if (!nomad)
		return XDP_ABORTED;
	__builtin_memcpy(eth->h_dest, nomad, ETH_ALEN);
	whose = eth->h_dest[ETH_ALEN - 1];
	count = fed.lookup(&whose);
	if (count)
		(*count)++;
	next.call(ctx, 0);
	return XDP_ABORTED;
}
