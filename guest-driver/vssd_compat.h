/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * One spelling for what differs between kernels from 6.1 on.
 *
 * VSSD_HAVE_* come from conftest.sh, which tries what compiles: distributions carry features of
 * newer kernels, so a version number tells little.
 */
#ifndef _VSSD_COMPAT_H
#define _VSSD_COMPAT_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/interrupt.h>
#include <linux/sched/mm.h>
#include <linux/virtio_config.h>

#include "vssd_conf.h"

#ifndef VSSD_HAVE_MAP_HW_QUEUES
#include <linux/blk-mq-virtio.h>
#endif

#ifdef VSSD_HAVE_TAG_SHOULD_MERGE
#define VSSD_COMPAT_TAG_FLAGS	BLK_MQ_F_SHOULD_MERGE
#else
#define VSSD_COMPAT_TAG_FLAGS	0
#endif

/* ---- virtqueues ---- */

struct vssd_compat_vqs {
	struct virtqueue **vqs;
#ifdef VSSD_HAVE_VIRTQUEUE_INFO
	struct virtqueue_info *info;
#else
	vq_callback_t **callbacks;
	const char **names;
#endif
};

static inline void vssd_compat_free_vqs(struct vssd_compat_vqs *v)
{
	kfree(v->vqs);
#ifdef VSSD_HAVE_VIRTQUEUE_INFO
	kfree(v->info);
#else
	kfree(v->callbacks);
	kfree(v->names);
#endif
}

static inline int vssd_compat_alloc_vqs(struct vssd_compat_vqs *v, unsigned int num)
{
	bool ok;

	v->vqs = kcalloc(num, sizeof(*v->vqs), GFP_KERNEL);
#ifdef VSSD_HAVE_VIRTQUEUE_INFO
	v->info = kcalloc(num, sizeof(*v->info), GFP_KERNEL);
	ok = v->vqs && v->info;
#else
	v->callbacks = kcalloc(num, sizeof(*v->callbacks), GFP_KERNEL);
	v->names = kcalloc(num, sizeof(*v->names), GFP_KERNEL);
	ok = v->vqs && v->callbacks && v->names;
#endif
	if (ok)
		return 0;
	vssd_compat_free_vqs(v);
	return -ENOMEM;
}

static inline void vssd_compat_set_vq(struct vssd_compat_vqs *v, unsigned int i,
				      vq_callback_t *callback, const char *name)
{
#ifdef VSSD_HAVE_VIRTQUEUE_INFO
	v->info[i].callback = callback;
	v->info[i].name = name;
#else
	v->callbacks[i] = callback;
	v->names[i] = name;
#endif
}

static inline int vssd_compat_find_vqs(struct virtio_device *vdev, struct vssd_compat_vqs *v,
				       unsigned int num)
{
	struct irq_affinity affinity = {};

#ifdef VSSD_HAVE_VIRTQUEUE_INFO
	return virtio_find_vqs(vdev, num, v->vqs, v->info, &affinity);
#else
	return virtio_find_vqs(vdev, num, v->vqs, v->callbacks, v->names, &affinity);
#endif
}

static inline void vssd_compat_map_queues(struct blk_mq_queue_map *map, struct virtio_device *vdev)
{
#ifdef VSSD_HAVE_MAP_HW_QUEUES
	blk_mq_map_hw_queues(map, &vdev->dev, 0);
#else
	blk_mq_virtio_map_queues(map, vdev, 0);
#endif
}

/* ---- requests ---- */

static inline int vssd_compat_map_sg(struct request *req, struct scatterlist *sg)
{
#ifdef VSSD_HAVE_MAP_SG_WITHOUT_QUEUE
	return blk_rq_map_sg(req, sg);
#else
	return blk_rq_map_sg(req->q, req, sg);
#endif
}

/*
 * Waits for the requests in flight and holds new ones back, until vssd_compat_unfreeze(). In
 * between allocations do not wait for I/O: newer kernels see to that themselves.
 */
static inline unsigned int vssd_compat_freeze(struct request_queue *q)
{
#ifdef VSSD_HAVE_FREEZE_MEMFLAGS
	return blk_mq_freeze_queue(q);
#else
	blk_mq_freeze_queue(q);
	return memalloc_noio_save();
#endif
}

static inline void vssd_compat_unfreeze(struct request_queue *q, unsigned int memflags)
{
#ifdef VSSD_HAVE_FREEZE_MEMFLAGS
	blk_mq_unfreeze_queue(q, memflags);
#else
	memalloc_noio_restore(memflags);
	blk_mq_unfreeze_queue(q);
#endif
}

/* ---- disk ---- */

struct vssd_limits {
	unsigned int logical_block_size;
	unsigned int physical_block_size;
	unsigned int io_min;
	unsigned int io_opt;
	unsigned int max_segments;
	unsigned int max_segment_size;
	unsigned int max_discard_sectors;
	unsigned int max_discard_ranges;
	unsigned int discard_granularity;
	unsigned int max_write_zeroes_sectors;
	bool write_cache;
};

static inline struct gendisk *vssd_compat_alloc_disk(struct blk_mq_tag_set *set,
						     const struct vssd_limits *l, void *data)
{
#ifdef VSSD_HAVE_ALLOC_DISK_LIMITS
	struct queue_limits lim = {
		.features		= l->write_cache ? BLK_FEAT_WRITE_CACHE : 0,
		.logical_block_size	= l->logical_block_size,
		.physical_block_size	= l->physical_block_size,
		.io_min			= l->io_min,
		.io_opt			= l->io_opt,
		.max_segments		= l->max_segments,
		.max_segment_size	= l->max_segment_size,
		.max_hw_sectors		= UINT_MAX,
		.max_hw_discard_sectors	= l->max_discard_sectors,
		.max_discard_segments	= l->max_discard_ranges,
		.discard_granularity	= l->discard_granularity,
		.max_write_zeroes_sectors = l->max_write_zeroes_sectors,
	};

	return blk_mq_alloc_disk(set, &lim, data);
#else
	struct gendisk *disk = blk_mq_alloc_disk(set, data);
	struct request_queue *q;

	if (IS_ERR(disk))
		return disk;
	q = disk->queue;
	blk_queue_flag_set(QUEUE_FLAG_NONROT, q);
	blk_queue_write_cache(q, l->write_cache, false);
	blk_queue_logical_block_size(q, l->logical_block_size);
	blk_queue_physical_block_size(q, l->physical_block_size);
	if (l->io_min)
		blk_queue_io_min(q, l->io_min);
	if (l->io_opt)
		blk_queue_io_opt(q, l->io_opt);
	blk_queue_max_segments(q, l->max_segments);
	blk_queue_max_segment_size(q, l->max_segment_size);
	blk_queue_max_hw_sectors(q, UINT_MAX);
	if (l->max_discard_sectors) {
		blk_queue_max_discard_sectors(q, l->max_discard_sectors);
		blk_queue_max_discard_segments(q, l->max_discard_ranges);
		q->limits.discard_granularity = l->discard_granularity;
	}
	blk_queue_max_write_zeroes_sectors(q, l->max_write_zeroes_sectors);
	return disk;
#endif
}

/* The page cache of a whole disk or of a partition of it. */
static inline struct address_space *vssd_compat_mapping(struct block_device *bdev)
{
#ifdef VSSD_HAVE_BD_MAPPING
	return bdev->bd_mapping;
#else
	return bdev->bd_inode->i_mapping;
#endif
}

#endif /* _VSSD_COMPAT_H */
