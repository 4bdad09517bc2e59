// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where things are: the checkout, the build results, the cache of unpacked Debian packages.

use std::collections::HashSet;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::process;

/// Set by a caller that has already built every binary, so that none is rebuilt on demand, and that starts the programs with guests.
pub const PREBUILT_ENV: &str = "VSSD_TESTS_PREBUILT";
/// Another daemon than the one of this checkout's build: a path.
pub const BACKEND_ENV: &str = "VSSD_TESTS_BACKEND";
/// Overrides the cache folder.
pub const CACHE_ENV: &str = "VSSD_GUEST_CACHE";

/// The root of the checkout this library was built from.
pub fn repo_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// The folder that holds this executable's siblings (`target/debug` or `target/release`).
pub fn profile_dir() -> Result<PathBuf> {
    let exe = env::current_exe().context("where is this executable")?;
    // target/<profile>/xtask, target/<profile>/deps/<test>-<hash>: the profile folder is the one below CACHEDIR.TAG.
    exe.ancestors()
        .find(|dir| dir.parent().is_some_and(|up| up.join("CACHEDIR.TAG").exists()))
        .map(Path::to_path_buf)
        .with_context(|| format!("{} is not inside a cargo target folder", exe.display()))
}

/// Downloads, unpacked packages, guest images and modules; everything in it can be made again.
pub fn cache_dir() -> Result<PathBuf> {
    let dir = match env::var_os(CACHE_ENV) {
        Some(dir) => PathBuf::from(dir),
        None => profile_dir()?.parent().context("a profile folder has a parent")?.join("guest-cache"),
    };
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

/// Held while something in the cache is made, so that two test processes do not make it twice.
/// Released when the value is dropped.
#[derive(Debug)]
pub struct CacheLock(#[allow(dead_code, reason = "the open file is the lock")] File);

/// Waits for the lock called `name`.
pub fn lock_cache(name: &str) -> Result<CacheLock> {
    let path = cache_dir()?.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    file.lock().with_context(|| format!("lock {}", path.display()))?;
    Ok(CacheLock(file))
}

/// The path of a binary of this workspace, built first unless the caller says that was done.
pub fn artifact(package: &str, bin: &str) -> Result<PathBuf> {
    if bin == "vssd-backend"
        && let Some(path) = env::var_os(BACKEND_ENV)
    {
        return Ok(path.into());
    }
    target(package, "--bin", bin)
}

/// The path of an example of this workspace, built first unless the caller says that was done.
pub fn example(package: &str, name: &str) -> Result<PathBuf> {
    target(package, "--example", name)
}

fn target(package: &str, kind: &str, name: &str) -> Result<PathBuf> {
    static BUILT: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);
    let dir = profile_dir()?;
    let path = if kind == "--example" { dir.join("examples").join(name) } else { dir.join(name) };
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if built.contains(&path) {
        return Ok(path);
    }
    if env::var_os(PREBUILT_ENV).is_none() {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(repo_root());
        cargo.args(["build", "--quiet", "--package", package, kind, name]);
        cargo.arg("--target-dir").arg(dir.parent().unwrap_or(&dir));
        if dir.ends_with("release") {
            cargo.arg("--release");
        }
        process::run(&mut cargo)?;
    }
    if !path.exists() {
        bail!("{} is not built; run: cargo build --package {package}", path.display());
    }
    built.insert(path.clone());
    Ok(path)
}

/// Finds an executable the way root's shell would, whatever the caller's `PATH` leaves out.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(PathBuf::from)
        .chain(env::split_paths(&path))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// As [`find_tool`], with an error that names the remedy.
pub fn tool(name: &str) -> Result<PathBuf> {
    find_tool(name).with_context(|| format!("{name} is not installed; run: cargo xtask setup"))
}

/// Removes all but the `keep` newest entries of a folder whose name ends in `suffix`.
pub fn keep_newest(dir: &Path, suffix: &str, keep: usize) -> Result<()> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(suffix) {
            // Another process may be at the same.
            if let Ok(meta) = fs::metadata(&path)
                && let Ok(time) = meta.modified()
            {
                entries.push((time, meta.is_dir(), path));
            }
        }
    }
    entries.sort();
    for (_, is_dir, path) in entries.iter().rev().skip(keep) {
        let _ = if *is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn the_oldest_files_of_a_kind_go() {
        let dir = tempfile::tempdir().unwrap();
        for (age, name) in [(30, "old.log"), (20, "middle.log"), (10, "new.log"), (40, "other.txt")] {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        keep_newest(dir.path(), ".log", 2).unwrap();
        let left = |name: &str| dir.path().join(name).exists();
        assert!(left("new.log") && left("middle.log") && left("other.txt"));
        assert!(!left("old.log"));
    }
}
