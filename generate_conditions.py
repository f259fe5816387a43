"""One question, five contexts: Sec. 3, Table 1, Figure 9, App. B.1 and C of the paper.

How does a model reason when it is shown the answer? Questions that it sometimes solves (accuracy
between 0.125 and 0.5 over 8 samples) are asked again with more and less in the prompt; s is the
question's first correct response that was not cut.
  (1) unguided          nothing
  (2) full              c = s
  (3) without_think     c = s without its think part
  (4) regenerated       c = the first correct response of (2), else its first
  (5) uncertain         c = s, and a request for as much uncertainty as possible (App. C)

    torchrun --nproc_per_node 8 generate_conditions.py \\
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B

Prints Table 1 and Table 7 with standard errors, and Figure 9. Writes to --out
    <context>.jsonl         every answer to the studied questions, a line each
    d_ug.jsonl, d_sg.jsonl  the two SFT sets of Sec. 4: as many correct answers of (1) and of (2)
                            to the same questions, under the plain prompt; for sft_distill.py
    rounds/                 finished work: the same command again resumes after it
Stops with what it has when the data runs out.

What the paper does not show (the authors' code: 5c51051 of
github.com/beanie00/self-distillation-analysis):
  - 100 such questions hold at most 400 pairs of correct answers, and Sec. 4 has 800: more questions
    are asked for them, in contexts (1) and (2) only (theirs takes one pair a question)
  - the prompt differs in white space from the one that SDPO's teacher gets
"""
import argparse
import itertools
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import epistemic
from verifier import Verifier, load_questions

# --- arguments -----------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:  # refuses nan, too
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low} and {high}")
        return kind(text)
    return number

def make_parser():
    parser = argparse.ArgumentParser(
        description="Five contexts (Sec. 3). The defaults are the paper's but for (ours).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, count, share = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", default="dapo", help="dapo, a hub id, or a .parquet, .json or .jsonl file")
    add("--enable_thinking", action=argparse.BooleanOptionalAction, default=True,
        help="for Qwen3's chat template")
    add("--num_questions", type=count, default=100, help="to study in all five contexts")
    add("--sft_examples", type=number(int, 0), default=800, help="in d_ug and in d_sg (Sec. 4)")
    add("--accuracy", type=share, nargs=2, default=[0.125, 0.5], metavar=("LOW", "HIGH"),
        help="of the unguided answers to a studied question, both included")
    add("--samples", type=count, default=8, help="answers to each question in each context")
    add("--temperature", type=number(float, 0.01), default=0.6, help="of sampling (authors' code)")
    add("--top_p", type=number(float, 0.01, 1), default=0.95, help="of sampling (authors' code)")
    add("--top_k", type=number(int, 0), default=20, help="0: all tokens (authors' code)")
    add("--max_prompt_tokens", type=count, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=count, default=32768, help="longer answers are cut")
    add("--questions_per_round", type=count, default=512, help="(ours) results written after each")
    add("--gpu_memory_utilization", type=number(float, 0.01, 1), default=0.9,
        help="(ours) vLLM's share of the GPU")
    add("--out", default="runs/conditions", help="(ours) a new folder, or one to resume")
    add("--seed", type=number(int, 0), default=0, help="of sampling")
    return parser

def check_args(args, path):
    """The rounds in --out belong to one model, its data and flags; `path` is the model's folder."""
    if not 0 < args.accuracy[0] <= args.accuracy[1]:
        raise ValueError(f"--accuracy {args.accuracy}: 0 < LOW <= HIGH; s is a correct answer")
    config = dict(vars(args), files=fingerprint(path, args.data))
    file = Path(args.out, "config.json")
    began = json.loads(file.read_text()) if file.exists() else config
    changed = [f"--{name} was {began.get(name)}" for name, value in config.items()
               if name != "out" and began.get(name) != value]
    if changed:
        raise ValueError(f"--out {args.out} began with other flags, or files have changed: "
                         f"{', '.join(changed)}; repeat them, or name a new folder")
    if not file.exists() and file.parent.exists() and any(file.parent.iterdir()):
        raise ValueError(f"--out {args.out} holds something else: name a new folder")
    return config

# --- prompts -------------------------------------------------------------------------------------

CONTEXTS = {  # the rows of Table 1, and App. C's
    "unguided": "(1) unguided",
    "full": "(2) full solution",
    "without_think": "(3) without think",
    "regenerated": "(4) regenerated",
    "uncertain": "(5) full, uncertain",
}
CLOSING = "Correctly solve the original question."
CLOSING_UNCERTAIN = (  # App. C, Figure 14
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation.")

def teacher_messages(messages, solution, form, heading="\nCorrect solution:\n\n"):
    """The chat with a solution after the question, in the same user message (authors' code).

    form: the "full" solution, "without_think", or full with App. C's "uncertain" closing sentence.
    """
    if form == "without_think":
        solution = re.sub(r"<think>.*?</think>\s*", "", solution, flags=re.S)
        # an answer of DeepSeek-R1-Distill has no <think>: its prompt ends with it
        solution = re.sub(r"^.*?</think>\s*", "", solution, flags=re.S)
    closing = CLOSING_UNCERTAIN if form == "uncertain" else CLOSING
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}{heading}{solution}\n\n{closing}"}]

def first_correct(group):
    """The demonstration: the first correct response, else the first (authors' code); never one that
    was cut, since "without_think" would show its unfinished think part."""
    return next((r for r in group if r["correct"] and r["finished"]), group[0])["response"]

def prompt_of(question, context, tokenizer, args):
    """Token ids of a question in a context, from its answers in the contexts before."""
    messages = question["messages"]
    if context != "unguided":
        source = "full" if context == "regenerated" else "unguided"
        messages = teacher_messages(messages, first_correct(question["contexts"][source]), context,
                                    heading="\n\nCorrect solution: ")  # as in Sec. 3, App. C
    return render(tokenizer, messages, args.enable_thinking)

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the answer begins (Table 12); the template writes any BOS.

    A control token in a message, such as <|im_end|>, is broken by a space, so that it stays text.
    Not <think>: a demonstration needs it.
    """
    control = "|".join(re.escape(t.content) for t in tokenizer.added_tokens_decoder.values()
                       if t.special or re.search("[|｜]", t.content))
    messages = [dict(m, content=re.sub(control or "(?!)", lambda t: f"{t[0][0]} {t[0][1:]}",
                                       m["content"])) for m in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=enable_thinking)
    return tokenizer.encode(text, add_special_tokens=False)

def read_questions(source, tokenizer, args):
    """load_questions, each with its prompt_ids; drops prompts over --max_prompt_tokens."""
    questions = load_questions(source)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    kept = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    say(f"{source}: {len(kept):,} of {len(questions):,} prompts fit --max_prompt_tokens")
    if not kept:
        raise ValueError(f"{source}: no prompt fits --max_prompt_tokens {args.max_prompt_tokens}")
    return kept

# --- tables --------------------------------------------------------------------------------------

def mean_and_error(groups, value):
    """Mean over all answers, and its standard error over questions (one's samples are alike)."""
    means = [statistics.fmean(value(r) for r in group) for group in groups]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return statistics.fmean(means), error

def summarise(studied):
    """{context: Table 1's row and Figure 9's bars} of the questions that were asked in all five."""
    rows = {}
    for context in CONTEXTS:
        groups = [q["contexts"][context] for q in studied]
        row = rows[context] = {}
        for name, key in (("score", "correct"), ("length", "tokens"), ("epistemic", "epistemic")):
            row[name], row[f"{name}_error"] = mean_and_error(groups, lambda r: r[key])
        answers = [r for group in groups for r in group]
        row["truncated"] = statistics.fmean(not r["finished"] for r in answers)
        row["markers"] = epistemic.summarize(answers)["markers"]
    return rows

def table(rows):
    """Tables 1 and 7, then Figure 9: mean occurrences of each marker in a response."""
    def cell(row, name, form):
        error = row[f"{name}_error"]
        return f"{row[name]:{form}}" + (f" ± {error:{form}}" if error is not None else "")
    lines = [f"{'':20s}{'score':>16s}{'length':>16s}{'epistemic':>16s}{'cut':>7s}"]
    for context, row in rows.items():
        lines.append(f"{CONTEXTS[context]:20s}{cell(row, 'score', '.3f'):>16s}"
                     f"{cell(row, 'length', ',.0f'):>16s}{cell(row, 'epistemic', '.1f'):>16s}"
                     f"{row['truncated']:7.1%}")
    lines += ["", f"{'':15s}" + "".join(f"{context:>15s}" for context in rows)]
    for marker in epistemic.MARKERS:
        bars = "".join(f"{row['markers'][marker]:15.2f}" for row in rows.values())
        lines.append(f"{marker:15s}{bars}")
    return "\n".join(lines)

def sft_pairs(questions, size):
    """(d_ug, d_sg): correct, complete answers of contexts (1) and (2), as many of each a question.

    Both under the plain prompt: the student is to answer so without the solution (Sec. 4).
    """
    d_ug, d_sg = [], []
    for q in questions:
        ug, sg = ([r["response"] for r in q["contexts"].get(context, ())
                   if r["correct"] and r["finished"]] for context in ("unguided", "full"))
        for texts in zip(ug, sg):
            for rows, text in zip((d_ug, d_sg), texts):
                rows.append(dict(index=q["index"], prompt=q["messages"], response=text,
                                 answer=q["answer"]))
    return d_ug[:size], d_sg[:size]

# --- rounds --------------------------------------------------------------------------------------

def ask(llm, verifier, tokenizer, questions, context, seed, args):
    """Answers of this rank's questions in a context, graded, into their `contexts`."""
    if not questions:
        return
    prompts = [dict(q, prompt_ids=prompt_of(q, context, tokenizer, args)) for q in questions]
    groups = generate(llm, verifier, prompts, seed, after_think=True, n=args.samples,
                      temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                      max_tokens=args.max_response_tokens)
    for q, group in zip(questions, groups):
        q["contexts"][context] = [epistemic.record(
            o.text, o.reward, len(o.token_ids), o.finish_reason == "stop") for o in group]

def ask_round(llm, verifier, tokenizer, questions, number, to_study, want_pairs, args):
    """A round's questions with their accuracy, and with answers in contexts if that is in the band.

    The first `to_study` of them get all five, the others (1) and (2), if pairs are wanted.
    """
    rank = dist.get_rank()
    def seed(stage):
        return hash((args.seed, number, stage, rank)) % 2**31
    mine = [dict(index=q["index"], messages=q["messages"], answer=q["answer"], contexts={})
            for q in questions[rank :: dist.get_world_size()]]
    ask(llm, verifier, tokenizer, mine, "unguided", seed(0), args)
    for q in mine:
        group = q["contexts"]["unguided"]
        q["accuracy"] = statistics.fmean(r["correct"] for r in group)
        solved = any(r["correct"] and r["finished"] for r in group)  # there is an s
        if not (args.accuracy[0] <= q["accuracy"] <= args.accuracy[1] and solved):
            q["contexts"] = {}
    in_band = [q for q in mine if q["contexts"]]
    chosen = sorted(exchange([q["index"] for q in in_band]))[:to_study]
    studied = [q for q in in_band if q["index"] in chosen]
    for stage, context in enumerate(list(CONTEXTS)[1:], 1):
        picked = in_band if context == "full" and want_pairs else studied
        ask(llm, verifier, tokenizer, picked, context, seed(stage), args)
    return sorted(exchange(mine), key=lambda q: q["index"])

def read_round(file):
    """The questions of a finished round. A file that was cut since is named."""
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError:
        raise ValueError(f"{file} is not whole: remove it, and it is made again") from None

def studied_of(questions):
    return [q for q in questions if len(q["contexts"]) == len(CONTEXTS)]

# --- run -----------------------------------------------------------------------------------------

def main():
    parser = make_parser()
    args = parser.parse_args()
    try:  # bad input ends with one line and exit code 2, before a model is loaded
        # a context holds a question and a response, and leaves room for an answer
        path, tokenizer = load_tokenizer(
            args.model, args.max_prompt_tokens + args.max_response_tokens + 1024)
        config = check_args(args, path)
        questions = read_questions(args.data, tokenizer, args)
        questions = [dict(q, index=i) for i, q in enumerate(questions)]
        done = [read_round(file) for file in sorted(Path(args.out).glob("rounds/round_*.jsonl"))]
    except Exception as error:  # what transformers, datasets and Jinja raise has no common class
        parser.error(" ".join(str(error).split()))
    device, out, llm = start_process_group(), Path(args.out), None
    if dist.get_rank() == 0:
        write_lines(out / "config.json", [config])
    rounds, done = len(done), list(itertools.chain(*done))
    with Verifier() as verifier:
        for number in itertools.count(rounds):
            start, first = time.time(), number * args.questions_per_round
            to_study = args.num_questions - len(studied_of(done))
            want_pairs = len(sft_pairs(done, args.sft_examples)[0]) < args.sft_examples
            if first >= len(questions) or not to_study and not want_pairs:
                break
            if llm is None:
                llm = start_engine(path, device, args)
            batch = ask_round(llm, verifier, tokenizer,
                              questions[first : first + args.questions_per_round], number, to_study,
                              want_pairs, args)
            done += batch
            if dist.get_rank() == 0:
                write_lines(out / f"rounds/round_{number:04d}.jsonl", batch)
            in_band = sum("unguided" in q["contexts"] for q in batch)
            say(f"round {number}: {in_band} of {len(batch)} in band, {time.time() - start:.0f} s")
    report(done, args)
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

def start_engine(path, device, args):
    """An engine with the model's weights, and as many positions as the longest context has."""
    from transformers import AutoConfig
    positions = args.max_prompt_tokens + 2 * args.max_response_tokens + 1024
    positions = min(positions, AutoConfig.from_pretrained(path).max_position_embeddings)
    llm = make_engine(path, positions, args, device)
    sync_weights(llm, load_model(path, torch.device("cpu")))
    return llm

def report(done, args):
    """Writes the answers, the SFT sets and the tables' numbers; prints the tables."""
    studied, out = studied_of(done), Path(args.out)
    d_ug, d_sg = sft_pairs(done, args.sft_examples)
    rows = summarise(studied) if studied else {}
    if dist.get_rank() == 0:
        for context in CONTEXTS:
            write_lines(out / f"{context}.jsonl", [
                dict(r, benchmark=context, index=q["index"], answer=q["answer"],
                     question=q["messages"][-1]["content"])
                for q in studied for r in q["contexts"][context]])
        write_lines(out / "d_ug.jsonl", d_ug)
        write_lines(out / "d_sg.jsonl", d_sg)
        write_lines(out / "summary.json", [dict(
            vars(args), questions=len(studied), asked=len(done), pairs=len(d_ug), contexts=rows)])
    if len(studied) < args.num_questions or len(d_ug) < args.sft_examples:
        say(f"{args.data} ends after {len(done):,} questions: {len(studied)} of "
            f"{args.num_questions} studied, {len(d_ug)} of {args.sft_examples} SFT pairs")
    say(f"\n{len(studied)} questions of {len(done):,}, {args.samples} answers in each context; "
        f"mean ± standard error over questions\n\n{table(rows)}\n\nresults are in {out}; "
        f"d_ug.jsonl and d_sg.jsonl hold {len(d_ug)} correct answers each")

# --- vLLM and models -----------------------------------------------------------------------------

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # weights, vLLM

def make_engine(path, max_model_len, args, device):
    """vLLM in this process, one engine a rank, asleep, without weights: sync_weights brings them.

    On CPU it packs its weights, and a second sync would miss an LM head that is tied to the
    embeddings (log-probabilities wrong by 0.2, no error): there the head is a tensor of its own.
    """
    cpu = device.type == "cpu"
    say("vLLM starts" + ("" if cpu else ": it measures memory and captures CUDA graphs, minutes"))
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # what it logs before it reads that
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM takes one
    from vllm import LLM
    llm = LLM(path, dtype=DTYPE, seed=args.seed, enforce_eager=cpu, max_model_len=max_model_len,
              max_num_seqs=256,  # its default of 1,024 takes GPU memory and is never reached
              gpu_memory_utilization=args.gpu_memory_utilization,
              kv_cache_memory_bytes=2 * 2**30 if cpu else None,
              distributed_executor_backend="external_launcher",
              logprobs_mode="processed_logprobs",  # after temperature: what is sampled from
              load_format="dummy", use_tqdm_on_load=False, enable_sleep_mode=not cpu,
              hf_overrides=dict(tie_word_embeddings=False) if cpu else None)
    sleep(llm)
    return llm

def sleep(llm):
    """Frees vLLM's KV cache and weights on the GPU, for the trainer."""
    if torch.cuda.is_available():
        llm.sleep(level=2)

def sync_weights(llm, model):
    """Wakes vLLM with the model's weights, written in place; frees gradients for its cache."""
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what torch's allocator still holds
        llm.wake_up(tags=["weights"])
    weights = ((name, p.detach()) for name, p in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])

def generate(llm, verifier, questions, seed, after_think=False, **sampling):
    """vLLM's n answers to each question, with text and reward: groups in the questions' order."""
    from transformers import set_seed
    from vllm import SamplingParams
    # A seed per request crashes on CPU. The global ones repeat bit for bit: vLLM's older model
    # runner draws from torch's, the newer one from NumPy's. Cached prefixes change the last bit.
    set_seed(seed)
    llm.reset_prefix_cache()
    outputs = llm.generate([dict(prompt_token_ids=q["prompt_ids"]) for q in questions],
                           SamplingParams(detokenize=False, **sampling),
                           use_tqdm=dist.get_rank() == 0 and progress)
    answers, decode = [o for output in outputs for o in output.outputs], llm.get_tokenizer().decode
    texts = [decode(o.token_ids, skip_special_tokens=True) for o in answers]
    golds = [q["answer"] for q, output in zip(questions, outputs) for _ in output.outputs]
    rewards = verifier.verify(texts, golds, after_think=after_think)  # 1 correct, 0 not
    for o, text, reward in zip(answers, texts, rewards):
        o.text, o.reward = text, reward
    return [output.outputs for output in outputs]

class progress(tqdm):
    """A bar that leaves no line on a terminal; elsewhere it writes once a minute at most."""

    def __init__(self, *args, **kwargs):
        wait = 0.1 if sys.stderr.isatty() else 60
        super().__init__(*args, **kwargs, leave=False, mininterval=wait, maxinterval=wait,
                         delay=wait, disable=dist.get_rank() != 0)

    def refresh(self, *args, **kwargs):  # vLLM calls it at the end, whatever the delay
        if time.time() > self.start_t + self.delay:
            super().refresh(*args, **kwargs)

def load_tokenizer(name, positions):
    """(folder, tokenizer) of a model. A hub id is resolved here, once: its branch may move."""
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoTokenizer
    try:
        path = name if Path(name).is_dir() else snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
    except Exception as error:  # no such id, no network, no access: no common class
        raise ValueError(f"--model {name}: no folder, and not on the hub ({error})") from None
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise ValueError(f"--model {name}: its tokenizer has no chat template")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"--model {name}: its tokenizer has {len(tokenizer):,} tokens, the model "
                         f"only {config.vocab_size:,}")
    if positions > config.max_position_embeddings:
        raise ValueError(f"--max_prompt_tokens and --max_response_tokens: {positions:,} together, "
                         f"but {name} has {config.max_position_embeddings:,} positions")
    return path, tokenizer

def load_model(path, device):
    from transformers import AutoModelForCausalLM, logging as transformers_logging
    transformers_logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, output_loading_info=True)
    if found["missing_keys"]:  # transformers only warns, and draws them at random
        sys.exit(f"error: weights are missing in {path}: {sorted(found['missing_keys'])[:3]} ...")
    model.generation_config.do_sample = True  # transformers saves no temperature without it
    return model.to(device)

# --- files and processes -------------------------------------------------------------------------

def fingerprint(*sources):
    """Name, size and modification time of the files: data, and weights in a model's folder."""
    files = [file for source in map(Path, sources)
             for file in (sorted(source.glob("*.safetensors")) if source.is_dir() else [source])]
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
            for file in files if file.is_file()]

def write_lines(path, rows):
    """JSON Lines, written aside and renamed: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(path)

def say(message):
    """A line on the screen, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)

def start_process_group():
    """torchrun's group, or under plain python a group of one; returns this rank's device."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        os.environ.setdefault(name, str(value))  # vLLM reads them
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # a rank may wait longer than the usual half hour for another's rollouts of 20,000 tokens
    dist.init_process_group(backend, timeout=timedelta(hours=6), **alone)
    return device

def exchange(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without tracebacks
    warnings.simplefilter("ignore", FutureWarning)  # the libraries', for their authors
    main()
