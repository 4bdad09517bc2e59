/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * Private definitions of the vSSD driver.
 *
 *	vssd_main.c	binding, probe and remove, suspend, the watchdog over dead devices
 *	vssd_blk.c	data path: requests of the block layer to the virtqueues and back
 *	vssd_chan.c	guest channel: a message to the device and its checked answer
 *	vssd_blocks.c	which blocks are plugged, fenced, written, used
 *	vssd_hints.c	the queue of blocks that user space would rather lose
 *	vssd_cache.c	page cache over a range of blocks
 *	vssd_resize.c	the work item that converges to the requested size
 *	vssd_shrink.c	what it does to give blocks up
 *	vssd_proc.c	/proc/vssd
 *	vssd_sysfs.c	/sys/block/<disk>/vssd, uevents
 *
 * The work item is the only one that sends on the channel and that changes the state of a block, so
 * neither needs a lock against other writers. Everybody else leaves a wish and wakes it.
 *
 * Locks: vssd_hints.lock, then vssd_blocks.lock; vssd.pull_lock alone. vssd_vq.lock is taken in
 * interrupts; of two queues, never both.
 */
#ifndef _VSSD_H
#define _VSSD_H

#include <linux/blk-mq.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/proc_fs.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_blk.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "vssd_abi.h"

#define VSSD_DRIVER_VERSION	"0.1.0"

/* What a device may claim at most: 4 TiB in the smallest blocks, 640 MiB of bitmaps. */
#define VSSD_MAX_BLOCKS		BIT(30)

/* Most ranges of a DISCARD; the rest of it takes another round trip. */
#define VSSD_MAX_DISCARD_RANGES	16

/* Most data segments of a request, whose scatterlist is a part of it. */
#define VSSD_MAX_SEGMENTS	126U

/* Tells a struct vssd_msg from a block request among the tokens of a ring. */
#define VSSD_TOKEN_MSG		1UL

struct vssd_span {
	u32 start;			/* block */
	u32 count;			/* blocks */
};

/* A virtqueue and what is in it. */
struct vssd_vq {
	struct virtqueue *vq;
	spinlock_t lock;		/* of the ring and of all below */
	unsigned int parity;		/* under which requests count that enter from now on */
	unsigned int inflight[2];	/* block requests in the ring: vssd_blk_drain() */
	bool closed;			/* the device was reset: the ring is not looked at */
	struct list_head parked;	/* requests that wait for a fence to be lifted */
	u64 completed;			/* block requests answered */
	u64 parked_total;
	u64 evicted_reads;		/* requests, or parts of them, failed with ENODATA */
	u64 evicted_writes;		/* and with ENOSPC */
	char name[16];
} ____cacheline_aligned_in_smp;

/* A message of the guest channel. */
struct vssd_msg {
	struct virtio_blk_outhdr hdr;
	u8 status;
	bool in_ring;			/* lock of the first virtqueue */
	bool reclaimed;			/* came back without an answer; valid once @done */
	bool done;
	void *tx;
	void *rx;
};

/* What the device says with an answer. */
struct vssd_news {
	u64 seq;
	u32 requested;
	u32 plugged;
	u32 count;			/* ranges or status bytes that follow */
	u32 flags;			/* VSSD_NEWS_*; this and below only of WAIT */
	u32 reason;			/* VSSD_REASON_* */
	u32 deadline_ms;
};

/* A page of the answer of STATE, and how far vssd_chan_next_range() is. */
struct vssd_state_page {
	u32 next;			/* block to go on with */
	u32 count;
	u32 index;
	u32 floor;			/* the next range cannot start before this block */
};

/*
 * The states of the blocks, a bit a block in each bitmap.
 *
 *			blocked	evicted
 *	plugged		0	0
 *	fenced		1	0	nominated: new I/O is parked until the outcome is known
 *	evicted		1	1	I/O fails
 *
 * The data path looks at @blocked under vssd_vq.lock, and further only when it finds a bit set. The
 * tables are replaced by larger ones only while the queue is frozen.
 */
struct vssd_blocks {
	struct mutex lock;		/* to change @evicted, or to copy it as of one moment */
	u32 total;
	u32 nr_evicted;
	unsigned long *blocked;
	unsigned long *evicted;
	unsigned long *written;		/* since vssd_blocks_forget_writes() */
	u16 *stamps;			/* seconds, when last used; NULL unless wanted */
	u32 *ages;			/* scratch to sort the stamps */
};

/* Hints, see vssd_hints.c. */
struct vssd_hints {
	struct mutex lock;		/* of all below */
	u32 total;			/* blocks of the disk */
	struct list_head chunks;	/* most expendable first */
	struct list_head aside;		/* tried in this pass, but busy */
	unsigned long *queued;		/* bitmap of all blocks that are hinted */
	u32 nr_blocks;			/* bits set therein */
	u32 generation;			/* how often the hints were cleared */
	bool in_hand;			/* some that were taken are being given up */
	wait_queue_head_t settled;	/* for !@in_hand */
};

/* How the driver chooses when there are not enough hints. */
enum vssd_nominate {
	VSSD_NOMINATE_HINTS,		/* not at all */
	VSSD_NOMINATE_BLANK,		/* any block, while no block holds data */
	VSSD_NOMINATE_EMPTY,		/* blocks that hold no data */
	VSSD_NOMINATE_COLD,		/* then those longest unused */
};

enum vssd_state {
	VSSD_IDLE,
	VSSD_SHRINKING,
	VSSD_GROWING,
	VSSD_DECLINED,
	VSSD_STALE,			/* no session, HELLO comes next */
	VSSD_BROKEN,			/* the device breaks the protocol: I/O only */
};

/* Bits of vssd.flags. */
enum {
	VSSD_F_STOPPING,		/* the work item leaves */
	VSSD_F_DEAD,			/* the device was reset for good: all I/O fails */
	VSSD_F_POLL_DUE,		/* ask for the sizes */
	VSSD_F_RESYNC,			/* read the plugged set */
	VSSD_F_HINTED,			/* hints or rules changed */
};

/* What user space says when it has no more hints. */
struct vssd_verdict {
	u64 seq;			/* the news it speaks of */
	u32 reason;			/* VSSD_DECLINE_*, 0: none was given */
	u32 could_give;			/* blocks, if asked again */
};

/* A wish for more blocks. */
struct vssd_pull {
	u32 blocks;			/* 0: none */
	u32 urgency;			/* VSSD_PULL_* */
	u64 ticket;			/* of the newest wish */
	u64 done;			/* ticket of the newest wish that was sent */
	int result;			/* of that one */
};

/* How many blocks could go, by what it would cost: VSSD_T_REPORT. */
struct vssd_report {
	u32 free;
	u32 clean_cold;
	u32 clean_hot;
	u32 dirty;
	bool known;			/* user space has said so */
	bool due;			/* and this session has not heard it */
};

struct vssd_counters {
	u64 messages;
	u64 hellos;
	u64 resyncs;
	u64 declines;
	u64 unplug_ranges;
	u64 unplugged_blocks;
	u64 plug_ranges;
	u64 plugged_blocks;
	u64 busy_ranges;		/* not sent as they were: in use, or written */
	u64 refused_ranges;		/* by the device */
};

struct vssd {
	struct virtio_device *vdev;
	struct gendisk *disk;
	struct blk_mq_tag_set tag_set;
	struct vssd_vq *vqs;
	unsigned int num_vqs;
	int index;
	bool live;			/* probe is over */
	unsigned long flags;		/* VSSD_F_* */

	/* From HELLO and the config space. Cannot change. */
	u32 block_size;
	unsigned int block_shift;	/* of sectors to blocks */
	u32 max_discard_sectors;
	u32 max_discard_ranges;
	char serial[VIRTIO_BLK_ID_BYTES + 1];

	/* Channel, vssd_chan.c. Probe, then work item. */
	bool session;
	u64 epoch;
	u64 wait_epoch;			/* in which WAIT was sent */
	u32 hello_total;		/* blocks, as of the newest HELLO */
	u32 min_blocks;
	u32 msg_ranges;			/* that our buffers hold */
	u32 max_ranges;			/* that the device takes, too */
	char name[VSSD_NAME_LEN + 1];
	struct vssd_msg call;
	struct vssd_msg wait;
	wait_queue_head_t chan_wait;	/* for @call, or for room in the ring */
	wait_queue_head_t drain_wait;	/* for vssd_vq.inflight */

	struct vssd_blocks blocks;
	struct vssd_hints hints;

	/* Convergence, vssd_resize.c. Written by the work item, read by others with READ_ONCE(). */
	struct workqueue_struct *wq;
	struct work_struct work;
	struct delayed_work retry;
	struct delayed_work poll;
	struct delayed_work tidy;	/* of pages over evicted blocks */
	enum vssd_state state;
	u64 seq;			/* newest news that WAIT brought */
	u64 seq_heard;			/* newest news that any answer mentioned */
	u32 requested;
	u32 reason;			/* VSSD_REASON_* */
	unsigned long deadline;		/* jiffies */
	bool has_deadline;
	bool declined;
	u64 declined_seq;
	unsigned int backoff_ms;
	unsigned int busy_passes;
	unsigned int polls;
	unsigned long hint_deadline;	/* jiffies until which hints are waited for */
	unsigned long retry_at;		/* jiffies when @retry wakes the work item */
	unsigned long wait_armed;	/* jiffies when WAIT was sent */
	unsigned long resynced;		/* jiffies when the plugged set was read */
	struct vssd_span *batch;	/* scratch of @msg_ranges: blocks chosen */
	struct vssd_span *unplug;	/* scratch of @msg_ranges: those that go */
	unsigned long *scratch;		/* bitmap */
	struct vssd_counters counters;

	/* Settings. */
	enum vssd_nominate nominate;
	unsigned int hint_wait_ms;

	/* User space. */
	struct mutex pull_lock;		/* of @pull, @verdict and @report */
	struct vssd_pull pull;
	struct vssd_verdict verdict;
	struct vssd_report report;
	wait_queue_head_t pull_wait;
	struct proc_dir_entry *proc_dir;
	atomic_t agents;		/* open files of `request` that may also hint */
	unsigned long news_count;	/* changes that readers of `request` want to see */

	/* Watchdog, vssd_main.c. */
	struct delayed_work watchdog;
	u64 watched;
	unsigned long watched_since;
};

static inline bool vssd_stopping(const struct vssd *vssd)
{
	return test_bit(VSSD_F_STOPPING, &vssd->flags) || test_bit(VSSD_F_DEAD, &vssd->flags);
}

static inline u32 vssd_plugged(const struct vssd *vssd)
{
	return vssd->blocks.total - READ_ONCE(vssd->blocks.nr_evicted);
}

static inline bool vssd_token_is_msg(const void *token)
{
	return (unsigned long)token & VSSD_TOKEN_MSG;
}

/* vssd_main.c */
void vssd_free(struct vssd *vssd);

/* vssd_blk.c */
int vssd_blk_init_vqs(struct vssd *vssd);
void vssd_blk_free_vqs(struct vssd *vssd);
int vssd_blk_alloc_disk(struct vssd *vssd);
int vssd_blk_drain(struct vssd *vssd);
void vssd_blk_release_parked(struct vssd *vssd);
bool vssd_blk_busy(struct vssd *vssd, u64 *completed);
void vssd_blk_reclaim(struct vssd *vssd);
void vssd_blk_kill(struct vssd *vssd);

/* vssd_chan.c */
int vssd_chan_alloc(struct vssd *vssd);
void vssd_chan_free(struct vssd *vssd);
void vssd_chan_answered(struct vssd *vssd, void *token, bool answered);
int vssd_chan_hello(struct vssd *vssd, struct vssd_news *news);
int vssd_chan_get_id(struct vssd *vssd);
int vssd_chan_state(struct vssd *vssd, u32 flags, u32 start, struct vssd_state_page *page,
		    struct vssd_news *news);
int vssd_chan_next_range(const struct vssd *vssd, struct vssd_state_page *page,
			 struct vssd_span *range);
int vssd_chan_change(struct vssd *vssd, u32 type, const struct vssd_span *spans, u32 count,
		     const u8 **status, struct vssd_news *news);
int vssd_chan_decline(struct vssd *vssd, u64 seq, u32 could_give, u32 reason,
		      struct vssd_news *news);
int vssd_chan_pull(struct vssd *vssd, u32 blocks, u32 urgency, struct vssd_news *news);
int vssd_chan_report(struct vssd *vssd, const struct vssd_report *report, struct vssd_news *news);
int vssd_chan_arm_wait(struct vssd *vssd);
bool vssd_chan_waiting(const struct vssd *vssd);
int vssd_chan_take_wait(struct vssd *vssd, struct vssd_news *news);

/* vssd_blocks.c */
void vssd_blocks_init(struct vssd_blocks *blocks);
int vssd_blocks_extend(struct vssd_blocks *blocks, u32 total);
void vssd_blocks_free(struct vssd_blocks *blocks);
int vssd_blocks_want_stamps(struct vssd_blocks *blocks);
void vssd_blocks_age(struct vssd_blocks *blocks);
void vssd_blocks_note_use(struct vssd_blocks *blocks, u32 first, u32 last, bool write);
void vssd_blocks_forget_writes(struct vssd_blocks *blocks);
bool vssd_blocks_fenced(const struct vssd_blocks *blocks, u32 first, u32 last);
sector_t vssd_blocks_run(const struct vssd_blocks *blocks, sector_t sector, sector_t end,
			 unsigned int shift);
void vssd_blocks_fence(struct vssd_blocks *blocks, const struct vssd_span *span);
void vssd_blocks_unfence(struct vssd_blocks *blocks, const struct vssd_span *span);
void vssd_blocks_set_evicted(struct vssd_blocks *blocks, const struct vssd_span *span);
void vssd_blocks_set_plugged(struct vssd_blocks *blocks, const struct vssd_span *span);
bool vssd_blocks_replace(struct vssd_blocks *blocks, const unsigned long *evicted);
bool vssd_blocks_next_evicted(const struct vssd_blocks *blocks, u32 from, u32 most,
			      struct vssd_span *span);
u32 vssd_blocks_coldest(struct vssd_blocks *blocks, u32 need, const unsigned long *skip,
			struct vssd_span *spans, u32 most);

/* vssd_hints.c */
void vssd_hints_init(struct vssd_hints *hints);
int vssd_hints_extend(struct vssd_hints *hints, u32 total);
void vssd_hints_free(struct vssd_hints *hints);
int vssd_hints_add(struct vssd_hints *hints, u32 start, u32 count,
		   const struct vssd_blocks *blocks);
int vssd_hints_clear(struct vssd_hints *hints);
u32 vssd_hints_take(struct vssd_hints *hints, u32 need, const unsigned long *skip,
		    struct vssd_span *spans, u32 most, u32 *generation);
void vssd_hints_done(struct vssd_hints *hints, const struct vssd_span *span, u32 generation);
void vssd_hints_set_aside(struct vssd_hints *hints, const struct vssd_span *span, u32 generation);
void vssd_hints_settled(struct vssd_hints *hints);
void vssd_hints_rewind(struct vssd_hints *hints);
bool vssd_hints_get(const struct vssd_hints *hints, u64 index, struct vssd_span *span);

/* vssd_cache.c */
void vssd_cache_clean(struct vssd *vssd, const struct vssd_span *span);
bool vssd_cache_drop(struct vssd *vssd, const struct vssd_span *span);

/* vssd_resize.c */
int vssd_resize_init(struct vssd *vssd);
void vssd_resize_start(struct vssd *vssd);
void vssd_resize_stop(struct vssd *vssd);
void vssd_resize_kick(struct vssd *vssd);
void vssd_tidy_soon(struct vssd *vssd);
bool vssd_interrupted(const struct vssd *vssd);
void vssd_set_state(struct vssd *vssd, enum vssd_state state);
void vssd_adopt(struct vssd *vssd, const struct vssd_news *news);
int vssd_begin_session(struct vssd *vssd);
int vssd_extend(struct vssd *vssd, u32 total);
int vssd_resync(struct vssd *vssd);

/* vssd_shrink.c */
int vssd_shrink(struct vssd *vssd);

/* vssd_proc.c */
int vssd_proc_init(void);
void vssd_proc_exit(void);
int vssd_proc_add(struct vssd *vssd);
void vssd_proc_remove(struct vssd *vssd);
void vssd_proc_notify(struct vssd *vssd);

/* vssd_sysfs.c */
extern const struct attribute_group *vssd_attr_groups[];
const char *vssd_state_name(const struct vssd *vssd);
const char *vssd_reason_name(const struct vssd *vssd);
unsigned int vssd_deadline_ms(const struct vssd *vssd);
void vssd_notify(struct vssd *vssd);
void vssd_uevent(struct vssd *vssd, const char *event);

#endif /* _VSSD_H */
