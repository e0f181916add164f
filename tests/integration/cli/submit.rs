//! `submit`: many requests, good and bad.

use std::collections::BTreeMap;

use serde_json::json;

use super::{Client, is_durable, worlds};

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bad_line_is_told_and_the_rest_goes() {
    for world in worlds(&[("MAX_CONTAINERS", "4")]).await {
        let ids: Vec<String> = (0..10).map(|_| world.id()).collect();
        let mut lines: Vec<String> = ids
            .iter()
            .map(|id| {
                let exit = if *id == ids[7] { "exit 3" } else { "exit 0" };
                let command = json!(["sh", "-c", format!("echo {id}; {exit}")]);
                let request =
                    json!({"id": id, "image_reference": world.image, "parameter": command});
                request.to_string()
            })
            .collect();
        lines.insert(2, "{\"image_reference\": oops}".into());
        lines.insert(5, String::new());
        let input = lines.join("\n");

        // Handed in, and no more.
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &input).unwrap();
        let path = file.path().to_str().unwrap();
        let ran = Client::of(&world, &["submit", "--in-flight", "3", path]).run().await;
        assert_eq!(ran.code, 1, "{ran:?}");
        let mut accepted: Vec<String> = ran.text().lines().map(str::to_string).collect();
        accepted.sort();
        let mut wanted = ids.clone();
        wanted.sort();
        assert_eq!(accepted, wanted);
        assert!(ran.stderr.contains("line 3: is no JSON object: "), "{}", ran.stderr);
        assert!(ran.stderr.contains("10 accepted, 1 not accepted"), "{}", ran.stderr);
        for id in &ids {
            world.results.wait_for(id).await;
        }
        if is_durable(&world) {
            world.ledger.settled().await;
        }

        // Waited for. Where an id is one job, this is what became of the same.
        let line = ["submit", "--in-flight", "4", "--json", "-"];
        let ran = Client::of(&world, &line).run_with(input.as_bytes()).await;
        assert_eq!(ran.code, 1, "one fails: {}", ran.stderr);
        let ended: BTreeMap<String, String> = ran
            .json()
            .iter()
            .map(|outcome| {
                let text = |name: &str| outcome[name].as_str().unwrap().to_string();
                assert_eq!(text("stdout"), format!("{}\n", text("id")));
                (text("id"), text("status"))
            })
            .collect();
        let wanted = ids.iter().map(|id| {
            let status = if *id == ids[7] { "failed" } else { "succeeded" };
            (id.clone(), status.to_string())
        });
        assert_eq!(ended, wanted.collect());
        let summary = "10 accepted, 9 succeeded, 1 did not, 1 not accepted";
        assert!(ran.stderr.contains(summary), "{}", ran.stderr);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_document_is_taken_as_well() {
    for world in worlds(&[]).await {
        let (one, other) = (world.id(), world.id());
        let request = |id: &str, priority: &str| json!({"id": id, "image_reference": world.image, "parameter": "true", "priority": priority});
        let list = json!([request(&one, "low"), 7, request(&other, "high")]);
        let list = serde_json::to_string_pretty(&list).unwrap();
        let ran = Client::of(&world, &["submit", "--wait"]).run_with(list.as_bytes()).await;
        assert_eq!(ran.code, 1);
        let mut lines: Vec<String> = ran.text().lines().map(str::to_string).collect();
        lines.sort();
        let mut wanted = [format!("{one} succeeded"), format!("{other} succeeded")];
        wanted.sort();
        assert_eq!(lines, wanted);
        assert!(ran.stderr.contains("item 2: is no JSON object"), "{}", ran.stderr);

        // One alone, without a name.
        let single = json!({"image_reference": world.image, "parameter": "echo a"});
        let single = serde_json::to_string_pretty(&single).unwrap();
        let ran = Client::of(&world, &["submit", "--json", "-q"]).run_with(single.as_bytes()).await;
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
        assert_eq!(ran.json()[0]["stdout"], "a\n");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_cannot_be_handed_in_is_told() {
    let [world, durable] = worlds(&[]).await;
    let ran = Client::of(&world, &["submit", "no-such-file"]).run().await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("no-such-file: No such file"), "{}", ran.stderr);
    let large = json!({"image_reference": "x", "stdin": "y".repeat(2 << 20)}).to_string();
    for world in [world, durable] {
        let small = json!({"image_reference": world.image, "parameter": "true"}).to_string();
        let input = format!("{large}\n{small}\n");
        let ran = Client::of(&world, &["submit", "--wait"]).run_with(input.as_bytes()).await;
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.stderr.contains("line 1: the request has "), "{}", ran.stderr);
        assert!(ran.text().ends_with(" succeeded\n"), "{ran:?}");
        world.clean().await;
    }
}
