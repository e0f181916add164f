//! Whether JetStream is there, has room, and holds what the settings want.

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{Context, ContextBuilder, RequestErrorKind};
use indicatif::BinaryBytes;
use serde::Deserialize;

use super::nats::{Link, PATIENCE};
use crate::config::{Config, Delivery};
use crate::finding::{Finding, Tell};
use crate::source::jetstream::SPARE_DELIVERIES;
use crate::topology::{Present, SetupError, Sight, Topology};

const JETSTREAM: &str = "jetstream";
const STREAMS: &str = "streams";
const STORE: &str = "store";
/// From which part of a limit on there is a warning.
const NEARLY: f64 = 0.9;

/// Looks at it. Returns whether the daemon would use it.
pub(super) async fn examine(config: &Config, link: &Link, tell: Tell<'_>) -> bool {
    if config.delivery == Delivery::Core {
        tell(Finding::ok(JETSTREAM, "not asked for: DELIVERY is core"));
        return false;
    }
    let jetstream = ContextBuilder::new().timeout(PATIENCE).build(link.client.clone());
    let Some(account) = account(config, link, &jetstream, tell).await else { return false };
    tell(Finding::ok(JETSTREAM, account.describe()));
    let topology = Topology::new(
        &config.subjects,
        &config.queue_group,
        &config.streams,
        config.max_attempts + SPARE_DELIVERIES,
        config.object_limit > 0,
    );
    let sight = tokio::select! {
        sight = topology.look(&jetstream) => sight,
        complaint = link.complained_of(&["$JS.API.STREAM"]) => Err(SetupError::Unavailable(complaint)),
        complaint = link.complained_of(&["$JS.API.CONSUMER"]) => Err(SetupError::Unavailable(complaint)),
    };
    match sight {
        Ok(sight) => {
            streams(config, &account, &sight, tell);
            room(config, &account, &sight, tell);
        }
        Err(error) => {
            let denied = link.complaint_of(&["$JS.API"]).is_some();
            tell(Finding::fail(
                STREAMS,
                error.to_string(),
                if denied {
                    "allow this user to publish to $JS.API.STREAM.INFO.* and $JS.API.CONSUMER.INFO.*.*"
                } else {
                    "look at the server's log: a cluster may have no leader, a disk may hang"
                },
            ));
        }
    }
    true
}

/// What the account has of JetStream; nothing where it has none.
async fn account(
    config: &Config,
    link: &Link,
    jetstream: &Context,
    tell: Tell<'_>,
) -> Option<Account> {
    let question = serde_json::json!({});
    let answer = tokio::select! {
        answer = jetstream.request("INFO", &question) => answer,
        complaint = link.complained_of(&["$JS.API.INFO"]) => {
            absent(config, &complaint, "allow this user to publish to $JS.API.>", tell);
            return None;
        }
    };
    match answer {
        Ok(Account { error: Some(error), .. }) => {
            let none = [
                ErrorCode::JETSTREAM_NOT_ENABLED.0,
                ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT.0,
            ];
            if none.contains(&error.err_code) {
                absent(
                    config,
                    &format!("this account has none ({})", error.description),
                    "enable JetStream for this account, or log in to one that has it",
                    tell,
                );
            } else {
                tell(Finding::fail(
                    JETSTREAM,
                    format!("JetStream does not work: {}", error.description),
                    "look at the server's log: a cluster may have no leader",
                ));
            }
            None
        }
        Ok(account) => Some(account),
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            absent(
                config,
                "the server has none",
                "start the server with JetStream: nats-server -js -sd DIRECTORY, or jetstream { store_dir: … } in its configuration",
                tell,
            );
            None
        }
        Err(error) => {
            tell(Finding::fail(
                JETSTREAM,
                format!("JetStream does not answer: {error}"),
                "look at the server's log: a cluster may have no leader, a disk may hang",
            ));
            None
        }
    }
}

/// There is none: bad where it is asked for.
fn absent(config: &Config, why: &str, remedy: &str, tell: Tell<'_>) {
    tell(if config.delivery == Delivery::JetStream {
        Finding::fail(
            JETSTREAM,
            format!("{why}, and DELIVERY is jetstream"),
            format!("{remedy}; or set DELIVERY to auto or core"),
        )
    } else {
        Finding::warn(
            JETSTREAM,
            format!("{why}: requests that wait in a daemon are lost with it"),
            format!("{remedy}; or set DELIVERY to core if that is meant"),
        )
    });
}

/// Whether what is to be made still fits.
fn room(config: &Config, account: &Account, sight: &Sight, tell: Tell<'_>) {
    let needed: u64 = sight.missing.iter().map(|(_, bytes)| bytes).sum();
    let (kind, limit, used) = if config.streams.in_memory {
        let used = account.memory.max(account.reserved_memory);
        ("memory", account.limits.max_memory, used)
    } else {
        ("storage", account.limits.max_storage, account.storage.max(account.reserved_storage))
    };
    let fewer = "lower QUEUE_MAX_BYTES, RESULTS_MAX_BYTES, RECORDS_MAX_BYTES, OBJECTS_MAX_BYTES and DEAD_LETTERS_MAX_BYTES";
    if let Ok(limit) = u64::try_from(limit) {
        let (left, all) = (limit.saturating_sub(used), BinaryBytes(limit));
        let detail = format!("{} of {all} {kind} left to this account", BinaryBytes(left));
        tell(if needed > left {
            Finding::fail(
                STORE,
                format!("{detail}, and the streams to be made reserve {}", BinaryBytes(needed)),
                format!("raise the account's limit, or {fewer}"),
            )
        } else if used as f64 > NEARLY * limit as f64 {
            Finding::warn(STORE, detail, format!("raise the account's limit, or {fewer}"))
        } else {
            Finding::ok(STORE, detail)
        });
    } else {
        let place = if config.streams.in_memory { "machine" } else { "disk" };
        let held = held(&sight.present).map(|held| format!("; {held}")).unwrap_or_default();
        tell(Finding::not_checked(
            STORE,
            format!(
                "this account's {kind} has no limit, and the server does not tell what room its {place} has{held}"
            ),
        ));
    }
}

/// What the streams hold, and may come to hold; nothing where there are none.
fn held(present: &[Present]) -> Option<String> {
    let bounded = present.iter().filter_map(|stream| Some((stream.state.bytes, stream.max_bytes?)));
    let (held, most) = bounded.reduce(|(held, most), (bytes, bound)| {
        (held.saturating_add(bytes), most.saturating_add(bound))
    })?;
    let (held, most) = (BinaryBytes(held), BinaryBytes(most));
    Some(format!("the streams hold {held} of the {most} that they may"))
}

/// Whether as many streams as are to be made still may.
fn number(account: &Account, sight: &Sight, tell: Tell<'_>) {
    let more = i64::try_from(sight.missing.len()).unwrap_or(i64::MAX);
    let (has, most) = (account.streams, account.limits.max_streams);
    if most >= 0 && has.saturating_add(more) > most {
        tell(Finding::fail(
            STREAMS,
            format!("the account has {has} of {most} streams, and {more} are to be made"),
            "raise the account's limit of streams, or delete some that are not needed",
        ));
    }
}

fn streams(config: &Config, account: &Account, sight: &Sight, tell: Tell<'_>) {
    number(account, sight, tell);
    for fault in &sight.faults {
        tell(Finding::fail(STREAMS, &fault.what, &fault.remedy));
    }
    let queue = sight.present.iter().find(|stream| stream.name.ends_with("_queue"));
    if let Some(Present { name, state, .. }) = queue {
        let part = |is: u64, most: u64| is as f64 / most.max(1) as f64;
        let full = part(state.messages, config.streams.queue_max_messages)
            .max(part(state.bytes, config.streams.queue_max_bytes));
        if full > NEARLY {
            tell(Finding::warn(
                STREAMS,
                format!(
                    "stream {name}: {:.0} % full, with {} requests",
                    full * 100.0,
                    state.messages
                ),
                "add instances or slots; or raise QUEUE_MAX_MESSAGES and QUEUE_MAX_BYTES in the settings and of the stream",
            ));
        }
    }
    if sight.faults.is_empty() {
        let detail = match (sight.present.len(), sight.missing.len()) {
            (0, missing) => format!("none yet; the daemon makes {missing}"),
            (there, 0) => format!("{there}, as the settings want them"),
            (there, missing) => {
                format!("{there}, as the settings want them; the daemon makes {missing} more")
            }
        };
        tell(Finding::ok(STREAMS, detail));
    }
}

/// Of an account's state, what matters here. Older servers leave some of it out.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Account {
    error: Option<ApiError>,
    memory: u64,
    storage: u64,
    reserved_memory: u64,
    reserved_storage: u64,
    streams: i64,
    limits: Limits,
}

#[derive(Deserialize)]
#[serde(default)]
struct Limits {
    max_memory: i64,
    max_storage: i64,
    max_streams: i64,
}

impl Default for Limits {
    /// None are known.
    fn default() -> Self {
        Self { max_memory: -1, max_storage: -1, max_streams: -1 }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ApiError {
    err_code: u64,
    description: String,
}

impl Account {
    fn describe(&self) -> String {
        let used = BinaryBytes(self.storage);
        format!("this account has it, with {} streams and {used} in files", self.streams)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::finding::Status;

    fn found(account: &str, missing: u64) -> Vec<Finding> {
        let config = Config::from_vars(std::iter::empty()).unwrap();
        let account: Account = serde_json::from_str(account).unwrap();
        let missing = vec![("functions_queue".to_owned(), missing)];
        let sight = Sight { missing, ..Sight::default() };
        let mut all = Vec::new();
        let mut tell = |finding| all.push(finding);
        room(&config, &account, &sight, &mut tell);
        number(&account, &sight, &mut tell);
        all
    }

    #[test]
    fn what_an_account_has_left_is_told() {
        const GIB: u64 = 1 << 30;
        // As older servers answer, and as newer ones.
        for (account, missing, wanted) in [
            (r#"{"limits": {"max_storage": -1}}"#, GIB, Status::NotChecked),
            (r#"{"storage": 7, "limits": {"max_storage": 2147483648}}"#, GIB, Status::Ok),
            (r#"{"limits": {"max_storage": 1000}}"#, GIB, Status::Fail),
            (r#"{"storage": 950, "limits": {"max_storage": 1000}}"#, 0, Status::Warn),
            (r#"{"reserved_storage": 950, "limits": {"max_storage": 1000}}"#, 60, Status::Fail),
            (r#"{"memory": 950, "limits": {"max_memory": 1000}}"#, GIB, Status::NotChecked),
        ] {
            let all = found(account, missing);
            assert_eq!(all.first().map(|f| f.status), Some(wanted), "{account}: {all:?}");
        }
        let streams = found(r#"{"streams": 4, "limits": {"max_streams": 4}}"#, 0);
        assert_eq!(streams.last().map(|f| (f.check, f.status)), Some((STREAMS, Status::Fail)));
    }
}
