// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the tests of sources need.

use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use super::*;

/// A reporter with its receiver.
pub(crate) fn reporter(kind: &'static str) -> (Reporter, Receiver<Observation>) {
    let (sender, receiver) = sync_channel(64);
    let outlet = Outlet { sender, notify: None, stop: Stop::new().unwrap() };
    (Reporter::new(SourceId(0), "tested", kind, outlet), receiver)
}

/// What it says next.
pub(crate) fn next(receiver: &Receiver<Observation>) -> Kind {
    receiver.recv_timeout(Duration::from_secs(20)).unwrap().kind
}

/// That it says nothing for a while.
pub(crate) fn silent(receiver: &Receiver<Observation>) {
    assert_eq!(receiver.recv_timeout(Duration::from_millis(200)).ok(), None);
}

/// Waits until something is the case.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Stops a source and waits for its thread, which must not take long.
pub(crate) fn end(reporter: &Reporter, thread: JoinHandle<()>) {
    let start = Instant::now();
    reporter.stop().stop();
    thread.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "ended after {:?}", start.elapsed());
}

/// The middle one.
pub(crate) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
