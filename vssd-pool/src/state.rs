// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The pool's metadata as a value: what a checkpoint holds, what the journal's records change, and what
//! must hold of it. Recovery and the offline check build one; they differ in what they do about a finding.

use std::collections::BTreeMap;

use vssd_protocol::units::{BlockIndex, PhysicalBlock};

use crate::arbiter::{Capacity, Promise};
use crate::bitmap::Bitmap;
use crate::blocks::PhysicalRun;
use crate::error::{Error, Result};
use crate::map::{Entry, Map, most_blocks};
use crate::record::{Meta, Record};
use crate::types::VssdId;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) next_id: u32,
    pub(crate) vssds: BTreeMap<VssdId, (Meta, Map)>,
    pub(crate) clean: Bitmap,
}

impl State {
    pub(crate) fn new(total_blocks: u32) -> Self {
        Self { next_id: 1, vssds: BTreeMap::new(), clean: Bitmap::new(total_blocks) }
    }

    /// Applies one record. Records of a vSSD that is not there are skipped: the checkpoint was taken after the
    /// deletion that a later record will tell of.
    pub(crate) fn apply(&mut self, record: &Record) -> Result<()> {
        match record {
            Record::Map { vssd, start, count, physical } => {
                self.set(*vssd, *start, *count, |i| Entry::mapped(PhysicalBlock(physical.0 + i)))
            }
            Record::Empty { vssd, start, count } | Record::Plug { vssd, start, count } => {
                self.set(*vssd, *start, *count, |_| Entry::EMPTY)
            }
            Record::Unplug { vssd, start, count } => self.set(*vssd, *start, *count, |_| Entry::UNPLUGGED),
            Record::Reserve(run) => self.mark(*run, false),
            Record::Clean(run) => self.mark(*run, true),
            Record::Vssd { meta, new } => {
                self.next_id = self.next_id.max(meta.id.0.saturating_add(1));
                if new.is_none() && !self.vssds.contains_key(&meta.id) {
                    return Ok(());
                }
                let most = most_blocks(self.clean.len());
                if meta.max_blocks > most {
                    return Err(Error::damaged(format!(
                        "the journal names {} with {} blocks, more than the {most} that are possible",
                        meta.id, meta.max_blocks
                    )));
                }
                let (held, map) = self
                    .vssds
                    .entry(meta.id)
                    .or_insert_with(|| ((**meta).clone(), Map::new(meta.max_blocks)));
                held.clone_from(meta);
                map.extend(meta.max_blocks);
                match new {
                    Some(plugged @ 1..) => self.set(meta.id, 0, *plugged, |_| Entry::EMPTY),
                    _ => Ok(()),
                }
            }
            Record::Delete { vssd } => {
                self.vssds.remove(vssd);
                Ok(())
            }
        }
    }

    fn set(&self, vssd: VssdId, start: u32, count: u32, entry: impl Fn(u32) -> Entry) -> Result<()> {
        let Some((_, map)) = self.vssds.get(&vssd) else { return Ok(()) };
        if u64::from(start) + u64::from(count) > u64::from(map.len()) {
            return Err(Error::damaged(format!(
                "the journal names block {start}+{count} of {vssd}, which has {}",
                map.len()
            )));
        }
        for i in 0..count {
            map.set(BlockIndex(start + i), entry(i));
        }
        Ok(())
    }

    fn mark(&mut self, run: PhysicalRun, clean: bool) -> Result<()> {
        if u64::from(run.start) + u64::from(run.count) > u64::from(self.clean.len()) {
            return Err(Error::damaged(format!(
                "the journal names physical block {}+{}",
                run.start, run.count
            )));
        }
        for block in run.start..run.start + run.count {
            if clean {
                self.clean.insert(block)
            } else {
                self.clean.remove(block)
            };
        }
        Ok(())
    }

    /// The blocks in maps, and everything that cannot be: a block with two owners, a clean block with an
    /// owner, a block that does not exist, two vSSDs of one name, more promised than there is.
    pub(crate) fn audit(&self, capacity: &Capacity) -> (Bitmap, Vec<String>) {
        let total = capacity.physical.iter().sum();
        let mut leased = Bitmap::new(total);
        let mut findings = Vec::new();
        let mut names = std::collections::HashSet::new();
        let mut promises = Vec::new();
        for (id, (meta, map)) in &self.vssds {
            if !names.insert(meta.name.as_str()) {
                findings.push(format!("two vSSDs are named {:?}", meta.name));
            }
            if meta.id != *id || id.0 >= self.next_id {
                findings.push(format!("{id} has an identifier that was never given out"));
            }
            let mut plugged = 0;
            for (start, count, entry) in map.runs(0) {
                plugged += count;
                let Some(first) = entry.physical() else { continue };
                for i in 0..count {
                    let (block, physical) = (start + i, first.0 + i);
                    if physical >= total {
                        findings
                            .push(format!("block {block} of {id} lies at {physical}, the pool has {total}"));
                    } else if !leased.insert(physical) {
                        findings.push(format!(
                            "physical block {physical} has two owners, one is block {block} of {id}"
                        ));
                    } else if self.clean.contains(physical) {
                        findings.push(format!(
                            "physical block {physical} counts as clean and is block {block} of {id}"
                        ));
                    }
                }
            }
            promises.push(Promise::new(plugged, meta.attrs.requested_blocks, meta.attrs.class));
        }
        let promised: u64 = promises.iter().map(|promise| u64::from(promise.blocks)).sum();
        if promised > capacity.promisable() {
            findings
                .push(format!("{promised} blocks are promised, at most {} can be", capacity.promisable()));
        }
        (leased, findings)
    }
}
