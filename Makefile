# `make demo` and `make test`; each sets up .venv first if that is missing.
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
QUIET := PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR

# Two runs at a time with a thread each on CPU: half the time of one after the other with two. On a
# GPU one after the other, since vLLM takes most of its memory.
JOBS := $(if $(GPU),1,2)
RUN := $(QUIET) OMP_NUM_THREADS=1 $(BIN)/python

# What demo runs: the scripts at the toy's size; the rates and steps of toy/study.py.
OUT := runs/demo
STEPS := 20
QUESTIONS := 12
WARMUP := 3
GRPO_LR := 5e-5
SDPO_LR := 1e-4
STUDIED := --accuracy 0.125 1 --temperature 1 --top_p 1 --top_k 0 \
    --num_questions 45 --sft_examples 96 --questions_per_round 150
EPOCHS := 6
SAMPLES := 1
TOY := --max_response_tokens 320 --model toy/model
TESTS := toy/data/in.jsonl toy/data/ood.jsonl
TRAIN := $(TOY) --eval_data $(TESTS) --data toy/data/train.jsonl --steps $(STEPS) \
    --questions_per_step $(QUESTIONS) --minibatch_questions $(QUESTIONS) \
    --warmup_steps $(WARMUP) --save_every 10 --tokens_per_micro_batch 8192 \
    --no-recompute_layers
ended = $(1:%=$(OUT)/%/eval/step_$(STEPS).json)
# |D| = 512: 20 steps of 12 see each question at most once
grpo := grpo.py --num_questions 512 --lr $(GRPO_LR)
sdpo := sdpo.py --num_questions 512 --lr $(SDPO_LR)

.PHONY: demo study controls opsd remedies test quick test-kill
demo: .venv/installed
	@echo "Five contexts, SFT on two sets, GRPO and SDPO on a 1M-parameter model: about 6 minutes on"
	@echo "two CPU cores. Then Tables 1 and 2, the curves, and a picture in runs/demo/report.png."
	rm -rf runs/demo
	$(MAKE) --no-print-directory -j $(JOBS) $(call ended,sdpo) runs/demo/sft/eval/summary.json \
	    $(call ended,grpo)
	$(BIN)/python report.py runs/demo

# The whole miniature with three seeds, resumable: it says first how long it will take.
study: .venv/installed
	$(BIN)/python toy/study.py controls study opsd remedies --jobs $(JOBS)
controls opsd remedies: .venv/installed
	$(BIN)/python toy/study.py $@ --jobs $(JOBS)

$(OUT)/conditions/summary.json:
	$(RUN) generate_conditions.py $(TOY) --data toy/data/train.jsonl $(STUDIED) --out $(@D)
$(OUT)/sft/eval/summary.json: $(OUT)/conditions/summary.json
	rm -rf $(OUT)/sft
	for d in d_ug d_sg; do $(RUN) sft_distill.py $(TOY) --data $(<D)/$$d.jsonl --lr 1e-4 \
	    --batch_size 8 --epochs $(EPOCHS) --tokens_per_micro_batch 8192 --save_every 1000 \
	    --no-recompute_layers --run_dir $(OUT)/sft/$$d || exit; done
	$(RUN) evaluate.py $(TOY) $(OUT)/sft/*/checkpoints/step_* --samples $(SAMPLES) --top_k 0 \
	    --data $(TESTS) --out $(@D)
$(OUT)/%/eval/step_$(STEPS).json:
	rm -rf $(OUT)/$*
	$(RUN) $($*) $(TRAIN) --run_dir $(OUT)/$*

test: .venv/installed
	$(QUIET) $(BIN)/python -m pytest -q -rs -p no:cacheprovider tests
quick: .venv/installed
	$(QUIET) $(BIN)/python -m pytest -q -rs -p no:cacheprovider -m "not vllm and not slow" tests
test-kill: .venv/installed
	$(BIN)/python tests/kill.py

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
