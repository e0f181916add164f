//! Points on a job's way, for whoever wants to know where its time goes.
//!
//! `RUST_LOG=info,worker_spawner::stage=trace` has each logged as it is passed; the log's times are the
//! measurement. `scripts/bench.sh --breakdown` makes a table of them. Where they are not asked for,
//! passing one costs a look at a flag.

/// Passes a point.
#[macro_export]
macro_rules! stage {
    ($name:literal) => {
        tracing::trace!(target: "worker_spawner::stage", $name)
    };
    ($name:literal, $job:expr) => {
        tracing::trace!(target: "worker_spawner::stage", job = %$job, $name)
    };
}
