//! The AsyncAPI 3 document of all subjects.

use serde_json::{Map, Value, json};

use super::{Subjects, dead_letter, headers, schema};
use crate::job::Status;
use crate::trace;

/// A subject: its name in the document, its address, what it is for, and what travels there.
struct Channel<'a> {
    name: &'a str,
    address: String,
    description: &'a str,
    messages: &'a [&'a str],
}

/// The document, with the subjects under `prefix`.
#[must_use]
pub fn document(prefix: &str) -> Value {
    let subjects = Subjects::new(prefix);
    let one = |name, address: &str, description, messages| Channel {
        name,
        address: address.to_owned(),
        description,
        messages,
    };
    let channels = [
        one(
            "execute",
            &subjects.execute,
            "Requests. Where JetStream keeps them the reply says that the request is kept; else the reply is the outcome. `.high` and `.low` behind the subject are the queues of those priorities.",
            &["request"],
        ),
        one(
            "run",
            &subjects.run,
            "Requests whose reply is the outcome. Nothing keeps them.",
            &["request"],
        ),
        one(
            "outcomes",
            "{inbox}",
            "Where the reply to a request to run a function goes.",
            &["outcome"],
        ),
        one(
            "results",
            &subjects.results,
            "One message for each job: what the function printed, and in its headers what became of it.",
            &["result"],
        ),
        one("cancel", &subjects.cancel, "Jobs to stop, whether they run or wait.", &["reference"]),
        one(
            "cancellations",
            "{inbox}",
            "Where the reply to a cancellation goes.",
            &["cancellation", "refusal"],
        ),
        one("status", &subjects.status, "Jobs to tell of.", &["reference"]),
        one(
            "statuses",
            "{inbox}",
            "Where the reply to a question about a job goes.",
            &["event", "running", "refusal"],
        ),
        one(
            "events",
            &format!("{prefix}.events.{{id}}"),
            "A job's record at each change; the last one has its outcome.",
            &["event"],
        ),
        one(
            "stdout",
            &format!("{prefix}.logs.{{id}}.stdout"),
            "What a function prints to standard output, as it prints it.",
            &["output"],
        ),
        one(
            "stderr",
            &format!("{prefix}.logs.{{id}}.stderr"),
            "What a function prints to standard error, as it prints it.",
            &["output"],
        ),
        one(
            "dead_letters",
            &subjects.dead_letters,
            "Requests that could not be run, whole, with the reason in their headers.",
            &["dead_letter"],
        ),
    ];
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": env!("CARGO_PKG_NAME"),
            "version": env!("CARGO_PKG_VERSION"),
            "description": env!("CARGO_PKG_DESCRIPTION"),
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"nats": {"host": "localhost:4222", "protocol": "nats"}},
        "channels": channels.iter().map(Channel::item).collect::<Map<_, _>>(),
        "operations": operations(),
        "components": {"messages": messages()},
    })
}

impl Channel<'_> {
    fn item(&self) -> (String, Value) {
        let reference = |message: &&str| {
            ((*message).to_owned(), json!({"$ref": format!("#/components/messages/{message}")}))
        };
        let mut item = json!({
            "address": self.address,
            "description": self.description,
            "messages": self.messages.iter().map(reference).collect::<Map<_, _>>(),
        });
        let parameters = [("id", "The job's id."), ("inbox", "The reply subject of the request.")];
        let parameters: Map<_, _> = parameters
            .into_iter()
            .filter(|(name, _)| self.address.contains(&format!("{{{name}}}")))
            .map(|(name, description)| (name.to_owned(), json!({"description": description})))
            .collect();
        if !parameters.is_empty() {
            item["parameters"] = parameters.into();
        }
        (self.name.to_owned(), item)
    }
}

/// What the worker does on each subject: `receive` is from callers, `send` is to them.
fn operations() -> Value {
    let channel = |name: &str| json!({"$ref": format!("#/channels/{name}")});
    let answered = |name: &str, reply: &str, summary: &str| {
        json!({
            "action": "receive",
            "summary": summary,
            "channel": channel(name),
            "reply": {
                "address": {"location": "$message.header#/reply", "description": "NATS' own reply subject"},
                "channel": channel(reply),
            },
        })
    };
    let sent = |name: &str, summary: &str| json!({"action": "send", "summary": summary, "channel": channel(name)});
    json!({
        "execute": answered("execute", "outcomes", "Runs a function"),
        "run": answered("run", "outcomes", "Runs a function for whoever waits"),
        "cancel": answered("cancel", "cancellations", "Cancels a job"),
        "status": answered("status", "statuses", "Says what becomes of a job"),
        "publishResult": sent("results", "Says what a function printed and how it ended"),
        "publishEvent": sent("events", "Says what becomes of a job"),
        "publishStdout": sent("stdout", "Passes on what a function prints"),
        "publishStderr": sent("stderr", "Passes on what a function prints"),
        "publishDeadLetter": sent("dead_letters", "Gives up a request"),
    })
}

fn messages() -> Value {
    let text = json!({"type": "string"});
    let number = json!({"type": "string", "pattern": "^[0-9]+$"});
    let time = json!({"type": "string", "format": "date-time"});
    let truth = json!({"type": "string", "enum": ["true", "false"]});
    let statuses = Status::ALL.map(Status::as_str);
    let bytes = |title: &str, headers: Value| {
        json!({
            "title": title,
            "contentType": "application/octet-stream",
            "headers": {"type": "object", "properties": headers},
            "payload": {"type": "string", "format": "binary"},
        })
    };
    let mut request = message("A request to run a function", schema::request());
    request["examples"] = json!([{
        "name": "hello",
        "summary": "Prints a greeting",
        "payload": {
            "image_reference": "python:3.11-slim",
            "parameter": "python3 -c \"print('Hello, World!')\"",
        },
    }, {
        "name": "limits",
        "summary": "An id of the caller's own, standard input, and limits",
        "payload": {
            "id": "report-7",
            "image_reference": "python:3.11-slim",
            "parameter": ["python3", "-c", "import sys; print(sys.stdin.read().upper())"],
            "stdin": "hello",
            "env": {"LANG": "C.UTF-8"},
            "timeout_ms": 10000,
            "memory_bytes": 67108864,
            "priority": "high",
            "retry": {"max_attempts": 2, "on": ["timed_out"]},
        },
    }]);
    let mut reference = message("A request about one job", schema::reference());
    reference["examples"] = json!([{"name": "job", "payload": {"id": "report-7"}}]);
    json!({
        "request": request,
        "reference": reference,
        "outcome": message("What became of a job", schema::outcome()),
        "event": message("Where a job is", schema::event()),
        "cancellation": message("What a cancellation did", schema::cancellation()),
        "running": message("A job that runs and has no record", schema::running()),
        "refusal": message("Why a request was not followed", schema::refusal()),
        "result": bytes("What a function printed", json!({
            headers::JOB_ID: text, headers::JOB_STATUS: {"type": "string", "enum": statuses},
            headers::JOB_EXIT_CODE: number, headers::JOB_IMAGE: text, headers::JOB_ERROR: text,
            headers::JOB_ATTEMPT: number, headers::JOB_DURATION_MS: number,
            headers::JOB_OUTPUT_TRUNCATED: truth, headers::JOB_STDOUT_OBJECT: text,
            headers::JOB_STDERR_OBJECT: text, headers::NATS_MSG_ID: text,
            trace::TRACEPARENT: text, trace::TRACESTATE: text,
        })),
        "output": bytes("A piece of what a function prints", json!({
            headers::JOB_ID: text, headers::JOB_ATTEMPT: number, headers::SEQ: number,
            headers::OFFSET: number, headers::END: truth, headers::DROPPED_BYTES: number,
        })),
        "dead_letter": bytes("A request that could not be run", json!({
            headers::NATS_MSG_ID: text, headers::JOB_ID: text, headers::JOB_IMAGE: text,
            dead_letter::REASON: text, dead_letter::MESSAGE: text, dead_letter::ATTEMPTS: number,
            dead_letter::SUBJECT: text, dead_letter::QUEUED_AT: time, dead_letter::AT: time,
            dead_letter::HEADERS_DROPPED: truth, dead_letter::TRUNCATED: truth,
        })),
    })
}

fn message(title: &str, payload: Value) -> Value {
    json!({"title": title, "payload": payload})
}
