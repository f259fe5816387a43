# `make demo` and `make test`; each makes its virtual environment first if that is missing.
PYTHON ?= python3
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
QUIET := PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR
# The tests hold the float32 figures of a CPU, so that beside a GPU they need the CPU build of torch
# and vLLM in an environment of their own.
TESTS := $(if $(GPU),.venv-cpu,.venv)
PYTEST := $(QUIET) $(TESTS)/bin/python -m pytest -q -rs -p no:cacheprovider

# Two runs at a time with a thread each on CPU: half the time of one after the other with two. On a
# GPU one after the other, since vLLM takes most of its memory.
JOBS := $(if $(GPU),1,2)
RUN := $(QUIET) OMP_NUM_THREADS=1 .venv/bin/python

# The demo is Figure 1 in miniature, then Tables 1 and 2; the rates are those of toy/study.py.
DEMO := runs/demo
TOY := --max_response_tokens 320 --model toy/model
TRAIN := $(TOY) --num_questions 512 --warmup_steps 3 --save_every 10 --tokens_per_micro_batch 8192 \
    --no-recompute_layers
NARROW := $(TRAIN) --data toy/data/narrow.jsonl --eval_data toy/data/narrow_test.jsonl \
    toy/data/ood.jsonl --steps 20 --questions_per_step 12 --minibatch_questions 12
DIVERSE := $(TRAIN) --data toy/data/coverage.jsonl --eval_data toy/data/coverage_test.jsonl \
    toy/data/ood.jsonl --steps 40 --questions_per_step 8 --minibatch_questions 8

.PHONY: demo study coverage controls opsd remedies test quick test-kill test-readme
demo: .venv/installed
	@echo "GRPO and SDPO on a narrow and on a diverse domain, five contexts, SFT on two sets: a model"
	@echo "of 1M parameters, 6 to 12 minutes on two CPU cores. Then the tables, a page, a picture."
	rm -rf $(DEMO)
	$(MAKE) --no-print-directory -j $(JOBS) $(DEMO)/diverse_grpo $(DEMO)/sft/eval \
	    $(DEMO)/diverse_sdpo $(DEMO)/narrow_grpo $(DEMO)/narrow_sdpo
	.venv/bin/python toy/picture.py $(DEMO)  # Figure 1, for the page
	.venv/bin/python -m extras.report $(DEMO)
$(DEMO)/narrow_grpo:
	$(RUN) grpo.py $(NARROW) --lr 5e-5 --run_dir $@
$(DEMO)/narrow_sdpo:
	$(RUN) sdpo.py $(NARROW) --lr 1e-4 --run_dir $@
$(DEMO)/diverse_grpo:
	$(RUN) grpo.py $(DIVERSE) --lr 5e-5 --run_dir $@
$(DEMO)/diverse_sdpo:
	$(RUN) sdpo.py $(DIVERSE) --lr 1e-4 --run_dir $@
$(DEMO)/conditions:
	$(RUN) generate_conditions.py $(TOY) --data toy/data/train.jsonl --accuracy 0.125 1 \
	    --temperature 1 --top_p 1 --top_k 0 --num_questions 45 --sft_examples 96 \
	    --questions_per_round 150 --out $@
$(DEMO)/sft/eval: $(DEMO)/conditions
	for d in d_ug d_sg; do $(RUN) sft_distill.py $(TOY) --data $</$$d.jsonl --lr 1e-4 \
	    --batch_size 8 --epochs 6 --tokens_per_micro_batch 8192 --save_every 1000 \
	    --no-recompute_layers --run_dir $(DEMO)/sft/$$d || exit; done
	$(RUN) evaluate.py $(TOY) $(DEMO)/sft/*/checkpoints/step_* --samples 1 --top_k 0 \
	    --data toy/data/in.jsonl toy/data/ood.jsonl --out $@

# The whole miniature with three seeds, resumable: it says first how long it will take.
study: .venv/installed
	.venv/bin/python toy/study.py controls study coverage opsd remedies --jobs $(JOBS)
coverage controls opsd remedies: .venv/installed
	.venv/bin/python toy/study.py $@ --jobs $(JOBS)

test: $(TESTS)/installed $(if $(GPU),.venv/installed)
	$(PYTEST) tests
	$(if $(GPU),$(QUIET) .venv/bin/python -m pytest -q -p no:cacheprovider tests/test_gpu.py)
quick: $(TESTS)/installed
	$(PYTEST) -m "not vllm and not slow" tests
test-kill: $(TESTS)/installed
	$(TESTS)/bin/python tests/kill.py
test-readme: $(TESTS)/installed
	$(TESTS)/bin/python tests/readme.py

# For a CPU its build of torch comes first, or vLLM's requirements bring several GB of CUDA; where the
# default index has none under this version, PyTorch's own has. The three that go again are built for
# CUDA: beside a CPU torch they break `import vllm`, and text needs none.
.venv/installed: $(if $(GPU),requirements.txt,requirements-cpu.txt)
.venv-cpu/installed: requirements-cpu.txt
%/installed:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "error: $(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv --clear $* || \
	    { echo "error: no virtual environment; is the venv module of $(PYTHON) installed?"; exit 2; }
	[ $< = requirements.txt ] || $*/bin/pip install -q torch==2.13.0+cpu || \
	    $*/bin/pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu || \
	    { echo "error: torch 2.13.0 for CPU could not be installed; see pip's words above"; exit 2; }
	$*/bin/pip install -q -r $< || \
	    { echo "error: $< could not be installed; see pip's words above"; exit 2; }
	[ $< = requirements.txt ] || $*/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
