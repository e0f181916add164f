//! What the engine says of itself: its version, its runtimes, its limits, its networks.

use std::collections::BTreeMap;

use bollard::API_DEFAULT_VERSION;
use bollard::models::SystemInfo;
use bollard::query_parameters::InspectNetworkOptions;

use super::{ENGINE, disk};
use crate::backend::docker::engine::Engine;
use crate::config::{Confinement, Docker, Policy};
use crate::finding::{Finding, Tell};

/// The oldest API this program is tried with: that of Docker 20.10.
const OLDEST_API: (usize, usize) = (1, 41);
const LOG: &str = "look at the engine's log";

/// Looks at all of it.
pub(super) async fn examine(
    engine: &Engine,
    docker: &Docker,
    confinement: &Confinement,
    policy: &Policy,
    tell: Tell<'_>,
) {
    let Some(info) = describe(engine, docker, tell).await else { return };
    runtime(&info, confinement, tell);
    cgroups(&info, tell);
    storage(&info, tell);
    security(&info, tell);
    networks(engine, policy, tell).await;
    disk::examine(&info, engine.is_remote(), tell);
}

/// Asks for the version, then for the rest.
async fn describe(engine: &Engine, docker: &Docker, tell: Tell<'_>) -> Option<SystemInfo> {
    let version = engine.call("tell its version", |d| async move { d.version().await }).await;
    let version = match version {
        Ok(version) => version,
        Err(error) => {
            tell(Finding::fail(
                ENGINE,
                format!("what listens at {} does not tell its version: {error}", docker.host),
                "point DOCKER_HOST at the engine's socket or port; if it is the engine, update it",
            ));
            return None;
        }
    };
    let (Some(name), Some(api)) = (version.version, version.api_version) else {
        tell(Finding::fail(
            ENGINE,
            format!("what listens at {} is no engine: it has no version", docker.host),
            "point DOCKER_HOST at the engine's socket or port",
        ));
        return None;
    };
    let detail = format!("{}: version {name}, API {api}", docker.host);
    let oldest = format!("{}.{}", OLDEST_API.0, OLDEST_API.1);
    let least = version.min_api_version.as_deref().and_then(numbers);
    let ours = (API_DEFAULT_VERSION.major_version, API_DEFAULT_VERSION.minor_version);
    tell(if least.is_some_and(|least| least > ours) {
        Finding::fail(
            ENGINE,
            format!("{detail}: too new for this program"),
            "update worker-spawner",
        )
    } else if numbers(&api).is_some_and(|api| api < OLDEST_API) {
        Finding::warn(
            ENGINE,
            format!("{detail}: older than any this program was tried with"),
            format!("update the engine to one with API {oldest} or later: Docker 20.10"),
        )
    } else {
        Finding::ok(ENGINE, detail)
    });
    let described = async {
        engine.call("tell its version", bollard::Docker::negotiate_version).await?;
        engine.call("describe itself", |d| async move { d.info().await }).await
    };
    match described.await {
        Ok(info) if info.os_type.as_deref().is_some_and(|os| os != "linux") => {
            let os = info.os_type.unwrap_or_default();
            tell(Finding::fail(
                ENGINE,
                format!("it runs {os} containers"),
                "functions need an engine for Linux containers: switch it over, or use another",
            ));
            None
        }
        Ok(info) => Some(info),
        Err(error) => {
            tell(Finding::fail(ENGINE, error.to_string(), LOG));
            None
        }
    }
}

/// A version of the API as numbers that compare.
fn numbers(version: &str) -> Option<(usize, usize)> {
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn runtime(info: &SystemInfo, confinement: &Confinement, tell: Tell<'_>) {
    const CHECK: &str = "runtime";
    let mut names: Vec<&str> = info.runtimes.iter().flatten().map(|(name, _)| &**name).collect();
    names.sort_unstable();
    let known = names.join(", ");
    tell(match confinement.runtime.as_deref() {
        None => {
            let default = info.default_runtime.as_deref().unwrap_or("its own");
            Finding::ok(CHECK, format!("the engine's default, {default}"))
        }
        Some(wanted) if names.contains(&wanted) => Finding::ok(CHECK, wanted),
        Some(wanted) => Finding::fail(
            CHECK,
            format!("the engine has no runtime {wanted:?}; it has {known}"),
            format!(
                "install {wanted} and name it under \"runtimes\" in the engine's daemon.json, or set CONTAINER_RUNTIME to one there is"
            ),
        ),
    });
}

/// What holds functions within their limits.
fn cgroups(info: &SystemInfo, tell: Tell<'_>) {
    const CHECK: &str = "cgroups";
    const KERNEL: &str = "enable the controller for the engine: by the kernel's command line (cgroup_enable=memory), or by delegation to a rootless engine's user";
    let limits = [
        ("memory", info.memory_limit, "MEMORY_LIMIT"),
        ("processors", info.cpu_cfs_quota, "CPU_LIMIT"),
        ("processes", info.pids_limit, "PIDS_LIMIT"),
    ];
    let missing: Vec<(&str, &str)> = limits
        .iter()
        .filter(|(_, has, _)| *has == Some(false))
        .map(|(what, _, setting)| (*what, *setting))
        .collect();
    let version = info.cgroup_version.as_ref().map(ToString::to_string).unwrap_or_default();
    if missing.is_empty() {
        tell(Finding::ok(
            CHECK,
            format!("version {version}; memory, processors and processes can be limited"),
        ));
    } else {
        let what: Vec<&str> = missing.iter().map(|(what, _)| *what).collect();
        let settings: Vec<&str> = missing.iter().map(|(_, setting)| *setting).collect();
        tell(Finding::fail(
            CHECK,
            format!(
                "the engine cannot limit {}: {} would not hold",
                what.join(" and "),
                settings.join(" and ")
            ),
            KERNEL,
        ));
    }
    if info.memory_limit != Some(false) && info.swap_limit == Some(false) {
        tell(Finding::warn(
            CHECK,
            "the engine cannot limit swap: a function may use twice its memory where the host has swap",
            "boot with swapaccount=1, or have the host use no swap",
        ));
    }
}

fn storage(info: &SystemInfo, tell: Tell<'_>) {
    const CHECK: &str = "storage";
    let driver = info.driver.as_deref().unwrap_or("unknown");
    tell(match driver {
        "vfs" => Finding::warn(
            CHECK,
            "driver vfs: each container is a whole copy of its image",
            "use overlay2, which takes a data root on ext4, or on xfs with ftype=1",
        ),
        "aufs" | "devicemapper" | "overlay" => Finding::warn(
            CHECK,
            format!("driver {driver}, which engines give up"),
            "use overlay2: later engines will not start with this one",
        ),
        driver => Finding::ok(CHECK, format!("driver {driver}")),
    });
}

fn security(info: &SystemInfo, tell: Tell<'_>) {
    const CHECK: &str = "seccomp";
    let Some(options) = &info.security_options else {
        tell(Finding::not_checked(CHECK, "the engine does not say"));
        return;
    };
    tell(if options.iter().any(|option| option.starts_with("name=seccomp")) {
        Finding::ok(CHECK, "system calls are filtered")
    } else {
        Finding::warn(
            CHECK,
            "the engine does not filter system calls: functions are less confined",
            "use a kernel and an engine with seccomp",
        )
    });
}

/// Whether the networks there are settings for exist.
async fn networks(engine: &Engine, policy: &Policy, tell: Tell<'_>) {
    const CHECK: &str = "networks";
    let mut named: BTreeMap<&str, &str> =
        policy.allowed_networks.iter().map(|name| (&**name, "ALLOWED_NETWORKS")).collect();
    named.insert(&policy.network, "CONTAINER_NETWORK");
    // It needs none in the engine.
    named.remove("none");
    let mut there = Vec::new();
    let mut all = true;
    for (name, setting) in named {
        let inspect = |d: bollard::Docker| async move {
            d.inspect_network(name, None::<InspectNetworkOptions>).await
        };
        match engine.call("show the network", inspect).await {
            Ok(_) => there.push(name),
            Err(error) if error.is_not_found() => {
                all = false;
                tell(Finding::fail(
                    CHECK,
                    format!("the engine has no network {name:?}, which {setting} names"),
                    format!("make it (docker network create {name}), or correct {setting}"),
                ));
            }
            Err(error) => {
                all = false;
                tell(Finding::fail(CHECK, error.to_string(), LOG));
            }
        }
    }
    if all {
        tell(Finding::ok(
            CHECK,
            match there.is_empty() {
                true => "functions have none".to_owned(),
                false => there.join(", "),
            },
        ));
    }
}
