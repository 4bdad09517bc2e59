// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What `dmsetup` prints: tables, the state of devices, and a cache's counters. Pure.
//!
//! ```text
//!   dmsetup info, table ──► View (devices, segments) ──► CacheTable ──► a line to load
//!   dmsetup status ──► CacheStatus
//! ```
//!
//! The formats are those of `Documentation/admin-guide/device-mapper/cache.rst` and `dmsetup(8)`. Words behind those it knows are
//! carried along or ignored, for kernels add some. It does not know which device is whose.

use std::fmt;

/// The fields that [`View::parse`] wants of `dmsetup info -c --noheadings --separator /`: no name has a slash in it.
pub(super) const INFO_FIELDS: &str = "devno,suspended,tables_loaded,open,uuid,name";
/// The feature that sends each write to the origin, too.
pub(super) const WRITETHROUGH: &str = "writethrough";
/// The features of which a table has at most one.
const IO_MODES: [&str; 3] = ["writeback", WRITETHROUGH, "passthrough"];
/// The policy that writes back all that is dirty, and moves nothing.
pub(super) const CLEANER: &str = "cleaner";
const MIGRATION: &str = "migration_threshold";
/// Sectors that a cache may write back at a time while it is cleaned: 32 MiB. The kernel's cleaner holds back what was used in the last 20 s
/// unless the cache is idle, and a cache is idle from its table's first moment to its first request: so much is written back at once.
const BURST: u32 = 65536;

/// Every device-mapper device, as of a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    pub(super) devices: Vec<Device>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) name: String,
    /// `254:3`.
    pub(super) number: String,
    pub(super) uuid: String,
    pub(super) is_suspended: bool,
    pub(super) has_inactive: bool,
    pub(super) is_open: bool,
    /// Of its live table; in order.
    pub(super) segments: Vec<Segment>,
}

/// A line of a table. Sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) target: String,
    pub(super) args: Vec<String>,
}

impl Segment {
    /// `0 262144 linear 253:0 2048`.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, len) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let target = words.next()?.to_owned();
        Some(Self { start, len, target, args: words.map(str::to_owned).collect() })
    }

    /// If it is a piece of `disk`, where that begins there.
    pub(super) fn offset_on(&self, disk: &str) -> Option<u64> {
        match self.args.as_slice() {
            [device, offset] if self.target == "linear" && device == disk => offset.parse().ok(),
            _ => None,
        }
    }

    /// Whether it uses `disk` in any way.
    pub(super) fn uses(&self, disk: &str) -> bool {
        self.args.iter().any(|arg| arg == disk)
    }
}

impl View {
    /// From what `dmsetup info` and `dmsetup table` print. A device that only one of them knows came or went in between.
    pub(super) fn parse(info: &str, table: &str) -> Option<Self> {
        let mut devices = Vec::new();
        // "No devices found" when there are none.
        for line in info.lines().filter(|line| line.contains('/')) {
            let mut fields = line.trim().splitn(6, '/');
            let mut next = || fields.next().map(str::trim);
            let (number, suspended, tables, open) = (next()?, next()?, next()?, next()?);
            let (uuid, name) = (next()?, next()?);
            devices.push(Device {
                name: name.to_owned(),
                number: number.to_owned(),
                uuid: uuid.to_owned(),
                // With its name as the value in some versions.
                is_suspended: matches!(suspended, "1" | "Suspended"),
                has_inactive: matches!(tables, "Inactive" | "Both"),
                is_open: open != "0",
                segments: Vec::new(),
            });
        }
        for line in table.lines() {
            let Some((name, rest)) = line.split_once(": ") else { continue };
            if let Some(device) = devices.iter_mut().find(|device| device.name == name)
                && !rest.trim().is_empty()
            {
                device.segments.push(Segment::parse(rest)?);
            }
        }
        Some(Self { devices })
    }

    pub(super) fn named(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    pub(super) fn numbered(&self, number: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.number == number)
    }
}

/// How a cache works, apart from the devices it lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mode {
    features: Vec<String>,
    policy: String,
    policy_args: Vec<String>,
}

impl Mode {
    /// `1 writeback smq 2 migration_threshold 4096`, as a table has it; what follows is ignored.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_ascii_whitespace();
        Self::take(&mut words)
    }

    fn take<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Self> {
        let features = counted(words)?;
        let policy = words.next()?.to_owned();
        // Tables that were loaded without policy arguments have no count of them in some versions.
        let policy_args = counted(words).unwrap_or_default();
        Some(Self { features, policy, policy_args })
    }

    /// Whether no write can make a block dirty.
    pub(super) fn keeps_clean(&self) -> bool {
        self.features.iter().any(|feature| feature == WRITETHROUGH || feature == "passthrough")
    }

    pub(super) fn is_cleaner(&self) -> bool {
        self.policy == CLEANER
    }

    /// The same with nothing becoming dirty any more, and what is dirty being written back.
    pub(super) fn cleaning(&self) -> Self {
        let mut features: Vec<_> =
            self.features.iter().filter(|word| !IO_MODES.contains(&word.as_str())).cloned().collect();
        features.push(WRITETHROUGH.to_owned());
        let policy_args = vec![MIGRATION.to_owned(), BURST.to_string()];
        Self { features, policy: CLEANER.to_owned(), policy_args }
    }

    /// The same with a threshold that was set by a message, and that no table has therefore.
    pub(super) fn with_threshold(mut self, threshold: Option<&str>) -> Self {
        /// The kernel's.
        const DEFAULT: &str = "2048";
        let Some(threshold) = threshold else { return self };
        let at = self.policy_args.chunks(2).position(|pair| pair.first().is_some_and(|key| key == MIGRATION));
        match at {
            Some(at) => {
                self.policy_args.truncate(self.policy_args.len() / 2 * 2);
                if let Some(value) = self.policy_args.get_mut(at * 2 + 1) {
                    threshold.clone_into(value);
                }
            }
            None if threshold == DEFAULT => {}
            None => self.policy_args.extend([MIGRATION.to_owned(), threshold.to_owned()]),
        }
        self
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, words: &[String]| {
            write!(f, "{}", words.len())?;
            words.iter().try_for_each(|word| write!(f, " {word}"))
        };
        list(f, &self.features)?;
        write!(f, " {} ", self.policy)?;
        list(f, &self.policy_args)
    }
}

/// A count and so many words.
fn counted<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Vec<String>> {
    let count: usize = words.next()?.parse().ok()?;
    let list: Vec<_> = words.take(count).map(str::to_owned).collect();
    (list.len() == count).then_some(list)
}

/// `<start> <len> cache <metadata dev> <cache dev> <origin dev> <block size> <#features> … <policy> <#args> …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CacheTable {
    /// Of the cached device.
    sectors: u64,
    pub(super) metadata: String,
    pub(super) fast: String,
    pub(super) origin: String,
    pub(super) block_sectors: u64,
    pub(super) mode: Mode,
}

impl CacheTable {
    pub(super) fn parse(segments: &[Segment]) -> Option<Self> {
        let [Segment { start: 0, len, target, args }] = segments else { return None };
        if target != "cache" {
            return None;
        }
        let mut words = args.iter().map(String::as_str);
        let mut device = || words.next().map(str::to_owned);
        let (metadata, fast, origin) = (device()?, device()?, device()?);
        let block_sectors = words.next()?.parse().ok().filter(|&size| size > 0)?;
        let mode = Mode::take(&mut words)?;
        Some(Self { sectors: *len, metadata, fast, origin, block_sectors, mode })
    }

    /// The line to load for the same cache with other parts.
    pub(super) fn line(&self, fast: &str, mode: &Mode) -> String {
        let Self { sectors, metadata, origin, block_sectors, .. } = self;
        format!("0 {sectors} cache {metadata} {fast} {origin} {block_sectors} {mode}")
    }
}

/// What a cache says of itself. Counters are since it was made, those of demotions and promotions since its table was loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CacheStatus {
    /// Blocks of metadata that are free, of 4 KiB.
    pub(super) free_metadata: u64,
    pub(super) used: u64,
    pub(super) total: u64,
    pub(super) dirty: u64,
    pub(super) counters: Counters,
    pub(super) threshold: Option<String>,
    /// It is not as it should be: what is wrong with its metadata.
    pub(super) fault: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) demotions: u64,
    pub(super) promotions: u64,
}

impl CacheStatus {
    /// `0 8388608 cache 8 72/2048 128 96/4096 12 3 4 5 0 96 7 1 writeback 2 migration_threshold 2048 smq 0 rw - `
    pub(super) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace().skip(2);
        if words.next()? != "cache" {
            return None;
        }
        let first = words.next()?;
        // In place of all that follows.
        if first == "Fail" || first == "Error" {
            return Some(Self { fault: Some(format!("its state is {first}")), ..Self::default() });
        }
        let (used_metadata, all_metadata) = fraction(words.next()?)?;
        let _block_size = words.next()?;
        let (used, total) = fraction(words.next()?)?;
        let mut number = || words.next()?.parse::<u64>().ok();
        let [read_hits, read_misses, write_hits, write_misses] = [number()?, number()?, number()?, number()?];
        let (demotions, promotions, dirty) = (number()?, number()?, number()?);
        let _features = counted(&mut words)?;
        let core = counted(&mut words)?;
        let threshold =
            core.chunks(2).find(|pair| pair[0] == MIGRATION).and_then(|pair| pair.get(1)).cloned();
        let _policy = words.next();
        let _policy_args = counted(&mut words);
        let (access, check) = (words.next().unwrap_or("rw"), words.next().unwrap_or("-"));
        let fault = match (access, check) {
            (_, "needs_check") => Some("its metadata must be checked and repaired".to_owned()),
            ("ro", _) => Some("its metadata is read-only".to_owned()),
            _ => None,
        };
        Some(Self {
            free_metadata: all_metadata.saturating_sub(used_metadata),
            used,
            total,
            dirty,
            counters: Counters {
                hits: read_hits + write_hits,
                misses: read_misses + write_misses,
                demotions,
                promotions,
            },
            threshold,
            fault,
        })
    }
}

fn fraction(text: &str) -> Option<(u64, u64)> {
    let (part, whole) = text.split_once('/')?;
    Some((part.parse().ok()?, whole.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str =
        "254:0/0/Live/1//meta\n254:1/0/Live/1//fast\n254:2/1/Both/2/LVM-x/cached\n254:3/0/None/0//idle\n";
    const TABLE: &str = "cached: 0 41943040 cache 254:0 254:1 8:32 512 1 writeback smq 2 migration_threshold 8192\n\
        fast: 0 262144 linear 253:0 8192\nidle: \nmeta: 0 8192 linear 253:0 0\nnew: 0 1 error \n";

    fn cache(args: &str) -> Option<CacheTable> {
        CacheTable::parse(&[Segment::parse(&format!("0 1000 {args}"))?])
    }

    #[test]
    fn devices_and_their_tables_are_put_together() {
        let view = View::parse(INFO, TABLE).unwrap();
        let cached = view.named("cached").unwrap();
        assert!(cached.is_suspended && cached.has_inactive && cached.is_open && cached.uuid == "LVM-x");
        let table = CacheTable::parse(&cached.segments).unwrap();
        let fast = view.numbered(&table.fast).unwrap();
        assert_eq!((fast.name.as_str(), table.block_sectors, fast.is_suspended), ("fast", 512, false));
        assert_eq!(fast.segments[0].offset_on("253:0"), Some(8192));
        assert_eq!(fast.segments[0].offset_on("253:16"), None);
        assert!(fast.segments[0].uses("253:0") && !cached.segments[0].uses("253:0"));
        let idle = view.named("idle").unwrap();
        assert!(idle.segments.is_empty() && !idle.is_open && !idle.has_inactive);
        assert_eq!(view.devices.len(), 4, "one that came in between is not seen");
        assert_eq!(View::parse("No devices found\n", "No devices found\n").unwrap(), View::default());
        assert_eq!(View::parse("254:0/0/Live/1//a\n", "a: 0 many linear 1:1 0\n"), None);
    }

    #[test]
    fn a_line_to_load_is_the_same_but_for_what_is_to_change() {
        // The examples of the kernel's documentation, device numbers in place of names.
        let documented = [
            "cache 8:1 8:2 8:3 512 1 writeback default 0",
            "cache 8:1 8:2 8:3 1024 1 writeback mq 4 sequential_threshold 1024 random_threshold 8",
            "cache 8:1 8:2 8:3 128 2 metadata2 writethrough smq 0",
        ];
        for args in documented {
            let table = cache(args).unwrap();
            assert_eq!(table.line("8:2", &table.mode), format!("0 1000 {args}"));
        }
        let table = cache(documented[1]).unwrap();
        assert_eq!(
            table.line("254:9", &table.mode.cleaning()),
            "0 1000 cache 8:1 254:9 8:3 1024 1 writethrough cleaner 2 migration_threshold 65536"
        );
        assert!(!table.mode.keeps_clean() && table.mode.cleaning().keeps_clean());
        let table = cache("cache 8:1 8:2 8:3 64 1 metadata2 smq 2 migration_threshold 100").unwrap();
        assert_eq!(
            table.mode.cleaning().to_string(),
            "2 metadata2 writethrough cleaner 2 migration_threshold 65536"
        );
        assert_eq!(Mode::parse(&table.mode.to_string()), Some(table.mode));
        for bad in [
            "linear 8:1 0",
            "cache 8:1 8:2 8:3 0 0 smq 0",
            "cache 8:1 8:2 8:3 64 3 writeback smq",
            "cache 8:1 8:2 8:3",
            "cache 8:1 8:2 8:3 64 0",
        ] {
            assert_eq!(cache(bad), None, "{bad}");
        }
        let segment = |start| Segment { start, len: 1, target: "cache".to_owned(), args: Vec::new() };
        assert_eq!(CacheTable::parse(&[segment(0), segment(1)]), None);
    }

    #[test]
    fn a_threshold_that_was_set_by_message_is_carried_along() {
        let mode = |text: &str, threshold| Mode::parse(text).unwrap().with_threshold(threshold).to_string();
        assert_eq!(mode("1 writeback smq 0", Some("2048")), "1 writeback smq 0");
        assert_eq!(mode("1 writeback smq 0", Some("50000")), "1 writeback smq 2 migration_threshold 50000");
        assert_eq!(mode("0 smq 2 migration_threshold 9", Some("7")), "0 smq 2 migration_threshold 7");
        assert_eq!(mode("0 smq 2 migration_threshold 9", None), "0 smq 2 migration_threshold 9");
    }

    #[test]
    fn status_is_read_whatever_else_it_says() {
        let line = "0 8388608 cache 8 72/2048 128 96/4096 12 3 4 5 2 98 7 1 writeback 2 migration_threshold 2048 smq 0 rw - more\n";
        let status = CacheStatus::parse(line).unwrap();
        assert_eq!((status.free_metadata, status.used, status.total, status.dirty), (1976, 96, 4096, 7));
        assert_eq!(status.counters, Counters { hits: 16, misses: 8, demotions: 2, promotions: 98 });
        assert_eq!((status.threshold.as_deref(), &status.fault), (Some("2048"), &None));
        // Of kernels without the last two words.
        let old = line.split(" rw").next().unwrap();
        assert_eq!(CacheStatus::parse(old).unwrap(), status);
        for (words, fault) in [("rw needs_check", "repaired"), ("ro -", "read-only")] {
            let line = line.replace("rw -", words);
            assert!(CacheStatus::parse(&line).unwrap().fault.unwrap().contains(fault));
        }
        assert!(CacheStatus::parse("0 1000 cache Fail").unwrap().fault.unwrap().contains("Fail"));
        for bad in ["", "0 1 linear 8:1 0", "0 1 cache 8 1/2", &line.replace("96/4096", "96"), "0 1 cache"] {
            assert_eq!(CacheStatus::parse(bad), None, "{bad}");
        }
    }
}
