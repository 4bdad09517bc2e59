// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's page cache stays out of the data path: what guests read and write on an SSD is in it neither before nor after,
//! and takes no memory from the host.

use anyhow::{Result, ensure};
use serde_json::json;
use vssd_tests::backend::{Backend, control_socket, device_socket, pool_command};
use vssd_tests::mock::driver::{Driver, lowest};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::operator::Operator;
use vssd_tests::mock::seed;
use vssd_tests::mock::site::{BLOCK, MIB};
use vssd_tests::page_cache::{forget, resident};
use vssd_tests::scratch::Scratch;

const SIZE: u64 = 32 * MIB;
const REQUESTS: usize = 20_000;

/// Pages that a working page cache would hold at the least.
const MANY: usize = 4096;

#[test]
fn reading_writing_flushing_discarding_and_shrinking_leave_no_page_of_the_pool_in_the_page_cache()
-> Result<()> {
    // Beside the build results: a folder for temporary files may lie in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let scratch = Scratch::new()?;
    let (media, runtime) = (dir.path().join("pool"), scratch.join("run"));
    pool_command(&["create", "--ssd", &format!("{}:80M", media.display())])?;
    let mut daemon = Backend::pool(&[&media], &runtime, &scratch.join("log"))?.started()?;
    let mut operator = Operator::connect(&control_socket(&runtime))?;
    let status = operator.pool()?;
    let direct = status.media.iter().all(|medium| medium.persistence == "direct");
    ensure!(direct, "{} has no direct I/O: {:?}", dir.path().display(), status.media);
    operator.create("vm1", SIZE, &json!({}))?;
    let mut machine = Machine::start(&device_socket(&runtime, "vm1"), Options::default())?;
    // Making and opening a pool looks at its superblock before it is known what the medium is.
    forget(&media)?;
    ensure!(resident(&media)? == 0, "{} pages after they were let go", resident(&media)?);

    let mut driver = Driver::start(machine.take_queue(0)?)?;
    let unit = machine.logical_block()?.into();
    let profile =
        Profile { bytes: SIZE / 4..SIZE, unit, block: BLOCK, depth: 16, zeroing: true, tables: true };
    let mut load = Load::new(vec![machine.take_queue(1)?], profile, seed("wire_page_cache"))?;
    load.touch_all()?;
    load.run(REQUESTS)?;
    load.verify()?;
    let job = operator.resize("vm1", SIZE - SIZE / 8, &json!({}))?;
    driver.attend(&mut lowest)?;
    operator.finish(job.id)?;
    load.run(REQUESTS / 10)?;
    load.verify()?;
    let pages = resident(&media)?;
    println!("{:?}: {pages} pages in the page cache", load.counts);
    ensure!(pages == 0, "{pages} pages of the pool are in the page cache");

    // The measurement can tell: what goes through the page cache is found there.
    std::fs::read(&media)?;
    ensure!(resident(&media)? >= MANY, "{} pages after reading all", resident(&media)?);
    ensure!(daemon.terminate()?.success());
    daemon.expect_clean_log()
}
