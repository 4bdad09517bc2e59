// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon that serves one vSSD from a pool of its own, and its operator.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use vssd_protocol::control::{JobInfo, JobState, method};
use vssd_tests::backend::{Backend, control_socket, device_socket, pool_command};
use vssd_tests::ctl::Ctl;
use vssd_tests::mock::operator::Operator;
use vssd_tests::scenario::{Range, normal};

use crate::peer::Media;

/// The vSSD's name.
const NAME: &str = "paper";
/// Only a resize that hangs takes longer: thousands of exchanges with an emulated guest take tens of seconds.
const PATIENCE: Duration = Duration::from_secs(600);

/// The journal of a vSSD of 32 GiB needs a few MiB.
const JOURNAL: u64 = 256 << 20;

/// What a new pool lies on. Its files are made by it, so it knows that they read as zeroes: in one that was there before the daemon would first
/// zero everything, beside what is measured, and fill a sparse file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pool<'a> {
    /// All of it in memory.
    Nvram,
    /// A little NV-RAM, which takes the journal, and in this folder a sparse file as an SSD: for a vSSD larger than memory that nobody writes to.
    WithSsd(&'a Path),
}

#[derive(Debug)]
pub(super) struct Host {
    daemon: Backend,
    ctl: Ctl,
    operator: Operator,
    media: Vec<PathBuf>,
    runtime: PathBuf,
}

impl Host {
    /// A vSSD of `size` bytes on a new pool, whose NV-RAM is in the folder `dir`, which is made. `options` are the daemon's.
    pub(super) fn new(
        dir: &Path,
        on: Pool<'_>,
        size: u64,
        block_size: u64,
        options: &[&str],
    ) -> Result<Self> {
        let runtime = dir.join("run");
        fs::create_dir_all(&runtime).with_context(|| format!("make {}", runtime.display()))?;
        let nvram = dir.join("nvram");
        let mut media = vec![nvram.clone()];
        let block_size = format!("--block-size={block_size}");
        let data = Media::pool_bytes(size);
        let small = if matches!(on, Pool::Nvram) { data } else { JOURNAL };
        let mut create =
            vec!["create".to_owned(), format!("--nvram={}:{small}", nvram.display()), block_size];
        if let Pool::WithSsd(disk) = on {
            fs::create_dir_all(disk).with_context(|| format!("make {}", disk.display()))?;
            let ssd = disk.join("ssd");
            create.push(format!("--ssd={}:{data}", ssd.display()));
            media.push(ssd);
        }
        pool_command(&create.iter().map(String::as_str).collect::<Vec<_>>())?;
        let media_paths: Vec<&Path> = media.iter().map(PathBuf::as_path).collect();
        let daemon = Backend::pool(&media_paths, &runtime, &dir.join("log"))?
            .args(options.iter().copied())
            .started()?;
        let control = control_socket(&runtime);
        let mut operator = Operator::connect(&control)?;
        operator.create(NAME, size, &json!({}))?;
        Ok(Self { daemon, ctl: Ctl::new(&control)?, operator, media, runtime })
    }

    /// The daemon's process.
    pub(super) fn pid(&mut self) -> Result<u32> {
        self.daemon.pid()
    }

    /// Where a front-end connects.
    pub(super) fn socket(&self) -> PathBuf {
        device_socket(&self.runtime, NAME)
    }

    /// `balloon-ctl shrink`, to its end.
    pub(super) fn shrink(&self, bytes: u64) -> Result<()> {
        self.ctl.ok(&["shrink", NAME, &bytes.to_string(), "--wait"]).map(drop)
    }

    /// `balloon-ctl grow`, to its end.
    pub(super) fn grow(&self, bytes: u64) -> Result<()> {
        self.ctl.ok(&["grow", NAME, &bytes.to_string(), "--wait"]).map(drop)
    }

    /// Has the vSSD resized to `bytes`; how long it took from the operator's call to the end of its job.
    pub(super) fn resize(&mut self, bytes: u64) -> Result<Duration> {
        let start = Instant::now();
        let mut job = self.operator.resize(NAME, bytes, &json!({}))?;
        while !job.state.is_final() {
            ensure!(start.elapsed() < PATIENCE, "the guest does not follow; the job: {job:?}");
            let params = json!({ "id": job.id, "timeout_ms": 1000 });
            job = self.operator.call::<JobInfo>(method::JOB_WAIT, &params)?;
        }
        let took = start.elapsed();
        ensure!(
            job.state == JobState::Done && job.plugged_bytes == bytes,
            "asked for {bytes} bytes, the job ended as {job:?}"
        );
        Ok(took)
    }

    /// The blocks that the daemon holds for unplugged.
    pub(super) fn evicted(&mut self) -> Result<Vec<Range>> {
        let ranges = self.operator.evicted(NAME)?;
        Ok(normal(ranges.into_iter().map(|range| (range.start.into(), range.count.into())).collect()))
    }

    /// Ends the daemon in order and checks the pool: sound, nothing owned twice.
    pub(super) fn finish(mut self) -> Result<()> {
        let status = self.daemon.terminate()?;
        if !status.success() {
            bail!("the daemon ended with {status}; its log:\n{}", self.daemon.log());
        }
        self.daemon.expect_clean_log()?;
        let media: Vec<String> =
            self.media.iter().map(|medium| medium.to_string_lossy().into_owned()).collect();
        pool_command(&[&["check"], &media.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat())
            .map(drop)
    }
}
