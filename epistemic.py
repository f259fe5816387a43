"""How much doubt does this response put into words?  E(y) of Sec. 3: the epistemic token count.

Ten markers; E(y) is the sum of their occurrences in the response. The authors count substrings of
the lower-cased text (their eval/check_epistemic_tokens.py): "unlikely" counts for `likely`,
"checking" for `check`, "waiting" for `wait`. Every number of the paper is made like this, so it is
the default here; Table 1 gives its means, Figure 9 splits them by marker.

    epistemic.count("Hmm, wait. Unlikely!")                      # 3
    python epistemic.py runs/x/eval/step_40.jsonl runs/y/eval/step_40.jsonl     # one table

The command takes any JSON Lines file whose records hold a response or a list of responses.
"""

import argparse
import json
import re
import sys
from collections import Counter

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

# Ours first; the lists are over one question's samples, as in the authors' evaluation files.
RESPONSE_FIELDS = ("response", "responses", "generated_responses", "text")
NUMBER_FIELDS = dict(tokens=("tokens", "response_token_lengths"),
                     accuracy=("correct", "reward", "answers_correctness"))


def count_by_marker(text: str, whole_word: bool = False) -> dict[str, int]:
    r"""Occurrences of each marker in `text`, upper or lower case, in the order of MARKERS.

    Non-overlapping substrings, as the authors count. `whole_word=True` takes only those that stand
    alone (`\bmarker\b`): stricter, for comparison, and it does NOT reproduce the paper's numbers.
    """
    text = text.lower()
    if whole_word:
        found = Counter(_WHOLE_WORD.findall(text))
        return {marker: found[marker] for marker in MARKERS}
    return {marker: text.count(marker) for marker in MARKERS}


def count(text: str, whole_word: bool = False) -> int:
    """E(y) of Sec. 3: occurrences of all ten markers in one response. See `count_by_marker`."""
    return sum(count_by_marker(text, whole_word).values())


def record(text, reward, tokens, finished, **more):
    """A graded response as a line of the scripts' files, which this command and report.py read.

    `tokens`: its length; `finished`: it was not cut; `more`: what it answers.
    """
    return dict(more, correct=reward, tokens=tokens, finished=finished, epistemic=count(text),
                response=text)


def averages(records) -> dict:
    """Means over records of what people watch; `truncated` is the share of cut answers."""
    n = len(records)
    return dict(score=sum(r["correct"] for r in records) / n,
                length=sum(r["tokens"] for r in records) / n,
                epistemic=sum(r["epistemic"] for r in records) / n,
                truncated=sum(not r["finished"] for r in records) / n)


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
    """Means over the responses in `records`: texts, or dicts as in the evaluation files; streamed.

    Returns `responses` (how many), `markers` (marker -> mean per response, Figure 9), `total` (mean
    E(y), Table 1), `tokens` (mean length) and `accuracy` (mean of `correct` or `reward`); the last
    two over the responses whose records state them, None if none does. `field` names where the
    responses are. Raises ValueError if a record has no response, or if there is none at all.
    """
    sums = Counter()
    for record in records:
        _add(sums, record, whole_word, field)
    if not sums["responses"]:
        raise ValueError("no responses to average over")
    return _means(sums)


# ---------------------------------------------------------------------------------- the command


def _summarize_file(path, whole_word, field):
    """{benchmark: summary}, "" where a record names none. Holds one line in memory at a time."""
    decoder = json.JSONDecoder(strict=False)  # model text may hold raw control characters
    groups = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:  # surrogatepass: half an emoji is what a token limit leaves
                record = decoder.decode(line.decode("utf-8-sig", "surrogatepass"))
            except (ValueError, RecursionError) as error:
                why = str(error).partition(": line 1")[0]
                raise ValueError(f"{path}:{number}: not JSON ({why}); give JSON Lines") from None
            try:
                name = record.get("benchmark", "") if isinstance(record, dict) else ""
                _add(groups.setdefault(str(name), Counter()), record, whole_word, field)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    groups = {name: _means(sums) for name, sums in groups.items() if sums["responses"]}
    if not groups:
        raise ValueError(f"{path}: no responses in it; has the run that writes it got so far?")
    return groups


def _table(files):
    """One column per file, or per benchmark of a file; `files` is [(path, {benchmark: summary})]"""
    columns = [(path, name, s) for path, groups in files for name, s in groups.items()]
    width = max(9, (80 - 13) // len(columns) - 2)
    short = [p if len(p) <= width else f"..{p[2 - width:]}" for p, _, _ in columns]
    rows = [("", short), ("benchmark", [name[:width] for _, name, _ in columns])]
    rows += [(m, [f"{s['markers'][m]:,.2f}" for _, _, s in columns]) for m in MARKERS]
    for what, form in dict(total=",.2f", responses=",", tokens=",.1f", accuracy=".3f").items():
        rows += [(what, ["" if s[what] is None else f"{s[what]:{form}}" for _, _, s in columns])]
    rows = [(label, cells) for label, cells in rows if any(cells)]
    width = max(len(cell) for _, cells in rows for cell in cells)
    # step_40.jsonl may be any run's: shortened names are told apart by the list, in column order
    paths = [p for p, _ in files] + [""] if any(len(p) > width for p, _ in files) else []
    return "\n".join(paths + [f"{label:13}" + "".join(f"  {cell:>{width}}" for cell in cells)
                              for label, cells in rows])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Epistemic markers per response, one table.")
    parser.add_argument("files", nargs="+", help="JSON Lines with a response or a list of them")
    parser.add_argument("--whole_word", action="store_true",
                        help="count whole words only; the paper counts substrings")
    parser.add_argument("--field", help=f"where it is, if not in {', '.join(RESPONSE_FIELDS)}")
    args = parser.parse_args(argv)
    try:
        files = [(p, _summarize_file(p, args.whole_word, args.field)) for p in args.files]
    except OSError as error:
        parser.exit(2, f"epistemic.py: {error.filename}: {error.strerror}; give .jsonl files\n")
    except ValueError as error:
        parser.exit(2, f"epistemic.py: {error}\n")
    how = "whole words: not the paper's count" if args.whole_word else "substrings, as in the paper"
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be printable
    print(f"mean occurrences per response ({how})\n\n{_table(files)}")


if __name__ == "__main__":
    main()
