// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How results look: tables and lines for people, JSON for programs. Data goes to standard output; what is
//! only said along the way goes to standard error. Knows no command.

use std::cell::Cell;
use std::env;
use std::io::{self, ErrorKind, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::{Map, Value};
use vssd_protocol::units::ByteCount;

use crate::args::CommonArgs;
use crate::error::{Error, Result};

/// What stands where there is nothing to say.
pub const NOTHING: &str = "-";

/// How one call of a program prints.
#[derive(Debug)]
pub struct Output {
    schema: &'static str,
    pub json: bool,
    pub exact: bool,
    headers: bool,
    pub quiet: bool,
    /// Nobody reads standard output any more (`… | head -1`): end without a word.
    closed: Cell<bool>,
}

impl Output {
    /// `schema` is the first member of all JSON objects.
    pub fn new(schema: &'static str, args: &CommonArgs) -> Self {
        let &CommonArgs { json, exact, no_headers, quiet, .. } = args;
        Self { schema, json, exact, headers: !no_headers, quiet, closed: Cell::new(false) }
    }

    /// Whether nobody reads what is printed any more.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// A size for people, or in exact bytes where asked for.
    pub fn size(&self, bytes: u64) -> String {
        if self.exact { bytes.to_string() } else { ByteCount(bytes).to_string() }
    }

    /// One line of data.
    pub fn line(&self, text: &str) -> Result<()> {
        self.write(&printable(text))
    }

    /// Something done: only said to people who want to hear it.
    pub fn done(&self, text: &str) -> Result<()> {
        if self.quiet { Ok(()) } else { self.line(text) }
    }

    /// Said along the way, on standard error.
    pub fn note(&self, text: &str) {
        if !self.quiet && !self.json {
            eprint_line(&printable(text));
        }
    }

    /// The one object that `--json` prints: `{"schema":…, …}`.
    pub fn object<const N: usize>(&self, members: [(&str, Value); N]) -> Result<()> {
        self.write(&envelope(self.schema, members))
    }

    /// One JSON value on a line of its own.
    pub fn value(&self, value: &Value) -> Result<()> {
        self.write(&value.to_string())
    }

    /// Text that ends its own lines and needs no cleaning: a script or a snippet made here.
    pub fn text(&self, text: &str) -> Result<()> {
        self.write(text.trim_end_matches('\n'))
    }

    /// Rows of printable cells, below their headers unless those are not wanted.
    pub fn table<const N: usize>(
        &self,
        headers: [&str; N],
        rows: impl IntoIterator<Item = [String; N]>,
    ) -> Result<()> {
        let mut table = bare_table();
        if self.headers {
            table.set_header(headers);
        }
        for row in rows {
            table.add_row(row.map(|cell| printable(&cell)));
        }
        self.render(&mut table)
    }

    /// Two columns: what, and its value. Has no headers.
    pub fn pairs(&self, pairs: impl IntoIterator<Item = (&'static str, String)>) -> Result<()> {
        let mut table = bare_table();
        for (key, value) in pairs {
            table.add_row([key, &printable(&value)]);
        }
        self.render(&mut table)
    }

    fn render(&self, table: &mut Table) -> Result<()> {
        // A table without rows and headers is nothing, not an empty line.
        if table.is_empty() && table.header().is_none() {
            return Ok(());
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        self.write(&table.trim_fmt())
    }

    fn write(&self, text: &str) -> Result<()> {
        if self.closed.get() {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
            Ok(()) => Ok(()),
            Err(err) if err.kind() == ErrorKind::BrokenPipe => {
                self.closed.set(true);
                Ok(())
            }
            Err(source) => Err(Error::Local { what: "standard output".to_owned(), source }),
        }
    }
}

/// The word that the wire has for a value of one of the protocol's enums.
pub fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => NOTHING.to_owned(),
    }
}

/// The object that `--json` prints, schema first.
pub fn envelope<const N: usize>(schema: &str, members: [(&str, Value); N]) -> String {
    #[derive(Serialize)]
    struct Envelope<'a> {
        schema: &'a str,
        #[serde(flatten)]
        members: Map<String, Value>,
    }
    let members = members.map(|(key, value)| (key.to_owned(), value)).into_iter().collect();
    // Serialising a map of values to a string has no way to fail.
    serde_json::to_string(&Envelope { schema, members }).unwrap_or_default()
}

fn bare_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// Prints an error for people: coloured on a terminal.
pub fn print_error(code: &str, message: &str, hint: Option<&str>) {
    let [red, cyan, plain] =
        if has_colour(&io::stderr()) { ["\x1b[1;31m", "\x1b[36m", "\x1b[0m"] } else { [""; 3] };
    eprint_line(&format!("{red}error[{}]{plain}: {}", printable(code), printable(message)));
    if let Some(hint) = hint {
        eprint_line(&format!("{cyan}hint{plain}: {}", printable(hint)));
    }
}

/// Standard error may be gone too; there is nobody left to tell then.
pub fn eprint_line(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Colour is for terminals that can show it, and for people who have not said no (no-color.org).
pub fn has_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal()
        && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Without control characters and marks of writing direction: a guest chooses the name of its driver, and must not command the
/// terminal of the operator who lists it.
pub fn printable(text: &str) -> String {
    let is_harmful =
        |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if is_harmful(c) { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(
            printable("a\x1b[2Jb\r\nc\u{9b}d é\u{202e}"),
            "a\u{fffd}[2Jb\u{fffd}\u{fffd}c\u{fffd}d é\u{fffd}"
        );
    }

    #[test]
    fn sizes_are_human_or_exact() {
        let sized =
            |exact| Output::new("lamp.v3", &CommonArgs { exact, ..CommonArgs::default() }).size(20 << 30);
        assert_eq!(sized(false), "20 GiB");
        assert_eq!(sized(true), "21474836480");
    }

    #[test]
    fn schema_comes_first_whatever_the_members_are_called() {
        assert_eq!(
            envelope("lamp.v3", [("a", Value::from(1)), ("z", Value::Null)]),
            r#"{"schema":"lamp.v3","a":1,"z":null}"#
        );
    }
}
