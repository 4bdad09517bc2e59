// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What grace periods and maps need of threads and memory, in one place: `schedules/` compiles them against stand-ins of the
//! same names that run every schedule.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
pub(crate) use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// `len` atomics that are 0. They come untouched from the kernel and take memory only once they are written to.
pub(crate) fn zeroed(len: usize) -> Box<[AtomicU32]> {
    let zeroes = vec![0u32; len].into_boxed_slice();
    // SAFETY: AtomicU32 has the size, alignment and bit validity of u32, and the box is the sole owner.
    unsafe { Box::from_raw(Box::into_raw(zeroes) as *mut [AtomicU32]) }
}

/// Lets others go on, the longer the more often it was in vain.
pub(crate) fn pause(turns: u32) {
    match turns {
        0..64 => std::hint::spin_loop(),
        64..128 => std::thread::yield_now(),
        // Requests on an SSD take about this long.
        _ => std::thread::sleep(Duration::from_micros(50)),
    }
}
