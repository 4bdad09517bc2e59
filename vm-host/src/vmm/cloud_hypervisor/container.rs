// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The two files that cloud-hypervisor saves a machine in, as one run of bytes.
//!
//! ```text
//! head, 40 bytes │ config.json │ state.json
//! ```
//!
//! Little-endian. The head:
//!
//! ```text
//! 0    [u8;8]   magic "chSTATE\0"
//! 8    u32      version (1)
//! 12   u32      0
//! 16   u64      CRC-64/NVME of the head with this field as zero, and of all that follows
//! 24   u64      bytes of config.json
//! 32   u64      bytes of state.json
//! ```
//!
//! Knows neither what the files say nor where they are.

use crc_fast::{CrcAlgorithm, Digest};

const MAGIC: [u8; 8] = *b"chSTATE\0";
const VERSION: u32 = 1;
const HEAD: usize = 40;

/// What a snapshot consists of, when no memory is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) config: Vec<u8>,
    pub(super) state: Vec<u8>,
}

impl Snapshot {
    pub(super) fn pack(&self) -> Vec<u8> {
        let mut packed = Vec::with_capacity(HEAD + self.config.len() + self.state.len());
        packed.extend(MAGIC);
        packed.extend(VERSION.to_le_bytes());
        packed.extend(0u32.to_le_bytes());
        packed.extend(0u64.to_le_bytes());
        for part in [&self.config, &self.state] {
            packed.extend((part.len() as u64).to_le_bytes());
        }
        packed.extend(&self.config);
        packed.extend(&self.state);
        let sum = sum(&packed);
        packed[16..24].copy_from_slice(&sum.to_le_bytes());
        packed
    }

    /// What is wrong with it is the error.
    pub(super) fn unpack(packed: &[u8]) -> Result<Self, String> {
        let Some((head, rest)) = packed.split_first_chunk::<HEAD>() else {
            return Err(format!("it has {} bytes, less than its head", packed.len()));
        };
        if !head.starts_with(&MAGIC) {
            return Err("it is none of cloud-hypervisor's".to_owned());
        }
        let version = u32::from_le_bytes(field(head, 8));
        if version != VERSION {
            return Err(format!("it has version {version}, this program knows {VERSION}"));
        }
        if u64::from_le_bytes(field(head, 16)) != sum(packed) {
            return Err("it has changed since it was saved".to_owned());
        }
        let [config, state] =
            [24, 32].map(|at| usize::try_from(u64::from_le_bytes(field(head, at))).unwrap_or(usize::MAX));
        if config.checked_add(state) != Some(rest.len()) {
            return Err(format!(
                "its parts are said to have {config} and {state} bytes, and it has {}",
                rest.len()
            ));
        }
        let (config, state) = rest.split_at(config);
        Ok(Self { config: config.to_vec(), state: state.to_vec() })
    }
}

fn sum(packed: &[u8]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&packed[..16]);
    digest.update(&[0; 8]);
    digest.update(&packed[24..]);
    digest.finalize()
}

fn field<const N: usize>(head: &[u8; HEAD], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&head[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked_and_no_byte_of_it_can_change(
            config in proptest::collection::vec(any::<u8>(), 0..100),
            state in proptest::collection::vec(any::<u8>(), 0..100),
            at in any::<prop::sample::Index>(),
            change in 1u8..,
        ) {
            let snapshot = Snapshot { config, state };
            let mut packed = snapshot.pack();
            prop_assert_eq!(Snapshot::unpack(&packed), Ok(snapshot));
            let at = at.index(packed.len());
            prop_assert!(Snapshot::unpack(&packed[..at]).is_err());
            packed[at] ^= change;
            prop_assert!(Snapshot::unpack(&packed).is_err());
        }

        #[test]
        fn nothing_is_too_odd_to_be_unpacked(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Snapshot::unpack(&bytes);
            let _ = Snapshot::unpack(&[MAGIC.as_slice(), &bytes].concat());
        }
    }

    #[test]
    fn what_is_no_snapshot_is_said_to_be_none() {
        let packed = Snapshot { config: b"{}".to_vec(), state: b"{}".to_vec() }.pack();
        let newer = {
            let mut newer = packed.clone();
            newer[8] = 2;
            newer
        };
        for (bytes, why) in [
            (&b""[..], "less than its head"),
            (&[0; 64], "none of cloud-hypervisor's"),
            (&newer, "version 2"),
            (&packed[..packed.len() - 1], "changed"),
        ] {
            assert!(Snapshot::unpack(bytes).unwrap_err().contains(why), "{why}");
        }
    }
}
