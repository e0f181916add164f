#!/usr/bin/env bash
# Everything that can be said about the code without running it.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

shell_scripts() {
    git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run
}

# Settings of the daemon's own that docker-compose.yml does not hand on: its file names neither the servers' keys nor
# another engine.
settings_compose_lacks() {
    comm -23 <(sed -En 's/^(# )?([A-Z_]+)=.*/\2/p' .env.example | grep -Ev '^(NATS|DOCKER)_' | sort) \
        <(sed -En 's/^      - ([A-Z_]+)$/\1/p' docker-compose.yml | sort)
}

# Those of Cargo.toml, for a program that Cargo does not see. Its unsafe code is what it is for, and nobody outside it
# could use what it calls public.
agent_lints() {
    clippy-driver --edition=2024 --crate-type=bin src/agent/main.rs --emit=metadata -o "$WORK/agent" -D warnings \
        -W clippy::unwrap_used -W clippy::expect_used -W clippy::panic -W clippy::dbg_macro \
        -W clippy::todo -W clippy::unimplemented
}

need_cargo
need shellcheck
WORK="$(mktemp -d)"
at_exit "rm -rf '$WORK'"

say "formatting"
cargo fmt --all --check
rustfmt --check --edition=2024 src/agent/main.rs fuzz/src/lib.rs fuzz/fuzz_targets/*.rs
say "lints"
cargo clippy --workspace --all-targets --all-features --locked -- -D warnings
agent_lints
say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features --locked
say "scripts"
shell_scripts | xargs -d '\n' shellcheck -x
say "settings in docker-compose.yml"
LACKING="$(settings_compose_lacks)"
[[ -z $LACKING ]] || die "docker-compose.yml does not hand on:"$'\n'"$LACKING"
say "specifications"
scripts/specifications.sh check
scripts/deny.sh
