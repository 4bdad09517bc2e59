// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What goes wrong, told by files.
//!
//! | file | what is in it |
//! |---|---|
//! | a call, `vm.pause` | [`Spoilt`]: what becomes of the next such call |
//! | `guest` | what the guest does of itself: `poweroff`, `reboot`, `panic` |
//! | `snapshot` | what is wrong with the next snapshot: `memory`, `torn`, `private`, `no-state` |
//! | `--version`, `version` | what it says it is |
//! | `pid` | it says that it is process 1 |
//! | `start` | it cannot start |

use std::fs;
use std::path::PathBuf;

/// How a call goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoilt {
    /// Nothing happens, ever.
    Hang,
    /// It is done, and the answer breaks off.
    Half,
    /// The answer is none.
    Nonsense,
    /// It is refused without a reason.
    Refuse,
    /// The answer has a status that it never has.
    WrongStatus,
    /// The program crashes before anything is done.
    Die,
    /// The answer never ends.
    Endless,
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Orders(Option<PathBuf>);

impl Orders {
    pub fn none() -> Self {
        Self(None)
    }

    pub fn new(dir: PathBuf) -> Self {
        Self(Some(dir))
    }

    /// Takes an order, once.
    pub fn take(&self, name: &str) -> Option<String> {
        let path = self.0.as_ref()?.join(name);
        let text = fs::read_to_string(&path).ok()?;
        fs::remove_file(path).unwrap();
        Some(text)
    }

    pub fn spoilt(&self, call: &str) -> Option<Spoilt> {
        Some(match self.take(call)?.as_str() {
            "hang" => Spoilt::Hang,
            "half" => Spoilt::Half,
            "nonsense" => Spoilt::Nonsense,
            "refuse" => Spoilt::Refuse,
            "wrong-status" => Spoilt::WrongStatus,
            "die" => Spoilt::Die,
            "endless" => Spoilt::Endless,
            odd => panic!("no such order: {odd}"),
        })
    }
}
