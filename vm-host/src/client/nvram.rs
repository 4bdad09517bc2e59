// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `nvram list` and `nvram probe`.

use std::path::{Path, absolute};

use control_client::{Answer, Error, NOTHING, Result, Session};
use serde_json::{Value, json};
use vm_host::wire::{NvramList, ProbeAnswer, ProbeParams, method};

use super::vm::{member, or_nothing};

pub(super) fn list(session: &Session) -> Result<()> {
    let answer: Answer<NvramList> = session.connect()?.call(method::NVRAM_LIST, &json!({}))?;
    let out = &session.out;
    if out.json {
        return out.object([("media", member(&answer.raw, "media"))]);
    }
    let size = |bytes: Option<u64>| bytes.map_or_else(|| NOTHING.to_owned(), |bytes| out.size(bytes));
    let rows = answer.typed.media.into_iter().map(|medium| {
        let (verdict, why) = match (&medium.error, &medium.found) {
            (Some(error), _) => ("unusable", Some(error.message.clone())),
            (None, Some(found)) if found.keeps => ("keeps", Some(found.notes.join("; "))),
            (None, Some(found)) => ("loses", found.why.clone()),
            (None, None) => (NOTHING, None),
        };
        [
            medium.name,
            medium.path.display().to_string(),
            medium
                .found
                .as_ref()
                .map_or_else(|| NOTHING.to_owned(), |found| plain(&found.capabilities, "kind")),
            size(medium.usage.map(|usage| usage.used_bytes)),
            size(medium.usage.map(|usage| usage.available_bytes)),
            medium.regions.len().to_string(),
            verdict.to_owned(),
            or_nothing(why),
        ]
    });
    out.table(["NAME", "PATH", "KIND", "USED", "AVAILABLE", "REGIONS", "MEMORY", "WHY"], rows)
}

pub(super) fn probe(session: &Session, path: &Path, declared_persistent: bool) -> Result<()> {
    // The daemon has a working directory of its own.
    let path = absolute(path).map_err(|source| Error::Local {
        what: format!("cannot tell where {} is", path.display()),
        source,
    })?;
    let params = ProbeParams { path, declared_persistent };
    let answer: Answer<ProbeAnswer> = session.connect()?.call(method::NVRAM_PROBE, &params)?;
    let out = &session.out;
    if out.json {
        return out.object([("probe", answer.raw)]);
    }
    let found = answer.typed;
    let of = |key: &str| plain(&found.capabilities, key);
    out.pairs([
        ("path", params.path.display().to_string()),
        ("kind", of("kind")),
        ("DAX", of("is_dax")),
        (
            "alignment",
            found.capabilities["alignment_bytes"]
                .as_u64()
                .map_or_else(|| NOTHING.to_owned(), |n| out.size(n)),
        ),
        ("survives a reboot", of("survives_reboot")),
        ("flushed by", of("flush")),
        ("guests' memory", if found.keeps { "is kept".to_owned() } else { "would be lost".to_owned() }),
        ("why", or_nothing(found.why)),
        ("what to do", or_nothing(found.advice)),
        ("notes", or_nothing(Some(found.notes.join("; ")))),
    ])
}

/// A member as a word.
fn plain(object: &Value, key: &str) -> String {
    match object.get(key) {
        None | Some(Value::Null) => NOTHING.to_owned(),
        Some(Value::String(word)) => word.clone(),
        Some(Value::Bool(is)) => if *is { "yes" } else { "no" }.to_owned(),
        Some(other) => other.to_string(),
    }
}
