// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * /sys/block/<disk>/serial and /sys/block/<disk>/vssd/, and uevents of the disk. The files are
 * described in Documentation/ABI/testing/sysfs-block-vssd.
 */
#include <linux/blkdev.h>
#include <linux/jiffies.h>
#include <linux/sysfs.h>

#include "vssd.h"

/* Longest time that hints are waited for. */
#define VSSD_HINT_WAIT_MAX_MS	(60 * 1000)

static const char * const vssd_state_names[] = {
	[VSSD_IDLE]		= "idle",
	[VSSD_SHRINKING]	= "shrinking",
	[VSSD_GROWING]		= "growing",
	[VSSD_DECLINED]		= "declined",
	[VSSD_STALE]		= "stale",
	[VSSD_BROKEN]		= "broken",
};

static const char * const vssd_nominate_names[] = {
	[VSSD_NOMINATE_HINTS]	= "hints",
	[VSSD_NOMINATE_BLANK]	= "blank",
	[VSSD_NOMINATE_EMPTY]	= "empty",
	[VSSD_NOMINATE_COLD]	= "cold",
};

const char *vssd_state_name(const struct vssd *vssd)
{
	return vssd_state_names[READ_ONCE(vssd->state)];
}

const char *vssd_reason_name(const struct vssd *vssd)
{
	switch (READ_ONCE(vssd->reason)) {
	case VSSD_REASON_NONE:
		return "none";
	case VSSD_REASON_OPERATOR:
		return "operator";
	case VSSD_REASON_PRESSURE:
		return "pressure";
	case VSSD_REASON_PULL:
		return "pull";
	default:
		return "unknown";
	}
}

/* Time left to reach the requested size; 0 when there is no deadline or it is over. */
unsigned int vssd_deadline_ms(const struct vssd *vssd)
{
	unsigned long deadline = READ_ONCE(vssd->deadline);

	if (!READ_ONCE(vssd->has_deadline) || time_after_eq(jiffies, deadline))
		return 0;
	return jiffies_to_msecs(deadline - jiffies);
}

static struct vssd *vssd_of(struct device *dev)
{
	return dev_to_disk(dev)->private_data;
}

static ssize_t serial_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", vssd_of(dev)->serial);
}
static DEVICE_ATTR_RO(serial);

#define VSSD_ATTR_SHOW(_name, _format, _value)						\
static ssize_t _name##_show(struct device *dev, struct device_attribute *attr, char *buf)	\
{											\
	const struct vssd *vssd = vssd_of(dev);						\
											\
	return sysfs_emit(buf, _format "\n", _value);					\
}											\
static DEVICE_ATTR_RO(_name)

VSSD_ATTR_SHOW(name, "%s", vssd->name);
VSSD_ATTR_SHOW(block_size, "%u", vssd->block_size);
VSSD_ATTR_SHOW(total_blocks, "%u", vssd->blocks.total);
VSSD_ATTR_SHOW(min_blocks, "%u", READ_ONCE(vssd->min_blocks));
VSSD_ATTR_SHOW(requested_blocks, "%u", READ_ONCE(vssd->requested));
VSSD_ATTR_SHOW(plugged_blocks, "%u", vssd_plugged(vssd));
VSSD_ATTR_SHOW(evicted_blocks, "%u", READ_ONCE(vssd->blocks.nr_evicted));
VSSD_ATTR_SHOW(hinted_blocks, "%u", READ_ONCE(vssd->hints.nr_blocks));
VSSD_ATTR_SHOW(seq, "%llu", READ_ONCE(vssd->seq_heard));
VSSD_ATTR_SHOW(state, "%s", vssd_state_name(vssd));
VSSD_ATTR_SHOW(reason, "%s", vssd_reason_name(vssd));
VSSD_ATTR_SHOW(deadline_ms, "%u", vssd_deadline_ms(vssd));

static ssize_t nominate_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", vssd_nominate_names[READ_ONCE(vssd_of(dev)->nominate)]);
}

static ssize_t nominate_store(struct device *dev, struct device_attribute *attr, const char *buf,
			      size_t count)
{
	int nominate = sysfs_match_string(vssd_nominate_names, buf);
	struct vssd *vssd = vssd_of(dev);
	int err;

	if (nominate < 0)
		return nominate;
	if (nominate == VSSD_NOMINATE_COLD) {
		err = vssd_blocks_want_stamps(&vssd->blocks);
		if (err)
			return err;
	}
	WRITE_ONCE(vssd->nominate, nominate);
	set_bit(VSSD_F_HINTED, &vssd->flags);
	vssd_resize_kick(vssd);
	return count;
}
static DEVICE_ATTR_RW(nominate);

static ssize_t hint_wait_ms_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", READ_ONCE(vssd_of(dev)->hint_wait_ms));
}

static ssize_t hint_wait_ms_store(struct device *dev, struct device_attribute *attr,
				  const char *buf, size_t count)
{
	unsigned int ms;
	int err;

	err = kstrtouint(buf, 0, &ms);
	if (err)
		return err;
	if (ms > VSSD_HINT_WAIT_MAX_MS)
		return -ERANGE;
	WRITE_ONCE(vssd_of(dev)->hint_wait_ms, ms);
	return count;
}
static DEVICE_ATTR_RW(hint_wait_ms);

static struct attribute *vssd_disk_attrs[] = {
	&dev_attr_serial.attr,
	NULL,
};

static const struct attribute_group vssd_disk_group = {
	.attrs = vssd_disk_attrs,
};

static struct attribute *vssd_attrs[] = {
	&dev_attr_name.attr,
	&dev_attr_block_size.attr,
	&dev_attr_total_blocks.attr,
	&dev_attr_min_blocks.attr,
	&dev_attr_requested_blocks.attr,
	&dev_attr_plugged_blocks.attr,
	&dev_attr_evicted_blocks.attr,
	&dev_attr_hinted_blocks.attr,
	&dev_attr_seq.attr,
	&dev_attr_state.attr,
	&dev_attr_reason.attr,
	&dev_attr_deadline_ms.attr,
	&dev_attr_nominate.attr,
	&dev_attr_hint_wait_ms.attr,
	NULL,
};

static const struct attribute_group vssd_group = {
	.name	= "vssd",
	.attrs	= vssd_attrs,
};

const struct attribute_group *vssd_attr_groups[] = {
	&vssd_disk_group,
	&vssd_group,
	NULL,
};

/**
 * vssd_notify - wake who waits for a change of sizes or state
 * @vssd: the disk
 *
 * Context: process.
 */
void vssd_notify(struct vssd *vssd)
{
	static const char * const pollable[] = {
		"requested_blocks", "plugged_blocks", "state", "seq",
	};
	int i;

	if (!vssd->live)
		return;
	vssd_proc_notify(vssd);
	for (i = 0; i < ARRAY_SIZE(pollable); i++)
		sysfs_notify(&disk_to_dev(vssd->disk)->kobj, vssd_group.name, pollable[i]);
}

/**
 * vssd_uevent - tell udev what happened
 * @vssd: the disk
 * @event: shrink-request, grow, declined or resync
 *
 * Context: process.
 */
void vssd_uevent(struct vssd *vssd, const char *event)
{
	char text[5][40];
	char *env[ARRAY_SIZE(text) + 1];
	int i;

	if (!vssd->live)
		return;
	snprintf(text[0], sizeof(text[0]), "VSSD_EVENT=%s", event);
	snprintf(text[1], sizeof(text[1]), "VSSD_SEQ=%llu", vssd->seq_heard);
	snprintf(text[2], sizeof(text[2]), "VSSD_REQUESTED_BLOCKS=%u", vssd->requested);
	snprintf(text[3], sizeof(text[3]), "VSSD_PLUGGED_BLOCKS=%u", vssd_plugged(vssd));
	snprintf(text[4], sizeof(text[4]), "VSSD_REASON=%s", vssd_reason_name(vssd));
	for (i = 0; i < ARRAY_SIZE(text); i++)
		env[i] = text[i];
	env[i] = NULL;
	kobject_uevent_env(&disk_to_dev(vssd->disk)->kobj, KOBJ_CHANGE, env);
}
