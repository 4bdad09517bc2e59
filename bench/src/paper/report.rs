// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The report: one Markdown file, with its plots and tables of what was measured beside it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::report::Verdict;

/// One experiment's part.
#[derive(Clone, Debug, Default)]
pub(super) struct Section {
    pub(super) title: String,
    /// Markdown: what was done, what was found. Plots are embedded by the names of [`Section::files`].
    pub(super) text: String,
    pub(super) verdicts: Vec<Verdict>,
    /// Name and content.
    pub(super) files: Vec<(&'static str, String)>,
}

/// A table in Markdown; all columns but the first are numbers.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut text =
        format!("| {} |\n|---|{}\n", head.join(" | "), "---:|".repeat(head.len().saturating_sub(1)));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

/// Lines of comma-separated values.
pub(crate) fn csv(head: &str, rows: impl IntoIterator<Item = String>) -> String {
    rows.into_iter().fold(format!("{head}\n"), |text, row| text + &row + "\n")
}

fn outcome(verdict: &Verdict) -> &'static str {
    match verdict.pass {
        Some(true) => "PASS",
        Some(false) => "MISS",
        None => "",
    }
}

/// How many required figures there are, and how many of them were reached.
fn count(sections: &[Section]) -> (usize, usize) {
    let verdicts = || sections.iter().flat_map(|section| &section.verdicts);
    (
        verdicts().filter(|verdict| verdict.pass.is_some()).count(),
        verdicts().filter(|verdict| verdict.pass == Some(true)).count(),
    )
}

fn markdown(about: &[String], sections: &[Section]) -> String {
    let (required, reached) = count(sections);
    let mut text = format!(
        "# The vSSD paper's experiments\n\n\
         *Elastic Persistent Memory for Virtualized Environments* (B. Singh, 2017) measured three things of its resizable virtual SSD. Here \
         they are measured again, on real guests. {reached} of {required} required figures were reached.\n\n\
         Made by `cargo xtask bench paper`.\n\n"
    );
    for line in about {
        let _ = writeln!(text, "- {line}");
    }
    for section in sections {
        let _ = write!(text, "\n## {}\n\n{}\n\n", section.title, section.text.trim());
        let rows: Vec<Vec<String>> = section
            .verdicts
            .iter()
            .map(|verdict| {
                vec![
                    verdict.what.clone(),
                    verdict.reached.clone(),
                    verdict.required.clone(),
                    outcome(verdict).into(),
                ]
            })
            .collect();
        text.push_str(&table(&["what", "reached", "required", ""], &rows));
    }
    text
}

/// Writes everything into the folder `out`; gives the report's path.
pub(super) fn write(out: &Path, about: &[String], sections: &[Section]) -> Result<PathBuf> {
    let put = |name: &str, content: &str| {
        let path = out.join(name);
        fs::write(&path, content).with_context(|| {
            format!("cannot write {}: free some space, or choose another folder with --out", path.display())
        })?;
        Ok::<_, anyhow::Error>(path)
    };
    for (name, content) in sections.iter().flat_map(|section| &section.files) {
        put(name, content)?;
    }
    put("report.md", &markdown(about, sections))
}

/// The required figures, for a terminal.
pub(super) fn summary(sections: &[Section]) -> String {
    let mut text = String::new();
    for section in sections {
        let _ = writeln!(text, "{}", section.title);
        for verdict in &section.verdicts {
            let required = if verdict.required.is_empty() {
                String::new()
            } else {
                format!(" (required: {})", verdict.required)
            };
            let _ =
                writeln!(text, "  {:4} {}: {}{required}", outcome(verdict), verdict.what, verdict.reached);
        }
    }
    let (required, reached) = count(sections);
    let _ = writeln!(text, "{reached} of {required} required figures reached");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section() -> Section {
        Section {
            title: "One".into(),
            text: "![plot](a.svg)\n".into(),
            verdicts: vec![
                Verdict::of("speed", "3 ×", "> 1 ×", true),
                Verdict::of("errors", "7", "6", false),
                Verdict::info("by the way", "42"),
            ],
            files: vec![("a.svg", "<svg/>".into()), ("a.csv", csv("x,y", ["1,2".to_owned()]))],
        }
    }

    #[test]
    fn a_report_counts_what_was_reached_and_stands_beside_its_files() {
        let out = tempfile::tempdir().unwrap();
        let path = write(out.path(), &["Machine: this one".into()], &[section()]).unwrap();
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains("1 of 2 required figures were reached"), "{text}");
        assert!(text.contains("| errors | 7 | 6 | MISS |") && text.contains("- Machine: this one"), "{text}");
        assert_eq!(fs::read_to_string(out.path().join("a.csv")).unwrap(), "x,y\n1,2\n");
        assert!(out.path().join("a.svg").exists());
        assert!(summary(&[section()]).ends_with("1 of 2 required figures reached\n"));
    }

    #[test]
    fn a_table_has_a_rule_for_each_column() {
        let text = table(&["a", "b", "c"], &[vec!["x".into(), "1".into(), "2".into()]]);
        assert_eq!(text, "| a | b | c |\n|---|---:|---:|\n| x | 1 | 2 |\n");
    }
}
