// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The VM's end of a port: takes every frame, and counts by the last byte of
 * the destination, which says whose frame it is. Nothing of the product.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>

BPF_TABLE("percpu_array", __u32, __u64, received, 256);

int sink(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	__u32 whose;
	__u64 *count;

	if ((void *)(eth + 1) > end)
		return XDP_DROP;
	whose = eth->h_dest[ETH_ALEN - 1];
	count = received.lookup(&whose);
	if (count)
		(*count)++;
	return XDP_DROP;
}
