#!/usr/bin/env bash
# Builds the Dockerfile, runs docker-compose.yml, sends a request through both, and takes everything down again.
#
# Nothing is pulled. The base images are stand-ins made from Debian's packages and from this machine's Rust toolchain,
# with the crates vendored, so that the build inside needs no network:
#   builder  a minimal Debian with a C compiler, cargo and rustc, as rust:slim has
#   runtime  glibc, libgcc_s and CA certificates and nothing else, as distroless/cc has
#   nats     nats-server, and busybox for the health check, as nats:alpine has

set -euo pipefail
# shellcheck source=scripts/services.sh
source "$(dirname "$0")/services.sh"
cd "$ROOT"

PREFIX=worker-spawner-image-check
FUNCTION_IMAGE=$PREFIX/busybox:latest
export BUILDER_IMAGE=$PREFIX/builder:latest
export RUNTIME_IMAGE=$PREFIX/runtime:latest
export NATS_IMAGE=$PREFIX/nats:latest
export WORKER_SPAWNER_IMAGE=$PREFIX/worker-spawner:latest
# The engine's own builder keeps its layers as images, which can be removed by name. BuildKit's cache would stay.
export DOCKER_BUILDKIT=0

# --- Stand-ins for the base images -------------------------------------------------------------------------------

# unpack_packages DIRECTORY PACKAGE…: the files of Debian's packages, without installing them.
unpack_packages() {
    local tree=$1 archive
    shift
    mkdir -p "$tree"/usr/{bin,sbin,lib,lib64} "$WORK/packages"
    ln -s usr/{bin,sbin,lib,lib64} "$tree"
    (cd "$WORK/packages" && apt-get -qq -o APT::Sandbox::User=root download "$@")
    for archive in "$WORK/packages"/*.deb; do
        dpkg-deb --fsys-tarfile "$archive" | tar -C "$tree" --keep-directory-symlink -x
    done
    rm -r "$WORK/packages"
}

# What goes with neither a package nor the toolchain.
finish_tree() {
    mkdir -p "$1"/{etc,tmp,data}
    chmod 1777 "$1/tmp" "$1/data"
    printf 'root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n' >"$1/etc/passwd"
    printf 'root:x:0:\nnonroot:x:65532:\n' >"$1/etc/group"
    # What the packages' own scripts do: one file with all the certificates.
    if [[ -d $1/usr/share/ca-certificates ]]; then
        mkdir -p "$1/etc/ssl/certs"
        find "$1/usr/share/ca-certificates" -name '*.crt' -exec cat {} + >"$1/etc/ssl/certs/ca-certificates.crt"
    fi
}

runtime_image() {
    local tree="$WORK/runtime"
    unpack_packages "$tree" libc6 libgcc-s1 ca-certificates
    rm -rf "$tree"/usr/{share/doc,share/man,sbin,lib/*/gconv}
    finish_tree "$tree"
    import_tree "$tree" "$RUNTIME_IMAGE" 'USER 65532:65532'
}

nats_image() {
    local tree="$WORK/nats"
    unpack_packages "$tree" libc6 nats-server busybox-static
    ln -sf busybox "$tree/bin/wget"
    finish_tree "$tree"
    import_tree "$tree" "$NATS_IMAGE" 'ENTRYPOINT ["/usr/sbin/nats-server"]'
}

builder_image() {
    local tree="$WORK/builder" release
    release="$(. /etc/os-release && echo "${VERSION_CODENAME:?}")"
    debootstrap --variant=minbase --include=gcc,libc6-dev "$release" "$tree" >"$WORK/debootstrap.log" 2>&1 ||
        { tail -n 20 "$WORK/debootstrap.log" >&2; die "debootstrap failed"; }
    rm -rf "$tree"/var/cache/apt/archives/*.deb
    add_toolchain "$tree"
    add_crates "$tree"
    tar -C "$tree" -c . | docker import \
        --change 'ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'ENV CARGO_NET_OFFLINE=true' - "$BUILDER_IMAGE" >/dev/null
}

add_toolchain() {
    local rust="$1/usr/local/rust" from
    from="$(rustc --print sysroot)"
    mkdir -p "$rust/bin" "$rust/lib/rustlib"
    cp -a "$from"/bin/{cargo,rustc} "$rust/bin/"
    cp -a "$from"/lib/*.so* "$rust/lib/"
    cp -a "$from"/lib/rustlib/*-linux-gnu "$rust/lib/rustlib/"
}

add_crates() {
    local home="$1/usr/local/cargo"
    mkdir -p "$home"
    cargo vendor --quiet --locked --versioned-dirs "$home/vendor" >/dev/null
    cat >"$home/config.toml" <<'CONFIG'
[source.crates-io]
replace-with = "vendored"

[source.vendored]
directory = "/usr/local/cargo/vendor"
CONFIG
}

# --- The check ---------------------------------------------------------------------------------------------------

timed() {
    local begin=$SECONDS
    "$@"
    echo "$*: $((SECONDS - begin)) s" >&2
}

# The plugin, or the command of the version before it.
compose() {
    if docker compose version &>/dev/null; then
        docker compose --project-name "$PREFIX" --env-file "$WORK/env" "$@"
    else
        docker-compose --project-name "$PREFIX" --env-file "$WORK/env" "$@"
    fi
}

# An image that another was built from goes after it.
remove_images() {
    local image
    for image in worker-spawner stage builder runtime nats busybox; do
        docker rmi -f "$PREFIX/$image" &>/dev/null
    done
}

ours() {
    docker ps -a --format 'container {{.Names}}' --filter "name=$PREFIX"
    docker volume ls --format 'volume {{.Name}}' --filter "name=$PREFIX"
    docker network ls --format 'network {{.Name}}' --filter "name=$PREFIX"
}

# kept_messages COUNT: the streams hold as many messages.
kept_messages() {
    [[ $(compose exec -T nats wget -q -O - http://127.0.0.1:8222/jsz) == *"\"messages\": $1,"* ]]
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# The stage before the last gets a name too, so that it can be removed.
build() {
    local args=(--build-arg BUILDER_IMAGE --build-arg RUNTIME_IMAGE)
    { docker build "${args[@]}" --target builder --tag $PREFIX/stage:latest . &&
        docker build "${args[@]}" --tag "$WORKER_SPAWNER_IMAGE" .; } >"$WORK/build.log" 2>&1 ||
        { tail -n 40 "$WORK/build.log" >&2; die "the image could not be built"; }
}

((EUID == 0)) || die "debootstrap and an engine of our own need root"
need_cargo
need dockerd debootstrap busybox python3
docker compose version &>/dev/null || need docker-compose
WORK="$(mktemp -d)"
: >"$WORK/env" # in place of the user's .env
at_exit "rm -rf --one-file-system '$WORK'"
engine_acquire
at_exit engine_release
at_exit remove_images

say "stand-ins for the base images"
timed runtime_image
timed nats_image
timed builder_image
import_busybox "$FUNCTION_IMAGE"

say "building the Dockerfile"
timed build
docker image ls "$PREFIX/*"

docker image inspect --format 'user {{.Config.User}}, {{.Size}} bytes, {{len .RootFS.Layers}} layers' "$WORKER_SPAWNER_IMAGE"

say "docker-compose.yml"
DOCKER_GID="$(stat -c %g /var/run/docker.sock)"
NATS_PORT="$(free_port)"
export DOCKER_GID NATS_PORT
at_exit "compose down --volumes --timeout 20 &>/dev/null"
timed compose up --detach --no-build
cargo build --quiet --locked --example demo
export NATS_URL="nats://127.0.0.1:$NATS_PORT"
target/debug/examples/demo "$FUNCTION_IMAGE" "echo 'Hello from compose!'"
[[ $(compose logs --no-color worker-spawner) == *' ready '*'delivery="jetstream"'* ]] || die "the daemon does not use JetStream"
# What is kept is on the volume, and outlives the server's container: two results, two records.
compose rm --stop --force nats
compose up --detach --no-build
target/debug/examples/demo "$FUNCTION_IMAGE" "echo 'Hello again!'"
wait_until 20 kept_messages 4 || die "the volume does not have what the streams kept"
compose ps
compose logs --no-color worker-spawner
daemon="$(compose ps -q worker-spawner)"
pid="$(docker inspect --format '{{.State.Pid}}' "$daemon")"
say "the daemon's process"
[[ $(stat -c %u "/proc/$pid") != 0 ]] || die "the daemon runs as root"
grep -E '^(Name|Uid|Gid|Groups|CapEff|NoNewPrivs):' "/proc/$pid/status"

say "taking it down"
timed compose stop --timeout 40
[[ $(docker inspect --format '{{.State.ExitCode}}' "$daemon") == 0 ]] || die "the daemon did not end cleanly when it was stopped"
compose down --volumes
LEFT="$(ours)"
[[ -z $LEFT ]] || die "docker compose down left:"$'\n'"$LEFT"
say "built, ran, answered, and left nothing"
