// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Frames for the benchmarks, run by BPF_PROG_TEST_RUN: whatever the frame's
 * destination is, the next one of the stream is put in its place.
 *
 * generate  and then out of a device: a sender of real frames (live frames)
 * feed      and then into another program, as if the frame had come to it
 *
 * The MACs of a stream differ in their last three bytes, which are a number drawn at random: uniformly,
 * or so that the first few get most of the frames. Whoever gets a frame may leave its first bytes in
 * disorder, as a tag that is taken out does, and its memory is sent again: 16 bytes are written anew.
 * Not part of the product.
 */
#include <linux/bpf.h>

/* The stream: one row, read and written by one CPU at a time. */
struct stream {
	__u64 state;  /* of a linear congruential generator (Knuth's MMIX constants) */
	__u64 start;  /* a frame's first eight bytes, the number 0 in them; little endian */
	__u64 next;   /* its next eight: the rest of the source, and a tag or what comes instead */
	__u32 count;  /* how many destinations */
	__u32 hot;    /* to how many of them, the first, a share of the frames is confined */
	__u32 share;  /* how large that is, in 1024ths */
	__u32 outlet; /* which row of outlets they leave by */
};
BPF_TABLE("array", __u32, struct stream, streams, 1);
/* The devices that frames can leave by. */
BPF_XDP_REDIRECT_MAP("devmap", struct bpf_devmap_val, outlets, MAX_OUTLETS);
/* Slot 0: the program that is fed. */
BPF_TABLE("prog", __u32, __u32, fed, 1);

/* Stores of eight bytes: a reader of the destination need not wait for several to be joined. */
static __always_inline int readdress(struct xdp_md *ctx, struct stream *stream)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u64 draw, count;
	__u32 number;

	if (data + 16 > end)
		return -1;
	stream->state = stream->state * 6364136223846793005ull + 1442695040888963407ull;
	draw = stream->state;
	count = (draw >> 23 & 1023) < stream->share ? stream->hot : stream->count;
	number = (draw >> 33) * count >> 31;
	*(__u64 *)data = stream->start | (__u64)__builtin_bswap32(number << 8) << 24;
	*(__u64 *)(data + 8) = stream->next;
	return 0;
}

int generate(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct stream *stream = streams.lookup(&zero);

	if (!stream || readdress(ctx, stream) < 0)
		return XDP_ABORTED;
	return outlets.redirect_map(stream->outlet, XDP_ABORTED);
}

int feed(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct stream *stream = streams.lookup(&zero);

	if (!stream || readdress(ctx, stream) < 0)
		return XDP_ABORTED;
	fed.call(ctx, 0);
	return XDP_ABORTED;
}
