# A bare `make` lists the targets.
PYTHON ?= python3
JOB    ?= jobs/digits_mlp.yaml
IMAGE  ?= toolkit
DOCKER ?= docker
export IMAGE DOCKER
BIN    := .venv/bin
SUDO   := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.DEFAULT_GOAL := help
.PHONY: help setup train-local tour test test-kill test-faults test-slurm test-docker slurm-up slurm-down \
        docker-build docker-train docker-test check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## make .venv with everything in it

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "python3-venv is missing"; $(SUDO) apt-get install -y python3-venv; }
	@$(PYTHON) -m venv .venv
	@echo "installing into .venv; this takes a minute"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train-local: setup ## train on this machine: JOB=jobs/digits_mlp.yaml
	@$(BIN)/toolkit train $(JOB)

tour: setup ## run the eight lessons of jobs/tour, in order; a minute
	@for lesson in jobs/tour/lesson_*.py; do $(BIN)/python $$lesson || exit 1; done

test: setup ## run every test this machine can run
	@$(BIN)/pytest

test-kill: setup ## kill training 250 times, half of them in a save, on disk and on S3; minutes
	@$(BIN)/python tests/campaigns/kill.py --store local --rounds 200
	@$(BIN)/python tests/campaigns/kill.py --store s3 --rounds 50

test-faults: setup ## inflict every fault on runs of 2 and 4 ranks: killed, stopped, out of memory, ...; minutes
	@$(BIN)/python tests/campaigns/faults.py --processes 2 4

test-slurm: setup ## inflict every fault on jobs in a real Slurm of four nodes, on this machine; as root; minutes
	@$(SUDO) $(BIN)/pytest tests/slurm -m ""

test-docker: setup ## build the image and run it in every way; starts an engine, as root, where none runs; minutes
	@$(SUDO) $(BIN)/pytest tests/docker -m ""

docker-build: ## build the image $(IMAGE); more options of docker build: BUILD='--build-arg EXTRAS=s3,gcs'
	@docker/build $(BUILD)

docker-train: ## train in a container, on its GPUS=auto|all|none, as you, in this folder: JOB=jobs/digits_mlp.yaml
	@$(DOCKER) info >/dev/null
	@$(DOCKER) image inspect $(IMAGE) >/dev/null 2>&1 || { echo "there is no image $(IMAGE); build it: make docker-build"; exit 2; }
	@docker/run $(RUN) $(IMAGE) train $(JOB)

docker-test: ## build the image for development and run TESTS in it
	@IMAGE=$(IMAGE)-devel docker/build --target devel $(BUILD)
	@docker/run $(RUN) $(IMAGE)-devel python -m pytest $(TESTS)

slurm-up: ## bring up that Slurm, for trying things: sinfo, sbatch, toolkit submit
	@$(SUDO) slurm/testbed/cluster up

slurm-down: ## take it down, with all its jobs
	@$(SUDO) slurm/testbed/cluster down

check: setup ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint docker/Dockerfile

bench: setup ## measure commands, stream, steps, shards and checkpoints, beside others; minutes
	@for part in commands stream steps agreement sharding checkpoints checkpoints_s3; do \
		$(BIN)/python -m tests.benchmarks.$$part || missed="$$missed $$part"; \
	done; [ -z "$$missed" ] || { echo "bounds were missed in:$$missed"; exit 1; }

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
