// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Measures the data path of `vssd-backend` against `qemu-storage-daemon` and raw `fio` on the same medium in the same run; and, in [`paper`],
//! repeats the experiments of the paper that vSSDs come from.
//!
//! ```text
//!   cases ──► experiment ──► run ──► peer (daemons, files) ◄── vhost-user ── client
//!                             │       └─ placement: who runs where           │
//!                             ├─ meter: processor time of backend and others ┘
//!                             └──► report: table, JSON, plot
//! ```
//!
//! [`cases`] says what is measured and what must be reached, as data. What this does not know: how a backend works. It is all
//! done over the sockets that any machine monitor and operator use.

pub mod cases;
pub mod client;
pub mod experiment;
pub mod memory;
pub mod meter;
pub mod nv_hypervisor;
pub mod paper;
pub mod peer;
pub mod persistence;
pub mod placement;
pub mod report;
pub mod run;
pub mod sample;
pub mod stats;
