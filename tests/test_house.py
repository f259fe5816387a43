"""What holds the files together: each is whole, and what they repeat is one text."""
import ast
import collections
import re
import subprocess
import sys

import pytest

from common import ROOT

SCRIPTS = ["generate_conditions.py", "sft_distill.py", "grpo.py", "sdpo.py", "evaluate.py"]
ON_TOP = [f"extras/{name}.py" for name in ("opsd", "remedies", "token_kl", "judge")]
ON_TOP += ["toy/controls.py"]
OWN = {"main", "make_parser", "check_args", "log", "summarise", "table",  # a script's own,
       "Rollout", "set_loss_weights", "sample_groups",  # and where the algorithms differ
       "Student", "remember_logprobs", "update", "token_losses"}


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
    shared = {f: t for f, t in texts.items() if len(t) > 1 and f not in OWN}
    assert shared  # at least the prompts' functions
    drifted = [f"{f}: {', '.join(t)}" for f, t in shared.items() if len(set(t.values())) > 1]
    assert not drifted


def test_what_stands_on_top_holds_no_copy():
    below = {text: f"{name}: {function}" for name in SCRIPTS
             for function, text in functions(name).items()}
    copies = [f"{name}: {below[text]}" for name in ON_TOP
              for text in functions(name).values() if text in below]
    assert not copies


def test_scripts_import_only_the_shared_two():
    ours = {path.stem for path in ROOT.glob("*.py")}
    for name in [*SCRIPTS, "report.py"]:
        source = (ROOT / name).read_text()
        imported = {module for module in ours
                    if re.search(rf"^\s*(import|from) .*\b{module}\b", source, re.M)}
        assert imported <= {"epistemic", *(["verifier"] if name != "report.py" else [])}


@pytest.mark.slow
def test_help_loads_neither_vllm_nor_transformers():
    """All scripts in one process, since torch takes its time."""
    code = f"""
import importlib, sys
for name in {SCRIPTS}:
    sys.argv = [name, "--help"]
    try:
        importlib.import_module(name.removesuffix(".py")).main()
    except SystemExit as end:
        assert end.code == 0
assert not {{"vllm", "transformers"}} & set(sys.modules)"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                          capture_output=True).stdout
    assert said.count("--model") >= len(SCRIPTS) and said.count("(default: ") > len(SCRIPTS)
