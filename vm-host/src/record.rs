// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is durable about each VM: a small JSON file, replaced as a whole.
//!
//! ```json
//! { "crc64": "0123456789abcdef", "record": { "version": 1, … } }
//! ```
//!
//! The checksum is the CRC-64/NVME of the record's text as it stands there: an incarnation in which one bit has flipped would make a good
//! state a void one.
//!
//! The rule that keeps a saved state from being used twice, or with memory that has moved on:
//!
//! 1. A guest's run has a random name, its *incarnation*. It is made durable here before the guest's processors run.
//! 2. A state is saved with the incarnation of the guest that it was taken from.
//! 3. A saved state counts only while the record names the same incarnation.
//!
//! So each time a guest is continued, after a save as well as after a restore, a new incarnation comes first, and with that
//! write the saved state is void. What happens before that write has not touched the guest's memory, and can be
//! done again; what happens after it is the guest's next run.
//!
//! This module writes files and knows nothing of machines.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crc_fast::{CrcAlgorithm, checksum};
use rand::TryRngCore;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::definition::Definition;
use crate::power::budget::Steps;
use crate::vmm::Launch;
use crate::vmm::process::ProcessId;

/// Of the file; a newer one is refused, not guessed at.
const VERSION: u32 = 1;
const EXTENSION: &str = "json";

/// Why a record cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot {doing} {}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is no record of a VM", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("{} has version {found}, this program knows {VERSION}", path.display())]
    NewerVersion { path: PathBuf, found: u32 },
    #[error("{} has changed since it was written", path.display())]
    Changed { path: PathBuf },
    #[error("{} is about {found:?}", path.display())]
    Stranger { path: PathBuf, found: String },
}

/// One run of a guest, from when its processors begin until they stop for good.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation(pub [u8; 16]);

impl Incarnation {
    /// One that never was.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        OsRng.try_fill_bytes(&mut bytes).map_err(io::Error::other)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Incarnation> for String {
    fn from(incarnation: Incarnation) -> Self {
        incarnation.to_string()
    }
}

impl TryFrom<String> for Incarnation {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match u128::from_str_radix(&text, 16) {
            Ok(number) if text.len() == 32 => Ok(Self(number.to_be_bytes())),
            _ => Err(format!("{text:?} is no incarnation")),
        }
    }
}

/// What the operator wants of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    #[default]
    Stopped,
    Running,
    /// Kept as it is, and not continued before it is asked for.
    Saved,
}

/// Where a VM's guest is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Life {
    /// There is none.
    #[default]
    Stopped,
    /// In memory. It runs, or it was saved, or the power went without either: the process and the slot tell.
    Live {
        incarnation: Incarnation,
        launch: Launch,
        /// None for one that came back from secondary storage.
        process: Option<ProcessId>,
    },
    /// In a file on secondary storage, memory and state.
    SwappedOut { incarnation: Incarnation, launch: Launch, image: PathBuf },
}

impl Life {
    pub fn incarnation(&self) -> Option<Incarnation> {
        match self {
            Self::Stopped => None,
            Self::Live { incarnation, .. } | Self::SwappedOut { incarnation, .. } => Some(*incarnation),
        }
    }

    /// What its guest's machine is made from.
    pub fn launch(&self) -> Option<&Launch> {
        match self {
            Self::Stopped => None,
            Self::Live { launch, .. } | Self::SwappedOut { launch, .. } => Some(launch),
        }
    }
}

/// All that is durable about a VM beside its memory and its saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    pub definition: Definition,
    pub wanted: Wanted,
    pub life: Life,
    /// The worst case of each step of its saves so far: what the energy budget reckons with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<Steps>,
}

impl Record {
    pub fn new(definition: Definition) -> Self {
        Self { version: VERSION, definition, wanted: Wanted::Stopped, life: Life::Stopped, worst: None }
    }

    /// What a record in a file of that path says.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let damaged = |source| RecordError::Damaged { path: path.to_owned(), source };
        let head: Head = serde_json::from_slice(bytes).map_err(damaged)?;
        if head.version > VERSION {
            return Err(RecordError::NewerVersion { path: path.to_owned(), found: head.version });
        }
        let record: Self = serde_json::from_slice(bytes).map_err(damaged)?;
        if path.file_stem().is_none_or(|name| *name != *record.definition.name) {
            return Err(RecordError::Stranger { path: path.to_owned(), found: record.definition.name });
        }
        Ok(record)
    }
}

/// A VM's name, and its record or why it cannot be read.
pub type Named = (String, Result<Record, RecordError>);

/// The folder with the records.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Makes the folder if need be.
    pub fn open(dir: &Path) -> Result<Self, RecordError> {
        fs::create_dir_all(dir).map_err(|source| io_error("make", dir, source))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Every record: one damaged file must not keep the other VMs down.
    pub fn all(&self) -> Result<Vec<Named>, RecordError> {
        let list = |source| io_error("list", &self.dir, source);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION)
                && let Some(name) = path.file_stem().and_then(|name| name.to_str())
            {
                found.push((name.to_owned(), read(&path)));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Replaces a record. Durable when it returns; after an error the file is as before or as after.
    pub fn write(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.path(&record.definition.name);
        let new = path.with_extension("new");
        let text = serde_json::to_string_pretty(record)
            .map_err(|source| RecordError::Damaged { path: path.clone(), source })?;
        File::create(&new)
            .and_then(|mut file| file.write_all(seal(&text).as_bytes()).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| self.sync())
            .map_err(|source| io_error("write", &path, source))
    }

    /// Removes a record, durably.
    pub fn remove(&self, name: &str) -> Result<(), RecordError> {
        let path = self.path(name);
        fs::remove_file(&path).and_then(|()| self.sync()).map_err(|source| io_error("remove", &path, source))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.{EXTENSION}"))
    }
}

/// The text of a file with a record.
fn seal(record: &str) -> String {
    format!("{{\"crc64\": \"{}\", \"record\": {record}}}\n", sum(record))
}

fn sum(text: &str) -> String {
    format!("{:016x}", checksum(CrcAlgorithm::Crc64Nvme, text.as_bytes()))
}

fn read(path: &Path) -> Result<Record, RecordError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sealed<'a> {
        crc64: &'a str,
        #[serde(borrow)]
        record: &'a RawValue,
    }
    let bytes = fs::read(path).map_err(|source| io_error("read", path, source))?;
    let sealed: Sealed<'_> = serde_json::from_slice(&bytes)
        .map_err(|source| RecordError::Damaged { path: path.to_owned(), source })?;
    let text = sealed.record.get();
    if sealed.crc64 != sum(text) {
        return Err(RecordError::Changed { path: path.to_owned() });
    }
    Record::decode(text.as_bytes(), path)
}

fn io_error(doing: &'static str, path: &Path, source: io::Error) -> RecordError {
    RecordError::Io { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::Hypervisor;

    fn record(name: &str) -> Record {
        Record::new(Definition::parse(&format!("name = '{name}'\nmemory = '64MiB'")).unwrap())
    }

    fn live() -> Life {
        Life::Live {
            incarnation: Incarnation::random().unwrap(),
            launch: Launch {
                hypervisor: Hypervisor::Qemu,
                program: "/q".into(),
                args: vec!["-S".to_owned()],
                config: None,
                machine: "pc-q35-7.2".to_owned(),
                version: "7.2.22".to_owned(),
            },
            process: Some(ProcessId { pid: 1, began: 2, boot: "b".to_owned() }),
        }
    }

    #[test]
    fn what_was_written_is_read_and_the_last_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let mut one = record("a");
        records.write(&record("b")).unwrap();
        records.write(&one).unwrap();
        one.life = live();
        one.wanted = Wanted::Running;
        records.write(&one).unwrap();
        let all = records.all().unwrap();
        assert_eq!(all.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(*all[0].1.as_ref().unwrap(), one);
        records.remove("a").unwrap();
        assert_eq!(records.all().unwrap().len(), 1);
        assert!(records.remove("a").is_err());
    }

    #[test]
    fn what_cannot_be_read_is_named_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        records.write(&record("good")).unwrap();
        let text = fs::read_to_string(dir.path().join("good.json")).unwrap();
        let typo = serde_json::to_string(&record("typo")).unwrap().replace("wanted", "wished");
        for (name, text) in [
            ("cut", &text[..text.len() / 2]),
            ("empty", ""),
            ("newer", &seal("{\"version\": 99, \"shape\": \"unknown\"}")),
            ("other", &text),
            ("typo", &seal(&typo)),
        ] {
            fs::write(dir.path().join(format!("{name}.json")), text).unwrap();
        }
        // Left over from a write that did not come to its end.
        fs::write(dir.path().join("good.new"), "{").unwrap();
        let all = records.all().unwrap();
        let bad: Vec<&str> =
            all.iter().filter(|(_, read)| read.is_err()).map(|(name, _)| name.as_str()).collect();
        assert_eq!((all.len(), bad), (6, vec!["cut", "empty", "newer", "other", "typo"]));
        assert!(matches!(
            all.iter().find(|one| one.0 == "newer").unwrap().1,
            Err(RecordError::NewerVersion { found: 99, .. })
        ));
    }

    #[test]
    fn no_byte_changes_unseen() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let mut record = record("a");
        record.life = live();
        records.write(&record).unwrap();
        let path = dir.path().join("a.json");
        let text = fs::read(&path).unwrap();
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            let read = records.all().unwrap().remove(0).1;
            assert!(read.as_ref().map_or(true, |read| *read == record), "byte {at}: {read:?}");
        }
    }

    #[test]
    fn an_incarnation_is_written_as_it_is_read() {
        let one = Incarnation::random().unwrap();
        assert_eq!(Incarnation::try_from(one.to_string()), Ok(one));
        assert!(Incarnation::try_from("0123".to_owned()).is_err());
        assert_ne!(one, Incarnation::random().unwrap());
    }
}
