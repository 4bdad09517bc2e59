// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Times as an operator writes and reads them: `90`, `500ms`, `5m`. Sizes are
//! [`ByteCount`](vssd_protocol::units::ByteCount)'s business.

use std::fmt;
use std::str::FromStr;

/// A time in milliseconds, as people read and write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Millis(pub u64);

/// Why a text is no time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a time: write whole seconds or a number with ms, s, m, h (90, 500ms, 5m)")]
pub struct ParseMillisError {
    text: String,
}

impl FromStr for Millis {
    type Err = ParseMillisError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let scale = match unit {
            "ms" => Some(1),
            "" | "s" => Some(1000),
            "m" => Some(60_000),
            "h" => Some(3_600_000),
            _ => None,
        };
        scale
            .zip(number.parse::<u64>().ok())
            .and_then(|(scale, number)| number.checked_mul(scale))
            .map(Self)
            .ok_or_else(|| ParseMillisError { text: text.to_owned() })
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0;
        let seconds = ms / 1000;
        match ms {
            0 => write!(f, "0 s"),
            1..1000 => write!(f, "{ms} ms"),
            1000..10_000 if !ms.is_multiple_of(1000) => write!(f, "{seconds}.{} s", ms % 1000 / 100),
            1000..120_000 => write!(f, "{seconds} s"),
            120_000..3_600_000 => write!(f, "{} min {} s", seconds / 60, seconds % 60),
            _ => write!(f, "{} h {} min", seconds / 3600, seconds / 60 % 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_in_four_units() {
        for (text, ms) in
            [("0", 0), ("90", 90_000), ("90s", 90_000), ("500ms", 500), ("5m", 300_000), ("2h", 7_200_000)]
        {
            assert_eq!(text.parse(), Ok(Millis(ms)), "{text}");
        }
        for text in ["", "s", "-1", "1.5s", "5 m", "5min", "18446744073709551615", "99999999999999999999"] {
            assert!(text.parse::<Millis>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_shown_in_the_unit_that_fits() {
        for (ms, text) in [
            (0, "0 s"),
            (999, "999 ms"),
            (1000, "1 s"),
            (1250, "1.2 s"),
            (31_400, "31 s"),
            (60_000, "60 s"),
            (125_000, "2 min 5 s"),
            (3_725_000, "1 h 2 min"),
        ] {
            assert_eq!(Millis(ms).to_string(), text);
        }
    }
}
