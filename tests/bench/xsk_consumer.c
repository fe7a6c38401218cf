// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the benchmark of AF_XDP compares with: the same in C, by system calls alone.
 *
 *   xsk_consumer MAP DEVICE [TO]
 *
 * Puts a socket for queue 0 of DEVICE into entry 0 of the XSKMAP pinned at MAP, and drops what
 * comes, or sends it out of TO with the same UMEM, until SIGINT. Prints {"frames": N} then, and
 * whenever there is a SIGUSR1.
 * Batches, rings and UMEM have the sizes of offload.xsk's tools. Not part of the product.
 */
#include <errno.h>
#include <linux/bpf.h>
#include <linux/if_xdp.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { FRAMES = 4096, CHUNK = 2048, RING = 2048, BATCH = 256, SPIN = 100000 /* ns */, TX_BUDGET = 9 /* XDP_MAX_TX_SKB_BUDGET */ };

struct ring {
	uint32_t *producer, *consumer, *flags, mine, theirs, size;
	void *entries;
};
struct xsk {
	int fd;
	struct ring rx, tx, fill, completion;
};

static volatile sig_atomic_t ended, asked;

static void end(int number)
{
	(void)number;
	ended = 1;
}

static void ask(int number)
{
	(void)number;
	asked = 1;
}

static void tell(unsigned long frames)
{
	printf("{\"frames\": %lu}\n", frames);
	fflush(stdout);
}

static void check(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(1);
	}
}

static struct ring map_ring(int fd, const struct xdp_ring_offset *at, uint32_t size, size_t entry, off_t place)
{
	char *base = mmap(NULL, at->desc + size * entry, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, place);

	check(base != MAP_FAILED, "mmap of a ring");
	return (struct ring){
		.producer = (uint32_t *)(base + at->producer),
		.consumer = (uint32_t *)(base + at->consumer),
		.flags = (uint32_t *)(base + at->flags),
		.entries = base + at->desc,
		.size = size,
	};
}

static void set(int fd, int option, uint32_t value)
{
	check(!setsockopt(fd, SOL_XDP, option, &value, sizeof(value)), "setsockopt");
}

/* A socket with its own UMEM, to receive on; or with that of another, to send on. */
static struct xsk open_xsk(const char *device, char *umem, int shared)
{
	struct xsk xsk = { .fd = socket(AF_XDP, SOCK_RAW, 0) };
	struct xdp_mmap_offsets at;
	socklen_t length = sizeof(at);
	struct sockaddr_xdp address = {
		.sxdp_family = AF_XDP,
		.sxdp_flags = shared < 0 ? XDP_USE_NEED_WAKEUP : XDP_SHARED_UMEM,
		.sxdp_ifindex = if_nametoindex(device),
		.sxdp_shared_umem_fd = shared < 0 ? 0 : shared,
	};
	uint32_t budget = RING;

	check(xsk.fd >= 0, "socket");
	if (shared < 0) {
		struct xdp_umem_reg reg = { .addr = (uintptr_t)umem, .len = FRAMES * CHUNK, .chunk_size = CHUNK };
		check(!setsockopt(xsk.fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof(reg)), "XDP_UMEM_REG");
	}
	set(xsk.fd, XDP_UMEM_FILL_RING, FRAMES);
	set(xsk.fd, XDP_UMEM_COMPLETION_RING, FRAMES);
	set(xsk.fd, shared < 0 ? XDP_RX_RING : XDP_TX_RING, RING);
	if (shared >= 0)
		setsockopt(xsk.fd, SOL_XDP, TX_BUDGET, &budget, sizeof(budget)); /* where the kernel has it */
	check(!getsockopt(xsk.fd, SOL_XDP, XDP_MMAP_OFFSETS, &at, &length), "XDP_MMAP_OFFSETS");
	xsk.fill = map_ring(xsk.fd, &at.fr, FRAMES, 8, XDP_UMEM_PGOFF_FILL_RING);
	xsk.completion = map_ring(xsk.fd, &at.cr, FRAMES, 8, XDP_UMEM_PGOFF_COMPLETION_RING);
	if (shared < 0)
		xsk.rx = map_ring(xsk.fd, &at.rx, RING, 16, XDP_PGOFF_RX_RING);
	else
		xsk.tx = map_ring(xsk.fd, &at.tx, RING, 16, XDP_PGOFF_TX_RING);
	/* The kernel takes some milliseconds to free the queue of the process before. */
	for (int tries = 0; bind(xsk.fd, (struct sockaddr *)&address, sizeof(address)); tries++) {
		check(errno == EBUSY && tries < 200, "bind");
		usleep(5000);
	}
	return xsk;
}

/* Entries to read, BATCH at most. */
static uint32_t available(struct ring *ring)
{
	uint32_t count = ring->theirs - ring->mine;

	if (count < BATCH) {
		ring->theirs = __atomic_load_n(ring->producer, __ATOMIC_ACQUIRE);
		count = ring->theirs - ring->mine;
	}
	return count < BATCH ? count : BATCH;
}

static void publish(uint32_t *index, struct ring *ring, uint32_t count)
{
	ring->mine += count;
	__atomic_store_n(index, ring->mine, __ATOMIC_RELEASE);
}

static uint64_t *address_at(struct ring *ring, uint32_t number)
{
	return (uint64_t *)ring->entries + ((ring->mine + number) & (ring->size - 1));
}

static struct xdp_desc *frame_at(struct ring *ring, uint32_t number)
{
	return (struct xdp_desc *)ring->entries + ((ring->mine + number) & (ring->size - 1));
}

static uint32_t drop(struct xsk *in)
{
	uint32_t count = available(&in->rx);

	for (uint32_t i = 0; i < count; i++)
		*address_at(&in->fill, i) = frame_at(&in->rx, i)->addr;
	publish(in->fill.producer, &in->fill, count); /* it holds every frame: there is always room */
	publish(in->rx.consumer, &in->rx, count);
	return count;
}

static uint32_t forward(struct xsk *in, struct xsk *out)
{
	uint32_t done = available(&out->completion), count, room;

	for (uint32_t i = 0; i < done; i++)
		*address_at(&in->fill, i) = *address_at(&out->completion, i);
	publish(in->fill.producer, &in->fill, done);
	publish(out->completion.consumer, &out->completion, done);

	out->tx.theirs = __atomic_load_n(out->tx.consumer, __ATOMIC_ACQUIRE);
	room = out->tx.size - (out->tx.mine - out->tx.theirs);
	count = available(&in->rx);
	count = count < room ? count : room;
	for (uint32_t i = 0; i < count; i++)
		*frame_at(&out->tx, i) = *frame_at(&in->rx, i);
	publish(out->tx.producer, &out->tx, count);
	publish(in->rx.consumer, &in->rx, count);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (count && *out->tx.flags & XDP_RING_NEED_WAKEUP)
		while (sendto(out->fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 && errno == EAGAIN && !ended)
			;
	return count;
}

/* Look for frames, as long as offload.xsk's tools do, before sleeping. */
static uint32_t spin(struct xsk *in)
{
	struct timespec began, now;
	uint32_t count;

	clock_gettime(CLOCK_MONOTONIC, &began);
	do {
		count = available(&in->rx);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (!count && (now.tv_sec - began.tv_sec) * 1000000000L + now.tv_nsec - began.tv_nsec < SPIN);
	return count;
}

int main(int argc, char **argv)
{
	char *umem = mmap(NULL, FRAMES * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	union bpf_attr get = { .pathname = argc > 1 ? (uintptr_t)argv[1] : 0 }, update = { 0 };
	uint32_t zero = 0;
	unsigned long frames = 0;
	struct xsk in, out = { 0 };

	check(argc == 3 || argc == 4, "usage: xsk_consumer MAP DEVICE [TO]");
	check(umem != MAP_FAILED, "mmap of the UMEM");
	in = open_xsk(argv[2], umem, -1);
	if (argc == 4)
		out = open_xsk(argv[3], umem, in.fd);
	for (uint32_t i = 0; i < FRAMES; i++)
		*address_at(&in.fill, i) = (uint64_t)i * CHUNK;
	publish(in.fill.producer, &in.fill, FRAMES);

	update.map_fd = syscall(SYS_bpf, BPF_OBJ_GET, &get, sizeof(get));
	update.key = (uintptr_t)&zero;
	update.value = (uintptr_t)&in.fd;
	check(!syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &update, sizeof(update)), "the map");
	sigaction(SIGINT, &(struct sigaction){ .sa_handler = end }, NULL);
	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = ask }, NULL);
	fprintf(stderr, "ready\n");
	while (!ended) {
		struct pollfd wait = { .fd = in.fd, .events = POLLIN };
		uint32_t count = argc == 4 ? forward(&in, &out) : drop(&in);

		frames += count;
		if (asked) {
			asked = 0;
			tell(frames);
		}
		if (!count && !spin(&in))
			poll(&wait, 1, 100);
	}
	tell(frames);
	return 0;
}
