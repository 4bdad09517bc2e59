// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A daemon that plays a script: it checks each request and answers as written. And the command under test,
//! run with a limit.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// No test needs this long: what does, hangs.
const LIMIT: Duration = Duration::from_secs(20);

/// What the peer does with one request.
pub(crate) struct Step {
    method: &'static str,
    params: Value,
    reply: Reply,
}

pub(crate) enum Reply {
    Result(Value),
    Error(Value),
    /// A result, then these events.
    Events(Value, Vec<Value>),
    /// Bytes as they are, then the connection goes on.
    Raw(Vec<u8>),
    /// Bytes as they are, then the end of the connection.
    RawThenClose(Vec<u8>),
    /// One byte of a line that never ends, every 50 ms, for as long as anybody listens.
    Drip,
    Silence,
}

/// The peer expects `method` with `params` and answers with a result.
pub(crate) fn ok(method: &'static str, params: Value, result: Value) -> Step {
    Step { method, params, reply: Reply::Result(result) }
}

/// The peer expects `method` with `params` and answers with an error of this code.
pub(crate) fn refuse(
    method: &'static str,
    params: Value,
    code: &str,
    message: &str,
    hint: Option<&str>,
) -> Step {
    let mut data = json!({"code": code});
    if let Some(hint) = hint {
        data["hint"] = hint.into();
    }
    Step { method, params, reply: Reply::Error(json!({"code": -32000, "message": message, "data": data})) }
}

pub(crate) fn step(method: &'static str, params: Value, reply: Reply) -> Step {
    Step { method, params, reply }
}

/// Listens on a socket and plays its script to the first client.
pub(crate) struct Peer {
    dir: TempDir,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize, String>>,
    steps: usize,
}

impl Peer {
    pub(crate) fn play(steps: Vec<Step>) -> Self {
        let count = steps.len();
        Self::listen(count, move |stream| serve(stream, steps))
    }

    /// Answers every request with `answer`, at once; `requests` is how many are too many.
    pub(crate) fn repeat(answer: Value, requests: usize) -> Self {
        Self::listen(requests, move |mut stream| {
            stream.set_nonblocking(false).unwrap();
            let mut count = 0;
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let answer = json!({"jsonrpc": "2.0", "id": request["id"], "result": answer});
                drop(stream.write_all(format!("{answer}\n").as_bytes()));
                count += 1;
            }
            if count < requests { Ok(requests) } else { Err(format!("asked {count} times")) }
        })
    }

    fn listen(
        steps: usize,
        serve: impl FnOnce(UnixStream) -> Result<usize, String> + Send + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let is_stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !is_stopped.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok((stream, _)) => return serve(stream),
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
            Ok(0)
        });
        Self { dir, stop, thread, steps }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// Ends the peer; fails unless the whole script was played and nothing else was asked.
    pub(crate) fn finish(self) {
        self.stop.store(true, Ordering::Release);
        match self.thread.join().expect("the peer panicked") {
            Ok(played) => {
                assert_eq!(played, self.steps, "requests that the script expects and the command made");
            }
            Err(complaint) => panic!("{complaint}"),
        }
    }
}

/// How many steps were played, or what was asked instead.
fn serve(stream: UnixStream, steps: Vec<Step>) -> Result<usize, String> {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    let count = steps.len();
    for (number, step) in steps.into_iter().enumerate() {
        let mut line = String::new();
        reader.read_line(&mut line).map_err(|err| format!("step {number}: {err}"))?;
        if line.is_empty() {
            return Err(format!("the command left before {} was asked", step.method));
        }
        let request: Value = serde_json::from_str(&line).map_err(|err| format!("{err}: {line}"))?;
        let expected =
            json!({"jsonrpc": "2.0", "id": request["id"], "method": step.method, "params": step.params});
        if request != expected || !request["id"].is_u64() {
            return Err(format!("step {number}: asked {request}, expected {expected}"));
        }
        let id = &request["id"];
        // The command may be gone already; whether that is right, its exit code says.
        let mut say = |text: &[u8]| drop(stream.write_all(text));
        let result_line =
            |result: Value| format!("{}\n", json!({"jsonrpc": "2.0", "id": id, "result": result}));
        match step.reply {
            Reply::Result(result) => say(result_line(result).as_bytes()),
            Reply::Error(error) => {
                say(format!("{}\n", json!({"jsonrpc": "2.0", "id": id, "error": error})).as_bytes());
            }
            Reply::Events(result, events) => {
                let mut text = result_line(result);
                for event in events {
                    text += &format!("{}\n", json!({"jsonrpc": "2.0", "method": "event", "params": event}));
                }
                say(text.as_bytes());
            }
            Reply::Raw(bytes) => say(&bytes),
            Reply::RawThenClose(bytes) => {
                say(&bytes);
                return Ok(number + 1);
            }
            Reply::Drip => {
                while stream.write_all(b" ").is_ok() {
                    thread::sleep(Duration::from_millis(50));
                }
            }
            Reply::Silence => {}
        }
    }
    let mut rest = Vec::new();
    match reader.read_to_end(&mut rest) {
        Ok(_) if rest.is_empty() => Ok(count),
        Ok(_) => Err(format!("asked after the end of the script: {}", String::from_utf8_lossy(&rest))),
        // A peer that has not read all that the client wrote is told so at the end.
        Err(err) => Err(format!("end of the script: {err}")),
    }
}

/// How the command ended and what it said.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Asserts success and silence on standard error, and returns what was printed.
    pub(crate) fn printed(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{self:?}");
        self.stdout
    }

    /// Asserts success, and returns the one JSON object that was printed.
    pub(crate) fn json(self) -> Value {
        let text = self.printed();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with(r#"{"schema":"vssd.v1","#), "{text}");
        serde_json::from_str(&text).unwrap()
    }
}

/// The command, deaf to the environment of whoever runs the tests.
pub(crate) fn command(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_balloon-ctl"));
    for name in ["BALLOON_CTL_SOCKET", "XDG_RUNTIME_DIR", "NO_COLOR", "CLICOLOR_FORCE"] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm").arg("--socket").arg(socket);
    command
}

pub(crate) fn wait(child: Child) -> Outcome {
    let pid = child.id();
    let done = Arc::new(AtomicBool::new(false));
    let is_done = Arc::clone(&done);
    let watchdog = thread::spawn(move || {
        let end = Instant::now() + LIMIT;
        while !is_done.load(Ordering::Acquire) {
            if Instant::now() > end {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        false
    });
    let output = child.wait_with_output().unwrap();
    done.store(true, Ordering::Release);
    assert!(!watchdog.join().unwrap(), "the command hung: {output:?}");
    Outcome {
        code: output.status.code().expect("killed by a signal"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs a finished command line with no terminal anywhere.
pub(crate) fn run(mut command: Command) -> Outcome {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait(child)
}

/// Plays `steps` to the command with `args`, and checks that all of them were asked.
pub(crate) fn ctl(steps: Vec<Step>, args: &[&str]) -> Outcome {
    let peer = Peer::play(steps);
    let mut command = command(&peer.socket());
    command.args(args);
    let outcome = run(command);
    peer.finish();
    outcome
}

/// Runs the command where it must not need a daemon.
pub(crate) fn alone(args: &[&str]) -> Outcome {
    ctl(Vec::new(), args)
}

/// `read_to_end` for streams whose end may be an error, as a terminal's is.
pub(crate) fn read_all(mut stream: impl Read) -> String {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut chunk) {
        all.extend_from_slice(&chunk[..count]);
    }
    String::from_utf8_lossy(&all).into_owned()
}
