# Two commands: `make demo` and `make test`. Each sets up .venv first if that is missing.
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
QUIET := PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR

# What demo and study run, in the folder $(OUT): the scripts at the toy's size.
OUT := runs/demo
SEED := 0
STEPS := 30
TOY := --model toy/model --max_response_tokens 480 --seed $(SEED)
EVAL := --eval_data toy/data/in.jsonl toy/data/ood.jsonl --eval_every 10
TRAIN := $(TOY) $(EVAL) --data toy/data/train.jsonl --questions_per_step 16 \
    --minibatch_questions 16 --steps $(STEPS) --warmup_steps 5 --save_every $(STEPS) \
    --tokens_per_micro_batch 8192
ended = $(1:%=$(OUT)/%/checkpoints/step_$(STEPS))
# |D| = 512, of which 30 steps of 16 see each question at most once
grpo := grpo.py --num_questions 512 --lr 1e-4
sdpo := sdpo.py --num_questions 512 --lr 2e-4
sdpo_without_think := $(sdpo) --demonstration without_think
sdpo_ema := $(sdpo) --ema 0.05
sdpo_8 := $(sdpo) --num_questions 8

.PHONY: demo study seed test test-kill
# Two runs at a time with a thread each: half the time of one after the other with two.
demo: .venv/installed
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j 2 runs/demo/sft/summary.json \
	    $(call ended,grpo sdpo)
	$(BIN)/python report.py runs/demo

# The whole miniature, three seeds, two runs at a time as well: 65 minutes beside other work.
study: .venv/installed
	for seed in 0 1 2; do OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j 2 seed SEED=$$seed \
	    OUT=runs/study/seed_$$seed EVAL="--eval_data toy/data/ood.jsonl --eval_every 100 --eval_rollouts 2" || exit; done
	$(BIN)/python report.py runs/study/seed_*
seed: $(OUT)/sft/summary.json \
    $(call ended,grpo sdpo sdpo_without_think sdpo_ema sdpo_8)

$(OUT)/conditions/summary.json:
	$(QUIET) $(BIN)/python generate_conditions.py $(TOY) --data toy/data/train.jsonl \
	    --num_questions 100 --sft_examples 200 --questions_per_round 240 --out $(@D)
$(OUT)/sft/summary.json: $(OUT)/conditions/summary.json
	rm -rf $(@D)
	$(QUIET) $(BIN)/torchrun --standalone sft_distill.py $(TOY) $(EVAL) --eval_every 100 \
	    --eval_rollouts 2 --data $(<D)/d_ug.jsonl $(<D)/d_sg.jsonl --lr 1e-4 --batch_size 8 \
	    --tokens_per_micro_batch 8192 --run_dir $(@D)
$(OUT)/%/checkpoints/step_$(STEPS):
	rm -rf $(OUT)/$*
	$(QUIET) $(BIN)/torchrun --standalone $($*) $(TRAIN) --run_dir $(OUT)/$*

test: .venv/installed
	$(QUIET) $(BIN)/python -m pytest -q -rs -p no:cacheprovider tests
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
