//! A request, as the command line says it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::parse::{duration, pair, size, variable, variables};
use crate::job::{JobId, Priority};
use crate::protocol::time::{parse_rfc3339, rfc3339};

/// What is to be run, and how.
#[derive(Args, Debug)]
#[command(next_help_heading = "Function")]
pub(super) struct RequestOptions {
    /// The image.
    #[arg(help_heading = None)]
    pub(super) image: String,
    /// The command and its arguments, after `--`; the image's own where there are none. No shell is
    /// started for it.
    #[arg(last = true, help_heading = None)]
    command: Vec<String>,
    /// The job's id, 1 to 64 of A-Z a-z 0-9 _ -; else a new one is made.
    #[arg(long)]
    id: Option<JobId>,
    /// Set a variable; NAME alone for what it is here. May be given again.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Set the variables in a file, NAME=VALUE a line; --env counts more. May be given again.
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory in the container.
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// User in the container: user, uid, user:group or uid:gid.
    #[arg(short = 'u', long, value_name = "USER")]
    run_as: Option<String>,
    /// How long it may run, such as 30s.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    timeout: Option<Duration>,
    /// Memory, swap included, such as 64MiB.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Processors; 0.5 is half of one.
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<f64>,
    /// Processes and threads at once.
    #[arg(long, value_name = "NUMBER")]
    pids: Option<u64>,
    /// The container's network.
    #[arg(long)]
    network: Option<String>,
    /// Label for the container. May be given again.
    #[arg(short, long = "label", value_name = "NAME=VALUE", value_parser = pair)]
    labels: Vec<(String, String)>,
    /// Before which other jobs it runs.
    #[arg(long, value_enum, default_value_t = Urgency::Normal)]
    priority: Urgency,
    /// How many attempts there are in all when the function fails.
    #[arg(long, value_name = "ATTEMPTS")]
    retry: Option<u32>,
    /// Which ends are tried again with --retry, joined by commas: failed, timed_out, out_of_memory.
    #[arg(long, value_name = "STATUS", value_delimiter = ',', requires = "retry")]
    retry_on: Vec<String>,
    /// Not to be started after this: a duration from now, or a time of RFC 3339.
    #[arg(long, value_name = "TIME", value_parser = point_in_time)]
    expires: Option<SystemTime>,
    /// A subject that gets the outcome as well.
    #[arg(long, value_name = "SUBJECT")]
    reply_to: Option<String>,
    /// An object that is fed to the program, by its name in the object store.
    #[arg(long, value_name = "NAME", conflicts_with = "interactive")]
    stdin_object: Option<String>,
}

/// The priorities by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Urgency {
    High,
    Normal,
    Low,
}

fn point_in_time(text: &str) -> Result<SystemTime, String> {
    let later = || SystemTime::now().checked_add(duration(text).ok()?);
    parse_rfc3339(text).or_else(later).ok_or_else(|| {
        "expected a duration such as 10m, or a time such as 2030-01-31T12:00:00Z".to_owned()
    })
}

impl RequestOptions {
    /// The job's id: the given one, or a new one.
    pub(super) fn job_id(&self) -> JobId {
        self.id.clone().unwrap_or_default()
    }

    /// Which of the subjects it goes to.
    pub(super) fn priority(&self) -> Priority {
        match self.priority {
            Urgency::High => Priority::High,
            Urgency::Normal => Priority::Normal,
            Urgency::Low => Priority::Low,
        }
    }

    /// The request without its input.
    ///
    /// # Errors
    /// A file cannot be read, or is not what it should be.
    pub(super) fn json(&self, id: &JobId) -> anyhow::Result<Map<String, Value>> {
        let mut env = BTreeMap::new();
        for path in &self.env_file {
            let what = || format!("--env-file {}", path.display());
            let text = std::fs::read_to_string(path).with_context(what)?;
            env.extend(variables(&text).map_err(anyhow::Error::msg).with_context(what)?);
        }
        env.extend(self.env.iter().cloned());
        let labels: BTreeMap<_, _> = self.labels.iter().cloned().collect();
        let retry = self.retry.map(|attempts| {
            let on = match self.retry_on.as_slice() {
                [] => vec!["failed".to_owned()],
                given => given.to_vec(),
            };
            json!({"max_attempts": attempts, "on": on})
        });
        let mut fields = Map::new();
        fields.insert("id".to_owned(), id.as_str().into());
        fields.insert("image_reference".to_owned(), self.image.as_str().into());
        let mut optional = |name: &str, value: Option<Value>| {
            fields.extend(value.map(|value| (name.to_owned(), value)));
        };
        optional("parameter", (!self.command.is_empty()).then(|| json!(self.command)));
        optional("env", (!env.is_empty()).then(|| json!(env)));
        optional("labels", (!labels.is_empty()).then(|| json!(labels)));
        optional("working_dir", self.workdir.as_deref().map(Value::from));
        optional("user", self.run_as.as_deref().map(Value::from));
        optional("timeout_ms", self.timeout.map(|t| json!(millis(t))));
        optional("memory_bytes", self.memory.map(Value::from));
        optional("cpus", self.cpus.map(Value::from));
        optional("pids", self.pids.map(Value::from));
        optional("network", self.network.as_deref().map(Value::from));
        optional("retry", retry);
        optional("expires_at", self.expires.map(|at| rfc3339(at).into()));
        optional("reply_to", self.reply_to.as_deref().map(Value::from));
        optional("stdin_object", self.stdin_object.as_deref().map(Value::from));
        Ok(fields)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[arg(short)]
        interactive: bool,
        #[command(flatten)]
        request: RequestOptions,
    }

    fn request(line: &str) -> Value {
        let words = std::iter::once("run").chain(line.split_whitespace());
        let line = Line::try_parse_from(words).unwrap();
        assert!(!line.interactive);
        Value::Object(line.request.json(&line.request.job_id()).unwrap())
    }

    #[test]
    fn options_become_fields() {
        let line = "busybox --id a-1 -e A=1 --env B=x=y -w /tmp -u 1:2 --timeout 1500ms --memory 64MiB \
            --cpus 0.5 --pids 9 --network none -l team=x --retry 3 --retry-on failed,timed_out \
            --expires 2030-01-31T12:00:00Z --reply-to team.x --stdin-object in/1 -- sh -c exit";
        let wanted = json!({
            "id": "a-1", "image_reference": "busybox", "parameter": ["sh", "-c", "exit"],
            "env": {"A": "1", "B": "x=y"}, "labels": {"team": "x"}, "working_dir": "/tmp",
            "user": "1:2", "timeout_ms": 1500, "memory_bytes": 64 << 20, "cpus": 0.5, "pids": 9,
            "network": "none", "retry": {"max_attempts": 3, "on": ["failed", "timed_out"]},
            "expires_at": "2030-01-31T12:00:00.000000Z", "reply_to": "team.x", "stdin_object": "in/1",
        });
        assert_eq!(request(line), wanted);
        assert_eq!(request("busybox --id b"), json!({"id": "b", "image_reference": "busybox"}));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for line in ["", "busybox sh", "busybox --id a.b", "busybox --memory much", "busybox -e =1"]
        {
            let words = std::iter::once("run").chain(line.split_whitespace());
            assert!(Line::try_parse_from(words).is_err(), "{line}");
        }
    }
}
