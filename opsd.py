"""OPSD, self-distillation with the data's own solution: App. E and Figure 15 of the paper.

On top of sdpo.py. What is replaced there:
  - c is the `solution` that the data has beside the answer, for every rollout, right or wrong
  - --loss_tokens: the loss is on the first tokens of each answer only
  - --teacher_thinking, App. E's hybrid: the teacher's prompt has thinking on, the student's off
  - batch size and learning rate are OPSD's, a tenth of SDPO's

    torchrun --nproc_per_node 8 opsd.py --model Qwen/Qwen3-1.7B --data solved.jsonl \\
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
    parser.description = "OPSD (App. E) on top of sdpo.py. The other defaults are SDPO's."
    parser.add_argument("--loss_tokens", type=sdpo.number(int, 1), default=1024,
                        help="of each answer, from its start, have a loss")
    parser.add_argument("--teacher_thinking", action="store_true",
                        help="hybrid: with --no-enable_thinking only the student does not think")
    parser.set_defaults(run_dir="runs/opsd", questions_per_step=32, minibatch_questions=32, lr=1e-6)
    return parser

def read_questions(source, tokenizer, args):
    """sdpo.py's; raises ValueError where the training questions do not allow what the flags ask."""
    questions = sdpo_questions(source, tokenizer, args)
    without, first = sum("solution" not in q for q in questions), questions[0]
    if source == args.data and without:
        raise ValueError(f"--data {source}: {without:,} of {len(questions):,} questions have no "
                         "`solution` text beside their answer")
    if args.teacher_thinking and first["prompt_ids"] == sdpo.render(
            tokenizer, first["messages"], enable_thinking=True):
        raise ValueError("--teacher_thinking: the student thinks too (add --no-enable_thinking), "
                         f"or the chat template of {args.model} cannot switch thinking off")
    return questions

def set_teacher_prompts(question, group, tokenizer, rng, args):
    """The prompt of each rollout's teacher: the question with the data's solution."""
    messages = sdpo.teacher_messages(
        question["messages"], question["solution"], args.demonstration)
    for r in group:
        r.teacher_prompt_ids = sdpo.render(
            tokenizer, messages, args.enable_thinking or args.teacher_thinking)

def update(ddp, teacher, optimizer, rollouts, lr):
    """sdpo.py's, on copies of the rollouts that end after --loss_tokens; the log has the whole."""
    end = ddp.module.args.loss_tokens
    cut = [replace(r, response_ids=r.response_ids[:end], logprobs=r.logprobs[:end])
           for r in rollouts]
    return sdpo_update(ddp, teacher, optimizer, cut, lr)

REPLACED = dict(make_parser=make_parser, read_questions=read_questions,
                set_teacher_prompts=set_teacher_prompts, update=update)

def main():
    vars(sdpo).update(REPLACED)
    sdpo.main()

if __name__ == "__main__":
    main()
