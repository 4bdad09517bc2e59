// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Takes the sources that are run through schedules, as they are and with one thing broken: a check that finds nothing wrong
//! with the broken ones proves nothing. Each source becomes a file of modules that a test includes.

use std::path::Path;
use std::{env, fs};

struct Source {
    path: &'static str,
    mutants: &'static [Mutant],
}

/// `from`, which occurs once, becomes `to`.
struct Mutant {
    name: &'static str,
    from: &'static str,
    to: &'static str,
}

const SOURCES: &[Source] = &[
    Source {
        path: "vssd-pool/src/grace.rs",
        mutants: &[
            Mutant { name: "one_round", from: "for _ in 0..2 {", to: "for _ in 0..1 {" },
            Mutant {
                name: "reader_without_fence",
                from: "self.hold(slot, parity);\n        fence(Ordering::SeqCst);",
                to: "self.hold(slot, parity);",
            },
            Mutant { name: "owner_without_fence", from: "fence(Ordering::SeqCst);\n        for", to: "for" },
            Mutant { name: "leave_relaxed", from: "- 1, Ordering::Release", to: "- 1, Ordering::Relaxed" },
            Mutant {
                name: "wait_relaxed",
                from: "[parity].load(Ordering::Acquire)",
                to: "[parity].load(Ordering::Relaxed)",
            },
        ],
    },
    Source {
        path: "vssd-pool/src/map.rs",
        mutants: &[Mutant {
            name: "exchange_in_two_steps",
            from: "slot.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire).map(|_| ()).map_err(Entry)",
            to: "{ let now = slot.load(Ordering::Acquire); if now != from.0 { return Err(Entry(now)); } \
                 slot.store(to.0, Ordering::Release); Ok(()) }",
        }],
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
        for Mutant { name, from, to } in source.mutants {
            assert_eq!(code.matches(from).count(), 1, "{}: {from:?} stands there once", source.path);
            modules.push_str(&module(name, &code.replace(from, to)));
        }
        fs::write(Path::new(&out).join(file), modules).expect("the output folder takes files");
    }
}

fn module(name: &str, code: &str) -> String {
    // The features are those of another package.
    let allow = "#[allow(dead_code, unexpected_cfgs, reason = \"a part of it, elsewhere\")]";
    format!("{allow}\nmod {name} {{\n{code}}}\n")
}
