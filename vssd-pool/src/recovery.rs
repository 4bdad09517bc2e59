// SPDX-License-Identifier: Apache-2.0 OR MIT

//! From media to state: which media make up the pool, which checkpoint counts, what the journal adds.
//! Reads only; whoever opens the pool for writing then takes a checkpoint and so starts a new stretch of the
//! journal.

use std::path::Path;
use std::sync::Arc;

use crate::bitmap::Bitmap;
use crate::checkpoint::{self, Found, Slot};
use crate::core::Medium;
use crate::error::{Error, Result};
use crate::journal::Scan;
use crate::state::State;
use crate::store::Store;
use crate::superblock::{self, COPIES, Layout, SIZE, Superblock};
use crate::types::MediumKind;

/// The media of one pool, all there and all of a piece.
#[derive(Debug)]
pub(crate) struct Media {
    pub(crate) layout: Layout,
    pub(crate) media: [Option<Medium>; 2],
    /// Superblock copies that are not as they should be.
    pub(crate) findings: Vec<String>,
}

impl Media {
    pub(crate) fn on(&self, kind: MediumKind) -> Result<&dyn Store> {
        self.media[kind.index()]
            .as_ref()
            .map(|medium| &*medium.store)
            .ok_or_else(|| Error::damaged(format!("the {kind} medium is missing")))
    }

    /// Writes both superblock copies of every medium anew.
    pub(crate) fn repair_superblocks(&self) -> Result<()> {
        for kind in MediumKind::ALL {
            let Some(medium) = &self.media[kind.index()] else { continue };
            let superblock =
                Superblock { layout: self.layout.clone(), kind, data_offset: medium.data_offset };
            superblock
                .write(&*medium.store)
                .map_err(|source| Error::io("cannot write a superblock", source))?;
        }
        Ok(())
    }
}

/// What kind of medium lies at a path.
pub(crate) fn kind_at(path: &Path) -> Result<MediumKind> {
    let mut copies = [[0u8; SIZE]; 2];
    for (copy, at) in copies.iter_mut().zip(COPIES) {
        crate::store::peek(path, copy, at)?;
    }
    let (chosen, wrong) = superblock::choose(&copies);
    chosen.map(|superblock| superblock.kind).ok_or_else(|| Error::medium(path, describe(&wrong)))
}

fn describe(wrong: &[String]) -> String {
    format!("cannot be used: {}", wrong.join("; "))
}

/// Reads the superblocks of `stores` and sees that they are one whole pool.
pub(crate) fn assemble(stores: Vec<Arc<dyn Store>>) -> Result<Media> {
    let mut layout: Option<Layout> = None;
    let mut media: [Option<Medium>; 2] = [None, None];
    let mut findings = Vec::new();
    for store in stores {
        let path = store.path().to_owned();
        let mut copies = [[0u8; SIZE]; 2];
        for (copy, at) in copies.iter_mut().zip(COPIES) {
            if at + SIZE as u64 > store.size() {
                return Err(Error::medium(path, "is too small to hold a pool"));
            }
            store
                .read_at(at, copy)
                .map_err(|source| Error::io(format!("cannot read {}", path.display()), source))?;
        }
        let (chosen, wrong) = superblock::choose(&copies);
        let Some(superblock) = chosen else { return Err(Error::medium(path, describe(&wrong))) };
        findings.extend(wrong.into_iter().map(|what| format!("{}: {what}", path.display())));
        superblock.validate(&path, store.size())?;
        if superblock.kind != store.kind() {
            return Err(Error::medium(
                path,
                format!("is {} in its pool, not {}", superblock.kind, store.kind()),
            ));
        }
        let seen = layout.get_or_insert_with(|| superblock.layout.clone());
        if seen.pool != superblock.layout.pool {
            let what = format!(
                "belongs to pool {:?}, another medium to pool {:?}",
                superblock.layout.name, seen.name
            );
            return Err(Error::medium(path, what));
        }
        if *seen != superblock.layout {
            return Err(Error::damaged(format!(
                "the superblock of {} contradicts that of another medium",
                path.display()
            )));
        }
        let place = &mut media[superblock.kind.index()];
        if place.is_some() {
            return Err(Error::medium(path, "was named twice"));
        }
        let first_block = if superblock.kind == MediumKind::Nvram { 0 } else { seen.blocks[0] };
        *place = Some(Medium { store, data_offset: superblock.data_offset, first_block });
    }
    let layout = layout.ok_or_else(|| Error::invalid("a pool has one or two media, none was named"))?;
    for kind in MediumKind::ALL {
        if layout.has(kind) && media[kind.index()].is_none() {
            return Err(Error::NotFound {
                what: format!("the {kind} medium of pool {:?} was not named, it", layout.name),
            });
        }
    }
    Ok(Media { layout, media, findings })
}

/// The pool's metadata as of the last durable change.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) state: State,
    pub(crate) leased: Bitmap,
    /// What contradicts itself; a pool with any is not opened.
    pub(crate) contradictions: Vec<String>,
    /// What was wrong and has a second copy.
    pub(crate) findings: Vec<String>,
    /// The number for the journal's next page: above all that was ever written.
    pub(crate) next_page: u64,
    /// Journal pages from here on must be kept until two more checkpoints are taken.
    pub(crate) needed_from: u64,
    /// Number and slot of the newest checkpoint.
    pub(crate) checkpoint: (u64, usize),
}

/// Finds the newest good checkpoint and replays the journal on it.
pub(crate) fn recover(media: &Media) -> Result<Recovered> {
    let layout = &media.layout;
    let io_error = |source| Error::io("cannot read the pool's metadata", source);
    let slots_on = media.on(layout.slots_on)?;
    let mut findings = Vec::new();
    let mut best: Option<(usize, checkpoint::Header, State)> = None;
    let mut newest = 0;
    for (slot, &offset) in layout.slots.iter().enumerate() {
        let place = Slot { offset, len: layout.slot_len };
        match checkpoint::read(slots_on, place, layout.pool, layout.total_blocks()).map_err(io_error)? {
            Found::Nothing => {}
            Found::Corrupt(header, what) => {
                newest = newest.max(header.number);
                findings.push(format!("checkpoint {} in slot {slot}: {what}", header.number));
            }
            Found::Good(header, state) => {
                newest = newest.max(header.number);
                if best.as_ref().is_none_or(|(_, other, _)| other.number < header.number) {
                    best = Some((slot, header, state));
                }
            }
        }
    }
    let Some((slot, header, mut state)) = best else {
        findings.insert(0, "there is no good checkpoint".to_owned());
        return Err(Error::damaged(findings.join("; ")));
    };
    let scan = Scan::read(media.on(layout.journal_on)?, layout.journal, layout.pool).map_err(io_error)?;
    let end = scan.replay(header.begin, |record| state.apply(record))?;
    let next_page = scan.end().max(end);
    let (leased, contradictions) = state.audit(&layout.capacity());
    Ok(Recovered {
        state,
        leased,
        contradictions,
        findings,
        next_page,
        // A commit cut short leaves a gap that no replay from before it gets across: then the checkpoint
        // that the opening takes is the only one that counts.
        needed_from: if end == next_page { header.begin } else { next_page },
        checkpoint: (newest, slot),
    })
}
