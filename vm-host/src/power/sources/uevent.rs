// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Adapters and UPSes that the kernel knows: `/sys/class/power_supply`, read again whenever the kernel tells of a change (netlink,
//! NETLINK_KOBJECT_UEVENT, SUBSYSTEM=power_supply). Nothing is polled.
//!
//! Supplies of type Mains and UPS count, as far as they have a file `online`. Any of them online means online, for a machine with two
//! adapters runs on one. While none is, a system battery whose `capacity_level` is Critical means low battery.
//!
//! Anybody with the right to may send such messages, and the kernel says who did: only those of port 0, which are its own, are
//! believed. Even they only say *that* something changed: what is the case is read from sysfs, so one that is lost (the
//! socket's buffer is full: ENOBUFS) does no harm.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};
use tracing::debug;

use super::{Reporter, Woken};
use crate::power::observation::Kind;

const SUBSYSTEM: &[u8] = b"power_supply";
/// The group in which the kernel tells of its own; udev's is 2.
const KERNEL_GROUP: u32 = 1;
/// The kernel's messages have at most 2 KiB and a little more.
const LARGEST: usize = 8192;

/// A socket that hears the kernel's messages of device changes.
#[derive(Debug)]
pub struct Uevents(OwnedFd);

impl Uevents {
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(KOBJECT_UEVENT))?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self(socket))
    }

    /// Takes all messages that are there and says whether one was about `subsystem`, or whether that cannot be said.
    fn drain(&self, subsystem: &[u8]) -> io::Result<bool> {
        let mut concerns = false;
        let mut buffer = [0; LARGEST];
        loop {
            match recvfrom(&self.0, &mut buffer[..], RecvFlags::empty()) {
                Ok((length, _, sender)) => {
                    let sender = sender.and_then(|address| SocketAddrNetlink::try_from(address).ok());
                    let kernel = sender.is_some_and(|sender| sender.pid() == 0);
                    let message = buffer.get(..length).unwrap_or_default();
                    if !kernel {
                        debug!(?sender, "a message that is not the kernel's is ignored");
                    } else if Message::parse(message).is_some_and(|message| message.subsystem == subsystem) {
                        concerns = true;
                    }
                }
                Err(Errno::AGAIN) => return Ok(concerns),
                // Messages were lost.
                Err(Errno::NOBUFS) => concerns = true,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// What counts of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) action: &'a [u8],
    pub(super) subsystem: &'a [u8],
}

impl<'a> Message<'a> {
    /// `action@path`, then `KEY=value` strings, all of them ended by zero bytes. `None` where it is no message of the kernel.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut strings = bytes.split(|&byte| byte == 0);
        let header = strings.next()?;
        let (action, path) = header.split_at(header.iter().position(|&byte| byte == b'@')?);
        if action.is_empty() || !path.starts_with(b"@/") {
            return None;
        }
        let subsystem = strings.find_map(|string| string.strip_prefix(b"SUBSYSTEM="))?;
        Some(Self { action, subsystem })
    }
}

/// Says how the supplies under `sysfs` do, until told to stop.
pub fn run(reporter: &Reporter, uevents: &Uevents, sysfs: &Path) {
    run_for(reporter, uevents, sysfs, SUBSYSTEM);
}

fn run_for(reporter: &Reporter, uevents: &Uevents, sysfs: &Path, subsystem: &[u8]) {
    // The socket hears already: what changes after this look is not missed.
    look(reporter, sysfs);
    loop {
        let outcome = match reporter.stop().wait(&[(uevents.0.as_fd(), PollFlags::IN)], None) {
            Ok(Woken::Stopped) => return,
            Ok(_) => uevents.drain(subsystem),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(true) => look(reporter, sysfs),
            Ok(false) => {}
            Err(error) => {
                reporter.lost(format!("the kernel's messages cannot be read any more: {error}"));
                return;
            }
        }
    }
}

fn look(reporter: &Reporter, sysfs: &Path) {
    match scan(sysfs) {
        Ok(Some(kind)) => reporter.say(kind),
        Ok(None) => {
            reporter.not_available(format!("no adapter and no UPS in {}", sysfs.display()));
        }
        Err(error) => reporter.lost(format!("{}: {error}", sysfs.display())),
    }
}

/// How the supplies do; `None` where there are none that count.
fn scan(sysfs: &Path) -> io::Result<Option<Kind>> {
    let entries = match fs::read_dir(sysfs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let (mut found, mut online, mut low) = (false, false, false);
    for entry in entries {
        let supply = entry?.path();
        // A supply that goes in this moment has no files any more.
        let file = |name: &str| fs::read_to_string(supply.join(name)).ok().map(|text| text.trim().to_owned());
        match file("type").as_deref() {
            Some("Mains" | "UPS") => {
                if let Some(text) = file("online") {
                    found = true;
                    // 2 is online, too, with a voltage that can be set.
                    online |= text != "0";
                }
            }
            Some("Battery") => {
                // Those of mice and the like have the scope "Device".
                let system = file("scope").is_none_or(|scope| scope != "Device");
                low |= system && file("capacity_level").is_some_and(|level| level == "Critical");
            }
            _ => {}
        }
    }
    Ok(found.then_some(match (online, low) {
        (true, _) => Kind::Online,
        (false, false) => Kind::OnBattery { runtime_left_ms: None },
        (false, true) => Kind::LowBattery,
    }))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use rustix::net::{SendFlags, sendto};

    use super::*;
    use crate::power::sources::spawn;
    use crate::power::sources::testkit::{end, next, reporter, silent};

    const BATTERY: Kind = Kind::OnBattery { runtime_left_ms: None };

    /// A folder of sysfs with these supplies.
    fn sysfs(supplies: &[(&str, &[(&str, &str)])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, files) in supplies {
            fs::create_dir(dir.path().join(name)).unwrap();
            for (file, text) in *files {
                fs::write(dir.path().join(name).join(file), format!("{text}\n")).unwrap();
            }
        }
        dir
    }

    #[test]
    fn supplies_are_understood() {
        let low: &[(&str, &str)] = &[("type", "Battery"), ("capacity_level", "Critical")];
        let mouse: &[(&str, &str)] =
            &[("type", "Battery"), ("capacity_level", "Critical"), ("scope", "Device")];
        let off: &[(&str, &str)] = &[("type", "Mains"), ("online", "0")];
        let on: &[(&str, &str)] = &[("type", "Mains"), ("online", "1")];
        let ups: &[(&str, &str)] = &[("type", "UPS"), ("online", "2")];
        for (supplies, kind) in [
            (&[][..], None),
            (&[("BAT0", low)][..], None),
            (&[("AC", off)][..], Some(BATTERY)),
            (&[("AC", on), ("BAT0", low)][..], Some(Kind::Online)),
            (&[("AC", off), ("BAT0", low)][..], Some(Kind::LowBattery)),
            (&[("AC", off), ("mouse", mouse)][..], Some(BATTERY)),
            (&[("AC0", off), ("AC1", on)][..], Some(Kind::Online)),
            (&[("AC0", off), ("ups", ups)][..], Some(Kind::Online)),
        ] {
            assert_eq!(scan(sysfs(supplies).path()).unwrap(), kind, "{supplies:?}");
        }
        assert_eq!(scan(Path::new("/nonexistent")).unwrap(), None);
    }

    #[test]
    fn kernel_is_believed_and_nobody_else() {
        let dir = sysfs(&[("AC", &[("type", "Mains"), ("online", "1")])]);
        let online = dir.path().join("AC/online");
        let uevents = Uevents::open().unwrap();
        let port = match rustix::net::getsockname(&uevents.0) {
            Ok(address) => SocketAddrNetlink::try_from(address).unwrap().pid(),
            Err(errno) => panic!("{errno}"),
        };
        let (reporter, receiver) = reporter("uevent");
        let path: PathBuf = dir.path().into();
        // No machine has a power supply that a test could unplug; each has memory devices, which the kernel will tell of.
        let thread = spawn(&reporter, move |reporter| run_for(reporter, &uevents, &path, b"mem")).unwrap();
        assert_eq!(next(&receiver), Kind::Online);

        fs::write(&online, "0").unwrap();
        let forger =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(KOBJECT_UEVENT))
                .unwrap();
        let message = b"change@/devices/virtual/mem/null\0ACTION=change\0SUBSYSTEM=mem\0SEQNUM=1\0";
        // Without the right to send it, there is nothing to be protected from.
        let _ = sendto(&forger, message, SendFlags::empty(), &SocketAddrNetlink::new(port, 0));
        silent(&receiver);

        match fs::write("/sys/class/mem/null/uevent", "change") {
            Ok(()) => assert_eq!(next(&receiver), BATTERY),
            Err(error) => println!("the kernel was not heard: {error}"),
        }
        end(&reporter, thread);
    }

    #[test]
    fn machine_without_supplies_says_so() {
        let dir = sysfs(&[]);
        let (reporter, receiver) = reporter("uevent");
        let path: PathBuf = dir.path().into();
        let uevents = Uevents::open().unwrap();
        let thread = spawn(&reporter, move |reporter| run(reporter, &uevents, &path)).unwrap();
        assert_eq!(next(&receiver), Kind::NotAvailable);
        assert!(reporter.health().error.unwrap().contains("no adapter and no UPS"));
        end(&reporter, thread);
    }

    #[test]
    fn message_is_taken_apart() {
        let bytes = b"change@/devices/AC\0ACTION=change\0SUBSYSTEM=power_supply\0POWER_SUPPLY_ONLINE=0\0";
        assert_eq!(Message::parse(bytes), Some(Message { action: b"change", subsystem: b"power_supply" }));
        assert_eq!(Message::parse(b"libudev\0\xfe\xed\xca\xfeSUBSYSTEM=power_supply\0"), None);
        assert_eq!(Message::parse(b"@/devices/AC\0SUBSYSTEM=power_supply\0"), None);
        assert_eq!(Message::parse(b"change@/devices/AC\0"), None);
        assert_eq!(Message::parse(b""), None);
    }

    proptest! {
        #[test]
        fn any_message_is_taken_apart_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(message) = Message::parse(&bytes) {
                prop_assert!(bytes.windows(10).any(|window| window == b"SUBSYSTEM="));
                prop_assert!(!message.action.is_empty());
            }
        }

        #[test]
        fn subsystem_is_found_wherever_it_stands(
            before in prop::collection::vec("[A-Z]{1,9}=[a-z0-9]{0,9}", 0..5),
            subsystem in "[a-z_]{0,12}",
            after in prop::collection::vec("[A-Z]{1,9}=[a-z0-9]{0,9}", 0..5),
        ) {
            prop_assume!(before.iter().all(|string| !string.starts_with("SUBSYSTEM=")));
            let own = format!("SUBSYSTEM={subsystem}");
            let strings = [vec!["add@/d".to_owned()], before, vec![own], after].concat();
            let message = strings.join("\0") + "\0";
            prop_assert_eq!(Message::parse(message.as_bytes()).unwrap().subsystem, subsystem.as_bytes());
        }
    }
}
