#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# Finds out what the kernel headers offer by compiling, and writes it as defines.
#
#	conftest.sh OUTPUT COMPILER FLAGS...
#
# Each probe is a snippet in the form that newer kernels want; if it compiles, VSSD_HAVE_<name> is set.
# A first snippet that every kernel accepts guards against a compiler that accepts nothing.
set -u

out=$1
shift
tmp=$(mktemp -d "${TMPDIR:-/tmp}/vssd-conftest.XXXXXX") || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

# probe NAME: compiles standard input.
probe()
{
	cat > "$tmp/$1.c"
	names="${names-} $1"
}

probe BASELINE <<'EOF'
#include <linux/blk-mq.h>
#include <linux/virtio_config.h>
int probe(struct virtio_device *vdev);
int probe(struct virtio_device *vdev) { return vdev->index; }
EOF

# 6.9: queue limits are given when the disk is allocated; 6.11: the write cache is one of them.
probe ALLOC_DISK_LIMITS <<'EOF'
#include <linux/blk-mq.h>
struct gendisk *probe(struct blk_mq_tag_set *set);
struct gendisk *probe(struct blk_mq_tag_set *set)
{
	struct queue_limits lim = { .features = BLK_FEAT_WRITE_CACHE };

	return blk_mq_alloc_disk(set, &lim, NULL);
}
EOF

# Until 6.13.
probe TAG_SHOULD_MERGE <<'EOF'
#include <linux/blk-mq.h>
int probe(void);
int probe(void) { return BLK_MQ_F_SHOULD_MERGE; }
EOF

# 6.11.
probe VIRTQUEUE_INFO <<'EOF'
#include <linux/virtio_config.h>
int probe(struct virtio_device *vdev, struct virtqueue **vqs, struct virtqueue_info *info);
int probe(struct virtio_device *vdev, struct virtqueue **vqs, struct virtqueue_info *info)
{
	return virtio_find_vqs(vdev, 1, vqs, info, NULL);
}
EOF

# 6.14.
probe MAP_HW_QUEUES <<'EOF'
#include <linux/blk-mq.h>
void probe(struct blk_mq_queue_map *map, struct device *dev);
void probe(struct blk_mq_queue_map *map, struct device *dev)
{
	blk_mq_map_hw_queues(map, dev, 0);
}
EOF

# 6.16.
probe MAP_SG_WITHOUT_QUEUE <<'EOF'
#include <linux/blk-mq.h>
int probe(struct request *req, struct scatterlist *sg);
int probe(struct request *req, struct scatterlist *sg) { return blk_rq_map_sg(req, sg); }
EOF

# 6.14.
probe FREEZE_MEMFLAGS <<'EOF'
#include <linux/blk-mq.h>
void probe(struct request_queue *q);
void probe(struct request_queue *q) { blk_mq_unfreeze_queue(q, blk_mq_freeze_queue(q)); }
EOF

# 6.10.
probe BD_MAPPING <<'EOF'
#include <linux/blkdev.h>
struct address_space *probe(struct block_device *bdev);
struct address_space *probe(struct block_device *bdev) { return bdev->bd_mapping; }
EOF

for name in $names; do
	(
		if "$@" -Werror -fsyntax-only "$tmp/$name.c" > "$tmp/$name.log" 2>&1; then
			: > "$tmp/$name.ok"
		fi
	) &
done
wait

if [ ! -e "$tmp/BASELINE.ok" ]; then
	echo "conftest.sh: the kernel headers do not compile at all:" >&2
	cat "$tmp/BASELINE.log" >&2
	exit 1
fi

{
	echo '/* Made by conftest.sh from the kernel headers. */'
	for name in $names; do
		if [ "$name" != BASELINE ] && [ -e "$tmp/$name.ok" ]; then
			echo "#define VSSD_HAVE_$name"
		fi
	done
} > "$tmp/conf.h"

# Left alone when nothing changed, so that nothing is built again.
cmp -s "$tmp/conf.h" "$out" || cp "$tmp/conf.h" "$out"
