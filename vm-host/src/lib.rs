// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Persistent virtual machines: their memory lies in NV-RAM, and when the power fails only the state of their processors and
//! devices has to be saved.
//!
//! ```text
//!   power::sources ──► power::state (pure) ──┐
//!                                            ▼
//!   control socket ──► host (one owner) ──► vm (one thread a VM) ──► vmm::{qemu, cloud_hypervisor}
//!                                            │
//!                                            ├──► nvram   regions of memory, and a slot for the saved state beside each
//!                                            └──► record  what is durable about a VM
//! ```
//!
//! One rule keeps a saved state from being used twice, or with memory that it does not belong to: **each time a guest
//! is about to run, a new incarnation is made durable first, and a saved state counts only for the incarnation that it was
//! saved from.**

pub mod config;
pub mod daemon;
pub mod definition;
pub mod fault;
pub mod guard;
pub mod host;
pub mod lint;
pub mod news;
pub mod nvram;
pub mod power;
pub mod record;
pub mod service;
mod unix;
pub mod vm;
pub mod vmm;
pub mod wire;
