"""How uncertain does a response sound to a language model?  The judge of App. B.5, Table 5.

The paper checks its ten words by having GPT-5.4 count expressions of uncertainty. This asks any
OpenAI-compatible server (its key in OPENAI_API_KEY), such as `vllm serve MODEL`:

    python -m extras.judge runs/sdpo/eval/step_*.jsonl --url http://localhost:8000/v1 --model NAME

The counts of eval/step_10.jsonl go to eval/step_10.judged as they come; started again, it asks only
for those that are missing: a count belongs to one judge and one text. Then a table: each file's
mean (Table 5) and quartiles (Figure 13). Needs `pip install openai`.
"""
import argparse
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

def read_count(reply):
    """The last count in the judge's reply, after its think part; None without one."""
    answer = reply.rpartition("</think>")[2]  # JSON with prose around it, or with LaTeX, not JSON
    counts = re.findall(r"""["']count["']\s*:\s*([0-9]{1,6})(?:\.0)?\s*[,}]""", answer)
    return int(counts[-1]) if counts else None

def ask(client, model, text):
    """(count, reply) of the judge for a response; (None, None) if the server refuses the text."""
    from openai import BadRequestError
    messages = [dict(role="system", content=JUDGE_PROMPT),
                dict(role="user", content=text.encode(errors="replace").decode())]
    try:
        response = client.chat.completions.create(model=model, messages=messages)
    except BadRequestError:  # too long, or refused: the other texts are asked
        return None, None
    reply = response.choices[0].message.content or ""
    return read_count(reply), reply

def judge_file(path, client, args):
    """The counts of a file's responses, in order of size; asks where .judged has none."""
    texts, keys = {}, []  # {hash of judge and text: text}; the hash of each response
    for responses in epistemic.read_lines(path, lambda r: epistemic.responses_of(r, args.field)):
        for text in responses:
            asked = f"{args.model}\n{JUDGE_PROMPT}{text}".encode(errors="surrogatepass")
            keys.append(hashlib.sha256(asked).hexdigest()[:16])
            texts[keys[-1]] = text
    target = Path(path).with_suffix(".judged")
    # a killed run may leave half a row at the end
    *rows, half_row = (target.read_bytes() if target.exists() else b"").split(b"\n")
    judged = {row["hash"]: row["count"] for row in map(json.loads, rows)}
    missing = [key for key in texts if key not in judged]
    with open(target, "ab") as file, ThreadPoolExecutor(8) as pool:
        file.truncate(file.tell() - len(half_row))
        replies = pool.map(lambda key: ask(client, args.model, texts[key]), missing)
        for key, (count, reply) in zip(missing, tqdm(replies, path, len(missing), disable=None)):
            if count is not None:
                judged[key] = count
                row = dict(model=args.model, hash=key, count=count, reply=reply)
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
    counts = sorted(judged[key] for key in keys if key in judged)
    print(f"{path}: {len(counts):,} of {len(keys):,} responses have a count")
    if not counts:
        raise ValueError(f"{path}: the judge has given no count; started again, it is asked again")
    return counts

def main():
    parser = argparse.ArgumentParser(
        description="Table 5: uncertainty as a language model counts it.", usage=argparse.SUPPRESS)
    parser.add_argument("files", nargs="+", help="JSON Lines with a response or a list of them")
    parser.add_argument("--url", required=True, help="of an OpenAI-compatible server, with /v1")
    parser.add_argument("--model", required=True, help="the judge's name there")
    parser.add_argument("--field", help="of the responses, where epistemic.py does not know it")
    args = parser.parse_args()
    key = os.environ.get("OPENAI_API_KEY") or "none"
    try:
        from openai import OpenAI
        client = OpenAI(base_url=args.url, api_key=key, max_retries=6, timeout=300)
        counts = [judge_file(path, client, args) for path in args.files]
    except Exception as error:  # openai, which may be missing, has classes of its own
        parser.error(" ".join(str(error).split()).replace(key, "***"))
    spread = [" ".join(str(c[round(q / 4 * (len(c) - 1))]) for q in range(5)) for c in counts]
    rows = [("mean (Table 5)", [f"{sum(c) / len(c):.2f}" for c in counts]),
            ("least, quartiles, most", spread), ("responses", [f"{len(c):,}" for c in counts])]
    print(f"uncertainty expressions per response, as {args.model} counts (App. B.5)\n\n"
          f"{epistemic.grid(args.files, rows, 28)}")

if __name__ == "__main__":
    main()
