// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs in the guest: an application that reads blocks of a disk around a favourite place, with direct I/O, and can say which it would not miss.
//!
//! ```text
//! guest_reads untouched BLOCKS MEAN SIGMA SEED READS WANTED             hints: WANTED of the blocks that READS reads do not touch
//! guest_reads read DISK BLOCK_SIZE MEAN SIGMA SEED READS DATA_SEED      reads, and counts
//! ```
//!
//! `read` prints how often each outcome was met as `OUTCOME COUNT`: `intact`, `zero`, `wrong`, or the error's number (`61` for ENODATA).

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use vssd_tests::draw::Bell;
use vssd_tests::pattern::{self, Found};
use vssd_tests::tool;

const O_DIRECT: i32 = 0o40000;
/// What direct I/O wants buffers to be aligned to.
const ALIGNMENT: usize = 4096;

fn main() -> ExitCode {
    tool::main("guest_reads", run)
}

fn run(words: &[&str]) -> Result<()> {
    let number = |text: &str| text.parse::<u64>().with_context(|| format!("{text:?} is no number"));
    match words {
        ["untouched", blocks, mean, sigma, seed, reads, wanted] => {
            let bell = Bell::new(number(blocks)?, number(mean)?, sigma.parse()?)?;
            let mut out = BufWriter::new(io::stdout().lock());
            for block in bell.untouched(number(seed)?, number(reads)?, number(wanted)?)? {
                writeln!(out, "{block} 1")?;
            }
            Ok(out.flush()?)
        }
        ["read", disk, size, mean, sigma, seed, reads, data_seed] => {
            let mut file = OpenOptions::new()
                .read(true)
                .custom_flags(O_DIRECT)
                .open(disk)
                .with_context(|| format!("open {disk}"))?;
            let (size, data_seed) = (number(size)?, number(data_seed)?);
            let blocks = file.seek(SeekFrom::End(0))?.checked_div(size).context("blocks of 0 bytes")?;
            let bell = Bell::new(blocks, number(mean)?, sigma.parse()?)?;
            let len = usize::try_from(size)?;
            let mut buffer = vec![0; len + ALIGNMENT];
            let from = buffer.as_ptr().align_offset(ALIGNMENT);
            let block = buffer.get_mut(from..from + len).context("no aligned buffer")?;
            let mut seen: BTreeMap<String, u64> = BTreeMap::new();
            for index in bell.draws(number(seed)?, number(reads)?) {
                let outcome = match file.read_exact_at(block, index * size) {
                    Ok(()) => match pattern::judge(block, data_seed, index) {
                        Found::Intact => "intact".to_owned(),
                        Found::Zero => "zero".to_owned(),
                        Found::Wrong => "wrong".to_owned(),
                    },
                    Err(error) => error.raw_os_error().ok_or(error)?.to_string(),
                };
                *seen.entry(outcome).or_default() += 1;
            }
            for (outcome, count) in seen {
                println!("{outcome} {count}");
            }
            Ok(())
        }
        _ => bail!(
            "usage: untouched BLOCKS MEAN SIGMA SEED READS WANTED | read DISK BLOCK_SIZE MEAN SIGMA SEED READS DATA_SEED"
        ),
    }
}
