// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Hints: the queue of blocks that user space would rather lose, most expendable first.
 *
 * A block is in the queue once, at the place where it was named first: of a new line only the
 * blocks that are not queued yet are appended, so the queue cannot hold more entries than the
 * disk has blocks. The bit in @queued is set as long as a block is in the queue or in the hands
 * of the work item, which takes blocks from the front (vssd_hints_take()) and either is rid of
 * them (vssd_hints_done()) or sets them aside (vssd_hints_set_aside()) until its pass is over
 * (vssd_hints_rewind()). Between taking and vssd_hints_settled() they are in hand: who takes all
 * hints back waits for that, and knows then that none of these blocks goes any more.
 */
#include <linux/bitmap.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "vssd.h"

/* A page of entries. */
struct vssd_hint_chunk {
	struct list_head list;
	u32 first;			/* entries before it are taken */
	u32 end;
	struct vssd_span span[(PAGE_SIZE - sizeof(struct list_head) - 2 * sizeof(u32)) /
			      sizeof(struct vssd_span)];
};

void vssd_hints_init(struct vssd_hints *hints)
{
	mutex_init(&hints->lock);
	init_waitqueue_head(&hints->settled);
	INIT_LIST_HEAD(&hints->chunks);
	INIT_LIST_HEAD(&hints->aside);
}

/**
 * vssd_hints_extend - make room for hints of more blocks
 * @hints: the queue
 * @total: blocks, no fewer than before
 */
int vssd_hints_extend(struct vssd_hints *hints, u32 total)
{
	unsigned long *queued = kvcalloc(BITS_TO_LONGS(total), sizeof(long), GFP_KERNEL);

	if (!queued)
		return -ENOMEM;
	mutex_lock(&hints->lock);
	if (hints->total)
		bitmap_copy(queued, hints->queued, hints->total);
	swap(hints->queued, queued);
	hints->total = total;
	mutex_unlock(&hints->lock);
	kvfree(queued);
	return 0;
}

static void vssd_hints_drop(struct vssd_hints *hints)
{
	struct vssd_hint_chunk *chunk, *next;

	list_splice_init(&hints->aside, &hints->chunks);
	list_for_each_entry_safe(chunk, next, &hints->chunks, list) {
		list_del(&chunk->list);
		kfree(chunk);
	}
}

void vssd_hints_free(struct vssd_hints *hints)
{
	vssd_hints_drop(hints);
	kvfree(hints->queued);
}

/* Context: hints->lock held. */
static int vssd_hints_append(struct list_head *list, u32 start, u32 count)
{
	struct vssd_hint_chunk *chunk = NULL;
	struct vssd_span *last;

	BUILD_BUG_ON(sizeof(*chunk) > PAGE_SIZE);
	if (!list_empty(list))
		chunk = list_last_entry(list, struct vssd_hint_chunk, list);
	if (chunk && chunk->end > chunk->first) {
		last = &chunk->span[chunk->end - 1];
		if (last->start + last->count == start) {
			last->count += count;
			return 0;
		}
	}
	if (!chunk || chunk->end == ARRAY_SIZE(chunk->span)) {
		chunk = kmalloc(sizeof(*chunk), GFP_KERNEL_ACCOUNT);
		if (!chunk)
			return -ENOMEM;
		chunk->first = 0;
		chunk->end = 0;
		list_add_tail(&chunk->list, list);
	}
	chunk->span[chunk->end++] = (struct vssd_span) { start, count };
	return 0;
}

/**
 * vssd_hints_add - queue a range of blocks
 * @hints: the queue
 * @start: first block
 * @count: blocks
 * @blocks: the states of the blocks
 *
 * Blocks that are queued already keep their place. Those that are evicted are ignored.
 *
 * Return: 0, -ERANGE when the range is empty or not inside the disk, -ENOMEM with a part of it
 * queued.
 */
int vssd_hints_add(struct vssd_hints *hints, u32 start, u32 count,
		   const struct vssd_blocks *blocks)
{
	const unsigned long *evicted;
	unsigned long block, limit, end;
	int err = 0;

	mutex_lock(&hints->lock);
	if (!count || start >= hints->total || count > hints->total - start) {
		mutex_unlock(&hints->lock);
		return -ERANGE;
	}
	/* Replaced only with this lock held. */
	evicted = blocks->evicted;
	limit = (unsigned long)start + count;
	for (block = start; block < limit; block = end) {
		if (test_bit(block, evicted)) {
			end = find_next_zero_bit(evicted, limit, block);
			continue;
		}
		end = find_next_bit(evicted, limit, block);
		if (test_bit(block, hints->queued)) {
			end = find_next_zero_bit(hints->queued, end, block);
			continue;
		}
		end = find_next_bit(hints->queued, end, block);
		err = vssd_hints_append(&hints->chunks, block, end - block);
		if (err)
			break;
		bitmap_set(hints->queued, block, end - block);
		hints->nr_blocks += end - block;
	}
	mutex_unlock(&hints->lock);
	return err;
}

/**
 * vssd_hints_clear - forget all hints
 * @hints: the queue
 *
 * Return: 0 when no block that was hinted before goes any more. -EINTR: the hints are forgotten,
 * but those in hand may still go.
 */
int vssd_hints_clear(struct vssd_hints *hints)
{
	mutex_lock(&hints->lock);
	vssd_hints_drop(hints);
	bitmap_zero(hints->queued, hints->total);
	hints->nr_blocks = 0;
	hints->generation++;
	mutex_unlock(&hints->lock);
	return wait_event_interruptible(hints->settled, !READ_ONCE(hints->in_hand)) ? -EINTR : 0;
}

/**
 * vssd_hints_take - take blocks from the front of the queue
 * @hints: the queue
 * @need: the most blocks
 * @skip: bitmap of blocks to leave out: they are evicted and leave the queue
 * @spans: the blocks
 * @most: the most spans
 * @generation: to be handed back with the blocks
 *
 * Return: number of spans.
 */
u32 vssd_hints_take(struct vssd_hints *hints, u32 need, const unsigned long *skip,
		    struct vssd_span *spans, u32 most, u32 *generation)
{
	struct vssd_hint_chunk *chunk, *next;
	u32 n = 0;

	mutex_lock(&hints->lock);
	*generation = hints->generation;
	list_for_each_entry_safe(chunk, next, &hints->chunks, list) {
		while (need && n < most && chunk->first < chunk->end) {
			struct vssd_span *head = &chunk->span[chunk->first];
			unsigned long limit = (unsigned long)head->start + head->count, end;

			if (test_bit(head->start, skip)) {
				end = find_next_zero_bit(skip, limit, head->start);
				bitmap_clear(hints->queued, head->start, end - head->start);
				hints->nr_blocks -= end - head->start;
			} else {
				end = find_next_bit(skip, limit, head->start);
				end = min_t(unsigned long, end, (unsigned long)head->start + need);
				spans[n++] = (struct vssd_span) { head->start, end - head->start };
				need -= end - head->start;
			}
			head->count = limit - end;
			head->start = end;
			if (!head->count)
				chunk->first++;
		}
		if (chunk->first < chunk->end)
			break;
		list_del(&chunk->list);
		kfree(chunk);
	}
	if (n)
		WRITE_ONCE(hints->in_hand, true);
	mutex_unlock(&hints->lock);
	return n;
}

/**
 * vssd_hints_settled - whatever was taken has gone or stays
 * @hints: the queue
 */
void vssd_hints_settled(struct vssd_hints *hints)
{
	/* Releases: who sees it also sees which blocks are evicted. */
	smp_store_release(&hints->in_hand, false);
	wake_up_all(&hints->settled);
}

/**
 * vssd_hints_done - blocks that were taken are given up
 * @hints: the queue
 * @span: the blocks
 * @generation: from vssd_hints_take()
 */
void vssd_hints_done(struct vssd_hints *hints, const struct vssd_span *span, u32 generation)
{
	mutex_lock(&hints->lock);
	if (generation == hints->generation) {
		bitmap_clear(hints->queued, span->start, span->count);
		hints->nr_blocks -= span->count;
	}
	mutex_unlock(&hints->lock);
}

/**
 * vssd_hints_set_aside - blocks that were taken cannot go now
 * @hints: the queue
 * @span: the blocks
 * @generation: from vssd_hints_take(); hints that were cleared meanwhile are forgotten
 */
void vssd_hints_set_aside(struct vssd_hints *hints, const struct vssd_span *span, u32 generation)
{
	mutex_lock(&hints->lock);
	if (generation == hints->generation &&
	    vssd_hints_append(&hints->aside, span->start, span->count)) {
		/* No memory. Hints are advice: these are lost rather than the pass. */
		bitmap_clear(hints->queued, span->start, span->count);
		hints->nr_blocks -= span->count;
	}
	mutex_unlock(&hints->lock);
}

/**
 * vssd_hints_rewind - what was set aside is first in the queue again
 * @hints: the queue
 */
void vssd_hints_rewind(struct vssd_hints *hints)
{
	mutex_lock(&hints->lock);
	list_splice_init(&hints->aside, &hints->chunks);
	mutex_unlock(&hints->lock);
}

/**
 * vssd_hints_get - look at an entry of the queue
 * @hints: the queue, locked
 * @index: which
 * @span: the entry
 *
 * Return: whether there is one.
 */
bool vssd_hints_get(const struct vssd_hints *hints, u64 index, struct vssd_span *span)
{
	const struct list_head *lists[] = { &hints->aside, &hints->chunks };
	struct vssd_hint_chunk *chunk;
	int i;

	for (i = 0; i < ARRAY_SIZE(lists); i++)
		list_for_each_entry(chunk, lists[i], list) {
			if (index < chunk->end - chunk->first) {
				*span = chunk->span[chunk->first + index];
				return true;
			}
			index -= chunk->end - chunk->first;
		}
	return false;
}
