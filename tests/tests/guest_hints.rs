// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Programs in a guest that name the blocks they can do without: an object cache under a verified workload, a C program, and
//! everything that may lie where hints are looked for.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vssd_tests::agent::Job;
use vssd_tests::c_program;
use vssd_tests::guest::Guest;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scenario::{self, Disk, Medium, PoolHost, Range, blocks, normal};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const NAME: &str = "vm1";

/// A guest with a vSSD of `size`, and the agent that looks for hints for it.
fn start(scratch: &Scratch, size: &str) -> Result<(PoolHost, Guest, Disk, Job)> {
    let host = PoolHost::new(scratch, Medium::Nvram, "200M")?;
    let socket = host.create(NAME, &["--size", size])?;
    let kernel = Kernel::debian()?;
    let image = ImageBuilder::new(&kernel)
        .file("/tools/guest_blocks", &paths::artifact("vssd-tests", "guest_blocks")?)
        .file("/tools/vssd-agent", &paths::artifact("vssd-agent", "vssd-agent")?)
        .file("/tools/slot_cache", &paths::example("vssd-client", "slot_cache")?)
        .file(
            "/tools/give_blocks",
            &c_program::compile("vssd-client/examples/give_blocks.c", "vssd-client/include")?,
        )
        .driver()?
        .build()?;
    let mut guest =
        Qemu::new(QemuBinary::debian()?, &image).memory_mib(1024).disk(VhostUserDisk::new(&socket)).boot()?;
    let disk = scenario::bind(&mut guest, 0)?;
    guest.write_file("/etc/vssd-agent.toml", b"[[disk]]\nsource = \"hint-files\"\n")?;
    let agent = guest.spawn("exec vssd-agent 2>&1")?;
    guest.ok(&format!("until test -d {}; do sleep 0.1; done", place(&disk)))?;
    Ok((host, guest, disk, agent))
}

/// Where programs write their hints for a disk.
fn place(disk: &Disk) -> String {
    format!("/run/vssd-agent/hints/{}", disk.name)
}

/// Replaces a program's hint file.
fn publish(guest: &mut Guest, disk: &Disk, program: &str, text: &str) -> Result<()> {
    let place = place(disk);
    guest.write_file(&format!("{place}/.{program}"), text.as_bytes())?;
    guest.ok(&format!("mv {place}/.{program} {place}/{program}")).map(drop)
}

fn singles(ranges: &[Range]) -> Vec<u64> {
    ranges.iter().flat_map(|(start, count)| *start..start + count).collect()
}

/// Waits until no hint is left in the driver: the agent takes them back when the host has what it wanted.
fn settled(guest: &mut Guest, disk: &Disk) -> Result<()> {
    Deadline::secs(20).until("the agent to take hints back", || {
        let status = disk.status(guest)?;
        Ok(status["hinted_blocks"] == "0" && status["plugged_blocks"] == status["requested_blocks"])
    })
}

/// What the cache says of itself.
struct Cache {
    job: Job,
    lines: usize,
}

/// Gets of the cache and those of them that found something.
#[derive(Clone, Copy, Debug, Default)]
struct Hits {
    gets: u64,
    hits: u64,
}

impl Hits {
    fn percent(self) -> f64 {
        self.hits as f64 * 100.0 / self.gets as f64
    }
}

impl Cache {
    fn start(guest: &mut Guest, disk: &Disk, law: &str) -> Result<Self> {
        let job = guest.spawn(&format!(
            "exec slot_cache {} until=/tmp/stop law={law} objects=2700 report=/tmp/report trace=/tmp/trace 2>&1",
            disk.name
        ))?;
        Ok(Self { job, lines: 0 })
    }

    fn report(&self, guest: &mut Guest) -> Result<Value> {
        let said = guest.sh("cat /tmp/report")?;
        ensure!(!self.job.ended(), "the cache has ended: {}", String::from_utf8_lossy(&self.job.stdout()));
        Ok(serde_json::from_str(&said.text()).unwrap_or_default())
    }

    /// Waits until it reports `count` slots of a kind.
    fn wait(&self, guest: &mut Guest, kind: &str, count: u64) -> Result<()> {
        let mut said = Value::Null;
        Deadline::secs(60)
            .until(&format!("the cache to have {count} slots {kind}"), || {
                said = self.report(guest)?;
                Ok(said[kind] == count)
            })
            .with_context(|| said.to_string())
    }

    fn hits(&self, guest: &mut Guest) -> Result<Hits> {
        let report = self.report(guest)?;
        let count = |key: &str| report[key].as_u64().with_context(|| format!("no {key} in {report}"));
        Ok(Hits { gets: count("hits")? + count("misses")?, hits: count("hits")? })
    }

    /// The next `gets` gets or some more, added to `sum`.
    fn measure(&self, guest: &mut Guest, gets: u64, sum: &mut Hits) -> Result<()> {
        let before = self.hits(guest)?;
        let after = Deadline::secs(60).poll("the cache to be asked", || {
            thread::sleep(Duration::from_millis(100));
            let now = self.hits(guest)?;
            Ok((now.gets >= before.gets + gets).then_some(now))
        })?;
        sum.gets += after.gets - before.gets;
        sum.hits += after.hits - before.hits;
        Ok(())
    }

    /// The slots that it named since the last call, in order. Checks that they are its coldest ones, the coldest first.
    fn named(&mut self, guest: &mut Guest) -> Result<Vec<u64>> {
        let text = guest.ok("cat /tmp/trace")?;
        let mut named = Vec::new();
        let mut seen = HashSet::new();
        for line in text.lines().skip(self.lines) {
            self.lines += 1;
            let line: Value = serde_json::from_str(line)?;
            let hints: Vec<(u64, u64)> = serde_json::from_value(line["hints"].clone())?;
            let kept = line["coldest_kept"].as_u64().unwrap_or(u64::MAX);
            ensure!(hints.is_sorted_by_key(|(_, last_use)| *last_use), "not the coldest first: {line}");
            ensure!(hints.iter().all(|(_, last_use)| *last_use < kept), "a colder one was kept: {line}");
            named.extend(hints.into_iter().map(|(slot, _)| slot).filter(|slot| seen.insert(*slot)));
        }
        Ok(named)
    }
}

#[test]
fn a_cache_loses_its_coldest_objects_first_and_no_other_in_10_cycles() -> Result<()> {
    const CYCLES: u32 = 10;
    const ASKED: u64 = 512;
    const MANY: u64 = 2000;
    const SOME: u64 = 400;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let (mut host, mut guest, disk, agent) = start(&scratch, "64M")?;
    let bytes = ASKED * disk.block_size;
    let mut cache = Cache::start(&mut guest, &disk, "zipf")?;
    cache.wait(&mut guest, "free", 0)?;
    let (mut before, mut small, mut between, mut after) = <(Hits, Hits, Hits, Hits)>::default();
    cache.measure(&mut guest, MANY, &mut before)?;
    let (mut slowest, mut spare) = (Duration::ZERO, 0);
    for cycle in 0..CYCLES {
        let started = Instant::now();
        // A cache that is slow to answer, because the machine is, may do so after the agent has said that there are no hints.
        let shrink =
            ["shrink", NAME, &bytes.to_string(), "--deadline", "60s", "--on-timeout", "wait", "--wait"];
        let shrunk = host.ctl.ok(&shrink).with_context(|| {
            format!("cycle {cycle}: {}", String::from_utf8_lossy(&agent.stdout()).into_owned())
        });
        shrunk.with_context(|| guest.ok("cat /tmp/trace /tmp/report").unwrap_or_default())?;
        slowest = slowest.max(started.elapsed());
        // Named and not needed: the cache's again.
        cache.wait(&mut guest, "hinted", 0)?;
        settled(&mut guest, &disk)?;
        let named = cache.named(&mut guest)?;
        let gone = host.evicted(NAME)?;
        ensure!(blocks(&gone) == ASKED, "{} blocks went", blocks(&gone));
        ensure!(
            named.len() as u64 > ASKED,
            "no more were named than went, so this shows nothing of their order"
        );
        spare += named.len() as u64 - ASKED;
        let first = named.iter().zip(0..ASKED).map(|(slot, _)| (*slot, 1));
        ensure!(normal(gone) == normal(first.collect()), "cycle {cycle}: others went than were named first");
        cache.measure(&mut guest, SOME, &mut small)?;
        let state = host.try_resize("grow", NAME, bytes)?;
        ensure!(state == "done", "cycle {cycle}: the grow ended {state}");
        cache.wait(&mut guest, "gone", 0)?;
        settled(&mut guest, &disk)?;
        cache.measure(&mut guest, SOME, &mut between)?;
    }
    cache.wait(&mut guest, "free", 0)?;
    cache.measure(&mut guest, MANY, &mut after)?;
    guest.ok("touch /tmp/stop")?;
    let said = guest.wait(&cache.job, Duration::from_secs(20))?.check()?.text();
    let report: Value = serde_json::from_str(&said)?;
    ensure!(report["lost"] == 0 && report["refused"] == 0, "slots went that the cache used: {report}");
    ensure!(report["hits"].as_u64() > Some(1000), "the cache was hardly used: {report}");
    ensure!(!agent.ended(), "the agent has ended: {}", String::from_utf8_lossy(&agent.stdout()));
    let late = String::from_utf8_lossy(&agent.stdout()).matches("E_NO_HINTS").count();
    println!(
        "PASS {CYCLES} cycles, half of the cache each … {} objects read and right, {} put; what went is what was named first \
         ({spare} named and not needed); slowest shrink {} ms ({late} answered late); hits: {:.1} % before, {:.1} % while small, {:.1} % between, \
         {:.1} % after",
        report["hits"],
        report["puts"],
        slowest.as_millis(),
        before.percent(),
        small.percent(),
        between.percent(),
        after.percent(),
    );
    ensure!(before.percent() > small.percent(), "half of the slots found as much");
    ensure!(after.percent() > f64::midpoint(before.percent(), small.percent()), "it did not recover");
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

/// What blocks go of a cache matters to it only if it has not forgotten them: taken by force, they are misses and nothing else.
#[test]
fn a_cache_that_is_not_asked_loses_objects_and_never_gives_a_wrong_one() -> Result<()> {
    const ASKED: u64 = 340;
    const CYCLES: u64 = 3;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let (mut host, mut guest, disk, agent) = start(&scratch, "64M")?;
    guest.ok("killall vssd-agent")?;
    guest.wait(&agent, Duration::from_secs(10))?;
    let cache = Cache::start(&mut guest, &disk, "gaussian")?;
    let bytes = (ASKED * disk.block_size).to_string();
    for _ in 0..CYCLES {
        // So that each block that goes is one that is used.
        cache.wait(&mut guest, "free", 0)?;
        host.ctl.ok(&["shrink", NAME, &bytes, "--force", "--yes", "--wait"])?;
        cache.wait(&mut guest, "gone", ASKED)?;
        host.ctl.ok(&["grow", NAME, &bytes, "--wait"])?;
        cache.wait(&mut guest, "gone", 0)?;
    }
    guest.ok("touch /tmp/stop")?;
    let said = guest.wait(&cache.job, Duration::from_secs(20))?.check()?.text();
    let report: Value = serde_json::from_str(&said)?;
    let count = |key: &str| report[key].as_u64().with_context(|| format!("no {key} in {report}"));
    let (lost, refused) = (count("lost")?, count("refused")?);
    // The cache hears of the wish a moment before it is carried out, so some that go are forgotten by then.
    ensure!(lost + refused > ASKED / 2, "too few objects were lost to show anything: {report}");
    println!(
        "PASS {CYCLES} shrinks by force under a cache … {lost} objects lost, {refused} writes refused, {} objects read and right",
        report["hits"]
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn whatever_lies_where_hints_are_looked_for_is_said_and_costs_nobody_else_anything() -> Result<()> {
    const SEED: u64 = 59;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let (mut host, mut guest, disk, agent) = start(&scratch, "64M")?;
    let place = place(&disk);
    disk.fill(&mut guest, SEED, &[(0, disk.total_blocks)])?;
    let size = |blocks: u64| blocks * disk.block_size;
    let log = |agent: &Job| String::from_utf8_lossy(&agent.stdout()).into_owned();
    let refused = |host: &PoolHost, why: &str| -> Result<()> {
        let run = host.ctl.refused(&["shrink", NAME, &size(32).to_string(), "--wait"])?;
        ensure!(run.code == 4 && run.stderr.contains(why), "not {why:?}: {} {}", run.code, run.stderr);
        ensure!(blocks(&host.evicted(NAME)?) == 0);
        Ok(())
    };
    let back = |host: &PoolHost, guest: &mut Guest| -> Result<()> {
        let gone = size(blocks(&host.evicted(NAME)?));
        ensure!(host.try_resize("grow", NAME, gone)? == "done");
        settled(guest, &disk)
    };

    // No hints.
    let started = Instant::now();
    refused(&host, "nothing can be given up")?;
    let declined = started.elapsed();
    ensure!(declined < Duration::from_secs(6), "it took {declined:?} to say that there are no hints");
    ensure!(log(&agent).contains("E_NO_HINTS"), "{}", log(&agent));

    // Of one file the lines before the fault count, others not at all, and a good one as a whole.
    publish(&mut guest, &disk, "bad", "10 4\n20 x\n30 4\n")?;
    publish(&mut guest, &disk, "far", "40 1\n1000000 1\n50 1\n")?;
    publish(&mut guest, &disk, "good", "# a good one\n100 8\n")?;
    guest.ok(&format!(
        "cd {place}; echo '60 1' > /tmp/elsewhere; ln -s /tmp/elsewhere link; mkfifo pipe; printf '70 1' > cut; \
         (echo '80 1'; head -c 5000000 /dev/zero | tr '\\0' '#'; echo) > large; echo '90 1' > .hidden"
    ))?;
    ensure!(host.try_resize("shrink", NAME, size(64))? == "partial");
    let expected = vec![(10, 4), (40, 1), (100, 8)];
    ensure!(normal(host.evicted(NAME)?) == expected, "{:?} went", host.evicted(NAME)?);
    let words = [
        "bad: line 2",
        "far: line 2",
        "link: it is a symbolic link",
        "pipe: it is no",
        "cut: line 1",
        "large: it has",
    ];
    let said: Value = serde_json::from_str(&guest.ok("vssd-agent status --json")?)?;
    for word in words {
        let count = log(&agent).matches(word).count();
        ensure!(count == 1, "{word:?} was said {count} times: {}", log(&agent));
        ensure!(said["problem"].as_str().is_some_and(|text| text.contains(word)), "no {word:?} in {said}");
    }
    ensure!(log(&agent).contains("E_HINTS") && said["could_give"]["clean_cold_blocks"] == 0, "{said}");
    guest.ok(&format!("rm -f {place}/* {place}/.hidden"))?;
    back(&host, &mut guest)?;

    // Where everybody may write, nobody is believed.
    publish(&mut guest, &disk, "good", "100 32\n")?;
    guest.ok(&format!("chmod 777 {place}"))?;
    refused(&host, "its own rules forbid it")?;
    ensure!(log(&agent).contains("everybody may write"), "{}", log(&agent));
    guest.ok(&format!("chmod 755 {place}"))?;

    // What costs nothing goes first; then two programs give in turns, each its first.
    publish(&mut guest, &disk, "good", "100 20\n300 80\n")?;
    publish(&mut guest, &disk, "other", "500 100\n")?;
    publish(&mut guest, &disk, "rest", "cost free\n700 4\ncost dirty\n710 4\n")?;
    ensure!(host.try_resize("shrink", NAME, size(68))? == "done");
    let expected = vec![(100, 20), (300, 12), (500, 32), (700, 4)];
    ensure!(normal(host.evicted(NAME)?) == expected, "{:?} went", host.evicted(NAME)?);

    // A program that misses blocks gets some back, where the host may grant that.
    guest.ok(&format!("rm {place}/good {place}/other {place}/rest"))?;
    settled(&mut guest, &disk)?;
    host.ctl.ok(&["limits", NAME, "--pull", "grant"])?;
    publish(&mut guest, &disk, "short", "want 24\n")?;
    Deadline::secs(30)
        .until("the host to grant what a program wants", || Ok(blocks(&host.evicted(NAME)?) == 44))?;
    guest.ok(&format!("rm {place}/short"))?;
    back(&host, &mut guest)?;

    // A C program hears of the wish and names blocks for it, which go in its order.
    guest.ok(&format!("until grep -qx 'agents 1' /proc/vssd/{}/status; do sleep 0.1; done", disk.name))?;
    let program =
        guest.spawn(&format!("exec give_blocks {} cprogram free 900 8 700 16 600 3 800 100", disk.name))?;
    guest.ok(&format!("until grep -qx 'agents 2' /proc/vssd/{}/status; do sleep 0.1; done", disk.name))?;
    ensure!(host.try_resize("shrink", NAME, size(32))? == "done");
    let gone = normal(host.evicted(NAME)?);
    ensure!(gone == [(600, 3), (700, 16), (800, 5), (900, 8)], "{gone:?} went");
    let said = guest.wait(&program, Duration::from_secs(20))?.check()?.text();
    let seen: String = gone.iter().map(|(start, count)| format!("{start} {count}\n")).collect();
    ensure!(said == seen.trim(), "the program was told: {said}");
    ensure!(!guest.sh(&format!("test -e {place}/cprogram"))?.success(), "its hints are still there");
    settled(&mut guest, &disk)?;
    let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
    ensure!(singles(&gone).len() as u64 == scan.blocks(scenario::ENODATA));
    ensure!(!agent.ended(), "the agent has ended: {}", log(&agent));
    println!(
        "PASS no hints (said after {} ms), malformed, out of range, cut off, too large, link, pipe, writable by all, two programs in \
         turns, a wish granted, a C program's blocks in its order",
        declined.as_millis()
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}
