// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the agent is told: a TOML file, and no file at all for the usual case.
//!
//! ```toml
//! [[disk]]
//! name = "vda"          # or "*", the default: every vSSD without an entry of its own
//! source = "filesystem" # what it is used for
//! mount = "/data"       # where its file system is mounted, if it has several
//! reserve = "5%"        # stays free: a share of the file system, or a size ("2G")
//! pull_below = "3%"     # with less free space the host is asked for blocks back,
//! pull_until = "8%"     # for so many that this much is free
//! cache = "cached"      # device-mapper's name of the cache (source "dm-cache")
//! min_cache = "10%"     # what the cache keeps: a share of the vSSD, or a size
//! stall_s = 60          # what is dirty must become less by a hundredth in so many seconds, or it stays as large as it is
//! pull_misses = "30%"   # the host is asked for blocks back when a full cache misses more of its requests than this,
//! pull_misses_until = "20%" # until it misses less than this
//! hints = "/run/vssd-agent/hints" # holds a directory a disk, in which programs name blocks (source "hint-files")
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use vssd_protocol::units::ByteCount;

use crate::error::{AgentError, Result};

/// Where the file is looked for. It need not be there.
pub(crate) const PATH: &str = "/etc/vssd-agent.toml";
const ANY: &str = "*";

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    #[serde(default, rename = "disk")]
    disks: Vec<DiskConfig>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiskConfig {
    #[serde(default = "any")]
    name: String,
    #[serde(default)]
    pub(crate) source: Kind,
    pub(crate) mount: Option<PathBuf>,
    #[serde(default = "reserve")]
    pub(crate) reserve: Share,
    #[serde(default = "pull_below")]
    pub(crate) pull_below: Share,
    #[serde(default = "pull_until")]
    pub(crate) pull_until: Share,
    pub(crate) cache: Option<String>,
    #[serde(default = "min_cache")]
    pub(crate) min_cache: Share,
    #[serde(default = "stall_s")]
    pub(crate) stall_s: u64,
    #[serde(default = "pull_misses")]
    pub(crate) pull_misses: Percent,
    #[serde(default = "pull_misses_until")]
    pub(crate) pull_misses_until: Percent,
    #[serde(default = "hints")]
    pub(crate) hints: PathBuf,
}

fn min_cache() -> Share {
    Share::Percent(10)
}

fn stall_s() -> u64 {
    60
}

fn pull_misses() -> Percent {
    Percent(30)
}

fn pull_misses_until() -> Percent {
    Percent(20)
}

fn hints() -> PathBuf {
    vssd_client::HINTS.into()
}

fn reserve() -> Share {
    Share::Percent(5)
}

fn pull_below() -> Share {
    Share::Percent(3)
}

fn pull_until() -> Share {
    Share::Percent(8)
}

fn any() -> String {
    ANY.to_owned()
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            name: any(),
            source: Kind::default(),
            mount: None,
            reserve: reserve(),
            pull_below: pull_below(),
            pull_until: pull_until(),
            cache: None,
            min_cache: min_cache(),
            stall_s: stall_s(),
            pull_misses: pull_misses(),
            pull_misses_until: pull_misses_until(),
            hints: hints(),
        }
    }
}

/// What a disk is used for, and so where blocks come from that it can do without.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    #[default]
    Filesystem,
    HintFiles,
    DmCache,
}

/// A part of a file system.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
pub(crate) enum Share {
    Percent(u8),
    Bytes(u64),
}

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        if text.ends_with('%') {
            return Percent::try_from(text).map(|percent| Self::Percent(percent.0));
        }
        text.parse::<ByteCount>().map(|bytes| Self::Bytes(bytes.0)).map_err(|error| error.to_string())
    }
}

/// A part of whatever it is of.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
pub(crate) struct Percent(pub(crate) u8);

impl TryFrom<String> for Percent {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let percent = text.strip_suffix('%').and_then(|percent| percent.trim().parse().ok());
        percent
            .filter(|percent| *percent <= 100)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not from 0% to 100%"))
    }
}

impl Share {
    /// Of a file system of `size` bytes.
    pub(crate) fn bytes(self, size: u64) -> u64 {
        match self {
            Self::Percent(percent) => size / 100 * u64::from(percent),
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl Config {
    /// Reads the file; one that nobody named may be missing.
    pub(crate) fn load(named: Option<&Path>) -> Result<Self> {
        let path = named.unwrap_or(Path::new(PATH));
        let wrong = |what: String| AgentError::Config { path: path.to_owned(), what };
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).map_err(wrong),
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(error) => Err(wrong(error.to_string())),
        }
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        for (i, disk) in config.disks.iter().enumerate() {
            if config.disks[..i].iter().any(|other| other.name == disk.name) {
                return Err(format!("disk {:?} has two entries", disk.name));
            }
            if disk.source == Kind::DmCache && disk.cache.is_none() {
                return Err(format!(
                    "the source \"dm-cache\" of disk {:?} needs the name of its cache: cache = …",
                    disk.name
                ));
            }
            if disk.hints.is_relative() {
                return Err(format!("hints {:?} of disk {:?} is no absolute path", disk.hints, disk.name));
            }
        }
        Ok(config)
    }

    pub(crate) fn of(&self, disk: &str) -> DiskConfig {
        let named = |name: &str| self.disks.iter().find(|entry| entry.name == name).cloned();
        named(disk).or_else(|| named(ANY)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_particular_entry_counts() {
        let text =
            "[[disk]]\nreserve = \"1G\"\n[[disk]]\nname = \"vda\"\nmount = \"/data\"\nreserve = \"10%\"\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.of("vda").reserve.bytes(1000), 100);
        assert_eq!(config.of("vda").mount, Some("/data".into()));
        assert_eq!(config.of("vdb").reserve, Share::Bytes(1 << 30));
        assert_eq!(Config::default().of("vdb").reserve, Share::Percent(5));
    }

    #[test]
    fn the_file_that_comes_with_it_says_what_is_the_case_without_it() {
        let config = Config::parse(include_str!("../vssd-agent.toml")).unwrap();
        let (told, untold) = (config.of("vda"), DiskConfig::default());
        assert_eq!(told, untold);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (text, word) in [
            ("[[disk]]\nreserv = \"5%\"", "reserv"),
            ("[[disk]]\nreserve = \"101%\"", "101%"),
            ("[[disk]]\nreserve = \"much\"", "much"),
            ("[[disk]]\nreserve = 5", "reserve"),
            ("[[disk]]\n[[disk]]\n", "two entries"),
            ("[disk]", "disk"),
            ("[[disk]]\nhints = \"run/hints\"", "run/hints"),
            ("[[disk]]\nsource = \"hints\"", "hint-files"),
            ("[[disk]]\nsource = \"dm-cache\"", "cache ="),
            ("[[disk]]\npull_misses = \"10M\"", "10M"),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
