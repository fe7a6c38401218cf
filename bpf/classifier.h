/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The filter table: (destination MAC, VID) to port, by equality.
 *
 * A two-choice hash table of buckets in a BPF array, whose lookups the JIT
 * inlines. A slot is ONE 64-bit word that holds key and value together, so a
 * reader never sees one key with another's value, however the writer and the
 * readers interleave. That the 60 bits of the key fit beside 18 bits of value
 * is owed to quotienting: mix() is a bijection of 60-bit numbers, the bucket
 * number says 15 of its bits, and only the other 45 are stored.
 *
 *   mix(key)   59 .......................... 15 14 ......... 0
 *                       remainder (45)           bucket (15)
 *   slot       63 .......................... 19   18    17 ... 0
 *                       remainder (45)          choice  port + 1
 *
 * choice says whether the slot is in its key's first bucket (0) or in its
 * second (1); without it two keys could look alike. An empty slot is 0.
 *
 * A key that is displaced is written to its other bucket before it leaves the
 * first, and is not displaced twice within one RCU grace period; readers, who
 * are RCU readers by nature, look at the first bucket, the second, and the
 * first again. So a key that is in the table is always found:
 *   moved 1 -> 2 after we read 1: we found it in 1;  before: it is in 2 by then
 *   moved 2 -> 1 after we read 2: we found it in 2;  before: it is in 1 by then
 * The writer is offload/classifier.py.
 */
#ifndef OFFLOAD_CLASSIFIER_H
#define OFFLOAD_CLASSIFIER_H

#include <linux/types.h>

#define BUCKET_BITS  15
#define BUCKETS      (1u << BUCKET_BITS)
#define BUCKET_SLOTS 4
#define VALUE_BITS   18
#define KEY_BITS     60
#define KEY_MASK     ((1ull << KEY_BITS) - 1)
#define MIX_FACTOR   0x9e3779b97f4a7c5ull /* odd; 2^60 divided by the golden ratio */
#define MIX_SHIFT    30
#define FOLD_SHIFT   45 /* the best mixed bits, which the whole key went into, onto the bucket number */

/* Half a cache line, aligned to its size: a bucket never straddles two lines. */
struct bucket {
	__u64 slot[BUCKET_SLOTS];
};

/* A key: the MAC as the wire has it in the low 48 bits (little endian), the VID above. */
static __always_inline __u64 filter_key(__u64 mac, __u16 vid)
{
	return mac | (__u64)vid << 48;
}

/* A bijection of 60-bit numbers: every step can be undone. */
static __always_inline __u64 mix(__u64 key)
{
	key ^= key >> MIX_SHIFT;
	key = (key * MIX_FACTOR) & KEY_MASK;
	key ^= key >> FOLD_SHIFT;
	return key;
}

static __always_inline __u32 first_bucket(__u64 mixed)
{
	return mixed & (BUCKETS - 1);
}

/* Always another bucket than the first, and the first's own second. */
static __always_inline __u32 second_bucket(__u64 mixed)
{
	return (mixed ^ (mixed >> BUCKET_BITS | 1)) & (BUCKETS - 1);
}

/* What a slot of this key holds above its value. */
static __always_inline __u64 slot_tag(__u64 mixed, __u64 choice)
{
	return mixed >> BUCKET_BITS << (VALUE_BITS + 1) | choice << VALUE_BITS;
}

/* The port + 1 that a bucket has under a tag, or 0. Each slot is read once, whole. */
static __always_inline __u32 search_bucket(const struct bucket *bucket, __u64 tag)
{
	#pragma unroll
	for (int i = 0; i < BUCKET_SLOTS; i++) {
		__u64 rest = *(const volatile __u64 *)&bucket->slot[i] ^ tag;

		if (rest - 1 < (1u << VALUE_BITS) - 1)
			return rest;
	}
	return 0;
}

#endif
