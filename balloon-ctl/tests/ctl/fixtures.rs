// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Answers of the daemon as they look on the wire.

use serde_json::{Value, json};

pub(crate) const GIB: u64 = 1 << 30;

/// Online with our driver, nothing pending.
pub(crate) fn vm1() -> Value {
    json!({
        "name": "vm1-data", "id": 1, "state": "online",
        "capacity_bytes": 80 * GIB, "requested_bytes": 20 * GIB, "plugged_bytes": 20 * GIB,
        "allocated_bytes": 13_314_398_618u64, "min_bytes": 5 * GIB, "max_bytes": 80 * GIB,
        "block_size_bytes": 65536, "class": "any",
        "policy": {"on_timeout": "fail", "deadline_ms": 60000, "pull": "grant"},
        "socket_path": "/run/vssd/dev/vm1-data.sock", "serial": "vssd-vm1-data",
        "driver": {"kind": "vssd", "name": "vssd 0.1", "could_give_bytes": 7 * GIB},
        "frontend": {"connected": true, "pid": 4242, "queues": 4, "connections": 2},
        "io": {"reads": 10, "read_bytes": 40960, "writes": 3, "written_bytes": 3 * GIB, "flushes": 7,
               "discards": 1, "errors": 0, "evicted": 2}
    })
}

/// In the middle of a shrink.
pub(crate) fn vm2() -> Value {
    json!({
        "name": "vm2-db", "id": 2, "state": "shrinking",
        "capacity_bytes": 60 * GIB, "requested_bytes": 28 * GIB, "plugged_bytes": 40 * GIB,
        "allocated_bytes": 23_300_000_000u64, "min_bytes": 10 * GIB, "max_bytes": 60 * GIB,
        "block_size_bytes": 65536, "class": "nvram",
        "policy": {"on_timeout": "wait", "deadline_ms": 0, "pull": "notify"},
        "socket_path": "/run/vssd/dev/vm2-db.sock", "serial": "vssd-vm2-db",
        "driver": {"kind": "stock"},
        "frontend": {"connected": true, "queues": 8, "connections": 1},
        "job": 41,
        "io": {}
    })
}

/// Nobody is connected.
pub(crate) fn vm3() -> Value {
    json!({
        "name": "vm3-tmp", "id": 3, "state": "detached",
        "capacity_bytes": 8 * GIB, "requested_bytes": 8 * GIB, "plugged_bytes": 8 * GIB,
        "allocated_bytes": 0, "min_bytes": 65536, "max_bytes": 8 * GIB,
        "block_size_bytes": 65536, "class": "ssd",
        "policy": {"on_timeout": "wait", "deadline_ms": 0, "pull": "notify"},
        "socket_path": "/run/vssd/dev/vm3-tmp.sock", "serial": "vssd-vm3-tmp",
        "driver": {"kind": "none"},
        "frontend": {"connected": false, "queues": 0, "connections": 0},
        "io": {}
    })
}

/// Job 41: vm2-db from 40 to 28 GiB, with this much plugged now.
pub(crate) fn job(state: &str, plugged_bytes: u64, elapsed_ms: u64) -> Value {
    json!({
        "id": 41, "device": "vm2-db", "state": state, "from_bytes": 40 * GIB, "target_bytes": 28 * GIB,
        "plugged_bytes": plugged_bytes, "started_ms": 1000, "elapsed_ms": elapsed_ms, "deadline_ms": 60000,
        "message": "", "requested_by_uid": 0, "requested_by_pid": 77
    })
}

pub(crate) fn with(mut object: Value, key: &str, value: Value) -> Value {
    object[key] = value;
    object
}

pub(crate) fn hello() -> Value {
    json!({
        "server": "vssd-backend", "version": "0.1.0", "schema": "vssd.v1", "pool": "fast0", "pid": 1,
        "uptime_ms": 3_725_000, "socket": "control", "max_line_bytes": 1_048_576
    })
}

pub(crate) fn pool() -> Value {
    json!({
        "name": "fast0", "uuid": "6f1c9c1e-8f5e-4d43-9d0a-6f2d9f0b7a11", "block_size_bytes": 65536,
        "size_bytes": 1024 * GIB, "allocated_bytes": 611 * GIB, "scrubbing_bytes": GIB / 2,
        "free_bytes": 412 * GIB + GIB / 2, "promised_bytes": 1454 * GIB, "available_bytes": 82 * GIB,
        "overcommit_percent": 150, "health": "ok", "devices": 3,
        "media": [
            {"kind": "nvram", "path": "/dev/pmem0", "size_bytes": 64 * GIB, "written_bytes": 5 * GIB,
             "persistence": "map-sync"},
            {"kind": "ssd", "path": "/dev/nvme0n1", "size_bytes": 960 * GIB, "written_bytes": 7 * GIB,
             "persistence": "direct"}
        ]
    })
}

/// What `balloon-ctl` says in `server.hello`.
pub(crate) fn hello_params() -> Value {
    json!({"client": concat!("balloon-ctl ", env!("CARGO_PKG_VERSION"))})
}
