"""OPSD, self-distillation with the data's own solution: App. E and Figure 15 of the paper.

On top of sdpo.py. What is replaced there:
  - c is the worked `solution` that the data has beside the answer, for every rollout, right or
    wrong. open-r1's DAPO has none: its `solution` column holds the answer
  - --loss_tokens: the loss is on the first tokens of each answer only
  - --teacher_thinking, App. E's hybrid: the teacher's prompt has thinking on, the student's off
  - batch size and learning rate are OPSD's, a tenth of SDPO's

    torchrun --nproc_per_node 8 -m extras.opsd --model Qwen/Qwen3-1.7B --data solved.jsonl \\
        --no-enable_thinking --teacher_thinking

OPSD's own code also cuts the answers while they are sampled: --max_response_tokens 1024. Unlike it,
all weights are trained (OPSD: LoRA) and each question has a group of rollouts.

Watch (Figure 15): the hybrid's score and length rise first, then fall; without --teacher_thinking,
with thinking on, both fall from the start.
"""
from dataclasses import replace

import sdpo
from sdpo import make_parser as sdpo_parser
from sdpo import read_questions as sdpo_questions
from sdpo import update as sdpo_update

def make_parser():
    parser = sdpo_parser()
    parser.description = "OPSD (App. E) on top of sdpo.py. --data is required."
    parser.add_argument("--loss_tokens", type=int, default=1024,
                        help="of each answer, from its start, have a loss")
    parser.add_argument("--teacher_thinking", action="store_true",
                        help="hybrid: with --no-enable_thinking only the student does not think")
    parser.set_defaults(data=None, run_dir="runs/opsd", questions_per_step=32,
                        minibatch_questions=32, lr=1e-6)
    return parser

def read_questions(source, tokenizer, args, draw=False):
    """sdpo.py's; ValueError if the training questions, those with `draw`, have no solutions."""
    if source is None:
        raise ValueError("--data is required: questions with a worked `solution` beside the answer")
    questions = sdpo_questions(source, tokenizer, args, draw)
    bare = sum(str(q.get("solution", "")).strip() in ("", q["answer"]) for q in questions)
    if draw and bare:
        raise ValueError(f"--data {source}: {bare:,} of {len(questions):,} questions have no "
                         "`solution`, or one that is only the answer")
    if args.teacher_thinking and questions[0]["prompt_ids"] == sdpo.render(
            tokenizer, questions[0]["messages"], enable_thinking=True):
        raise ValueError("--teacher_thinking: the student thinks too (add --no-enable_thinking), "
                         f"or the chat template of {args.model} cannot switch thinking off")
    return questions

def set_teacher_prompts(group, tokenizer, rng, args):
    """The prompt of each rollout's teacher: the question with the data's solution."""
    for r in group:
        messages = sdpo.teacher_messages(
            r.question["messages"], r.question["solution"], args.demonstration)
        r.teacher_prompt_ids = sdpo.render(
            tokenizer, messages, args.enable_thinking or args.teacher_thinking)

def update(model, teacher, optimizer, rollouts, lr, args):
    """sdpo.py's, on copies of the rollouts cut after --loss_tokens; the log has the whole ones."""
    cut = [replace(r, response_ids=r.response_ids[: args.loss_tokens],
                   logprobs=r.logprobs[: args.loss_tokens]) for r in rollouts]
    return sdpo_update(model, teacher, optimizer, cut, lr, args)

def main():
    sdpo.make_parser = make_parser
    sdpo.read_questions = read_questions
    sdpo.set_teacher_prompts = set_teacher_prompts
    sdpo.update = update
    sdpo.main()

if __name__ == "__main__":
    main()
