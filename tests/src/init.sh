#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
# The guest's first process: mounts, loads the virtio drivers, and hands over to the agent.
export PATH=/tools:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
# There is no udev to wait for, or to make nodes.
export DM_DISABLE_UDEV=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t debugfs debugfs /sys/kernel/debug
ln -s /proc/self/fd /dev/fd
hostname guest
modprobe -a virtio_pci virtio_console virtio_blk
# Boot messages cost time on an emulated serial port; from here on they are few and wanted.
echo 7 > /proc/sys/kernel/printk
if grep -q vssd.systemd /proc/cmdline; then
    exec /usr/lib/systemd/systemd --unit=multi-user.target
elif grep -q vssd.shell /proc/cmdline; then
    guest_agent &
    cd /root
    setsid cttyhack sh -l
else
    guest_agent
    echo "guest agent ended with $?"
fi
poweroff -f
