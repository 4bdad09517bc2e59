// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Words, lines and colours that all output is made of. Knows no option and no command.

use std::env;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use serde_json::{Map, Value};

/// What stands where there is nothing to say.
pub const NOTHING: &str = "-";

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
    fn schema_comes_first_whatever_the_members_are_called() {
        assert_eq!(
            envelope("lamp.v3", [("a", Value::from(1)), ("z", Value::Null)]),
            r#"{"schema":"lamp.v3","a":1,"z":null}"#
        );
    }
}
