// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Runs the checker and tells what it found.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::rules::Rule;
use crate::scene::Scene;
use crate::world::{Action, World};

impl Model for Scene {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.progress(self, actions);
        world.disturbances(self, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        next.act(self, action);
        if next.broken.is_none() && next.is_at_rest(self) && next.disagreement(self).is_some() {
            next.breaks(Rule::Converged);
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        // One property for all, for each costs a look at every state; a state knows which rule it breaks.
        vec![Property::always("every rule holds", |_, world: &World| world.broken.is_none())]
    }
}

/// What a search found.
#[derive(Debug)]
pub struct Outcome {
    pub name: &'static str,
    /// Different states seen.
    pub states: usize,
    /// Steps made, also to states seen before.
    pub steps: usize,
    /// The longest of the shortest ways to a state.
    pub depth: usize,
    pub took: Duration,
    /// Everything within the budget was seen.
    pub complete: bool,
    /// The rule that does not hold, and how that comes about.
    pub broken: Option<(Rule, String)>,
}

/// Walks a scene until everything was seen, a rule is broken, or `limit` states were seen.
pub fn check(scene: Scene, threads: usize, limit: usize) -> Outcome {
    let started = Instant::now();
    let checker = scene
        .checker()
        .threads(threads)
        .finish_when(HasDiscoveries::Any)
        .target_state_count(limit)
        .spawn_bfs()
        .join();
    let broken = checker.discoveries().into_values().next().and_then(|path| {
        let mut story = String::new();
        let rule = path.last_state().broken?;
        let why = path.last_state().disagreement(&scene).filter(|_| rule == Rule::Converged).unwrap_or("");
        let _ = writeln!(story, "{}: {} {why}", scene.name, rule.text());
        let steps = path.into_actions();
        for (n, action) in (1..).zip(&steps) {
            let _ = writeln!(story, "  {n:2} {action:?}");
        }
        Some((rule, story))
    });
    Outcome {
        name: scene.name,
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        took: started.elapsed(),
        complete: checker.is_done() && checker.state_count() < limit && broken.is_none(),
        broken,
    }
}
