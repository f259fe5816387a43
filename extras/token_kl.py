"""Table 6 (App. B.6): how far apart are student and teacher on each token, before any training?

    python -m extras.token_kl --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B runs/conditions/rounds

Reads the unguided answers y that generate_conditions.py has sampled; as in sdpo.py the teacher sees
a correct answer c to the same question, here the first one that is not y itself; a y without a c is
left out. Adds up KL(student || teacher) over the whole vocabulary by the token of y that stands
there. Writes --out, {token id: {text, kl (the sum), count}}, for report.py. On one GPU, or on CPU.
The files hold text, so y is encoded again, without the token that ends it.
"""
import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import sdpo

def read_answers(folder):
    """[(messages, y, c)] of all questions in a folder of rounds."""
    answers = []
    for file in sorted(Path(folder).glob("round_*.jsonl")):
        for question in map(json.loads, file.read_text().splitlines()):
            group = question["contexts"].get("unguided", [])
            for y in group:
                correct = [r for r in group if r["correct"] and r["finished"] and r is not y]
                if correct:
                    answers.append((question["messages"], y["response"], correct[0]["response"]))
    if not answers:
        raise ValueError(f"{folder}: no round_*.jsonl with a correct answer beside another")
    return answers

@torch.no_grad()
def token_kl(model, student_prompt, teacher_prompt, response):
    """KL(student || teacher) at each token of the response, (T,); (T, V) never exists."""
    student, head = sdpo.response_states(model, [student_prompt], [response])  # (T, D)
    teacher, head = sdpo.response_states(model, [teacher_prompt], [response])
    chunks = []
    for pair in zip(student.split(sdpo.CHUNK), teacher.split(sdpo.CHUNK)):
        logprobs = [head(hidden).float().log_softmax(-1) for hidden in pair]  # (C, V) each
        chunks.append(sdpo.divergence(*logprobs, alpha=1))
    return torch.cat(chunks)

def main():
    parser = argparse.ArgumentParser(
        description="Table 6: KL of student and teacher by token.", usage=argparse.SUPPRESS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("rounds", help="folder in generate_conditions.py's --out")
    add("--model", required=True, help="hub id or folder of the model that gave the answers")
    add("--enable_thinking", action=switch, default=True, help="as generate_conditions.py had it")
    add("--out", default="runs/token_kl/token_kl.json", help="file to write (%(default)s)")
    args = parser.parse_args()
    try:
        answers = read_answers(args.rounds)
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = sdpo.load_model(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # what transformers raises has no common class
        parser.error(" ".join(f"{type(error).__name__}: {error}".split()))
    kl, count = Counter(), Counter()  # by token id
    for messages, y, c in tqdm(answers, unit="answer", **sdpo.TQDM):
        student_prompt = sdpo.render(tokenizer, messages, args.enable_thinking)
        teacher_prompt = sdpo.render(
            tokenizer, sdpo.teacher_messages(messages, c, "full"), args.enable_thinking)
        ids = tokenizer.encode(y, add_special_tokens=False)
        count.update(ids)
        for i, value in zip(ids, token_kl(model, student_prompt, teacher_prompt, ids).tolist()):
            kl[i] += value
    table = {i: dict(text=tokenizer.decode([i]), kl=kl[i], count=count[i]) for i in count}
    sdpo.write_lines(Path(args.out), [table])
    print(f"{len(table):,} tokens of {len(answers):,} answers: {args.out}")

if __name__ == "__main__":
    main()
