//! Values on the command line: durations, sizes, and pairs.

use std::time::Duration;

/// A duration such as `500ms`, `30s` or `10m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a duration such as 500ms, 30s or 10m".to_owned())
}

/// A size such as `64MiB`, in bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    parse_size::parse_size(text).map_err(|_| "expected a size such as 64MiB or 1GB".to_owned())
}

/// `NAME=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// `NAME=VALUE`, or `NAME` for what the variable is here.
pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    if text.contains('=') {
        return pair(text);
    }
    match std::env::var(text) {
        Ok(value) => Ok((text.to_owned(), value)),
        Err(_) => Err(format!(
            "expected NAME=VALUE, or the name of a variable that is set; {text} is not"
        )),
    }
}

/// The variables in the text of a file: `NAME=VALUE` lines; empty ones and those that begin with
/// `#` do not count. As `docker run --env-file` reads it.
pub(super) fn variables(text: &str) -> Result<Vec<(String, String)>, String> {
    let lines = text.lines().map(str::trim_start).enumerate();
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(at, line)| variable(line).map_err(|why| format!("line {}: {why}", at + 1)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_split_at_the_first_sign() {
        assert_eq!(pair("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert_eq!(pair("A="), Ok(("A".to_owned(), String::new())));
        assert!(pair("=b").is_err());
        assert!(pair("A").is_err());
        assert!(variable("SURELY_NOT_SET_ANYWHERE").is_err());
        assert!(variable("PATH").is_ok_and(|(name, value)| name == "PATH" && !value.is_empty()));
    }

    #[test]
    fn files_of_variables_are_read_line_by_line() {
        let text = "# a comment\n\nA=1\n  B=x y # z\n";
        let wanted = [("A", "1"), ("B", "x y # z")];
        let wanted = wanted.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(variables(text), Ok(wanted.to_vec()));
        assert!(variables("A=1\n=2\n").is_err_and(|why| why.starts_with("line 2:")));
    }

    #[test]
    fn durations_and_sizes_are_those_of_the_settings() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert!(duration("0s").is_err() && duration("90").is_err());
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert!(size("lots").is_err());
    }
}
