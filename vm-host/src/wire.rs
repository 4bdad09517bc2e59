// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is said on vm-host's control channel: names of methods, and types of parameters and answers. The lines are those of
//! [`vssd_protocol::control`], and so are the codes of errors.
//!
//! Sizes and times are integers with the unit in the key. Unknown fields of a request are refused, those of an answer are to be
//! ignored. Methods answer when what they were asked for is done, which may take seconds (a save) or minutes (a swap to disk);
//! `vm.show` on another connection says how far it is.

use std::path::PathBuf;

use control_server::Fault;
use control_server::blocking::Access;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vssd_protocol::control::ErrorCode;
pub use vssd_protocol::control::{HelloParams, NameParams, SubscribeParams, Subscribed};

use crate::guard::PowerStatus;
use crate::host::Host;
use crate::lint::Finding;
use crate::nvram::{Capabilities, Purpose, Usage, Verdict};
use crate::power::{Plan, Pretended};
use crate::vm::{Medium, Status};

/// Name and version of this set of messages.
pub const SCHEMA: &str = "vm-host.v1";
/// The key of an event that has the name of the VM it is about.
pub const EVENT_OBJECT: &str = "vm";
/// How long a guest has to turn itself off, unless told.
pub const DEFAULT_GRACE_MS: u64 = 60_000;

/// Names of methods, and what they do to the daemon.
pub mod method {
    use super::Access;

    pub use vssd_protocol::control::method::{EVENTS_SUBSCRIBE, HELLO};
    pub const VM_LIST: &str = "vm.list";
    pub const VM_SHOW: &str = "vm.show";
    pub const VM_DEFINE: &str = "vm.define";
    pub const VM_UNDEFINE: &str = "vm.undefine";
    pub const VM_START: &str = "vm.start";
    pub const VM_STOP: &str = "vm.stop";
    pub const VM_SAVE: &str = "vm.save";
    pub const VM_RESTORE: &str = "vm.restore";
    pub const VM_SWAP_OUT: &str = "vm.swap-out";
    pub const VM_SWAP_IN: &str = "vm.swap-in";
    pub const VM_DISCARD: &str = "vm.discard";
    pub const VM_LINT: &str = "vm.lint";
    pub const NVRAM_LIST: &str = "nvram.list";
    pub const NVRAM_PROBE: &str = "nvram.probe";
    pub const POWER_STATUS: &str = "power.status";
    pub const POWER_TEST: &str = "power.test";

    /// What the method of this name does; `None` where there is none.
    pub fn access(method: &str) -> Option<Access> {
        match method {
            HELLO | VM_LIST | VM_SHOW | VM_LINT | NVRAM_LIST | POWER_STATUS => Some(Access::Read),
            // A probe opens what it is told to and may write to it.
            VM_DEFINE | VM_UNDEFINE | VM_START | VM_STOP | VM_SAVE | VM_RESTORE | VM_SWAP_OUT
            | VM_SWAP_IN | VM_DISCARD | NVRAM_PROBE | POWER_TEST => Some(Access::Change),
            _ => None,
        }
    }
}

/// Answer to `server.hello` (a [`HelloParams`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerInfo {
    pub server: String,
    pub version: String,
    pub schema: String,
    pub pid: u32,
    pub uptime_ms: u64,
    /// `control` or `monitor`: which of the two sockets this is.
    pub socket: String,
    pub max_line_bytes: u64,
    /// Where `NAME.log` has what a VM's hypervisor says, and `NAME.console` what its guest says. Both are bounded: what was said before
    /// the last MiB or so is in `….old`, or gone.
    pub log_dir: PathBuf,
}

/// `vm.define`. Answer: [`Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DefineParams {
    /// TOML, see [`crate::definition`].
    pub definition: String,
    /// Change the definition of a VM that there is.
    #[serde(default)]
    pub replace: bool,
}

/// `vm.stop`. Answer: [`Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopParams {
    pub name: String,
    /// How long the guest has to turn itself off; [`DEFAULT_GRACE_MS`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
    /// Do not ask the guest at all.
    #[serde(default)]
    pub kill: bool,
}

impl StopParams {
    pub fn grace_ms(&self) -> u64 {
        if self.kill { 0 } else { self.grace_ms.unwrap_or(DEFAULT_GRACE_MS) }
    }
}

/// Answer to `vm.list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmList {
    pub vms: Vec<Status>,
    /// VMs of which the daemon cannot read what it wrote about them; their memory is left alone.
    #[serde(default)]
    pub unreadable: Vec<Unreadable>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unreadable {
    pub name: String,
    pub error: FaultInfo,
}

impl VmList {
    pub fn of(host: &Host) -> Self {
        let unreadable = host.unreadable().iter();
        Self {
            vms: host.list(),
            unreadable: unreadable
                .map(|(name, fault)| Unreadable { name: name.clone(), error: fault.into() })
                .collect(),
        }
    }
}

/// Something that failed earlier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultInfo {
    pub code: ErrorCode,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl From<&Fault> for FaultInfo {
    fn from(fault: &Fault) -> Self {
        Self { code: fault.code, message: fault.message.clone(), hint: fault.hint.clone() }
    }
}

/// `vm.lint`. Answer: [`LintAnswer`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LintParams {
    /// TOML, see [`crate::definition`].
    pub definition: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LintAnswer {
    pub findings: Vec<Finding>,
}

/// Answer to `nvram.list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NvramList {
    pub media: Vec<MediumInfo>,
}

/// A medium that the configuration names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MediumInfo {
    pub name: String,
    pub path: PathBuf,
    /// Of one that is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<ProbeAnswer>,
    #[serde(default)]
    pub regions: Vec<RegionInfo>,
    /// Why it is not open, or its usage is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<FaultInfo>,
}

/// A part of a medium that belongs to a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RegionInfo {
    pub owner: String,
    /// `memory` or `state`.
    pub purpose: String,
    pub bytes: u64,
}

impl NvramList {
    pub fn of(media: &[Medium]) -> Self {
        Self { media: media.iter().map(MediumInfo::of).collect() }
    }
}

impl MediumInfo {
    fn of(medium: &Medium) -> Self {
        let bare = Self {
            name: medium.config.name.clone(),
            path: medium.config.path.clone(),
            usage: None,
            found: None,
            regions: Vec::new(),
            error: None,
        };
        let nvram = match &medium.nvram {
            Ok(nvram) => nvram,
            Err(fault) => return Self { error: Some(fault.into()), ..bare },
        };
        let (usage, error) = match nvram.usage() {
            Ok(usage) => (Some(usage), None),
            Err(error) => (None, Some(FaultInfo::from(&Fault::from(error)))),
        };
        let regions = nvram.list();
        Self {
            usage,
            found: Some(ProbeAnswer::of(nvram.capabilities())),
            regions: regions
                .iter()
                .map(|region| RegionInfo {
                    owner: region.owner.clone(),
                    purpose: purpose(region.purpose).to_owned(),
                    bytes: region.bytes,
                })
                .collect(),
            error,
            ..bare
        }
    }
}

fn purpose(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Memory => "memory",
        Purpose::State => "state",
    }
}

/// `nvram.probe`: what a medium could be used for. Answer: [`ProbeAnswer`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeParams {
    /// A directory, file or device.
    pub path: PathBuf,
    /// As if its configuration said so.
    #[serde(default)]
    pub declared_persistent: bool,
}

/// What was found by trying.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAnswer {
    /// Whether persistent VMs may live there.
    pub keeps: bool,
    /// Worth knowing about one that does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Of one that does not: why, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// [`Capabilities`]; for people, whose versions may differ.
    pub capabilities: Value,
}

impl ProbeAnswer {
    pub fn of(found: &Capabilities) -> Self {
        let (keeps, notes, why, advice) = match found.verdict() {
            Verdict::Keeps { notes } => (true, notes, None, None),
            Verdict::Loses { why, advice } => (false, Vec::new(), Some(why), Some(advice)),
        };
        // Capabilities are plain words and numbers: nothing in them fails.
        let capabilities = serde_json::to_value(found).unwrap_or_default();
        Self { keeps, notes, why, advice, capabilities }
    }
}

/// Answer to `power.status`, as the daemon makes it; [`PowerInfo`] is how it is read.
#[derive(Clone, Debug, Serialize)]
pub struct PowerAnswer {
    #[serde(flatten)]
    pub power: PowerStatus,
    /// What saving all VMs that run comes to.
    pub plan: Plan,
}

/// Answer to `power.status`.
#[derive(Clone, Debug, Deserialize)]
pub struct PowerInfo {
    /// `online`, `on_battery`, `critical`, `saved`, `resuming`.
    pub state: String,
    /// Milliseconds in this state.
    pub for_ms: u64,
    /// Why; its member `reason` is a word.
    #[serde(default)]
    pub reason: Option<Value>,
    #[serde(default)]
    pub shutdown_planned: bool,
    /// An operator pretends.
    #[serde(default)]
    pub testing: bool,
    #[serde(default)]
    pub delays_shutdown: bool,
    #[serde(default)]
    pub sources: Vec<SourceInfo>,
    #[serde(default)]
    pub last_save_us: Option<u64>,
    pub plan: PlanInfo,
}

/// A source of power events.
#[derive(Clone, Debug, Deserialize)]
pub struct SourceInfo {
    pub name: String,
    pub kind: String,
    /// Its last word.
    #[serde(default)]
    pub state: Option<Value>,
    #[serde(default)]
    pub error: Option<String>,
    #[serde(default)]
    pub detail: Option<String>,
}

/// A [`Plan`].
#[derive(Clone, Debug, Deserialize)]
pub struct PlanInfo {
    pub vms: Vec<PlanRow>,
    pub total_us: u64,
    pub usable_us: u64,
    pub window_us: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct PlanRow {
    pub name: String,
    pub priority: u8,
    pub measured: bool,
    pub begins_us: u64,
    pub ends_us: u64,
    pub fits: bool,
}

/// `power.test`: as if a supply had said so. Answer: an empty object.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerTestParams {
    pub stage: Stage,
}

/// What is pretended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    OnBattery,
    Critical,
    /// The end of the test.
    Online,
}

impl From<Stage> for Pretended {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::OnBattery => Self::Battery,
            Stage::Critical => Self::Critical,
            Stage::Online => Self::Online,
        }
    }
}

/// Parameters of an `event` notification.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    pub seq: u64,
    /// RFC 3339, UTC, milliseconds.
    pub time: String,
    pub event: String,
    #[serde(default)]
    pub vm: Option<String>,
    #[serde(default)]
    pub data: Value,
}

#[cfg(test)]
mod tests {
    use control_server::{About, EventLog};
    use serde_json::json;

    use super::*;
    use crate::power::budget::{Budget, Steps, Vm};

    #[test]
    fn plan_is_read_as_it_is_written() {
        let assumed = Steps { stop_us: 1, save_us: 2, commit_us: 3, flush_us: 4 };
        let budget = Budget { window_us: 5000, reaction_us: 10, reserve_us: 100, lanes: 1, assumed };
        let plan = budget.plan(&[Vm { name: "db".to_owned(), priority: 3, measured: None }]);
        let read: PlanInfo = serde_json::from_value(serde_json::to_value(&plan).unwrap()).unwrap();
        let (row, planned) = (&read.vms[0], &plan.vms[0]);
        assert_eq!((row.name.as_str(), row.priority, row.measured, row.fits), ("db", 3, false, true));
        assert_eq!((row.begins_us, row.ends_us), (planned.begins_us, planned.ends_us));
        assert_eq!((read.total_us, read.usable_us, read.window_us), (plan.total_us, plan.usable_us, 5000));
    }

    #[test]
    fn event_is_read_as_it_is_written() {
        let mut log = EventLog::default();
        log.push(0, "vm.state", About::object(EVENT_OBJECT, "db"), json!({ "to": "saved" }));
        let line: Value = serde_json::from_str(&log.after(0).next().unwrap().line).unwrap();
        let event: Event = serde_json::from_value(line["params"].clone()).unwrap();
        assert_eq!((event.vm.as_deref(), event.event.as_str()), (Some("db"), "vm.state"));
    }

    #[test]
    fn typing_errors_are_refused() {
        let stop = |value: Value| serde_json::from_value::<StopParams>(value);
        assert!(stop(json!({ "name": "db", "grace": 5 })).is_err());
        assert_eq!(stop(json!({ "name": "db" })).unwrap().grace_ms(), DEFAULT_GRACE_MS);
        assert_eq!(stop(json!({ "name": "db", "grace_ms": 5, "kill": true })).unwrap().grace_ms(), 0);
        for (word, stage) in
            [("on-battery", Stage::OnBattery), ("critical", Stage::Critical), ("online", Stage::Online)]
        {
            let params: PowerTestParams = serde_json::from_value(json!({ "stage": word })).unwrap();
            assert_eq!(params.stage, stage);
        }
    }

    #[test]
    fn whoever_only_watches_changes_nothing() {
        assert_eq!(method::access(method::VM_LIST), Some(Access::Read));
        assert_eq!(method::access(method::POWER_TEST), Some(Access::Change));
        assert_eq!(method::access("vm.explode"), None);
    }
}
