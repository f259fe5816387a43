"""How much doubt does a response put into words?  E(y) of Sec. 3: the epistemic token count.

Ten markers; E(y) is the sum of their occurrences in the response. The authors count substrings of
the lower-cased text (their eval/check_epistemic_tokens.py): "unlikely" counts for `likely`. All
numbers of the paper are made so: Table 1 gives the means, Figure 9 splits them by marker.

    epistemic.count("Hmm, wait. Unlikely!")                      # 3
    python epistemic.py runs/x/eval/step_40.jsonl runs/y/eval/step_40.jsonl     # one table

The command takes any JSON Lines files whose records hold a response or a list of responses, such as
a model's answers before and after training. Reasoning that stands beside a response counts with it.
"""
import argparse
import json
from collections import Counter

MARKERS = ("wait", "hmm", "perhaps", "maybe", "actually",
           "alternatively", "seems", "might", "likely", "check")  # Sec. 3, in its order

RESPONSE_FIELDS = ("response", "responses", "generated_responses", "text", "completion", "messages")
TRACE_FIELDS = ("reasoning_content", "reasoning", "thinking")
NUMBER_FIELDS = dict(tokens=("tokens", "response_token_lengths"),
                     accuracy=("correct", "reward", "answers_correctness"))

def count_by_marker(text: str) -> dict[str, int]:
    """Occurrences of each marker, in any case: non-overlapping substrings, as the authors count."""
    text = text.lower()
    return {marker: text.count(marker) for marker in MARKERS}

def count(text: str) -> int:
    """E(y) of Sec. 3: occurrences of all ten markers in one response."""
    return sum(count_by_marker(text).values())

def record(rollout, **more):
    """A graded rollout as a line of a file, which this command and report.py read."""
    return dict(more, correct=rollout.reward, tokens=len(rollout.response_ids),
                finished=rollout.finished, epistemic=count(rollout.text), response=rollout.text)

def averages(records) -> dict:
    """Means over records of what people watch; `truncated` is the rate of cut answers."""
    names = dict(score="correct", length="tokens", epistemic="epistemic")
    means = {name: sum(r[key] for r in records) / len(records) for name, key in names.items()}
    return dict(means, truncated=sum(not r["finished"] for r in records) / len(records))

def line(means) -> str:
    """`averages` for the screen."""
    return "score {score:.3f}  len {length:,.0f}  epistemic {epistemic:.1f}".format(**means)

def trace_of(*places):
    """The reasoning that one of the places, a message or its row, keeps beside the response."""
    found = [place[field] for place in places for field in TRACE_FIELDS if field in place]
    return next((trace for trace in found if trace and isinstance(trace, (str, list))), "")

def with_trace(text, trace):
    """The response after its reasoning: alone it has few markers, like the paper's effect."""
    if not isinstance(trace, str) or not trace.strip() or "</think>" in text:
        return text
    return f"<think>\n{trace.strip()}\n</think>\n\n{text.lstrip()}"

def responses_of(record, field=None):
    """The texts of a record's responses; of a chat, that of its last message."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object that holds a response")
    name = field or next((name for name in RESPONSE_FIELDS if name in record), None)
    if name not in record:
        raise ValueError(f"no field {field or ' or '.join(RESPONSE_FIELDS)} among "
                         f"{str(list(record))[:200]}; name the responses' field with --field")
    texts, places = record[name] if isinstance(record[name], list) else [record[name]], [record]
    if texts and isinstance(texts[-1], dict):
        texts, places = [texts[-1].get("content")], [texts[-1], record]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"field {name} is not text or a list of texts; name another with --field")
    trace = trace_of(*places) or [""] * len(texts)
    traces = trace if isinstance(trace, list) else [trace]
    if len(traces) != len(texts):
        raise ValueError(f"{len(texts)} responses, but {len(traces)} with reasoning beside them")
    return [with_trace(*pair) for pair in zip(texts, traces)]

def measure(record, field=None):
    """Counter of a record's responses, their markers, tokens and grades."""
    texts = responses_of(record, field)
    sums = Counter(responses=len(texts))
    for text in texts:
        sums.update(count_by_marker(text))
    for what, names in NUMBER_FIELDS.items():
        value = next((record[name] for name in names if name in record), None)
        values = value if isinstance(value, list) else [value]
        # One number for several responses may be their sum or their mean: left out.
        if len(values) == len(texts) and all(isinstance(v, (int, float)) for v in values):
            sums.update({what: sum(values), (what, "known"): len(values)})
    return sums

def means_of(sums):
    """Means over the responses that `measure` has counted; None for what none of them states."""
    n = sums["responses"]
    numbers = {w: sums[w] / sums[w, "known"] if sums[w, "known"] else None for w in NUMBER_FIELDS}
    markers = {marker: sums[marker] / n for marker in MARKERS}
    return dict(responses=n, markers=markers, total=sum(markers.values()), **numbers)

def read_lines(path, use):
    """use(record) of every line; errors name its number. One line in memory at a time."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:  # surrogatepass: half an emoji is what a token limit leaves
                text = line.decode("utf-8-sig", "surrogatepass").strip()
                if text:
                    yield use(json.loads(text, strict=False))  # may hold raw control characters
            except Exception as error:  # what `use` raises has no common class
                raise ValueError(f"{path}:{number}: {error}") from None

def summarize_file(path, field):
    """{benchmark: means}, "" where a record names none."""
    groups = {}
    for sums, name in read_lines(path, lambda r: (measure(r, field), r.get("benchmark") or "")):
        groups.setdefault(str(name), Counter()).update(sums)
    if not groups:
        raise ValueError(f"{path}: no responses in it; has the run that writes it got so far?")
    return {name: means_of(sums) for name, sums in groups.items()}

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

def main():
    parser = argparse.ArgumentParser(description="Markers per response.", usage=argparse.SUPPRESS)
    parser.add_argument("files", nargs="+", help="JSON Lines with a response or a list of them")
    parser.add_argument("--field", help=f"where it is, if not in {', '.join(RESPONSE_FIELDS)}")
    args = parser.parse_args()
    try:
        columns = [(path, benchmark, means) for path in args.files
                   for benchmark, means in summarize_file(path, args.field).items()]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = [("benchmark", [name[:max(9, 67 // len(columns) - 2)] for _, name, _ in columns])]
    rows += [(m, [f"{means['markers'][m]:,.2f}" for _, _, means in columns]) for m in MARKERS]
    for what, form in dict(total=",.2f", responses=",", tokens=",.1f", accuracy=".3f").items():
        cells = [means[what] for _, _, means in columns]
        rows.append((what, ["" if cell is None else f"{cell:{form}}" for cell in cells]))
    print("mean occurrences per response (substrings, as in the paper)\n\n"
          f"{grid([path for path, _, _ in columns], rows)}")

if __name__ == "__main__":
    main()
