// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Planned shutdowns and reboots of the host, as systemd-logind announces them on the system bus.
//!
//! ```text
//!   connect ► hear PrepareForShutdown ► PreparingForShutdown? ► Inhibit("shutdown", …, "delay") ► started
//!                   │
//!                   ├─ true:  shutdown planned; logind waits for the lock, at most InhibitDelayMaxUSec
//!                   │            Lock::release, when all is saved: the shutdown goes on
//!                   └─ false: take a new lock ► shutdown cancelled
//! ```
//!
//! The lock is held before the source counts as started: otherwise a shutdown that begins in between would not wait. It is a
//! descriptor, and lives as long as that: it outlives the bus, and ends with this process however that ends.
//!
//! A shutdown that bypasses logind (`systemctl --force`, `reboot -f`, sysrq) is not announced: to this daemon it is a power cut.
//!
//! The D-Bus library needs a runtime for its futures; it runs on this source's own thread, which sleeps until the bus or the stop event
//! has something for it.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures_core::Stream;
use thiserror::Error;
use tracing::{debug, info};
use zbus::proxy::{CacheProperties, SignalStream};
use zbus::{Connection, Proxy, connection, fdo, proxy};
use zruntime::{AsyncIo, Shared, SharedRuntime};

use super::{Backoff, Reporter, Stop, Woken};
use crate::power::observation::Kind;

const SERVICE: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";
const INTERFACE: &str = "org.freedesktop.login1.Manager";
/// For each answer, and for the connection as a whole.
const TIMEOUT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(1);
const RETRY_LIMIT: Duration = Duration::from_secs(60);

/// The lock that delays a shutdown.
#[derive(Clone, Debug, Default)]
pub struct Lock(Arc<Mutex<Option<OwnedFd>>>);

impl Lock {
    /// Lets a shutdown go on. Does nothing where no lock is held.
    pub fn release(&self) {
        if self.take(None).is_some() {
            info!("the host may shut down");
        }
    }

    pub fn is_held(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn take(&self, new: Option<OwnedFd>) -> Option<OwnedFd> {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), new)
    }
}

/// Why the host's shutdown cannot be heard.
#[derive(Debug, Error)]
enum LogindError {
    #[error("stopped")]
    Stopped,
    #[error("no answer from the bus or from logind in time")]
    TimedOut,
    #[error("the bus closed the connection")]
    Closed,
    #[error(transparent)]
    Bus(#[from] zbus::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl LogindError {
    /// There is no bus, or nobody on it who could be logind.
    fn is_absence(&self) -> bool {
        match self {
            Self::Bus(zbus::Error::Connection(error, _)) => {
                matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
            }
            Self::Bus(zbus::Error::FDO(error)) => matches!(
                **error,
                fdo::Error::ServiceUnknown(_)
                    | fdo::Error::NameHasNoOwner(_)
                    | fdo::Error::SpawnServiceNotFound(_)
            ),
            _ => false,
        }
    }
}

/// Says what logind says, until told to stop. Calls `started` once: when the lock is held, or the first try has failed.
pub fn run(reporter: &Reporter, address: Option<&str>, lock: &Lock, started: impl FnOnce()) {
    let mut started = Some(started);
    let mut tell = move || {
        if let Some(started) = started.take() {
            started();
        }
    };
    let mut backoff = Backoff::new(RETRY);
    let mut ever = false;
    loop {
        let ended = zbus::block_on(serve(reporter, address, lock, || {
            backoff.reset();
            ever = true;
            tell();
        }));
        match ended {
            Ok(never) => match never {},
            Err(LogindError::Stopped) => return,
            Err(error) if error.is_absence() && !ever => reporter.not_available(error.to_string()),
            Err(error) => reporter.lost(error.to_string()),
        }
        tell();
        if !matches!(reporter.stop().wait(&[], Some(backoff.step(RETRY_LIMIT))), Ok(Woken::TimedOut)) {
            return;
        }
    }
}

enum Never {}

async fn serve(
    reporter: &Reporter,
    address: Option<&str>,
    lock: &Lock,
    mut started: impl FnMut(),
) -> Result<Never, LogindError> {
    let runtime = SharedRuntime::current()?;
    let stop = AsyncIo::new_nonblocking(&runtime, reporter.stop().clone())?;
    let builder = address.map_or_else(connection::Builder::system, connection::Builder::address);
    let built = runtime.timeout(TIMEOUT, builder.method_timeout(TIMEOUT).build());
    let connection = unless_stopped(&stop, built).await?.map_err(|_| LogindError::TimedOut)??;
    let ended = unless_stopped(&stop, hear(reporter, &connection, lock, &mut started)).await;
    // Best effort: the other side may be what failed.
    let _ = runtime.timeout(Duration::from_millis(100), connection.close()).await;
    ended?
}

async fn hear(
    reporter: &Reporter,
    connection: &Connection,
    lock: &Lock,
    started: &mut impl FnMut(),
) -> Result<Never, LogindError> {
    let logind: Proxy<'_> = proxy::Builder::new(connection)
        .destination(SERVICE)
        .path(PATH)
        .interface(INTERFACE)
        .cache_properties(CacheProperties::No)
        .build()
        .await?;
    // Before the lock, or a shutdown that begins in between would not be heard.
    let mut signals = logind.receive_signal("PrepareForShutdown").await?;
    let preparing = logind.get_property::<bool>("PreparingForShutdown").await.unwrap_or(false);
    match inhibit(&logind, lock).await {
        // Too late: logind gives no locks any more.
        Err(error) if preparing => debug!(%error, "a shutdown is under way and does not wait"),
        taken => taken?,
    }
    let within = logind.get_property::<u64>("InhibitDelayMaxUSec").await;
    let within_ms =
        within.inspect_err(|error| debug!(%error, "no InhibitDelayMaxUSec")).ok().map(|us| us / 1000);
    reporter.detail(match within_ms {
        Some(ms) => format!("a shutdown waits for up to {ms} ms"),
        None => "a shutdown waits".to_owned(),
    });
    reporter.say(if preparing { Kind::ShutdownPlanned { within_ms } } else { Kind::Online });
    started();
    while let Some(begins) = next(&mut signals).await? {
        if begins {
            reporter.say(Kind::ShutdownPlanned { within_ms });
        } else {
            // The next one has to wait, too.
            inhibit(&logind, lock).await?;
            reporter.say(Kind::ShutdownCancelled);
            reporter.say(Kind::Online);
        }
    }
    Err(LogindError::Closed)
}

async fn inhibit(logind: &Proxy<'_>, lock: &Lock) -> Result<(), LogindError> {
    let why = "Virtual machines are being saved";
    let held: zbus::OwnedFd = logind.call("Inhibit", &("shutdown", "vm-host", why, "delay")).await?;
    lock.take(Some(held.into()));
    Ok(())
}

/// The next word of logind; `None` when there will be no more.
async fn next(signals: &mut SignalStream<'_>) -> Result<Option<bool>, LogindError> {
    let message = poll_fn(|context| Pin::new(&mut *signals).poll_next(context)).await;
    Ok(message.map(|message| message.body().deserialize::<bool>()).transpose()?)
}

/// What `future` comes to, unless it is told to stop before.
async fn unless_stopped<T>(
    stop: &AsyncIo<Stop, Shared>,
    future: impl Future<Output = T>,
) -> Result<T, LogindError> {
    let (mut stopped, mut future) = (pin!(stop.readable()), pin!(future));
    poll_fn(|context| {
        if stopped.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(LogindError::Stopped));
        }
        future.as_mut().poll(context).map(Ok)
    })
    .await
}
