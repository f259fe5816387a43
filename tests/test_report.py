"""report.py on folders written here, whose numbers are worked out by hand."""
import html
import json
import re
import struct
import sys

import pandas
import pytest

import epistemic
import report
from common import refusal


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(benchmark, corrects, text="Wait, maybe 3.", **more):
    """One answer a question, graded as told."""
    return [epistemic.record(text, float(c), 10 + i, True, benchmark=benchmark, index=i,
                             answer="3", **more) for i, c in enumerate(corrects)]


def run(folder, scores=(0.5, 0.25), ood=(1, 1, 0, 1), text="So 3.", name="sdpo", **config):
    """A training run: what it did on the way, its evaluation before and after."""
    write(folder / "config.json", dict(model="toy/model", script=f"{name}.py", **config))
    write(folder / "metrics.jsonl", *(dict(step=i, score=s, length=100.0, epistemic=4.0)
                                      for i, s in enumerate(scores, 1)))
    ends = {0: answers("ood", (1, 1, 1, 1)), len(scores): answers("ood", ood, text)}
    for step, records in ends.items():
        write(folder / f"eval/step_{step}.jsonl", *records)
        write(folder / f"eval/step_{step}.json", {"ood": epistemic.averages(records)})


def evaluation(folder, models, benchmark="ood", samples=1, **more):
    """evaluate.py's folder, of {model: what is right}."""
    table = {}
    for name, corrects in models.items():
        records = answers(benchmark, corrects, question="What is 1 + 2?")
        write(folder / name / f"{benchmark}.jsonl", *records)
        table[name] = {benchmark: dict(epistemic.averages(records), samples=samples, **more)}
    write(folder / "summary.json", dict(models=table))


@pytest.fixture
def made(monkeypatch, capsys, tmp_path):
    """Runs the command; gives (what it printed, the page). Draws only if told: that takes time."""
    def make(*folders, out=tmp_path / "out", draw=False):
        def figure(page, title, *_, **__):
            page.html += f'<img alt="{html.escape(title)}">'
        report.counted.cache_clear()
        if not draw:
            monkeypatch.setattr(report.Page, "figure", figure)
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, folders), "--out", str(out)])
        report.main()
        return capsys.readouterr().out, (out / "report.html").read_text()
    return make


def found(*folders):
    return report.Found(report.find(folders))


def row(page, name):
    """The cells of the row of this name, first of the page."""
    cells = re.search(rf"<th>{re.escape(name)}</th>(.*?)</tr>", page, flags=re.S)[1]
    return re.findall("<td>(.*?)</td>", cells, flags=re.S)


def test_numbers_of_one_seed(made, tmp_path):
    run(tmp_path / "runs/sdpo", scores=(0.9, 0.1, 0.2, 0.3, 0.4, 0.5))
    with open(tmp_path / "runs/sdpo/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "sco')  # the run goes on
    said, page = made(tmp_path / "runs")
    # training: the last five, .1 to .5; ood: 3 of 4, its error stdev(1, 1, 0, 1) / 2
    assert row(page, "sdpo")[0] == "0.300 ± 0.071" and row(page, "base")[0] == ""
    assert row(page, "sdpo")[3:6] == ["0.750 ± 0.250", "12 ± 1", "0.0 ± 0.0"]
    assert row(page, "base")[3:6] == ["1.000 ± 0.000", "12 ± 1", "2.0 ± 0.0"]
    assert "one seed" in said and "0.750 ± 0.250" in said
    for path in (tmp_path / "runs/sdpo/eval").iterdir():  # nor has it been evaluated yet
        path.unlink()
    assert row(made(tmp_path / "runs")[1], "sdpo")[0] == "0.300 ± 0.071"


def test_seeds_are_one_arm(made, tmp_path):
    for seed, ood in enumerate([(1, 1, 1, 1), (1, 1, 1, 0), (1, 1, 0, 0)]):
        run(tmp_path / f"runs/seed_{seed}/sdpo", ood=ood)
    for folders in ([tmp_path / "runs"], sorted((tmp_path / "runs").iterdir())):
        said, page = made(*folders)
        assert row(page, "sdpo")[3] == "0.750 ± 0.144"  # stdev(1, .75, .5) / sqrt(3)
        assert "3 seeds" in said
    assert {name for name, *_ in report.find([tmp_path / "runs/seed_0/sdpo"])} == {"sdpo"}
    run(tmp_path / "other/sdpo")  # of one name in two places
    assert {name for name, *_ in report.find([tmp_path])} == {"runs/sdpo", "other/sdpo"}
    csv = pandas.read_csv(next((tmp_path / "out/figures").glob("*_where_the_runs_ended_*.csv")))
    ood = csv.set_index(["arm", "benchmark", "quantity"]).loc["sdpo", "ood", "score"]
    assert ood["mean"] == 0.75 and ood.seeds == 3 and abs(ood.error - 0.144338) < 1e-6


def test_a_benchmark_that_only_sft_has(made, tmp_path):
    """It was a KeyError."""
    run(tmp_path / "runs/grpo")
    evaluation(tmp_path / "runs/sft/eval", {"model": (1, 1), "d_sg/step_9": (1, 0)}, "aime24")
    said, page = made(tmp_path / "runs")
    assert row(page, "SFT on d_sg")[0] == "0.500 ± 0.500" and "SFT on d_sg" in said


def test_contexts(made, tmp_path):
    folder = tmp_path / "conditions"
    means = {}
    for context, text in dict(unguided="Hmm, wait.", full="So 3.").items():
        records = answers(context, (1, 0), text)
        write(folder / f"{context}.jsonl", *records)
        means[context] = epistemic.averages(records)
    write(folder / "summary.json", dict(contexts=means))
    said, page = made(folder)
    assert row(page, "unguided") == ["0.500 ± 0.500", "10 ± 0", "2.0 ± 0.0"]
    assert "unguided" in said and "Figure 9" in page and "Where the runs ended" not in page


@pytest.mark.parametrize("file, text, said", [
    ("metrics.jsonl", '{"step": 1, "sco\n{}\n', ", row 1: no whole JSON"),
    ("metrics.jsonl", '{"step": 1, "score": 1}\n', ", row 1: no object with score, length"),
    ("eval/step_2.json", '{"ood": {"score": 1', ": no whole JSON"),
    ("eval/step_2.json", "[]", ": no object"),
    ("eval/step_2.jsonl", '{"index": 0, "benchmark": "ood"}\n', ", row 1: no object with index"),
    ("eval/step_2.jsonl", "", ": holds no answers to ood"),
    ("summary.json", '{"models": 3}', ": no object"),
    ("token_kl.json", '{"3": {"text": "x"}}', ": no object with text, kl, count")])
def test_what_is_cut_in_half_is_named(tmp_path, monkeypatch, file, text, said):
    """One line with file and row, exit code 2, and nothing written."""
    run(tmp_path / "sdpo")
    (tmp_path / "sdpo" / file).write_text(text)
    report.counted.cache_clear()
    monkeypatch.setattr(report.Page, "figure", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    assert file + said in refusal(report.main)
    assert {p.name for p in tmp_path.iterdir()} == {"sdpo"}
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "sdpo/none")])
    assert "no metrics.jsonl and no summary.json" in refusal(report.main)


def test_what_is_not_its_own_stays(made, tmp_path):
    """A user's report.html is refused; his files in figures/ stay; its own old ones go."""
    run(tmp_path / "sdpo", ood=(1, 1, 0, 1))
    out = tmp_path / "out"
    made(tmp_path / "sdpo")
    old = {p.name for p in (out / "figures").iterdir()}
    (out / "figures/001_mine.png").write_text("mine")
    evaluation(tmp_path / "sdpo/eval", {"model": (1, 1)})
    made(tmp_path)
    assert (out / "figures/001_mine.png").read_text() == "mine"
    written = {out / name for name in json.loads((out / "figures/written.json").read_text())}
    names = {*out.rglob("*.*")} - {out / "figures/001_mine.png", out / "figures/written.json"}
    assert names == written and {p.name for p in names} - old
    (out / "report.html").write_text("edited")
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    assert "report.html is not report.py's own" in refusal(made, tmp_path)
    assert before == {p: p.read_bytes() for p in out.rglob("*.*")}


def test_claims(made, tmp_path):
    """The signs that hold between the numbers, and the verdicts that follow."""
    for name, right in dict(grpo=(1,) * 40, sdpo=(0,) * 30 + (1,) * 10).items():
        run(tmp_path / name, name=name, num_questions=512, ood=right)
    run(tmp_path / "sdpo_8", num_questions=8, scores=(1.0,) * 5)
    run(tmp_path / "grpo_8", name="grpo", num_questions=8, scores=(0.5,) * 5)
    said, page = made(tmp_path)
    table = report.claims(found(tmp_path), "toy/model")
    agrees = {claim.split(":")[1].strip(): row.agrees for claim, row in table.iterrows()}
    assert agrees["GRPO keeps the score on other questions, SDPO does not"] == "yes"
    assert agrees["few questions SDPO learns as well"] == "yes"
    assert agrees["the more the context tells, the fewer words of doubt"] == "not run"
    assert "grpo 1.000 ± 0.000 ≈ base 1.000 ± 0.000 > sdpo 0.250" in " ".join(table.here)
    assert agrees["GRPO keeps the words of doubt, SDPO does not"] == "no"  # grpo says "So 3.", too
    assert "\nyes                Takeaway 3, Section 5" in said
    assert page.index("GRPO keeps the score") < page.index("<h2>")
    run(tmp_path / "grpo", name="grpo", num_questions=512, ood=(0,) * 40)
    report.counted.cache_clear()
    table = report.claims(found(tmp_path), "toy/model")
    assert [row.agrees for claim, row in table.iterrows() if "keeps the score" in claim] == ["no"]


def test_model_text_is_escaped(made, tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="f()"> wait \ud800 </pre>'
    run(tmp_path / "runs/<b>sdpo", text=evil)
    write(tmp_path / "runs/<b>sdpo/token_kl.json", {"5": dict(text=" wait", kl=1.0, count=50)})
    _, page = made(tmp_path / "runs")
    assert "<script" not in page and "<b>sdpo" not in page and "onerror=\"" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(src|href)=.?(http|//)", page)  # nothing from the network


def test_traces(made, tmp_path):
    """Those questions first on which the models differ; markers as epistemic counts them."""
    run(tmp_path / "sdpo", ood=(1, 1, 1, 0), text="Unlikely. WAIT, checking.")
    evaluation(tmp_path / "eval", {"model": (1, 1, 1, 1), "sdpo/step_2": (1, 1, 1, 1)})
    _, page = made(tmp_path)
    page = page[page.index("<h2>Read the traces"):]
    traces = re.findall("<tr>(.*?)</tr>", page[page.index("toy/model ood"):], flags=re.S)[:4]
    assert "base: right" in traces[0] and "sdpo: wrong" in traces[0]
    assert "sdpo: right" in traces[1] and "on 1 of 4 questions" in page
    assert "What is 1 + 2? Right: 3" in traces[0]  # the run's own answers do not hold the question
    assert traces[0].count("<mark>") == epistemic.count("Wait, maybe 3. Unlikely WAIT checking")


def test_the_page_stays_small_with_many_answers(made, tmp_path):
    run(tmp_path / "sdpo", ood=(1, 0) * 200, text="wait " * 300)
    write(tmp_path / "sdpo/eval/step_0.jsonl", *answers("ood", (1,) * 400, "maybe " * 300))
    _, page = made(tmp_path / "sdpo")
    assert len(page) < 100_000 and "200 of 400 questions" in page


def test_changes_of_words(tmp_path):
    """App. B.4, by hand: the base says wait 2, x 1; the model x 3 and new, which does not count."""
    run(tmp_path / "sdpo", ood=(1,), text="x x x new")
    write(tmp_path / "sdpo/eval/step_0.jsonl", *answers("ood", (1, 1), "Wait, wait x"))
    report.counted.cache_clear()
    changes = report.changes(found(tmp_path).answered("run"))
    assert changes.wait.tolist() == [-2] and changes.other_words.tolist() == [2]


def test_runs_that_differ_in_one_flag(made, tmp_path):
    for size in (8, 64):
        run(tmp_path / f"runs/sdpo_{size}", num_questions=size, ema=0.0, seed=size)
    run(tmp_path / "runs/sdpo_ema", num_questions=8, ema=0.05)
    there = found(tmp_path / "runs")
    assert there.alike_but_for("num_questions") == [dict(sdpo_8=8, sdpo_64=64)]
    assert there.alike_but_for("ema") == [dict(sdpo_8=0.0, sdpo_ema=0.05)]
    assert there.alike_but_for("lr") == []
    _, page = made(tmp_path / "runs")
    for title in ("Figure 6", "Figure 7", "Figure 8", "Figure 11"):
        assert f"<h2>{title}: " in page
    assert "Figure 20a" not in page


def test_checkpoints_and_pass_at(made, tmp_path):
    evaluation(tmp_path / "eval", {"model": (1, 1), "sdpo/step_9": (1, 0), "sdpo/step_10": (0, 0)},
               samples=2, pass_at={"1": 0.5, "2": 0.75})
    _, page = made(tmp_path / "eval")
    assert row(page, "sdpo")[0] == "0.000 ± 0.000"  # step 10, not 9
    assert 'alt="pass@2 out of distribution\neval"' in page and row(page, "sdpo")[3] == "0.750"


def test_table_6(made, tmp_path):
    run(tmp_path / "sdpo")
    write(tmp_path / "sdpo/token_kl.json", {
        "1": dict(text=" wait", kl=30.0, count=100), "2": dict(text="Wait", kl=1.0, count=10),
        "3": dict(text=" waits", kl=10.0, count=100)})
    _, page = made(tmp_path / "sdpo")
    # the mean over frequent tokens: (.3 + .1) / 2
    assert "sdpo 0: 0.200 on average" in page and "waits" not in page
    assert row(page, "‘ wait’")[1:] == ["100", "0.3", "1.5"]
    assert row(page, "‘Wait’")[1:] == ["10", "0.1", "0.5"]


def test_pictures(made, tmp_path):
    """Every kind of drawing once."""
    for size in (8, 64):
        run(tmp_path / f"runs/sdpo_{size}", num_questions=size)
    run(tmp_path / "runs/shield_8", remedy="shield")
    _, page = made(tmp_path / "runs", draw=True)
    pictures = sorted((tmp_path / "out/figures").glob("*.png"))
    assert page.count("data:image/png;base64,iVBOR") == len(pictures)
    for kind in ("figure_7_score_in_training", "figure_8_score_out_of_dist", "figure_11_words",
                 "remedies_score_out"):
        assert kind in " ".join(path.name for path in pictures)
    for file in [*pictures, tmp_path / "out/report.png"]:
        width, height = struct.unpack(">II", file.read_bytes()[16:24])
        assert width >= 500 and height >= 150


def test_a_band_goes_from_the_lowest_seed_to_the_highest():
    _, axis = report.pyplot.subplots()
    report.lines(axis, dict(sdpo=pandas.DataFrame([{0: 1.0, 1: 2.0}, {0: 3.0}]).T))
    assert axis.lines[0].get_ydata().tolist() == [2, 2]  # at step 1 there is one seed as yet
    assert {tuple(p) for p in axis.collections[0].get_paths()[0].vertices} == {
        (0, 1), (0, 3), (1, 2)}
    report.pyplot.close()
