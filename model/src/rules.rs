// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What must hold, by its number in `protocol.md` where it has one.

/// A rule; a state that breaks one ends the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    OneOwner,
    DurableAnswer,
    OnlyNominated,
    NoDataTaken,
    NotWhileGuestTakesPart,
    OfferedStaysTheGuests,
    StaleChangesNothing,
    OneAnswer,
    WaitFreedOnStop,
    TargetInBounds,
    NoDueTimerLeft,
    CompareAndSet,
    FinalIsFinal,
    QuietRunEnds,
    /// See [`crate::World::disagreement`].
    Converged,
}

impl Rule {
    pub const ALL: [Self; 15] = [
        Self::OneOwner,
        Self::DurableAnswer,
        Self::OnlyNominated,
        Self::NoDataTaken,
        Self::NotWhileGuestTakesPart,
        Self::OfferedStaysTheGuests,
        Self::StaleChangesNothing,
        Self::OneAnswer,
        Self::WaitFreedOnStop,
        Self::TargetInBounds,
        Self::NoDueTimerLeft,
        Self::CompareAndSet,
        Self::FinalIsFinal,
        Self::QuietRunEnds,
        Self::Converged,
    ];

    pub fn text(self) -> &'static str {
        match self {
            Self::OneOwner => {
                "V-10: a block that another vSSD got is neither served nor remembered as this one's"
            }
            Self::DurableAnswer => "V-9, V-28, V-39: what was answered OK is in force and durable",
            Self::OnlyNominated => {
                "V-40: without force the host takes no block that the guest did not nominate"
            }
            Self::NoDataTaken => "V-43: without force the host takes no data",
            Self::NotWhileGuestTakesPart => {
                "V-40: the host keeps off while a driver with the guest channel takes part"
            }
            Self::OfferedStaysTheGuests => "V-45: a job that a vSSD driver heard of stays the guest's",
            Self::StaleChangesNothing => "V-15: a foreign epoch is answered STALE and changes nothing",
            Self::OneAnswer => "every request is answered once",
            Self::WaitFreedOnStop => "V-22: no WAIT is kept when its queue stops",
            Self::TargetInBounds => {
                "the target is between minimum and maximum, and the plugged size above the minimum"
            }
            Self::NoDueTimerLeft => "a timer that came is done with",
            Self::CompareAndSet => "C-5: an order with an expected size meets that size",
            Self::FinalIsFinal => "C-6: a job that ended stays so, and only the newest is open",
            Self::QuietRunEnds => "a quiet run ends",
            Self::Converged => "where a quiet run ends, guest, device and pool agree and no job is left",
        }
    }
}
