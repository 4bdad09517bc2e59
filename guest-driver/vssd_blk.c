// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Data path: requests of the block layer to the virtqueues and back.
 *
 * As in virtio_blk each virtqueue is a hardware queue. All that a request needs lives in its pdu,
 * the scatterlist included. New is the gate: under the lock of the queue, right before a request
 * enters the ring, the states of its blocks are looked up.
 *
 *	all plugged	it enters the ring
 *	one evicted	it fails: ENODATA for reads, ENOSPC for writes
 *	one fenced	it is parked, and looked at again when the fence is lifted
 *
 * Because the look-up, the ring and the count of requests in flight share a lock, whoever raises
 * a fence visits each queue once to be sure that no request slips past, and then waits for the
 * requests of one parity to be sure that none is in flight (vssd_blk_drain()). The queue is never
 * frozen: I/O to other blocks goes on.
 *
 * The block layer merges what different submitters sent. They shall not pay for each other, so a
 * request is failed, parked or sent by leading bios: vssd_pdu.bytes says how much of it is under
 * way, and the rest comes back through the requeue list.
 *
 * DISCARD skips evicted blocks, which hold nothing to discard. WRITE_ZEROES promises that zeroes
 * can be read afterwards, and fails like a write.
 */
#include <linux/blkdev.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#include "vssd.h"
#include "vssd_compat.h"

/* What stays free in the ring for the guest channel: WAIT and one more message. */
#define VSSD_RESERVED_SLOTS	2
#define VSSD_RESERVED_DESCS	(2 * 4)

/* Smallest ring: the above, and a request of a few segments. */
#define VSSD_MIN_RING		16

/* Most blocks of a WRITE_ZEROES: each is noted as written with the lock held. */
#define VSSD_MAX_ZERO_BLOCKS	4096U

struct vssd_pdu {
	struct virtio_blk_outhdr hdr;
	u8 status;
	u8 parity;			/* under which it counts as in flight */
	bool single;			/* send one bio at a time, valid with RQF_DONTPREP */
	unsigned int nents;
	unsigned int nr_ranges;
	unsigned int bytes;		/* leading bytes that are under way */
	struct virtio_blk_discard_write_zeroes range[VSSD_MAX_DISCARD_RANGES];
	struct scatterlist sg[];
};

enum vssd_gate {
	VSSD_SEND,
	VSSD_PARK,
	VSSD_FAIL,
};

/* ---- gate ---- */

static bool vssd_touches(const struct vssd *vssd, const unsigned long *map, sector_t sector,
			 unsigned int sectors)
{
	unsigned long first = sector >> vssd->block_shift;
	unsigned long last = (sector + sectors - 1) >> vssd->block_shift;

	return find_next_bit(map, last + 1, first) <= last;
}

static enum vssd_gate vssd_gate_sectors(const struct vssd *vssd, enum req_op op, sector_t sector,
					unsigned int sectors)
{
	if (!sectors || likely(!vssd_touches(vssd, vssd->blocks.blocked, sector, sectors)))
		return VSSD_SEND;
	if (op == REQ_OP_DISCARD)
		return vssd_blocks_fenced(&vssd->blocks, sector >> vssd->block_shift,
					  (sector + sectors - 1) >> vssd->block_shift) ?
			VSSD_PARK : VSSD_SEND;
	if (vssd_touches(vssd, vssd->blocks.evicted, sector, sectors))
		return VSSD_FAIL;
	return VSSD_PARK;
}

/*
 * Decides over a request, or over as many of its leading bios as share a fate: *@bytes.
 *
 * Context: vssd_vq.lock held.
 */
static enum vssd_gate vssd_gate(const struct vssd *vssd, struct request *req, unsigned int *bytes)
{
	const struct vssd_pdu *vr = blk_mq_rq_to_pdu(req);
	enum vssd_gate first = VSSD_SEND, gate;
	struct bio *bio;

	*bytes = blk_rq_bytes(req);
	if (likely(!vr->single) &&
	    likely(vssd_gate_sectors(vssd, req_op(req), blk_rq_pos(req),
				     blk_rq_sectors(req)) == VSSD_SEND))
		return VSSD_SEND;

	*bytes = 0;
	__rq_for_each_bio(bio, req) {
		gate = vssd_gate_sectors(vssd, req_op(req), bio->bi_iter.bi_sector,
					 bio_sectors(bio));
		if (*bytes && (gate != first || vr->single))
			break;
		first = gate;
		*bytes += bio->bi_iter.bi_size;
	}
	return first;
}

/* Notes which blocks a request uses. Context: vssd_vq.lock held. */
static void vssd_note_use(struct vssd *vssd, struct request *req, unsigned int bytes)
{
	u32 first = blk_rq_pos(req) >> vssd->block_shift;
	u32 last = (blk_rq_pos(req) + (bytes >> SECTOR_SHIFT) - 1) >> vssd->block_shift;

	if (bytes && req_op(req) != REQ_OP_DISCARD)
		vssd_blocks_note_use(&vssd->blocks, first, last, op_is_write(req_op(req)));
}

/* ---- into the ring ---- */

/* Shortens a mapped scatterlist to @bytes. Returns its new number of entries. */
static unsigned int vssd_cut_sg(struct scatterlist *sg, unsigned int nents, unsigned int bytes)
{
	unsigned int i;

	for (i = 0; i < nents; i++, sg = sg_next(sg)) {
		if (bytes <= sg->length) {
			sg->length = bytes;
			sg_mark_end(sg);
			return i + 1;
		}
		bytes -= sg->length;
	}
	return nents;
}

static void vssd_add_range(struct vssd_pdu *vr, sector_t sector, u32 sectors, u32 flags)
{
	struct virtio_blk_discard_write_zeroes *range = &vr->range[vr->nr_ranges++];

	range->sector = cpu_to_le64(sector);
	range->num_sectors = cpu_to_le32(sectors);
	range->flags = cpu_to_le32(flags);
}

/*
 * Lists the plugged parts of a DISCARD, as many as one request to the device can take. Returns the
 * bytes covered, evicted blocks included.
 *
 * Context: vssd_vq.lock held.
 */
static unsigned int vssd_add_discard_ranges(const struct vssd *vssd, struct request *req,
					    unsigned int bytes)
{
	struct vssd_pdu *vr = blk_mq_rq_to_pdu(req);
	unsigned int covered = 0;
	struct bio *bio;

	__rq_for_each_bio(bio, req) {
		sector_t sector = bio->bi_iter.bi_sector;
		sector_t end = bio_end_sector(bio);

		if (covered >= bytes)
			break;
		while (sector < end) {
			sector_t run = vssd_blocks_run(&vssd->blocks, sector, end,
						       vssd->block_shift);

			if (!vssd_touches(vssd, vssd->blocks.evicted, sector, 1)) {
				if (vr->nr_ranges == vssd->max_discard_ranges)
					return covered;
				run = min_t(sector_t, run, vssd->max_discard_sectors);
				vssd_add_range(vr, sector, run, 0);
			}
			sector += run;
			covered += run << SECTOR_SHIFT;
		}
	}
	return covered;
}

/*
 * Puts the leading @bytes of a request into the ring.
 *
 * Context: vssd_vq.lock held.
 * Return: 0, -ENOSPC or -ENOMEM as of virtqueue_add_sgs(), -ENODATA when there is nothing to send.
 */
static int vssd_add_req(struct vssd *vssd, struct vssd_vq *vq, struct request *req,
			unsigned int bytes)
{
	struct vssd_pdu *vr = blk_mq_rq_to_pdu(req);
	struct scatterlist hdr, status, payload, *sgs[3];
	unsigned int out = 0, in = 0;
	int err;

	vr->nr_ranges = 0;
	switch (req_op(req)) {
	case REQ_OP_DISCARD:
		bytes = vssd_add_discard_ranges(vssd, req, bytes);
		break;
	case REQ_OP_WRITE_ZEROES:
		vssd_add_range(vr, blk_rq_pos(req), bytes >> SECTOR_SHIFT,
			       req->cmd_flags & REQ_NOUNMAP ?
			       0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
		break;
	default:
		if (unlikely(bytes < blk_rq_bytes(req)))
			vr->nents = vssd_cut_sg(vr->sg, vr->nents, bytes);
		break;
	}
	vr->bytes = bytes;
	if (req_op(req) == REQ_OP_DISCARD && !vr->nr_ranges)
		return -ENODATA;

	/* Should the device not write it. */
	vr->status = VIRTIO_BLK_S_IOERR;
	sg_init_one(&hdr, &vr->hdr, sizeof(vr->hdr));
	sgs[out++] = &hdr;
	if (vr->nr_ranges) {
		sg_init_one(&payload, vr->range, vr->nr_ranges * sizeof(vr->range[0]));
		sgs[out++] = &payload;
	} else if (vr->nents) {
		sgs[op_is_write(req_op(req)) ? out++ : out + in++] = vr->sg;
	}
	sg_init_one(&status, &vr->status, sizeof(vr->status));
	sgs[out + in++] = &status;

	err = virtqueue_add_sgs(vq->vq, sgs, out, in, vr, GFP_ATOMIC);
	if (err)
		return err;
	vr->parity = vq->parity;
	vq->inflight[vr->parity]++;
	vssd_note_use(vssd, req, bytes);
	return 0;
}

static blk_status_t vssd_prepare(struct vssd *vssd, struct request *req)
{
	struct vssd_pdu *vr = blk_mq_rq_to_pdu(req);
	sector_t sector = 0;
	u32 type;

	switch (req_op(req)) {
	case REQ_OP_READ:
		type = VIRTIO_BLK_T_IN;
		sector = blk_rq_pos(req);
		break;
	case REQ_OP_WRITE:
		type = VIRTIO_BLK_T_OUT;
		sector = blk_rq_pos(req);
		break;
	case REQ_OP_FLUSH:
		type = VIRTIO_BLK_T_FLUSH;
		break;
	case REQ_OP_DISCARD:
		type = VIRTIO_BLK_T_DISCARD;
		break;
	case REQ_OP_WRITE_ZEROES:
		type = VIRTIO_BLK_T_WRITE_ZEROES;
		break;
	default:
		return BLK_STS_NOTSUPP;
	}
	vr->hdr.type = cpu_to_virtio32(vssd->vdev, type);
	vr->hdr.ioprio = cpu_to_virtio32(vssd->vdev, req_get_ioprio(req));
	vr->hdr.sector = cpu_to_virtio64(vssd->vdev, sector);
	if (!(req->rq_flags & RQF_DONTPREP))
		vr->single = false;

	vr->nents = 0;
	if (type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_OUT) {
		sg_init_table(vr->sg, blk_rq_nr_phys_segments(req));
		vr->nents = vssd_compat_map_sg(req, vr->sg);
	}
	return BLK_STS_OK;
}

/* Ends the leading @bytes of a request, and brings the rest back if there is one. */
static void vssd_end_bytes(struct request *req, blk_status_t status, unsigned int bytes)
{
	if (bytes == blk_rq_bytes(req)) {
		blk_mq_end_request(req, status);
	} else if (blk_update_request(req, status, bytes)) {
		req->rq_flags &= ~RQF_QUIET;
		blk_mq_requeue_request(req, true);
	} else {
		__blk_mq_end_request(req, status);
	}
}

/*
 * Ends the leading @bytes of a request as touching an evicted block. That is an answer and no
 * fault of the disk: the kernel log does not hear of it.
 */
static void vssd_end_evicted(struct vssd *vssd, struct request *req, unsigned int bytes)
{
	req->rq_flags |= RQF_QUIET;
	if (op_is_write(req_op(req))) {
		/* Its page will be clean, and holds what was never stored. */
		vssd_tidy_soon(vssd);
		vssd_end_bytes(req, BLK_STS_NOSPC, bytes);
	} else {
		vssd_end_bytes(req, BLK_STS_MEDIUM, bytes);
	}
}

static blk_status_t vssd_queue_rq(struct blk_mq_hw_ctx *hctx, const struct blk_mq_queue_data *bd)
{
	struct vssd *vssd = hctx->queue->queuedata;
	struct vssd_vq *vq = &vssd->vqs[hctx->queue_num];
	struct request *req = bd->rq;
	enum vssd_gate gate;
	unsigned long irq;
	unsigned int bytes;
	blk_status_t status;
	bool notify;
	int err = 0;

	if (unlikely(test_bit(VSSD_F_DEAD, &vssd->flags)))
		return BLK_STS_IOERR;
	status = vssd_prepare(vssd, req);
	if (unlikely(status))
		return status;
	blk_mq_start_request(req);

	spin_lock_irqsave(&vq->lock, irq);
	gate = vssd_gate(vssd, req, &bytes);
	switch (gate) {
	case VSSD_SEND:
		err = vssd_add_req(vssd, vq, req, bytes);
		/* A completion starts the queue again, if there is one to come. */
		if (err == -ENOSPC && (vq->inflight[0] || vq->inflight[1]))
			blk_mq_stop_hw_queue(hctx);
		else if (err == -ENOSPC)
			err = -ENOMEM;
		break;
	case VSSD_PARK:
		list_add_tail(&req->queuelist, &vq->parked);
		vq->parked_total++;
		break;
	case VSSD_FAIL:
		if (op_is_write(req_op(req)))
			vq->evicted_writes++;
		else
			vq->evicted_reads++;
		break;
	}
	/* The end of a batch is the end of it whatever became of its last request. */
	notify = (bd->last || err) && virtqueue_kick_prepare(vq->vq);
	spin_unlock_irqrestore(&vq->lock, irq);
	if (notify)
		virtqueue_notify(vq->vq);

	if (gate == VSSD_FAIL) {
		vssd_end_evicted(vssd, req, bytes);
		return BLK_STS_OK;
	}
	switch (err) {
	case 0:
		return BLK_STS_OK;
	case -ENODATA:
		vssd_end_bytes(req, BLK_STS_OK,
			       ((struct vssd_pdu *)blk_mq_rq_to_pdu(req))->bytes);
		return BLK_STS_OK;
	case -ENOSPC:
		return BLK_STS_DEV_RESOURCE;
	case -ENOMEM:
		return BLK_STS_RESOURCE;
	default:
		return BLK_STS_IOERR;
	}
}

static void vssd_commit_rqs(struct blk_mq_hw_ctx *hctx)
{
	struct vssd *vssd = hctx->queue->queuedata;
	struct vssd_vq *vq = &vssd->vqs[hctx->queue_num];
	bool notify;

	if (unlikely(test_bit(VSSD_F_DEAD, &vssd->flags)))
		return;
	spin_lock_irq(&vq->lock);
	notify = virtqueue_kick_prepare(vq->vq);
	spin_unlock_irq(&vq->lock);
	if (notify)
		virtqueue_notify(vq->vq);
}

/* ---- out of the ring ---- */

static blk_status_t vssd_result(u8 status)
{
	switch (status) {
	case VIRTIO_BLK_S_OK:
		return BLK_STS_OK;
	case VIRTIO_BLK_S_UNSUPP:
		return BLK_STS_NOTSUPP;
	case VSSD_S_NOSPACE:
		return BLK_STS_NOSPC;
	default:
		return BLK_STS_IOERR;
	}
}

static void vssd_complete_rq(struct request *req)
{
	struct vssd_pdu *vr = blk_mq_rq_to_pdu(req);
	struct vssd *vssd = req->q->queuedata;

	if (likely(vr->status != VSSD_S_EVICTED) || !req->bio) {
		vssd_end_bytes(req, vssd_result(vr->status), vr->bytes);
		return;
	}

	/* The host took a block by force, and the news of it is still to come. */
	set_bit(VSSD_F_RESYNC, &vssd->flags);
	vssd_resize_kick(vssd);
	if (req_op(req) == REQ_OP_DISCARD) {
		vssd_end_bytes(req, BLK_STS_OK, vr->bytes);
		return;
	}
	if (vr->bytes > req->bio->bi_iter.bi_size) {
		/* Of several merged bios only some touch it. RQF_DONTPREP: merge no more. */
		vr->single = true;
		req->rq_flags |= RQF_DONTPREP;
		blk_mq_requeue_request(req, true);
		return;
	}
	vssd_end_evicted(vssd, req, vr->bytes);
}

/* Context: vssd_vq.lock held. */
static void vssd_retire(struct vssd *vssd, struct vssd_vq *vq, struct vssd_pdu *vr)
{
	vq->completed++;
	if (!--vq->inflight[vr->parity] && vr->parity != vq->parity)
		wake_up(&vssd->drain_wait);
	blk_mq_complete_request(blk_mq_rq_from_pdu(vr));
}

/*
 * Takes from a ring what the device answered. Returns whether block requests were among it.
 *
 * Context: vssd_vq.lock held.
 */
static bool vssd_vq_take(struct vssd *vssd, struct vssd_vq *vq)
{
	bool retired = false;
	unsigned int len;
	void *token;

	while ((token = virtqueue_get_buf(vq->vq, &len))) {
		if (vssd_token_is_msg(token)) {
			vssd_chan_answered(vssd, token, true);
		} else {
			vssd_retire(vssd, vq, token);
			retired = true;
		}
	}
	return retired;
}

static void vssd_vq_done(struct virtqueue *virtqueue)
{
	struct vssd *vssd = virtqueue->vdev->priv;
	struct vssd_vq *vq = &vssd->vqs[virtqueue->index];
	bool retired = false;
	unsigned long irq;

	spin_lock_irqsave(&vq->lock, irq);
	while (!vq->closed) {
		virtqueue_disable_cb(virtqueue);
		retired |= vssd_vq_take(vssd, vq);
		if (virtqueue_enable_cb(virtqueue) || virtqueue_is_broken(virtqueue))
			break;
	}
	if (retired)
		blk_mq_start_stopped_hw_queues(vssd->disk->queue, true);
	spin_unlock_irqrestore(&vq->lock, irq);
}

/* ---- fence and drain ---- */

/**
 * vssd_blk_drain - wait for the requests in flight
 * @vssd: the disk
 *
 * After it every request that entered a ring before the call is answered, and every request that
 * enters after it was looked at by the gate after the call. Requests of other blocks go on
 * meanwhile.
 *
 * Context: work item.
 * Return: 0, or -EINTR when the device stops first.
 */
int vssd_blk_drain(struct vssd *vssd)
{
	unsigned int i, old;

	for (i = 0; i < vssd->num_vqs; i++) {
		struct vssd_vq *vq = &vssd->vqs[i];

		/* A drain that was cut short may have left some of the other parity. */
		old = !vq->parity;
		wait_event_idle(vssd->drain_wait, !READ_ONCE(vq->inflight[old]) ||
				vssd_stopping(vssd));
		spin_lock_irq(&vq->lock);
		vq->parity = old;
		spin_unlock_irq(&vq->lock);
	}
	for (i = 0; i < vssd->num_vqs; i++) {
		struct vssd_vq *vq = &vssd->vqs[i];

		old = !vq->parity;
		wait_event_idle(vssd->drain_wait, !READ_ONCE(vq->inflight[old]) ||
				vssd_stopping(vssd));
	}
	return vssd_stopping(vssd) ? -EINTR : 0;
}

/**
 * vssd_blk_release_parked - look again at the requests that wait for a fence
 * @vssd: the disk, whose block states were changed before the call
 */
void vssd_blk_release_parked(struct vssd *vssd)
{
	struct request *req, *next;
	bool any = false;
	LIST_HEAD(parked);
	unsigned int i;

	for (i = 0; i < vssd->num_vqs; i++) {
		struct vssd_vq *vq = &vssd->vqs[i];

		spin_lock_irq(&vq->lock);
		list_splice_tail_init(&vq->parked, &parked);
		spin_unlock_irq(&vq->lock);
	}
	list_for_each_entry_safe(req, next, &parked, queuelist) {
		list_del_init(&req->queuelist);
		blk_mq_requeue_request(req, false);
		any = true;
	}
	if (any)
		blk_mq_kick_requeue_list(vssd->disk->queue);
}

/* Whether the device owes an answer, and how many requests it ever answered: for the watchdog. */
bool vssd_blk_busy(struct vssd *vssd, u64 *completed)
{
	unsigned int busy = READ_ONCE(vssd->call.in_ring), i;

	*completed = 0;
	for (i = 0; i < vssd->num_vqs; i++) {
		struct vssd_vq *vq = &vssd->vqs[i];

		spin_lock_irq(&vq->lock);
		busy += vq->inflight[0] + vq->inflight[1];
		*completed += vq->completed;
		spin_unlock_irq(&vq->lock);
	}
	return busy;
}

/**
 * vssd_blk_reclaim - take everything back from a device that was reset
 * @vssd: the disk; nothing enters its rings any more
 *
 * What the device did not answer fails. An interrupt that comes late finds the rings closed.
 */
void vssd_blk_reclaim(struct vssd *vssd)
{
	unsigned int i;
	void *token;

	for (i = 0; i < vssd->num_vqs; i++) {
		struct vssd_vq *vq = &vssd->vqs[i];

		spin_lock_irq(&vq->lock);
		vq->closed = true;
		vssd_vq_take(vssd, vq);
		while ((token = virtqueue_detach_unused_buf(vq->vq))) {
			if (vssd_token_is_msg(token)) {
				vssd_chan_answered(vssd, token, false);
			} else {
				((struct vssd_pdu *)token)->status = VIRTIO_BLK_S_IOERR;
				vssd_retire(vssd, vq, token);
			}
		}
		spin_unlock_irq(&vq->lock);
	}
}

/**
 * vssd_blk_kill - give up on a device that does not answer
 * @vssd: the disk, which is being removed
 *
 * Once it is reset the device touches memory no more, so what it holds can be failed.
 */
void vssd_blk_kill(struct vssd *vssd)
{
	struct request_queue *q = vssd->disk->queue;

	set_bit(VSSD_F_DEAD, &vssd->flags);
	/* Wait for whoever is about to notify the device: requests here, messages by their lock. */
	blk_mq_quiesce_queue(q);
	spin_lock_irq(&vssd->vqs[0].lock);
	spin_unlock_irq(&vssd->vqs[0].lock);

	virtio_reset_device(vssd->vdev);
	vssd_blk_reclaim(vssd);

	blk_mq_unquiesce_queue(q);
	blk_mq_start_stopped_hw_queues(q, true);
	wake_up_all(&vssd->chan_wait);
	wake_up_all(&vssd->drain_wait);
}

/* ---- queues ---- */

/**
 * vssd_blk_init_vqs - find the virtqueues
 * @vssd: the disk
 *
 * Return: 0 or a negative errno. vssd_blk_free_vqs() undoes it.
 */
int vssd_blk_init_vqs(struct vssd *vssd)
{
	struct virtio_device *vdev = vssd->vdev;
	struct vssd_compat_vqs found;
	unsigned int i;
	u16 num;
	int err;

	err = virtio_cread_feature(vdev, VIRTIO_BLK_F_MQ, struct virtio_blk_config, num_queues,
				   &num);
	if (err || !num)
		num = 1;
	num = min_t(unsigned int, num, nr_cpu_ids);

	vssd->vqs = kcalloc(num, sizeof(*vssd->vqs), GFP_KERNEL);
	if (!vssd->vqs)
		return -ENOMEM;
	err = vssd_compat_alloc_vqs(&found, num);
	if (err)
		goto out_free;
	for (i = 0; i < num; i++) {
		struct vssd_vq *vq = &vssd->vqs[i];

		spin_lock_init(&vq->lock);
		INIT_LIST_HEAD(&vq->parked);
		snprintf(vq->name, sizeof(vq->name), "req.%u", i);
		vssd_compat_set_vq(&found, i, vssd_vq_done, vq->name);
	}
	err = vssd_compat_find_vqs(vdev, &found, num);
	if (!err)
		for (i = 0; i < num; i++)
			vssd->vqs[i].vq = found.vqs[i];
	vssd_compat_free_vqs(&found);
	if (err)
		goto out_free;
	vssd->num_vqs = num;
	return 0;

out_free:
	kfree(vssd->vqs);
	vssd->vqs = NULL;
	return err;
}

void vssd_blk_free_vqs(struct vssd *vssd)
{
	vssd->vdev->config->del_vqs(vssd->vdev);
	kfree(vssd->vqs);
	vssd->vqs = NULL;
	vssd->num_vqs = 0;
}

static void vssd_map_queues(struct blk_mq_tag_set *set)
{
	struct vssd *vssd = set->driver_data;

	vssd_compat_map_queues(&set->map[HCTX_TYPE_DEFAULT], vssd->vdev);
}

static const struct blk_mq_ops vssd_mq_ops = {
	.queue_rq	= vssd_queue_rq,
	.commit_rqs	= vssd_commit_rqs,
	.complete	= vssd_complete_rq,
	.map_queues	= vssd_map_queues,
};

/* ---- disk ---- */

/* A field of the config space, or @fallback when the device does not have it. */
static u32 vssd_config32(struct virtio_device *vdev, unsigned int feature, unsigned int offset,
			 u32 fallback)
{
	return virtio_has_feature(vdev, feature) ? virtio_cread32(vdev, offset) : fallback;
}

static u16 vssd_config16(struct virtio_device *vdev, unsigned int feature, unsigned int offset)
{
	return virtio_has_feature(vdev, feature) ? virtio_cread16(vdev, offset) : 0;
}

static u8 vssd_config8(struct virtio_device *vdev, unsigned int feature, unsigned int offset)
{
	return virtio_has_feature(vdev, feature) ? virtio_cread8(vdev, offset) : 0;
}

#define VSSD_CONFIG(field)	offsetof(struct virtio_blk_config, field)

/*
 * Reads what the device can take. It may leave out or claim anything: each value has a fallback
 * and a bound.
 */
static int vssd_read_limits(struct vssd *vssd, struct vssd_limits *lim)
{
	struct virtio_device *vdev = vssd->vdev;
	u32 logical, max;

	logical = vssd_config32(vdev, VIRTIO_BLK_F_BLK_SIZE, VSSD_CONFIG(blk_size), SECTOR_SIZE);
	if (logical < SECTOR_SIZE || logical > min_t(u32, PAGE_SIZE, vssd->block_size) ||
	    !is_power_of_2(logical)) {
		dev_err(&vdev->dev, "logical block size %u is not supported\n", logical);
		return -EINVAL;
	}
	lim->logical_block_size = logical;
	lim->physical_block_size = logical <<
		min_t(u8, vssd_config8(vdev, VIRTIO_BLK_F_TOPOLOGY,
				       VSSD_CONFIG(physical_block_exp)), 12);
	lim->io_min = logical * vssd_config16(vdev, VIRTIO_BLK_F_TOPOLOGY,
					      VSSD_CONFIG(min_io_size));
	max = vssd_config32(vdev, VIRTIO_BLK_F_TOPOLOGY, VSSD_CONFIG(opt_io_size), 0);
	lim->io_opt = logical * min_t(u32, max, U16_MAX);

	lim->max_segments = clamp(vssd_config32(vdev, VIRTIO_BLK_F_SEG_MAX,
						VSSD_CONFIG(seg_max), 1),
				  1U, VSSD_MAX_SEGMENTS);
	/* The block layer cannot split a page, and a device that takes less cannot be used anyway. */
	max = vssd_config32(vdev, VIRTIO_BLK_F_SIZE_MAX, VSSD_CONFIG(size_max), U32_MAX);
	lim->max_segment_size = clamp_t(size_t, min_t(size_t, virtio_max_dma_size(vdev), max),
					PAGE_SIZE, U32_MAX);
	lim->write_cache = virtio_has_feature(vdev, VIRTIO_BLK_F_FLUSH);

	/* A request counts its bytes in 32 bits; whole blocks suit the device. */
	vssd->max_discard_sectors = (U32_MAX >> SECTOR_SHIFT) & ~((1U << vssd->block_shift) - 1);
	if (virtio_has_feature(vdev, VIRTIO_BLK_F_DISCARD)) {
		max = virtio_cread32(vdev, VSSD_CONFIG(max_discard_sectors));
		if (max)
			vssd->max_discard_sectors = min(vssd->max_discard_sectors, max);
		max = virtio_cread32(vdev, VSSD_CONFIG(max_discard_seg));
		vssd->max_discard_ranges = clamp_t(u32, max, 1, VSSD_MAX_DISCARD_RANGES);
		max = virtio_cread32(vdev, VSSD_CONFIG(discard_sector_alignment));
		lim->discard_granularity = max_t(u32, logical,
						 min_t(u32, max, vssd->block_size >> SECTOR_SHIFT)
						 << SECTOR_SHIFT);
		lim->max_discard_sectors = vssd->max_discard_sectors;
		lim->max_discard_ranges = vssd->max_discard_ranges;
	}
	if (virtio_has_feature(vdev, VIRTIO_BLK_F_WRITE_ZEROES)) {
		max = virtio_cread32(vdev, VSSD_CONFIG(max_write_zeroes_sectors));
		lim->max_write_zeroes_sectors =
			min(max ?: U32_MAX, VSSD_MAX_ZERO_BLOCKS << vssd->block_shift);
	}
	return 0;
}

/* Names as the SCSI disks have: a to z, then aa. */
static void vssd_format_name(char *name, size_t size, int index)
{
	char *p = name + size;

	*--p = '\0';
	do {
		*--p = 'a' + index % 26;
		index = index / 26 - 1;
	} while (index >= 0 && p > name);
	memmove(name, p, name + size - p);
}

static void vssd_free_disk(struct gendisk *disk)
{
	vssd_free(disk->private_data);
}

static const struct block_device_operations vssd_fops = {
	.owner		= THIS_MODULE,
	.free_disk	= vssd_free_disk,
};

/**
 * vssd_blk_alloc_disk - make the block device, not yet visible
 * @vssd: the disk, its virtqueues found and its geometry known
 *
 * From here on the last put_disk() frees @vssd.
 *
 * Return: 0 or a negative errno.
 */
int vssd_blk_alloc_disk(struct vssd *vssd)
{
	struct blk_mq_tag_set *set = &vssd->tag_set;
	unsigned int slots = virtqueue_get_vring_size(vssd->vqs[0].vq);
	struct vssd_limits lim = {};
	struct gendisk *disk;
	int err;

	err = vssd_read_limits(vssd, &lim);
	if (err)
		return err;

	if (slots < VSSD_MIN_RING) {
		dev_err(&vssd->vdev->dev, "rings of %u entries are too small\n", slots);
		return -EINVAL;
	}
	/* With indirect descriptors a request takes a slot, without them three at least. */
	if (!virtio_has_feature(vssd->vdev, VIRTIO_RING_F_INDIRECT_DESC)) {
		lim.max_segments = min(lim.max_segments, slots - VSSD_RESERVED_DESCS - 2);
		slots /= 3;
	}
	set->ops = &vssd_mq_ops;
	set->queue_depth = max_t(int, slots - VSSD_RESERVED_SLOTS, 1);
	set->numa_node = NUMA_NO_NODE;
	set->flags = VSSD_COMPAT_TAG_FLAGS;
	set->cmd_size = sizeof(struct vssd_pdu) + lim.max_segments * sizeof(struct scatterlist);
	set->driver_data = vssd;
	set->nr_hw_queues = vssd->num_vqs;
	set->nr_maps = 1;
	err = blk_mq_alloc_tag_set(set);
	if (err)
		return err;

	disk = vssd_compat_alloc_disk(set, &lim, vssd);
	if (IS_ERR(disk)) {
		blk_mq_free_tag_set(set);
		return PTR_ERR(disk);
	}
	strscpy(disk->disk_name, "vssd", DISK_NAME_LEN);
	vssd_format_name(disk->disk_name + 4, DISK_NAME_LEN - 4, vssd->index);
	disk->fops = &vssd_fops;
	disk->private_data = vssd;
	set_disk_ro(disk, virtio_has_feature(vssd->vdev, VIRTIO_BLK_F_RO));
	/* The capacity of the config space is for drivers that do not know vSSDs. */
	set_capacity(disk, (sector_t)vssd->blocks.total << vssd->block_shift);
	vssd->disk = disk;
	return 0;
}
