# Every target sets up .venv by itself. Try `make help`.
PYTHON ?= python3
PIPELINE ?= pipelines/demo.toml
NAME := $(basename $(notdir $(PIPELINE)))
OUT ?= out/$(NAME)
POOL ?=
RECIPE ?=
ABLATION ?= ablation_demo ablation_stages
SET ?=
OVERWRITE ?=
MODELS ?=
DAQUAR ?=
TEXT ?=
REAL_MODELS ?=
MAKE_MODELS := ../shared/tools/real_models.py
PY := .venv/bin/python
OLDEST := out/oldest
READY := .venv/.ready
QUICK := tests/test_laws.py tests/test_options.py tests/storage tests/vectors tests/select/test_steps.py tests/select/test_coverage.py \
	tests/mix/test_text_overlap.py tests/train/test_config.py
NUMERICS := tests/vectors tests/select/test_coverage.py tests/train/model/test_attention.py tests/train/run/test_flops.py
RUN := .venv/bin/curate run $(PIPELINE) --out $(OUT) $(if $(POOL),--pool '$(POOL)') $(if $(RECIPE),--recipe $(RECIPE)) $(foreach s,$(SET),--set '$(s)') $(if $(OVERWRITE),--overwrite)

.DEFAULT_GOAL := help
.PHONY: help install coreset train eval real check test test-gpu test-gpu-simulated test-oldest test-real test-numerics lint format ablation bench picture clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 22
	@echo "  variables: PIPELINE=$(PIPELINE) POOL=… OUT=$(OUT) RECIPE=… SET='table.key=value …' OVERWRITE=1"
	@echo "             ABLATION=NAME (ablation)  MODELS=… DAQUAR=… TEXT=… (real)  REAL_MODELS=… (test-real)"

$(READY): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(READY) ## set up .venv with everything that was tested (constraints.txt)

coreset: $(READY) ## the main job: pool -> embeddings -> clusters -> coreset -> shards -> report
	$(RUN) --only coreset

train: $(READY) ## train on the emitted shards: mix -> align -> finetune -> export -> eval
	$(RUN)

real: $(READY) ## a small real VLM on a processor: POOL=pairs/ MODELS=models/ DAQUAR=daquar/ TEXT=text.json (pipelines/README.md)
	@test -n "$(POOL)" -a -n "$(MODELS)" -a -n "$(DAQUAR)" -a -n "$(TEXT)" || { echo "make real POOL=pairs/ MODELS=models/ DAQUAR=daquar/ TEXT=text.json"; exit 2; }
	.venv/bin/curate run pipelines/real.toml --out $(if $(filter out/demo,$(OUT)),out/real,$(OUT)) --pool '$(POOL)' \
		--set embed.model=local-dir:$(MODELS)/clip --set model.tower=$(MODELS)/efficientnet --set model.lm=$(MODELS)/smollm2-135m \
		--set mix.sources.questions.path=$(DAQUAR)/daquar_train.json --set mix.sources.questions.images=$(DAQUAR)/images \
		--set mix.sources.text.path=$(TEXT) --set data.eval_root=$(DAQUAR) $(foreach s,$(SET),--set '$(s)') $(if $(OVERWRITE),--overwrite)

eval: $(READY) ## score the trained model again
	$(RUN) --only eval

test: $(READY) ## run the tests: offline, on the processor alone
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test-oldest: ## run the trainer's tests with the oldest versions that pyproject.toml allows (another 6 GB)
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed -nE 's/^    "([A-Za-z0-9_-]+)>=([0-9.]+)(;[^"]*)?",$$/\1==\2/p' pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c $(OLDEST)/constraints.txt -e . pytest hypothesis
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/train

test-numerics: $(READY) ## the numeric tests as two older processors compute them
	OMP_NUM_THREADS=1 $(PY) -m pytest --dist each \
		--tx popen//env:ATEN_CPU_CAPABILITY=default//env:ONEDNN_MAX_CPU_ISA=SSE41 \
		--tx popen//env:ATEN_CPU_CAPABILITY=avx2//env:ONEDNN_MAX_CPU_ISA=AVX2 $(NUMERICS)

test-gpu: $(READY) ## run the tests that need a GPU (tests/bench/gpu.py measures besides)
	$(PY) -m pytest -m gpu -rs

test-gpu-simulated: $(READY) ## the same where torch sees GPUs that are not there: devices, copies, ranks; no kernels (gcc, Linux)
	OMP_NUM_THREADS=1 $(PY) tests/simulated_gpu/simulate.py --gpus 2 $(PY) -m pytest -m gpu -rs

test-real: $(READY) ## run the tests that need real models, in REAL_MODELS=FOLDER
	@test -n "$(REAL_MODELS)" -o -f $(MAKE_MODELS) || { echo "set REAL_MODELS to a folder with efficientnet/ (timm), smollm2-135m/ and gemma3-270m/ (transformers)"; exit 2; }
	@test -n "$(REAL_MODELS)" -o -d out/real_models || $(PY) $(MAKE_MODELS) out/real_models
	REAL_MODELS=$(abspath $(or $(REAL_MODELS),out/real_models)) $(PY) -m pytest -m realweights -rs

check: lint ## lint, types and the quick tests: what to run while you work
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(QUICK)

lint: $(READY) ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(READY) ## rewrite the code in the house's format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

ablation: $(READY) ## train on what recipes keep and compare; ABLATION=ablation_smoke is small, ablation_bar the default's bar
	$(foreach name,$(ABLATION),OMP_NUM_THREADS=1 .venv/bin/curate run $(name) $(if $(POOL),--pool '$(POOL)') $(foreach s,$(SET),--set '$(s)') $(if $(OVERWRITE),--overwrite) &&) true

bench: $(READY) ## measure stages against their floors, where no data is needed
	$(PY) -m tests.bench

picture: $(READY) ## take the README's picture of the demo's report anew (needs chromium and chromedriver)
	.venv/bin/curate run pipelines/demo.toml --out out/demo --only coreset
	$(PY) docs/picture.py out/demo/report.html docs/report.png

clean: ## remove outputs and the virtual environment
	rm -rf out .venv build dist *.egg-info
