// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Block states: which blocks are plugged, fenced or evicted, which were written and when they
 * were last used; and the order in which the driver gives blocks up when nobody tells it.
 *
 * Memory: three bits a block (24 KiB for 4 GiB in blocks of 64 KiB), and two bytes a block more
 * once `nominate` was set to `cold`.
 *
 * The stamps count seconds. Ages above 32767 seconds (nine hours) are not told apart, and
 * vssd_blocks_age() pulls older stamps along before they wrap.
 */
#include <linux/bitmap.h>
#include <linux/jiffies.h>
#include <linux/mm.h>

#include "vssd.h"

#define VSSD_STAMP_OLDEST	0x7fff

static u16 vssd_stamp_now(void)
{
	return div_u64(get_jiffies_64(), HZ);
}

static u16 vssd_stamp_age(u16 now, u16 stamp)
{
	return min_t(u16, now - stamp, VSSD_STAMP_OLDEST);
}

void vssd_blocks_free(struct vssd_blocks *blocks)
{
	kvfree(blocks->blocked);
	kvfree(blocks->evicted);
	kvfree(blocks->written);
	kvfree(blocks->stamps);
	kvfree(blocks->ages);
}

void vssd_blocks_init(struct vssd_blocks *blocks)
{
	mutex_init(&blocks->lock);
}

/**
 * vssd_blocks_extend - make the tables, or larger ones
 * @blocks: the tables
 * @total: blocks, no fewer than before
 *
 * New blocks start as evicted; vssd_blocks_replace() says better.
 *
 * Context: probe, or the work item with the queue frozen.
 */
int vssd_blocks_extend(struct vssd_blocks *blocks, u32 total)
{
	size_t longs = BITS_TO_LONGS(total);
	struct vssd_blocks new = {
		.blocked = kvmalloc_array(longs, sizeof(long), GFP_KERNEL),
		.evicted = kvmalloc_array(longs, sizeof(long), GFP_KERNEL),
		.written = kvcalloc(longs, sizeof(long), GFP_KERNEL),
	};
	u32 added;

	mutex_lock(&blocks->lock);
	added = total - blocks->total;
	if (blocks->stamps)
		new.stamps = kvcalloc(total, sizeof(*new.stamps), GFP_KERNEL);
	if (!new.blocked || !new.evicted || !new.written || (blocks->stamps && !new.stamps)) {
		mutex_unlock(&blocks->lock);
		vssd_blocks_free(&new);
		return -ENOMEM;
	}
	if (blocks->total) {
		bitmap_copy(new.blocked, blocks->blocked, blocks->total);
		bitmap_copy(new.evicted, blocks->evicted, blocks->total);
		bitmap_copy(new.written, blocks->written, blocks->total);
	}
	bitmap_set(new.blocked, blocks->total, added);
	bitmap_set(new.evicted, blocks->total, added);
	if (blocks->stamps)
		memcpy(new.stamps, blocks->stamps, blocks->total * sizeof(*new.stamps));

	swap(blocks->blocked, new.blocked);
	swap(blocks->evicted, new.evicted);
	swap(blocks->written, new.written);
	swap(blocks->stamps, new.stamps);
	blocks->nr_evicted += added;
	blocks->total = total;
	mutex_unlock(&blocks->lock);
	vssd_blocks_free(&new);
	return 0;
}

/**
 * vssd_blocks_want_stamps - begin to note when blocks are used
 * @blocks: the table
 *
 * Before that all blocks count as used now.
 */
int vssd_blocks_want_stamps(struct vssd_blocks *blocks)
{
	u16 *stamps, now = vssd_stamp_now();
	u32 i;
	int err = 0;

	mutex_lock(&blocks->lock);
	if (!blocks->stamps) {
		if (!blocks->ages)
			blocks->ages = kvmalloc_array(VSSD_STAMP_OLDEST + 1, sizeof(*blocks->ages),
						      GFP_KERNEL);
		stamps = kvmalloc_array(blocks->total, sizeof(*stamps), GFP_KERNEL);
		if (stamps && blocks->ages) {
			for (i = 0; i < blocks->total; i++)
				stamps[i] = now;
			/* The data path looks without the lock, through the pointer only. */
			smp_store_release(&blocks->stamps, stamps);
		} else {
			kvfree(stamps);
			err = -ENOMEM;
		}
	}
	mutex_unlock(&blocks->lock);
	return err;
}

/**
 * vssd_blocks_age - keep old stamps from looking young
 * @blocks: the table
 *
 * Context: work item, at least every nine hours.
 */
void vssd_blocks_age(struct vssd_blocks *blocks)
{
	u16 *stamps = READ_ONCE(blocks->stamps);
	u16 now = vssd_stamp_now();
	u32 i;

	if (!stamps)
		return;
	for (i = 0; i < blocks->total; i++)
		if ((u16)(now - READ_ONCE(stamps[i])) > VSSD_STAMP_OLDEST)
			WRITE_ONCE(stamps[i], now - VSSD_STAMP_OLDEST);
}

/**
 * vssd_blocks_note_use - note that blocks are read or written
 * @blocks: the table
 * @first: first block
 * @last: last block
 * @write: whether they are written
 *
 * Context: any; the request is not in the ring yet, or the lock of its queue is held.
 */
void vssd_blocks_note_use(struct vssd_blocks *blocks, u32 first, u32 last, bool write)
{
	u16 *stamps = READ_ONCE(blocks->stamps);
	u32 i;

	if (write)
		for (i = first; i <= last; i++)
			if (!test_bit(i, blocks->written))
				set_bit(i, blocks->written);
	if (stamps) {
		u16 now = vssd_stamp_now();

		for (i = first; i <= last; i++)
			WRITE_ONCE(stamps[i], now);
	}
}

/**
 * vssd_blocks_forget_writes - from now on note again which blocks are written
 * @blocks: the table
 *
 * A write that was noted before may still be in flight: drain after it.
 */
void vssd_blocks_forget_writes(struct vssd_blocks *blocks)
{
	bitmap_zero(blocks->written, blocks->total);
}

/* Whether one of the blocks from @first to @last is fenced. */
bool vssd_blocks_fenced(const struct vssd_blocks *blocks, u32 first, u32 last)
{
	unsigned long bit;

	for (bit = find_next_bit(blocks->blocked, (unsigned long)last + 1, first); bit <= last;
	     bit = find_next_bit(blocks->blocked, (unsigned long)last + 1, bit + 1))
		if (!test_bit(bit, blocks->evicted))
			return true;
	return false;
}

/**
 * vssd_blocks_run - how far the state of a sector reaches
 * @blocks: the table
 * @sector: the sector
 * @end: where the question ends
 * @shift: sectors to blocks
 *
 * Return: sectors from @sector on, up to @end, that are all evicted or all not.
 */
sector_t vssd_blocks_run(const struct vssd_blocks *blocks, sector_t sector, sector_t end,
			 unsigned int shift)
{
	unsigned long block = sector >> shift, limit = ((end - 1) >> shift) + 1, next;

	if (test_bit(block, blocks->evicted))
		next = find_next_zero_bit(blocks->evicted, limit, block);
	else
		next = find_next_bit(blocks->evicted, limit, block);
	return min_t(sector_t, end, (sector_t)next << shift) - sector;
}

/* ---- changes; work item only ---- */

/* Fences a range of plugged blocks: new I/O waits. Requests in flight are not: drain them. */
void vssd_blocks_fence(struct vssd_blocks *blocks, const struct vssd_span *span)
{
	bitmap_set(blocks->blocked, span->start, span->count);
}

/* Lifts the fence: the blocks stay plugged. */
void vssd_blocks_unfence(struct vssd_blocks *blocks, const struct vssd_span *span)
{
	bitmap_clear(blocks->blocked, span->start, span->count);
}

/* The device took blocks that are fenced. */
void vssd_blocks_set_evicted(struct vssd_blocks *blocks, const struct vssd_span *span)
{
	mutex_lock(&blocks->lock);
	bitmap_set(blocks->evicted, span->start, span->count);
	blocks->nr_evicted += span->count;
	mutex_unlock(&blocks->lock);
}

/* The device gave blocks that were evicted. */
void vssd_blocks_set_plugged(struct vssd_blocks *blocks, const struct vssd_span *span)
{
	mutex_lock(&blocks->lock);
	bitmap_clear(blocks->evicted, span->start, span->count);
	bitmap_clear(blocks->blocked, span->start, span->count);
	blocks->nr_evicted -= span->count;
	mutex_unlock(&blocks->lock);
}

/**
 * vssd_blocks_replace - adopt the set that the device told
 * @blocks: the table; nothing is fenced
 * @evicted: bitmap of all evicted blocks
 *
 * Return: whether blocks were evicted that had not been.
 */
bool vssd_blocks_replace(struct vssd_blocks *blocks, const unsigned long *evicted)
{
	bool taken;

	mutex_lock(&blocks->lock);
	taken = !bitmap_subset(evicted, blocks->evicted, blocks->total);
	bitmap_copy(blocks->evicted, evicted, blocks->total);
	bitmap_copy(blocks->blocked, evicted, blocks->total);
	blocks->nr_evicted = bitmap_weight(evicted, blocks->total);
	mutex_unlock(&blocks->lock);
	return taken;
}

/**
 * vssd_blocks_next_evicted - the next run of evicted blocks
 * @blocks: the table
 * @from: where to look
 * @most: the longest run to report
 * @span: the run
 *
 * Return: false when there is none.
 */
bool vssd_blocks_next_evicted(const struct vssd_blocks *blocks, u32 from, u32 most,
			      struct vssd_span *span)
{
	unsigned long start = find_next_bit(blocks->evicted, blocks->total, from), end;

	if (start >= blocks->total)
		return false;
	end = find_next_zero_bit(blocks->evicted, min_t(u64, blocks->total, (u64)start + most),
				 start);
	span->start = start;
	span->count = end - start;
	return true;
}

/* ---- choice ---- */

/**
 * vssd_blocks_coldest - choose the plugged blocks that were not used for longest
 * @blocks: the table, with stamps
 * @need: how many
 * @skip: bitmap of blocks to leave out
 * @spans: the choice
 * @most: the most spans
 *
 * Among blocks of one age the highest go first, see vssd_pick_empty().
 *
 * Context: work item.
 * Return: number of spans.
 */
u32 vssd_blocks_coldest(struct vssd_blocks *blocks, u32 need, const unsigned long *skip,
			struct vssd_span *spans, u32 most)
{
	u16 *stamps = READ_ONCE(blocks->stamps);
	u16 now = vssd_stamp_now(), bound, age;
	u32 *ages = blocks->ages;
	u32 i, n = 0, older = 0, same;

	if (!stamps)
		return 0;
	memset(ages, 0, (VSSD_STAMP_OLDEST + 1) * sizeof(*ages));
	for (i = 0; i < blocks->total; i++)
		if (!test_bit(i, blocks->blocked) && !test_bit(i, skip))
			ages[vssd_stamp_age(now, READ_ONCE(stamps[i]))]++;

	/* The youngest age needed. All older blocks go, and of this age what is missing. */
	for (bound = VSSD_STAMP_OLDEST; bound > 0; bound--) {
		if (older + ages[bound] >= need)
			break;
		older += ages[bound];
	}
	same = need - older;

	for (i = blocks->total; i-- && need;) {
		age = vssd_stamp_age(now, READ_ONCE(stamps[i]));
		if (age < bound || test_bit(i, blocks->blocked) || test_bit(i, skip))
			continue;
		if (age == bound) {
			if (!same)
				continue;
			same--;
		}
		if (n && spans[n - 1].start == i + 1) {
			spans[n - 1].start = i;
			spans[n - 1].count++;
		} else if (n < most) {
			spans[n].start = i;
			spans[n++].count = 1;
		} else {
			break;
		}
		need--;
	}
	return n;
}
