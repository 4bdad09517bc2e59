// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The part of a command line that all commands have, and what is said when one cannot be read.

use std::env;
use std::io;
use std::process::ExitCode;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, Parser};
use serde::de::DeserializeOwned;

use crate::error::{Error, Exit, Failure};
use crate::program::Program;
use crate::text::{eprint_line, has_colour};
use crate::time::Millis;

/// The options that every command takes.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct CommonArgs {
    /// Print JSON: one object, or one object a line for streams
    #[arg(long, global = true)]
    pub json: bool,
    /// Print sizes as exact bytes
    #[arg(short = 'b', long = "bytes", global = true)]
    pub exact: bool,
    /// Print tables without the line of headers
    #[arg(long, global = true)]
    pub no_headers: bool,
    /// Print only what was asked for and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Give up when the daemon does not answer within this time [default: 10s]; a command that waits for
    /// a job waits no longer than this [default: without limit]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = some_time)]
    pub timeout: Option<Millis>,
}

/// Reads the command line; says what is wrong with it, or shows the help that it asks for, and gives back what to
/// end with.
pub fn parse<C: Parser>(program: &'static Program) -> Result<C, ExitCode> {
    C::try_parse().map_err(|err| explain(program, &err))
}

/// What the command line's parser has to say: help and versions are data, the rest are usage errors.
fn explain(program: &'static Program, err: &clap::Error) -> ExitCode {
    match err.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Whoever closed standard output does not want to read it.
            let _ = err.print();
            return ExitCode::SUCCESS;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = err.print();
        }
        _ => {
            let text = err.render();
            let is_json = env::args_os().any(|arg| arg == "--json");
            if is_json {
                let plain = text.to_string();
                let message = plain.lines().next().unwrap_or_default().trim_start_matches("error: ");
                Error::usage(message).report(program, true);
            } else {
                // The same words, with the code that all errors have.
                let text = if has_colour(&io::stderr()) { text.ansi().to_string() } else { text.to_string() };
                eprint_line(text.replacen("error", "error[E_USAGE]", 1).trim_end());
            }
        }
    }
    Exit::Usage.into()
}

/// Parses one of `words` as serde spells `T`, so that each word exists once, in the protocol.
pub fn one_of<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(words)
        .try_map(|text| serde_json::from_value::<T>(serde_json::Value::String(text)))
}

/// A time that is not zero.
pub fn some_time(text: &str) -> Result<Millis, String> {
    match text.parse::<Millis>() {
        Ok(Millis(0)) => Err("it takes some time to answer".to_owned()),
        Ok(time) => Ok(time),
        Err(err) => Err(err.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use serde::Deserialize;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Shade {
        Dark,
        VeryBright,
    }

    /// Switches lamps.
    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        common: CommonArgs,
        #[arg(long, value_parser = one_of::<Shade>(&["dark", "very-bright"]))]
        shade: Option<Shade>,
    }

    fn parsed(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("lampctl").chain(args.iter().copied()))
    }

    #[test]
    fn help_is_that_of_the_program() {
        let help = Cli::command().render_help().to_string();
        assert!(help.starts_with("Switches lamps\n"), "{help}");
        assert!(help.contains("\nGlobal options:\n      --json "), "{help}");
    }

    #[test]
    fn words_are_spelled_as_on_the_wire() {
        assert_eq!(parsed(&["--shade", "very-bright"]).unwrap().shade, Some(Shade::VeryBright));
        assert_eq!(parsed(&["--shade", "dark"]).unwrap().shade, Some(Shade::Dark));
        for word in ["VeryBright", "bright", ""] {
            assert!(parsed(&["--shade", word]).is_err(), "{word}");
        }
    }

    #[test]
    fn time_to_wait_is_not_zero() {
        let timeout = |text: &str| parsed(&["--timeout", text]).map(|cli| cli.common.timeout);
        assert_eq!(timeout("300ms").unwrap(), Some(Millis(300)));
        assert!(timeout("0").unwrap_err().to_string().contains("it takes some time to answer"));
        assert!(timeout("soon").unwrap_err().to_string().contains("is not a time"));
    }
}
