# `make` lists what there is. What they run is in scripts/, which says more.

.DEFAULT_GOAL := help
.PHONY: help build demo test test-long test-engine-current soak fuzz bench bench-long services services-stop image-check package package-check specifications lint fmt deny ci clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the release binary: target/release/worker-spawner
	cargo build --release --locked

demo: ## Install and start what is missing, run the daemon on a real request, show the result
	@scripts/demo.sh

test: ## Install and start what is missing, run every test, leave nothing behind
	@scripts/test.sh

test-long: ## The same, with the tests that take long
	@scripts/test.sh --long

test-engine-current: ## The tests of what an engine does, on a current Docker engine
	@scripts/engine-current.sh

soak: ## Hurt daemons, NATS and engine for an hour, and check that nothing accepted was lost
	@scripts/test.sh --soak

fuzz: ## Feed made-up bytes to what takes apart the words of a container, for a minute each
	@scripts/fuzz.sh

bench: ## Measure the daemon against `docker run` and the bare API
	@scripts/with-engine.sh scripts/bench.sh

bench-long: ## The same, long enough to see memory grow
	@scripts/with-engine.sh scripts/bench.sh --long

services: ## Start a Docker engine and a NATS server, unless they run already
	@scripts/services.sh start

services-stop: ## Stop what `make services` started
	@scripts/services.sh stop

image-check: ## Build and run the Dockerfile and docker-compose.yml with base images made from local files
	@scripts/image-check.sh

package: ## Build the Debian package from the release binary: target/debian/
	@scripts/package.sh

package-check: ## Install the Debian package in a system of its own, run, upgrade and purge it
	@scripts/package-check.sh

specifications: ## Write the schemas and the AsyncAPI document of the messages anew
	@scripts/specifications.sh write

lint: ## Formatting, lints, documentation, scripts, licences and duplicates of dependencies
	@scripts/lint.sh

fmt: ## Format the code
	cargo fmt --all

deny: ## Only the check of the dependencies
	@scripts/deny.sh

ci: ## All that must pass before a change goes in
	@.ci/run

clean: services-stop ## Remove what was built and the tools that were fetched
	cargo clean
	rm -rf .tools
