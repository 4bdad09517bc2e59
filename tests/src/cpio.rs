// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes an initramfs: the "newc" cpio format of the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.
//!
//! Written here rather than with the `cpio` tool so that no staging tree with root's ownership is needed and the
//! same input gives the same bytes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;
const TRAILER: &str = "TRAILER!!!";

/// The tree, by path without a leading slash. A later entry for the same path replaces an earlier one, except that
/// a link never replaces a file.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Archive {
    /// Adds a folder and those above it.
    pub fn directory(&mut self, path: &str) {
        let mut end = 0;
        while let Some(slash) = path[end..].find('/') {
            end += slash;
            self.entries.entry(path[..end].to_owned()).or_insert((DIRECTORY, Vec::new()));
            end += 1;
        }
        self.entries.entry(path.to_owned()).or_insert((DIRECTORY, Vec::new()));
    }

    fn parent(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, bytes: Vec<u8>, mode: u32) {
        self.parent(path);
        self.entries.insert(path.to_owned(), (FILE | mode, bytes));
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parent(path);
        let link = (LINK, target.as_bytes().to_vec());
        let taken = self.entries.get(path).is_some_and(|(mode, _)| mode & 0o170_000 == FILE);
        if !taken {
            self.entries.insert(path.to_owned(), link);
        }
    }

    /// The archive's bytes. Parents sort before what they hold, as the kernel needs them.
    pub fn finish(self) -> Vec<u8> {
        let mut out = Vec::new();
        for (inode, (path, (mode, bytes))) in (1..).zip(&self.entries) {
            member(&mut out, inode, path, *mode, bytes);
        }
        member(&mut out, 0, TRAILER, 0, &[]);
        pad(&mut out, 512);
        out
    }
}

fn member(out: &mut Vec<u8>, inode: u32, path: &str, mode: u32, bytes: &[u8]) {
    let links = 1 + u32::from(mode == DIRECTORY);
    let mut header = String::from("070701");
    // inode mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
    for field in [inode, mode, 0, 0, links, 0] {
        let _ = write!(header, "{field:08x}");
    }
    let _ = write!(header, "{:08x}", bytes.len());
    header.push_str(&"0".repeat(32));
    let _ = write!(header, "{:08x}{:08x}", path.len() + 1, 0);
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out, 4);
    out.extend_from_slice(bytes);
    pad(out, 4);
}

fn pad(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_has_the_newc_layout() {
        let mut archive = Archive::default();
        archive.file("a/b", b"hello".to_vec(), 0o644);
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        let second = text.find("000081a4").map(|at| at - 14).unwrap();
        assert_eq!(&text[second..second + 6], "070701");
        assert_eq!(&text[second + 54..second + 62], "00000005", "size");
        assert_eq!(&text[second + 94..second + 102], "00000004", "name with its zero");
        assert_eq!(second % 4, 0);
        assert!(text.contains("TRAILER!!!"));
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn folders_come_before_what_they_hold_and_links_do_not_replace_files() {
        let mut archive = Archive::default();
        archive.file("usr/bin/dd", b"real".to_vec(), 0o755);
        archive.link("usr/bin/dd", "/busybox");
        let order: Vec<_> = archive.entries.keys().cloned().collect();
        assert_eq!(order, ["usr", "usr/bin", "usr/bin/dd"]);
        assert_eq!(archive.entries["usr/bin/dd"].1, b"real");
    }
}
