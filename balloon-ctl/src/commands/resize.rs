// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `resize`, `grow` and `shrink`: agree on a size with the daemon, then follow the job.
//!
//! A relative size is a read followed by a write. The write carries what was read (compare-and-set), so that
//! of two operators who say `+2G` at once one is told instead of both getting what neither asked for.

use control_client::{Answer, Error, Output, Session, confirm, require_terminal};
use serde_json::{Value, json};
use vssd_protocol::control::{DeviceInfo, ErrorCode, ResizeAnswer, ResizeParams, method};

use super::{device, job};
use crate::args::ResizeArgs;
use crate::error::Result;
use crate::size::SizeChange;

pub(super) fn run(session: &Session, name: String, change: SizeChange, options: &ResizeArgs) -> Result<()> {
    let asks = options.force && !options.yes && !options.dry_run && !matches!(change, SizeChange::GrowBy(_));
    if asks {
        require_terminal("--force")?;
    }
    let mut client = session.connect()?;
    let (size_bytes, expected_bytes, now) = match change {
        SizeChange::To(bytes) if !asks => (bytes, None, None),
        _ => {
            let device = device::fetch(&mut client, name.clone())?.typed;
            let (size, expected) = reckon(&session.out, change, &device)?;
            (size, expected, Some(device))
        }
    };
    if let Some(device) = now.filter(|device| asks && size_bytes < device.plugged_bytes) {
        let out = &session.out;
        confirm(&format!(
            "take {} from {name} without asking its guest? Data in those blocks is lost",
            out.size(device.plugged_bytes - size_bytes)
        ))?;
    }
    let params = ResizeParams {
        name,
        size_bytes,
        expected_bytes,
        deadline_ms: options.deadline.map(|time| time.0),
        on_timeout: options.on_timeout,
        force: options.force,
        dry_run: options.dry_run,
    };
    let answer: Answer<ResizeAnswer> = client.call(method::DEVICE_RESIZE, &params)?;
    let ResizeAnswer { job, from_bytes, to_bytes, plan } = answer.typed;
    let out = &session.out;
    let summary = format!("{}: {} -> {}", params.name, out.size(from_bytes), out.size(to_bytes));
    let Some(accepted) = job else {
        if out.json {
            out.object([("resize", answer.raw), ("dry_run", options.dry_run.into())])?;
        } else {
            let mode = if options.dry_run { " (dry run)" } else { "" };
            out.done(&format!("{summary}{mode}: {plan}"))?;
        }
        return Ok(());
    };
    if options.no_wait {
        if out.json {
            out.object([("resize", answer.raw), ("dry_run", false.into())])?;
        } else {
            out.done(&format!("{summary}: job {}", accepted.id))?;
        }
        return Ok(());
    }
    out.note(&format!("job {}: {plan}", accepted.id));
    let first = Answer { raw: answer.raw.get("job").cloned().unwrap_or(Value::Null), typed: accepted };
    let last = job::follow(session, &mut client, first)?;
    if out.json {
        let mut resize = answer.raw;
        resize["job"] = last.raw;
        out.object([("resize", resize), ("dry_run", json!(false))])?;
    }
    job::verdict(session, last.typed)
}

/// The size to ask for, and the requested size that it was reckoned from, where it depends on it. What no number can say is
/// refused here as the daemon would.
fn reckon(
    out: &Output,
    change: SizeChange,
    device: &DeviceInfo,
) -> control_client::Result<(u64, Option<u64>)> {
    let base = device.requested_bytes;
    match change {
        SizeChange::To(bytes) => Ok((bytes, None)),
        SizeChange::ToMin => Ok((device.min_bytes, None)),
        SizeChange::ToMax => Ok((device.max_bytes, None)),
        SizeChange::GrowBy(by) => base.checked_add(by).map(|size| (size, Some(base))).ok_or_else(|| {
            let (max, by) = (out.size(device.max_bytes), out.size(by));
            Error::refused(
                ErrorCode::AboveMax,
                format!("{} cannot grow by {by}: its maximum is {max}", device.name),
            )
        }),
        SizeChange::ShrinkBy(by) => base.checked_sub(by).map(|size| (size, Some(base))).ok_or_else(|| {
            let (min, base, by) = (out.size(device.min_bytes), out.size(base), out.size(by));
            let message = format!("{} cannot give back {by} of {base}: its minimum is {min}", device.name);
            Error::refused(ErrorCode::BelowMin, message)
        }),
    }
}
