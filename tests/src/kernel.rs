// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debian kernels: unpacked beside their headers, with modules built against them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::apt::{self, PrivateApt};
use crate::{paths, process};

/// How many built modules stay in the cache.
const KEEP: usize = 12;

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    root: PathBuf,
    release: String,
}

impl Kernel {
    /// Debian 12's own kernel, Linux 6.1.
    pub fn debian() -> Result<Self> {
        Self::from_suite("kernel-debian", apt::RELEASE)
    }

    /// The kernel of Debian 12's backports, Linux 6.12.
    pub fn backports() -> Result<Self> {
        Self::from_suite("kernel-backports", apt::BACKPORTS)
    }

    /// Every kernel that guests are tested with.
    pub fn all() -> Result<[Self; 2]> {
        Ok([Self::debian()?, Self::backports()?])
    }

    fn from_suite(name: &str, suite: &str) -> Result<Self> {
        let root = apt::cached_tree(name, |into| unpack(suite, into))?;
        let releases = children(&root.join("lib/modules"))?;
        let [release] = releases.as_slice() else {
            bail!("{} holds {} kernels instead of one", root.display(), releases.len());
        };
        let kernel = Self { release: release.clone(), root };
        kernel.anchor_headers()?;
        Ok(kernel)
    }

    /// As `uname -r` says it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The first two numbers of the release: `6.1`.
    pub fn series(&self) -> String {
        self.release.split('.').take(2).collect::<Vec<_>>().join(".")
    }

    /// The bootable image.
    pub fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// `/lib/modules/<release>`.
    pub fn modules_dir(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// What `make -C` wants.
    pub fn headers(&self) -> PathBuf {
        self.root.join(format!("usr/src/linux-headers-{}", self.release))
    }

    /// The headers' makefile includes another by its installed path. Points it at the unpacked one; done each
    /// time because the cache may have been moved.
    fn anchor_headers(&self) -> Result<()> {
        let makefile = self.headers().join("Makefile");
        let text = fs::read_to_string(&makefile).with_context(|| format!("read {}", makefile.display()))?;
        let common = text
            .trim()
            .rsplit_once("/usr/src/")
            .map(|(_, rest)| rest)
            .with_context(|| format!("{} does not include the common headers", makefile.display()))?;
        let anchored = format!("include {}/usr/src/{common}\n", self.root.display());
        if anchored != text {
            fs::write(&makefile, anchored)?;
        }
        Ok(())
    }

    /// Builds the external module in `source` and gives the folder with its `.ko` files. Compiler warnings are
    /// errors. Built in a copy; the same source is built once.
    pub fn build_module(&self, source: &Path) -> Result<PathBuf> {
        let files = source_files(source)?;
        let mut digest = Sha256::new();
        for (name, source) in &files {
            digest.update(format!("{name}\0{:o} {}\n", source.mode, source.bytes.len()));
            digest.update(&source.bytes);
        }
        let key = crate::hex(&digest.finalize()[..8]);
        let what = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let modules = paths::cache_dir()?.join("modules");
        fs::create_dir_all(&modules)?;
        paths::keep_newest(&modules, "", KEEP)?;
        apt::cached_tree(&format!("modules/{what}-{}-{key}", self.release), |into| {
            for (name, source) in &files {
                let path = into.join(name);
                fs::create_dir_all(path.parent().unwrap_or(into))?;
                fs::write(&path, &source.bytes)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(source.mode))?;
            }
            self.make(into)
        })
    }

    fn make(&self, dir: &Path) -> Result<()> {
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let mut make = Command::new(paths::tool("make")?);
        // cargo's own job server, if one is passed on, is not make's.
        make.env_remove("MAKEFLAGS").env_remove("MFLAGS").env("LC_ALL", "C");
        make.arg(format!("-j{jobs}")).arg("-C").arg(self.headers());
        make.arg(format!("M={}", dir.display())).args(["W=1", "modules"]);
        // Type information serves tracing and would need pahole.
        make.arg("CONFIG_DEBUG_INFO_BTF_MODULES=");
        let output = make.stdin(Stdio::null()).output().context("start make")?;
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("the module does not build for {}:\n{}", self.release, process::tail(&said, 60));
        }
        let warned = said.lines().any(|line| {
            line.contains("warning:") && !line.starts_with("warning: the compiler differs")
                || line.starts_with("WARNING:")
        });
        if warned {
            bail!("the module builds with warnings for {}:\n{}", self.release, process::tail(&said, 60));
        }
        Ok(())
    }
}

fn unpack(suite: &str, into: &Path) -> Result<()> {
    let apt = PrivateApt::open()?;
    let pick = |package: &str, wanted: &dyn Fn(&str) -> bool| -> Result<String> {
        apt.depends(package, suite)?
            .into_iter()
            .find(|name| wanted(name))
            .with_context(|| format!("{package} of {suite} does not depend on what was expected"))
    };
    let image = pick("linux-image-cloud-amd64", &|name| name.starts_with("linux-image-"))?;
    let headers = pick("linux-headers-cloud-amd64", &|name| name.starts_with("linux-headers-"))?;
    let common = pick(&headers, &|name| name.starts_with("linux-headers-") && name.ends_with("-common"))?;
    let kbuild = pick(&headers, &|name| name.starts_with("linux-kbuild-"))?;
    let release = image.trim_start_matches("linux-image-").to_owned();
    if headers.trim_start_matches("linux-headers-") != release {
        bail!("kernel {image} and {headers} are of different builds");
    }
    apt.unpack(&[image, headers, common, kbuild], into)?;
    // The headers bring dangling links into /usr/src; the tools of the host must not follow them.
    for link in ["build", "source"] {
        let _ = fs::remove_file(into.join("lib/modules").join(&release).join(link));
    }
    let modules = into.join("lib/modules").join(&release).join("kernel");
    let packed: Vec<PathBuf> =
        walk(&modules)?.into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "xz")).collect();
    if !packed.is_empty() {
        // Done once here, it need not be done under emulation at each boot.
        process::run(Command::new(paths::tool("xz")?).args(["-d", "-T0"]).args(&packed))?;
    }
    process::run(Command::new(paths::tool("depmod")?).arg("-b").arg(into).arg(&release))?;
    Ok(())
}

#[derive(Debug)]
struct Source {
    bytes: Vec<u8>,
    /// A build may run scripts of its own.
    mode: u32,
}

/// The names in a folder, sorted.
fn children(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Every file below a folder, sorted.
pub(crate) fn walk(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in children(dir)? {
        let path = dir.join(name);
        if path.is_dir() && !path.is_symlink() {
            found.extend(walk(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

/// A module's sources by relative path; what a build by hand left behind is not one.
fn source_files(source: &Path) -> Result<BTreeMap<String, Source>> {
    let mut files = BTreeMap::new();
    for path in walk(source)? {
        let name = path.strip_prefix(source)?.to_string_lossy().into_owned();
        if !is_build_product(&name) {
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            let mode = fs::metadata(&path)?.permissions().mode();
            files.insert(name, Source { bytes, mode });
        }
    }
    if files.is_empty() {
        bail!("no module sources in {}", source.display());
    }
    Ok(files)
}

fn is_build_product(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    let extension = last.rsplit('.').next().unwrap_or_default();
    last.starts_with('.')
        || last.ends_with(".mod.c")
        || ["o", "ko", "mod", "cmd", "d", "a"].contains(&extension)
        || ["Module.symvers", "modules.order"].contains(&last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_build_left_behind_is_not_source() {
        for name in ["vssd.o", "vssd.mod.c", ".vssd.o.cmd", "modules.order", "a/.tmp_x", "vssd.ko"] {
            assert!(is_build_product(name), "{name}");
        }
        for name in ["Kbuild", "vssd_main.c", "vssd_abi.h", "conftest.sh", "tests/probe.c"] {
            assert!(!is_build_product(name), "{name}");
        }
    }
}
