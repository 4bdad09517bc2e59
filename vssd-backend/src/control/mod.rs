// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Control of the vSSDs' sizes, and the sockets over which operators do it.

pub mod negotiation;
