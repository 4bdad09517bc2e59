// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `ping`.

use std::time::Instant;

use control_client::{Answer, Millis, Result, Session};
use vssd_protocol::control::ServerInfo;

pub(super) fn ping(session: &Session) -> Result<()> {
    let mut client = session.connect()?;
    let asked_at = Instant::now();
    let answer: Answer<ServerInfo> = client.hello()?;
    let round_trip = asked_at.elapsed();
    let out = &session.out;
    if out.json {
        let micros = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX);
        return out.object([("server", answer.raw), ("round_trip_us", micros.into())]);
    }
    let info = answer.typed;
    out.done(&format!(
        "{} {} serves pool {} on {} ({} socket), up {}, answered in {:.1} ms",
        info.server,
        info.version,
        info.pool,
        client.path().display(),
        info.socket,
        Millis(info.uptime_ms),
        round_trip.as_secs_f64() * 1000.0
    ))
}
