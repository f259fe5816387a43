"""What the READMEs say: their tables, links, flags and commands."""
import json
import os
import re
import shlex
import subprocess
import sys

from common import ROOT

sys.path[:0] = [str(ROOT / "toy"), str(ROOT / "benchmarks")]

import memory
import study

READMES = {name: (ROOT / name).read_text()
           for name in ("README.md", "toy/README.md", "benchmarks/README.md")}


def test_it_is_read_in_ten_minutes():
    assert len(READMES["README.md"].splitlines()) <= 230


def test_the_toys_tables_are_the_studys():
    found = json.loads((ROOT / "results/toy/numbers.json").read_text())
    shown = dict(re.findall(r"<!-- table (\w+) -->\n(.*?)\n<!-- end -->", READMES["toy/README.md"],
                            re.DOTALL))
    assert shown == study.tables(found)


def test_the_hardware_table_is_computed():
    table, = re.findall(r"<!-- memory.py -->\n(.*?)\n<!-- end -->", READMES["benchmarks/README.md"],
                        re.DOTALL)
    rows = {row: [cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]}
    assert len(rows) == 16
    for row, (model, gpus, script, *_) in rows.items():
        ranks, gpu = map(int, gpus.split(" x "))
        assert row == memory.row(model, ranks, gpu, script.strip("`").removesuffix(".py"))


def test_the_costs_are_the_hardware_tables():
    """| model, GB each | GPU hours GRPO | GPU hours SDPO | hours a step | of 8 GPUs."""
    rows = re.findall(r"^\| (\S+), (\d+) GB each \| (\d+) \| (\d+) \| (\S+) \|",
                      READMES["README.md"], re.MULTILINE)
    assert len(rows) >= 3
    for model, gpu, grpo, sdpo, hours in rows:
        cells = [memory.row(model, 8, int(gpu), name).split(" | ") for name in ("grpo", "sdpo")]
        assert [grpo, sdpo] == [c[9] for c in cells] and float(hours) == float(cells[1][8])


def test_links_lead_to_files():
    links = [(readme, link) for readme, text in READMES.items()
             for link in re.findall(r"\]\((?!https)([^)#]+)\)", text)]
    assert len(links) > 5
    assert not [pair for pair in links if not (ROOT / pair[0]).parent.joinpath(pair[1]).exists()]


def test_flags_and_files_that_are_named_exist():
    sources = {str(path.relative_to(ROOT)): path.read_text()
               for folder in (".", "toy", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    sources["torchrun"] = ('"--nproc_per_node" "--nnodes" "--node_rank" "--master_addr" '
                           '"--master_port"')

    def has(source, flag):
        return re.search(rf'"--{flag.removeprefix("no-")}"', source)
    text = "\n".join(READMES.values())
    names = set(re.findall(r"`(?:python )?([\w/]+\.py)\b", text))
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)", text))
    assert len(names) > 15 and len(flags) > 25
    places = ("", "toy/", "benchmarks/")
    assert not {name for name in names if not any(place + name in sources for place in places)}
    assert not {f for f in flags if not any(has(source, f) for source in sources.values())}


def commands(text):
    """The commands of the ```sh blocks, `\\` at a line's end joined; $M is its value."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    values = dict(re.findall(r"^(\w+)=(\S+)$", blocks, re.MULTILINE))
    return [re.sub(r"\$(\w+)", lambda m: values[m[1]], line) for line in blocks.splitlines()
            if line.startswith(("python", "torchrun"))]


# One process has torch; each command is read in a fork of it, by its own script, up to parse_args.
PARSE = """
import argparse, os, runpy, sys, torch, tqdm
parse_args = argparse.ArgumentParser.parse_args
def parse_and_end(*args, **kwargs):
    parse_args(*args, **kwargs)
    os._exit(0)
argparse.ArgumentParser.parse_args = parse_and_end
for script, *flags in __import__("json").load(sys.stdin):
    if not (child := os.fork()):
        sys.argv, sys.path[0] = [script, *flags], os.path.dirname(os.path.abspath(script))
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException as error:
            if not isinstance(error, SystemExit):
                print(f"{script}: {error!r}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def parse(lines):
    """[0 or 1]: does the script of each command know its flags?  And what they say on stderr."""
    split = [shlex.split(line, comments=True) for line in lines]
    split = [words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
             for words in split]
    done = subprocess.run([sys.executable, "-c", PARSE], input=json.dumps(split), cwd=ROOT,
                          text=True, capture_output=True, env=dict(os.environ, RANK="0"))
    return list(map(int, done.stdout.split())), done.stderr


def test_printed_commands_parse():
    lines = commands(READMES["README.md"])
    assert len(lines) > 12
    codes, said = parse(lines)
    assert len(codes) == len(lines)
    assert not [line for line, code in zip(lines, codes) if code], said


def test_a_command_with_a_flag_that_is_gone_does_not_parse():
    assert parse(["python sdpo.py --model M --resume", "python evaluate.py --model M"])[0] == [1, 0]


def test_printed_commands_share_no_folder():
    lines = [line for line in commands(READMES["README.md"]) if "--model" in line]
    folders = [match[1] for line in lines for match in re.finditer(r"--(?:run_dir|out) (\S+)", line)]
    assert len(folders) > 8 and len(set(folders)) == len(folders)
    for line in lines:
        assert re.search("--run_dir|--out", line) or re.search("token_kl|judge", line), line
