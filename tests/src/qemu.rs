// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU machines: Debian's QEMU and the one of its backports, with vhost-user disks.
//!
//! KVM is used where it really boots a guest, else emulation. Override with `VSSD_ACCEL=kvm` or `tcg`.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::agent::Agent;
use crate::apt::{self, PrivateApt};
use crate::guest::{Guest, Parts};
use crate::image::GuestImage;
use crate::paths;
use crate::process::{Daemon, tail};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::wait::Deadline;
use crate::wire::PORT_NAME;

/// Chooses the accelerator instead of probing.
pub const ACCEL_ENV: &str = "VSSD_ACCEL";

/// In hardware a guest boots in a second or two.
const KVM_BOOT: Duration = Duration::from_secs(8);

/// Few boot messages, no work for hardware that is not there, and patience: a busy host starves emulated processors,
/// which is no lockup of the guest. A task that hangs is reported before a command's usual limit.
pub const CMDLINE: &str = "console=ttyS0 loglevel=5 panic=0 mitigations=off no_timer_check random.trust_cpu=on \
    rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=60 sysctl.kernel.hung_task_timeout_secs=60";

/// Where a machine's NV-RAM may begin: it is mapped in pieces of this size.
const ALIGNMENT_MIB: u32 = 1024;

/// How many guests' consoles stay in the cache.
const CONSOLES: usize = 50;

/// How the guest's processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// In hardware.
    Kvm,
    /// By translation: slow, works everywhere.
    Tcg,
}

impl Accel {
    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "emulated processors (no working KVM here)",
        })
    }
}

/// A QEMU program.
#[derive(Debug, Clone)]
pub struct QemuBinary {
    program: PathBuf,
    /// Firmware folders and libraries of an unpacked QEMU; empty for the system's.
    data: Vec<PathBuf>,
    libraries: Option<PathBuf>,
    version: (u32, u32),
}

impl QemuBinary {
    /// The installed one; 7.2 on Debian 12.
    pub fn debian() -> Result<Self> {
        Self::probe(paths::tool("qemu-system-x86_64")?, Vec::new(), None)
    }

    /// The one of Debian 12's backports, 10.0, unpacked.
    pub fn backports() -> Result<Self> {
        let root = apt::cached_tree("qemu-backports", |into| {
            let apt = PrivateApt::open()?;
            let packages = apt.missing_closure("qemu-system-x86", apt::BACKPORTS)?;
            apt.unpack(&packages, into)
        })?;
        let data = ["usr/share/qemu", "usr/share/seabios"];
        Self::probe(
            root.join("usr/bin/qemu-system-x86_64"),
            data.iter().map(|dir| root.join(dir)).collect(),
            Some(root.join("usr/lib/x86_64-linux-gnu")),
        )
    }

    fn probe(program: PathBuf, data: Vec<PathBuf>, libraries: Option<PathBuf>) -> Result<Self> {
        let mut qemu = Self { program, data, libraries, version: (0, 0) };
        let said = crate::process::run(qemu.command().arg("--version"))?;
        qemu.version = parse_version(&said).with_context(|| format!("no version in {said:?}"))?;
        Ok(qemu)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
            command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
        }
        for dir in &self.data {
            command.arg("-L").arg(dir);
        }
        command
    }

    /// Writes a program that is this one wherever it is started from, for whoever knows nothing of its folders.
    pub fn write_starter(&self, path: &Path) -> Result<()> {
        let command = self.command();
        let quoted = |text: &OsStr| format!("'{}'", text.to_string_lossy().replace('\'', r"'\''"));
        let mut text = "#!/bin/sh\n".to_owned();
        for (name, value) in command.get_envs() {
            text += &format!("export {}={}\n", name.to_string_lossy(), quoted(value.unwrap_or_default()));
        }
        text += &format!("exec {}", quoted(command.get_program()));
        command.get_args().for_each(|arg| text += &format!(" {}", quoted(arg)));
        text += " \"$@\"\n";
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(fs::set_permissions(path, Permissions::from_mode(0o755))?)
    }

    /// The executable.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Its own libraries, unless it uses the system's.
    pub(crate) fn libraries(&self) -> Option<&Path> {
        self.libraries.as_deref()
    }

    /// A file of its data folders.
    pub(crate) fn data_file(&self, name: &str) -> Result<PathBuf> {
        let system = ["/usr/share/qemu", "/usr/share/seabios"].map(PathBuf::from);
        let dirs = if self.data.is_empty() { &system[..] } else { &self.data };
        dirs.iter()
            .map(|dir| dir.join(name))
            .find(|path| path.exists())
            .with_context(|| format!("{} comes without {name}", self.program.display()))
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }
}

/// `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(said: &str) -> Option<(u32, u32)> {
    let number = said.split_once("version ")?.1.split_whitespace().next()?;
    let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
    Some((parts.next()??, parts.next()??))
}

/// A vhost-user disk of a machine.
#[derive(Debug, Clone)]
pub struct VhostUserDisk {
    socket: PathBuf,
    queues: Option<u16>,
    reconnect: bool,
    options: String,
}

impl VhostUserDisk {
    /// A disk served on `socket`, with as many queues as the machine has processors, reconnecting if its server dies.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), queues: None, reconnect: true, options: String::new() }
    }

    /// Sets the number of queues.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = Some(queues);
        self
    }

    /// QEMU does not come back to a server that went away.
    #[must_use]
    pub fn without_reconnect(mut self) -> Self {
        self.reconnect = false;
        self
    }

    /// Adds device properties: `queue-size=256,packed=on`.
    #[must_use]
    pub fn options(mut self, options: &str) -> Self {
        options.clone_into(&mut self.options);
        self
    }
}

/// An NVDIMM of a machine.
#[derive(Debug, Clone)]
struct Nvdimm {
    file: PathBuf,
    mib: u32,
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct Qemu {
    binary: QemuBinary,
    image: GuestImage,
    accel: Option<Accel>,
    cpu: Option<String>,
    memory_mib: u32,
    vcpus: u16,
    nvdimm: Option<Nvdimm>,
    disks: Vec<VhostUserDisk>,
    args: Vec<String>,
    cmdline: String,
    limit: Duration,
}

impl Qemu {
    /// A machine with two processors and 512 MiB of shared memory, and no disk.
    pub fn new(binary: QemuBinary, image: &GuestImage) -> Self {
        Self {
            binary,
            image: image.clone(),
            accel: None,
            cpu: None,
            memory_mib: 512,
            vcpus: 2,
            nvdimm: None,
            disks: Vec::new(),
            args: Vec::new(),
            cmdline: String::new(),
            limit: Duration::from_secs(120),
        }
    }

    /// Fixes the accelerator; probed otherwise.
    #[must_use]
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// Fixes the model of the processors, with its features: `EPYC,+svm`.
    #[must_use]
    pub fn cpu(mut self, model: &str) -> Self {
        self.cpu = Some(model.to_owned());
        self
    }

    /// Guest memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Virtual processors.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u16) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Adds NV-RAM whose contents are `file`'s, all of it. What the guest has stored there outlives the machine however it
    /// ends, flushed or not: its caches count as persistent (eADR).
    #[must_use]
    pub fn nvdimm(mut self, file: &Path, mib: u32) -> Self {
        self.nvdimm = Some(Nvdimm { file: file.to_path_buf(), mib });
        self
    }

    /// Adds a disk; the first added is the first on the bus.
    #[must_use]
    pub fn disk(mut self, disk: VhostUserDisk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds QEMU arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds words to the kernel command line.
    #[must_use]
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline.push(' ');
        self.cmdline.push_str(words);
        self
    }

    /// How long a boot may take.
    #[must_use]
    pub fn boot_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The command without what connects it to the test.
    fn machine(&self, accel: Accel) -> Command {
        let mut qemu = self.binary.command();
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        let mut board = "q35,memory-backend=mem".to_owned();
        let mut memory = format!("{}M", self.memory_mib);
        if let Some(Nvdimm { file, mib }) = &self.nvdimm {
            board.push_str(",nvdimm=on,nvdimm-persistence=cpu");
            memory.push_str(&format!(",slots=1,maxmem={}M", self.memory_mib + mib + ALIGNMENT_MIB));
            let file = file.display();
            qemu.args([
                "-object",
                &format!("memory-backend-file,id=nvram,share=on,size={mib}M,mem-path={file}"),
            ]);
            qemu.args(["-device", "nvdimm,id=nvdimm0,memdev=nvram"]);
        }
        // With a thread for each processor, QEMU 10.0.2 once aborted at a reset of the machine (`iotlb_to_section`: an access by
        // an entry of the TLB from before). One thread for all of them cost a boot nothing that could be measured.
        let single = accel == Accel::Tcg && self.binary.version >= (10, 0);
        let accelerator = if single { "tcg,thread=single" } else { accel.name() };
        qemu.args(["-machine", &board, "-accel", accelerator]);
        // QEMU 7.2 emulates cmpxchg16b wrongly now and then: it leaves an address in the flags, and the kernel (Linux
        // 6.12's allocator) double-faults at the next instruction. Without it the kernel takes another way.
        let cpu = match (&self.cpu, accel) {
            (Some(model), Accel::Kvm) => model.clone(),
            (None, Accel::Kvm) => "host".to_owned(),
            (model, Accel::Tcg) => format!("{},cx16=off", model.as_deref().unwrap_or("max")),
        };
        qemu.args(["-cpu", &cpu]);
        qemu.args(["-smp", &self.vcpus.to_string()]);
        qemu.args(["-m", &memory]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=mem,size={}M,share=on", self.memory_mib)]);
        qemu.arg("-kernel").arg(self.image.kernel().image());
        qemu.arg("-initrd").arg(self.image.initramfs());
        qemu.args(["-append", &format!("{CMDLINE}{}", self.cmdline)]);
        // Option renamed; the old one is refused from 10.1 on, the new one before 9.2.
        let reconnect = if self.binary.version >= (9, 2) { "reconnect-ms=200" } else { "reconnect=1" };
        for (at, disk) in self.disks.iter().enumerate() {
            let mut chardev = format!("socket,id=vu{at},path={}", disk.socket.display());
            if disk.reconnect {
                chardev.push(',');
                chardev.push_str(reconnect);
            }
            let mut device = format!("vhost-user-blk-pci,id=disk{at},chardev=vu{at}");
            if let Some(queues) = disk.queues {
                device.push_str(&format!(",num-queues={queues}"));
            }
            if !disk.options.is_empty() {
                device.push(',');
                device.push_str(&disk.options);
            }
            qemu.args(["-chardev", &chardev, "-device", &device]);
        }
        qemu.args(&self.args);
        qemu
    }

    /// A command that boots the machine with a shell on this terminal.
    pub fn interactive(&self) -> Command {
        let mut machine = self.clone();
        machine.cmdline.push_str(" vssd.shell");
        let accel = self.accel.unwrap_or_else(probed_accel);
        let mut qemu = machine.machine(accel);
        qemu.args(["-serial", "mon:stdio"]);
        qemu
    }

    /// Starts the machine and waits until its agent answers.
    pub fn boot(&self) -> Result<Guest> {
        self.boot_with(self.accel.unwrap_or_else(probed_accel))
    }

    fn boot_with(&self, accel: Accel) -> Result<Guest> {
        let scratch = Scratch::new()?;
        let console = console_log()?;
        let Started { process, qmp, agent } = self.start(accel, &scratch, &console, None)?;
        let agent = Agent::new(agent)?;
        let mut guest =
            Guest::new(Parts { process, qmp, agent, scratch, console, boot_limit: self.limit, accel });
        guest.wait_ready(1)?;
        Ok(guest)
    }

    /// Starts the machine. With `incoming` it waits for a guest that is moved to it over that socket.
    pub(crate) fn start(
        &self,
        accel: Accel,
        scratch: &Scratch,
        console: &Path,
        incoming: Option<&Path>,
    ) -> Result<Started> {
        let name = |what: &str| match incoming {
            Some(socket) => PathBuf::from(format!("{}.{what}", socket.display())),
            None => scratch.join(what),
        };
        let (qmp, agent) = (name("qmp"), name("agent"));
        // QEMU connects to us, so that no byte of either side can come before the connection.
        let qmp_listener = UnixListener::bind(&qmp)?;
        let agent_listener = UnixListener::bind(&agent)?;

        let mut command = self.machine(accel);
        command.arg("-chardev").arg(format!("file,id=console,append=on,path={}", console.display()));
        command.args(["-serial", "chardev:console"]);
        command.arg("-chardev").arg(format!("socket,id=qmp,path={}", qmp.display()));
        command.args(["-mon", "chardev=qmp,mode=control"]);
        command.arg("-chardev").arg(format!("socket,id=agent,path={}", agent.display()));
        command.args(["-device", "virtio-serial-pci,id=vser"]);
        command.args(["-device", &format!("virtserialport,bus=vser.0,chardev=agent,name={PORT_NAME}")]);
        if let Some(socket) = incoming {
            command.arg("-incoming").arg(format!("unix:{}", socket.display()));
        }
        let stderr = scratch.join("qemu.stderr");
        let log = File::options().create(true).append(true).open(&stderr)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);

        let mut process = Daemon::spawn("qemu", command)?;
        let connected = connect(&mut process, &qmp_listener, &agent_listener);
        let (qmp, agent) = connected.with_context(|| {
            let said = fs::read_to_string(&stderr).unwrap_or_default();
            format!("QEMU did not start: {}", tail(&said, 10))
        })?;
        Ok(Started { process, qmp, agent })
    }
}

/// A QEMU that runs, with its connections.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) process: Daemon,
    pub(crate) qmp: Qmp,
    pub(crate) agent: UnixStream,
}

/// Takes QEMU's two connections.
fn connect(process: &mut Daemon, qmp: &UnixListener, agent: &UnixListener) -> Result<(Qmp, UnixStream)> {
    let deadline = Deadline::secs(30);
    let mut accept = |listener: &UnixListener, what: &str| -> Result<UnixStream> {
        listener.set_nonblocking(true)?;
        let (stream, _) = deadline.poll(what, || {
            process.expect_running()?;
            Ok(listener.accept().ok())
        })?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    };
    let qmp = accept(qmp, "QEMU's control connection")?;
    let agent = accept(agent, "QEMU's agent connection")?;
    // QEMU greets only when all its devices are there.
    Ok((Qmp::new(qmp)?, agent))
}

/// A new file for a guest's console. It outlives the guest, to be read when a test has failed.
fn console_log() -> Result<PathBuf> {
    let dir = paths::cache_dir()?.join("consoles");
    fs::create_dir_all(&dir)?;
    paths::keep_newest(&dir, ".log", CONSOLES)?;
    let file = tempfile::Builder::new().prefix("guest-").suffix(".log").tempfile_in(&dir)?;
    let (_, path) = file.keep()?;
    Ok(path)
}

/// The accelerator of this machine, probed once per boot of the host.
pub fn probed_accel() -> Accel {
    static PROBED: OnceLock<Accel> = OnceLock::new();
    *PROBED.get_or_init(|| match env::var(ACCEL_ENV).as_deref() {
        Ok("kvm") => Accel::Kvm,
        Ok("tcg") => Accel::Tcg,
        _ => remembered_probe().unwrap_or(Accel::Tcg),
    })
}

/// A device node says little: it may be there and not usable, or usable and not boot anything.
fn remembered_probe() -> Result<Accel> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accel::Tcg);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let note = paths::cache_dir()?.join(format!("accel-{}", boot.trim()));
    if let Ok(name) = fs::read_to_string(&note) {
        return Ok(if name == "kvm" { Accel::Kvm } else { Accel::Tcg });
    }
    let image = GuestImage::stock(&crate::kernel::Kernel::debian()?)?;
    let machine = Qemu::new(QemuBinary::debian()?, &image).boot_limit(KVM_BOOT);
    let accel = match machine.boot_with(Accel::Kvm) {
        Ok(_) => Accel::Kvm,
        Err(error) => {
            let why = error.root_cause().to_string();
            eprintln!(
                "/dev/kvm does not boot a guest, using emulation: {}",
                why.lines().next().unwrap_or_default()
            );
            Accel::Tcg
        }
    };
    fs::write(note, accel.name())?;
    Ok(accel)
}

/// Whether a server listens on `socket`, found without connecting (a vhost-user server serves one peer at a time).
pub fn listening(socket: &Path) -> Result<bool> {
    let table = fs::read_to_string("/proc/net/unix").context("read the socket table")?;
    let path = socket.to_string_lossy();
    // Num RefCount Protocol Flags Type St Inode Path; the flag 0x10000 marks a listening socket.
    Ok(table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .any(|words| words.get(7) == Some(&path.as_ref()) && words.get(3) == Some(&"00010000")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_banner() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)"), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2)"), Some((10, 0)));
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn a_bound_socket_counts_only_once_it_listens() {
        let scratch = Scratch::new().unwrap();
        let path = scratch.join("s");
        assert!(!listening(&path).unwrap());
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(listening(&path).unwrap());
    }
}
