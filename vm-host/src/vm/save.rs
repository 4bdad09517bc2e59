// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What of a persistent VM lies in NV-RAM: its memory, and the slot with its saved state.

use std::io;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vssd_protocol::control::ErrorCode;
use vssd_protocol::units::ByteCount;

use super::status::LastSave;
use crate::definition::Definition;
use crate::fault::Fault;
use crate::nvram::{Backing, Nvram, Purpose, Region, RegionId, SavedHeader, SavedState, Slot, SlotContent};
use crate::power::budget::Steps;
use crate::record::Incarnation;
use crate::vmm::{Launch, Machine, Memory};

/// For the state of processors and devices: 300 KiB as a rule, and more with many processors, video memory or firmware.
const STATE_BYTES: u64 = 16 << 20;

/// The regions of a VM.
#[derive(Debug)]
pub(super) struct Kept {
    nvram: Arc<Nvram>,
    memory: Region,
    slot: Slot,
}

/// What the slot says about a guest.
#[derive(Debug)]
pub(super) enum Found {
    /// The guest can go on from here.
    State(Box<SavedState>),
    /// It was not saved; why, for people.
    Nothing(String),
    /// There is a state, and it must not be used.
    Unusable(Fault),
}

/// What a state was saved from; it fits nothing else.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    pub(super) name: String,
    pub(super) machine: String,
    pub(super) version: String,
    pub(super) memory_bytes: u64,
    pub(super) memory_region: RegionId,
}

impl Kept {
    /// The regions that a VM has.
    pub(super) fn find(nvram: &Arc<Nvram>, owner: &str) -> Result<Option<Self>, Fault> {
        let (Some(memory), Some(state)) =
            (nvram.find(owner, Purpose::Memory), nvram.find(owner, Purpose::State))
        else {
            return Ok(None);
        };
        if let Some(what) = nvram.fault(memory.id)? {
            return Err(Fault::new(
                ErrorCode::State,
                format!("the memory of {owner} is not as it was left: {what}"),
            )
            .hint("nothing was changed; `vm-host discard` gives it up"));
        }
        Ok(Some(Self { nvram: Arc::clone(nvram), memory, slot: nvram.slot(state.id)? }))
    }

    /// Makes what is missing: all of it or nothing. Memory of another size than the definition's is made anew.
    pub(super) fn make(
        nvram: &Arc<Nvram>,
        definition: &Definition,
        mut progress: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> Result<Self, Fault> {
        let owner = &definition.name;
        if let Some(memory) = nvram.find(owner, Purpose::Memory)
            && memory.bytes != definition.memory.0
        {
            nvram.free(memory.id)?;
        }
        let mut made = Vec::new();
        for (purpose, bytes) in [(Purpose::State, STATE_BYTES), (Purpose::Memory, definition.memory.0)] {
            if nvram.find(owner, purpose).is_some() {
                continue;
            }
            match nvram.allocate(owner, purpose, bytes, &mut progress) {
                Ok(region) => made.push(region.id),
                Err(error) => {
                    // Others may need it.
                    made.into_iter().try_for_each(|id| nvram.free(id))?;
                    return Err(error.into());
                }
            }
        }
        Self::find(nvram, owner)?
            .ok_or_else(|| Fault::new(ErrorCode::Internal, format!("the regions of {owner} have gone")))
    }

    /// Gives a VM's regions back, whichever there are.
    pub(super) fn free(nvram: &Nvram, owner: &str) -> Result<(), Fault> {
        for purpose in [Purpose::Memory, Purpose::State] {
            if let Some(region) = nvram.find(owner, purpose) {
                nvram.free(region.id)?;
            }
        }
        Ok(())
    }

    pub(super) fn memory_region(&self) -> &Region {
        &self.memory
    }

    /// For the hypervisor.
    pub(super) fn memory(&self) -> Memory {
        let Backing { mem_path, offset_bytes, size_bytes, align_bytes, pmem, .. } = self.memory.backing();
        Memory::Named {
            path: mem_path,
            offset: offset_bytes,
            bytes: size_bytes,
            align: Some(align_bytes),
            pmem,
        }
    }

    /// Saves a guest, durably. `sync` makes durable what its disks have acknowledged.
    ///
    /// The order is the point: the state is taken from a guest that stands still, its memory and its disks are made durable as they
    /// are then, and only when that is done there is a state that says so.
    pub(super) fn save(
        &self,
        machine: &mut dyn Machine,
        incarnation: Incarnation,
        launch: &Launch,
        owner: &str,
        sync: impl FnOnce() -> Result<(), Fault>,
    ) -> Result<LastSave, Fault> {
        let mut lap = Lap::new();
        machine.pause()?;
        let stop_us = lap.us();
        let state = machine.save()?;
        let save_us = lap.us();
        self.nvram.flush(self.memory.id)?;
        sync()?;
        let flush_us = lap.us();
        let unix_ms = unix_ms();
        let metadata = encode(&self.origin(launch, owner))?;
        let generation = u64::try_from(unix_ms).unwrap_or(0);
        let header =
            SavedHeader { incarnation: incarnation.0, generation, saved_at_unix_ms: unix_ms, metadata };
        self.slot.commit(&header, &state)?;
        let commit_us = lap.us();
        let state_bytes = u64::try_from(state.len()).unwrap_or(u64::MAX);
        Ok(LastSave { unix_ms, state_bytes, steps: Steps { stop_us, save_us, commit_us, flush_us } })
    }

    /// Takes a state that comes from elsewhere, with the memory that has been put into the region, durably.
    pub(super) fn install(&self, mut saved: SavedState, launch: &Launch, owner: &str) -> Result<(), Fault> {
        let here = self.origin(launch, owner);
        let from: Option<Origin> = serde_json::from_slice(&saved.header.metadata).ok();
        let moved = from.map(|from| Origin { memory_region: here.memory_region, ..from });
        if moved.as_ref() != Some(&here) {
            return Err(misfit(moved.as_ref(), &here));
        }
        saved.header.metadata = encode(&here)?;
        self.nvram.flush(self.memory.id)?;
        Ok(self.slot.commit(&saved.header, &saved.payload)?)
    }

    /// Whether there is a state that the guest `incarnation` can go on from.
    pub(super) fn look(
        &self,
        incarnation: Incarnation,
        launch: &Launch,
        owner: &str,
    ) -> Result<Found, Fault> {
        Ok(judge(self.slot.read()?, incarnation, &self.origin(launch, owner)))
    }

    fn origin(&self, launch: &Launch, owner: &str) -> Origin {
        Origin {
            name: owner.to_owned(),
            machine: launch.machine.clone(),
            version: launch.version.clone(),
            memory_bytes: self.memory.bytes,
            memory_region: self.memory.id,
        }
    }
}

/// What a slot's content is worth to a guest.
pub(super) fn judge(content: SlotContent, incarnation: Incarnation, expected: &Origin) -> Found {
    let saved = match content {
        SlotContent::Empty => return Found::Nothing("nothing was saved".to_owned()),
        SlotContent::Torn { why } => {
            return Found::Nothing(format!("the save did not come to its end: {why}"));
        }
        SlotContent::NewerVersion { found, known } => {
            let owner = &expected.name;
            let message = format!("the state of {owner} has version {found}, this program knows {known}");
            let fault = Fault::new(ErrorCode::State, message)
                .hint("use the program that saved it, or a later one; nothing was changed");
            return Found::Unusable(fault);
        }
        SlotContent::Saved(saved) => saved,
    };
    if saved.header.incarnation != incarnation.0 {
        return Found::Nothing("the last saved state is of an earlier run and was used".to_owned());
    }
    let found: Option<Origin> = serde_json::from_slice(&saved.header.metadata).ok();
    if found.as_ref() == Some(expected) {
        return Found::State(Box::new(saved));
    }
    Found::Unusable(misfit(found.as_ref(), expected))
}

fn encode(origin: &Origin) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(origin).map_err(|error| Fault::new(ErrorCode::Internal, error.to_string()))
}

fn misfit(found: Option<&Origin>, expected: &Origin) -> Fault {
    let said = |origin: &Origin| {
        let Origin { name, machine, version, memory_bytes, memory_region } = origin;
        format!("{name} on {machine} {version}, {} of memory in {memory_region}", ByteCount(*memory_bytes))
    };
    let found = found.map_or_else(|| "something unknown".to_owned(), said);
    Fault::new(ErrorCode::State, format!("the state was saved from {found}, and this is {}", said(expected)))
        .hint("nothing was changed; `vm-host discard` gives it up")
}

/// Times steps.
#[derive(Debug)]
struct Lap(Instant);

impl Lap {
    fn new() -> Self {
        Self(Instant::now())
    }

    /// Since the last call.
    fn us(&mut self) -> u64 {
        let now = Instant::now();
        let passed = now.duration_since(std::mem::replace(&mut self.0, now));
        u64::try_from(passed.as_micros()).unwrap_or(u64::MAX)
    }
}

fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
