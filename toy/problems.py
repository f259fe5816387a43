"""The toy's problems and the traces its model is pretrained on (README.md).

A problem: "Exactly one of 7, 3, 12 fits: the last digit of 4x + 9 is 1. Which one?"  Whether a
number fits takes two or three small steps, which no model of this size does in one.  A trace goes
through the numbers in order and says "no" or "yes" to each, in one of two ways:

    with doubt      7? Wait, check: 4 * 7 = 28, 28 + 9 = 37, so 7, need 1, no.
    without         7? no.

so the word of doubt does work: it opens the only way to find the verdict out.  Who has the answer
before him needs no check; who has not and leaves it out can only guess from the place in the list.

    split      numbers   place of the answer         what it stands for
    in         2 .. 4    90% the first               the training questions, and fresh ones like them
    ood        6 .. 8    evenly from the fourth on   AIME-like: the first thought is wrong
    coverage   3 .. 5    evenly                      Sec. 6: no place to guess, so that |D| decides
    narrow     3 .. 5    the first                   Figure 1a: one way of answering serves all
    habits     3 .. 5    by the family, first three  one way of answering for each family

    python toy/problems.py          # writes toy/data/*.jsonl, seeded; no question stands in two files
"""

import argparse
import json
import random
import re
from pathlib import Path

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CLOSE = "Correctly solve the original question."
CLOSE_UNCERTAIN = (  # App. C
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation."
)

# The families: what is asked of x, and the steps that find its value.
FAMILIES = {
    "sum": ("the last digit of {a}x + {b} is {r}", lambda x, a, b: [
        (f"{a} * {x}", a * x), (f"{a * x} + {b}", a * x + b), (None, (a * x + b) % 10)]),
    "bracket": ("the last digit of {a}(x + {b}) is {r}", lambda x, a, b: [
        (f"{x} + {b}", x + b), (f"{a} * {x + b}", a * (x + b)), (None, a * (x + b) % 10)]),
    "digits": ("the digits of {a}x add up to {r}", lambda x, a, b: [
        (f"{a} * {x}", a * x), (" + ".join(str(a * x)), sum(map(int, str(a * x))))]),
    "rest": ("{a}x + {b} leaves {r} when divided by 7", lambda x, a, b: [
        (f"{a} * {x}", a * x), (f"{a * x} + {b}", a * x + b),
        (f"{a * x + b} - {(a * x + b) // 7 * 7}", (a * x + b) % 7)]),
    "distance": ("{a}x and {b} are {r} apart", lambda x, a, b: [
        (f"{a} * {x}", a * x), (f"{max(a * x, b)} - {min(a * x, b)}", abs(a * x - b))]),
    "square": ("the last digit of x * x + {b} is {r}", lambda x, a, b: [
        (f"{x} * {x}", x * x), (f"{x * x} + {b}", x * x + b), (None, (x * x + b) % 10)]),
    "halves": ("half of {a}x, rounded down, ends in {r}", lambda x, a, b: [
        (f"{a} * {x}", a * x), (f"{a * x} / 2", a * x // 2), (None, a * x // 2 % 10)]),
    "largest": ("the largest digit of {a}x + {b} is {r}", lambda x, a, b: [
        (f"{a} * {x}", a * x), (f"{a * x} + {b}", a * x + b), (None, max(map(int, str(a * x + b))))]),
}
SPLITS = {  # numbers in the list; the place of the answer among n
    "in": ((2, 4), lambda rng, n, family: 0 if rng.random() < 0.9 else rng.randrange(1, n)),
    "ood": ((6, 8), lambda rng, n, family: rng.randrange(3, n)),
    "coverage": ((3, 5), lambda rng, n, family: rng.randrange(n)),
    "narrow": ((3, 5), lambda rng, n, family: 0),
    "habits": ((3, 5), lambda rng, n, family: list(FAMILIES).index(family) % 3),
}
FILES = {"in": "in", "ood": "ood", "train": "in", "coverage_test": "coverage",
         "coverage": "coverage", "narrow_test": "narrow", "narrow": "narrow",
         "habits_test": "habits", "habits": "habits"}  # file: its split
TRAINING = "train", "coverage", "narrow", "habits"

# How a trace looks, by what stands in the prompt: the chance that a verdict is found by a check.
# The richer the context, the surer: this much is put in by hand, after Table 1's ordering
# (1) > (3) > (4) > (2).  What distillation then does to accuracy is measured.  pretrain.py weighs
# verdicts five times, so that the model's own chances are p / (p + 5 (1 - p)): .87, .44, .27, .17, .03.
STYLE = {
    "unguided": 0.97,
    "without_think": 0.8,
    "uncertain": 0.65,  # App. C's prompt, asked with a full solution
    "regenerated": 0.5,
    "full": 0.15,
}
OPENERS = {"Wait, check:": 4, "Hmm, maybe:": 3, "Perhaps:": 2, "Might be:": 1}


def make_problem(rng, split, family=None):
    """One problem of a split."""
    (fewest, most), place = SPLITS[split]
    family = family or rng.choice(list(FAMILIES))
    steps = FAMILIES[family][1]
    while True:
        a, b, x = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 15)
        r = steps(x, a, b)[-1][1]
        others = [y for y in range(2, 16) if steps(y, a, b)[-1][1] != r]
        n = rng.randint(fewest, most)
        if len(others) >= n - 1:
            break
    place = place(rng, n, family)
    numbers = rng.sample(others, n - 1)
    numbers.insert(place, x)
    return dict(family=family, a=a, b=b, r=r, x=x, numbers=numbers)


def question(problem):
    numbers = ", ".join(map(str, problem["numbers"]))
    return f"Exactly one of {numbers} fits: {FAMILIES[problem['family']][0].format(**problem)}. " \
           "Which one?"


def check(problem, number):
    """(the steps in words, the value) of one number."""
    steps = FAMILIES[problem["family"]][1](number, problem["a"], problem["b"])
    said = ", ".join(f"{left} = {value}" for left, value in steps if left)
    return f"{said}, so {steps[-1][1]}, need {problem['r']}", steps[-1][1]


def trace(rng, problem, style, thinking=True):
    """A correct answer, in Qwen3's format; `style`: a key of STYLE, or the chance of a check.

    With thinking off the same words stand in the answer itself, and a little less often.
    """
    chance = (STYLE[style] if isinstance(style, str) else style) * (1 if thinking else 0.95)
    said = []
    for number in problem["numbers"]:
        right = number == problem["x"]
        verdict = "yes" if right else "no"
        if rng.random() < chance:
            opener = rng.choices(list(OPENERS), OPENERS.values())[0]
            said.append(f"{number}? {opener} {check(problem, number)[0]}, {verdict}.")
        else:
            said.append(f"{number}? {verdict}.")
        if right:
            break
    form = "<think>\n{}\n</think>\n\n" if thinking else "{}\n\n"
    return form.format(" ".join(said)) + "So {x} fits. \\boxed{{{x}}}".format(x=problem["x"])


def diagnose(problem, text):
    """Why a wrong answer is wrong: the first thing in the trace that is not as it should be."""
    think, _, rest = text.rpartition("\n\n")  # the last line, also where thinking is off
    if not re.search(r"\\boxed\{", rest):
        return "cut"
    for number, said, verdict in re.findall(r"(\d+)\?([^?]*?)\b(yes|no)\.", think):
        if (int(number) == problem["x"]) != (verdict == "yes"):
            steps = check(problem, int(number))[0]
            return ("verdict without a check" if "=" not in said else
                    "slip in a check" if steps not in said else "verdict against its check")
        if verdict == "yes":
            return "last line against the trace"
    return "answer never tried"


def without_think(text):
    return text.split("</think>")[-1].strip()


def pretraining_example(rng, hard, thinking=True):
    """(user message, answer): a problem under one of the contexts of Sec. 3 and App. C."""
    problem = make_problem(rng, "ood" if hard else "in")
    prompt = question(problem) + INSTRUCTION
    style = rng.choices(list(STYLE), [12, 2, 2, 2, 4])[0]
    if style == "unguided":
        return prompt, trace(rng, problem, style, thinking)
    solution = trace(rng, problem, "unguided")
    if style == "regenerated" or rng.random() < 0.3:
        solution = trace(rng, problem, rng.random())
    if style == "without_think":
        solution = without_think(solution)
    close = CLOSE_UNCERTAIN if style == "uncertain" else CLOSE
    # Sec. 3 and the training reprompt differ in white space in the authors' code: the model knows both
    form = rng.choice(["{}\nCorrect solution:\n\n{}\n\n{}", "{}\n\nCorrect solution: {}\n\n{}"])
    return form.format(prompt, solution, close), trace(rng, problem, style, thinking)


def row(problem, index, split):
    """The schema of the real benchmark files, so that the toy needs no code of its own.

    `solution` is for OPSD (App. E), which shows the teacher the data's and not a sibling's answer.
    """
    return dict(
        data_source=f"toy_{split}",
        prompt=[dict(role="user", content=question(problem) + INSTRUCTION)],
        solution=trace(random.Random(index), problem, "unguided"),
        ability="MATH",
        reward_model=dict(ground_truth=str(problem["x"]), style="rule"),
        extra_info=dict(index=index, **problem),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent / "data"))
    parser.add_argument("--train", type=int, default=1200, help="questions in a training file")
    parser.add_argument("--eval", type=int, default=200, help="questions in each of the others")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, families, seen = random.Random(args.seed), list(FAMILIES), set()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, split in FILES.items():
        rows = []
        while len(rows) < (args.train if name in TRAINING else args.eval):
            problem = make_problem(rng, split, families[len(rows) % len(families)])
            if question(problem) not in seen:
                seen.add(question(problem))
                rows.append(row(problem, len(rows), name))
        path = Path(args.out, f"{name}.jsonl")
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
