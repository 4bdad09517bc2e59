// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Text that vm-host is told: by a hypervisor, by a guest's agent, by sources of power events, by clients, and by its own files.
//!
//! The first byte names who speaks. Oracles: no panic, and for
//!
//! * QMP: answers and events are those that a plain reading of the lines gives, in their order;
//! * a guest's agent: it has set the clock where it says so after the sync that was asked for, and nowhere else;
//! * a NUT server: words come back as they were; on battery is never taken for online;
//! * the kernel: a message is what its parts say;
//! * a line that tells of power: however it is cut, it says the same;
//! * requests, records, definitions: what was understood is the same when it is written and read again.

#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use vm_host::definition::Definition;
use vm_host::power::sources::fuzzing::{Kind, edge, nut_quote, nut_values, nut_words, uevent};
use vm_host::record::Record;
use vm_host::vm::fuzzing::sets_clock;
use vm_host::vmm::VmmError;
use vm_host::vmm::qemu::qmp::Qmp;
use vm_host::wire;
use vssd_fuzz::setup;

/// Nothing is waited for: all that is said is there from the beginning.
const LIMIT: Duration = Duration::from_secs(5);

fuzz_target!(|data: &[u8]| {
    setup();
    let Some((who, said)) = data.split_first() else { return };
    match who {
        0 => hypervisor(said),
        1 => agent(said),
        2 => ups(said),
        3 => kernel(said),
        4 => line(said),
        5 => client(said),
        6 => record(said),
        7 => definition(said),
        _ => {}
    }
});

/// Somebody who says this and no more.
fn speaker(said: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(said).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    (ours, theirs)
}

// ---- a hypervisor ----

/// The lines up to the first that is no JSON or has no end.
struct Lines<'a>(&'a [u8], Vec<Value>);

impl Lines<'_> {
    fn next(&mut self) -> Option<Value> {
        let end = self.0.iter().position(|byte| *byte == b'\n')?;
        let (line, rest) = self.0.split_at(end + 1);
        self.0 = rest;
        let line = serde_json::from_slice(line);
        if line.is_err() {
            self.0 = &[];
        }
        line.ok()
    }

    /// Events up to the next answer are kept.
    fn answer(&mut self) -> Option<Result<Value, Value>> {
        while let Some(message) = self.next() {
            if let Some(value) = message.get("return") {
                return Some(Ok(value.clone()));
            }
            if let Some(error) = message.get("error") {
                return Some(Err(error["desc"].clone()));
            }
            self.keep(&message);
        }
        None
    }

    fn keep(&mut self, message: &Value) {
        if message.get("event").is_some() {
            let name = message["event"].as_str().unwrap_or_default();
            self.1.push(json!([name, message["data"]]));
        }
    }
}

fn hypervisor(said: &[u8]) {
    let (ours, _theirs) = speaker(said);
    let mut lines = Lines(said, Vec::new());
    let greeting = lines.next();
    let qmp = Qmp::new(ours, LIMIT);
    let expected = greeting.and_then(|greeting| {
        let number = |part| greeting["QMP"]["version"]["qemu"][part].as_u64();
        let version = format!("{}.{}.{}", number("major")?, number("minor")?, number("micro")?);
        lines.answer()?.ok().map(|_| version)
    });
    let mut qmp = match qmp {
        Ok(qmp) => qmp,
        Err(error) => {
            assert!(!matches!(error, VmmError::Silent { .. }), "it was there: {error}");
            assert_eq!(expected, None, "not understood: {error}");
            return;
        }
    };
    assert_eq!(Some(qmp.version()), expected.as_deref());
    for _ in 0..3 {
        match (qmp.call("query-status", json!({}), LIMIT), lines.answer()) {
            (Ok(value), Some(Ok(expected))) => assert_eq!(value, expected),
            (Err(VmmError::Refused { reason, .. }), Some(Err(expected))) => {
                assert!(expected.as_str().is_none_or(|text| text == reason));
            }
            (Err(VmmError::Protocol(_) | VmmError::Connection { .. }), None) => break,
            (found, expected) => panic!("{found:?} instead of {expected:?}"),
        }
    }
    while let Some(message) = lines.next() {
        lines.keep(&message);
    }
    for expected in lines.1 {
        let event = qmp.wait_event("an event", LIMIT, |name, data| Some(json!([name, data])));
        assert_eq!(event.expect("it has come"), expected);
    }
    assert!(qmp.wait_event::<()>("an event", LIMIT, |_, _| None).is_err());
}

// ---- a guest's agent ----

fn agent(said: &[u8]) {
    const ID: i64 = 7;
    let (ours, _theirs) = speaker(said);
    let done = sets_clock(ours, LIMIT, ID);
    let line = |from: usize| {
        let rest = &said[from..];
        rest.iter().position(|byte| *byte == b'\n').map(|end| (&rest[..end], from + end + 1))
    };
    let is_synced =
        |line: &[u8]| serde_json::from_slice::<Value>(line).is_ok_and(|said| said["return"] == ID);
    let mut delimiters = (0..said.len()).filter(|at| said[*at] == 0xff);
    let synced = delimiters.find_map(|at| line(at + 1).filter(|(text, _)| is_synced(text)));
    let expected = synced.and_then(|(_, end)| line(end)).is_some_and(|(text, _)| {
        serde_json::from_slice::<Value>(text).is_ok_and(|said| said.get("return").is_some())
    });
    assert_eq!(done, expected);
}

// ---- sources of power events ----

fn ups(said: &[u8]) {
    let Ok(text) = std::str::from_utf8(said) else { return };
    if let Some(words) = nut_words(text) {
        let line = words.iter().map(|word| nut_quote(word)).collect::<Vec<_>>().join(" ");
        assert_eq!(nut_words(&line).as_ref(), Some(&words));
        assert!(words.iter().map(String::len).sum::<usize>() <= text.len());
    }
    let (kind, runtime) = nut_values(text);
    let has = |token: &str| text.split_ascii_whitespace().any(|word| word == token);
    let online = has("OL") || has("BYPASS");
    match kind {
        Some(Kind::Online) => assert!(online && !has("OB") && !has("FSD")),
        Some(Kind::ForcedShutdown) => assert!(has("FSD")),
        Some(_) => assert!(has("OB") && !has("FSD")),
        None => assert!(!online && !has("OB") && !has("FSD")),
    }
    assert!(
        runtime.is_none_or(
            |ms| ms % 1000 == 0 && text.trim().starts_with(|c: char| c == '+' || c.is_ascii_digit())
        )
    );
}

fn kernel(said: &[u8]) {
    let Some((action, subsystem)) = uevent(said) else { return };
    assert!(!action.is_empty() && !action.contains(&0) && said.starts_with(&[action, b"@/"].concat()));
    let mut strings = said.split(|byte| *byte == 0).skip(1);
    let first = strings.find_map(|string| string.strip_prefix(b"SUBSYSTEM="));
    assert_eq!(first, Some(subsystem));
}

fn line(said: &[u8]) {
    let Some((cut, said)) = said.split_first() else { return };
    let (before, after) = said.split_at(usize::from(*cut) % (said.len() + 1));
    let bytes: Vec<&[u8]> = said.chunks(1).collect();
    let whole = edge(&[said]);
    assert_eq!(edge(&[before, after]), whole);
    assert_eq!(edge(&bytes), whole);
}

// ---- clients ----

fn client(said: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(said) else { return };
    again::<wire::HelloParams>(&value);
    again::<wire::NameParams>(&value);
    again::<wire::SubscribeParams>(&value);
    again::<wire::DefineParams>(&value);
    again::<wire::StopParams>(&value);
    again::<wire::LintParams>(&value);
    again::<wire::ProbeParams>(&value);
    again::<wire::PowerTestParams>(&value);
}

/// What was understood says all that was said.
fn again<T: Serialize + DeserializeOwned>(value: &Value) {
    let Ok(params) = serde_json::from_value::<T>(value.clone()) else { return };
    let written = serde_json::to_value(&params).unwrap();
    for (key, said) in value.as_object().into_iter().flatten() {
        assert!(said.is_null() || written[key] == *said, "{key} was not understood: {written}");
    }
    let params: T = serde_json::from_value(written.clone()).expect("what was written is read");
    assert_eq!(serde_json::to_value(params).unwrap(), written);
}

// ---- its own files ----

fn record(said: &[u8]) {
    let path = Path::new("/vms/db.json");
    let Ok(record) = Record::decode(said, path) else { return };
    assert_eq!(record.definition.name, "db");
    let written = serde_json::to_vec_pretty(&record).unwrap();
    assert_eq!(Record::decode(&written, path).expect("what was written is read"), record);
}

fn definition(said: &[u8]) {
    let Ok(definition) =
        std::str::from_utf8(said).map_err(drop).and_then(|text| Definition::parse(text).map_err(drop))
    else {
        return;
    };
    let path = format!("/vms/{}.json", definition.name);
    let record = Record::new(definition);
    let written = serde_json::to_vec_pretty(&record).unwrap();
    assert_eq!(Record::decode(&written, Path::new(&path)).expect("what was written is read"), record);
}
