// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the operator says about power: the sections `[power]` and `[[power.source]]`.
//!
//! ```toml
//! [power]
//! supplies = "any"          # the machine needs each of its supplies; "all": they are redundant, one is enough
//! window_ms = 10000         # between a critical event and darkness
//! reserve_ms = 1000         # of that, what must be left when all is saved
//! margin_ms = 30000         # with less runtime than saving needs and this, it is saved
//! save_after_ms = 300000    # on battery for so long, it is saved (default: never for that reason)
//! lost_grace_ms = 5000      # a supply that is silent for so long on battery counts as about to end
//! disarm_after_ms = 5000    # power must be back for so long to count as back
//! resume_after_ms = 10000   # and for so long before anything resumes
//! retry_ms = 1000           # what could not be saved is tried again after so long
//!
//! [[power.source]]
//! kind = "nut"              # Network UPS Tools
//! name = "ups-a"
//! host = "::1"              # port = 3493
//! ups = "rack1"             # may be left out where the server has one UPS
//! user = "monitor"          # with password_file = "/etc/vm-host/ups-a.password" and login = true where upsd asks for it
//!
//! [[power.source]]
//! kind = "logind"           # planned shutdowns and reboots; address = "unix:path=…" for another bus
//! name = "host"
//!
//! [[power.source]]
//! kind = "uevent"           # adapters and UPSes that the kernel knows (/sys/class/power_supply)
//! name = "mains"
//!
//! [[power.source]]
//! kind = "signal"           # SIGPWR, as UPS daemons send it to init
//! name = "sigpwr"
//!
//! [[power.source]]
//! kind = "edge"             # a line of hardware, or any program that writes to a FIFO
//! name = "power-good"
//! path = "/sys/class/gpio/gpio17/value"   # or fd = 5, one that was inherited
//! low = "critical"          # what 0 means, or "battery"
//! window_ms = 200           # each source may have a window of its own (logind: 5000 where nothing else is said)
//! ```

use std::path::PathBuf;

use serde::Deserialize;
use thiserror::Error;

use super::budget::{Budget, Steps};
use super::observation::{Role, SourceId};
use super::state::{Policy, Supplies};

/// `[power]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct PowerConfig {
    pub supplies: Supplies,
    pub window_ms: u64,
    pub reserve_ms: u64,
    pub margin_ms: u64,
    pub save_after_ms: Option<u64>,
    pub lost_grace_ms: u64,
    pub disarm_after_ms: u64,
    pub resume_after_ms: u64,
    pub retry_ms: u64,
    #[serde(rename = "source")]
    pub sources: Vec<SourceConfig>,
}

impl Default for PowerConfig {
    fn default() -> Self {
        Self {
            supplies: Supplies::Any,
            window_ms: 10_000,
            reserve_ms: 1_000,
            margin_ms: 30_000,
            save_after_ms: None,
            lost_grace_ms: 5_000,
            disarm_after_ms: 5_000,
            resume_after_ms: 10_000,
            retry_ms: 1_000,
            sources: Vec::new(),
        }
    }
}

/// `[[power.source]]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum SourceConfig {
    Nut(NutConfig),
    Logind(LogindConfig),
    Uevent(UeventConfig),
    Signal(SignalConfig),
    Edge(EdgeConfig),
}

/// A UPS that a NUT server knows.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct NutConfig {
    pub name: String,
    pub window_ms: Option<u64>,
    #[serde(default = "localhost")]
    pub host: String,
    #[serde(default = "nut_port")]
    pub port: u16,
    pub ups: Option<String>,
    pub user: Option<String>,
    /// Its first line is the password.
    pub password_file: Option<PathBuf>,
    /// Be counted by the server among those that the UPS feeds: after a forced shutdown, upsmon on the server waits for us (for
    /// HOSTSYNC) before it switches the UPS off. Needs a user.
    #[serde(default)]
    pub login: bool,
    #[serde(default = "poll_ms")]
    pub poll_ms: u64,
    #[serde(default = "poll_on_battery_ms")]
    pub poll_on_battery_ms: u64,
    /// For each answer.
    #[serde(default = "nut_timeout_ms")]
    pub timeout_ms: u64,
}

fn localhost() -> String {
    "localhost".to_owned()
}

fn nut_port() -> u16 {
    3493
}

fn poll_ms() -> u64 {
    5_000
}

fn poll_on_battery_ms() -> u64 {
    1_000
}

fn nut_timeout_ms() -> u64 {
    3_000
}

/// The host's own shutdown, as systemd-logind announces it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct LogindConfig {
    pub name: String,
    pub window_ms: Option<u64>,
    /// Of the bus; `DBUS_SYSTEM_BUS_ADDRESS` or the system's usual one where it is left out.
    pub address: Option<String>,
}

/// What the kernel knows of adapters and UPSes.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct UeventConfig {
    pub name: String,
    pub window_ms: Option<u64>,
    /// Where the power supplies are listed.
    #[serde(default = "power_supplies")]
    pub sysfs: PathBuf,
}

fn power_supplies() -> PathBuf {
    "/sys/class/power_supply".into()
}

/// SIGPWR.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct SignalConfig {
    pub name: String,
    pub window_ms: Option<u64>,
    /// Files that say what a SIGPWR is about: the first that is there counts.
    #[serde(default = "status_files")]
    pub status_files: Vec<PathBuf>,
}

fn status_files() -> Vec<PathBuf> {
    ["/run/powerstatus", "/var/run/powerstatus", "/etc/powerstatus"].map(PathBuf::from).to_vec()
}

/// A descriptor that tells of power by bytes, lines or edges.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct EdgeConfig {
    pub name: String,
    pub window_ms: Option<u64>,
    /// A FIFO, character device or sysfs file.
    pub path: Option<PathBuf>,
    /// An inherited descriptor, in place of a path.
    pub fd: Option<i32>,
    #[serde(default)]
    pub low: Low,
}

/// What `0` on a line means.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Low {
    /// Power-good has fallen: milliseconds are left.
    #[default]
    Critical,
    Battery,
}

/// What is wrong with it.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("{actual} power sources, at most {max} are possible")]
    TooMany { actual: usize, max: usize },
    #[error("two power sources are called \"{name}\"")]
    Twice { name: String },
    #[error("power sources \"{first}\" and \"{second}\" both want descriptor {fd}")]
    SameDescriptor { first: String, second: String, fd: i32 },
    #[error("power source \"{name}\": {reason}")]
    Source { name: String, reason: String },
    #[error("resume_after_ms is {resume_after_ms}, at least disarm_after_ms ({disarm_after_ms}) is needed")]
    ResumesTooEarly { resume_after_ms: u64, disarm_after_ms: u64 },
    #[error("a window of {window_ms} ms leaves nothing after a reserve of {reserve_ms} ms")]
    NoWindow { window_ms: u64, reserve_ms: u64 },
}

const MAX_SOURCES: usize = 64;
/// For so long logind waits, unless its configuration says otherwise (InhibitDelayMaxSec).
const LOGIND_WINDOW_MS: u64 = 5_000;

impl PowerConfig {
    /// Whether it can be worked with.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.sources.len() > MAX_SOURCES {
            return Err(ConfigError::TooMany { actual: self.sources.len(), max: MAX_SOURCES });
        }
        for (place, source) in self.sources.iter().enumerate() {
            let name = source.name();
            if self.sources.iter().take(place).any(|other| other.name() == name) {
                return Err(ConfigError::Twice { name: name.to_owned() });
            }
            if let Some(fd) = source.fd()
                && let Some(other) = self.sources.iter().take(place).find(|other| other.fd() == Some(fd))
            {
                let (first, second) = (other.name().to_owned(), name.to_owned());
                return Err(ConfigError::SameDescriptor { first, second, fd });
            }
            source
                .check()
                .map_err(|reason| ConfigError::Source { name: name.to_owned(), reason: reason.to_owned() })?;
        }
        let Self { resume_after_ms, disarm_after_ms, reserve_ms, .. } = *self;
        if resume_after_ms < disarm_after_ms {
            return Err(ConfigError::ResumesTooEarly { resume_after_ms, disarm_after_ms });
        }
        let window_ms = self.shortest_window_ms();
        if window_ms <= reserve_ms {
            return Err(ConfigError::NoWindow { window_ms, reserve_ms });
        }
        Ok(())
    }

    /// What the budget has to be made for: the shortest window of any supply.
    pub fn shortest_window_ms(&self) -> u64 {
        let windows = self.sources.iter().map(|source| source.window_ms().unwrap_or(self.window_ms));
        windows.min().unwrap_or(self.window_ms)
    }

    /// For planning saves. `reaction_us` passes before the first VM is told to stop, `lanes` VMs are saved at a time.
    pub fn budget(&self, reaction_us: u64, lanes: usize, assumed: Steps) -> Budget {
        Budget {
            window_us: self.shortest_window_ms().saturating_mul(1000),
            reaction_us,
            reserve_us: self.reserve_ms.saturating_mul(1000),
            lanes,
            assumed,
        }
    }

    /// For the state machine. `needed_ms` is what the budget's plan says.
    pub fn policy(&self, needed_ms: u64) -> Policy {
        Policy {
            supplies: self.supplies,
            window_ms: self.window_ms,
            source_windows_ms: self.sources.iter().map(SourceConfig::window_ms).collect(),
            needed_ms,
            margin_ms: self.margin_ms,
            save_after_ms: self.save_after_ms,
            lost_grace_ms: self.lost_grace_ms,
            disarm_after_ms: self.disarm_after_ms,
            resume_after_ms: self.resume_after_ms,
            retry_ms: self.retry_ms,
        }
    }

    /// For the state machine.
    pub fn roles(&self) -> Vec<Role> {
        self.sources.iter().map(SourceConfig::role).collect()
    }

    /// What a source is called.
    pub fn source_name(&self, id: SourceId) -> &str {
        if id == SourceId::TEST {
            return "test";
        }
        self.sources.get(usize::from(id.0)).map_or("unknown", SourceConfig::name)
    }
}

impl SourceConfig {
    pub fn name(&self) -> &str {
        match self {
            Self::Nut(config) => &config.name,
            Self::Logind(config) => &config.name,
            Self::Uevent(config) => &config.name,
            Self::Signal(config) => &config.name,
            Self::Edge(config) => &config.name,
        }
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Nut(_) => "nut",
            Self::Logind(_) => "logind",
            Self::Uevent(_) => "uevent",
            Self::Signal(_) => "signal",
            Self::Edge(_) => "edge",
        }
    }

    pub fn window_ms(&self) -> Option<u64> {
        match self {
            Self::Nut(config) => config.window_ms,
            Self::Logind(config) => Some(config.window_ms.unwrap_or(LOGIND_WINDOW_MS)),
            Self::Uevent(config) => config.window_ms,
            Self::Signal(config) => config.window_ms,
            Self::Edge(config) => config.window_ms,
        }
    }

    pub fn role(&self) -> Role {
        match self {
            Self::Logind(_) => Role::Host,
            Self::Nut(_) | Self::Uevent(_) | Self::Signal(_) | Self::Edge(_) => Role::Supply,
        }
    }

    fn fd(&self) -> Option<i32> {
        match self {
            Self::Edge(config) => config.fd,
            _ => None,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let name = self.name();
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err("its name must have 1 to 64 characters and no control characters");
        }
        match self {
            Self::Nut(config) => config.check(),
            Self::Edge(config) => match (&config.path, config.fd) {
                (Some(_), None) => Ok(()),
                (None, Some(fd)) if fd > 2 => Ok(()),
                (None, Some(_)) => Err("its fd must be one after standard input, output and error"),
                _ => Err("needs either a path or an fd"),
            },
            Self::Logind(_) | Self::Uevent(_) | Self::Signal(_) => Ok(()),
        }
    }
}

impl NutConfig {
    fn check(&self) -> Result<(), &'static str> {
        let word = |text: &str| {
            !text.is_empty()
                && text.len() <= 128
                && !text.contains(|c: char| c.is_control() || c.is_whitespace())
        };
        if self.host.is_empty() {
            return Err("its host is empty");
        }
        if !self.ups.as_deref().is_none_or(|ups| word(ups) && !ups.contains(['"', '\\', '@'])) {
            return Err("its ups is no name of a UPS");
        }
        if !self.user.as_deref().is_none_or(word) {
            return Err("its user is no name");
        }
        if self.user.is_some() != self.password_file.is_some() {
            return Err("user and password_file go together");
        }
        if self.login && self.user.is_none() {
            return Err("a login needs a user");
        }
        if self.poll_ms == 0 || self.poll_on_battery_ms == 0 || self.timeout_ms == 0 {
            return Err("poll_ms, poll_on_battery_ms and timeout_ms must not be 0");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        power: PowerConfig,
    }

    fn parse(text: &str) -> Result<PowerConfig, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        file.power.check().map_err(|error| error.to_string())?;
        Ok(file.power)
    }

    #[test]
    fn all_kinds_of_sources_are_understood() {
        let config = parse(
            r#"
            [power]
            supplies = "all"
            [[power.source]]
            kind = "nut"
            name = "ups-a"
            host = "::1"
            [[power.source]]
            kind = "logind"
            name = "host"
            [[power.source]]
            kind = "uevent"
            name = "mains"
            [[power.source]]
            kind = "signal"
            name = "sigpwr"
            [[power.source]]
            kind = "edge"
            name = "pg"
            fd = 5
            window_ms = 2000
            "#,
        )
        .unwrap();
        assert_eq!(config.supplies, Supplies::All);
        let kinds: Vec<_> = config.sources.iter().map(SourceConfig::kind).collect();
        assert_eq!(kinds, ["nut", "logind", "uevent", "signal", "edge"]);
        let SourceConfig::Nut(nut) = &config.sources[0] else { panic!("{config:?}") };
        assert_eq!((nut.port, nut.poll_ms, nut.poll_on_battery_ms), (3493, 5_000, 1_000));
        assert_eq!(config.shortest_window_ms(), 2_000);
        assert_eq!(config.policy(7).source_windows_ms, [None, Some(5_000), None, None, Some(2_000)]);
        assert_eq!(config.budget(0, 1, Steps::default()).window_us, 2_000_000);
        assert_eq!(config.roles()[1], Role::Host);
        assert_eq!((config.source_name(SourceId(4)), config.source_name(SourceId::TEST)), ("pg", "test"));
    }

    #[test]
    fn mistakes_are_told() {
        let source =
            |lines: &str| parse(&format!("[power]\n[[power.source]]\nname = \"x\"\n{lines}")).unwrap_err();
        assert!(parse("[power]\nwindow = 1").unwrap_err().contains("unknown field `window`"));
        assert!(source("kind = \"nut\"\nups_name = \"a\"").contains("unknown field `ups_name`"));
        assert!(source("kind = \"nut\"\nups = \"a b\"").contains("no name of a UPS"));
        assert!(source("kind = \"nut\"\nups = \"a\\nLOGOUT\"").contains("no name of a UPS"));
        assert!(source("kind = \"nut\"\nuser = \"a\"").contains("go together"));
        assert!(source("kind = \"edge\"").contains("either a path or an fd"));
        assert!(source("kind = \"edge\"\nfd = 3\nwindow_ms = 1000").contains("leaves nothing"));
        assert!(source("kind = \"edge\"\nfd = 2").contains("after standard input"));
        let same = "kind = \"edge\"\nfd = 3\n[[power.source]]\nkind = \"edge\"\nname = \"y\"\nfd = 3";
        assert_eq!(source(same), "power sources \"x\" and \"y\" both want descriptor 3");
        assert!(source("kind = \"apc\"").contains("unknown variant `apc`"));
        let twice = "[power]\n[[power.source]]\nkind = \"uevent\"\nname = \"x\"\n[[power.source]]\nkind = \"signal\"\nname = \"x\"";
        assert_eq!(parse(twice).unwrap_err(), "two power sources are called \"x\"");
        assert!(parse("[power]\nresume_after_ms = 1").unwrap_err().contains("at least disarm_after_ms"));
    }
}
