// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much processor time went where between two moments: to the backend, and to programs that have no part in the
//! measurement.

use std::fs;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Processor time of a whole process so far, its ended threads included; to the nanosecond.
pub fn process_time(pid: u32) -> Result<Duration> {
    let pid = libc::pid_t::try_from(pid)?;
    let mut clock = 0;
    // SAFETY: `clock` is valid for the one write that the function makes.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    ensure!(error == 0, "no processor clock for process {pid}: {}", std::io::Error::from_raw_os_error(error));
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the one write that the function makes.
    let outcome = unsafe { libc::clock_gettime(clock, &raw mut time) };
    ensure!(outcome == 0, "read the processor clock of process {pid}: {}", std::io::Error::last_os_error());
    Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?))
}

/// Processor time of all children that have ended.
fn children_time() -> Result<Duration> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: `usage` is valid for the one write that the function makes.
    let outcome = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) };
    ensure!(outcome == 0, "read the children's usage: {}", std::io::Error::last_os_error());
    // SAFETY: the call succeeded, so it has written the structure.
    let usage = unsafe { usage.assume_init() };
    let time = |t: libc::timeval| -> Result<Duration> {
        Ok(Duration::new(u64::try_from(t.tv_sec)?, u32::try_from(t.tv_usec)? * 1000))
    };
    Ok(time(usage.ru_utime)? + time(usage.ru_stime)?)
}

/// Time that all processors spent on programs so far, in ticks' resolution. Interrupts and soft interrupts are left out: they
/// are mostly the measurement's own I/O.
fn busy_time() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let fields = line.split_whitespace().skip(1).map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    // user nice system idle iowait irq softirq steal guest guest_nice
    let ticks: u64 = [0, 1, 2, 7].iter().filter_map(|at| fields.get(*at)).sum();
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// Flushes that a disk has completed so far.
fn flushes(stat: &Path) -> Result<u64> {
    let text = fs::read_to_string(stat).with_context(|| format!("read {}", stat.display()))?;
    let field = text.split_whitespace().nth(15).context("the disk does not count flushes")?;
    Ok(field.parse()?)
}

/// The state at one moment.
#[derive(Clone, Copy, Debug)]
struct Snapshot {
    at: Instant,
    backend: Duration,
    own: Duration,
    busy: Duration,
    flushes: u64,
}

/// What an interval cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processors that the backend kept busy.
    pub backend_cores: f64,
    /// Processors that programs kept busy which are neither the backend nor this one.
    pub foreign_cores: f64,
    /// Flushes of the disk a second.
    pub media_flushes: f64,
}

/// Whose time counts as the backend's.
#[derive(Clone, Copy, Debug)]
enum Backend {
    Process(u32),
    /// All children that have ended.
    Children,
}

/// Measures one interval.
#[derive(Debug)]
pub struct Meter {
    backend: Backend,
    disk: Option<PathBuf>,
    begun: Option<Snapshot>,
    usage: Usage,
}

impl Meter {
    pub fn new(backend: u32) -> Self {
        let backend = Backend::Process(backend);
        Self { backend, disk: None, begun: None, usage: Usage::default() }
    }

    /// The backend is a program that this one runs to its end meanwhile.
    pub fn of_children() -> Self {
        Self { backend: Backend::Children, ..Self::new(0) }
    }

    /// Counts the flushes of a disk too; `disk` is its `stat` in sysfs.
    #[must_use]
    pub fn on_disk(self, disk: Option<PathBuf>) -> Self {
        Self { disk, ..self }
    }

    fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot {
            at: Instant::now(),
            backend: match self.backend {
                Backend::Process(pid) => process_time(pid)?,
                Backend::Children => children_time()?,
            },
            own: process_time(std::process::id())?,
            busy: busy_time()?,
            flushes: self.disk.as_deref().map_or(Ok(0), flushes)?,
        })
    }

    pub fn begin(&mut self) -> Result<()> {
        self.begun = Some(self.snapshot()?);
        Ok(())
    }

    pub fn end(&mut self) -> Result<()> {
        let (from, to) = (self.begun.context("the interval has no beginning")?, self.snapshot()?);
        let wall = to.at.duration_since(from.at).as_secs_f64();
        let spent = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() / wall;
        let (backend, own) = (spent(from.backend, to.backend), spent(from.own, to.own));
        self.usage = Usage {
            backend_cores: backend,
            foreign_cores: (spent(from.busy, to.busy) - backend - own).max(0.0),
            #[allow(clippy::cast_precision_loss, reason = "figures for people")]
            media_flushes: (to.flushes - from.flushes) as f64 / wall,
        };
        Ok(())
    }

    pub fn usage(&self) -> Usage {
        self.usage
    }
}

/// Watches how busy the machine is with programs that have no part in a measurement.
#[derive(Debug)]
pub struct Bystanders {
    /// Those that have a part in it, beside this one.
    pids: Vec<u32>,
    at: Instant,
    busy: Duration,
    ours: Duration,
}

impl Bystanders {
    /// From now on; the processes must outlive the measurement.
    pub fn watch(pids: Vec<u32>) -> Result<Self> {
        let ours = Self::ours(&pids)?;
        Ok(Self { pids, at: Instant::now(), busy: busy_time()?, ours })
    }

    fn ours(pids: &[u32]) -> Result<Duration> {
        let all = pids.iter().copied().chain([std::process::id()]);
        all.map(process_time).sum()
    }

    /// Processors that others kept busy so far, on average.
    pub fn cores(&self) -> Result<f64> {
        let busy = busy_time()?.saturating_sub(self.busy);
        let ours = Self::ours(&self.pids)?.saturating_sub(self.ours);
        let wall = self.at.elapsed().as_secs_f64().max(1e-3);
        Ok(busy.saturating_sub(ours).as_secs_f64() / wall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bystanders_are_the_others() {
        let watch = Bystanders::watch(Vec::new()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let processors = std::thread::available_parallelism().unwrap().get() as f64;
        let cores = watch.cores().unwrap();
        assert!((0.0..processors + 0.5).contains(&cores), "{cores}");
        assert!(Bystanders::watch(vec![0x0fff_fff0]).is_err());
    }

    #[test]
    fn what_this_process_spends_is_not_foreign() {
        // However little of a processor others leave.
        const SPENT: Duration = Duration::from_millis(100);
        let now = || process_time(std::process::id()).unwrap();
        let mut meter = Meter::new(std::process::id());
        meter.begin().unwrap();
        let (start, before) = (Instant::now(), now());
        while now() - before < SPENT {
            std::hint::spin_loop();
        }
        meter.end().unwrap();
        let usage = meter.usage();
        let spent = usage.backend_cores * start.elapsed().as_secs_f64();
        assert!(spent >= SPENT.as_secs_f64() * 0.9, "{spent} s: {usage:?}");
        let processors = std::thread::available_parallelism().unwrap().get() as f64;
        // The kernel tells what all programs spent in hundredths of a second.
        assert!(usage.backend_cores + usage.foreign_cores < processors + 0.5, "{usage:?}");
    }

    #[test]
    fn a_process_that_is_not_there_has_no_clock() {
        assert!(process_time(0x0fff_fff0).is_err());
    }
}
