// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * vSSD driver: binding, probe and remove, suspend and resume.
 *
 * A vSSD is a virtio block device. Nothing that the driver core can match tells it from an
 * ordinary disk, and a driver that declines in probe leaves VIRTIO_CONFIG_S_FAILED behind, with
 * which some hypervisors never start the disk again. So the driver takes no disk that it was not
 * told to take:
 *
 *  - Its id table is empty. The core finds no match, at registration, for new devices, at a rescan:
 *    never, whether a disk is bound to virtio_blk or to nobody.
 *  - It brings its own `bind` and `unbind` in /sys/bus/virtio/drivers/vssd, in place of the core's,
 *    whose `bind` wants a match. They are used in the same way.
 *  - When probe refuses a device (HELLO is not answered), `bind` resets it and acknowledges it
 *    again, as it was when it was found. virtio_blk can take it.
 */
#include <linux/blkdev.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include "vssd.h"
#include "vssd_compat.h"

#define VSSD_DISKS		(26 * 27)	/* vssda to vssdzz */
#define VSSD_HINT_WAIT_MS	3000

static unsigned int remove_timeout = 15;
module_param(remove_timeout, uint, 0644);
MODULE_PARM_DESC(remove_timeout,
		 "Seconds without an answer after which a disk being removed fails its I/O");

static DEFINE_IDA(vssd_ida);

/**
 * vssd_free - free a disk
 * @vssd: the disk, removed, or refused in probe
 *
 * Context: the last reference to the block device may be dropped long after remove.
 */
void vssd_free(struct vssd *vssd)
{
	if (vssd->wq)
		destroy_workqueue(vssd->wq);
	vssd_chan_free(vssd);
	vssd_blocks_free(&vssd->blocks);
	vssd_hints_free(&vssd->hints);
	kvfree(vssd->scratch);
	if (vssd->index >= 0)
		ida_free(&vssd_ida, vssd->index);
	kfree(vssd);
}

/* ---- watchdog of remove ---- */

/*
 * A backend that is gone may come back, so requests wait for it without a limit. But a disk that
 * is being removed must not keep its remover forever: when it answers nothing for remove_timeout,
 * the device is reset and what it holds fails.
 */
static void vssd_watchdog(struct work_struct *work)
{
	struct vssd *vssd = container_of(to_delayed_work(work), struct vssd, watchdog);
	u64 completed;
	bool busy = vssd_blk_busy(vssd, &completed);

	if (!busy || completed != vssd->watched) {
		vssd->watched = completed;
		vssd->watched_since = jiffies;
	} else if (time_after(jiffies, vssd->watched_since + READ_ONCE(remove_timeout) * HZ)) {
		dev_warn(&vssd->vdev->dev, "no answer while being removed: failing all I/O\n");
		vssd_blk_kill(vssd);
		return;
	}
	schedule_delayed_work(&vssd->watchdog, HZ / 2);
}

/* ---- probe and remove ---- */

static struct vssd *vssd_alloc(struct virtio_device *vdev)
{
	struct vssd *vssd = kzalloc(sizeof(*vssd), GFP_KERNEL);

	if (!vssd)
		return NULL;
	vssd->vdev = vdev;
	vssd->state = VSSD_STALE;
	vssd->nominate = VSSD_NOMINATE_BLANK;
	vssd->hint_wait_ms = VSSD_HINT_WAIT_MS;
	vssd->wait_armed = jiffies - HZ;
	vssd->resynced = jiffies - HZ;
	vssd_blocks_init(&vssd->blocks);
	mutex_init(&vssd->pull_lock);
	init_waitqueue_head(&vssd->chan_wait);
	init_waitqueue_head(&vssd->drain_wait);
	init_waitqueue_head(&vssd->pull_wait);
	INIT_DELAYED_WORK(&vssd->watchdog, vssd_watchdog);
	vssd_hints_init(&vssd->hints);
	vssd->index = ida_alloc_max(&vssd_ida, VSSD_DISKS - 1, GFP_KERNEL);
	if (vssd->index < 0 || vssd_resize_init(vssd)) {
		vssd_free(vssd);
		return NULL;
	}
	return vssd;
}

/* Asks the device who it is, and learns its geometry and states. */
static int vssd_identify(struct vssd *vssd)
{
	struct device *dev = &vssd->vdev->dev;
	int err;

	err = vssd_begin_session(vssd);
	if (err == -EOPNOTSUPP || err == -EPROTO) {
		dev_info(dev, "not a vSSD\n");
		return -ENODEV;
	}
	if (!err)
		err = vssd_chan_get_id(vssd);
	if (!err)
		err = vssd_extend(vssd, vssd->hello_total);
	if (err)
		return err;
	err = vssd_resync(vssd);
	if (err)
		dev_err(dev, "cannot read the plugged set (%d)\n", err);
	return err;
}

static int vssd_probe(struct virtio_device *vdev)
{
	struct vssd *vssd;
	int err;

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "no access to the config space\n");
		return -EINVAL;
	}
	vssd = vssd_alloc(vdev);
	if (!vssd)
		return -ENOMEM;
	vdev->priv = vssd;
	err = vssd_chan_alloc(vssd);
	if (err)
		goto out_free;
	err = vssd_blk_init_vqs(vssd);
	if (err)
		goto out_free;

	/* The geometry of the disk is asked through its queues. */
	virtio_device_ready(vdev);
	err = vssd_identify(vssd);
	if (err)
		goto out_reset;
	err = vssd_blk_alloc_disk(vssd);
	if (err)
		goto out_reset;
	/* Before the uevent of the disk, which may start an agent. */
	err = vssd_proc_add(vssd);
	if (err)
		goto out_put_disk;
	err = device_add_disk(&vdev->dev, vssd->disk, vssd_attr_groups);
	if (err)
		goto out_proc;
	vssd_resize_start(vssd);
	dev_info(&vdev->dev, "%s: vSSD \"%s\", %u of %u blocks of %u bytes\n",
		 vssd->disk->disk_name, vssd->name, vssd_plugged(vssd), vssd->blocks.total,
		 vssd->block_size);
	return 0;

out_proc:
	vssd_resize_stop(vssd);
	vssd_proc_remove(vssd);
out_put_disk:
	put_disk(vssd->disk);
	blk_mq_free_tag_set(&vssd->tag_set);
out_reset:
	virtio_reset_device(vdev);
	vssd_blk_reclaim(vssd);
	vssd_blk_free_vqs(vssd);
out_free:
	vssd_free(vssd);
	vdev->priv = NULL;
	return err;
}

static void vssd_remove(struct virtio_device *vdev)
{
	struct vssd *vssd = vdev->priv;

	schedule_delayed_work(&vssd->watchdog, 0);
	vssd_resize_stop(vssd);
	vssd_proc_remove(vssd);
	/* Writes back what is cached. */
	del_gendisk(vssd->disk);
	cancel_delayed_work_sync(&vssd->watchdog);

	virtio_reset_device(vdev);
	vssd_blk_reclaim(vssd);
	vssd_blk_free_vqs(vssd);
	blk_mq_free_tag_set(&vssd->tag_set);
	vdev->priv = NULL;
	put_disk(vssd->disk);
}

/* ---- suspend and resume ---- */

#ifdef CONFIG_PM_SLEEP
static int vssd_freeze(struct virtio_device *vdev)
{
	struct vssd *vssd = vdev->priv;
	struct request_queue *q = vssd->disk->queue;
	unsigned int memflags;

	vssd_resize_stop(vssd);
	memflags = vssd_compat_freeze(q);
	blk_mq_quiesce_queue_nowait(q);
	vssd_compat_unfreeze(q, memflags);
	virtio_reset_device(vdev);
	vssd_blk_reclaim(vssd);
	vssd_blk_free_vqs(vssd);
	return 0;
}

static int vssd_restore(struct virtio_device *vdev)
{
	struct vssd *vssd = vdev->priv;
	unsigned int queues = vssd->tag_set.nr_hw_queues;
	int err;

	err = vssd_blk_init_vqs(vssd);
	if (!err && vssd->num_vqs != queues) {
		dev_err(&vdev->dev, "%u queues, it had %u\n", vssd->num_vqs, queues);
		vssd_blk_free_vqs(vssd);
		err = -ENODEV;
	}
	if (err) {
		set_bit(VSSD_F_DEAD, &vssd->flags);
	} else {
		virtio_device_ready(vdev);
		/* The device was reset: its session is over, its blocks are as they were. */
		vssd->session = false;
		clear_bit(VSSD_F_STOPPING, &vssd->flags);
		vssd_resize_start(vssd);
	}
	blk_mq_unquiesce_queue(vssd->disk->queue);
	return err;
}
#endif

/* ---- binding ---- */

/* Puts a device that probe refused back into the state in which the core found it. */
static void vssd_give_back(struct virtio_device *vdev)
{
	device_lock(&vdev->dev);
	if (!vdev->dev.driver && device_is_registered(&vdev->dev)) {
		virtio_reset_device(vdev);
		virtio_add_status(vdev, VIRTIO_CONFIG_S_ACKNOWLEDGE);
	}
	device_unlock(&vdev->dev);
}

static ssize_t vssd_bind_store(struct device_driver *drv, const char *buf, size_t count)
{
	struct device *dev = bus_find_device_by_name(drv->bus, NULL, buf);
	int err = -ENODEV;

	if (dev && dev_to_virtio(dev)->id.device == VIRTIO_ID_BLOCK) {
		err = device_driver_attach(drv, dev);
		if (err)
			vssd_give_back(dev_to_virtio(dev));
	}
	put_device(dev);
	return err ?: count;
}

static ssize_t vssd_unbind_store(struct device_driver *drv, const char *buf, size_t count)
{
	struct device *dev = bus_find_device_by_name(drv->bus, NULL, buf);
	int err = -ENODEV;

	if (dev && dev->driver == drv) {
		device_release_driver(dev);
		err = 0;
	}
	put_device(dev);
	return err ?: count;
}

/* As the core's own: a device that goes away takes its links along, not these files. */
static struct driver_attribute driver_attr_bind =
	__ATTR_IGNORE_LOCKDEP(bind, 0200, NULL, vssd_bind_store);
static struct driver_attribute driver_attr_unbind =
	__ATTR_IGNORE_LOCKDEP(unbind, 0200, NULL, vssd_unbind_store);

static struct attribute *vssd_driver_attrs[] = {
	&driver_attr_bind.attr,
	&driver_attr_unbind.attr,
	NULL,
};
ATTRIBUTE_GROUPS(vssd_driver);

/* Matches nothing, see above. */
static const struct virtio_device_id vssd_id_table[] = {
	{ 0 },
};

static const unsigned int vssd_features[] = {
	VIRTIO_BLK_F_SIZE_MAX,
	VIRTIO_BLK_F_SEG_MAX,
	VIRTIO_BLK_F_RO,
	VIRTIO_BLK_F_BLK_SIZE,
	VIRTIO_BLK_F_FLUSH,
	VIRTIO_BLK_F_TOPOLOGY,
	VIRTIO_BLK_F_MQ,
	VIRTIO_BLK_F_DISCARD,
	VIRTIO_BLK_F_WRITE_ZEROES,
};

static struct virtio_driver vssd_driver = {
	.driver.name			= KBUILD_MODNAME,
	.driver.owner			= THIS_MODULE,
	.driver.suppress_bind_attrs	= true,
	.driver.groups			= vssd_driver_groups,
	.id_table			= vssd_id_table,
	.feature_table			= vssd_features,
	.feature_table_size		= ARRAY_SIZE(vssd_features),
	.probe				= vssd_probe,
	.remove				= vssd_remove,
#ifdef CONFIG_PM_SLEEP
	.freeze				= vssd_freeze,
	.restore			= vssd_restore,
#endif
};

static int __init vssd_init(void)
{
	int err;

	err = vssd_proc_init();
	if (err)
		return err;
	err = register_virtio_driver(&vssd_driver);
	if (err)
		vssd_proc_exit();
	return err;
}

static void __exit vssd_exit(void)
{
	unregister_virtio_driver(&vssd_driver);
	vssd_proc_exit();
	ida_destroy(&vssd_ida);
}

module_init(vssd_init);
module_exit(vssd_exit);

MODULE_DESCRIPTION("vSSD: virtio block device that shrinks and grows while in use");
MODULE_AUTHOR("The vSSD developers");
MODULE_VERSION(VSSD_DRIVER_VERSION);
MODULE_LICENSE("Dual MIT/GPL");
