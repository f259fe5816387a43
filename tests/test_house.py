"""What holds the files together: each is whole, short, and what they repeat is one text."""
import ast
import collections
import re

from common import ROOT

SCRIPTS = ["generate_conditions.py", "sft_distill.py", "grpo.py", "sdpo.py", "evaluate.py"]
ON_TOP = ["extras/opsd.py", "extras/remedies.py", "extras/token_kl.py", "extras/judge.py",
          "extras/report.py", "toy/controls.py"]
OWN = {"main", "make_parser", "summarise", "table",  # a script's own,
       "Rollout", "sample_groups", "Student", "update", "sync_weights"}  # and where the algorithms differ
FAMILIES = [["grpo.py", "sdpo.py"], ["generate_conditions.py", "evaluate.py"], ["sft_distill.py"]]
# one text in a family: the second trains nothing, the third samples nothing
APART = {"make_engine", "load_model", "read_questions", "begin_run", "log",
         "MAY_CHANGE", "start_process_group"}
LIMITS = {  # lines; a promise of the README
    "epistemic.py": 150, "verifier.py": 220, "generate_conditions.py": 380, "sft_distill.py": 430,
    "grpo.py": 570, "sdpo.py": 620, "evaluate.py": 310, "extras/opsd.py": 80,
    "extras/token_kl.py": 80, "extras/judge.py": 110, "extras/remedies.py": 330,
    "extras/report.py": 380, "README.md": 150, "toy/README.md": 200, "benchmarks": 750,
    "tests": 3600}

def test_lines_are_a_promise():
    def count(path):
        files = path.glob("*.py") if path.is_dir() else [path]
        return sum(len(file.read_text().splitlines()) for file in files)
    counts = {name: count(ROOT / name) for name in LIMITS}
    assert {n: lines for n, lines in counts.items() if lines > LIMITS[n]} == {}
    wide = [f"{path}:{n}" for path in (*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"))
            for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert wide == []

def functions(name, constants=False):
    tree = ast.parse((ROOT / name).read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, kinds)}
    return found | {node.targets[0].id: ast.unparse(node) for node in tree.body
                    if constants and isinstance(node, ast.Assign)}

def test_what_has_one_name_is_one_text():
    texts = collections.defaultdict(dict)
    for name in SCRIPTS:
        for function, text in functions(name, constants=True).items():
            texts[function][name] = text
    differ = {f for f, of_scripts in texts.items() if len(set(of_scripts.values())) > 1}
    assert differ == OWN | APART
    for function in APART:
        for family in FAMILIES:
            assert len({texts[function].get(name) for name in family} - {None}) <= 1, function
    assert len(texts["render"]) > 2 and len(texts["MasterAdamW"]) > 2

def test_what_stands_on_top_holds_no_copy():
    below = {text: f"{name}: {function}" for name in SCRIPTS
             for function, text in functions(name).items()}
    copies = [f"{name}: {below[text]}" for name in ON_TOP
              for text in functions(name).values() if text in below]
    assert not copies

def test_scripts_import_only_the_shared_two():
    ours = {path.stem for folder in (".", "extras", "toy") for path in (ROOT / folder).glob("*.py")}
    for name, allowed in {**dict.fromkeys(SCRIPTS, {"epistemic", "verifier"}),
                          "epistemic.py": set(), "verifier.py": set(),
                          "extras/report.py": {"epistemic"}}.items():
        source = (ROOT / name).read_text()
        imported = {module for module in {*ours, "extras", "toy"}
                    if re.search(rf"^\s*(import|from) .*\b{module}\b", source, re.M)}
        assert imported <= allowed, name
