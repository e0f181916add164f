#!/usr/bin/env bash
# Everything that can be said about the code without running it.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

shell_scripts() {
    git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run
}

need_cargo
need shellcheck

say "formatting"
cargo fmt --all --check
say "lints"
cargo clippy --workspace --all-targets --all-features --locked -- -D warnings
say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features --locked
say "scripts"
shell_scripts | xargs -d '\n' shellcheck -x
scripts/deny.sh
