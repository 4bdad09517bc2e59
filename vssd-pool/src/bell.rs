// SPDX-License-Identifier: Apache-2.0 OR MIT

//! By which threads of a pool wake each other.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::lock;

/// A flag that a thread can sleep on.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    sleeper: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        *lock(&self.rung) = true;
        self.sleeper.notify_one();
    }

    /// Sleeps until it is rung, or for `limit`.
    pub(crate) fn wait(&self, limit: Option<Duration>) {
        let mut rung = lock(&self.rung);
        while !*rung {
            match limit {
                Some(limit) => {
                    (rung, _) =
                        self.sleeper.wait_timeout(rung, limit).unwrap_or_else(PoisonError::into_inner);
                    break;
                }
                None => rung = self.sleeper.wait(rung).unwrap_or_else(PoisonError::into_inner),
            }
        }
        *rung = false;
    }
}
