// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs in the guest: makes, ages and checks a tree of files whose contents can be told from anything else.
//!
//! ```text
//! guest_files fill DIR SEED          writes files of 4 KiB to 1 MiB until the file system is full
//! guest_files few DIR SEED           writes some
//! guest_files thin DIR SALT          deletes about half of them, others for each salt
//! guest_files check DIR SEED         reads all of them; an error unless each is as it was written
//! guest_files churn DIR SEED STOP    writes, checks and deletes files until the file STOP is there; checks the rest at the end
//! ```
//!
//! Prints how many files and bytes there are.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use vssd_tests::pattern::{self, Found};
use vssd_tests::tool;

/// Files that `churn` keeps.
const KEEP: usize = 24;

fn main() -> ExitCode {
    tool::main("guest_files", |words| {
        let (files, bytes) = run(words)?;
        println!("files {files} bytes {bytes}");
        Ok::<(), io::Error>(())
    })
}

fn run(words: &[&str]) -> io::Result<(u64, u64)> {
    let seed = |text: &str| {
        text.parse::<u64>().map_err(|error| io::Error::other(format!("{text:?} is no number: {error}")))
    };
    match words {
        ["fill", dir, text] => fill(Path::new(dir), seed(text)?),
        ["few", dir, text] => {
            for index in 0..KEEP as u64 {
                write(Path::new(dir), seed(text)?, index, false)?;
            }
            count(Path::new(dir))
        }
        ["thin", dir, salt] => {
            let salt = mix(seed(salt)?);
            for (path, index, _) in files(Path::new(dir))? {
                if mix(salt ^ index) & 1 == 0 {
                    fs::remove_file(path)?;
                }
            }
            count(Path::new(dir))
        }
        ["check", dir, text] => check(Path::new(dir), seed(text)?),
        ["churn", dir, text, stop] => churn(Path::new(dir), seed(text)?, Path::new(stop)),
        _ => Err(io::Error::other("usage: fill|few|check DIR SEED | thin DIR SALT | churn DIR SEED STOP")),
    }
}

fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ (n >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 20
}

/// Small ones are many, large ones are few.
fn len_of(seed: u64, index: u64) -> u64 {
    let random = mix(seed.wrapping_add(index.wrapping_mul(7)));
    let scale = 12 + random % 9;
    (1 << scale) - (random >> 8) % (1 << (scale - 1))
}

/// The name says what the file holds.
fn write(dir: &Path, seed: u64, index: u64, durable: bool) -> io::Result<()> {
    let len = len_of(seed, index);
    let path = dir.join(format!("{index}.{len}"));
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    pattern::fill(&mut bytes, seed, index);
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(&bytes)?;
        if durable { file.sync_data() } else { Ok(()) }
    });
    written.inspect_err(|_| {
        // There need not be one: making it can fail, too.
        let _ = fs::remove_file(&path);
    })
}

fn judge(path: &Path, seed: u64, index: u64, len: u64) -> io::Result<()> {
    let bytes = fs::read(path)?;
    if bytes.len() as u64 != len || pattern::judge(&bytes, seed, index) != Found::Intact {
        return Err(io::Error::other(format!(
            "{} of {} bytes is not as it was written",
            path.display(),
            bytes.len()
        )));
    }
    Ok(())
}

fn files(dir: &Path) -> io::Result<Vec<(PathBuf, u64, u64)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = |text: &str| text.parse::<u64>().ok();
        let Some((index, len)) =
            name.split_once('.').and_then(|(index, len)| Some((number(index)?, number(len)?)))
        else {
            return Err(io::Error::other(format!("{} is none of ours", path.display())));
        };
        all.push((path, index, len));
    }
    all.sort_unstable_by_key(|(_, index, _)| *index);
    Ok(all)
}

fn count(dir: &Path) -> io::Result<(u64, u64)> {
    let all = files(dir)?;
    Ok((all.len() as u64, all.iter().map(|(_, _, len)| len).sum()))
}

fn fill(dir: &Path, seed: u64) -> io::Result<(u64, u64)> {
    fs::create_dir_all(dir)?;
    let first = files(dir)?.last().map_or(0, |(_, index, _)| index + 1);
    for index in first.. {
        match write(dir, seed, index, false) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
            Err(error) => return Err(error),
        }
    }
    count(dir)
}

fn check(dir: &Path, seed: u64) -> io::Result<(u64, u64)> {
    for (path, index, len) in files(dir)? {
        judge(&path, seed, index, len)?;
    }
    count(dir)
}

fn churn(dir: &Path, seed: u64, stop: &Path) -> io::Result<(u64, u64)> {
    fs::create_dir_all(dir)?;
    let mut index = 0;
    while !stop.exists() {
        match write(dir, seed, index, true) {
            Ok(()) => {}
            // The rest of the file system is allowed to be full.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {}
            Err(error) => return Err(error),
        }
        index += 1;
        let mut all = files(dir)?;
        while all.len() > KEEP {
            let at = usize::try_from(mix(index)).map_err(io::Error::other)? % all.len();
            let (path, index, len) = all.swap_remove(at);
            judge(&path, seed, index, len)?;
            fs::remove_file(path)?;
        }
    }
    let (_, bytes) = check(dir, seed)?;
    Ok((index, bytes))
}
