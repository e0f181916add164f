//! `cancel`: jobs that are no longer wanted.

use std::time::Duration;

use anyhow::{anyhow, bail};
use async_nats::RequestErrorKind;
use async_nats::client::Request;
use clap::Args;
use serde_json::Value;

use super::client::Link;
use super::options::ConnectOptions;
use super::{exit, print};
use crate::job::{JobId, printable};

/// How long daemons may take to answer: they write the wish down first.
const PATIENCE: Duration = Duration::from_secs(10);

/// The most of an answer's word that is shown, in bytes.
const MAX_WORD: usize = 64;

/// The arguments of `cancel`.
#[derive(Args, Debug)]
pub struct Cancel {
    /// Their ids.
    #[arg(required = true)]
    ids: Vec<JobId>,
    #[command(flatten)]
    connect: ConnectOptions,
}

/// What a daemon answered.
pub(super) struct Word {
    /// For people.
    pub(super) text: String,
    /// The job is being stopped, or will not start.
    pub(super) followed: bool,
    /// It does not run: its end comes when a worker meets it.
    pub(super) waits: bool,
}

impl Cancel {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        let link = Link::open(&self.connect, 64).await?;
        let mut code = exit::OK;
        for id in &self.ids {
            match ask(&link, id).await {
                Ok(Word { text, followed, .. }) => {
                    print::stdout(&format!("{text}\n"))?;
                    if !followed {
                        code = exit::FAILED;
                    }
                }
                Err(error) => {
                    print::note(format!("{id}: {error:#}"));
                    code = exit::FAILED;
                }
            }
        }
        Ok(code)
    }
}

/// Asks the daemons to stop a job. The first answer counts.
///
/// # Errors
/// Nobody answers, or the wish cannot be followed.
pub(super) async fn ask(link: &Link, id: &JobId) -> anyhow::Result<Word> {
    let request = Request::new().payload(id.to_string().into()).timeout(Some(PATIENCE));
    let answer = link.client.send_request(link.subjects.cancel.clone(), request).await;
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) if error.kind() == RequestErrorKind::NoResponders => bail!(
            "no daemon is there to cancel it, or under another prefix than {:?}; what is queued stays queued",
            link.subjects.prefix()
        ),
        Err(error) => {
            return Err(link
                .news
                .explain(format!("it is not known whether {id} is cancelled: {error}")));
        }
    };
    read(id, &answer.payload)
}

fn read(id: &JobId, answer: &[u8]) -> anyhow::Result<Word> {
    let answer: Value = serde_json::from_slice(answer)?;
    let text = |name: &str| Some(printable(answer.get(name)?.as_str()?, MAX_WORD));
    if let Some(error) = answer.get("error") {
        let part = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
        bail!("{}: {}", part("code"), part("message"));
    }
    let result = text("result");
    let waits = result.as_deref() == Some("will_not_start");
    let (text, followed) = match result.as_deref() {
        Some("stopping") => (format!("{id} is being stopped"), true),
        Some("will_not_start") => (format!("{id} does not run, and will not start"), true),
        Some("already_ended") => {
            (format!("{id} had ended already: {}", text("status").unwrap_or_default()), false)
        }
        _ => return Err(anyhow!("an answer that is none: {answer}")),
    };
    Ok(Word { text, followed, waits })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::by_id::{decode, refusal};
    use crate::protocol::cancel::{Answer, answer};

    #[test]
    fn the_daemons_answers_are_understood() {
        let id: JobId = "job-1".parse().unwrap();
        for (given, followed, wanted) in [
            (Answer::Stopping, true, "job-1 is being stopped"),
            (Answer::WillNotStart, true, "job-1 does not run, and will not start"),
            (Answer::AlreadyEnded("failed".into()), false, "job-1 had ended already: failed"),
        ] {
            let word = read(&id, &answer(&id, &given)).unwrap();
            assert_eq!((word.text.as_str(), word.followed), (wanted, followed));
        }
        let refused = read(&id, &refusal(&decode(b"").unwrap_err())).err().unwrap();
        assert!(refused.to_string().starts_with("request.invalid_field: id:"), "{refused}");
        assert!(read(&id, b"{}").is_err());
    }
}
