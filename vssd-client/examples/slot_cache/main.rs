// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An object cache on a raw vSSD that gives blocks up when the host asks, under a workload that checks every object.
//!
//! ```text
//! slot_cache DISK until=FILE [program=NAME] [law=zipf|gaussian] [objects=N] [seed=N] [report=FILE] [trace=FILE]
//! ```
//!
//! Whatever is on the disk is lost. Runs until the file `until` is there, and prints its counters as JSON; `report` is replaced
//! with them a few times a second. To `trace` goes a line for each list of hints that is published. Ends with an error at the first
//! object that is not as it was put.
//!
//! `cache.rs` is the part to copy from.

#![forbid(unsafe_code)]

mod cache;
mod workload;

use std::collections::HashMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cache::{Counters, Published, SlotCache};
use workload::{Law, Workload};

const USAGE: &str = "usage: slot_cache DISK until=FILE [program=NAME] [law=zipf|gaussian] [objects=N] [seed=N] \
                     [report=FILE] [trace=FILE]";
/// How often counters are reported.
const REPORT: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("slot_cache: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (disk, options) = args.split_first().ok_or(USAGE)?;
    let options: HashMap<&str, &str> =
        options.iter().map(|word| word.split_once('=').ok_or(USAGE)).collect::<Result<_, _>>()?;
    let known = ["until", "program", "law", "objects", "seed", "report", "trace"];
    if options.keys().any(|key| !known.contains(key)) {
        return Err(USAGE.into());
    }
    let number = |key, default| options.get(key).map_or(Ok(default), |text| text.parse::<u64>());
    let law = match *options.get("law").unwrap_or(&"zipf") {
        "zipf" => Law::Zipf,
        "gaussian" => Law::Gaussian,
        _ => return Err(USAGE.into()),
    };
    let until = PathBuf::from(options.get("until").ok_or(USAGE)?);
    let report = options.get("report").map(PathBuf::from);
    let mut trace = options.get("trace").map(File::create).transpose()?;

    let mut cache = SlotCache::open(disk, options.get("program").unwrap_or(&"slot_cache"))?;
    let mut workload = Workload::new(law, number("objects", 4096)?, cache.slot_len(), number("seed", 1)?)?;
    let mut reported = Instant::now();
    loop {
        if let Some(published) = cache.heed()?
            && let Some(trace) = &mut trace
        {
            writeln!(trace, "{}", trace_line(&published))?;
        }
        workload.step(&mut cache)?;
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            if let Some(path) = &report {
                let aside = path.with_extension("aside");
                fs::write(&aside, json(cache.counters()))?;
                fs::rename(&aside, path)?;
            }
            if until.exists() {
                break;
            }
        }
    }
    println!("{}", json(cache.counters()));
    Ok(())
}

fn json(counters: Counters) -> String {
    let Counters { hits, misses, puts, lost, refused, used, free, hinted, gone } = counters;
    format!(
        "{{\"hits\":{hits},\"misses\":{misses},\"puts\":{puts},\"lost\":{lost},\"refused\":{refused},\
         \"used\":{used},\"free\":{free},\"hinted\":{hinted},\"gone\":{gone},\"wrong\":0}}"
    )
}

fn trace_line(published: &Published) -> String {
    let hints: Vec<String> =
        published.hints.iter().map(|(block, last_use)| format!("[{block},{last_use}]")).collect();
    format!(
        "{{\"seq\":{},\"to_give\":{},\"coldest_kept\":{},\"hints\":[{}]}}",
        published.seq,
        published.to_give,
        published.coldest_kept.map_or_else(|| "null".to_owned(), |last_use| last_use.to_string()),
        hints.join(",")
    )
}
