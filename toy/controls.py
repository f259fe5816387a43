"""What does the damage?  `sdpo.py` with one thing changed, and the base without its doubt.

    python toy/controls.py no_markers SDPO'S FLAGS         # markers left out of both distributions
    python toy/controls.py no_marker_loss SDPO'S FLAGS     # no loss at the student's own markers
    python toy/controls.py no_answer_loss SDPO'S FLAGS     # no loss after </think>
    python toy/controls.py other_question SDPO'S FLAGS     # shown another question's correct answer
    python toy/controls.py banned EVALUATE'S FLAGS         # no marker is ever sampled
    python toy/controls.py errors RUN_FOLDER...            # why answers are wrong -> errors.json

Each replaces one function of `sdpo` or `evaluate`; `make controls` runs them all.
"""

import collections
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import epistemic
import problems
import sdpo


def tokenizer_of_run():
    return sdpo.load_tokenizer(sys.argv[sys.argv.index("--model") + 1], 1)[1]


def marker_ids(tokenizer):
    return [i for i in range(len(tokenizer)) if epistemic.count(tokenizer.decode([i]))]


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
    markers = torch.tensor(marker_ids(tokenizer))
    teacher_buckets, token_losses = sdpo.teacher_buckets, sdpo.token_losses

    def without(head):
        return lambda hidden: head(hidden).index_fill(-1, markers, -1e4)

    def buckets_without(student, teacher, *args):
        (hidden, head), (teacher_hidden, teacher_head) = student, teacher
        return teacher_buckets((hidden, without(head)), (teacher_hidden, without(teacher_head)),
                               *args)

    def losses_without(hidden, head, targets, temperature, *buckets, **alpha):
        _, logprobs = token_losses(hidden, head, targets, temperature)
        if not buckets:
            return torch.zeros_like(logprobs), logprobs
        loss, _ = token_losses(hidden, without(head), targets, temperature, *buckets, **alpha)
        return loss * ~torch.isin(targets, markers), logprobs

    sdpo.teacher_buckets, sdpo.token_losses = buckets_without, losses_without


def no_marker_loss(tokenizer):
    ids = torch.tensor(marker_ids(tokenizer))
    without_loss(lambda targets: torch.isin(targets, ids))


def no_answer_loss(tokenizer):
    close, end = tokenizer.convert_tokens_to_ids("</think>"), tokenizer.eos_token_id

    def after_think(targets):  # answers stand one after the other, each ends with `end`
        opened, ended = (targets == close).cumsum(0), (targets == end).cumsum(0)
        return opened - (targets == close).long() > ended - (targets == end).long()

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


def banned():
    import evaluate

    bias, generate = dict.fromkeys(marker_ids(tokenizer_of_run()), -100), evaluate.generate

    def replaced(*args, **sampling):
        return generate(*args, logit_bias=bias, **sampling)

    evaluate.generate = replaced
    evaluate.main()


def errors(folders):
    """Sorts the wrong answers of each run's last evaluation: {"arm, benchmark": {kind: count}}."""
    asked = {name: [json.loads(line)["extra_info"] for line in
                    (ROOT / f"toy/data/{name}.jsonl").read_text().splitlines()]
             for name in problems.SPLITS}
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
                    name = record.get("benchmark", file.stem)
                    if name in asked:
                        kinds[f"{arm}, {name}"].update(() if record["correct"] else [
                            problems.diagnose(asked[name][record["index"]], record["response"])])
                found |= kinds
        (folder / "errors.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    control = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if control == "errors":
        errors(sys.argv[1:])
    elif control == "banned":
        banned()
    elif control in ("no_markers", "no_marker_loss", "no_answer_loss", "other_question"):
        globals()[control](tokenizer_of_run())
        make_parser = sdpo.make_parser

        def replaced():
            parser = make_parser()
            # into config.json, so that report.py takes it for no run of the plain sdpo.py
            parser.set_defaults(control=control)
            return parser
        sdpo.make_parser = replaced
        sdpo.main()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
