//! What was wrong with the settings.

use std::fmt;

/// The settings that were wrong, one line each.
#[derive(Debug)]
pub struct ConfigError {
    pub(super) problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bad setting(s):", self.problems.len())?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    /// What was wrong: the setting's name, a colon, and why.
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}
