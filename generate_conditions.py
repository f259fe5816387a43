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
    <context>.jsonl         every response to the studied questions, a line each
    d_ug.jsonl, d_sg.jsonl  the two SFT sets of Sec. 4: as many correct responses of (1) and of (2)
                            to the same questions, under the plain prompt; for sft_distill.py
    rounds/                 finished work: the same command again resumes after it
Stops with what it has when the data runs out.

What the paper does not show (authors' code: 5c51051 of beanie00/self-distillation-analysis):
  - 100 such questions hold at most 400 pairs of correct ones, and Sec. 4 has 800: more questions
    are asked for them, in contexts (1) and (2) only (theirs takes one pair a question)
  - the prompt differs in white space from the one that SDPO's teacher gets
"""
import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from tqdm import tqdm

import epistemic
from verifier import Verifier, load_questions

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of model and vLLM
TQDM = dict(leave=False, disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0")

# --- arguments -----------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(
        description="Five contexts (Sec. 3). The defaults are the paper's but for (ours).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", default="dapo", help="dapo, a hub id, or a .parquet, .json or .jsonl file")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add("--num_questions", type=int, default=100, help="to study in all five contexts")
    add("--sft_examples", type=int, default=800, help="in d_ug and in d_sg (Sec. 4)")
    add("--accuracy", type=float, nargs=2, default=[0.125, 0.5], metavar=("LOW", "HIGH"),
        help="of the unguided responses to a studied question, both included")
    add("--samples", type=int, default=8, help="responses to each question in each context")
    add("--temperature", type=float, default=0.6, help="of sampling (authors' code)")
    add("--top_p", type=float, default=0.95, help="of sampling (authors' code)")
    add("--top_k", type=int, default=20, help="0: all tokens (authors' code)")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=int, default=32768, help="longer responses are cut")
    add("--questions_per_round", type=int, default=512, help="(ours) results written after each")
    add("--gpu_memory_utilization", type=float, default=0.9, help="(ours) for vLLM")
    add("--out", default="runs/conditions", help="(ours) a new folder, or one to resume")
    add("--seed", type=int, default=0, help="of sampling")
    return parser

# --- prompts -------------------------------------------------------------------------------------

CONTEXTS = {  # the rows of Table 1, and App. C's
    "unguided": "(1) unguided",
    "full": "(2) full solution",
    "without_think": "(3) without think",
    "regenerated": "(4) regenerated",
    "uncertain": "(5) full, uncertain",
}
UNCERTAIN = ("Solve the original question from scratch with a full, detailed reasoning trace, "
             "without skipping any steps, and include as much uncertainty or ambiguity in the "
             "explanation.")  # App. C, Figure 14

def teacher_messages(messages, solution, form, heading="\nCorrect solution:\n\n"):
    """The chat with a solution after the question, in the same user message (authors' code)."""
    if form == "without_think":
        solution = solution.rpartition("</think>")[2].lstrip()
    closing = UNCERTAIN if form == "uncertain" else "Correctly solve the original question."
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}{heading}{solution}\n\n{closing}"}]

def first_correct(group):
    """The demonstration: the first correct response that was not cut, else the first of all."""
    return next((r for r in group if r["correct"] and r["finished"]), group[0])["response"]

def prompt_of(question, context, tokenizer, args):
    """Token ids of a question in a context, from its responses in the contexts before."""
    messages = question["messages"]
    if context != "unguided":
        source = "full" if context == "regenerated" else "unguided"
        messages = teacher_messages(messages, first_correct(question["contexts"][source]), context,
                                    heading="\n\nCorrect solution: ")  # as in Sec. 3, App. C
    return render(tokenizer, messages, args.enable_thinking)

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the answer begins (Table 12)."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=enable_thinking)

# --- tables --------------------------------------------------------------------------------------

def mean_and_error(groups, value):
    """Mean over all responses, and its standard error over questions (one's samples are alike)."""
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
        responses = [r for group in groups for r in group]
        row["truncated"] = statistics.fmean(not r["finished"] for r in responses)
        counts = [epistemic.count_by_marker(r["response"]) for r in responses]
        row["markers"] = {m: statistics.fmean(c[m] for c in counts) for m in epistemic.MARKERS}
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
    """(d_ug, d_sg): correct, whole responses in contexts (1) and (2), as many of each a question.
    Both under the plain prompt: the student is to answer so without the solution (Sec. 4)."""
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

Rollout = namedtuple("Rollout", "question response_ids logprobs text finished reward")

def ask(llm, verifier, tokenizer, questions, context, seed, args):
    """Graded responses to this rank's questions in a context, into their `contexts`."""
    prompts = [dict(q, prompt_ids=prompt_of(q, context, tokenizer, args)) for q in questions]
    rollouts = generate(llm, verifier, prompts, seed, n=args.samples, top_k=args.top_k,
                        temperature=args.temperature, top_p=args.top_p,
                        max_tokens=args.max_response_tokens)
    for i, q in enumerate(questions):
        group = rollouts[i * args.samples : (i + 1) * args.samples]
        q["contexts"][context] = [epistemic.record(rollout) for rollout in group]

def ask_round(llm, verifier, tokenizer, questions, number, to_study, want_pairs, args):
    """A round's questions with their accuracy, and with responses in contexts if that is in the
    band. The first `to_study` of them get all five, the others (1) and (2), if pairs are wanted."""
    rank = dist.get_rank()
    own = [dict(index=q["index"], messages=q["messages"], answer=q["answer"], contexts={})
           for q in questions[rank :: dist.get_world_size()]]
    seeds = {context: hash((args.seed, number, stage, rank)) % 2**31
             for stage, context in enumerate(CONTEXTS)}
    ask(llm, verifier, tokenizer, own, "unguided", seeds["unguided"], args)
    for q in own:
        group = q["contexts"]["unguided"]
        q["accuracy"] = statistics.fmean(r["correct"] for r in group)
        solved = any(r["correct"] and r["finished"] for r in group)  # there is an s
        if not (args.accuracy[0] <= q["accuracy"] <= args.accuracy[1] and solved):
            q["contexts"] = {}
    in_band = [q for q in own if q["contexts"]]
    chosen = sorted(all_gather([q["index"] for q in in_band]))[:to_study]
    studied = [q for q in in_band if q["index"] in chosen]
    for context in list(CONTEXTS)[1:]:
        picked = in_band if context == "full" and want_pairs else studied
        ask(llm, verifier, tokenizer, picked, context, seeds[context], args)
    return sorted(all_gather(own), key=lambda q: q["index"])

def studied_of(questions):
    return [q for q in questions if len(q["contexts"]) == len(CONTEXTS)]

# --- run -----------------------------------------------------------------------------------------

def main():
    parser = make_parser()
    args = parser.parse_args()
    start_process_group()
    try:  # bad input ends with one line (a rank) and exit code 2, before vLLM starts
        from transformers import AutoConfig, AutoTokenizer  # takes seconds, --help waits for none
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        path = args.model if Path(args.model).is_dir() else snapshot_download(
            args.model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
        positions = AutoConfig.from_pretrained(path).max_position_embeddings
        questions = read_questions(args.data, tokenizer, args)
        model = load_model(path)
        begin_run(args)
        files = sorted(Path(args.out).glob("rounds/round_*.jsonl"))
        done = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    except Exception as error:  # what transformers, datasets and Jinja raise has no common class
        parser.error(" ".join(str(error).split()))

    # a context holds a question and a response, and leaves room for another
    longest = min(args.max_prompt_tokens + 2 * args.max_response_tokens + 1024, positions)
    llm = make_engine(path, longest, args)
    sync_weights(llm, model)
    verifier = Verifier()
    for number in itertools.count(len(files)):
        start, first = time.time(), number * args.questions_per_round
        to_study = args.num_questions - len(studied_of(done))
        want_pairs = len(sft_pairs(done, args.sft_examples)[0]) < args.sft_examples
        if first >= len(questions) or not to_study and not want_pairs:
            break
        batch = ask_round(llm, verifier, tokenizer,
                          questions[first : first + args.questions_per_round], number, to_study,
                          want_pairs, args)
        done += batch
        if dist.get_rank() == 0:
            write_lines(Path(args.out, f"rounds/round_{number:04d}.jsonl"), batch)
        in_band = sum("unguided" in q["contexts"] for q in batch)
        say(f"round {number}: {in_band} of {len(batch)} in band, {time.time() - start:.0f} s")
    write_results(done, args)
    llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit

def write_results(done, args):
    """Writes the responses, the SFT sets and the tables' numbers; prints the tables."""
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
    say(f"\n{len(studied)} questions of {len(done):,}, {args.samples} responses in each context; "
        f"mean ± standard error over questions\n\n{table(rows)}\n\nresults are in {out}")

# --- a reader of the paper may stop here: vLLM, questions, models, files, processes --------------

def make_engine(path, max_model_len, args):
    """vLLM in this process, one engine a rank; sync_weights brings its weights."""
    say("vLLM starts; on a GPU this takes minutes")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM takes one
    from vllm import LLM
    cpu = not torch.cuda.is_available()
    return LLM(path, dtype=DTYPE, seed=args.seed, max_model_len=max_model_len,
               load_format="dummy", use_tqdm_on_load=False,
               max_num_seqs=256,  # its default of 1,024 takes GPU memory and is never reached
               gpu_memory_utilization=args.gpu_memory_utilization,
               kv_cache_memory_bytes=2 * 2**30 if cpu else None, enforce_eager=cpu,
               distributed_executor_backend="external_launcher",
               logprobs_mode="processed_logprobs",  # after temperature: what is sampled from
               # a checkpoint's LM head may differ from the embeddings that its model ties it to
               hf_overrides=dict(tie_word_embeddings=False))

def sync_weights(llm, model):
    """The model's weights, written into vLLM's in place."""
    weights = ((name, w.detach()) for name, w in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))

def load_model(path):
    """A model in CPU memory."""
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE,
                                                            output_loading_info=True)
    except Exception as error:  # of half a file "header too large", and not which
        raise ValueError(f"{path}: {error}") from None
    if found["missing_keys"]:  # transformers only warns, and draws them at random
        raise ValueError(f"{path}: weights are missing: {sorted(found['missing_keys'])[:3]} ...")
    return model

def generate(llm, verifier, questions, seed, **sampling):
    """Graded rollouts, those of one question together, in the questions' order."""
    from transformers import set_seed
    from vllm import SamplingParams
    # A seed per request crashes on CPU; the global ones repeat bit for bit, torch's and NumPy's
    # (vLLM draws from one or the other). Cached prefixes change the last bit.
    set_seed(seed)
    llm.reset_prefix_cache()
    outputs = llm.generate([dict(prompt_token_ids=q["prompt_ids"]) for q in questions],
                           SamplingParams(detokenize=False, **sampling),  # token by token: slow
                           use_tqdm=not TQDM["disable"] and (lambda **bar: tqdm(**bar, **TQDM)))
    answers = [(q, answer) for q, output in zip(questions, outputs) for answer in output.outputs]
    decode = llm.get_tokenizer().decode  # batch_decode makes one text of no answers at all
    texts = [decode(answer.token_ids, skip_special_tokens=True) for _, answer in answers]
    rewards = verifier.verify(texts, [q["answer"] for q, _ in answers])
    return [Rollout(q, list(a.token_ids), a.logprobs and a.logprobs.logprobs, text,
                    a.finish_reason == "stop", reward)
            for (q, a), text, reward in zip(answers, texts, rewards)]

def read_questions(source, tokenizer, args):
    """[{messages, answer, prompt_ids, benchmark, index}], prompts within --max_prompt_tokens."""
    questions = load_questions(source)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    fitting = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    say(f"{source}: {len(fitting):,} of {len(questions):,} prompts fit")
    if not fitting:
        raise ValueError(f"{source}: no prompt within {args.max_prompt_tokens:,} tokens")
    return [dict(q, benchmark=Path(source).stem, index=i) for i, q in enumerate(fitting)]

def begin_run(args):
    """Writes config.json. ValueError if the rounds in --out had other flags."""
    file = Path(args.out, "config.json")
    config = dict(vars(args), script=Path(sys.argv[0]).name)
    if Path(args.out, "rounds").exists():
        before = json.loads(file.read_text())
        changed = [f"--{name} was {before.get(name)}" for name, value in config.items()
                   if name not in ("out", "gpu_memory_utilization") and before.get(name) != value]
        if changed:
            raise ValueError(f"--out {args.out} holds other results: {', '.join(changed)}")
    if dist.get_rank() == 0:
        write_lines(file, [config])

def write_lines(path, rows):
    """JSON Lines, renamed when complete: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.rename(path)

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

def all_gather(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

def say(message):
    """A line on the screen, from the first rank only."""
    if dist.get_rank() == 0:
        print(message, flush=True)

if __name__ == "__main__":
    main()
