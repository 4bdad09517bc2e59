// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the agent says when it is asked: the state of each disk, and what it would do.

use serde::Serialize;
use vssd_protocol::units::ByteCount;

use crate::blocks::BlockSet;
use crate::config::Config;
use crate::disk::{self, Status};
use crate::error::{AgentError, Result};
use crate::estimate::Estimate;
use crate::source::{self, Source};
use crate::stock;

#[derive(Debug, Serialize)]
struct Report {
    disk: String,
    device: String,
    state: String,
    block_size_bytes: u32,
    total_blocks: u32,
    plugged_blocks: u32,
    requested_blocks: u32,
    to_give_blocks: u32,
    evicted_blocks: u32,
    /// If the source could say it.
    #[serde(flatten)]
    inside: Option<Inside>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// What the source says.
#[derive(Debug, Serialize)]
struct Inside {
    place: String,
    could_give: Estimate,
    /// Evicted blocks that something may still use: any but 0 is a fault.
    uncovered_blocks: u32,
}

fn look(name: &str, config: &Config) -> Result<(Status, Report)> {
    let (status, evicted) = if disk::has_driver(name) {
        let status = disk::status(name)?;
        let evicted = disk::evicted(name, status.total_blocks)?;
        (status, evicted)
    } else {
        let status = stock::status(name)?;
        let none = BlockSet::new(status.total_blocks);
        (status, none)
    };
    let source = source::of(name, &config.of(name));
    let (inside, problem) = match inside(source.as_ref(), &status, &evicted) {
        Ok((inside, complaints)) => (Some(inside), complaints),
        Err(error) => (None, Some(error.to_string())),
    };
    let report = Report {
        disk: name.to_owned(),
        device: status.name.clone(),
        state: status.state.clone(),
        block_size_bytes: status.block_size,
        total_blocks: status.total_blocks,
        plugged_blocks: status.plugged_blocks,
        requested_blocks: status.requested_blocks,
        to_give_blocks: status.to_give(),
        evicted_blocks: evicted.len(),
        inside,
        problem,
    };
    Ok((status, report))
}

/// What the source says, and what is wrong with it all the same.
fn inside(source: &dyn Source, status: &Status, evicted: &BlockSet) -> Result<(Inside, Option<String>)> {
    let inside = Inside {
        place: source.place()?.display().to_string(),
        could_give: source.estimate(status, evicted)?,
        uncovered_blocks: source.uncovered(status, evicted)?.len(),
    };
    let complaints: Vec<String> = source.complaints(status)?.iter().map(AgentError::message).collect();
    Ok((inside, (!complaints.is_empty()).then(|| complaints.join("; "))))
}

/// The state of each disk.
pub(crate) fn print(disks: &[String], config: &Config, json: bool) -> Result<()> {
    for name in disks {
        let (_, report) = look(name, config)?;
        if json {
            println!("{}", serde_json::json!(report));
        } else {
            print_text(&report);
        }
    }
    Ok(())
}

fn print_text(report: &Report) {
    let bytes = |blocks: u32| ByteCount(u64::from(blocks) * u64::from(report.block_size_bytes));
    println!(
        "{} ({}): {} of {} plugged, {} asked, state {}",
        report.disk,
        report.device,
        bytes(report.plugged_blocks),
        bytes(report.total_blocks),
        bytes(report.requested_blocks),
        report.state
    );
    if let Some(inside) = &report.inside {
        println!(
            "  {}: {} gone, {} held, {} more could go",
            inside.place,
            bytes(report.evicted_blocks),
            bytes(inside.could_give.held_blocks),
            bytes(inside.could_give.more_blocks())
        );
        if inside.uncovered_blocks > 0 {
            println!("  {} are gone and may be used: grow the vSSD back", bytes(inside.uncovered_blocks));
        }
    }
    if let Some(problem) = &report.problem {
        println!("  {problem}");
    }
}

/// What [`crate::serve`] would do for each disk.
pub(crate) fn print_plan(disks: &[String], config: &Config) -> Result<()> {
    for name in disks {
        let (status, report) = look(name, config)?;
        print_text(&report);
        let wanted = status.to_give();
        let bytes = |blocks: u32| ByteCount(u64::from(blocks) * u64::from(status.block_size));
        match report.inside.map(|inside| inside.could_give) {
            _ if wanted == 0 => println!("  would do nothing: the host asks for nothing back"),
            Some(could) => {
                let missing = wanted.saturating_sub(could.held_blocks);
                let (free, more) = (missing.min(could.free_blocks), missing.min(could.more_blocks()));
                let short = missing - more;
                println!("  would give {}: {} of them from free space", bytes(wanted - short), bytes(free));
                if short > 0 {
                    println!("  would decline {}", bytes(short));
                }
            }
            None => println!("  would decline {}", bytes(wanted)),
        }
    }
    Ok(())
}
