// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A saved VM in a file on secondary storage: its memory without what is zero, and its state.
//!
//! ```text
//! head, 128 bytes │ metadata │ state │ (place u64, CRC-64 of place and memory u64, 1 MiB of memory) …
//! ```
//!
//! Little-endian. The head:
//!
//! ```text
//! 0    [u8;8]   magic "vmSWAP\0\0"
//! 8    u32      version (1)
//! 12   u32      0
//! 16   u64      CRC-64/NVME of the head with this field as zero, the metadata and the state
//! 24   [u8;16]  incarnation
//! 40   u64      generation
//! 48   i64      when it was saved, milliseconds since 1970
//! 56   u64      bytes of metadata
//! 64   u64      bytes of state
//! 72   u64      bytes of memory
//! 80   u64      how many pieces of memory follow
//! ```
//!
//! The file is written under another name and renamed when it is whole and durable, so that one of its name is whole; each part has a
//! checksum, so that one that has rotted is not taken for it. The VM's record names the file before its NV-RAM is given back.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crc_fast::{CrcAlgorithm, Digest};
use memmap2::{Mmap, MmapMut, MmapOptions};
use vssd_protocol::control::ErrorCode;

use crate::fault::Fault;
use crate::nvram::{MAX_METADATA, Region, SavedHeader, SavedState, is_zero};
use crate::record::Incarnation;

const MAGIC: [u8; 8] = *b"vmSWAP\0\0";
const VERSION: u32 = 1;
const HEAD: usize = 128;
/// Small for a fuzzer, whose memory would take longer to check than all else.
pub(super) const PIECE: usize = if cfg!(fuzzing) { 4096 } else { 1 << 20 };
/// Before a piece.
const LABEL: usize = 16;
const EXTENSION: &str = "vmswap";
const ALGORITHM: CrcAlgorithm = CrcAlgorithm::Crc64Nvme;

/// Writes an image, durably, and gives its path. What was there under that name is replaced.
pub(super) fn write(
    dir: &Path,
    name: &str,
    memory: &Region,
    saved: &SavedState,
    progress: impl FnMut(u64, u64) -> io::Result<()>,
) -> Result<PathBuf, Fault> {
    let (path, part) = paths(dir, name);
    let written = fs::create_dir_all(dir)
        .and_then(|()| write_file(&part, memory, saved, progress))
        .and_then(|()| fs::rename(&part, &path))
        .and_then(|()| File::open(dir)?.sync_all());
    written.map_err(|error| {
        let _ = fs::remove_file(&part);
        Fault::new(ErrorCode::Media, format!("cannot write {}: {error}", path.display()))
            .hint("the VM is where it was; make room or see to `swap_dir`")
    })?;
    Ok(path)
}

fn write_file(
    path: &Path,
    memory: &Region,
    saved: &SavedState,
    progress: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mapping = map(memory)?;
    let mut out = BufWriter::with_capacity(PIECE + LABEL, File::create(path)?);
    write_image(&mut out, &mapping, saved, progress)?;
    out.into_inner()?.sync_all()
}

pub(super) fn write_image(
    out: &mut (impl Write + Seek),
    memory: &[u8],
    saved: &SavedState,
    mut progress: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let memory_bytes = memory.len() as u64;
    out.write_all(&[0; HEAD])?;
    out.write_all(&saved.header.metadata)?;
    out.write_all(&saved.payload)?;
    let mut pieces = 0;
    for (at, piece) in (0u64..).zip(memory.chunks(PIECE)) {
        if !is_zero(piece) {
            out.write_all(&at.to_le_bytes())?;
            out.write_all(&sum(at, piece).to_le_bytes())?;
            out.write_all(piece)?;
            pieces += 1;
        }
        progress((at + 1) * PIECE as u64, memory_bytes)?;
    }
    out.seek(SeekFrom::Start(0))?;
    out.write_all(&head(saved, memory_bytes, pieces))
}

/// Reads an image into a VM's memory, and gives the state that was saved with it.
pub(super) fn read(
    path: &Path,
    incarnation: Incarnation,
    memory: &Region,
    progress: impl FnMut(u64, u64) -> io::Result<()>,
) -> Result<SavedState, Fault> {
    let damaged = |what: String| {
        Fault::new(ErrorCode::State, format!("{} cannot be used: {what}", path.display()))
            .hint("the file is kept as it is; a copy of it, if there is one, can take its place")
    };
    let saved = read_file(path, memory, progress).map_err(|error| damaged(error.to_string()))?;
    if saved.header.incarnation == incarnation.0 {
        Ok(saved)
    } else {
        Err(damaged("it is of another run of the guest".to_owned()))
    }
}

fn read_file(
    path: &Path,
    memory: &Region,
    progress: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<SavedState> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    read_image(&mut BufReader::with_capacity(PIECE, file), length, &mut map_mut(memory)?, progress)
}

/// `length` is the input's: of what it says about its parts, no more is believed.
pub(super) fn read_image(
    input: &mut impl Read,
    length: u64,
    memory: &mut [u8],
    mut progress: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<SavedState> {
    let mut head = [0; HEAD];
    input.read_exact(&mut head)?;
    if !head.starts_with(&MAGIC) {
        return Err(invalid("it is no image of a VM"));
    }
    let version = u32::from_le_bytes(field(&head, 8));
    if version != VERSION {
        return Err(invalid(&format!("it has version {version}, this program knows {VERSION}")));
    }
    let number = |at| u64::from_le_bytes(field(&head, at));
    let (metadata_bytes, state_bytes, memory_bytes, pieces) =
        (number(56), number(64), number(72), number(80));
    // Before anything is believed, it is not let to ask for more memory than there is file.
    if metadata_bytes > MAX_METADATA as u64 || state_bytes > length {
        return Err(invalid("its head makes no sense"));
    }
    let metadata = take(input, metadata_bytes)?;
    let payload = take(input, state_bytes)?;
    let saved = SavedState {
        header: SavedHeader {
            incarnation: field(&head, 24),
            generation: number(40),
            saved_at_unix_ms: i64::from_le_bytes(field(&head, 48)),
            metadata,
        },
        payload,
    };
    if self::head(&saved, memory_bytes, pieces) != head {
        return Err(invalid("its head or state has changed since it was written"));
    }
    if memory_bytes != memory.len() as u64 {
        return Err(invalid(&format!(
            "it holds {memory_bytes} bytes of memory, and the VM has {}",
            memory.len()
        )));
    }
    let mut next = 0;
    for _ in 0..pieces {
        let mut label = [0; LABEL];
        input.read_exact(&mut label)?;
        let (at, written) = (u64::from_le_bytes(field(&label, 0)), u64::from_le_bytes(field(&label, 8)));
        let place = usize::try_from(at)
            .ok()
            .and_then(|at| at.checked_mul(PIECE))
            .filter(|&place| at >= next && place < memory.len());
        let Some(place) = place else { return Err(invalid(&format!("a piece has the place {at}"))) };
        let end = memory.len().min(place + PIECE);
        let piece = &mut memory[place..end];
        input.read_exact(piece)?;
        if sum(at, piece) != written {
            return Err(invalid(&format!(
                "its memory from byte {place} on has changed since it was written"
            )));
        }
        next = at + 1;
        progress(end as u64, memory_bytes)?;
    }
    if input.read(&mut [0])? != 0 {
        return Err(invalid("it goes on after its end"));
    }
    Ok(saved)
}

/// Removes what a daemon that was killed has left of images of a VM, but for the one that its record names.
pub(super) fn clean(dir: &Path, name: &str, image: Option<&Path>) -> Result<(), Fault> {
    let (path, part) = paths(dir, name);
    [path, part].iter().filter(|left| image != Some(left)).try_for_each(|left| remove(left))
}

/// Of an image, whole and being written. A VM's name may have dots.
fn paths(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    (dir.join(format!("{name}.{EXTENSION}")), dir.join(format!("{name}.{EXTENSION}.part")))
}

/// Removes an image that is needed no more.
pub(super) fn remove(path: &Path) -> Result<(), Fault> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Fault::new(ErrorCode::Media, format!("cannot remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

fn head(saved: &SavedState, memory_bytes: u64, pieces: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(24, &saved.header.incarnation);
    put(40, &saved.header.generation.to_le_bytes());
    put(48, &saved.header.saved_at_unix_ms.to_le_bytes());
    put(56, &(saved.header.metadata.len() as u64).to_le_bytes());
    put(64, &(saved.payload.len() as u64).to_le_bytes());
    put(72, &memory_bytes.to_le_bytes());
    put(80, &pieces.to_le_bytes());
    let mut digest = Digest::new(ALGORITHM);
    digest.update(&head);
    digest.update(&saved.header.metadata);
    digest.update(&saved.payload);
    head[16..24].copy_from_slice(&digest.finalize().to_le_bytes());
    head
}

/// Of a piece. Its place counts, or it could come to lie elsewhere.
fn sum(at: u64, piece: &[u8]) -> u64 {
    let mut digest = Digest::new(ALGORITHM);
    digest.update(&at.to_le_bytes());
    digest.update(piece);
    digest.finalize()
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn take(input: &mut impl Read, bytes: u64) -> io::Result<Vec<u8>> {
    let mut taken = Vec::new();
    if input.take(bytes).read_to_end(&mut taken)? as u64 == bytes {
        Ok(taken)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn map(memory: &Region) -> io::Result<Mmap> {
    let file = File::open(&memory.path)?;
    // SAFETY: the region is this VM's, its machine has ended, and nobody shortens its file while the medium is locked.
    unsafe { options(memory)?.map(&file) }
}

fn map_mut(memory: &Region) -> io::Result<MmapMut> {
    let file = File::options().read(true).write(true).open(&memory.path)?;
    // SAFETY: as in `map`.
    unsafe { options(memory)?.map_mut(&file) }
}

fn options(memory: &Region) -> io::Result<MmapOptions> {
    let length =
        usize::try_from(memory.bytes).map_err(|_| invalid("the memory is larger than an address space"))?;
    let mut options = MmapOptions::new();
    options.offset(memory.offset_bytes).len(length);
    Ok(options)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::nvram::{MediumConfig, Nvram, Purpose};

    #[test]
    fn what_is_broken_off_leaves_no_image_and_harms_none() {
        let dir = tempfile::tempdir().unwrap();
        let (nv, images) = (dir.path().join("nv"), dir.path().join("images"));
        fs::create_dir(&nv).unwrap();
        let nvram = Nvram::create(&MediumConfig::new("nv", &nv)).unwrap();
        let memory = nvram.allocate("a", Purpose::Memory, 4 << 20, |_, _| Ok(())).unwrap();
        File::options().write(true).open(&memory.path).unwrap().write_all_at(b"data", 3 << 20).unwrap();
        let (saved, ..) = example();
        let run = Incarnation(saved.header.incarnation);
        let broken_off = |_, _| Err(io::ErrorKind::Interrupted.into());

        write(&images, "a", &memory, &saved, broken_off).unwrap_err();
        assert_eq!(fs::read_dir(&images).unwrap().count(), 0);

        let path = write(&images, "a", &memory, &saved, |_, _| Ok(())).unwrap();
        let image = fs::read(&path).unwrap();
        read(&path, run, &memory, broken_off).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), image);
        let read = read(&path, run, &memory, |_, _| Ok(())).unwrap();
        assert_eq!((read.header, read.payload), (saved.header, saved.payload));
    }

    /// Three pieces, of which the second is zero and the third is short.
    fn example() -> (SavedState, Vec<u8>, Vec<u8>) {
        let header = SavedHeader {
            incarnation: [3; 16],
            generation: 4,
            saved_at_unix_ms: 5,
            metadata: b"{}".to_vec(),
        };
        let saved = SavedState { header, payload: b"registers".to_vec() };
        let mut memory = vec![7; 2 * PIECE + 4096];
        memory[PIECE..2 * PIECE].fill(0);
        let mut out = io::Cursor::new(Vec::new());
        write_image(&mut out, &memory, &saved, |_, _| Ok(())).unwrap();
        (saved, memory, out.into_inner())
    }

    fn read_bytes(image: &[u8], memory: &mut [u8]) -> io::Result<SavedState> {
        read_image(&mut &*image, image.len() as u64, memory, |_, _| Ok(()))
    }

    #[test]
    fn image_is_read_as_it_was_written() {
        let (saved, memory, image) = example();
        assert!(image.len() < PIECE + 8192, "zeroes take no room");
        let mut found = vec![0; memory.len()];
        assert_eq!(read_bytes(&image, &mut found).unwrap(), saved);
        assert!(found == memory);
    }

    #[test]
    fn any_byte_that_has_changed_is_found() {
        let (saved, memory, image) = example();
        let state = HEAD + saved.header.metadata.len() + saved.payload.len();
        let second = state + LABEL + PIECE;
        let mut found = vec![0; memory.len()];
        let all = (0..state + LABEL + 2).chain(second - 2..second + LABEL + 2).chain([image.len() - 1]);
        for at in all {
            let mut image = image.clone();
            image[at] ^= 1;
            assert!(read_bytes(&image, &mut found).is_err(), "byte {at}");
        }
        assert!(read_bytes(&image[..image.len() - 1], &mut found).is_err());
        assert!(read_bytes(&[&image[..], b"x"].concat(), &mut found).is_err());
    }
}
