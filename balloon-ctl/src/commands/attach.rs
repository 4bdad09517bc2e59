// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What to give to a virtual machine monitor so that its guest gets a vSSD: ready to paste, with the limits
//! of that monitor as comments. Texts only; [`run`] is all that asks the daemon.

use control_client::{Error, Result, Session, word};
use serde_json::{Value, json};
use vssd_protocol::units::ByteCount;

use super::device::fetch;
use crate::args::Vmm;

impl Vmm {
    fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Libvirt => "libvirt",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Crosvm => "crosvm",
            Self::Firecracker => "firecracker",
        }
    }

    /// What works differently there, a line each.
    fn notes(self) -> &'static [&'static str] {
        match self {
            Self::Qemu => &[
                "Guest RAM must be shared (share=on): the daemon reads and writes in it.",
                "QEMU older than 9.2 has no reconnect-ms: write reconnect=1 (seconds) in its place. Without either, \
                 a restart of the daemon costs the guest its disk.",
                "The socket must exist when QEMU starts. Without num-queues QEMU makes one queue per virtual CPU.",
                "A new size reaches a guest with virtio_blk at once. block_resize is for QEMU's own disks, not for \
                 this one.",
            ],
            Self::Libvirt => &[
                "Guest RAM must be shared: memoryBacking as above; the timeout of reconnect is in seconds.",
                "QEMU's user (libvirt-qemu or qemu) must be able to open the socket: see the daemon's socket group.",
                "virsh blockresize, block jobs and snapshots do not work on this disk; use balloon-ctl resize.",
            ],
            Self::CloudHypervisor => &[
                "Guest RAM must be shared (shared=on): the daemon reads and writes in it.",
                "Up to version 54 a guest with virtio_blk sees a new size only after a restart; the vssd driver needs \
                 nothing.",
                "It reconnects by itself, every 100 ms for 60 s. vm.resize-disk is for its own disks, not for this one.",
            ],
            Self::Crosvm => &[
                "Guest RAM is shared already. The number of queues is the daemon's.",
                "It does not reconnect: a restart of the daemon costs the guest its disk.",
                "A new size reaches a guest with virtio_blk at once. crosvm disk resize is for its own disks, not for \
                 this one.",
            ],
            Self::Firecracker => &[
                "Before InstanceStart. Guest RAM is shared already. One queue of 256 entries, whatever is asked.",
                "No DISCARD and no WRITE_ZEROES: a guest with virtio_blk cannot return space by fstrim; the vssd driver \
                 can.",
                "A new size reaches a guest with virtio_blk only after PATCH /drives/ID.",
                "It does not reconnect (a restart of the daemon costs the guest its disk) and makes no snapshots of a \
                 microVM with this disk.",
            ],
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub(crate) queues: u16,
    pub(crate) memory: ByteCount,
}

pub(crate) fn run(session: &Session, name: String, vmm: Vmm, options: Options) -> Result<()> {
    let device = fetch(&mut session.connect()?, name)?.typed;
    let snippet = snippet(vmm, &device.name, &device.socket_path, options)?;
    let notes = vmm.notes();
    let out = &session.out;
    if out.json {
        return out.object([
            ("name", device.name.into()),
            ("vmm", vmm.as_str().into()),
            ("socket_path", device.socket_path.into()),
            ("serial", device.serial.into()),
            ("class", word(&device.class).into()),
            ("snippet", snippet.into()),
            ("notes", notes.iter().map(|&note| Value::from(note)).collect()),
        ]);
    }
    out.text(&commented(vmm, &snippet, notes))
}

/// The snippet and its notes, as comments of the language that the snippet is in.
fn commented(vmm: Vmm, snippet: &str, notes: &[&str]) -> String {
    let mut text = snippet.to_owned();
    for note in notes {
        text.push_str(&match vmm {
            Vmm::Libvirt => format!("<!-- {note} -->\n"),
            _ => format!("# {note}\n"),
        });
    }
    text
}

fn snippet(vmm: Vmm, name: &str, socket: &str, options: Options) -> Result<String> {
    let Options { queues, memory } = options;
    if socket.contains(|c: char| c.is_control()) {
        return Err(Error::Protocol(format!("socket path {socket:?}")));
    }
    Ok(match vmm {
        Vmm::Qemu => {
            let memory = memory.0 >> 20;
            // A comma inside a value of QEMU's options is written twice.
            let chardev =
                format!("socket,id=vssd-{name},path={},reconnect-ms=500", socket.replace(',', ",,"));
            format!(
                "-m {memory}M -object memory-backend-memfd,id=vssd-ram,size={memory}M,share=on \
                 -machine memory-backend=vssd-ram \\\n\
                 -chardev {} \\\n\
                 -device vhost-user-blk-pci,chardev=vssd-{name},num-queues={queues}\n",
                shell_word(&chardev)
            )
        }
        Vmm::Libvirt => format!(
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n\
             <!-- and in <devices>: -->\n\
             <disk type='vhostuser' device='disk' snapshot='no'>\n  \
             <driver name='qemu' type='raw' queues='{queues}' queue_size='256'/>\n  \
             <source type='unix' path='{}'><reconnect enabled='yes' timeout='1'/></source>\n  \
             <target dev='vdb' bus='virtio'/>\n\
             </disk>\n",
            xml_text(socket)
        ),
        Vmm::CloudHypervisor => {
            let disk =
                format!("vhost_user=on,socket={},num_queues={queues},queue_size=256", plain(vmm, socket)?);
            format!("--memory size={}M,shared=on \\\n--disk {}\n", memory.0 >> 20, shell_word(&disk))
        }
        Vmm::Crosvm => {
            let device = format!("block,socket={}", plain(vmm, socket)?);
            format!("--vhost-user {}\n", shell_word(&device))
        }
        Vmm::Firecracker => {
            // Firecracker's names have letters, digits and underscores only.
            let id = name.replace(['.', '-'], "_");
            let body = json!({"drive_id": id, "socket": socket, "is_root_device": false});
            format!(
                "curl --unix-socket \"$API_SOCKET\" -X PUT http://localhost/drives/{id} \\\n\
                 -H 'Content-Type: application/json' \\\n\
                 -d {}\n",
                shell_word(&body.to_string())
            )
        }
    })
}

/// A path for an option list that has no way to write a comma.
fn plain(vmm: Vmm, socket: &str) -> Result<&str> {
    if socket.contains(',') {
        let message = format!("{} cannot be told of {socket}: the path has a comma", vmm.as_str());
        return Err(Error::Usage { message, hint: Some("give the daemon another runtime folder") });
    }
    Ok(socket)
}

fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-=,:+@%".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

fn xml_text(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    const OPTIONS: Options = Options { queues: 4, memory: ByteCount(2 << 30) };

    #[test]
    fn hostile_socket_path_stays_one_word_of_each_language() {
        let path = "/run/a 'b',c&d.sock";
        let qemu = snippet(Vmm::Qemu, "vm1", path, OPTIONS).unwrap();
        assert!(
            qemu.contains(r"-chardev 'socket,id=vssd-vm1,path=/run/a '\''b'\'',,c&d.sock,reconnect-ms=500'"),
            "{qemu}"
        );
        let libvirt = snippet(Vmm::Libvirt, "vm1", path, OPTIONS).unwrap();
        assert!(libvirt.contains("path='/run/a &apos;b&apos;,c&amp;d.sock'"), "{libvirt}");
        let firecracker = snippet(Vmm::Firecracker, "vm1", path, OPTIONS).unwrap();
        assert!(firecracker.contains(r#""socket":"/run/a '\''b'\'',c&d.sock""#), "{firecracker}");
        for vmm in [Vmm::CloudHypervisor, Vmm::Crosvm] {
            assert!(matches!(snippet(vmm, "vm1", path, OPTIONS), Err(Error::Usage { .. })));
        }
    }

    #[test]
    fn socket_path_that_would_break_the_line_is_refused() {
        assert!(matches!(
            snippet(Vmm::Qemu, "vm1", "/run/a\n-device evil", OPTIONS),
            Err(Error::Protocol(_))
        ));
    }

    #[test]
    fn firecracker_gets_a_name_it_accepts() {
        let text = snippet(Vmm::Firecracker, "vm1-data.a_b", "/run/s", OPTIONS).unwrap();
        assert!(
            text.contains("/drives/vm1_data_a_b ") && text.contains(r#""drive_id":"vm1_data_a_b""#),
            "{text}"
        );
    }

    #[test]
    fn notes_are_comments() {
        for vmm in Vmm::value_variants() {
            let text = commented(*vmm, "", vmm.notes());
            for line in text.lines() {
                match vmm {
                    Vmm::Libvirt => assert!(line.starts_with("<!-- ") && line.ends_with(" -->"), "{line}"),
                    _ => assert!(line.starts_with("# "), "{line}"),
                }
            }
            assert!(
                vmm.notes().iter().all(|note| !note.contains("--")),
                "{vmm:?}: -- would end an XML comment"
            );
        }
    }
}
