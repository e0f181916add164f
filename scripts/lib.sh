# shellcheck shell=bash
# What the scripts share: words on the terminal, clean-up, waiting, packages, test images. Sourced, never run.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# An unprivileged user's PATH on Debian lacks the directories where servers and network tools live.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export ROOT PATH

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# --- Clean-up: what `at_exit` is given runs in reverse order, however the script ends. ---------------------------

CLEANUPS=()
at_exit() { CLEANUPS=("$1" "${CLEANUPS[@]}"); }
run_cleanups() {
    local status=$? step
    trap '' INT TERM HUP
    set +e
    for step in "${CLEANUPS[@]}"; do
        eval "$step"
    done
    exit "$status"
}
trap run_cleanups EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# --- Waiting and stopping ----------------------------------------------------------------------------------------

# wait_until SECONDS COMMAND…: polls until COMMAND succeeds; fails when the time is up.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

# process_runs PID_FILE NAME: the process of that number is there and is still the program NAME.
process_runs() { [[ -s $1 && $(readlink "/proc/$(<"$1")/exe") == */$2 ]] 2>/dev/null; }

# stop_process PID SECONDS: TERM, and KILL for what is still there after SECONDS. Returns once it is gone.
stop_process() {
    local pid=$1 seconds=$2
    kill -TERM "$pid" 2>/dev/null || return 0
    # `wait` reaps our own children, which would otherwise stay as zombies and look alive.
    if ! wait_until "$seconds" reaped "$pid"; then
        warn "process $pid ignored TERM for ${seconds}s, killing it"
        kill -KILL "$pid" 2>/dev/null
        wait_until 10 reaped "$pid"
    fi
}
reaped() {
    local state
    state="$(ps -o stat= -p "$1" 2>/dev/null)" || return 0
    [[ $state == Z* ]]
}

# --- Packages ----------------------------------------------------------------------------------------------------

# package_of COMMAND: the Debian package it comes from.
package_of() {
    case $1 in
    # The client is a package of its own in newer releases.
    docker) if apt-cache show docker-cli &>/dev/null; then echo docker-cli; else echo docker.io; fi ;;
    dockerd) echo docker.io ;;
    busybox) echo busybox-static ;;
    htpasswd) echo apache2-utils ;;
    promtool) echo prometheus ;;
    dpkg-shlibdeps) echo dpkg-dev ;;
    ip) echo iproute2 ;;
    systemd-analyze) echo systemd ;;
    ps | pgrep | pkill) echo procps ;;
    unshare | nsenter | flock | findmnt | setsid | setpriv | pivot_root) echo util-linux ;;
    cc) echo gcc libc6-dev ;;
    pip3) echo python3-pip ;;
    node) echo nodejs ;;
    script) echo bsdutils ;;
    *) echo "$1" ;;
    esac
}

# need COMMAND…: installs the packages of those that are missing, or says which to install.
need() {
    local command packages=()
    for command in "$@"; do
        command -v "$command" >/dev/null || read -ra packages < <(echo "${packages[@]}" "$(package_of "$command")")
    done
    ((${#packages[@]})) || return 0
    mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
    install_packages "${packages[@]}"
    hash -r
    for command in "$@"; do
        command -v "$command" >/dev/null || die "$command is still missing after installing: ${packages[*]}"
    done
}

install_packages() {
    local names="$*" log services_before
    command -v apt-get >/dev/null || die "missing: $names (names of Debian's packages). Install them with this system's package manager, then try again."
    ((EUID == 0)) || die "missing: $names. As root: apt-get install $names — then try again."
    say "installing $names"
    services_before="$(running_services)"
    log="$(mktemp)"
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get -q -o DPkg::Lock::Timeout=300 update &&
        apt-get -qy -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        die "could not install $names"
    fi
    rm -f "$log"
    stop_new_services "$services_before"
}

# Debian starts a server when it is installed. Only the programs are wanted here.
SERVICES_OF_PACKAGES=(docker.socket docker containerd nats-server docker-registry prometheus)

running_services() {
    local service
    for service in "${SERVICES_OF_PACKAGES[@]}"; do
        if service_runs "$service"; then echo "$service"; fi
    done
}

service_runs() {
    if [[ -d /run/systemd/system ]]; then
        systemctl is-active --quiet "$1"
    else
        [[ -x /etc/init.d/$1 ]] && "/etc/init.d/$1" status &>/dev/null
    fi
}

# stop_new_services BEFORE: stops what runs now and is not in the list BEFORE.
stop_new_services() {
    local service
    while read -r service; do
        grep -qxF "$service" <<<"$1" && continue
        if [[ -d /run/systemd/system ]]; then
            systemctl disable --quiet --now "$service"
        else
            "/etc/init.d/$service" stop >/dev/null
        fi
    done < <(running_services)
}

# private_apt DIRECTORY RELEASE: a configuration of apt for that release of Debian, DIRECTORY/apt.conf, with files of its
# own and from the mirrors that this machine has: apt checks the archive's signatures, nothing is installed, and the
# machine's own lists of packages stay as they are. Needs no root.
private_apt() {
    local work=$1 release=$2 mirror here
    here="$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)"
    # Other archives may have a release of that name too. What Debian has not signed is not taken.
    apt-get --print-uris update | sed -n "s|^'\(.*\)/dists/$here/InRelease'.*|\1|p" | while read -r mirror; do
        echo "deb [target=Packages signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main"
    done >"$work/sources.list"
    mkdir -p "$work"/{lists,cache/archives}/partial
    # The machine's own hooks would clear its cache. A release in the making expires within days, and a mirror that is
    # behind, or a snapshot, still serves what Debian signed.
    cat >"$work/apt.conf" <<CONFIG
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::State "$work";
Dir::State::lists "$work/lists";
Dir::State::status "/dev/null";
Dir::Cache "$work/cache";
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
APT::Sandbox::User "root";
APT::Default-Release "";
Acquire::Check-Valid-Until "false";
Acquire::Retries "2";
Acquire::http::Timeout "30";
CONFIG
    # One of several mirrors is enough, so a failure here is told by whoever finds no package.
    apt-get -q -c "$work/apt.conf" update || true
}

# The compiler comes from rustup: Debian's own is often older than rust-version in Cargo.toml.
need_cargo() {
    command -v cargo >/dev/null ||
        die "cargo is missing: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml") or newer with rustup, then try again."
    # Some dependencies compile a little C.
    need cc
}

# --- Images from local files -------------------------------------------------------------------------------------

# import_busybox IMAGE: an image with a static busybox and its applets; nothing is pulled.
import_busybox() {
    local image=$1 tree applet
    need busybox
    tree="$(mktemp -d)"
    mkdir -p "$tree/bin" "$tree/tmp" "$tree/etc"
    chmod 1777 "$tree/tmp"
    cp "$(command -v busybox)" "$tree/bin/busybox"
    for applet in $(busybox --list); do
        [[ $applet == busybox ]] || ln -s busybox "$tree/bin/$applet"
    done
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$tree/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$tree/etc/group"
    import_tree "$tree" "$image"
    rm -rf "$tree"
}

# import_tree DIRECTORY IMAGE [CHANGE…]: DIRECTORY, owned by root, as IMAGE; CHANGE is a Dockerfile instruction.
import_tree() {
    local tree=$1 image=$2 change changes=()
    shift 2
    for change in "$@"; do changes+=(--change "$change"); done
    tar -C "$tree" --owner=0 --group=0 --numeric-owner -c . | docker import "${changes[@]}" - "$image" >/dev/null
}
