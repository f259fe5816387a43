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
    make demo                                               # a small one, on two CPU cores

Prints Table 1 and Table 7 with standard errors, and Figure 9. Writes to --out
    <context>.jsonl         every answer to the studied questions, a line each
    d_ug.jsonl, d_sg.jsonl  the two SFT sets of Sec. 4: as many correct answers of (1) and of (2)
                            to the same questions, under the plain prompt; for sft_distill.py
    rounds/                 finished work: a second start with the same --out goes on after it
Stops with what it has when the data runs out.

What a reader of the paper would not expect (the authors' code: commit 5c51051 of
github.com/beanie00/self-distillation-analysis):
  - 100 such questions hold at most 400 pairs of correct answers, so Sec. 4's 800 need more: the
    search goes on for them, with contexts (1) and (2) alone (theirs takes one pair a question)
  - the prompt differs in white space from the one that SDPO's teacher gets
"""
import argparse
import json
import logging
import os
import re
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import epistemic
from verifier import Verifier, load_questions

# --- arguments -----------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="One question, five contexts (Sec. 3). The defaults are the paper's; (ours) "
                    "marks the others.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", default="dapo", help="dapo, a hub id, or a .parquet/.json/.jsonl file")
    add("--enable_thinking", action=argparse.BooleanOptionalAction, default=True,
        help="for Qwen3's chat template")
    add = parser.add_argument_group("questions").add_argument
    add("--num_questions", type=int, default=100, help="to study")
    add("--sft_examples", type=int, default=800, help="in each of d_ug and d_sg; 0: none (Sec. 4)")
    add("--accuracy", type=float, nargs=2, default=[0.125, 0.5], metavar=("LOW", "HIGH"),
        help="of the unguided answers to a studied question, both included")
    add = parser.add_argument_group("sampling (authors' code)").add_argument
    add("--samples", type=int, default=8, help="answers to a question in each context")
    add("--temperature", type=float, default=0.6, help="of sampling")
    add("--top_p", type=float, default=0.95, help="share of the probability that is sampled from")
    add("--top_k", type=int, default=20, help="likeliest tokens that are sampled from; 0: all")
    add("--max_prompt_tokens", type=int, default=2048, help="longer questions are left out")
    add("--max_response_tokens", type=int, default=32768, help="longer answers are cut")
    add = parser.add_argument_group("run").add_argument
    add("--questions_per_round", type=int, default=512,
        help="asked at once, over all ranks; finished work is written after each round (ours)")
    add("--gpu_memory_utilization", type=float, default=0.9, help="vLLM's share of the GPU (ours)")
    add("--out", default="runs/conditions", help="a new folder, or one to go on with (ours)")
    add("--seed", type=int, default=0, help="of sampling")
    return parser.parse_args(argv)

def check_args(args):
    for name, value in vars(args).items():
        if type(value) is int and value < 1 and name not in ("seed", "sft_examples", "top_k"):
            fail(f"--{name} {value} must be at least 1")
    low, high = args.accuracy
    if not 0 < low <= high <= 1:
        fail(f"--accuracy {low} {high}: 0 < LOW <= HIGH <= 1, since s is a correct answer")
    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        fail(f"--temperature {args.temperature} must be above 0, --top_p {args.top_p} in (0, 1]")
    if args.top_k < 0 or args.sft_examples < 0:
        fail(f"--top_k {args.top_k}, --sft_examples {args.sft_examples}: not negative")
    path = Path(args.out) / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in vars(args).items():
            if name != "out" and before.get(name) != value:
                fail(f"--{name} {value}: {path.parent} was begun with {before.get(name)}; "
                     "name another folder, or go on as it was begun")
    elif Path(args.out).exists() and (Path(args.out).is_file() or any(Path(args.out).iterdir())):
        fail(f"--out {args.out} holds something else: name another folder or remove it")

# --- prompts -------------------------------------------------------------------------------------

CONTEXTS = {  # the rows of Table 1, and App. C's
    "unguided": "(1) unguided",
    "full": "(2) full solution",
    "without_think": "(3) without think",
    "regenerated": "(4) regenerated",
    "uncertain": "(5) full, uncertain",
}
CLOSE = "Correctly solve the original question."
CLOSE_UNCERTAIN = (  # App. C
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation.")

def load_tokenizer(model, longest):
    """(tokenizer, config) of a model: what can be wrong with it shows before any weights load."""
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # missing, or a config.json that contradicts itself: no common class
        fail(f"--model {model}: no model folder, and no model on the hub "
             f"({str(error).strip().splitlines()[0]})")
    if tokenizer.chat_template is None:
        fail(f"--model {model}: its tokenizer has no chat template")
    if len(tokenizer) > config.vocab_size:
        fail(f"--model {model}: the tokenizer has {len(tokenizer):,} tokens and the model "
             f"{config.vocab_size:,}: they do not belong together")
    if longest > config.max_position_embeddings:
        fail(f"--max_prompt_tokens and --max_response_tokens: together {longest:,}, more than the "
             f"{config.max_position_embeddings:,} positions of {model}")
    return tokenizer, config

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the model speaks (Table 12); the template writes any BOS."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=enable_thinking)
    return tokenizer.encode(text, add_special_tokens=False)

def with_prompts(source, tokenizer, args):
    """load_questions, each with its prompt_ids; those over --max_prompt_tokens left out."""
    try:
        questions = load_questions(source)
    except ValueError as error:
        fail(error)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    kept = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    if not kept:
        fail(f"{source}: all {len(questions)} prompts are longer than --max_prompt_tokens "
             f"{args.max_prompt_tokens}")
    if len(kept) < len(questions):
        say(f"{source}: {len(questions) - len(kept):,} of {len(questions):,} prompts left out")
    return kept

def demonstration_text(response, form):
    """What the teacher is shown of a correct response: s ("full"), or s without its think part.

    An answer of DeepSeek-R1-Distill has no opening <think>: the template wrote it.
    """
    if form == "without_think":
        response = re.sub(r"<think>.*?</think>\s*", "", response, flags=re.S)
        response = re.sub(r"^.*?</think>\s*", "", response, flags=re.S)
    return response

def guided_messages(messages, context, solution):
    """The chat with a solution after the question, as Sec. 3 and App. C print it."""
    *before, last = messages
    close = CLOSE_UNCERTAIN if context == "uncertain" else CLOSE
    shown = demonstration_text(solution, context)
    text = f"{last['content']}\n\nCorrect solution: {shown}\n\n{close}"
    return [*before, {**last, "content": text}]

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

# --- rollout -------------------------------------------------------------------------------------

def load_engine(args, device, max_model_len):
    """vLLM in this very process, one engine a rank, with the weights of --model."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # of what it says before it reads that
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM leaves one
    cpu = device.type == "cpu"
    from vllm import LLM
    return LLM(args.model, dtype="float32" if cpu else "bfloat16", seed=args.seed,
               enforce_eager=cpu, max_model_len=max_model_len, max_num_seqs=256,
               gpu_memory_utilization=args.gpu_memory_utilization,
               kv_cache_memory_bytes=2 * 2**30 if cpu else None,
               distributed_executor_backend="external_launcher", use_tqdm_on_load=False)

def ask(llm, verifier, tokenizer, chats, golds, seed, args):
    """--samples answers to every chat, graded: a list of groups, in the order of the chats."""
    from transformers import set_seed
    from vllm import SamplingParams
    prompts = [render(tokenizer, messages, args.enable_thinking) for messages in chats]
    room = llm.llm_engine.model_config.max_model_len
    # one global seed: a seed a request crashes vLLM on CPU, and this repeats bit for bit
    set_seed(seed)
    outputs = llm.generate(
        [dict(prompt_token_ids=ids) for ids in prompts],
        [SamplingParams(n=args.samples, temperature=args.temperature, top_p=args.top_p,
                        top_k=args.top_k, max_tokens=min(args.max_response_tokens, room - len(ids)))
         for ids in prompts], use_tqdm=False)
    flat = [o for output in outputs for o in output.outputs]
    rewards = iter(verifier.verify([o.text for o in flat],
                                   [gold for gold in golds for _ in range(args.samples)],
                                   after_think=True))
    return [[epistemic.record(o.text, next(rewards), len(o.token_ids), o.finish_reason == "stop")
             for o in output.outputs] for output in outputs]

def first_correct(group):
    """The demonstration: the first correct response, else the first (authors' code); never one that
    was cut: its think part has no end, and c = s without think would show it."""
    return next((r for r in group if r["correct"] and r["finished"]), group[0])["response"]

def ask_round(llm, verifier, tokenizer, questions, number, to_study, want_pairs, args):
    """A round's questions, with their accuracy; those in the band, with their contexts' answers.

    The first `to_study` of them get all five, the others (1) and (2), if pairs are wanted.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def answers(picked, chat_of, stage):
        seed = hash((args.seed, number, stage, rank)) % 2**31
        golds = [q["answer"] for q in picked]
        chats = [chat_of(q) for q in picked]
        return ask(llm, verifier, tokenizer, chats, golds, seed, args) if chats else []

    mine = [dict(index=q["index"], messages=q["messages"], answer=q["answer"], contexts={})
            for q in questions[rank::world_size]]
    in_band = []
    for q, group in zip(mine, answers(mine, lambda q: q["messages"], 0)):
        q["accuracy"] = statistics.fmean(r["correct"] for r in group)
        uncut = any(r["correct"] and r["finished"] for r in group)
        if args.accuracy[0] <= q["accuracy"] <= args.accuracy[1] and uncut:  # there is an s
            q["contexts"]["unguided"] = group
            in_band.append(q)
    studied = sorted(exchange([q["index"] for q in in_band]))[:to_study]
    if not want_pairs:
        in_band = [q for q in in_band if q["index"] in studied]
    for stage, context in enumerate(list(CONTEXTS)[1:], 1):
        # s stands in all of them but (4), which stands on (2)
        source = "full" if context == "regenerated" else "unguided"
        picked = [q for q in in_band if context == "full" or q["index"] in studied]
        groups = answers(picked, lambda q: guided_messages(
            q["messages"], context, first_correct(q["contexts"][source])), stage)
        for q, group in zip(picked, groups):
            q["contexts"][context] = group
    return sorted(exchange(mine), key=lambda q: q["index"])

# --- run -----------------------------------------------------------------------------------------

def start_process_group():
    """torchrun's group, or under plain python one of a single process; returns its device."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        os.environ.setdefault(name, str(value))
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # AdamW in CPU memory wants its share of the cores, of which torchrun leaves it one
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    # a rank may wait for another's rollouts of 20,000 tokens longer than the usual half hour
    dist.init_process_group(backend, timeout=timedelta(hours=6), **alone)
    return device

def exchange(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

def say(message):
    """A line on the screen, from the first rank alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)

def fail(message):
    """Bad input: one line and exit code 2. From the first rank at once, and torchrun ends the
    others; where only another rank fails, it is heard two seconds later."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def write_lines(path, rows):
    """JSON Lines, written aside and renamed, so that a reader never finds half a file."""
    path.parent.mkdir(exist_ok=True)  # of a run whose folder is gone, nothing is begun anew
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(path)

def main():
    args = parse_args()
    check_args(args)
    # a context holds a question and a response, and leaves room for an answer
    tokenizer, config = load_tokenizer(
        args.model, args.max_prompt_tokens + args.max_response_tokens + 1024)
    questions = with_prompts(args.data, tokenizer, args)
    questions = [dict(q, index=i) for i, q in enumerate(questions)]
    device = start_process_group()
    rank, out = dist.get_rank(), Path(args.out)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_lines(out / "config.json", [vars(args)])

    done, llm = [], None
    with Verifier() as verifier:
        for number, first in enumerate(range(0, len(questions), args.questions_per_round)):
            studied = [q for q in done if len(q["contexts"]) == len(CONTEXTS)]
            pairs = len(sft_pairs(done, args.sft_examples)[0])
            if len(studied) == args.num_questions and pairs == args.sft_examples:
                break
            path, start = out / f"rounds/round_{number:04d}.jsonl", time.time()
            if path.exists():
                done += [json.loads(line) for line in path.read_text().splitlines()]
                continue
            if llm is None:
                positions = args.max_prompt_tokens + 2 * args.max_response_tokens + 1024
                llm = load_engine(args, device, min(positions, config.max_position_embeddings))
            asked = questions[first : first + args.questions_per_round]
            batch = ask_round(llm, verifier, tokenizer, asked, number,
                              args.num_questions - len(studied), pairs < args.sft_examples, args)
            done += batch
            if rank == 0:
                write_lines(path, batch)
            in_band = sum("unguided" in q["contexts"] for q in batch)
            say(f"round {number}: {in_band} of {len(batch)} in band, {time.time() - start:.0f} s")
    studied = [q for q in done if len(q["contexts"]) == len(CONTEXTS)]
    d_ug, d_sg = sft_pairs(done, args.sft_examples)
    rows = summarise(studied) if studied else {}
    if rank == 0:
        for context in CONTEXTS:
            write_lines(out / f"{context}.jsonl", [
                dict(r, benchmark=context, index=q["index"], answer=q["answer"])
                for q in studied for r in q["contexts"][context]])
        write_lines(out / "d_ug.jsonl", d_ug)
        write_lines(out / "d_sg.jsonl", d_sg)
        write_lines(out / "summary.json", [dict(
            vars(args), questions=len(studied), asked=len(done), pairs=len(d_ug), contexts=rows)])
    if len(studied) < args.num_questions or len(d_ug) < args.sft_examples:
        say(f"{args.data} ran out after {len(done):,} questions: {len(studied)} of "
            f"{args.num_questions} studied, {len(d_ug)} of {args.sft_examples} SFT pairs")
    say(f"\n{len(studied)} questions of {len(done):,}, {args.samples} answers in each context; mean "
        f"± standard error over questions\n\n{table(rows)}\n\n{out}/d_ug.jsonl, d_sg.jsonl: "
        f"{len(d_ug)} correct answers each")
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that is gone
        sys.exit(f"error: {error}; what was finished is whole: the same command goes on")
