// SPDX-License-Identifier: Apache-2.0 OR MIT

//! For the fuzz targets: what is understood of what sources of power events say.

pub use super::super::observation::Kind;
use super::edge::Words;
use super::nut;
use super::uevent::Message;

/// The words of a NUT server's line.
pub fn nut_words(line: &str) -> Option<Vec<String>> {
    nut::words(line)
}

/// As a word of such a line.
pub fn nut_quote(text: &str) -> String {
    nut::quote(text)
}

/// What a UPS's status says, and how long its battery lasts.
pub fn nut_values(status: &str) -> (Option<Kind>, Option<u64>) {
    (nut::meaning(status), nut::milliseconds(status))
}

/// Action and subsystem of a message of the kernel.
pub fn uevent(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    Message::parse(bytes).map(|message| (message.action, message.subsystem))
}

/// The last word that a line of power says in these pieces.
pub fn edge(pieces: &[&[u8]]) -> Option<Kind> {
    let mut words = Words::default();
    pieces.iter().filter_map(|piece| words.take(piece).kind).last()
}
