# Each target makes the virtual environment that it needs; where it is there already, that takes no time.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
LOWEST := .venv-lowest
BIN := $(VENV)/bin
SIZE ?= 1GB
ROUNDS ?= 5
READY := $(VENV)/.ready
# The tests start hundreds of programs; without caches, each would compile all of our modules again.
unexport PYTHONDONTWRITEBYTECODE
# Much of the time a test waits: twice as many workers as there are cores.
SIDE_BY_SIDE = -n $(shell $(PYTHON) -c "import os; print(min(4, 2 * (os.cpu_count() or 1)))") --dist worksteal

.PHONY: demo test test-all lint lowest bench peers e2e e2e-parts chaos examples

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Error: no $(PYTHON) on PATH. Choose another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Error: $(PYTHON) is not Python 3.10 to 3.13. Choose another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Making $(VENV): a minute or two, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[trainer,test]" -c constraints.txt
	@touch $@

demo: $(READY)  ## Rehearse the default task: a real training run, preempted in five ways, compared bit by bit.
	@$(BIN)/skyspot rehearse

test: $(READY)  ## What every change should pass; minutes.
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: $(READY)  ## Everything but e2e.
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

lowest: $(LOWEST)/.ready  ## The tests of every framework and tracker with its oldest supported release (constraints-lowest.txt); minutes.
	$(LOWEST)/bin/python -m pytest $(SIDE_BY_SIDE) tests/test_hf.py tests/test_frozen.py tests/test_accelerate.py tests/test_lightning.py tests/test_sampler.py tests/test_trackers.py tests/test_trackers_append.py
	$(LOWEST)/bin/python -m pytest $(SIDE_BY_SIDE) tests/test_examples.py -k "goes_on and (accelerate or hf_trainer or lightning or trl)"

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check -e ".[trainer,loops,rehearse,tensorboard,trackio,wandb]" hypothesis pytest pytest-xdist -c constraints-lowest.txt
	@touch $@

bench: $(READY)  ## Time the command line, checkpoints beside other tools, stops, and rehearsals (writes docs/performance.md).
	@failed=0; \
	for part in bench.startup "bench.checkpoint --size $(SIZE) --rounds $(ROUNDS)" bench.loop bench.watchers bench.stops bench.rehearsal bench.bucketfs; do \
		$(BIN)/python -m $$part || failed=1; \
	done; exit $$failed

peers: $(READY)  ## The independent tool ckpt-chaos at 40 writes of the bundled trainer, then beside rehearsals of five scripts, then on Hugging Face's Trainer and Lightning; minutes.
	@test -x $(PEERS)/bin/ckpt-chaos || { $(PYTHON) -m venv $(PEERS) && $(PEERS)/bin/python -m pip install -q --disable-pip-version-check ckpt-chaos==0.1.8; }
	OMP_NUM_THREADS=1 $(PEERS)/bin/ckpt-chaos run --modes before,torn,term --grace 25 --jobs 2 --work $(PEERS)/runs/$$(date +%s) \
		--step-regex 'resumed at step (\d+)' --result-file '{out}/final/model.safetensors' \
		-- $(BIN)/python -m trainer.finetune --checkpoint-dir {out} --max-steps 8 --save-every 4 --cpu
	$(BIN)/python -m bench.ckpt_chaos
	$(BIN)/python -m bench.ckpt_chaos_loops

chaos: $(READY)  ## 22,100 faults and 200 stops, then docs/chaos-results.md; goes on after an interruption. make chaos CHAOS="--faults 100 --stores local" STOPS="--stops 20"
	$(BIN)/python tests/chaos/run.py --state .chaos.json --report docs/chaos-results.md $(CHAOS)
	$(BIN)/python tests/chaos/stops.py --state .stops.json --report docs/chaos-results.md $(STOPS)
	@rm -f .chaos.json .stops.json

examples: $(READY)  ## Every example, preempted in the five default ways, and with each rule broken; then docs/examples-results.md; goes on after an interruption.
	$(BIN)/python tests/example_campaign.py --state .examples.json --report docs/examples-results.md $(EXAMPLES)
	@rm -f .examples.json

e2e: $(READY) e2e-parts  ## SkyPilot itself on a real Slurm, with the real trainer, on loopback; skipped without root or apt.
	$(BIN)/python tests/e2e/run.py

e2e-parts:  # Its downloads, which with -j come beside those of $(VENV).
	@$(PYTHON) tests/e2e/run.py --install
