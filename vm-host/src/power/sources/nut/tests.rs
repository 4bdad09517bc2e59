// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Against servers that mean no good, or do not do well. The real server is in `tests/power_nut.rs`.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::power::observation::Observation;
use crate::power::sources::spawn;
use crate::power::sources::testkit::{end, next, reporter, until};

fn config(port: u16) -> NutConfig {
    NutConfig {
        name: "ups".into(),
        window_ms: None,
        host: "127.0.0.1".into(),
        port,
        ups: Some("u".into()),
        user: None,
        password_file: None,
        login: false,
        poll_ms: 20,
        poll_on_battery_ms: 10,
        timeout_ms: 200,
    }
}

/// A server that treats each connection, given with its number, as it likes.
fn server(treat: impl Fn(usize, TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for (number, socket) in listener.incoming().enumerate() {
            treat(number, socket.unwrap());
        }
    });
    port
}

/// One that answers each line.
fn answering(answer: impl Fn(&str) -> String + Send + 'static) -> u16 {
    server(move |_, socket| converse(&socket, &answer))
}

fn converse(mut socket: &TcpStream, answer: impl Fn(&str) -> String) {
    let reader = BufReader::new(socket.try_clone().unwrap());
    for line in reader.lines() {
        let Ok(line) = line else { return };
        if socket.write_all(answer(&line).as_bytes()).is_err() {
            return;
        }
    }
}

fn start(config: NutConfig) -> (Reporter, Receiver<Observation>, JoinHandle<()>) {
    let (reporter, receiver) = reporter("nut");
    let thread = spawn(&reporter, move |reporter| run(reporter, &config)).unwrap();
    (reporter, receiver, thread)
}

fn status(line: &str, status: &str) -> String {
    match line {
        "GET VAR u ups.status" => format!("VAR u ups.status \"{status}\"\n"),
        "GET VAR u battery.runtime" => "ERR VAR-NOT-SUPPORTED\n".into(),
        _ => "ERR UNKNOWN-COMMAND\n".into(),
    }
}

#[test]
fn status_is_understood() {
    for (text, kind) in [
        ("OL", Some(Kind::Online)),
        ("OL CHRG LB", Some(Kind::Online)),
        ("BYPASS", Some(Kind::Online)),
        ("OB DISCHRG", Some(Kind::OnBattery { runtime_left_ms: None })),
        ("OB LB", Some(Kind::LowBattery)),
        ("CAL OB LB", Some(Kind::OnBattery { runtime_left_ms: None })),
        ("FSD OL", Some(Kind::ForcedShutdown)),
        ("OFF", None),
        ("", None),
        ("OLOB", None),
    ] {
        assert_eq!(meaning(text), kind, "{text}");
    }
    assert_eq!(milliseconds("1234.5"), Some(1_234_000));
    assert_eq!(milliseconds("-1"), None);
    assert_eq!(milliseconds("99999999999999999999"), None);
}

#[test]
fn answers_in_single_bytes_are_understood_while_they_come_in_time() {
    let port = server(|_, socket| {
        let mut writer = socket.try_clone().unwrap();
        for line in BufReader::new(socket).lines() {
            let Ok(line) = line else { return };
            for byte in status(&line, "OB").bytes() {
                if writer.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let (reporter, receiver, thread) = start(config(port));
    assert_eq!(next(&receiver), Kind::OnBattery { runtime_left_ms: None });
    end(&reporter, thread);
}

#[test]
fn answer_that_trickles_in_for_ever_is_given_up_at_the_deadline() {
    let port = server(|_, mut socket| {
        while socket.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let (reporter, receiver, thread) = start(config(port));
    let start = Instant::now();
    assert_eq!(next(&receiver), Kind::Lost);
    assert!(start.elapsed() >= Duration::from_millis(190), "{:?}", start.elapsed());
    assert!(reporter.health().error.unwrap().contains("did not answer in time"));
    end(&reporter, thread);
}

#[test]
fn line_without_end_is_given_up() {
    let port = server(|_, mut socket| while socket.write_all(&[b'x'; 4096]).is_ok() {});
    let (reporter, receiver, thread) = start(NutConfig { timeout_ms: 10_000, ..config(port) });
    assert_eq!(next(&receiver), Kind::Lost);
    assert!(reporter.health().error.unwrap().contains("more than 2048 bytes"));
    end(&reporter, thread);
}

#[test]
fn list_without_end_is_given_up() {
    let port = server(|_, mut socket| {
        let _ = socket.write_all(b"BEGIN LIST UPS\n");
        while socket.write_all(b"UPS a \"b\"\n").is_ok() {}
    });
    let (reporter, receiver, thread) = start(NutConfig { ups: None, timeout_ms: 10_000, ..config(port) });
    assert_eq!(next(&receiver), Kind::Lost);
    assert!(reporter.health().error.unwrap().contains("a list of more than 256 lines"));
    end(&reporter, thread);
}

#[test]
fn garbage_is_told_and_escaped() {
    let port = answering(|_| "\u{1b}[2Jhello\n".into());
    let (reporter, receiver, thread) = start(config(port));
    assert_eq!(next(&receiver), Kind::Lost);
    let error = reporter.health().error.unwrap();
    assert!(error.contains(r#"the server answered "\u{1b}[2Jhello""#), "{error}");
    end(&reporter, thread);
}

#[test]
fn talk_that_was_not_asked_for_ends_the_connection() {
    let port = server(|number, mut socket| {
        if number == 0 {
            let mut line = String::new();
            BufReader::new(socket.try_clone().unwrap()).read_line(&mut line).unwrap();
            socket.write_all(b"VAR u ups.status \"OL\"\nVAR u ups.status \"OB LB\"\n").unwrap();
            thread::sleep(Duration::from_millis(50));
        } else {
            converse(&socket, |line| status(line, "OL"));
        }
    });
    let (reporter, receiver, thread) = start(config(port));
    assert_eq!(next(&receiver), Kind::Online);
    // What came too early must not be taken for the answer to the next question.
    let mut heard = Vec::new();
    while heard.last() != Some(&Kind::Online) {
        heard.push(next(&receiver));
    }
    assert_eq!(heard, [Kind::Lost, Kind::Online]);
    end(&reporter, thread);
}

#[test]
fn server_that_closes_is_lost_at_once_and_found_again() {
    let port = server(|number, socket| {
        if number == 0 {
            let mut writer = socket.try_clone().unwrap();
            let mut line = String::new();
            BufReader::new(socket).read_line(&mut line).unwrap();
            writer.write_all(status(line.trim(), "OL").as_bytes()).unwrap();
        } else {
            converse(&socket, |line| status(line, "OB LB"));
        }
    });
    // Not found out by polling.
    let (reporter, receiver, thread) = start(NutConfig { poll_ms: 600_000, ..config(port) });
    assert_eq!(
        [next(&receiver), next(&receiver), next(&receiver)],
        [Kind::Online, Kind::Lost, Kind::LowBattery]
    );
    end(&reporter, thread);
}

#[test]
fn server_of_two_upses_wants_a_name() {
    let port = answering(|_| "BEGIN LIST UPS\nUPS a \"one\"\nUPS b \"t\\\"wo\"\nEND LIST UPS\n".into());
    let (reporter, receiver, thread) = start(NutConfig { ups: None, ..config(port) });
    assert_eq!(next(&receiver), Kind::Lost);
    assert!(reporter.health().error.unwrap().contains("the server has 2: a, b"));
    end(&reporter, thread);
}

#[test]
fn nobody_there_and_nobody_who_answers_can_be_stopped() {
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for (port, text) in [(closed, "refused"), (silent.local_addr().unwrap().port(), "in time")] {
        let (reporter, receiver, thread) = start(config(port));
        assert_eq!(next(&receiver), Kind::Lost);
        until("the error", || reporter.health().error.is_some_and(|error| error.contains(text)));
        end(&reporter, thread);
    }
    // In the middle of a wait.
    let long = NutConfig { timeout_ms: 600_000, ..config(silent.local_addr().unwrap().port()) };
    let (reporter, _receiver, thread) = start(long);
    thread::sleep(Duration::from_millis(100));
    end(&reporter, thread);
}

#[test]
fn password_is_quoted_and_only_its_first_line_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("password");
    fs::write(&path, "se \"cr\\et\nsecond\n").unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let port = answering(move |line| {
        tell.send(line.to_owned()).unwrap();
        if line.starts_with("GET") { status(line, "OL") } else { "OK\n".into() }
    });
    let config =
        NutConfig { user: Some("me".into()), password_file: Some(path), login: true, ..config(port) };
    let (reporter, receiver, thread) = start(config);
    assert_eq!(next(&receiver), Kind::Online);
    let lines: Vec<String> = told.iter().take(4).collect();
    assert_eq!(lines, [r#"USERNAME "me""#, r#"PASSWORD "se \"cr\\et""#, "LOGIN u", "GET VAR u ups.status"]);
    end(&reporter, thread);
    until("LOGOUT", || told.try_iter().any(|line| line == "LOGOUT"));
}

proptest! {
    #[test]
    fn quoted_words_come_back_as_they_were(texts in prop::collection::vec("\\PC{0,12}", 0..6)) {
        let line = texts.iter().map(|text| quote(text)).collect::<Vec<_>>().join(" ");
        prop_assert_eq!(words(&line), Some(texts));
    }

    #[test]
    fn any_line_is_taken_apart_without_harm(line in "\\PC{0,80}") {
        if let Some(words) = words(&line) {
            prop_assert!(words.iter().map(String::len).sum::<usize>() <= line.len());
        }
        let _ = (meaning(&line), milliseconds(&line));
    }
}
