// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `device.sync`: what guests were told is written survives a power cut, flushed or not. The pool does it on a thread of its
//! own; the control loop gets a ticket at once and the ending later.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use control_server::About;
use serde_json::json;
use tracing::{error, info};
use vssd_protocol::control::{SyncAnswer, SyncParams};

use super::{Owner, about};
use crate::control::fault::Fault;
use crate::control::negotiation::Actor;

/// A sync that has ended, on its way from the pool's thread.
#[derive(Debug)]
struct Ended {
    ticket: u64,
    call: Call,
    took_us: u64,
    result: vssd_pool::Result<()>,
}

/// Who asked for what.
#[derive(Debug)]
struct Call {
    /// If it was one.
    name: Option<String>,
    devices: u32,
    actor: Actor,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Syncs {
    ended: mpsc::Sender<Ended>,
    endings: mpsc::Receiver<Ended>,
    last_ticket: u64,
}

impl Syncs {
    pub(super) fn new() -> Self {
        let (ended, endings) = mpsc::channel();
        Self { ended, endings, last_ticket: 0 }
    }
}

impl Owner {
    /// Begins to make durable what the named vSSDs, or all, have acknowledged so far; [`Owner::take_synced`] tells of the end under
    /// the ticket that this returns. A pool's vSSDs share its media and its journal, so what others have acknowledged becomes
    /// durable, too.
    pub fn sync(&mut self, params: SyncParams, actor: Actor) -> Result<u64, Fault> {
        let started = Instant::now();
        let mut names = params.names;
        names.sort_unstable();
        names.dedup();
        for name in &names {
            self.find(name)?;
        }
        let devices = if names.is_empty() { self.devices.len() } else { names.len() };
        let name = if names.len() == 1 { names.pop() } else { None };
        let call = Call { name, devices: u32::try_from(devices).unwrap_or(u32::MAX), actor };
        self.syncs.last_ticket += 1;
        let ticket = self.syncs.last_ticket;
        let (ended, wake) = (self.syncs.ended.clone(), Arc::clone(&self.done_wake));
        self.pool.sync(Box::new(move |result| {
            let took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            // Fails only once the owner is gone, and then nobody waits for the answer.
            if ended.send(Ended { ticket, call, took_us, result }).is_ok() {
                let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
            }
        }));
        Ok(ticket)
    }

    /// The syncs that have ended since this was last asked, by ticket.
    pub fn take_synced(&mut self) -> Vec<(u64, Result<SyncAnswer, Fault>)> {
        let mut synced = Vec::new();
        while let Ok(Ended { ticket, call, took_us, result }) = self.syncs.endings.try_recv() {
            let Call { name, devices, actor } = call;
            let answer = match result {
                Ok(()) => {
                    info!(device = name, devices, took_us, uid = actor.uid, pid = actor.pid, "synced");
                    let mut data = json!({ "devices": devices, "took_us": took_us });
                    actor.add_to(&mut data);
                    let unix_ms = self.clock.unix_ms(self.clock.now_ms());
                    let about = name.as_deref().map_or(About::NOTHING, about);
                    self.log.push(unix_ms, "device.synced", about, data);
                    Ok(SyncAnswer { devices, took_us })
                }
                Err(cause) => {
                    error!(device = name, error = %cause, "cannot make durable what was acknowledged");
                    self.alarm.soon(self.clock.now_ms());
                    Err(self.pool_fault(&cause))
                }
            };
            synced.push((ticket, answer));
        }
        synced
    }
}
