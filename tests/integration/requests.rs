//! What is asked for: good requests, bad requests, where the answers go.

use std::time::Duration;

use async_nats::HeaderMap;
use futures::StreamExt;
use serde_json::{Value, json};

use crate::support::engine::{Engine, INSTANCE_LABEL, label};
use crate::support::images::Image;
use crate::support::nats::round_trip;
use crate::support::results::Results;
use crate::support::wait::{PATIENCE, within};
use crate::support::warmth;
use crate::support::world::{World, held};

/// What a bad request must be answered with: the code, and a word its message must hold.
struct Bad {
    what: &'static str,
    payload: Vec<u8>,
    code: &'static str,
    names: &'static str,
}

/// A request that is good but for one field.
fn with(image: &str, field: &str, value: Value) -> Vec<u8> {
    let mut request = json!({"image_reference": image, "parameter": "true"});
    request[field] = value;
    request.to_string().into()
}

fn bad_fields(image: &str) -> Vec<Bad> {
    let many_levels = "[".repeat(5000);
    let long = "x".repeat(65);
    let cases: Vec<(&'static str, &'static str, Value)> = vec![
        ("no such field", "imagee", json!("x")),
        ("a HostConfig", "HostConfig", json!({"Privileged": true})),
        ("a field in another case", "Image_Reference", json!("x")),
        ("image null", "image_reference", json!(null)),
        ("image a number", "image_reference", json!(7)),
        ("image empty", "image_reference", json!("")),
        ("image blank", "image_reference", json!("   ")),
        ("image in capitals", "image_reference", json!("Not/A/Reference")),
        ("image with a bad tag", "image_reference", json!("busybox:not a tag")),
        ("image with a short digest", "image_reference", json!("busybox@sha256:abc")),
        ("image with a line break", "image_reference", json!("busybox\nbusybox")),
        ("image with a path in it", "image_reference", json!("../../etc/passwd")),
        ("parameter a number", "parameter", json!(7)),
        ("parameter a map", "parameter", json!({"a": "b"})),
        ("parameter a list with a number", "parameter", json!(["echo", 7])),
        ("parameter with an open quote", "parameter", json!("echo \"open")),
        ("parameter with a NUL", "parameter", json!("echo a\u{0}b")),
        ("parameter list with a NUL", "parameter", json!(["echo", "a\u{0}b"])),
        ("id empty", "id", json!("")),
        ("id with a space", "id", json!("a b")),
        ("id with a dot", "id", json!("a.b")),
        ("id with a wildcard", "id", json!("*")),
        ("id too long", "id", json!(long)),
        ("id not ASCII", "id", json!("jöb")),
        ("id a number", "id", json!(7)),
        ("env a list", "env", json!(["A=b"])),
        ("env with a number", "env", json!({"A": 1})),
        ("env without a name", "env", json!({"": "b"})),
        ("env with = in the name", "env", json!({"A=B": "c"})),
        ("env with a NUL", "env", json!({"A": "b\u{0}c"})),
        ("stdin a number", "stdin", json!(7)),
        ("working_dir a number", "working_dir", json!(7)),
        ("working_dir relative", "working_dir", json!("tmp")),
        ("user a number", "user", json!(1000)),
        ("timeout zero", "timeout_ms", json!(0)),
        ("timeout negative", "timeout_ms", json!(-1)),
        ("timeout a fraction", "timeout_ms", json!(1.5)),
        ("timeout a string", "timeout_ms", json!("1s")),
        ("timeout above the maximum", "timeout_ms", json!(3_600_001)),
        ("timeout beyond 64 bits", "timeout_ms", json!(1e30)),
        ("memory zero", "memory_bytes", json!(0)),
        ("memory negative", "memory_bytes", json!(-1)),
        ("memory below what an engine takes", "memory_bytes", json!(1024)),
        ("memory above the maximum", "memory_bytes", json!(512 * 1024 * 1024 + 1)),
        ("memory a string", "memory_bytes", json!("1g")),
        ("cpus zero", "cpus", json!(0)),
        ("cpus negative", "cpus", json!(-0.5)),
        ("cpus above the maximum", "cpus", json!(1.01)),
        ("cpus a string", "cpus", json!("1")),
        ("pids zero", "pids", json!(0)),
        ("pids negative, which engines take for unlimited", "pids", json!(-1)),
        ("pids above the maximum", "pids", json!(257)),
        ("network not allowed", "network", json!("host")),
        ("network of another container", "network", json!("container:abc")),
        ("network a list", "network", json!(["none"])),
        ("labels a list", "labels", json!(["a=b"])),
        ("labels with a number", "labels", json!({"a": 1})),
        ("labels of the daemon's own", "labels", json!({"worker-spawner.instance": "x"})),
        ("reply_to the server's API", "reply_to", json!("$JS.API.STREAM.DELETE.X")),
        ("reply_to the system account", "reply_to", json!("$SYS.REQ.SERVER.PING")),
        ("reply_to the requests", "reply_to", json!("functions.execute")),
        ("reply_to a prefix in the wrong place", "reply_to", json!("x._INBOX.y")),
        ("reply_to the bare prefix", "reply_to", json!("_INBOX")),
        ("reply_to with a lookalike prefix", "reply_to", json!("_INBOXES.a")),
        ("reply_to a wildcard", "reply_to", json!("_INBOX.>")),
        ("reply_to another wildcard", "reply_to", json!("_INBOX.*.a")),
        ("reply_to with a space", "reply_to", json!("_INBOX.a b")),
        ("reply_to with a line break", "reply_to", json!("_INBOX.a\r\nPUB x 0")),
        ("reply_to with an empty token", "reply_to", json!("_INBOX..a")),
        ("reply_to a number", "reply_to", json!(7)),
    ];
    let mut bad: Vec<Bad> = cases
        .into_iter()
        .map(|(what, field, value)| Bad {
            what,
            payload: with(image, field, value),
            code: "request.invalid_field",
            names: field,
        })
        .collect();
    bad.push(Bad {
        what: "no image at all",
        payload: br#"{"parameter": "true"}"#.to_vec(),
        code: "request.invalid_field",
        names: "image_reference",
    });
    let shapes: Vec<(&'static str, Vec<u8>, &'static str)> = vec![
        ("nothing", b"".to_vec(), "request.invalid_json"),
        ("blanks", b" \n".to_vec(), "request.invalid_json"),
        ("words", b"run this please".to_vec(), "request.invalid_json"),
        ("cut short", br#"{"image_reference": "busy"#.to_vec(), "request.invalid_json"),
        (
            "with a tail",
            [with(image, "stdin", json!("")), b"}".to_vec()].concat(),
            "request.invalid_json",
        ),
        ("not UTF-8", b"{\"image_reference\": \"\xff\xfe\"}".to_vec(), "request.invalid_json"),
        ("a deep nest", many_levels.into_bytes(), "request."),
        ("null", b"null".to_vec(), "request."),
        ("a list", b"[]".to_vec(), "request."),
        (
            "a list in place of the fields",
            format!("[\"{image}\", \"true\"]").into_bytes(),
            "request.",
        ),
        ("a string", b"\"x\"".to_vec(), "request."),
        ("a number", b"42".to_vec(), "request."),
        (
            "a field twice",
            format!(r#"{{"image_reference": "{image}", "image_reference": "127.0.0.1:1/x"}}"#)
                .into_bytes(),
            "request.",
        ),
    ];
    bad.extend(shapes.into_iter().map(|(what, payload, code)| Bad {
        what,
        payload,
        code,
        names: "",
    }));
    bad
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bad_request_is_rejected_with_the_field_that_is_wrong() {
    let world = World::start(&[]).await;
    let mut wrong = Vec::new();
    let mut expected = 0;
    for case in bad_fields(&world.image) {
        expected += 1;
        let ended = world.execute_raw(case.payload.into(), HeaderMap::new()).await;
        let message = ended.outcome["error"]["message"].as_str().unwrap_or_default();
        let right = ended.status() == "rejected"
            && if case.code.ends_with('.') {
                ended.code().starts_with(case.code)
            } else {
                ended.code() == case.code
            }
            && message.contains(case.names);
        if !right {
            wrong.push(format!("{}: {}", case.what, ended.outcome));
        }
    }
    assert!(wrong.is_empty(), "answered wrongly:\n{}", wrong.join("\n"));
    assert_eq!(world.results.all().len(), expected, "each has one result");
    assert!(world.containers().await.is_empty(), "none of them got a container");
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_as_big_as_a_message_can_be_is_answered_within_one() {
    let world = World::start(&[]).await;
    let mut wrong = Vec::new();
    for (what, field) in [
        ("an image's name", "image_reference"),
        ("a reply subject", "reply_to"),
        ("a network", "network"),
        ("a directory", "working_dir"),
        ("a user", "user"),
        ("an id", "id"),
        ("a field nobody knows", ""),
    ] {
        // Characters that take twice their room once they are quoted again.
        let mut request = json!({"image_reference": world.image, "parameter": "true"});
        if field.is_empty() {
            request["\"".repeat(450_000)] = json!(1);
        } else {
            request[field] = json!("\"".repeat(450_000));
        }
        let reply = world.client.new_inbox();
        let mut answers = world.client.subscribe(reply.clone()).await.unwrap();
        let (count, payload) = (world.results.all().len(), request.to_string());
        world.client.publish_with_reply("functions.execute", reply, payload.into()).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(20), answers.next()).await;
        let outcome = answer
            .ok()
            .flatten()
            .map(|answer| serde_json::from_slice::<Value>(&answer.payload).unwrap());
        match &outcome {
            None => wrong.push(format!("{what}: no answer")),
            Some(outcome) if outcome["status"] != "rejected" => {
                wrong.push(format!("{what}: {:.300}", outcome.to_string()))
            }
            Some(_) => world.results.wait_for_count(count + 1, PATIENCE).await,
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!world.nats.log().to_lowercase().contains("maximum payload"), "{}", world.nats.log());
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_the_kernel_cannot_take_is_not_tried_for_ever() {
    let world = World::start(&[]).await;
    // One argument or variable may have 128 KiB, all together a quarter of the stack.
    let long = "x".repeat(200_000);
    let mut many = vec!["0123456789"; 60_000];
    many[0] = "echo";
    for request in [
        json!({"parameter": ["echo", long]}),
        json!({"parameter": [long]}),
        json!({"parameter": "echo x", "env": {"LONG": long}}),
        json!({"parameter": many}),
    ] {
        let ended = world.execute(request).await;
        assert_ne!(ended.status(), "error", "{:.2000}", ended.outcome.to_string());
        assert_eq!(ended.outcome["attempt"], 1, "{:.2000}", ended.outcome.to_string());
    }
    let just = "x".repeat(100_000);
    let ended = world.execute(json!({"parameter": ["echo", just]})).await;
    assert_eq!(ended.text(), format!("{just}\n"));
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_command_is_split_as_a_shell_would_and_no_shell_is_started() {
    let world = World::start(&[]).await;
    let own = "the image's own command\n";
    let cases: Vec<(&str, Option<Value>, &str)> = vec![
        ("words", Some(json!("echo one two")), "one two\n"),
        ("many blanks", Some(json!("  echo   one \t two\n")), "one two\n"),
        ("double quotes", Some(json!("echo \"a  b\" \"it's\"")), "a  b it's\n"),
        ("single quotes", Some(json!("echo 'a  b' 'say \"x\"'")), "a  b say \"x\"\n"),
        ("escapes", Some(json!(r"echo e\ f \$HOME \\")), "e f $HOME \\\n"),
        ("quotes within a word", Some(json!("echo a'b c'd")), "ab cd\n"),
        ("an empty argument", Some(json!("printf [%s] a '' b")), "[a][][b]"),
        ("no variables", Some(json!("echo $HOME ${PATH}")), "$HOME ${PATH}\n"),
        (
            "no operators",
            Some(json!("echo a; echo b && echo c > /tmp/x | cat")),
            "a; echo b && echo c > /tmp/x | cat\n",
        ),
        ("no patterns", Some(json!("echo * ?")), "* ?\n"),
        ("a shell when asked for", Some(json!("sh -c 'echo $((6 * 7)); echo two'")), "42\ntwo\n"),
        ("beyond ASCII", Some(json!("echo 'grüße 👋'")), "grüße 👋\n"),
        ("a list as it is", Some(json!(["echo", "a  b", "$HOME", "'q'", ""])), "a  b $HOME 'q' \n"),
        ("a list with line breaks", Some(json!(["printf", "%s|", "a\nb", "c"])), "a\nb|c|"),
        ("nothing", None, own),
        ("an empty string", Some(json!("")), own),
        ("an empty list", Some(json!([])), own),
    ];
    let jobs = cases.into_iter().map(|(what, parameter, printed)| {
        let world = &world;
        async move {
            let mut request = json!({});
            if let Some(parameter) = parameter {
                request["parameter"] = parameter;
            }
            let ended = world.execute(request).await;
            assert_eq!(ended.status(), "succeeded", "{what}: {}", ended.outcome);
            assert_eq!(ended.text(), printed, "{what}");
        }
    });
    futures::future::join_all(jobs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_request_in_the_readme_comes_back_as_what_the_container_printed() {
    let world = World::start(&[]).await;
    let id = world
        .submit(json!({"parameter": "sh -c \"printf 'Hello, World!'\"", "image_reference": world.image}))
        .await;
    let result = world.results.wait_for(&id).await;
    assert_eq!(result.payload, "Hello, World!", "the body is the output and nothing else");
    assert_eq!(result.subject.as_str(), "functions.results");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_outcome_tells_everything_about_the_job() {
    let world = World::start(&[]).await;
    let ended = world.execute(json!({"parameter": "sh -c 'echo out; echo err >&2; exit 3'"})).await;
    let outcome = &ended.outcome;
    assert_eq!(outcome["status"], "failed");
    assert_eq!(outcome["exit_code"], 3);
    assert_eq!(outcome["image"], json!(world.image));
    assert_eq!(outcome["stdout"], "out\n");
    assert_eq!(outcome["stderr"], "err\n");
    assert_eq!(outcome["attempt"], 1);
    assert_eq!(outcome["start"], if warmth::is_default() { "warm" } else { "cold" });
    assert!(outcome.get("signal").is_none(), "it was not killed: {outcome}");
    assert!(outcome.get("error").is_none(), "the function failed, not the daemon: {outcome}");
    assert!(!outcome["worker"].as_str().unwrap().is_empty());
    let times: Vec<&str> = ["queued_at", "started_at", "finished_at"]
        .iter()
        .map(|name| outcome[name].as_str().unwrap())
        .collect();
    let instants: Vec<jiff::Timestamp> = times.iter().map(|text| text.parse().unwrap()).collect();
    assert!(instants.is_sorted(), "{times:?}");
    let timings = &outcome["timings_ms"];
    for phase in ["queue", "create", "start", "run", "total"] {
        assert!(timings[phase].as_f64().is_some_and(|took| took >= 0.0), "{phase}: {outcome}");
    }
    assert!(timings["total"].as_f64() >= timings["run"].as_f64(), "{outcome}");
    assert_eq!(ended.header("Job-Attempt").as_deref(), Some("1"));
    assert!(ended.header("Job-Duration-Ms").unwrap().parse::<u64>().is_ok());
    assert_eq!(ended.header("Job-Output-Truncated").as_deref(), Some("false"));
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_has_the_id_it_was_given_or_one_that_fits() {
    let world = World::start(&[]).await;
    let request = json!({"image_reference": world.image, "parameter": "true"}).to_string();
    let sent_with = |header: Option<&str>| {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert("Nats-Msg-Id", header);
        }
        let world = &world;
        let request = request.clone();
        async move {
            let ended = world.execute_raw(request.into(), headers).await;
            ended.outcome["id"].as_str().unwrap().to_string()
        }
    };
    let fits = |id: &str| {
        (1..=64).contains(&id.len())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
    };

    let own = world.id();
    assert_eq!(sent_with(Some(&own)).await, own, "a message id that fits is the job's id");

    let unfit = format!("order/{own} no. 7 ÄÖÜ");
    let (first, second) = (sent_with(Some(&unfit)).await, sent_with(Some(&unfit)).await);
    assert!(fits(&first), "{first}");
    assert_eq!(first, second, "the same message id gives the same job id");
    let other = sent_with(Some(&format!("{unfit}!"))).await;
    assert_ne!(first, other, "another message id gives another");

    let made = sent_with(None).await;
    let uuid = uuid::Uuid::parse_str(&made).expect("a job without an id gets a UUID");
    assert_eq!(uuid.get_version_num(), 7);

    let longest = format!("{own}{}", "_".repeat(64 - own.len()));
    let ended = world.execute(json!({"id": longest, "parameter": "true"})).await;
    assert_eq!(ended.outcome["id"], json!(longest));

    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "from-the-header");
    let (id, request) = world.complete(json!({"parameter": "true"}));
    let ended = world.execute_raw(request.to_string().into(), headers).await;
    assert_eq!(ended.outcome["id"], json!(id), "the request's own id comes first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_environment_the_directory_and_the_user_are_as_asked_for() {
    let world = World::start(&[]).await;
    let image = world.engine.image(Image::Environment).await;
    let show = "sh -c 'echo $COLOUR $SHAPE $EXTRA; pwd; id -u; id -g'";
    let cases = [
        ("the image's own", json!({}), "green round\n/data\n0\n0\n"),
        (
            "env added",
            json!({"env": {"EXTRA": "a b = 'c'\nd"}}),
            "green round a b = 'c' d\n/data\n0\n0\n",
        ),
        ("env replaced", json!({"env": {"COLOUR": "", "SHAPE": "grüß"}}), "grüß\n/data\n0\n0\n"),
        ("a directory", json!({"working_dir": "/etc"}), "green round\n/etc\n0\n0\n"),
        ("the network there is", json!({"network": "none"}), "green round\n/data\n0\n0\n"),
        ("a user by number", json!({"user": "1234"}), "green round\n/data\n1234\n0\n"),
        ("a user and a group", json!({"user": "1234:4321"}), "green round\n/data\n1234\n4321\n"),
        ("a user by name", json!({"user": "app"}), "green round\n/data\n1000\n1000\n"),
    ];
    let jobs = cases.into_iter().map(|(what, mut request, printed)| {
        let (world, image) = (&world, &image);
        async move {
            request["image_reference"] = json!(image);
            request["parameter"] = json!(show);
            let ended = world.execute(request).await;
            assert_eq!(ended.status(), "succeeded", "{what}: {}", ended.outcome);
            assert_eq!(ended.text(), printed, "{what}");
        }
    });
    futures::future::join_all(jobs).await;

    let nobody = world.execute(json!({"parameter": "true", "user": "no-such-user"})).await;
    assert_eq!(
        (nobody.status(), nobody.code()),
        ("rejected", "container.invalid_user"),
        "{}",
        nobody.outcome
    );
    let file = world.execute(json!({"parameter": "true", "working_dir": "/etc/passwd"})).await;
    assert_eq!(
        (file.status(), file.code()),
        ("rejected", "container.invalid_working_dir"),
        "{}",
        file.outcome
    );
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_network_the_engine_does_not_have_ends_the_job_and_not_the_slot() {
    let network = "no-such-network";
    let world =
        World::start(&[("ALLOWED_NETWORKS", "none,no-such-network"), ("MAX_DELIVER", "2")]).await;
    let ended = world.execute(json!({"parameter": "true", "network": network})).await;
    assert!(["rejected", "error"].contains(&ended.status()), "{}", ended.outcome);
    assert!(
        ended.outcome["error"]["message"].as_str().unwrap().contains(network),
        "{}",
        ended.outcome
    );
    world.works(5).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_says_what_it_is_for() {
    let world = World::start(&[("DEFAULT_TIMEOUT", "10m")]).await;
    let held =
        world.hold_with(json!({"labels": {"team": "blue", "com.example/ticket": "Ä 7"}})).await;
    let containers = world.engine.containers_of(&held.id).await;
    assert_eq!(containers.len(), 1);
    let container = &containers[0];
    assert_eq!(label(container, "worker-spawner.image"), Some(world.image.as_str()));
    assert!(!label(container, INSTANCE_LABEL).unwrap().is_empty());
    let deadline: jiff::Timestamp =
        label(container, "worker-spawner.deadline").unwrap().parse().unwrap();
    let ahead = deadline.duration_since(jiff::Timestamp::now()).as_secs();
    assert!(
        (500..=900).contains(&ahead),
        "a deadline {ahead} s ahead of a job that may take 600 s"
    );
    assert_eq!(label(container, "team"), Some("blue"));
    assert_eq!(label(container, "com.example/ticket"), Some("Ä 7"));
    let name = container.names.as_ref().unwrap()[0].clone();
    assert!(name.starts_with(&format!("/worker-spawner-{}-", held.id)), "{name}");
    world.release(&held).await;
    assert_eq!(world.results.wait_for(&held.id).await.payload, "released\n");
    world.engine.gone(&held.id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn two_jobs_of_one_id_do_not_disturb_each_other() {
    let world = World::start(&[]).await;
    let id = world.id();
    let both = (0..2).map(|_| world.execute(json!({"id": id, "parameter": "echo twice"})));
    for ended in futures::future::join_all(both).await {
        assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
        assert_eq!(ended.text(), "twice\n");
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_outcome_goes_to_every_subject_that_may_have_it() {
    let world = World::start(&[("REPLY_PREFIXES", "answers., other.place")]).await;
    for reply_to in
        [world.client.new_inbox(), "answers.for.me".to_string(), "other.place.x".to_string()]
    {
        let answers = Results::subscribe(&world.client, &reply_to).await;
        let ended = world.execute(json!({"parameter": "echo for you", "reply_to": reply_to})).await;
        assert_eq!(ended.status(), "succeeded", "{reply_to}: {}", ended.outcome);
        answers.wait_for_count(1, PATIENCE).await;
        let copy: Value = serde_json::from_slice(&answers.all()[0].payload).unwrap();
        assert_eq!(copy["id"], ended.outcome["id"], "{reply_to}");
        assert_eq!(copy["stdout"], "for you\n", "{reply_to}");
    }
    for refused in
        ["answers", "elsewhere.x", "other.placebo.x", "$JS.API.STREAM.PURGE.X", "functions.results"]
    {
        let overheard = Results::subscribe(&world.client, refused).await;
        let ended =
            world.execute(json!({"parameter": "echo for nobody", "reply_to": refused})).await;
        assert_eq!(
            (ended.status(), ended.code()),
            ("rejected", "request.invalid_field"),
            "{}",
            ended.outcome
        );
        assert!(
            ended.outcome["error"]["message"].as_str().unwrap().contains("reply_to"),
            "{}",
            ended.outcome
        );
        round_trip(&world.client).await;
        let astray =
            overheard.all().iter().filter(|message| message.payload.starts_with(b"{")).count();
        assert_eq!(astray, 0, "nothing may be sent to {refused}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn run_answers_with_the_outcome_and_publishes_the_result() {
    let world = World::start(&[]).await;
    let id = world.id();
    let outcome = world.run(json!({"id": id, "parameter": "sh -c 'echo out; exit 4'"})).await;
    assert_eq!(outcome["id"], json!(id));
    assert_eq!(outcome["status"], "failed");
    assert_eq!(outcome["exit_code"], 4);
    assert_eq!(outcome["stdout"], "out\n");
    assert_eq!(world.results.wait_for(&id).await.payload, "out\n");
    let outcome = world.run(json!({"parameter": 7})).await;
    assert_eq!(outcome["error"]["code"], "request.invalid_field", "{outcome}");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn run_is_answered_with_busy_when_no_slot_comes_free() {
    let world = World::start(&[("MAX_CONTAINERS", "1"), ("RUN_SLOT_TIMEOUT", "200ms")]).await;
    let holder = world.hold().await;
    let id = world.id();
    let outcome = world.run(json!({"id": id, "parameter": "true"})).await;
    assert_eq!(outcome["status"], "error", "{outcome}");
    assert_eq!(outcome["error"]["code"], "busy", "{outcome}");
    world.release(&holder).await;
    world.results.wait_for(&holder.id).await;
    // Whatever would have been published about it has been by the time this one is through.
    assert_eq!(world.execute(json!({"parameter": "echo free"})).await.text(), "free\n");
    assert!(world.results.of(&id).is_empty(), "a busy answer is no job's result");
    world.clean().await;
    let outcome = world.run(json!({"parameter": "echo free again"})).await;
    assert_eq!(outcome["stdout"], "free again\n", "{outcome}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_more_run_at_once_than_may() {
    let world = World::start(&[("MAX_CONTAINERS", "2"), ("RUN_SLOT_TIMEOUT", "100ms")]).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(world.submit(held(json!({}))).await);
    }
    let mut released = 0;
    while released < ids.len() {
        let want = 2.min(ids.len() - released);
        for id in &ids[released..released + want] {
            world.engine.running(id).await;
        }
        // All slots are taken and the others' requests are there: nothing more may start.
        if want == 2 {
            let outcome = world.run(json!({"parameter": "true"})).await;
            assert_eq!(outcome["error"]["code"], "busy", "{outcome}");
        }
        let there = world.containers().await.len();
        assert!(there <= 2, "{there} containers of 2 allowed");
        let container = world.engine.running(&ids[released]).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        world.results.wait_for(&ids[released]).await;
        released += 1;
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn other_prefixes_and_groups_are_other_daemons() {
    let world = World::start(&[]).await;
    let settings = [("SUBJECT_PREFIX", "blue.functions"), ("QUEUE_GROUP", "blue")];
    let settings = world.settings.clone().set_all(&settings);
    let mut blue = crate::support::daemon::Daemon::spawn(&settings);
    blue.wait_ready().await;
    let results = Results::subscribe(&world.client, "blue.functions.results").await;
    let (id, request) = world.complete(json!({"parameter": "echo blue"}));
    let answer = within(
        "the other daemon's answer",
        PATIENCE,
        world.client.request("blue.functions.execute", request.to_string().into()),
    )
    .await
    .unwrap();
    let outcome: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(outcome["stdout"], "blue\n");
    assert_eq!(results.wait_for(&id).await.payload, "blue\n");
    assert!(world.results.of(&id).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_daemon_of_a_group_takes_each_request() {
    let world = World::start(&[]).await;
    let mut second = crate::support::daemon::Daemon::spawn(&world.settings);
    second.wait_ready().await;
    let jobs = (0..20).map(|_| world.execute(json!({"parameter": "echo once"})));
    let ended = futures::future::join_all(jobs).await;
    let workers: std::collections::BTreeSet<&str> =
        ended.iter().map(|ended| ended.outcome["worker"].as_str().unwrap()).collect();
    assert_eq!(workers.len(), 2, "both take part: {workers:?}");
    round_trip(&world.client).await;
    assert!(world.tally().values().all(|count| *count == 1), "{:?}", world.tally());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_without_a_reply_subject_is_answered_on_the_results_alone() {
    let world = World::start(&[]).await;
    let mut everything = world.client.subscribe("functions.>").await.unwrap();
    round_trip(&world.client).await;
    let id = world.submit(json!({"parameter": "echo quiet"})).await;
    world.results.wait_for(&id).await;
    world.engine.gone(&id).await;
    round_trip(&world.client).await;
    let mut subjects = Vec::new();
    while let Ok(Some(message)) =
        tokio::time::timeout(Duration::from_millis(200), everything.next()).await
    {
        subjects.push(message.subject.to_string());
    }
    subjects.retain(|subject| subject != "functions.execute");
    let event = format!("functions.events.{id}");
    assert_eq!(subjects, [&event, "functions.results", &event]);
    // Engines of other machines are nobody's business here.
    assert!(Engine::shared().await.containers_of(&id).await.is_empty());
}
