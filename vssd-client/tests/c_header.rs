// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The C header: it compiles without a warning, reads what the driver writes, and writes what the agent reads.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use vssd_client::format::{self, HintList};
use vssd_client::{BlockRange, Cost};

fn compile(out: &Path, options: &[&str], source: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut gcc = Command::new("gcc");
    gcc.args(["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion", "-pedantic", "-I"])
        .arg(root.join("include"))
        .args(options)
        .arg(root.join(source))
        .arg("-o")
        .arg(out);
    succeeded(&gcc.output().expect("gcc is installed"));
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_c_program_reads_what_the_driver_writes_and_writes_what_the_agent_reads() {
    let dir = tempfile::tempdir().unwrap();
    let (proc, hints) = (dir.path().join("proc"), dir.path().join("hints"));
    fs::create_dir_all(proc.join("vssda")).unwrap();
    fs::create_dir_all(hints.join("vssda")).unwrap();
    let sizes = "requested_blocks 100\nplugged_blocks 400\n";
    for (file, text) in [
        (
            "status",
            format!(
                "name vm1\nepoch 1\nstate shrinking\nseq 7\nblock_size 65536\ntotal_blocks 512\n{sizes}evicted_blocks 112\n"
            ),
        ),
        (
            "request",
            format!("seq 12345678901234\n{sizes}to_give_blocks 300\ndeadline_ms 250\nreason operator\n"),
        ),
        ("evicted", "3 2\n40 2\n400 9\n".to_owned()),
    ] {
        fs::write(proc.join("vssda").join(file), text).unwrap();
    }
    fs::create_dir(proc.join("vssdb")).unwrap();
    for (file, text) in
        [("status", "block_size 65536\n"), ("request", "seq 1\nreason operator\n"), ("evicted", "3\n")]
    {
        fs::write(proc.join("vssdb").join(file), text).unwrap();
    }
    let program = dir.path().join("header");
    let place = format!("-DVSSD_PROC=\"{}\"", proc.display());
    compile(&program, &["-std=c11", "-O2", &place], "tests/header.c");
    succeeded(&Command::new(&program).arg(&hints).output().unwrap());

    let text = fs::read(hints.join("vssda/c")).unwrap();
    let ranges = [
        (Cost::CleanCold, BlockRange::new(7, 2)),
        (Cost::Free, BlockRange::new(100, 4)),
        (Cost::CleanHot, BlockRange::new(0, 1)),
        (Cost::Dirty, BlockRange::new(1, 1)),
        (Cost::CleanCold, BlockRange::new(2, 1)),
    ];
    assert_eq!(
        format::parse(&text, 512),
        HintList { ranges: ranges.to_vec(), wanted_blocks: 64, fault: None }
    );
    assert_eq!(fs::read_dir(hints.join("vssda")).unwrap().count(), 1, "nothing is left aside");
}

#[test]
fn the_example_compiles_whatever_the_dialect() {
    let dir = tempfile::tempdir().unwrap();
    for options in
        [&["-std=c11"][..], &["-std=gnu11"], &["-std=c17", "-D_GNU_SOURCE"], &["-std=c11", "-O0", "-m64"]]
    {
        compile(&dir.path().join("give_blocks"), options, "examples/give_blocks.c");
    }
}
