// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Walking through a guest's buffers. Their bytes are never behind a reference: the guest may change them
//! at any time.

/// A position in a list of buffers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    iov: &'a [libc::iovec],
    /// Bytes of `iov[0]` that are used up.
    used: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(iov: &'a [libc::iovec]) -> Self {
        Self { iov, used: 0 }
    }

    /// The next piece of memory, at most `max` bytes; `None` at the end.
    pub(super) fn take(&mut self, max: u64) -> Option<(*mut u8, usize)> {
        while let Some((first, rest)) = self.iov.split_first() {
            let left = first.iov_len - self.used;
            if left == 0 {
                self.iov = rest;
                self.used = 0;
                continue;
            }
            let len = usize::try_from(max).map_or(left, |max| left.min(max));
            // wrapping_add: whether the memory is there is the caller's promise, not this walk's.
            let at = first.iov_base.cast::<u8>().wrapping_add(self.used);
            self.used += len;
            return (len > 0).then_some((at, len));
        }
        None
    }

    /// Calls `each` with the pieces that make up the next `len` bytes; stops at the first error.
    pub(super) fn take_all<E>(
        &mut self,
        mut len: u64,
        mut each: impl FnMut(*mut u8, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        while len > 0 {
            let Some((at, n)) = self.take(len) else { break };
            each(at, n)?;
            len -= n as u64;
        }
        Ok(())
    }
}

/// The sum of all lengths, or `None` where it overflows.
pub(super) fn total_len(iov: &[libc::iovec]) -> Option<u64> {
    iov.iter().try_fold(0u64, |sum, part| sum.checked_add(part.iov_len as u64))
}

/// Drops `n` bytes from the front of `iov[*at..]` and moves `*at` past buffers that are used up.
pub(super) fn advance(iov: &mut [libc::iovec], at: &mut usize, mut n: usize) {
    while let Some(part) = iov.get_mut(*at) {
        if n < part.iov_len {
            part.iov_base = part.iov_base.wrapping_byte_add(n);
            part.iov_len -= n;
            return;
        }
        n -= part.iov_len;
        *at += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn iov(lens: &[usize]) -> Vec<libc::iovec> {
        let mut at = 0x1000;
        lens.iter()
            .map(|&len| {
                let part = libc::iovec { iov_base: std::ptr::without_provenance_mut(at), iov_len: len };
                at += 0x1000;
                part
            })
            .collect()
    }

    fn bytes(iov: &[libc::iovec]) -> Vec<usize> {
        iov.iter().flat_map(|part| (0..part.iov_len).map(|i| part.iov_base.addr() + i)).collect()
    }

    proptest! {
        #[test]
        fn cursor_and_advance_visit_every_byte_once(
            lens in prop::collection::vec(0usize..9, 0..8), steps in prop::collection::vec(1u64..7, 0..40)
        ) {
            let whole = iov(&lens);
            let expected = bytes(&whole);
            let mut cursor = Cursor::new(&whole);
            let mut seen = Vec::new();
            let mut rest = whole.clone();
            let mut at = 0;
            for step in steps {
                let before = seen.len();
                let pushed: Result<(), ()> = cursor.take_all(step, |p, n| {
                    seen.extend((0..n).map(|i| p.addr() + i));
                    Ok(())
                });
                pushed.unwrap();
                advance(&mut rest, &mut at, seen.len() - before);
                prop_assert_eq!(bytes(&rest[at..]), &expected[seen.len()..]);
            }
            prop_assert_eq!(&seen[..], &expected[..seen.len()]);
        }
    }
}
