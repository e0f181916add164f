//! What can be seen from outside, during the run and after it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bollard::query_parameters::ListContainersOptions;
use futures::StreamExt;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::chronicle::Chronicle;
use super::ledger::{DeadLetter, Job, Outcome, Overrun, Record};
use super::rig::SLOTS;
use crate::support::engine::{Engine, INSTANCE_LABEL, JOB_LABEL, label};
use crate::support::runs::Runs;
use crate::support::streams::{ADVISORIES, CONSUMERS, QUEUE, Streams, Trouble, header};

/// Between two looks at what runs.
const LOOK: Duration = Duration::from_millis(100);

/// Watches what runs and what is published.
pub(crate) struct Observer {
    pub(crate) runs: Arc<Runs>,
    overruns: Arc<Mutex<Vec<Overrun>>>,
    heard: Arc<Mutex<BTreeMap<String, usize>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Observer {
    pub(crate) async fn begin(engine: &Engine, streams: &Streams, chronicle: &Chronicle) -> Self {
        let runs = Arc::new(Runs::watch(engine));
        let overruns = Arc::default();
        let heard = Arc::default();
        let results = streams.client().subscribe("functions.results").await.unwrap();
        let advisories = streams.client().subscribe("$JS.EVENT.ADVISORY.>").await.unwrap();
        let tasks = vec![
            tokio::spawn(look(
                engine.clone(),
                Arc::clone(&runs),
                Arc::clone(&overruns),
                chronicle.clone(),
            )),
            tokio::spawn(hear(results, Arc::clone(&heard))),
            tokio::spawn(advise(advisories, chronicle.clone())),
        ];
        Self { runs, overruns, heard, tasks }
    }

    pub(crate) fn overruns(&self) -> Vec<Overrun> {
        self.overruns.lock().unwrap().clone()
    }

    pub(crate) fn heard(&self) -> BTreeMap<String, usize> {
        self.heard.lock().unwrap().clone()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Counts what runs for each instance, dead ones as well: what they left runs on for a while, and
/// there can be no more of it than there was.
async fn look(
    engine: Engine,
    runs: Arc<Runs>,
    overruns: Arc<Mutex<Vec<Overrun>>>,
    chronicle: Chronicle,
) {
    let filters = HashMap::from([
        ("label".to_string(), vec![JOB_LABEL.to_string()]),
        ("status".to_string(), vec!["running".to_string()]),
    ]);
    let options = ListContainersOptions { filters: Some(filters), ..Default::default() };
    loop {
        let at = chronicle.elapsed();
        let mut instances: BTreeMap<String, usize> = BTreeMap::new();
        // An engine that is away answers nothing.
        for container in
            engine.docker().list_containers(Some(options.clone())).await.into_iter().flatten()
        {
            if let (Some(job), Some(id)) = (label(&container, JOB_LABEL), &container.id) {
                runs.add(job, id);
            }
            let instance = label(&container, INSTANCE_LABEL).unwrap_or_default().to_string();
            *instances.entry(instance).or_default() += 1;
        }
        let over = instances.into_iter().filter(|(_, running)| *running > SLOTS);
        let over = over.map(|(instance, running)| Overrun { at, instance, running });
        overruns.lock().unwrap().extend(over);
        tokio::time::sleep(LOOK).await;
    }
}

/// Counts the results as any subscriber would get them.
async fn hear(mut results: async_nats::Subscriber, heard: Arc<Mutex<BTreeMap<String, usize>>>) {
    while let Some(result) = results.next().await {
        let id = result.headers.as_ref().and_then(|headers| headers.get("Job-Id"));
        if let Some(id) = id {
            *heard.lock().unwrap().entry(id.to_string()).or_default() += 1;
        }
    }
}

/// Notes what the server says of requests it delivers no more, or has back.
async fn advise(mut advisories: async_nats::Subscriber, chronicle: Chronicle) {
    while let Some(advisory) = advisories.next().await {
        let event: Value = serde_json::from_slice(&advisory.payload).unwrap_or_default();
        if let Some(sequence) = event["stream_seq"].as_u64() {
            let (kind, times) = (&event["type"], &event["deliveries"]);
            chronicle.note(format!("sequence: {sequence}, {kind} of delivery {times}"));
        }
    }
}

/// What is in the queue and does not leave it, and what the server says of those who take from it.
pub(crate) async fn stuck(streams: &Streams) -> Vec<String> {
    let mut stuck = Vec::new();
    for stream in [QUEUE, ADVISORIES] {
        for message in streams.messages(stream).await.into_iter().flatten() {
            let text = String::from_utf8_lossy(&message.payload);
            let (sequence, subject) = (message.sequence, message.subject);
            stuck.push(format!("number {sequence} of {stream}: {subject} {text}"));
        }
    }
    for consumer in CONSUMERS {
        stuck.push(format!("consumer {consumer}: {:?}", streams.consumer(QUEUE, consumer).await));
    }
    stuck
}

/// All outcomes there are in the stream.
pub(crate) async fn outcomes(streams: &Streams) -> Result<Vec<Outcome>, Trouble> {
    let messages = streams.results().await?;
    let outcomes = messages.iter().map(|message| {
        let header = |name| header(message, name);
        Outcome {
            id: header("Job-Id"),
            message_id: header("Nats-Msg-Id"),
            status: header("Job-Status"),
            error: header("Job-Error"),
            exit_code: header("Job-Exit-Code"),
            attempt: header("Job-Attempt").parse().unwrap_or_default(),
            truncated: header("Job-Output-Truncated") == "true",
            body: message.payload.to_vec(),
        }
    });
    Ok(outcomes.collect())
}

/// All dead letters there are.
pub(crate) async fn dead_letters(streams: &Streams) -> Result<Vec<DeadLetter>, Trouble> {
    let messages = streams.dead_letters().await?;
    let letters = messages.iter().map(|message| {
        let id = header(message, "Job-Id");
        let body: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        let whole = body["id"] == id.as_str();
        DeadLetter { whole, id, reason: header(message, "Dead-Letter-Reason") }
    });
    Ok(letters.collect())
}

/// The records of all `jobs` that have one.
pub(crate) async fn records(
    streams: &Streams,
    jobs: &BTreeMap<String, Job>,
) -> Result<BTreeMap<String, Record>, Trouble> {
    let mut records = BTreeMap::new();
    for id in jobs.keys() {
        let Some(record) = streams.record(id).await? else { continue };
        let text = |name: &str| record[name].as_str().unwrap_or_default().to_string();
        let attempt = record["attempt"].as_u64().and_then(|n| u32::try_from(n).ok());
        let attempt = attempt.unwrap_or_default();
        let record = Record { state: text("state"), status: text("status"), attempt };
        records.insert(id.clone(), record);
    }
    Ok(records)
}

/// Everything in the engine that is not an image: containers and volumes.
pub(crate) async fn left_in(engine: &Engine) -> Result<Vec<String>, Trouble> {
    let docker = engine.docker();
    let options = ListContainersOptions { all: true, ..Default::default() };
    let containers = docker.list_containers(Some(options)).await.map_err(|e| e.to_string())?;
    let mut left: BTreeSet<String> = containers
        .iter()
        .map(|container| {
            let (job, state) = (label(container, JOB_LABEL), &container.state);
            format!("container {:?} of {job:?}, {state:?}", container.id)
        })
        .collect();
    let volumes = docker
        .list_volumes(None::<bollard::query_parameters::ListVolumesOptions>)
        .await
        .map_err(|e| e.to_string())?;
    left.extend(
        volumes
            .volumes
            .into_iter()
            .flatten()
            .map(|volume| format!("volume {} with {:?}", volume.name, volume.labels)),
    );
    Ok(left.into_iter().collect())
}
