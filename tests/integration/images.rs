//! Where images come from: pulled if missing, always or never, with credentials or refused.

use std::os::unix::fs::PermissionsExt;

use base64::Engine as _;
use futures::future::join_all;
use serde_json::{Value, json};

use crate::support::images::Image;
use crate::support::proxy::{Flow, Proxy};
use crate::support::registry::{self, Access, Registry};
use crate::support::unique;
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::world::World;

/// A Docker configuration directory with `config` in it.
fn docker_config(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn path_of(dir: &tempfile::TempDir) -> &str {
    dir.path().to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_image_is_pulled_if_it_is_missing_and_only_then() {
    let registry = Registry::start(Access::Anyone).await;
    let world = World::start(&[]).await;
    let image = registry.reference("made/here:1");
    registry.put("made/here", "1", "first");
    let _guard = world.engine.remove_later(&image);
    let ended = world.execute(json!({"image_reference": image})).await;
    assert_eq!(ended.text(), "first\n", "{}", ended.outcome);
    assert_eq!(ended.outcome["image"], json!(image));
    assert!(
        ended.outcome["timings_ms"]["pull"].as_f64().is_some_and(|took| took > 0.0),
        "{}",
        ended.outcome
    );
    let asked = registry.manifest_requests("made/here");
    assert!(asked > 0);
    registry.put("made/here", "1", "second");
    let ended = world.execute(json!({"image_reference": image})).await;
    assert_eq!(ended.text(), "first\n", "what is there is used");
    assert_eq!(registry.manifest_requests("made/here"), asked, "and nobody is asked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_image_can_be_pulled_every_time() {
    let registry = Registry::start(Access::Anyone).await;
    let world = World::start(&[("PULL_POLICY", "always")]).await;
    let image = registry.reference("changing:latest");
    let _guard = world.engine.remove_later(&image);
    for words in ["first", "second"] {
        registry.put("changing", "latest", words);
        let ended = world.execute(json!({"image_reference": image})).await;
        assert_eq!(ended.text(), format!("{words}\n"), "{}", ended.outcome);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_image_can_be_never_pulled() {
    let registry = Registry::start(Access::Anyone).await;
    let world = World::start(&[("PULL_POLICY", "never")]).await;
    registry.put("made/here", "1", "unreachable");
    let image = registry.reference("made/here:1");
    let ended = world.execute(json!({"image_reference": image})).await;
    assert_eq!(
        (ended.status(), ended.code()),
        ("rejected", "image.not_found"),
        "{}",
        ended.outcome
    );
    assert_eq!(registry.manifest_requests("made/here"), 0, "nobody was asked: {}", registry.log());
    world.works(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn many_jobs_wait_for_one_pull() {
    let registry = Registry::start(Access::Anyone).await;
    registry.put("alone", "1", "alone");
    registry.put("crowd", "1", "crowd");
    let proxy = Proxy::to(registry.port, Flow::Open).await;
    let world = World::start(&[("MAX_CONTAINERS", "6"), ("RUN_SLOT_TIMEOUT", "100ms")]).await;
    let reference = |name: &str| format!("127.0.0.1:{}/{name}:1", proxy.port);
    let (alone, crowd) = (reference("alone"), reference("crowd"));
    let _guards = [world.engine.remove_later(&alone), world.engine.remove_later(&crowd)];
    let ended = world.execute(json!({"image_reference": alone})).await;
    assert_eq!(ended.text(), "alone\n", "{}", ended.outcome);
    let one_pull = registry.manifest_requests("alone");

    proxy.set(Flow::Shut);
    let jobs = join_all((0..6).map(|_| world.execute(json!({"image_reference": crowd}))));
    let opened = async {
        eventually("all slots are waiting for the image", || async {
            let outcome = world.run(json!({"parameter": "true"})).await;
            outcome["error"]["code"] == "busy"
        })
        .await;
        eventually("the engine asks for the image", || async { proxy.connections() > 1 }).await;
        proxy.set(Flow::Open);
    };
    let (jobs, ()) =
        within("all of them have run", PATIENCE, async { tokio::join!(jobs, opened) }).await;
    for ended in jobs {
        assert_eq!(ended.text(), "crowd\n", "{}", ended.outcome);
    }
    assert_eq!(
        registry.manifest_requests("crowd"),
        one_pull,
        "one pull for six jobs:\n{}",
        registry.log()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_registry_does_not_have_is_not_found() {
    let registry = Registry::start(Access::Anyone).await;
    registry.put("made/here", "1", "here");
    let world = World::start(&[]).await;
    let no_such_digest = format!("made/here@sha256:{}", "0".repeat(64));
    for name in ["made/here:2", "made/nowhere:1", "made/nowhere", &no_such_digest] {
        let ended = world.execute(json!({"image_reference": registry.reference(name)})).await;
        assert_eq!(
            (ended.status(), ended.code()),
            ("rejected", "image.not_found"),
            "{name}: {}",
            ended.outcome
        );
    }
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_registry_nobody_answers_at_is_a_failed_pull() {
    let world = World::start(&[("MAX_DELIVER", "2")]).await;
    let image = format!("127.0.0.1:{}/any:1", crate::support::process::free_port());
    let ended = world.execute(json!({"image_reference": image})).await;
    assert_eq!((ended.status(), ended.code()), ("error", "image.pull_failed"), "{}", ended.outcome);
    assert_eq!(ended.outcome["attempt"], 2, "it was tried again: {}", ended.outcome);
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_registry_that_wants_a_password_gets_the_configured_one() {
    let registry = Registry::start(Access::Password).await;
    let host = registry.reference("");
    let host = host.trim_end_matches('/');
    let encode = |text: String| base64::engine::general_purpose::STANDARD.encode(text);
    let good = encode(format!("{}:{}", registry::USER, registry::PASSWORD));
    let bad = encode(format!("{}:wrong", registry::USER));
    let helpers = tempfile::tempdir().unwrap();
    let helper = helpers.path().join("docker-credential-worker-spawner-test");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = get ] || exit 1\nread server || [ -n \"$server\" ] || exit 1\n\
         printf '{{\"ServerURL\":\"%s\",\"Username\":\"{}\",\"Secret\":\"{}\"}}\\n' \"$server\"\n",
        registry::USER,
        registry::PASSWORD
    );
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let search_path = format!("{}:{}", path_of(&helpers), std::env::var("PATH").unwrap());

    let cases = [
        ("no configuration", None, "image.unauthorized"),
        ("an empty one", Some(json!({})), "image.unauthorized"),
        ("a wrong password", Some(json!({"auths": {host: {"auth": bad}}})), "image.unauthorized"),
        (
            "another registry's",
            Some(json!({"auths": {"127.0.0.1:1": {"auth": good}}})),
            "image.unauthorized",
        ),
        ("the right password", Some(json!({"auths": {host: {"auth": good}}})), ""),
        ("with a scheme", Some(json!({"auths": {format!("http://{host}"): {"auth": good}}})), ""),
        (
            "a helper for the registry",
            Some(json!({"credHelpers": {host: "worker-spawner-test"}})),
            "",
        ),
        ("a helper for all", Some(json!({"credsStore": "worker-spawner-test"})), ""),
    ];
    for (index, (what, config, code)) in cases.into_iter().enumerate() {
        // One for each: what the engine has already it needs no password for.
        let name = format!("private{index}");
        registry.put(&name, "1", "let in");
        let image = registry.reference(&format!("{name}:1"));
        let dir = config.map(|config| docker_config(&config));
        let mut settings = vec![("PATH", search_path.as_str())];
        if let Some(dir) = &dir {
            settings.push(("DOCKER_CONFIG", path_of(dir)));
        }
        let world = World::start(&settings).await;
        let _guard = world.engine.remove_later(&image);
        let ended = world.execute(json!({"image_reference": image})).await;
        if code.is_empty() {
            assert_eq!(ended.text(), "let in\n", "{what}: {}", ended.outcome);
        } else {
            assert_eq!(
                (ended.status(), ended.code()),
                ("rejected", code),
                "{what}: {}",
                ended.outcome
            );
        }
        let told = format!("{}\n{}", world.daemon.log().text(), ended.outcome);
        for secret in [registry::PASSWORD, &good] {
            assert!(
                !told.contains(secret),
                "{what}: the password is in the log or the outcome: {told}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_helper_that_fails_does_not_take_the_job_down_with_it() {
    let registry = Registry::start(Access::Anyone).await;
    registry.put("open", "1", "came anyway");
    let image = registry.reference("open:1");
    let config = docker_config(&json!({"credsStore": "is-not-installed"}));
    let world = World::start(&[("DOCKER_CONFIG", path_of(&config))]).await;
    let _guard = world.engine.remove_later(&image);
    let ended = world.execute(json!({"image_reference": image})).await;
    assert_eq!(ended.text(), "came anyway\n", "the registry needs no password: {}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_registry_is_given_up_on_and_can_be_tried_again() {
    let registry = Registry::start(Access::Anyone).await;
    let proxy = Proxy::to(registry.port, Flow::Trickle).await;
    // Long enough for a registry that answers, however busy the machine is.
    let world = World::start(&[("PULL_TIMEOUT", "10s"), ("MAX_DELIVER", "2")]).await;
    for (name, flow) in [("trickling", Flow::Trickle), ("silent", Flow::Shut)] {
        proxy.set(flow);
        registry.put(name, "1", name);
        let image = format!("127.0.0.1:{}/{name}:1", proxy.port);
        let _guard = world.engine.remove_later(&image);
        let (ended, other) = tokio::join!(
            world.execute(json!({"image_reference": image})),
            world.execute(json!({"parameter": "echo meanwhile"})),
        );
        assert_eq!(
            (ended.status(), ended.code()),
            ("error", "image.pull_timeout"),
            "{}",
            ended.outcome
        );
        assert_eq!(other.text(), "meanwhile\n", "who does not need the image does not wait for it");
        proxy.set(Flow::Open);
        let ended = world.execute(json!({"image_reference": image})).await;
        assert_eq!(ended.text(), format!("{name}\n"), "{}", ended.outcome);
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_digest_names_one_image_for_ever() {
    let registry = Registry::start(Access::Anyone).await;
    let world = World::start(&[("IMAGE_ALLOWLIST", "127.0.0.1:*/pinned*")]).await;
    let digest = registry.put("pinned", "1", "first");
    registry.put("pinned", "1", "second");
    let pinned = registry.reference(&format!("pinned@{digest}"));
    let both = registry.reference(&format!("pinned:1@{digest}"));
    let tagged = registry.reference("pinned:1");
    let _guards = [world.engine.remove_later(&pinned), world.engine.remove_later(&tagged)];
    for (image, words) in
        [(&pinned, "first\n"), (&pinned, "first\n"), (&both, "first\n"), (&tagged, "second\n")]
    {
        let ended = world.execute(json!({"image_reference": image})).await;
        assert_eq!(ended.text(), words, "{image}: {}", ended.outcome);
        assert_eq!(ended.outcome["image"], json!(image));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn only_images_on_the_list_are_run() {
    let allowed = "docker.io/worker-spawner-test/busybox:*,docker.io/library/worker-spawner-absent:*,registry.example:5000/team/*";
    let world = World::start(&[("IMAGE_ALLOWLIST", allowed), ("PULL_POLICY", "never")]).await;
    let other = world.engine.image(Image::Entrypoint).await;
    let full = format!("docker.io/{}", world.image);
    let unheard = format!("worker-spawner-{}", unique());
    let cases: Vec<(&str, &str)> = vec![
        (&world.image, ""),
        (&full, ""),
        (&other, "image.not_allowed"),
        (&unheard, "image.not_allowed"),
        ("python", "image.not_allowed"),
        ("docker.io/library/python:3", "image.not_allowed"),
        ("evil.example/worker-spawner-test/busybox:1", "image.not_allowed"),
        ("docker.io.evil.example/worker-spawner-test/busybox:1", "image.not_allowed"),
        ("localhost/worker-spawner-test/busybox:1", "image.not_allowed"),
        // These are on the list by their full names; that nobody has them comes after.
        ("worker-spawner-absent", "image.not_found"),
        ("library/worker-spawner-absent:2", "image.not_found"),
        ("docker.io/worker-spawner-absent", "image.not_found"),
        ("index.docker.io/library/worker-spawner-absent", "image.not_found"),
        ("registry.example:5000/team/tool", "image.not_found"),
        ("registry.example/team/tool", "image.not_allowed"),
    ];
    for (image, code) in cases {
        let ended =
            world.execute(json!({"image_reference": image, "parameter": ["echo", "ran"]})).await;
        let status = if code.is_empty() { "succeeded" } else { "rejected" };
        assert_eq!((ended.status(), ended.code()), (status, code), "{image}: {}", ended.outcome);
    }
}
