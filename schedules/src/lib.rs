// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Runs the hand-offs between threads through every schedule, or through very many. Everything is in `tests/`; `build.rs` brings the
//! sources there, as they are and with one thing broken that a check must notice.
