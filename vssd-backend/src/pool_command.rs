// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `vssd-backend pool create|check`: what is done to a pool while no daemon uses it.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use vssd_pool::{CheckOptions, CreateOptions, MediumKind, MediumSpec, Pool, Severity};
use vssd_protocol::control::SCHEMA;
use vssd_protocol::units::ByteCount;

use crate::config::{PoolCheckArgs, PoolCommand, PoolCreateArgs};
use crate::daemon::block_size;

/// Runs the command; a check that finds damage fails.
pub fn run(command: PoolCommand) -> Result<ExitCode> {
    match command {
        PoolCommand::Create(args) => create(&args),
        PoolCommand::Check(args) => check(args),
    }
}

fn create(args: &PoolCreateArgs) -> Result<ExitCode> {
    let media = [(MediumKind::Nvram, &args.nvram), (MediumKind::Ssd, &args.ssd)];
    let media = media.into_iter().filter_map(|(kind, text)| Some(medium(kind, text.as_deref()?))).collect();
    let mut options = CreateOptions::new(&args.name, media);
    options.block_size = block_size(args.block_size)?;
    options.overcommit_percent = args.overcommit;
    options.force = args.force;
    Pool::create(&options).context("cannot make the pool")?;
    let paths: Vec<_> = options.media.iter().map(|medium| medium.path.display().to_string()).collect();
    println!("pool {} made on {}, blocks of {}", args.name, paths.join(", "), args.block_size);
    Ok(ExitCode::SUCCESS)
}

/// `FILE` or `FILE:SIZE`. What follows the last colon is a size only if it reads as one: paths may have colons.
fn medium(kind: MediumKind, text: &str) -> MediumSpec {
    let sized =
        text.rsplit_once(':').and_then(|(path, size)| Some((path, size.parse::<ByteCount>().ok()?.0)));
    match sized {
        Some((path, size)) => MediumSpec::new(kind, path, Some(size)),
        None => MediumSpec::new(kind, text, None),
    }
}

fn check(args: PoolCheckArgs) -> Result<ExitCode> {
    let options = CheckOptions { media: args.media.into_iter().map(Into::into).collect(), verify_zero: true };
    let report = Pool::check(&options).context("cannot check the pool")?;
    let fatal = report.findings.iter().any(|finding| finding.severity == Severity::Fatal);
    let mut out = io::stdout().lock();
    if args.json {
        let findings: Vec<_> = report
            .findings
            .iter()
            .map(|finding| serde_json::json!({"severity": severity(finding.severity), "what": finding.what}))
            .collect();
        let object = serde_json::json!({
            "schema": SCHEMA, "clean": report.is_clean(), "vssds": report.vssds, "blocks": report.total_blocks,
            "leased_blocks": report.leased_blocks, "clean_blocks": report.clean_blocks,
            "dirty_blocks": report.dirty_blocks, "findings": findings,
        });
        writeln!(out, "{object}")?;
    } else {
        for finding in &report.findings {
            writeln!(out, "{}: {}", severity(finding.severity), finding.what)?;
        }
        writeln!(
            out,
            "{} vSSDs, {} blocks: {} hold data, {} are clean, {} will be zeroed before use",
            report.vssds, report.total_blocks, report.leased_blocks, report.clean_blocks, report.dirty_blocks
        )?;
        let verdict = match (fatal, report.is_clean()) {
            (true, _) => "damaged",
            (false, false) => "usable; the next start repairs what was found",
            (false, true) => "sound",
        };
        writeln!(out, "the pool is {verdict}")?;
    }
    Ok(if fatal { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Repairable => "repairable",
        Severity::Fatal => "fatal",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_size_follows_the_last_colon_only_if_it_is_one() {
        let sized = medium(MediumKind::Ssd, "/a:b/pool.img:10G");
        assert_eq!((sized.path.as_path(), sized.size), (Path::new("/a:b/pool.img"), Some(10 << 30)));
        let by_path = "/dev/disk/by-path/pci-0000:00:1f.2-ata";
        let unsized_medium = medium(MediumKind::Ssd, by_path);
        assert_eq!((unsized_medium.path.as_path(), unsized_medium.size), (Path::new(by_path), None));
        assert_eq!(medium(MediumKind::Nvram, "/dev/pmem0").size, None);
    }
}
