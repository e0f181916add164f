//! A NATS server, a daemon and an observer: what most tests happen in.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::{Client, HeaderMap, Message};
use futures::StreamExt;
use serde_json::{Value, json};

use super::daemon::{Daemon, Settings};
use super::engine::{Engine, job_of};
use super::images::Image;
use super::jetstream::{Events, Ledger};
use super::nats::{NatsOptions, NatsServer, NatsVersion, round_trip};
use super::results::{Results, header};
use super::specification;
use super::wait::{PATIENCE, within};
use super::warmth::{self, Warmth};

/// One job's end, as its requester and as a subscriber of the results saw it.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) outcome: Value,
    pub(crate) result: Message,
}

impl Ended {
    pub(crate) fn status(&self) -> &str {
        self.outcome["status"].as_str().unwrap_or_default()
    }

    pub(crate) fn code(&self) -> &str {
        self.outcome["error"]["code"].as_str().unwrap_or_default()
    }

    pub(crate) fn exit_code(&self) -> Option<i64> {
        self.outcome["exit_code"].as_i64()
    }

    /// The program's standard output, decoded.
    pub(crate) fn stdout(&self) -> Vec<u8> {
        decoded(&self.outcome, "stdout")
    }

    pub(crate) fn stderr(&self) -> Vec<u8> {
        decoded(&self.outcome, "stderr")
    }

    /// The standard output of a program that prints text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.stdout()).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        header(&self.result, name)
    }
}

/// The bytes of an outcome's stream `name`.
pub(crate) fn decoded(outcome: &Value, name: &str) -> Vec<u8> {
    use base64::Engine as _;
    let text = outcome[name].as_str().unwrap_or_default();
    match outcome[format!("{name}_encoding")].as_str() {
        Some("base64") => base64::engine::general_purpose::STANDARD.decode(text).unwrap(),
        Some("utf8") | None => text.as_bytes().to_vec(),
        Some(other) => panic!("an encoding nobody promised: {other}"),
    }
}

/// The fields are dropped in this order: the daemon goes before what it needs.
pub(crate) struct World {
    pub(crate) daemon: Daemon,
    pub(crate) results: Results,
    /// What the streams hold, in a durable world.
    pub(crate) ledger: Ledger,
    pub(crate) client: Client,
    pub(crate) nats: NatsServer,
    pub(crate) engine: Engine,
    pub(crate) settings: Settings,
    /// The name of the busybox image.
    pub(crate) image: String,
    /// Whether its jobs should start in containers that wait for them, and how many have.
    warmth: Warmth,
    /// A stream keeps the requests.
    durable: bool,
    prefix: String,
    counter: AtomicUsize,
}

impl World {
    /// A daemon with the given settings beside the defaults.
    pub(crate) async fn start(settings: &[(&str, &str)]) -> Self {
        Self::with(NatsOptions::default(), Engine::shared().await, settings).await
    }

    pub(crate) async fn with(nats: NatsOptions, engine: Engine, settings: &[(&str, &str)]) -> Self {
        let image = engine.image(Image::Busybox).await;
        Self::on(NatsServer::with(nats).await, engine, image, settings).await
    }

    /// Where a stream keeps the requests: a daemon that takes them from there, with the given
    /// settings beside the defaults.
    pub(crate) async fn durable(settings: &[(&str, &str)]) -> Self {
        let nats = NatsOptions::durable(NatsVersion::Installed);
        Self::durable_with(nats, Engine::shared().await, settings).await
    }

    /// As [`durable`](Self::durable), on such a server and that engine.
    pub(crate) async fn durable_with(
        nats: NatsOptions,
        engine: Engine,
        settings: &[(&str, &str)],
    ) -> Self {
        let settings = [&[("DELIVERY", "jetstream")], settings].concat();
        Self::with(NatsOptions { jetstream: true, ..nats }, engine, &settings).await
    }

    /// As the others, on servers that exist already.
    pub(crate) async fn on(
        nats: NatsServer,
        engine: Engine,
        image: String,
        settings: &[(&str, &str)],
    ) -> Self {
        let client = nats.client().await;
        let pool = warmth::settings(&image);
        let pool: Vec<_> = pool.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let settings = Settings::new().nats(&nats).engine(&engine).set_all(&pool).set_all(settings);
        let results = Results::subscribe(&client, "functions.results").await;
        let mut daemon = Daemon::spawn(&settings);
        daemon.wait_ready().await;
        let prefix = format!("t{}", super::unique());
        Self {
            daemon,
            results,
            ledger: Ledger::new(&client),
            client,
            nats,
            engine,
            warmth: Warmth::of(&settings, &image),
            durable: settings.get("DELIVERY") == Some("jetstream"),
            settings,
            image,
            prefix,
            counter: AtomicUsize::new(0),
        }
    }

    /// A job id of this world's.
    pub(crate) fn id(&self) -> String {
        format!("{}-{}", self.prefix, self.counter.fetch_add(1, Ordering::SeqCst))
    }

    /// `request` with an id and the busybox image, unless it has its own.
    pub(crate) fn complete(&self, mut request: Value) -> (String, Value) {
        if request.get("id").is_none() {
            request["id"] = json!(self.id());
        }
        if request.get("image_reference").is_none() {
            request["image_reference"] = json!(self.image);
        }
        (request["id"].as_str().unwrap_or_default().to_string(), request)
    }

    /// Publishes a request and returns its id, once the server has it; in a durable world, once the
    /// stream has it.
    pub(crate) async fn submit(&self, request: Value) -> String {
        let (id, request) = self.complete(request);
        Box::pin(self.warmth.wait_for(self, &request)).await;
        if self.durable {
            self.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
            return id;
        }
        self.client.publish("functions.execute", request.to_string().into()).await.unwrap();
        round_trip(&self.client).await;
        id
    }

    /// Publishes a request and waits for its outcome and its result, which must agree.
    pub(crate) async fn execute(&self, request: Value) -> Ended {
        let (id, request) = self.complete(request);
        // On the heap: tests make many at once, on stacks that are small.
        let job = Box::pin(self.execute_complete(id, request.clone()));
        Box::pin(self.warmth.run(self, &request, job)).await
    }

    async fn execute_complete(&self, id: String, request: Value) -> Ended {
        if self.durable {
            return self.execute_durably(id, request).await;
        }
        let ended = self.execute_raw(request.to_string().into(), HeaderMap::new()).await;
        assert_eq!(ended.outcome["id"], json!(id));
        ended
    }

    /// The answer to a request that a stream keeps is the server's: the outcome goes to an address
    /// in the request. It must be the recorded one.
    async fn execute_durably(&self, id: String, mut request: Value) -> Ended {
        let reply_to = self.client.new_inbox();
        let mut answers = self.client.subscribe(reply_to.clone()).await.unwrap();
        request["reply_to"] = json!(reply_to);
        self.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
        let answer = within("an outcome at reply_to", PATIENCE, answers.next()).await.unwrap();
        let ended = self.ended(&id).await;
        let outcome: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(outcome, ended.outcome, "what was sent, and what was recorded");
        ended
    }

    /// In a durable world, waits for the end of a job that was submitted. The result that the stream
    /// has and the outcome that the record has must agree.
    pub(crate) async fn ended(&self, id: &str) -> Ended {
        let result = self.ledger.result(id).await;
        let outcome = self.ledger.outcome(id).await;
        let ended = Ended { outcome, result };
        agree(&ended);
        ended
    }

    /// What is told of the job `id` from now on.
    pub(crate) async fn events(&self, id: &str) -> Events {
        Events::of(&self.client, id).await
    }

    /// As [`execute`](Self::execute), with a payload taken as it is.
    pub(crate) async fn execute_raw(&self, payload: bytes::Bytes, headers: HeaderMap) -> Ended {
        if self.durable {
            let offered = self.ledger.offer("functions.execute", payload, headers).await;
            let id = self.ledger.job_of(offered.unwrap().sequence).await;
            return self.ended(&id).await;
        }
        let reply = self.client.new_inbox();
        let mut answers = self.client.subscribe(reply.clone()).await.unwrap();
        self.client
            .publish_with_reply_and_headers("functions.execute", reply, headers, payload)
            .await
            .unwrap();
        let answer =
            within("an outcome at the reply subject", PATIENCE, answers.next()).await.unwrap();
        let outcome: Value = serde_json::from_slice(&answer.payload).unwrap();
        let id = outcome["id"].as_str().expect("every outcome has an id");
        let result = self.results.wait_for(id).await;
        let ended = Ended { outcome, result };
        agree(&ended);
        ended
    }

    /// Calls `functions.run`.
    pub(crate) async fn run(&self, request: Value) -> Value {
        let (_, request) = self.complete(request);
        let job = Box::pin(self.run_complete(&request));
        Box::pin(self.warmth.run(self, &request, job)).await
    }

    /// As [`run`](Self::run), with a request taken as it is.
    pub(crate) async fn run_complete(&self, request: &Value) -> Value {
        let answer = within(
            "an answer to functions.run",
            PATIENCE,
            self.client.request("functions.run", request.to_string().into()),
        )
        .await
        .unwrap();
        let outcome = serde_json::from_slice(&answer.payload).unwrap();
        specification::assert_outcome(&outcome);
        outcome
    }

    /// Starts a job that runs until [`release`](Self::release), and waits until its container
    /// does.
    pub(crate) async fn hold(&self) -> Held {
        self.hold_with(json!({})).await
    }

    /// As [`hold`](Self::hold), with more fields in the request.
    pub(crate) async fn hold_with(&self, fields: Value) -> Held {
        let id = self.submit(held(fields)).await;
        let container = self.engine.running(&id).await;
        Held { id, container }
    }

    /// Lets a held job end by itself, with success.
    pub(crate) async fn release(&self, held: &Held) {
        // The command may come before the program it is for has started: the file waits for it.
        self.engine.exec(&held.container, &["touch", "/tmp/go"]).await;
    }

    /// The containers of this world's jobs, running or not.
    pub(crate) async fn containers(&self) -> Vec<bollard::models::ContainerSummary> {
        let mut all = self.engine.containers().await;
        all.retain(|container| job_of(container).is_some_and(|id| id.starts_with(&self.prefix)));
        all
    }

    /// Waits until nothing is left of this world's jobs.
    pub(crate) async fn clean(&self) {
        super::wait::eventually("no container of this test is left", || async {
            let rests = self.warmth.rests(self.idle().await.len());
            rests && self.containers().await.is_empty()
        })
        .await;
    }

    /// The containers that wait for this world's jobs.
    pub(crate) async fn idle(&self) -> Vec<bollard::models::ContainerSummary> {
        self.engine.idle(self.daemon.pid()).await
    }

    /// Asserts that the daemon still does its work, with all of its slots.
    pub(crate) async fn works(&self, slots: usize) {
        let jobs = (0..slots).map(|_| self.execute(json!({"parameter": "echo still here"})));
        for ended in futures::future::join_all(jobs).await {
            assert_eq!(ended.status(), "succeeded", "{:?}", ended.outcome);
            assert_eq!(ended.text(), "still here\n");
        }
    }

    /// How many results each job of this world has had.
    pub(crate) fn tally(&self) -> HashMap<String, usize> {
        let mut tally = HashMap::new();
        for message in self.results.all() {
            *tally.entry(header(&message, "Job-Id").unwrap_or_default()).or_default() += 1;
        }
        tally.retain(|id, _| !warmth::is_primer(id));
        tally
    }

    /// Ends this world's daemon without ado and starts another with the same settings.
    pub(crate) async fn crash_and_restart(&mut self) {
        self.daemon.crash().await;
        self.daemon = Daemon::spawn(&self.settings);
        self.daemon.wait_ready().await;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Before the containers, or it would start further ones.
        self.daemon.signal(super::process::Signal::KILL);
        let prefix = self.prefix.clone();
        self.engine.remove_containers_blocking(move |container| {
            job_of(container).is_some_and(|id| id.starts_with(&prefix))
        });
    }
}

/// A job that runs until it is told to end.
pub(crate) struct Held {
    pub(crate) id: String,
    pub(crate) container: String,
}

/// The request of a job that runs until somebody makes /tmp/go.
pub(crate) fn held(mut fields: Value) -> Value {
    fields["parameter"] =
        json!(["sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; echo released"]);
    fields
}

/// Waits until a daemon answers, whether it can run anything or not.
pub(crate) async fn listening(client: &Client) {
    super::wait::eventually("somebody takes requests", || async {
        let asked = client.request("functions.run", "no request, just a knock".into()).await;
        asked.is_ok()
    })
    .await;
}

/// How long a test may wait for many jobs.
pub(crate) const MANY: Duration = Duration::from_secs(300);

/// The outcome and the result say the same.
fn agree(ended: &Ended) {
    let outcome = &ended.outcome;
    specification::assert_outcome(outcome);
    let text = |value: &Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    for (name, value) in [
        ("Job-Id", &outcome["id"]),
        ("Nats-Msg-Id", &outcome["id"]),
        ("Job-Status", &outcome["status"]),
        ("Job-Exit-Code", &outcome["exit_code"]),
        ("Job-Error", &outcome["error"]["code"]),
    ] {
        assert_eq!(ended.header(name), text(value), "{name} and the outcome differ: {outcome}");
    }
    // What is no image's name can hold what no header can.
    if ended.status() != "rejected" {
        assert_eq!(ended.header("Job-Image"), text(&outcome["image"]), "{outcome}");
    }
    let known =
        ["succeeded", "failed", "timed_out", "out_of_memory", "cancelled", "rejected", "error"];
    assert!(known.contains(&ended.status()), "a status nobody promised: {outcome}");
    let ran = outcome.get("exit_code").is_some_and(|code| !code.is_null());
    if ended.status() == "succeeded" {
        assert_eq!(outcome["exit_code"], json!(0), "{outcome}");
    } else if outcome["exit_code"] == json!(0) {
        assert!(
            ["timed_out", "cancelled"].contains(&ended.status()),
            "only a stopped job fails with exit code 0: {outcome}"
        );
    }
    if ended.status() == "rejected" {
        assert!(!ran, "a rejected job has no exit code: {outcome}");
        let message = outcome["error"]["message"].as_str().unwrap_or_default();
        assert_eq!(
            ended.result.payload, message,
            "the body of a job that never ran is its error's message"
        );
    }
    // What is not known is absent, never a null.
    let nulls: Vec<&String> = outcome
        .as_object()
        .unwrap()
        .iter()
        .filter(|(_, value)| value.is_null())
        .map(|(name, _)| name)
        .collect();
    assert!(nulls.is_empty(), "{nulls:?} should be absent: {outcome}");
}
