// SPDX-License-Identifier: Apache-2.0 OR MIT

//! As much of HTTP/1.1 as the API of cloud-hypervisor needs: a request with a JSON body or none, an answer with a body of known
//! length or none, one connection for each. Knows no request.
//!
//! What an answer may be is bounded, in time and in length: whoever answers may be ill.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::unix::connect_within;
use crate::vmm::VmmError;

/// `vm.info` tells all devices of a machine, some hundred bytes each.
const LONGEST_BODY: usize = 4 << 20;
const LONGEST_HEAD: usize = 16 << 10;
const MOST_HEADERS: usize = 32;
const CHUNK: usize = 16 << 10;

/// What a request asks to be done with what it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Put,
}

/// An answer whose form is right, whatever it says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// One connection, for one request.
#[derive(Debug)]
pub(super) struct Exchange {
    stream: UnixStream,
    /// The name of the request, for errors.
    command: &'static str,
    limit: Duration,
    until: Instant,
}

impl Exchange {
    /// All of it has to be over within `limit`.
    pub(super) fn begin(socket: &Path, command: &'static str, limit: Duration) -> Result<Self, VmmError> {
        let until = Instant::now() + limit;
        match connect_within(socket, limit) {
            Ok(stream) => Ok(Self { stream, command, limit, until }),
            Err(error) if is_timeout(&error) => Err(VmmError::Silent { command, limit }),
            Err(source) => Err(VmmError::Connection { doing: "connect to its control socket", source }),
        }
    }

    /// Sends the request and takes the answer to it.
    pub(super) fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, VmmError> {
        self.send(&request(method, path, body))?;
        let mut received = Vec::new();
        loop {
            if let Some((head, body_at)) = parse_head(&received)? {
                while received.len() - body_at < head.length {
                    self.fill(&mut received)?;
                }
                let body = received.drain(body_at..).take(head.length).collect();
                return Ok(Answer { status: head.status, body });
            }
            if received.len() > LONGEST_HEAD {
                return Err(VmmError::Protocol("an answer whose head does not end".to_owned()));
            }
            self.fill(&mut received)?;
        }
    }

    /// Waits until the other side has closed the connection, as it does when it ends.
    pub(super) fn wait_for_end(&mut self) -> Result<(), VmmError> {
        loop {
            match self.fill(&mut Vec::new()) {
                Ok(()) => {}
                Err(VmmError::Connection { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self, request: &[u8]) -> Result<(), VmmError> {
        let left = self.left()?;
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(request));
        sent.map_err(|error| self.failed("send", error))
    }

    /// Reads what there is, once.
    fn fill(&mut self, received: &mut Vec<u8>) -> Result<(), VmmError> {
        let mut chunk = [0; CHUNK];
        let left = self.left()?;
        match self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(&mut chunk)) {
            Ok(0) => Err(self.failed("read", io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                received.extend_from_slice(&chunk[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.failed("read", error)),
        }
    }

    fn left(&self) -> Result<Duration, VmmError> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.silent()) } else { Ok(left) }
    }

    fn silent(&self) -> VmmError {
        VmmError::Silent { command: self.command, limit: self.limit }
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> VmmError {
        if is_timeout(&source) { self.silent() } else { VmmError::Connection { doing, source } }
    }
}

fn request(method: Method, path: &str, body: Option<&Value>) -> Vec<u8> {
    let method = match method {
        Method::Get => "GET",
        Method::Put => "PUT",
    };
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
    // A request without a body must not have an empty one.
    if let Some(body) = body.map(Value::to_string) {
        request.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
    } else {
        request.push_str("\r\n");
    }
    request.into_bytes()
}

#[derive(Debug)]
struct Head {
    status: u16,
    /// Of the body.
    length: usize,
}

/// The head and where the body begins, once all of the head is there.
fn parse_head(received: &[u8]) -> Result<Option<(Head, usize)>, VmmError> {
    let wrong = |what: &str| Err(VmmError::Protocol(what.to_owned()));
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let at = match response.parse(received) {
        Ok(httparse::Status::Complete(at)) => at,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return wrong(&format!("not an answer in HTTP: {error}")),
    };
    let status = response.code.unwrap_or_default();
    if !(200..600).contains(&status) {
        return wrong(&format!("an answer with status {status}"));
    }
    let mut length = None;
    for header in response.headers {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return wrong("an answer in pieces");
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let said = str::from_utf8(header.value).ok().and_then(|value| value.trim().parse().ok());
            match said {
                Some(said) if length.is_none_or(|before| before == said) => length = Some(said),
                _ => return wrong("an answer of unknown length"),
            }
        }
    }
    // Its server keeps the connection and leaves the length out where there is no body.
    let length = if status == 204 { 0 } else { length.unwrap_or(0) };
    if length > LONGEST_BODY {
        return wrong(&format!("an answer of {length} bytes"));
    }
    Ok(Some((Head { status, length }, at)))
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);
    const NO_CONTENT: &[u8] = b"HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n";

    /// Asks a server that says `pieces`, one after the other, and stays or goes; gives what it heard, too.
    fn ask(
        pieces: Vec<Vec<u8>>,
        stays: bool,
        limit: Duration,
        body: Option<&Value>,
    ) -> (Result<Answer, VmmError>, String) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut heard = vec![0; 1 << 16];
            let count = stream.read(&mut heard).unwrap();
            heard.truncate(count);
            for piece in pieces {
                if stream.write_all(&piece).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
            }
            if stays {
                // Until the client goes.
                let _ = stream.read(&mut [0; 1]);
            }
            String::from_utf8(heard).unwrap()
        });
        let answer = Exchange::begin(&socket, "vm.test", limit)
            .and_then(|mut exchange| exchange.ask(Method::Put, "/api/v1/vm.test", body));
        (answer, server.join().unwrap())
    }

    #[test]
    fn answer_is_taken_whole_whether_the_connection_stays_or_not() {
        let said =
            b"HTTP/1.1 500 \r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n[\"a b\"]".to_vec();
        for at in [1, 12, 40, said.len() - 1] {
            for stays in [true, false] {
                let pieces = vec![said[..at].to_vec(), said[at..].to_vec()];
                let (answer, _) = ask(pieces, stays, LIMIT, None);
                assert_eq!(answer.unwrap(), Answer { status: 500, body: b"[\"a b\"]".to_vec() });
            }
        }
        let (answer, heard) = ask(vec![NO_CONTENT.to_vec()], true, LIMIT, Some(&json!({ "a": 1 })));
        assert_eq!(answer.unwrap(), Answer { status: 204, body: Vec::new() });
        assert_eq!(
            heard,
            "PUT /api/v1/vm.test HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
             Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}"
        );
        let (_, heard) = ask(vec![NO_CONTENT.to_vec()], true, LIMIT, None);
        assert!(heard.ends_with("Accept: application/json\r\n\r\n"), "{heard}");
    }

    #[test]
    fn silence_an_early_end_and_nonsense_are_told_apart() {
        let short = Duration::from_millis(50);
        for half in [&b""[..], b"HTTP/1.1 20", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{\"a"] {
            let (answer, _) = ask(vec![half.to_vec()], true, short, None);
            assert!(matches!(answer, Err(VmmError::Silent { command: "vm.test", .. })), "{answer:?}");
            let (answer, _) = ask(vec![half.to_vec()], false, LIMIT, None);
            assert!(matches!(answer, Err(VmmError::Connection { .. })), "{answer:?}");
        }
        for nonsense in [
            &b"SSH-2.0-OpenSSH\r\n\r\n"[..],
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n..",
            b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n",
        ] {
            let (answer, _) = ask(vec![nonsense.to_vec()], true, LIMIT, None);
            let shown = String::from_utf8_lossy(nonsense);
            assert!(matches!(answer, Err(VmmError::Protocol(_))), "{shown}: {answer:?}");
        }
        let endless = vec![b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 1 << 20]];
        let (answer, _) = ask(endless, true, LIMIT, None);
        assert!(matches!(answer, Err(VmmError::Protocol(_))), "{answer:?}");
        let gone = Exchange::begin(Path::new("/nonexistent"), "vm.test", LIMIT);
        assert!(matches!(gone, Err(VmmError::Connection { .. })));
    }

    #[test]
    fn an_answer_that_comes_a_byte_at_a_time_does_not_outlast_the_limit() {
        let slow: Vec<Vec<u8>> = (0..2000).map(|_| b"x".to_vec()).collect();
        let pieces = [vec![b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n".to_vec()], slow].concat();
        let begun = Instant::now();
        let (answer, _) = ask(pieces, true, Duration::from_millis(200), None);
        assert!(matches!(answer, Err(VmmError::Silent { .. })), "{answer:?}");
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    proptest! {
        #[test]
        fn no_head_is_too_odd_to_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_head(&bytes);
            let _ = parse_head(&[b"HTTP/1.1 200 OK\r\n", bytes.as_slice()].concat());
        }
    }
}
