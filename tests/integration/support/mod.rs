//! The servers, images and observers the tests are made of.
//!
//! Everything here is removed by `Drop`, so a test that fails leaves as little behind as one that
//! passes. What must die with a killed test process as well is started under `setpriv
//! --pdeathsig`: the kernel ends it when the test's own thread ends. That is why servers are
//! spawned from the test's thread and never from a pool.

pub(crate) mod collector;
pub(crate) mod daemon;
pub(crate) mod engine;
pub(crate) mod fleet;
pub(crate) mod http;
pub(crate) mod images;
pub(crate) mod jetstream;
pub(crate) mod nats;
pub(crate) mod process;
pub(crate) mod prometheus;
pub(crate) mod proxy;
pub(crate) mod registry;
pub(crate) mod results;
pub(crate) mod runs;
pub(crate) mod screen;
pub(crate) mod specification;
pub(crate) mod streams;
pub(crate) mod tar;
pub(crate) mod wait;
pub(crate) mod warmth;
pub(crate) mod world;

/// Whether the forms that take many minutes were asked for.
pub(crate) fn long() -> bool {
    std::env::var("WORKER_SPAWNER_TEST_LONG").is_ok_and(|value| value == "1")
}

/// A short name no other test of this or another run uses.
pub(crate) fn unique() -> String {
    let id = uuid::Uuid::now_v7().simple().to_string();
    // The head is the time and hardly differs between neighbours; the tail is random.
    id[18..].to_string()
}
