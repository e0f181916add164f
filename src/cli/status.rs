//! `status`: what is known of one job.

use clap::Args;
use serde_json::Value;

use super::client::Link;
use super::options::ConnectOptions;
use super::{exit, print, records};
use crate::job::{JobId, printable};
use crate::protocol::record::Record;

/// The most of a value that is shown, in bytes.
const MAX_VALUE: usize = 2048;
/// What `result` prints, and what is the workers' own.
const HIDDEN: [&str; 7] =
    ["stdout", "stderr", "stdout_encoding", "stderr_encoding", "claim", "delivery", "interleaving"];

/// The arguments of `status`.
#[derive(Args, Debug)]
pub struct Status {
    /// The job's id.
    id: JobId,
    /// Print the record as one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: ConnectOptions,
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        let link = Link::open(&self.connect, 64).await?;
        let record = records::find(&link, "status", &self.id).await?;
        let text = if self.json {
            let json = String::from_utf8_lossy(&record.encode()).into_owned();
            format!("{json}\n")
        } else {
            lines(&record)
        };
        print::stdout(&text)?;
        Ok(exit::OK)
    }
}

/// The fields of a record, one a line; those of an object each for itself.
fn lines(record: &Record) -> String {
    let Ok(Value::Object(fields)) = serde_json::to_value(record) else { return String::new() };
    // What matters most comes first, the rest as it is.
    let first = ["id", "state", "status", "exit_code", "error", "image", "worker", "attempt"];
    let rest = fields.keys().map(String::as_str).filter(|name| !first.contains(name));
    let mut text = String::new();
    for name in first.into_iter().chain(rest).filter(|name| !HIDDEN.contains(name)) {
        match fields.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::Object(parts)) => {
                for (part, value) in parts {
                    line(&mut text, &format!("{name}.{part}"), value);
                }
            }
            Some(value) => line(&mut text, name, value),
        }
    }
    text
}

fn line(text: &mut String, name: &str, value: &Value) {
    let value = match value {
        Value::String(value) => value.clone(),
        other => other.to_string(),
    };
    text.push_str(&format!("{name:22} {}\n", printable(&value, MAX_VALUE)));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_record_is_shown_without_its_output() {
        let json = r#"{"id": "a", "state": "ended", "updated_at": "2030-01-01T00:00:00Z",
            "status": "failed", "exit_code": 3, "stdout": "s3cret", "stdout_encoding": "utf8",
            "error": {"code": "x.y", "message": "two\nlines"}, "attempt": 1}"#;
        let text = lines(&Record::decode(json.as_bytes()).unwrap());
        let begin = "id                     a\nstate                  ended\nstatus                 failed\n";
        assert!(text.starts_with(begin), "{text}");
        assert!(text.contains("\nerror.message          two lines\n"), "{text}");
        assert!(!text.contains("s3cret"));
    }
}
