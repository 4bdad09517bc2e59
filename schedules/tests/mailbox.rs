// SPDX-License-Identifier: Apache-2.0 OR MIT
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
//! The workers' mailbox and the stop of a queue (`vssd-backend/src/vhost_user/mailbox.rs`) in thousands of schedules, by shuttle; and
//! the same with an order reversed that they rest on, which must be noticed.
//!
//! ```text
//!   session ── stop, wait until quiet, ask back what is parked, wait ──┐
//!   worker  ◄─ mailbox ──── takes chains, answers or parks them ───────┤
//!   owner   ── parks ────── asked back: replies ──► mailbox            ▼ all ended
//! ```
//!
//! A wake-up that is lost leaves a worker asleep and whoever waits for it waiting: shuttle ends a run in which nobody can go on.
//! `cargo xtask schedules` runs it. Each scene runs [`SCHEDULES_ENV`] schedules (5,000 unless told otherwise), half of them at random and
//! half by priorities that change at few places; a failure is replayed with the seed that was printed, in `VSSD_SEED`.

mod common;

use std::cell::Cell;
use std::env;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::expect_failure;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::atomic::AtomicU32;
use shuttle::sync::mpsc;
use shuttle::{Config, FailurePersistence, Runner, thread};

/// What the sources take from `vssd-backend/src/vhost_user/sync.rs`.
mod sync {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use shuttle::sync::atomic::{AtomicBool, Ordering};
    pub(crate) use shuttle::sync::{Condvar, Mutex, mpsc};

    #[derive(Debug, Default)]
    pub(crate) struct Event {
        set: Mutex<bool>,
        signalled: Condvar,
    }

    impl Event {
        #[allow(clippy::unnecessary_wraps, reason = "the real one can run out of descriptors")]
        pub(crate) fn new() -> std::io::Result<Self> {
            Ok(Self::default())
        }

        pub(crate) fn signal(&self) {
            *self.set.lock().unwrap() = true;
            self.signalled.notify_all();
        }

        pub(crate) fn clear(&self) {
            *self.set.lock().unwrap() = false;
        }

        pub(crate) fn is_set(&self) -> bool {
            *self.set.lock().unwrap()
        }

        pub(crate) fn wait(&self) {
            let mut set = self.set.lock().unwrap();
            while !*set {
                set = self.signalled.wait(set).unwrap();
            }
        }
    }
}

include!(concat!(env!("OUT_DIR"), "/mailbox.rs"));

const SCHEDULES_ENV: &str = "VSSD_SCHEDULES";
const SCHEDULES: usize = 5_000;
const SEED_ENV: &str = "VSSD_SEED";
/// Changes of priority in one schedule.
const DEPTH: usize = 3;
/// How often a worker that polls looks before it sleeps.
const LOOKS: u32 = 2;
/// Shuttle never times out.
const NEVER: Duration = Duration::MAX;

fn number_from(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|text| text.trim().parse().unwrap())
}

fn seed(name: &str) -> u64 {
    let seed = number_from(SEED_ENV).unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_secs() << 20 | u64::from(now.subsec_micros())
    });
    println!("{name}: {SEED_ENV}={seed}");
    seed
}

fn run(scheduler: impl Scheduler + 'static, scene: fn()) -> usize {
    let mut config = Config::new();
    config.failure_persistence = FailurePersistence::None;
    // That it knows no weaker orderings than SeqCst: the mailbox rests on its lock.
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(scene)
}

fn explore(seed: u64, scene: fn()) -> usize {
    let schedules = number_from(SCHEDULES_ENV).map_or(SCHEDULES, |number| number.try_into().unwrap());
    run(RandomScheduler::new_from_seed(seed, schedules.div_ceil(2)), scene)
        + run(PctScheduler::new_from_seed(seed, DEPTH, schedules / 2), scene)
}

fn passes(name: &str, scene: fn()) {
    let schedules = explore(seed(name), scene);
    println!("{name}: {schedules} schedules");
}

thread_local! {
    /// Schedules begun by a test.
    static BEGUN: Cell<u64> = const { Cell::new(0) };
}

fn caught(name: &str, scene: fn()) {
    let seed = seed(name);
    BEGUN.set(0);
    let message = expect_failure(|| {
        explore(seed, scene);
    });
    println!("{name}: caught in schedule {}: {message}", BEGUN.get());
}

trait Mail<T>: Send + Sync + 'static {
    fn new() -> Arc<Self>;
    fn post(&self, item: T);
    fn has_mail(&self) -> bool;
    fn take(&self, into: &mut Vec<T>);
    fn wake(&self) -> &sync::Event;
}

/// How many chains a queue took.
type Taken = u32;

trait Order: Send + 'static {
    fn obey(self, stop: impl FnOnce(mpsc::Sender<Taken>));
}

trait Ticket {
    fn wait_quiet(&self);
    fn wait(&self) -> Option<Taken>;
}

/// `mailbox.rs`, as it is or broken.
trait Source: Sized + 'static {
    type Mailbox<T: Send + 'static>: Mail<T>;
    type Order: Order;
    type Ticket: Ticket;
    fn stop_order() -> (Self::Order, Self::Ticket);
}

macro_rules! sources {
    ($($module:ident as $name:ident)*) => {$(
        struct $name;

        impl Source for $name {
            type Mailbox<T: Send + 'static> = $module::Mailbox<T>;
            type Order = $module::StopOrder<Taken>;
            type Ticket = $module::StopTicket<Taken>;
            fn stop_order() -> (Self::Order, Self::Ticket) { $module::stop_order() }
        }

        impl<T: Send + 'static> Mail<T> for $module::Mailbox<T> {
            fn new() -> Arc<Self> { Arc::new(Self::new().unwrap()) }
            fn post(&self, item: T) { self.post(item); }
            fn has_mail(&self) -> bool { self.has_mail() }
            fn take(&self, into: &mut Vec<T>) { self.take(into); }
            fn wake(&self) -> &sync::Event { self.wake() }
        }

        impl Order for $module::StopOrder<Taken> {
            fn obey(self, stop: impl FnOnce(mpsc::Sender<Taken>)) { self.obey(stop); }
        }

        impl Ticket for $module::StopTicket<Taken> {
            fn wait_quiet(&self) { self.wait_quiet(); }
            fn wait(&self) -> Option<Taken> { self.wait(NEVER).unwrap() }
        }
    )*};
}
sources!(
    mailbox as AsItIs
    signal_before_post as SignalsTooEarly
    clear_after_take as ClearsTooLate
    quiet_too_early as QuietTooEarly
);

/// Waits as a worker does: looks a few times, if it polls, then sleeps.
fn wait<T>(mailbox: &impl Mail<T>, looks: u32) {
    for _ in 0..looks {
        if mailbox.has_mail() {
            return;
        }
        thread::yield_now();
    }
    mailbox.wake().wait();
}

/// Three threads post to one worker, which ends when it has everything.
fn mail<S: Source>(looks: u32) {
    const POSTERS: usize = 3;
    const EACH: usize = 3;
    BEGUN.set(BEGUN.get() + 1);
    let mailbox = S::Mailbox::new();
    for poster in 0..POSTERS {
        let mailbox = Arc::clone(&mailbox);
        thread::spawn(move || (0..EACH).for_each(|item| mailbox.post((poster, item))));
    }
    let mut next = [0; POSTERS];
    let mut taken = Vec::new();
    while next.iter().sum::<usize>() < POSTERS * EACH {
        wait(&*mailbox, looks);
        mailbox.take(&mut taken);
        for (poster, item) in taken.drain(..) {
            assert_eq!(item, next[poster], "each poster's mail arrives once and in order");
            next[poster] += 1;
        }
    }
}

enum Command<S: Source> {
    Start,
    Stop(S::Order),
    Reply,
    Exit,
}

type Commands<S> = <S as Source>::Mailbox<Command<S>>;

enum OwnerHears<S: Source> {
    Parked(Arc<Commands<S>>),
    GiveBack,
}

/// Chains of a queue; every other one is for the owner.
const CHAINS: u32 = 4;

#[derive(Default)]
struct Queue {
    taken: Taken,
    parked: u32,
    stop: Option<mpsc::Sender<Taken>>,
}

struct Worker<S: Source> {
    looks: u32,
    mailbox: Arc<Commands<S>>,
    owner: mpsc::Sender<OwnerHears<S>>,
    /// For the session to see.
    taken: Arc<AtomicU32>,
    queue: Option<Queue>,
}

impl<S: Source> Worker<S> {
    fn run(mut self) {
        let mut commands = Vec::new();
        loop {
            let sleeps =
                self.queue.as_ref().is_none_or(|queue| queue.stop.is_some() || queue.taken == CHAINS);
            if sleeps {
                wait(&*self.mailbox, self.looks);
            }
            if sleeps || self.mailbox.wake().is_set() {
                self.mailbox.take(&mut commands);
            }
            for command in commands.drain(..) {
                match command {
                    Command::Start => self.queue = Some(Queue::default()),
                    Command::Stop(order) if self.queue.is_some() => order.obey(|stopped| {
                        // A chain may be taken until the moment in which that is forbidden.
                        self.take_chain();
                        self.queue.as_mut().unwrap().stop = Some(stopped);
                    }),
                    Command::Stop(_does_not_run) => {}
                    Command::Reply => self.queue.as_mut().unwrap().parked -= 1,
                    Command::Exit => return,
                }
            }
            self.take_chain();
            self.finish_stop();
        }
    }

    fn take_chain(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        if queue.stop.is_some() || queue.taken == CHAINS {
            return;
        }
        queue.taken += 1;
        self.taken.store(queue.taken, Ordering::SeqCst);
        if queue.taken % 2 == 1 {
            queue.parked += 1;
            self.owner.send(OwnerHears::Parked(Arc::clone(&self.mailbox))).unwrap();
        }
    }

    fn finish_stop(&mut self) {
        if let Some(queue) = self.queue.take_if(|queue| queue.parked == 0 && queue.stop.is_some()) {
            queue.stop.unwrap().send(queue.taken).unwrap();
        }
    }
}

/// Keeps what is parked until it is asked back, and what comes after that for ever.
fn owner<S: Source>(hears: &mpsc::Receiver<OwnerHears<S>>) {
    let mut parked = Vec::new();
    while let Ok(news) = hears.recv() {
        match news {
            OwnerHears::Parked(mailbox) => parked.push(mailbox),
            OwnerHears::GiveBack => parked.drain(..).for_each(|mailbox| mailbox.post(Command::Reply)),
        }
    }
}

fn order_stop<S: Source>(mailbox: &Commands<S>) -> S::Ticket {
    let (order, ticket) = S::stop_order();
    mailbox.post(Command::Stop(order));
    ticket
}

/// A session stops the queues of two workers, of which one polls; and the first once more, when it does not run.
fn stop<S: Source>() {
    BEGUN.set(BEGUN.get() + 1);
    let (to_owner, hears) = mpsc::channel();
    thread::spawn(move || owner::<S>(&hears));
    let workers = [0, LOOKS].map(|looks| {
        let (mailbox, taken) = (Commands::<S>::new(), Arc::new(AtomicU32::new(0)));
        let worker = Worker::<S> {
            looks,
            mailbox: Arc::clone(&mailbox),
            owner: to_owner.clone(),
            taken: Arc::clone(&taken),
            queue: None,
        };
        (mailbox, taken, thread::spawn(move || worker.run()))
    });
    workers.iter().for_each(|(mailbox, ..)| mailbox.post(Command::Start));
    let tickets: Vec<_> = workers.iter().map(|(mailbox, ..)| order_stop::<S>(mailbox)).collect();
    tickets.iter().for_each(Ticket::wait_quiet);
    let quiet: Vec<_> = workers.iter().map(|(_, taken, _)| taken.load(Ordering::SeqCst)).collect();
    to_owner.send(OwnerHears::GiveBack).unwrap();
    for (ticket, quiet) in tickets.iter().zip(quiet) {
        assert_eq!(ticket.wait(), Some(quiet), "no chain is taken once the queue is quiet");
    }
    let again = order_stop::<S>(&workers[0].0);
    again.wait_quiet();
    assert_eq!(again.wait(), None, "it does not run");
    for (mailbox, _, thread) in workers {
        mailbox.post(Command::Exit);
        thread.join().unwrap();
    }
}

#[test]
fn no_mail_is_overlooked() {
    passes("mail to a worker that sleeps", || mail::<AsItIs>(0));
    passes("mail to a worker that looks", || mail::<AsItIs>(LOOKS));
}

#[test]
fn stopped_queue_takes_nothing_and_gives_everything_back() {
    passes("stop of queues", stop::<AsItIs>);
}

#[test]
fn reversed_orders_are_caught() {
    caught("signal before the mail is in", || mail::<SignalsTooEarly>(LOOKS));
    caught("signal cleared after the mail was taken", || mail::<ClearsTooLate>(0));
    caught("quiet before no chain is taken", stop::<QuietTooEarly>);
}
