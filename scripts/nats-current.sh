#!/usr/bin/env bash
# A current NATS server for the tests, beside the one of this release of Debian: what servers do with a stream differs
# between versions. Sourced for `nats_current`; run as a command it prints the program's path, or why there is none.
#
# The program comes out of the package of a later release of Debian, by way of apt with files of its own: apt checks
# the archive's signatures, nothing is installed, and the machine's own lists of packages stay as they are. Needs no
# root. NATS_SERVER_CURRENT names another program to use.

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Releases of Debian that have one, the newest server first.
NATS_CURRENT_RELEASES=(forky trixie)
# Servers before this one lose acknowledged messages, see the release notes.
NATS_CURRENT_LEAST=2.10.23

# nats_current: sets and exports NATS_SERVER_CURRENT, or says why it cannot and fails.
nats_current() {
    local release
    if [[ -n ${NATS_SERVER_CURRENT-} ]]; then
        nats_is_current "$NATS_SERVER_CURRENT" && return
        warn "NATS_SERVER_CURRENT=$NATS_SERVER_CURRENT is no nats-server of version $NATS_CURRENT_LEAST or newer"
        return 1
    fi
    export NATS_SERVER_CURRENT="$ROOT/.tools/nats-server-current"
    if nats_is_current "$NATS_SERVER_CURRENT"; then return; fi
    if grep -qsx ID=debian /etc/os-release; then
        for release in "${NATS_CURRENT_RELEASES[@]}"; do
            if nats_fetch "$release" && nats_is_current "$NATS_SERVER_CURRENT"; then return; fi
        done
    else
        warn "a current nats-server comes from Debian's archive, and this is no Debian: set NATS_SERVER_CURRENT to one"
    fi
    unset NATS_SERVER_CURRENT
    return 1
}

# It runs here, and its version is not older than it must be.
nats_is_current() {
    local version
    version="$("$1" --version 2>/dev/null)" || return 1
    printf '%s\n' "$NATS_CURRENT_LEAST" "${version##*v}" | sort --version-sort --check=quiet
}

# nats_fetch RELEASE: the program out of that release's package, as $NATS_SERVER_CURRENT.
nats_fetch() {
    local work status=0
    say "fetching nats-server of Debian $1"
    work="$(mktemp -d)"
    at_exit "rm -rf '$work'"
    if { private_apt "$work" "$1" && nats_download "$work"; } >"$work/log" 2>&1 </dev/null; then
        # Another run may be at it as well, and a server that runs cannot be written to.
        mkdir -p "${NATS_SERVER_CURRENT%/*}" && mv -f "$work/nats-server" "$NATS_SERVER_CURRENT"
        "$NATS_SERVER_CURRENT" --version >&2 || warn "the nats-server of Debian $1 does not run here"
    else
        status=1
        tail -n 15 "$work/log" >&2
        warn "no nats-server of Debian $1: apt-get could not get it, see above"
    fi
    rm -rf "$work"
    return "$status"
}

nats_download() {
    local work=$1
    (cd "$work" && apt-get -q -c "$work/apt.conf" download nats-server) || return 1
    dpkg-deb --fsys-tarfile "$work"/nats-server_*.deb | tar -x --to-stdout --wildcards '*bin/nats-server' >"$work/nats-server" &&
        chmod 755 "$work/nats-server"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    nats_current || die "there is no current nats-server"
    echo "$NATS_SERVER_CURRENT"
fi
