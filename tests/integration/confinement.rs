//! Ways out of a container, tried from inside. Nothing is sent to any address: that there is no
//! way is read from the kernel's tables.

use serde_json::{Value, json};

use crate::support::engine::WARM_LABEL;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_function_finds_no_way_out() {
    let world = World::start(&[]).await;
    // What to try, and what must be refused. Each prints "out" when it succeeds.
    let attempts = [
        ("mount a file system", "mount -t tmpfs none /data && echo out"),
        ("mount the host's disk", "mknod /tmp/disk b 254 0 && echo out"),
        ("make a device", "mknod /tmp/memory c 1 1 && echo out"),
        ("remount the root", "mount -o remount,rw / && echo out"),
        ("remount /tmp with devices", "mount -o remount,dev,suid /tmp && echo out"),
        ("unmount /proc", "umount /proc && echo out"),
        ("make a mount namespace", "unshare -m true && echo out"),
        ("make a user namespace", "unshare -U true && echo out"),
        ("make a network namespace", "unshare -n true && echo out"),
        (
            "become another user",
            "setpriv --reuid 1000 true 2>/dev/null && echo out; start-stop-daemon -S -c 1000 -x /bin/true && echo out",
        ),
        ("chown a file", "touch /tmp/f; chown 1000 /tmp/f && echo out"),
        ("change the root", "chroot /tmp true 2>/dev/null && echo out; chroot / true && echo out"),
        ("write to the image", "touch /bin/planted /etc/planted /planted && echo out"),
        (
            "write to the kernel's settings",
            "cat /proc/sys/kernel/sysrq > /tmp/v; cat /tmp/v > /proc/sys/kernel/sysrq && echo out",
        ),
        ("reach the kernel's trigger", "echo h > /proc/sysrq-trigger && echo out"),
        ("set the host's name", "hostname elsewhere && echo out"),
        ("set the clock", "date -s @$(date +%s) 2>&1 | grep -q \"can.t set\" || echo out"),
        ("load a module", "insmod /etc/garbage && echo out"),
        ("reboot", "reboot -f && echo out"),
        (
            "swap",
            "swapoff -a && dd if=/dev/zero of=/tmp/s bs=1M count=1 && mkswap /tmp/s && swapon /tmp/s && echo out",
        ),
        ("read the kernel's log", "dmesg | head -1 | grep . && echo out"),
        (
            "change the control group",
            // Not in /sys/fs/cgroup: with version 1 that is a tmpfs of the container's own.
            "for d in $(awk '$3 ~ /^cgroup/ { print $2 }' /proc/mounts); do \
                 mkdir $d/x && echo out; echo 0 > $d/cgroup.procs && echo out; done",
        ),
        ("make a network device", "ip link add d0 type dummy && echo out"),
        ("take lo down", "ip link set lo down && echo out"),
        ("take more than its share of the processor", "nice -n -5 true && echo out"),
    ];
    let jobs = attempts.map(|(what, script)| {
        let world = &world;
        async move {
            let ended = world
                .execute(json!({"parameter": ["sh", "-c", format!("{{ {script}; }} 2>&1; true")]}))
                .await;
            assert_eq!(ended.status(), "succeeded", "{what}: {}", ended.outcome);
            ended
                .text()
                .lines()
                .any(|line| line == "out")
                .then(|| format!("{what}: {}", ended.text()))
        }
    });
    let out: Vec<String> = futures::future::join_all(jobs).await.into_iter().flatten().collect();
    assert!(out.is_empty(), "these got through:\n{}", out.join("\n"));
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_function_has_no_rights_and_can_gain_none() {
    let world = World::start(&[]).await;
    let read = |user: Option<&str>| {
        let mut request = json!({"parameter": "cat /proc/self/status"});
        if let Some(user) = user {
            request["user"] = json!(user);
        }
        world.execute(request)
    };
    for user in [None, Some("1000")] {
        let ended = read(user).await;
        let status = ended.text();
        let value = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
                .unwrap_or_default()
        };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(value(set), "0000000000000000", "{set} as {user:?}");
        }
        assert_eq!(value("NoNewPrivs:"), "1");
        assert_eq!(value("Seccomp:"), "2", "system calls are filtered");
    }
    // A set-uid program of root's, run by another user, notices that it has not become root's.
    let switch = "exec -a su /bin/setuid-busybox root -c id";
    let ended = world.execute(json!({"parameter": ["sh", "-c", switch], "user": "1000"})).await;
    let told = String::from_utf8(ended.stderr()).unwrap();
    assert!(told.contains("must be suid"), "it ran with root's rights: {}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn there_is_no_interface_but_lo_and_no_route() {
    let world = World::start(&[]).await;
    let script = "tail -n +3 /proc/net/dev | cut -d: -f1; echo routes; tail -n +2 /proc/net/route; \
                  awk '$10 != \"lo\"' /proc/net/ipv6_route 2>/dev/null; true";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
    let words: Vec<String> = ended.text().split_whitespace().map(ToString::to_string).collect();
    // A kernel may bring tunnel devices of its own along in every namespace; they are down and
    // nothing routes to them.
    let (interfaces, routes) =
        words.split_at(words.iter().position(|word| word == "routes").unwrap());
    assert!(interfaces.contains(&"lo".to_string()), "{words:?}");
    let own = [
        "lo", "tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0",
        "ip6gre0",
    ];
    assert!(interfaces.iter().all(|name| own.contains(&name.as_str())), "{words:?}");
    assert_eq!(routes, ["routes"], "there is a way out");
    let ended = world.execute(json!({"parameter": "sh -c '(echo hi | nc -l -p 4000 &) ; sleep 1; nc 127.0.0.1 4000'"})).await;
    assert_eq!(ended.text(), "hi\n", "a function can talk to itself: {}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn only_tmp_can_be_written_to_and_only_so_much() {
    let world = World::start(&[("TMPFS_SIZE", "4MiB")]).await;
    let script = "dd if=/dev/zero of=/tmp/big bs=1M count=100 2>/dev/null; stat -c %s /tmp/big; \
                  grep ' /tmp ' /proc/mounts; grep ' / ' /proc/mounts";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
    let text = ended.text();
    let mut lines = text.lines();
    let size: u64 = lines.next().unwrap().parse().unwrap();
    assert!(size <= 4 << 20, "{size} bytes fit into 4 MiB");
    let tmp = lines.next().unwrap();
    assert!(tmp.contains("nosuid") && tmp.contains("nodev"), "{tmp}");
    assert!(
        lines
            .next()
            .unwrap()
            .split_whitespace()
            .nth(3)
            .unwrap()
            .split(',')
            .any(|flag| flag == "ro"),
        "{text}"
    );
    let next = world.execute(json!({"parameter": "ls -A /tmp"})).await;
    assert_eq!(next.text(), "", "the next function's /tmp is empty");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_writable_root_is_there_for_those_who_ask() {
    let world = World::start(&[("READONLY_ROOTFS", "false")]).await;
    let ended =
        world.execute(json!({"parameter": "sh -c 'echo x > /written && cat /written'"})).await;
    assert_eq!(ended.text(), "x\n", "{}", ended.outcome);
    let ended = world.execute(json!({"parameter": "cat /written"})).await;
    assert_eq!(ended.status(), "failed", "and it is nobody else's: {}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_hosts_secrets_are_not_in_a_container() {
    let world =
        World::start(&[("NATS_PASSWORD", "secret-of-the-daemon"), ("NATS_USER", "x")]).await;
    let ended = world
        .execute(
            json!({"parameter": "sh -c 'env; cat /proc/1/environ; ls -A / /root /data; ls /dev'"}),
        )
        .await;
    let text = ended.text();
    assert!(!text.contains("secret-of-the-daemon") && !text.contains("docker.sock"), "{text}");
    let held = world.hold().await;
    let inspected = world.engine.docker().inspect_container(&held.container, None).await.unwrap();
    let host = inspected.host_config.unwrap();
    assert_ne!(host.privileged, Some(true));
    assert!(
        host.binds.unwrap_or_default().iter().all(|bind| !bind.starts_with('/')),
        "no path of the host"
    );
    assert_eq!(
        host.log_config.and_then(|log| log.typ).as_deref(),
        Some("none"),
        "no output on the host's disk"
    );
    assert_eq!(host.memory, host.memory_swap, "no swap on top of the memory");
    let ulimits: Vec<String> =
        host.ulimits.unwrap_or_default().into_iter().filter_map(|limit| limit.name).collect();
    assert!(
        ["nofile", "core"].iter().all(|name| ulimits.iter().any(|have| have == name)),
        "{ulimits:?}"
    );
    assert!(ulimits.iter().all(|name| name != "nproc"), "counted over all containers of a user");
    // In a warm container the program that waited in it is the first process and does the same.
    let labels = inspected.config.as_ref().and_then(|config| config.labels.as_ref());
    let is_warm = labels.is_some_and(|labels| labels.contains_key(WARM_LABEL));
    assert_eq!(host.init, Some(!is_warm));
    let value = serde_json::to_value(inspected.config).unwrap();
    assert_eq!(
        value.pointer("/Tty").and_then(Value::as_bool),
        Some(false),
        "a terminal changes the bytes"
    );
    world.release(&held).await;
    world.results.wait_for(&held.id).await;
}
