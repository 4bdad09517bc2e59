// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The NUT source against the real server: `upsd` with its `dummy-ups` driver, which reads the state of a UPS from a file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use vm_host::power::{Effect, Input, Kind, Machine, Monitor, Observation, PowerConfig, State};

const UPS: &str = "dummy";

/// A server and a driver with folders of their own, on a free port.
struct Nut {
    dir: tempfile::TempDir,
    port: u16,
    driver: Option<Child>,
    server: Option<Child>,
}

impl Nut {
    fn start(status: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        };
        let loopback6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
        let listen6 = if loopback6 { format!("LISTEN ::1 {port}\n") } else { String::new() };
        file("nut.conf", "MODE=netserver\n");
        // Stale after two seconds without a word of the driver.
        file("upsd.conf", &format!("LISTEN 127.0.0.1 {port}\n{listen6}MAXAGE 2\n"));
        file("upsd.users", "[vmhost]\n  password = \"se cret\"\n  upsmon secondary\n");
        let state = dir.path().join("ups.dev");
        file(
            "ups.conf",
            &format!(
                "pollinterval = 1\n[{UPS}]\n  driver = dummy-ups\n  port = {}\n  mode = dummy-loop\n  desc = \"a UPS\"\n",
                state.display()
            ),
        );
        let mut nut = Self { dir, port, driver: None, server: None };
        nut.say(status, None);
        nut.start_driver();
        nut.start_server();
        nut
    }

    /// The tools want to be root or a user of their own, who must be told to stay who they are.
    fn command(&self, program: &str) -> Command {
        let user = Command::new("id").arg("-un").output().unwrap();
        let mut command = Command::new(program);
        command
            .args(["-u", String::from_utf8(user.stdout).unwrap().trim()])
            .env("NUT_CONFPATH", self.dir.path())
            .env("NUT_STATEPATH", self.dir.path())
            .env("NUT_ALTPIDPATH", self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.dir.path().join("log")).unwrap());
        command
    }

    fn start_driver(&mut self) {
        let driver = ["/lib/nut/dummy-ups", "/usr/lib/nut/dummy-ups"]
            .into_iter()
            .find(|path| Path::new(path).exists());
        let driver = driver.expect("install nut-server");
        self.driver = Some(self.command(driver).args(["-F", "-a", UPS]).spawn().unwrap());
        let socket = self.dir.path().join(format!("dummy-ups-{UPS}"));
        until("the driver's socket", || socket.exists());
    }

    fn start_server(&mut self) {
        // What Debian has in the path asks /etc/nut/nut.conf whether it may start.
        let servers = ["/lib/nut/upsd", "/usr/lib/nut/upsd", "/usr/sbin/upsd"];
        let server = servers.into_iter().find(|path| Path::new(path).exists()).expect("install nut-server");
        self.server = Some(self.command(server).arg("-F").spawn().unwrap());
        let log = self.dir.path().join("log");
        let port = self.port;
        until(&format!("upsd, see {}", log.display()), || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
        });
    }

    /// Has the UPS say so.
    fn say(&self, status: &str, runtime_s: Option<u32>) {
        let mut text = format!("ups.status: {status}\nups.mfr: none\n");
        if let Some(seconds) = runtime_s {
            text += &format!("battery.runtime: {seconds}\n");
        }
        // The driver must never see half of it.
        let path = self.dir.path().join("ups.dev");
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    }

    fn monitor(&self, more: &str) -> (Monitor, Receiver<Observation>) {
        let config = format!(
            "[[source]]\nkind = \"nut\"\nname = \"ups\"\nhost = \"127.0.0.1\"\nport = {}\npoll_ms = 300\n\
             poll_on_battery_ms = 100\ntimeout_ms = 1000\n{more}",
            self.port
        );
        let config: PowerConfig = toml::from_str(&config).unwrap();
        Monitor::start(&config).unwrap()
    }
}

impl Drop for Nut {
    fn drop(&mut self) {
        for child in [&mut self.server, &mut self.driver] {
            kill(child);
        }
    }
}

fn kill(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited for: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for a word, passing over those that a driver may say on the way to it.
fn hear(receiver: &Receiver<Observation>, wanted: Kind) -> Duration {
    let start = Instant::now();
    let mut heard = Vec::new();
    while start.elapsed() < Duration::from_secs(30) {
        if let Ok(observation) = receiver.recv_timeout(Duration::from_millis(100)) {
            if observation.kind == wanted {
                return start.elapsed();
            }
            heard.push(observation.kind);
        }
    }
    panic!("waited for {wanted:?}, heard {heard:?}");
}

fn error(monitor: &Monitor) -> String {
    monitor.health()[0].error.clone().unwrap_or_default()
}

#[test]
fn real_server_tells_of_a_failure_from_its_beginning_to_its_end() {
    let nut = Nut::start("OL");
    let (monitor, receiver) = nut.monitor("");
    hear(&receiver, Kind::Online);
    assert_eq!(monitor.health()[0].detail.as_deref(), Some(&*format!("{UPS}@127.0.0.1:{}", nut.port)));
    nut.say("OB DISCHRG", Some(1200));
    hear(&receiver, Kind::OnBattery { runtime_left_ms: Some(1_200_000) });
    nut.say("OB DISCHRG", Some(90));
    hear(&receiver, Kind::OnBattery { runtime_left_ms: Some(90_000) });
    nut.say("OB LB", Some(5));
    hear(&receiver, Kind::LowBattery);
    nut.say("FSD OB LB", Some(5));
    hear(&receiver, Kind::ForcedShutdown);
    nut.say("OL CHRG LB", Some(20));
    hear(&receiver, Kind::Online);
    assert_eq!(error(&monitor), "");
}

/// The host's loop, with a host that saves and resumes in no time.
#[test]
fn machine_saves_before_the_battery_ends_and_resumes_when_power_has_come_back_for_good() {
    let nut = Nut::start("OL");
    let config = format!(
        "margin_ms = 30000\ndisarm_after_ms = 500\nresume_after_ms = 2000\n[[source]]\nkind = \"nut\"\nname = \"ups\"\n\
         host = \"127.0.0.1\"\nport = {}\npoll_ms = 300\npoll_on_battery_ms = 100",
        nut.port
    );
    let config: PowerConfig = toml::from_str(&config).unwrap();
    let (_monitor, receiver) = Monitor::start(&config).unwrap();
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_millis()).unwrap();
    let mut machine = Machine::new(config.policy(1_000), &config.roles(), now());
    let mut done: Vec<(&str, u64)> = Vec::new();
    let mut step = 0;
    while now() < 40_000 && done.last().is_none_or(|(what, _)| *what != "resume") {
        let wait = machine.wake_at_ms().map_or(100, |at| at.saturating_sub(now()).min(100));
        let mut inputs = match receiver.recv_timeout(Duration::from_millis(wait)) {
            Ok(observation) => vec![Input::Observed(observation)],
            Err(_) => vec![Input::Time],
        };
        while let Some(input) = inputs.pop() {
            for effect in machine.apply(input, now()) {
                match effect {
                    Effect::PreArm => done.push(("arm", now())),
                    Effect::DisArm => done.push(("disarm", now())),
                    Effect::SaveAll { ticket, deadline_ms, .. } => {
                        // The UPS said 25 s, some of which may have passed.
                        assert!(
                            (now() + 20_000..=now() + 25_000).contains(&deadline_ms),
                            "{deadline_ms} at {}",
                            now()
                        );
                        done.push(("save", now()));
                        inputs.push(Input::SaveFinished { ticket, ok: 1, failed: 0 });
                    }
                    Effect::ResumeAll { ticket } => {
                        done.push(("resume", now()));
                        inputs.push(Input::ResumeFinished { ticket });
                    }
                    Effect::AllowShutdown | Effect::Event(_) => {}
                }
            }
        }
        match (step, machine.state()) {
            (0, State::Online) if now() > 1_000 => nut.say("OB", Some(60)),
            (1, State::OnBattery) => nut.say("OB", Some(25)),
            (2, State::Saved) => nut.say("OL", None),
            _ => continue,
        }
        step += 1;
    }
    let names: Vec<_> = done.iter().map(|(what, _)| *what).collect();
    assert_eq!(names, ["arm", "save", "resume"], "{done:?}");
    assert!(done[2].1 - done[1].1 >= 2_000, "{done:?}");
    assert_eq!(machine.state(), State::Online);
}

#[test]
fn reaction_is_bounded_by_polling() {
    let nut = Nut::start("OL");
    let (_monitor, receiver) = nut.monitor("ups = \"dummy\"");
    hear(&receiver, Kind::Online);
    let mut times = Vec::new();
    for round in 0..10 {
        let (status, kind) = if round % 2 == 0 {
            ("OB", Kind::OnBattery { runtime_left_ms: None })
        } else {
            ("OL", Kind::Online)
        };
        nut.say(status, None);
        times.push(hear(&receiver, kind));
    }
    times.sort();
    println!(
        "nut: {:?} from the UPS to the observation, median of {}, worst {:?}; the driver looks at its UPS once a second",
        times[times.len() / 2],
        times.len(),
        times[times.len() - 1]
    );
    // The driver's second and the poll, with room for a busy machine.
    assert!(times[times.len() / 2] < Duration::from_secs(4), "{times:?}");
}

#[test]
fn killed_server_is_lost_and_found_again() {
    let mut nut = Nut::start("OL");
    let (monitor, receiver) = nut.monitor("");
    hear(&receiver, Kind::Online);
    let start = Instant::now();
    kill(&mut nut.server);
    hear(&receiver, Kind::Lost);
    println!("nut: a killed server is lost after {:?}", start.elapsed());
    nut.say("OB LB", None);
    until("refused connections", || error(&monitor).contains("refused"));
    nut.start_server();
    hear(&receiver, Kind::LowBattery);
    assert_eq!(error(&monitor), "");
}

#[test]
fn driver_that_dies_or_hangs_makes_the_ups_lost_and_not_the_server() {
    let mut nut = Nut::start("OL");
    let (monitor, receiver) = nut.monitor("");
    hear(&receiver, Kind::Online);
    // It hangs: upsd calls its data stale.
    let driver = nut.driver.as_ref().unwrap().id();
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &driver.to_string()]).status().unwrap().success());
    };
    signal("-STOP");
    hear(&receiver, Kind::Lost);
    until("stale data", || error(&monitor).contains("the server says DATA-STALE"));
    signal("-CONT");
    hear(&receiver, Kind::Online);
    // It dies.
    kill(&mut nut.driver);
    hear(&receiver, Kind::Lost);
    // For a moment upsd may still know no better than WAIT.
    until("no driver", || error(&monitor).contains("DRIVER-NOT-CONNECTED"));
    nut.say("OB", None);
    nut.start_driver();
    hear(&receiver, Kind::OnBattery { runtime_left_ms: None });
}

#[test]
fn client_logs_in_and_is_refused_with_a_wrong_password() {
    let nut = Nut::start("OL");
    let password: PathBuf = nut.dir.path().join("password");
    let login = format!(
        "ups = \"{UPS}\"\nuser = \"vmhost\"\nlogin = true\npassword_file = \"{}\"",
        password.display()
    );
    fs::write(&password, "se cret\n").unwrap();
    let (monitor, receiver) = nut.monitor(&login);
    hear(&receiver, Kind::Online);
    let clients = || {
        let ups = format!("{UPS}@127.0.0.1:{}", nut.port);
        let output = Command::new("upsc").args(["-c", &ups]).output().expect("install nut-client");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(clients().contains("127.0.0.1"), "{}", clients());
    drop(monitor);
    until("the log-out", || !clients().contains("127.0.0.1"));

    fs::write(&password, "wrong\n").unwrap();
    let (monitor, receiver) = nut.monitor(&login);
    hear(&receiver, Kind::Lost);
    assert!(error(&monitor).contains("the server says ACCESS-DENIED"), "{}", error(&monitor));
}

#[test]
fn unknown_ups_and_version_6_addresses() {
    let nut = Nut::start("OL");
    let (monitor, receiver) = nut.monitor("ups = \"other\"");
    hear(&receiver, Kind::Lost);
    assert!(error(&monitor).contains("the server says UNKNOWN-UPS"), "{}", error(&monitor));
    drop(monitor);
    for host in ["localhost", "::1"] {
        if host == "::1" && TcpStream::connect((Ipv6Addr::LOCALHOST, nut.port)).is_err() {
            println!("this machine has no ::1");
            continue;
        }
        let config = format!(
            "[[source]]\nkind = \"nut\"\nname = \"ups\"\nhost = \"{host}\"\nport = {}\ntimeout_ms = 2000",
            nut.port
        );
        let (monitor, receiver) = Monitor::start(&toml::from_str(&config).unwrap()).unwrap();
        hear(&receiver, Kind::Online);
        drop(monitor);
    }
}
