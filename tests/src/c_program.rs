// SPDX-License-Identifier: Apache-2.0 OR MIT
//! C programs of the workspace, compiled as strictly as a stranger's might be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, process};

/// Compiles `source` with the headers in `include`, both relative to the checkout, and gives the program's path.
pub fn compile(source: &str, include: &str) -> Result<PathBuf> {
    let source = paths::repo_root().join(source);
    let name = source.file_stem().with_context(|| format!("{} names no file", source.display()))?;
    let dir = paths::cache_dir()?.join("c-programs");
    fs::create_dir_all(&dir)?;
    let program = dir.join(name);
    let name = name.to_string_lossy().into_owned();
    let _lock = paths::lock_cache(&name)?;
    let partial = program.with_extension("partial");
    let mut gcc = Command::new(paths::tool("gcc")?);
    gcc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-std=c11", "-pedantic", "-I"]);
    gcc.arg(paths::repo_root().join(include)).arg("-o").arg(&partial).arg(&source);
    process::run(&mut gcc)?;
    // A new time would make a new guest image.
    if !is_same(&partial, &program) {
        fs::rename(&partial, &program)?;
    }
    Ok(program)
}

fn is_same(a: &Path, b: &Path) -> bool {
    fs::read(a).ok().zip(fs::read(b).ok()).is_some_and(|(a, b)| a == b)
}
