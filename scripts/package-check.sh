#!/usr/bin/env bash
# Installs the Debian package in a minimal Debian of its own, checks what is there, lets a real systemd start the service
# and a real request go through it, then upgrades, removes and purges the package.
#
# The package is made from the debug binary, as the tests have it: it is packed as the other would be.

set -euo pipefail
# shellcheck source=scripts/services.sh
source "$(dirname "$0")/services.sh"
# shellcheck source=scripts/package.sh
source "$(dirname "$0")/package.sh"
cd "$ROOT"

# What systemd's own measure may say of the unit, in tenths: see docs/OPERATING.md.
EXPOSURE=15
PACKAGE=worker-spawner
UNIT=$PACKAGE.service
CONFFILE=/etc/worker-spawner/worker-spawner.env
FUNCTION_IMAGE=worker-spawner-package-check/busybox:latest

# --- The system it is installed in ---------------------------------------------------------------------------------

# Shells and a manual reader, as a user has them, and an init. Made once for each release; a copy is quick.
make_tree() {
    local release archive part
    release="$(. /etc/os-release && echo "${VERSION_CODENAME:?}")"
    archive="$ROOT/.tools/debian-$release-2.tar"
    if [[ ! -f $archive ]]; then
        debootstrap --variant=minbase --include=adduser,procps,man-db,bash-completion,zsh,fish,systemd \
            "$release" "$WORK/fresh" >"$WORK/debootstrap.log" 2>&1 ||
            { tail -n 20 "$WORK/debootstrap.log" >&2; die "debootstrap failed"; }
        rm -rf "$WORK/fresh"/var/{cache/apt/archives/*.deb,lib/apt/lists/*}
        mkdir -p "$ROOT/.tools"
        part="$(mktemp -p "$ROOT/.tools")"
        tar -C "$WORK/fresh" -cf "$part" .
        mv "$part" "$archive"
        rm -rf --one-file-system "$WORK/fresh"
    fi
    mkdir "$TREE"
    tar -C "$TREE" -xf "$archive"
    mount -t proc proc "$TREE/proc"
    at_exit "umount '$TREE/proc'"
}

inside() {
    chroot "$TREE" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        "$@" </dev/null
}

# --- Packages --------------------------------------------------------------------------------------------------------

# build REVISION: the package as $WORK/REVISION.deb. cargo-deb looks for the optimised binary.
build() {
    CARGO_TARGET_DIR="$WORK/build" "$CARGO_DEB" --quiet --no-build --locked --fast --deb-revision "$1" \
        --output "$WORK/$1.deb" >/dev/null
}

build_packages() {
    cargo build --quiet --locked --all-features --bin worker-spawner
    mkdir -p "$WORK/build/release"
    cp "${CARGO_TARGET_DIR:-target}/debug/worker-spawner" "$WORK/build/release/"
    stage "$WORK/build/release/worker-spawner"
    build 1
    # A later one, that comes with other settings.
    echo '# A_NEW_SETTING=' >>"$STAGE/worker-spawner.env"
    build 2
}

# An engine's package as far as this one notices it: a program, and a group whose number is that of the real socket.
build_engine() {
    local tree="$WORK/engine" gid
    gid="$(stat -L -c %g /var/run/docker.sock)"
    mkdir -p "$tree"/{DEBIAN,usr/sbin}
    printf '#!/bin/sh\n' >"$tree/usr/sbin/dockerd"
    printf '#!/bin/sh\ngetent group docker >/dev/null || groupadd --system --non-unique --gid %s docker\n' "$gid" \
        >"$tree/DEBIAN/postinst"
    chmod 755 "$tree/usr/sbin/dockerd" "$tree/DEBIAN/postinst"
    cat >"$tree/DEBIAN/control" <<'CONTROL'
Package: stand-in-engine
Version: 1
Architecture: all
Maintainer: nobody <nobody@localhost>
Description: what an engine's package does that others notice
CONTROL
    dpkg-deb --build --root-owner-group "$tree" "$WORK/engine.deb" >/dev/null
}

# install DEB [OPTION…]: with dpkg, as apt does once it has the dependencies.
install_deb() {
    local deb=$1
    shift
    cp "$deb" "$TREE/tmp/package.deb"
    inside dpkg "$@" --install /tmp/package.deb >"$WORK/dpkg.log" 2>&1 || { cat "$WORK/dpkg.log" >&2; die "dpkg failed"; }
    rm "$TREE/tmp/package.deb"
}

# --- Checks ----------------------------------------------------------------------------------------------------------

# expect WHAT WANTED COMMAND…: COMMAND prints WANTED.
expect() {
    local what=$1 wanted=$2 got
    shift 2
    got="$("$@" 2>&1)" || true
    [[ $got == "$wanted" ]] || die "$what: wanted ${wanted@Q}, got ${got@Q}"
}

# What an installation may leave is what every installation leaves: the package manager's notes and caches.
list_files() {
    (cd "$TREE" && find . -xdev \( -path ./var/lib/dpkg -o -path ./var/lib/apt -o -path ./var/cache -o -path ./var/log \
        -o -path ./tmp -o -path ./proc -o -path ./run \) -prune -o ! -name '*-' -print | sort)
}
list_accounts() { inside getent passwd; inside getent group; }

check_files() {
    local version
    version="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)"
    expect version "$PACKAGE $version" inside $PACKAGE --version
    expect "the settings' owner" "640 root $PACKAGE" inside stat -c '%a %U %G' $CONFFILE
    expect "the settings' folder" "750 root $PACKAGE" inside stat -c '%a %U %G' /etc/worker-spawner
    expect "settings that are set" "" grep -v '^\(#.*\)\?$' "$TREE$CONFFILE"
    expect "the unit is enabled" /lib/systemd/system/$UNIT inside readlink /etc/systemd/system/multi-user.target.wants/$UNIT
    expect "the unit" "" inside systemd-analyze verify --man=no $UNIT
    inside systemd-analyze security --offline=true --threshold=$EXPOSURE --no-pager $UNIT >"$WORK/security" ||
        { cat "$WORK/security" >&2; die "the unit is more exposed than it was"; }
    tail -n 1 "$WORK/security"
    for file in copyright README.md CHANGELOG.md docs/OPERATING.md; do
        [[ -f $TREE/usr/share/doc/$PACKAGE/$file ]] || die "there is no $file in the documentation"
    done
}

check_manual() {
    local page count=0
    for page in "$TREE/usr/share/man/man1/$PACKAGE"*; do
        page="$(basename "$page" .1.gz)"
        expect "complaints about the manual of $page" "" inside sh -c "man --warnings '$page' 2>&1 >/dev/null"
        count=$((count + 1))
    done
    ((count > 5)) || die "there are only $count pages of the manual"
    [[ $(inside man $PACKAGE-run) == *'exit code is'* ]] || die "the manual of run does not say what its exit code is"
}

check_completions() {
    # shellcheck disable=SC2016 # for the shell inside
    expect "bash's completion" cancel inside bash -c '
        . /usr/share/bash-completion/bash_completion
        _completion_loader worker-spawner
        function="$(complete -p worker-spawner | sed "s/.* -F \([^ ]*\) .*/\1/")"
        COMP_WORDS=(worker-spawner canc) COMP_CWORD=1
        "$function" worker-spawner canc worker-spawner
        echo "${COMPREPLY[@]}"'
    # shellcheck disable=SC2016
    expect "zsh's completion" _worker-spawner \
        inside zsh -fc 'autoload -Uz compinit; compinit -D -u; print $_comps[worker-spawner]'
    [[ $(inside fish -c 'complete -C "worker-spawner canc"') == cancel* ]] || die "fish completes nothing"
}

# --- A system that runs ----------------------------------------------------------------------------------------------

# boot: systemd as process 1 of namespaces of its own, but for the network, where NATS is. What it writes
# is gone with it, and what it could change outside is read-only: /sys, and the kernel's settings.
boot() {
    local hierarchy
    hierarchy="$(findmnt -n -t cgroup2 -o TARGET | head -n 1)"
    [[ -n $hierarchy ]] || die "there are no control groups of version 2 for systemd"
    CGROUP="$hierarchy/worker-spawner-package-check.$$"
    mkdir "$CGROUP" "$WORK/booted"
    at_exit "remove_cgroups"
    at_exit "power_off"
    # shellcheck disable=SC2016 # for the shell in the namespaces
    bash -c 'echo $$ >"$1/cgroup.procs" && exec unshare --pid --mount --uts --ipc --cgroup --fork --kill-child \
        bash -c "$4" boot "$2" "$3"' boot "$CGROUP" "$TREE" "$WORK/booted" '
        set -e
        mount --make-rprivate /
        mount -t tmpfs tmpfs "$2"
        mkdir "$2"/{changes,work,root}
        mount -t overlay -o "lowerdir=$1,upperdir=$2/changes,workdir=$2/work" overlay "$2/root"
        cd "$2/root"
        mount -t proc proc proc
        mount --bind proc/sys proc/sys
        mount -o remount,bind,ro proc/sys
        mount -t sysfs -o ro sysfs sys
        mount -t cgroup2 cgroup2 sys/fs/cgroup
        mount -t tmpfs -o mode=755 tmpfs run
        mount -t tmpfs tmpfs tmp
        mount -t tmpfs -o mode=755 tmpfs dev
        for device in null zero full random urandom tty; do
            touch "dev/$device"
            mount --bind "/dev/$device" "dev/$device"
        done
        mkdir dev/pts
        mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
        ln -s pts/ptmx dev/ptmx
        touch run/docker.sock
        mount --bind "$(readlink -f /var/run/docker.sock)" run/docker.sock
        # Services with a view of their own of the files take a root that is a mount.
        pivot_root . mnt
        exec chroot . sh -c "umount -l /mnt && exec env -i container=other PATH=/usr/sbin:/usr/bin /lib/systemd/systemd"
        ' >"$WORK/console" 2>&1 </dev/null &
    BOOTED=$!
    wait_until 60 process_one || { cat "$WORK/console" >&2; die "systemd did not start"; }
    wait_until 120 runs_units || { cat "$WORK/console" >&2; die "systemd takes no commands"; }
}

# The number of process 1 as this machine counts.
process_one() { INIT="$(pgrep -P "$BOOTED" 2>/dev/null | head -n 1)" && [[ -n $INIT ]]; }
booted() { nsenter --target "$INIT" --all --root --wd env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@" </dev/null; }
runs_units() { booted systemctl is-system-running 2>/dev/null | grep -q -e running -e degraded; }

# With the process that has the namespaces go all the others in them.
power_off() {
    if [[ -n ${INIT-} ]]; then kill -KILL "$INIT" 2>/dev/null || true; fi
    # It ends as killed as it was.
    if [[ -n ${BOOTED-} ]]; then wait "$BOOTED" 2>/dev/null || true; fi
    INIT='' BOOTED=''
}
remove_cgroups() { wait_until 10 eval "find '$CGROUP' -depth -type d -exec rmdir {} + 2>/dev/null; [[ ! -d '$CGROUP' ]]"; }

property() { booted systemctl show --value --property "$1" $UNIT; }
status_is() { [[ $(property StatusText) == "$1" ]]; }
state_is() { [[ $(property ActiveState) == "$1" ]]; }
restarted() { [[ $(property NRestarts) == "$1" ]] && status_is "ready; 0 jobs running"; }

# wait_for SECONDS COMMAND…: or shows what the service says of itself.
wait_for() {
    wait_until "$@" && return
    { booted systemctl status --no-pager --full $UNIT; booted journalctl --no-pager --lines=50; cat "$WORK/console"; } >&2 || true
    die "not within $1 s: ${*:2}"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_nats() {
    nats-server -a 127.0.0.1 -p "$NATS_PORT" -js -sd "$WORK/nats" >>"$WORK/nats.log" 2>&1 &
    NATS_PID=$!
}
stop_nats() {
    [[ -z $NATS_PID ]] || stop_process "$NATS_PID" 5
    NATS_PID=''
}

function_says() {
    booted env NATS_URL="nats://127.0.0.1:$NATS_PORT" SUBJECT_PREFIX=package-check \
        $PACKAGE run $FUNCTION_IMAGE -- echo "$@" 2>/dev/null
}

# says PATTERN: the service's log has such a line.
says() { booted journalctl --no-pager --unit=$UNIT | grep -q -- "$1"; }

# The check's own settings are in a drop-in, so that the file is as it was installed when it comes to the upgrade.
check_service() {
    local main
    NATS_PORT="$(free_port)"
    mkdir -p "$TREE/etc/systemd/system/$UNIT.d"
    printf '[Service]\nEnvironment=NATS_URL=nats://127.0.0.1:%s WARM_CONTAINERS=0 SUBJECT_PREFIX=package-check\n' "$NATS_PORT" \
        >"$TREE/etc/systemd/system/$UNIT.d/check.conf"
    boot
    # Enabled, so it is started with the system; and it is up though NATS is not there.
    wait_for 60 state_is active
    wait_for 30 status_is "starting: requests are not taken yet; nats: there is no connection; 0 jobs running"
    start_nats
    at_exit stop_nats
    wait_for 60 status_is "ready; 0 jobs running"
    # Confined as it is, it reaches the engine.
    expect "a function's output" "Hello from a unit!" function_says "Hello from a unit!"
    stop_nats
    wait_for 30 status_is "nats: there is no connection; 0 jobs running"
    start_nats
    wait_for 60 status_is "ready; 0 jobs running"
    # A changed setting is taken up; then the file is as it was installed again.
    cp -p "$TREE$CONFFILE" "$WORK/settings"
    echo PIDS_LIMIT=99 >>"$TREE$CONFFILE"
    booted systemctl reload $UNIT
    wait_for 30 says 'the settings were read again.*PIDS_LIMIT'
    cp -p "$WORK/settings" "$TREE$CONFFILE"
    # One that stands still is started again, by the watchdog.
    main="$(property MainPID)"
    booted kill -STOP "$main"
    wait_for 120 restarted 1
    booted systemctl stop $UNIT
    expect "the end" "success inactive" booted sh -c "systemctl show --value -p Result -p ActiveState $UNIT | paste -sd ' '"
    power_off
    stop_nats
    rm -r "$TREE/etc/systemd/system/$UNIT.d"
}

# --- The order of things ---------------------------------------------------------------------------------------------

timed() {
    local begin=$SECONDS
    "$@"
    echo "$*: $((SECONDS - begin)) s" >&2
}

((EUID == 0)) || die "a system of its own takes root"
need_cargo
need debootstrap dpkg-shlibdeps dpkg-deb nats-server busybox python3 unshare nsenter pivot_root findmnt pgrep
find_cargo_deb
WORK="$(mktemp -d)"
TREE="$WORK/tree"
at_exit "rm -rf --one-file-system '$WORK'"
engine_acquire
at_exit engine_release
at_exit "docker rmi -f $FUNCTION_IMAGE &>/dev/null"
import_busybox $FUNCTION_IMAGE

say "the packages"
timed build_packages
build_engine
say "a Debian to install it in"
timed make_tree
list_files >"$WORK/files.before"
list_accounts >"$WORK/accounts.before"

say "installing it where there is no engine"
install_deb "$WORK/1.deb"
expect groups $PACKAGE inside id -Gn $PACKAGE
timed check_files
timed check_manual
timed check_completions

say "installing an engine"
install_deb "$WORK/engine.deb"
expect "groups with an engine" "$PACKAGE docker" inside id -Gn $PACKAGE

say "running it"
timed check_service

say "upgrading it"
echo MAX_CONTAINERS=3 >>"$TREE$CONFFILE"
install_deb "$WORK/2.deb" --force-confdef --force-confold
expect "the changed setting" MAX_CONTAINERS=3 tail -n 1 "$TREE$CONFFILE"
expect "the new settings" '# A_NEW_SETTING=' tail -n 1 "$TREE$CONFFILE.dpkg-dist"
expect "the settings' owner" "640 root $PACKAGE" inside stat -c '%a %U %G' $CONFFILE
install_deb "$WORK/1.deb" --force-confdef --force-confold
expect "the setting after a downgrade" MAX_CONTAINERS=3 tail -n 1 "$TREE$CONFFILE"

say "removing it"
inside dpkg --remove $PACKAGE >/dev/null
[[ ! -e $TREE/usr/bin/worker-spawner && ! -e $TREE/lib/systemd/system/$UNIT ]] || die "it is still there after its removal"
expect "the setting after the removal" MAX_CONTAINERS=3 tail -n 1 "$TREE$CONFFILE"
inside dpkg --purge stand-in-engine >/dev/null
inside dpkg --purge $PACKAGE >/dev/null
inside groupdel docker
list_files | diff "$WORK/files.before" - || die "that is what the purge left, or took"
list_accounts | diff "$WORK/accounts.before" - || die "these are the accounts that the purge left, or took"
say "installed, ran, upgraded, and left nothing; $SECONDS s"
