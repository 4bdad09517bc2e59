// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `events`: what has happened, and with `--follow` what happens.

use control_client::{Error, NOTHING, Output, Result, Session, event_details, print_events};
use serde::Deserialize;
use serde_json::Value;
use vssd_protocol::control::Event;

pub(super) fn run(session: &Session, follow: bool, since: Option<u64>, types: &[String]) -> Result<()> {
    print_events(session, follow, since, types, line)
}

/// Streams have no table: the columns are as wide as what usually stands in them.
fn line(out: &Output, raw: &Value) -> Result<String> {
    let event = Event::deserialize(raw).map_err(|err| Error::Protocol(format!("event: {err}")))?;
    let device = event.device.as_deref().unwrap_or(NOTHING);
    let job = event.job.map_or_else(|| NOTHING.to_owned(), |id| format!("job {id}"));
    let text = format!(
        "{}  {:>6}  {:<20}  {device:<12}  {job:<8}  {}",
        event.time,
        event.seq,
        event.event,
        event_details(out, &event.data)
    );
    Ok(text.trim_end().to_owned())
}
