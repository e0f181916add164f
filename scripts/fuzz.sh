#!/usr/bin/env bash
# Feeds made-up bytes to what takes apart the words of a container and of the daemon: each target in fuzz/ for
# FUZZ_SECONDS, a minute unless told. Names of targets as arguments: those alone.
#
# What it finds on the way that is new stays below target/, what breaks a target in fuzz/artifacts.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

VERSION=0.13.2
TOOL="$ROOT/.tools/bin/cargo-fuzz"
SECONDS_EACH="${FUZZ_SECONDS:-60}"
# It asks for flags that only a nightly compiler takes. This is how the stable one takes them, too.
export RUSTC_BOOTSTRAP=1
export CARGO_TARGET_DIR="$ROOT/target/fuzz"

is_wanted() { [[ $("$1" --version 2>/dev/null) == "cargo-fuzz $VERSION" ]]; }

find_tool() {
    local installed
    installed="$(command -v cargo-fuzz || true)"
    if is_wanted "$installed"; then TOOL="$installed"; fi
    is_wanted "$TOOL" || cargo install cargo-fuzz --locked --version "$VERSION" --root "$ROOT/.tools"
}

# What is fuzzed has no unsafe code, so that a sanitizer would have nothing to say.
cargo_fuzz() { "$TOOL" "$1" --sanitizer none "${@:2}"; }

fuzz() {
    local found="$CARGO_TARGET_DIR/found/$1"
    mkdir -p "$found"
    say "fuzzing $1 for $SECONDS_EACH s"
    # New inputs go to the first directory named, so the seeds in the repository stay as few as they are.
    cargo_fuzz run "$1" "$found" "fuzz/corpus/$1" -- \
        -max_total_time="$SECONDS_EACH" -timeout=10 -rss_limit_mb=512 -max_len=200000 -print_final_stats=1
}

need_cargo
need g++
find_tool
(($#)) || set -- dialogue start
for target in "$@"; do
    fuzz "$target"
done
