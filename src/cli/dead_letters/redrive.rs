//! Handing requests in again.

use async_nats::HeaderMap;
use serde_json::{Map, Value};

use super::letter::{Letter, Letters};
use super::{Chosen, report_missing};
use crate::cli::client::Link;
use crate::cli::hand_in::{self, Mode};
use crate::cli::{exit, print};
use crate::job::{JobId, Priority};
use crate::protocol::Subjects;

/// The header that says that the request is an object.
const REQUEST_OBJECT: &str = "Job-Request-Object";

/// Hands the chosen ones in, one after the other.
pub(super) async fn run(link: &Link, chosen: &Chosen, keep: bool) -> anyhow::Result<u8> {
    let mut letters = Letters::open(link, "dead-letters redrive").await?;
    let (mut found, mut code) = (Vec::new(), exit::OK);
    // What is handed in again can fail again, and is then a letter of its own: not of this round.
    let last = letters.last();
    while let Some(letter) = letters.next().await? {
        if letter.sequence() > last {
            break;
        }
        if !chosen.takes(&letter) {
            continue;
        }
        found.push(letter.id().to_owned());
        match again(link, &letter).await {
            Ok(id) => {
                print::stdout(&format!("{} -> {id}\n", letter.id()))?;
                if !keep {
                    letters.remove(&letter).await?;
                }
            }
            Err(error) => {
                print::note(format!("{}: {error:#}", letter.id()));
                code = exit::FAILED;
            }
        }
    }
    Ok(code.max(report_missing(chosen, &found)))
}

/// Hands a request in, and returns its new id once a stream has it.
async fn again(link: &Link, letter: &Letter) -> anyhow::Result<JobId> {
    let id = JobId::new();
    let request = renewed(letter, &id).map_err(anyhow::Error::msg)?;
    let payload = serde_json::to_vec(&request)?.into();
    let subject = subject_of(letter, &link.subjects);
    let inbox = link.client.new_inbox();
    let mut sent = hand_in::send(link, &subject, inbox, HeaderMap::new(), payload).await?;
    sent.accepted(link, Mode::Stream).await?;
    Ok(id)
}

/// The request under another id: its own has ended, and would run nothing.
fn renewed(letter: &Letter, id: &JobId) -> Result<Map<String, Value>, String> {
    if !letter.header(REQUEST_OBJECT).is_empty() {
        return Err("its request is an object; hand that in under another id".to_owned());
    }
    if letter.truncated() {
        return Err("the end of its request is missing".to_owned());
    }
    let Ok(Value::Object(mut request)) = serde_json::from_slice(&letter.body()) else {
        return Err("its request is no JSON object, and would fail again".to_owned());
    };
    request.insert("id".to_owned(), id.as_str().into());
    // Whoever waited there is gone, and the time it was to start in is over.
    let inbox = |subject: &Value| subject.as_str().is_some_and(|s| s.starts_with("_INBOX."));
    if request.get("reply_to").is_some_and(inbox) {
        request.remove("reply_to");
    }
    request.remove("expires_at");
    Ok(request)
}

/// Where it came, if requests can be kept there.
fn subject_of(letter: &Letter, subjects: &Subjects) -> String {
    let known = Priority::ALL.map(|priority| subjects.execute_at(priority));
    let came = letter.subject();
    known.into_iter().find(|known| known == came).unwrap_or_else(|| subjects.execute.clone())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    #[test]
    fn a_request_gets_another_id_and_nothing_else_that_matters() {
        let body = r#"{"image_reference": "a", "id": "old", "reply_to": "_INBOX.x",
            "expires_at": "2020-01-01T00:00:00Z", "env": {"A": "1"}}"#;
        let id: JobId = "new".parse().unwrap();
        let wanted = json!({"image_reference": "a", "id": "new", "env": {"A": "1"}});
        assert_eq!(Value::Object(renewed(&Letter::of(&[], body), &id).unwrap()), wanted);
        let body = r#"{"reply_to": "team.replies"}"#;
        let kept = renewed(&Letter::of(&[], body), &id).unwrap();
        assert_eq!(kept["reply_to"], "team.replies");
    }

    #[test]
    fn what_would_fail_again_is_refused() {
        let id = JobId::new();
        for (headers, body) in [
            (&[][..], "no request"),
            (&[], "[]"),
            (&[("Dead-Letter-Truncated", "true")], "{}"),
            (&[("Job-Request-Object", "x")], "{}"),
        ] {
            assert!(renewed(&Letter::of(headers, body), &id).is_err(), "{headers:?} {body}");
        }
    }

    #[test]
    fn it_goes_where_it_came() {
        let subjects = Subjects::new("functions");
        for (came, wanted) in [
            ("functions.execute.low", "functions.execute.low"),
            ("functions.execute", "functions.execute"),
            ("functions.run", "functions.execute"),
            ("somewhere.else", "functions.execute"),
        ] {
            let letter = Letter::of(&[("Dead-Letter-Subject", came)], "{}");
            assert_eq!(subject_of(&letter, &subjects), wanted);
        }
    }
}
