//! How findings are printed: a line each as it comes, or all of them as JSON in the end.

use std::io::IsTerminal as _;

use crate::cli::print;
use crate::finding::{Finding, Status};
use crate::job::printable;

/// The most of a text that is printed, in bytes.
const MAX_TEXT: usize = 2048;

/// What was found so far.
pub(super) struct Report {
    findings: Vec<Finding>,
    json: bool,
    colour: bool,
    /// What went wrong when it was printed.
    printed: anyhow::Result<()>,
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        let colour = std::io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { findings: Vec::new(), json, colour, printed: Ok(()) }
    }

    /// Takes a finding, and prints it where that is asked for.
    pub(super) fn add(&mut self, finding: Finding) {
        if !self.json && self.printed.is_ok() {
            self.printed = print::stdout(&lines(&finding, self.colour));
        }
        self.findings.push(finding);
    }

    /// Prints what is left to print. Returns whether something failed.
    ///
    /// # Errors
    /// It could not be printed.
    pub(super) fn finish(self) -> anyhow::Result<bool> {
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

    #[test]
    fn a_finding_is_a_line_and_what_to_do() {
        let finding = Finding::fail("engine", "no socket\u{1b}[31m", "start it");
        let plain = "fail  engine       no socket?[31m\n                   → start it\n";
        assert_eq!(lines(&finding, false), plain);
        assert!(lines(&finding, true).starts_with("\u{1b}[1;31mfail\u{1b}[0m  engine"));
        assert_eq!(lines(&Finding::ok("nats", "there"), false), "ok    nats         there\n");
    }
}
