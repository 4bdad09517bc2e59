// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Giving blocks up: which ones, and how.
 *
 * The way of a block that is given up:
 *
 *	clean	write back and drop its cached pages, I/O goes on
 *	fence	new I/O to it is parked
 *	drain	wait for the I/O in flight
 *	check	no page came back, nothing was written to one chosen as empty; else lift the fence
 *	UNPLUG	the device decides
 *	settle	evicted, or lift the fence. Parked I/O is looked at again.
 *
 * Local state changes only after the device answered. Between fence and settle nothing allocates
 * memory that could wait for this disk.
 */
#include <linux/bitmap.h>
#include <linux/blkdev.h>
#include <linux/jiffies.h>
#include <linux/sched/mm.h>

#include "vssd.h"

/* Passes that found blocks busy before the host is told. */
#define VSSD_BUSY_PASSES	3

enum vssd_stage {
	VSSD_STAGE_HINTS,
	VSSD_STAGE_EMPTY,
	VSSD_STAGE_COLD,
	VSSD_STAGE_END,
};

/* One walk through everything that could be given up. */
struct vssd_pass {
	enum vssd_stage stage;
	u32 generation;			/* of the hints in the batch */
	bool empty_known;		/* vssd->scratch holds the empty blocks */
	u32 empty_end;			/* those from here on were looked at */
	u32 given;			/* blocks */
	u32 busy;			/* blocks whose pages could not be dropped */
	u32 refused;			/* blocks the device does not take now */
	u32 deferred;			/* blocks that did not fit the message */
};

static bool vssd_in_use(const struct vssd *vssd)
{
	/* Whoever claims a partition claims the whole disk with it. */
	return READ_ONCE(vssd->disk->part0->bd_holder);
}

/*
 * Asks the device for blocks that hold no data: vssd->scratch. A write that is under way when the
 * device answers must not be missed, so all writes are noted from before the question on, and
 * vssd_check() looks again.
 */
static int vssd_find_empty(struct vssd *vssd)
{
	struct vssd_state_page page = { .next = 0 };
	struct vssd_news news;
	struct vssd_span span;
	int err;

	vssd_blocks_forget_writes(&vssd->blocks);
	err = vssd_blk_drain(vssd);
	if (err)
		return err;
	bitmap_zero(vssd->scratch, vssd->blocks.total);
	do {
		if (vssd_interrupted(vssd))
			return -EAGAIN;
		err = vssd_chan_state(vssd, VSSD_STATE_F_EMPTY, page.next, &page, &news);
		if (err)
			return err;
		while ((err = vssd_chan_next_range(vssd, &page, &span)) > 0)
			bitmap_set(vssd->scratch, span.start, span.count);
		if (err)
			return err;
	} while (page.next < vssd->blocks.total);
	return 0;
}

/*
 * Chooses empty blocks, the highest first: the beginning of a disk is what is used first, and a
 * driver that does not know vSSDs can use it up to its highest plugged block.
 */
static int vssd_pick_empty(struct vssd *vssd, struct vssd_pass *pass, u32 need, bool only_blank)
{
	struct vssd_span *batch = vssd->batch;
	unsigned long i;
	u32 n = 0;
	int err;

	if (!pass->empty_known) {
		err = vssd_find_empty(vssd);
		if (err)
			return err;
		pass->empty_known = true;
		pass->empty_end = vssd->blocks.total;
		/*
		 * Where something was written, blocks that nobody wrote to may be needed all the
		 * same: a file system that finds its log empty reads zeroes, not errors.
		 */
		if (only_blank &&
		    bitmap_weight(vssd->scratch, vssd->blocks.total) != vssd_plugged(vssd))
			pass->empty_end = 0;
	}
	while (need && pass->empty_end) {
		i = find_last_bit(vssd->scratch, pass->empty_end);
		if (i >= pass->empty_end) {
			pass->empty_end = 0;
			break;
		}
		if (test_bit(i, vssd->blocks.blocked) || test_bit(i, vssd->blocks.written) ||
		    test_bit(i, vssd->hints.queued)) {
			pass->empty_end = i;
			continue;
		}
		if (n && batch[n - 1].start == i + 1) {
			batch[n - 1].start = i;
			batch[n - 1].count++;
		} else if (n < vssd->max_ranges) {
			batch[n++] = (struct vssd_span) { i, 1 };
		} else {
			break;
		}
		pass->empty_end = i;
		need--;
	}
	return n;
}

/* What user space said of the newest news; no reason if it may still bring hints. */
static struct vssd_verdict vssd_last_verdict(struct vssd *vssd)
{
	struct vssd_verdict verdict;

	mutex_lock(&vssd->pull_lock);
	verdict = vssd->verdict;
	mutex_unlock(&vssd->pull_lock);
	return verdict.seq == vssd->seq_heard ? verdict : (struct vssd_verdict) {};
}

/*
 * Fills the batch with blocks of one stage, and goes to the next stage when one has no more.
 *
 * Return: number of spans, 0 at the end, -EINPROGRESS when an agent may still bring hints, or an
 * error.
 */
static int vssd_pick(struct vssd *vssd, struct vssd_pass *pass, u32 need)
{
	enum vssd_nominate nominate = READ_ONCE(vssd->nominate);
	bool more_hints = !vssd_last_verdict(vssd).reason;
	int n = 0;

	/*
	 * A file system may write to any free block, and there may be one on a disk that is not in
	 * use just now: who has said that there are no more hints knows better.
	 */
	if (vssd_in_use(vssd) || !more_hints)
		nominate = VSSD_NOMINATE_HINTS;

	for (; pass->stage < VSSD_STAGE_END; pass->stage++) {
		switch (pass->stage) {
		case VSSD_STAGE_HINTS:
			n = vssd_hints_take(&vssd->hints, need, vssd->blocks.evicted, vssd->batch,
					    vssd->max_ranges, &pass->generation);
			if (!n && more_hints && atomic_read(&vssd->agents) &&
			    time_before(jiffies, vssd->hint_deadline))
				return -EINPROGRESS;
			break;
		case VSSD_STAGE_EMPTY:
			if (nominate >= VSSD_NOMINATE_BLANK)
				n = vssd_pick_empty(vssd, pass, need,
						    nominate == VSSD_NOMINATE_BLANK);
			break;
		case VSSD_STAGE_COLD:
			if (nominate >= VSSD_NOMINATE_COLD)
				n = vssd_blocks_coldest(&vssd->blocks, need, vssd->hints.queued,
							vssd->batch, vssd->max_ranges);
			break;
		default:
			break;
		}
		if (n)
			return n;
	}
	return 0;
}

/* A block of the batch stays plugged. */
static void vssd_keep(struct vssd *vssd, struct vssd_pass *pass, const struct vssd_span *span)
{
	vssd_blocks_unfence(&vssd->blocks, span);
	if (pass->stage == VSSD_STAGE_HINTS)
		vssd_hints_set_aside(&vssd->hints, span, pass->generation);
	else
		vssd_blocks_note_use(&vssd->blocks, span->start, span->start + span->count - 1,
				     false);
}

/* Whether fenced blocks may go. */
static bool vssd_check(struct vssd *vssd, const struct vssd_pass *pass,
		       const struct vssd_span *span)
{
	unsigned long end = (unsigned long)span->start + span->count;

	if (pass->stage == VSSD_STAGE_EMPTY &&
	    find_next_bit(vssd->blocks.written, end, span->start) < end)
		return false;
	return vssd_cache_drop(vssd, span);
}

/*
 * Sorts the fenced batch: what may go is collected in vssd->unplug, of the rest the fence is
 * lifted. A span that may not go as a whole is looked at block by block.
 *
 * Return: number of spans in vssd->unplug.
 */
static u32 vssd_sort(struct vssd *vssd, struct vssd_pass *pass, u32 n)
{
	struct vssd_span *unplug = vssd->unplug;
	u32 i, m = 0;

	for (i = 0; i < n; i++) {
		struct vssd_span *span = &vssd->batch[i];
		struct vssd_span one = { span->start, 1 };

		if (m < vssd->max_ranges && vssd_check(vssd, pass, span)) {
			unplug[m++] = *span;
			continue;
		}
		vssd->counters.busy_ranges++;
		for (; one.start < span->start + span->count; one.start++) {
			if (m && unplug[m - 1].start + unplug[m - 1].count == one.start &&
			    vssd_check(vssd, pass, &one)) {
				unplug[m - 1].count++;
			} else if (m == vssd->max_ranges) {
				vssd_keep(vssd, pass, &one);
				pass->deferred++;
			} else if (vssd_check(vssd, pass, &one)) {
				unplug[m++] = one;
			} else {
				vssd_keep(vssd, pass, &one);
				pass->busy++;
			}
		}
	}
	return m;
}

static int vssd_unplug(struct vssd *vssd, struct vssd_pass *pass, u32 m)
{
	const u8 *status = NULL;
	struct vssd_news news;
	int err;
	u32 i;

	err = vssd_chan_change(vssd, VSSD_T_UNPLUG, vssd->unplug, m, &status, &news);
	vssd->counters.unplug_ranges += m;
	for (i = 0; i < m; i++) {
		const struct vssd_span *span = &vssd->unplug[i];

		/* Whatever happened to it without an answer, the device is asked again. */
		switch (err ? VSSD_R_BUSY : READ_ONCE(status[i])) {
		case VSSD_R_OK:
		case VSSD_R_ALREADY:
			vssd_blocks_set_evicted(&vssd->blocks, span);
			if (pass->stage == VSSD_STAGE_HINTS)
				vssd_hints_done(&vssd->hints, span, pass->generation);
			pass->given += span->count;
			vssd->counters.unplugged_blocks += span->count;
			break;
		case VSSD_R_BUSY:
		case VSSD_R_PROTECTED:
			vssd_keep(vssd, pass, span);
			pass->refused += span->count;
			vssd->counters.refused_ranges++;
			break;
		default:
			vssd_keep(vssd, pass, span);
			err = -EPROTO;
			break;
		}
	}
	if (!err)
		vssd_adopt(vssd, &news);
	return err;
}

/* Gives up @n spans of vssd->batch, as far as that is possible. */
static int vssd_give(struct vssd *vssd, struct vssd_pass *pass, u32 n)
{
	unsigned int noio;
	int err = 0;
	u32 i, m;

	for (i = 0; i < n && !err; i++) {
		vssd_cache_clean(vssd, &vssd->batch[i]);
		if (vssd_interrupted(vssd))
			err = -EAGAIN;
	}
	noio = memalloc_noio_save();
	if (!err) {
		for (i = 0; i < n; i++)
			vssd_blocks_fence(&vssd->blocks, &vssd->batch[i]);
		err = vssd_blk_drain(vssd);
	}
	if (err) {
		for (i = 0; i < n; i++)
			vssd_keep(vssd, pass, &vssd->batch[i]);
	} else {
		m = vssd_sort(vssd, pass, n);
		if (m)
			err = vssd_unplug(vssd, pass, m);
	}
	vssd_blk_release_parked(vssd);
	memalloc_noio_restore(noio);
	if (pass->stage == VSSD_STAGE_HINTS)
		vssd_hints_settled(&vssd->hints);
	return err;
}

/* Whether the newest news was declined. */
static bool vssd_declined(const struct vssd *vssd)
{
	return vssd->declined && vssd->declined_seq == vssd->seq_heard;
}

static int vssd_decline(struct vssd *vssd, const struct vssd_pass *pass)
{
	u32 could_give = pass->busy + pass->refused, reason;
	struct vssd_verdict verdict = vssd_last_verdict(vssd);
	struct vssd_news news;
	int err;

	if (vssd_declined(vssd))
		return 0;
	could_give = min_t(u64, (u64)could_give + verdict.could_give, vssd_plugged(vssd));
	if (verdict.reason)
		reason = verdict.reason;
	else if (could_give)
		reason = VSSD_DECLINE_BUSY;
	else if (READ_ONCE(vssd->nominate) == VSSD_NOMINATE_HINTS || vssd_in_use(vssd))
		reason = VSSD_DECLINE_POLICY;
	else
		reason = VSSD_DECLINE_NOTHING;

	vssd->declined = true;
	vssd->declined_seq = vssd->seq_heard;
	err = vssd_chan_decline(vssd, vssd->declined_seq, could_give, reason, &news);
	if (err == -EINVAL || err == -ETXTBSY)
		return 0;
	if (err)
		return err;
	vssd->counters.declines++;
	vssd_adopt(vssd, &news);
	vssd_uevent(vssd, "declined");
	return 0;
}

/**
 * vssd_shrink - give blocks up until the requested size is reached or no more can go
 * @vssd: the disk
 *
 * Context: work item.
 * Return: 0 when it is reached, or declined with nothing to wait for. -EAGAIN: news came.
 * -EINPROGRESS: hints may come. -EBUSY, -ETXTBSY: later. Else an error of the channel.
 */
int vssd_shrink(struct vssd *vssd)
{
	struct vssd_pass pass = {};
	int rc = 0, err;
	u32 before;

	/* While only the backstop asks again, the answer stands. */
	if (vssd->state != VSSD_DECLINED || !vssd_declined(vssd))
		vssd_set_state(vssd, VSSD_SHRINKING);
	while (vssd_plugged(vssd) > vssd->requested) {
		rc = vssd_interrupted(vssd) ? -EAGAIN :
		     vssd_pick(vssd, &pass, vssd_plugged(vssd) - vssd->requested);
		if (rc <= 0)
			break;
		before = pass.given;
		rc = vssd_give(vssd, &pass, rc);
		if (rc)
			break;
		/* The other stages do not come to the same blocks twice. */
		if (pass.stage == VSSD_STAGE_COLD && pass.given == before)
			pass.stage = VSSD_STAGE_END;
	}
	vssd_hints_rewind(&vssd->hints);
	if (pass.given) {
		vssd->busy_passes = 0;
		vssd_notify(vssd);
	}
	if (rc || vssd_plugged(vssd) <= vssd->requested)
		return rc;

	/* All that could go went. */
	if (pass.deferred && pass.given)
		return -EAGAIN;
	if (pass.refused)
		rc = -ETXTBSY;
	else if (pass.busy || pass.deferred)
		rc = -EBUSY;
	if (rc && vssd->busy_passes++ < VSSD_BUSY_PASSES)
		return rc;
	err = vssd_decline(vssd, &pass);
	if (err)
		return err;
	vssd_set_state(vssd, VSSD_DECLINED);
	return rc;
}
