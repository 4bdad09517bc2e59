// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Convergence: the work item that brings plugged_blocks to requested_blocks.
 *
 * It is level-triggered. Whatever happened, each round asks the same questions: is there a
 * session, is there news, which way is the target? A pass over many blocks is given up at the
 * next message when there is news, so that a shrink ends as soon as the host no longer wants it.
 *
 * Ends of a round, see vssd_resize_work(): done, again at once, again after a back-off that
 * doubles, or broken, when the device breaks the protocol. A broken device still does I/O.
 */
#include <linux/bitmap.h>
#include <linux/blkdev.h>
#include <linux/crash_dump.h>
#include <linux/jiffies.h>

#include "vssd.h"
#include "vssd_compat.h"

#define VSSD_BACKOFF_FIRST_MS	50
#define VSSD_BACKOFF_LAST_MS	(60 * 1000)
#define VSSD_POLL_INTERVAL	(10 * HZ)
#define VSSD_POLLS_PER_AGEING	360

/* A WAIT that comes back at once is not sent again sooner than this. */
#define VSSD_WAIT_INTERVAL	msecs_to_jiffies(20)

/* Longest range of PLUG: it stands or falls whole. */
#define VSSD_PLUG_BLOCKS	4096

#define VSSD_RESYNC_TRIES	3
#define VSSD_RESYNC_INTERVAL	msecs_to_jiffies(50)

/* Failed writes are collected for so long: their pages are still under writeback when they fail. */
#define VSSD_TIDY_DELAY		msecs_to_jiffies(100)

void vssd_resize_kick(struct vssd *vssd)
{
	if (vssd->live && !vssd_stopping(vssd))
		queue_work(vssd->wq, &vssd->work);
}

/* Wakes the work item, of several wishes at the earliest. Context: work item. */
static void vssd_retry_in(struct vssd *vssd, unsigned long delay)
{
	unsigned long at = jiffies + delay;

	if (vssd_stopping(vssd) ||
	    (delayed_work_pending(&vssd->retry) && time_after_eq(at, vssd->retry_at)))
		return;
	vssd->retry_at = at;
	mod_delayed_work(vssd->wq, &vssd->retry, delay);
}

/* Something to hear before more blocks are moved. */
bool vssd_interrupted(const struct vssd *vssd)
{
	return READ_ONCE(vssd->wait.done) || vssd_stopping(vssd);
}

void vssd_set_state(struct vssd *vssd, enum vssd_state state)
{
	if (vssd->state == state)
		return;
	WRITE_ONCE(vssd->state, state);
	vssd_notify(vssd);
}

/* ---- what the device says ---- */

static void vssd_reset_backoff(struct vssd *vssd)
{
	vssd->backoff_ms = 0;
	vssd->busy_passes = 0;
	vssd->hint_deadline = jiffies + msecs_to_jiffies(READ_ONCE(vssd->hint_wait_ms));
}

/*
 * Takes over the sizes that come with each answer. If the device counts other than we do, the host
 * took blocks by force, and the plugged set is read again.
 */
void vssd_adopt(struct vssd *vssd, const struct vssd_news *news)
{
	/* Answers can overtake each other: an older one would bring an old target back. */
	if (news->seq < vssd->seq_heard)
		return;
	if (news->plugged != vssd->blocks.total - vssd->blocks.nr_evicted)
		set_bit(VSSD_F_RESYNC, &vssd->flags);
	if (news->seq > vssd->seq_heard)
		WRITE_ONCE(vssd->seq_heard, news->seq);
	if (news->requested == vssd->requested)
		return;
	WRITE_ONCE(vssd->requested, news->requested);
	vssd_reset_backoff(vssd);
	vssd_notify(vssd);
	if (news->requested < vssd_plugged(vssd))
		vssd_uevent(vssd, "shrink-request");
}

/* Asks for the sizes only. */
static int vssd_poll(struct vssd *vssd)
{
	struct vssd_state_page page;
	struct vssd_news news;
	int err;

	err = vssd_chan_state(vssd, 0, vssd->blocks.total, &page, &news);
	if (!err)
		vssd_adopt(vssd, &news);
	return err;
}

static int vssd_read_set(struct vssd *vssd, struct vssd_news *news)
{
	struct vssd_state_page page = { .next = 0 };
	struct vssd_span span;
	int err;

	bitmap_fill(vssd->scratch, vssd->blocks.total);
	do {
		err = vssd_chan_state(vssd, 0, page.next, &page, news);
		if (err)
			return err;
		while ((err = vssd_chan_next_range(vssd, &page, &span)) > 0)
			bitmap_clear(vssd->scratch, span.start, span.count);
		if (err)
			return err;
	} while (page.next < vssd->blocks.total);
	if (bitmap_weight(vssd->scratch, vssd->blocks.total) != vssd->blocks.total - news->plugged)
		return -ETXTBSY;
	return 0;
}

/**
 * vssd_resync - read the plugged set again
 * @vssd: the disk; nothing is fenced
 *
 * Context: probe or work item.
 */
int vssd_resync(struct vssd *vssd)
{
	struct vssd_news news;
	int err, tries = VSSD_RESYNC_TRIES;
	bool taken;

	clear_bit(VSSD_F_RESYNC, &vssd->flags);
	/* The host may take more while the pages of the list are read. */
	do {
		err = vssd_read_set(vssd, &news);
	} while (err == -ETXTBSY && --tries);
	if (err) {
		set_bit(VSSD_F_RESYNC, &vssd->flags);
		return err;
	}
	taken = vssd_blocks_replace(&vssd->blocks, vssd->scratch);
	vssd->counters.resyncs++;
	vssd->resynced = jiffies;
	vssd_adopt(vssd, &news);
	if (vssd->disk && taken) {
		vssd_tidy_soon(vssd);
		vssd_notify(vssd);
		vssd_uevent(vssd, "resync");
	}
	return 0;
}

/**
 * vssd_extend - make room for more blocks
 * @vssd: the disk; nothing is fenced
 * @total: blocks
 *
 * The tables are replaced under the feet of the data path, so here, and only here, the queue is
 * frozen: this happens once in the life of a disk, if at all.
 *
 * Context: probe or work item.
 */
int vssd_extend(struct vssd *vssd, u32 total)
{
	struct request_queue *q = vssd->disk ? vssd->disk->queue : NULL;
	unsigned long *scratch;
	unsigned int memflags = 0;
	int err;

	scratch = kvmalloc_array(BITS_TO_LONGS(total), sizeof(long), GFP_KERNEL);
	if (!scratch)
		return -ENOMEM;
	swap(vssd->scratch, scratch);
	kvfree(scratch);

	if (q)
		memflags = vssd_compat_freeze(q);
	mutex_lock(&vssd->hints.lock);
	err = vssd_blocks_extend(&vssd->blocks, total);
	mutex_unlock(&vssd->hints.lock);
	if (q)
		vssd_compat_unfreeze(q, memflags);
	if (!err)
		err = vssd_hints_extend(&vssd->hints, total);
	if (!err && q)
		set_capacity_and_notify(vssd->disk, (sector_t)total << vssd->block_shift);
	return err;
}

/**
 * vssd_begin_session - HELLO
 * @vssd: the disk
 *
 * Context: probe or work item.
 */
int vssd_begin_session(struct vssd *vssd)
{
	struct vssd_news news;
	int err;

	err = vssd_chan_hello(vssd, &news);
	if (err)
		return err;
	if (vssd->live && vssd->hello_total > vssd->blocks.total) {
		err = vssd_extend(vssd, vssd->hello_total);
		if (err)
			return err;
	}
	vssd->session = true;
	vssd->seq = 0;
	WRITE_ONCE(vssd->seq_heard, 0);
	vssd->declined = false;
	mutex_lock(&vssd->pull_lock);
	vssd->verdict = (struct vssd_verdict) {};
	vssd->report.due = vssd->report.known;
	mutex_unlock(&vssd->pull_lock);
	vssd->resynced = jiffies - HZ;
	set_bit(VSSD_F_RESYNC, &vssd->flags);
	vssd_reset_backoff(vssd);
	WRITE_ONCE(vssd->requested, news.requested);
	WRITE_ONCE(vssd->seq_heard, news.seq);
	return 0;
}

static void vssd_hear(struct vssd *vssd, const struct vssd_news *news)
{
	if (news->flags & VSSD_NEWS_STATE)
		set_bit(VSSD_F_RESYNC, &vssd->flags);
	if (news->seq > vssd->seq)
		vssd->seq = news->seq;
	WRITE_ONCE(vssd->reason, news->reason);
	WRITE_ONCE(vssd->deadline, jiffies + msecs_to_jiffies(news->deadline_ms));
	WRITE_ONCE(vssd->has_deadline, news->deadline_ms);
	if (news->flags & VSSD_NEWS_TARGET) {
		vssd_reset_backoff(vssd);
		vssd_notify(vssd);
		if (news->requested == vssd->requested && news->requested < vssd_plugged(vssd))
			vssd_uevent(vssd, "shrink-request");
	}
	vssd_adopt(vssd, news);
}

/* Reads the answer of WAIT if there is one, and leaves a new WAIT with the device. */
static int vssd_hear_news(struct vssd *vssd)
{
	struct vssd_news news;
	int err;

	err = vssd_chan_take_wait(vssd, &news);
	switch (err) {
	case 0:
		vssd_hear(vssd, &news);
		break;
	case -ENODATA:
	case -ETXTBSY:
	case -EAGAIN:
		break;
	default:
		return err;
	}
	if (vssd_chan_waiting(vssd))
		return 0;
	if (time_before(jiffies, vssd->wait_armed + VSSD_WAIT_INTERVAL)) {
		vssd_retry_in(vssd, VSSD_WAIT_INTERVAL);
		return 0;
	}
	vssd->wait_armed = jiffies;
	return vssd_chan_arm_wait(vssd);
}

/* ---- taking blocks ---- */

/*
 * Sends PLUG for the first @n spans of vssd->batch.
 *
 * Return: 0, -ENOSPC when the pool had no space for one, -ETXTBSY when one was refused for now,
 * or an error. *@granted counts the blocks that came all the same.
 */
static int vssd_plug(struct vssd *vssd, u32 n, u32 *granted)
{
	const u8 *status = NULL;
	struct vssd_news news;
	int err, rc = 0;
	u32 i;

	/* A write that failed may have left its page. */
	for (i = 0; i < n; i++)
		vssd_cache_drop(vssd, &vssd->batch[i]);

	*granted = 0;
	err = vssd_chan_change(vssd, VSSD_T_PLUG, vssd->batch, n, &status, &news);
	if (err)
		return err;
	vssd->counters.plug_ranges += n;
	for (i = 0; i < n; i++) {
		switch (READ_ONCE(status[i])) {
		case VSSD_R_OK:
		case VSSD_R_ALREADY:
			vssd_blocks_set_plugged(&vssd->blocks, &vssd->batch[i]);
			*granted += vssd->batch[i].count;
			break;
		case VSSD_R_NOSPACE:
			rc = -ENOSPC;
			vssd->counters.refused_ranges++;
			break;
		case VSSD_R_LIMIT:
		case VSSD_R_BUSY:
			rc = rc ?: -ETXTBSY;
			vssd->counters.refused_ranges++;
			break;
		default:
			return -EPROTO;
		}
	}
	vssd->counters.plugged_blocks += *granted;
	vssd_adopt(vssd, &news);
	return rc;
}

/*
 * Takes blocks, lowest first: neighbours make long ranges, and what is read ahead stays together.
 * When the pool is short of space, shorter and shorter ranges find out what it can still give.
 */
static int vssd_grow(struct vssd *vssd)
{
	u32 longest = VSSD_PLUG_BLOCKS, most = vssd->max_ranges, total = 0, granted, from = 0;
	int rc = 0;

	vssd_set_state(vssd, VSSD_GROWING);
	while (vssd_plugged(vssd) < vssd->requested && !rc) {
		u32 need = vssd->requested - vssd_plugged(vssd), n = 0;

		if (vssd_interrupted(vssd)) {
			rc = -EAGAIN;
			break;
		}
		while (n < most && need &&
		       vssd_blocks_next_evicted(&vssd->blocks, from, min(longest, need),
						&vssd->batch[n])) {
			from = vssd->batch[n].start + vssd->batch[n].count;
			need -= vssd->batch[n++].count;
		}
		if (!n)
			break;
		rc = vssd_plug(vssd, n, &granted);
		total += granted;
		if (rc == -ENOSPC && (granted || longest > 1)) {
			longest = max(longest / 8, 1U);
			most = 8;
			from = 0;
			rc = 0;
		}
	}
	if (total) {
		vssd_notify(vssd);
		vssd_uevent(vssd, "grow");
	}
	return rc;
}

/* ---- the work item ---- */

static int vssd_send_pull(struct vssd *vssd)
{
	struct vssd_news news;
	u32 blocks, urgency;
	u64 ticket;
	int err;

	mutex_lock(&vssd->pull_lock);
	blocks = vssd->pull.blocks;
	urgency = vssd->pull.urgency;
	ticket = vssd->pull.ticket;
	mutex_unlock(&vssd->pull_lock);
	if (!blocks)
		return 0;

	err = vssd_chan_pull(vssd, blocks, urgency, &news);
	if (err == -ESTALE)
		return err;

	mutex_lock(&vssd->pull_lock);
	vssd->pull.result = err;
	vssd->pull.done = ticket;
	if (vssd->pull.ticket == ticket)
		vssd->pull.blocks = 0;
	mutex_unlock(&vssd->pull_lock);
	wake_up_all(&vssd->pull_wait);
	if (!err)
		vssd_adopt(vssd, &news);
	return err == -ETXTBSY || err == -EINVAL ? 0 : err;
}

static void vssd_fail_pull(struct vssd *vssd, int err)
{
	mutex_lock(&vssd->pull_lock);
	if (vssd->pull.blocks) {
		vssd->pull.blocks = 0;
		vssd->pull.result = err;
		vssd->pull.done = vssd->pull.ticket;
	}
	mutex_unlock(&vssd->pull_lock);
	wake_up_all(&vssd->pull_wait);
}

static int vssd_send_report(struct vssd *vssd)
{
	struct vssd_report report;
	struct vssd_news news;
	int err;

	mutex_lock(&vssd->pull_lock);
	report = vssd->report;
	vssd->report.due = false;
	mutex_unlock(&vssd->pull_lock);
	if (!report.due)
		return 0;

	err = vssd_chan_report(vssd, &report, &news);
	if (!err)
		vssd_adopt(vssd, &news);
	/* Nobody waits for it; a newer one follows, and a new session is told again. */
	return err == -ETXTBSY || err == -EINVAL || err == -EOPNOTSUPP ? 0 : err;
}

static int vssd_round(struct vssd *vssd)
{
	int rc;

	if (!vssd->session) {
		vssd_set_state(vssd, VSSD_STALE);
		rc = vssd_begin_session(vssd);
		if (rc)
			return rc;
	}
	rc = vssd_hear_news(vssd);
	if (!rc)
		rc = vssd_send_pull(vssd);
	if (!rc)
		rc = vssd_send_report(vssd);
	if (!rc && test_and_clear_bit(VSSD_F_POLL_DUE, &vssd->flags))
		rc = vssd_poll(vssd);
	if (!rc && test_bit(VSSD_F_RESYNC, &vssd->flags)) {
		/* Should the device go on to refuse what it lists, nothing spins. */
		if (time_before(jiffies, vssd->resynced + VSSD_RESYNC_INTERVAL))
			return 0;
		rc = vssd_resync(vssd);
	}
	if (rc)
		return rc;
	if (test_and_clear_bit(VSSD_F_HINTED, &vssd->flags)) {
		vssd_reset_backoff(vssd);
		if (vssd->state == VSSD_DECLINED)
			vssd_set_state(vssd, VSSD_SHRINKING);
	}

	/* A crash kernel uses the disk as it is. The target may cross over in mid-way. */
	if (!is_kdump_kernel()) {
		if (vssd_plugged(vssd) > vssd->requested) {
			rc = vssd_shrink(vssd);
			if (!rc && vssd_plugged(vssd) < vssd->requested)
				return -EAGAIN;
		} else if (vssd_plugged(vssd) < vssd->requested) {
			rc = vssd_grow(vssd);
			if (!rc && vssd_plugged(vssd) > vssd->requested)
				return -EAGAIN;
		}
	}
	if (!rc && vssd_plugged(vssd) == vssd->requested)
		vssd_set_state(vssd, VSSD_IDLE);
	return rc;
}

static void vssd_back_off(struct vssd *vssd)
{
	vssd->backoff_ms = clamp(vssd->backoff_ms * 2, VSSD_BACKOFF_FIRST_MS, VSSD_BACKOFF_LAST_MS);
	vssd_retry_in(vssd, msecs_to_jiffies(vssd->backoff_ms));
}

static void vssd_resize_work(struct work_struct *work)
{
	struct vssd *vssd = container_of(work, struct vssd, work);
	long left;
	int rc;

	do {
		if (vssd_stopping(vssd) || vssd->state == VSSD_BROKEN)
			return;
		cond_resched();
		rc = vssd_round(vssd);
	} while (rc == -EAGAIN);

	switch (rc) {
	case 0:
		if (test_bit(VSSD_F_RESYNC, &vssd->flags))
			vssd_retry_in(vssd, VSSD_RESYNC_INTERVAL);
		break;
	case -EINPROGRESS:	/* an agent is there and may bring hints */
		left = vssd->hint_deadline - jiffies;
		vssd_retry_in(vssd, max(left, 1L));
		break;
	case -ESTALE:		/* a new session */
		vssd->session = false;
		vssd_back_off(vssd);
		break;
	case -EBUSY:		/* blocks are in use here */
	case -ETXTBSY:		/* the device is busy */
	case -ENOSPC:		/* the pool is full */
	case -ENOMEM:
		vssd_back_off(vssd);
		break;
	case -EINTR:		/* stopping */
		break;
	default:
		dev_err(&vssd->vdev->dev,
			"the device breaks the protocol (%d): no resizing until bound again\n",
			rc);
		vssd_set_state(vssd, VSSD_BROKEN);
		vssd_fail_pull(vssd, rc);
		break;
	}
}

static void vssd_retry_work(struct work_struct *work)
{
	vssd_resize_kick(container_of(to_delayed_work(work), struct vssd, retry));
}

/*
 * A page over an evicted block may outlive the block: one whose write failed is clean afterwards,
 * and one over a block that was taken by force was never dropped. Reading it would hide that the
 * data is gone.
 */
static void vssd_tidy_work(struct work_struct *work)
{
	struct vssd *vssd = container_of(to_delayed_work(work), struct vssd, tidy);
	struct vssd_span span = {};
	bool clean = true;

	while (vssd_blocks_next_evicted(&vssd->blocks, span.start + span.count, U32_MAX, &span) &&
	       !vssd_stopping(vssd))
		if (!vssd_cache_drop(vssd, &span))
			clean = false;
	/* Some are dirty or in use: later. */
	if (!clean && !vssd_stopping(vssd))
		queue_delayed_work(vssd->wq, &vssd->tidy, HZ);
}

/**
 * vssd_tidy_soon - drop the pages over evicted blocks
 * @vssd: the disk
 *
 * Context: any.
 */
void vssd_tidy_soon(struct vssd *vssd)
{
	if (vssd->live && !vssd_stopping(vssd))
		queue_delayed_work(vssd->wq, &vssd->tidy, VSSD_TIDY_DELAY);
}

static void vssd_poll_work(struct work_struct *work)
{
	struct vssd *vssd = container_of(to_delayed_work(work), struct vssd, poll);

	if (!(++vssd->polls % VSSD_POLLS_PER_AGEING))
		vssd_blocks_age(&vssd->blocks);
	set_bit(VSSD_F_POLL_DUE, &vssd->flags);
	vssd_resize_kick(vssd);
	if (!vssd_stopping(vssd))
		queue_delayed_work(vssd->wq, &vssd->poll, VSSD_POLL_INTERVAL);
}

/* ---- life ---- */

int vssd_resize_init(struct vssd *vssd)
{
	/* Parked requests wait for the work item, and memory may wait for them. */
	vssd->wq = alloc_ordered_workqueue("vssd-%s", WQ_MEM_RECLAIM, dev_name(&vssd->vdev->dev));
	if (!vssd->wq)
		return -ENOMEM;
	INIT_WORK(&vssd->work, vssd_resize_work);
	INIT_DELAYED_WORK(&vssd->retry, vssd_retry_work);
	INIT_DEFERRABLE_WORK(&vssd->poll, vssd_poll_work);
	INIT_DELAYED_WORK(&vssd->tidy, vssd_tidy_work);
	return 0;
}

/* Begins to converge. */
void vssd_resize_start(struct vssd *vssd)
{
	vssd->live = true;
	queue_delayed_work(vssd->wq, &vssd->poll, VSSD_POLL_INTERVAL);
	vssd_resize_kick(vssd);
}

/**
 * vssd_resize_stop - let the work item leave and keep it from coming back
 * @vssd: the disk
 *
 * Afterwards nothing is fenced and no request is parked. A message or a WAIT may still be with the
 * device. If the work item waits for I/O that never ends, so does this: see vssd_watchdog().
 */
void vssd_resize_stop(struct vssd *vssd)
{
	set_bit(VSSD_F_STOPPING, &vssd->flags);
	wake_up_all(&vssd->chan_wait);
	wake_up_all(&vssd->drain_wait);
	cancel_work_sync(&vssd->work);
	/* Nobody arms these any more. Should they wake the work item, it returns at once. */
	cancel_delayed_work_sync(&vssd->poll);
	cancel_delayed_work_sync(&vssd->retry);
	cancel_delayed_work_sync(&vssd->tidy);
	vssd_fail_pull(vssd, -ENODEV);
}
