// SPDX-License-Identifier: Apache-2.0 OR MIT

//! NV-RAM on real media: tmpfs, whatever the temporary files lie on, a plain file with extents, and hugetlbfs where
//! it is mounted with free pages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use tempfile::TempDir;
use vm_host::nvram::{
    Error, Flush, FsKind, MediumConfig, MediumKind, Nvram, PersistenceDomain, Purpose, SavedHeader,
    SlotContent, Support, Verdict, probe,
};

const MIB: u64 = 1 << 20;

/// A medium that ends with the test.
struct Medium {
    config: MediumConfig,
    _folder: TempDir,
}

fn tmpfs() -> Medium {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    Medium { config: MediumConfig::new("shm", folder.path()), _folder: folder }
}

fn disk() -> Medium {
    let folder = tempfile::tempdir().unwrap();
    Medium { config: MediumConfig::new("disk", folder.path()), _folder: folder }
}

fn file(bytes: u64) -> Medium {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("medium");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    Medium { config: MediumConfig::new("file", path), _folder: folder }
}

/// Where hugetlbfs is mounted with enough pages of 2 MiB free for one test.
fn hugetlbfs() -> Option<Medium> {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").ok()?;
    if free.trim().parse::<u64>().ok()? < 16 {
        return None;
    }
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let is_usable = |line: &&str| line.contains(" hugetlbfs ") && line.contains("pagesize=2M");
    let at = mounts.lines().find(is_usable)?.split(' ').nth(1)?;
    let folder = tempfile::tempdir_in(at).ok()?;
    Some(Medium { config: MediumConfig::new("huge", folder.path()), _folder: folder })
}

fn all() -> Vec<Medium> {
    let mut all = vec![tmpfs(), disk(), file(64 * MIB)];
    match hugetlbfs() {
        Some(medium) => all.push(medium),
        None => eprintln!("no hugetlbfs of 2 MiB pages with 16 of them free: not tested on it"),
    }
    all
}

fn no_progress(_: u64, _: u64) -> io::Result<()> {
    Ok(())
}

fn header(generation: u64) -> SavedHeader {
    SavedHeader {
        incarnation: [3; 16],
        generation,
        saved_at_unix_ms: 1_700_000_000_000,
        metadata: b"{\"vm\":\"web1\"}".to_vec(),
    }
}

fn bytes_of(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn regions_are_found_again_with_their_content() {
    for medium in all() {
        let config = &medium.config;
        let nvram = Nvram::create(config).unwrap();
        let mut told = Vec::new();
        let memory = nvram
            .allocate("web1", Purpose::Memory, 5 * MIB, |done, total| {
                told.push((done, total));
                Ok(())
            })
            .unwrap();
        let state = nvram.allocate("web1", Purpose::State, MIB, no_progress).unwrap();
        assert_eq!((memory.bytes, state.bytes), (6 * MIB, 2 * MIB), "rounded up to 2 MiB: {config:?}");
        assert!(told.is_sorted() && told.last() == Some(&(6 * MIB, 6 * MIB)), "{told:?}");
        nvram.slot(state.id).unwrap().commit(&header(4), b"registers").unwrap();
        drop(nvram);

        let nvram = Nvram::open(config).unwrap();
        let found = nvram.find("web1", Purpose::Memory).unwrap();
        assert_eq!(found, memory);
        assert_eq!(nvram.list().len(), 2);
        assert_eq!(nvram.fault(found.id).unwrap(), None);
        let backing = found.backing();
        assert_eq!(backing.size_bytes, 6 * MIB);
        assert!(backing.offset_bytes.is_multiple_of(backing.align_bytes));
        assert!(fs::metadata(&backing.mem_path).unwrap().len() >= backing.offset_bytes + backing.size_bytes);
        nvram.flush(found.id).unwrap();
        match nvram.slot(state.id).unwrap().read().unwrap() {
            SlotContent::Saved(saved) => {
                assert_eq!((saved.header, saved.payload), (header(4), b"registers".to_vec()));
            }
            other => panic!("{other:?}"),
        }
        nvram.free(found.id).unwrap();
        assert_eq!(nvram.find("web1", Purpose::Memory), None);
        assert_eq!(nvram.usage().unwrap().used_bytes, 2 * MIB);
        assert!(matches!(nvram.slot(found.id), Err(Error::NotFound { .. })));
    }
}

#[test]
fn memory_of_one_owner_is_never_seen_by_the_next() {
    for medium in all() {
        let nvram = Nvram::create(&medium.config).unwrap();
        let first = nvram.allocate("first", Purpose::Memory, 4 * MIB, no_progress).unwrap();
        if nvram.capabilities().file_system.unwrap().kind != FsKind::Hugetlbfs {
            let file = File::options().write(true).open(&first.path).unwrap();
            file.write_all_at(&vec![0xaa; 4 << 20], first.offset_bytes).unwrap();
        }
        nvram.free(first.id).unwrap();
        let second = nvram.allocate("second", Purpose::Memory, 4 * MIB, no_progress).unwrap();
        assert!(bytes_of(&second.path, second.offset_bytes, 4 << 20).iter().all(|&b| b == 0));
        if nvram.capabilities().kind == MediumKind::File {
            assert_eq!(second.offset_bytes, first.offset_bytes, "or the test shows nothing");
        }
    }
}

#[test]
fn making_that_is_broken_off_leaves_nothing() {
    for medium in all() {
        let nvram = Nvram::create(&medium.config).unwrap();
        let mut told = 0;
        let broken_off = |_, _| {
            told += 1;
            Err(io::ErrorKind::Interrupted.into())
        };
        let outcome = nvram.allocate("a", Purpose::Memory, 4 * MIB, broken_off);
        assert!(matches!(outcome, Err(Error::Io { .. })), "{outcome:?}");
        assert_eq!(told, 1);
        assert_eq!(nvram.usage().unwrap().used_bytes, 0);
        nvram.allocate("a", Purpose::Memory, 4 * MIB, no_progress).unwrap();
    }
}

#[test]
fn bytes_of_a_region_are_taken_from_the_file_system_at_once() {
    for medium in [tmpfs(), disk()] {
        let nvram = Nvram::create(&medium.config).unwrap();
        let region = nvram.allocate("a", Purpose::Memory, 8 * MIB, no_progress).unwrap();
        assert!(fs::metadata(&region.path).unwrap().blocks() * 512 >= 8 * MIB);
    }
}

#[test]
fn medium_has_one_owner_at_a_time() {
    for medium in all() {
        let nvram = Nvram::create(&medium.config).unwrap();
        assert!(matches!(Nvram::open(&medium.config), Err(Error::Locked { .. })));
        assert!(matches!(Nvram::create(&medium.config), Err(Error::Locked { .. })));
        probe(&medium.config).unwrap();
        drop(nvram);
        Nvram::open(&medium.config).unwrap();
    }
}

#[test]
fn only_a_blank_medium_is_formatted() {
    for medium in all() {
        assert!(matches!(Nvram::open(&medium.config), Err(Error::Unformatted { .. })));
        drop(Nvram::create(&medium.config).unwrap());
        assert!(matches!(Nvram::create(&medium.config), Err(Error::Medium { .. })));
        drop(Nvram::open(&medium.config).unwrap());
    }
    let foreign = file(64 * MIB);
    // Where ext4 keeps its superblock.
    let device = File::options().write(true).open(&foreign.config.path).unwrap();
    device.write_all_at(&[0x53, 0xef], 1080).unwrap();
    let before = fs::read(&foreign.config.path).unwrap();
    assert!(matches!(Nvram::open(&foreign.config), Err(Error::Damaged { .. })));
    assert!(matches!(Nvram::create(&foreign.config), Err(Error::Medium { .. })));
    assert!(fs::read(&foreign.config.path).unwrap() == before);
}

#[test]
fn medium_of_another_name_or_size_is_refused() {
    let medium = file(64 * MIB);
    drop(Nvram::create(&medium.config).unwrap());
    let renamed = MediumConfig { name: "other".to_owned(), ..medium.config.clone() };
    assert!(matches!(Nvram::open(&renamed), Err(Error::Medium { .. })));
    let file = File::options().write(true).open(&medium.config.path).unwrap();
    file.set_len(63 * MIB).unwrap();
    assert!(matches!(Nvram::open(&medium.config), Err(Error::Medium { .. })));
    file.set_len(65 * MIB).unwrap();
    Nvram::open(&medium.config).unwrap();
}

#[test]
fn directory_does_not_take_the_registry_of_a_device() {
    let (device, directory) = (file(64 * MIB), tmpfs());
    drop(Nvram::create(&device.config).unwrap());
    let head = bytes_of(&device.config.path, 0, 1 << 20);
    fs::write(directory.config.path.join("vm-nvram.registry"), head).unwrap();
    let config = MediumConfig { name: "file".to_owned(), ..directory.config.clone() };
    assert!(matches!(Nvram::open(&config), Err(Error::Medium { .. })));
}

#[test]
fn directory_that_lost_its_registry_is_not_formatted_again() {
    let medium = tmpfs();
    let nvram = Nvram::create(&medium.config).unwrap();
    let region = nvram.allocate("a", Purpose::Memory, MIB, no_progress).unwrap();
    drop(nvram);
    fs::remove_file(medium.config.path.join("vm-nvram.registry")).unwrap();
    assert!(matches!(Nvram::open(&medium.config), Err(Error::Damaged { .. })));
    assert!(matches!(Nvram::create(&medium.config), Err(Error::Damaged { .. })));
    assert!(region.path.exists());
}

#[test]
fn region_without_its_file_is_reported_and_harms_no_other() {
    let medium = tmpfs();
    let nvram = Nvram::create(&medium.config).unwrap();
    let lost = nvram.allocate("a", Purpose::State, MIB, no_progress).unwrap();
    let short = nvram.allocate("b", Purpose::State, MIB, no_progress).unwrap();
    let good = nvram.allocate("c", Purpose::State, MIB, no_progress).unwrap();
    fs::remove_file(&lost.path).unwrap();
    File::options().write(true).open(&short.path).unwrap().set_len(4096).unwrap();
    drop(nvram);
    let nvram = Nvram::open(&medium.config).unwrap();
    for region in [&lost, &short] {
        assert!(nvram.fault(region.id).unwrap().is_some());
        assert!(matches!(nvram.slot(region.id), Err(Error::Damaged { .. })));
        nvram.free(region.id).unwrap();
    }
    assert_eq!(nvram.fault(good.id).unwrap(), None);
    nvram.slot(good.id).unwrap();
}

#[test]
fn files_that_are_no_regions_are_left_alone() {
    let medium = tmpfs();
    drop(Nvram::create(&medium.config).unwrap());
    let stranger = medium.config.path.join("a.memory.00000009");
    fs::write(&stranger, "of somebody").unwrap();
    fs::write(medium.config.path.join("notes"), "of somebody").unwrap();
    let nvram = Nvram::open(&medium.config).unwrap();
    assert_eq!(nvram.strangers().unwrap(), ["a.memory.00000009"]);
    nvram.allocate("a", Purpose::Memory, MIB, no_progress).unwrap();
    assert_eq!(nvram.strangers().unwrap(), ["a.memory.00000009"]);
    assert!(stranger.exists());
}

#[test]
fn quota_and_reserve_are_kept() {
    let mut medium = file(64 * MIB);
    medium.config.reserve_bytes = 40 * MIB;
    medium.config.default_quota_bytes = Some(16 * MIB);
    medium.config.quota_bytes.insert("small".to_owned(), 2 * MIB);
    let nvram = Nvram::create(&medium.config).unwrap();
    let small = nvram.allocate("small", Purpose::Memory, 4 * MIB, no_progress);
    assert!(
        matches!(&small, Err(Error::OverQuota { owner, requested_bytes, available_bytes })
            if owner == "small" && *requested_bytes == 4 * MIB && *available_bytes == 2 * MIB),
        "{small:?}"
    );
    nvram.allocate("large", Purpose::Memory, 16 * MIB, no_progress).unwrap();
    let usage = nvram.usage().unwrap();
    assert_eq!((usage.free_bytes, usage.available_bytes), (46 * MIB, 6 * MIB));
    let refused = nvram.allocate("other", Purpose::Memory, 8 * MIB, no_progress);
    assert!(
        matches!(refused, Err(Error::NoSpace { requested_bytes, available_bytes })
            if requested_bytes == 8 * MIB && available_bytes == 6 * MIB),
        "{refused:?}"
    );
    let mut medium = tmpfs();
    medium.config.reserve_bytes = u64::MAX / 2;
    let nvram = Nvram::create(&medium.config).unwrap();
    let refused = nvram.allocate("a", Purpose::Memory, MIB, no_progress);
    assert!(matches!(refused, Err(Error::NoSpace { available_bytes: 0, .. })), "{refused:?}");
}

#[test]
fn regions_are_allocated_by_many_threads_at_once() {
    for medium in [file(64 * MIB), tmpfs()] {
        let nvram = Nvram::create(&medium.config).unwrap();
        std::thread::scope(|scope| {
            for owner in 0..8 {
                let nvram = &nvram;
                scope.spawn(move || {
                    let owner = format!("vm{owner}");
                    let first = nvram.allocate(&owner, Purpose::Memory, 2 * MIB, no_progress).unwrap();
                    nvram.free(first.id).unwrap();
                    nvram.allocate(&owner, Purpose::Memory, 4 * MIB, no_progress).unwrap();
                });
            }
        });
        let before = nvram.list();
        let mut places: Vec<_> = before.iter().map(|r| (r.path.clone(), r.offset_bytes)).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 8);
        drop(nvram);
        // Opening refuses a registry with overlaps.
        assert_eq!(Nvram::open(&medium.config).unwrap().list(), before);
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let medium = tmpfs();
    let nvram = Nvram::create(&medium.config).unwrap();
    let memory = nvram.allocate("a", Purpose::Memory, MIB, no_progress).unwrap();
    let cases = [
        ("a", Purpose::Memory, MIB),
        ("../a", Purpose::State, MIB),
        ("b", Purpose::State, 0),
        ("b", Purpose::State, u64::MAX),
        ("b", Purpose::State, 1 << 63),
    ];
    for (owner, purpose, bytes) in cases {
        let refused = nvram.allocate(owner, purpose, bytes, no_progress);
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{owner} {purpose} {bytes}: {refused:?}");
    }
    assert!(matches!(nvram.slot(memory.id), Err(Error::Invalid { .. })));
}

#[test]
fn paths_that_are_no_medium_are_refused() {
    let at = |path: &str| MediumConfig::new("m", PathBuf::from(path));
    assert!(matches!(probe(&at("/nonexistent")), Err(Error::NotFound { .. })));
    assert!(matches!(probe(&at("/dev/null")), Err(Error::Medium { .. })));
    assert!(matches!(Nvram::create(&MediumConfig::new("a/b", "/dev/shm")), Err(Error::Invalid { .. })));
    assert!(matches!(Nvram::open(&at("dev/shm")), Err(Error::Invalid { .. })));
    let small = file(3 * MIB);
    assert!(matches!(Nvram::create(&small.config), Err(Error::Medium { .. })));
}

#[test]
fn tmpfs_keeps_virtual_machines_only_where_that_is_declared() {
    let mut medium = tmpfs();
    let found = probe(&medium.config).unwrap();
    assert_eq!(found.file_system.unwrap().kind, FsKind::Tmpfs);
    assert_eq!((found.survives_reboot, found.is_dax, found.flush), (false, false, Flush::Nothing));
    assert!(matches!(found.map_sync, Support::No { .. }));
    assert_eq!(found.persistence_domain(), PersistenceDomain::Unknown);
    let Verdict::Loses { why, advice } = found.verdict() else { panic!("{:?}", found.verdict()) };
    assert!(why.contains("tmpfs") && advice.contains("declared_persistent"), "{why}; {advice}");

    medium.config.declared_persistent = true;
    let verdict = probe(&medium.config).unwrap().verdict();
    assert!(verdict.keeps(), "{verdict:?}");
}

#[test]
fn page_cache_is_not_taken_for_nvram() {
    for medium in [disk(), file(64 * MIB)] {
        let found = probe(&medium.config).unwrap();
        // Unless the tests' temporary files lie on something special.
        if found.is_dax || found.file_system.unwrap().kind == FsKind::Tmpfs {
            continue;
        }
        assert_eq!((found.survives_reboot, found.flush), (false, Flush::Sync));
        let Verdict::Loses { why, advice } = found.verdict() else { panic!("{:?}", found.verdict()) };
        assert!(why.contains("without DAX") && advice.contains("dax"), "{why}; {advice}");
    }
}

#[test]
fn probing_changes_nothing() {
    let medium = file(64 * MIB);
    let content: Vec<u8> = (0..8192u32).flat_map(u32::to_le_bytes).collect();
    File::options().write(true).open(&medium.config.path).unwrap().write_all_at(&content, 0).unwrap();
    probe(&medium.config).unwrap();
    assert!(bytes_of(&medium.config.path, 0, content.len()) == content);
    assert_eq!(fs::metadata(&medium.config.path).unwrap().len(), 64 * MIB);
    let medium = disk();
    probe(&medium.config).unwrap();
    assert_eq!(fs::read_dir(&medium.config.path).unwrap().count(), 0);
}

#[test]
fn capabilities_are_told_as_json() {
    for medium in all() {
        eprintln!("{}", serde_json::to_string(&probe(&medium.config).unwrap()).unwrap());
    }
    let found = probe(&tmpfs().config).unwrap();
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json["kind"], "directory");
    assert_eq!(json["file_system"]["kind"], "tmpfs");
    assert_eq!(json["alignment_bytes"], 2 * MIB);
    assert!(json["user_faults"]["write_protect"]["support"].is_string());
    assert_eq!(serde_json::to_value(found.verdict()).unwrap()["verdict"], "loses");
}

#[test]
fn configuration_is_read_with_defaults_and_without_surprises() {
    let config: MediumConfig = serde_json::from_str(r#"{"name": "pmem0", "path": "/mnt/pmem0"}"#).unwrap();
    assert_eq!(config, MediumConfig::new("pmem0", "/mnt/pmem0"));
    assert!(
        serde_json::from_str::<MediumConfig>(r#"{"name": "a", "path": "/a", "resrve_bytes": 1}"#).is_err()
    );
}

/// No test of time, which depends on the machine: prints what each medium takes.
#[test]
fn large_states_are_saved_again_and_again() {
    for medium in all() {
        let nvram = Nvram::create(&medium.config).unwrap();
        let region = nvram.allocate("a", Purpose::State, 16 * MIB, no_progress).unwrap();
        let slot = nvram.slot(region.id).unwrap();
        let payload = vec![0x5a; 300 << 10];
        let mut times: Vec<_> = (0..50)
            .map(|generation| {
                let start = Instant::now();
                slot.commit(&header(generation), &payload).unwrap();
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        let start = Instant::now();
        match slot.read().unwrap() {
            SlotContent::Saved(saved) => assert!(saved.header == header(49) && saved.payload == payload),
            other => panic!("{other:?}"),
        }
        eprintln!(
            "{:?} {:?}: commit of 300 KiB p50 {:?}, max {:?}; read {:?}",
            nvram.capabilities().kind,
            nvram.capabilities().file_system.unwrap().kind,
            times[25],
            times[49],
            start.elapsed()
        );
    }
}
