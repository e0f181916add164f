#!/usr/bin/env bash
# Lists, one a line, what tests and demos could leave behind: for a comparison of before and after.
# `leftovers.sh ours` lists only what carries this project's name, for a machine that others use at the same time.

set -euo pipefail
# shellcheck source=scripts/services.sh
source "$(dirname "$0")/services.sh"

PROGRAMS='dockerd|containerd|containerd-shim.*|docker-proxy|docker-init|runc|nats-server.*|docker-registry|prometheus|worker-spawner.*|integration-.*'

in_engine() {
    if ! engine_answers; then return; fi
    # Not what has no name: Docker 20.10 may go on listing a container that it has removed, and says itself that there is
    # none.
    docker ps -a --no-trunc --format '{{if .Names}}container {{.ID}} {{.Names}} {{.Image}} {{.Labels}}{{end}}' | sed '/^$/d'
    docker volume ls --format 'volume {{.Name}} {{.Labels}}'
    docker network ls --no-trunc --format 'network {{.ID}} {{.Name}}'
    docker image ls -a --no-trunc --format 'image {{.ID}} {{.Repository}}:{{.Tag}}'
}

# The number of a process goes with it: the same server started anew is another one. A zombie has ended; that its
# parent has not noticed is not ours to mend.
processes() {
    ps -e -o stat= -o pid= -o comm= -o args= |
        awk -v programs="^($PROGRAMS)\$" '$1 !~ /^Z/ && $3 ~ programs { $1 = "process"; print substr($0, 1, 160) }'
}

on_machine() {
    ip -o link show | awk -F': ' '{ sub(/@.*/, "", $2); print "interface", $2 }'
    awk '{ print "mount", $5 }' /proc/self/mountinfo
    if [[ -d /run/netns ]]; then printf 'namespace %s\n' /run/netns/*; fi
    # The names that this project's programs, mktemp and the tests' libraries give.
    find /tmp -mindepth 1 -maxdepth 1 -regextype posix-extended -regex '.*/(worker-spawner|engine-|\.tmp|tmp\.).*' \
        -printf 'temporary %p\n'
    find /sys/fs/cgroup -maxdepth 2 -name 'worker-spawner*' -printf 'cgroup %p\n'
    find /run/containerd -type s -printf 'socket %p\n' 2>/dev/null || true
    find /run/worker-spawner-dev /var/lib/worker-spawner-dev -maxdepth 0 -printf 'state %p\n' 2>/dev/null || true
    firewall_rules iptables | sed 's/^/firewall /'
}

need docker ip ps
if [[ ${1-} == ours ]]; then
    { in_engine; processes; } | grep worker-spawner | sort
else
    { in_engine; processes; on_machine; } | sort
fi
