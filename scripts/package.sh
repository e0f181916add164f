#!/usr/bin/env bash
# Builds the Debian package from the optimised binary: target/debian/worker-spawner_VERSION-REVISION_ARCHITECTURE.deb.
# Sourced, it lends scripts/package-check.sh its steps.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

CARGO_DEB_VERSION=3.8.0
CARGO_DEB="$ROOT/.tools/bin/cargo-deb"
# What is made for the package; Cargo.toml names it.
STAGE="$ROOT/target/package"

is_wanted() { [[ $("$1" --version 2>/dev/null) == *"$CARGO_DEB_VERSION" ]]; }

find_cargo_deb() {
    local installed
    installed="$(command -v cargo-deb || true)"
    if is_wanted "$installed"; then CARGO_DEB="$installed"; fi
    if ! is_wanted "$CARGO_DEB"; then
        say "compiling cargo-deb $CARGO_DEB_VERSION"
        cargo install cargo-deb --quiet --locked --version "$CARGO_DEB_VERSION" --root "$ROOT/.tools"
    fi
}

# stage BINARY: all of the package that comes neither from the compiler nor from the repository.
stage() {
    local binary=$1
    rm -rf "$STAGE"
    mkdir -p "$STAGE"/{man,completions}
    "$binary" man "$STAGE/man"
    # Under the names by which each shell finds them.
    "$binary" completions bash >"$STAGE/completions/worker-spawner"
    "$binary" completions zsh >"$STAGE/completions/_worker-spawner"
    "$binary" completions fish >"$STAGE/completions/worker-spawner.fish"
    settings_file >"$STAGE/worker-spawner.env"
}

# With every setting commented out, an upgrade changes no setting that nobody has chosen.
settings_file() {
    cat <<'HEADER'
# Settings of the service worker-spawner, as lines NAME=value. What is commented out has the default that it shows.
# `systemctl reload worker-spawner` has limits, the allow-list, slots, warm containers and the log's filter taken up, and
# names in the log what takes a `systemctl restart worker-spawner`.
HEADER
    # This is the file that CONFIG_FILE names.
    tail -n +2 .env.example | sed '/^# File of settings/,$d' | sed 's/^\([A-Z]\)/# \1/'
}

package() {
    need_cargo
    # What the binary is linked to becomes the package's dependencies.
    need dpkg-shlibdeps
    find_cargo_deb
    cargo build --release --locked
    stage "${CARGO_TARGET_DIR:-target}/release/worker-spawner"
    "$CARGO_DEB" --no-build --locked
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then package; fi
