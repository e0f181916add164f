//! What is drawn, and what keys do, on a terminal.

use serde_json::json;

use super::{Client, HELD, script, worlds};
use crate::support::world::World;

/// Hides the line, as whatever draws on a terminal does.
const CLEARS: &str = "\u{1b}[2K";

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_is_drawn_until_it_prints_and_ctrl_c_cancels_it() {
    for world in worlds(&[]).await {
        let id = world.id();
        let silent = "while [ ! -e /tmp/go ]; do sleep 0.1; done; echo first; \
                      while [ ! -e /tmp/end ]; do sleep 0.1; done; echo second; exit 5";
        let running = Client::of(&world, &script(&world, &id, silent)).on_a_terminal().spawn();
        running.prints("running on ").await;
        let container = world.engine.running(&id).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        running.prints("first\r\n").await;
        world.engine.exec(&container, &["touch", "/tmp/end"]).await;
        let ran = running.end().await;
        assert_eq!(ran.code, 5, "{ran:?}");
        let text = ran.text();
        assert!(text.contains(CLEARS), "it draws: {text:?}");
        // Once the function prints, the terminal is its own.
        let own = text.split_once("first\r\n").unwrap().1;
        assert_eq!(own, "second\r\n");

        let id = world.id();
        let mut running = Client::of(&world, &script(&world, &id, HELD)).on_a_terminal().spawn();
        running.prints("begun\r\n").await;
        running.types(b"\x03");
        let ran = running.end().await;
        assert_eq!(ran.code, 130, "{ran:?}");
        assert!(ran.text().contains("is being stopped"), "{ran:?}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn many_jobs_have_a_bar() {
    let world = World::durable(&[]).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let lines: String = (0..6)
        .map(|_| {
            let request = json!({"image_reference": world.image, "parameter": "true"});
            format!("{request}\n")
        })
        .collect();
    std::fs::write(file.path(), lines).unwrap();
    let path = file.path().to_str().unwrap();
    let ran = Client::of(&world, &["submit", "--wait", path]).on_a_terminal().spawn().end().await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let text = ran.text();
    assert!(text.contains("/6"), "{text:?}");
    assert_eq!(text.matches(" succeeded\r\n").count(), 6, "{text:?}");
    assert!(text.contains("6 accepted, 6 succeeded, 0 did not, 0 not accepted"), "{text:?}");
    let quiet = Client::of(&world, &["submit", "--wait", "--quiet", path]);
    let text = quiet.on_a_terminal().spawn().end().await.text();
    assert!(!text.contains('\u{1b}'), "{text:?}");
    world.clean().await;
}
