// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The report as text.

use std::fmt::Write as _;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use super::figures::{count, seconds, share, times};
use super::{CaseReport, Report, Row};

const COLUMNS: [&str; 9] = ["", "IOPS", "±", "p50", "p99", "GB/s", "backend cores", "IOPS/core", "ratio"];

/// The machine and how it was measured.
pub fn heading(report: &Report) -> String {
    let (machine, effort) = (&report.machine, &report.effort);
    format!(
        "{} × {}, {} GiB, Linux {}; {}; NV-RAM is tmpfs with pages of {}\nmedians of {} interleaved runs of {} after {} of warm-up\n",
        machine.host.processors,
        machine.host.processor,
        machine.host.memory_gib,
        machine.host.kernel,
        machine.versions.join("; "),
        machine.nvram_pages.name(),
        effort.rounds,
        seconds(effort.measured.as_secs_f64()),
        seconds(effort.warm_up.as_secs_f64()),
    )
}

/// One case.
pub fn case(case: &CaseReport) -> String {
    let mut text = format!("\n{}\n  {}\n", case.name, case.about);
    if !case.rows.is_empty() {
        let mut table = plain(&COLUMNS);
        for row in &case.rows {
            table.add_row(cells(row));
        }
        push_indented(&mut text, &table);
    }
    if !case.verdicts.is_empty() {
        let mut table = plain(&["", "reached", "required", ""]);
        for verdict in &case.verdicts {
            let pass = match verdict.pass {
                Some(true) => "PASS",
                Some(false) => "MISS",
                None => "",
            };
            table.add_row([&verdict.what, &verdict.reached, &verdict.required, pass]);
        }
        push_indented(&mut text, &table);
    }
    for note in &case.notes {
        let _ = writeln!(text, "  note: {note}");
    }
    text
}

/// How many of the required figures were reached.
pub fn summary(report: &Report) -> String {
    let verdicts = || report.cases.iter().flat_map(|case| &case.verdicts);
    let required = verdicts().filter(|verdict| !verdict.required.is_empty()).count();
    let reached = verdicts().filter(|verdict| verdict.pass == Some(true)).count();
    format!("\n{reached} of {required} required figures reached, {} missed\n", report.missed())
}

fn cells(row: &Row) -> [String; 9] {
    let median = &row.median;
    if row.series.samples.is_empty() {
        let mut cells = std::array::from_fn(|_| String::new());
        cells[0].clone_from(&row.contender);
        "not available".clone_into(&mut cells[1]);
        return cells;
    }
    [
        row.contender.clone(),
        count(median.iops),
        share(row.series.spread()),
        seconds(median.p50_us / 1e6),
        seconds(median.p99_us / 1e6),
        format!("{:.2}", median.bytes_per_second / 1e9),
        format!("{:.2}", median.backend_cores),
        count(median.iops_per_core()),
        row.ratio.map(times).unwrap_or_default(),
    ]
}

fn plain(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.to_vec());
    for (index, column) in table.column_iter_mut().enumerate() {
        let right = header.len() == COLUMNS.len() && index > 0;
        column.set_cell_alignment(if right { CellAlignment::Right } else { CellAlignment::Left });
    }
    table
}

fn push_indented(text: &mut String, table: &Table) {
    for line in table.to_string().lines() {
        let _ = writeln!(text, "  {}", line.trim_end());
    }
}
