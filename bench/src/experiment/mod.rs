// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How each kind of case is carried out.

pub mod first_touch;
pub mod guest;
pub mod idle;
pub mod latency;
pub mod protocol;
pub mod scaling;
pub mod steady;

use anyhow::Result;

use crate::cases::{Case, Plan};
use crate::report::CaseReport;
use crate::run::Bench;

/// Carries a case out.
pub fn run(bench: &mut Bench, case: &Case) -> Result<CaseReport> {
    if !matches!(case.plan, Plan::Steady(_)) {
        bench.make_room()?;
    }
    let mut report = match &case.plan {
        Plan::Steady(plan) => steady::run(bench, plan),
        Plan::FirstTouch(medium) => first_touch::run(bench, *medium),
        Plan::Scaling => scaling::run(bench),
        Plan::Idle => idle::run(bench),
        Plan::LatencyUnderResize { depth } => latency::run(bench, *depth),
        Plan::ResizeProtocol => protocol::run(bench),
        Plan::ResizeGuest => guest::run(bench),
    }?;
    report.name.clone_from(&case.name);
    report.note_disturbances();
    Ok(report)
}
