// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a keeper makes of what an earlier daemon left: a machine that runs, one that stands still, a state, or only memory.

use vssd_protocol::control::ErrorCode;

use super::{Done, HALTED, Keeper, OFF, gone};
use crate::fault::Fault;
use crate::record::{Life, Wanted};
use crate::vm::save::{Found, Kept};
use crate::vm::status::VmState;
use crate::vm::swap;
use crate::vmm::{Launch, Machine, RunState};

/// What there is of a guest.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    /// It stands still for no other reason than that it was saved, or was being saved, when the daemon ended.
    CanGoOn,
    /// It runs, or is not there, or waits for whoever sees to it.
    AsItIs,
}

impl Keeper {
    /// What a start of the daemon finds.
    pub(super) fn recover(&mut self) -> Done {
        self.require("recover", &[VmState::Stopped, VmState::SwappedOut, VmState::Broken])?;
        let left = self.find_what_is_left().inspect_err(|fault| {
            self.enter_for(VmState::Broken, &fault.message, fault);
        })?;
        if left == Left::AsItIs || self.record.wanted != Wanted::Running {
            return Ok(());
        }
        match self.resume() {
            // The power is failing: it is found, and that is all.
            Err(fault) if fault.code == ErrorCode::Busy => Ok(()),
            done => done,
        }
    }

    fn find_what_is_left(&mut self) -> Result<Left, Fault> {
        let name = self.name().to_owned();
        let image = match &self.record.life {
            Life::SwappedOut { image, .. } => Some(image.as_path()),
            Life::Stopped | Life::Live { .. } => None,
        };
        swap::clean(&self.shared.swap_dir, &name, image)?;
        let medium = self.medium()?;
        let (launch, process) = match self.record.life.clone() {
            Life::Live { launch, process, .. } => (launch, process),
            life => {
                self.vmm().end_orphan(&self.places)?;
                if let (Life::SwappedOut { .. }, Some(nvram)) = (&life, &medium) {
                    // It was swapped out whole before this began to be freed, or swapped in only in part.
                    Kept::free(nvram, &name)?;
                }
                let state = if life == Life::Stopped { VmState::Stopped } else { VmState::SwappedOut };
                self.enter(state, "");
                return Ok(Left::AsItIs);
            }
        };
        if let Some(nvram) = &medium {
            self.kept = Kept::find(nvram, &name)?;
        }
        self.machine = match process {
            Some(process) => self.vmm().adopt(&process, &self.places)?,
            None => None,
        };
        if self.machine.is_some() {
            self.open_logs();
        }
        match self.machine.as_deref_mut().map(Machine::run_state).transpose()? {
            Some(RunState::Running) => {
                self.enter(VmState::Running, "it ran on while the daemon did not");
                Ok(Left::AsItIs)
            }
            Some(RunState::Off) => self.put_away(OFF).map(|()| Left::AsItIs),
            Some(RunState::Halted) => {
                self.enter(VmState::Paused, HALTED);
                Ok(Left::AsItIs)
            }
            Some(RunState::Stopped) if self.record.wanted == Wanted::Running => {
                // Whether there is a state or not, the guest is whole.
                self.enter(VmState::Paused, "the daemon had ended while it was being saved");
                Ok(Left::CanGoOn)
            }
            Some(RunState::Stopped) => self.find_saved(&launch),
            Some(RunState::AwaitsState) | None => {
                self.end_machine();
                self.vmm().end_orphan(&self.places)?;
                self.find_saved(&launch)
            }
        }
    }

    /// The guest does not run: is it saved?
    fn find_saved(&mut self, launch: &Launch) -> Result<Left, Fault> {
        let name = self.name().to_owned();
        let Some(incarnation) = self.record.life.incarnation() else { return Err(gone(&name)) };
        let Some(kept) = &self.kept else {
            self.lose(if self.record.definition.is_persistent() {
                "its regions have gone"
            } else {
                "it is an ordinary VM"
            });
            return Ok(Left::AsItIs);
        };
        match kept.look(incarnation, launch, &name)? {
            Found::State(_) => {
                self.enter(VmState::Saved, "found saved");
                Ok(Left::CanGoOn)
            }
            Found::Nothing(_) if self.machine.is_some() => {
                self.enter(VmState::Paused, "found stopped, and not saved");
                Ok(Left::AsItIs)
            }
            Found::Nothing(why) => {
                self.lose(&why);
                Ok(Left::AsItIs)
            }
            Found::Unusable(fault) => Err(fault),
        }
    }
}
