// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The stand-in, as a program that a definition can name.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

/// Long enough for a process on a machine that does much else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Where the guest counts.
const PLACE: u64 = 0x1000;

const PACKAGE: &str = env!("CARGO_MANIFEST_DIR");

/// Its executable, built if need be: a run of this test alone builds no examples.
static STAND_IN: LazyLock<PathBuf> = LazyLock::new(|| {
    let this = env::current_exe().unwrap();
    // target/PROFILE/deps/TEST
    let profile = this.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples/cloud_hypervisor_stand_in");
    if is_up_to_date(&program) {
        return program;
    }
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", "vm-host", "--example", "cloud_hypervisor_stand_in"]);
    cargo.arg("--target-dir").arg(profile.parent().unwrap()).current_dir(PACKAGE);
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().unwrap().success(), "the stand-in is not built");
    program
});

/// It uses nothing of this package but its own sources.
fn is_up_to_date(program: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let sources = fs::read_dir(Path::new(PACKAGE).join("tests/cloud_hypervisor_stand_in")).unwrap();
    time(program).is_ok_and(|built| sources.flatten().all(|file| time(&file.path()).unwrap() < built))
}

/// A program in `dir` that is the stand-in, and the folder from which that takes its orders.
#[derive(Debug)]
pub(crate) struct StandIn {
    pub(crate) program: PathBuf,
    orders: PathBuf,
}

impl StandIn {
    pub(crate) fn make(dir: &Path) -> Self {
        let (program, orders) = (dir.join("cloud-hypervisor"), dir.join("orders"));
        fs::create_dir(&orders).unwrap();
        let script =
            format!("#!/bin/sh\nexec '{}' --orders '{}' \"$@\"\n", STAND_IN.display(), orders.display());
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { program, orders }
    }

    /// What it is to do wrong next, or its guest of itself.
    pub(crate) fn order(&self, name: &str, what: &str) {
        // Whole at once: it looks for it all the time.
        let new = self.orders.with_extension("new");
        fs::write(&new, what).unwrap();
        fs::rename(new, self.orders.join(name)).unwrap();
    }

    /// Orders that were not carried out.
    pub(crate) fn orders_left(&self) -> usize {
        fs::read_dir(&self.orders).unwrap().count()
    }
}

/// How far the guest with this memory has counted.
pub(crate) fn count(memory: &Path) -> u64 {
    let mut number = [0; 8];
    File::open(memory).unwrap().read_exact_at(&mut number, PLACE).unwrap();
    u64::from_le_bytes(number)
}

/// Waits until the guest counts on.
pub(crate) fn expect_counting(memory: &Path) -> u64 {
    let before = count(memory);
    wait_for("the guest to count on", || count(memory) > before + 2);
    before
}

/// Whether the guest stands still.
pub(crate) fn expect_still(memory: &Path) -> u64 {
    let before = count(memory);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(count(memory), before, "the guest counts on");
    before
}

pub(crate) fn wait_for(what: &str, mut happens: impl FnMut() -> bool) {
    let give_up = Instant::now() + PATIENCE;
    while !happens() {
        assert!(Instant::now() < give_up, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
