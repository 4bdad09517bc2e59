// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * /proc/vssd. The files are described in Documentation/ABI/testing/procfs-vssd.
 *
 * proc_remove() waits for calls that are under way and lets none in afterwards, so no file here
 * can reach a disk that is gone. Only a poll can outlast it: who sleeps in poll(2) hangs on a
 * wait queue without being inside a call. So there is one wait queue for all disks, and it is the
 * module that outlives the sleepers, in vssd_proc_exit().
 */
#include <linux/bitmap.h>
#include <linux/blkdev.h>
#include <linux/capability.h>
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>

#include "vssd.h"

#define VSSD_LINE_SIZE		64

static struct proc_dir_entry *vssd_proc_root;
static DECLARE_WAIT_QUEUE_HEAD(vssd_news_wait);

/* ---- version, status ---- */

static int vssd_version_show(struct seq_file *m, void *v)
{
	seq_printf(m, "driver %s\nprotocol %u\n", VSSD_DRIVER_VERSION, VSSD_VERSION);
	return 0;
}

static int vssd_status_show(struct seq_file *m, void *v)
{
	struct vssd *vssd = m->private;
	const struct vssd_counters *c = &vssd->counters;
	u64 parked = 0, reads = 0, writes = 0;
	unsigned int i;

	for (i = 0; i < vssd->num_vqs; i++) {
		parked += READ_ONCE(vssd->vqs[i].parked_total);
		reads += READ_ONCE(vssd->vqs[i].evicted_reads);
		writes += READ_ONCE(vssd->vqs[i].evicted_writes);
	}
	seq_printf(m, "name %s\n", vssd->name);
	seq_printf(m, "epoch %016llx\n", READ_ONCE(vssd->epoch));
	seq_printf(m, "state %s\n", vssd_state_name(vssd));
	seq_printf(m, "seq %llu\n", READ_ONCE(vssd->seq_heard));
	seq_printf(m, "reason %s\n", vssd_reason_name(vssd));
	seq_printf(m, "deadline_ms %u\n", vssd_deadline_ms(vssd));
	seq_printf(m, "block_size %u\n", vssd->block_size);
	seq_printf(m, "total_blocks %u\n", vssd->blocks.total);
	seq_printf(m, "min_blocks %u\n", READ_ONCE(vssd->min_blocks));
	seq_printf(m, "requested_blocks %u\n", READ_ONCE(vssd->requested));
	seq_printf(m, "plugged_blocks %u\n", vssd_plugged(vssd));
	seq_printf(m, "evicted_blocks %u\n", READ_ONCE(vssd->blocks.nr_evicted));
	seq_printf(m, "hinted_blocks %u\n", READ_ONCE(vssd->hints.nr_blocks));
	seq_printf(m, "agents %d\n", atomic_read(&vssd->agents));
	seq_printf(m, "messages %llu\n", READ_ONCE(c->messages));
	seq_printf(m, "hellos %llu\n", READ_ONCE(c->hellos));
	seq_printf(m, "resyncs %llu\n", READ_ONCE(c->resyncs));
	seq_printf(m, "declines %llu\n", READ_ONCE(c->declines));
	seq_printf(m, "unplug_ranges %llu\n", READ_ONCE(c->unplug_ranges));
	seq_printf(m, "unplugged_total %llu\n", READ_ONCE(c->unplugged_blocks));
	seq_printf(m, "plug_ranges %llu\n", READ_ONCE(c->plug_ranges));
	seq_printf(m, "plugged_total %llu\n", READ_ONCE(c->plugged_blocks));
	seq_printf(m, "busy_ranges %llu\n", READ_ONCE(c->busy_ranges));
	seq_printf(m, "refused_ranges %llu\n", READ_ONCE(c->refused_ranges));
	seq_printf(m, "parked_requests %llu\n", parked);
	seq_printf(m, "evicted_reads %llu\n", reads);
	seq_printf(m, "evicted_writes %llu\n", writes);
	return 0;
}

/* ---- request ---- */

struct vssd_request_file {
	struct vssd *vssd;
	unsigned long seen;		/* vssd->news_count at the last read */
	bool agent;
};

static int vssd_request_show(struct seq_file *m, void *v)
{
	struct vssd_request_file *f = m->private;
	struct vssd *vssd = f->vssd;
	u32 requested, plugged;

	/* Seen first: what changes while it is read is news again. */
	WRITE_ONCE(f->seen, READ_ONCE(vssd->news_count));
	smp_rmb();	/* pairs with vssd_proc_notify() */
	requested = READ_ONCE(vssd->requested);
	plugged = vssd_plugged(vssd);
	seq_printf(m, "seq %llu\n", READ_ONCE(vssd->seq_heard));
	seq_printf(m, "requested_blocks %u\n", requested);
	seq_printf(m, "plugged_blocks %u\n", plugged);
	seq_printf(m, "to_give_blocks %u\n", plugged > requested ? plugged - requested : 0);
	seq_printf(m, "deadline_ms %u\n", vssd_deadline_ms(vssd));
	seq_printf(m, "reason %s\n", vssd_reason_name(vssd));
	return 0;
}

static int vssd_request_open(struct inode *inode, struct file *file)
{
	struct vssd *vssd = pde_data(inode);
	struct vssd_request_file *f;
	int err;

	f = kzalloc(sizeof(*f), GFP_KERNEL);
	if (!f)
		return -ENOMEM;
	f->vssd = vssd;
	/* Unread is news. */
	f->seen = READ_ONCE(vssd->news_count) - 1;
	/* Who may not hint is not waited for. */
	f->agent = capable(CAP_SYS_ADMIN);
	err = single_open(file, vssd_request_show, f);
	if (err) {
		kfree(f);
		return err;
	}
	if (f->agent)
		atomic_inc(&vssd->agents);
	return 0;
}

static int vssd_request_release(struct inode *inode, struct file *file)
{
	struct vssd_request_file *f = ((struct seq_file *)file->private_data)->private;

	if (f->agent && atomic_dec_and_test(&f->vssd->agents))
		vssd_resize_kick(f->vssd);
	kfree(f);
	return single_release(inode, file);
}

static __poll_t vssd_request_poll(struct file *file, poll_table *wait)
{
	struct vssd_request_file *f = ((struct seq_file *)file->private_data)->private;

	poll_wait(file, &vssd_news_wait, wait);
	if (READ_ONCE(f->seen) == READ_ONCE(f->vssd->news_count))
		return 0;
	return EPOLLIN | EPOLLRDNORM | EPOLLPRI;
}

static const struct proc_ops vssd_request_ops = {
	.proc_open	= vssd_request_open,
	.proc_read	= seq_read,
	.proc_lseek	= seq_lseek,
	.proc_release	= vssd_request_release,
	.proc_poll	= vssd_request_poll,
};

/* ---- evicted ---- */

/* The whole set as it was when the file was opened. */
struct vssd_evicted_file {
	u32 total;
	unsigned long *map;
	struct vssd_span span;
};

/* The position is a block. */
static void *vssd_evicted_find(struct vssd_evicted_file *f, loff_t pos)
{
	unsigned long start, end;

	if (pos >= f->total)
		return NULL;
	start = find_next_bit(f->map, f->total, pos);
	if (start >= f->total)
		return NULL;
	end = find_next_zero_bit(f->map, f->total, start);
	f->span = (struct vssd_span) { start, end - start };
	return &f->span;
}

static void *vssd_evicted_start(struct seq_file *m, loff_t *pos)
{
	return vssd_evicted_find(m->private, *pos);
}

static void *vssd_evicted_next(struct seq_file *m, void *v, loff_t *pos)
{
	const struct vssd_span *span = v;

	*pos = (loff_t)span->start + span->count;
	return vssd_evicted_find(m->private, *pos);
}

static void vssd_evicted_stop(struct seq_file *m, void *v)
{
}

static int vssd_span_show(struct seq_file *m, void *v)
{
	const struct vssd_span *span = v;

	seq_printf(m, "%u %u\n", span->start, span->count);
	return 0;
}

static const struct seq_operations vssd_evicted_seq = {
	.start	= vssd_evicted_start,
	.next	= vssd_evicted_next,
	.stop	= vssd_evicted_stop,
	.show	= vssd_span_show,
};

static int vssd_evicted_open(struct inode *inode, struct file *file)
{
	struct vssd_blocks *blocks = &((struct vssd *)pde_data(inode))->blocks;
	u32 total = READ_ONCE(blocks->total);
	struct vssd_evicted_file *f;
	unsigned long *map;

	map = kvmalloc_array(BITS_TO_LONGS(total), sizeof(long), GFP_KERNEL_ACCOUNT);
	if (!map)
		return -ENOMEM;
	f = __seq_open_private(file, &vssd_evicted_seq, sizeof(*f));
	if (!f) {
		kvfree(map);
		return -ENOMEM;
	}
	f->total = total;
	f->map = map;
	/* Should the disk become larger just now, this is how it was before. */
	mutex_lock(&blocks->lock);
	bitmap_copy(map, blocks->evicted, total);
	mutex_unlock(&blocks->lock);
	return 0;
}

static int vssd_evicted_release(struct inode *inode, struct file *file)
{
	struct vssd_evicted_file *f = ((struct seq_file *)file->private_data)->private;

	kvfree(f->map);
	return seq_release_private(inode, file);
}

static const struct proc_ops vssd_evicted_ops = {
	.proc_open	= vssd_evicted_open,
	.proc_read	= seq_read,
	.proc_lseek	= seq_lseek,
	.proc_release	= vssd_evicted_release,
};

/* ---- hints ---- */

struct vssd_hints_file {
	struct vssd *vssd;
	struct mutex lock;		/* of what a write parses */
	size_t len;			/* of an incomplete line */
	char line[VSSD_LINE_SIZE + 1];
	char chunk[SZ_1K];
	struct vssd_span span;		/* being read */
};

static void *vssd_hints_start(struct seq_file *m, loff_t *pos)
{
	struct vssd_hints_file *f = m->private;

	mutex_lock(&f->vssd->hints.lock);
	return vssd_hints_get(&f->vssd->hints, *pos, &f->span) ? &f->span : NULL;
}

static void *vssd_hints_next(struct seq_file *m, void *v, loff_t *pos)
{
	struct vssd_hints_file *f = m->private;

	++*pos;
	return vssd_hints_get(&f->vssd->hints, *pos, &f->span) ? &f->span : NULL;
}

static void vssd_hints_stop(struct seq_file *m, void *v)
{
	struct vssd_hints_file *f = m->private;

	mutex_unlock(&f->vssd->hints.lock);
}

static const struct seq_operations vssd_hints_seq = {
	.start	= vssd_hints_start,
	.next	= vssd_hints_next,
	.stop	= vssd_hints_stop,
	.show	= vssd_span_show,
};

/* Reads a decimal number and steps over it. */
static int vssd_parse_number(char **p, u32 *number)
{
	u64 value = 0;

	if (!isdigit(**p))
		return -EINVAL;
	for (; isdigit(**p); ++*p) {
		value = value * 10 + (**p - '0');
		if (value > U32_MAX)
			value = (u64)U32_MAX + 1;
	}
	*number = min_t(u64, value, U32_MAX);
	return value > U32_MAX ? -ERANGE : 0;
}

/* "<seq> <reason> <blocks>": user space has no more hints for the news @seq, and why. */
static int vssd_hints_end(struct vssd *vssd, const char *args)
{
	static const char * const names[] = {
		[VSSD_DECLINE_NOTHING]	= "nothing",
		[VSSD_DECLINE_BUSY]	= "busy",
		[VSSD_DECLINE_POLICY]	= "policy",
		[VSSD_DECLINE_ERROR]	= "error",
	};
	struct vssd_verdict verdict;
	char reason[8], end;
	int i;

	if (sscanf(args, "%llu %7s %u %c", &verdict.seq, reason, &verdict.could_give, &end) != 3)
		return -EINVAL;
	for (i = VSSD_DECLINE_NOTHING; i < ARRAY_SIZE(names); i++)
		if (!strcmp(reason, names[i]))
			break;
	if (i == ARRAY_SIZE(names))
		return -EINVAL;
	verdict.reason = i;
	mutex_lock(&vssd->pull_lock);
	vssd->verdict = verdict;
	mutex_unlock(&vssd->pull_lock);
	return 0;
}

static int vssd_hints_line(struct vssd *vssd, char *line)
{
	int start_err, count_err;
	u32 start, count;
	char *p = line;

	if (!strcmp(line, "clear"))
		return vssd_hints_clear(&vssd->hints);
	/* Whatever is written renews the wait for hints; this says nothing else. */
	if (!strcmp(line, "wait"))
		return 0;
	if (str_has_prefix(line, "end "))
		return vssd_hints_end(vssd, line + 4);
	start_err = vssd_parse_number(&p, &start);
	if (start_err == -EINVAL || (*p != ' ' && *p != '\t'))
		return -EINVAL;
	while (*p == ' ' || *p == '\t')
		p++;
	count_err = vssd_parse_number(&p, &count);
	if (count_err == -EINVAL || *p)
		return -EINVAL;
	if (start_err || count_err)
		return -ERANGE;
	return vssd_hints_add(&vssd->hints, start, count, &vssd->blocks);
}

/*
 * Takes a piece of the stream. *@good is how much of it ended with a line in force. After an
 * error the rest of the line is forgotten.
 */
static int vssd_hints_feed(struct vssd_hints_file *f, const char *piece, size_t size, size_t *good)
{
	size_t i;
	int err;

	for (i = 0; i < size; i++) {
		if (!piece[i] || (f->len == VSSD_LINE_SIZE && piece[i] != '\n')) {
			f->len = 0;
			return -EINVAL;
		}
		if (piece[i] != '\n') {
			f->line[f->len++] = piece[i];
			continue;
		}
		f->line[f->len] = '\0';
		f->len = 0;
		err = vssd_hints_line(f->vssd, f->line);
		if (err)
			return err;
		*good = i + 1;
	}
	return 0;
}

static void vssd_hints_written(struct vssd *vssd)
{
	set_bit(VSSD_F_HINTED, &vssd->flags);
	vssd_resize_kick(vssd);
}

static ssize_t vssd_hints_write(struct file *file, const char __user *buf, size_t size, loff_t *pos)
{
	struct vssd_hints_file *f = ((struct seq_file *)file->private_data)->private;
	size_t done = 0, in_force = 0;
	int err = 0;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (mutex_lock_interruptible(&f->lock))
		return -ERESTARTSYS;
	while (!err && done < size) {
		size_t n = min(size - done, sizeof(f->chunk)), good = 0;

		if (copy_from_user(f->chunk, buf + done, n)) {
			err = -EFAULT;
			f->len = 0;
			break;
		}
		err = vssd_hints_feed(f, f->chunk, n, &good);
		if (good)
			in_force = done + good;
		done += n;
		cond_resched();
	}
	mutex_unlock(&f->lock);
	if (in_force)
		vssd_hints_written(f->vssd);
	if (!err)
		return size;
	/* A short write ends before the line that was rejected; writing that again tells why. */
	return in_force ?: err;
}

static int vssd_hints_open(struct inode *inode, struct file *file)
{
	struct vssd_hints_file *f;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	f = __seq_open_private(file, &vssd_hints_seq, sizeof(*f));
	if (!f)
		return -ENOMEM;
	f->vssd = pde_data(inode);
	mutex_init(&f->lock);
	return 0;
}

static int vssd_hints_release(struct inode *inode, struct file *file)
{
	struct vssd_hints_file *f = ((struct seq_file *)file->private_data)->private;

	/* The last line may lack its end. If it is cut off, it names fewer blocks or none. */
	if (f->len) {
		f->line[f->len] = '\0';
		if (!vssd_hints_line(f->vssd, f->line))
			vssd_hints_written(f->vssd);
	}
	return seq_release_private(inode, file);
}

static const struct proc_ops vssd_hints_ops = {
	.proc_open	= vssd_hints_open,
	.proc_read	= seq_read,
	.proc_write	= vssd_hints_write,
	.proc_lseek	= seq_lseek,
	.proc_release	= vssd_hints_release,
};

/* Takes a whole write, from who may speak for the guest, as a text of VSSD_LINE_SIZE bytes. */
static int vssd_copy_line(char *line, const char __user *buf, size_t size)
{
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (size >= VSSD_LINE_SIZE)
		return -EINVAL;
	if (copy_from_user(line, buf, size))
		return -EFAULT;
	line[size] = '\0';
	return 0;
}

/* ---- pull ---- */

static int vssd_pull_parse(struct vssd *vssd, char *line, u32 *blocks, u32 *urgency)
{
	static const char * const names[] = {
		[VSSD_PULL_WISH]	= "wish",
		[VSSD_PULL_PRESSURE]	= "pressure",
		[VSSD_PULL_CRITICAL]	= "critical",
	};
	char *p = strim(line);
	int err, i;

	err = vssd_parse_number(&p, blocks);
	if (err)
		return err;
	*urgency = VSSD_PULL_WISH;
	if (*p) {
		if (!isspace(*p))
			return -EINVAL;
		i = match_string(names, ARRAY_SIZE(names), skip_spaces(p));
		if (i < 0)
			return i;
		*urgency = i;
	}
	return *blocks && *blocks <= vssd->blocks.total ? 0 : -ERANGE;
}

static ssize_t vssd_pull_write(struct file *file, const char __user *buf, size_t size, loff_t *pos)
{
	struct vssd *vssd = pde_data(file_inode(file));
	char line[VSSD_LINE_SIZE];
	u32 blocks, urgency;
	u64 ticket;
	int err;

	err = vssd_copy_line(line, buf, size);
	if (err)
		return err;
	err = vssd_pull_parse(vssd, line, &blocks, &urgency);
	if (err)
		return err;

	/* The newest wish replaces one that is not sent yet. */
	mutex_lock(&vssd->pull_lock);
	vssd->pull.blocks = blocks;
	vssd->pull.urgency = urgency;
	ticket = ++vssd->pull.ticket;
	mutex_unlock(&vssd->pull_lock);
	vssd_resize_kick(vssd);
	err = wait_event_interruptible(vssd->pull_wait, READ_ONCE(vssd->pull.done) >= ticket ||
				       vssd_stopping(vssd) ||
				       READ_ONCE(vssd->state) == VSSD_BROKEN);
	if (err)
		return -EINTR;

	mutex_lock(&vssd->pull_lock);
	err = vssd->pull.done >= ticket ? vssd->pull.result : -ENODEV;
	mutex_unlock(&vssd->pull_lock);
	if (err == -ETXTBSY)
		err = -EAGAIN;
	return err ?: size;
}

static const struct proc_ops vssd_pull_ops = {
	.proc_write	= vssd_pull_write,
	.proc_lseek	= noop_llseek,
};

/* ---- estimate ---- */

static ssize_t vssd_estimate_write(struct file *file, const char __user *buf, size_t size,
				   loff_t *pos)
{
	struct vssd *vssd = pde_data(file_inode(file));
	struct vssd_report report = { .known = true, .due = true };
	u32 *fields[] = { &report.free, &report.clean_cold, &report.clean_hot, &report.dirty };
	char line[VSSD_LINE_SIZE];
	char *p = line;
	u64 sum = 0;
	int err, i;

	err = vssd_copy_line(line, buf, size);
	if (err)
		return err;
	for (i = 0; i < ARRAY_SIZE(fields); i++) {
		p = skip_spaces(p);
		err = vssd_parse_number(&p, fields[i]);
		if (err)
			return err;
		sum += *fields[i];
	}
	if (*strim(p))
		return -EINVAL;
	if (sum > vssd->blocks.total)
		return -ERANGE;

	mutex_lock(&vssd->pull_lock);
	vssd->report = report;
	mutex_unlock(&vssd->pull_lock);
	vssd_resize_kick(vssd);
	return size;
}

static const struct proc_ops vssd_estimate_ops = {
	.proc_write	= vssd_estimate_write,
	.proc_lseek	= noop_llseek,
};

/* ---- directories ---- */

int vssd_proc_add(struct vssd *vssd)
{
	struct proc_dir_entry *dir;

	dir = proc_mkdir(vssd->disk->disk_name, vssd_proc_root);
	if (!dir)
		return -ENOMEM;
	if (!proc_create_single_data("status", 0444, dir, vssd_status_show, vssd) ||
	    !proc_create_data("request", 0444, dir, &vssd_request_ops, vssd) ||
	    !proc_create_data("evicted", 0444, dir, &vssd_evicted_ops, vssd) ||
	    !proc_create_data("hints", 0600, dir, &vssd_hints_ops, vssd) ||
	    !proc_create_data("pull", 0200, dir, &vssd_pull_ops, vssd) ||
	    !proc_create_data("estimate", 0200, dir, &vssd_estimate_ops, vssd)) {
		proc_remove(dir);
		return -ENOMEM;
	}
	vssd->proc_dir = dir;
	return 0;
}

/* The work item must be stopped, else a write may wait for it. */
void vssd_proc_remove(struct vssd *vssd)
{
	proc_remove(vssd->proc_dir);
	wake_up_all(&vssd_news_wait);
}

void vssd_proc_notify(struct vssd *vssd)
{
	/* Who sees the count sees what it announces. */
	smp_wmb();
	WRITE_ONCE(vssd->news_count, vssd->news_count + 1);
	wake_up_all(&vssd_news_wait);
}

int vssd_proc_init(void)
{
	vssd_proc_root = proc_mkdir("vssd", NULL);
	if (!vssd_proc_root)
		return -ENOMEM;
	if (!proc_create_single("version", 0444, vssd_proc_root, vssd_version_show)) {
		proc_remove(vssd_proc_root);
		return -ENOMEM;
	}
	return 0;
}

void vssd_proc_exit(void)
{
	proc_remove(vssd_proc_root);
	/*
	 * Nobody can begin to wait any more. POLLFREE takes epoll and its like off the queue at
	 * once; who sleeps in poll(2) takes himself off when he wakes.
	 */
	wake_up_poll(&vssd_news_wait, EPOLLHUP | POLLFREE);
	/* Nothing is awaited but the removal of entries: no barrier is needed. */
	while (waitqueue_active(&vssd_news_wait)) {
		wake_up_all(&vssd_news_wait);
		msleep(20);
	}
	/* The last one may still hold the lock of the queue. */
	spin_lock_irq(&vssd_news_wait.lock);
	spin_unlock_irq(&vssd_news_wait.lock);
	synchronize_rcu();
}
