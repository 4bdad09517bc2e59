// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Guest channel: messages of vssd_abi.h on the first virtqueue, beside block requests.
 *
 * This file knows the wire and nothing of what the messages are for. It checks all that the
 * device says and turns its results into an errno, once, here:
 *
 *	-ESTALE		the session is over, HELLO comes next
 *	-ETXTBSY	the device is busy, again later
 *	-ENODATA	WAIT came back without news
 *	-EINVAL		the device calls a field out of bounds
 *	-EOPNOTSUPP	the device does not know the message: no vSSD (any more)
 *	-EPROTO		the device breaks the protocol, or says that we do
 *	-EINTR		the driver is being stopped, or the device was reset: no answer will come
 *	-ETIMEDOUT	no answer while probing
 *
 * There is one sender at a time: probe, then the work item. It waits without a limit, even while
 * the driver is being stopped: a message under way may take effect at any time, so nothing can be
 * said of its blocks before it is back. Deadlines are the host's. When the device is dead,
 * vssd_blk_kill() resets it and brings the message back.
 */
#include <linux/ctype.h>
#include <linux/log2.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>

#include "vssd.h"

#define VSSD_PROBE_TIMEOUT	(30 * HZ)

/* Room for the ranges of STATE. */
#define VSSD_STATE_BYTES	(64 * 1024)

/* Room for WAIT or its answer. */
#define VSSD_WAIT_BYTES		64

/* ---- transport ---- */

/**
 * vssd_chan_answered - a message left the ring
 * @vssd: the disk
 * @token: what virtqueue_get_buf() returned
 * @answered: false when it was taken back from a device that was reset
 *
 * Context: lock of the first virtqueue held.
 */
void vssd_chan_answered(struct vssd *vssd, void *token, bool answered)
{
	struct vssd_msg *msg = (void *)((unsigned long)token & ~VSSD_TOKEN_MSG);

	msg->in_ring = false;
	msg->reclaimed = !answered;
	/* What the device and we wrote is seen by who sees @done. */
	smp_store_release(&msg->done, true);
	if (msg == &vssd->wait)
		vssd_resize_kick(vssd);
	else
		wake_up(&vssd->chan_wait);
}

/* Tries once. Returns -ENOSPC when the ring is full. */
static int vssd_chan_try_send(struct vssd *vssd, struct vssd_msg *msg, size_t tx_len, size_t rx_len)
{
	struct scatterlist hdr, tx, rx, status, *sgs[4];
	struct vssd_vq *vq = &vssd->vqs[0];
	unsigned int out = 0, in = 0;
	unsigned long irq;
	int err;

	sg_init_one(&hdr, &msg->hdr, sizeof(msg->hdr));
	sgs[out++] = &hdr;
	if (tx_len) {
		sg_init_one(&tx, msg->tx, tx_len);
		sgs[out++] = &tx;
	}
	sg_init_one(&rx, msg->rx, rx_len);
	sgs[out + in++] = &rx;
	sg_init_one(&status, &msg->status, sizeof(msg->status));
	sgs[out + in++] = &status;

	spin_lock_irqsave(&vq->lock, irq);
	if (vssd_stopping(vssd)) {
		err = -EINTR;
	} else if (WARN_ON_ONCE(msg->in_ring)) {
		err = -EPROTO;
	} else {
		err = virtqueue_add_sgs(vq->vq, sgs, out, in,
					(void *)((unsigned long)msg | VSSD_TOKEN_MSG), GFP_ATOMIC);
		msg->in_ring = !err;
		msg->done = false;
		msg->reclaimed = false;
	}
	/* Under the lock, so that vssd_blk_kill() can wait for it. Messages are rare. */
	virtqueue_kick(vq->vq);
	spin_unlock_irqrestore(&vq->lock, irq);
	return err;
}

static int vssd_chan_send(struct vssd *vssd, struct vssd_msg *msg, u32 type, size_t tx_len,
			  size_t rx_len)
{
	int err;

	msg->hdr.type = cpu_to_virtio32(vssd->vdev, type);
	msg->hdr.ioprio = 0;
	msg->hdr.sector = 0;
	msg->status = VIRTIO_BLK_S_IOERR;
	/* An answer that is not written must not look like the one before. */
	memset(msg->rx, 0, min_t(size_t, rx_len, sizeof(struct vssd_hello_resp)));

	for (;;) {
		err = vssd_chan_try_send(vssd, msg, tx_len, rx_len);
		if (err != -ENOSPC && err != -ENOMEM)
			break;
		/* Only without indirect descriptors: block requests fill the ring. */
		wait_event_idle_timeout(vssd->chan_wait, vssd_stopping(vssd),
					msecs_to_jiffies(10));
	}
	if (!err)
		vssd->counters.messages++;
	return err;
}

/* The head that begins every answer. */
static int vssd_chan_head(struct vssd *vssd, const struct vssd_msg *msg, struct vssd_news *news)
{
	struct vssd_resp resp;

	if (msg->reclaimed)
		return -EINTR;
	switch (msg->status) {
	case VIRTIO_BLK_S_OK:
		break;
	case VIRTIO_BLK_S_UNSUPP:
		return -EOPNOTSUPP;
	default:
		return -EPROTO;
	}

	memcpy(&resp, msg->rx, sizeof(resp));
	switch (le32_to_cpu(resp.result)) {
	case VSSD_RES_OK:
		break;
	case VSSD_RES_STALE:
		return -ESTALE;
	case VSSD_RES_NO_NEWS:
		return -ENODATA;
	case VSSD_RES_BUSY:
		return -ETXTBSY;
	case VSSD_RES_INVALID:
		return -EINVAL;
	default:
		return -EPROTO;
	}
	*news = (struct vssd_news) {
		.seq		= le64_to_cpu(resp.seq),
		.requested	= le32_to_cpu(resp.requested_blocks),
		.plugged	= le32_to_cpu(resp.plugged_blocks),
		.count		= le32_to_cpu(resp.count),
	};
	/* HELLO has yet to say how many there are. */
	if (msg->hdr.type != cpu_to_virtio32(vssd->vdev, VSSD_T_HELLO) &&
	    (news->requested > vssd->blocks.total || news->plugged > vssd->blocks.total))
		return -EPROTO;
	return 0;
}

/* Sends a message and waits for the answer, whatever it says. */
static int vssd_chan_exchange(struct vssd *vssd, u32 type, size_t tx_len, size_t rx_len)
{
	struct vssd_msg *msg = &vssd->call;
	int err;

	err = vssd_chan_send(vssd, msg, type, tx_len, rx_len);
	if (err)
		return err;
	if (!wait_event_idle_timeout(vssd->chan_wait, READ_ONCE(msg->done),
				     vssd->live ? MAX_SCHEDULE_TIMEOUT : VSSD_PROBE_TIMEOUT))
		return -ETIMEDOUT;
	smp_rmb();	/* pairs with vssd_chan_answered() */
	return msg->reclaimed ? -EINTR : 0;
}

static int vssd_chan_call(struct vssd *vssd, u32 type, size_t tx_len, size_t rx_len,
			  struct vssd_news *news)
{
	int err = vssd_chan_exchange(vssd, type, tx_len, rx_len);

	return err ?: vssd_chan_head(vssd, &vssd->call, news);
}

static void vssd_chan_fill(const struct vssd *vssd, void *tx, u32 count, u32 flags)
{
	struct vssd_req *req = tx;

	req->epoch = cpu_to_le64(vssd->epoch);
	req->count = cpu_to_le32(count);
	req->flags = cpu_to_le32(flags);
}

/* ---- messages ---- */

/* Names come from the host and go to /proc, /sys and the log. */
static void vssd_chan_copy_name(char *to, const u8 *from, size_t size)
{
	size_t i;

	for (i = 0; i < size && from[i]; i++)
		to[i] = isgraph(from[i]) ? from[i] : '?';
	to[i] = '\0';
}

static int vssd_chan_take_geometry(struct vssd *vssd, const struct vssd_hello_resp *resp)
{
	u32 block_size = le32_to_cpu(resp->block_size);
	u32 total = le32_to_cpu(resp->total_blocks);
	u32 min = le32_to_cpu(resp->min_blocks);

	if (le32_to_cpu(resp->magic) != VSSD_MAGIC || le16_to_cpu(resp->version) != VSSD_VERSION ||
	    !resp->epoch || !resp->max_ranges ||
	    !is_power_of_2(block_size) || block_size < SZ_4K || block_size > SZ_2M ||
	    !total || total > VSSD_MAX_BLOCKS || min > total) {
		dev_err(&vssd->vdev->dev, "HELLO: unusable geometry: %u blocks of %u bytes\n",
			total, block_size);
		return -EPROTO;
	}
	if (total < vssd->blocks.total ||
	    (vssd->blocks.total && block_size != vssd->block_size)) {
		dev_err(&vssd->vdev->dev,
			"HELLO: %u blocks of %u bytes, but it was %u blocks of %u bytes\n",
			total, block_size, vssd->blocks.total, vssd->block_size);
		return -EPROTO;
	}
	vssd->hello_total = total;
	vssd->block_size = block_size;
	vssd->block_shift = ilog2(block_size) - SECTOR_SHIFT;
	vssd->min_blocks = min;
	vssd->max_ranges = min(le32_to_cpu(resp->max_ranges), vssd->msg_ranges);
	vssd->epoch = le64_to_cpu(resp->epoch);
	vssd_chan_copy_name(vssd->name, resp->name, VSSD_NAME_LEN);
	return 0;
}

/**
 * vssd_chan_hello - begin a session
 * @vssd: the disk. Its block size is set at the first time and compared afterwards; its blocks may
 *	have become more since: vssd->hello_total.
 * @news: the sizes
 */
int vssd_chan_hello(struct vssd *vssd, struct vssd_news *news)
{
	struct vssd_hello_req *req = vssd->call.tx;
	struct vssd_hello_resp resp;
	int err;

	memset(req, 0, sizeof(*req));
	req->magic = cpu_to_le32(VSSD_MAGIC);
	req->version = cpu_to_le16(VSSD_VERSION);
	strscpy(req->driver, "vssd.ko " VSSD_DRIVER_VERSION, sizeof(req->driver));

	err = vssd_chan_call(vssd, VSSD_T_HELLO, sizeof(*req), sizeof(resp), news);
	if (err)
		return err;
	memcpy(&resp, vssd->call.rx, sizeof(resp));
	err = vssd_chan_take_geometry(vssd, &resp);
	if (err)
		return err;
	if (news->requested > vssd->hello_total || news->plugged > vssd->hello_total)
		return -EPROTO;
	vssd->counters.hellos++;
	return 0;
}

/**
 * vssd_chan_get_id - read the serial number
 * @vssd: the disk; vssd->serial stays empty when the device has none
 */
int vssd_chan_get_id(struct vssd *vssd)
{
	int err = vssd_chan_exchange(vssd, VIRTIO_BLK_T_GET_ID, 0, VIRTIO_BLK_ID_BYTES);

	if (!err && vssd->call.status == VIRTIO_BLK_S_OK)
		vssd_chan_copy_name(vssd->serial, vssd->call.rx, VIRTIO_BLK_ID_BYTES);
	return err;
}

/**
 * vssd_chan_state - ask for the plugged set
 * @vssd: the disk
 * @flags: VSSD_STATE_F_*
 * @start: first block to tell; total_blocks to ask for the sizes only
 * @page: filled for vssd_chan_next_range(); valid until the next message
 * @news: the sizes
 */
int vssd_chan_state(struct vssd *vssd, u32 flags, u32 start, struct vssd_state_page *page,
		    struct vssd_news *news)
{
	struct vssd_state_req *req = vssd->call.tx;
	struct vssd_state_resp *resp = vssd->call.rx;
	size_t rx_len = start < vssd->blocks.total ? VSSD_STATE_BYTES : sizeof(*resp);
	int err;

	memset(req, 0, sizeof(*req));
	vssd_chan_fill(vssd, req, 0, flags);
	req->start = cpu_to_le32(start);
	err = vssd_chan_call(vssd, VSSD_T_STATE, sizeof(*req), rx_len, news);
	if (err)
		return err;

	page->next = le32_to_cpu(READ_ONCE(resp->next));
	page->count = news->count;
	page->index = 0;
	page->floor = start;
	if (page->next > vssd->blocks.total ||
	    (page->next <= start && page->next != vssd->blocks.total) ||
	    page->count > (rx_len - sizeof(*resp)) / sizeof(struct vssd_range))
		return -EPROTO;
	return 0;
}

/**
 * vssd_chan_next_range - the next range that STATE told
 * @vssd: the disk
 * @page: from vssd_chan_state()
 * @range: the range
 *
 * The ranges ascend, are not empty, do not overlap and end before page->next.
 *
 * Return: 1, 0 after the last one, -EPROTO when the device lies.
 */
int vssd_chan_next_range(const struct vssd *vssd, struct vssd_state_page *page,
			 struct vssd_span *range)
{
	const struct vssd_range *wire = vssd->call.rx + sizeof(struct vssd_state_resp);

	if (page->index == page->count)
		return 0;
	wire += page->index++;
	range->start = le32_to_cpu(READ_ONCE(wire->start));
	range->count = le32_to_cpu(READ_ONCE(wire->count));
	if (range->start < page->floor || !range->count || range->start > page->next ||
	    range->count > page->next - range->start)
		return -EPROTO;
	page->floor = range->start + range->count;
	return 1;
}

/**
 * vssd_chan_change - send UNPLUG or PLUG
 * @vssd: the disk
 * @type: VSSD_T_UNPLUG or VSSD_T_PLUG
 * @spans: the ranges
 * @count: how many, at most vssd->max_ranges
 * @status: VSSD_R_* of each range, valid until the next message
 * @news: the sizes afterwards
 */
int vssd_chan_change(struct vssd *vssd, u32 type, const struct vssd_span *spans, u32 count,
		     const u8 **status, struct vssd_news *news)
{
	struct vssd_range *wire = vssd->call.tx + sizeof(struct vssd_req);
	u8 *rx = vssd->call.rx + sizeof(struct vssd_resp);
	u32 i;
	int err;

	vssd_chan_fill(vssd, vssd->call.tx, count, 0);
	for (i = 0; i < count; i++) {
		wire[i].start = cpu_to_le32(spans[i].start);
		wire[i].count = cpu_to_le32(spans[i].count);
	}
	/* No value of VSSD_R_*: a status that is not written is no consent. */
	memset(rx, 0xff, count);
	err = vssd_chan_call(vssd, type, sizeof(struct vssd_req) + count * sizeof(*wire),
			     sizeof(struct vssd_resp) + count, news);
	if (err)
		return err;
	if (news->count != count)
		return -EPROTO;
	*status = rx;
	return 0;
}

/**
 * vssd_chan_decline - tell that the requested size will not be reached
 * @vssd: the disk
 * @seq: the news that this answers
 * @could_give: blocks
 * @reason: VSSD_DECLINE_*
 * @news: the sizes
 */
int vssd_chan_decline(struct vssd *vssd, u64 seq, u32 could_give, u32 reason,
		      struct vssd_news *news)
{
	struct vssd_decline_req *req = vssd->call.tx;

	vssd_chan_fill(vssd, req, 0, 0);
	req->seq = cpu_to_le64(seq);
	req->could_give = cpu_to_le32(could_give);
	req->reason = cpu_to_le32(reason);
	return vssd_chan_call(vssd, VSSD_T_DECLINE, sizeof(*req), sizeof(struct vssd_resp), news);
}

/**
 * vssd_chan_pull - ask for more
 * @vssd: the disk
 * @blocks: on top of the requested size
 * @urgency: VSSD_PULL_*
 * @news: the sizes
 */
int vssd_chan_pull(struct vssd *vssd, u32 blocks, u32 urgency, struct vssd_news *news)
{
	struct vssd_pull_req *req = vssd->call.tx;

	vssd_chan_fill(vssd, req, 0, 0);
	req->want_blocks = cpu_to_le32(blocks);
	req->urgency = cpu_to_le32(urgency);
	return vssd_chan_call(vssd, VSSD_T_PULL, sizeof(*req), sizeof(struct vssd_resp), news);
}

/**
 * vssd_chan_report - tell how much could go
 * @vssd: the disk
 * @report: blocks, by what it would cost
 * @news: the sizes
 */
int vssd_chan_report(struct vssd *vssd, const struct vssd_report *report, struct vssd_news *news)
{
	struct vssd_report_req *req = vssd->call.tx;

	vssd_chan_fill(vssd, req, 0, 0);
	req->free_blocks = cpu_to_le32(report->free);
	req->clean_cold_blocks = cpu_to_le32(report->clean_cold);
	req->clean_hot_blocks = cpu_to_le32(report->clean_hot);
	req->dirty_blocks = cpu_to_le32(report->dirty);
	return vssd_chan_call(vssd, VSSD_T_REPORT, sizeof(*req), sizeof(struct vssd_resp), news);
}

/**
 * vssd_chan_arm_wait - leave a WAIT with the device
 * @vssd: the disk, which has none there
 *
 * When it comes back the work item is woken.
 */
int vssd_chan_arm_wait(struct vssd *vssd)
{
	struct vssd_wait_req *req = vssd->wait.tx;

	vssd_chan_fill(vssd, req, 0, 0);
	req->seq_seen = cpu_to_le64(vssd->seq);
	vssd->wait_epoch = vssd->epoch;
	return vssd_chan_send(vssd, &vssd->wait, VSSD_T_WAIT, sizeof(*req),
			      sizeof(struct vssd_wait_resp));
}

/* Whether a WAIT is with the device. */
bool vssd_chan_waiting(const struct vssd *vssd)
{
	return READ_ONCE(vssd->wait.in_ring);
}

/**
 * vssd_chan_take_wait - read the answer of WAIT
 * @vssd: the disk
 * @news: what it says
 *
 * Return: 0, -EAGAIN when there is no answer to read, else as above.
 */
int vssd_chan_take_wait(struct vssd *vssd, struct vssd_news *news)
{
	struct vssd_wait_resp resp;
	int err;

	/* Pairs with vssd_chan_answered(). */
	if (!smp_load_acquire(&vssd->wait.done))
		return -EAGAIN;
	vssd->wait.done = false;
	/* Whatever it says, it is of a session that is over. */
	if (vssd->wait_epoch != vssd->epoch)
		return -ENODATA;
	err = vssd_chan_head(vssd, &vssd->wait, news);
	if (err)
		return err;
	memcpy(&resp, vssd->wait.rx, sizeof(resp));
	news->flags = le32_to_cpu(resp.flags);
	news->reason = le32_to_cpu(resp.reason);
	news->deadline_ms = le32_to_cpu(resp.deadline_ms);
	return 0;
}

/* ---- buffers ---- */

void vssd_chan_free(struct vssd *vssd)
{
	kfree(vssd->call.tx);
	kfree(vssd->call.rx);
	kfree(vssd->wait.tx);
	kfree(vssd->wait.rx);
	kvfree(vssd->batch);
}

/**
 * vssd_chan_alloc - allocate the buffers of all messages
 * @vssd: the disk
 *
 * Nothing is allocated while blocks are being given up: that may be what memory waits for. After an
 * error vssd_chan_free() is still due.
 */
int vssd_chan_alloc(struct vssd *vssd)
{
	u32 ranges = VSSD_MAX_RANGES;

	BUILD_BUG_ON(sizeof(struct vssd_req) != 16);
	BUILD_BUG_ON(sizeof(struct vssd_resp) != 24);
	BUILD_BUG_ON(sizeof(struct vssd_hello_req) != 48);
	BUILD_BUG_ON(sizeof(struct vssd_hello_resp) != 96);
	BUILD_BUG_ON(sizeof(struct vssd_state_req) != 24);
	BUILD_BUG_ON(sizeof(struct vssd_state_resp) != 32);
	BUILD_BUG_ON(sizeof(struct vssd_wait_req) != 24);
	BUILD_BUG_ON(sizeof(struct vssd_wait_resp) != 40);
	BUILD_BUG_ON(sizeof(struct vssd_decline_req) != 32);
	BUILD_BUG_ON(sizeof(struct vssd_pull_req) != 24);
	BUILD_BUG_ON(sizeof(struct vssd_report_req) != 32);

	/* Fewer ranges in a message cost round trips only. */
	for (; ranges >= 512; ranges /= 2) {
		size_t size = sizeof(struct vssd_req) + ranges * sizeof(struct vssd_range);

		vssd->call.tx = kmalloc(size, GFP_KERNEL | __GFP_NOWARN);
		if (vssd->call.tx)
			break;
	}
	vssd->msg_ranges = ranges;
	vssd->call.rx = kmalloc(VSSD_STATE_BYTES, GFP_KERNEL);
	vssd->wait.tx = kzalloc(VSSD_WAIT_BYTES, GFP_KERNEL);
	vssd->wait.rx = kzalloc(VSSD_WAIT_BYTES, GFP_KERNEL);
	vssd->batch = kvmalloc_array(2 * ranges, sizeof(*vssd->batch), GFP_KERNEL);
	vssd->unplug = vssd->batch + ranges;
	if (!vssd->call.tx || !vssd->call.rx || !vssd->wait.tx || !vssd->wait.rx || !vssd->batch)
		return -ENOMEM;
	return 0;
}
