// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The one owner of a medium's regions: each change is decided by the [`Table`], made by the [`Place`], and counts when the
//! [`Registry`] has it.
//!
//! ```text
//! allocate: commit "making" ► bytes: zero, durable ► commit "ready" ► answer
//! free:     commit "dropping" ► bytes away, durable ► commit without it ► answer
//! open:     read ► bytes of "making" and "dropping" away ► commit without them
//! ```
//!
//! The lock is held for commits, not while gigabytes are zeroed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::error::{Error, Result};
use super::place::{Place, Progress};
use super::registry::{Identity, Registry};
use super::store::Store;
use super::table::{Entry, Limits, Phase, Purpose, RegionId, Room, Table};

#[derive(Debug)]
pub(super) struct Regions {
    path: PathBuf,
    registry: Box<dyn Store>,
    place: Box<dyn Place>,
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    registry: Registry,
    table: Table,
    /// Why a write of the registry failed. What is durable is then not known.
    failed: Option<(io::ErrorKind, String)>,
}

impl Regions {
    pub(super) fn open(
        path: &Path,
        registry_store: Box<dyn Store>,
        place: Box<dyn Place>,
        limits: Limits,
        check: impl FnOnce(&Identity) -> Result<()>,
    ) -> Result<Self> {
        let (registry, table) = Registry::open(&*registry_store, path, check)?;
        let mut state = State { registry, table, failed: None };
        let mut rest = state.table.clone();
        for entry in &state.table.entries {
            if entry.phase == Phase::Ready {
                continue;
            }
            tracing::info!(
                medium = %path.display(), region = entry.id.0, owner = entry.owner, purpose = %entry.purpose,
                phase = ?entry.phase, "finishing what an unclean end interrupted"
            );
            place
                .unmake(entry)
                .map_err(|source| Error::io(format!("cannot take away {}", entry.id), source))?;
            rest.dropped(entry.id);
        }
        if rest != state.table {
            state.commit(&*registry_store, path, rest)?;
        }
        Ok(Self { path: path.to_owned(), registry: registry_store, place, limits, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is only ever replaced whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn medium(&self) -> [u8; 16] {
        self.lock().registry.identity().medium
    }

    fn room(&self, state: &State) -> Result<Room> {
        if let Some(span) = state.registry.identity().span() {
            return Ok(Room::Extents(span));
        }
        let free = self.place.free().map_err(|source| {
            Error::io(format!("cannot ask how much of {} is free", self.path.display()), source)
        })?;
        Ok(Room::Files { free: free.unwrap_or(0) })
    }

    /// Bytes without a region, and of them those that the reserve leaves.
    pub(super) fn free_bytes(&self) -> Result<(u64, u64)> {
        let state = self.lock();
        let free = state.table.free(self.room(&state)?);
        Ok((free, free.saturating_sub(self.limits.reserve)))
    }

    pub(super) fn allocate(
        &self,
        owner: &str,
        purpose: Purpose,
        bytes: u64,
        alignment: u64,
        progress: Progress<'_>,
    ) -> Result<Entry> {
        let entry = {
            let mut state = self.lock();
            let room = self.room(&state)?;
            let mut table = state.table.clone();
            let entry = table.begin(owner, purpose, bytes, alignment, room, &self.limits)?;
            state.commit(&*self.registry, &self.path, table)?;
            entry
        };
        if let Err(source) = self.place.make(&entry, progress) {
            // The entry stays where the clean-up fails, too, and is found when the medium is opened.
            match self.place.unmake(&entry) {
                Ok(()) => {
                    self.change(|table| {
                        table.dropped(entry.id);
                        Ok(())
                    })?;
                }
                Err(error) => {
                    tracing::error!(region = entry.id.0, %error, "cannot take away an unfinished region");
                }
            }
            return Err(match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::OutOfMemory => {
                    let (_, available_bytes) = self.free_bytes()?;
                    Error::NoSpace { requested_bytes: entry.bytes, available_bytes }
                }
                _ => Error::io(format!("cannot make {} of {owner}", entry.id), source),
            });
        }
        self.change(|table| table.made(entry.id))?;
        Ok(Entry { phase: Phase::Ready, ..entry })
    }

    pub(super) fn free(&self, id: RegionId) -> Result<()> {
        let entry = self.change(|table| table.release(id))?;
        self.place.unmake(&entry).map_err(|source| Error::io(format!("cannot take away {id}"), source))?;
        self.change(|table| {
            table.dropped(id);
            Ok(())
        })
    }

    /// Changes the registry, durably, unless there is nothing to change.
    fn change<T>(&self, decide: impl FnOnce(&mut Table) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        let mut table = state.table.clone();
        let answer = decide(&mut table)?;
        if table != state.table {
            state.commit(&*self.registry, &self.path, table)?;
        }
        Ok(answer)
    }

    /// Regions that can be used, by ascending id.
    pub(super) fn ready(&self) -> Vec<Entry> {
        self.lock().table.entries.iter().filter(|entry| entry.phase == Phase::Ready).cloned().collect()
    }

    pub(super) fn get(&self, id: RegionId) -> Result<Entry> {
        self.lock()
            .table
            .get(id)
            .filter(|entry| entry.phase == Phase::Ready)
            .cloned()
            .ok_or_else(|| Error::NotFound { what: id.to_string() })
    }

    /// What is wrong with a region, if anything is.
    pub(super) fn fault(&self, entry: &Entry) -> Result<Option<String>> {
        self.place.check(entry).map_err(|source| Error::io(format!("cannot examine {}", entry.id), source))
    }

    /// A region that is whole.
    fn whole(&self, id: RegionId) -> Result<Entry> {
        let entry = self.get(id)?;
        match self.fault(&entry)? {
            None => Ok(entry),
            Some(what) => Err(Error::damaged(
                &self.path,
                format!("{id}, the {} of {}: {what}", entry.purpose, entry.owner),
            )),
        }
    }

    pub(super) fn open_store(&self, id: RegionId) -> Result<(Entry, Box<dyn Store>)> {
        let entry = self.whole(id)?;
        let store =
            self.place.open(&entry).map_err(|source| Error::io(format!("cannot open {id}"), source))?;
        Ok((entry, store))
    }

    pub(super) fn flush(&self, id: RegionId) -> Result<()> {
        let entry = self.get(id)?;
        self.place.flush(&entry).map_err(|source| Error::io(format!("cannot flush {id}"), source))
    }
}

impl State {
    fn commit(&mut self, store: &dyn Store, path: &Path, table: Table) -> Result<()> {
        let what = || format!("cannot write the registry of {}", path.display());
        if let Some((kind, why)) = &self.failed {
            let why = format!("an earlier write failed: {why}");
            return Err(Error::io(what(), io::Error::new(*kind, why)));
        }
        match self.registry.commit(store, &table) {
            Ok(()) => {
                self.table = table;
                Ok(())
            }
            Err(source) => {
                self.failed = Some((source.kind(), source.to_string()));
                Err(Error::io(what(), source))
            }
        }
    }
}
