//! A file of settings: lines of `NAME=value`, as `.env.example` has them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{ConfigError, settings};

/// Where the file is.
const CONFIG_FILE: &str = "CONFIG_FILE";

/// `vars`, and of the file that they name what they do not set themselves. An empty value is an unset
/// one.
pub(super) fn completed(
    vars: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, ConfigError> {
    let path = vars.get(CONFIG_FILE).map(|path| path.trim()).filter(|path| !path.is_empty());
    let Some(path) = path.map(Path::new) else { return Ok(vars) };
    let wrong = |problems| ConfigError { problems };
    let text = std::fs::read_to_string(path)
        .map_err(|e| wrong(vec![format!("{CONFIG_FILE}: cannot read {}: {e}", path.display())]))?;
    let mut all = parse(&text).map_err(|lines| {
        let at = |line: String| format!("{CONFIG_FILE}: {}: {line}", path.display());
        wrong(lines.into_iter().map(at).collect())
    })?;
    all.extend(vars.into_iter().filter(|(_, value)| !value.trim().is_empty()));
    Ok(all)
}

/// The settings in `text`. A value ends with its line; quotation marks around all of it are not part
/// of it. Nothing of a value is repeated in an error: it may be a secret.
fn parse(text: &str) -> Result<BTreeMap<String, String>, Vec<String>> {
    let (mut settings, mut problems) = (BTreeMap::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for (line, number) in text.lines().zip(1..) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            problems.push(format!("line {number}: expected NAME=value"));
            continue;
        };
        let name = name.trim();
        if !settings::is_setting(name) || name == CONFIG_FILE {
            problems.push(format!("line {number}: {name:.64?} is no setting that can stand here"));
        } else if !seen.insert(name) {
            problems.push(format!("line {number}: {name} is set twice"));
        } else {
            settings.insert(name.to_owned(), unquoted(value.trim()).to_owned());
        }
    }
    if problems.is_empty() { Ok(settings) } else { Err(problems) }
}

fn unquoted(value: &str) -> &str {
    let within = |mark| value.strip_prefix(mark)?.strip_suffix(mark);
    within('"').or_else(|| within('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn lines_are_settings() {
        let text = "# A comment.\n\nMAX_CONTAINERS = 7\nIMAGE_ALLOWLIST=\"a, b\"\r\nNATS_PASSWORD='#=x'\nRUST_LOG=";
        let settings = parse(text).unwrap();
        let wanted = [
            ("IMAGE_ALLOWLIST", "a, b"),
            ("MAX_CONTAINERS", "7"),
            ("NATS_PASSWORD", "#=x"),
            ("RUST_LOG", ""),
        ];
        let wanted = wanted.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(settings, BTreeMap::from(wanted));
    }

    #[test]
    fn every_wrong_line_is_named() {
        let text =
            "MAX_CONTAINER=7\nhello\nCPU_LIMIT=1\nCPU_LIMIT=2\nCONFIG_FILE=x\nNATS_PASSWRD=secret";
        let problems = parse(text).unwrap_err();
        assert_eq!(problems.len(), 5, "{problems:?}");
        for (problem, wanted) in problems.iter().zip([
            "line 1: \"MAX_CONTAINER\"",
            "line 2: ",
            "line 4: CPU_LIMIT",
            "line 5",
            "line 6",
        ]) {
            assert!(problem.starts_with(wanted), "{problem}");
            assert!(!problem.contains("secret"));
        }
    }

    #[test]
    fn the_environment_comes_first() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "MAX_CONTAINERS=7\nCPU_LIMIT=2").unwrap();
        let vars = [
            ("CONFIG_FILE", file.path().to_str().unwrap()),
            ("CPU_LIMIT", "3"),
            ("MAX_CONTAINERS", " "),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let all = completed(BTreeMap::from(vars)).unwrap();
        assert_eq!((all["CPU_LIMIT"].as_str(), all["MAX_CONTAINERS"].as_str()), ("3", "7"));
        let vars = BTreeMap::from([("CONFIG_FILE".to_owned(), "/nowhere".to_owned())]);
        let error = completed(vars).unwrap_err().to_string();
        assert!(error.contains("CONFIG_FILE: cannot read /nowhere"), "{error}");
    }
}
