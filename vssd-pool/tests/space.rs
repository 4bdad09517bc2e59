// SPDX-License-Identifier: Apache-2.0 OR MIT

//! No room: the file system under a sparse pool file is full, for a while or for good.
//!
//! Each test runs once more in a mount namespace of its own, with a file system of a few MiB.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a panic is how a test reports")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use vssd_pool::{
    BlockSize, CreateOptions, IoError, MediumKind, MediumSpec, OpenOptions, Pool, Submitted, Vssd,
};

const B: u64 = 4096;
const INSIDE: &str = "SPACE_TEST_DIR";
const WAIT: Duration = Duration::from_millis(400);

/// The folder with little room, if this is the run inside; else runs this test there.
fn inside(test: &str) -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os(INSIDE) {
        return Some(dir.into());
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=4m none \"$SPACE_TEST_DIR\" && exec \"$@\"";
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, dir.path())
        .status()
        .unwrap();
    assert!(status.success(), "{test} in a mount namespace of its own: {status}");
    None
}

fn sparse_pool(dir: &Path) -> Arc<Pool> {
    let path = dir.join("pool");
    let mut create =
        CreateOptions::new("sparse", vec![MediumSpec::new(MediumKind::Ssd, &path, Some(64 << 20))]);
    create.block_size = BlockSize::new(4096).unwrap();
    Pool::create(&create).unwrap();
    open(dir)
}

fn open(dir: &Path) -> Arc<Pool> {
    let mut options = OpenOptions::new([dir.join("pool")]);
    options.space_wait = WAIT;
    Pool::open(&options).unwrap()
}

/// Writes block after block until there is no room; how many were acknowledged.
fn fill_up(io: &mut Io, vssd: &Arc<Vssd>) -> u64 {
    for block in 0..u64::from(vssd.total_blocks()) {
        let started = Instant::now();
        match io.fill(vssd, block * B, B, content(block)) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, IoError::NoSpace);
                let held = started.elapsed();
                assert!(held >= WAIT && held < 10 * WAIT, "held for {held:?}");
                return block;
            }
        }
    }
    panic!("a sparse file of 64 MiB fits on 4 MiB");
}

fn content(block: u64) -> u8 {
    u8::try_from(block % 250).unwrap() + 1
}

fn expect(io: &mut Io, vssd: &Arc<Vssd>, blocks: impl Iterator<Item = u64>) {
    for block in blocks {
        let bytes = io.read_vec(vssd, block * B, B).unwrap();
        assert!(bytes.iter().all(|&byte| byte == content(block)), "block {block}");
    }
}

#[test]
fn full_disk_under_a_sparse_pool_fails_new_writes_after_a_while_and_nothing_else() {
    let Some(dir) = inside("full_disk_under_a_sparse_pool_fails_new_writes_after_a_while_and_nothing_else")
    else {
        return;
    };
    let pool = sparse_pool(&dir);
    let vssd = pool.create_vssd(&spec("a", 4000, 4000)).unwrap();
    let mut io = Io::new(&pool);
    let written = fill_up(&mut io, &vssd);
    assert!(written > 100, "{written}");
    // What has room goes on, and so does all that is metadata.
    io.flush(&vssd).unwrap();
    for block in 0..10 {
        io.fill(&vssd, block * B, B, content(block)).unwrap();
    }
    let other = pool.create_vssd(&spec("b", 16, 16)).unwrap();
    pool.checkpoint().unwrap();
    assert_eq!(io.fill(&other, 0, B, 1), Err(IoError::NoSpace));
    io.flush(&vssd).unwrap();
    assert!(!pool.info().failed);
    expect(&mut io, &vssd, 0..written);
    drop((io, other));
    pool.close().unwrap();
    drop((vssd, pool));
    let pool = open(&dir);
    let mut io = Io::new(&pool);
    expect(&mut io, &pool.vssd_by_name("a").unwrap(), 0..written);
    println!("{written} blocks written before the disk was full");
}

#[test]
fn write_held_for_room_goes_on_when_some_is_given_back() {
    let Some(dir) = inside("write_held_for_room_goes_on_when_some_is_given_back") else { return };
    let pool = sparse_pool(&dir);
    let vssd = pool.create_vssd(&spec("a", 4000, 4000)).unwrap();
    let mut io = Io::new(&pool);
    let written = fill_up(&mut io, &vssd);
    let mut lane = pool.lane().unwrap();
    let mut bytes = vec![7u8; B as usize];
    let iov = [libc_iovec(&mut bytes)];
    // SAFETY: `bytes` outlives the request, which is drained below.
    let held = unsafe { lane.write(&vssd, 3999 * B, &iov, 9) };
    assert_eq!(held, Submitted::Pending);
    // Others are not held up by it.
    let started = Instant::now();
    expect(&mut io, &vssd, 0..10);
    io.discard(&vssd, 0, 64 * B).unwrap();
    assert!(started.elapsed() < WAIT);
    let mut answers = Vec::new();
    lane.drain(&mut |token, result| answers.push((token, result)));
    assert_eq!(answers, [(9, Ok(()))]);
    io.flush(&vssd).unwrap();
    expect(&mut io, &vssd, 64..written);
    assert!(io.read_vec(&vssd, 3999 * B, B).unwrap().iter().all(|&byte| byte == 7));
}

#[test]
fn pool_that_does_not_fit_is_not_made() {
    let Some(dir) = inside("pool_that_does_not_fit_is_not_made") else { return };
    std::fs::write(dir.join("ballast"), vec![1u8; 7 << 19]).unwrap();
    let path = dir.join("pool");
    let mut create =
        CreateOptions::new("sparse", vec![MediumSpec::new(MediumKind::Ssd, &path, Some(64 << 20))]);
    create.block_size = BlockSize::new(4096).unwrap();
    assert_eq!(Pool::create(&create).unwrap_err().code(), "E_IO");
    assert!(!path.exists());
}
