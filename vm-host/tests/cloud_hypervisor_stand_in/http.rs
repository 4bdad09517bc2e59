// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Requests in, answers out, in the form of the server that cloud-hypervisor uses (`micro_http`). Shares no code with the client.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::exit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::orders::{Orders, Spoilt};
use crate::vmm::{Refusal, Vmm};

/// What that server takes at most.
const LONGEST_BODY: usize = 51200;

static HANGS: AtomicBool = AtomicBool::new(false);

/// An answer: a status, and a body or none.
pub type Answer = Result<Option<String>, Refusal>;

/// Until the client goes.
pub fn serve(stream: UnixStream, vmm: &Mutex<Vmm>, orders: &Orders) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    while let Some((method, path, body)) = request(&mut reader) {
        let call = path.strip_prefix("/api/v1/").unwrap_or_default().to_owned();
        let spoilt = orders.spoilt(&call);
        // One thread serves all there: what hangs keeps all that comes after it waiting.
        let hangs = HANGS.fetch_or(spoilt == Some(Spoilt::Hang), Ordering::SeqCst);
        while hangs || spoilt == Some(Spoilt::Hang) {
            thread::park();
        }
        match spoilt {
            Some(Spoilt::Die) => {
                eprintln!("thread 'vmm' panicked at vmm/src/lib.rs: told to die in {call}");
                exit(134);
            }
            Some(Spoilt::Nonsense) => {
                let _ = stream.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n");
                return;
            }
            Some(Spoilt::Endless) => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nX-Endless: ");
                while stream.write_all(&[b'x'; 4096]).is_ok() {}
                return;
            }
            Some(Spoilt::Hang | Spoilt::Refuse | Spoilt::WrongStatus | Spoilt::Half) | None => {}
        }
        let answer = match spoilt {
            Some(Spoilt::Refuse) => Err(Refusal::new(500, &[])),
            _ => vmm.lock().unwrap().call(&method, &call, body.as_deref()),
        };
        let ends = answer.is_ok() && call == "vmm.shutdown";
        let mut said = said(answer);
        match spoilt {
            Some(Spoilt::Half) => said.truncate(said.len() / 2),
            Some(Spoilt::WrongStatus) => said = "HTTP/1.1 304 \r\n\r\n".to_owned(),
            _ => {}
        }
        if stream.write_all(said.as_bytes()).is_err() || spoilt == Some(Spoilt::Half) {
            return;
        }
        if ends {
            exit(0);
        }
    }
}

fn said(answer: Answer) -> String {
    let (status, body) = match answer {
        Ok(None) => (204, None),
        Ok(body) => (200, body),
        Err(refusal) => (refusal.status, Some(serde_json::to_string(&refusal.chain).unwrap())),
    };
    let head = format!("HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n");
    match body {
        Some(body) => {
            format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        }
        None => format!("{head}\r\n"),
    }
}

/// Method, path and body; none once there are no more.
fn request(reader: &mut impl BufRead) -> Option<(String, String, Option<String>)> {
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let mut words = line.trim_end().split(' ');
    let (method, path, version) = (words.next()?, words.next()?, words.next()?);
    assert_eq!((version, words.next()), ("HTTP/1.1", None), "{line:?}");
    let (method, path) = (method.to_owned(), path.to_owned());
    let mut length = None;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let header = line.strip_suffix("\r\n").expect("a line ends with CR LF");
        if header.is_empty() {
            break;
        }
        let (name, value) = header.split_once(": ").expect("a header has a value");
        match name {
            "Host" | "Accept" => {}
            "Content-Type" => assert_eq!(value, "application/json"),
            "Content-Length" => length = Some(value.parse::<usize>().unwrap()),
            odd => panic!("a header that it does not know: {odd}"),
        }
    }
    let Some(length) = length else { return Some((method, path, None)) };
    assert!((1..=LONGEST_BODY).contains(&length), "a body of {length} bytes");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((method, path, Some(String::from_utf8(body).unwrap())))
}
