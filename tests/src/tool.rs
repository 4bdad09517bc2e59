// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every program for a guest begins with: its words, and how it ends.

use std::env;
use std::fmt::Display;
use std::process::ExitCode;

/// Runs `act` with the words of the command line. Its error goes to standard error, with `name` before it.
pub fn main<E: Display>(name: &str, act: impl FnOnce(&[&str]) -> Result<(), E>) -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match act(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
