// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The words that the parts of vSSD exchange, and nothing else.
//!
//! * [`units`]: newtypes for every quantity that crosses a module border.
//! * [`guest`]: the guest channel, private request types on a virtio-blk queue. Its C twin is
//!   `guest-driver/vssd_abi.h`; a test compares the two. Normative text: `protocol.md`.
//! * [`letter`]: how an agent speaks with the host through a driver that does not know the guest channel.
//! * [`control`]: the control channel, JSON-RPC 2.0 with one object per line on a Unix socket.
//!
//! This crate does no I/O and holds no state: it knows neither sockets, nor rings, nor media.

#![forbid(unsafe_code)]

pub mod control;
pub mod guest;
pub mod letter;
pub mod units;
