//! How findings are printed: a line each as it comes, or all of them as JSON in the end; and a line
//! for each check that nothing was found of.

use std::io::IsTerminal as _;

use super::checks::{Check, reason};
use crate::cli::print;
use crate::finding::{Finding, Status};
use crate::job::printable;

/// The most of a text that is printed, in bytes.
const MAX_TEXT: usize = 2048;

/// What was found so far.
pub(super) struct Report {
    /// The checks that have not been passed yet.
    ahead: &'static [Check],
    findings: Vec<Finding>,
    json: bool,
    colour: bool,
    /// What went wrong when it was printed.
    printed: anyhow::Result<()>,
}

impl Report {
    /// Of these checks, whose findings come in their order.
    pub(super) fn new(checks: &'static [Check], json: bool) -> Self {
        let colour = std::io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { ahead: checks, findings: Vec::new(), json, colour, printed: Ok(()) }
    }

    /// Takes a finding, and prints it where that is asked for. Of checks before it nothing comes any
    /// more: those without a finding were not made.
    pub(super) fn add(&mut self, finding: Finding) {
        if let Some(at) = self.ahead.iter().position(|check| check.name == finding.check) {
            self.pass(at);
        }
        self.take(finding);
    }

    /// Leaves so many checks behind.
    fn pass(&mut self, count: usize) {
        let (passed, ahead) = self.ahead.split_at(count);
        self.ahead = ahead;
        for check in passed {
            let found = |name: &str| self.findings.iter().any(|finding| finding.check == name);
            if !found(check.name) {
                let reason = reason(check, |name| self.was_looked_at(name));
                self.take(Finding::not_checked(check.name, reason));
            }
        }
    }

    fn take(&mut self, finding: Finding) {
        if !self.json && self.printed.is_ok() {
            self.printed = print::stdout(&lines(&finding, self.colour));
        }
        self.findings.push(finding);
    }

    /// Whether there is a finding of the check's own.
    fn was_looked_at(&self, name: &str) -> bool {
        let of_its_own =
            |found: &Finding| found.check == name && found.status != Status::NotChecked;
        self.findings.iter().any(of_its_own)
    }

    /// Prints what is left to print. Returns whether something failed.
    ///
    /// # Errors
    /// It could not be printed.
    pub(super) fn finish(mut self) -> anyhow::Result<bool> {
        self.pass(self.ahead.len());
        self.printed?;
        if self.json {
            print::stdout(&format!("{}\n", serde_json::to_string_pretty(&self.findings)?))?;
        }
        Ok(self.findings.iter().any(|finding| finding.status == Status::Fail))
    }
}

/// A finding for people.
fn lines(finding: &Finding, colour: bool) -> String {
    let (word, code) = match finding.status {
        Status::Ok => ("ok", "32"),
        Status::Warn => ("warn", "33"),
        Status::Fail => ("fail", "1;31"),
        Status::NotChecked => ("-", "2"),
    };
    let word = format!("{word:4}");
    let word = if colour { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word };
    let text = |text: &str| printable(text, MAX_TEXT);
    let mut lines = format!("{word}  {:11}  {}\n", finding.check, text(&finding.detail));
    if let Some(remedy) = &finding.remedy {
        lines.push_str(&format!("{:17}  → {}\n", "", text(remedy)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::checks::listed;

    #[test]
    fn what_was_not_looked_at_is_listed_in_its_place() {
        let mut report = Report::new(listed(true), true);
        report.add(Finding::ok("settings", "fine"));
        report.add(Finding::warn("nats", "away", "start it"));
        report.add(Finding::fail("nats", "away", "start it"));
        report.add(Finding::ok("engine", "there"));
        report.pass(report.ahead.len());
        let mut names: Vec<&str> = report.findings.iter().map(|found| found.check).collect();
        names.dedup();
        assert!(names.iter().eq(listed(true).iter().map(|check| &check.name)), "{names:?}");
        let detail = |check: &str| {
            let mut of_it = report.findings.iter().filter(|found| found.check == check);
            of_it.next().map(|found| found.detail.as_str())
        };
        assert_eq!(detail("store"), Some("not checked: NATS cannot be reached"));
        assert_eq!(detail("disk"), Some("not checked: the engine cannot be used"));
        assert_eq!(report.findings.iter().filter(|found| found.check == "nats").count(), 2);
    }

    #[test]
    fn a_finding_is_a_line_and_what_to_do() {
        let finding = Finding::fail("engine", "no socket\u{1b}[31m", "start it");
        let plain = "fail  engine       no socket?[31m\n                   → start it\n";
        assert_eq!(lines(&finding, false), plain);
        assert!(lines(&finding, true).starts_with("\u{1b}[1;31mfail\u{1b}[0m  engine"));
        assert_eq!(lines(&Finding::ok("nats", "there"), false), "ok    nats         there\n");
    }
}
