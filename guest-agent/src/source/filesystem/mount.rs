// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which file system lies on a disk: from `/proc/self/mountinfo` and sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{AgentError, Result};

const SECTOR: u64 = 512;

/// A mounted file system and where on its disk it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) point: PathBuf,
    pub(crate) place: Place,
    pub(crate) read_only: bool,
    pub(crate) is_xfs: bool,
}

/// Where on a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// 0 unless it is a partition.
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct Line {
    device: String,
    root: String,
    point: PathBuf,
    options: String,
    kind: String,
    source: String,
}

/// Finds the one file system on `disk`, or the one at `wanted`.
pub(crate) fn find(disk: &str, wanted: Option<&Path>) -> Result<Mount> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(|source| AgentError::io("read", path, source))?;
    choose(disk, wanted, text.lines().filter_map(parse), |device| place_on(disk, device))
}

fn choose(
    disk: &str,
    wanted: Option<&Path>,
    lines: impl Iterator<Item = Line>,
    place_on: impl Fn(&str) -> Option<Place>,
) -> Result<Mount> {
    let not_mounted = |what: String| AgentError::NotMounted { disk: disk.to_owned(), what };
    let mut found: Option<(Line, Place)> = None;
    for line in lines {
        if wanted.is_some_and(|wanted| wanted != line.point) || line.root != "/" {
            continue;
        }
        let Some(place) = place_on(&line.device) else {
            // Some file systems have a device number of their own.
            let is_here = wanted.is_some()
                || line.source.strip_prefix("/dev/").is_some_and(|source| source.starts_with(disk));
            if is_here && line.kind == "btrfs" {
                return Err(AgentError::Unsuitable {
                    path: line.point,
                    what: "btrfs moves the blocks of a file; they cannot be given away".to_owned(),
                });
            }
            if wanted.is_some() {
                return Err(not_mounted(format!("{} lies on {}", line.point.display(), line.source)));
            }
            continue;
        };
        if line.kind != "ext4" && line.kind != "xfs" {
            return Err(AgentError::Unsuitable {
                what: format!("{} is not supported", line.kind),
                path: line.point,
            });
        }
        match &found {
            // Mounted at several places: the first will do.
            Some((_, other)) if *other == place => {}
            Some((other, _)) => {
                return Err(not_mounted(format!(
                    "{} and {} lie on it, and the configuration does not say which is meant",
                    other.point.display(),
                    line.point.display()
                )));
            }
            None => found = Some((line, place)),
        }
    }
    let (line, place) = found.ok_or_else(|| not_mounted("nothing on it is mounted".to_owned()))?;
    let read_only = line.options.split(',').any(|option| option == "ro");
    Ok(Mount { is_xfs: line.kind == "xfs", point: line.point, place, read_only })
}

/// `36 35 253:1 / /mnt rw,noatime shared:1 - ext4 /dev/vda1 rw` (proc(5)).
fn parse(line: &str) -> Option<Line> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let (device, root, point, options) = (left.next()?, left.next()?, left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, source, of_all) = (right.next()?, right.next()?, right.next().unwrap_or_default());
    Some(Line {
        device: device.to_owned(),
        root: unescape(root),
        point: PathBuf::from(unescape(point)),
        options: format!("{options},{of_all}"),
        kind: kind.to_owned(),
        source: unescape(source),
    })
}

/// Blanks and the like are written as three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal =
            tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Where on `disk` the block device with this number lies, if it is the disk or a partition of it.
fn place_on(disk: &str, device: &str) -> Option<Place> {
    let path = fs::canonicalize(Path::new("/sys/dev/block").join(device)).ok()?;
    let bytes = |file: &str| -> Option<u64> {
        let sectors: u64 = fs::read_to_string(path.join(file)).ok()?.trim().parse().ok()?;
        sectors.checked_mul(SECTOR)
    };
    let len = bytes("size")?;
    if path.file_name()? == disk {
        return Some(Place { offset: 0, len });
    }
    let is_part = path.parent()?.file_name()? == disk && path.join("partition").exists();
    if is_part { Some(Place { offset: bytes("start")?, len }) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r"22 1 0:2 / / rw - rootfs rootfs rw
36 22 253:0 / /data rw,noatime shared:1 - ext4 /dev/vda rw
37 22 253:16 / /mnt/two\040words ro - xfs /dev/vdb rw
38 22 253:33 / /part rw - ext4 /dev/vdc1 ro
39 22 253:0 /inner /bind rw - ext4 /dev/vda rw
40 22 253:0 / /again rw - ext4 /dev/vda rw
41 22 0:44 / /btr rw - btrfs /dev/vdd rw,subvol=/
42 22 253:64 / /two rw - ext4 /dev/vde1 rw
43 22 253:65 / /too rw - ext4 /dev/vde2 rw
44 22 253:80 / /fat rw - vfat /dev/vdf rw
";

    fn place(disk: &str, device: &str) -> Option<Place> {
        let (name, offset) = match device {
            "253:0" => ("vda", 0),
            "253:16" => ("vdb", 0),
            "253:33" => ("vdc", 1 << 20),
            "253:64" => ("vde", 1 << 20),
            "253:65" => ("vde", 1 << 30),
            "253:80" => ("vdf", 0),
            _ => return None,
        };
        (name == disk).then_some(Place { offset, len: 1 << 30 })
    }

    fn at(disk: &str, wanted: Option<&str>) -> Result<Mount> {
        choose(disk, wanted.map(Path::new), TEXT.lines().filter_map(parse), |device| place(disk, device))
    }

    #[test]
    fn the_file_system_of_a_disk_is_found() {
        let mount = |point: &str, offset, read_only| Mount {
            point: point.into(),
            place: Place { offset, len: 1 << 30 },
            read_only,
            is_xfs: point == "/mnt/two words",
        };
        assert_eq!(at("vda", None).unwrap(), mount("/data", 0, false));
        assert_eq!(at("vda", Some("/again")).unwrap(), mount("/again", 0, false));
        assert_eq!(at("vdb", None).unwrap(), mount("/mnt/two words", 0, true));
        assert_eq!(at("vdc", None).unwrap(), mount("/part", 1 << 20, true));
        assert_eq!(at("vde", Some("/too")).unwrap(), mount("/too", 1 << 30, false));
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_reason() {
        for (disk, wanted, code, word) in [
            ("vdz", None, "E_NOT_MOUNTED", "nothing on it"),
            ("vda", Some("/bind"), "E_NOT_MOUNTED", "nothing on it"),
            ("vda", Some("/part"), "E_NOT_MOUNTED", "lies on /dev/vdc1"),
            ("vdd", None, "E_UNSUITABLE", "btrfs"),
            ("vde", None, "E_NOT_MOUNTED", "which is meant"),
            ("vdf", None, "E_UNSUITABLE", "vfat"),
        ] {
            let error = at(disk, wanted).unwrap_err();
            assert_eq!(error.code(), code, "{disk} {wanted:?}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
