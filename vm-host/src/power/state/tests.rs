// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const A: SourceId = SourceId(0);
const B: SourceId = SourceId(1);
const HOST: SourceId = SourceId(2);
const ROLES: [Role; 3] = [Role::Supply, Role::Supply, Role::Host];

const BATTERY: Kind = Kind::OnBattery { runtime_left_ms: None };
const PLANNED: Kind = Kind::ShutdownPlanned { within_ms: None };

fn policy() -> Policy {
    Policy {
        supplies: Supplies::Any,
        window_ms: 1000,
        source_windows_ms: vec![None, Some(300), None],
        needed_ms: 100,
        margin_ms: 50,
        save_after_ms: None,
        lost_grace_ms: 20,
        disarm_after_ms: 30,
        resume_after_ms: 40,
        retry_ms: 15,
    }
}

fn machine(policy: Policy) -> Machine {
    Machine::new(policy, &ROLES, 0)
}

fn say(source: SourceId, kind: Kind) -> Input {
    Input::Observed(Observation { source, kind })
}

/// The effects without events.
fn acts(effects: Vec<Effect>) -> Vec<Effect> {
    effects.into_iter().filter(|effect| !matches!(effect, Effect::Event(_))).collect()
}

fn save(number: u64, reason: Reason, deadline_ms: u64) -> Vec<Effect> {
    vec![Effect::SaveAll { ticket: Ticket(number), reason, deadline_ms }]
}

fn saved(number: u64) -> Input {
    Input::SaveFinished { ticket: Ticket(number), ok: 3, failed: 0 }
}

fn resume(number: u64) -> Vec<Effect> {
    vec![Effect::ResumeAll { ticket: Ticket(number) }]
}

#[test]
fn battery_arms_at_once_and_power_has_to_stay_before_it_disarms() {
    let mut machine = machine(policy());
    assert_eq!(acts(machine.apply(say(A, BATTERY), 10)), [Effect::PreArm]);
    assert_eq!(machine.state(), State::OnBattery);
    assert_eq!(machine.wake_at_ms(), None);
    assert_eq!(acts(machine.apply(say(A, Kind::Online), 20)), []);
    assert_eq!(machine.wake_at_ms(), Some(50));
    assert_eq!(acts(machine.apply(say(A, BATTERY), 49)), [], "a flap is no second failure");
    assert_eq!(acts(machine.apply(say(A, Kind::Online), 60)), []);
    assert_eq!(acts(machine.apply(Input::Time, 89)), []);
    assert_eq!(acts(machine.apply(Input::Time, 90)), [Effect::DisArm]);
    assert_eq!(machine.state(), State::Online);
    assert_eq!(machine.wake_at_ms(), None);
}

#[test]
fn each_critical_word_saves_at_once_with_its_own_reason_and_window() {
    for (source, kind, reason, deadline_ms) in [
        (A, Kind::LowBattery, Reason::LowBattery { source: A }, 1005),
        (A, Kind::ForcedShutdown, Reason::ForcedShutdown { source: A }, 1005),
        (B, Kind::PowerFailing, Reason::PowerFailing { source: B }, 305),
        (HOST, PLANNED, Reason::ShutdownPlanned, 1005),
        (HOST, Kind::ShutdownPlanned { within_ms: Some(500) }, Reason::ShutdownPlanned, 505),
        (
            A,
            Kind::OnBattery { runtime_left_ms: Some(150) },
            Reason::RuntimeShort { source: A, left_ms: 150, needed_ms: 150 },
            155,
        ),
    ] {
        let mut machine = machine(policy());
        assert_eq!(acts(machine.apply(say(source, kind), 5)), save(1, reason, deadline_ms), "{kind:?}");
        assert_eq!(machine.state(), State::Critical);
    }
}

#[test]
fn runtime_that_runs_down_between_two_words_becomes_critical_by_itself() {
    let mut machine = machine(policy());
    let left = Kind::OnBattery { runtime_left_ms: Some(400) };
    assert_eq!(acts(machine.apply(say(A, left), 10)), [Effect::PreArm]);
    assert_eq!(machine.wake_at_ms(), Some(260));
    let reason = Reason::RuntimeShort { source: A, left_ms: 150, needed_ms: 150 };
    assert_eq!(acts(machine.apply(Input::Time, 260)), save(1, reason, 410));
}

#[test]
fn more_to_save_makes_the_same_runtime_critical() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::OnBattery { runtime_left_ms: Some(400) }), 10);
    machine.set_needed(360);
    let reason = Reason::RuntimeShort { source: A, left_ms: 390, needed_ms: 410 };
    assert_eq!(acts(machine.apply(Input::Time, 20)), save(1, reason, 410));
}

#[test]
fn long_on_battery_is_critical_and_flaps_do_not_make_it_shorter() {
    let mut machine = machine(Policy { save_after_ms: Some(100), ..policy() });
    machine.apply(say(A, BATTERY), 10);
    machine.apply(say(A, Kind::Online), 90);
    machine.apply(say(A, BATTERY), 105);
    assert_eq!(machine.wake_at_ms(), Some(110));
    assert_eq!(acts(machine.apply(Input::Time, 110)), save(1, Reason::LongOnBattery { ms: 100 }, 1110));
}

#[test]
fn lost_source_is_no_power_failure_while_online_but_is_on_battery() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::Online), 1);
    let lost = Effect::Event(Event::SourceLost { source: A, on_battery: false });
    assert_eq!(machine.apply(say(A, Kind::Lost), 2), [lost]);
    assert_eq!(machine.apply(say(A, Kind::Lost), 3), [], "told once");
    assert_eq!((machine.state(), machine.wake_at_ms()), (State::Online, None));
    assert_eq!(machine.apply(say(A, BATTERY), 4)[0], Effect::Event(Event::SourceBack { source: A }));

    let lost = Effect::Event(Event::SourceLost { source: A, on_battery: true });
    assert_eq!(machine.apply(say(A, Kind::Lost), 10), [lost]);
    assert_eq!(machine.wake_at_ms(), Some(30));
    assert_eq!(acts(machine.apply(Input::Time, 30)), save(1, Reason::SilentOnBattery { source: A }, 1030));
}

#[test]
fn redundant_supplies_fare_as_well_as_the_best_that_is_heard() {
    let mut machine = machine(Policy { supplies: Supplies::All, ..policy() });
    machine.apply(say(A, Kind::Online), 0);
    machine.apply(say(B, Kind::Online), 0);
    assert_eq!(acts(machine.apply(say(A, Kind::LowBattery), 10)), []);
    assert_eq!(acts(machine.apply(say(B, BATTERY), 20)), [Effect::PreArm]);
    assert_eq!(
        acts(machine.apply(say(B, Kind::ForcedShutdown), 30)),
        // B ends at 330, A has a longer window.
        save(1, Reason::LowBattery { source: A }, 1010)
    );
}

#[test]
fn planned_shutdown_on_battery_ends_with_what_ends_first() {
    for (within_ms, deadline_ms) in [(500, 520), (5000, 610)] {
        let mut machine = machine(policy());
        machine.apply(say(A, Kind::OnBattery { runtime_left_ms: Some(600) }), 10);
        let planned = say(HOST, Kind::ShutdownPlanned { within_ms: Some(within_ms) });
        assert_eq!(acts(machine.apply(planned, 20)), save(1, Reason::ShutdownPlanned, deadline_ms));
    }
}

#[test]
fn darkness_comes_with_the_first_supply_that_is_needed_and_ends() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::OnBattery { runtime_left_ms: Some(600) }), 10);
    let effects = acts(machine.apply(say(B, Kind::LowBattery), 20));
    assert_eq!(effects, save(1, Reason::LowBattery { source: B }, 320));
    machine.apply(Input::SaveFinished { ticket: Ticket(1), ok: 0, failed: 1 }, 30);
    machine.apply(say(B, Kind::OnBattery { runtime_left_ms: Some(5000) }), 40);
    assert_eq!(acts(machine.apply(Input::Time, 50)), save(2, Reason::Retry { failed: 1 }, 610));
}

#[test]
fn redundant_supply_that_is_lost_vouches_for_nothing() {
    let mut machine = machine(Policy { supplies: Supplies::All, ..policy() });
    machine.apply(say(A, Kind::Online), 0);
    machine.apply(say(B, Kind::Online), 0);
    assert_eq!(acts(machine.apply(say(A, Kind::Lost), 10)), []);
    assert_eq!(machine.state(), State::Online);
    assert_eq!(acts(machine.apply(say(B, BATTERY), 20)), [Effect::PreArm]);
}

#[test]
fn redundant_supply_at_its_end_asks_for_no_wake_ups() {
    let mut machine = machine(Policy { supplies: Supplies::All, ..policy() });
    machine.apply(say(B, Kind::Online), 0);
    machine.apply(say(A, Kind::OnBattery { runtime_left_ms: Some(1) }), 10);
    assert_eq!((machine.state(), machine.wake_at_ms()), (State::Online, None));
}

#[test]
fn power_back_before_the_save_has_ended_is_used_afterwards() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::LowBattery), 10);
    assert_eq!(acts(machine.apply(say(A, Kind::Online), 20)), []);
    assert_eq!((machine.state(), machine.wake_at_ms()), (State::Critical, None));
    assert_eq!(acts(machine.apply(saved(1), 30)), []);
    assert_eq!((machine.state(), machine.wake_at_ms()), (State::Saved, Some(60)));
    assert_eq!(acts(machine.apply(Input::Time, 60)), resume(2));
    machine.apply(Input::ResumeFinished { ticket: Ticket(2) }, 70);
    assert_eq!((machine.state(), machine.wake_at_ms()), (State::Online, None));
}

#[test]
fn failure_in_the_middle_of_a_resume_saves_again() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::LowBattery), 10);
    machine.apply(saved(1), 20);
    machine.apply(say(A, Kind::Online), 30);
    assert_eq!(acts(machine.apply(Input::Time, 70)), resume(2));
    assert_eq!(
        acts(machine.apply(say(A, Kind::LowBattery), 75)),
        save(3, Reason::LowBattery { source: A }, 1075)
    );
    assert_eq!(machine.apply(Input::ResumeFinished { ticket: Ticket(2) }, 76), [], "overtaken");
    assert_eq!(machine.apply(saved(1), 77), [], "of another save");
    assert_eq!(machine.state(), State::Critical);
    machine.apply(saved(3), 80);
    assert_eq!(machine.state(), State::Saved);
}

#[test]
fn battery_in_the_middle_of_a_resume_arms_and_ends_on_battery() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::LowBattery), 10);
    machine.apply(saved(1), 20);
    machine.apply(say(A, Kind::Online), 30);
    machine.apply(Input::Time, 70);
    assert_eq!(acts(machine.apply(say(A, BATTERY), 75)), [Effect::PreArm]);
    machine.apply(Input::ResumeFinished { ticket: Ticket(2) }, 80);
    assert_eq!(machine.state(), State::OnBattery);
}

#[test]
fn planned_shutdown_is_allowed_when_saved_and_stays_saved() {
    let mut machine = machine(policy());
    machine.apply(say(HOST, PLANNED), 10);
    assert_eq!(acts(machine.apply(saved(1), 20)), [Effect::AllowShutdown]);
    assert_eq!(machine.wake_at_ms(), None);
    assert_eq!(acts(machine.apply(say(A, Kind::Online), 10_000)), []);
    assert_eq!(machine.state(), State::Saved);
    assert_eq!(acts(machine.apply(say(HOST, Kind::ShutdownCancelled), 10_001)), resume(2));
    assert_eq!(machine.view().reason, Some(Reason::ShutdownCancelled));
}

#[test]
fn shutdown_planned_while_saved_is_allowed_at_once() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::LowBattery), 10);
    machine.apply(saved(1), 20);
    assert_eq!(acts(machine.apply(say(HOST, PLANNED), 30)), [Effect::AllowShutdown]);
    machine.apply(say(A, Kind::Online), 40);
    assert_eq!(machine.wake_at_ms(), None);
}

#[test]
fn what_failed_is_saved_again_while_power_is_away() {
    let mut machine = machine(policy());
    machine.apply(say(A, Kind::LowBattery), 10);
    let effects = machine.apply(Input::SaveFinished { ticket: Ticket(1), ok: 1, failed: 2 }, 20);
    assert_eq!(effects[0], Effect::Event(Event::SaveIncomplete { ok: 1, failed: 2 }));
    assert_eq!((machine.state(), machine.wake_at_ms()), (State::Saved, Some(35)));
    assert_eq!(acts(machine.apply(Input::Time, 35)), save(2, Reason::Retry { failed: 2 }, 1010));
}

#[test]
fn end_of_a_test_resumes_at_once() {
    let mut machine = machine(policy());
    machine.apply(say(SourceId::TEST, BATTERY), 100);
    assert_eq!(machine.state(), State::OnBattery);
    machine.apply(say(SourceId::TEST, Kind::PowerFailing), 110);
    assert!(machine.view().testing);
    machine.apply(saved(1), 120);
    assert_eq!((machine.state(), machine.wake_at_ms()), (State::Saved, None));
    assert_eq!(acts(machine.apply(say(SourceId::TEST, Kind::Online), 130)), resume(2));
    assert_eq!(machine.view().reason, Some(Reason::TestEnded));
}

#[test]
fn end_of_a_test_does_not_hide_a_real_failure() {
    let mut machine = machine(policy());
    machine.apply(say(SourceId::TEST, Kind::PowerFailing), 100);
    machine.apply(saved(1), 120);
    machine.apply(say(A, BATTERY), 121);
    assert_eq!(acts(machine.apply(say(SourceId::TEST, Kind::Online), 130)), []);
    assert_eq!(machine.state(), State::Saved);
}

#[test]
fn unknown_source_is_ignored() {
    let mut machine = machine(policy());
    assert_eq!(machine.apply(say(SourceId(7), Kind::LowBattery), 1), []);
}

#[test]
fn time_that_goes_back_stands_still() {
    let mut machine = machine(policy());
    machine.apply(say(A, BATTERY), 100);
    machine.apply(say(A, Kind::Online), 10);
    assert_eq!(machine.wake_at_ms(), Some(130));
}

#[test]
fn event_and_view_have_stable_names() {
    let mut machine = machine(policy());
    let effects = machine.apply(say(A, Kind::OnBattery { runtime_left_ms: Some(150) }), 5);
    let Some(Effect::Event(event)) = effects.last() else { panic!("{effects:?}") };
    assert_eq!(
        serde_json::to_value(event).unwrap(),
        serde_json::json!({
            "event": "state-changed", "from": "online", "to": "critical",
            "reason": "runtime-short", "source": 0, "left_ms": 150, "needed_ms": 150,
        })
    );
    assert_eq!(
        serde_json::to_value(machine.view()).unwrap(),
        serde_json::json!({
            "state": "critical", "since_ms": 5, "on_battery_since_ms": 5, "shutdown_planned": false, "testing": false,
            "needed_ms": 100,
            "reason": { "reason": "runtime-short", "source": 0, "left_ms": 150, "needed_ms": 150 },
        })
    );
}

/// The same rules, written down without any cleverness: every millisecond is looked at, and what lasted is found by walking
/// back through all that was ever the case.
struct Oracle {
    policy: Policy,
    words: [Option<(Kind, u64)>; 2],
    lost: [Option<u64>; 2],
    test: Option<(Kind, u64)>,
    planned: bool,
    /// Whether the supplies were online, at each time that it was looked.
    history: Vec<(u64, bool)>,
    state: State,
    entered: u64,
    episode: Option<u64>,
    armed: bool,
    ticket: u64,
    failed: u32,
}

impl Oracle {
    fn rank(&self, word: Option<(Kind, u64)>, lost: Option<u64>, now: u64) -> Option<u8> {
        let (kind, at) = word?;
        match kind {
            Kind::Online => {
                if lost.is_some() {
                    None
                } else {
                    Some(0)
                }
            }
            Kind::OnBattery { runtime_left_ms } => {
                let short = runtime_left_ms
                    .is_some_and(|left| now + self.policy.needed_ms + self.policy.margin_ms >= at + left);
                let silent = lost.is_some_and(|since| now >= since + self.policy.lost_grace_ms);
                if short || silent { Some(2) } else { Some(1) }
            }
            _ => Some(2),
        }
    }

    fn stable(&self, now: u64, ms: u64) -> bool {
        let mut result = now >= ms && self.test.is_none();
        for window in self.history.windows(2) {
            // From the first look to the next one this was the case.
            let ((_, online), (until, _)) = (window[0], window[1]);
            if !online && until + ms > now {
                result = false;
            }
        }
        result && self.history.last().is_some_and(|(_, online)| *online)
    }

    fn step(&mut self, input: Option<Input>, now: u64) -> Vec<&'static str> {
        let mut done = Vec::new();
        match input {
            Some(Input::Observed(Observation { source, kind })) => match (source, kind) {
                (_, Kind::ShutdownPlanned { .. }) => {
                    if !self.planned && self.state == State::Saved && self.failed == 0 {
                        done.push("allow");
                    }
                    self.planned = true;
                }
                (_, Kind::ShutdownCancelled) => self.planned = false,
                (SourceId::TEST, Kind::Online) => self.test = None,
                (SourceId::TEST, kind) => self.test = Some((kind, now)),
                (HOST, _) => {}
                (SourceId(i), Kind::Lost) => {
                    let lost = &mut self.lost[usize::from(i)];
                    *lost = lost.or(Some(now));
                }
                (SourceId(i), kind) => {
                    self.lost[usize::from(i)] = None;
                    self.words[usize::from(i)] = Some((kind, now));
                }
            },
            Some(Input::SaveFinished { ticket, failed, .. }) => {
                if self.state == State::Critical && ticket.0 == self.ticket {
                    (self.state, self.entered, self.failed) = (State::Saved, now, failed);
                    if self.planned && failed == 0 {
                        done.push("allow");
                    }
                }
            }
            Some(Input::ResumeFinished { ticket }) => {
                if self.state == State::Resuming && ticket.0 == self.ticket {
                    self.state = if self.episode.is_some() { State::OnBattery } else { State::Online };
                }
            }
            Some(Input::Time) | None => {}
        }
        let ranks: Vec<u8> = (0..2).filter_map(|i| self.rank(self.words[i], self.lost[i], now)).collect();
        let real = match self.policy.supplies {
            Supplies::Any => ranks.iter().max(),
            Supplies::All => ranks.iter().min(),
        };
        let real = real.copied().unwrap_or(0);
        self.history.push((now, real == 0));
        let rank = real.max(self.rank(self.test, None, now).unwrap_or(0));
        let running = matches!(self.state, State::Online | State::OnBattery | State::Resuming);
        if running {
            if rank > 0 && self.episode.is_none() {
                self.episode = Some(now);
            }
            let long = rank == 1
                && self.policy.save_after_ms.is_some_and(|after| now >= self.episode.unwrap() + after);
            if self.planned || rank == 2 || long {
                self.save(now, &mut done);
            } else if rank == 1 {
                if !self.armed {
                    self.armed = true;
                    done.push("arm");
                }
                if self.state == State::Online {
                    self.state = State::OnBattery;
                }
            } else if self.episode.is_some() && self.stable(now, self.policy.disarm_after_ms) {
                self.episode = None;
                if self.armed {
                    self.armed = false;
                    done.push("disarm");
                }
                if self.state == State::OnBattery {
                    self.state = State::Online;
                }
            }
        } else if self.state == State::Saved {
            if !self.planned && rank == 0 && self.stable(now, self.policy.resume_after_ms) {
                self.episode = None;
                self.failed = 0;
                self.ticket += 1;
                self.state = State::Resuming;
                done.push("resume");
            } else if self.failed > 0 && now >= self.entered + self.policy.retry_ms {
                self.save(now, &mut done);
            }
        }
        done
    }

    fn save(&mut self, now: u64, done: &mut Vec<&'static str>) {
        (self.state, self.entered) = (State::Critical, now);
        (self.armed, self.failed) = (false, 0);
        self.ticket += 1;
        done.push("save");
    }
}

fn name(effect: &Effect) -> Option<&'static str> {
    Some(match effect {
        Effect::PreArm => "arm",
        Effect::DisArm => "disarm",
        Effect::SaveAll { .. } => "save",
        Effect::ResumeAll { .. } => "resume",
        Effect::AllowShutdown => "allow",
        Effect::Event(_) => return None,
    })
}

fn any_input() -> impl Strategy<Value = Input> {
    let word = prop_oneof![
        4 => Just(Kind::Online),
        3 => prop::option::of(0u64..400).prop_map(|left| Kind::OnBattery { runtime_left_ms: left }),
        1 => Just(Kind::LowBattery),
        1 => Just(Kind::ForcedShutdown),
        1 => Just(Kind::PowerFailing),
    ];
    let supply = (0u16..2, prop_oneof![4 => word.clone(), 1 => Just(Kind::Lost)]);
    prop_oneof![
        8 => supply.prop_map(|(source, kind)| say(SourceId(source), kind)),
        1 => word.prop_map(|kind| say(SourceId::TEST, kind)),
        1 => Just(say(SourceId::TEST, Kind::Online)),
        1 => Just(say(HOST, PLANNED)),
        1 => Just(say(HOST, Kind::ShutdownCancelled)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// The machine is woken only by inputs and when it asks to be, the oracle each millisecond.
    #[test]
    fn machine_does_what_the_naive_oracle_does(
        script in prop::collection::vec((0u64..60, any_input()), 1..50),
        answers in prop::collection::vec((0u64..60, 0u32..3), 1..8),
        all in any::<bool>(),
        save_after_ms in prop::option::of(20u64..300),
    ) {
        let supplies = if all { Supplies::All } else { Supplies::Any };
        let policy = Policy { supplies, save_after_ms, ..policy() };
        let mut machine = machine(policy.clone());
        let mut oracle = Oracle {
            policy, words: [None; 2], lost: [None; 2], test: None, planned: false,
            history: vec![(0, true)], state: State::Online, entered: 0, episode: None,
            armed: false, ticket: 0, failed: 0,
        };
        let start = 1000;
        let mut agenda: BTreeMap<u64, Vec<Input>> = BTreeMap::new();
        let mut at = start;
        for (delay, input) in script {
            at += delay;
            agenda.entry(at).or_default().push(input);
        }
        let mut answers = answers.into_iter().cycle();
        for now in start..at + 500 {
            let mut inputs = agenda.remove(&now).unwrap_or_default();
            let mut next = 0;
            loop {
                let input = inputs.get(next).copied();
                next += 1;
                let expected = oracle.step(input, now);
                let due = machine.wake_at_ms().is_some_and(|wake| wake <= now);
                let effects = match input {
                    Some(input) => machine.apply(input, now),
                    None if due => machine.apply(Input::Time, now),
                    None => Vec::new(),
                };
                let names: Vec<_> = effects.iter().filter_map(name).collect();
                prop_assert_eq!(&names, &expected, "at {} after {:?}", now, input);
                prop_assert_eq!(machine.state(), oracle.state, "at {} after {:?}", now, input);
                for effect in effects {
                    let (delay, failed) = answers.next().unwrap();
                    let answer = match effect {
                        Effect::SaveAll { ticket, deadline_ms, .. } => {
                            prop_assert!(deadline_ms <= now + 1000);
                            Input::SaveFinished { ticket, ok: 1, failed: failed.saturating_sub(1) }
                        }
                        Effect::ResumeAll { ticket } => Input::ResumeFinished { ticket },
                        _ => continue,
                    };
                    if delay == 0 {
                        inputs.push(answer);
                    } else {
                        agenda.entry(now + delay).or_default().push(answer);
                    }
                }
                if input.is_none() {
                    break;
                }
            }
        }
    }

    /// Whatever happens: nobody saves twice at a time, resumes what is not saved, or asks to be woken in the past.
    #[test]
    fn saves_and_resumes_alternate(inputs in prop::collection::vec((0u64..100, any_input()), 0..200)) {
        let mut machine = machine(policy());
        let (mut now, mut saving, mut asleep) = (0, None, false);
        for (delay, input) in inputs {
            now += delay;
            let mut effects = machine.apply(input, now);
            if let (Some(ticket), 0) = (saving, delay % 3) {
                effects.extend(machine.apply(Input::SaveFinished { ticket, ok: 1, failed: 0 }, now));
                saving = None;
                asleep = true;
            }
            for effect in effects {
                match effect {
                    Effect::SaveAll { ticket, .. } => {
                        prop_assert!(saving.is_none());
                        saving = Some(ticket);
                    }
                    Effect::ResumeAll { .. } => {
                        prop_assert!(asleep);
                        asleep = false;
                    }
                    _ => {}
                }
            }
            prop_assert!(machine.wake_at_ms().is_none_or(|wake| wake > now));
        }
    }
}
