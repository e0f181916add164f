//! `check --run`: one job goes the whole way, or it is said what stops it.

use bollard::models::ContainerSummary;

use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::Engine;
use crate::support::images::Image;
use crate::support::nats::{Auth, NatsOptions, NatsServer, NatsVersion};
use crate::support::process::{self, Signal, free_port};
use crate::support::results::header;
use crate::support::wait::eventually;
use crate::support::world::World;

use super::{Checked, Checking, LISTED, PROGRAM, check_with};

/// Has such a job tried.
async fn tried(settings: &Settings, arguments: &[&str]) -> Checked {
    check_with(settings, &[&["--run"], arguments].concat()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_goes_all_the_way() {
    for world in [World::start(&[]).await, World::durable(&[]).await] {
        let checked = tried(&world.settings, &[&world.image, "--", "true"]).await;
        assert_eq!(checked.code, Some(0), "{:#?}", checked.findings);
        assert_eq!(checked.listed(), [&LISTED[..], &["run"]].concat());
        let detail = checked.of("run", "ok")[0]["detail"].as_str().unwrap();
        assert!(detail.starts_with("started cold on ") && detail.ends_with(" ms"), "{detail}");
        assert_eq!(super::check(&world.settings).await.listed(), LISTED, "it is not asked for");

        // The image's own command; one that fails says nothing against the daemon.
        let own = tried(&world.settings, &[&world.image]).await;
        assert_eq!(own.of("run", "ok").len(), 1, "{:#?}", own.findings);
        let failed = tried(&world.settings, &[&world.image, "--", "sh", "-c", "exit 3"]).await;
        failed.finds("warn", "run", "failed with exit code 3", "a command that succeeds, after --");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_the_daemon_refuses_is_told_with_what_to_do() {
    let allowed = "worker-spawner-test/*,no-such-image";
    let settings = [("IMAGE_ALLOWLIST", allowed), ("PULL_POLICY", "never")];
    for world in [World::start(&settings).await, World::durable(&settings).await] {
        for (arguments, code, remedy) in [
            (&["another-image"][..], "image.not_allowed", "add this one to it"),
            (&["no-such-image"], "image.not_found", "check name and tag"),
            (&[&world.image, "--", "no-such-command"], "command.not_found", "that the image has"),
        ] {
            let checked = tried(&world.settings, arguments).await;
            checked.finds("fail", "run", &format!("rejected: {code}: "), remedy);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn that_nobody_is_there_is_told() {
    for options in [NatsOptions::default(), NatsOptions::durable(NatsVersion::Installed)] {
        let nats = NatsServer::with(options).await;
        let settings = Settings::new().set("DELIVERY", "auto").nats(&nats);
        let checked = tried(&settings, &["busybox"]).await;
        checked.finds("fail", "run", "no worker answers on functions.status", "start a daemon");
    }
    let away = format!("nats://127.0.0.1:{}", free_port());
    let checked = tried(&Settings::new().set("NATS_URL", &away), &["busybox"]).await;
    checked.does_not_check(&["run"], "NATS cannot be reached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_takes_too_long_is_given_up() {
    // Longer than a container takes to start, however busy the machine is.
    let patience = "12s";
    let still_ran = format!("no outcome within {patience}: it still ran");
    let core = World::start(&[("MAX_CONTAINERS", "1")]).await;
    let world = World::durable(&[("MAX_CONTAINERS", "1")]).await;
    for world in [&core, &world] {
        let forever = [&world.image, "--run-timeout", patience, "--", "sleep", "1000"];
        let checked = tried(&world.settings, &forever).await;
        checked.finds("fail", "run", &still_ran, "a command that ends soon");
    }
    // It is cancelled, or this one would never get the slot.
    let held = world.hold().await;
    let arguments = [&world.image, "--run-timeout", "1s", "--", "true"];
    let checked = tried(&world.settings, &arguments).await;
    checked.finds("fail", "run", "no worker took it up", "whether all slots are in use");
    world.release(&held).await;
    assert_eq!(world.ended(&held.id).await.status(), "succeeded");
    eventually("the other one was not started", || async {
        let results = world.ledger.results().await;
        let status = |result| header(result, "Job-Status");
        results.iter().filter(|result| status(result).as_deref() == Some("cancelled")).count() == 2
    })
    .await;
    world.clean().await;
    core.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_interrupt_takes_the_job_along() {
    for world in [World::start(&[]).await, World::durable(&[]).await] {
        let script = format!("exec sleep 1000; : {}", world.id());
        let arguments = ["--run", &world.image, "--run-timeout", "1h", "--", "sh", "-c", &script];
        let checking = Checking::begin(&[PROGRAM], &world.settings, &arguments);
        let is_its = |found: &ContainerSummary| {
            found.command.as_ref().is_some_and(|command| command.contains(&script))
        };
        let container = || async {
            let found = world.engine.containers().await.into_iter().find(is_its);
            found.map(|found| found.status.unwrap_or_default())
        };
        eventually("it runs", || async {
            container().await.is_some_and(|status| status.starts_with("Up"))
        })
        .await;
        process::send(checking.child.id(), Signal::INT);
        let checked = checking.end().await;
        assert_eq!(checked.code, Some(130), "{:#?}", checked.findings);
        assert_eq!(checked.listed(), [&LISTED[..], &["run"]].concat());
        let found = checked.of("run", "fail")[0]["detail"].as_str().unwrap();
        assert!(found.starts_with("interrupted: "), "{found}");
        assert!(found.ends_with(" is being stopped"), "{found}");
        eventually("its container is gone", || async { container().await.is_none() }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_documented_permissions_are_enough_for_it() {
    let options =
        NatsOptions { auth: Auth::Documented, ..NatsOptions::durable(NatsVersion::Installed) };
    let nats = NatsServer::with(options).await;
    let engine = Engine::shared().await;
    let image = engine.image(Image::Busybox).await;
    let settings = Settings::jetstream().nats(&nats).engine(&engine);
    let mut daemon = Daemon::spawn(&settings);
    daemon.wait_ready().await;
    let checked = tried(&settings, &[&image, "--", "true"]).await;
    assert_eq!(checked.of("run", "ok").len(), 1, "{:#?}", checked.findings);
}
