//! The daemon from the outside: the built program against a real NATS server, a real engine and a
//! real registry. What is looked at is what users see: messages, containers, exit codes, logs.
//!
//! Needed on the PATH: nats-server, docker-registry, htpasswd, busybox (static), prometheus,
//! promtool, setpriv, unshare, nsenter and script; a Docker engine at DOCKER_HOST or the usual
//! socket; and, for the tests that stop, kill and freeze an engine, root and dockerd.
//! WORKER_SPAWNER_TEST_LONG=1 asks for the forms that take many minutes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod big_objects;
mod cancel;
mod chaos;
mod check;
mod cli;
mod commands;
mod confinement;
mod connections;
mod dead_letters;
mod durability;
mod faults;
mod http;
mod images;
mod jetstream;
mod lifecycle;
mod limits;
mod live_logs;
mod load;
mod notify;
mod outputs;
mod priorities;
mod records;
mod reload;
mod requests;
mod retries;
mod servers;
mod service;
mod settings;
mod support;
mod top;
mod traces;
mod warm;
