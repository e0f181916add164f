//! Inputs and outputs that are too big for a message.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::object_store::{ObjectMetadata, ObjectStore};
use async_nats::jetstream::{self, object_store};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::engine::Engine;
use crate::support::jetstream::OBJECTS;
use crate::support::nats::{NatsOptions, NatsVersion};
use crate::support::world::{Ended, World};

async fn durable_worlds(settings: &[(&str, &str)]) -> Vec<World> {
    let mut worlds = Vec::new();
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        worlds.push(World::durable_with(options, Engine::shared().await, settings).await);
    }
    worlds
}

async fn bucket(world: &World) -> ObjectStore {
    jetstream::new(world.client.clone()).get_object_store(OBJECTS).await.unwrap()
}

/// What `seq 1 n` prints.
fn numbers(n: usize) -> Vec<u8> {
    (1..=n).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

/// The object that the outcome names for `stream`, whole.
async fn object(world: &World, ended: &Ended, stream: &str) -> Vec<u8> {
    let named = &ended.outcome[format!("{stream}_object")];
    let (id, attempt) = (ended.outcome["id"].as_str().unwrap(), &ended.outcome["attempt"]);
    let name = format!("{id}/{attempt}/{stream}");
    assert_eq!((&named["bucket"], &named["name"]), (&json!(OBJECTS), &json!(name)));
    let header = format!("Job-{}-Object", if stream == "stdout" { "Stdout" } else { "Stderr" });
    assert_eq!(ended.header(&header), Some(format!("{OBJECTS}/{name}")));
    let content = world.ledger.object(&name).await.expect("the object is there");
    assert_eq!(named["size"], content.len(), "{named}");
    let digest = format!("SHA-256={}", URL_SAFE.encode(Sha256::digest(&content)));
    assert_eq!(named["digest"], digest, "{named}");
    assert_eq!(ended.outcome[format!("{stream}_truncated")], true);
    content
}

fn has_object(ended: &Ended, stream: &str) -> bool {
    ended.outcome.get(format!("{stream}_object")).is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_that_does_not_fit_is_an_object() {
    for world in durable_worlds(&[]).await {
        // 3.3 MB, where a message takes one and an outcome keeps half of one.
        let expected = numbers(500_000);
        let ended = world.execute(json!({"parameter": "seq 1 500000"})).await;
        assert!(object(&world, &ended, "stdout").await == expected, "byte for byte");
        assert!(!has_object(&ended, "stderr"));
        let inline = ended.stdout();
        assert_eq!(inline.len(), 512 << 10, "as much as an outcome keeps");
        assert!(expected.starts_with(&inline));
        assert_eq!(ended.header("Job-Output-Truncated").as_deref(), Some("true"));
        assert!(expected.starts_with(&ended.result.payload) && !ended.result.payload.is_empty());

        // Both, and the other one alone; what fits stays where it is.
        let script = "seq 1 300000; seq 1 400000 >&2; exit 3";
        let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
        assert!(object(&world, &ended, "stdout").await == numbers(300_000));
        assert!(object(&world, &ended, "stderr").await == numbers(400_000));
        assert_eq!(ended.exit_code(), Some(3));
        let script = "echo small; seq 1 400000 >&2";
        let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
        assert!(object(&world, &ended, "stderr").await == numbers(400_000));
        assert!(!has_object(&ended, "stdout"));
        assert_eq!(
            (ended.text().as_str(), &ended.outcome["stdout_truncated"]),
            ("small\n", &json!(false))
        );

        // Bytes that are no text.
        let script = "for i in $(seq 1 3000); do cat /etc/every-byte; done";
        let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
        let content = object(&world, &ended, "stdout").await;
        assert_eq!(content.len(), 3000 * 512);
        assert!(content.starts_with(&ended.stdout()));

        // What fits is no object.
        for parameter in ["echo small", "true"] {
            let ended = world.execute(json!({"parameter": parameter})).await;
            assert!(!has_object(&ended, "stdout") && !has_object(&ended, "stderr"));
            assert_eq!(ended.header("Job-Stdout-Object"), None);
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_whose_json_does_not_fit_is_an_object_as_well() {
    for world in durable_worlds(&[]).await {
        for (what, script) in [
            // Base64 is a third longer.
            (
                "bytes on both",
                "for i in $(seq 1 850); do cat /etc/every-byte; cat /etc/every-byte >&2; done",
            ),
            // Six bytes for one.
            ("control characters", "head -c 400000 /dev/zero | tr '\\0' '\\1'"),
            (
                "quotation marks on both",
                "head -c 500000 /dev/zero | tr '\\0' '\"' | tee /dev/stderr",
            ),
        ] {
            let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
            for stream in ["stdout", "stderr"] {
                let cut = ended.outcome[format!("{stream}_truncated")] == true;
                assert_eq!(cut, has_object(&ended, stream), "{what}: {stream} is lost in part");
                if cut {
                    let content = object(&world, &ended, stream).await;
                    assert!([435_200, 400_000, 500_000].contains(&content.len()), "{what}");
                }
            }
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_object_has_a_limit_as_well() {
    for world in durable_worlds(&[("OBJECT_LIMIT", "1MiB"), ("OUTPUT_LIMIT", "1000")]).await {
        let expected = numbers(500_000);
        let script = "seq 1 500000; seq 1 500000 >&2";
        let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
        for stream in ["stdout", "stderr"] {
            let content = object(&world, &ended, stream).await;
            assert!(content == expected[..1 << 20], "{}", content.len());
        }
        assert_eq!(ended.stdout().len(), 1000);
        // Exactly as much is all of it.
        let ended = world.execute(json!({"parameter": "head -c 1048576 /dev/zero"})).await;
        assert_eq!(object(&world, &ended, "stdout").await, vec![0; 1 << 20]);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_objects_output_is_cut() {
    let mut worlds = durable_worlds(&[("OBJECT_LIMIT", "0")]).await;
    worlds.push(World::start(&[]).await);
    for world in worlds {
        let ended = world.execute(json!({"parameter": "seq 1 500000"})).await;
        assert_eq!(ended.stdout().len(), 512 << 10);
        assert_eq!(ended.outcome["stdout_truncated"], true);
        assert!(!has_object(&ended, "stdout"));
        assert_eq!(ended.header("Job-Stdout-Object"), None);
        let ended = world.execute(json!({"parameter": "cat", "stdin_object": "any"})).await;
        assert_eq!(ended.status(), "rejected", "{}", ended.outcome);
        let message = ended.outcome["error"]["message"].as_str().unwrap();
        assert!(message.contains("OBJECT_LIMIT") && message.contains("stdin_object"), "{message}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_answer_at_once_is_cut() {
    for world in durable_worlds(&[]).await {
        let outcome = world.run(json!({"parameter": "seq 1 500000"})).await;
        assert_eq!(outcome["stdout_truncated"], true);
        assert!(outcome.get("stdout_object").is_none());
        assert_eq!(outcome["stdout"].as_str().map(str::len), Some(512 << 10));
        world.clean().await;
    }
}

/// A request that is too big for a message, with all that is in it, comes as an object.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_whole_request_can_be_an_object() {
    for world in durable_worlds(&[]).await {
        let bucket = bucket(&world).await;
        let file = "x".repeat(3 << 20);
        let (id, request) = world.complete(json!({"parameter": "wc -c", "stdin": file}));
        bucket.put("big", &mut request.to_string().as_bytes()).await.unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("Job-Request-Object", "big");
        world.ledger.offer("functions.execute", "".into(), headers.clone()).await.unwrap();
        let ended = world.ended(&id).await;
        assert_eq!(ended.text().trim(), (3 << 20).to_string(), "{}", ended.outcome);
        headers.insert("Job-Request-Object", "not there");
        headers.insert("Nats-Msg-Id", "nothing");
        world.ledger.offer("functions.execute", "".into(), headers).await.unwrap();
        let ended = world.ended("nothing").await;
        assert_eq!((ended.status(), ended.code()), ("rejected", "request.stdin_not_found"));
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn standard_input_can_be_an_object() {
    for world in durable_worlds(&[("OBJECT_LIMIT", "8MiB")]).await {
        let bucket = bucket(&world).await;
        let noise: Vec<u8> = (0u32..5 << 18).flat_map(u32::to_le_bytes).collect();
        for (name, content) in [
            ("inputs/noise.bin", noise.as_slice()),
            ("with spaces, and: ünïcödé *.>", b"all the same"),
            ("empty", b""),
        ] {
            let mut reader = content;
            bucket.put(name, &mut reader).await.unwrap();
            let request = json!({"parameter": "sha256sum", "stdin_object": name});
            let ended = world.execute(request.clone()).await;
            let digest: String =
                Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(ended.text(), format!("{digest}  -\n"), "{name}: {}", ended.outcome);
            let outcome = world.run(request).await;
            assert_eq!(outcome["stdout"], format!("{digest}  -\n"), "{name}: {outcome}");
        }
        // As large as can be, there and back.
        let most: Vec<u8> = noise.iter().copied().cycle().take(8 << 20).collect();
        bucket.put("most", &mut most.as_slice()).await.unwrap();
        let ended = world.execute(json!({"parameter": "cat", "stdin_object": "most"})).await;
        assert!(object(&world, &ended, "stdout").await == most, "byte for byte");
        // Another one under the same name.
        bucket.put("empty", &mut &b"not any more"[..]).await.unwrap();
        let ended = world.execute(json!({"parameter": "cat", "stdin_object": "empty"})).await;
        assert_eq!(ended.text(), "not any more");
        world.clean().await;
    }
}

/// How long the job took. The test may have waited longer, for a container to wait for it.
fn took(ended: &Ended) -> Duration {
    let total = ended.outcome["timings_ms"]["total"].as_f64().unwrap();
    Duration::from_secs_f64(total / 1e3)
}

/// The refusal of a request whose standard input is no good.
async fn refused(world: &World, stdin: Value) -> String {
    let mut request = json!({"parameter": "cat"});
    request.as_object_mut().unwrap().extend(stdin.as_object().unwrap().clone());
    let ended = world.execute(request).await;
    assert_eq!(ended.status(), "rejected", "{stdin}: {}", ended.outcome);
    let message = ended.outcome["error"]["message"].as_str().unwrap().to_string();
    assert!(message.contains("stdin_object"), "{message}");
    assert!(took(&ended) < Duration::from_secs(20), "{stdin}: {}", ended.outcome["timings_ms"]);
    message
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_input_that_cannot_be_had_is_refused() {
    for world in durable_worlds(&[("OBJECT_LIMIT", "1MiB")]).await {
        let bucket = bucket(&world).await;
        let message = refused(&world, json!({"stdin_object": "no-such-object"})).await;
        assert!(message.contains("no-such-object") && message.contains(OBJECTS), "{message}");
        bucket.put("too-big", &mut vec![0; (1 << 20) + 1].as_slice()).await.unwrap();
        let message = refused(&world, json!({"stdin_object": "too-big"})).await;
        assert!(message.contains("OBJECT_LIMIT") && message.contains("1048577"), "{message}");
        bucket.put("gone", &mut &b"once"[..]).await.unwrap();
        bucket.delete("gone").await.unwrap();
        refused(&world, json!({"stdin_object": "gone"})).await;
        bucket.put("both", &mut &b"here"[..]).await.unwrap();
        refused(&world, json!({"stdin_object": "both", "stdin": "there"})).await;
        for bad in [json!(""), json!(7), json!(["a"]), json!("x".repeat(1000))] {
            refused(&world, json!({"stdin_object": bad})).await;
        }
        // Nothing is left of them, and each is a dead letter.
        world.ledger.settled().await;
        assert_eq!(world.ledger.dead_letters().await.len(), 8);
        let ended = world.execute(json!({"parameter": "cat", "stdin_object": "both"})).await;
        assert_eq!(ended.text(), "here");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_object_that_stands_for_another_is_none() {
    for world in durable_worlds(&[]).await {
        let context = jetstream::new(world.client.clone());
        let own = bucket(&world).await;
        // A bucket that the daemon may read and those who send requests may not.
        let config = object_store::Config { bucket: "secrets".into(), ..Default::default() };
        let secrets = context.create_object_store(config).await.unwrap();
        let secret = secrets.put("secret", &mut &b"nobody's business"[..]).await.unwrap();
        own.add_link("link", &secret).await.unwrap();
        refused(&world, json!({"stdin_object": "link"})).await;
        // One that stands for itself.
        let subject = format!("$O.{OBJECTS}.M.{}", URL_SAFE.encode("link"));
        let stream = context.get_stream(format!("OBJ_{OBJECTS}")).await.unwrap();
        let link = stream.get_last_raw_message_by_subject(&subject).await.unwrap();
        let mut link: Value = serde_json::from_slice(&link.payload).unwrap();
        link["options"]["link"] = json!({"bucket": OBJECTS, "name": "link"});
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Rollup", "sub");
        world.ledger.offer(&subject, link.to_string().into(), headers).await.unwrap();
        refused(&world, json!({"stdin_object": "link"})).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_object_that_is_spoiled_is_not_run_on() {
    for world in durable_worlds(&[("MAX_DELIVER", "2")]).await {
        let bucket = bucket(&world).await;
        let put = |name: &str| ObjectMetadata {
            name: name.to_string(),
            chunk_size: Some(1000),
            ..Default::default()
        };
        let info = bucket.put(put("spoiled"), &mut vec![b'x'; 5000].as_slice()).await.unwrap();
        // One of its parts is lost.
        let context = jetstream::new(world.client.clone());
        let stream = context.get_stream(format!("OBJ_{OBJECTS}")).await.unwrap();
        let part = stream
            .get_first_raw_message_by_subject(&format!("$O.{OBJECTS}.C.{}", info.nuid), 1)
            .await
            .unwrap();
        stream.delete_message(part.sequence).await.unwrap();
        let ended = world.execute(json!({"parameter": "wc -c", "stdin_object": "spoiled"})).await;
        assert_ne!(ended.status(), "succeeded", "{}", ended.outcome);
        assert!(took(&ended) < Duration::from_secs(60), "{}", ended.outcome);
        world.works(5).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bucket_that_is_full_costs_the_output_that_does_not_fit_and_no_other() {
    let settings = [("OBJECTS_MAX_BYTES", "2MiB"), ("OUTPUT_LIMIT", "1000")];
    for world in durable_worlds(&settings).await {
        let ended = world.execute(json!({"parameter": "seq 1 500000"})).await;
        assert_eq!((ended.status(), has_object(&ended, "stdout")), ("succeeded", false));
        assert_eq!(
            (ended.stdout().len(), &ended.outcome["stdout_truncated"]),
            (1000, &json!(true))
        );
        assert!(took(&ended) < Duration::from_secs(30), "{}", ended.outcome["timings_ms"]);
        // What was stored of it takes nobody's room.
        let ended = world.execute(json!({"parameter": "seq 1 200000"})).await;
        assert!(object(&world, &ended, "stdout").await == numbers(200_000));
        // Another of the same size has none any more, and is told so.
        let ended = world.execute(json!({"parameter": "seq 1 200000"})).await;
        assert_eq!((ended.status(), has_object(&ended, "stdout")), ("succeeded", false));
        assert_eq!(ended.outcome["stdout_truncated"], true);
        world.works(2).await;
        world.clean().await;
    }
}
