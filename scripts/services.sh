#!/usr/bin/env bash
# The servers that building, testing and trying the daemon need. Sourced by the other scripts for the functions;
# run as a command by `make services` and `make services-stop`.
#
# An engine that already answers is used and left alone. Else one is started with data of its own, so that no
# container of a stopped engine on this machine is woken or seen, and nothing remains of it once it is stopped.
# The state is machine-wide, so that two work trees share one engine: the last user out stops it.

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export DOCKER_HOST="${DOCKER_HOST:-unix:///var/run/docker.sock}"

STATE=/run/worker-spawner-dev           # pids, logs, who uses the engine, what the system looked like before
ENGINE_DATA=/var/lib/worker-spawner-dev # images and containers of the engine started here

# --- The Docker engine -------------------------------------------------------------------------------------------

engine_answers() { timeout 10 docker version &>/dev/null; }
engine_is_ours() { process_runs "$STATE/engine.pid" dockerd; }

# engine_acquire: an engine answers afterwards. Pair it with engine_release.
engine_acquire() {
    need docker
    if ((EUID == 0)); then
        need flock ps
        locked engine_acquire_locked
    else
        engine_answers || die "$(why_no_engine)"
    fi
}

engine_acquire_locked() {
    if ! engine_answers; then
        engine_clear
        engine_start
    fi
    ! engine_is_ours || { mkdir -p "$STATE/users" && : >"$STATE/users/$$"; }
}

# engine_release: stops the engine if it was started here and nobody else uses it.
engine_release() {
    ((EUID == 0)) && [[ -e $STATE/users/$$ ]] || return 0
    locked engine_release_locked
}

engine_release_locked() {
    local user
    rm -f "$STATE/users/$$"
    for user in "$STATE"/users/*; do
        [[ -e $user ]] || continue
        [[ $user != */kept && ! -d /proc/${user##*/} ]] || return 0
    done
    engine_stop
}

# One at a time, on the whole machine. The lock is on a directory that is always there: no lock file is left behind.
locked() {
    exec 9</run
    flock 9
    "$@"
    exec 9<&-
}

why_no_engine() {
    local socket=${DOCKER_HOST#unix://}
    if [[ -S $socket && ! -w $socket ]]; then
        echo "this user may not use $socket: add it to the group $(stat -c %G "$socket"), or try again as root."
    else
        echo "no Docker engine answers at $DOCKER_HOST. As root this starts one; else start it (Debian's package: docker.io) and try again."
    fi
}

engine_start() {
    local other
    [[ $DOCKER_HOST == unix:///var/run/docker.sock ]] || die "no Docker engine answers at $DOCKER_HOST"
    need dockerd iptables ip pgrep pkill
    # Two engines in one network namespace take the bridge from each other.
    for other in $(pgrep -x dockerd); do
        [[ $(readlink "/proc/$other/ns/net") != "$(readlink /proc/self/ns/net)" ]] && continue
        wait_until 30 engine_answers && return
        die "an engine runs here (process $other) but does not answer at $DOCKER_HOST: set DOCKER_HOST, or stop it."
    done
    say "starting a Docker engine"
    mkdir -p "$STATE/users" "$ENGINE_DATA"
    network_remember
    # A configuration file of its own: the machine's may name other directories.
    cat >"$STATE/daemon.json" <<CONFIG
{
  "hosts": ["$DOCKER_HOST"],
  "data-root": "$ENGINE_DATA/docker",
  "exec-root": "$STATE/exec",
  "pidfile": "$STATE/exec/dockerd.pid"
}
CONFIG
    [[ -e /etc/docker/key.json ]] || : >"$STATE/no-key"
    # Containerd may be shared with an engine that is stopped now, hence names of our own there.
    setsid dockerd --config-file "$STATE/daemon.json" --containerd-namespace worker-spawner-dev \
        --containerd-plugins-namespace worker-spawner-dev-plugins >"$STATE/dockerd.log" 2>&1 </dev/null 9<&- &
    echo $! >"$STATE/engine.pid"
    if ! { wait_until 60 engine_settled && engine_answers; }; then
        tail -n 20 "$STATE/dockerd.log" >&2
        engine_stop
        die "the Docker engine did not start; its last words are above"
    fi
}

# It answers, or it has given up.
engine_settled() { engine_answers || ! engine_is_ours; }

engine_stop() {
    say "stopping the Docker engine"
    engine_empty
    engine_clear
}

# Networks of the user's kind have a bridge each that outlives the engine; containers hold mounts.
engine_empty() {
    local ids
    engine_answers || return 0
    # By name: Docker 20.10 may list what it does not have any more, without one.
    ids="$(docker ps -aq --filter name=.)"
    # shellcheck disable=SC2086 # one word per container
    [[ -z $ids ]] || docker rm -fv $ids >/dev/null
    docker network prune -f >/dev/null
}

# Whatever an engine of ours left, running or not: idempotent, and nothing to do is fine.
engine_clear() {
    [[ -d $STATE || -d $ENGINE_DATA ]] || return 0
    ! engine_is_ours || stop_process "$(<"$STATE/engine.pid")" 60
    stop_orphans
    unmount_under "$STATE"
    unmount_under "$ENGINE_DATA"
    # Should another engine have come up in the meantime, the bridge, the rules and the socket are its own.
    if ! engine_answers; then
        network_restore
        rmdir /sys/fs/cgroup/{,*/}docker 2>/dev/null || true
        rm -f /var/run/docker.sock
    fi
    [[ ! -e $STATE/no-key ]] || rm -f /etc/docker/key.json
    # Directories that an engine makes wherever its configuration puts the rest.
    remove_empty /etc/docker /run/docker /run/containerd
    rm -rf --one-file-system "$ENGINE_DATA"
    rm -rf "$STATE"/{users,exec,before,daemon.json,dockerd.log,engine.pid,no-key}
    rmdir --ignore-fail-on-non-empty "$STATE" 2>/dev/null || true
}

# A killed engine leaves its containerd and the containers' shims: those with our own directory in their command line.
# The first process of a container is its shim's child, and takes the others of its container along.
stop_orphans() {
    local cmdline pid
    for cmdline in /proc/[0-9]*/cmdline; do
        pid=${cmdline#/proc/}
        pid=${pid%/cmdline}
        [[ $(readlink "/proc/$pid/exe" 2>/dev/null) == */containerd* ]] || continue
        tr '\0' ' ' <"$cmdline" 2>/dev/null | grep -qF "$STATE/exec" || continue
        pkill -KILL -P "$pid" || true
        stop_process "$pid" 10
    done
}

remove_empty() { find "$@" -depth -type d -empty -delete 2>/dev/null || true; }

unmount_under() {
    local mount
    while read -r mount; do
        umount "$mount" || umount -l "$mount"
    done < <(awk -v top="$1/" 'index($5 "/", top) == 1 { print $5 }' /proc/self/mountinfo | tac)
}

# --- What the engine does to the network -------------------------------------------------------------------------

FIREWALLS=(iptables ip6tables)

network_remember() {
    local firewall
    mkdir -p "$STATE/before"
    for firewall in "${FIREWALLS[@]}"; do
        firewall_rules "$firewall" >"$STATE/before/$firewall"
    done
    cat /proc/sys/net/ipv4/ip_forward >"$STATE/before/ip_forward"
    interfaces >"$STATE/before/interfaces"
}

firewall_rules() {
    local table
    for table in filter nat raw; do
        "$1" -t "$table" -S 2>/dev/null | sed "s/^/-t $table /"
    done
}

interfaces() { ip -o link show | awk -F': ' '{ sub(/@.*/, "", $2); print $2 }'; }

# Puts back what the engine changed, unless another engine had been there before and would miss it.
network_restore() {
    local firewall interface before="$STATE/before"
    [[ -d $before ]] || return 0
    for firewall in "${FIREWALLS[@]}"; do
        grep -q ' DOCKER' "$before/$firewall" || firewall_restore "$firewall" "$before/$firewall"
    done
    while read -r interface; do
        [[ $interface == docker0 || $interface == br-* || $interface == veth* ]] || continue
        grep -qxF "$interface" "$before/interfaces" || ip link delete "$interface"
    done < <(interfaces)
    [[ $(<"$before/ip_forward") == 1 ]] || cat "$before/ip_forward" >/proc/sys/net/ipv4/ip_forward
}

# firewall_restore FIREWALL BEFORE: deletes the rules, then the chains, that name the engine or its bridges, and sets the forward policy back.
firewall_restore() {
    local firewall=$1 before=$2 rule
    while read -r rule; do
        xargs "$firewall" <<<"${rule/ -A / -D }"
    done < <(firewall_rules "$firewall" | grep -e ' -A ' | grep -Ew 'DOCKER|DOCKER-[A-Z0-9-]+|docker0|br-[0-9a-f]{12}' | grep -vFxf "$before")
    while read -r rule; do
        xargs "$firewall" <<<"${rule/ -N / -X }"
    done < <(firewall_rules "$firewall" | grep -e ' -N DOCKER')
    rule="$(grep -e '-t filter -P FORWARD ' "$before")" && xargs "$firewall" <<<"$rule"
    return 0
}

# --- NATS --------------------------------------------------------------------------------------------------------

# nats_start DIRECTORY [OPTION…]: a server of its own on a free loopback port, with its files in DIRECTORY.
# Sets NATS_PID and NATS_ADDRESS.
# shellcheck disable=SC2034 # for the script that sources this one
nats_start() {
    local dir=$1 ports
    shift
    need nats-server
    mkdir -p "$dir"
    setsid nats-server --addr 127.0.0.1 --port -1 --ports_file_dir "$dir" "$@" >"$dir/nats.log" 2>&1 </dev/null 9<&- &
    NATS_PID=$!
    ports="$dir/nats-server_$NATS_PID.ports"
    wait_until 20 test -s "$ports" || die "nats-server did not start: $(tail -n 3 "$dir/nats.log")"
    NATS_ADDRESS="$(grep -o 'nats://127[^"]*' "$ports" | head -n 1)"
}

nats_listens() { (exec 3<>/dev/tcp/127.0.0.1/4222) 2>/dev/null; }

# --- The command -------------------------------------------------------------------------------------------------

services_start() {
    need docker nats-server
    engine_acquire
    ! engine_is_ours || mv "$STATE/users/$$" "$STATE/users/kept"
    nats_keep
    say "ready: Docker engine at $DOCKER_HOST, NATS at nats://localhost:4222"
}

nats_keep() {
    local dir="$ROOT/.services/nats"
    if nats_listens; then return; fi
    say "starting nats-server"
    mkdir -p "$dir"
    setsid nats-server --addr 127.0.0.1 --port 4222 --jetstream --store_dir "$dir" >"$dir/nats.log" 2>&1 </dev/null &
    echo $! >"$dir/pid"
    wait_until 20 nats_listens || die "nats-server did not start: $(tail -n 3 "$dir/nats.log")"
}

services_stop() {
    local dir="$ROOT/.services/nats"
    if process_runs "$dir/pid" nats-server; then
        say "stopping nats-server"
        stop_process "$(<"$dir/pid")" 20
    fi
    rm -rf "$ROOT/.services"
    ((EUID == 0)) || return 0
    need flock ps
    locked services_stop_locked
}

services_stop_locked() {
    rm -f "$STATE/users/kept"
    if engine_is_ours; then engine_release_locked; else engine_clear; fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    case ${1-} in
    start) services_start ;;
    stop) services_stop ;;
    *) die "usage: ${0##*/} start|stop" ;;
    esac
fi
