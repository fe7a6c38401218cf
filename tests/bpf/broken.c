// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Programs that the verifier must refuse. Nothing of the product.
 */
#include <linux/bpf.h>
#include "abi.h"

BPF_TABLE("array", __u32, struct port, ports, 4);

/* Reads the frame without asking where it ends. */
int unbounded(struct xdp_md *ctx)
{
	__u8 *data = (void *)(long)ctx->data;

	return data[100] ? XDP_DROP : XDP_PASS;
}

/* Takes for granted that the row is there. */
int unchecked(struct xdp_md *ctx)
{
	__u32 row = 2;
	struct port *port = ports.lookup(&row);

	return port->flags & PORT_RUNNING ? XDP_DROP : XDP_PASS;
}
