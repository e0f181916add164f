#!/usr/bin/env bash
# Measures the daemon against the ways of running one container by hand, and prints the table of docs/BENCHMARKS.md.
#
#   scripts/bench.sh                    about eleven minutes
#   scripts/bench.sh --long             and memory over 2,000 jobs, and a burst of 10,000: about forty minutes
#   scripts/bench.sh --without-daemon   the other contenders only
#   scripts/bench.sh --warm             only containers that wait, and what they are compared with: about seven minutes
#   scripts/bench.sh --breakdown        only where the time of one warm start goes: a minute
#   scripts/bench.sh --durability       only what durable delivery costs
#   scripts/bench.sh --rounds N | --budget SECONDS    no round at all leaves the contenders out
#
# Needs a Docker engine (DOCKER_HOST is obeyed by every contender), the docker command line client, nats-server and a
# static busybox (BENCH_BUSYBOX, default /bin/busybox). Nothing is pulled and nothing is left behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    printf 'bench: %s\n' "$1" >&2
    exit 69
}

command -v docker >/dev/null || die 'the docker command line client is missing (Debian: docker-cli)'
command -v tar >/dev/null || die 'tar is missing'
command -v "${NATS_SERVER:-nats-server}" >/dev/null || die 'nats-server is missing (Debian: nats-server)'
[[ -x ${BENCH_BUSYBOX:-/bin/busybox} ]] || die 'a static busybox is missing (Debian: busybox-static)'
docker version >/dev/null 2>&1 || die 'no Docker engine answers'

# The build is not part of the measured time, and must not run beside it.
cargo build --release --quiet
cargo bench --quiet --bench e2e --no-run
exec cargo bench --quiet --bench e2e -- "$@"
