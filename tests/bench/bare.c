// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The limits that the benchmark compares with: a redirect with nothing before
 * it, and what the generator's own frames do. Not part of the product.
 */
#include <linux/bpf.h>

/* Slot 0: where everything goes. */
BPF_XDP_REDIRECT_MAP("devmap", struct bpf_devmap_val, devices, 1);
/* Frames that reached the sink, per CPU. */
BPF_TABLE("percpu_array", __u32, __u64, sunk, 1);

/* Redirect every frame, look at nothing: no program on this NIC can be faster. */
int redirect(struct xdp_md *ctx)
{
	return devices.redirect_map(0, XDP_PASS);
}

/* A VM that takes frames as fast as they come. */
int sink(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *count = sunk.lookup(&zero);

	if (count)
		(*count)++;
	return XDP_DROP;
}

int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}
