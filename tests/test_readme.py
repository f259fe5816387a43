"""What the READMEs say: their tables, links, flags and commands."""
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from common import ROOT

sys.path[:0] = [str(ROOT / "toy"), str(ROOT / "benchmarks")]

import memory
import study

READMES = {name: (ROOT / name).read_text()
           for name in ("README.md", "toy/README.md", "benchmarks/README.md")}


def test_the_toys_tables_are_the_studys():
    found = json.loads((ROOT / "results/toy/numbers.json").read_text())
    shown = dict(re.findall(r"<!-- table (\w+) -->\n(.*?)\n<!-- end -->", READMES["toy/README.md"],
                            re.DOTALL))
    assert shown == study.tables(found)


def test_the_hardware_tables_are_computed():
    computed = set("\n".join(map(memory.table, memory.TABLES)).splitlines())
    shown = [line for text in READMES.values()
             for table in re.findall(r"<!-- memory.py -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
             for line in table.splitlines()]
    assert len(shown) >= len(computed) and not set(shown) - computed


def commands(text):
    """The commands of the ```sh blocks, `\\` at a line's end joined; $M is its value."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    values = dict(re.findall(r'^(\w+)="?([^"#\n]*[^"#\s])', blocks, re.MULTILINE))
    return [re.sub(r"\$(\w+)", lambda m: values[m[1]], line) for line in blocks.splitlines()
            if line.startswith(("python", "torchrun"))]


# Each command is read by its own script, up to parse_args, in a fork of a process that has loaded
# the libraries.
PARSE = """
import argparse, json, os, runpy, sys
sys.path[0] = ""
import matplotlib.figure, sdpo
for name in ("sdpo", "epistemic", "verifier"):
    del sys.modules[name]
parse_args = argparse.ArgumentParser.parse_args
def parse_and_end(*args, **kwargs):
    parse_args(*args, **kwargs)
    os._exit(0)
argparse.ArgumentParser.parse_args = parse_and_end
for script, *flags in json.load(sys.stdin):
    if not (child := os.fork()):
        sys.argv = [script, *flags]
        try:
            if script.endswith(".py"):
                sys.path[0] = os.path.dirname(script)
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except BaseException as error:  # parser.error has spoken for itself
            if not isinstance(error, SystemExit):
                print(f"{script}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def script_of(line):
    """The words of a command from its script, `x.py` or the module after -m, on."""
    words = shlex.split(line, comments=True)
    return words[next(i for i, word in enumerate(words)
                      if word.endswith(".py") or words[i - 1] == "-m"):]


def parse(lines):
    """[0 or 1]: does the script of each command know its flags?  And what they say on stderr."""
    done = subprocess.run([sys.executable, "-c", PARSE], input=json.dumps([*map(script_of, lines)]),
                          cwd=ROOT, text=True, capture_output=True, env=dict(os.environ, RANK="0"))
    return list(map(int, done.stdout.split())), done.stderr


@pytest.mark.slow
def test_printed_commands_parse():
    """And those with a flag that is gone, or a file too few, do not. No two have one folder."""
    lines = commands(READMES["README.md"])
    assert len(lines) > 12
    wrong = ["python sdpo.py --model M --resume", "torchrun evaluate.py",
             "python -m extras.judge a.jsonl", "torchrun -m extras.opsd --model M --remedy srpo"]
    codes, said = parse(lines + wrong)
    assert len(codes) == len(lines) + len(wrong) and all(codes[len(lines):])
    assert not [line for line, code in zip(lines, codes) if code], said
    folders = re.findall(r"--(?:run_dir|out) (\S+)", "\n".join(lines))
    assert len(folders) > 8 and len(set(folders)) == len(folders)


@pytest.mark.slow
def test_the_commands_of_the_study_parse():
    """As it completes them: token_kl.py once got a --seed that it does not have."""
    lines = {study.complete(command, f"o/{name}", 0) for group in study.GROUPS
             for name, commands in study.runs(group, "o").items() for command in commands}
    lines = [study.TWO_MODES.format("o"), *sorted(lines)]
    codes, said = parse(lines)
    assert len(codes) == len(lines) > 60
    assert not [line for line, code in zip(lines, codes) if code], said
