// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Calls that take as long as they take: the answer is awaited on one connection, and how far the work is shown from another.

use std::io::{self, IsTerminal};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use control_client::{
    Answer, Client, Error, Millis, Output, Result, Session, eprint_line, has_colour, printable,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vm_host::vm::{Status, Work};
use vm_host::wire::{NameParams, method};

/// What ends sooner needs no bar.
const SOON: Duration = Duration::from_secs(1);
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);

/// Gives an order to the VM of this name and says what became of it: `db runs after 1.2 s`.
pub(super) fn run(session: &Session, method: &str, name: &str, done: &str) -> Result<()> {
    let begun = Instant::now();
    let answer: Answer<Status> = call(session, method, &NameParams { name: name.to_owned() }, name)?;
    tell(session, answer, done, begun)
}

pub(super) fn tell(session: &Session, answer: Answer<Status>, done: &str, begun: Instant) -> Result<()> {
    let out = &session.out;
    if out.json {
        return out.object([("vm", answer.raw)]);
    }
    let took = Millis(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
    out.done(&format!("{} {done} after {took}", answer.typed.name))
}

/// Calls a method that works on the VM of this name, for as long as it takes unless `--timeout` says otherwise.
pub(super) fn call<T: DeserializeOwned + Send>(
    session: &Session,
    method: &str,
    params: &(impl Serialize + Sync),
    name: &str,
) -> Result<Answer<T>> {
    let mut client = session.connect()?;
    let patience = if session.give_up_at().is_some() { Duration::ZERO } else { Duration::MAX };
    let (sender, receiver) = channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            // Whoever waits for it is below.
            let _ = sender.send(client.call_for(method, params, patience));
        });
        let mut wait = SOON;
        let mut watch = None;
        loop {
            match receiver.recv_timeout(wait) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Protocol(format!("no answer to {method}")));
                }
                Err(RecvTimeoutError::Timeout) => {
                    watch.get_or_insert_with(|| Watch::new(session)).look(name);
                    wait = BETWEEN_LOOKS;
                }
            }
        }
    })
}

/// A look now and then at how far the work is. That it cannot be seen is no failure of the work.
struct Watch<'a> {
    out: &'a Output,
    client: Option<Client>,
    bar: Option<ProgressBar>,
    last: String,
}

impl<'a> Watch<'a> {
    fn new(session: &'a Session) -> Self {
        let out = &session.out;
        let client = if out.quiet || out.json { None } else { session.connect().ok() };
        Self { out, client, bar: None, last: String::new() }
    }

    fn look(&mut self, name: &str) {
        let Some(client) = &mut self.client else { return };
        let answer: Result<Answer<Status>> =
            client.call(method::VM_SHOW, &NameParams { name: name.to_owned() });
        match answer {
            Ok(answer) => {
                if let Some(work) = answer.typed.work {
                    self.show(name, &work);
                }
            }
            Err(_) => self.client = None,
        }
    }

    fn show(&mut self, name: &str, work: &Work) {
        let is_new = self.last != work.doing;
        self.last.clone_from(&work.doing);
        if !io::stderr().is_terminal() {
            if is_new {
                eprint_line(&printable(&format!("{name}: {}, {}", work.doing, numbers(self.out, work))));
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(new_bar);
        if is_new {
            bar.reset_elapsed();
        }
        bar.set_length(work.total_bytes);
        bar.set_position(work.done_bytes);
        bar.set_prefix(printable(&work.doing));
        bar.set_message(printable(&numbers(self.out, work)));
    }
}

impl Drop for Watch<'_> {
    /// The result takes the place of the bar.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn numbers(out: &Output, work: &Work) -> String {
    format!("{} of {}", out.size(work.done_bytes), out.size(work.total_bytes))
}

fn new_bar() -> ProgressBar {
    let template = if has_colour(&io::stderr()) {
        "  {prefix:.cyan} [{bar:24.cyan}] {elapsed}  {wide_msg}"
    } else {
        "  {prefix} [{bar:24}] {elapsed}  {wide_msg}"
    };
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    let bar = ProgressBar::new(0);
    bar.set_style(style);
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}
