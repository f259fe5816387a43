"""Pretrain the toy model from scratch on the traces of problems.py.

    python toy/pretrain.py --out toy/model --overwrite    # about 16 minutes on two cores
    python toy/pretrain.py --two_modes 0.5 --steps 200 --lr 1e-3 --out runs/two_modes   # goes on from it

An ordinary supervised loop: AdamW, linear decay, loss on the answer only. The result
is a plain Hugging Face folder: a Qwen3 of 1M parameters with float16 weights (2 MB), *untied*
embeddings (vLLM on CPU cannot refresh tied ones), a byte-level BPE and Qwen3's chat format.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
from problems import pretraining_example
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
HARD = 0.4  # share of long lists
CHAT_TEMPLATE = (  # Qwen3's, without tools
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def draw(rng, thinking=True):
    """Short lists and long ones: in a short one the first number mostly fits."""
    return pretraining_example(rng, rng.random() < HARD, thinking)


def make_tokenizer(rng):
    """A number is one token with and without a space before it: the space goes to the word."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\d{1,3}| ?[^\s\d]+ (?=\d)| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [re.sub("</?think>", "", "\n".join(draw(rng))) for _ in range(4000)]
    corpus += [" ".join(map(str, range(240)))] * 200  # every number that a trace can hold
    trainer = trainers.BpeTrainer(
        vocab_size=752, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
    )
    # not "special" as <|im_end|> is: decoding has to keep them
    fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def batch(rng, tokenizer, size, thinking_off):
    """(ids, targets) of `size` examples in four pieces by length, right-padded; -100: no loss.

    One step takes all: a step of one length only learns that length, and unlearns the others.
    """
    rows = []
    for _ in range(size):
        thinking = not thinking_off or rng.random() >= thinking_off
        user, answer = draw(rng, thinking)
        prompt = tokenizer.apply_chat_template([dict(role="user", content=user)], tokenize=False,
                                               add_generation_prompt=True, enable_thinking=thinking)
        p = tokenizer.encode(prompt, add_special_tokens=False)
        rows.append((p, tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    for i in range(0, size, size // 4):
        piece = rows[i : i + size // 4]
        ids = torch.zeros(len(piece), len(piece[-1][0]) + len(piece[-1][1]), dtype=torch.long)
        targets = torch.full_like(ids, -100)
        for j, (p, y) in enumerate(piece):
            ids[j, : len(p) + len(y)] = torch.tensor(p + y)
            targets[j, len(p) - 1 : len(p) + len(y) - 1] = torch.tensor(y)
        yield ids, targets


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--overwrite", action="store_true", help="--out may exist")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32, help="examples a step, a multiple of 4")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--two_modes", type=float, default=0, metavar="SHARE",
                        help="go on from toy/model, with thinking off in this share of the examples")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or Path(args.out).exists() and not args.overwrite:
        parser.error(f"--steps {args.steps} --out {args.out}: at least a step, into a new folder")
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(rng)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    if args.two_modes:  # then --seed is that of the examples alone
        folder = Path(__file__).parent / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    # the verdicts: one token in twenty, and the last thing that is learned
    decisions = torch.tensor([i for i in range(len(tokenizer))
                              if re.fullmatch(r" (yes|no)\W*", tokenizer.decode([i]))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    start, seen = time.time(), 0
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 50) * (1 - (step - 1) / args.steps)
        pieces = list(batch(rng, tokenizer, args.batch, args.two_modes))
        weights = [(t != -100) * (1 + 4 * torch.isin(t, decisions)) for _, t in pieces]
        total = sum(w.sum() for w in weights)
        optimizer.zero_grad()
        for (ids, targets), weight in zip(pieces, weights):
            keep = targets != -100
            logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[keep])
            loss = torch.nn.functional.cross_entropy(logits, targets[keep], reduction="none")
            ((loss * weight[keep]).sum() / total).backward()
            seen += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            rate = seen / (time.time() - start)
            print(f"step {step:4d}/{args.steps}  loss of the longest {loss.mean().item():.3f}  "
                  f"{rate:,.0f} tokens/s", flush=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
