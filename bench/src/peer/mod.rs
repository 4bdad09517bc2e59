// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is compared: our daemon, QEMU's storage daemon and raw `fio`, each on a medium of its own kind with equal content.
//!
//! [`server`]: the two daemons as bound processes. [`qsd`]: which storage daemons there are. [`fio`]: the third, which brings its own load. [`media`]: the files.

pub mod fio;
pub mod media;
pub mod qsd;
pub mod server;

use std::fmt;

use serde::Serialize;

pub use media::{Media, Medium, Pages};
pub use server::Server;

/// A backend in one configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Contender {
    /// `vssd-backend`, asleep when there is nothing to do.
    Vssd,
    /// `vssd-backend`, looking for work for a while before it sleeps.
    VssdPolling,
    /// `vssd-backend` built to answer without its map.
    VssdIdentity,
    /// `qemu-storage-daemon`, in the configuration that serves the case best.
    Qsd,
    /// `fio` on the file itself.
    Fio,
}

impl Contender {
    pub fn name(self) -> &'static str {
        match self {
            Self::Vssd => "vssd",
            Self::VssdPolling => "vssd, polling",
            Self::VssdIdentity => "vssd, identity map",
            Self::Qsd => "qsd",
            Self::Fio => "fio",
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
