// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is measured and what must be reached, as data.

use crate::client::{Kind, Load, Waiting};
use crate::peer::{Contender, Medium};
use crate::placement::Placement;
use crate::sample::Sample;

use Contender::{Fio, Qsd, Vssd, VssdIdentity, VssdPolling};

/// Bytes of a disk that a steady case uses.
const SPAN: u64 = 1 << 30;
const KIB: usize = 1 << 10;

/// A figure that a run gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    Iops,
    IopsPerCore,
    BytesPerSecond,
    P50,
}

impl Figure {
    pub fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::IopsPerCore => "IOPS per backend core",
            Self::BytesPerSecond => "throughput",
            Self::P50 => "p50",
        }
    }

    pub fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Iops => sample.iops,
            Self::IopsPerCore => sample.iops_per_core(),
            Self::BytesPerSecond => sample.bytes_per_second,
            Self::P50 => sample.p50_us,
        }
    }
}

/// What a figure must reach.
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    /// So many times another contender's, or more.
    Times(f64, Contender),
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Copy, Debug)]
pub struct Gate {
    pub of: Contender,
    pub figure: Figure,
    pub bound: Bound,
}

const fn times(of: Contender, figure: Figure, factor: f64, other: Contender) -> Gate {
    Gate { of, figure, bound: Bound::Times(factor, other) }
}

const fn at_least(of: Contender, figure: Figure, bound: f64) -> Gate {
    Gate { of, figure, bound: Bound::AtLeast(bound) }
}

/// A load that stays the same, on every contender in turn.
#[derive(Clone, Debug)]
pub struct Steady {
    pub medium: Medium,
    pub load: Load,
    pub placement: Placement,
    pub waiting: Waiting,
    pub contenders: Vec<Contender>,
    pub gates: Vec<Gate>,
    /// How many times as many rounds as other cases: for small differences.
    pub rounds: usize,
    /// Whether to compare with this machine's speed of copying memory.
    pub against_memory: bool,
}

#[derive(Clone, Debug)]
pub enum Plan {
    Steady(Steady),
    /// The first write to each block.
    FirstTouch(Medium),
    /// Many vSSDs against one.
    Scaling,
    /// Many vSSDs that nobody uses.
    Idle,
    /// Reads while other blocks of the same vSSD come and go.
    LatencyUnderResize {
        depth: usize,
    },
    /// Shrinking and growing as fast as a driver can.
    ResizeProtocol,
    /// Shrinking and growing with a guest's own work.
    ResizeGuest,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub plan: Plan,
}

fn steady(name: impl Into<String>, steady: Steady) -> Case {
    Case { name: name.into(), plan: Plan::Steady(steady) }
}

fn random(kind: Kind, block: usize, depth: usize) -> Load {
    Load::random(kind, block, depth, SPAN)
}

/// All cases, in the order of the report.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let ways = [(Kind::Read, "read"), (Kind::Write, "write")];
    for (kind, way) in ways {
        let base = Steady {
            medium: Medium::Nvram,
            load: random(kind, 4 * KIB, 32),
            placement: Placement::Same,
            waiting: Waiting::Sleeping,
            contenders: vec![Vssd, Qsd],
            gates: vec![times(Vssd, Figure::Iops, 6.0, Qsd), at_least(Vssd, Figure::IopsPerCore, 1e6)],
            rounds: 1,
            against_memory: true,
        };
        cases.push(steady(format!("nvram-4k-qd32-{way}-same"), base.clone()));
        let split = Steady {
            placement: Placement::Split,
            contenders: vec![Vssd, VssdPolling, Qsd],
            gates: vec![
                times(Vssd, Figure::Iops, 2.0, Qsd),
                times(VssdPolling, Figure::Iops, 3.0, Qsd),
                at_least(VssdPolling, Figure::Iops, 8e5),
            ],
            ..base.clone()
        };
        cases.push(steady(format!("nvram-4k-qd32-{way}-split"), split.clone()));
        let queues =
            Steady { load: Load { queues: 2, depth: 16, buffers: 16, ..split.load.clone() }, ..split };
        cases.push(steady(format!("nvram-4k-2q-qd16-{way}-split"), queues));
        let one = Steady {
            load: random(kind, 4 * KIB, 1),
            gates: vec![times(Vssd, Figure::Iops, 2.0, Qsd)],
            against_memory: false,
            ..base.clone()
        };
        cases.push(steady(format!("nvram-4k-qd1-{way}-same"), one.clone()));
        let one_split = Steady {
            placement: Placement::Split,
            contenders: vec![Vssd, VssdPolling, Qsd],
            gates: vec![times(Vssd, Figure::Iops, 1.0, Qsd)],
            ..one.clone()
        };
        cases.push(steady(format!("nvram-4k-qd1-{way}-split"), one_split.clone()));
        let looking = Steady {
            waiting: Waiting::Polling,
            gates: vec![Gate { of: VssdPolling, figure: Figure::P50, bound: Bound::AtMost(3.0) }],
            ..one_split
        };
        cases.push(steady(format!("nvram-4k-qd1-{way}-polling-client"), looking));
        let large = Steady {
            load: random(kind, 128 * KIB, 16),
            placement: Placement::Split,
            gates: vec![times(Vssd, Figure::BytesPerSecond, 2.0, Qsd)],
            ..base
        };
        cases.push(steady(format!("nvram-128k-qd16-{way}-split"), large));
    }
    for (kind, way) in ways {
        let case = Steady {
            medium: Medium::Nvram,
            load: random(kind, 4 * KIB, 32),
            placement: Placement::Same,
            waiting: Waiting::Sleeping,
            contenders: vec![Vssd, VssdIdentity],
            gates: vec![
                times(Vssd, Figure::Iops, 0.95, VssdIdentity),
                times(Vssd, Figure::IopsPerCore, 0.95, VssdIdentity),
            ],
            rounds: 3,
            against_memory: false,
        };
        cases.push(steady(format!("map-cost-{way}-same"), case));
    }
    for (kind, way) in ways {
        for (depth, factor) in [(1, 1.0), (32, 1.05)] {
            let gates = vec![
                times(Vssd, Figure::Iops, factor, Qsd),
                times(Vssd, Figure::Iops, 0.9, Fio),
                times(Vssd, Figure::IopsPerCore, 1.2, Qsd),
            ];
            let case = Steady {
                medium: Medium::Ssd,
                load: random(kind, 4 * KIB, depth),
                placement: Placement::Split,
                waiting: Waiting::Sleeping,
                contenders: vec![Vssd, Qsd, Fio],
                gates,
                rounds: 1,
                against_memory: false,
            };
            cases.push(steady(format!("ssd-4k-qd{depth}-{way}-split"), case));
        }
    }
    for depth in [1, 32] {
        let case = Steady {
            medium: Medium::Ssd,
            load: random(Kind::DurableWrite, 4 * KIB, depth),
            placement: Placement::Split,
            waiting: Waiting::Sleeping,
            contenders: vec![Vssd, Qsd],
            gates: vec![times(Vssd, Figure::Iops, 1.0, Qsd)],
            rounds: 1,
            against_memory: false,
        };
        cases.push(steady(format!("ssd-flush-each-qd{depth}-split"), case));
    }
    let mut add = |name: &str, plan| cases.push(Case { name: name.into(), plan });
    add("nvram-first-touch", Plan::FirstTouch(Medium::Nvram));
    add("ssd-first-touch", Plan::FirstTouch(Medium::Ssd));
    add("latency-under-resize-qd1", Plan::LatencyUnderResize { depth: 1 });
    add("latency-under-resize-qd8", Plan::LatencyUnderResize { depth: 8 });
    add("scaling", Plan::Scaling);
    add("idle", Plan::Idle);
    add("resize-protocol", Plan::ResizeProtocol);
    add("resize-guest", Plan::ResizeGuest);
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_gates_speak_of_contenders_that_run() {
        let cases = all();
        let mut names: Vec<_> = cases.iter().map(|case| &case.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cases.len());
        for case in &cases {
            let Plan::Steady(steady) = &case.plan else { continue };
            for gate in &steady.gates {
                assert!(steady.contenders.contains(&gate.of), "{}", case.name);
                if let Bound::Times(_, other) = gate.bound {
                    assert!(steady.contenders.contains(&other), "{}", case.name);
                }
            }
        }
    }
}
