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
import random
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


def no_markers(tokenizer):
    """The loss compares the two distributions over all other tokens: it moves no marker's logit.

    no_marker_loss is not that: where doubt is an open choice, it drops the loss if the student has
    chosen a marker and keeps it if not, with the teacher's whole pull away from the marker.
    """
    ids = torch.tensor(marker_ids(tokenizer))
    sdpo_losses = sdpo.token_losses

    def without(states):
        hidden, head = states
        return hidden, lambda chunk: head(chunk).index_fill(-1, ids.to(chunk.device), -1e4)

    def token_losses(student, teacher, targets, args):
        _, logprobs = sdpo_losses(student, teacher, targets, args)
        loss, _ = sdpo_losses(without(student), without(teacher), targets, args)
        return loss * ~torch.isin(targets, ids.to(targets.device)), logprobs

    sdpo.token_losses = token_losses


def without_loss(silent):
    """No loss where silent(response_ids), a list of bool, is true."""

    class Student(sdpo.Student):

        def forward(self, micro_batch, teacher=None):
            loss, logprobs = super().forward(micro_batch, teacher)
            drop = [position for r in micro_batch for position in silent(r.response_ids)]
            return loss * ~torch.tensor(drop, device=loss.device), logprobs

    sdpo.Student = Student


def no_marker_loss(tokenizer):
    ids = set(marker_ids(tokenizer))
    without_loss(lambda response_ids: [i in ids for i in response_ids])


def no_answer_loss(tokenizer):
    close = tokenizer.convert_tokens_to_ids("</think>")
    without_loss(lambda response_ids: [close in response_ids[:i] for i in range(len(response_ids))])


def other_question(_):
    """The demonstration is a correct answer to another question of the step, at random."""
    sdpo_groups = sdpo.sample_groups

    def sample_groups(llm, verifier, tokenizer, questions, step, args):
        rollouts = sdpo_groups(llm, verifier, tokenizer, questions, step, args)
        correct = [r for r in rollouts if r.reward == 1]
        for i, r in enumerate(rollouts):
            messages = r.question["messages"]
            others = [o.text for o in correct if o.question["messages"] != messages]
            if r.teacher_prompt_ids and others:  # a rollout without a demonstration gets none
                solution = random.Random(f"{args.seed}/{step}/{i}").choice(others)
                chat = sdpo.teacher_messages(messages, solution, args.demonstration)
                r.teacher_prompt_ids = sdpo.render(tokenizer, chat, args.enable_thinking)
            else:
                r.teacher_prompt_ids = None
        return rollouts

    sdpo.sample_groups = sample_groups


def banned(tokenizer):
    bias, evaluate_generate = dict.fromkeys(marker_ids(tokenizer), -100), evaluate.generate

    def generate(*args, **sampling):
        return evaluate_generate(*args, **{**sampling, "logit_bias": bias})

    evaluate.generate = generate


CONTROLS = dict(no_markers=no_markers, no_marker_loss=no_marker_loss,
                no_answer_loss=no_answer_loss, other_question=other_question, banned=banned)


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
        return errors(sys.argv[1:])
    if control not in CONTROLS:
        sys.exit(__doc__)
    script = evaluate if control == "banned" else sdpo
    parser = script.make_parser()
    parser.set_defaults(control=control)  # in config.json: report.py sees that it is not plain SDPO
    script.make_parser = lambda: parser
    models = parser.parse_args().model  # evaluate.py takes several, of one tokenizer
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(models if script is sdpo else models[0])
    CONTROLS[control](tokenizer)
    script.main()


if __name__ == "__main__":
    main()
