// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `lint`: what in a definition would not survive a power cut. Needs no daemon.

use std::path::Path;

use control_client::{Error, Result, Session, word};
use serde_json::json;
use vm_host::fault::Fault;
use vm_host::lint::{Level, lint};
use vm_host::vmm;
use vssd_protocol::control::ErrorCode;

use super::vm::read;

pub(super) fn run(session: &Session, file: &Path) -> Result<()> {
    let definition = vmm::read_definition(&read(file)?).map_err(|error| {
        let fault = Fault::from(error);
        let hint = fault.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
        Error::refused(fault.code, format!("{}: {}{hint}", file.display(), fault.message.trim_end()))
    })?;
    let findings = lint(&definition);
    let out = &session.out;
    if out.json {
        out.object([("findings", json!(findings))])?;
    } else {
        for finding in &findings {
            let allowed = if finding.allowed { " (allowed)" } else { "" };
            out.line(&format!("{}[{}]{allowed}: {}", word(&finding.level), finding.name, finding.message))?;
            out.line(&format!("  {}", finding.hint))?;
        }
    }
    let bad = findings.iter().filter(|finding| finding.level == Level::Error && !finding.allowed).count();
    if bad > 0 {
        let message = format!("{} would not survive a power cut: {bad} errors", definition.name);
        return Err(Error::refused(ErrorCode::Lint, message));
    }
    if out.json {
        return Ok(());
    }
    let what = if definition.is_persistent() { "survives power cuts" } else { "is not persistent" };
    out.done(&format!("{} {what}", definition.name))
}
