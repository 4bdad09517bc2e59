// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A UPS that a server of Network UPS Tools knows (RFC 9271, TCP port 3493).
//!
//! ```text
//!   connect ► (USERNAME, PASSWORD) ► (LIST UPS) ► (LOGIN) ► GET VAR ups.status ► on battery: GET VAR battery.runtime ┐
//!      ▲                                                        ▲                                                    │
//!      └── back-off ◄─ any error but ERR                        └── poll_ms, or poll_on_battery_ms ◄─────────────────┘
//! ```
//!
//! | `ups.status` has | means |
//! |---|---|
//! | FSD | forced shutdown |
//! | OB and LB | low battery |
//! | OB | on battery; with CAL (the UPS tests its battery) LB is to be expected and means nothing |
//! | OL or BYPASS | online |
//! | none of these (OFF, WAIT) | lost: the server cannot say what is the case |
//!
//! The server and all that it says are not trusted to be well: each answer has a deadline, each line a greatest length, each list a
//! greatest number of lines. `ERR DATA-STALE` and `ERR DRIVER-NOT-CONNECTED` mean that the *server* no longer hears the UPS: the
//! connection stays, the UPS is lost.
//!
//! There is no encryption: a server on another machine needs a network that is trusted.

mod wire;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::PollFlags;
use thiserror::Error;

use self::wire::{Limit, Resolver, Wire};
use super::{Backoff, Reporter, Stop, Woken};
use crate::power::config::NutConfig;
use crate::power::observation::Kind;

const RETRY: Duration = Duration::from_millis(250);
const RETRY_LIMIT: Duration = Duration::from_secs(10);
/// While what is known last is that the UPS is on battery.
const RETRY_LIMIT_ON_BATTERY: Duration = Duration::from_secs(1);
/// A server has fewer UPSes.
const MOST_LINES: usize = 256;

/// Why a UPS cannot be heard.
#[derive(Debug, Error)]
pub(super) enum NutError {
    #[error("stopped")]
    Stopped,
    #[error("the server did not answer in time")]
    TimedOut,
    #[error("the server closed the connection")]
    Closed,
    #[error("the host has no address")]
    NoAddress,
    #[error("the server sent a line of more than {max} bytes")]
    TooLong { max: usize },
    #[error("the server answered \"{line}\"")]
    NoProtocol { line: String },
    #[error("the server said \"{line}\" without being asked")]
    Unasked { line: String },
    /// What the server itself calls an error; it can be asked again.
    #[error("the server says {code}")]
    Refused { code: String },
    #[error("a name for the UPS is needed, the server has {found}: {names}")]
    Unclear { found: usize, names: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for NutError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Says how the UPS does, until told to stop.
pub fn run(reporter: &Reporter, config: &NutConfig) {
    let mut client =
        Client { config, stop: reporter.stop(), resolver: Resolver::default(), on_battery: false };
    let mut backoff = Backoff::new(RETRY);
    loop {
        match client.serve(reporter, &mut backoff) {
            Err(NutError::Stopped) => return,
            Err(error) => reporter.lost(format!("{}: {error}", config.address())),
            Ok(never) => match never {},
        }
        let limit = if client.on_battery { RETRY_LIMIT_ON_BATTERY } else { RETRY_LIMIT };
        if !matches!(reporter.stop().wait(&[], Some(backoff.step(limit))), Ok(Woken::TimedOut)) {
            return;
        }
    }
}

impl NutConfig {
    /// For people.
    fn address(&self) -> String {
        let host = &self.host;
        if host.contains(':') && !host.starts_with('[') {
            format!("[{host}]:{}", self.port)
        } else {
            format!("{host}:{}", self.port)
        }
    }
}

enum Never {}

struct Client<'a> {
    config: &'a NutConfig,
    stop: &'a Stop,
    resolver: Resolver,
    /// What the UPS said last.
    on_battery: bool,
}

impl Client<'_> {
    fn limit(&self) -> Limit<'_> {
        Limit::new(self.stop, Duration::from_millis(self.config.timeout_ms))
    }

    /// Connects and polls, until something is wrong with the connection.
    fn serve(&mut self, reporter: &Reporter, backoff: &mut Backoff) -> Result<Never, NutError> {
        let limit = Limit::new(self.stop, Duration::from_millis(self.config.timeout_ms));
        let addresses = self.resolver.resolve(&self.config.host, self.config.port, &limit)?;
        let mut wire = Wire::connect(&addresses, &limit)?;
        let ups = self.greet(&mut wire)?;
        reporter.detail(format!("{ups}@{}", self.config.address()));
        loop {
            match self.poll(&mut wire, &ups) {
                Ok(kind) => {
                    backoff.reset();
                    self.on_battery = kind != Kind::Online;
                    reporter.say(kind);
                }
                Err(NutError::Refused { code }) => {
                    reporter.lost(format!("{ups}@{}: the server says {code}", self.config.address()));
                }
                Err(error) => return Err(error),
            }
            let pause = if self.on_battery { self.config.poll_on_battery_ms } else { self.config.poll_ms };
            let pause = Some(Duration::from_millis(pause));
            match self.stop.wait(&[(wire.socket().as_fd(), PollFlags::IN)], pause)? {
                Woken::Stopped => {
                    let _ = wire.send("LOGOUT", &Limit::new(&Stop::new()?, Duration::ZERO));
                    return Err(NutError::Stopped);
                }
                Woken::TimedOut => {}
                // It was not asked: it has gone, or does not keep to the protocol.
                Woken::Ready(_) => {
                    let line = wire.receive(&self.limit())?;
                    return Err(NutError::Unasked { line: shorten(&line) });
                }
            }
        }
    }

    /// Says who we are, if anybody wants to know, and finds out which UPS is meant.
    fn greet(&self, wire: &mut Wire) -> Result<String, NutError> {
        if let (Some(user), Some(file)) = (&self.config.user, &self.config.password_file) {
            let password = password(file)?;
            self.expect_ok(wire, &format!("USERNAME {}", quote(user)))?;
            self.expect_ok(wire, &format!("PASSWORD {}", quote(&password)))?;
        }
        let ups = match &self.config.ups {
            Some(ups) => ups.clone(),
            None => self.only_ups(wire)?,
        };
        if self.config.login {
            self.expect_ok(wire, &format!("LOGIN {ups}"))?;
        }
        Ok(ups)
    }

    fn expect_ok(&self, wire: &mut Wire, command: &str) -> Result<(), NutError> {
        let answer = self.ask(wire, command)?;
        // Servers add something to it, such as "OK Goodbye".
        if answer == "OK" || answer.starts_with("OK ") {
            Ok(())
        } else {
            Err(NutError::NoProtocol { line: shorten(&answer) })
        }
    }

    /// Sends a command and returns the first line of its answer.
    fn ask(&self, wire: &mut Wire, command: &str) -> Result<String, NutError> {
        let limit = self.limit();
        wire.send(command, &limit)?;
        let answer = wire.receive(&limit)?;
        match answer.strip_prefix("ERR ") {
            Some(code) => Err(NutError::Refused { code: shorten(code) }),
            None => Ok(answer),
        }
    }

    /// The UPS of a server that has one.
    fn only_ups(&self, wire: &mut Wire) -> Result<String, NutError> {
        let first = self.ask(wire, "LIST UPS")?;
        if first != "BEGIN LIST UPS" {
            return Err(NutError::NoProtocol { line: shorten(&first) });
        }
        let limit = self.limit();
        let mut names = Vec::new();
        for _ in 0..MOST_LINES {
            let line = wire.receive(&limit)?;
            if line == "END LIST UPS" {
                return match names.as_slice() {
                    [name] => Ok(String::clone(name)),
                    _ => Err(NutError::Unclear { found: names.len(), names: shorten(&names.join(", ")) }),
                };
            }
            let name = match words(&line).as_deref() {
                Some([kind, name, ..]) if kind == "UPS" => name.clone(),
                _ => return Err(NutError::NoProtocol { line: shorten(&line) }),
            };
            // It becomes part of commands.
            if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"') {
                return Err(NutError::NoProtocol { line: shorten(&line) });
            }
            names.push(name);
        }
        Err(NutError::NoProtocol { line: format!("a list of more than {MOST_LINES} lines") })
    }

    fn variable(&self, wire: &mut Wire, ups: &str, variable: &str) -> Result<String, NutError> {
        let answer = self.ask(wire, &format!("GET VAR {ups} {variable}"))?;
        match words(&answer).as_deref() {
            Some([kind, of, name, value]) if kind == "VAR" && of == ups && name == variable => {
                Ok(value.clone())
            }
            _ => Err(NutError::NoProtocol { line: shorten(&answer) }),
        }
    }

    fn poll(&self, wire: &mut Wire, ups: &str) -> Result<Kind, NutError> {
        let status = self.variable(wire, ups, "ups.status")?;
        let Some(kind) = meaning(&status) else {
            return Err(NutError::Refused { code: format!("ups.status \"{}\"", shorten(&status)) });
        };
        if !matches!(kind, Kind::OnBattery { .. }) {
            return Ok(kind);
        }
        match self.variable(wire, ups, "battery.runtime") {
            Ok(runtime) => Ok(Kind::OnBattery { runtime_left_ms: milliseconds(&runtime) }),
            // Not every UPS knows.
            Err(NutError::Refused { .. }) => Ok(kind),
            Err(error) => Err(error),
        }
    }
}

/// What a status says; `None` where it says nothing about power.
pub(super) fn meaning(status: &str) -> Option<Kind> {
    let has = |token: &str| status.split_ascii_whitespace().any(|word| word == token);
    if has("FSD") {
        Some(Kind::ForcedShutdown)
    } else if has("OB") {
        let low = has("LB") && !has("CAL");
        Some(if low { Kind::LowBattery } else { Kind::OnBattery { runtime_left_ms: None } })
    } else if has("OL") || has("BYPASS") {
        Some(Kind::Online)
    } else {
        None
    }
}

/// Seconds, with or without a fraction, which does not matter here.
pub(super) fn milliseconds(runtime: &str) -> Option<u64> {
    let seconds = runtime.trim().split('.').next()?;
    seconds.parse::<u64>().ok()?.checked_mul(1000)
}

/// The words of a line: separated by blanks, or in quotes, within which a backslash takes the next character as it is. `None`
/// where a quote does not end.
pub(super) fn words(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut characters = line.chars().peekable();
    loop {
        while characters.next_if(char::is_ascii_whitespace).is_some() {}
        let Some(first) = characters.next() else { return Some(words) };
        let mut word = String::new();
        if first == '"' {
            loop {
                match characters.next()? {
                    '"' => break,
                    '\\' => word.push(characters.next()?),
                    other => word.push(other),
                }
            }
        } else {
            word.push(first);
            while let Some(next) = characters.next_if(|c| !c.is_ascii_whitespace()) {
                word.push(next);
            }
        }
        words.push(word);
    }
}

pub(super) fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn password(path: &Path) -> Result<String, NutError> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let text = fs::read_to_string(path).map_err(named)?;
    let line = text.lines().next().unwrap_or_default();
    if line.chars().any(char::is_control) {
        return Err(named(io::ErrorKind::InvalidData.into()).into());
    }
    Ok(line.to_owned())
}

/// For messages: what a server sends may be long and anything.
fn shorten(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests;
