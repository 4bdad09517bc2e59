// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `power status` and `power test`.

use control_client::{Answer, Millis, NOTHING, Output, Result, Session, event_details, word};
use serde_json::{Value, json};
use vm_host::wire::{PowerInfo, PowerTestParams, SourceInfo, Stage, method};

use super::vm::{millis, or_nothing};

pub(super) fn status(session: &Session) -> Result<()> {
    let answer: Answer<PowerInfo> = session.connect()?.call(method::POWER_STATUS, &json!({}))?;
    let out = &session.out;
    if out.json {
        return out.object([("power", answer.raw)]);
    }
    let PowerInfo {
        state,
        for_ms,
        reason,
        shutdown_planned,
        testing,
        delays_shutdown,
        sources,
        last_save_us,
        plan,
    } = answer.typed;
    let yes_or_no = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let fits = if plan.vms.iter().all(|vm| vm.fits) { "in time" } else { "NOT ALL IN TIME" };
    out.pairs([
        ("power", format!("{} for {}", state.replace('_', " "), Millis(for_ms))),
        ("why", reason.as_ref().map_or_else(|| NOTHING.to_owned(), |reason| event_details(out, reason))),
        ("test", yes_or_no(testing)),
        ("shutdown planned", yes_or_no(shutdown_planned)),
        ("delays shutdowns", yes_or_no(delays_shutdown)),
        (
            "saving all",
            format!(
                "{fits}: after {} of {} (window {})",
                millis(plan.total_us),
                millis(plan.usable_us),
                millis(plan.window_us)
            ),
        ),
        ("last save of all", or_nothing(last_save_us.map(millis))),
    ])?;
    if !sources.is_empty() {
        out.line("")?;
        let rows = sources.iter().map(|source| {
            let more = [source.error.as_deref(), source.detail.as_deref()].into_iter().flatten();
            let more: Vec<&str> = more.collect();
            [
                source.name.clone(),
                source.kind.clone(),
                last_word(out, source),
                or_nothing(Some(more.join("; "))),
            ]
        });
        out.table(["SOURCE", "KIND", "SAYS", "MORE"], rows)?;
    }
    if !plan.vms.is_empty() {
        out.line("")?;
        let rows = plan.vms.iter().map(|vm| {
            let fits = if vm.fits { "yes" } else { "NO" };
            let guess = if vm.measured { "" } else { ", not measured" };
            [
                vm.name.clone(),
                vm.priority.to_string(),
                millis(vm.begins_us),
                millis(vm.ends_us),
                format!("{fits}{guess}"),
            ]
        });
        out.table(["VM", "PRIORITY", "BEGINS", "SAVED", "IN TIME"], rows)?;
    }
    Ok(())
}

pub(super) fn test(session: &Session, stage: Stage) -> Result<()> {
    let answer: Answer<Value> = session.connect()?.call(method::POWER_TEST, &PowerTestParams { stage })?;
    let out = &session.out;
    if out.json {
        return out.object([("test", answer.raw)]);
    }
    let what = match stage {
        Stage::OnBattery => "on battery, as far as this test goes",
        Stage::Critical => "all VMs are being saved, as if the power failed",
        Stage::Online => "the test ends",
    };
    out.done(&format!("{}: {what}; `vm-host power status` shows how it goes", word(&stage)))
}

/// `on-battery, left_ms=600000`: a state is an object with its kind and what more it says.
fn last_word(out: &Output, source: &SourceInfo) -> String {
    let Some(Value::Object(mut state)) = source.state.clone() else { return NOTHING.to_owned() };
    let kind = match state.remove("kind") {
        Some(Value::String(kind)) => kind,
        _ => NOTHING.to_owned(),
    };
    let more = event_details(out, &Value::Object(state));
    if more.is_empty() { kind } else { format!("{kind}, {more}") }
}
