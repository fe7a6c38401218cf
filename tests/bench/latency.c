// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Round trips and floods of UDP for the benchmarks. Not part of the product.
 *
 *   latency echo ADDRESS PORT           sends back what comes
 *   latency ping ADDRESS PORT RATE N    N probes, RATE a second, whatever comes back; then prints
 *                                       {"sent": N, "ns": [...]}, a round trip for each that did
 *   latency flood ADDRESS PORT RATE     datagrams of 18 bytes, RATE a second, 0: as fast as it can;
 *                                       until SIGINT, then prints {"sent": N}
 *
 * A frame of the last two is of 64 bytes. A probe is sent when it is due, whether or not the one before it
 * was answered. Each prints "ready" to stderr when it is at work.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 18, BATCH = 32, SECOND = 1000000000, PATIENCE = 200000000 /* ns, for the last answer */ };
enum { EVEN = 50000 /* a slower flood sends one by one */ };

static volatile sig_atomic_t ended;

static void end(int number)
{
	(void)number;
	ended = 1;
}

static void check(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(1);
	}
}

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (int64_t)time.tv_sec * SECOND + time.tv_nsec;
}

static void echo(int fd)
{
	struct sockaddr_in from;
	char data[2048];

	while (!ended) {
		socklen_t length = sizeof(from);
		ssize_t size = recvfrom(fd, data, sizeof(data), 0, (struct sockaddr *)&from, &length);

		if (size > 0)
			sendto(fd, data, size, 0, (struct sockaddr *)&from, length);
	}
}

/* A datagram has the number of its probe; a late answer is not taken for another's. */
static void ping(int fd, long rate, uint32_t count)
{
	int64_t *sent = calloc(count, sizeof(*sent)), *taken = calloc(count, sizeof(*taken));
	int64_t start = now(), due;
	uint32_t next = 0, back = 0, number;
	char data[SIZE] = { 0 };
	const char *comma = "";

	check(sent && taken, "memory");
	while (!ended && back < count) {
		struct pollfd wait = { .fd = fd, .events = POLLIN };
		struct timespec left = { 0 };

		due = next < count ? start + next * (SECOND / rate) : sent[count - 1] + PATIENCE;
		if (due > now()) {
			left.tv_nsec = due - now();
			if (left.tv_nsec < 0)
				left.tv_nsec = 0;
			left.tv_sec = left.tv_nsec / SECOND;
			left.tv_nsec %= SECOND;
			ppoll(&wait, 1, &left, NULL);
		} else if (next < count) {
			memcpy(data, &next, sizeof(next));
			sent[next++] = now();
			send(fd, data, SIZE, MSG_DONTWAIT);
		} else {
			break;
		}
		while (recv(fd, data, SIZE, MSG_DONTWAIT) == SIZE) {
			memcpy(&number, data, sizeof(number));
			if (number < next && !taken[number]) {
				taken[number] = now() - sent[number];
				back++;
			}
		}
	}
	printf("{\"sent\": %u, \"ns\": [", next);
	for (number = 0; number < next; number++)
		if (taken[number]) {
			printf("%s%lld", comma, (long long)taken[number]);
			comma = ", ";
		}
	printf("]}\n");
}

static void flood(int fd, long rate)
{
	struct iovec part = { .iov_base = (char[SIZE]){ 0 }, .iov_len = SIZE };
	struct mmsghdr batch[BATCH] = { 0 };
	int64_t start = now();
	unsigned long sent = 0;
	int burst = rate && rate < EVEN ? 1 : BATCH;

	for (int i = 0; i < BATCH; i++)
		batch[i].msg_hdr = (struct msghdr){ .msg_iov = &part, .msg_iovlen = 1 };
	while (!ended) {
		int64_t due = rate ? start + (int64_t)(sent * ((double)SECOND / rate)) : 0;
		int64_t left = rate ? due - now() : 0;

		if (left > 0) {
			nanosleep(&(struct timespec){ .tv_nsec = left < SECOND ? left : SECOND - 1 }, NULL);
		} else {
			int some = sendmmsg(fd, batch, burst, 0);

			sent += some > 0 ? some : 0;
		}
	}
	printf("{\"sent\": %lu}\n", sent);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	int echoes = argc == 4 && !strcmp(argv[1], "echo"), floods = argc == 5 && !strcmp(argv[1], "flood");
	int pings = argc == 6 && !strcmp(argv[1], "ping");

	if (!echoes && !floods && !pings) {
		fprintf(stderr, "usage: latency echo|flood|ping ADDRESS PORT [RATE [N]]\n");
		return 2;
	}
	address.sin_port = htons(atoi(argv[3]));
	check(inet_pton(AF_INET, argv[2], &address.sin_addr) == 1, argv[2]);
	check(!(echoes ? bind : connect)(fd, (struct sockaddr *)&address, sizeof(address)), argv[2]);
	sigaction(SIGINT, &(struct sigaction){ .sa_handler = end }, NULL);
	prctl(PR_SET_TIMERSLACK, 1);
	fprintf(stderr, "ready\n");
	if (echoes)
		echo(fd);
	else if (floods)
		flood(fd, atol(argv[4]));
	else
		ping(fd, atol(argv[4]), atol(argv[5]));
	return 0;
}
