"""How much doubt does this response put into words?  E(y) of Sec. 3: the epistemic token count.

Ten markers; E(y) is the sum of their occurrences in the response. The authors count substrings of
the lower-cased text (their eval/check_epistemic_tokens.py): "unlikely" counts for `likely`. So are
all numbers of the paper made: Table 1 gives the means, Figure 9 splits them by marker.

    epistemic.count("Hmm, wait. Unlikely!")                      # 3
    python epistemic.py runs/x/eval/step_40.jsonl runs/y/eval/step_40.jsonl     # one table

The command takes any JSON Lines file whose records hold a response or a list of responses. With
`--judge URL --judge_model NAME` an OpenAI-compatible server counts, by App. B.5's prompt (Table 5).
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MARKERS = ("wait", "hmm", "perhaps", "maybe", "actually",
           "alternatively", "seems", "might", "likely", "check")  # Sec. 3, in its order
# `\bwait\b` with its first test last: twice as fast, since the search can look for a letter.
_WHOLE_WORD = re.compile("|".join(rf"{marker}(?<!\w{marker})\b" for marker in MARKERS))

# App. B.5, word for word (line breaks ours); their judge was GPT-5.4. How the response follows is
# not printed: send this as the system message and the response, alone, as the user's.
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
JUDGE_TIMEOUT = 300.0  # s for a request; it is tried again after 0.5, 1, ... 8 s or as told

# Ours first; the lists are over one question's samples, as in the authors' evaluation files.
RESPONSE_FIELDS = ("response", "responses", "generated_responses", "text")
NUMBER_FIELDS = dict(tokens=("tokens", "response_token_lengths"),
                     accuracy=("correct", "reward", "answers_correctness"))
_JSON = json.JSONDecoder(strict=False)  # model text may hold raw control characters

def count_by_marker(text: str, whole_word: bool = False) -> dict[str, int]:
    """Occurrences of each marker, in any case: non-overlapping substrings, as the authors count.

    `whole_word=True` takes only those that stand alone; it does NOT give the paper's numbers.
    """
    text = text.lower()
    find = Counter(_WHOLE_WORD.findall(text)).__getitem__ if whole_word else text.count
    return {marker: find(marker) for marker in MARKERS}

def count(text: str, whole_word: bool = False) -> int:
    """E(y) of Sec. 3: occurrences of all ten markers in one response. See `count_by_marker`."""
    return sum(count_by_marker(text, whole_word).values())

def record(text, reward, tokens, finished, **more):
    """A graded response, cut if not `finished`, as a line that this command and report.py read."""
    return dict(more, correct=reward, tokens=tokens, finished=finished, epistemic=count(text),
                response=text)

def averages(records) -> dict:
    """Means over records of what people watch; `truncated` is the share of cut answers."""
    names = dict(score="correct", length="tokens", epistemic="epistemic")
    means = {name: sum(r[key] for r in records) / len(records) for name, key in names.items()}
    return dict(means, truncated=sum(not r["finished"] for r in records) / len(records))

def line(means) -> str:
    """`averages` for the screen."""
    return "score {score:.3f}  len {length:6,.0f}  epistemic {epistemic:5.1f}".format(**means)

def _responses(record, field):
    if isinstance(record, str):
        return [record]
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object that holds a response")
    name = field or next((name for name in RESPONSE_FIELDS if name in record), None)
    if name not in record:
        raise ValueError(f"no field {field or ' or '.join(RESPONSE_FIELDS)} among "
                         f"{str(list(record))[:200]}; name the responses' field with --field")
    texts = record[name] if isinstance(record[name], list) else [record[name]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"field {name} is not text or a list of texts; name another with --field")
    return texts

def _add(sums, record, whole_word, field):
    texts = _responses(record, field)
    sums["responses"] += len(texts)
    for text in texts:
        sums.update(count_by_marker(text, whole_word))
    for what, names in NUMBER_FIELDS.items() if isinstance(record, dict) else ():
        value = next((record[name] for name in names if name in record), None)
        values = value if isinstance(value, list) else [value]
        # One number for several responses may be their sum or their mean: left out.
        if len(values) == len(texts) and all(isinstance(v, (int, float)) for v in values):
            sums[what] += sum(values)
            sums[what, "known"] += len(values)

def _means(sums):
    n = sums["responses"]
    numbers = {w: sums[w] / sums[w, "known"] if sums[w, "known"] else None for w in NUMBER_FIELDS}
    return dict(responses=n, markers={marker: sums[marker] / n for marker in MARKERS},
                total=sum(sums[marker] for marker in MARKERS) / n, **numbers)

def summarize(records, whole_word: bool = False, field: str | None = None) -> dict:
    """Means over the responses in `records`, texts or lines as `record` makes them; streamed.

    `responses`: how many; `markers`: Figure 9; `total`: E(y), Table 1; `tokens` and `accuracy` over
    those that state them, else None. ValueError for a record without a response, or for none.
    """
    sums = Counter()
    for record in records:
        _add(sums, record, whole_word, field)
    if not sums["responses"]:
        raise ValueError("no responses to average over")
    return _means(sums)

def _lines(path, use):
    """use(record) of every line, errors with its number. Holds one line in memory at a time."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:  # surrogatepass: half an emoji is what a token limit leaves
                record = _JSON.decode(line.decode("utf-8-sig", "surrogatepass"))
            except (ValueError, RecursionError) as error:
                why = str(error).partition(": line 1")[0]
                raise ValueError(f"{path}:{number}: not JSON ({why}); give JSON Lines") from None
            try:
                yield use(record)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None

def _summarize_file(path, whole_word, field):
    """{benchmark: summary}, "" where a record names none."""
    groups = {}

    def add(record):
        name = record.get("benchmark", "") if isinstance(record, dict) else ""
        _add(groups.setdefault(str(name), Counter()), record, whole_word, field)
    list(_lines(path, add))
    groups = {name: _means(sums) for name, sums in groups.items() if sums["responses"]}
    if not groups:
        raise ValueError(f"{path}: no responses in it; has the run that writes it got so far?")
    return groups

def _grid(paths, rows, left=13):
    """A table with a column for each path, from rows of (label, cells)."""
    width = max(9, (80 - left) // len(paths) - 2)
    short = [p if len(p) <= width else f"..{p[2 - width:]}" for p in paths]
    rows = [(label, cells) for label, cells in [("", short), *rows] if any(cells)]
    width = max(len(cell) for _, cells in rows for cell in cells)
    # step_40.jsonl may be any run's: shortened names are told apart by the list, in column order
    above = [*dict.fromkeys(paths), ""] if any(len(p) > width for p in paths) else []
    return "\n".join(above + [f"{label:{left}}" + "".join(f"  {cell:>{width}}" for cell in cells)
                              for label, cells in rows])

def _table(files):
    """One column per file, or per benchmark of a file; `files` is [(path, {benchmark: summary})]"""
    columns = [(path, name, s) for path, groups in files for name, s in groups.items()]
    rows = [("benchmark", [name[:max(9, 67 // len(columns) - 2)] for _, name, _ in columns])]
    rows += [(m, [f"{s['markers'][m]:,.2f}" for _, _, s in columns]) for m in MARKERS]
    for what, form in dict(total=",.2f", responses=",", tokens=",.1f", accuracy=".3f").items():
        rows += [(what, ["" if s[what] is None else f"{s[what]:{form}}" for _, _, s in columns])]
    return _grid([path for path, _, _ in columns], rows)

# ------------------------------------------------------------------------- the judge (App. B.5)

def judgement(said):
    r"""(count, expressions) of the last JSON object with a count in a judge's answer, else None.

    Judges put prose, ``` or a think part around it, and quote LaTeX, whose \sin is no JSON.
    """
    said = said.rpartition("</think>")[2][-20_000:]  # what is longer never ends
    said = re.sub(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})?', lambda m: m[0] if m[1] else r"\\", said)
    for brace in reversed(list(re.finditer("{", said))):
        with contextlib.suppress(ValueError, RecursionError):
            found = _JSON.raw_decode(said, brace.start())[0]
            quotes = found.get("examples")
            if n := re.fullmatch(r"([0-9]{1,6})(?:\.0)?", str(found.get("count"))):
                quotes = quotes if isinstance(quotes, list) else [quotes]
                return int(n[1]), [quote for quote in quotes if isinstance(quote, str)]

def _ask(client, model, text):
    """A judgement, or why this text gets none. Sampling is the server's: the paper names none."""
    from openai import APIResponseValidationError, BadRequestError, OpenAIError
    messages = [dict(role="system", content=JUDGE_PROMPT),
                dict(role="user", content=text.encode(errors="replace").decode())]
    for _ in range(3):
        try:
            reply = client.chat.completions.create(model=model, messages=messages)
            if found := judgement(reply.choices[0].message.content):
                return found
        except (AttributeError, LookupError, TypeError, ValueError, APIResponseValidationError):
            continue  # not as the protocol has it
        except OpenAIError as error:
            why = " ".join(str(error).replace(client.api_key, "***").split())[:300]
            if isinstance(error, BadRequestError):  # too long or refused: others may be answered
                return why
            raise ValueError(f"the judge: {why}; what it has judged is kept") from None
    return "it says no JSON object with a count"

def _judge(path, args, client):
    """[(count, expressions)] of a file's responses; asks about those that are new."""
    places, target = {}, Path(path).with_suffix(".judged.jsonl")  # {hash: (text, its indices)}
    texts = (t for ts in _lines(path, lambda record: _responses(record, args.field)) for t in ts)
    for i, text in enumerate(texts):
        asked = (JUDGE_PROMPT + text).encode("utf-8", "surrogatepass")
        places.setdefault(hashlib.sha256(asked).hexdigest()[:16], (text, []))[1].append(i)
    judged = {key: (0, []) for key, (text, _) in places.items() if not text.strip()}
    *old, torn = (target.read_bytes() if target.exists() else b"").split(b"\n")  # by a kill
    try:
        rows = [r for r in map(json.loads, old) if r["model"] == args.judge_model]
        judged |= {r["hash"]: (r["count"], r["expressions"]) for r in rows}
        written = {(r["hash"], r["index"]) for r in rows}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{target}: holds something else than judgements; move it away") from None
    todo = [JUDGE_PROMPT + text for key, (text, _) in places.items() if key not in judged]
    tokens = sum(map(len, todo)) // 4  # ours: 4 characters each
    print(f"{path}: {len(todo):,} requests, about {tokens:,} tokens to read", flush=True)
    if args.dry_run:
        return print("", *todo[:1], sep="\n")
    def judge(key):
        found = judged.get(key) or _ask(client, args.judge_model, places[key][0])
        if isinstance(found, str):
            return found
        row = dict(model=args.judge_model, expressions=found[1], count=found[0], hash=key)
        file.write(b"".join(json.dumps(dict(index=i, **row)).encode() + b"\n"
                            for i in places[key][1] if (key, i) not in written))
        file.flush()
        judged[key] = found
    with open(target, "ab") as file, ThreadPoolExecutor(args.concurrency) as pool:
        file.truncate(file.tell() - len(torn))
        failed = [why for why in pool.map(judge, places) if why]  # an exception calls off the rest
    if failed:
        print(f"{path}: {len(failed):,} not judged, as {failed[0]!r}; another start asks again")
    if not places.keys() & judged:
        raise ValueError(f"{path}: no response of it is judged")
    return [judged[key] for key, (_, at) in places.items() if key in judged for _ in at]

def _judge_files(args):
    """Table 5's mean, Figure 13's box, and what the judge quoted most often, per response."""
    address = re.fullmatch(r"https?://([\w.-]+|\[[0-9a-f:]+\])(:[0-9]+)?(/[\w./~-]*)?", args.judge)
    if not address or not args.judge_model or args.concurrency < 1:
        raise ValueError("--judge needs a URL (http://host:8000/v1), --judge_model, concurrency")
    if args.dry_run:
        return [_judge(path, args, None) for path in args.files]
    from openai import OpenAI
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none is set"
    client = OpenAI(base_url=args.judge, api_key=key, max_retries=6, timeout=JUDGE_TIMEOUT)
    judged = [_judge(path, args, client) for path in args.files]
    counts = [[n for n, _ in file] for file in judged]
    boxes = [[sorted(c)[round(q / 4 * (len(c) - 1))] for q in range(5)] for c in counts]
    quotes = [Counter(q.lower().strip(" .,:;!?…\"'“”") for _, qs in f for q in qs) for f in judged]
    rows = [("mean (Table 5)", [f"{sum(c) / len(c):.2f}" for c in counts]),
            ("least, quartiles, most", [" ".join(map(str, box)) for box in boxes]),
            ("responses", [f"{len(c):,}" for c in counts])]
    rows += [(f"“{quote[:24]}”", [f"{q[quote] / len(c):.2f}" for q, c in zip(quotes, counts)])
             for quote, _ in sum(quotes, Counter()).most_common(20)]
    print(f"\nuncertainty expressions per response, as {args.judge_model} counts (App. B.5)\n\n"
          f"{_grid(args.files, rows, 28)}")

def main(argv=None):
    parser = argparse.ArgumentParser(description="Epistemic markers per response, one table.")
    add = parser.add_argument
    add("files", nargs="+", help="JSON Lines with a response or a list of them")
    add("--whole_word", action="store_true", help="whole words only; the paper counts substrings")
    add("--field", help=f"where it is, if not in {', '.join(RESPONSE_FIELDS)}")
    add("--judge", metavar="URL", help="have an OpenAI-compatible server count (App. B.5), its key "
        "in OPENAI_API_KEY; FILE's judgements go to FILE with suffix .judged.jsonl")
    add("--judge_model", metavar="NAME", help="what the judge is called there")
    add("--dry_run", action="store_true", help="say what --judge would ask; ask nothing")
    add("--concurrency", type=int, default=8, help="requests to the judge at a time")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be printable
    try:
        if args.judge is not None:
            return _judge_files(args)
        files = [(p, _summarize_file(p, args.whole_word, args.field)) for p in args.files]
    except OSError as error:
        parser.exit(2, f"epistemic.py: {error.filename}: {error.strerror}; give .jsonl files\n")
    except ValueError as error:
        parser.exit(2, f"epistemic.py: {error}\n")
    how = "whole words: not the paper's count" if args.whole_word else "substrings, as in the paper"
    print(f"mean occurrences per response ({how})\n\n{_table(files)}")

if __name__ == "__main__":
    main()
