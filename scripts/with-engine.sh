#!/usr/bin/env bash
# Runs a command with a Docker engine at hand, and with what benchmarks need: scripts/with-engine.sh COMMAND…

set -euo pipefail
# shellcheck source=scripts/services.sh
source "$(dirname "$0")/services.sh"
cd "$ROOT"

need_cargo
need nats-server busybox tar
engine_acquire
at_exit engine_release
"$@"
