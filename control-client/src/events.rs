// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `events` of every program: what has happened, and with `--follow` what happens.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use vssd_protocol::control::{SubscribeParams, Subscribed, method};

use crate::client::Answer;
use crate::error::{Error, Result};
use crate::output::Output;
use crate::session::Session;

/// How long the daemon may take between two of the events it has kept.
const BACKLOG_GAP: Duration = Duration::from_secs(10);
/// Says that the daemon dropped events because the reader was slow; it has no place in their order.
const LOST: &str = "events.lost";

/// What all events have.
#[derive(Deserialize)]
struct Head {
    seq: u64,
    event: String,
}

/// Prints the events that the daemon has kept and whose names begin with one of `types`, oldest first; `line` makes a line for
/// people of one.
pub fn print_events(
    session: &Session,
    follow: bool,
    since: Option<u64>,
    types: &[String],
    line: impl Fn(&Output, &Value) -> Result<String>,
) -> Result<()> {
    let mut client = session.connect()?;
    // Without --follow the newest event ends the output, so it must come whatever its type is: then the
    // choice is made here.
    let params = SubscribeParams {
        filter: if follow { types.to_owned() } else { Vec::new() },
        since_seq: since.or((!follow).then_some(0)),
    };
    let answer: Answer<Subscribed> = client.call(method::EVENTS_SUBSCRIBE, &params)?;
    let newest = answer.typed.seq;
    // A number that was not given out yet is of a daemon that ran before: then all that is kept will come.
    if !follow && (newest == 0 || since == Some(newest)) {
        return Ok(());
    }
    let out = &session.out;
    while !out.is_closed() {
        let deadline = if follow { None } else { Instant::now().checked_add(BACKLOG_GAP) };
        let Some(raw) = client.next_event(deadline)? else {
            return Err(Error::TimedOut {
                message: format!("the daemon announced events up to {newest} and did not send them"),
                hint: format!("`{} events --follow` goes on with new ones", session.program.name),
            });
        };
        let head = Head::deserialize(&raw).map_err(|err| Error::Protocol(format!("event: {err}")))?;
        let is_wanted =
            types.is_empty() || types.iter().any(|prefix| head.event.starts_with(prefix.as_str()));
        if is_wanted || head.event == LOST {
            if out.json {
                out.value(&raw)?;
            } else {
                out.line(&line(out, &raw)?)?;
            }
        }
        if !follow && head.event != LOST && head.seq >= newest {
            return Ok(());
        }
    }
    Ok(())
}

/// `reason=guest-busy, freeable=7 GiB`: the members of an event's data, sizes as sizes.
pub fn event_details(out: &Output, data: &Value) -> String {
    match data {
        Value::Null => String::new(),
        Value::Object(members) => {
            let texts: Vec<String> = members
                .iter()
                .filter(|(_, value)| !value.is_null() && value.as_str() != Some(""))
                .map(|(key, value)| match (key.strip_suffix("_bytes"), value.as_u64(), value) {
                    (Some(key), Some(bytes), _) if !out.exact => format!("{key}={}", out.size(bytes)),
                    (_, _, Value::String(text)) => format!("{key}={text}"),
                    _ => format!("{key}={value}"),
                })
                .collect();
            texts.join(", ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::args::CommonArgs;

    #[test]
    fn details_show_sizes_as_sizes_unless_exact() {
        let data = json!({
            "deadline_ms": null, "freeable_bytes": 7516192768u64, "message": "", "reason": "guest-busy", "uid": 0
        });
        let output = |exact| Output::new("lamp.v3", &CommonArgs { exact, ..CommonArgs::default() });
        let human = output(false);
        assert_eq!(event_details(&human, &data), "freeable=7 GiB, reason=guest-busy, uid=0");
        let exact = output(true);
        assert_eq!(event_details(&exact, &data), "freeable_bytes=7516192768, reason=guest-busy, uid=0");
        assert_eq!(event_details(&human, &Value::Null), "");
        assert_eq!(event_details(&human, &json!([1])), "[1]");
    }
}
