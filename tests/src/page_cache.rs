// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much of a file the kernel's page cache holds.

use std::fs::File;
use std::io;
use std::path::Path;
use std::ptr;

use anyhow::{Context, Result};
use rustix::fs::{Advice, fadvise};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::param::page_size;

/// Pages of `path` in the page cache.
pub fn resident(path: &Path) -> Result<usize> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let len = usize::try_from(file.metadata()?.len())?;
    let mut pages = vec![0u8; len.div_ceil(page_size())];
    // SAFETY: a new mapping at an address that the kernel chooses; nobody reads or writes through it.
    let at = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, &file, 0) }?;
    // SAFETY: the mapping above has `len` bytes; mincore fills one byte for each of its pages, which is how many `pages` has.
    let asked = match unsafe { libc::mincore(at, len, pages.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the mapping is this function's own.
    unsafe { munmap(at, len) }?;
    asked.context("mincore")?;
    Ok(pages.iter().filter(|page| **page & 1 != 0).count())
}

/// Makes the kernel forget what it has of `path`.
pub fn forget(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    rustix::fs::fsync(&file)?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}
