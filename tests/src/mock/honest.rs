// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tenant who keeps to the rules and is as busy as it can be: what an attacker may cost others is measured by it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::PATIENCE;
use super::load::{Load, Profile};
use super::machine::{Machine, Options};
use super::neighbour::{Span, WINDOW};
use super::site::{BLOCK, MIB, Site};

const SIZE: u64 = 32 * MIB;
/// Requests in flight on each of two queues.
const DEPTH: usize = 64;
/// Before a window begins: what was under way is over, what begins is under way.
const SETTLE: Duration = Duration::from_millis(10);

/// What there is to do for the time of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Work,
    Rest,
}

/// A third vSSD, whose guest works or rests when told.
#[derive(Debug)]
pub struct Honest {
    orders: Sender<Order>,
    windows: Receiver<Span>,
    thread: JoinHandle<Result<()>>,
    /// Keeps the connection open.
    _machine: Machine,
}

impl Honest {
    /// Makes the vSSD `honest`. Its first requests have been answered when this returns.
    pub fn start(site: &mut Site) -> Result<Self> {
        let options = Options { queue_size: 512, ..Options::default() };
        let mut machine = site.machine("honest", SIZE, options)?;
        let unit = machine.logical_block()?.into();
        let profile =
            Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: DEPTH, zeroing: true, tables: true };
        let queues = vec![machine.take_queue(0)?, machine.take_queue(1)?];
        let mut load = Load::new(queues, profile, super::seed("honest"))?;
        load.run(1000)?;
        load.drain()?;
        let (orders, inbox) = channel();
        let (outbox, windows) = channel();
        let thread = thread::spawn(move || {
            while let Ok(order) = inbox.recv() {
                carry_out(order, &mut load, SETTLE)?;
                let begin = Instant::now();
                carry_out(order, &mut load, WINDOW)?;
                let window = (begin, Instant::now());
                load.drain()?;
                outbox.send(window)?;
            }
            Ok(())
        });
        Ok(Self { orders, windows, thread, _machine: machine })
    }

    /// Works or rests for a window, and says from when to when. All it asked for is answered when this returns.
    pub fn obey(&self, order: Order) -> Result<Span> {
        self.orders.send(order)?;
        self.windows.recv_timeout(PATIENCE).context("nothing was used: the honest tenant")
    }

    pub fn end(self) -> Result<()> {
        drop(self.orders);
        self.thread.join().map_err(|_| anyhow!("the honest tenant panicked"))?
    }
}

fn carry_out(order: Order, load: &mut Load, time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    match order {
        Order::Rest => thread::sleep(time),
        Order::Work => {
            while Instant::now() < until {
                load.run(2 * DEPTH)?;
            }
        }
    }
    Ok(())
}
