"""What holds the files together: each is whole, and what they repeat is one text."""
import ast
import collections
import subprocess
import sys

import pytest

from common import ROOT

SCRIPTS = ["generate_conditions.py", "sft_distill.py", "grpo.py", "sdpo.py", "evaluate.py"]
ON_TOP = [name for name in ("opsd.py", "remedies.py", "token_kl.py", "judge.py", "toy/controls.py")
          if (ROOT / name).exists()]
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


@pytest.mark.parametrize("name", [*SCRIPTS, "report.py"])
def test_scripts_import_only_the_shared_two(name):
    ours = {path.stem for path in ROOT.glob("*.py")}
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & ours <= ({"epistemic", "verifier"} if name != "report.py" else {"epistemic"})


HELP = """
import importlib, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    print("HELP OF", name)
    try:
        importlib.import_module(name.removesuffix(".py")).main()
    except SystemExit as end:
        assert end.code == 0
assert not {"vllm", "transformers"} & set(sys.modules)
"""


def test_help_loads_neither_vllm_nor_transformers():
    """All scripts in one process, since torch takes its time."""
    said = subprocess.run([sys.executable, "-c", HELP, *SCRIPTS], cwd=ROOT, check=True, text=True,
                          capture_output=True).stdout
    for name, part in zip(SCRIPTS, said.split("HELP OF ")[1:], strict=True):
        assert part.startswith(name) and "--model" in part and "(default: " in part
