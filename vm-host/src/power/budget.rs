// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether what has to be saved can be, in the time between a critical event and darkness. Values in, a plan out: no clock, no I/O.
//!
//! ```text
//!   critical event                                                        darkness
//!     ├─ reaction ─┬─ lane 0: vm a (stop│save│commit│flush) ─┬─ vm d ─┬┄┄┄┄┄┄┤
//!     │            └─ lane 1: vm b ───┬─ vm c ───────────────┘        │ reserve
//!     0                                                             total   window
//! ```
//!
//! VMs start in the order of their priority, each on the lane that is free first: exactly as the host saves them. Each takes what it
//! took at worst so far, step by step; one that was never measured takes what the operator expects of any.
//!
//! A plan says of each VM when it would be saved, and whether that is before the reserve begins. [`Budget::admits`] says
//! whether one more VM may run: all must fit.

use std::cmp::Reverse;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What there is. Times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Between a critical event and darkness.
    pub window_us: u64,
    /// What passes before the first VM is told to stop.
    pub reaction_us: u64,
    /// What must be left at the end.
    pub reserve_us: u64,
    /// How many VMs are saved at a time; 0 counts as 1.
    pub lanes: usize,
    /// What each step of a VM that was never measured is taken to need.
    pub assumed: Steps,
}

/// The worst case of each step of saving a VM, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// Until its processors stand still and its disks are drained.
    pub stop_us: u64,
    /// Its devices' and processors' state.
    pub save_us: u64,
    /// Until that is durable and counts.
    pub commit_us: u64,
    /// Its memory's dirty cache lines, where caches do not survive.
    pub flush_us: u64,
}

impl Steps {
    pub fn total_us(&self) -> u64 {
        let steps = [self.stop_us, self.save_us, self.commit_us, self.flush_us];
        steps.into_iter().fold(0, u64::saturating_add)
    }

    /// The worse of both in each step: how a measurement is taken in.
    #[must_use]
    pub fn worst(&self, other: &Self) -> Self {
        Self {
            stop_us: self.stop_us.max(other.stop_us),
            save_us: self.save_us.max(other.save_us),
            commit_us: self.commit_us.max(other.commit_us),
            flush_us: self.flush_us.max(other.flush_us),
        }
    }
}

/// One VM as the budget sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    pub name: String,
    /// The higher, the sooner. Of equals, the one that comes first by name.
    pub priority: u8,
    /// `None`: never measured.
    pub measured: Option<Steps>,
}

/// When a VM is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    pub name: String,
    pub priority: u8,
    pub measured: bool,
    pub steps: Steps,
    /// After the critical event.
    pub begins_us: u64,
    pub ends_us: u64,
    pub fits: bool,
}

/// What saving all comes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In the order in which they begin.
    pub vms: Vec<Row>,
    /// When the last one is saved.
    pub total_us: u64,
    /// When it has to be: the window without its reserve.
    pub usable_us: u64,
    pub window_us: u64,
    pub lanes: usize,
}

/// Why a VM may not run.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize)]
pub enum Refusal {
    #[error(
        "with \"{name}\", saving all takes {total_us} us at worst, {usable_us} us are there: \"{late}\" would be saved after \
         {late_ends_us} us"
    )]
    DoesNotFit { name: String, total_us: u64, usable_us: u64, late: String, late_ends_us: u64 },
    #[error("saving \"{name}\" alone takes {needed_us} us at worst, {usable_us} us are there")]
    TooLong { name: String, needed_us: u64, usable_us: u64 },
}

impl Budget {
    /// Plans the save of `vms`.
    pub fn plan(&self, vms: &[Vm]) -> Plan {
        let mut order: Vec<&Vm> = vms.iter().collect();
        order.sort_by(|one, other| {
            (Reverse(one.priority), &one.name).cmp(&(Reverse(other.priority), &other.name))
        });
        let mut free = vec![self.reaction_us; self.lanes.max(1)];
        let usable_us = self.usable_us();
        let mut rows = Vec::with_capacity(order.len());
        for vm in order {
            let steps = vm.measured.unwrap_or(self.assumed);
            let begins_us = free.iter().copied().min().unwrap_or(self.reaction_us);
            let ends_us = begins_us.saturating_add(steps.total_us());
            if let Some(lane) = free.iter_mut().find(|lane| **lane == begins_us) {
                *lane = ends_us;
            }
            rows.push(Row {
                name: vm.name.clone(),
                priority: vm.priority,
                measured: vm.measured.is_some(),
                steps,
                begins_us,
                ends_us,
                fits: ends_us <= usable_us,
            });
        }
        let total_us = rows.iter().map(|row| row.ends_us).max().unwrap_or(self.reaction_us);
        Plan { vms: rows, total_us, usable_us, window_us: self.window_us, lanes: self.lanes.max(1) }
    }

    /// Whether `new` may run beside `running`. One with a name that is among those replaces it.
    pub fn admits(&self, running: &[Vm], new: &Vm) -> Result<Plan, Refusal> {
        let usable_us = self.usable_us();
        let needed_us = self.reaction_us.saturating_add(new.measured.unwrap_or(self.assumed).total_us());
        if needed_us > usable_us {
            return Err(Refusal::TooLong { name: new.name.clone(), needed_us, usable_us });
        }
        let others = running.iter().filter(|vm| vm.name != new.name);
        let all: Vec<Vm> = others.chain([new]).cloned().collect();
        let plan = self.plan(&all);
        match plan.vms.iter().find(|row| !row.fits) {
            None => Ok(plan),
            Some(row) => Err(Refusal::DoesNotFit {
                name: new.name.clone(),
                total_us: plan.total_us,
                usable_us,
                late: row.name.clone(),
                late_ends_us: row.ends_us,
            }),
        }
    }

    fn usable_us(&self) -> u64 {
        self.window_us.saturating_sub(self.reserve_us)
    }
}

impl Plan {
    /// Whether each VM is saved in time.
    pub fn fits(&self) -> bool {
        self.vms.iter().all(|row| row.fits)
    }

    /// What the state machine has to keep of a supply's runtime ([`super::state::Machine::set_needed`]).
    pub fn needed_ms(&self) -> u64 {
        self.total_us.div_ceil(1000)
    }
}

/// A table for the operator, in milliseconds.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const TITLES: [&str; 10] =
            ["vm", "priority", "stop", "save", "commit", "flush", "total", "begins", "ends", "fits"];
        let ms = |us: u64| format!("{}.{}", us / 1000, us % 1000 / 100);
        let mut table: Vec<[String; 10]> = vec![TITLES.map(str::to_owned)];
        for row in &self.vms {
            let steps = &row.steps;
            let fits = match (row.fits, row.measured) {
                (true, true) => "yes",
                (true, false) => "yes, not measured",
                (false, _) => "NO",
            };
            table.push([
                row.name.clone(),
                row.priority.to_string(),
                ms(steps.stop_us),
                ms(steps.save_us),
                ms(steps.commit_us),
                ms(steps.flush_us),
                ms(steps.total_us()),
                ms(row.begins_us),
                ms(row.ends_us),
                fits.to_owned(),
            ]);
        }
        let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 10] = std::array::from_fn(width);
        for row in &table {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
                match column {
                    0 => line += &format!("{cell:<width$}"),
                    9 => line += &format!("  {cell}"),
                    _ => line += &format!("  {cell:>width$}"),
                }
            }
            writeln!(f, "{line}")?;
        }
        write!(
            f,
            "all saved after {} ms of {} ms (window {} ms), {} at a time: {}",
            ms(self.total_us),
            ms(self.usable_us),
            ms(self.window_us),
            self.lanes,
            if self.fits() { "fits" } else { "DOES NOT FIT" }
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vm(name: &str, priority: u8, us: u64) -> Vm {
        Vm { name: name.into(), priority, measured: Some(Steps { save_us: us, ..Steps::default() }) }
    }

    const BUDGET: Budget = Budget {
        window_us: 10_000,
        reaction_us: 500,
        reserve_us: 1_000,
        lanes: 2,
        assumed: Steps { stop_us: 1_000, save_us: 2_000, commit_us: 500, flush_us: 500 },
    };

    #[test]
    fn higher_priority_begins_first_on_the_lane_that_is_free_first() {
        let plan = BUDGET.plan(&[vm("c", 1, 1_000), vm("b", 9, 4_000), vm("a", 9, 3_000), vm("d", 0, 5_000)]);
        let rows: Vec<_> =
            plan.vms.iter().map(|row| (row.name.as_str(), row.begins_us, row.ends_us, row.fits)).collect();
        assert_eq!(
            rows,
            [
                ("a", 500, 3_500, true),
                ("b", 500, 4_500, true),
                ("c", 3_500, 4_500, true),
                ("d", 4_500, 9_500, false)
            ]
        );
        assert_eq!((plan.total_us, plan.usable_us, plan.needed_ms()), (9_500, 9_000, 10));
        assert!(!plan.fits());
    }

    #[test]
    fn vm_that_would_make_another_late_is_refused_with_the_numbers() {
        let running = [vm("a", 0, 4_500), vm("b", 0, 4_500)];
        assert_eq!(BUDGET.admits(&running, &vm("c", 0, 4_000)).map(|plan| plan.total_us), Ok(9_000));
        let refusal = BUDGET.admits(&running, &vm("c", 7, 4_001)).unwrap_err();
        assert_eq!(
            refusal,
            Refusal::DoesNotFit {
                name: "c".into(),
                total_us: 9_001,
                usable_us: 9_000,
                late: "b".into(),
                late_ends_us: 9_001
            }
        );
        assert_eq!(
            BUDGET.admits(&[], &vm("c", 7, 8_501)).unwrap_err().to_string(),
            "saving \"c\" alone takes 9001 us at worst, 9000 us are there"
        );
    }

    #[test]
    fn vm_that_was_never_measured_takes_what_is_assumed_and_says_so() {
        let new = Vm { name: "new".into(), priority: 0, measured: None };
        let plan = BUDGET.plan(&[new]);
        assert_eq!((plan.vms[0].ends_us, plan.vms[0].measured), (4_500, false));
        assert_eq!(
            plan.to_string(),
            "vm   priority  stop  save  commit  flush  total  begins  ends  fits\n\
             new         0   1.0   2.0     0.5    0.5    4.0     0.5   4.5  yes, not measured\n\
             all saved after 4.5 ms of 9.0 ms (window 10.0 ms), 2 at a time: fits"
        );
    }

    #[test]
    fn measurement_only_ever_makes_a_step_worse() {
        let one = Steps { stop_us: 5, save_us: 1, commit_us: 0, flush_us: 3 };
        let other = Steps { stop_us: 4, save_us: 2, commit_us: 1, flush_us: 3 };
        assert_eq!(one.worst(&other), Steps { stop_us: 5, save_us: 2, commit_us: 1, flush_us: 3 });
    }

    /// Saves VMs microsecond by microsecond: idle lanes take the next VM, busy ones work.
    fn by_hand(budget: &Budget, vms: &[Vm]) -> Vec<(String, u64)> {
        let mut waiting: Vec<&Vm> = vms.iter().collect();
        let mut lanes: Vec<Option<(&Vm, u64)>> = vec![None; budget.lanes.max(1)];
        let (mut now, mut ended) = (budget.reaction_us, Vec::new());
        while !waiting.is_empty() || lanes.iter().any(Option::is_some) {
            for lane in &mut lanes {
                while lane.is_none() && !waiting.is_empty() {
                    let mut best = 0;
                    for (place, vm) in waiting.iter().enumerate() {
                        let first = waiting[best];
                        if vm.priority > first.priority
                            || (vm.priority == first.priority && vm.name < first.name)
                        {
                            best = place;
                        }
                    }
                    let vm = waiting.remove(best);
                    match vm.measured.unwrap_or(budget.assumed).total_us() {
                        0 => ended.push((vm.name.clone(), now)),
                        work => *lane = Some((vm, work)),
                    }
                }
            }
            now += 1;
            for lane in &mut lanes {
                if let Some((vm, left)) = lane {
                    *left -= 1;
                    if *left == 0 {
                        ended.push((vm.name.clone(), now));
                        *lane = None;
                    }
                }
            }
        }
        ended.sort();
        ended
    }

    proptest! {
        #[test]
        fn plan_is_what_saving_by_hand_does(
            costs in prop::collection::vec((0u8..3, 0u64..40), 0..12),
            lanes in 0usize..4,
            window_us in 0u64..200,
        ) {
            let budget = Budget { window_us, reaction_us: 3, reserve_us: 7, lanes, ..BUDGET };
            let vms: Vec<Vm> = costs
                .iter()
                .enumerate()
                .map(|(i, &(priority, us))| vm(&format!("vm{i:02}"), priority, us))
                .collect();
            let plan = budget.plan(&vms);
            let mut planned: Vec<_> = plan.vms.iter().map(|row| (row.name.clone(), row.ends_us)).collect();
            planned.sort();
            let ended = by_hand(&budget, &vms);
            prop_assert_eq!(&planned, &ended);
            let in_time = ended.iter().all(|(_, at)| at + 7 <= window_us);
            prop_assert_eq!(plan.fits(), in_time);
            if let Some((new, running)) = vms.split_last() {
                prop_assert_eq!(budget.admits(running, new).is_ok(), in_time);
            }
        }
    }
}
