// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A live dm-cache in real guests, whose fast device is a vSSD that shrinks and grows under it: the application sees no error and no
//! old data, and the origin alone is right in the end.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use serde_json::Value;
use vssd_tests::agent::Job;
use vssd_tests::guest::Guest;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::mock;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scenario::{self, Disk, Medium, PoolHost, blocks, normal};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const NAME: &str = "vm1";
/// Blocks of 4 KiB of the origin: where the load reads and writes, what is only read, and where fio is.
const LOAD: (u64, u64) = (0, 8192);
const STILL: (u64, u64) = (16384, 8192);
const FIO: (u64, u64) = (32768, 8192);
const SEED: u64 = 61;
/// How many steps a load may have made after those of which it could still tell.
const UNTOLD: u64 = 1 << 14;

/// A guest with a vSSD, a small disk for metadata and a slow one with an image.
fn boot(
    scratch: &Scratch,
    kernel: &Kernel,
    qemu: QemuBinary,
    host: &PoolHost,
    size: &str,
    iops: u32,
) -> Result<Guest> {
    let socket = host.create(NAME, &["--size", size])?;
    let image = ImageBuilder::new(kernel)
        .file("/tools/guest_versions", &paths::artifact("vssd-tests", "guest_versions")?)
        .file("/tools/vssd-agent", &paths::artifact("vssd-agent", "vssd-agent")?)
        .file("/tools/vssd-cache", &paths::repo_root().join("guest-agent/vssd-cache"))
        .tool("fio")
        .tool("dmsetup")
        .kernel_module("dm_cache")
        .kernel_module("dm_cache_smq")
        .driver()?
        .build()?;
    let mut machine = Qemu::new(qemu, &image).memory_mib(1024).disk(VhostUserDisk::new(socket));
    for (name, bytes) in [("meta", 16 << 20), ("origin", 512 << 20)] {
        let path = scratch.join(name);
        File::create(&path)?.set_len(bytes)?;
        let slow = if name == "origin" && iops > 0 {
            format!(",throttling.iops-total={iops}")
        } else {
            String::new()
        };
        machine = machine.args([
            "-drive".to_owned(),
            format!("if=none,id={name},format=raw,file={}{slow}", path.display()),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={name},serial={name}"),
        ]);
    }
    machine.boot()
}

/// The cache as an operator would have it, and what it lies on.
struct Cache {
    disk: Disk,
    meta: String,
    origin: String,
    /// Sectors of the vSSD that hold the metadata; 0: the other disk does.
    head: u64,
    mode: &'static str,
}

impl Cache {
    /// Binds the driver, assembles the cache.
    fn assemble(guest: &mut Guest, head: u64, mode: &'static str) -> Result<Self> {
        let disk = scenario::bind(guest, 0)?;
        guest.ok("modprobe -a dm_mod dm_cache dm_cache_smq")?;
        let mut named = |serial: &str| {
            guest.ok(&format!("for d in /sys/block/vd*; do test \"$(cat $d/serial)\" = {serial} && echo /dev/${{d##*/}}; done; true"))
        };
        let (meta, origin) = (named("meta")?, named("origin")?);
        let cache = Self { disk, meta, origin, head, mode };
        cache.assemble_again(guest)?;
        Ok(cache)
    }

    fn assemble_again(&self, guest: &mut Guest) -> Result<()> {
        let Self { disk, meta, origin, head, mode } = self;
        let meta = if *head > 0 { "-" } else { meta };
        guest.ok(&format!("vssd-cache cached {} {head} {meta} {origin} 128 {mode}", disk.name)).map(drop)
    }

    /// Writes everything back and takes the cache apart.
    fn stop(&self, guest: &mut Guest) -> Result<()> {
        guest.ok(
            "dmsetup table cached | sed 's/ write[a-z]* smq .*/ writethrough cleaner 0/' > /tmp/clean && \
             dmsetup load cached /tmp/clean && dmsetup resume cached && \
             until dmsetup status cached | { read -r _ _ _ _ _ _ _ _ _ _ _ _ _ dirty _; test $dirty = 0; }; do sleep 0.1; done && \
             dmsetup remove cached && dmsetup remove cached-fast && if dmsetup info cached-meta > /dev/null 2>&1; then dmsetup remove cached-meta; fi",
        )?;
        Ok(())
    }
}

fn start_agent(guest: &mut Guest, least: &str, stall_s: u32) -> Result<Job> {
    let config = format!(
        "[[disk]]\nsource = \"dm-cache\"\ncache = \"cached\"\nmin_cache = \"{least}\"\nstall_s = {stall_s}\n"
    );
    guest.write_file("/etc/vssd-agent.toml", config.as_bytes())?;
    let agent = guest.spawn("exec vssd-agent 2>&1")?;
    guest.ok("until grep -q '^agents 1' /proc/vssd/*/status; do sleep 0.1; done")?;
    Ok(agent)
}

/// Waits until the agent has said `word`, and gives all it has said.
fn heard(agent: &Job, word: &str) -> Result<String> {
    let mut said = String::new();
    let waited = Deadline::secs(10).until("the agent to say so", || {
        said = String::from_utf8_lossy(&agent.stdout()).into_owned();
        Ok(said.contains(word))
    });
    waited.with_context(|| format!("no {word} in {said}"))?;
    Ok(said)
}

fn kill_agent(guest: &mut Guest, agent: &Job) -> Result<()> {
    guest.ok("killall -KILL vssd-agent")?;
    guest.wait(agent, Duration::from_secs(10)).map(drop)
}

/// The last line of a load that says up to where it is durable.
fn synced(load: &Job) -> u64 {
    let said = String::from_utf8_lossy(&load.stdout()).into_owned();
    // The last line may not have come as a whole.
    let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().rev().find_map(|line| line.strip_prefix("synced ")?.parse().ok()).unwrap_or(0)
}

fn versions(verb: &str, device: &str, area: (u64, u64), seed: u64, rest: &str) -> String {
    format!("guest_versions {verb} {device} {} {} {seed} {rest}", area.0, area.1)
}

/// Runs until /tmp/stop is there.
fn start_load(guest: &mut Guest, seed: u64) -> Result<Job> {
    let load =
        guest.spawn(&format!("exec {}", versions("run", "/dev/mapper/cached", LOAD, seed, "/tmp/stop")))?;
    Deadline::secs(30).until("the load to begin", || Ok(synced(&load) > 0 || load.ended()))?;
    Ok(load)
}

/// Requests that the cache served and had not, so far.
fn hits(guest: &mut Guest) -> Result<[u64; 2]> {
    let said = guest.ok("dmsetup status --noflush cached")?;
    let words: Vec<u64> =
        said.split_whitespace().skip(7).take(4).map_while(|word| word.parse().ok()).collect();
    let [read_hits, read_misses, write_hits, write_misses] = words.as_slice() else {
        anyhow::bail!("no counters in {said:?}");
    };
    Ok([read_hits + write_hits, read_misses + write_misses])
}

fn dirty(guest: &mut Guest) -> Result<u64> {
    let said = guest.ok("dmsetup status --noflush cached")?;
    let word = said.split_whitespace().nth(13).with_context(|| format!("no number in {said:?}"))?;
    Ok(word.parse()?)
}

/// The share of hits between two looks, in per cent.
fn ratio(from: [u64; 2], to: [u64; 2]) -> f64 {
    let [hits, misses] = [to[0].saturating_sub(from[0]), to[1].saturating_sub(from[1])];
    hits as f64 * 100.0 / (hits + misses).max(1) as f64
}

/// Looks now and then: each look costs the guest more than it costs us.
fn until(limit: u64, what: &str, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    Deadline::secs(limit).until(what, || {
        let is_so = look()?;
        if !is_so {
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(is_so)
    })
}

/// Waits until the cache is as large as it may be, works as it was made to, and nothing is left of how it came to that.
fn settled(guest: &mut Guest, cache: &Cache, agent: &Job) -> Result<()> {
    let Cache { disk, head, mode, .. } = cache;
    let devices = if *head > 0 { 3 } else { 2 };
    let mut said = String::new();
    let waited = until(60, "the agent to have done all it can", || {
        said = guest.ok(&format!(
            "cat /proc/vssd/{}/status; echo evicted; cat /proc/vssd/{}/evicted; echo devices; \
             dmsetup info -c --noheadings --separator : -o name,suspended; dmsetup table; true",
            disk.name, disk.name
        ))?;
        let number =
            |key: &str| said.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
        let evicted =
            said.split_once("\nevicted\n").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        let end = evicted.unwrap_or(disk.total_blocks) * disk.block_size / 512;
        let is_active = |line: &&str| line.starts_with("cached") && line.ends_with(":Active");
        Ok(number("plugged_blocks") == number("requested_blocks")
            && said.contains(&format!("cached-fast: 0 {} linear", (end - head) / 128 * 128))
            && said.contains(&format!(" 128 {mode}\n"))
            && said.lines().filter(is_active).count() == devices
            && !said.contains("-vssd"))
    });
    waited.with_context(|| format!("{said}\n{}", String::from_utf8_lossy(&agent.stdout())))
}

/// What is the case, for the report of a failure.
fn look_around(guest: &mut Guest, host: &PoolHost) -> String {
    let said =
        guest.ok("cat /proc/vssd/*/status; dmsetup info -c; dmsetup table; dmsetup status --noflush; true");
    let said = said.unwrap_or_else(|error| error.to_string());
    format!("{said}\n{:?}", host.ctl.run(&["show", NAME]).map(|run| run.stdout))
}

/// No request ever met a block that had gone.
fn nothing_missed(guest: &mut Guest, disk: &Disk) -> Result<()> {
    let status = disk.status(guest)?;
    for key in ["evicted_reads", "evicted_writes"] {
        ensure!(status.get(key).is_some_and(|count| count == "0"), "{key}: {status:?}");
    }
    Ok(())
}

/// The two sides agree, and what has gone is the end of the disk.
fn agree(guest: &mut Guest, host: &PoolHost, disk: &Disk) -> Result<u64> {
    let (guests, hosts) = (normal(disk.evicted(guest)?), normal(host.evicted(NAME)?));
    ensure!(guests == hosts, "the driver says {guests:?} are evicted, the daemon {hosts:?}");
    let gone = blocks(&guests);
    ensure!(gone == 0 || guests == [(disk.total_blocks - gone, gone)], "not the end of the disk: {guests:?}");
    Ok(gone)
}

/// Shrinks and grows under two loads, and the origin alone in the end.
fn live_cache(kernel: &Kernel, qemu: QemuBinary, mode: &'static str, cycles: u32) -> Result<()> {
    const WINDOW: Duration = Duration::from_secs(1);
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "160M")?;
    let mut guest = boot(&scratch, kernel, qemu, &host, "96M", 0)?;
    let cache = Cache::assemble(&mut guest, 0, mode)?;
    let disk = cache.disk.clone();
    let cached = "/dev/mapper/cached";
    for area in [LOAD, STILL] {
        guest.ok(&versions("fill", cached, area, SEED, ""))?;
    }
    let agent = start_agent(&mut guest, "16M", 60)?;
    let load = start_load(&mut guest, SEED)?;
    let fio_at = format!("--offset={}k --size={}k", FIO.0 * 4, FIO.1 * 4);
    let fio = guest.spawn(&format!(
        "while ! test -e /tmp/stop; do \
           fio --name=verify --filename={cached} {fio_at} --io_size=4M --rate_iops=300,300 --rw=randrw --rwmixread=30 --random_distribution=zipf:1.1 \
             --norandommap --bs=4k --direct=1 --ioengine=libaio --iodepth=4 --serialize_overlap=1 --verify=crc32c --verify_fatal=1 \
             --do_verify=1 --verify_backlog=64 --randrepeat=0 --thread --minimal > /tmp/fio.out 2>&1 || exit 1; \
           echo round; \
         done"
    ))?;
    // What is only read becomes part of the cache, too.
    guest.ok(&format!("for i in 1 2 3; do {}; done", versions("check", cached, STILL, SEED, "0 0")))?;
    let mut rng = mock::rng(mock::seed("sizes of a cache that shrinks"));
    let mut ratios = [0.0; 3];
    let (mut quickest, mut slowest) = (Duration::MAX, Duration::ZERO);
    let said_by = |agent: &Job| String::from_utf8_lossy(&agent.stdout()).into_owned();
    for cycle in 0..cycles {
        let bytes = rng.random_range(256..=1280) * disk.block_size;
        let first = hits(&mut guest)?;
        std::thread::sleep(WINDOW);
        let before = hits(&mut guest)?;
        let begun = Instant::now();
        // With time: a driver that has waited for hints in vain, on a machine that is busy with other things, declines, and the agent's
        // count all the same when they come.
        let patient = ["--deadline", "120s", "--on-timeout", "wait", "--no-wait"];
        host.ctl.ok(&[&["shrink", NAME, &bytes.to_string()], &patient[..]].concat())?;
        let plugged = disk.total_blocks - bytes / disk.block_size;
        let (mut now, mut served) = (before, [0; 2]);
        until(90, "the shrink", || {
            // A new table begins with the counters of the one before the last.
            let next = hits(&mut guest)?;
            if next.iter().zip(now).all(|(next, now)| *next >= now) {
                served = [served[0] + next[0] - now[0], served[1] + next[1] - now[1]];
            }
            now = next;
            Ok(disk.plugged(&mut guest)? == plugged)
        })
        .with_context(|| format!("cycle {cycle}: {}\n{}", said_by(&agent), look_around(&mut guest, &host)))?;
        slowest = slowest.max(begun.elapsed());
        quickest = quickest.min(begun.elapsed());
        let smaller = hits(&mut guest)?;
        std::thread::sleep(WINDOW);
        let after = hits(&mut guest)?;
        for (sum, (from, to)) in ratios.iter_mut().zip([(first, before), ([0; 2], served), (smaller, after)])
        {
            *sum += ratio(from, to) / f64::from(cycles);
        }
        settled(&mut guest, &cache, &agent)?;
        agree(&mut guest, &host, &disk)?;
        let state = host.try_resize("grow", NAME, bytes)?;
        ensure!(state == "done", "cycle {cycle}: the grow ended {state}");
        settled(&mut guest, &cache, &agent)?;
        ensure!(!load.ended() && !fio.ended(), "cycle {cycle}: a load has ended");
    }
    guest.ok("touch /tmp/stop")?;
    let said = guest.wait(&load, Duration::from_secs(60))?.check()?.text();
    let steps = said.lines().last().unwrap_or_default().to_owned();
    let done = synced(&load);
    let rounds = guest.wait(&fio, Duration::from_secs(60))?;
    ensure!(rounds.success(), "fio failed: {rounds:?}\n{}", guest.ok("cat /tmp/fio.out")?);
    let said = said_by(&agent);
    ensure!(!agent.ended() && !said.contains("ERROR") && !said.contains("WARN"), "the agent: {said}");
    nothing_missed(&mut guest, &disk)?;
    kill_agent(&mut guest, &agent)?;
    guest.ok(&versions("check", cached, LOAD, SEED, &format!("{done} {done}")))?;
    guest.ok(&format!("fio --name=last --filename={cached} {fio_at} --rw=write --bs=64k --direct=1 --verify=crc32c --do_verify=0"))?;
    // The origin alone, small as the cache may have been.
    cache.stop(&mut guest)?;
    guest.ok(&versions("check", &cache.origin, LOAD, SEED, &format!("{done} {done}")))?;
    guest.ok(&versions("check", &cache.origin, STILL, SEED, "0 0"))?;
    guest.ok(&format!(
        "fio --name=last --filename={} {fio_at} --rw=read --bs=64k --direct=1 --verify=crc32c",
        cache.origin
    ))?;
    println!(
        "PASS Linux {}, {}: {cycles} shrinks and grows of a live dm-cache under verified I/O … hits before {:.0} %, during {:.0} %, after {:.0} %; \
         a shrink took {} to {} ms; load: {steps}, {} rounds of fio; no error, no difference, the origin alone is right",
        kernel.series(),
        mode.split(' ').find(|word| word.starts_with("write")).unwrap_or_default(),
        ratios[0],
        ratios[1],
        ratios[2],
        quickest.as_millis(),
        slowest.as_millis(),
        rounds.text().lines().count(),
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn a_live_cache_shrinks_and_grows_ten_times_under_verified_io() -> Result<()> {
    live_cache(&Kernel::debian()?, QemuBinary::debian()?, "1 writeback smq 0", 10)
}

#[test]
fn a_writethrough_cache_of_a_newer_kernel_shrinks_and_grows() -> Result<()> {
    live_cache(&Kernel::backports()?, QemuBinary::backports()?, "2 metadata2 writethrough smq 0", 4)
}

/// The agent dies at any time, and the guest's power is cut, beside shrinks and grows: whoever comes next goes on.
#[test]
fn kills_of_the_agent_and_power_cuts_lose_nothing_and_leave_nothing_suspended() -> Result<()> {
    const KILLS: u32 = 6;
    const CUTS: u32 = 3;
    const SHRINK: u64 = 40 << 20;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "160M")?;
    // So slow that there is something to interrupt.
    let mut guest = boot(&scratch, &Kernel::debian()?, QemuBinary::backports()?, &host, "64M", 1500)?;
    let cache = Cache::assemble(&mut guest, 8192, "2 metadata2 writeback smq 2 migration_threshold 8192")?;
    let disk = cache.disk.clone();
    let cached = "/dev/mapper/cached";
    let mut rng = mock::rng(mock::seed("kills of an agent that resizes a cache"));
    guest.ok(&versions("fill", cached, STILL, SEED, ""))?;
    guest.ok(&versions("fill", cached, LOAD, SEED, ""))?;
    let load = start_load(&mut guest, SEED)?;
    let mut agent = start_agent(&mut guest, "8M", 60)?;
    let resize = |host: &PoolHost| -> Result<()> {
        let gone = blocks(&host.evicted(NAME)?) * disk.block_size;
        let (verb, bytes) = if gone == 0 { ("shrink", SHRINK) } else { ("grow", gone) };
        host.ctl.ok(&[verb, NAME, &bytes.to_string(), "--no-wait"]).map(drop)
    };
    let mut met = [0; 3];
    for kill in 0..KILLS {
        settled(&mut guest, &cache, &agent)?;
        resize(&host)?;
        // Somewhere between the first command and the last.
        let pause = rng.random_range(200..1800);
        guest.ok(&format!("usleep {}; killall -KILL vssd-agent", pause * 1000))?;
        guest.wait(&agent, Duration::from_secs(10))?;
        let table = guest.ok("dmsetup table")?;
        met[0] += u32::from(table.contains("cleaner"));
        met[1] += u32::from(table.contains("cached-fast-vssd"));
        agent = start_agent(&mut guest, "8M", 60)?;
        ensure!(!load.ended(), "kill {kill}: the load has ended");
    }
    settled(&mut guest, &cache, &agent)?;
    guest.ok("touch /tmp/stop")?;
    guest.wait(&load, Duration::from_secs(60))?.check()?;
    let done = synced(&load);
    guest.ok(&versions("check", cached, LOAD, SEED, &format!("{done} {done}")))?;
    guest.ok("rm /tmp/stop")?;

    for cut in 0..CUTS {
        let seed = SEED + 1 + u64::from(cut);
        guest.ok(&versions("fill", cached, LOAD, seed, ""))?;
        let load = start_load(&mut guest, seed)?;
        settled(&mut guest, &cache, &agent)?;
        let before = blocks(&host.evicted(NAME)?);
        resize(&host)?;
        if rng.random() {
            let waited = until(60, "the first blocks to move", || Ok(blocks(&host.evicted(NAME)?) != before));
            waited.with_context(|| {
                let status = guest.ok("dmsetup status cached").unwrap_or_default();
                format!("cut {cut}: {status}\n{}", String::from_utf8_lossy(&agent.stdout()))
            })?;
            met[2] += 1;
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(0..600)));
        nothing_missed(&mut guest, &disk)?;
        let done = synced(&load);
        guest.reset()?;
        scenario::bind(&mut guest, 0)?;
        guest.ok("modprobe -a dm_mod dm_cache dm_cache_smq")?;
        cache.assemble_again(&mut guest).with_context(|| format!("cut {cut}"))?;
        agree(&mut guest, &host, &disk)?;
        guest
            .ok(&versions("check", cached, LOAD, seed, &format!("{done} {}", done + UNTOLD)))
            .with_context(|| format!("cut {cut}"))?;
        guest.ok(&versions("check", cached, STILL, SEED, "0 0")).with_context(|| format!("cut {cut}"))?;
        agent = start_agent(&mut guest, "8M", 60)?;
        let said: Value = serde_json::from_str(&guest.ok("vssd-agent status --json")?)?;
        ensure!(said["uncovered_blocks"] == 0, "cut {cut}: the cache has blocks that the host has: {said}");
    }
    // After all that the origin is right without the cache.
    nothing_missed(&mut guest, &disk)?;
    settled(&mut guest, &cache, &agent)?;
    guest.ok(&versions("fill", cached, LOAD, SEED, ""))?;
    let load = start_load(&mut guest, SEED)?;
    resize(&host)?;
    settled(&mut guest, &cache, &agent)?;
    guest.ok("touch /tmp/stop")?;
    guest.wait(&load, Duration::from_secs(60))?.check()?;
    let done = synced(&load);
    kill_agent(&mut guest, &agent)?;
    cache.stop(&mut guest)?;
    guest.ok(&versions("check", &cache.origin, LOAD, SEED, &format!("{done} {done}")))?;
    guest.ok(&versions("check", &cache.origin, STILL, SEED, "0 0"))?;
    println!(
        "PASS {KILLS} kills of the agent beside resizes, {} while the cache was being cleaned, {} beside a second fast device; {CUTS} power cuts, \
         {} after the first blocks had moved … nothing lost, nothing suspended, the origin alone is right",
        met[0], met[1], met[2]
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

/// Everything that keeps a cache from shrinking is said, and the cache goes on as it was.
#[test]
fn whatever_keeps_a_cache_from_shrinking_is_said() -> Result<()> {
    const WANTED: u64 = 32 << 20;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "160M")?;
    let mut guest = boot(&scratch, &Kernel::debian()?, QemuBinary::debian()?, &host, "64M", 0)?;
    let mut cache = Cache::assemble(&mut guest, 0, "1 writeback smq 0")?;
    let disk = cache.disk.clone();
    let cached = "/dev/mapper/cached";
    let origin = &cache.origin.clone();
    let refused = |host: &PoolHost, agent: &Job, why: &str, code: &str| -> Result<()> {
        let run = host.ctl.refused(&["shrink", NAME, &WANTED.to_string(), "--wait"])?;
        let said = heard(agent, code)?;
        ensure!(
            run.code == 4 && run.stderr.contains(why),
            "not {why:?}: {} {}\n{said}",
            run.code,
            run.stderr
        );
        ensure!(blocks(&host.evicted(NAME)?) == 0);
        Ok(())
    };
    let status = |guest: &mut Guest, word: &str| -> Result<()> {
        let said = guest.ok("vssd-agent status")?;
        ensure!(said.contains(word), "no {word:?} in {said}");
        Ok(())
    };

    // The configuration says which cache.
    guest.write_file("/etc/vssd-agent.toml", b"[[disk]]\nsource = \"dm-cache\"\n")?;
    let said = guest.sh("vssd-agent")?;
    ensure!(said.code == 2 && said.errors().contains("cache ="), "{said:?}");

    // No cache at all, and no dmsetup.
    cache.stop(&mut guest)?;
    let agent = start_agent(&mut guest, "16M", 5)?;
    refused(&host, &agent, "its own rules forbid it", "E_NO_CACHE")?;
    let said = guest.ok("cp /tools/vssd-agent /tmp/ && PATH=/nowhere /tmp/vssd-agent status")?;
    ensure!(said.contains("cannot start dmsetup"), "{said}");

    // A cache that lies on the disk itself.
    guest.ok(&format!(
        "dmsetup create cached --table \"0 $(blockdev --getsz {origin}) cache {meta} /dev/{} {origin} 128 1 writeback smq 0\"",
        disk.name,
        origin = cache.origin,
        meta = cache.meta,
    ))?;
    refused(&host, &agent, "its own rules forbid it", "E_UNSUITABLE")?;
    status(&mut guest, "no linear device over")?;
    guest.ok("dmsetup remove cached")?;
    guest.ok(&format!("dmsetup create slow --table \"0 $(blockdev --getsz {origin}) linear {origin} 0\""))?;
    "/dev/mapper/slow".clone_into(&mut cache.origin);
    cache.assemble_again(&mut guest)?;

    // Another device that lies behind it.
    guest.ok(&format!("dmsetup create other --table '0 8 linear /dev/{} 8000'", disk.name))?;
    refused(&host, &agent, "its own rules forbid it", "other uses")?;
    guest.ok("dmsetup remove other")?;

    // Suspended by somebody: it is left alone.
    guest.ok("dmsetup suspend cached")?;
    refused(&host, &agent, "what could be given is in use", "E_SUSPENDED")?;
    ensure!(guest.ok("dmsetup info -c --noheadings -o suspended cached")? == "Suspended");
    guest.ok("dmsetup resume cached")?;
    settled(&mut guest, &cache, &agent)?;

    // Suspended by an agent that died: it goes on. This one was killed after the kernel had refused a shorter device.
    kill_agent(&mut guest, &agent)?;
    guest.ok("dmsetup create cached-fast-vssd --table \"$(dmsetup table cached-fast | sed 's/^0 [0-9]*/0 65536/')\" && dmsetup suspend cached")?;
    let agent = start_agent(&mut guest, "16M", 5)?;
    settled(&mut guest, &cache, &agent)?;

    // What is dirty cannot be written back, for the origin fails. Nothing is given, and the cache is as it was.
    guest.ok(&versions("fill", cached, STILL, SEED, ""))?;
    let failing = STILL.0 * 8;
    let len: u64 = guest.ok(&format!("blockdev --getsz {origin}"))?.parse()?;
    guest.ok(&format!(
        "dmsetup load slow --table '0 {failing} linear {origin} 0\n{failing} {} error' && dmsetup resume --noflush slow",
        len - failing
    ))?;
    // Where it hits it does not need the origin.
    let _ = guest.sh(&versions("fill", cached, STILL, SEED + 1, ""))?;
    ensure!(dirty(&mut guest)? > 0, "nothing is dirty");
    refused(&host, &agent, "what could be given is in use", "E_DIRTY")?;
    settled(&mut guest, &cache, &agent)?;
    ensure!(dirty(&mut guest)? > 0, "it was given up too soon");
    guest.ok(&format!(
        "dmsetup load slow --table '0 {len} linear {origin} 0' && dmsetup resume --noflush slow"
    ))?;
    guest.ok(&versions("fill", cached, STILL, SEED + 1, ""))?;

    // Down to the least.
    ensure!(host.try_resize("shrink", NAME, 60 << 20)? == "partial");
    heard(&agent, "E_FLOOR")?;
    settled(&mut guest, &cache, &agent)?;
    let gone = agree(&mut guest, &host, &disk)?;
    ensure!(gone * disk.block_size == 48 << 20, "{gone} blocks are gone");
    ensure!(host.try_resize("grow", NAME, gone * disk.block_size)? == "done");
    settled(&mut guest, &cache, &agent)?;

    // By force, while no agent is there: the next one makes the cache leave what has gone. What is dirty would be lost with it.
    kill_agent(&mut guest, &agent)?;
    Deadline::secs(30).until("the cache to be clean", || Ok(dirty(&mut guest)? == 0))?;
    host.ctl.ok(&["shrink", NAME, "16M", "--force", "--yes", "--wait"])?;
    disk.wait_plugged(&mut guest, disk.total_blocks - (16 << 20) / disk.block_size)?;
    status(&mut guest, "gone and may be used")?;
    let agent = start_agent(&mut guest, "16M", 5)?;
    settled(&mut guest, &cache, &agent)?;
    let said: Value = serde_json::from_str(&guest.ok("vssd-agent status --json")?)?;
    ensure!(said["uncovered_blocks"] == 0, "{said}");
    guest.ok(&versions("check", cached, STILL, SEED + 1, "0 0"))?;
    ensure!(!agent.ended(), "the agent has ended: {}", String::from_utf8_lossy(&agent.stdout()));
    kill_agent(&mut guest, &agent)?;
    cache.stop(&mut guest)?;
    guest.ok(&versions("check", origin, STILL, SEED + 1, "0 0"))?;
    println!(
        "PASS no name, no cache, no dmsetup, no linear device, a neighbour, suspended by others and by an agent that died, an origin that fails, \
         the least that is kept, blocks taken by force"
    );
    guest.power_off()?;
    host.finish()
}
