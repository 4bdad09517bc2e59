// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages of the guest channel that lie: every field of every type at its limits, counts that promise more or less than
//! comes, bits that flip. More of class 22 of `wire_hostile.rs`, whose text says how rounds are judged.
//!
//! Long form: `cargo xtask long hostile`; this file alone:
//! `VSSD_HOSTILE_ROUNDS=10000 cargo test -p vssd-tests --release --test wire_hostile_channel -- --test-threads=1`

use anyhow::{Context, Result, anyhow, ensure};
use rand::Rng;
use vssd_protocol::guest::{
    DeclineReason, Estimate, RangeStatus, Request, RequestType, Response, Urgency, VERSION,
};
use vssd_protocol::units::BlockRange;
use vssd_tests::mock::arena::Verdict;
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::queue::{Answer, S_IOERR, S_OK};
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::scene::Scene;
use vssd_tests::mock::{PATIENCE, rng, seed};

/// Room for the longest request here, and for its response.
const REQUEST_ROOM: u64 = 1 << 16;
const RESPONSE_ROOM: usize = 4096;
const BLANK: u8 = 0xa5;

/// A driver that says what it likes.
struct Liar {
    driver: Driver,
    request: u64,
    response: u64,
}

impl Liar {
    fn new(scene: &mut Scene) -> Result<Self> {
        let driver = Driver::start(scene.machine.take_queue(1)?)?;
        let ram = &scene.ram;
        let (request, response) = (ram.alloc(REQUEST_ROOM, 64), ram.alloc(RESPONSE_ROOM as u64, 64));
        Ok(Self { driver, request, response })
    }

    /// A correct message of a type, in the session of now.
    fn correct(&self, kind: RequestType) -> Vec<u8> {
        let (epoch, seq) = (self.driver.epoch(), self.driver.sizes.seq);
        let ranges = || vec![BlockRange::new(3, 2), BlockRange::new(9, 1), BlockRange::new(40, 16)];
        match kind {
            RequestType::Hello => Request::Hello { version: VERSION, features: 0, driver: "liar".into() },
            RequestType::State => Request::State { epoch, flags: 0, start: 0 },
            RequestType::Wait => Request::Wait { epoch, seq_seen: seq },
            RequestType::Unplug => Request::Unplug { epoch, ranges: ranges() },
            RequestType::Plug => Request::Plug { epoch, ranges: ranges() },
            RequestType::Decline => {
                Request::Decline { epoch, seq, could_give: 1, reason: DeclineReason::Busy }
            }
            RequestType::Pull => Request::Pull { epoch, want_blocks: 1, urgency: Urgency::Wish },
            RequestType::Report => Request::Report { epoch, estimate: Estimate::default() },
        }
        .encode()
    }

    /// Sends bytes as a message; whatever they are, they are answered, and no more is written than the answer says. A WAIT that
    /// the device keeps is answered when the session ends.
    fn say(&mut self, kind: RequestType, body: &[u8], room: usize) -> Result<Verdict> {
        let queue = &mut self.driver.queue;
        queue.ring.ram.write(self.request, body);
        queue.ring.ram.fill(self.response, RESPONSE_ROOM, BLANK);
        let mut data = Vec::new();
        if !body.is_empty() {
            data.push(Segment::out(self.request, u32::try_from(body.len())?));
        }
        if room > 0 {
            data.push(Segment::into(self.response, u32::try_from(room)?));
        }
        let head = queue.submit(kind as u32, 0, &data)?;
        let answer = if kind == RequestType::Wait {
            self.driver.hello().context("HELLO behind a WAIT that lies")?;
            self.driver.queue.wait(head, PATIENCE)?
        } else {
            self.driver.queue.wait(head, PATIENCE)?
        };
        let verdict = self.judge(kind, answer, room)?;
        // A HELLO that was good enough began another session.
        if kind == RequestType::Hello {
            self.driver.hello()?;
        }
        Ok(verdict)
    }

    fn judge(&self, kind: RequestType, answer: Answer, room: usize) -> Result<Verdict> {
        // The status byte counts where all the room before it was filled.
        let len = usize::try_from(answer.written)?.min(room);
        let bytes = self.driver.queue.ring.ram.read(self.response, RESPONSE_ROOM);
        ensure!(bytes[len..].iter().all(|byte| *byte == BLANK), "more was written than `used.len` says");
        match answer.status {
            S_OK => {
                Response::decode(kind, &bytes[..len])?;
                Ok(Verdict::Pass)
            }
            S_IOERR => Ok(Verdict::Reject),
            _ => Err(anyhow!("{answer:?}")),
        }
    }

    /// What the device says of itself agrees with the set that it lists (V-18), and all that was given up can be had again.
    fn expect_consistent(&mut self) -> Result<()> {
        self.driver.hello()?;
        let gone = (0..self.driver.hello.total_blocks).filter(|block| !self.driver.plugged[*block as usize]);
        let gone: Vec<BlockRange> = gone.map(|block| BlockRange::new(block, 1)).collect();
        let statuses = self.driver.plug(&gone)?.context("STALE")?;
        ensure!(statuses.iter().all(|status| *status == RangeStatus::Ok), "{statuses:?}");
        Ok(())
    }
}

/// How many values are tried of a field.
const LIMITS: usize = 11;

/// The values at the limits of a field that holds `right`.
fn limits(right: u64, width: usize) -> [u64; LIMITS] {
    let max = u64::MAX >> (64 - 8 * width);
    let (above, below) = (right.wrapping_add(1) & max, right.wrapping_sub(1) & max);
    [0, 1, 4095, 4096, 4097, max / 2, max / 2 + 1, max - 1, max, above, below]
}

/// Each 32-bit and 64-bit word of every message, wherever a field could be, takes each value at its limits; the ranges' words too.
#[test]
fn class_22_fields_of_the_guest_channel_at_their_limits_are_answered() -> Result<()> {
    let mut scene = Scene::new("class_22 limits")?;
    let mut liar = Liar::new(&mut scene)?;
    let mut cases = Vec::new();
    for kind in RequestType::ALL {
        let len = liar.correct(kind).len();
        let words = (0..len).step_by(4).map(|at| (at, 4)).chain((0..len - 7).step_by(8).map(|at| (at, 8)));
        cases.extend(words.flat_map(|(at, width)| (0..LIMITS).map(move |limit| (kind, at, width, limit))));
    }
    for round in scene.arena.rounds(2 * cases.len() as u64) {
        let (kind, at, width, limit) = cases[round % cases.len()];
        let mut body = liar.correct(kind);
        let right = body[at..at + width].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let value = limits(right, width)[limit];
        body[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        let verdict = liar.say(kind, &body, RESPONSE_ROOM);
        let verdict = verdict.with_context(|| format!("{kind:?}: {value:#x} in {width} bytes at {at}"));
        scene.arena.judge(&format!("{kind:?}"), verdict)?;
        if round % 1000 == 999 {
            liar.expect_consistent()?;
        }
    }
    println!("class_22 limits: {} cases", cases.len());
    liar.expect_consistent()?;
    scene.expect_good("fields at their limits")?;
    drop(liar);
    scene.end()
}

/// Counts that promise more ranges than come, or fewer; answers that do not fit.
#[test]
fn class_22_counts_of_the_guest_channel_that_lie_are_answered() -> Result<()> {
    let mut scene = Scene::new("class_22 counts")?;
    let mut liar = Liar::new(&mut scene)?;
    let mut rng = rng(seed("wire_hostile/counts"));
    for round in scene.arena.rounds(20_000) {
        let kind = [RequestType::Unplug, RequestType::Plug][round % 2];
        let come = rng.random_range(0..40usize);
        let promised = match rng.random_range(0..4) {
            0 => come,
            1 => rng.random_range(0..80),
            2 => [4095, 4096, 4097, 1 << 29, (1 << 29) + come, 1 << 31, u32::MAX as usize]
                [rng.random_range(0..7)],
            _ => rng.random::<u32>() as usize,
        };
        let mut body = liar.driver.epoch().to_le_bytes().to_vec();
        body.extend(u32::try_from(promised)?.to_le_bytes());
        body.extend([0; 4]);
        for _ in 0..come {
            let wild = rng.random_ratio(1, 4);
            body.extend(if wild { rng.random() } else { rng.random_range(0..512u32) }.to_le_bytes());
            body.extend(if wild { rng.random() } else { rng.random_range(0..8u32) }.to_le_bytes());
        }
        body.truncate(
            body.len() - if rng.random_ratio(1, 8) { rng.random_range(0..8.min(body.len())) } else { 0 },
        );
        // As much as the ranges that come need, or less, or what was promised.
        let room = [24 + come, rng.random_range(0..24 + come), (24 + promised).min(RESPONSE_ROOM)]
            [rng.random_range(0..3)];
        // Bytes behind the last range mean nothing.
        let honest = promised <= 4096 && 16 + 8 * promised <= body.len();
        let verdict = liar.say(kind, &body, room).and_then(|verdict| {
            ensure!(
                honest || verdict == Verdict::Reject,
                "{promised} ranges promised, {come} came, and it is OK"
            );
            Ok(verdict)
        });
        let case = if honest { "a count that is true" } else { "a count that lies" };
        scene.arena.judge(case, verdict.with_context(|| format!("round {round}")))?;
        if round % 1000 == 999 {
            liar.expect_consistent()?;
        }
    }
    liar.expect_consistent()?;
    scene.expect_good("counts that lie")?;
    drop(liar);
    scene.end()
}

/// Up to six bits of a correct message flip, or it is cut short.
#[test]
fn class_22_bits_of_the_guest_channel_that_flip_are_answered() -> Result<()> {
    let mut scene = Scene::new("class_22 bits")?;
    let mut liar = Liar::new(&mut scene)?;
    let mut rng = rng(seed("wire_hostile/channel"));
    for round in scene.arena.rounds(20_000) {
        let kind = RequestType::ALL[rng.random_range(0..RequestType::ALL.len())];
        let mut body = liar.correct(kind);
        for _ in 0..rng.random_range(1..=6) {
            let at = rng.random_range(0..body.len());
            body[at] ^= 1 << rng.random_range(0..8);
        }
        if rng.random_ratio(1, 4) {
            body.truncate(rng.random_range(0..=body.len()));
        }
        let room = if rng.random_ratio(1, 4) { rng.random_range(0..200) } else { RESPONSE_ROOM };
        let verdict = liar.say(kind, &body, room);
        scene
            .arena
            .judge(&format!("{kind:?}"), verdict.with_context(|| format!("round {round}: {body:x?}")))?;
        if round % 1000 == 999 {
            liar.expect_consistent()?;
        }
    }
    liar.expect_consistent()?;
    scene.expect_good("bits that flip")?;
    drop(liar);
    scene.end()
}
