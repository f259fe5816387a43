# Two commands: `make demo` and `make test`. Each sets up .venv first if that is missing.
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
QUIET := PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR
TOY := --max_response_tokens 640
SPLITS := toy/data/in.jsonl toy/data/mid.jsonl toy/data/ood.jsonl

.PHONY: demo test
demo: .venv/installed
	rm -rf runs/demo
	$(QUIET) $(BIN)/python evaluate.py --model toy/model --data $(SPLITS) $(TOY) --samples 4 \
	    --out runs/demo/before
	$(QUIET) $(BIN)/torchrun sdpo.py --model toy/model --data toy/data/train.jsonl $(TOY) \
	    --eval_data $(SPLITS) --questions_per_step 32 --minibatch_questions 32 --lr 2e-4 \
	    --steps 60 --warmup_steps 5 --tokens_per_micro_batch 8192 --save_every 60 \
	    --run_dir runs/demo/sdpo
	$(QUIET) $(BIN)/python evaluate.py --model runs/demo/sdpo/checkpoints/step_60 \
	    --data $(SPLITS) $(TOY) --samples 4 --out runs/demo/after
	$(BIN)/python report.py runs/demo

test: .venv/installed
	$(QUIET) $(BIN)/python -m pytest -q -p no:cacheprovider tests

# Without a GPU the CPU build of torch comes first, or vLLM's requirements bring several GB of CUDA.
# Where the default index has none under this version, PyTorch's own index of CPU wheels has. The three
# that go again are built for CUDA: beside a CPU torch they break `import vllm`, and text needs none.
.venv/installed: $(REQUIREMENTS)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "error: $(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv --clear .venv || \
	    { echo "error: no virtual environment; is the venv module of $(PYTHON) installed?"; exit 2; }
ifeq ($(GPU),)
	$(BIN)/pip install -q torch==2.13.0+cpu || $(BIN)/pip install -q torch==2.13.0 \
	    --index-url https://download.pytorch.org/whl/cpu || \
	    { echo "error: torch 2.13.0 for CPU could not be installed; see pip's words above"; exit 2; }
endif
	$(BIN)/pip install -q -r $(REQUIREMENTS) || \
	    { echo "error: $(REQUIREMENTS) could not be installed; see pip's words above"; exit 2; }
ifeq ($(GPU),)
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
endif
	touch $@
