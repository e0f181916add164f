#!/usr/bin/env bash
# The tests of what an engine does, against a current Docker engine instead of this release of Debian's:
#
#   scripts/engine-current.sh [FILTER…]     those tests, or the ones that cargo test picks by these words
#   scripts/engine-current.sh -- COMMAND…   a command in their place, with DOCKER_HOST set
#
# Engine, containerd, runc and init process come out of the packages of a later release of Debian, see `private_apt`, and
# are kept unpacked in .tools/. The engine runs in process, mount and network namespaces of its own, where two engines
# do not fight over the bridge. The tests run among its processes, which they look for by number, and in its network,
# so that it gets to their registries on loopback. Killing the namespaces' first process ends all of it. Needs root.
#
#   ENGINE_CURRENT_RELEASE   the release of Debian: trixie has Docker 26, forky 28. The newest that can be had, if unset
#   ENGINE_CURRENT_IMAGES    containerd: the engine keeps images in containerd's store, as Docker 29 does by default

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

# The newest engine first.
RELEASES=(forky trixie)
# Where an engine matters. Tests that bring engines of their own take the one on the PATH, so they are not among these.
FILTERS=(commands:: confinement:: limits:: outputs:: requests:: cancel:: images:: warm:: --skip warm::faults::)
LIMIT=40m

# --- The programs ------------------------------------------------------------------------------------------------

# engine_tree: sets TREE to a root file system with a current engine.
engine_tree() {
    local release
    [[ -z ${ENGINE_CURRENT_RELEASE-} ]] || RELEASES=("$ENGINE_CURRENT_RELEASE")
    for release in "${RELEASES[@]}"; do
        TREE="$ROOT/.tools/engine-$release"
        if tree_runs "$TREE" || { engine_fetch "$release" && tree_runs "$TREE"; }; then return; fi
    done
    die "there is no current engine"
}

tree_runs() { [[ -x $1/usr/sbin/dockerd ]] && chroot "$1" /usr/sbin/dockerd --version &>/dev/null; }

# engine_fetch RELEASE: that release's engine, unpacked, as $TREE.
engine_fetch() {
    local work status=0
    grep -qsx ID=debian /etc/os-release || die "a current engine comes from Debian's archive, and this is no Debian"
    say "fetching the Docker engine of Debian $1"
    mkdir -p "$ROOT/.tools"
    work="$(mktemp -d -p "$ROOT/.tools" fetching.XXXXXX)"
    at_exit "rm -rf '$work'"
    if { private_apt "$work" "$1" && engine_unpack "$work"; } >"$work/log" 2>&1 </dev/null; then
        # Another run may have been faster.
        mv -T "$work/tree" "$TREE" || true
    else
        status=1
        tail -n 15 "$work/log" >&2
        warn "no Docker engine of Debian $1, see above"
    fi
    rm -rf "$work"
    return "$status"
}

# With all they depend on, since nothing of this machine's is used but a static busybox; and unpacked only: the packages'
# own scripts would set up a system.
engine_unpack() {
    local work=$1 archive
    apt-get -qy -c "$work/apt.conf" --no-install-recommends --download-only install docker.io || return 1
    mkdir -p "$work"/tree/usr/{bin,sbin,lib,lib64} "$work"/tree/{dev,etc/docker,old,proc,run,state,sys,tmp}
    ln -s usr/{bin,sbin,lib,lib64} "$work/tree"
    for archive in "$work"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$archive" |
            tar -C "$work/tree" --keep-directory-symlink --exclude='./usr/share/*' -x || return 1
    done
    cp "$(command -v busybox)" "$work/tree/usr/bin/busybox"
}

# --- The engine --------------------------------------------------------------------------------------------------

# On disk, since an engine cannot stack layers on just any file system.
STATES=/var/lib/worker-spawner-engine
STATE=$STATES/$$
CGROUP=worker-spawner-engine-$$

engine_start() {
    local holder
    mkdir -p "$STATE"/{data,tmp}
    at_exit engine_clear
    echo '{}' >"$STATE/daemon.json"
    if [[ ${ENGINE_CURRENT_IMAGES-} == containerd ]]; then
        echo '{"features": {"containerd-snapshotter": true}}' >"$STATE/daemon.json"
    fi
    # They go with this script, even where it is killed.
    setpriv --pdeathsig KILL unshare --kill-child=KILL --pid --fork --mount --net \
        bash -euc "$(declare -f enter_tree); enter_tree \"\$@\"" sh "$TREE" "$STATE" "$CGROUP" \
        >"$STATE/log" 2>&1 </dev/null &
    holder=$!
    # Before what removes its files and control groups.
    at_exit "kill -KILL $holder 2>/dev/null; wait $holder 2>/dev/null"
    export DOCKER_HOST="unix://$STATE/docker.sock"
    if ! { wait_until 60 engine_settled "$holder" && engine_answers; }; then
        tail -n 20 "$STATE/log" >&2
        die "the engine did not start; its last words are above"
    fi
    INIT="$(pgrep -P "$holder")"
    say "$(engine_described)"
}

engine_answers() { timeout 10 docker version &>/dev/null; }
engine_settled() { engine_answers || ! kill -0 "$1" 2>/dev/null; }

engine_described() {
    docker version --format 'Docker {{.Server.Version}} (API {{.Server.APIVersion}}){{range .Server.Components}}{{if ne .Name "Engine"}}, {{.Name}} {{.Version}}{{end}}{{end}}'
    docker info --format 'images in {{.Driver}}, control groups of version {{.CgroupVersion}}'
}

# What the first process of the namespaces does: it makes the tree its root, starts the engine there, and reaps what is
# orphaned to it. Runs without the rest of this script.
enter_tree() {
    local tree=$1 state=$2 cgroup=$3
    mount --bind "$tree" "$tree"
    cd "$tree"
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount --rbind /sys/fs/cgroup sys/fs/cgroup
    mount --rbind /dev dev
    for writable in run tmp etc/docker; do mount -t tmpfs tmpfs "$writable"; done
    mount --bind "$state" state
    mount -o remount,bind,ro .
    ip link set lo up
    export PATH=/usr/sbin:/usr/bin
    pivot_root . old
    exec busybox sh -euc '
        cd /
        busybox umount -l /old
        dockerd "$@" &
        while :; do wait; busybox sleep 1; done
    ' sh --config-file /state/daemon.json --bridge=none --iptables=false --ip6tables=false --data-root /state/data \
        --exec-root /run/docker --pidfile /run/docker.pid --host unix:///state/docker.sock --cgroup-parent "/$cgroup"
}

# What is outside of the namespaces: files and control groups, those of runs that were killed as well.
engine_clear() {
    local state
    for state in "$STATES"/*; do
        [[ $state == "$STATE" ]] || ! grep -qs engine-current "/proc/${state##*/}/cmdline" || continue
        wait_until 10 cgroups_removed "worker-spawner-engine-${state##*/}" || warn "control groups are left"
        rm -rf --one-file-system "$state"
    done
    rmdir --ignore-fail-on-non-empty "$STATES" 2>/dev/null || true
}

# A group is busy until the last of its processes is reaped.
cgroups_removed() {
    find /sys/fs/cgroup -depth -type d -path "*/$1*" -exec rmdir {} + 2>/dev/null
    [[ -z $(find /sys/fs/cgroup -maxdepth 2 -name "$1" -print -quit) ]]
}

# --- The run -----------------------------------------------------------------------------------------------------

# beside_engine COMMAND…: among the engine's processes, and in its network, where there is nothing but loopback. What it
# starts ends with it, by the process group that `timeout` makes, and all of it with this script.
beside_engine() {
    local status=0
    setpriv --pdeathsig TERM timeout --kill-after=30 "$LIMIT" \
        nsenter --target "$INIT" --net --pid unshare --mount-proc "$@" </dev/null &
    RUNNING=$!
    wait "$RUNNING" || status=$?
    RUNNING=
    return "$status"
}

stop_running() { [[ -z $RUNNING ]] || stop_process "$RUNNING" 40; }

# The volume with the agent is shared, so daemons that are killed leave it to the next.
nothing_left() {
    LEFT="$(docker ps -a --format 'container {{.Names}}' && docker volume ls --format 'volume {{.Name}}')" || return 1
    LEFT="$(grep -v '^volume worker-spawner-agent-' <<<"$LEFT" || true)"
    [[ -z $LEFT ]]
}

((EUID == 0)) || die "an engine in namespaces of its own needs root"
[[ ${ENGINE_CURRENT_IMAGES-containerd} == containerd ]] || die "ENGINE_CURRENT_IMAGES is containerd, or is not set"
need docker busybox unshare nsenter setpriv ip ps pgrep
engine_clear
engine_tree
engine_start
RUNNING=
at_exit stop_running
# Temporary files that killed tests leave go with the engine's.
export TMPDIR="$STATE/tmp"

if [[ ${1-} == -- ]]; then
    shift
    beside_engine "$@"
    exit
fi
need_cargo
need nats-server docker-registry htpasswd
# Here, where there is a network.
cargo test --all-features --locked --test integration --no-run
(($#)) || set -- "${FILTERS[@]}"
say "tests"
beside_engine cargo test --all-features --locked --offline --test integration -- "$@"
wait_until 20 nothing_left || die "the tests left behind:"$'\n'"$LEFT"
say "all tests passed, nothing left behind"
