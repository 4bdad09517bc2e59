// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Figures as people write them: three digits and a unit.

/// Three significant digits, as far as they lie behind the point.
fn three(value: f64) -> String {
    match value.abs() {
        v if v < 9.995 => format!("{value:.2}"),
        v if v < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// `824`, `72.4 k`, `1.20 M`.
pub fn count(value: f64) -> String {
    match value.abs() {
        v if v < 999.5 => format!("{value:.0}"),
        v if v < 999.5e3 => format!("{} k", three(value / 1e3)),
        _ => format!("{} M", three(value / 1e6)),
    }
}

/// `2.10 µs`, `1.20 ms`, `3.40 s`.
pub fn seconds(value: f64) -> String {
    match value.abs() {
        v if v < 999.5e-6 => format!("{} µs", three(value * 1e6)),
        v if v < 0.9995 => format!("{} ms", three(value * 1e3)),
        _ => format!("{} s", three(value)),
    }
}

/// `2.10 ×`.
pub fn times(value: f64) -> String {
    format!("{} ×", three(value))
}

/// `93.1 %`.
pub fn share(value: f64) -> String {
    format!("{} %", three(value * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_at_every_magnitude() {
        assert_eq!(["824", "72.4 k", "1.20 M"], [count(824.4), count(72_390.0), count(1_199_999.0)]);
        assert_eq!(["2.10 µs", "1.20 ms", "3.40 s"], [seconds(2.1e-6), seconds(1.2e-3), seconds(3.4)]);
        assert_eq!(["1.00 M", "1.00 ms", "100"], [count(999_990.0), seconds(999.9e-6), count(99.99)]);
        assert_eq!(["8.26 ×", "93.1 %"], [times(8.261), share(0.9312)]);
    }
}
