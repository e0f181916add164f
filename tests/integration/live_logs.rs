//! What functions print, as it is published while they run.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_nats::Message;
use serde_json::{Value, json};

use crate::support::engine::Engine;
use crate::support::images::every_byte;
use crate::support::nats::{NatsOptions, NatsVersion, round_trip};
use crate::support::process::free_port;
use crate::support::results::{Results, header};
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::world::World;

/// A world with streams on each kind of server, and one without.
async fn worlds(settings: &[(&str, &str)]) -> Vec<World> {
    let mut worlds = vec![World::start(settings).await];
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        worlds.push(World::durable_with(options, Engine::shared().await, settings).await);
    }
    worlds
}

/// All that is published of the job `id` from now on.
async fn follow(world: &World, id: &str) -> Results {
    Results::subscribe(&world.client, &format!("functions.logs.{id}.>")).await
}

fn number(message: &Message, name: &str) -> u64 {
    header(message, name).unwrap_or_else(|| panic!("no {name}: {message:?}")).parse().unwrap()
}

/// One stream of a job, put together again.
#[derive(Debug, Default)]
struct Followed {
    bytes: Vec<u8>,
    chunks: Vec<Vec<u8>>,
    /// Bytes that never came, by the offsets.
    missing: u64,
    /// What the end says of them.
    dropped: u64,
    ended: bool,
}

/// Puts the streams of `messages` together; they must say what they are, and be in order.
fn put_together(id: &str, messages: &[Message]) -> BTreeMap<String, Followed> {
    let mut streams: BTreeMap<String, Followed> = BTreeMap::new();
    let mut seqs: BTreeMap<String, u64> = BTreeMap::new();
    for message in messages {
        let name = message.subject.as_str().strip_prefix(&format!("functions.logs.{id}.")).unwrap();
        assert!(["stdout", "stderr"].contains(&name), "{}", message.subject);
        assert_eq!(header(message, "Job-Id").as_deref(), Some(id));
        let stream = streams.entry(name.to_string()).or_default();
        assert!(!stream.ended, "something comes after the end of {name}: {message:?}");
        let seq = seqs.entry(name.to_string()).or_default();
        *seq += 1;
        assert_eq!(number(message, "Seq"), *seq, "of {name}");
        let expected = stream.bytes.len() as u64 + stream.missing;
        let offset = number(message, "Offset");
        assert!(offset >= expected, "{offset} of {name}, {expected} were there already");
        stream.missing += offset - expected;
        stream.bytes.extend_from_slice(&message.payload);
        match header(message, "End") {
            Some(end) => {
                assert_eq!((end.as_str(), message.payload.len()), ("true", 0));
                stream.ended = true;
                stream.dropped = header(message, "Dropped-Bytes").map_or(0, |n| n.parse().unwrap());
            }
            None => {
                assert!(!message.payload.is_empty(), "a chunk of nothing: {message:?}");
                stream.chunks.push(message.payload.to_vec());
            }
        }
    }
    streams
}

/// Waits until both streams have ended, and returns them.
async fn ends(id: &str, logs: &Results) -> (Followed, Followed) {
    eventually(&format!("both streams of {id} have ended"), || async {
        logs.all().iter().filter(|message| header(message, "End").is_some()).count() >= 2
    })
    .await;
    let mut streams = put_together(id, &logs.all());
    let mut stream = |name: &str| streams.remove(name).unwrap_or_default();
    let (stdout, stderr) = (stream("stdout"), stream("stderr"));
    assert!(stdout.ended && stderr.ended);
    assert_eq!(stdout.missing, stdout.dropped, "the gaps are what was dropped");
    assert_eq!(stderr.missing, stderr.dropped, "the gaps are what was dropped");
    (stdout, stderr)
}

/// Runs a job to its end, and returns its outcome and what was published meanwhile.
async fn run_live(world: &World, mut request: Value) -> (Value, Followed, Followed) {
    let id = world.id();
    request["id"] = json!(id);
    request["live_logs"] = json!(true);
    let (logs, events) = (follow(world, &id).await, world.events(&id).await);
    world.submit(request).await;
    let outcome = events.wait_for("ended").await;
    let (stdout, stderr) = ends(&id, &logs).await;
    world.engine.gone(&id).await;
    (outcome, stdout, stderr)
}

fn shell(script: &str) -> Value {
    json!(["sh", "-c", script])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_is_there_while_the_function_runs() {
    for world in worlds(&[]).await {
        let id = world.id();
        let (logs, events) = (follow(&world, &id).await, world.events(&id).await);
        let script =
            "echo begun; echo oh no >&2; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo done";
        world.submit(json!({"id": id, "parameter": shell(script), "live_logs": true})).await;
        eventually("what was printed so far is there", || async {
            let streams = put_together(&id, &logs.all());
            let is = |name: &str, text: &str| {
                streams
                    .get(name)
                    .is_some_and(|stream| stream.bytes == text.as_bytes() && !stream.ended)
            };
            is("stdout", "begun\n") && is("stderr", "oh no\n")
        })
        .await;
        assert!(!events.states().contains(&"ended".to_string()));
        let container = world.engine.running(&id).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        let outcome = events.wait_for("ended").await;
        let (stdout, stderr) = ends(&id, &logs).await;
        assert_eq!((stdout.bytes, stderr.bytes), (b"begun\ndone\n".into(), b"oh no\n".into()));
        assert_eq!(outcome["stdout"], "begun\ndone\n", "{outcome}");
        assert!(outcome.get("live_logs_dropped_bytes").is_none(), "{outcome}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_is_published_unless_it_is_asked_for() {
    for setting in ["false", "true"] {
        for world in worlds(&[("LIVE_LOGS", setting)]).await {
            let logs = Results::subscribe(&world.client, "functions.logs.>").await;
            for (asked, wanted) in
                [(Value::Null, setting == "true"), (json!(false), false), (json!(true), true)]
            {
                let before = logs.all().len();
                let request = json!({"parameter": "echo words", "live_logs": asked});
                let ended = world.execute(request.clone()).await;
                assert_eq!(ended.text(), "words\n");
                let outcome = world.run(request).await;
                assert_eq!(outcome["stdout"], "words\n", "{outcome}");
                if wanted {
                    // Two jobs of two streams each, of which one is empty.
                    logs.wait_for_count(before + 6, PATIENCE).await;
                } else {
                    // Behind all that was published before.
                    world.works(1).await;
                    round_trip(&world.client).await;
                }
                let new = logs.all().len() - before;
                let expected =
                    if wanted { 6 } else { 0 } + if setting == "true" && !wanted { 3 } else { 0 };
                if setting == "true" && !wanted {
                    logs.wait_for_count(before + expected, PATIENCE).await;
                } else {
                    assert_eq!(new, expected, "{setting}, {asked}");
                }
            }
            for bad in [json!("true"), json!(1)] {
                let ended = world.execute(json!({"parameter": "true", "live_logs": bad})).await;
                assert_eq!(ended.code(), "request.invalid_field", "{}", ended.outcome);
            }
            world.clean().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn text_is_not_cut_within_a_character() {
    for world in worlds(&[("LIVE_LOGS_BUFFER", "64MiB")]).await {
        // Characters of one to four bytes, more than a message holds, and more than the outcome keeps.
        let script = "yes 'aß€𝄞' | head -c 3000000; yes '𝄞' | head -c 300000 >&2";
        let (outcome, stdout, stderr) = run_live(&world, json!({"parameter": shell(script)})).await;
        let expected: Vec<u8> = "aß€𝄞\n".bytes().cycle().take(3_000_000).collect();
        assert_eq!(stdout.dropped, 0, "{outcome}");
        assert!(stdout.bytes == expected, "byte for byte");
        assert!(stderr.bytes == "𝄞\n".bytes().cycle().take(300_000).collect::<Vec<u8>>());
        for stream in [&stdout, &stderr] {
            let (_, whole) = stream.chunks.split_last().unwrap();
            for chunk in whole {
                let text = std::str::from_utf8(chunk);
                assert!(text.is_ok(), "{:?} … {:?}", &chunk[..8.min(chunk.len())], text);
            }
        }
        let largest = stdout.chunks.iter().map(Vec::len).max().unwrap();
        assert!(largest < 1 << 20, "{largest} bytes in a message");
        assert_eq!(outcome["stdout_truncated"], true, "{outcome:.200}");

        // A character that comes in two halves, long after each other.
        let script = r"printf 'x\342\202'; sleep 0.5; printf '\254y\342\202'";
        let (_, stdout, _) = run_live(&world, json!({"parameter": shell(script)})).await;
        assert_eq!(stdout.bytes, b"x\xe2\x82\xacy\xe2\x82");
        assert_eq!(stdout.chunks.last().unwrap().as_slice(), b"\xe2\x82", "no text: {stdout:?}");
        assert!(
            stdout.chunks[..stdout.chunks.len() - 1].iter().all(|c| std::str::from_utf8(c).is_ok())
        );
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn bytes_that_are_no_text_arrive_as_they_are() {
    for world in worlds(&[("LIVE_LOGS_BUFFER", "64MiB")]).await {
        let script = "for i in $(seq 1 400); do cat /etc/every-byte; done";
        let (_, stdout, stderr) = run_live(&world, json!({"parameter": shell(script)})).await;
        let expected: Vec<u8> = (0..400).flat_map(|_| every_byte()).collect();
        assert_eq!((stdout.dropped, stdout.bytes.len()), (0, expected.len()));
        assert!(stdout.bytes == expected, "byte for byte");
        assert!(stderr.bytes.is_empty());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_function_that_prints_nothing_has_its_ends() {
    for world in worlds(&[]).await {
        let (_, stdout, stderr) = run_live(&world, json!({"parameter": "true"})).await;
        assert!(stdout.chunks.is_empty() && stderr.chunks.is_empty());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn both_streams_are_told_about_in_turn() {
    for world in worlds(&[]).await {
        let id = world.id();
        let (logs, events) = (follow(&world, &id).await, world.events(&id).await);
        let script =
            "for i in 1 2 3 4 5; do echo out $i; sleep 0.3; echo err $i >&2; sleep 0.3; done";
        world.submit(json!({"id": id, "parameter": shell(script), "live_logs": true})).await;
        events.wait_for("ended").await;
        ends(&id, &logs).await;
        let texts: Vec<String> = logs
            .all()
            .iter()
            .filter(|message| !message.payload.is_empty())
            .map(|message| String::from_utf8(message.payload.to_vec()).unwrap())
            .collect();
        let wanted: Vec<String> =
            (1..=5).flat_map(|i| [format!("out {i}\n"), format!("err {i}\n")]).collect();
        assert_eq!(texts, wanted, "as it was printed");
        world.clean().await;
    }
}

/// Waits until the function of the job `id` has ended, whatever its daemon makes of it.
async fn function_ended(world: &World, id: &str) {
    eventually("the function has ended", || async {
        world.engine.containers_of(id).await.iter().all(|container| {
            container.status.as_ref().is_some_and(|status| status.starts_with("Exited"))
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_server_costs_output_and_not_time() {
    const TOTAL: u64 = 40_000_000;
    for world in worlds(&[("LIVE_LOGS_BUFFER", "256KiB"), ("ACK_WAIT", "60s")]).await {
        let id = world.id();
        let (logs, events) = (follow(&world, &id).await, world.events(&id).await);
        let script =
            format!("while [ ! -e /tmp/go ]; do sleep 0.1; done; yes 'grüße' | head -c {TOTAL}");
        world.submit(json!({"id": id, "parameter": shell(&script), "live_logs": true})).await;
        let container = world.engine.running(&id).await;
        world.nats.pause();
        let begun = Instant::now();
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        function_ended(&world, &id).await;
        let took = begun.elapsed();
        world.nats.resume();
        assert!(took < Duration::from_secs(30), "the function was kept waiting: {took:?}");
        let outcome = events.wait_for("ended").await;
        assert_eq!(outcome["status"], "succeeded", "{outcome:.300}");
        let (stdout, stderr) = ends(&id, &logs).await;
        let dropped = outcome["live_logs_dropped_bytes"].as_u64().unwrap_or_default();
        assert!(dropped > 0, "nobody can have taken all of it: {outcome:.300}");
        assert_eq!(stdout.bytes.len() as u64 + stdout.dropped, TOTAL);
        assert_eq!(stdout.dropped + stderr.dropped, dropped, "both say the same");
        // What was dropped did not make binary of the rest.
        let (_, whole) = stdout.chunks.split_last().unwrap();
        assert!(whole.iter().all(|chunk| std::str::from_utf8(chunk).is_ok()));
        assert!(world.daemon.peak_memory() < 256 << 20, "{}", world.daemon.peak_memory());
        world.works(2).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_waits_for_a_server_at_the_end_is_published_or_counted() {
    const TOTAL: u64 = 20_000_000;
    // All of it has room in memory, but the server is away for longer than anybody waits.
    for world in worlds(&[("LIVE_LOGS_BUFFER", "64MiB"), ("ACK_WAIT", "60s")]).await {
        let id = world.id();
        let (logs, events) = (follow(&world, &id).await, world.events(&id).await);
        let script = format!("while [ ! -e /tmp/go ]; do sleep 0.1; done; yes | head -c {TOTAL}");
        world.submit(json!({"id": id, "parameter": shell(&script), "live_logs": true})).await;
        let container = world.engine.running(&id).await;
        world.nats.pause();
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        function_ended(&world, &id).await;
        tokio::time::sleep(Duration::from_secs(14)).await;
        world.nats.resume();
        let outcome = events.wait_for("ended").await;
        let dropped = outcome["live_logs_dropped_bytes"].as_u64().unwrap_or_default();
        // All that was not dropped comes.
        let arrived = || {
            let streams = put_together(&id, &logs.all());
            streams.values().map(|stream| stream.bytes.len() as u64).sum::<u64>()
        };
        let all = async {
            while arrived() + dropped < TOTAL {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let came = tokio::time::timeout(Duration::from_secs(30), all).await;
        assert!(came.is_ok(), "{} came, {dropped} were dropped, of {TOTAL}", arrived());
        assert_eq!(arrived() + dropped, TOTAL);
        within("the ends", PATIENCE, ends(&id, &logs)).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn more_is_published_than_an_outcome_keeps() {
    for world in worlds(&[("OUTPUT_LIMIT", "100"), ("OBJECT_LIMIT", "0")]).await {
        let (outcome, stdout, _) = run_live(&world, json!({"parameter": "seq 1 20000"})).await;
        assert_eq!(outcome["stdout"].as_str().map(str::len), Some(100));
        let expected: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
        assert!(stdout.bytes == expected.as_bytes());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn attempts_can_be_told_apart() {
    for world in worlds(&[]).await {
        let id = world.id();
        let (logs, events) = (follow(&world, &id).await, world.events(&id).await);
        let retry = json!({"max_attempts": 2, "on": ["failed"]});
        let request = json!({"id": id, "parameter": shell("echo words; exit 3"), "retry": retry,
            "live_logs": true});
        world.submit(request).await;
        let outcome = events.wait_for("ended").await;
        assert_eq!(outcome["attempt"], 2, "{outcome}");
        logs.wait_for_count(6, PATIENCE).await;
        for attempt in ["1", "2"] {
            let of_attempt: Vec<Message> = logs
                .all()
                .into_iter()
                .filter(|message| header(message, "Job-Attempt").as_deref() == Some(attempt))
                .collect();
            let streams = put_together(&id, &of_attempt);
            assert_eq!(streams["stdout"].bytes, b"words\n", "attempt {attempt}");
            assert!(streams.values().all(|stream| stream.ended), "attempt {attempt}");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_never_runs_prints_nothing() {
    for world in worlds(&[("MAX_DELIVER", "1")]).await {
        for request in [
            json!({"image_reference": format!("127.0.0.1:{}/any:1", free_port())}),
            json!({"parameter": 7}),
            json!({"parameter": "true", "expires_at": "2001-01-01T00:00:00Z"}),
        ] {
            let mut request = request;
            let id = world.id();
            request["id"] = json!(id);
            request["live_logs"] = json!(true);
            let logs = follow(&world, &id).await;
            let events = world.events(&id).await;
            world.submit(request).await;
            events.wait_for("ended").await;
            world.works(1).await;
            round_trip(&world.client).await;
            let said: Vec<_> = logs.all();
            assert!(said.iter().all(|message| message.payload.is_empty()), "{said:?}");
        }
        world.clean().await;
    }
}
