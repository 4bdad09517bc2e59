// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the pool's handle asks of the keeper, and how the keeper answers.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use vssd_protocol::units::BlockRange;

use crate::error::Result;
use crate::types::{RangeStatus, VssdAttrs, VssdId, VssdSpec};
use crate::vssd::Vssd;

/// Called once on the keeper's thread with one status a range, in order. It must only hand over: it must
/// not block and must not call the pool's waiting methods.
pub type ResizeDone = Box<dyn FnOnce(Result<Vec<RangeStatus>>) + Send>;

pub(crate) type Reply<T> = SyncSender<Result<T>>;

/// What the keeper is asked to do.
pub(crate) enum Command {
    Create(Box<VssdSpec>, Reply<Arc<Vssd>>),
    Delete(VssdId, Reply<()>),
    SetAttrs(VssdId, Box<VssdAttrs>, Reply<()>),
    Extend(VssdId, u32, Reply<()>),
    /// If it says so, only of what holds no data.
    Unplug(Resize, bool),
    /// Up to so many blocks in all.
    Plug(Resize, u32),
    Checkpoint(Reply<()>),
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Create(..) => "Create",
            Self::Delete(..) => "Delete",
            Self::SetAttrs(..) => "SetAttrs",
            Self::Extend(..) => "Extend",
            Self::Unplug(..) => "Unplug",
            Self::Plug(..) => "Plug",
            Self::Checkpoint(..) => "Checkpoint",
        })
    }
}

/// A plug or unplug under way.
pub(crate) struct Resize {
    pub(crate) id: VssdId,
    pub(crate) ranges: Vec<BlockRange>,
    pub(crate) done: ResizeDone,
}
