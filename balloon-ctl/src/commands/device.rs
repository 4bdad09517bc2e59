// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `list`, `show`, `create`, `delete`, `sync`, `limits`, `estimate` and `evicted`.

use std::cmp::Reverse;

use control_client::{
    Answer, Client, Millis, NOTHING, Output, Result, Session, confirm, require_terminal, word,
};
use serde_json::Value;
use vssd_protocol::control::{
    CreateParams, DeleteParams, DeviceInfo, DeviceList, DriverKind, EstimateAnswer, EvictedParams,
    EvictedRanges, LimitsParams, NameParams, SyncAnswer, SyncParams, method,
};

use crate::args::{CreateArgs, LimitsArgs, SortKey};

pub(crate) fn fetch(client: &mut Client, name: String) -> Result<Answer<DeviceInfo>> {
    client.call(method::DEVICE_SHOW, &NameParams { name })
}

pub(super) fn list(session: &Session, sort: SortKey) -> Result<()> {
    let answer: Answer<DeviceList> = session.connect()?.call(method::DEVICE_LIST, &serde_json::json!({}))?;
    let mut devices: Vec<(DeviceInfo, Value)> =
        answer.typed.devices.into_iter().zip(list_member(answer.raw, "devices")).collect();
    devices.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    // Sorting is stable: equal sizes stay in the order of names.
    match sort {
        SortKey::Name => {}
        SortKey::Id => devices.sort_by_key(|(device, _)| device.id),
        SortKey::State => devices.sort_by_key(|(device, _)| word(&device.state)),
        SortKey::Size => devices.sort_by_key(|(device, _)| Reverse(device.plugged_bytes)),
        SortKey::Used => devices.sort_by_key(|(device, _)| Reverse(device.allocated_bytes)),
        SortKey::Target => devices.sort_by_key(|(device, _)| Reverse(device.requested_bytes)),
        SortKey::Min => devices.sort_by_key(|(device, _)| Reverse(device.min_bytes)),
        SortKey::Max => devices.sort_by_key(|(device, _)| Reverse(device.max_bytes)),
    }
    let out = &session.out;
    if out.json {
        let devices = devices.into_iter().map(|(_, raw)| raw).collect();
        return out.object([("devices", Value::Array(devices))]);
    }
    out.table(
        ["NAME", "STATE", "SIZE", "USED", "MIN / MAX", "TARGET", "FRONTEND", "DRIVER"],
        devices.iter().map(|(device, _)| {
            [
                device.name.clone(),
                word(&device.state),
                out.size(device.plugged_bytes),
                out.size(device.allocated_bytes),
                format!("{} / {}", out.size(device.min_bytes), out.size(device.max_bytes)),
                target(out, device),
                frontend(device),
                driver(device),
            ]
        }),
    )
}

pub(super) fn show(session: &Session, name: String) -> Result<()> {
    let device = fetch(&mut session.connect()?, name)?;
    let out = &session.out;
    if out.json {
        return out.object([("device", device.raw)]);
    }
    let device = device.typed;
    let io = &device.io;
    out.pairs([
        ("name", device.name.clone()),
        ("state", word(&device.state)),
        ("size", out.size(device.plugged_bytes)),
        ("target", target(out, &device)),
        ("used", out.size(device.allocated_bytes)),
        ("minimum", out.size(device.min_bytes)),
        ("maximum", out.size(device.max_bytes)),
        (
            "disk size",
            format!("{} (what a driver that cannot negotiate sees)", out.size(device.capacity_bytes)),
        ),
        ("block size", out.size(device.block_size_bytes)),
        ("class", word(&device.class)),
        ("on timeout", word(&device.policy.on_timeout)),
        ("deadline", deadline(device.policy.deadline_ms)),
        ("pull", word(&device.policy.pull)),
        ("frontend", frontend(&device)),
        ("connections", device.frontend.connections.to_string()),
        ("driver", driver(&device)),
        ("could give", device.driver.could_give_bytes.map_or_else(nothing, |bytes| out.size(bytes))),
        ("soft size", soft_size(out, &device)),
        ("agent", agent(out, &device)),
        ("job", device.job.map_or_else(nothing, |id| id.to_string())),
        ("socket", device.socket_path.clone()),
        ("serial", device.serial.clone()),
        ("id", device.id.to_string()),
        ("read", format!("{} in {} requests", out.size(io.read_bytes), io.reads)),
        ("written", format!("{} in {} requests", out.size(io.written_bytes), io.writes)),
        ("flushes", io.flushes.to_string()),
        ("discards", io.discards.to_string()),
        ("errors", format!("{} ({} more met evicted blocks)", io.errors, io.evicted)),
    ])
}

pub(super) fn create(session: &Session, args: CreateArgs) -> Result<()> {
    let dry_run = args.dry_run;
    let params = CreateParams {
        size_bytes: args.size.0,
        min_bytes: args.min.map(|size| size.0),
        max_bytes: args.max.map(|size| size.0),
        class: args.class,
        policy: args.policy.to_policy(),
        dry_run,
        name: args.name,
    };
    let device: Answer<DeviceInfo> = session.connect()?.call(method::DEVICE_CREATE, &params)?;
    let out = &session.out;
    if out.json {
        return out.object([("device", device.raw), ("dry_run", dry_run.into())]);
    }
    let device = device.typed;
    let (name, verb) = (&device.name, if dry_run { "could be created" } else { "created" });
    out.done(&format!(
        "{name} {verb}: {}, minimum {}, maximum {}, socket {}",
        out.size(device.requested_bytes),
        out.size(device.min_bytes),
        out.size(device.max_bytes),
        device.socket_path
    ))?;
    if !dry_run {
        out.note(&format!("give it to a guest: balloon-ctl attach-info {name} --for qemu"));
    }
    Ok(())
}

pub(super) fn delete(session: &Session, name: String, force: bool, yes: bool, dry_run: bool) -> Result<()> {
    let asks = !yes && !dry_run;
    if asks {
        require_terminal("deleting a vSSD")?;
    }
    let mut client = session.connect()?;
    if asks {
        let device = fetch(&mut client, name.clone())?.typed;
        let used = session.out.size(device.allocated_bytes);
        let attached = if device.frontend.connected { ", which a guest is using," } else { "" };
        confirm(&format!("delete {name}{attached} and the {used} of data on it?"))?;
    }
    let _: Answer<Value> =
        client.call(method::DEVICE_DELETE, &DeleteParams { name: name.clone(), force, dry_run })?;
    let out = &session.out;
    if out.json {
        return out.object([
            ("name", name.into()),
            ("deleted", (!dry_run).into()),
            ("dry_run", dry_run.into()),
        ]);
    }
    out.done(&if dry_run { format!("{name} could be deleted") } else { format!("{name} deleted") })
}

/// Of all vSSDs if there are no names.
pub(super) fn sync(session: &Session, names: Vec<String>) -> Result<()> {
    let what = match &names[..] {
        [one] => Some(one.clone()),
        _ => None,
    };
    let answer: Answer<SyncAnswer> = session.connect()?.call(method::DEVICE_SYNC, &SyncParams { names })?;
    let out = &session.out;
    if out.json {
        return out.object([("sync", answer.raw)]);
    }
    let SyncAnswer { devices, took_us } = answer.typed;
    let what = what.unwrap_or_else(|| format!("{devices} vSSD{}", if devices == 1 { "" } else { "s" }));
    let took = std::time::Duration::from_micros(took_us);
    out.done(&format!("{what}: all that was acknowledged is durable, in {took:.1?}"))
}

pub(super) fn limits(session: &Session, args: LimitsArgs) -> Result<()> {
    let shows = args.is_empty();
    let mut client = session.connect()?;
    let device = if shows {
        fetch(&mut client, args.name)?
    } else {
        let params = LimitsParams {
            name: args.name,
            min_bytes: args.min.map(|size| size.0),
            max_bytes: args.max.map(|size| size.0),
            on_timeout: args.policy.on_timeout,
            deadline_ms: args.policy.deadline.map(|time| time.0),
            pull: args.policy.pull,
        };
        client.call(method::DEVICE_LIMITS, &params)?
    };
    let out = &session.out;
    if out.json {
        return out.object([("device", device.raw)]);
    }
    if !shows && out.quiet {
        return Ok(());
    }
    let device = device.typed;
    out.table(
        ["NAME", "MIN", "SIZE", "MAX", "ON TIMEOUT", "DEADLINE", "PULL"],
        [[
            device.name.clone(),
            out.size(device.min_bytes),
            out.size(device.plugged_bytes),
            out.size(device.max_bytes),
            word(&device.policy.on_timeout),
            deadline(device.policy.deadline_ms),
            word(&device.policy.pull),
        ]],
    )
}

pub(super) fn estimate(session: &Session, name: &str) -> Result<()> {
    let answer: Answer<EstimateAnswer> =
        session.connect()?.call(method::DEVICE_ESTIMATE, &NameParams { name: name.to_owned() })?;
    let out = &session.out;
    if out.json {
        return out.object([("estimate", answer.raw)]);
    }
    let told = answer.typed;
    let rows = [
        ("free", told.free_bytes, "nothing lies there"),
        ("clean-cold", told.clean_cold_bytes, "copies of what is elsewhere, not asked for lately"),
        ("clean-hot", told.clean_hot_bytes, "copies of what is elsewhere, in use"),
        ("dirty", told.dirty_bytes, "must be written elsewhere first"),
    ];
    out.table(
        ["COST", "SIZE", "WHAT IT IS"],
        rows.map(|(cost, bytes, what)| [cost.to_owned(), out.size(bytes), what.to_owned()]),
    )?;
    out.note(&format!(
        "{name}: as its guest said {} ago; {} of its blocks hold no data, as the host sees it",
        Millis(told.age_ms),
        out.size(told.unwritten_bytes)
    ));
    Ok(())
}

pub(super) fn evicted(session: &Session, name: String) -> Result<()> {
    let mut client = session.connect()?;
    let mut params = EvictedParams { name, start: 0 };
    let mut answer: Answer<EvictedRanges> = client.call(method::DEVICE_EVICTED, &params)?;
    // Each page begins behind the one before, so the list has an end.
    while let Some(next) = answer.typed.next.take().filter(|next| *next > params.start) {
        params.start = next;
        let mut page: Answer<EvictedRanges> = client.call(method::DEVICE_EVICTED, &params)?;
        answer.typed.ranges.append(&mut page.typed.ranges);
        answer.typed.next = page.typed.next;
        if let (Some(Value::Array(all)), Some(Value::Array(more))) =
            (answer.raw.get_mut("ranges"), page.raw.get_mut("ranges"))
        {
            all.append(more);
        }
    }
    if let Value::Object(members) = &mut answer.raw {
        members.remove("next");
    }
    let out = &session.out;
    if out.json {
        return out.object([("evicted", answer.raw)]);
    }
    let block = answer.typed.block_size_bytes;
    out.table(
        ["BLOCK", "COUNT", "OFFSET", "SIZE"],
        answer.typed.ranges.iter().map(|range| {
            let bytes = |blocks: u32| out.size(u64::from(blocks).saturating_mul(block));
            [range.start.to_string(), range.count.to_string(), bytes(range.start), bytes(range.count)]
        }),
    )
}

/// The items of the list `key` of an answer, as they came.
pub(super) fn list_member(mut answer: Value, key: &str) -> Vec<Value> {
    match answer.get_mut(key).map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => Vec::new(),
    }
}

fn nothing() -> String {
    NOTHING.to_owned()
}

fn deadline(ms: u64) -> String {
    if ms == 0 { "none".to_owned() } else { Millis(ms).to_string() }
}

/// The requested size where it is another than the present one.
fn target(out: &Output, device: &DeviceInfo) -> String {
    if device.requested_bytes == device.plugged_bytes { nothing() } else { out.size(device.requested_bytes) }
}

pub(crate) fn frontend(device: &DeviceInfo) -> String {
    let frontend = &device.frontend;
    match (frontend.connected, frontend.pid) {
        (false, _) => nothing(),
        (true, Some(pid)) => format!("pid {pid}, {} queues", frontend.queues),
        (true, None) => format!("{} queues", frontend.queues),
    }
}

fn soft_size(out: &Output, device: &DeviceInfo) -> String {
    let promised = out.size(device.requested_bytes);
    device.soft_bytes.map_or_else(nothing, |bytes| {
        format!("{} (a wish that nothing enforces; {promised} stay promised)", out.size(bytes))
    })
}

fn agent(out: &Output, device: &DeviceInfo) -> String {
    device.agent.as_ref().map_or_else(nothing, |agent| {
        let short = agent.shortfall.as_ref().map_or_else(String::new, |why| format!(", no more: {why}"));
        format!("keeps {} unused{short}, heard {} ago", out.size(agent.held_bytes), Millis(agent.heard_ms))
    })
}

fn driver(device: &DeviceInfo) -> String {
    match (device.driver.kind, &device.driver.name) {
        (DriverKind::None, _) => nothing(),
        (DriverKind::Stock, _) => "stock".to_owned(),
        (DriverKind::Vssd, Some(name)) => name.clone(),
        (DriverKind::Vssd, None) => "vssd".to_owned(),
    }
}
