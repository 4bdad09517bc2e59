// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The daemon's entry: command line in, exit code out. See [`vssd_backend`].

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use tracing_subscriber::EnvFilter;
use vssd_backend::config::{Cli, Command, Config, ConfigError, LogFormat};
use vssd_backend::{daemon, pool_command};

/// Exit code for a command line or configuration that cannot be used; clap's own.
const USAGE: u8 = 2;

/// What QEMU's back-end conventions want to know (docs/interop/vhost-user.json); the list of features is closed.
const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}
"#;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Pool(command)) => pool_command::run(command),
        // Before anything else is looked at: the convention says that other options do not matter then.
        None if cli.serve.print_capabilities => {
            io::stdout().write_all(CAPABILITIES.as_bytes()).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        None => {
            let check_only = cli.serve.check_config;
            match cli.serve.resolve() {
                Ok(_) if check_only => {
                    println!("the configuration is valid");
                    Ok(ExitCode::SUCCESS)
                }
                Ok(config) => serve(&config),
                Err(error) => return usage(error),
            }
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn usage(error: ConfigError) -> ExitCode {
    eprintln!("error: {:#}", anyhow::Error::from(error));
    ExitCode::from(USAGE)
}

fn serve(config: &Config) -> Result<ExitCode> {
    let filter = EnvFilter::try_new(&config.log_level)
        .with_context(|| format!("log level {:?} is not valid", config.log_level))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match config.log_format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).with_target(false).init(),
    }
    daemon::run(config)?;
    Ok(ExitCode::SUCCESS)
}
