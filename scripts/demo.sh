#!/usr/bin/env bash
# From nothing to a result: a NATS server, the daemon, one request, what came back. Everything is removed at the end.
#
# The image is made here from Debian's static busybox, so that nothing has to be pulled. The build is the unoptimised
# one that the tests use: it is ready sooner, and a container's start takes far longer than the daemon's work.

set -euo pipefail
# shellcheck source=scripts/services.sh
source "$(dirname "$0")/services.sh"
cd "$ROOT"

IMAGE=worker-spawner-demo/busybox:latest

make_image() {
    at_exit "docker rmi -f $IMAGE >/dev/null"
    import_busybox "$IMAGE"
}

start_daemon() {
    # None of the caller's own settings: they may name another server.
    env -i PATH="$PATH" HOME="$HOME" DOCKER_HOST="$DOCKER_HOST" NATS_URL="$NATS_ADDRESS" \
        target/debug/worker-spawner >"$WORK/daemon.log" 2>&1 </dev/null &
    DAEMON=$!
    at_exit "stop_process $DAEMON 40"
}

request() {
    if ! RUST_BACKTRACE=0 NATS_URL="$NATS_ADDRESS" target/debug/examples/demo "$@"; then
        warn "the daemon's log:"
        cat "$WORK/daemon.log" >&2
        exit 1
    fi
}

need_cargo
need docker nats-server busybox
WORK="$(mktemp -d)"
at_exit "rm -rf '$WORK'"
engine_acquire
at_exit engine_release

say "building"
cargo build --locked --bin worker-spawner --example demo
say "making the image $IMAGE"
make_image
say "starting a NATS server and the daemon"
nats_start "$WORK/nats" --jetstream --store_dir "$WORK/nats"
at_exit "stop_process $NATS_PID 20"
start_daemon

say "a function that prints something"
request "$IMAGE" "echo 'Hello, World!'"
say "a function that fails"
request "$IMAGE" "sh -c 'echo this goes to stderr >&2; exit 3'"
say "the daemon's log"
cat "$WORK/daemon.log"
