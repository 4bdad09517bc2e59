// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Stands for cloud-hypervisor where that cannot be: a process with its options, its API (`cloud-hypervisor.yaml` 0.3.0, and the source
//! as of v53 where that says more), its events and its snapshots, whose guest is a number in memory.
//!
//! ```text
//!   stdin: listening socket ──► http (a thread a connection) ──► vmm (states, as `vmm/src/lib.rs` has them) ──► guest
//!   stdout: events ◄─────────────────────────────────────────────┘
//! ```
//!
//! It is stricter than the program: a field that its API document does not have is an error here, and ignored there. It does what it is
//! told to do wrong by files in a folder, `--orders DIR`: one with the name of a call spoils the next such call (see [`orders`]).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a program of a test that cannot go on panics")]
#![allow(unreachable_pub, missing_debug_implementations, reason = "one program in several files")]

mod config;
mod guest;
mod http;
mod orders;
mod vmm;

use std::env;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{ExitCode, exit};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use orders::Orders;
use serde_json::{Value, json};
use vmm::Vmm;

/// As the program prints it, and as it answers.
const BUILD: &str = "v53.0";
const VERSION: &str = "53.0.0";

/// What it is started with.
struct Options {
    api: UnixListener,
    events: File,
    orders: Orders,
    no_shutdown: bool,
}

/// Where events go, in the form of `event_monitor/src/lib.rs`: indented JSON, and an empty line.
#[derive(Clone)]
pub struct Monitor {
    to: Arc<Mutex<File>>,
    begun: Instant,
}

impl Monitor {
    pub fn tell(&self, source: &str, event: &str, properties: &Value) {
        let since = self.begun.elapsed();
        let timestamp = json!({ "secs": since.as_secs(), "nanos": since.subsec_nanos() });
        let event =
            json!({ "timestamp": timestamp, "source": source, "event": event, "properties": properties });
        let text = serde_json::to_string_pretty(&event).unwrap();
        let mut to = self.to.lock().unwrap();
        let _ = to.write_all(text.as_bytes()).and_then(|()| to.write_all(b"\n\n"));
    }
}

fn main() -> ExitCode {
    let options = match parse(env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}\n\nFor more information, try '--help'.");
            return ExitCode::from(2);
        }
    };
    let Options { api, events, orders, no_shutdown } = options;
    let monitor = Monitor { to: Arc::new(Mutex::new(events)), begun: Instant::now() };
    monitor.tell("vmm", "starting", &Value::Null);
    let vmm = Arc::new(Mutex::new(Vmm::new(monitor, orders.clone(), no_shutdown)));
    guest::drive(Arc::clone(&vmm));
    for stream in api.incoming() {
        let (vmm, orders) = (Arc::clone(&vmm), orders.clone());
        thread::spawn(move || http::serve(stream.unwrap(), &vmm, &orders));
    }
    exit(1)
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let (mut api, mut events, mut orders, mut no_shutdown) = (None, None, Orders::none(), false);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("a value is required for '{arg}'"));
        match arg.as_str() {
            "--orders" => orders = Orders::new(PathBuf::from(value()?)),
            "--version" => {
                println!("{}", orders.take("--version").unwrap_or(format!("cloud-hypervisor {BUILD}")));
                return Ok(None);
            }
            "--api-socket" => api = Some(fd(&value()?)?),
            "--event-monitor" => events = Some(fd(&value()?)?),
            "--no-shutdown" => no_shutdown = true,
            "-v" | "-vv" | "-vvv" => {}
            "--seccomp" if ["true", "false", "log"].contains(&value()?.as_str()) => {}
            _ => return Err(format!("unexpected argument '{arg}' found")),
        }
    }
    let (Some(api), Some(events)) = (api, events) else {
        return Err("the socket of the API and the descriptor of events are needed here".to_owned());
    };
    if orders.take("start").is_some() {
        return Err("Failed to open hypervisor interface (is hypervisor interface available?)".to_owned());
    }
    // SAFETY: the options name descriptors that were inherited for this, and each is taken once.
    let (api, events) = unsafe { (UnixListener::from_raw_fd(api), File::from_raw_fd(events)) };
    Ok(Some(Options { api, events, orders, no_shutdown }))
}

/// `fd=N`
fn fd(value: &str) -> Result<RawFd, String> {
    let number = value.strip_prefix("fd=").and_then(|number| number.parse().ok());
    number.ok_or(format!("{value} is no descriptor"))
}
