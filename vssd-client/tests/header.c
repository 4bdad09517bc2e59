/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Uses the header on files that c_header.rs made: header HINTS-DIRECTORY */
#include "vssd_hints.h"

#include <stdlib.h>

#define CHECK(what)                                                                              \
	do {                                                                                     \
		if (!(what)) {                                                                   \
			fprintf(stderr, "line %d: %s: %s\n", __LINE__, #what, strerror(errno));  \
			exit(1);                                                                 \
		}                                                                                \
	} while (0)

static int add(void *context, uint32_t start, uint32_t count)
{
	uint64_t *sum = context;

	*sum = *sum * 1000 + start * 10 + count;
	return start == 40 ? 7 : 0;
}

int main(int argc, char **argv)
{
	char longest[VSSD_NAME_LEN + 2];
	struct vssd_request asks;
	struct vssd_status status;
	struct vssd_hints hints;
	struct vssd_disk disk, odd;
	uint64_t sum = 0;
	uint32_t block;
	const char *dir;

	CHECK(argc == 2);
	dir = argv[1];
	CHECK(vssd_open(&disk, "..") == -1 && errno == EINVAL);
	CHECK(vssd_open(&disk, "vssdz") == -1 && errno == ENOENT);
	CHECK(!vssd_open(&disk, "vssda"));
	CHECK(!vssd_get_status(&disk, &status));
	CHECK(status.block_size == 65536 && status.total_blocks == 512 && status.requested_blocks == 100);
	CHECK(status.plugged_blocks == 400 && status.evicted_blocks == 112);
	CHECK(!vssd_get_request(&disk, &asks));
	CHECK(asks.seq == 12345678901234 && asks.to_give_blocks == 300 && asks.deadline_ms == 250);
	CHECK(asks.requested_blocks == 100 && asks.plugged_blocks == 400 && !strcmp(asks.reason, "operator"));
	/* An ordinary file never has news. */
	CHECK(vssd_wait_request(&disk, 1, &asks) == 0);
	CHECK(vssd_each_evicted(&disk, add, &sum) == 7 && sum == 32402);

	CHECK(!vssd_open(&odd, "vssdb"));
	CHECK(vssd_get_status(&odd, &status) == -1 && errno == EPROTO);
	CHECK(vssd_get_request(&odd, &asks) == -1 && errno == EPROTO);
	CHECK(vssd_each_evicted(&odd, add, &sum) == -1 && errno == EPROTO);
	vssd_close(&odd);

	memset(longest, 'x', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = '\0';
	CHECK(vssd_hints_begin(&hints, dir, "vssda", longest) == -1 && errno == EINVAL);
	CHECK(vssd_hints_begin(&hints, dir, "vssda", ".c") == -1 && errno == EINVAL);
	CHECK(vssd_hints_begin(&hints, dir, "vssda", "a/b") == -1 && errno == EINVAL);
	CHECK(vssd_hints_begin(&hints, dir, "vssdz", "c") == -1 && errno == ENOENT);

	CHECK(!vssd_hints_withdraw(dir, "vssda", "c"));
	CHECK(!vssd_hints_begin(&hints, dir, "vssda", "c"));
	vssd_hints_add(&hints, 7, 2);
	vssd_hints_add(&hints, 9, 0);
	vssd_hints_cost(&hints, VSSD_FREE);
	vssd_hints_add(&hints, 100, 4);
	vssd_hints_cost(&hints, VSSD_CLEAN_HOT);
	vssd_hints_add(&hints, 0, 1);
	vssd_hints_cost(&hints, VSSD_DIRTY);
	vssd_hints_add(&hints, 1, 1);
	vssd_hints_cost(&hints, VSSD_CLEAN_COLD);
	vssd_hints_add(&hints, 2, 1);
	vssd_hints_want(&hints, 64);
	CHECK(!vssd_hints_publish(&hints));

	/* None of these replaces what was published. */
	CHECK(!vssd_hints_begin(&hints, dir, "vssda", "c"));
	vssd_hints_add(&hints, 500, 1);
	vssd_hints_abandon(&hints);
	vssd_hints_abandon(&hints);
	CHECK(!vssd_hints_begin(&hints, dir, "vssda", "c"));
	for (block = 1000000; block < 1600000; block++)
		vssd_hints_add(&hints, block, 1);
	CHECK(vssd_hints_publish(&hints) == -1 && errno == EFBIG);

	CHECK(!vssd_hints_begin(&hints, dir, "vssda", "gone"));
	CHECK(!vssd_hints_publish(&hints));
	CHECK(!vssd_hints_withdraw(dir, "vssda", "gone"));
	vssd_close(&disk);
	return 0;
}
