// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The plots, as SVG. They are given values and draw all of them; what those mean is written in the report.

use anyhow::{Context, Result};
use plotters::chart::{ChartBuilder, ChartContext, SeriesLabelPosition};
use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::{
    BLACK, Cartesian2d, Circle, Color, DrawingArea, ErrorBar, IntoDrawingArea, IntoLogRange, LineSeries,
    PathElement, RGBColor, Ranged, Rectangle, SVGBackend, Text, WHITE,
};

use crate::report::figures::{seconds, share};
use crate::stats::Confidence;

/// What is ours, or the guest's.
pub(crate) const BLUE: RGBColor = RGBColor(47, 111, 176);
/// What it is compared with.
pub(crate) const ORANGE: RGBColor = RGBColor(217, 119, 30);
pub(crate) const GREY: RGBColor = RGBColor(150, 150, 150);
pub(crate) const FAINT: RGBColor = RGBColor(228, 228, 228);

const FONT: (&str, u32) = ("sans-serif", 14);
pub(crate) const SMALL: (&str, u32) = ("sans-serif", 12);

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(crate) type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;

/// Draws on white paper of this size.
pub(crate) fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
    area.fill(&WHITE)?;
    draw(&area)?;
    area.present().context("finish the plot")?;
    drop(area);
    Ok(text)
}

pub(crate) fn chart<'a, 'b>(
    area: &'a Area<'b>,
    title: &str,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
) -> Result<Chart<'a, 'b, RangedCoordf64, RangedCoordf64>> {
    Ok(ChartBuilder::on(area)
        .margin(12)
        .margin_right(24)
        .caption(title, FONT)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y)?)
}

/// Axes with names, and a faint grid.
pub(crate) fn axes<X, Y>(
    chart: &mut Chart<'_, '_, X, Y>,
    (x, x_label): (&str, &dyn Fn(&f64) -> String),
    (y, y_label): (&str, &dyn Fn(&f64) -> String),
) -> Result<()>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(FAINT)
        .axis_style(GREY)
        .label_style(SMALL)
        .axis_desc_style(FONT)
        .y_labels(6)
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(x_label)
        .y_label_formatter(y_label)
        .draw()?;
    Ok(())
}

pub(crate) fn whole(value: &f64) -> String {
    format!("{value:.0}")
}

/// Only of whole numbers: places in between have no name.
fn if_whole(value: &f64) -> String {
    if (value - value.round()).abs() < 1e-6 { format!("{:.0}", value.abs()) } else { String::new() }
}

fn percent(value: &f64) -> String {
    format!("{:.0} %", value * 100.0)
}

/// Points of (blocks taken, balloon, read errors) on the line where the last two are equal.
pub(super) fn correctness(points: &[(i64, f64, f64)]) -> Result<String> {
    let most = points.iter().map(|(_, x, y)| x.max(*y)).fold(1.0, f64::max) * 1.12;
    svg((640, 480), |area| {
        let mut chart =
            chart(area, "Read errors of a sequential read, after each step", 0.0..most, 0.0..most)?;
        axes(&mut chart, ("balloon: blocks evicted", &whole), ("read errors, in blocks", &whole))?;
        chart
            .draw_series(LineSeries::new([(0.0, 0.0), (most, most)], GREY.stroke_width(1)))?
            .label("as many errors as evicted blocks")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], GREY));
        chart
            .draw_series(points.iter().map(|(_, x, y)| Circle::new((*x, *y), 5, BLUE.filled())))?
            .label("measured, with the blocks of the step")
            .legend(|(x, y)| Circle::new((x + 9, y), 5, BLUE.filled()));
        // What would lie on the label before it is left without one.
        let mut labelled: Vec<(f64, f64)> = Vec::new();
        let near = most / 22.0;
        for (asked, x, y) in points.iter().filter(|(asked, ..)| *asked != 0) {
            if labelled.iter().all(|(other_x, other_y)| (x - other_x).hypot(y - other_y) > near) {
                chart.draw_series([Text::new(
                    format!("{asked:+}"),
                    (x + most / 60.0, y - most / 90.0),
                    SMALL,
                )])?;
                labelled.push((*x, *y));
            }
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    })
}

pub(crate) fn legend<'a, 'b: 'a, X, Y>(
    chart: &mut Chart<'a, 'b, X, Y>,
    position: SeriesLabelPosition,
) -> Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE)
        .border_style(FAINT)
        .label_font(SMALL)
        .draw()?;
    Ok(())
}

/// A piece of the disk.
#[derive(Clone, Debug)]
pub(super) struct Bin {
    pub(super) first: u64,
    pub(super) reads: u64,
    /// Shares of its blocks that went.
    pub(super) guest: f64,
    pub(super) hypervisor: f64,
}

/// Where the application reads and what goes, in the trials of the first seed.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub(super) blocks: u64,
    pub(super) bins: Vec<Bin>,
}

/// Where the application reads, and below it what has gone of each piece of the disk.
pub(super) fn access(access: &Access) -> Result<String> {
    let blocks = access.blocks as f64;
    let width = access.bins.first().map_or(blocks, |_| blocks / access.bins.len() as f64);
    let most = access.bins.iter().map(|bin| bin.reads).max().unwrap_or(1).max(1) as f64 * 1.1;
    let bars = |value: &dyn Fn(usize) -> f64, colour: RGBColor| -> Vec<_> {
        (0..access.bins.len())
            .filter(|at| value(*at) > 0.0)
            .map(|at| {
                let from = access.bins[at].first as f64;
                Rectangle::new([(from, 0.0), (from + width, value(at))], colour.filled())
            })
            .collect()
    };
    let gone = access.bins.iter().map(|bin| bin.guest.max(bin.hypervisor)).fold(0.1, f64::max) * 1.1;
    svg((760, 620), |area| {
        let (reads, below) = area.split_vertically(260);
        let (guest, hypervisor) = below.split_vertically(170);
        let mut top = chart(&reads, "Reads of the application", 0.0..blocks, 0.0..most)?;
        axes(&mut top, ("", &whole), ("reads", &whole))?;
        top.draw_series(bars(&|at| access.bins[at].reads as f64, GREY))?;
        for (panel, title, colour, value, x) in [
            (
                &guest,
                "Evicted, guest-managed",
                BLUE,
                &(|at: usize| access.bins[at].guest) as &dyn Fn(usize) -> f64,
                "",
            ),
            (&hypervisor, "Evicted, uniform", ORANGE, &|at: usize| access.bins[at].hypervisor, "block"),
        ] {
            let mut chart = chart(panel, title, 0.0..blocks, 0.0..gone)?;
            axes(&mut chart, (x, &whole), ("of the blocks", &percent))?;
            chart.draw_series(bars(value, colour))?;
        }
        Ok(())
    })
}

/// Hits and misses of each way as bars with intervals, and the miss ratio of every seed.
pub(super) fn eviction(ways: &[(&str, &[f64], Confidence); 2]) -> Result<String> {
    let colours = [BLUE, ORANGE];
    let seeds = ways[0].1.len() as f64;
    let most =
        ways.iter().flat_map(|(_, ratios, _)| ratios.iter()).fold(0.0f64, |most, r| most.max(*r)) * 1.45;
    svg((860, 420), |area| {
        let (left, right) = area.split_horizontally(400);
        let mut bars = chart(&left, "Hits and misses, mean and 95 % interval", 0.0..4.0, 0.0..1.1)?;
        let names = ["hits", "misses", "hits", "misses"];
        let name = |x: &f64| {
            let place = names.iter().zip([0.5, 1.5, 2.5, 3.5]).find(|(_, at)| (x - at).abs() < 0.01);
            place.map(|(name, _)| (*name).to_owned()).unwrap_or_default()
        };
        bars.configure_mesh()
            .disable_x_mesh()
            .light_line_style(WHITE)
            .bold_line_style(FAINT)
            .axis_style(GREY)
            .label_style(SMALL)
            .axis_desc_style(FONT)
            .x_labels(9)
            .x_label_formatter(&name)
            .y_desc("share of the reads")
            .y_label_formatter(&percent)
            .draw()?;
        let mut from = 0.0;
        for ((label, _, misses), colour) in ways.iter().zip(colours) {
            for (mean, pale) in [(1.0 - misses.mean, true), (misses.mean, false)] {
                let style = if pale { colour.mix(0.45).filled() } else { colour.filled() };
                bars.draw_series([Rectangle::new([(from + 0.15, 0.0), (from + 0.85, mean)], style)])?;
                let whisker = ErrorBar::new_vertical(
                    from + 0.5,
                    mean - misses.half,
                    mean,
                    mean + misses.half,
                    BLACK.stroke_width(1),
                    6,
                );
                bars.draw_series([whisker])?;
                bars.draw_series([Text::new(share(mean), (from + 0.24, mean + 0.06), SMALL)])?;
                from += 1.0;
            }
            bars.draw_series([Text::new((*label).to_owned(), (from - 1.6, 1.09), SMALL)])?;
        }

        let mut points =
            chart(&right, "Miss ratio of each seed, mean and 95 % interval", -0.5..seeds - 0.5, 0.0..most)?;
        axes(&mut points, ("seed", &if_whole), ("misses, share of the reads", &percent))?;
        for ((label, ratios, interval), colour) in ways.iter().zip(colours) {
            let band = [(-0.5, interval.low()), (seeds - 0.5, interval.high())];
            points.draw_series([Rectangle::new(band, colour.mix(0.18).filled())])?;
            let mean = [(-0.5, interval.mean), (seeds - 0.5, interval.mean)];
            points.draw_series(LineSeries::new(mean, colour.stroke_width(1)))?;
            let places = (0u32..).map(f64::from).zip(ratios.iter().copied());
            points
                .draw_series(places.map(|at| Circle::new(at, 4, colour.filled())))?
                .label(*label)
                .legend(move |(x, y)| Circle::new((x + 9, y), 4, colour.filled()));
        }
        legend(&mut points, SeriesLabelPosition::UpperRight)
    })
}

/// A value at a place, with how far runs lie apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spread {
    pub(super) x: f64,
    pub(super) low: f64,
    pub(super) middle: f64,
    pub(super) high: f64,
}

/// Seconds against GiB, of shrinking from a size and of growing back to it; in each of ours and of the original's exchange.
pub(super) fn resize(size: &str, panels: &[[Vec<Spread>; 2]; 2]) -> Result<String> {
    let all = || panels.iter().flatten().flatten();
    let low = all().map(|spread| spread.low).fold(f64::INFINITY, f64::min).max(1e-6);
    let high = all().map(|spread| spread.high).fold(low, f64::max);
    // Whole decades, so that the grid says what they are; room for the legend.
    let (low, high) = (10f64.powf(low.log10().floor()), 10f64.powf((high * 8.0).log10().ceil()));
    let largest = all().map(|spread| spread.x).fold(1.0, f64::max) + 1.0;
    svg((900, 440), |area| {
        let (left, right) = area.split_horizontally(450);
        for (panel, ways, title, x) in [
            (left, &panels[0], format!("Shrink from {size}"), "size after the shrink, GiB"),
            (right, &panels[1], format!("Grow back to {size}"), "size before the grow, GiB"),
        ] {
            let mut chart = ChartBuilder::on(&panel)
                .margin(12)
                .margin_right(24)
                .caption(&title, FONT)
                .x_label_area_size(42)
                .y_label_area_size(72)
                .build_cartesian_2d(0.0..largest, (low..high).log_scale())?;
            axes(&mut chart, (x, &whole), ("time", &|value: &f64| seconds(*value)))?;
            for ((way, colour), label) in ways.iter().zip([BLUE, ORANGE]).zip(["vssd", "2 MiB a message"]) {
                let line = way.iter().map(|spread| (spread.x, spread.middle));
                chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
                chart.draw_series(way.iter().map(|spread| {
                    ErrorBar::new_vertical(
                        spread.x,
                        spread.low,
                        spread.middle,
                        spread.high,
                        colour.stroke_width(1),
                        8,
                    )
                }))?;
                chart
                    .draw_series(
                        way.iter().map(|spread| Circle::new((spread.x, spread.middle), 4, colour.filled())),
                    )?
                    .label(label)
                    .legend(move |(x, y)| Circle::new((x + 9, y), 4, colour.filled()));
            }
            legend(&mut chart, SeriesLabelPosition::UpperRight)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(svg: &str) -> usize {
        svg.matches("<circle").count()
    }

    #[test]
    fn every_step_and_every_seed_has_its_point() {
        let svg = correctness(&[(0, 0.0, 0.0), (16, 16.0, 16.0), (-8, 8.0, 7.0)]).unwrap();
        assert_eq!(circles(&svg), 3 + 1, "with the legend's");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        let confidence = Confidence { mean: 0.2, half: 0.01 };
        let svg =
            eviction(&[("a", &[0.1, 0.2, 0.3], confidence), ("b", &[0.3, 0.2, 0.1], confidence)]).unwrap();
        // An error bar has a circle at its mean.
        assert_eq!(circles(&svg), 6 + 2 + 4);
    }

    #[test]
    fn a_plot_of_accesses_has_a_bar_for_each_piece_that_is_not_empty() {
        let bin = |first, reads, guest, hypervisor| Bin { first, reads, guest, hypervisor };
        let bins = vec![bin(0, 5, 0.0, 0.5), bin(10, 0, 1.0, 0.5)];
        let empty = svg_of(&Access { blocks: 20, bins: vec![bin(0, 0, 0.0, 0.0), bin(10, 0, 0.0, 0.0)] });
        assert_eq!(svg_of(&Access { blocks: 20, bins }) - empty, 4);
    }

    fn svg_of(given: &Access) -> usize {
        access(given).unwrap().matches("<rect").count()
    }

    #[test]
    fn resizes_of_microseconds_and_of_minutes_fit_on_one_plot() {
        let spread = |x, middle| Spread { x, low: middle / 2.0, middle, high: middle * 2.0 };
        let way = |scale: f64| vec![spread(31.0, scale), spread(4.0, scale * 30.0)];
        let svg = resize("32 GiB", &[[way(1e-5), way(10.0)], [way(1e-4), way(100.0)]]).unwrap();
        // A point and an error bar's circle for each value, a point in each legend.
        assert_eq!(circles(&svg), 2 * 8 + 4);
    }
}
