/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Gives blocks of a vSSD away: a program with a list of blocks that it does not need.
 *
 *	give_blocks DISK PROGRAM free|clean-cold|clean-hot|dirty START COUNT [START COUNT]...
 *
 * Waits until the host asks, publishes the list, most expendable first, waits until the host has
 * what it wanted, takes the list back and says which blocks are gone.
 */
#include "vssd_hints.h"

#include <stdlib.h>

/* Longer than any host waits for a guest that does nothing. */
#define PATIENCE_MS 60000

static int fail(const char *what)
{
	fprintf(stderr, "give_blocks: %s: %s\n", what, strerror(errno));
	return EXIT_FAILURE;
}

static int print(void *context, uint32_t start, uint32_t count)
{
	(void)context;
	return printf("%" PRIu32 " %" PRIu32 "\n", start, count) < 0 ? -1 : 0;
}

/* Waits until the host asks for blocks, or for none any more. */
static int wait_until(const struct vssd_disk *disk, bool asks_for_blocks)
{
	struct vssd_request asks;
	int rc;

	do {
		rc = vssd_wait_request(disk, PATIENCE_MS, &asks);
		if (!rc) {
			errno = ETIMEDOUT;
			return -1;
		}
	} while (rc > 0 && (asks.to_give_blocks > 0) != asks_for_blocks);
	return rc > 0 ? 0 : -1;
}

static int number(const char *text, uint32_t *value)
{
	char *end;
	unsigned long long wide = strtoull(text, &end, 10);

	*value = (uint32_t)wide;
	return *text >= '0' && *text <= '9' && !*end && wide <= UINT32_MAX ? 0 : -1;
}

int main(int argc, char **argv)
{
	static const char *const words[] = { "free", "clean-cold", "clean-hot", "dirty" };
	const char *name = argc > 1 ? argv[1] : "", *program = argc > 2 ? argv[2] : "";
	struct vssd_status status;
	struct vssd_hints hints;
	struct vssd_disk disk;
	int cost = 0, i, rc;

	while (argc > 3 && cost < 4 && strcmp(argv[3], words[cost]))
		cost++;
	if (argc < 6 || argc % 2 || cost == 4) {
		fprintf(stderr, "usage: give_blocks DISK PROGRAM COST START COUNT [START COUNT]...\n");
		return 2;
	}
	if (vssd_open(&disk, name) || vssd_get_status(&disk, &status))
		return fail(name);
	if (vssd_hints_withdraw(NULL, name, program))
		return fail(program);
	fprintf(stderr, "%" PRIu32 " blocks of %" PRIu32 " bytes\n", status.total_blocks, status.block_size);

	if (wait_until(&disk, true))
		return fail("wait for the host to ask");
	if (vssd_hints_begin(&hints, NULL, name, program))
		return fail(program);
	vssd_hints_cost(&hints, (enum vssd_cost)cost);
	for (i = 4; i < argc; i += 2) {
		uint32_t start, count;

		if (number(argv[i], &start) || number(argv[i + 1], &count)) {
			vssd_hints_abandon(&hints);
			fprintf(stderr, "give_blocks: %s %s is no range\n", argv[i], argv[i + 1]);
			return 2;
		}
		vssd_hints_add(&hints, start, count);
	}
	if (vssd_hints_publish(&hints))
		return fail("publish");
	rc = wait_until(&disk, false);
	if (vssd_hints_withdraw(NULL, name, program))
		return fail("withdraw");
	if (rc)
		return fail("wait for the blocks to go");
	if (vssd_each_evicted(&disk, print, NULL))
		return fail("evicted");
	vssd_close(&disk);
	return EXIT_SUCCESS;
}
