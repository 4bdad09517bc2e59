/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * For C programs in a guest that keep something on a vSSD: what the host asks, which blocks have
 * gone, and hints which may go next. The same as the Rust library vssd-client; its README has the
 * contract in full. In short:
 *
 *	What is in a hint file may go at any time from then on. So a program forgets a block before
 *	it hints it, or copes with what evicted blocks answer: ENODATA for reads and ENOSPC for
 *	writes with O_DIRECT, and zeroes once a block has come back. A hint cannot be taken back
 *	for certain, for the agent may have read it already.
 *
 *	struct vssd_disk disk;
 *	struct vssd_request asks;
 *	struct vssd_hints hints;
 *
 *	if (vssd_open(&disk, "vssda"))
 *		err(1, "vssda");
 *	vssd_hints_withdraw(NULL, disk.name, "mycache");	what an earlier run had hinted
 *	while (vssd_wait_request(&disk, -1, &asks) > 0) {
 *		if (!asks.to_give_blocks) {
 *			vssd_hints_withdraw(NULL, disk.name, "mycache");
 *			continue;				vssd_each_evicted() tells what went
 *		}
 *		if (enough is hinted already)			news come also as blocks go
 *			continue;
 *		if (vssd_hints_begin(&hints, NULL, disk.name, "mycache"))
 *			err(1, "hints");
 *		vssd_hints_cost(&hints, VSSD_CLEAN_COLD);
 *		...					the most expendable first:
 *		vssd_hints_add(&hints, start, count);
 *		if (vssd_hints_publish(&hints))
 *			err(1, "hints");
 *	}
 *
 * Functions give 0, or -1 with errno set, unless they say otherwise. Nothing here is global, so
 * threads may use different structures at once. One structure is one thread's at a time.
 *
 * Needs POSIX.1-2008: include this file first, or define _POSIX_C_SOURCE as 200809L or _GNU_SOURCE
 * before any other.
 */
#ifndef VSSD_HINTS_H
#define VSSD_HINTS_H

#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Where the driver's files are. */
#ifndef VSSD_PROC
#define VSSD_PROC "/proc/vssd"
#endif
/* Where the agent looks for hints unless it is configured otherwise: a directory a disk. */
#ifndef VSSD_HINTS
#define VSSD_HINTS "/run/vssd-agent/hints"
#endif

#define VSSD_NAME_LEN 100		/* of a disk's or program's name, at most */
#define VSSD_PATH_LEN 512
#define VSSD_HINTS_MOST (4L << 20)	/* bytes of a hint file, at most */

/* A vSSD of this guest. While root has it open, the driver waits a moment for hints. */
struct vssd_disk {
	char name[VSSD_NAME_LEN + 1];
	int request;			/* may be polled for POLLPRI */
};

/* What the driver knows. */
struct vssd_status {
	uint32_t block_size;		/* bytes, a power of two */
	uint32_t total_blocks;		/* at its largest */
	uint32_t requested_blocks;	/* that the host would like the guest to hold */
	uint32_t plugged_blocks;	/* that the guest holds */
	uint32_t evicted_blocks;	/* that are gone */
};

/* What the host asks. */
struct vssd_request {
	uint64_t seq;			/* number of its newest news */
	uint32_t requested_blocks;
	uint32_t plugged_blocks;
	uint32_t to_give_blocks;	/* still to go; 0: it asks for nothing */
	uint32_t deadline_ms;		/* time that is left; 0: no limit */
	char reason[32];
};

/* What it costs the guest to lose blocks, the cheapest first. */
enum vssd_cost {
	VSSD_FREE,			/* nothing: there is nothing in them */
	VSSD_CLEAN_COLD,		/* copies, not asked for lately; the default */
	VSSD_CLEAN_HOT,			/* copies, in use */
	VSSD_DIRTY,			/* must be written elsewhere first, and will be */
};

/* Hints on their way into a file. */
struct vssd_hints {
	FILE *file;
	char path[VSSD_PATH_LEN];
	char aside[VSSD_PATH_LEN];
};

/* ---- details ---- */

static inline int vssd_fail_(int error)
{
	errno = error;
	return -1;
}

static inline bool vssd_is_name_(const char *name)
{
	static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
	size_t len = strlen(name);

	return len && len <= VSSD_NAME_LEN && name[0] != '.' && strspn(name, plain) == len;
}

/* The number behind "<key> " at the beginning of a line. */
static inline bool vssd_number_(const char *text, const char *key, uint64_t *number)
{
	size_t len = strlen(key);

	while (text && *text) {
		if (!strncmp(text, key, len) && text[len] == ' ')
			return sscanf(text + len, "%" SCNu64, number) == 1;
		text = strchr(text, '\n');
		if (text)
			text++;
	}
	return false;
}

static inline bool vssd_number32_(const char *text, const char *key, uint32_t *number)
{
	uint64_t wide;

	if (!vssd_number_(text, key, &wide) || wide > UINT32_MAX)
		return false;
	*number = (uint32_t)wide;
	return true;
}

static inline int vssd_proc_path_(char *path, const char *disk, const char *file)
{
	int len = snprintf(path, VSSD_PATH_LEN, "%s/%s/%s", VSSD_PROC, disk, file);

	return len > 0 && len < VSSD_PATH_LEN ? 0 : vssd_fail_(ENAMETOOLONG);
}

/* Reads a small file from its beginning, as text. */
static inline int vssd_read_(int fd, char *text, size_t size)
{
	size_t len = 0;
	ssize_t n;

	do {
		n = pread(fd, text + len, size - 1 - len, (off_t)len);
		if (n > 0)
			len += (size_t)n;
	} while ((n > 0 && len < size - 1) || (n < 0 && errno == EINTR));
	text[len] = '\0';
	return n < 0 ? -1 : 0;
}

/* ---- the disk ---- */

/* Opens the vSSD called @name ("vssda"). EINVAL: that is no name; ENOENT: there is no such vSSD. */
static inline int vssd_open(struct vssd_disk *disk, const char *name)
{
	char path[VSSD_PATH_LEN];

	if (!vssd_is_name_(name))
		return vssd_fail_(EINVAL);
	if (vssd_proc_path_(path, name, "request"))
		return -1;
	memcpy(disk->name, name, strlen(name) + 1);
	disk->request = open(path, O_RDONLY | O_CLOEXEC);
	return disk->request < 0 ? -1 : 0;
}

static inline void vssd_close(struct vssd_disk *disk)
{
	close(disk->request);
	disk->request = -1;
}

/* What the driver knows. EPROTO: it is not understood. */
static inline int vssd_get_status(const struct vssd_disk *disk, struct vssd_status *status)
{
	char path[VSSD_PATH_LEN], text[4096];
	int fd, rc, error;

	if (vssd_proc_path_(path, disk->name, "status"))
		return -1;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	rc = vssd_read_(fd, text, sizeof(text));
	error = errno;
	close(fd);
	if (rc)
		return vssd_fail_(error);
	if (!vssd_number32_(text, "block_size", &status->block_size) ||
	    !vssd_number32_(text, "total_blocks", &status->total_blocks) ||
	    !vssd_number32_(text, "requested_blocks", &status->requested_blocks) ||
	    !vssd_number32_(text, "plugged_blocks", &status->plugged_blocks) ||
	    !vssd_number32_(text, "evicted_blocks", &status->evicted_blocks))
		return vssd_fail_(EPROTO);
	return 0;
}

/* What the host asks now. What changes from here on ends a wait. EPROTO: it is not understood. */
static inline int vssd_get_request(const struct vssd_disk *disk, struct vssd_request *asks)
{
	char text[512];
	const char *reason;

	if (vssd_read_(disk->request, text, sizeof(text)))
		return -1;
	if (!vssd_number_(text, "seq", &asks->seq) ||
	    !vssd_number32_(text, "requested_blocks", &asks->requested_blocks) ||
	    !vssd_number32_(text, "plugged_blocks", &asks->plugged_blocks) ||
	    !vssd_number32_(text, "to_give_blocks", &asks->to_give_blocks) ||
	    !vssd_number32_(text, "deadline_ms", &asks->deadline_ms))
		return vssd_fail_(EPROTO);
	reason = strstr(text, "\nreason ");
	if (!reason || sscanf(reason, " reason %31s", asks->reason) != 1)
		return vssd_fail_(EPROTO);
	return 0;
}

/*
 * Waits up to @timeout_ms (-1: for ever) for news: what the host asks, or that blocks have gone or
 * come. The first call returns at once.
 *
 * Return: 1 and what the host asks, 0 when no news came in time, or -1.
 */
static inline int vssd_wait_request(const struct vssd_disk *disk, int timeout_ms,
				    struct vssd_request *asks)
{
	struct pollfd fd = { .fd = disk->request, .events = POLLPRI };
	int ready = poll(&fd, 1, timeout_ms);

	if (ready < 0)
		return -1;
	if (!ready)
		return 0;
	return vssd_get_request(disk, asks) ? -1 : 1;
}

/*
 * Calls @each for the ranges of blocks that are gone, in ascending order. If @each gives anything
 * but 0, that ends the walk.
 *
 * Return: 0, what @each gave, or -1.
 */
static inline int vssd_each_evicted(const struct vssd_disk *disk,
				    int (*each)(void *context, uint32_t start, uint32_t count),
				    void *context)
{
	char path[VSSD_PATH_LEN];
	uint32_t start, count;
	FILE *file;
	int rc = 0, n;

	if (vssd_proc_path_(path, disk->name, "evicted"))
		return -1;
	file = fopen(path, "re");
	if (!file)
		return -1;
	while (!rc && (n = fscanf(file, "%" SCNu32 " %" SCNu32, &start, &count)) != EOF)
		rc = n == 2 ? each(context, start, count) : vssd_fail_(EPROTO);
	if (!rc && ferror(file))
		rc = -1;
	n = errno;
	fclose(file);
	errno = n;
	return rc;
}

/* ---- hints ---- */

/* The paths of a hint file and of what is written before it becomes that. @dir: NULL for VSSD_HINTS. */
static inline int vssd_hints_paths_(struct vssd_hints *hints, const char *dir, const char *disk,
				    const char *program)
{
	int path, aside;

	if (!vssd_is_name_(disk) || !vssd_is_name_(program))
		return vssd_fail_(EINVAL);
	if (!dir)
		dir = VSSD_HINTS;
	path = snprintf(hints->path, VSSD_PATH_LEN, "%s/%s/%s", dir, disk, program);
	/* The agent passes over names that begin with a dot. */
	aside = snprintf(hints->aside, VSSD_PATH_LEN, "%s/%s/.%s.%ld", dir, disk, program, (long)getpid());
	if (path < 0 || path >= VSSD_PATH_LEN || aside < 0 || aside >= VSSD_PATH_LEN)
		return vssd_fail_(ENAMETOOLONG);
	return 0;
}

/*
 * Begins new hints of @program for @disk. Nobody sees them before vssd_hints_publish(). @dir: the
 * agent's "hints" setting, NULL for the usual one.
 *
 * ENOENT: there is no agent that looks for hints for this disk. EACCES: this program may not write
 * there. EINVAL: a name has other than up to 100 letters, digits, '-', '_', '.', or begins with '.'.
 */
static inline int vssd_hints_begin(struct vssd_hints *hints, const char *dir, const char *disk,
				   const char *program)
{
	int fd, error;

	hints->file = NULL;
	if (vssd_hints_paths_(hints, dir, disk, program))
		return -1;
	/* What has the name is a left-over, or was put there to be written through. */
	if (unlink(hints->aside) && errno != ENOENT)
		return -1;
	fd = open(hints->aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd < 0)
		return -1;
	hints->file = fdopen(fd, "w");
	if (hints->file)
		return 0;
	error = errno;
	close(fd);
	unlink(hints->aside);
	return vssd_fail_(error);
}

/* What the blocks that are added from here on cost to lose. */
static inline void vssd_hints_cost(struct vssd_hints *hints, enum vssd_cost cost)
{
	static const char *const words[] = { "free", "clean-cold", "clean-hot", "dirty" };

	fprintf(hints->file, "cost %s\n", words[cost]);
}

/* Adds blocks that are less expendable than all before. A block keeps its first place. */
static inline void vssd_hints_add(struct vssd_hints *hints, uint32_t start, uint32_t count)
{
	if (count)
		fprintf(hints->file, "%" PRIu32 " %" PRIu32 "\n", start, count);
}

/*
 * Says that so many blocks more than now would be of use. The agent asks the host for them, and
 * again after a minute if they do not come. Leave it out of the next hints when they have.
 */
static inline void vssd_hints_want(struct vssd_hints *hints, uint32_t blocks)
{
	fprintf(hints->file, "want %" PRIu32 "\n", blocks);
}

/* Forgets hints that were begun. Those published before stay. */
static inline void vssd_hints_abandon(struct vssd_hints *hints)
{
	if (hints->file) {
		fclose(hints->file);
		unlink(hints->aside);
	}
	hints->file = NULL;
}

/*
 * Puts the hints in the place of those before. From now on what they name may go. After an error
 * those before stay, and the new ones are forgotten. EFBIG: the agent would not read so many.
 */
static inline int vssd_hints_publish(struct vssd_hints *hints)
{
	bool failed = fflush(hints->file) || ferror(hints->file);
	int error = errno;
	long len = ftell(hints->file);

	if (!failed && len > VSSD_HINTS_MOST) {
		failed = true;
		error = EFBIG;
	}
	if (fclose(hints->file) && !failed) {
		failed = true;
		error = errno;
	}
	hints->file = NULL;
	if (!failed && !rename(hints->aside, hints->path))
		return 0;
	if (!failed)
		error = errno;
	unlink(hints->aside);
	return vssd_fail_(error);
}

/*
 * Takes all hints of @program for @disk back, also those of an earlier run, which a program does
 * before it first uses the disk. The agent may have read them just before.
 */
static inline int vssd_hints_withdraw(const char *dir, const char *disk, const char *program)
{
	struct vssd_hints hints;

	if (vssd_hints_paths_(&hints, dir, disk, program))
		return -1;
	return unlink(hints.path) && errno != ENOENT ? -1 : 0;
}

#endif
