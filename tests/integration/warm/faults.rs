//! Containers that wait, and engines, daemons and neighbours that do them harm.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bollard::models::ContainerSummary;
use bollard::query_parameters::{KillContainerOptions, ListVolumesOptions, RemoveContainerOptions};
use futures::StreamExt;
use futures::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;

use super::{is_warm, run_warm, shell, wait_for_waiting, warm_world, warm_world_on};
use crate::support::daemon::{Daemon, message_of};
use crate::support::engine::{AGENT_VOLUMES, Engine, PrivateEngine};
use crate::support::images::Image;
use crate::support::process::{self, Signal};
use crate::support::results::header;
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::world::{World, held};

fn ids(containers: &[ContainerSummary]) -> Vec<String> {
    containers.iter().filter_map(|container| container.id.clone()).collect()
}

/// The volumes on this engine that hold an agent.
async fn volumes(engine: &Engine) -> Vec<String> {
    let found = engine
        .docker()
        .list_volumes(None::<ListVolumesOptions>)
        .await
        .unwrap()
        .volumes
        .unwrap_or_default();
    let names = found.into_iter().map(|volume| volume.name);
    names.filter(|name| name.starts_with(AGENT_VOLUMES)).collect()
}

async fn host_pid(world: &World, container: &str) -> u32 {
    let inspected = world.engine.docker().inspect_container(container, None).await.unwrap();
    inspected.state.and_then(|state| state.pid).unwrap().try_into().unwrap()
}

/// Waits until the engine does not know this container any more.
async fn is_gone(world: &World, container: &str) {
    eventually("the container is gone", || async {
        world.engine.docker().inspect_container(container, None).await.is_err()
    })
    .await;
}

/// Runs a job in a container that waits, and waits until nothing is left of it: what is found to
/// wait afterwards does.
async fn run_warm_and_vanish(world: &World) {
    let ended = run_warm(world, &json!({"parameter": "hostname"})).await;
    is_gone(world, ended.text().trim()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_engine_that_dies_with_a_full_pool_leaves_work_to_be_done() {
    let mut private = PrivateEngine::start().await;
    let settings = [("MAX_CONTAINERS", "2"), ("MAX_DELIVER", "20"), ("REAP_INTERVAL", "1s")];
    let mut world = warm_world_on(private.engine().await, 3, &settings).await;
    wait_for_waiting(&world, 3).await;
    let before = ids(&world.idle().await);
    private.kill().await;
    private.restart().await;
    world.works(2).await;
    eventually("others wait in their place", || async {
        let idle = world.idle().await;
        let new = idle.len() == 3 && idle.iter().all(super::is_running);
        new && ids(&idle).iter().all(|id| !before.contains(id))
    })
    .await;
    run_warm(&world, &json!({"parameter": "true"})).await;
    world.clean().await;
    world.daemon.signal(Signal::TERM);
    assert_eq!(world.daemon.exit().await.code(), Some(0), "{}", world.daemon.log().text());
    assert!(world.idle().await.is_empty() && world.containers().await.is_empty());
    assert!(volumes(&world.engine).await.is_empty());
    let left = private.processes();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_pool_that_is_killed_from_outside_costs_no_attempt() {
    let world = warm_world(3, &[]).await;
    for by_removal in [false, true] {
        wait_for_waiting(&world, 3).await;
        let idle = ids(&world.idle().await);
        let docker = world.engine.docker();
        join_all(idle.iter().map(|id| async move {
            if by_removal {
                let options = RemoveContainerOptions { force: true, ..Default::default() };
                docker.remove_container(id, Some(options)).await.unwrap();
            } else {
                docker.kill_container(id, None::<KillContainerOptions>).await.unwrap();
            }
        }))
        .await;
        let ended = world.execute(json!({"parameter": "echo all the same"})).await;
        assert_eq!(ended.text(), "all the same\n", "{}", ended.outcome);
        assert_eq!(ended.outcome["attempt"], 1, "{}", ended.outcome);
        for id in &idle {
            is_gone(&world, id).await;
        }
        run_warm_and_vanish(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_that_does_not_answer_costs_a_moment_and_no_attempt() {
    let world = warm_world(1, &[]).await;
    for by_the_engine in [true, false] {
        wait_for_waiting(&world, 1).await;
        let stuck = ids(&world.idle().await).remove(0);
        let pid = host_pid(&world, &stuck).await;
        if by_the_engine {
            world.engine.docker().pause_container(&stuck).await.unwrap();
        } else {
            process::suspend(pid);
        }
        let ended = world.execute(json!({"parameter": "hostname"})).await;
        assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
        assert_eq!(ended.outcome["attempt"], 1, "{}", ended.outcome);
        assert_eq!(ended.outcome["start"], "cold", "{}", ended.outcome);
        assert!(!stuck.starts_with(ended.text().trim()), "it ran in the one that hangs");
        is_gone(&world, &stuck).await;
        run_warm_and_vanish(&world).await;
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_next_daemon_removes_what_a_killed_one_left_and_runs_its_job_once_more() {
    let image = Image::Busybox.name();
    let settings = [
        ("WARM_CONTAINERS", "3"),
        ("WARM_IMAGES", image.as_str()),
        ("ACK_WAIT", "3s"),
        ("REAP_INTERVAL", "1s"),
    ];
    let mut world = World::durable(&settings).await;
    wait_for_waiting(&world, 3).await;
    // The first job in the container that was started first, and it runs on without its daemon.
    let id = world.submit(held(json!({}))).await;
    let container = world.engine.running(&id).await;
    let inspected = world.engine.docker().inspect_container(&container, None).await.unwrap();
    let labels = inspected.config.unwrap().labels.unwrap();
    assert!(labels.contains_key("worker-spawner.warm"), "it started cold: {labels:?}");
    wait_for_waiting(&world, 3).await;
    let mut left = ids(&world.idle().await);
    left.push(container.clone());
    world.daemon.crash().await;
    // Nobody speaks to them any more: they end by themselves, the job's with its function.
    for container in &left {
        eventually("it has ended", || async {
            let inspected = world.engine.docker().inspect_container(container, None).await;
            inspected.map_or(true, |found| found.state.unwrap().running == Some(false))
        })
        .await;
    }
    let mut next = Daemon::spawn(&world.settings);
    std::mem::swap(&mut world.daemon, &mut next);
    world.daemon.wait_ready().await;
    for container in &left {
        is_gone(&world, container).await;
    }
    // What the dead one left is not removed by the test before this.
    drop(next);
    let second = world.engine.running(&id).await;
    assert_ne!(second, container);
    world.engine.exec(&second, &["touch", "/tmp/go"]).await;
    let ended = world.ended(&id).await;
    assert_eq!(ended.result.payload, "released\n");
    assert_eq!(ended.outcome["attempt"], 2, "{}", ended.outcome);
    world.ledger.settled().await;
    assert_eq!(world.ledger.tally().await[&id], 1);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_is_asked_to_end_takes_all_it_made_along() {
    let private = PrivateEngine::start().await;
    let mut world = warm_world_on(private.engine().await, 3, &[]).await;
    wait_for_waiting(&world, 3).await;
    assert_eq!(volumes(&world.engine).await.len(), 1);
    // While containers are being made as well.
    world.works(3).await;
    world.daemon.signal(Signal::TERM);
    assert_eq!(world.daemon.exit().await.code(), Some(0), "{}", world.daemon.log().text());
    assert!(world.idle().await.is_empty() && world.containers().await.is_empty());
    assert!(volumes(&world.engine).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_ends_does_not_take_its_neighbours_agent_along() {
    let private = PrivateEngine::start().await;
    let mut leaving = warm_world_on(private.engine().await, 1, &[]).await;
    wait_for_waiting(&leaving, 1).await;
    // It has the agent, and nothing of it is in use.
    let staying = World::with(
        crate::support::nats::NatsOptions::default(),
        private.engine().await,
        &[("WARM_CONTAINERS", "2")],
    )
    .await;
    leaving.daemon.signal(Signal::TERM);
    assert_eq!(leaving.daemon.exit().await.code(), Some(0));
    // Sooner than the patience of this function is a matter of seconds.
    run_warm(&staying, &json!({"parameter": "true"})).await;
    let log = staying.daemon.log().text();
    assert!(!log.contains("\"WARN\""), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_agent_of_another_build_is_removed_unless_it_is_in_use() {
    let private = PrivateEngine::start().await;
    let engine = private.engine().await;
    let image = engine.image(Image::Busybox).await;
    let old = format!("{AGENT_VOLUMES}0123456789abcdef");
    let used = format!("{AGENT_VOLUMES}fedcba9876543210");
    for name in [&old, &used] {
        let request =
            bollard::models::VolumeCreateRequest { name: Some(name.clone()), ..Default::default() };
        engine.docker().create_volume(request).await.unwrap();
    }
    let body = bollard::models::ContainerCreateBody {
        image: Some(image),
        host_config: Some(bollard::models::HostConfig {
            binds: Some(vec![format!("{used}:/x")]),
            ..Default::default()
        }),
        ..Default::default()
    };
    engine.docker().create_container(None, body).await.unwrap();
    let world = warm_world_on(engine, 1, &[]).await;
    wait_for_waiting(&world, 1).await;
    let left = volumes(&world.engine).await;
    assert!(!left.contains(&old) && left.contains(&used) && left.len() == 2, "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_agent_that_vanishes_is_delivered_again() {
    let private = PrivateEngine::start().await;
    let world = warm_world_on(private.engine().await, 1, &[]).await;
    wait_for_waiting(&world, 1).await;
    let volume = volumes(&world.engine).await.remove(0);
    let found = world.engine.docker().inspect_volume(&volume).await.unwrap();
    std::fs::remove_file(format!("{}/agent", found.mountpoint)).unwrap();
    // Those that wait have it; the next ones do not.
    for _ in 0..4 {
        let ended = world.execute(json!({"parameter": "echo either way"})).await;
        assert_eq!(ended.text(), "either way\n", "{}", ended.outcome);
        assert_eq!(ended.outcome["attempt"], 1, "{}", ended.outcome);
    }
    run_warm(&world, &json!({"parameter": "true"})).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_engine_that_does_not_take_the_agent_is_told_of_once() {
    // Between the daemon and the engine, somebody answers one kind of call himself.
    let private = PrivateEngine::start().await;
    let host = intercept(private.host(), |call| {
        let path = b"/volumes/worker-spawner-agent-";
        let refused = call.windows(path.len()).any(|window| window == path);
        async move { refused }
    })
    .await;
    let world = warm_world_on(private.engine().await, 2, &[("DOCKER_HOST", &host)]).await;
    let is_complaint = |event: &serde_json::Value| message_of(event).contains("jobs start cold");
    world.daemon.log().wait_for("it says why", is_complaint).await;
    for _ in 0..5 {
        let ended = world.execute(json!({"parameter": "echo all the same"})).await;
        assert_eq!(ended.text(), "all the same\n", "{}", ended.outcome);
        assert!(!is_warm(&ended) && ended.outcome["attempt"] == 1, "{}", ended.outcome);
    }
    assert!(world.idle().await.is_empty());
    let said = world.daemon.log().events().into_iter().filter(is_complaint).count();
    assert_eq!(said, 1, "{}", world.daemon.log().text());
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_that_has_ended_and_cannot_be_removed_yet_costs_no_attempt() {
    // One refusal is made up for at once, while the reaper is kept away. After another the reaper sees
    // to it.
    let private = PrivateEngine::start().await;
    for (refusals, reap_interval) in [(1, "1h"), (2, "1s")] {
        let engine = private.engine().await;
        let doomed = Arc::new(Mutex::new((String::new(), 0)));
        let (docker, refused) = (engine.docker().clone(), doomed.clone());
        let host = intercept(private.host(), move |call| {
            let container = called(call, "DELETE").filter(|container| {
                let (doomed, refusals) = &mut *refused.lock().unwrap();
                let is_refused = container == doomed && *refusals > 0;
                *refusals -= usize::from(is_refused);
                is_refused
            });
            let docker = docker.clone();
            async move {
                let Some(container) = container else { return false };
                // As from an engine that has killed it and cannot remove its files.
                let _ = docker.kill_container(&container, None::<KillContainerOptions>).await;
                let _ = docker.wait_container(&container, None).next().await;
                true
            }
        })
        .await;
        let settings = [("DOCKER_HOST", host.as_str()), ("REAP_INTERVAL", reap_interval)];
        let world = warm_world_on(engine, 1, &settings).await;
        wait_for_waiting(&world, 1).await;
        let container = ids(&world.idle().await).remove(0);
        *doomed.lock().unwrap() = (container.clone(), refusals);
        // Its agent will not take it: more than the kernel gives a program. The first ones may come
        // before the daemon knows that it waits.
        let request = json!({"parameter": ["echo", "x".repeat(200_000)]});
        within("its removal is refused", 2 * PATIENCE, async {
            while doomed.lock().unwrap().1 > 0 {
                let ended = world.execute(request.clone()).await;
                assert_eq!(ended.outcome["attempt"], 1, "{}", ended.outcome);
                assert_eq!(ended.outcome["start"], "cold", "{}", ended.outcome);
                assert_ne!(ended.status(), "error", "{}", ended.outcome);
            }
        })
        .await;
        is_gone(&world, &container).await;
        run_warm(&world, &json!({"parameter": "true"})).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_that_gets_its_name_is_removed_when_it_has_it() {
    let private = PrivateEngine::start().await;
    let calls = Arc::new(Mutex::new(Vec::new()));
    let (answers, answer) = watch::channel(false);
    let seen = calls.clone();
    let host = intercept(private.host(), move |call| {
        let (renamed, removed) = (called(call, "POST"), called(call, "DELETE"));
        let renamed = renamed.filter(|_| call.windows(8).any(|window| window == b"/rename?"));
        if let Some(container) = removed {
            seen.lock().unwrap().push(("removed", container));
        }
        let (seen, mut answer) = (seen.clone(), answer.clone());
        async move {
            if let Some(container) = renamed {
                seen.lock().unwrap().push(("is renamed", container.clone()));
                answer.wait_for(|is_given| *is_given).await.unwrap();
                seen.lock().unwrap().push(("renamed", container));
            }
            false
        }
    })
    .await;
    let world = warm_world_on(private.engine().await, 1, &[("DOCKER_HOST", &host)]).await;
    run_warm(&world, &shell("sleep 2")).await;
    let container = {
        let calls = calls.lock().unwrap();
        let renamed = calls.iter().find(|(what, _)| *what == "is renamed");
        renamed.expect("it gets a name while it runs").1.clone()
    };
    // An engine that takes its time. A daemon that does not wait would have it removed by then.
    tokio::time::sleep(Duration::from_millis(500)).await;
    answers.send_replace(true);
    is_gone(&world, &container).await;
    let mut calls = calls.lock().unwrap().clone();
    calls.retain(|(_, of)| *of == container);
    let calls: Vec<&str> = calls.iter().map(|(what, _)| *what).collect();
    assert_eq!(calls, ["is renamed", "renamed", "removed"]);
    world.clean().await;
}

/// The container that a call with this method is about, if it is one.
fn called(call: &[u8], method: &str) -> Option<String> {
    let line = String::from_utf8_lossy(call.split(|byte| *byte == b'\r').next()?).into_owned();
    let path = line.strip_prefix(method)?;
    let (_, container) = path.split_once("/containers/")?;
    Some(container.split(['/', '?', ' ']).next()?.to_owned())
}

/// What an engine answers that will not.
const REFUSAL: &[u8] = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n\
    Content-Length: 23\r\nConnection: close\r\n\r\n{\"message\":\"not today\"}";

/// The address of a way to the engine at `socket` on which every call waits for `refused`, which says
/// whether it is answered with an error. Open as long as the test's runtime is.
async fn intercept<F>(
    socket: String,
    refused: impl Fn(&[u8]) -> F + Clone + Send + Sync + 'static,
) -> String
where
    F: Future<Output = bool> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (socket, refused) = (socket.clone(), refused.clone());
            tokio::spawn(async move {
                let socket = socket.strip_prefix("unix://").unwrap();
                let mut engine = UnixStream::connect(socket).await.unwrap();
                let (mut there, mut back) = (vec![0; 16 << 10], vec![0; 16 << 10]);
                let mut is_open = true;
                loop {
                    tokio::select! {
                        read = client.read(&mut there), if is_open => {
                            let call = &there[..read.unwrap_or(0)];
                            // A call's first line comes in one piece: it begins a message.
                            if refused(call).await {
                                // Who does not wait for the answer has gone.
                                let _ = client.write_all(REFUSAL).await;
                                return;
                            }
                            is_open = !call.is_empty();
                            let passed = match is_open {
                                true => engine.write_all(call).await,
                                false => engine.shutdown().await,
                            };
                            if passed.is_err() { return }
                        }
                        read = engine.read(&mut back) => {
                            let answer = &back[..read.unwrap_or(0)];
                            if answer.is_empty() || client.write_all(answer).await.is_err() {
                                return;
                            }
                        }
                    }
                }
            });
        }
    });
    format!("tcp://127.0.0.1:{port}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_that_is_killed_while_its_job_runs_is_reported_as_any_other() {
    let world = warm_world(2, &[("MAX_DELIVER", "1")]).await;
    wait_for_waiting(&world, 2).await;
    let killed = world.hold().await;
    world.engine.docker().kill_container(&killed.container, None).await.unwrap();
    let message = world.results.wait_for(&killed.id).await;
    assert_eq!(header(&message, "Job-Status").as_deref(), Some("failed"), "{:?}", message.headers);
    assert_eq!(header(&message, "Job-Exit-Code").as_deref(), Some("137"), "{:?}", message.headers);
    // Its first process alone, with the function left without anybody: nothing runs on.
    wait_for_waiting(&world, 2).await;
    let orphaned = world.hold().await;
    process::send(host_pid(&world, &orphaned.container).await, Signal::KILL);
    let message = world.results.wait_for(&orphaned.id).await;
    assert_ne!(header(&message, "Job-Status").as_deref(), Some("succeeded"));
    is_gone(&world, &orphaned.container).await;
    // An agent that stands still while its function runs: its deadline comes all the same.
    wait_for_waiting(&world, 2).await;
    let mut request = shell("echo begun; sleep 1000");
    request["timeout_ms"] = json!(3000);
    let id = world.submit(request).await;
    let container = world.engine.running(&id).await;
    process::suspend(host_pid(&world, &container).await);
    let message = world.results.wait_for(&id).await;
    assert_ne!(header(&message, "Job-Status").as_deref(), Some("succeeded"));
    is_gone(&world, &container).await;
    tokio::time::timeout(Duration::from_secs(90), world.works(5)).await.unwrap();
    world.clean().await;
}
