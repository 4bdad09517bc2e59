// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs in the guest: writes and reads a disk block by block, with direct I/O, and says what became of each.
//!
//! ```text
//! guest_blocks fill DISK BLOCK_SIZE SEED START COUNT     writes the blocks that START COUNT names
//! guest_blocks scan DISK BLOCK_SIZE SEED                 reads every block from the first to the last
//! ```
//!
//! Prints runs of equal outcome as `OUTCOME START COUNT`: `intact`, `zero`, `wrong`, or the error's number (`61` for
//! ENODATA). `fill` prints `written` instead of `intact`.

use std::alloc::{Layout, alloc_zeroed};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;

use vssd_tests::pattern::{self, Found};
use vssd_tests::tool;

const O_DIRECT: i32 = 0o40000;

fn main() -> ExitCode {
    tool::main("guest_blocks", run)
}

fn run(words: &[&str]) -> io::Result<()> {
    let number = |text: &str| {
        text.parse::<u64>().map_err(|error| io::Error::other(format!("{text:?} is no number: {error}")))
    };
    match words {
        ["fill", disk, size, seed, start, count] => {
            let file = OpenOptions::new().write(true).custom_flags(O_DIRECT).open(disk)?;
            let (start, seed) = (number(start)?, number(seed)?);
            let blocks = start..start + number(count)?;
            walk(&file, number(size)?, blocks, |file, block, offset, index| {
                pattern::fill(block, seed, index);
                file.write_all_at(block, offset).map(|()| "written")
            })?;
            file.sync_all()
        }
        ["scan", disk, size, seed] => {
            let file = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(disk)?;
            let (size, seed) = (number(size)?, number(seed)?);
            let blocks = 0..io::Seek::seek(&mut &file, io::SeekFrom::End(0))? / size;
            walk(&file, size, blocks, |file, block, offset, index| {
                file.read_exact_at(block, offset)?;
                Ok(match pattern::judge(block, seed, index) {
                    Found::Intact => "intact",
                    Found::Zero => "zero",
                    Found::Wrong => "wrong",
                })
            })
        }
        _ => {
            Err(io::Error::other("usage: fill DISK BLOCK_SIZE SEED START COUNT | scan DISK BLOCK_SIZE SEED"))
        }
    }
}

/// Does `act` to every block and prints the outcomes in runs.
fn walk(
    file: &File,
    size: u64,
    blocks: std::ops::Range<u64>,
    act: impl Fn(&File, &mut [u8], u64, u64) -> io::Result<&'static str>,
) -> io::Result<()> {
    let len = usize::try_from(size).map_err(io::Error::other)?;
    let buffer = aligned(len)?;
    let mut run: Option<(String, u64, u64)> = None;
    for index in blocks {
        let outcome = match act(file, buffer, index * size, index) {
            Ok(word) => word.to_owned(),
            Err(error) => error.raw_os_error().ok_or(error)?.to_string(),
        };
        match &mut run {
            Some((word, _, count)) if *word == outcome => *count += 1,
            _ => {
                print(run.replace((outcome, index, 1)));
            }
        }
    }
    print(run);
    Ok(())
}

fn print(run: Option<(String, u64, u64)>) {
    if let Some((outcome, start, count)) = run {
        println!("{outcome} {start} {count}");
    }
}

/// A page-aligned buffer, as direct I/O wants it. One for the life of the process.
fn aligned(len: usize) -> io::Result<&'static mut [u8]> {
    let layout = Layout::from_size_align(len, 4096).map_err(io::Error::other)?;
    if len == 0 {
        return Err(io::Error::other("a block of 0 bytes"));
    }
    // SAFETY: the layout is not empty; the memory is never freed, so it may live as long as the process.
    let pointer = unsafe { alloc_zeroed(layout) };
    if pointer.is_null() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    // SAFETY: `len` zeroed bytes that nothing else refers to.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, len) })
}
