// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who is promised what. Values in, decisions out: no clock, no lock, no I/O.
//!
//! A vSSD's promise is the larger of what it holds plugged and what the operator requested for it. The
//! promises together stay within the physical blocks times the overcommit factor; those of vSSDs confined
//! to one medium also within that medium's. At 100 % every plugged block can therefore be backed: what is
//! not leased is clean, reserved or being scrubbed, and all of that comes back to first writes.

use crate::sabotage::{Sabotage, active};
use crate::types::{Class, MediumKind};

/// What there is to promise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capacity {
    /// Blocks, indexed like [`MediumKind::ALL`].
    pub(crate) physical: [u32; 2],
    pub(crate) overcommit_percent: u32,
}

/// What one vSSD is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Promise {
    pub(crate) blocks: u32,
    pub(crate) class: Class,
}

impl Promise {
    pub(crate) fn new(plugged: u32, requested: u32, class: Class) -> Self {
        Self { blocks: plugged.max(requested), class }
    }
}

/// Too much was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub(crate) requested: u64,
    pub(crate) available: u64,
}

impl Capacity {
    fn scaled(&self, blocks: u64) -> u64 {
        blocks * u64::from(self.overcommit_percent) / 100
    }

    /// How many blocks may be promised in all.
    pub(crate) fn promisable(&self) -> u64 {
        let blocks: u64 = self.physical.iter().map(|&blocks| u64::from(blocks)).sum();
        self.scaled(blocks + u64::from(active(Sabotage::CapacityOffByOne)))
    }

    fn promisable_on(&self, kind: MediumKind) -> u64 {
        self.scaled(u64::from(self.physical[kind.index()]))
    }

    /// How many more blocks can be promised to a vSSD of `class`, given all promises so far.
    pub(crate) fn available(&self, promises: &[Promise], class: Class) -> u64 {
        let sum = |confined_to: Option<MediumKind>| -> u64 {
            promises
                .iter()
                .filter(|promise| confined_to.is_none() || promise.class.strict() == confined_to)
                .map(|promise| u64::from(promise.blocks))
                .sum()
        };
        let overall = self.promisable().saturating_sub(sum(None));
        match class.strict() {
            None => overall,
            Some(kind) => overall.min(self.promisable_on(kind).saturating_sub(sum(Some(kind)))),
        }
    }

    /// How far a vSSD's promise, now `current`, may be raised, given the promises of all others.
    pub(crate) fn promisable_to(&self, others: &[Promise], current: Promise) -> u64 {
        self.available(others, current.class).max(current.blocks.into())
    }

    /// Whether a vSSD's promise may change from `current` (`None` for a new one) to `wanted`, given the
    /// promises of all others. Keeping or lowering one within its class is always granted.
    pub(crate) fn admit(
        &self,
        others: &[Promise],
        current: Option<Promise>,
        wanted: Promise,
    ) -> Result<(), Shortage> {
        let held = current.map_or(0, |promise| promise.blocks);
        if current.is_some_and(|promise| wanted.blocks <= promise.blocks && wanted.class == promise.class) {
            return Ok(());
        }
        let available = self.available(others, wanted.class);
        if u64::from(wanted.blocks) <= available {
            return Ok(());
        }
        let held = if current.is_some_and(|promise| promise.class == wanted.class) { held } else { 0 };
        Err(Shortage {
            requested: u64::from(wanted.blocks - held.min(wanted.blocks)),
            available: available.saturating_sub(u64::from(held)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any(blocks: u32) -> Promise {
        Promise { blocks, class: Class::Any }
    }

    const POOL: Capacity = Capacity { physical: [10, 90], overcommit_percent: 100 };

    #[test]
    fn admit_names_what_is_missing() {
        assert_eq!(POOL.admit(&[any(60)], None, any(40)), Ok(()));
        assert_eq!(POOL.admit(&[any(60)], None, any(41)), Err(Shortage { requested: 41, available: 40 }));
        assert_eq!(
            POOL.admit(&[any(60)], Some(any(30)), any(41)),
            Err(Shortage { requested: 11, available: 10 })
        );
    }

    #[test]
    fn confined_vssd_is_refused_when_its_medium_is_promised_although_the_pool_is_not() {
        let nvram = |blocks| Promise { blocks, class: Class::Nvram };
        assert_eq!(POOL.admit(&[nvram(8)], None, nvram(2)), Ok(()));
        assert_eq!(POOL.admit(&[nvram(8)], None, nvram(3)), Err(Shortage { requested: 3, available: 2 }));
        assert_eq!(
            POOL.admit(&[any(50)], Some(any(20)), nvram(20)),
            Err(Shortage { requested: 20, available: 10 })
        );
    }

    #[test]
    fn overcommit_promises_more_than_there_is() {
        let pool = Capacity { overcommit_percent: 150, ..POOL };
        assert_eq!(pool.admit(&[any(100)], None, any(50)), Ok(()));
        assert!(pool.admit(&[any(100)], None, any(51)).is_err());
    }

    #[test]
    fn lowering_is_granted_even_where_too_much_is_promised_already() {
        assert_eq!(POOL.admit(&[any(200)], Some(any(50)), any(49)), Ok(()));
    }

    proptest! {
        #[test]
        fn admitted_promises_never_exceed_the_capacity(
            requests in prop::collection::vec((0usize..4, 0u32..60, 0usize..3), 0..40)
        ) {
            let mut promises: [Option<Promise>; 4] = [None; 4];
            for (vssd, blocks, class) in requests {
                let class = [Class::Any, Class::Nvram, Class::Ssd][class];
                let others: Vec<_> =
                    promises.iter().enumerate().filter(|(i, _)| *i != vssd).filter_map(|(_, p)| *p).collect();
                let wanted = Promise { blocks, class };
                if POOL.admit(&others, promises[vssd], wanted).is_ok() {
                    promises[vssd] = Some(wanted);
                }
                let sum = |kind: Option<MediumKind>| promises.iter().flatten()
                    .filter(|p| kind.is_none() || p.class.strict() == kind).map(|p| p.blocks).sum::<u32>();
                prop_assert!(sum(None) <= 100 && sum(Some(MediumKind::Nvram)) <= 10 && sum(Some(MediumKind::Ssd)) <= 90);
            }
        }
    }
}
