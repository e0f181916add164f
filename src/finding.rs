//! What an examination of the daemon's surroundings found: how it is, and what to do about it.

use serde::Serialize;

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// The daemon works, with less than it could have.
    Warn,
    /// The daemon does not work, or not for long.
    Fail,
    /// It cannot be known from here.
    NotChecked,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: a short name that does not change.
    pub check: &'static str,
    /// How it is.
    pub status: Status,
    /// What was found. Never a secret.
    pub detail: String,
    /// What to do, where there is something to do.
    pub remedy: Option<String>,
}

/// Where findings go, as they are found.
pub type Tell<'a> = &'a mut dyn FnMut(Finding);

impl Finding {
    /// All is well.
    #[must_use]
    pub fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, detail: detail.into(), remedy: None }
    }

    /// Something could be better.
    #[must_use]
    pub fn warn(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Warn, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    /// Something must be mended.
    #[must_use]
    pub fn fail(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Fail, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    /// It cannot be known.
    #[must_use]
    pub fn not_checked(check: &'static str, why: impl std::fmt::Display) -> Self {
        let detail = format!("not checked: {why}");
        Self { check, status: Status::NotChecked, detail, remedy: None }
    }

    /// This, with what to do.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}
