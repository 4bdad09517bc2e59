// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `list`, `show`, `define`, `undefine`, `stop` and `discard`.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::time::Instant;

use control_client::{
    Answer, Error, Millis, NOTHING, Output, Result, Session, confirm, require_terminal, word,
};
use serde_json::{Value, json};
use vm_host::definition::Definition;
use vm_host::lint::lint;
use vm_host::power::budget::Steps;
use vm_host::vm::{LastSave, Status};
use vm_host::wire::{DefineParams, NameParams, StopParams, VmList, method};

use super::order;

pub(super) fn list(session: &Session) -> Result<()> {
    let answer: Answer<VmList> = session.connect()?.call(method::VM_LIST, &json!({}))?;
    let out = &session.out;
    if out.json {
        let [vms, unreadable] = ["vms", "unreadable"].map(|key| member(&answer.raw, key));
        return out.object([("vms", vms), ("unreadable", unreadable)]);
    }
    let VmList { vms, unreadable } = answer.typed;
    let rows = vms.iter().map(|vm| {
        [
            vm.name.clone(),
            word(&vm.state),
            out.size(vm.memory_bytes),
            vm.cpus.to_string(),
            or_nothing(vm.nvram.clone()),
            vm.priority.to_string(),
            vm.last_save.map_or_else(|| NOTHING.to_owned(), |save| millis(save.steps.total_us())),
            or_nothing(Some(vm.why.clone())),
        ]
    });
    let nothing = || NOTHING.to_owned();
    let bad = unreadable.iter().map(|vm| {
        let why = vm.error.message.clone();
        [vm.name.clone(), "unreadable".to_owned(), nothing(), nothing(), nothing(), nothing(), nothing(), why]
    });
    let headers = ["NAME", "STATE", "MEMORY", "CPUS", "NVRAM", "PRIORITY", "LAST SAVE", "WHY"];
    out.table(headers, rows.chain(bad))
}

pub(super) fn show(session: &Session, name: String) -> Result<()> {
    let answer: Answer<Status> = session.connect()?.call(method::VM_SHOW, &NameParams { name })?;
    let out = &session.out;
    if out.json {
        return out.object([("vm", answer.raw)]);
    }
    let vm = answer.typed;
    out.pairs([
        ("name", vm.name.clone()),
        ("state", word(&vm.state)),
        ("why", or_nothing(Some(vm.why.clone()))),
        ("error", or_nothing(vm.error.map(|code| code.as_str().to_owned()))),
        ("hint", or_nothing(vm.hint.clone())),
        ("wanted", word(&vm.wanted)),
        ("memory", out.size(vm.memory_bytes)),
        ("cpus", vm.cpus.to_string()),
        ("nvram", or_nothing(vm.nvram.clone())),
        ("priority", vm.priority.to_string()),
        ("vSSDs", or_nothing(Some(vm.vssds.join(", ")))),
        ("machine", or_nothing(vm.machine.clone())),
        ("incarnation", or_nothing(vm.incarnation.map(|incarnation| incarnation.to_string()))),
        ("hypervisor", vm.pid.map_or_else(|| NOTHING.to_owned(), |pid| format!("pid {pid}"))),
        (
            "work",
            vm.work.as_ref().map_or_else(
                || NOTHING.to_owned(),
                |work| {
                    format!("{}, {} of {}", work.doing, out.size(work.done_bytes), out.size(work.total_bytes))
                },
            ),
        ),
        ("last save", vm.last_save.map_or_else(|| NOTHING.to_owned(), |save| last_save(out, &save))),
        ("worst save", or_nothing(vm.worst.map(|steps| millis(steps.total_us())))),
        ("last restore", or_nothing(vm.last_restore_us.map(millis))),
    ])
}

pub(super) fn define(session: &Session, file: &Path, replace: bool) -> Result<()> {
    let definition = read(file)?;
    let answer: Answer<Status> = session
        .connect()?
        .call(method::VM_DEFINE, &DefineParams { definition: definition.clone(), replace })?;
    let out = &session.out;
    // What will keep it from starting is worth saying now.
    for finding in Definition::parse(&definition).iter().flat_map(lint).filter(|finding| !finding.allowed) {
        out.note(&format!("{}[{}]: {}", word(&finding.level), finding.name, finding.message));
    }
    if out.json {
        return out.object([("vm", answer.raw)]);
    }
    let vm = answer.typed;
    let place =
        vm.nvram.map_or_else(|| "not persistent".to_owned(), |nvram| format!("persistent on {nvram}"));
    out.done(&format!("{} is defined: {}, {} CPUs, {place}", vm.name, out.size(vm.memory_bytes), vm.cpus))
}

pub(super) fn undefine(session: &Session, name: &str, yes: bool) -> Result<()> {
    if !yes {
        require_terminal("removing a VM")?;
        confirm(&format!("Remove {name}, its memory and its saved state?"))?;
    }
    let gone: Answer<Value> =
        order::call(session, method::VM_UNDEFINE, &NameParams { name: name.to_owned() }, name)?;
    let out = &session.out;
    if out.json { out.object([("undefined", gone.raw)]) } else { out.done(&format!("{name} is removed")) }
}

pub(super) fn stop(
    session: &Session,
    name: &str,
    grace: Option<Millis>,
    kill: bool,
    yes: bool,
) -> Result<()> {
    if kill && !yes {
        require_terminal("pulling the plug of a VM")?;
        confirm(&format!("Pull the plug of {name}? Its guest may lose what it has not written."))?;
    }
    let begun = Instant::now();
    let params = StopParams { name: name.to_owned(), grace_ms: grace.map(|grace| grace.0), kill };
    let answer = order::call(session, method::VM_STOP, &params, name)?;
    order::tell(session, answer, "is stopped", begun)
}

pub(super) fn discard(session: &Session, name: &str, yes: bool) -> Result<()> {
    if !yes {
        require_terminal("giving up a guest's memory")?;
        confirm(&format!("Give up what is left of {name}'s guest?"))?;
    }
    order::run(session, method::VM_DISCARD, name, "can be started anew,")
}

/// A definition from a file, or from standard input.
pub(super) fn read(file: &Path) -> Result<String> {
    let text = if file.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().lock().read_to_string(&mut text).map(|_| text)
    } else {
        fs::read_to_string(file)
    };
    text.map_err(|source| Error::Local { what: format!("cannot read {}", file.display()), source })
}

pub(super) fn member(answer: &Value, key: &str) -> Value {
    answer.get(key).cloned().unwrap_or(Value::Null)
}

pub(super) fn or_nothing(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| NOTHING.to_owned())
}

/// `12.3 ms`
pub(super) fn millis(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

fn last_save(out: &Output, save: &LastSave) -> String {
    let Steps { stop_us, save_us, commit_us, flush_us } = save.steps;
    let [stop, state, commit, flush] = [stop_us, save_us, commit_us, flush_us].map(millis);
    format!(
        "{} (stop {stop}, state of {} {state}, commit {commit}, flush {flush})",
        millis(save.steps.total_us()),
        out.size(save.state_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_saves_are_in_milliseconds() {
        assert_eq!([millis(0), millis(999), millis(12_340)], ["0.0 ms", "0.9 ms", "12.3 ms"]);
        let steps = Steps { stop_us: u64::MAX, save_us: 1, commit_us: 1, flush_us: 1 };
        assert_eq!(steps.total_us(), u64::MAX);
    }
}
