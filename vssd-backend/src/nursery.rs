// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Starts threads for those who may not, since a thread inherits what the one that starts it has given up ([`crate::sandbox`]).
//!
//! A thread of its own does nothing else; it ends with the last handle. Knows nothing of what the threads do.

use std::fmt;
use std::io;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use crate::sandbox::{Sandbox, SandboxError, Thread};

struct Order {
    name: String,
    body: Box<dyn FnOnce() + Send>,
    reply: mpsc::SyncSender<io::Result<JoinHandle<()>>>,
}

/// Where threads are ordered.
#[derive(Clone)]
pub struct Nursery {
    orders: mpsc::Sender<Order>,
    sandbox: Sandbox,
}

impl fmt::Debug for Nursery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nursery")
    }
}

impl Nursery {
    /// Starts the thread that starts threads.
    pub fn start(sandbox: Sandbox) -> io::Result<Self> {
        let (sender, orders) = mpsc::channel::<Order>();
        let own = sandbox.clone();
        let body = move || {
            own.enter_early(Thread::Nursery);
            for Order { name, body, reply } in orders {
                // Who ordered it waits.
                let _ = reply.send(thread::Builder::new().name(name).spawn(body));
            }
        };
        thread::Builder::new().name("nursery".into()).spawn(body)?;
        Ok(Self { orders: sender, sandbox })
    }

    /// For a thread that was started here, to give up what one of its kind does not need.
    pub fn enter(&self, thread: Thread) -> Result<(), SandboxError> {
        self.sandbox.enter(thread)
    }

    /// Starts a thread.
    ///
    /// # Errors
    /// As [`thread::Builder::spawn`].
    pub fn spawn(&self, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
        let gone = || io::Error::other("the thread that starts threads is gone");
        let (reply, started) = mpsc::sync_channel(1);
        self.orders.send(Order { name, body: Box::new(body), reply }).map_err(|_| gone())?;
        started.recv().unwrap_or_else(|_| Err(gone()))
    }
}
