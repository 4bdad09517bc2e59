// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest images: a Debian kernel and an initramfs with busybox, kernel modules, host tools and the agent.
//!
//! The initramfs is the whole system; nothing is installed and every boot starts from the same state. The file
//! systems and the tools are what Debian ships, with the libraries they are linked with.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::apt::{self, PrivateApt};
use crate::cpio::Archive;
use crate::kernel::{Kernel, walk};
use crate::qemu::QemuBinary;
use crate::{hex, paths, process};

/// Modules that the first process loads, with all that they need.
const INIT_MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtio_blk"];

/// Modules that are there when wanted, with all that they need. A name the kernel has built in is skipped.
const MODULES: &[&str] = &["ext4", "xfs", "loop", "crc32c_generic", "crc32c_intel", "crc32_pclmul"];

/// Programs of the host that go into every guest, before busybox's in the path.
const TOOLS: &[&str] = &[
    "blkdiscard",
    "blockdev",
    "dd",
    "debugfs",
    "dumpe2fs",
    "e2fsck",
    "fsck.ext4",
    "fstrim",
    "mkfs.ext4",
    "mkfs.xfs",
    "modprobe",
    "resize2fs",
    "rmmod",
    "sha256sum",
    "xfs_growfs",
    "xfs_io",
    "xfs_repair",
];

const ETC: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nmessagebus:x:100:100::/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    ),
    ("etc/group", "root:x:0:\ndisk:x:6:\nmessagebus:x:100:\nnogroup:x:65534:\n"),
    ("etc/profile", "export PATH=/tools:/usr/sbin:/usr/bin:/sbin:/bin PS1='guest# '\n"),
];

/// A word of the kernel's command line: systemd is the first process.
pub const SYSTEMD: &str = "vssd.systemd";

/// Where Debian's libraries are.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// How many images stay in the cache: more than are made while one scenario lasts.
const KEEP: usize = 24;

const INIT: &str = include_str!("init.sh");

/// What to put into an image.
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    kernel: Kernel,
    tools: Vec<String>,
    kernel_modules: Vec<String>,
    modules: Vec<PathBuf>,
    files: Vec<(String, PathBuf)>,
    programs: Vec<Program>,
}

/// A program with the libraries that the dynamic linker would give it.
#[derive(Debug, Clone)]
struct Program {
    guest: String,
    host: PathBuf,
    /// Searched before the system's.
    libraries: Option<PathBuf>,
}

/// A kernel and an initramfs, ready to boot.
#[derive(Debug, Clone)]
pub struct GuestImage {
    kernel: Kernel,
    initramfs: PathBuf,
}

impl GuestImage {
    /// An image with stock drivers only.
    pub fn stock(kernel: &Kernel) -> Result<Self> {
        ImageBuilder::new(kernel).build()
    }

    /// An image that also has our driver (`modprobe vssd`) and its helper, built for this kernel.
    pub fn with_driver(kernel: &Kernel) -> Result<Self> {
        ImageBuilder::new(kernel).driver()?.build()
    }

    /// The kernel it boots.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The cpio archive.
    pub fn initramfs(&self) -> &Path {
        &self.initramfs
    }
}

impl ImageBuilder {
    /// The usual tools and modules.
    pub fn new(kernel: &Kernel) -> Self {
        Self {
            kernel: kernel.clone(),
            tools: TOOLS.iter().map(|&name| name.to_owned()).collect(),
            kernel_modules: INIT_MODULES.iter().chain(MODULES).map(|&name| name.to_owned()).collect(),
            modules: Vec::new(),
            files: Vec::new(),
            programs: Vec::new(),
        }
    }

    /// Little more than busybox and the virtio drivers: for a guest that is emulated twice.
    pub fn small(kernel: &Kernel) -> Self {
        let mut builder = Self::new(kernel);
        builder.tools = vec!["modprobe".to_owned()];
        builder.kernel_modules = INIT_MODULES.iter().map(|&name| name.to_owned()).collect();
        builder
    }

    /// Adds a program of the host, with its libraries. (`fio` is not among the usual ones: Debian's is linked with
    /// 80 MB of storage clients.)
    #[must_use]
    pub fn tool(mut self, name: &str) -> Self {
        self.tools.push(name.to_owned());
        self
    }

    /// Adds a module of the kernel, with all that it needs.
    #[must_use]
    pub fn kernel_module(mut self, name: &str) -> Self {
        self.kernel_modules.push(name.to_owned());
        self
    }

    /// Adds every `.ko` of a folder made by [`Kernel::build_module`].
    #[must_use]
    pub fn modules(mut self, built: &Path) -> Self {
        self.modules.push(built.to_path_buf());
        self
    }

    /// Adds a file of the host at an absolute path in the guest, with the host's mode.
    #[must_use]
    pub fn file(mut self, guest: &str, host: &Path) -> Self {
        self.files.push((guest.trim_start_matches('/').to_owned(), host.to_path_buf()));
        self
    }

    /// Adds a program of this workspace, with its libraries.
    pub fn artifact(mut self, package: &str, bin: &str) -> Result<Self> {
        self.programs.push(Program::new(format!("tools/{bin}"), paths::artifact(package, bin)?));
        Ok(self)
    }

    /// Adds a program of an unpacked Debian package at its place in the tree `root`, with its libraries: the tree's before the system's.
    #[must_use]
    pub fn unpacked(mut self, root: &Path, program: &str) -> Self {
        self.programs.push(Program {
            guest: program.to_owned(),
            host: root.join(program),
            libraries: Some(root.join(LIBRARIES)),
        });
        self
    }

    /// Adds a folder of an unpacked Debian package at its place in the tree `root`, with all that is in it.
    pub fn unpacked_dir(mut self, root: &Path, dir: &str) -> Result<Self> {
        for path in walk(&root.join(dir))? {
            self.files.push((path.strip_prefix(root)?.to_string_lossy().into_owned(), path));
        }
        Ok(self)
    }

    /// Adds a QEMU, with what it reads from its data folders for a machine without a display and a network card.
    pub fn qemu(mut self, qemu: &QemuBinary) -> Result<Self> {
        for name in ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"] {
            self = self.file(&format!("/usr/share/qemu/{name}"), &qemu.data_file(name)?);
        }
        self.programs.push(Program {
            guest: "usr/bin/qemu-system-x86_64".to_owned(),
            host: qemu.program().to_path_buf(),
            libraries: qemu.libraries().map(Path::to_path_buf),
        });
        Ok(self)
    }

    /// Adds Debian's QEMU guest agent as `/tools/qemu-ga`. Unpacked: installed, it would serve this machine.
    pub fn qemu_agent(mut self) -> Result<Self> {
        const PACKAGE: &str = "qemu-guest-agent";
        let root = apt::cached_tree(PACKAGE, |into| PrivateApt::open()?.unpack(&[PACKAGE.to_owned()], into))?;
        self.programs.push(Program::new("tools/qemu-ga".to_owned(), root.join("usr/sbin/qemu-ga")));
        Ok(self)
    }

    /// Adds the two files of another image: `/guests/<name>/kernel` and `/guests/<name>/initramfs`.
    #[must_use]
    pub fn guest(self, name: &str, image: &GuestImage) -> Self {
        self.file(&format!("/guests/{name}/kernel"), &image.kernel.image())
            .file(&format!("/guests/{name}/initramfs"), &image.initramfs)
    }

    /// Adds our driver, built from `guest-driver/`, and its bind helper.
    pub fn driver(mut self) -> Result<Self> {
        let source = paths::repo_root().join("guest-driver");
        let built = self.kernel.build_module(&source)?;
        self.modules.push(built);
        let helper = source.join("vssd-bind");
        Ok(if helper.exists() { self.file("/tools/vssd-bind", &helper) } else { self })
    }

    /// Adds Debian's systemd, its journal and its targets, for guests booted with [`SYSTEMD`].
    pub fn systemd(mut self) -> Result<Self> {
        const DIR: &str = "/lib/systemd";
        for program in ["systemd", "systemd-journald", "systemd-shutdown"] {
            let guest = format!("usr/lib/systemd/{program}");
            self.programs.push(Program::new(guest, Path::new(DIR).join(program)));
        }
        for tool in ["systemctl", "journalctl"] {
            self.programs.push(Program::new(format!("tools/{tool}"), paths::tool(tool)?));
        }
        for entry in fs::read_dir(Path::new(DIR).join("system")).context("list the units of systemd")? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_wanted = name.ends_with(".target") || name.starts_with("systemd-journald");
            if is_wanted && path.is_file() {
                self.files.push((format!("usr/lib/systemd/system/{name}"), path));
            }
        }
        let ours = paths::repo_root().join("tests/src/systemd");
        Ok(self
            .file("/etc/systemd/system/guest-agent.service", &ours.join("guest-agent.service"))
            .file("/etc/systemd/system/multi-user.target.d/wanted.conf", &ours.join("wanted.conf")))
    }

    /// Adds a message bus and systemd's own logind, which announces shutdowns on it, to [`Self::systemd`].
    pub fn logind(mut self) -> Result<Self> {
        const DIR: &str = "/lib/systemd";
        const DBUS: &str = "/usr/share/dbus-1";
        let logind = Path::new(DIR).join("systemd-logind");
        self.programs.push(Program::new("usr/lib/systemd/systemd-logind".to_owned(), logind));
        self.programs.push(Program::new("usr/bin/dbus-daemon".to_owned(), paths::tool("dbus-daemon")?));
        self = self.tool("busctl").tool("systemd-inhibit");
        for unit in [
            "dbus.service",
            "dbus.socket",
            "systemd-logind.service",
            "systemd-poweroff.service",
            "systemd-reboot.service",
            "user.slice",
        ] {
            let host = Path::new(DIR).join("system").join(unit);
            self = self.file(&format!("/usr/lib/systemd/system/{unit}"), &host);
        }
        for config in
            ["system.conf", "system.d/org.freedesktop.login1.conf", "system.d/org.freedesktop.systemd1.conf"]
        {
            let path = format!("{DBUS}/{config}");
            self = self.file(&path, Path::new(&path));
        }
        Ok(self)
    }

    /// Makes the image, or finds the one made before from the same inputs.
    pub fn build(self) -> Result<GuestImage> {
        let inputs = self.inputs()?;
        let key = inputs.key(&self.kernel);
        let dir = paths::cache_dir()?.join("images");
        fs::create_dir_all(&dir)?;
        let initramfs = dir.join(format!("{}-{key}.cpio", self.kernel.release()));
        if !initramfs.exists() {
            let _lock = paths::lock_cache("image")?;
            if !initramfs.exists() {
                let partial = initramfs.with_extension("partial");
                fs::write(&partial, inputs.pack(&self.kernel)?)?;
                fs::rename(&partial, &initramfs)?;
                // Each change of the driver makes another.
                paths::keep_newest(&dir, ".cpio", KEEP)?;
            }
        }
        Ok(GuestImage { kernel: self.kernel, initramfs })
    }

    /// Every file that goes in, by its path in the guest.
    fn inputs(&self) -> Result<Inputs> {
        let busybox = busybox()?;
        let mut inputs = Inputs { kernel_modules: self.kernel_modules.clone(), ..Inputs::default() };
        inputs.files.insert("usr/bin/busybox".into(), busybox);
        let agent = paths::artifact("vssd-tests", "guest_agent")?;
        inputs.program(&Program::new("usr/bin/guest_agent".to_owned(), agent))?;
        for name in &self.tools {
            inputs.program(&Program::new(format!("tools/{name}"), paths::tool(name)?))?;
        }
        let mke2fs = PathBuf::from("/etc/mke2fs.conf");
        if mke2fs.exists() {
            inputs.files.insert("etc/mke2fs.conf".into(), mke2fs);
        }
        for (guest, host) in &self.files {
            inputs.files.insert(guest.clone(), host.clone());
        }
        for program in &self.programs {
            inputs.program(program)?;
        }
        for dir in &self.modules {
            for path in walk(dir)? {
                if path.extension().is_some_and(|ext| ext == "ko") {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    inputs.extra_modules.insert(name, path);
                }
            }
        }
        Ok(inputs)
    }
}

impl Program {
    fn new(guest: String, host: PathBuf) -> Self {
        Self { guest, host, libraries: None }
    }
}

#[derive(Debug, Default)]
struct Inputs {
    kernel_modules: Vec<String>,
    files: BTreeMap<String, PathBuf>,
    extra_modules: BTreeMap<String, PathBuf>,
}

impl Inputs {
    fn program(&mut self, program: &Program) -> Result<()> {
        let Program { guest, host, libraries } = program;
        self.files.insert(guest.clone(), host.clone());
        let mut ldd = Command::new("ldd");
        if let Some(libraries) = libraries {
            ldd.env("LD_LIBRARY_PATH", libraries);
        }
        // ldd fails for what is not a dynamic executable; a script needs no libraries either.
        let Ok(said) = process::run(ldd.env("LC_ALL", "C").arg(host)) else {
            return Ok(());
        };
        for line in said.lines() {
            // "libx.so.1 => /lib/…/libx.so.1 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)"
            let word = line.split_once("=>").map_or(line, |(_, right)| right);
            let Some(path) = word.split_whitespace().next() else {
                continue;
            };
            if path == "not" {
                bail!("{} lacks a library: {}", host.display(), line.trim());
            }
            if path.starts_with('/') {
                let host = PathBuf::from(path);
                let own = libraries.as_ref().and_then(|dir| host.strip_prefix(dir).ok());
                let guest =
                    own.map_or_else(|| merged_usr(path), |name| format!("{LIBRARIES}/{}", name.display()));
                self.files.insert(guest, host);
            }
        }
        Ok(())
    }

    fn key(&self, kernel: &Kernel) -> String {
        let mut digest = Sha256::new();
        digest.update(kernel.release());
        digest.update(INIT);
        digest.update(format!("{:?} {ETC:?}", self.kernel_modules));
        for (guest, host) in self.files.iter().chain(&self.extra_modules) {
            digest.update(guest);
            // Size and time stand for the contents: hashing 30 MB at each boot would cost more than it finds.
            if let Ok(meta) = fs::metadata(host) {
                digest.update(format!(" {} {}.{}\n", meta.len(), meta.mtime(), meta.mtime_nsec()));
            }
            digest.update(host.as_os_str().as_encoded_bytes());
        }
        hex(&digest.finalize()[..8])
    }

    fn pack(&self, kernel: &Kernel) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for dir in ["dev", "proc", "sys", "tmp", "run", "root", "mnt", "tools", "usr/sbin", "etc"] {
            archive.directory(dir);
        }
        for link in ["bin", "sbin", "lib", "lib64"] {
            archive.directory(&format!("usr/{link}"));
            archive.link(link, &format!("usr/{link}"));
        }
        archive.link("var/run", "/run");
        archive.link("etc/mtab", "/proc/mounts");
        archive.file("init", INIT.as_bytes().to_vec(), 0o755);
        for (path, text) in ETC {
            archive.file(path, text.as_bytes().to_vec(), 0o644);
        }
        for (guest, host) in &self.files {
            let bytes = contents(host).with_context(|| format!("read {}", host.display()))?;
            let mode = fs::metadata(host)?.mode() & 0o777;
            archive.file(guest, bytes, mode);
        }
        if let Some(busybox) = self.files.get("usr/bin/busybox") {
            let applets = process::run(Command::new(busybox).arg("--list-full"))?;
            for applet in applets.lines() {
                let path = merged_usr(applet);
                if path != "usr/bin/busybox" && !path.starts_with("linuxrc") {
                    archive.link(&path, "/usr/bin/busybox");
                }
            }
        }
        // The kernel's own module loading calls this path.
        archive.link("usr/sbin/modprobe", "/tools/modprobe");
        self.pack_modules(kernel, &mut archive)?;
        Ok(archive.finish())
    }

    /// Copies the modules that are wanted and lets `depmod` index what the guest will have.
    fn pack_modules(&self, kernel: &Kernel, archive: &mut Archive) -> Result<()> {
        let stage = tempfile::tempdir()?;
        let relative = format!("lib/modules/{}", kernel.release());
        let into = stage.path().join(&relative);
        let from = kernel.modules_dir();
        let wanted = closure(&from, &self.kernel_modules, &self.extra_modules)?;
        for module in &wanted {
            copy(&from.join(module), &into.join(module))?;
        }
        for (name, path) in &self.extra_modules {
            copy(path, &into.join("extra").join(name))?;
        }
        for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
            copy(&from.join(name), &into.join(name))?;
        }
        process::run(Command::new(paths::tool("depmod")?).arg("-b").arg(stage.path()).arg(kernel.release()))?;
        for path in walk(&into)? {
            let name = path.strip_prefix(stage.path())?.to_string_lossy().into_owned();
            archive.file(&format!("usr/{name}"), fs::read(&path)?, 0o644);
        }
        Ok(())
    }
}

/// The files of `names` and of all they depend on, from `modules.dep`.
fn closure(dir: &Path, names: &[String], extra: &BTreeMap<String, PathBuf>) -> Result<BTreeSet<String>> {
    let dep = fs::read_to_string(dir.join("modules.dep"))?;
    let builtin = fs::read_to_string(dir.join("modules.builtin"))?;
    let index: BTreeMap<String, (&str, &str)> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (module_name(path), (path, needs)))
        .collect();
    let built_in: BTreeSet<String> = builtin.lines().map(module_name).collect();

    let mut names = names.to_vec();
    for path in extra.values() {
        names.extend(needed_by(path)?);
    }
    let ours: BTreeSet<String> = extra.keys().map(|name| module_name(name)).collect();
    let mut found = BTreeSet::new();
    for name in names {
        if let Some((path, needs)) = index.get(&name) {
            found.insert((*path).to_owned());
            found.extend(needs.split_whitespace().map(str::to_owned));
        } else if !built_in.contains(&name) && !ours.contains(&name) {
            bail!("the kernel in {} has no module {name}", dir.display());
        }
    }
    Ok(found)
}

/// What a module file says it depends on.
fn needed_by(module: &Path) -> Result<Vec<String>> {
    let said = process::run(Command::new(paths::tool("modinfo")?).args(["-F", "depends"]).arg(module))?;
    Ok(said.trim().split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// `/lib/x` and `/usr/lib/x` are one place on Debian, and in the guest.
fn merged_usr(path: &str) -> String {
    let path = path.trim_start_matches('/');
    if path.starts_with("usr/") { path.to_owned() } else { format!("usr/{path}") }
}

/// A file as it goes into an image. Programs of this workspace leave their debugging information behind: it is most of
/// them, and a guest would have to unpack it at each boot.
fn contents(host: &Path) -> Result<Vec<u8>> {
    if !host.starts_with(paths::profile_dir()?) {
        return Ok(fs::read(host)?);
    }
    let stripped = tempfile::NamedTempFile::new()?;
    let mut strip = Command::new(paths::tool("strip")?);
    process::run(strip.arg("--strip-debug").arg("-o").arg(stripped.path()).arg(host))?;
    Ok(fs::read(stripped.path())?)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    Ok(())
}

/// Debian's static busybox, unpacked: installing it would take the place of another busybox.
fn busybox() -> Result<PathBuf> {
    let root =
        apt::cached_tree("busybox", |into| PrivateApt::open()?.unpack(&["busybox-static".to_owned()], into))?;
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|path| root.join(path))
        .find(|path| path.exists())
        .with_context(|| format!("no busybox in {}", root.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_are_compared_as_the_kernel_does() {
        assert_eq!(module_name("kernel/crypto/crc32c-intel.ko.xz"), "crc32c_intel");
        assert_eq!(module_name("virtio_blk.ko"), "virtio_blk");
    }

    #[test]
    fn a_module_brings_all_it_needs_and_a_built_in_one_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("modules.dep"),
            "kernel/a/virtio_blk.ko: kernel/b/virtio_ring.ko kernel/b/virtio.ko\nkernel/b/virtio.ko:\n",
        )
        .unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/c/crc32c-intel.ko\n").unwrap();
        let found =
            closure(dir.path(), &["virtio_blk".to_owned(), "crc32c_intel".to_owned()], &BTreeMap::new())
                .unwrap();
        let expected = ["kernel/a/virtio_blk.ko", "kernel/b/virtio.ko", "kernel/b/virtio_ring.ko"];
        assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), expected);
        assert!(closure(dir.path(), &["nonsense".to_owned()], &BTreeMap::new()).is_err());
    }
}
