/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR BSD-3-Clause) */
/*
 * vSSD guest channel: the contract between a vSSD and the driver in its guest.
 *
 * A vSSD is a virtio block device that can shrink and grow while it is in use. Its space is
 * counted in blocks of a fixed size. Every block is either plugged (it can be read and written)
 * or unplugged (the device refuses reads and writes of it). The device has:
 *
 *   total_blocks      the address space; never changes during a session
 *   requested_blocks  how many blocks the host would like to be plugged; changes at any time
 *   plugged_blocks    how many blocks are plugged; changes when the driver plugs or unplugs, and
 *                     when the host takes blocks by force (its policy permitting)
 *
 * While plugged_blocks is above requested_blocks the driver is asked to choose blocks it can do
 * without and to unplug them, in any order and from any place. While it is below, the driver may
 * plug blocks. The driver need not reach the requested size: it may DECLINE.
 *
 * The channel uses request types that virtio-blk does not define, on the device's ordinary
 * request queues. A device that is no vSSD answers them with VIRTIO_BLK_S_UNSUPP. Each request is
 * one chain:
 *
 *   device-readable:  struct virtio_blk_outhdr { type = VSSD_T_*, ioprio = 0, sector = 0 }
 *                     struct vssd_<type>_req, followed for UNPLUG and PLUG by `count` ranges
 *   device-writable:  struct vssd_<type>_resp, followed for STATE by ranges, for UNPLUG and PLUG by
 *                     `count` bytes of range status
 *                     u8 status (VIRTIO_BLK_S_*)
 *
 * The status byte is VIRTIO_BLK_S_OK when the response is valid, VIRTIO_BLK_S_IOERR when the
 * chain was malformed (nothing happened), VIRTIO_BLK_S_UNSUPP when the device does not know the
 * type.
 *
 * Deliberate differences from virtio-mem:
 *   - Contents and plugged blocks survive a device reset and a system reset.
 *   - A block that becomes plugged reads as zeroes.
 *   - Requests are idempotent: unplugging an unplugged block is VSSD_R_ALREADY, not an error.
 *
 * All fields are little-endian. Normative text with numbered requirements: protocol.md.
 */
#ifndef _VSSD_ABI_H
#define _VSSD_ABI_H

#include <linux/types.h>

#define VSSD_MAGIC			0x44535376	/* "vSSD" */
#define VSSD_VERSION			1

/* Request types. None has a meaning in virtio-blk. */
#define VSSD_T_HELLO			0x56530001
#define VSSD_T_STATE			0x56530002
#define VSSD_T_WAIT			0x56530003
#define VSSD_T_UNPLUG			0x56530004
#define VSSD_T_PLUG			0x56530005
#define VSSD_T_DECLINE			0x56530006
#define VSSD_T_PULL			0x56530007
#define VSSD_T_REPORT			0x56530008

/* Status bytes of ordinary reads and writes that virtio-blk does not define. */
#define VSSD_S_EVICTED			0x80	/* touches an unplugged block; nothing was done */
#define VSSD_S_NOSPACE			0x81	/* no space in the pool; nothing was written */

/* vssd_resp.result */
#define VSSD_RES_OK			0
#define VSSD_RES_STALE			1	/* not the epoch of the session; nothing was done */
#define VSSD_RES_NO_NEWS		2	/* WAIT: queue stops, or a newer WAIT came */
#define VSSD_RES_BUSY			3	/* cannot now, send again later; nothing was done */
#define VSSD_RES_INVALID		4	/* a field is out of bounds; nothing was done */
#define VSSD_RES_VERSION		5	/* HELLO: not spoken; `version` says which is */

/* Range status, a byte for each range of UNPLUG and PLUG. */
#define VSSD_R_OK			0	/* every block is now in the wanted state */
#define VSSD_R_ALREADY			1	/* every block was in the wanted state before */
#define VSSD_R_BUSY			2	/* not now; unchanged */
#define VSSD_R_RANGE			3	/* empty or outside the device; no effect */
#define VSSD_R_PROTECTED		4	/* would fall below min_blocks; unchanged */
#define VSSD_R_LIMIT			5	/* PLUG: would exceed requested_blocks; unchanged */
#define VSSD_R_NOSPACE			6	/* PLUG: no space in the pool; unchanged */

/* Most ranges in one UNPLUG or PLUG; the device may report less in HELLO, never below 4096. */
#define VSSD_MAX_RANGES			16384
#define VSSD_NAME_LEN			32

/* vssd_wait_resp.reason: why the host asks. */
#define VSSD_REASON_NONE		0
#define VSSD_REASON_OPERATOR		1
#define VSSD_REASON_PRESSURE		2	/* the pool runs low */
#define VSSD_REASON_PULL		3	/* an answer to PULL */

/* vssd_wait_resp.flags */
#define VSSD_NEWS_STATE			0x1	/* the host changed the plugged set: read STATE */
#define VSSD_NEWS_TARGET		0x2	/* requested_blocks, deadline or reason changed */

/* vssd_decline_req.reason */
#define VSSD_DECLINE_NOTHING		1	/* no block can be given up */
#define VSSD_DECLINE_BUSY		2	/* what could be given is in use now */
#define VSSD_DECLINE_POLICY		3	/* the guest's own rules forbid it */
#define VSSD_DECLINE_ERROR		4	/* the driver failed */

/* vssd_pull_req.urgency */
#define VSSD_PULL_WISH			0
#define VSSD_PULL_PRESSURE		1
#define VSSD_PULL_CRITICAL		2

/* `count` blocks from block `start` on. 8 bytes. */
struct vssd_range {
	__le32 start;
	__le32 count;
};

/* Begins every request but HELLO. 16 bytes. */
struct vssd_req {
	__le64 epoch;			/* of the session, from HELLO */
	__le32 count;			/* ranges that follow; 0 where the type has none */
	__le32 flags;			/* VSSD_STATE_F_* for STATE, else 0 */
};

/* Begins every response. 24 bytes. The sizes are those after the request was carried out. */
struct vssd_resp {
	__le32 result;			/* VSSD_RES_* */
	__le32 count;			/* ranges or status bytes that follow the fixed part */
	__le64 seq;			/* number of the newest news of this session, see WAIT */
	__le32 requested_blocks;
	__le32 plugged_blocks;
};

/*
 * HELLO begins a session and ends the one before it: from then on only the new epoch counts.
 * 48 bytes.
 */
struct vssd_hello_req {
	__le32 magic;			/* VSSD_MAGIC */
	__le16 version;			/* highest version the driver speaks */
	__le16 reserved;		/* 0 */
	__le64 features;		/* 0, none defined */
	__u8 driver[VSSD_NAME_LEN];	/* name and version for people, NUL-padded UTF-8 */
};

/* 96 bytes. */
struct vssd_hello_resp {
	struct vssd_resp resp;
	__le32 magic;			/* VSSD_MAGIC */
	__le16 version;			/* the version of this session */
	__le16 reserved;
	__le64 features;		/* 0, none defined */
	__le64 epoch;			/* random, never 0, new at each HELLO */
	__le32 block_size;		/* bytes, a power of two from 4 KiB to 2 MiB */
	__le32 total_blocks;
	__le32 min_blocks;		/* never asked for less; UNPLUG below is PROTECTED */
	__le32 max_ranges;		/* in one UNPLUG or PLUG */
	__u8 name[VSSD_NAME_LEN];	/* the vSSD's name, NUL-padded UTF-8 */
};

/* vssd_state_req.req.flags */
#define VSSD_STATE_F_EMPTY		0x1	/* only plugged blocks that hold no data */

/* STATE reads the plugged set from block `start` on, in ascending order. 24 bytes. */
struct vssd_state_req {
	struct vssd_req req;
	__le32 start;
	__le32 reserved;		/* 0 */
};

/* 32 bytes, then resp.count ranges that are plugged, as many as fit the buffer. */
struct vssd_state_resp {
	struct vssd_resp resp;
	__le32 next;			/* where to go on; total_blocks when the list is complete */
	__le32 reserved;
};

/*
 * WAIT stays with the device until there is news: it is answered once seq is above seq_seen.
 * Only one WAIT is parked; a newer one sends the older one back with VSSD_RES_NO_NEWS. 24 bytes.
 */
struct vssd_wait_req {
	struct vssd_req req;
	__le64 seq_seen;		/* newest resp.seq the driver acted on; 0 at first */
};

/* 40 bytes. Level-triggered: the newest state, whatever happened in between. */
struct vssd_wait_resp {
	struct vssd_resp resp;
	__le32 flags;			/* VSSD_NEWS_* since seq_seen */
	__le32 reason;			/* VSSD_REASON_* */
	__le32 deadline_ms;		/* time left to reach requested_blocks; 0: none set */
	__le32 reserved;
};

/*
 * UNPLUG gives blocks back; their contents are gone for good once the range status is OK.
 * PLUG takes blocks; they read as zeroes. Each range stands or falls whole, one by one.
 * Request: struct vssd_req, req.count ranges. Response: struct vssd_resp, resp.count status bytes.
 */

/* DECLINE says that the driver will not (now) reach the requested size. 32 bytes. */
struct vssd_decline_req {
	struct vssd_req req;
	__le64 seq;			/* the news that this answers */
	__le32 could_give;		/* blocks that could go if they were asked for again */
	__le32 reason;			/* VSSD_DECLINE_* */
};

/* PULL asks for more. A grant arrives as news that raises requested_blocks. 24 bytes. */
struct vssd_pull_req {
	struct vssd_req req;
	__le32 want_blocks;		/* on top of requested_blocks */
	__le32 urgency;			/* VSSD_PULL_* */
};

/*
 * REPORT says how many blocks could go now, by what that would cost the guest, whether or not any
 * are asked for. The newest counts. Nothing follows from it: the blocks are still the guest's. 32
 * bytes.
 */
struct vssd_report_req {
	struct vssd_req req;
	__le32 free_blocks;		/* nothing lies there */
	__le32 clean_cold_blocks;	/* copies of what is elsewhere, not asked for lately */
	__le32 clean_hot_blocks;	/* such copies, in use */
	__le32 dirty_blocks;		/* must be written elsewhere first */
};

#endif /* _VSSD_ABI_H */
