//! `run`: what it prints, and how it ends.

use serde_json::json;

use super::{Client, HELD, is_durable, script, worlds};
use crate::support::nats::{NatsOptions, NatsServer};
use crate::support::process::Signal;
use crate::support::wait::eventually;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn it_ends_as_the_function_ends() {
    for world in worlds(&[("PULL_POLICY", "never")]).await {
        let shell =
            |text: &str, wanted: i32| (vec!["sh".to_string(), "-c".into(), text.into()], wanted);
        let word = |text: &str, wanted: i32| (vec![text.to_string()], wanted);
        let cases = [
            shell("echo out; echo err >&2; exit 3", 3),
            shell("exit 0", 0),
            shell("kill -9 $$", 137),
            shell("kill -15 $$", 143),
            word("no-such-command", 127),
            word("/etc", 126),
        ];
        for (command, wanted) in cases {
            let id = world.id();
            let mut line = vec!["run", &world.image, "--id", &id, "--quiet", "--"];
            line.extend(command.iter().map(String::as_str));
            let ran = Client::of(&world, &line).run().await;
            assert_eq!(ran.code, wanted, "{command:?}: {ran:?}");
            if wanted == 3 {
                assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("out\n", "err\n"));
            }
        }
        let id = world.id();
        let line = ["run", &world.image, "--id", &id, "--timeout", "500ms", "--", "sleep", "60"];
        let ran = Client::of(&world, &line).run().await;
        assert_eq!(ran.code, 124, "{ran:?}");
        assert!(ran.stderr.contains("timed_out: job.timed_out: "), "{}", ran.stderr);
        assert!(ran.stderr.contains("running on "), "{}", ran.stderr);

        // The engine hears of the memory from the kernel, and of the end from elsewhere: a moment
        // lies between the two, so that neither can overtake the other.
        let greed = "sleep 1; dd if=/dev/zero of=/dev/null bs=128M count=1; sleep 1; kill -9 $$";
        let id = world.id();
        let line = ["run", &world.image, "--id", &id, "--memory", "32MiB", "--", "sh", "-c", greed];
        let ran = Client::of(&world, &line).run().await;
        assert_eq!(ran.code, 137, "{ran:?}");
        assert!(ran.stderr.contains("out_of_memory: "), "{}", ran.stderr);

        let ran = Client::of(&world, &["run", "no.such/image:1", "--id", &world.id()]).run().await;
        assert_eq!(ran.code, 125, "{ran:?}");
        assert!(ran.stderr.contains("rejected: image.not_found: "), "{}", ran.stderr);
        let ran = Client::of(&world, &["run", &world.image, "--cpus", "99"]).run().await;
        assert_eq!(ran.code, 125, "{ran:?}");
        assert!(ran.stderr.contains("request.invalid_field: cpus: "), "{}", ran.stderr);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn options_reach_the_function() {
    let world = World::durable(&[]).await;
    let id = world.id();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "# of a file\nFROM=file\nBOTH=file\n").unwrap();
    let show = "echo $FROM $BOTH $HERE; pwd; id -u; ulimit -n";
    let mut line = vec!["run", &world.image, "--id", &id, "-e", "BOTH=line", "-e", "HERE"];
    line.extend(["--env-file", file.path().to_str().unwrap(), "-w", "/tmp", "-u", "123:45"]);
    line.extend(["--label", "team=x", "--priority", "high", "--pids", "20", "--network", "none"]);
    line.extend(["--expires", "1h", "--retry", "2", "--", "sh", "-c", show]);
    let ran = Client::of(&world, &line).set("HERE", "of here").run().await;
    assert_eq!(ran.text(), "file line of here\n/tmp\n123\n1024\n", "{ran:?}");
    assert_eq!(ran.code, 0);
    // It fails once, and is tried again as was asked for.
    let id = world.id();
    let line =
        ["run", &world.image, "--id", &id, "--retry", "2", "--", "sh", "-c", "echo try; exit 4"];
    let ran = Client::of(&world, &line).run().await;
    assert_eq!((ran.code, ran.text().as_str()), (4, "try\ntry\n"), "{ran:?}");
    assert!(ran.stderr.contains("attempt 2 begins"), "{}", ran.stderr);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_is_there_while_the_function_runs_and_only_once() {
    for world in worlds(&[]).await {
        let id = world.id();
        let running = Client::of(&world, &script(&world, &id, HELD)).spawn();
        running.prints("begun\n").await;
        let container = world.engine.running(&id).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        let ran = running.end().await;
        assert_eq!((ran.code, ran.text().as_str()), (0, "begun\nreleased\n"), "{ran:?}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_does_not_come_live_comes_at_the_end() {
    // So little may wait that most of it is dropped; what is longer than a message is an object.
    let settings = [("LIVE_LOGS_BUFFER", "64KiB"), ("OUTPUT_LIMIT", "300KiB")];
    for world in worlds(&settings).await {
        for kib in [250, 3000] {
            let id = world.id();
            let print = format!("seq 1 1000000 | head -c {}", kib * 1024);
            let ran = Client::of(&world, &script(&world, &id, &print)).run().await;
            assert_eq!(ran.code, 0, "{}", ran.stderr);
            let all: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
            let all = &all.as_bytes()[..kib * 1024];
            if kib == 250 || is_durable(&world) {
                assert!(ran.stdout == all, "{} bytes of {}", ran.stdout.len(), all.len());
            } else {
                // Nobody has the rest, and that is said.
                assert!(all.starts_with(&ran.stdout) && ran.stdout.len() >= 300 * 1024);
                let lost = ran.stderr.contains("the end of stdout was not kept");
                assert_eq!(lost, ran.stdout.len() < all.len(), "{}", ran.stderr);
            }
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn standard_input_reaches_the_function() {
    for world in worlds(&[("LIVE_LOGS_BUFFER", "8MiB")]).await {
        let text = "zwei Zeilen\nund Umlaute: äöü\n".repeat(100);
        let binary: Vec<u8> = (0..=255u8).cycle().take(2_000_000).collect();
        for input in [text.as_bytes(), b"", &binary] {
            let id = world.id();
            let line = ["run", &world.image, "-i", "--id", &id, "-q", "--", "cat"];
            let ran = Client::of(&world, &line).run_with(input).await;
            if is_durable(&world) || input.len() < 1_000_000 {
                assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
                assert!(ran.stdout == input, "{} bytes of {}", ran.stdout.len(), input.len());
            } else {
                assert_eq!(ran.code, 125);
                assert!(ran.stderr.contains("needs JetStream"), "{}", ran.stderr);
            }
            if is_durable(&world) {
                assert_eq!(world.ledger.object(&format!("stdin/{id}")).await, None, "it stays");
            }
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_outcome_is_one_document() {
    for world in worlds(&[]).await {
        let id = world.id();
        let line = ["run", &world.image, "--id", &id, "--json", "--", "sh", "-c", "echo a; exit 9"];
        let ran = Client::of(&world, &line).run().await;
        assert_eq!(ran.code, 9);
        let [outcome] = &ran.json()[..] else { panic!("{ran:?}") };
        assert_eq!(outcome["id"], json!(id));
        assert_eq!((&outcome["status"], &outcome["stdout"]), (&json!("failed"), &json!("a\n")));
        if is_durable(&world) {
            assert_eq!(*outcome, world.ended(&id).await.outcome);
            // The id is known: nothing runs, and what became of it is told again.
            let again = Client::of(&world, &script(&world, &id, "echo b")).run().await;
            assert_eq!((again.code, again.text().as_str()), (9, "a\n"), "{again:?}");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_detached_job_is_accepted_before_its_id_is_printed() {
    for world in worlds(&[]).await {
        let id = world.id();
        let mut line = script(&world, &id, HELD);
        line.insert(1, "--detach");
        let ran = Client::of(&world, &line).run().await;
        assert_eq!((ran.code, ran.text()), (0, format!("{id}\n")), "{ran:?}");
        let container = world.engine.running(&id).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        world.results.wait_for(&id).await;
        world.clean().await;
    }
    let nobody = NatsServer::with(NatsOptions::default()).await;
    for arguments in [&["run", "-d", "busybox"][..], &["run", "busybox"]] {
        let ran = Client::new(arguments).set("NATS_URL", &nobody.url()).run().await;
        assert_eq!((ran.code, ran.text().as_str()), (125, ""), "{ran:?}");
        assert!(ran.stderr.contains("nobody takes requests"), "{}", ran.stderr);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_interrupt_cancels_and_a_second_one_leaves() {
    for world in worlds(&[("STOP_GRACE", "5m")]).await {
        let id = world.id();
        let running = Client::of(&world, &script(&world, &id, HELD)).spawn();
        running.prints("begun\n").await;
        running.signal(Signal::INT);
        let ran = running.end().await;
        assert_eq!(ran.code, 130, "{ran:?}");
        assert!(ran.stderr.contains(&format!("{id} is being stopped")), "{}", ran.stderr);
        world.engine.gone(&id).await;

        let id = world.id();
        let stubborn = format!("trap '' TERM; {HELD}");
        let mut running = Client::of(&world, &script(&world, &id, &stubborn)).spawn();
        running.prints("begun\n").await;
        running.signal(Signal::TERM);
        running.says("is being stopped").await;
        // Two in one moment are one.
        eventually("it leaves", || {
            running.signal(Signal::TERM);
            let ended = running.has_ended();
            async move { ended }
        })
        .await;
        let ran = running.end().await;
        assert_eq!(ran.code, 143, "{ran:?}");
        assert!(ran.stderr.contains("is left to itself"), "{}", ran.stderr);
        let container = world.engine.running(&id).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        world.results.wait_for(&id).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_cancels_what_waits_does_not_wait_for_its_turn() {
    let world = World::durable(&[("MAX_CONTAINERS", "1")]).await;
    let held = world.hold().await;
    let id = world.id();
    let running = Client::of(&world, &script(&world, &id, "echo never")).spawn();
    running.says("is queued").await;
    running.signal(Signal::INT);
    let ran = running.end().await;
    assert_eq!((ran.code, ran.text().as_str()), (130, ""), "{ran:?}");
    assert!(ran.stderr.contains("does not run, and will not start"), "{ran:?}");
    world.release(&held).await;
    assert_eq!(world.ended(&id).await.status(), "cancelled");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_reads_no_further_ends_the_job() {
    let world = World::durable(&[]).await;
    let id = world.id();
    let line = script(&world, &id, "while echo y; do sleep 0.01; done");
    let line: Vec<String> = line.iter().map(|word| shell_words::quote(word).into()).collect();
    let program = env!("CARGO_BIN_EXE_worker-spawner");
    let shell = format!("{program} {} | head -n 2; sleep 600", line.join(" "));
    let mut client = Client::of(&world, &[]);
    client.command = ["sh", "-c", &shell].iter().map(ToString::to_string).collect();
    let running = client.spawn();
    running.prints("y\ny\n").await;
    let ended = world.ended(&id).await;
    assert_eq!(ended.status(), "cancelled", "{:?}", ended.outcome);
    world.clean().await;
    let all = String::from_utf8_lossy(&running.stderr.bytes()).into_owned();
    assert!(!all.contains("pipe") && !all.contains("panic"), "{all}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_outlives_its_server_and_is_still_waited_for() {
    let mut world = World::durable(&[]).await;
    let id = world.id();
    let running = Client::of(&world, &script(&world, &id, HELD)).spawn();
    running.prints("begun\n").await;
    let container = world.engine.running(&id).await;
    world.nats.restart().await;
    world.engine.exec(&container, &["touch", "/tmp/go"]).await;
    let ran = running.end().await;
    assert_eq!((ran.code, ran.text().as_str()), (0, "begun\nreleased\n"), "{ran:?}");
    eventually("nothing of the job is left", || async {
        world.engine.containers_of(&id).await.is_empty()
    })
    .await;
}
