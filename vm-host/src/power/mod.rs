// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Power: what tells of a failure, and what follows from it.

pub mod budget;
pub mod config;
pub mod observation;
pub mod state;
