// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `list`, `show`, `create`, `delete`, `sync`, `limits`, `evicted`, `attach-info`.

use serde_json::{Value, json};

use crate::fixtures::{GIB, vm1, vm2, vm3, with};
use crate::peer::{Step, alone, ctl, ok, refuse};

fn list() -> Vec<Step> {
    vec![ok("device.list", json!({}), json!({"devices": [vm3(), vm1(), vm2()]}))]
}

fn show(device: Value) -> Vec<Step> {
    vec![ok("device.show", json!({"name": device["name"]}), device)]
}

fn names(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.split_whitespace().next()).collect()
}

#[test]
fn list_is_a_table_in_order_of_names() {
    assert_eq!(
        ctl(list(), &["list"]).printed(),
        "\
NAME      STATE      SIZE    USED      MIN / MAX        TARGET  FRONTEND            DRIVER
vm1-data  online     20 GiB  12.3 GiB  5 GiB / 80 GiB   -       pid 4242, 4 queues  vssd 0.1
vm2-db    shrinking  40 GiB  21.6 GiB  10 GiB / 60 GiB  28 GiB  8 queues            stock
vm3-tmp   detached   8 GiB   0 B       64 KiB / 8 GiB   -       -                   -
"
    );
}

#[test]
fn list_without_headers_in_exact_bytes_suits_a_script() {
    assert_eq!(
        ctl(list(), &["list", "-b", "--no-headers"]).printed(),
        "\
vm1-data  online     21474836480  13314398618  5368709120 / 85899345920   -            pid 4242, 4 queues  vssd 0.1
vm2-db    shrinking  42949672960  23300000000  10737418240 / 64424509440  30064771072  8 queues            stock
vm3-tmp   detached   8589934592   0            65536 / 8589934592         -            -                   -
"
    );
}

#[test]
fn list_sorts_sizes_largest_first_and_json_alike() {
    for (key, order) in [
        ("name", ["vm1-data", "vm2-db", "vm3-tmp"]),
        ("id", ["vm1-data", "vm2-db", "vm3-tmp"]),
        ("state", ["vm3-tmp", "vm1-data", "vm2-db"]),
        ("size", ["vm2-db", "vm1-data", "vm3-tmp"]),
        ("used", ["vm2-db", "vm1-data", "vm3-tmp"]),
        ("target", ["vm2-db", "vm1-data", "vm3-tmp"]),
        ("min", ["vm2-db", "vm1-data", "vm3-tmp"]),
        ("max", ["vm1-data", "vm2-db", "vm3-tmp"]),
    ] {
        let table = ctl(list(), &["list", "--no-headers", "--sort", key]).printed();
        assert_eq!(names(&table), order, "{key}");
        let object = ctl(list(), &["--json", "list", "--sort", key]).json();
        let sorted: Vec<&str> = object["devices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|device| device["name"].as_str().unwrap())
            .collect();
        assert_eq!(sorted, order, "{key}");
    }
}

#[test]
fn list_of_nothing_is_only_headers() {
    let none = || vec![ok("device.list", json!({}), json!({"devices": []}))];
    assert_eq!(
        ctl(none(), &["list"]).printed(),
        "NAME  STATE  SIZE  USED  MIN / MAX  TARGET  FRONTEND  DRIVER\n"
    );
    assert_eq!(ctl(none(), &["list", "--no-headers"]).printed(), "");
    assert_eq!(ctl(none(), &["list", "--json"]).printed(), "{\"schema\":\"vssd.v1\",\"devices\":[]}\n");
}

#[test]
fn list_in_json_is_what_the_daemon_said_unknown_fields_included() {
    let newer = with(vm1(), "wear_percent", json!(3));
    let steps = vec![ok("device.list", json!({}), json!({"devices": [newer.clone()], "pages": 1}))];
    assert_eq!(ctl(steps, &["list", "--json"]).json(), json!({"schema": "vssd.v1", "devices": [newer]}));
}

#[test]
fn show_tells_everything() {
    assert_eq!(
        ctl(show(vm1()), &["show", "vm1-data"]).printed(),
        "\
name         vm1-data
state        online
size         20 GiB
target       -
used         12.3 GiB
minimum      5 GiB
maximum      80 GiB
disk size    80 GiB (what a driver that cannot negotiate sees)
block size   64 KiB
class        any
on timeout   fail
deadline     60 s
pull         grant
frontend     pid 4242, 4 queues
connections  2
driver       vssd 0.1
could give   7 GiB
soft size    -
agent        -
job          -
socket       /run/vssd/dev/vm1-data.sock
serial       vssd-vm1-data
id           1
read         40 KiB in 10 requests
written      3 GiB in 3 requests
flushes      7
discards     1
errors       0 (2 more met evicted blocks)
"
    );
    let text = ctl(show(vm2()), &["show", "vm2-db"]).printed();
    for line in [
        "target       28 GiB",
        "deadline     none",
        "driver       stock",
        "could give   -",
        "job          41",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn show_in_json_passes_the_device_on() {
    assert_eq!(
        ctl(show(vm1()), &["show", "vm1-data", "--json"]).json(),
        json!({"schema": "vssd.v1", "device": vm1()})
    );
}

#[test]
fn name_that_a_guest_chose_cannot_command_the_terminal() {
    let hostile = with(vm1(), "driver", json!({"kind": "vssd", "name": "\u{1b}]0;owned\u{7}\nroot"}));
    let text = ctl(vec![ok("device.list", json!({}), json!({"devices": [hostile]}))], &["list"]).printed();
    assert!(!text.contains(['\u{1b}', '\u{7}']), "{text:?}");
    assert_eq!(text.lines().count(), 2, "{text:?}");
}

#[test]
fn create_sends_what_was_given_and_defaults() {
    let defaults = json!({
        "name": "vm3-tmp", "size_bytes": 8 * GIB, "min_bytes": null, "max_bytes": null, "class": "any",
        "policy": {"on_timeout": "wait", "deadline_ms": 0, "pull": "notify"}, "dry_run": false
    });
    let outcome = ctl(vec![ok("device.create", defaults, vm3())], &["create", "vm3-tmp", "--size", "8G"]);
    assert_eq!(outcome.code, 0);
    assert_eq!(
        outcome.stdout,
        "vm3-tmp created: 8 GiB, minimum 64 KiB, maximum 8 GiB, socket /run/vssd/dev/vm3-tmp.sock\n"
    );
    assert_eq!(outcome.stderr, "give it to a guest: balloon-ctl attach-info vm3-tmp --for qemu\n");
}

fn create_all(dry_run: bool) -> Vec<Step> {
    let params = json!({
        "name": "vm1-data", "size_bytes": 20 * GIB, "min_bytes": 5 * GIB, "max_bytes": 80 * GIB, "class": "nvram",
        "policy": {"on_timeout": "force", "deadline_ms": 60000, "pull": "grant"}, "dry_run": dry_run
    });
    vec![ok("device.create", params, vm1())]
}

const CREATE_ALL: [&str; 16] = [
    "create",
    "vm1-data",
    "--size",
    "20G",
    "--min",
    "5GiB",
    "--max",
    "80g",
    "--class",
    "nvram",
    "--on-timeout",
    "force",
    "--deadline",
    "60s",
    "--pull",
    "grant",
];

#[test]
fn create_with_every_option_in_json() {
    let args = [&CREATE_ALL[..], &["--json"]].concat();
    assert_eq!(
        ctl(create_all(false), &args).json(),
        json!({"schema": "vssd.v1", "device": vm1(), "dry_run": false})
    );
}

#[test]
fn create_as_dry_run_says_so_and_suggests_nothing() {
    let args = [&CREATE_ALL[..], &["--dry-run"]].concat();
    assert_eq!(
        ctl(create_all(true), &args).printed(),
        "vm1-data could be created: 20 GiB, minimum 5 GiB, maximum 80 GiB, socket /run/vssd/dev/vm1-data.sock\n"
    );
}

#[test]
fn quiet_create_says_nothing() {
    let args = [&CREATE_ALL[..], &["-q"]].concat();
    assert_eq!(ctl(create_all(false), &args).printed(), "");
}

#[test]
fn name_that_cannot_be_is_refused_before_the_daemon_is_asked() {
    for name in ["", "a/b", ".hidden", "a b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"] {
        let outcome = alone(&["create", name, "--size", "1G"]);
        assert_eq!(outcome.code, 2, "{name:?}: {outcome:?}");
        assert!(outcome.stderr.starts_with("error[E_USAGE]: "), "{name:?}: {outcome:?}");
    }
}

fn delete(force: bool, dry_run: bool) -> Vec<Step> {
    vec![ok("device.delete", json!({"name": "vm3-tmp", "force": force, "dry_run": dry_run}), json!({}))]
}

#[test]
fn delete_needs_yes_where_nobody_can_be_asked() {
    let outcome = alone(&["delete", "vm3-tmp"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""));
    assert_eq!(
        outcome.stderr,
        "error[E_USAGE]: deleting a vSSD needs a confirmation, and this is no terminal\n\
         hint: add --yes if it is meant\n"
    );
    assert_eq!(alone(&["delete", "vm3-tmp", "--force"]).code, 2);
}

#[test]
fn delete_with_yes_deletes() {
    assert_eq!(ctl(delete(false, false), &["delete", "vm3-tmp", "--yes"]).printed(), "vm3-tmp deleted\n");
    assert_eq!(
        ctl(delete(true, false), &["delete", "vm3-tmp", "-y", "--force"]).printed(),
        "vm3-tmp deleted\n"
    );
    assert_eq!(
        ctl(delete(false, false), &["delete", "vm3-tmp", "-y", "--json"]).json(),
        json!({"schema": "vssd.v1", "name": "vm3-tmp", "deleted": true, "dry_run": false})
    );
}

#[test]
fn delete_as_dry_run_needs_no_yes() {
    assert_eq!(
        ctl(delete(false, true), &["delete", "vm3-tmp", "--dry-run"]).printed(),
        "vm3-tmp could be deleted\n"
    );
    assert_eq!(
        ctl(delete(false, true), &["delete", "vm3-tmp", "--dry-run", "--json"]).json(),
        json!({"schema": "vssd.v1", "name": "vm3-tmp", "deleted": false, "dry_run": true})
    );
}

#[test]
fn limits_without_options_shows() {
    assert_eq!(
        ctl(show(vm1()), &["limits", "vm1-data"]).printed(),
        "\
NAME      MIN    SIZE    MAX     ON TIMEOUT  DEADLINE  PULL
vm1-data  5 GiB  20 GiB  80 GiB  fail        60 s      grant
"
    );
}

#[test]
fn limits_with_options_sends_only_those() {
    let params = json!({
        "name": "vm1-data", "min_bytes": 4 * GIB, "max_bytes": null, "on_timeout": null, "deadline_ms": null,
        "pull": null
    });
    let steps = || vec![ok("device.limits", params.clone(), with(vm1(), "min_bytes", json!(4 * GIB)))];
    let args = ["limits", "vm1-data", "--min", "4G"];
    assert_eq!(
        ctl(steps(), &args).printed(),
        "\
NAME      MIN    SIZE    MAX     ON TIMEOUT  DEADLINE  PULL
vm1-data  4 GiB  20 GiB  80 GiB  fail        60 s      grant
"
    );
    assert_eq!(ctl(steps(), &[&args[..], &["-q"]].concat()).printed(), "");

    let all = json!({
        "name": "vm1-data", "min_bytes": 0, "max_bytes": 90 * GIB, "on_timeout": "wait", "deadline_ms": 0,
        "pull": "notify"
    });
    let args = [
        "limits",
        "vm1-data",
        "--min",
        "0",
        "--max",
        "90G",
        "--on-timeout",
        "wait",
        "--deadline",
        "0",
        "--pull",
        "notify",
        "--json",
    ];
    assert_eq!(
        ctl(vec![ok("device.limits", all, vm1())], &args).json(),
        json!({"schema": "vssd.v1", "device": vm1()})
    );
}

#[test]
fn evicted_lists_ranges_with_their_bytes() {
    let answer = json!({
        "name": "vm1-data", "block_size_bytes": 65536,
        "ranges": [{"start": 16, "count": 4}, {"start": 4_294_967_000u32, "count": 1}]
    });
    let steps = || vec![ok("device.evicted", json!({"name": "vm1-data"}), answer.clone())];
    assert_eq!(
        ctl(steps(), &["evicted", "vm1-data"]).printed(),
        "\
BLOCK       COUNT  OFFSET     SIZE
16          4      1 MiB      256 KiB
4294967000  1      255.9 TiB  64 KiB
"
    );
    assert_eq!(
        ctl(steps(), &["evicted", "vm1-data", "--json"]).json(),
        json!({"schema": "vssd.v1", "evicted": answer})
    );
}

#[test]
fn evicted_goes_on_where_an_answer_ended() {
    let page = |start: u32, next: Value| {
        let mut page = json!({
            "name": "vm1-data", "block_size_bytes": 65536, "ranges": [{"start": start, "count": 1}]
        });
        if !next.is_null() {
            page["next"] = next;
        }
        page
    };
    let steps = vec![
        ok("device.evicted", json!({"name": "vm1-data"}), page(1, json!(7))),
        ok("device.evicted", json!({"name": "vm1-data", "start": 7}), page(7, Value::Null)),
    ];
    assert_eq!(
        ctl(steps, &["evicted", "vm1-data", "--json"]).json(),
        json!({"schema": "vssd.v1", "evicted": {
            "name": "vm1-data", "block_size_bytes": 65536,
            "ranges": [{"start": 1, "count": 1}, {"start": 7, "count": 1}]
        }})
    );
}

fn attach(vmm: &str) -> String {
    ctl(show(vm1()), &["attach-info", "vm1-data", "--for", vmm]).printed()
}

#[test]
fn attach_info_for_qemu() {
    assert_eq!(
        attach("qemu"),
        "\
-m 2048M -object memory-backend-memfd,id=vssd-ram,size=2048M,share=on -machine memory-backend=vssd-ram \\
-chardev socket,id=vssd-vm1-data,path=/run/vssd/dev/vm1-data.sock,reconnect-ms=500 \\
-device vhost-user-blk-pci,chardev=vssd-vm1-data,num-queues=4
# Guest RAM must be shared (share=on): the daemon reads and writes in it.
# QEMU older than 9.2 has no reconnect-ms: write reconnect=1 (seconds) in its place. Without either, a restart of the daemon costs the guest its disk.
# The socket must exist when QEMU starts. Without num-queues QEMU makes one queue per virtual CPU.
# A new size reaches a guest with virtio_blk at once. block_resize is for QEMU's own disks, not for this one.
"
    );
}

#[test]
fn attach_info_for_libvirt() {
    assert_eq!(
        attach("libvirt"),
        "\
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
<!-- and in <devices>: -->
<disk type='vhostuser' device='disk' snapshot='no'>
  <driver name='qemu' type='raw' queues='4' queue_size='256'/>
  <source type='unix' path='/run/vssd/dev/vm1-data.sock'><reconnect enabled='yes' timeout='1'/></source>
  <target dev='vdb' bus='virtio'/>
</disk>
<!-- Guest RAM must be shared: memoryBacking as above; the timeout of reconnect is in seconds. -->
<!-- QEMU's user (libvirt-qemu or qemu) must be able to open the socket: see the daemon's socket group. -->
<!-- virsh blockresize, block jobs and snapshots do not work on this disk; use balloon-ctl resize. -->
"
    );
}

#[test]
fn attach_info_for_cloud_hypervisor() {
    assert_eq!(
        attach("cloud-hypervisor"),
        "\
--memory size=2048M,shared=on \\
--disk vhost_user=on,socket=/run/vssd/dev/vm1-data.sock,num_queues=4,queue_size=256
# Guest RAM must be shared (shared=on): the daemon reads and writes in it.
# Up to version 54 a guest with virtio_blk sees a new size only after a restart; the vssd driver needs nothing.
# It reconnects by itself, every 100 ms for 60 s. vm.resize-disk is for its own disks, not for this one.
"
    );
}

#[test]
fn attach_info_for_crosvm() {
    assert_eq!(
        attach("crosvm"),
        "\
--vhost-user block,socket=/run/vssd/dev/vm1-data.sock
# Guest RAM is shared already. The number of queues is the daemon's.
# It does not reconnect: a restart of the daemon costs the guest its disk.
# A new size reaches a guest with virtio_blk at once. crosvm disk resize is for its own disks, not for this one.
"
    );
}

#[test]
fn attach_info_for_firecracker() {
    assert_eq!(
        attach("firecracker"),
        "\
curl --unix-socket \"$API_SOCKET\" -X PUT http://localhost/drives/vm1_data \\
-H 'Content-Type: application/json' \\
-d '{\"drive_id\":\"vm1_data\",\"is_root_device\":false,\"socket\":\"/run/vssd/dev/vm1-data.sock\"}'
# Before InstanceStart. Guest RAM is shared already. One queue of 256 entries, whatever is asked.
# No DISCARD and no WRITE_ZEROES: a guest with virtio_blk cannot return space by fstrim; the vssd driver can.
# A new size reaches a guest with virtio_blk only after PATCH /drives/ID.
# It does not reconnect (a restart of the daemon costs the guest its disk) and makes no snapshots of a microVM with this disk.
"
    );
}

#[test]
fn attach_info_takes_queues_and_memory_and_has_json() {
    let args = ["attach-info", "vm1-data", "--for", "qemu", "--queues", "8", "--memory", "512M", "--json"];
    let object = ctl(show(vm1()), &args).json();
    assert_eq!(object["name"], "vm1-data");
    assert_eq!(object["vmm"], "qemu");
    assert_eq!(object["socket_path"], "/run/vssd/dev/vm1-data.sock");
    assert_eq!(object["serial"], "vssd-vm1-data");
    assert_eq!(
        object["snippet"],
        "-m 512M -object memory-backend-memfd,id=vssd-ram,size=512M,share=on -machine memory-backend=vssd-ram \\\n\
         -chardev socket,id=vssd-vm1-data,path=/run/vssd/dev/vm1-data.sock,reconnect-ms=500 \\\n\
         -device vhost-user-blk-pci,chardev=vssd-vm1-data,num-queues=8\n"
    );
    assert_eq!(object["notes"].as_array().unwrap().len(), 4);
    for queues in ["0", "257"] {
        assert_eq!(alone(&["attach-info", "vm1-data", "--for", "qemu", "--queues", queues]).code, 2);
    }
}

#[test]
fn sync_of_one_some_and_all_says_how_long_it_took() {
    let synced = |names: &[&str], devices: u32| {
        vec![ok("device.sync", json!({"names": names}), json!({"devices": devices, "took_us": 1234}))]
    };
    for (args, devices, said) in [
        (&["sync", "vm2-db"][..], 1, "vm2-db: all that was acknowledged is durable, in 1.2ms\n"),
        (&["sync", "vm1-data", "vm2-db"], 2, "2 vSSDs: all that was acknowledged is durable, in 1.2ms\n"),
        (&["sync"], 3, "3 vSSDs: all that was acknowledged is durable, in 1.2ms\n"),
    ] {
        assert_eq!(ctl(synced(&args[1..], devices), args).printed(), said);
    }
    assert_eq!(ctl(synced(&[], 3), &["sync", "--quiet"]).printed(), "");
    assert_eq!(
        ctl(synced(&[], 3), &["sync", "--json"]).json(),
        json!({"schema": "vssd.v1", "sync": {"devices": 3, "took_us": 1234}})
    );
    for (code, exit) in [("E_NOT_FOUND", 3), ("E_MEDIA", 1), ("E_PERMISSION", 8)] {
        let steps = vec![refuse("device.sync", json!({"names": ["vm9"]}), code, "not done", None)];
        let outcome = ctl(steps, &["sync", "vm9"]);
        assert_eq!((outcome.code, &outcome.stdout[..]), (exit, ""), "{outcome:?}");
    }
}
