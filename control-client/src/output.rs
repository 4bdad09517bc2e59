// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How results look: tables and lines for people, JSON for programs. Data goes to standard output; what is
//! only said along the way goes to standard error. Knows no command.

use std::cell::Cell;
use std::io::{self, ErrorKind, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;
use vssd_protocol::units::ByteCount;

use crate::args::CommonArgs;
use crate::error::{Error, Result};
use crate::text::{envelope, eprint_line, printable};

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

fn bare_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_human_or_exact() {
        let sized =
            |exact| Output::new("lamp.v3", &CommonArgs { exact, ..CommonArgs::default() }).size(20 << 30);
        assert_eq!(sized(false), "20 GiB");
        assert_eq!(sized(true), "21474836480");
    }
}
