// SPDX-License-Identifier: Apache-2.0 OR MIT

//! cloud-hypervisor behind `Vmm`: each call and what can go wrong with it (`machine`), and the whole daemon (`host`), both against a
//! stand-in that is a process of its own; the program itself (`real`), where there is one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(missing_debug_implementations, reason = "one program in several files")]

mod faults;
mod host;
mod machine;
mod program;
mod real;
