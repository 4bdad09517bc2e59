// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest: it counts, in a processor's register and in memory, and stops the whole program when one is not the other, as a guest
//! would crash whose memory is not its own.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memmap2::{MmapMut, MmapOptions};
use serde::{Deserialize, Serialize};

use crate::vmm::Vmm;

/// Where in memory the number is.
const PLACE: usize = 0x1000;
const TICK: Duration = Duration::from_millis(1);

/// What is lost with the power, and saved before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub count: u64,
    /// Another at each boot.
    pub boot: u64,
}

/// A guest that was booted or restored.
pub struct Guest {
    pub registers: Registers,
    memory: MmapMut,
    port: SerialPort,
}

impl Guest {
    pub fn boot(mut memory: MmapMut, port: SerialPort) -> Self {
        let registers = Registers { count: 0, boot: moment() };
        for (place, value) in [(PLACE, registers.count), (PLACE + 8, registers.boot)] {
            word(&mut memory, place).store(value, Ordering::SeqCst);
        }
        Self { registers, memory, port }
    }

    pub fn restore(memory: MmapMut, port: SerialPort, registers: Registers) -> Self {
        Self { registers, memory, port }
    }

    pub fn into_port(self) -> SerialPort {
        self.port
    }

    fn tick(&mut self) {
        let Registers { count, boot } = self.registers;
        let found = [PLACE, PLACE + 8].map(|place| word(&mut self.memory, place).load(Ordering::SeqCst));
        if found != [count, boot] {
            eprintln!(
                "the guest has crashed: its memory has {found:?} and its processor {:?}",
                [count, boot]
            );
            exit(70);
        }
        self.registers.count += 1;
        word(&mut self.memory, PLACE).store(self.registers.count, Ordering::SeqCst);
        if self.registers.count % 64 == 1 {
            self.port.say(&format!("count {}\n", self.registers.count));
        }
    }
}

/// Another each time.
fn moment() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_nanos()).unwrap()
}

fn word(memory: &mut MmapMut, place: usize) -> &AtomicU64 {
    let at = memory[place..place + 8].as_mut_ptr().cast();
    // SAFETY: the eight bytes are in the mapping, which the reference borrows, and aligned; other processes only read them.
    unsafe { AtomicU64::from_ptr(at) }
}

/// `MAP_SHARED` of the whole file, which must be there and long enough.
pub fn map_file(path: &Path, bytes: u64) -> Result<MmapMut, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let file = File::options().read(true).write(true).open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() < bytes {
        return Err("The mapping goes past the end of its file".to_owned());
    }
    let length = usize::try_from(bytes).unwrap();
    // SAFETY: the file is this guest's alone, and nobody shortens it.
    unsafe { MmapOptions::new().len(length).map_mut(&file) }.map_err(failed)
}

/// The serial port, on a socket.
pub struct SerialPort {
    path: PathBuf,
    listener: UnixListener,
    clients: Vec<UnixStream>,
}

impl SerialPort {
    /// Binds the socket, where nothing may be.
    pub fn bind(path: &Path) -> Result<Self, String> {
        let listener = UnixListener::bind(path).map_err(|error| format!("{}: {error}", path.display()))?;
        listener.set_nonblocking(true).unwrap();
        Ok(Self { path: path.to_owned(), listener, clients: Vec::new() })
    }

    /// As when a guest restarts: the socket is another one, and none is connected to it.
    pub fn bind_again(self) -> Result<Self, String> {
        let Self { path, listener, clients } = self;
        drop((listener, clients));
        fs::remove_file(&path).unwrap();
        Self::bind(&path)
    }

    fn say(&mut self, text: &str) {
        while let Ok((client, _)) = self.listener.accept() {
            self.clients.push(client);
        }
        self.clients.retain_mut(|client| client.write_all(text.as_bytes()).is_ok());
    }
}

/// Runs the processor of whatever guest there is.
pub fn drive(vmm: Arc<Mutex<Vmm>>) {
    thread::spawn(move || {
        loop {
            thread::sleep(TICK);
            let mut vmm = vmm.lock().unwrap();
            if let Some(guest) = vmm.running() {
                guest.tick();
                vmm.guest_turn();
            }
        }
    });
}
