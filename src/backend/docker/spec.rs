//! From a job to the body of the engine's create call. Pure: no engine, no clock.

use std::collections::HashMap;
use std::time::SystemTime;

use bollard::models::{
    ContainerCreateBody, ContainerUpdateBody, HealthConfig, HostConfig, HostConfigLogConfig, Mount,
    MountType, MountVolumeOptions, ResourcesUlimits,
};

use super::image::Image;
use crate::config::Confinement;
use crate::job::{Job, Limits};
use crate::protocol::time::rfc3339;

/// Label: the job's id.
pub(super) const LABEL_JOB_ID: &str = "worker-spawner.job-id";
/// Label: the instance that made the container.
pub(super) const LABEL_INSTANCE: &str = "worker-spawner.instance";
/// Label: the image, as the request named it.
pub(super) const LABEL_IMAGE: &str = "worker-spawner.image";
/// Label: the container was made for no job in particular.
pub(super) const LABEL_WARM: &str = "worker-spawner.warm";
/// Label: when the container should be gone at the latest, in RFC 3339.
pub(super) const LABEL_DEADLINE: &str = "worker-spawner.deadline";

/// Where the agent's volume is in a container that waits for a job.
pub(super) const AGENT_DIR: &str = "/.worker-spawner";
/// The agent in it.
pub(super) const AGENT_PATH: &str = "/.worker-spawner/agent";

/// Length of the period over which the kernel shares out processor time, in microseconds: the
/// kernel's own default.
const CPU_PERIOD_US: i64 = 100_000;
/// Open files, soft and hard: what public clouds give a function. A hard limit above the engine's
/// own is refused where the engine lacks the right to raise it.
const NOFILE: (i64, i64) = (1024, 1024);

/// What the labels of a container say beside the job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marks<'a> {
    pub(super) instance: &'a str,
    pub(super) owner: &'a [(&'static str, String)],
    pub(super) deadline: SystemTime,
}

/// The create body of `job`'s container.
///
/// Like a function on a public cloud: no capabilities, no way to gain any, a read-only root, only
/// /tmp and the image's volumes writable and those in memory, no network unless asked for.
pub(super) fn create_body(
    job: &Job,
    image: &Image,
    confinement: &Confinement,
    marks: Marks<'_>,
) -> ContainerCreateBody {
    let has_network = job.network != "none";
    let has_stdin = job.stdin.is_some();
    let memory = signed(job.limits.memory_bytes);
    ContainerCreateBody {
        image: Some(image.id.clone()),
        cmd: (!job.args.is_empty()).then(|| job.args.clone()),
        env: Some(job.env.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        working_dir: job.working_dir.clone(),
        user: job.user.clone().or_else(|| confinement.user.clone()),
        labels: Some(labels(job, marks)),
        attach_stdin: Some(has_stdin),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        open_stdin: Some(has_stdin),
        stdin_once: Some(has_stdin),
        tty: Some(false),
        // A namespace of its own with nothing but a loopback interface, and a third faster than
        // the network mode `none` alone, for which the engine sets up a sandbox all the same.
        network_disabled: (!has_network).then_some(true),
        healthcheck: Some(HealthConfig {
            test: Some(vec!["NONE".to_owned()]),
            ..HealthConfig::default()
        }),
        host_config: Some(HostConfig {
            // Also where it is `none`: Podman heeds this alone, and would give it its default one.
            network_mode: Some(job.network.clone()),
            memory: Some(memory),
            // Equal to the memory: no swap.
            memory_swap: Some(memory),
            // A quota rather than `NanoCpus`, which engines refuse beyond what they have.
            cpu_period: Some(CPU_PERIOD_US),
            cpu_quota: Some(cpu_quota(&job.limits)),
            pids_limit: Some(signed(job.limits.pids)),
            ulimits: Some(vec![ulimit("nofile", NOFILE), ulimit("core", (0, 0))]),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
            readonly_rootfs: Some(confinement.readonly_rootfs),
            tmpfs: Some(tmpfs(image, confinement.tmpfs_bytes)),
            init: Some(true),
            // Output is taken from the attached streams; a driver would write it to disk as well.
            log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
            runtime: confinement.runtime.clone(),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

/// The create body of a container that waits for a job like `job`, which is nobody's: with the agent
/// as its first process, in place of the init process and the function, and otherwise the same.
///
/// The agent comes from `volume`. It is spoken to through standard input, whose end is its own.
pub(super) fn waiting_body(
    job: &Job,
    image: &Image,
    confinement: &Confinement,
    marks: Marks<'_>,
    volume: &str,
) -> ContainerCreateBody {
    let body = create_body(job, image, confinement, marks);
    let host = body.host_config.unwrap_or_default();
    let mut labels = body.labels.unwrap_or_default();
    labels.remove(LABEL_JOB_ID);
    labels.insert(LABEL_WARM.to_owned(), String::new());
    ContainerCreateBody {
        labels: Some(labels),
        entrypoint: Some(vec![AGENT_PATH.to_owned()]),
        cmd: None,
        attach_stdin: Some(true),
        open_stdin: Some(true),
        stdin_once: Some(true),
        host_config: Some(HostConfig {
            init: Some(false),
            mounts: Some(vec![Mount {
                typ: Some(MountType::VOLUME),
                source: Some(volume.to_owned()),
                target: Some(AGENT_DIR.to_owned()),
                read_only: Some(true),
                volume_options: Some(MountVolumeOptions {
                    no_copy: Some(true),
                    ..MountVolumeOptions::default()
                }),
                ..Mount::default()
            }]),
            ..host
        }),
        ..body
    }
}

/// The body of the call that gives a container these limits, whatever it was created with.
pub(super) fn update_body(limits: &Limits) -> ContainerUpdateBody {
    let memory = signed(limits.memory_bytes);
    ContainerUpdateBody {
        memory: Some(memory),
        memory_swap: Some(memory),
        cpu_period: Some(CPU_PERIOD_US),
        cpu_quota: Some(cpu_quota(limits)),
        pids_limit: Some(signed(limits.pids)),
        ..ContainerUpdateBody::default()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "bounded by the policy: 1024 processors")]
fn cpu_quota(limits: &Limits) -> i64 {
    (limits.cpus * CPU_PERIOD_US as f64) as i64
}

fn labels(job: &Job, marks: Marks<'_>) -> HashMap<String, String> {
    let ours = [
        (LABEL_JOB_ID, job.id.to_string()),
        (LABEL_INSTANCE, marks.instance.to_owned()),
        (LABEL_IMAGE, job.image.clone()),
        (LABEL_DEADLINE, rfc3339(marks.deadline)),
    ];
    let ours = ours.into_iter().chain(marks.owner.iter().cloned());
    // Ours last: they win, though requests cannot name them.
    job.labels.clone().into_iter().chain(ours.map(|(k, v)| (k.to_owned(), v))).collect()
}

/// /tmp, and every volume of the image: writable, sized, in memory, gone with the container.
fn tmpfs(image: &Image, bytes: u64) -> HashMap<String, String> {
    let volumes = image.volumes.iter().map(|path| match path.trim_end_matches('/') {
        "" => "/".to_owned(),
        path => path.to_owned(),
    });
    std::iter::once("/tmp".to_owned())
        .chain(volumes)
        .map(|path| (path, format!("rw,exec,nosuid,nodev,mode=1777,size={bytes}")))
        .collect()
}

fn ulimit(name: &str, (soft, hard): (i64, i64)) -> ResourcesUlimits {
    ResourcesUlimits { name: Some(name.to_owned()), soft: Some(soft), hard: Some(hard) }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    fn job() -> Job {
        Job {
            id: "j".parse().unwrap(),
            image: "python".to_owned(),
            args: vec![],
            env: [("A".to_owned(), "b c".to_owned())].into(),
            stdin: None,
            working_dir: None,
            user: None,
            network: "none".to_owned(),
            labels: [("team".to_owned(), "x".to_owned())].into(),
            limits: Limits {
                timeout: Duration::from_secs(1),
                memory_bytes: 64 << 20,
                cpus: 0.5,
                pids: 7,
            },
        }
    }

    fn confinement() -> Confinement {
        Confinement { user: None, runtime: None, readonly_rootfs: true, tmpfs_bytes: 4096 }
    }

    fn body(job: &Job, image: &Image, confinement: &Confinement) -> ContainerCreateBody {
        let marks = Marks {
            instance: "i",
            owner: &[("worker-spawner.owner", "o".to_owned())],
            deadline: SystemTime::UNIX_EPOCH,
        };
        create_body(job, image, confinement, marks)
    }

    #[test]
    fn a_function_is_confined_by_default() {
        let body = body(&job(), &Image::default(), &confinement());
        let host = body.host_config.unwrap();
        assert_eq!(body.network_disabled, Some(true));
        assert_eq!(host.network_mode.as_deref(), Some("none"));
        assert_eq!(host.cap_drop, Some(vec!["ALL".to_owned()]));
        assert_eq!(host.security_opt, Some(vec!["no-new-privileges:true".to_owned()]));
        assert_eq!(host.readonly_rootfs, Some(true));
        assert_eq!((host.memory, host.memory_swap), (Some(64 << 20), Some(64 << 20)));
        assert_eq!((host.cpu_quota, host.cpu_period), (Some(50_000), Some(100_000)));
        assert_eq!(host.pids_limit, Some(7));
        assert_eq!(host.init, Some(true));
        assert_eq!(host.log_config.unwrap().typ.as_deref(), Some("none"));
        assert_eq!(host.tmpfs.unwrap()["/tmp"], "rw,exec,nosuid,nodev,mode=1777,size=4096");
        assert_eq!(body.healthcheck.unwrap().test, Some(vec!["NONE".to_owned()]));
        assert_eq!((body.open_stdin, body.tty), (Some(false), Some(false)));
        assert!(host.privileged.is_none() && host.binds.is_none() && host.cap_add.is_none());
    }

    #[test]
    fn a_waiting_container_differs_in_its_first_process_alone() {
        let image = Image { volumes: vec!["/data".to_owned()], ..Image::default() };
        let marks = Marks { instance: "i", owner: &[], deadline: SystemTime::UNIX_EPOCH };
        let cold = create_body(&job(), &image, &confinement(), marks);
        let mut waiting = waiting_body(&job(), &image, &confinement(), marks, "v");
        let labels = waiting.labels.as_mut().unwrap();
        assert!(labels.remove(LABEL_WARM).is_some());
        assert!(labels.insert(LABEL_JOB_ID.to_owned(), "j".to_owned()).is_none());
        let mounts = waiting.host_config.as_mut().unwrap().mounts.take().unwrap();
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].read_only, Some(true));
        assert_eq!(mounts[0].source.as_deref(), Some("v"));
        assert_eq!(waiting.entrypoint.take(), Some(vec![AGENT_PATH.to_owned()]));
        assert_eq!((waiting.open_stdin, waiting.stdin_once), (Some(true), Some(true)));
        waiting.host_config.as_mut().unwrap().init = Some(true);
        for stdin in [&mut waiting.attach_stdin, &mut waiting.open_stdin, &mut waiting.stdin_once] {
            *stdin = Some(false);
        }
        assert_eq!(waiting, cold);
    }

    #[test]
    fn limits_are_the_same_at_creation_and_later() {
        let host = body(&job(), &Image::default(), &confinement()).host_config.unwrap();
        let update = update_body(&job().limits);
        assert_eq!(
            (update.memory, update.memory_swap, update.pids_limit),
            (host.memory, host.memory_swap, host.pids_limit)
        );
        assert_eq!((update.cpu_period, update.cpu_quota), (host.cpu_period, host.cpu_quota));
    }

    #[test]
    fn what_the_request_leaves_out_is_the_images_own() {
        let body = body(&job(), &Image::default(), &confinement());
        assert_eq!(
            (body.cmd, body.entrypoint, body.user, body.working_dir),
            (None, None, None, None)
        );
        assert_eq!(body.env, Some(vec!["A=b c".to_owned()]));
    }

    #[test]
    fn what_the_request_names_is_used() {
        let job = Job {
            args: vec!["echo".to_owned(), "a b".to_owned()],
            stdin: Some("in".into()),
            user: Some("7".to_owned()),
            working_dir: Some("/w".to_owned()),
            network: "lan".to_owned(),
            ..job()
        };
        let confinement = Confinement {
            user: Some("1000".to_owned()),
            runtime: Some("runsc".to_owned()),
            ..confinement()
        };
        let body = body(&job, &Image::default(), &confinement);
        let host = body.host_config.unwrap();
        assert_eq!(body.cmd, Some(vec!["echo".to_owned(), "a b".to_owned()]));
        assert_eq!((body.user.as_deref(), body.working_dir.as_deref()), (Some("7"), Some("/w")));
        assert_eq!((body.open_stdin, body.stdin_once), (Some(true), Some(true)));
        assert_eq!((body.network_disabled, host.network_mode.as_deref()), (None, Some("lan")));
        assert_eq!(host.runtime.as_deref(), Some("runsc"));
    }

    #[test]
    fn volumes_are_covered() {
        let image =
            Image { volumes: vec!["/data/".to_owned(), "/tmp".to_owned()], ..Image::default() };
        let tmpfs = body(&job(), &image, &confinement()).host_config.unwrap().tmpfs.unwrap();
        let mut paths: Vec<&str> = tmpfs.keys().map(String::as_str).collect();
        paths.sort_unstable();
        assert_eq!(paths, ["/data", "/tmp"]);
    }

    #[test]
    fn labels_name_job_instance_image_and_deadline() {
        let labels = body(&job(), &Image::default(), &confinement()).labels.unwrap();
        for (name, value) in [
            (LABEL_JOB_ID, "j"),
            (LABEL_INSTANCE, "i"),
            (LABEL_IMAGE, "python"),
            (LABEL_DEADLINE, "1970-01-01T00:00:00.000000Z"),
            ("worker-spawner.owner", "o"),
            ("team", "x"),
        ] {
            assert_eq!(labels[name], value, "{name}");
        }
    }
}
