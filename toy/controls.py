"""What does the damage?  `sdpo.py` with one thing changed, and the base without its doubt.

    python toy/controls.py no_markers SDPO'S FLAGS         # markers left out of both distributions
    python toy/controls.py no_marker_loss SDPO'S FLAGS     # no loss at the student's own markers
    python toy/controls.py no_answer_loss SDPO'S FLAGS     # no loss after </think>
    python toy/controls.py other_question SDPO'S FLAGS     # shown another question's correct answer
    python toy/controls.py banned EVALUATE'S FLAGS         # no marker is ever sampled
    python toy/controls.py errors RUN_FOLDER...            # why answers are wrong -> errors.json

Each replaces functions of `sdpo` or `evaluate`; `make controls` runs them all.
"""

import collections
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import epistemic
import evaluate
import problems
import sdpo


def marker_ids(tokenizer):
    return [i for i in range(len(tokenizer)) if epistemic.count(tokenizer.decode([i]))]


def begin(script, control):
    """Applies the control as soon as the script has its tokenizer, and names it in config.json,
    so that report.py takes the run for none of the plain script."""
    load_tokenizer, make_parser = script.load_tokenizer, script.make_parser

    def replaced_tokenizer(*args):
        path, tokenizer = load_tokenizer(*args)
        control(tokenizer)
        return path, tokenizer

    def replaced_parser():
        parser = make_parser()
        parser.set_defaults(control=control.__name__)
        return parser

    script.load_tokenizer, script.make_parser = replaced_tokenizer, replaced_parser
    script.main()


def without_loss(silent):
    """No loss where silent(targets) is true, of the response tokens targets (N,)."""
    token_losses = sdpo.token_losses

    def replaced(hidden, head, targets, *args, **kwargs):
        loss, logprobs = token_losses(hidden, head, targets, *args, **kwargs)
        return loss * ~silent(targets), logprobs

    sdpo.token_losses = replaced


def no_markers(tokenizer):
    """The loss compares the two distributions over all other tokens: it moves no marker's logit.

    no_marker_loss is not that: where doubt is an open choice, it drops the loss if the student has
    chosen a marker and keeps it if not, with the teacher's whole pull away from the marker.
    """
    ids = torch.tensor(marker_ids(tokenizer))
    teacher_buckets, token_losses = sdpo.teacher_buckets, sdpo.token_losses

    def without(head):
        return lambda hidden: head(hidden).index_fill(-1, ids.to(hidden.device), -1e4)

    def replaced_buckets(student, teacher, *args):
        return teacher_buckets((student[0], without(student[1])), (teacher[0], without(teacher[1])),
                               *args)

    def replaced_losses(hidden, head, targets, temperature, *buckets, alpha=None):
        _, logprobs = token_losses(hidden, head, targets, temperature)
        loss, _ = token_losses(hidden, without(head), targets, temperature, *buckets, alpha=alpha)
        return loss * ~torch.isin(targets, ids.to(targets.device)), logprobs

    sdpo.teacher_buckets, sdpo.token_losses = replaced_buckets, replaced_losses


def no_marker_loss(tokenizer):
    ids = torch.tensor(marker_ids(tokenizer))
    without_loss(lambda targets: torch.isin(targets, ids.to(targets.device)))


def no_answer_loss(tokenizer):
    close, end = tokenizer.convert_tokens_to_ids("</think>"), tokenizer.eos_token_id

    def after_think(targets):  # answers stand one after the other, each ends with `end`
        closes = (targets == close).long()
        closed = closes.cumsum(0)
        in_answers_before = torch.where(targets == end, closed, 0).cummax(0).values.roll(1)
        in_answers_before[:1] = 0
        return closed - closes > in_answers_before

    without_loss(after_think)


def other_question(_):
    """The demonstration comes from the group before: a correct answer, to something else."""
    choose, correct = sdpo.choose_demonstration, [None, None]  # of the group before, of this one

    def replaced(group, i, rng):
        if i == 0:
            own = (r for r in group if r.reward >= 0.5)
            correct[:] = correct[1], next(own, correct[1])
        return choose(group, i, rng) and correct[0]

    sdpo.choose_demonstration = replaced


def banned(tokenizer):
    bias, generate = dict.fromkeys(marker_ids(tokenizer), -100), evaluate.generate

    def replaced(*args, **sampling):
        return generate(*args, **{**sampling, "logit_bias": bias})

    evaluate.generate = replaced


def errors(folders):
    """Sorts the wrong answers of each run's last evaluation: {"arm, benchmark": {kind: count}}.

    By the question's text: a run of `coverage` has an ood.jsonl of its own, and is left out.
    """
    rows = [json.loads(line) for name in ("in", "ood")
            for line in (ROOT / f"toy/data/{name}.jsonl").read_text().splitlines()]
    asked = {row["prompt"][0]["content"]: row["extra_info"] for row in rows}
    for folder in map(Path, folders):
        found = {}
        for evaluation in sorted(folder.glob("*/eval")):
            steps = sorted(evaluation.glob("step_*.jsonl"), key=lambda p: int(p.stem[5:]))
            run = evaluation.parent.name
            files = [(run, steps[-1])] + [("base", steps[0])] * (run == "sdpo") if steps else [
                (run if file.parent.name == "model" else str(file.parent.relative_to(evaluation)),
                 file) for file in sorted(evaluation.rglob("*.jsonl"))]
            for arm, file in files:
                kinds = collections.defaultdict(collections.Counter)
                for record in map(json.loads, file.read_text().splitlines()):
                    problem = asked.get(record["question"])
                    if problem:
                        kinds[f"{arm}, {record.get('benchmark', file.stem)}"].update(
                            () if record["correct"] else
                            [problems.diagnose(problem, record["response"])])
                found |= kinds
        (folder / "errors.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    control = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if control == "errors":
        errors(sys.argv[1:])
    elif control == "banned":
        begin(evaluate, banned)
    elif control in ("no_markers", "no_marker_loss", "no_answer_loss", "other_question"):
        begin(sdpo, globals()[control])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
