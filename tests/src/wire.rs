// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The frames between a test and the agent in its guest, over a virtio-serial port.
//!
//! A reset of the guest may cut a frame anywhere, and the port carries on with the next boot's bytes. So frames
//! are delimited, not counted: `END` never occurs inside one (it is escaped), and a torn frame ends at the
//! next `END` and is dropped because its length is not the one it states.
//!
//! ```text
//! END  kind:u8 job:u32le length:u32le payload  END      (everything between the ENDs escaped)
//! ```

use std::io::{self, Read, Write};

/// The name of the port in the guest.
pub const PORT_NAME: &str = "vssd.agent";

const END: u8 = 0x7e;
const ESC: u8 = 0x7d;
const FLIP: u8 = 0x20;
const HEADER: usize = 9;
/// The longest payload in one frame; longer data goes in several.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Agent: a new boot is ready; the payload is the kernel release.
    Hello = 1,
    /// Host: run the payload with `sh -c` as this job.
    Run = 2,
    /// Host: bytes for the job's standard input.
    Stdin = 3,
    /// Host: end of the job's standard input.
    StdinEnd = 4,
    /// Host: kill the job's process group.
    Kill = 5,
    /// Agent: bytes of the job's standard output.
    Stdout = 6,
    /// Agent: bytes of the job's standard error.
    Stderr = 7,
    /// Agent: the job has ended; the payload is an `i32`, the exit code or 128 + signal.
    Exit = 8,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Run,
            3 => Self::Stdin,
            4 => Self::StdinEnd,
            5 => Self::Kill,
            6 => Self::Stdout,
            7 => Self::Stderr,
            8 => Self::Exit,
            _ => return None,
        })
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// The job it is about; 0 for [`Kind::Hello`].
    pub job: u32,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame.
    pub fn new(kind: Kind, job: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, job, payload: payload.into() }
    }

    /// The bytes on the port.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut raw = Vec::with_capacity(HEADER + self.payload.len());
        raw.push(self.kind as u8);
        raw.extend_from_slice(&self.job.to_le_bytes());
        raw.extend_from_slice(&length.to_le_bytes());
        raw.extend_from_slice(&self.payload);

        let mut wire = Vec::with_capacity(raw.len() + raw.len() / 16 + 2);
        wire.push(END);
        for byte in raw {
            if byte == END || byte == ESC {
                wire.push(ESC);
                wire.push(byte ^ FLIP);
            } else {
                wire.push(byte);
            }
        }
        wire.push(END);
        wire
    }

    /// Writes the frame in one piece.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&self.encode())?;
        out.flush()
    }

    fn decode(raw: &[u8]) -> Option<Self> {
        let (header, payload) = raw.split_at_checked(HEADER)?;
        let kind = Kind::from_byte(header[0])?;
        let job = u32::from_le_bytes(header[1..5].try_into().ok()?);
        let length = u32::from_le_bytes(header[5..9].try_into().ok()?);
        (payload.len() == usize::try_from(length).ok()?).then(|| Self::new(kind, job, payload))
    }
}

/// Cuts a byte stream into frames and drops what was torn.
#[derive(Debug)]
pub struct FrameReader<R> {
    input: R,
    chunk: Vec<u8>,
    at: usize,
    raw: Vec<u8>,
    escaped: bool,
}

impl<R: Read> FrameReader<R> {
    /// Reads frames from `input`.
    pub fn new(input: R) -> Self {
        Self { input, chunk: Vec::new(), at: 0, raw: Vec::new(), escaped: false }
    }

    /// The next whole frame; `None` at the end of the stream.
    pub fn read(&mut self) -> io::Result<Option<Frame>> {
        loop {
            while self.at < self.chunk.len() {
                let byte = self.chunk[self.at];
                self.at += 1;
                if byte == END {
                    self.escaped = false;
                    let frame = Frame::decode(&self.raw);
                    self.raw.clear();
                    if frame.is_some() {
                        return Ok(frame);
                    }
                } else if byte == ESC {
                    self.escaped = true;
                } else {
                    self.raw.push(if self.escaped { byte ^ FLIP } else { byte });
                    self.escaped = false;
                }
            }
            self.chunk.resize(MAX_PAYLOAD, 0);
            self.at = 0;
            let got = loop {
                match self.input.read(&mut self.chunk) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => break other?,
                }
            };
            self.chunk.truncate(got);
            if got == 0 {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(bytes: &[u8]) -> Vec<Frame> {
        let mut reader = FrameReader::new(bytes);
        std::iter::from_fn(|| reader.read().unwrap()).collect()
    }

    #[test]
    fn every_byte_value_survives_the_round_trip() {
        let all: Vec<u8> = (0..=255).collect();
        let sent = Frame::new(Kind::Stdout, 0x7e7d_7d7e, all);
        assert_eq!(frames(&sent.encode()), [sent]);
    }

    #[test]
    fn a_frame_cut_anywhere_costs_only_itself() {
        let first = Frame::new(Kind::Stdout, 7, *b"cut~}here").encode();
        let second = Frame::new(Kind::Hello, 0, *b"6.1.0");
        // Without its last delimiter alone it is whole.
        for cut in 0..first.len() - 1 {
            let mut stream = first[..cut].to_vec();
            stream.extend(second.encode());
            assert_eq!(frames(&stream), std::slice::from_ref(&second), "cut at {cut}");
        }
    }

    #[test]
    fn unknown_kinds_are_skipped() {
        let mut odd = Frame::new(Kind::Exit, 1, *b"x").encode();
        odd[1] = 99;
        let good = Frame::new(Kind::Exit, 2, 0i32.to_le_bytes());
        odd.extend(good.encode());
        assert_eq!(frames(&odd), [good]);
    }
}
