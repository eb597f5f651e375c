# `make test` is the whole proof; `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
BINARY := bin/platter
RESULTS := bin/test-results.txt

# Knobs of the tests: `make test FUZZTIME=30s COUNT=3`.
FUZZTIME ?= 5s
CUTS ?= 400
COUNT ?= 1
TESTFLAGS ?= -race -shuffle=on -timeout 30m

STEPS := deps build check-fmt vet lint unit powercut fuzz bench-smoke integration

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the static binary bin/platter
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $(BINARY) .

.PHONY: deps
deps: ## install what the tests need (as root; otherwise say what is missing)
	@integration/install-packages.sh

.PHONY: test
test: ## everything that must hold: each step below, one after the other
	@begin=$$SECONDS; mkdir -p bin; : >$(RESULTS); \
	for step in $(STEPS); do \
		echo "==> $$step"; start=$$SECONDS; \
		$(MAKE) $$step || { echo "make test: step $$step failed" >&2; exit 1; }; \
		echo "    $$step took $$((SECONDS - start)) s"; \
	done; \
	echo "make test: all steps took $$((SECONDS - begin)) s; packages, fuzz targets and benchmarks:"; \
	echo "$$(grep -c ^ok $(RESULTS)) passed, 0 failed"

.PHONY: test-long
test-long: ## the same with a minute for each fuzz target, every test five times and many more power cuts
	@$(MAKE) test CUTS=4000 FUZZTIME=60s COUNT=5 TESTFLAGS='-race -shuffle=on -timeout 180m'

.PHONY: check-fmt
check-fmt: ## fail when gofmt would change a file
	@unformatted=$$(gofmt -l -s .); \
	if [[ -n $$unformatted ]]; then \
		echo "not formatted, run 'make fmt':"; echo "$$unformatted"; exit 1; \
	fi

.PHONY: fmt
fmt: ## format the sources
	gofmt -w -s .

.PHONY: vet
vet: ## go vet, for both architectures
	GOARCH=amd64 go vet ./...
	GOARCH=arm64 go vet ./...

.PHONY: lint
lint: ## the linters of .golangci.yml
	go run $(GOLANGCI_LINT) run ./...

.PHONY: unit
unit: ## the packages' tests under the race detector
	@mkdir -p bin; go list ./... | grep -v '^platter/integration$$' | \
		xargs go test $(TESTFLAGS) -count=$(COUNT) | grep -v 'no test files' | tee -a $(RESULTS)

.PHONY: powercut
powercut: ## thousands of power cuts, and counts of allocations: what the race detector, which unit has, slows down or changes
	@mkdir -p bin; PLATTER_TEST_CUTS=$(CUTS) go test -run 'PowerCut|Allocat' -timeout 60m -count=1 \
		./formats/qcow2/... | tee -a $(RESULTS)

# When the time is up while an input takes long, go test can fail with nothing but
# "context deadline exceeded": that is no finding, and tried
# again. A finding always names its input.
.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME
	@mkdir -p bin; go test -list '^Fuzz' ./... | \
		awk '$$1 ~ /^Fuzz/ { names[n++] = $$1 } $$1 == "ok" { for (i = 0; i < n; i++) print $$2, names[i]; n = 0 }' | \
		while read -r package target; do \
			for try in 1 2 3; do \
				status=0; \
				go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x "$$package" </dev/null >bin/fuzz.txt 2>&1 || status=$$?; \
				if ((status == 0)) || ! grep -q '^ *context deadline exceeded$$' bin/fuzz.txt || grep -q 'Failing input' bin/fuzz.txt; then break; fi; \
			done; \
			{ grep -v -e '^fuzz: elapsed' -e '^PASS' bin/fuzz.txt || true; } | sed "s/^ok.*/& $$target/" | tee -a $(RESULTS); \
			((status == 0)) || exit 1; \
		done

.PHONY: bench-smoke
bench-smoke: ## run every benchmark once, to see that it works
	@mkdir -p bin; go test -run '^$$' -bench . -benchtime 1x ./... | { grep -v 'no test files' || true; } | \
		awk '/^PASS/ { next } /^Benchmark/ { ran = 1 } /^ok/ { if (ran) print; ran = 0; next } { print }' | tee -a $(RESULTS)

.PHONY: integration
integration: build ## the built binary against real clients
	@mkdir -p bin; PLATTER_BINARY=$(CURDIR)/$(BINARY) go test $(TESTFLAGS) -count=$(COUNT) ./integration | tee -a $(RESULTS)

.PHONY: bench
bench: deps build ## measure platter and its peers and print the ratios; without BENCHFLAGS into docs/benchmarks.md too
	@mkdir -p docs; go run ./integration/bench $(BENCHFLAGS) | tee $(if $(BENCHFLAGS),bin,docs)/benchmarks.md

.PHONY: clean
clean: ## remove what was built
	rm -rf bin
	go clean -testcache
