// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Page cache over a range of blocks.
 *
 * A cached page over an evicted block would be read as if the block were there, and a dirty one
 * would be lost without a word. So a range is cleaned in two steps.
 *
 *	vssd_cache_clean()	before the fence is raised: writes back, drops, waits for I/O
 *	vssd_cache_drop()	behind the fence: drops what came back meanwhile, and tells whether
 *				something is left.
 *
 * Behind the fence nothing may wait for a page. Its lock may be held by a reader, and its
 * writeback bit may be set by a writer, whose request is parked until the fence is lifted.
 *
 * Each partition has a page cache of its own.
 */
#include <linux/blkdev.h>
#include <linux/buffer_head.h>
#include <linux/fs.h>
#include <linux/pagemap.h>
#include <linux/xarray.h>

#include "vssd.h"
#include "vssd_compat.h"

typedef bool (*vssd_cache_fn)(struct address_space *mapping, loff_t first, loff_t last);

/*
 * Calls @fn for each page cache that has pages and may hold the span, with its first and last byte
 * therein. Returns whether @fn returned true each time.
 */
static bool vssd_cache_each(struct vssd *vssd, const struct vssd_span *span, vssd_cache_fn fn)
{
	sector_t begin = (sector_t)span->start << vssd->block_shift;
	sector_t end = begin + ((sector_t)span->count << vssd->block_shift);
	struct block_device *part;
	unsigned long index;
	bool ok = true;

	rcu_read_lock();
	xa_for_each(&vssd->disk->part_tbl, index, part) {
		struct address_space *mapping = vssd_compat_mapping(part);
		sector_t from = max(begin, part->bd_start_sect);
		sector_t to = min(end, part->bd_start_sect + bdev_nr_sectors(part));
		struct inode *inode;

		if (from >= to || !READ_ONCE(mapping->nrpages))
			continue;
		/* A partition may be deleted while @fn sleeps. */
		inode = igrab(mapping->host);
		if (!inode)
			continue;
		rcu_read_unlock();
		if (!fn(mapping, (from - part->bd_start_sect) << SECTOR_SHIFT,
			((to - part->bd_start_sect) << SECTOR_SHIFT) - 1))
			ok = false;
		iput(inode);
		rcu_read_lock();
	}
	rcu_read_unlock();
	return ok;
}

static bool vssd_cache_clean_one(struct address_space *mapping, loff_t first, loff_t last)
{
	if (!filemap_range_has_page(mapping, first, last))
		return true;
	if (filemap_write_and_wait_range(mapping, first, last))
		return false;
	if (!invalidate_inode_pages2_range(mapping, first >> PAGE_SHIFT, last >> PAGE_SHIFT))
		return true;
	/* Each processor remembers the buffers it used last. */
	invalidate_bh_lrus();
	return !invalidate_inode_pages2_range(mapping, first >> PAGE_SHIFT, last >> PAGE_SHIFT);
}

static bool vssd_cache_drop_one(struct address_space *mapping, loff_t first, loff_t last)
{
	if (!filemap_range_has_page(mapping, first, last))
		return true;
	invalidate_mapping_pages(mapping, first >> PAGE_SHIFT, last >> PAGE_SHIFT);
	return !filemap_range_has_page(mapping, first, last);
}

/**
 * vssd_cache_clean - write back and drop the pages over a range
 * @vssd: the disk
 * @span: the range, not fenced
 *
 * Costs a look at the number of pages when nothing is cached. What cannot be dropped is left for
 * vssd_cache_drop() to find.
 *
 * Context: work item; sleeps for I/O of this disk.
 */
void vssd_cache_clean(struct vssd *vssd, const struct vssd_span *span)
{
	vssd_cache_each(vssd, span, vssd_cache_clean_one);
}

/**
 * vssd_cache_drop - drop the pages over a range without waiting for any
 * @vssd: the disk
 * @span: the range, fenced or evicted
 *
 * Return: whether no page is left.
 */
bool vssd_cache_drop(struct vssd *vssd, const struct vssd_span *span)
{
	return vssd_cache_each(vssd, span, vssd_cache_drop_one);
}
