//! What this NATS user may do. Nothing is published that anybody could take for a request or a job.

use async_nats::RequestErrorKind;
use async_nats::client::Request;
use serde::Deserialize;

use super::nats::{Echo, Link, PATIENCE, ms};
use crate::config::{Config, Delivery};
use crate::finding::{Finding, Tell};
use crate::job::Priority;
use crate::topology::Names;

/// Where a server says what the asking user may do; from 2.10 on.
const USER_INFO: &str = "$SYS.REQ.USER.INFO";
const SUBSCRIBE: &str = "subscribe";
const PUBLISH: &str = "publish";

/// Whether a message to an inbox of one's own comes back. Returns whether answers can be had.
pub(super) async fn inbox(config: &Config, link: &Link, tell: Tell<'_>) -> bool {
    const CHECK: &str = "inbox";
    match link.echo().await {
        Echo::Came(took) => {
            tell(Finding::ok(CHECK, format!("a message to itself came back in {}", ms(took))));
            true
        }
        Echo::Refused(complaint) if complaint.to_lowercase().contains("publish") => {
            tell(Finding::warn(
                CHECK,
                format!("{complaint}: outcomes are published without a confirmation"),
                "allow this user to publish to _INBOX.>",
            ));
            true
        }
        Echo::Refused(complaint) => {
            let remedy = "allow this user to subscribe to _INBOX.>";
            tell(if config.delivery == Delivery::Core {
                let detail = format!("{complaint}: outcomes are published without a confirmation");
                Finding::warn(CHECK, detail, remedy)
            } else {
                Finding::fail(CHECK, format!("{complaint}: JetStream cannot answer"), remedy)
            });
            false
        }
        Echo::Silence => {
            tell(Finding::fail(
                CHECK,
                format!(
                    "a message to itself did not come back within {}",
                    humantime::format_duration(PATIENCE)
                ),
                "look at the server: it accepts connections, and delivers nothing",
            ));
            false
        }
    }
}

/// Whether the daemon may subscribe to what it listens to.
///
/// Each subscription is ended in the same breath, and is in no queue group: it takes nothing from
/// anybody.
pub(super) async fn subscribe(config: &Config, link: &Link, durable: bool, tell: Tell<'_>) {
    let subjects = &config.subjects;
    let mut needed = vec![subjects.run.clone(), subjects.cancel.clone(), subjects.status.clone()];
    if !durable {
        needed.extend(Priority::ALL.iter().map(|priority| subjects.execute_at(*priority)));
    }
    let service = format!("$SRV.PING.{}", crate::service::NAME);
    for subject in needed.iter().chain([&service]) {
        if let Ok(mut subscription) = link.client.subscribe(subject.clone()).await {
            // What fails here fails in the echo as well.
            let _ = subscription.unsubscribe().await;
        }
    }
    if let Echo::Silence = link.echo().await {
        tell(Finding::not_checked(SUBSCRIBE, "the server does not answer"));
        return;
    }
    let refused = |subject: &String| {
        link.complaint_of(&["Subscription to", &format!("\"{subject}\"")]).is_some()
    };
    let denied: Vec<&str> = needed.iter().filter(|s| refused(s)).map(String::as_str).collect();
    if !denied.is_empty() {
        let denied = denied.join(", ");
        tell(Finding::fail(
            SUBSCRIBE,
            format!("the server does not let this user subscribe to {denied}"),
            format!("allow this user to subscribe to {denied}, in the server's permissions"),
        ));
    } else if refused(&service) {
        tell(Finding::warn(
            SUBSCRIBE,
            "the server does not let this user subscribe to $SRV.>: the daemon cannot be discovered",
            "allow this user to subscribe to $SRV.>",
        ));
    } else {
        tell(Finding::ok(SUBSCRIBE, format!("may listen to {}", needed.join(", "))));
    }
}

/// Whether the daemon may publish what it has to say. To try would be to say it; so the server is
/// asked.
pub(super) async fn publish(config: &Config, link: &Link, durable: bool, tell: Tell<'_>) {
    let request = Request::new().payload("".into()).timeout(Some(PATIENCE));
    let answer = tokio::select! {
        answer = link.client.send_request(USER_INFO, request) => answer,
        _ = link.complained_of(&[USER_INFO]) => {
            tell(Finding::not_checked(PUBLISH, "this user may not ask the server what it may do")
                .with_remedy(format!("allow this user to publish to {USER_INFO} to have it checked")));
            return;
        }
    };
    let answer = match answer {
        Ok(answer) => serde_json::from_slice::<UserInfo>(&answer.payload).ok(),
        Err(error) if error.kind() == RequestErrorKind::NoResponders => None,
        Err(error) => {
            tell(Finding::not_checked(PUBLISH, format!("no answer to {USER_INFO}: {error}")));
            return;
        }
    };
    let Some(UserInfo { data: Some(user) }) = answer else {
        tell(
            Finding::not_checked(PUBLISH, "the server does not tell what a user may do")
                .with_remedy("have a nats-server of 2.10 or later to have it checked"),
        );
        return;
    };
    let rights = user.permissions.and_then(|permissions| permissions.publish).unwrap_or_default();
    let denied: Vec<String> = published(config, durable)
        .into_iter()
        .filter(|subject| !rights.allows(&subject.replace(['>', '*'], "x")))
        .collect();
    tell(if denied.is_empty() {
        Finding::ok(PUBLISH, "may publish all that the daemon publishes")
    } else {
        let denied = denied.join(", ");
        Finding::fail(
            PUBLISH,
            format!("the server does not let this user publish to {denied}"),
            format!("allow this user to publish to {denied}, in the server's permissions"),
        )
    });
}

/// What the daemon publishes to.
fn published(config: &Config, durable: bool) -> Vec<String> {
    let subjects = &config.subjects;
    let prefix = subjects.prefix();
    let mut all = vec![
        subjects.results.clone(),
        subjects.dead_letters.clone(),
        format!("{prefix}.events.*"),
        format!("{prefix}.logs.*.*"),
    ];
    if !durable {
        return all;
    }
    let Names { queue, results, dead_letters, advisories, jobs, objects, .. } =
        &Names::new(subjects, &config.queue_group);
    let (jobs_stream, objects_stream) = (format!("KV_{jobs}"), format!("OBJ_{objects}"));
    all.extend([subjects.execute.clone(), subjects.execute_at(Priority::Low)]);
    all.extend(["$JS.API.INFO".to_owned(), format!("$KV.{jobs}.*")]);
    for stream in [queue, results, dead_letters, advisories, &jobs_stream] {
        all.extend(["INFO", "CREATE"].map(|verb| format!("$JS.API.STREAM.{verb}.{stream}")));
    }
    for stream in [queue, advisories] {
        let api = |what: &str| format!("$JS.API.CONSUMER.{what}.{stream}");
        all.push(format!("{}.*", api("INFO")));
        all.push(format!("{}.>", api("CREATE")));
        all.push(format!("{}.*", api("MSG.NEXT")));
        all.push(format!("$JS.ACK.{stream}.>"));
    }
    all.push(format!("$JS.API.DIRECT.GET.{queue}"));
    all.extend(["GET", "DELETE"].map(|verb| format!("$JS.API.STREAM.MSG.{verb}.{queue}")));
    all.push(format!("$JS.API.DIRECT.GET.{jobs_stream}.>"));
    if config.object_limit > 0 {
        let verbs = ["INFO", "CREATE", "PURGE"];
        all.extend(verbs.map(|verb| format!("$JS.API.STREAM.{verb}.{objects_stream}")));
        all.push(format!("$JS.API.DIRECT.GET.{objects_stream}.>"));
        all.push(format!("$JS.API.CONSUMER.CREATE.{objects_stream}.>"));
        all.push(format!("$O.{objects}.>"));
    }
    all
}

/// Of the server's answer, what matters here.
#[derive(Deserialize)]
struct UserInfo {
    data: Option<User>,
}

#[derive(Deserialize)]
struct User {
    permissions: Option<Permissions>,
}

#[derive(Deserialize)]
struct Permissions {
    publish: Option<Rights>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Rights {
    allow: Vec<String>,
    deny: Vec<String>,
}

impl Rights {
    /// Without a list of what is allowed all is that is not denied.
    fn allows(&self, subject: &str) -> bool {
        let covered = |patterns: &[String]| patterns.iter().any(|p| covers(p, subject));
        (self.allow.is_empty() || covered(&self.allow)) && !covered(&self.deny)
    }
}

/// Whether a subject with wildcards covers one without.
fn covers(pattern: &str, subject: &str) -> bool {
    let mut subject = subject.split('.');
    for token in pattern.split('.') {
        match (token, subject.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (token, Some(given)) if token == given => {}
            _ => return false,
        }
    }
    subject.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_cover() {
        for (pattern, subject, wanted) in [
            ("a.b", "a.b", true),
            ("a.*", "a.b", true),
            ("a.>", "a.b.c", true),
            (">", "a", true),
            ("a.>", "a", false),
            ("a.*", "a.b.c", false),
            ("a.b.c", "a.b", false),
            ("a.b", "a.c", false),
        ] {
            assert_eq!(covers(pattern, subject), wanted, "{pattern} {subject}");
        }
    }

    #[test]
    fn what_is_denied_is_not_allowed() {
        let rights = |allow: &[&str], deny: &[&str]| Rights {
            allow: allow.iter().map(ToString::to_string).collect(),
            deny: deny.iter().map(ToString::to_string).collect(),
        };
        assert!(rights(&[], &[]).allows("a.b"));
        assert!(!rights(&[], &["a.*"]).allows("a.b"));
        assert!(!rights(&["a.>"], &["a.b"]).allows("a.b"));
        assert!(rights(&["a.>"], &["a.b"]).allows("a.c"));
        assert!(!rights(&["c"], &[]).allows("a.c"));
    }
}
