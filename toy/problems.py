"""The toy's problems and the traces its model is pretrained on (README, "The toy").

A problem: "Find the smallest x >= 0 with (b + ax) mod m = r."  A search solves it in small, easy
steps and nobody can guess it in one, so a model that *searches aloud* is right and one that
announces an answer is not. The difficulty is the length of the search, x + 1 tries.

    split   answer    what it stands for
    in      4 .. 10   the questions that are trained on (train.jsonl) and fresh ones like them
    ood    11 .. 17   AIME-like: longer searches than any that training shows

    python toy/problems.py          # writes toy/data/{train,in,ood}.jsonl, seeded; no question twice
"""

import argparse
import json
import math
import random
from pathlib import Path

MODULI = (11, 22)  # of every split: the arithmetic is the same, and pretraining has seen it
SPLITS = {"in": (4, 10), "ood": (11, 17)}
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."

CLOSE = "Correctly solve the original question."
CLOSE_UNCERTAIN = (  # App. C
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation."
)

# How a trace looks, by what stands in the prompt: (share of tries stated plainly, that is without
# a word of doubt; chance before each try to commit to the answer read off the context instead of
# trying). The richer the context, the surer and shorter: this much is put in by hand, after
# Table 1's ordering (1) > (3) > (4) > (2). What distillation then does to accuracy is measured.
STYLE = {
    "unguided": (0.0, 0.0),
    "without_think": (0.35, 0.03),
    "uncertain": (0.55, 0.06),  # App. C's prompt, asked with a full solution
    "regenerated": (0.7, 0.1),
    "full": (0.9, 0.2),
}


def make_problem(rng, low, high):
    """One problem with low <= m <= high: a in 1..4, and x drawn evenly among those reachable."""
    m = rng.randint(low, high)
    a, b = rng.randint(1, 4), rng.randrange(m)
    x = rng.randrange(m // math.gcd(a, m))  # the sequence repeats after m / gcd(a, m) values
    return dict(a=a, b=b, m=m, x=x, r=(b + a * x) % m)


def all_problems(low, high):
    """Those of MODULI whose answer lies between low and high."""
    return [dict(a=a, b=b, m=m, x=x, r=(b + a * x) % m)
             for m in range(MODULI[0], MODULI[1] + 1) for a in range(1, 5) for b in range(m)
             for x in range(low, min(high + 1, m // math.gcd(a, m)))]


def question(problem):
    return "Find the smallest x >= 0 with ({b} + {a}x) mod {m} = {r}.".format(**problem)


def trace(rng, problem, style):
    """A correct answer, in Qwen3's format, as verbose and as doubtful as `style` says."""
    plain, commit = STYLE[style] if isinstance(style, str) else style
    a, b, m, r, x = (problem[k] for k in "abmrx")
    said, value = [], None
    for k in range(x + 1):
        hedged = rng.random() >= plain
        if k == 0:
            said.append("Hmm, let me try." if hedged else "We try.")
        if rng.random() < commit:
            said.append(f"So x = {x} gives {r}.")
            break
        before, value = value, (b + a * k) % m
        wrap = f" - {m}" if k and before + a >= m else ""
        step = f"x = {k}: {before} + {a}{wrap} = {value}" if k else f"x = 0: {b}"
        if not hedged:
            said.append(f"{step}, need {r}.")
            continue
        guess = rng.choices(["maybe", "perhaps", "alternatively"], [6, 3, 1])[0]
        said.append(f"{guess.capitalize() if k == 0 else 'Wait, ' + guess} {step}, need {r}.")
        if k == x:
            said.append("Check.")
    return "<think>\n{}\n</think>\n\nSo x = {} works. \\boxed{{{}}}".format(" ".join(said), x, x)


def without_think(text):
    return text.split("</think>")[-1].strip()


def pretraining_example(rng, low, high):
    """(user message, answer): a problem under one of the contexts of Sec. 3 and App. C."""
    problem = make_problem(rng, low, high)
    prompt = question(problem) + INSTRUCTION
    style = rng.choices(list(STYLE), [14, 2, 2, 2, 3])[0]
    if style == "unguided":
        return prompt, trace(rng, problem, style)
    solution = trace(rng, problem, "unguided")
    if style == "regenerated" or (style == "without_think" and rng.random() < 0.5):
        solution = trace(rng, problem, (rng.uniform(0.4, 1.0), rng.uniform(0.0, 0.4)))
    if style == "without_think":
        solution = without_think(solution)
    close = CLOSE_UNCERTAIN if style == "uncertain" else CLOSE
    # Sec. 3 and the training reprompt differ in white space (paper/semantics): the model knows both
    form = rng.choice(["{}\nCorrect solution:\n\n{}\n\n{}", "{}\n\nCorrect solution: {}\n\n{}"])
    return form.format(prompt, solution, close), trace(rng, problem, style)


def row(problem, index, split):
    """The schema of the real benchmark files, so that the toy needs no code of its own."""
    return dict(
        data_source=f"toy_{split}",
        prompt=[dict(role="user", content=question(problem) + INSTRUCTION)],
        ability="MATH",
        reward_model=dict(ground_truth=str(problem["x"]), style="rule"),
        extra_info=dict(index=index, **problem),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent / "data"))
    parser.add_argument("--train", type=int, default=1200, help="questions in train.jsonl")
    parser.add_argument("--eval", type=int, default=200, help="questions in each of the others")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    drawn = {split: rng.sample(all_problems(*SPLITS[split]), args.eval) for split in SPLITS}
    rest = [p for p in all_problems(*SPLITS["in"]) if p not in drawn["in"]]
    drawn["train"] = rng.sample(rest, args.train)
    for split, problems in drawn.items():
        rows = [row(problem, i, split) for i, problem in enumerate(problems)]
        lines = (json.dumps(r) for r in rows)
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{out}/{split}.jsonl: {len(rows)} questions")


if __name__ == "__main__":
    main()
