// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Faults put in on purpose, to see that the tests find them: a suite that has never failed proves nothing.
//!
//! Only with the cargo feature `sabotage`, which a release build refuses; without it [`active`] is a constant `false` and
//! the places that ask disappear. With it, `VSSD_SABOTAGE=name` chooses one fault for the life of the process.
//! `cargo xtask sabotage` runs, for each, the test that must catch it.

#[cfg(all(feature = "sabotage", not(debug_assertions)))]
compile_error!("the feature `sabotage` breaks the pool on purpose and has no place in a release build");

/// What can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// A commit writes its pages and does not flush them.
    SkipFlush,
    /// Opening a pool does not flush what the process before it left behind.
    SkipOpeningFlush,
    /// A failed flush is forgotten, and the next is acknowledged.
    ForgetFailedFlush,
    /// A block that was given back counts as clean without having been zeroed.
    ForgetZero,
    /// Blocks set aside for first writes are not recorded as such, and count as clean after a crash.
    ForgetReserve,
    /// Grace periods end at once: blocks change hands under requests in flight.
    FreeBeforeFence,
    /// The pool promises one block more than it has.
    CapacityOffByOne,
    /// Records are not on the medium when the requests they belong to are answered.
    SkipHandOver,
    /// Torn journal pages are replayed.
    IgnoreJournalChecksum,
    /// A checkpoint goes over the newest one instead of the one before.
    OverwriteLiveCheckpoint,
    /// A short transfer counts as whole.
    TakeShortForWhole,
    /// The daemon loses one request that was in flight when a front-end comes back.
    DropInFlight,
    /// The daemon checks a descriptor's length and then reads it from guest memory again.
    FetchLengthTwice,
}

impl Sabotage {
    /// Every fault and what `VSSD_SABOTAGE` calls it.
    pub const ALL: [(Self, &'static str); 13] = [
        (Self::SkipFlush, "skip-flush"),
        (Self::SkipOpeningFlush, "skip-opening-flush"),
        (Self::ForgetFailedFlush, "forget-failed-flush"),
        (Self::ForgetZero, "forget-zero"),
        (Self::ForgetReserve, "forget-reserve"),
        (Self::FreeBeforeFence, "free-before-fence"),
        (Self::CapacityOffByOne, "capacity-off-by-one"),
        (Self::SkipHandOver, "skip-hand-over"),
        (Self::IgnoreJournalChecksum, "ignore-journal-checksum"),
        (Self::OverwriteLiveCheckpoint, "overwrite-live-checkpoint"),
        (Self::TakeShortForWhole, "take-short-for-whole"),
        (Self::DropInFlight, "drop-in-flight"),
        (Self::FetchLengthTwice, "fetch-length-twice"),
    ];
}

/// Whether this is the fault that was asked for.
#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub const fn active(_fault: Sabotage) -> bool {
    false
}

/// Whether this is the fault that was asked for.
#[cfg(feature = "sabotage")]
pub fn active(fault: Sabotage) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<Sabotage>> = std::sync::LazyLock::new(|| {
        let name = std::env::var("VSSD_SABOTAGE").ok()?;
        let chosen = Sabotage::ALL.iter().find(|(_, known)| *known == name);
        assert!(chosen.is_some(), "there is no sabotage {name:?}");
        chosen.map(|(fault, _)| *fault)
    });
    *CHOSEN == Some(fault)
}
