//! How many containers wait, of which images, for how long, and for which jobs.

use std::collections::BTreeSet;
use std::time::Duration;

use bollard::query_parameters::{CreateImageOptionsBuilder, TagImageOptionsBuilder};
use bytes::Bytes;
use futures::TryStreamExt;
use futures::future::join_all;
use serde_json::json;

use super::{cold_world, is_warm, run_warm, shell, wait_for_waiting, waiting, warm_world};
use crate::support::engine::Engine;
use crate::support::images::{Image, LABEL, ROOT};
use crate::support::registry::{Access, Registry};
use crate::support::tar::archive;
use crate::support::unique;
use crate::support::wait::eventually;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_image_of_the_settings_is_warm_before_anybody_asks() {
    let world = warm_world(3, &[]).await;
    wait_for_waiting(&world, 3).await;
    let ended = run_warm(&world, &json!({"parameter": "echo at once"})).await;
    assert_eq!(ended.text(), "at once\n");
    assert!(ended.outcome["timings_ms"].get("create").is_none_or(|took| took == 0.0));
    wait_for_waiting(&world, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_image_that_is_used_becomes_warm_and_another_one_makes_room() {
    let world = World::start(&[("WARM_CONTAINERS", "2")]).await;
    let others = [Image::NoCommand, Image::Environment];
    let images = [
        world.image.clone(),
        world.engine.image(others[0]).await,
        world.engine.image(others[1]).await,
    ];
    assert!(world.idle().await.is_empty(), "nobody has asked for anything");
    for image in &images {
        let request = json!({"image_reference": image, "parameter": "echo mine"});
        run_warm(&world, &request).await;
        eventually("its containers wait", || async { !waiting(&world, image).await.is_empty() })
            .await;
        // One that makes room is removed beside the making of the other.
        eventually("no more wait than may", || async { world.idle().await.len() <= 2 }).await;
    }
    // What was used last is there; what was not used for longest has gone first.
    eventually("the first one has made room", || async {
        waiting(&world, &images[0]).await.is_empty()
    })
    .await;
    eventually("the last one waits", || async { !waiting(&world, &images[2]).await.is_empty() })
        .await;
    run_warm(&world, &json!({"image_reference": images[0], "parameter": "echo back"})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_nobody_asks_for_any_more_does_not_wait_for_ever() {
    let world = World::start(&[("WARM_CONTAINERS", "2"), ("WARM_IDLE_TIMEOUT", "2s")]).await;
    world.works(1).await;
    eventually("something waits", || async { !world.idle().await.is_empty() }).await;
    wait_for_waiting(&world, 0).await;
    // An image that the settings name stays.
    let world = warm_world(2, &[("WARM_IDLE_TIMEOUT", "1s")]).await;
    let user = json!({"parameter": "true", "user": "1000"});
    run_warm(&world, &user).await;
    eventually("what is not named in the settings has gone", || async {
        let idle = world.idle().await;
        let mut users = Vec::new();
        for id in idle.iter().filter_map(|found| found.id.as_ref()) {
            let inspected = world.engine.docker().inspect_container(id, None).await;
            users.extend(inspected.ok().and_then(|found| found.config?.user));
        }
        !users.is_empty() && users.iter().all(String::is_empty)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_more_wait_than_may_and_those_who_wait_take_no_slot() {
    let world = warm_world(2, &[("MAX_CONTAINERS", "3")]).await;
    wait_for_waiting(&world, 2).await;
    let mut most = 0;
    let jobs = async {
        for _ in 0..8 {
            world.works(3).await;
        }
    };
    let sampling = async {
        loop {
            let all = world.idle().await;
            // A container is named after its job only when that has run for a moment; of those
            // that are being removed, some still run. What is more than both is one too many.
            most = most.max(all.iter().filter(|found| super::is_running(found)).count());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = jobs => {}
        () = sampling => {}
    }
    assert!(most <= 2 + 3, "{most} containers for 2 that wait and 3 that run");
    wait_for_waiting(&world, 2).await;
    // All three slots are free although two containers wait.
    let held = [world.hold().await, world.hold().await, world.hold().await];
    eventually("the pool is full beside them", || async { world.idle().await.len() == 2 }).await;
    assert_eq!(world.containers().await.len(), 3);
    for held in &held {
        world.release(held).await;
        world.results.wait_for(&held.id).await;
    }
    wait_for_waiting(&world, 2).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_a_pool_every_job_starts_cold() {
    let world = cold_world(&[]).await;
    for _ in 0..5 {
        let ended = world.execute(json!({"parameter": "true"})).await;
        assert_eq!(ended.outcome["start"], "cold");
        assert!(world.idle().await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_serves_one_job() {
    let world = warm_world(4, &[]).await;
    let script = "cat /tmp/mine 2>/dev/null && exit 9; echo x > /tmp/mine; hostname";
    let mut names = BTreeSet::new();
    let mut warm = 0;
    for _ in 0..8 {
        let jobs = join_all((0..4).map(|_| world.execute(shell(script)))).await;
        for ended in &jobs {
            assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
            assert!(names.insert(ended.text()), "two jobs in {}", ended.text());
            warm += usize::from(is_warm(ended));
        }
        eventually("some wait again", || async { !world.idle().await.is_empty() }).await;
    }
    assert!(warm > 8, "{warm} of 32 started warm");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_with_labels_has_a_container_of_its_own() {
    let world = warm_world(2, &[]).await;
    wait_for_waiting(&world, 2).await;
    let request = json!({"parameter": "true", "labels": {"team": "blue"}});
    assert_eq!(world.execute(request).await.outcome["start"], "cold");
    let none = json!({"parameter": "true", "labels": {}});
    run_warm(&world, &none).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn limits_of_a_job_are_in_force_in_a_container_that_had_others() {
    let world = warm_world(2, &[]).await;
    let show = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes \
                /sys/fs/cgroup/memory/memory.memsw.limit_in_bytes /sys/fs/cgroup/pids/pids.max \
                /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || \
                { cat /sys/fs/cgroup/memory.max; cat /sys/fs/cgroup/memory.max; \
                cat /sys/fs/cgroup/pids.max; cut -d' ' -f1 /sys/fs/cgroup/cpu.max; }";
    // Down, up, and each at once.
    for (memory, pids, cpus) in
        [(64 << 20, 10, 0.5), (32 << 20, 200, 0.25), (512 << 20, 256, 1.0), (100 << 20, 5, 0.1)]
    {
        let mut request = shell(show);
        request["memory_bytes"] = json!(memory);
        request["pids"] = json!(pids);
        request["cpus"] = json!(cpus);
        let ended = run_warm(&world, &request).await;
        let said: Vec<String> = ended.text().lines().map(ToString::to_string).collect();
        let swap = if said[1] == "0" { 0 } else { memory };
        let quota = format!("{}", cpus * 100_000.0);
        assert_eq!(said, [memory.to_string(), swap.to_string(), pids.to_string(), quota]);
    }
    let mut hog = shell("exec dd if=/dev/zero of=/dev/null bs=128M count=1");
    hog["memory_bytes"] = json!(32 << 20);
    let ended = run_warm(&world, &hog).await;
    assert_eq!(
        (ended.status(), ended.exit_code(), &ended.outcome["oom_killed"]),
        ("out_of_memory", Some(137), &json!(true)),
        "{}",
        ended.outcome
    );
    let mut parent = shell("dd if=/dev/zero of=/dev/null bs=128M count=1; echo went on");
    parent["memory_bytes"] = json!(32 << 20);
    let ended = run_warm(&world, &parent).await;
    assert_eq!((ended.status(), ended.text().as_str()), ("succeeded", "went on\n"));
    assert_eq!(ended.outcome["oom_killed"], true, "{}", ended.outcome);
    let mut bomb = shell("for i in $(seq 1 40); do sleep 100 & done; wait");
    (bomb["pids"], bomb["timeout_ms"]) = (json!(12), json!(10_000));
    let ended = run_warm(&world, &bomb).await;
    assert_ne!(ended.status(), "succeeded", "{}", ended.outcome);
    let said = String::from_utf8_lossy(&ended.stderr()).into_owned();
    assert!(said.contains("fork"), "{}", ended.outcome);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_tag_that_moved_is_not_served_from_what_waits() {
    let registry = Registry::start(Access::Anyone).await;
    let image = registry.reference("moving:latest");
    let settings = [("PULL_POLICY", "always"), ("WARM_CONTAINERS", "2")];
    registry.put("moving", "latest", "0");
    // Removed when nothing that waits has a use for it any more.
    let _guard = Engine::shared().await.remove_later(&image);
    let world = World::start(&settings).await;
    let request = json!({"image_reference": image});
    for version in 0..4 {
        let words = version.to_string();
        registry.put("moving", "latest", &words);
        let ended = world.execute(request.clone()).await;
        assert_eq!(ended.text(), format!("{words}\n"), "{}", ended.outcome);
        let ended = run_warm(&world, &request).await;
        assert_eq!(ended.text(), format!("{words}\n"), "{}", ended.outcome);
    }
    eventually("nothing waits of what the name stood for before", || async {
        waiting(&world, &image).await.len() == world.idle().await.len()
    })
    .await;
}

/// Makes an image on the world's engine that prints `words`, under this name.
async fn import(world: &World, name: &str, words: &str) {
    let (repository, tag) = name.rsplit_once(':').unwrap();
    let mut options =
        CreateImageOptionsBuilder::default().from_src("-").repo(repository).tag(tag).build();
    options.changes = vec![format!(r#"CMD ["echo", "{words}"]"#), format!("LABEL {LABEL}=1")];
    let body = bollard::body_full(Bytes::from(archive(&ROOT)));
    let docker = world.engine.docker();
    docker.create_image(Some(options), Some(body), None).try_collect::<Vec<_>>().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_name_that_is_given_to_another_image_on_the_engine_is_noticed() {
    let name = format!("worker-spawner-test/retagged-{}", unique());
    let (a, b, moving) = (format!("{name}:a"), format!("{name}:b"), format!("{name}:moving"));
    let _guard = Engine::shared().await.remove_later(&a);
    let world = World::start(&[("PULL_POLICY", "missing"), ("WARM_CONTAINERS", "2")]).await;
    import(&world, &a, "first").await;
    import(&world, &b, "second").await;
    let request = json!({"image_reference": moving});
    for (source, words) in [(&a, "first\n"), (&b, "second\n"), (&a, "first\n")] {
        let options = TagImageOptionsBuilder::default().repo(&name).tag("moving").build();
        world.engine.docker().tag_image(source, Some(options)).await.unwrap();
        // The daemon hears of it from the engine, which takes a moment.
        eventually("the name stands for it", || async {
            world.execute(request.clone()).await.text() == words
        })
        .await;
        let ended = run_warm(&world, &request).await;
        assert_eq!(ended.text(), words, "{}", ended.outcome);
    }
}
