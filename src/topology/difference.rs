//! How what is there differs from what is wanted, and what an operator can do about it.

use std::fmt::{self, Display};
use std::time::Duration;

use async_nats::jetstream::consumer::{self, pull};
use async_nats::jetstream::stream;
use serde::Serialize;
use serde_json::Value;

/// A field of a stream that must be as wanted, and the setting that says how.
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) setting: &'static str,
    /// The option of `nats stream edit` that changes it; empty where nothing can.
    option: &'static str,
}

impl fmt::Debug for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

pub(super) const fn field(
    name: &'static str,
    setting: &'static str,
    option: &'static str,
) -> Field {
    Field { name, setting, option }
}

/// What would undo the promise in any stream.
const EVERY_STREAM: &[Field] = &[
    field("max_msgs_per_subject", "", "--max-msgs-per-subject"),
    field("max_msg_size", "", "--max-msg-size"),
    field("no_ack", "", ""),
    field("sealed", "", ""),
    // With it, whoever publishes can have a stream forget all that is in it.
    field("allow_rollup_hdrs", "", ""),
];

/// Something that is not as wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is not as wanted, and how it should be.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.remedy)
    }
}

/// What of a stream is not as wanted.
pub(super) fn differences(
    found: &stream::Config,
    wanted: &stream::Config,
    fields: &[Field],
) -> Vec<Fault> {
    let (found_json, wanted_json) = (json(found), json(wanted));
    let mut faults = Vec::new();
    for Field { name, setting, option } in fields.iter().chain(EVERY_STREAM) {
        let (is, should) = (shown(name, &found_json[*name]), shown(name, &wanted_json[*name]));
        if is == should {
            continue;
        }
        let stream = &wanted.name;
        let by_setting = match *setting {
            "" => String::new(),
            setting => format!("set {setting} to match, or "),
        };
        let by_edit = match *option {
            "" => "delete the stream, or use another SUBJECT_PREFIX".to_owned(),
            option => {
                let none = if DURATIONS.contains(name) { "0s" } else { "-1" };
                let value = if should == "none" { none } else { &should };
                format!("run: nats stream edit {stream} {option}={value}")
            }
        };
        faults.push(Fault {
            what: format!("stream {stream}: {name} is {is} and should be {should}"),
            remedy: format!("{by_setting}{by_edit}"),
        });
    }
    faults
}

pub(super) fn consumer_differences(
    stream: &str,
    found: &consumer::Config,
    wanted: &pull::Config,
) -> Vec<Fault> {
    let (found_json, wanted_json) = (json(found), json(wanted));
    let name = wanted.durable_name.as_deref().unwrap_or_default();
    [
        ("ack_wait", "ACK_WAIT", "--wait"),
        ("max_deliver", "MAX_DELIVER (10 less)", "--max-deliver"),
        ("ack_policy", "", ""),
        ("filter_subject", "SUBJECT_PREFIX", ""),
        ("deliver_subject", "", ""),
        ("max_ack_pending", "", "--max-pending"),
        ("headers_only", "", ""),
    ]
    .into_iter()
    .filter_map(|(field, setting, option)| {
        let (is, should) = (shown(field, &found_json[field]), shown(field, &wanted_json[field]));
        if is == should {
            return None;
        }
        let by_setting = match setting {
            "" => String::new(),
            setting => format!("set {setting} to match, or "),
        };
        let by_edit = match option {
            "" => format!("run: nats consumer rm {stream} {name}"),
            option => format!("run: nats consumer edit {stream} {name} {option}={should}"),
        };
        Some(Fault {
            what: format!(
                "consumer {name} of stream {stream}: {field} is {is} and should be {should}"
            ),
            remedy: format!("{by_setting}{by_edit}"),
        })
    })
    .collect()
}

fn json(config: &impl Serialize) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// The fields that hold nanoseconds.
const DURATIONS: [&str; 3] = ["max_age", "duplicate_window", "ack_wait"];

/// A field's value as an operator would write it. Absent, zero and minus one are all "none".
fn shown(name: &str, value: &Value) -> String {
    match value {
        Value::Number(n) if DURATIONS.contains(&name) => match n.as_u64() {
            None | Some(0) => "none".to_owned(),
            Some(nanos) => as_the_cli_takes_it(Duration::from_nanos(nanos)),
        },
        Value::Null => "none".to_owned(),
        Value::Number(n) if n.as_i64().is_some_and(|n| n <= 0) => "none".to_owned(),
        Value::String(text) if text.is_empty() => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let mut items: Vec<String> = items.iter().map(|item| shown(name, item)).collect();
            items.sort_unstable();
            items.join(",")
        }
        other => other.to_string(),
    }
}

/// A duration as `nats` takes it in an option: hours, minutes, seconds.
fn as_the_cli_takes_it(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let mut text = String::new();
    for (value, unit) in [(hours, "h"), (minutes, "m"), (seconds % 60, "s")] {
        if value > 0 {
            text.push_str(&format!("{value}{unit}"));
        }
    }
    if nanos > 0 {
        text.push_str(&format!("{nanos}ns"));
    }
    text
}
