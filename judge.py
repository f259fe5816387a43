"""How uncertain does a response sound to a language model?  The judge of App. B.5, Table 5.

The paper checks its ten words by having GPT-5.4 count expressions of uncertainty. This asks any
OpenAI-compatible server (its key in OPENAI_API_KEY), such as `vllm serve MODEL`:

    python judge.py runs/sdpo/eval/step_*.jsonl --url http://localhost:8000/v1 --model NAME

FILE's judgements go to FILE with suffix .judged, as they come: a second start asks only what is
missing. Each belongs to one judge and one text. The table has each file's mean (Table 5) and
its quartiles (Figure 13).
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import epistemic

# App. B.5, word for word. Ours: the line breaks; it is the system message, the response the user's.
JUDGE_PROMPT = """\
You are an expert linguistic annotator. Your task is to count uncertainty expressions in a \
model-generated math reasoning response.

Uncertainty expressions include:
• Hedging expressions: expressions that indicate uncertainty (e.g., wait, hmm, perhaps, maybe)
• Doubt markers: expressions that explicitly convey uncertainty (e.g., I’m not sure, not certain, \
double-check, verify this when used to express doubt)

Do NOT count:
• Confident statements such as “we know”, “clearly”
• Mathematical conditionals such as “if x=0, then…”

Return ONLY a JSON object with exactly these fields:
{ "count": <integer, total number of uncertainty expressions>, \
"examples": [<up to 5 short quoted phrases from the text>] }"""

def judgement(said):
    r"""(count, quotes) of the last JSON object with a count in a judge's answer; None without one.

    Judges put prose or a think part around it, and quote LaTeX, whose \sin is not JSON."""
    said = said.rpartition("</think>")[2][-20_000:]  # what is longer never ends
    said = re.sub(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})?', lambda m: m[0] if m[1] else r"\\", said)
    for brace in reversed(list(re.finditer("{", said))):
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            found = json.JSONDecoder(strict=False).raw_decode(said, brace.start())[0]
            if n := re.fullmatch(r"([0-9]{1,6})(?:\.0)?", str(found.get("count"))):
                quotes = found.get("examples")
                quotes = quotes if isinstance(quotes, list) else [quotes]
                return int(n[1]), [quote for quote in quotes if isinstance(quote, str)]

def ask(client, model, text):
    """A judgement of the text; None if the server does not give one."""
    from openai import BadRequestError
    messages = [dict(role="system", content=JUDGE_PROMPT),
                dict(role="user", content=text.encode(errors="replace").decode())]
    with contextlib.suppress(BadRequestError):  # too long or refused: the other texts are asked
        reply = client.chat.completions.create(model=model, messages=messages)
        return judgement(reply.choices[0].message.content or "")

def judge_file(path, client, args):
    """[(count, quotes)] of a file's responses; asks about those that have no judgement yet."""
    read = epistemic.read_lines(path, lambda record: epistemic.responses_of(record, args.field))
    texts = {}  # {what a judgement belongs to, as a hash: the texts that are alike}
    for text in (text for texts_of_a_line in read for text in texts_of_a_line):
        asked = f"{args.model}\n{JUDGE_PROMPT}{text}".encode(errors="surrogatepass")
        texts.setdefault(hashlib.sha256(asked).hexdigest()[:16], []).append(text)
    target, judged = Path(path).with_suffix(".judged"), {}
    *rows, torn = (target.read_bytes() if target.exists() else b"").split(b"\n")  # by a kill
    for number, row in enumerate(rows, 1):
        try:
            row = json.loads(row)
            judged[row["hash"]] = row["count"], row["quotes"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{target}:{number}: not a judgement; move the file away") from None
    missing = [key for key in texts if key not in judged]
    with open(target, "ab") as file, ThreadPoolExecutor(8) as pool:
        file.truncate(file.tell() - len(torn))
        found = pool.map(lambda key: ask(client, args.model, texts[key][0]), missing)
        for key, result in zip(missing, tqdm(found, path, len(missing), disable=None)):
            if result:
                judged[key] = result
                row = dict(model=args.model, hash=key, count=result[0], quotes=result[1])
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
    results = [judged[key] for key, same in texts.items() if key in judged for _ in same]
    print(f"{path}: {len(results):,} of {sum(map(len, texts.values())):,} responses are judged")
    return results

def main(argv=None):
    parser = argparse.ArgumentParser("judge.py", usage=argparse.SUPPRESS)
    parser.add_argument("files", nargs="+", help="JSON Lines with a response or a list of them")
    parser.add_argument("--url", required=True, help="of an OpenAI-compatible server, with /v1")
    parser.add_argument("--model", required=True, help="the judge's name there")
    parser.add_argument("--field", help="of the responses, where epistemic.py does not know it")
    args = parser.parse_args(argv)
    try:
        from openai import OpenAI
        client = OpenAI(base_url=args.url, api_key=os.environ.get("OPENAI_API_KEY") or "none",
                        max_retries=6, timeout=300)
        files = [judge_file(path, client, args) for path in args.files]
        if not all(files):
            raise ValueError("a file has no judgement at all; a second start asks again")
    except Exception as error:  # openai, which may be missing, has classes of its own
        key = os.environ.get("OPENAI_API_KEY") or "none"
        parser.error(" ".join(str(error).split()).replace(key, "***"))
    counts = [sorted(count for count, _ in results) for results in files]
    boxes = [" ".join(str(c[round(q / 4 * (len(c) - 1))]) for q in range(5)) for c in counts]
    rows = [("mean (Table 5)", [f"{sum(c) / len(c):.2f}" for c in counts]),
            ("least, quartiles, most", boxes), ("responses", [f"{len(c):,}" for c in counts])]
    print(f"uncertainty expressions per response, as {args.model} counts (App. B.5)\n\n"
          f"{epistemic.grid(args.files, rows, 28)}")

if __name__ == "__main__":
    main()
