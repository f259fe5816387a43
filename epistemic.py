"""How much doubt does a response put into words?  E(y) of Sec. 3: the epistemic token count.

Ten markers; E(y) is the sum of their occurrences in the response. The authors count substrings of
the lower-cased text (their eval/check_epistemic_tokens.py): "unlikely" counts for `likely`. All
numbers of the paper are made so: Table 1 gives the means, Figure 9 splits them by marker.

    epistemic.count("Hmm, wait. Unlikely!")                      # 3
    python epistemic.py runs/x/eval/step_40.jsonl runs/y/eval/step_40.jsonl     # one table

The command takes any JSON Lines files whose records hold a response or a list of responses, such as
a model's answers before and after training.
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

def record(rollout, **more):
    """A graded rollout as a line of a file, which this command and report.py read."""
    return dict(more, correct=rollout.reward, tokens=len(rollout.response_ids),
                finished=rollout.finished, epistemic=count(rollout.text), response=rollout.text)

def averages(records) -> dict:
    """Means over records of what people watch; `truncated` is the share of cut answers."""
    names = dict(score="correct", length="tokens", epistemic="epistemic")
    means = {name: sum(r[key] for r in records) / len(records) for name, key in names.items()}
    return dict(means, truncated=sum(not r["finished"] for r in records) / len(records))

def line(means) -> str:
    """`averages` for the screen."""
    return "score {score:.3f}  len {length:,.0f}  epistemic {epistemic:.1f}".format(**means)

def responses_of(record, field):
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
    texts = responses_of(record, field)
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

def read_lines(path, use):
    """use(record) of every line; errors name its number. One line in memory at a time."""
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
    for _ in read_lines(path, add):
        pass
    groups = {name: _means(sums) for name, sums in groups.items() if sums["responses"]}
    if not groups:
        raise ValueError(f"{path}: no responses in it; has the run that writes it got so far?")
    return groups

def grid(paths, rows, left=13):
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
    return grid([path for path, _, _ in columns], rows)

def main(argv=None):
    parser = argparse.ArgumentParser(description="Epistemic markers per response, one table.",
                                     usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("files", nargs="+", help="JSON Lines with a response or a list of them")
    add("--whole_word", action="store_true", help="whole words only; the paper counts substrings")
    add("--field", help=f"where it is, if not in {', '.join(RESPONSE_FIELDS)}")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be printable
    try:
        files = [(p, _summarize_file(p, args.whole_word, args.field)) for p in args.files]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    how = "whole words, not the paper's count" if args.whole_word else "substrings, as in the paper"
    print(f"mean occurrences per response ({how})\n\n{_table(files)}")

if __name__ == "__main__":
    main()
