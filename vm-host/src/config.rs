// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The daemon's configuration, `/etc/vm-host.toml`.
//!
//! ```toml
//! state_dir = "/var/lib/vm-host"      # what must outlive the power, beside memory
//! runtime_dir = "/run/vm-host"        # sockets
//! log_dir = "/var/log/vm-host"
//! swap_dir = "/var/lib/vm-host/swap"
//!
//! [[nvram]]
//! name = "nv0"
//! path = "/mnt/pmem0"
//!
//! [vssd]
//! runtime_dir = "/run/vssd"           # of vssd-backend
//!
//! [power]                             # see `vm_host::power::config`
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::nvram::MediumConfig;
use crate::power::{ConfigError as PowerError, PowerConfig};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no configuration", path.display())]
    Syntax { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{} is no absolute path: {key}", path.display())]
    Relative { key: &'static str, path: PathBuf },
    #[error("two NV-RAM media are named {name:?}")]
    Twice { name: String },
    #[error(transparent)]
    Power(#[from] PowerError),
}

/// All of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub state_dir: PathBuf,
    pub runtime_dir: PathBuf,
    pub log_dir: PathBuf,
    /// In `state_dir` if not named.
    pub swap_dir: Option<PathBuf>,
    /// Who may control: the group of the socket.
    pub socket_group: Option<String>,
    pub nvram: Vec<MediumConfig>,
    pub vssd: VssdConfig,
    pub power: PowerConfig,
}

/// Where vssd-backend is.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VssdConfig {
    pub runtime_dir: PathBuf,
}

impl Default for VssdConfig {
    fn default() -> Self {
        Self { runtime_dir: "/run/vssd".into() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/vm-host".into(),
            runtime_dir: "/run/vm-host".into(),
            log_dir: "/var/log/vm-host".into(),
            swap_dir: None,
            socket_group: None,
            nvram: Vec::new(),
            vssd: VssdConfig::default(),
            power: PowerConfig::default(),
        }
    }
}

impl Config {
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let syntax = |source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) };
        let config: Self = toml::from_str(&text).map_err(syntax)?;
        config.check()?;
        Ok(config)
    }

    pub fn swap_dir(&self) -> PathBuf {
        self.swap_dir.clone().unwrap_or_else(|| self.state_dir.join("swap"))
    }

    fn check(&self) -> Result<(), ConfigError> {
        let dirs = [
            ("state_dir", &self.state_dir),
            ("runtime_dir", &self.runtime_dir),
            ("log_dir", &self.log_dir),
            ("vssd.runtime_dir", &self.vssd.runtime_dir),
        ];
        let media = self.nvram.iter().map(|medium| ("nvram.path", &medium.path));
        let swap = self.swap_dir.iter().map(|dir| ("swap_dir", dir));
        for (key, path) in dirs.into_iter().chain(media).chain(swap) {
            if !path.is_absolute() {
                return Err(ConfigError::Relative { key, path: path.clone() });
            }
        }
        for (at, medium) in self.nvram.iter().enumerate() {
            if self.nvram[..at].iter().any(|other| other.name == medium.name) {
                return Err(ConfigError::Twice { name: medium.name.clone() });
            }
        }
        Ok(self.power.check()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm-host.toml");
        fs::write(&path, text).unwrap();
        Config::read(&path)
    }

    #[test]
    fn an_empty_file_is_a_configuration_and_a_bad_one_is_named() {
        let config = read("").unwrap();
        assert_eq!(config.swap_dir(), Path::new("/var/lib/vm-host/swap"));
        assert!(matches!(read("state_dir = 'x'"), Err(ConfigError::Relative { key: "state_dir", .. })));
        assert!(matches!(read("stat_dir = '/x'"), Err(ConfigError::Syntax { .. })));
        let twice = "[[nvram]]\nname = 'a'\npath = '/a'\n[[nvram]]\nname = 'a'\npath = '/b'\n";
        assert!(matches!(read(twice), Err(ConfigError::Twice { .. })));
        assert!(matches!(Config::read(Path::new("/nonexistent")), Err(ConfigError::Read { .. })));
    }
}
