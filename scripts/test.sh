#!/usr/bin/env bash
# Every test, against a real engine, real NATS servers and a real registry; the tests start the latter two themselves.
# `--long` adds the forms that take long. `--soak` runs nothing but the fault suite, on the optimised daemon, for an
# hour or for WORKER_SPAWNER_CHAOS_SECONDS. Further arguments go to the tests: scripts/test.sh admission

set -euo pipefail
# shellcheck source=scripts/services.sh
source "$(dirname "$0")/services.sh"
# shellcheck source=scripts/nats-current.sh
source "$(dirname "$0")/nats-current.sh"
cd "$ROOT"

LIMIT=40m
# How many of a hundred jobs that can start warm must, where the tests see to it that they can.
WARM_SHARE=80
WHAT=(--workspace)
SOAK=
case ${1-} in
--long)
    shift
    export WORKER_SPAWNER_TEST_LONG=1
    LIMIT=6h
    ;;
--soak)
    shift
    SOAK=1
    export WORKER_SPAWNER_CHAOS_SECONDS="${WORKER_SPAWNER_CHAOS_SECONDS:-3600}"
    # The quiet period at the end waits for no more than so long.
    LIMIT=$((WORKER_SPAWNER_CHAOS_SECONDS + 1800))
    WHAT=(--release --test integration)
    set -- --nocapture chaos::whatever_fails "$@"
    ;;
esac

# A test that hangs ends the run, and the clean-up below is done. Cargo is left out, so that it can say what happened.
limit_each_program() {
    local host
    host="$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')"
    export "CARGO_TARGET_${host}_RUNNER=timeout --foreground --kill-after=30 $LIMIT"
}

# Temporary files go to a directory of their own, which must be empty at the end.
private_temporary_files() {
    TMPDIR="$(mktemp -d /tmp/worker-spawner-test.XXXXXX)"
    # Some tests give up being root, and still have to find their way.
    chmod 0711 "$TMPDIR"
    export TMPDIR
    at_exit "rm -rf --one-file-system '$TMPDIR'"
    # Of a test that was killed: a disk of a server's own.
    at_exit "unmount_under '$TMPDIR'"
}

# Beside the server that is installed. REQUIRE_NATS_CURRENT=1 makes it an error that there is none.
current_nats_server() {
    if nats_current; then return; fi
    [[ ${REQUIRE_NATS_CURRENT-} != 1 ]] || die "there is no current nats-server"
    warn "NOT TESTED: WHAT TAKES A CURRENT NATS SERVER. Every such test passes without having run (see above)"
}

# What is listed depends on whose engine it is: in one started here, everything is ours.
list_leftovers() {
    if engine_is_ours; then scripts/leftovers.sh; else scripts/leftovers.sh ours; fi | grep -v -e '^firewall' -e '^temporary' || true
    find "$TMPDIR" -mindepth 1 -printf 'temporary %p\n'
}

# A daemon that is killed leaves the volume with its agent to the next one; one that is in use stays.
remove_agent_volumes() {
    docker volume ls -q --filter 'name=^worker-spawner-agent-' | xargs -r -n 1 docker volume rm &>/dev/null || true
}

# What the tests say of functions holds whichever way a container comes about: those that say it run once more with
# containers that wait for jobs. Most of the jobs must have started in one, or the tests have said nothing of it.
test_warm_starts() {
    local warm eligible
    STARTS="$(mktemp -p /tmp)"
    at_exit "rm -f '$STARTS'"
    say "tests, once more with warm starts"
    WORKER_SPAWNER_TEST_START=warm WORKER_SPAWNER_TEST_STARTS="$STARTS" \
        cargo test --test integration --all-features --locked -- \
        commands:: confinement:: limits:: outputs:: requests:: live_logs:: cancel:: big_objects:: lifecycle::
    read -r warm eligible < <(awk '{ warm += $1; all += $2 } END { print warm + 0, all + 0 }' "$STARTS")
    say "$warm of $eligible jobs that could have did start warm"
    ((eligible > 0 && warm * 100 >= eligible * WARM_SHARE)) ||
        die "fewer than $WARM_SHARE % started warm: $(sort -n "$STARTS")"
}

# The tests make each image once and share it, so none of them can tell when it is no longer needed. What another run
# on the same engine still uses stays.
remove_test_images() {
    docker image ls -q --filter 'reference=worker-spawner-test/*' | sort -u | xargs -r docker rmi -f &>/dev/null || true
}

# Control groups are all that outlives the private engines of tests that were killed.
remove_test_cgroups() {
    find /sys/fs/cgroup -depth -type d -path '*/worker-spawner-test-*' -exec rmdir {} + 2>/dev/null || true
}

# An engine that is killed while it starts a container forgets the container's shim, and with the engine's namespaces the
# shim goes, but not its socket. Removed are those made since the tests began that nobody on this machine listens on.
remove_dead_sockets() {
    local socket
    cat /proc/[0-9]*/net/unix 2>/dev/null | awk '{ print $8 }' | sort -u >"$BEFORE.sockets"
    while read -r socket; do
        grep -qxF "$socket" "$BEFORE.sockets" || rm -f "$socket"
    done < <(find /run/containerd/s -type s -newer "$BEFORE" 2>/dev/null)
    rm -f "$BEFORE.sockets"
}

nothing_new() {
    list_leftovers >"$BEFORE.now"
    NEW="$(comm -13 "$BEFORE" "$BEFORE.now")"
    [[ -z $NEW ]]
}

need_cargo
need nats-server docker-registry htpasswd busybox unshare nsenter setpriv perl ip iptables ps prometheus promtool script
private_temporary_files
current_nats_server
at_exit remove_test_cgroups
if [[ -z $SOAK ]]; then
    engine_acquire
    at_exit engine_release
    at_exit remove_test_images
    remove_test_images # of a run that was killed
else
    # The fault suite has an engine of its own.
    need dockerd
fi

BEFORE="$(mktemp -p /tmp)"
at_exit "rm -f '$BEFORE' '$BEFORE.now'"
list_leftovers >"$BEFORE"

# The tests wait more than they work: for servers, for deadlines, for what must not happen.
export RUST_TEST_THREADS="${RUST_TEST_THREADS:-4}"
limit_each_program
say "tests"
cargo test "${WHAT[@]}" --all-features --locked -- "$@"
if [[ -z $SOAK ]]; then
    # Not where certain tests were asked for.
    if (($# == 0)); then test_warm_starts; fi
    if [[ -x scripts/test-clients.sh ]]; then
        say "client examples"
        scripts/test-clients.sh
    fi
    remove_test_images
    remove_agent_volumes
fi
remove_dead_sockets
# Removal follows the result, so the last container may be going while the tests end.
if wait_until 20 nothing_new; then
    say "all tests passed, nothing left behind"
elif engine_is_ours; then
    die "the tests left behind:"$'\n'"$NEW"
else
    # Another daemon may be at work on the same engine; whose this is, only its owner knows.
    warn "all tests passed; new since they began:"$'\n'"$NEW"
fi
