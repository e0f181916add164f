//! `dead-letters`: looked at, handed in again, removed.

use serde_json::{Value, json};

use super::Client;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_that_could_not_be_run_are_looked_after() {
    let mut world = World::durable(&[("ALLOWED_NETWORKS", "none")]).await;
    let (unfit, broken) = (world.id(), world.id());
    let request = json!({"id": unfit, "parameter": "echo here", "network": "bridge"});
    world.submit(request).await;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Msg-Id", broken.as_str());
    world.ledger.offer("functions.execute", "no request".into(), headers).await.unwrap();
    for id in [&unfit, &broken] {
        world.ledger.dead_letter(id).await;
    }

    let listed = Client::of(&world, &["dead-letters", "list", "--json"]).run().await;
    assert_eq!(listed.code, 0, "{listed:?}");
    let mut reasons: Vec<(Value, Value)> =
        listed.json().iter().map(|l| (l["id"].clone(), l["reason"].clone())).collect();
    reasons.sort_by_key(|(id, _)| id.to_string());
    let mut wanted = vec![
        (json!(unfit), json!("request.invalid_field")),
        (json!(broken), json!("request.invalid_json")),
    ];
    wanted.sort_by_key(|(id, _)| id.to_string());
    assert_eq!(reasons, wanted);
    let line = ["dead-letters", "list", "--reason", "request.invalid_json"];
    let table = Client::of(&world, &line).run().await.text();
    assert!(table.contains(&broken) && !table.contains(&unfit), "{table}");

    let shown = Client::of(&world, &["dead-letters", "show", &broken]).run().await.text();
    assert!(shown.contains("Dead-Letter-Reason: request.invalid_json\n"), "{shown}");
    assert!(shown.ends_with("\n\nno request\n"), "{shown}");
    let body = Client::of(&world, &["dead-letters", "show", "--body", &unfit]).run().await;
    let body: Value = serde_json::from_slice(&body.stdout).unwrap();
    assert_eq!(body["network"], "bridge");
    let none = Client::of(&world, &["dead-letters", "show", "nobody"]).run().await;
    assert_eq!(none.code, 1);

    // The operator allows it now. What is no request would fail again, and stays.
    world.daemon.crash().await;
    world.settings = world.settings.clone().set("ALLOWED_NETWORKS", "none,bridge");
    world.crash_and_restart().await;
    let redriven = Client::of(&world, &["dead-letters", "redrive", "--all"]).run().await;
    assert_eq!(redriven.code, 1, "{redriven:?}");
    let why = format!("{broken}: its request is no JSON object");
    assert!(redriven.stderr.contains(&why), "{redriven:?}");
    let text = redriven.text();
    let new = text.trim_end().strip_prefix(&format!("{unfit} -> ")).unwrap();
    let ended = world.ended(new).await;
    assert_eq!((ended.status(), ended.text().as_str()), ("succeeded", "here\n"));
    let left = world.ledger.dead_letters().await;
    assert_eq!(left.len(), 1);

    let missing = Client::of(&world, &["dead-letters", "redrive", &unfit]).run().await;
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.contains(&format!("no dead letter of {unfit}")), "{missing:?}");
    let all_or_some = Client::of(&world, &["dead-letters", "purge"]).run().await;
    assert_eq!(all_or_some.code, 2, "what is removed must be said");
    let purged = Client::of(&world, &["dead-letters", "purge", &broken]).run().await;
    assert_eq!((purged.code, purged.text().as_str()), (0, "1 removed\n"), "{purged:?}");
    assert!(world.ledger.dead_letters().await.is_empty());
}
