#!/usr/bin/env bash
# Runs the client examples, each with a real client library, against a daemon, a NATS server and an engine.
# A collector takes the traces of it all. Libraries and collector are fetched once and kept under target/clients/.
# WORKER_SPAWNER_BIN names another daemon to test.

set -euo pipefail
# shellcheck source=scripts/services.sh
source "$(dirname "$0")/services.sh"
cd "$ROOT"

IMAGE=worker-spawner-test/clients:latest
BUILT="${CARGO_TARGET_DIR:-$ROOT/target}/debug"
CACHE="${CARGO_TARGET_DIR:-$ROOT/target}/clients"
PASSED=0 FAILED=0 SKIPPED=0
declare -A ADDRESSES LOGS

# --- The clients: each has a way to be made ready, and a command ------------------------------------------------

ready_python() {
    ready_venv python nats examples/clients/python/requirements.txt || return 1
    CLIENT=("$CACHE/python/bin/python" examples/clients/python/client.py)
}

# ready_venv NAME MODULE REQUIREMENTS: a virtual environment with what the file asks for, which has that module.
ready_venv() {
    local venv="$CACHE/$1" module=$2 wanted=$3
    have 'python3 -c "import ensurepip, venv"' python3 python3-venv || return 1
    # A virtual environment breaks with the interpreter it was made by.
    if ! cmp -s "$wanted" "$venv/requirements.txt" ||
        ! "$venv/bin/python" -c "import importlib.util as u; exit(not u.find_spec('$module'))" &>/dev/null; then
        say "installing what $wanted asks for"
        rm -rf "$venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --require-hashes -r "$wanted" || return 1
        cp "$wanted" "$venv/requirements.txt"
    fi
}

ready_discovery() {
    ready_python || return 1
    CLIENT=("$CACHE/python/bin/python" examples/clients/python/discover.py)
}

ready_node() {
    local dir="$CACHE/node" source=examples/clients/node
    have 'command -v node' nodejs || return 1
    have 'command -v npm' npm || return 1
    if (($(node -p 'parseInt(process.versions.node)') < 18)); then
        warn "node is $(node --version); the library needs 18 or newer"
        return 1
    fi
    mkdir -p "$dir"
    if ! cmp -s "$source/package-lock.json" "$dir/installed.json"; then
        say "installing @nats-io/transport-node"
        cp "$source/package.json" "$source/package-lock.json" "$dir/"
        npm ci --prefix "$dir" --no-audit --no-fund --loglevel=error >/dev/null
        cp "$source/package-lock.json" "$dir/installed.json"
    fi
    # Node looks for libraries beside the program.
    cp "$source/client.mjs" "$dir/"
    CLIENT=(node "$dir/client.mjs")
}

ready_traces() {
    [[ -n $COLLECTOR ]] || return 1
    CLIENT=("$WORKER_SPAWNER_BIN" run --quiet)
}

ready_rust() {
    cargo build --quiet --locked --example client
    CLIENT=("$BUILT/examples/client")
}

# have CHECK PACKAGE…: CHECK succeeds, if need be after the packages are installed.
have() {
    local check=$1
    shift
    if bash -c "$check" &>/dev/null; then return; fi
    # In a subshell, where `die` ends no more than this: one client less is no reason to leave the others untested.
    (install_packages "$@") && bash -c "$check" &>/dev/null
}

# --- What each client is expected to do -------------------------------------------------------------------------

# expect STATUS STDOUT STDERR ARGUMENT…: the client, given the arguments, ends with this exit status, prints exactly
# this, and says this among other things on standard error.
expect() {
    local status=$1 stdout=$2 stderr=$3 actual=0
    shift 3
    timeout 60 "${CLIENT[@]}" "$IMAGE" "$@" >"$WORK/stdout" 2>"$WORK/stderr" </dev/null || actual=$?
    # `%b` puts bytes for escapes, so that output need not be text.
    if [[ $actual == "$status" ]] && cmp -s "$WORK/stdout" <(printf '%b' "$stdout") &&
        [[ $(<"$WORK/stderr") == *"$stderr"* ]]; then
        return
    fi
    warn "$*: wanted exit status $status, standard output ${stdout@Q}, standard error with ${stderr@Q}"
    warn "got exit status $actual, and"
    cat -A "$WORK/stdout" >&2
    cat "$WORK/stderr" >&2
    return 1
}

greets() { expect 0 'run: succeeded 0\nHello, World!\nexecute: succeeded 0\nHello, World!\n' '' echo 'Hello, World!'; }

takes_bytes() { expect 3 'run: failed 3\n\0377\0\nexecute: failed 3\n\0377\0\n' '' sh -c 'printf "\377\0\n"; exit 3'; }

tells_errors() {
    local message='the command "nosuch" is not in the image: No such file or directory'
    expect 1 "run: rejected -\nexecute: rejected -\n$message" "command.not_found $message" nosuch
}

is_found() { expect 0 'endpoints: cancel run status\nfound\nrequests: some\n' '' echo found; }

# Three at once for one slot: somebody is told to come back, and everybody is served.
waits_for_its_turn() {
    local before others=() other
    before="$(times_busy)"
    for _ in 1 2; do
        timeout 60 "${CLIENT[@]}" "$IMAGE" sleep 0.7 >/dev/null 2>&1 </dev/null &
        others+=($!)
    done
    expect 0 'run: succeeded 0\nexecute: succeeded 0\n' '' sleep 0.7 || return 1
    for other in "${others[@]}"; do
        wait "$other" || return 1
    done
    (($(times_busy) > before)) || {
        warn "nobody was told that the daemon is busy"
        return 1
    }
}
times_busy() { grep -c 'error=busy: ' "$LOG" || true; }

# The trace of a job, from this machine's environment to the collector.
is_traced() {
    local trace
    trace="$(od -An -N16 -tx1 /dev/urandom | tr -d ' ')"
    TRACEPARENT="00-$trace-00f067aa0ba902b7-01" expect 0 'traced\n' '' -- echo traced || return 1
    wait_until 30 has_spans "$trace" 'process functions.execute' queue pull start run publish || {
        warn "the collector has not got the spans of trace $trace"
        cat "$WORK/collector.log" >&2
        return 1
    }
}

# has_spans TRACE NAME…: the collector has told of spans with these names, of that trace.
has_spans() {
    local trace=$1 name
    shift
    for name in "$@"; do
        grep -q "Name *: $name\$" <(grep -A3 "Trace ID *: $trace" "$WORK/collector.log") || return 1
    done
}

misses_the_daemon() { NATS_URL=$EMPTY_NATS_ADDRESS expect 1 '' 'is worker-spawner running?' true; }

# try NAME CHECK…: one client through all checks, with each of the daemons.
try() {
    local name=$1 check kind
    shift
    if ! "ready_$name"; then
        warn "THE CLIENT EXAMPLE FOR ${name^^} WAS NOT TESTED: what it needs cannot be had here (see above)"
        SKIPPED=$((SKIPPED + 1))
        return
    fi
    for kind in "${!ADDRESSES[@]}"; do
        export NATS_URL=${ADDRESSES[$kind]}
        LOG=${LOGS[$kind]}
        for check in "$@"; do
            if ! "$check"; then
                warn "$name, $kind: $check failed"
                FAILED=$((FAILED + 1))
                continue 2
            fi
        done
        say "$name, $kind: passed"
        PASSED=$((PASSED + 1))
    done
}

# --- The servers ------------------------------------------------------------------------------------------------

need_cargo
need busybox ps
engine_acquire
at_exit engine_release
WORK="$(mktemp -d)"
at_exit "rm -rf '$WORK'"
at_exit "docker rmi -f '$IMAGE' >/dev/null 2>&1"
import_busybox "$IMAGE"

# serve KIND [OPTION…]: a NATS server with these options, and a daemon whose kind of delivery follows from them. One
# slot, and little patience, so that clients have to come back.
serve() {
    local kind=$1 dir="$WORK/nats-$1"
    shift
    nats_start "$dir" "$@"
    at_exit "stop_process $NATS_PID 10"
    ADDRESSES[$kind]=$NATS_ADDRESS
    LOGS[$kind]="$dir/daemon.log"
    env -u REPLY_PREFIXES -u DELIVERY NATS_URL="$NATS_ADDRESS" MAX_CONTAINERS=1 RUN_SLOT_TIMEOUT=50ms PULL_POLICY=never \
        IMAGE_ALLOWLIST='worker-spawner-test/*' OTEL_EXPORTER_OTLP_ENDPOINT="$COLLECTOR" "$WORKER_SPAWNER_BIN" >"${LOGS[$kind]}" 2>&1 </dev/null &
    at_exit "stop_process $! 60"
    wait_until 30 grep -q " ready .* delivery=\"$kind\"" "${LOGS[$kind]}" ||
        die "no daemon with the delivery $kind is ready: $(<"${LOGS[$kind]}")"
}

# collector_start: sets COLLECTOR to the address of one that tells of each span in a log.
COLLECTOR=''
collector_start() {
    local program ports
    ready_venv collector rotel scripts/collector-requirements.txt || return 0
    program="$(echo "$CACHE"/collector/lib/python3*/site-packages/rotel/rotel-agent)"
    # Two that are free now: it cannot choose for itself and say so.
    ports="$(python3 -c 'import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(one.getsockname()[1] for one in held))')"
    "$program" start --exporter blackhole --debug-log traces --debug-log-verbosity detailed \
        --otlp-http-endpoint "127.0.0.1:${ports% *}" --otlp-grpc-endpoint "127.0.0.1:${ports#* }" \
        >"$WORK/collector.log" 2>&1 </dev/null 9<&- &
    at_exit "stop_process $! 10"
    wait_until 20 grep -q 'Starting Rotel' "$WORK/collector.log" ||
        die "the collector did not start: $(<"$WORK/collector.log")"
    COLLECTOR="http://127.0.0.1:${ports% *}"
}
collector_start

# One that nobody listens on.
nats_start "$WORK/empty"
at_exit "stop_process $NATS_PID 10"
EMPTY_NATS_ADDRESS=$NATS_ADDRESS

if [[ -z ${WORKER_SPAWNER_BIN-} ]]; then
    cargo build --quiet --locked
    WORKER_SPAWNER_BIN="$BUILT/worker-spawner"
fi
# What a reply to functions.execute means depends on whether a stream keeps the requests.
serve core
serve jetstream --jetstream --store_dir "$WORK/store"

for client in python node rust; do
    try "$client" misses_the_daemon greets takes_bytes tells_errors waits_for_its_turn
done

try discovery misses_the_daemon is_found
try traces is_traced

((FAILED == 0)) || tail -n +1 "${LOGS[@]}" >&2
printf 'clients: %d passed, %d failed' "$PASSED" "$FAILED"
((SKIPPED == 0)) || printf ', %d skipped' "$SKIPPED"
printf '\n'
((FAILED == 0))
