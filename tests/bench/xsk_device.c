// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A device that frames come to, for the benchmark of AF_XDP. Run by BPF_PROG_TEST_RUN with live frames
 * and the device as their origin, as a driver would run it. Not part of the product.
 */
#include <linux/bpf.h>

/* Slot 0: the socket that takes the frames of queue 0. */
BPF_XSKMAP(xsks, 1);

int redirect(struct xdp_md *ctx)
{
	return xsks.redirect_map(ctx->rx_queue_index, XDP_DROP);
}

/* For what comes after XDP: the kernel makes an skb. */
int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}
