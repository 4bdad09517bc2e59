// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `vm-host serve` is the daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let path = std::env::args().nth(3).unwrap_or_else(|| "/etc/vm-host.toml".to_owned());
    let run = vm_host::config::Config::read(std::path::Path::new(&path))
        .map_err(Into::into)
        .and_then(|config| vm_host::daemon::run(&config));
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
