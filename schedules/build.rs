// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Takes the sources that are run through schedules, as they are and with one thing broken: a check that finds nothing wrong
//! with the broken ones proves nothing. Each source becomes a file of modules that a test includes.

use std::path::Path;
use std::{env, fs};

struct Source {
    path: &'static str,
    mutants: &'static [Mutant],
}

/// Each left side, which occurs once, becomes its right side.
struct Mutant {
    name: &'static str,
    edits: &'static [(&'static str, &'static str)],
}

const SOURCES: &[Source] = &[
    Source {
        path: "vssd-pool/src/grace.rs",
        mutants: &[
            Mutant { name: "one_round", edits: &[("for _ in 0..2 {", "for _ in 0..1 {")] },
            Mutant {
                name: "reader_without_fence",
                edits: &[(
                    "self.hold(slot, parity);\n        fence(Ordering::SeqCst);",
                    "self.hold(slot, parity);",
                )],
            },
            Mutant {
                name: "owner_without_fence",
                edits: &[("fence(Ordering::SeqCst);\n        for", "for")],
            },
            Mutant { name: "leave_relaxed", edits: &[("- 1, Ordering::Release", "- 1, Ordering::Relaxed")] },
            Mutant {
                name: "wait_relaxed",
                edits: &[("[parity].load(Ordering::Acquire)", "[parity].load(Ordering::Relaxed)")],
            },
        ],
    },
    Source {
        path: "vssd-pool/src/map.rs",
        mutants: &[Mutant {
            name: "exchange_in_two_steps",
            edits: &[(
                "slot.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire).map(|_| ()).map_err(Entry)",
                "let now = slot.load(Ordering::Acquire);
                 if now != from.0 { return Err(Entry(now)); }
                 slot.store(to.0, Ordering::Release);
                 Ok(())",
            )],
        }],
    },
    Source {
        path: "vssd-backend/src/vhost_user/mailbox.rs",
        mutants: &[
            Mutant {
                name: "signal_before_post",
                edits: &[
                    ("        let first = {", "        self.wake.signal();\n        let first = {"),
                    (
                        "        if first {\n            self.wake.signal();\n        }",
                        "        let _ = first;",
                    ),
                ],
            },
            Mutant {
                name: "clear_after_take",
                edits: &[
                    ("        self.wake.clear();\n", ""),
                    (
                        "std::mem::swap(&mut *mail, into);",
                        "std::mem::swap(&mut *mail, into); drop(mail); self.wake.clear();",
                    ),
                ],
            },
            Mutant {
                name: "quiet_too_early",
                edits: &[(
                    "stop(self.stopped);\n        let _ = self.quiet.send(());",
                    "let _ = self.quiet.send(()); stop(self.stopped);",
                )],
            },
        ],
    },
];

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let out = env::var("OUT_DIR").expect("cargo sets it");
    for source in SOURCES {
        let path = root.join(source.path);
        println!("cargo::rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // Their own tests stay at home, and text about a file has no place in a module.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let code: String =
            code.lines().filter(|line| !line.starts_with("//!")).map(|line| format!("{line}\n")).collect();
        let file = path.file_name().and_then(|name| name.to_str()).expect("a name above");
        let mut modules = module(file.trim_end_matches(".rs"), &code);
        for mutant in source.mutants {
            let broken = mutant.edits.iter().fold(code.clone(), |code, (from, to)| {
                assert_eq!(code.matches(from).count(), 1, "{}: {from:?} is to occur once", source.path);
                code.replace(from, to)
            });
            modules.push_str(&module(mutant.name, &broken));
        }
        fs::write(Path::new(&out).join(file), modules).expect("the output folder takes files");
    }
}

fn module(name: &str, code: &str) -> String {
    // Out of its package, with a part of it used.
    let allow = "#[allow(dead_code, unreachable_pub, unexpected_cfgs, reason = \"this is not its place\")]";
    format!("{allow}\nmod {name} {{\n{code}}}\n")
}
