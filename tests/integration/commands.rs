//! What an image and a command can be: entry points, volumes, users, no shell, no such program.

use serde_json::json;

use crate::support::engine::AGENT_VOLUMES;
use crate::support::images::Image;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_missing_command_is_told_from_a_functions_own_failure() {
    let world = World::start(&[]).await;
    // A function can print what the init process or the engine would; it is its own all the same.
    let said = |reason: &str, code: i64| {
        let words = format!("[FATAL tini (7)] exec sh failed: {reason}");
        json!(["sh", "-c", format!("echo '{words}' >&2; exit {code}")])
    };
    let missing = said("No such file or directory", 127);
    let denied = said("Permission denied", 126);
    let runtime = json!([
        "sh",
        "-c",
        "echo 'OCI runtime create failed: exec: \"sh\": permission denied' >&2; exit 126"
    ]);
    let not_there = ("rejected", "command.not_found", None);
    let not_a_program = ("rejected", "command.not_executable", None);
    let cases = [
        ("a name that is not on the path", json!(["no-such-program"]), not_there),
        ("a path that is not there", json!(["/no/such/program", "x"]), not_there),
        ("an empty name", json!([""]), not_there),
        ("a file that is no program", json!(["/etc/plain"]), not_a_program),
        ("a directory", json!(["/etc"]), not_a_program),
        ("its own 127", json!(["sh", "-c", "exit 127"]), ("failed", "", Some(127))),
        ("its own 126", json!(["sh", "-c", "exit 126"]), ("failed", "", Some(126))),
        ("a shell's 127", json!(["sh", "-c", "no-such-program"]), ("failed", "", Some(127))),
        ("a shell's 126", json!(["sh", "-c", "/etc/plain"]), ("failed", "", Some(126))),
        (
            "a shell that is replaced",
            json!(["sh", "-c", "exec /no/such"]),
            ("failed", "", Some(127)),
        ),
        ("127 in the init's words", missing, ("failed", "", Some(127))),
        ("126 in the init's words", denied, ("failed", "", Some(126))),
        ("126 in the engine's words", runtime, ("failed", "", Some(126))),
    ];
    let jobs = cases.into_iter().map(|(what, parameter, wanted)| {
        let world = &world;
        async move {
            let ended = world.execute(json!({"parameter": parameter})).await;
            let got = (ended.status(), ended.code(), ended.exit_code());
            (got != wanted).then(|| format!("{what}: {}", ended.outcome))
        }
    });
    let wrong: Vec<String> = futures::future::join_all(jobs).await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "answered wrongly:\n{}", wrong.join("\n"));
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_program_that_cannot_start_says_why() {
    let world = World::start(&[]).await;
    let broken = world.engine.image(Image::Broken).await;
    // The file is there and what it needs is not. Whether that is the requester's mistake or the
    // function's failure can be argued; that it is neither success nor silence cannot.
    for request in [
        json!({"parameter": ["/etc/no-interpreter"]}),
        json!({"parameter": ["/etc/garbage"]}),
        json!({"image_reference": broken}),
    ] {
        let ended = world.execute(request).await;
        match ended.status() {
            "rejected" => assert!(ended.code().starts_with("command."), "{}", ended.outcome),
            "failed" => assert!(
                ended.exit_code().is_some_and(|code| code != 0) && !ended.stderr().is_empty(),
                "{}",
                ended.outcome
            ),
            other => panic!("{other}: {}", ended.outcome),
        }
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_parameter_replaces_the_command_and_keeps_the_entry_point() {
    let world = World::start(&[]).await;
    let image = world.engine.image(Image::Entrypoint).await;
    for (parameter, printed) in [
        (None, "entrypoint: own command\n"),
        (Some(json!("")), "entrypoint: own command\n"),
        (Some(json!("given words")), "entrypoint: given words\n"),
        (Some(json!(["a list"])), "entrypoint: a list\n"),
    ] {
        let mut request = json!({"image_reference": image});
        if let Some(parameter) = parameter {
            request["parameter"] = parameter;
        }
        let ended = world.execute(request).await;
        assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
        assert_eq!(ended.text(), printed);
    }
    let image = world.engine.image(Image::NoCommand).await;
    for parameter in [json!(""), json!([])] {
        let ended = world.execute(json!({"image_reference": image, "parameter": parameter})).await;
        assert_eq!(
            (ended.status(), ended.code()),
            ("rejected", "image.no_command"),
            "{}",
            ended.outcome
        );
    }
    let ended = world.execute(json!({"image_reference": image, "parameter": "echo given"})).await;
    assert_eq!(ended.text(), "given\n");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_image_of_one_program_and_nothing_else_runs() {
    let world = World::start(&[]).await;
    let image = world.engine.image(Image::Scratch).await;
    let ended = world.execute(json!({"image_reference": image})).await;
    assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
    assert_eq!(ended.text(), "from scratch\n");
    let ended = world.execute(json!({"image_reference": image, "parameter": "and more"})).await;
    assert_eq!(ended.text(), "from scratch and more\n");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_images_user_is_kept_unless_another_is_asked_for() {
    let world = World::start(&[]).await;
    let image = world.engine.image(Image::User).await;
    let ended = world.execute(json!({"image_reference": image, "parameter": "id -u"})).await;
    assert_eq!(ended.text(), "1000\n", "{}", ended.outcome);
    let ended =
        world.execute(json!({"image_reference": image, "parameter": "id -u", "user": "7"})).await;
    assert_eq!(ended.text(), "7\n", "{}", ended.outcome);
    let ended = world
        .execute(
            json!({"image_reference": image, "parameter": "sh -c 'echo x > /tmp/x; cat /tmp/x'"}),
        )
        .await;
    assert_eq!(ended.text(), "x\n", "any user can write to /tmp: {}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_operators_user_stands_in_for_the_images() {
    let world = World::start(&[("CONTAINER_USER", "4242:4343")]).await;
    let ended = world.execute(json!({"parameter": "sh -c 'id -u; id -g'"})).await;
    assert_eq!(ended.text(), "4242\n4343\n", "{}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_volume_of_an_image_is_writable_and_leaves_nothing() {
    let world = World::start(&[]).await;
    let image = world.engine.image(Image::Volume).await;
    let held = world.hold_with(json!({"image_reference": image})).await;
    let inspected = world.engine.docker().inspect_container(&held.container, None).await.unwrap();
    let volumes: Vec<String> = inspected
        .mounts
        .unwrap_or_default()
        .into_iter()
        .filter(|mount| mount.source.as_deref().is_some_and(|source| source.contains("/volumes/")))
        .filter_map(|mount| mount.name)
        // It holds the program that waits in a warm container, and can only be read there.
        .filter(|name| !name.starts_with(AGENT_VOLUMES))
        .collect();
    world.engine.exec(&held.container, &["sh", "-c", "echo kept > /data/file"]).await;
    let read = world.engine.exec(&held.container, &["cat", "/data/file"]).await;
    assert_eq!(read, "kept\n", "the volume can be written to");
    world.release(&held).await;
    world.results.wait_for(&held.id).await;
    world.engine.gone(&held.id).await;
    for volume in volumes {
        let left = world.engine.docker().inspect_volume(&volume).await;
        assert!(left.is_err(), "the volume {volume} is left behind");
    }
    let ended =
        world.execute(json!({"image_reference": image, "parameter": "cat /data/file"})).await;
    assert_eq!(ended.status(), "failed", "the next job sees none of it: {}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn standard_input_is_fed_and_closed() {
    let world = World::start(&[]).await;
    let big = "0123456789abcde\n".repeat(56 * 1024);
    assert!(big.len() > 900_000);
    let ended = world.execute(json!({"parameter": "cat", "stdin": "grüße\n"})).await;
    assert_eq!(ended.text(), "grüße\n", "{}", ended.outcome);
    let ended = world.execute(json!({"parameter": "wc -c", "stdin": big})).await;
    assert_eq!(ended.text().trim(), big.len().to_string(), "{}", ended.outcome);
    let ended = world.execute(json!({"parameter": "echo never looked", "stdin": big})).await;
    assert_eq!(ended.text(), "never looked\n", "{}", ended.outcome);
    let ended = world.execute(json!({"parameter": "head -c 5", "stdin": big})).await;
    assert_eq!(ended.text(), "01234", "{}", ended.outcome);
    let ended = world
        .execute(json!({"parameter": "sh -c 'exec <&-; sleep 1; echo closed it'", "stdin": big}))
        .await;
    assert_eq!(ended.text(), "closed it\n", "{}", ended.outcome);
    let ended = world.execute(json!({"parameter": "wc -c", "stdin": ""})).await;
    assert_eq!(ended.text().trim(), "0", "{}", ended.outcome);
    let ended = world.execute(json!({"parameter": "wc -c"})).await;
    assert_eq!(ended.text().trim(), "0", "without any, the input is at its end: {}", ended.outcome);
    // The pipes both ways are full at once: who writes all before reading stands still here.
    let ended = world.execute(json!({"parameter": "cat", "stdin": big})).await;
    assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
    assert!(big.as_bytes().starts_with(&ended.stdout()), "what comes back is what went in");
    world.clean().await;
}
