// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The offline check: everything that recovery would do, without doing anything.

use std::sync::Arc;

use vssd_protocol::units::PhysicalBlock;

use crate::error::{Error, Result};
use crate::recovery::{self, Media, Recovered};
use crate::store::Store;
use crate::types::{MediumKind, MediumPath};

/// What to check.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// Every medium of the pool, in any order.
    pub media: Vec<MediumPath>,
    /// Also read every block that is recorded as clean and see that it is zero.
    pub verify_zero: bool,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The other copy covers it; the next open repairs it.
    Repairable,
    /// The pool cannot be opened, or data is lost.
    Fatal,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    pub what: String,
}

/// What the check saw.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    pub findings: Vec<Finding>,
    pub vssds: usize,
    pub total_blocks: u32,
    pub leased_blocks: u32,
    pub clean_blocks: u32,
    /// Blocks that recovery would zero before anyone gets them.
    pub dirty_blocks: u32,
}

impl CheckReport {
    /// Nothing found.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    fn add(&mut self, severity: Severity, what: impl IntoIterator<Item = String>) {
        self.findings.extend(what.into_iter().map(|what| Finding { severity, what }));
    }
}

/// See [`crate::Pool::check`].
pub(crate) fn check(stores: Vec<Arc<dyn Store>>, verify_zero: bool) -> Result<CheckReport> {
    let media = recovery::assemble(stores)?;
    let mut report = CheckReport { total_blocks: media.layout.total_blocks(), ..CheckReport::default() };
    report.add(Severity::Repairable, media.findings.iter().cloned());
    let recovered = match recovery::recover(&media) {
        Ok(recovered) => recovered,
        Err(Error::Damaged { what }) => {
            report.add(Severity::Fatal, [what]);
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    report.add(Severity::Repairable, recovered.findings.iter().cloned());
    report.add(Severity::Fatal, recovered.contradictions.iter().cloned());
    report.vssds = recovered.state.vssds.len();
    report.leased_blocks = recovered.leased.ones();
    report.clean_blocks = recovered.state.clean.ones();
    report.dirty_blocks = report.total_blocks.saturating_sub(report.leased_blocks + report.clean_blocks);
    if verify_zero {
        verify_clean_blocks(&media, &recovered, &mut report)?;
    }
    Ok(report)
}

fn verify_clean_blocks(media: &Media, recovered: &Recovered, report: &mut CheckReport) -> Result<()> {
    let block_size = media.layout.block_size;
    // At most 2 MiB.
    let mut bytes = vec![0; usize::try_from(block_size.bytes()).unwrap_or(0)];
    let clean = &recovered.state.clean;
    let mut at = 0;
    while let Some(block) = clean.next(at, clean.len()) {
        at = block + 1;
        let kind = if block < media.layout.blocks[0] { MediumKind::Nvram } else { MediumKind::Ssd };
        let Some(medium) = &media.media[kind.index()] else { continue };
        medium
            .store
            .read_at(medium.offset_of(PhysicalBlock(block), block_size), &mut bytes)
            .map_err(|source| Error::io(format!("cannot read physical block {block}"), source))?;
        if bytes.iter().any(|&byte| byte != 0) {
            report.add(Severity::Fatal, [format!("physical block {block} counts as clean and is not zero")]);
        }
    }
    Ok(())
}
