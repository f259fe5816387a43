"""Pretrain the toy model from scratch on the traces of problems.py.

    python toy/pretrain.py          # about 10 minutes on two cores; writes toy/model

An ordinary supervised loop: AdamW, linear decay, loss on the answer only, bf16 autocast. The result
is a plain Hugging Face folder: a Qwen3 of 1M parameters with float16 weights (2 MB), *untied*
embeddings (vLLM on CPU cannot refresh tied ones), a byte-level BPE and Qwen3's chat format.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
from problems import SPLITS, pretraining_example
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
CHAT_TEMPLATE = (  # Qwen3's, without tools
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def draw(rng):
    """Long searches are rarer in pretraining than short ones: that makes them hard."""
    low, high = rng.choices(list(SPLITS.values()), [6, 4, 3])[0]
    return pretraining_example(rng, low, high)


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
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, show_progress=False,
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


def batches(rng, tokenizer, tokens_per_batch):
    """Endless batches (ids, labels), each of answers of nearly one length, right-padded."""
    while True:
        rows = []
        for _ in range(2000):
            user, answer = draw(rng)
            prompt = tokenizer.apply_chat_template(
                [dict(role="user", content=user)], add_generation_prompt=True, tokenize=False
            )
            p = tokenizer.encode(prompt, add_special_tokens=False)
            y = tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)
            rows.append((p + y, len(p)))
        rows.sort(key=lambda r: len(r[0]))
        group, groups = [], []
        for r in rows:
            if (len(group) + 1) * len(r[0]) > tokens_per_batch:
                groups.append(group)
                group = []
            group.append(r)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            labels = torch.full((len(group), width), -100)
            for i, (row, n_prompt) in enumerate(group):
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, n_prompt : len(row)] = torch.tensor(row[n_prompt:])
            yield ids, labels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--tokens_per_batch", type=int, default=6144)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
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
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    # "Wait," or "Check.": to stop or not is one token in twenty, and the last thing that is learned
    decisions = torch.tensor([tokenizer.convert_tokens_to_ids(f"Ġ{w}") for w in ("Wait", "Check")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.95))
    start, seen = time.time(), 0
    for step, (ids, labels) in enumerate(batches(rng, tokenizer, args.tokens_per_batch)):
        if step == args.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * (1 - step / args.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids).last_hidden_state  # (B, T, D)
            target = labels[:, 1:]
            keep = target != -100
            logits = model.lm_head(hidden[:, :-1][keep])
        loss = torch.nn.functional.cross_entropy(logits.float(), target[keep], reduction="none")
        weight = 1 + 4 * torch.isin(target[keep], decisions)
        loss = (loss * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += ids.numel()
        if step % 25 == 24:
            rate = seen / (time.time() - start)
            print(f"step {step + 1:4d}/{args.steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s", flush=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
