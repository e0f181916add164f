#!/usr/bin/env bash
# The specifications in docs/specifications: written anew from the code, or (`check`) read by AsyncAPI's own parser.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"
DIRECTORY=docs/specifications

write() {
    local name
    need_cargo
    mkdir -p "$DIRECTORY"
    for name in request outcome event; do
        cargo run --quiet --locked -- schema "$name" >"$DIRECTORY/$name.schema.json"
    done
    env -u SUBJECT_PREFIX cargo run --quiet --locked -- schema asyncapi >"$DIRECTORY/asyncapi.json"
}

# The parser is kept under .tools, and fetched again when another version is asked for.
check() {
    local parser=.tools/asyncapi
    need node npm
    if ! cmp -s scripts/asyncapi/package-lock.json "$parser/installed.json"; then
        say "installing AsyncAPI's parser"
        mkdir -p "$parser"
        cp scripts/asyncapi/package.json scripts/asyncapi/package-lock.json "$parser/"
        npm ci --prefix "$parser" --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
        cp scripts/asyncapi/package-lock.json "$parser/installed.json"
    fi
    # Node looks for libraries beside the program.
    cp scripts/asyncapi/check.mjs "$parser/"
    node "$parser/check.mjs" "$DIRECTORY/asyncapi.json"
}

case ${1-} in
write) write ;;
check) check ;;
*) die "usage: scripts/specifications.sh write|check" ;;
esac
