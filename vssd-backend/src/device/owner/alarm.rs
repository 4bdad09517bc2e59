// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tells operators when the pool runs low, by edge: once when it gets there, once when it has left with a margin.

use serde_json::{Value, json};
use vssd_pool::PoolInfo;

/// While a front-end is connected, space can go without the owner's doing: look again after this time.
const LOOK_AGAIN_MS: u64 = 10_000;
/// Never look more often than this.
const MIN_GAP_MS: u64 = 1_000;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    #[default]
    Ok,
    Low,
    Full,
}

/// Watches the pool's space and health.
#[derive(Clone, Debug, Default)]
pub(super) struct Alarm {
    level: Level,
    failed: bool,
    due: Option<u64>,
    last: Option<u64>,
}

impl Alarm {
    /// When to look next.
    pub(super) fn due(&self) -> Option<u64> {
        self.due
    }

    /// Something changed: look soon.
    pub(super) fn soon(&mut self, now: u64) {
        let at = self.last.map_or(now, |last| now.max(last + MIN_GAP_MS));
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// What is to be told.
    pub(super) fn check(&mut self, info: &PoolInfo, now: u64, connected: bool) -> Vec<(&'static str, Value)> {
        self.last = Some(now);
        self.due = connected.then_some(now + LOOK_AGAIN_MS);
        let mut news = Vec::new();
        let bytes = |blocks: u64| blocks.saturating_mul(info.block_size.bytes());
        let unused = u64::from(info.total_blocks.saturating_sub(info.leased_blocks));
        let level = self.next_level(info, unused);
        if level != self.level {
            let event = match level {
                Level::Ok => "pool.ok",
                Level::Low => "pool.low",
                Level::Full => "pool.full",
            };
            self.level = level;
            let data = json!({
                "size_bytes": bytes(info.total_blocks.into()),
                "unused_bytes": bytes(unused),
                "promised_bytes": bytes(info.promised_blocks),
                "promisable_bytes": bytes(info.promisable_blocks),
            });
            news.push((event, data));
        }
        if info.failed && !self.failed {
            news.push((
                "pool.failed",
                json!({ "reason": problem(info), "hint": "see the daemon's log, then restart it" }),
            ));
        }
        self.failed = info.failed;
        news
    }

    fn next_level(&self, info: &PoolInfo, unused: u64) -> Level {
        let total = u64::from(info.total_blocks).max(1);
        let promisable = info.promisable_blocks.max(1);
        let promised_percent = info.promised_blocks.saturating_mul(100) / promisable;
        let unused_percent = unused.saturating_mul(100) / total;
        let reached = if unused_percent < 1 {
            Level::Full
        } else if promised_percent >= 85 || unused_percent < 10 {
            Level::Low
        } else {
            Level::Ok
        };
        // Leaving takes a margin, or a pool at the border would alarm for ever.
        let still_low = promised_percent >= 80 || unused_percent < 15;
        let still_full = unused_percent < 3;
        match (self.level, reached) {
            (Level::Full, Level::Low | Level::Ok) if still_full => Level::Full,
            (Level::Full | Level::Low, Level::Ok) if still_low => Level::Low,
            _ => reached,
        }
    }
}

/// What made a pool fail and what to do, for people.
pub(super) fn problem(info: &PoolInfo) -> Option<String> {
    let lost = info.media.iter().find(|medium| medium.is_lost);
    match lost {
        Some(medium) => Some(format!(
            "medium {} has lost part of what it held: its file was shortened, or its filesystem has no room for it; \
             make room or bring a copy back, then restart the daemon",
            medium.path.display()
        )),
        None => info.failed.then(|| {
            "a write to a medium failed and nothing new is acknowledged; see the daemon's log, then restart it".to_owned()
        }),
    }
}

/// One word for a pool's health.
pub(super) fn health(info: &PoolInfo) -> &'static str {
    if info.failed {
        return "failed";
    }
    let unused = u64::from(info.total_blocks.saturating_sub(info.leased_blocks));
    if Alarm::default().next_level(info, unused) == Level::Ok { "ok" } else { "low" }
}

#[cfg(test)]
mod tests {
    use vssd_pool::Uuid;
    use vssd_protocol::units::BlockSize;

    use super::*;

    fn info(promised: u64, leased: u32) -> PoolInfo {
        PoolInfo {
            name: "p".into(),
            uuid: Uuid([0; 16]),
            block_size: BlockSize::DEFAULT,
            media: Vec::new(),
            read_only: false,
            total_blocks: 1000,
            free_blocks: 1000 - leased,
            scrubbing_blocks: 0,
            leased_blocks: leased,
            reserved_blocks: 0,
            promised_blocks: promised,
            promisable_blocks: 1000,
            overcommit_percent: 100,
            journal_used_bytes: 0,
            journal_bytes: 0,
            checkpoints: 0,
            logical_block_bytes: 512,
            failed: false,
        }
    }

    #[test]
    fn each_level_is_told_once_and_left_with_a_margin() {
        let mut alarm = Alarm::default();
        let mut told = Vec::new();
        for (promised, leased) in [
            (0, 0),
            (849, 0),
            (850, 0),
            (900, 0),
            (840, 0),
            (850, 0),
            (799, 0),
            (0, 901),
            (0, 996),
            (0, 980),
            (0, 500),
        ] {
            told.extend(alarm.check(&info(promised, leased), 0, false).into_iter().map(|(event, _)| event));
        }
        assert_eq!(told, ["pool.low", "pool.ok", "pool.low", "pool.full", "pool.ok"]);
    }

    #[test]
    fn failure_is_told_once() {
        let mut alarm = Alarm::default();
        let broken = PoolInfo { failed: true, ..info(0, 0) };
        assert_eq!(alarm.check(&broken, 0, false)[0].0, "pool.failed");
        assert!(alarm.check(&broken, 0, false).is_empty());
        assert_eq!(health(&broken), "failed");
    }

    #[test]
    fn nobody_connected_means_no_timer() {
        let mut alarm = Alarm::default();
        alarm.soon(5);
        assert_eq!(alarm.due(), Some(5));
        alarm.check(&info(0, 0), 5, false);
        assert_eq!(alarm.due(), None);
        alarm.soon(6);
        assert_eq!(alarm.due(), Some(5 + MIN_GAP_MS));
        alarm.check(&info(0, 0), 2_000, true);
        assert_eq!(alarm.due(), Some(2_000 + LOOK_AGAIN_MS));
    }
}
