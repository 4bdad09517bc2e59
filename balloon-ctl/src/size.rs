// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sizes as an operator writes them: `20G`, `+2G`, `-2G`, `min`, `max`.
//!
//! Pure: knows neither command lines nor devices. Plain sizes are
//! [`ByteCount`]'s business.

use std::str::FromStr;

use vssd_protocol::units::{ByteCount, ParseByteCountError};

/// What `resize NAME SIZE` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeChange {
    To(u64),
    GrowBy(u64),
    ShrinkBy(u64),
    /// To the vSSD's minimum.
    ToMin,
    /// To the vSSD's maximum.
    ToMax,
}

impl FromStr for SizeChange {
    type Err = ParseByteCountError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = |text: &str| text.parse::<ByteCount>().map(|count| count.0);
        match text {
            "min" => Ok(Self::ToMin),
            "max" => Ok(Self::ToMax),
            _ => match text.split_at_checked(1) {
                Some(("+", amount)) => bytes(amount).map(Self::GrowBy),
                Some(("-", amount)) => bytes(amount).map(Self::ShrinkBy),
                _ => bytes(text).map(Self::To),
            },
        }
    }
}

/// Why a text is no amount to grow or shrink by.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AmountError {
    #[error(transparent)]
    Size(#[from] ParseByteCountError),
    #[error("{text} has the wrong sign: use `balloon-ctl {instead}`")]
    WrongSign { text: String, instead: &'static str },
    #[error("{text} is not an amount: write how much to add or to give back (2G)")]
    NotAnAmount { text: String },
    #[error("nothing to do: the amount is zero")]
    Zero,
}

/// What to grow by: `2G` or `+2G`.
pub(crate) fn grow_amount(text: &str) -> Result<SizeChange, AmountError> {
    match text.parse()? {
        SizeChange::To(0) | SizeChange::GrowBy(0) => Err(AmountError::Zero),
        SizeChange::To(bytes) | SizeChange::GrowBy(bytes) => Ok(SizeChange::GrowBy(bytes)),
        SizeChange::ShrinkBy(_) => Err(AmountError::WrongSign { text: text.to_owned(), instead: "shrink" }),
        SizeChange::ToMin | SizeChange::ToMax => Err(AmountError::NotAnAmount { text: text.to_owned() }),
    }
}

/// What to shrink by: `2G` or `-2G`.
pub(crate) fn shrink_amount(text: &str) -> Result<SizeChange, AmountError> {
    match text.parse()? {
        SizeChange::To(0) | SizeChange::ShrinkBy(0) => Err(AmountError::Zero),
        SizeChange::To(bytes) | SizeChange::ShrinkBy(bytes) => Ok(SizeChange::ShrinkBy(bytes)),
        SizeChange::GrowBy(_) => Err(AmountError::WrongSign { text: text.to_owned(), instead: "grow" }),
        SizeChange::ToMin | SizeChange::ToMax => Err(AmountError::NotAnAmount { text: text.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn resize_takes_absolute_relative_and_named_sizes() {
        for (text, change) in [
            ("20G", SizeChange::To(20 * GIB)),
            ("+2G", SizeChange::GrowBy(2 * GIB)),
            ("-1.5GiB", SizeChange::ShrinkBy(3 * GIB / 2)),
            ("min", SizeChange::ToMin),
            ("max", SizeChange::ToMax),
        ] {
            assert_eq!(text.parse(), Ok(change), "{text}");
        }
        for text in ["", "+", "-", "--2G", "+-2G", "-min", "MAX", "2X", "é"] {
            assert!(text.parse::<SizeChange>().is_err(), "{text}");
        }
    }

    #[test]
    fn grow_and_shrink_take_their_own_sign_or_none() {
        assert_eq!(grow_amount("2G"), Ok(SizeChange::GrowBy(2 * GIB)));
        assert_eq!(grow_amount("+2G"), Ok(SizeChange::GrowBy(2 * GIB)));
        assert_eq!(shrink_amount("2G"), Ok(SizeChange::ShrinkBy(2 * GIB)));
        assert_eq!(shrink_amount("-2G"), Ok(SizeChange::ShrinkBy(2 * GIB)));
        assert_eq!(
            grow_amount("-2G").unwrap_err().to_string(),
            "-2G has the wrong sign: use `balloon-ctl shrink`"
        );
        assert_eq!(
            shrink_amount("+2G").unwrap_err().to_string(),
            "+2G has the wrong sign: use `balloon-ctl grow`"
        );
        for text in ["0", "+0", "max", "min"] {
            assert!(grow_amount(text).is_err(), "{text}");
        }
        for text in ["0", "-0", "max", "min"] {
            assert!(shrink_amount(text).is_err(), "{text}");
        }
    }
}
