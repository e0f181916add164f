# The daemon in a small image that runs as nobody in particular.
#
#   docker build -t worker-spawner .
#   docker run --rm --network host \
#       -v /var/run/docker.sock:/var/run/docker.sock \
#       --group-add "$(stat -c %g /var/run/docker.sock)" \
#       -e NATS_URL=nats://localhost:4222 worker-spawner
#
# The engine's socket belongs to root and to one group, whose number differs between hosts: --group-add names it.
# Whoever may use that socket is root on the host; the daemon is the only one here that needs it.

ARG BUILDER_IMAGE=rust:1.95-slim-bookworm
# Needs glibc 2.36 or newer, libgcc_s and CA certificates; no shell.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILDER_IMAGE} AS builder
WORKDIR /build

# The dependencies alone, against empty targets: this layer is built anew only when they change.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/integration \
    && echo 'fn main() {}' | tee build.rs src/main.rs tests/integration/main.rs >/dev/null \
    && : > src/lib.rs \
    && cargo build --release --locked --bin worker-spawner

# Cargo goes by the time of a file, and these may be older than the empty ones they replace.
COPY build.rs ./
COPY src src
RUN find build.rs src -name '*.rs' -exec touch {} + \
    && cargo build --release --locked --bin worker-spawner

FROM ${RUNTIME_IMAGE}
COPY --from=builder /build/target/release/worker-spawner /usr/local/bin/worker-spawner
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/worker-spawner"]
