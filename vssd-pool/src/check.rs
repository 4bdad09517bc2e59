// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The offline check.

use crate::types::MediumPath;

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
}
