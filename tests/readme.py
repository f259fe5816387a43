"""Runs the README's commands for real models, as printed and in order, with the toy in their place.

    python tests/readme.py [--folder FOLDER]      # `make test-readme`, about 6 minutes

What is replaced: the models, torchrun by one process, the data, and the paper's sizes by small ones.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import DATA, ROOT, few

SHORT = "--max_response_tokens 320"
TRAINER = (f"{SHORT} --steps 2 --questions_per_step 4 --minibatch_questions 2 --rollouts 4 "
           "--lr 1e-4 --num_questions 8 --data {train} --eval_data {eval}")
SMALL = {  # flags that come last, so that they count
    "generate_conditions.py": f"{SHORT} --data {{train}} --num_questions 4 --sft_examples 12 "
    "--samples 4 --questions_per_round 12 --accuracy 0.125 1 --temperature 1 --top_p 1 --top_k 0",
    "sft_distill.py": f"{SHORT} --batch_size 4 --epochs 1",
    "evaluate.py": f"{SHORT} --samples 2 --data {{eval}}",
    "extras.token_kl": "", "extras.report": "",
    **dict.fromkeys(("grpo.py", "sdpo.py", "extras.remedies"), TRAINER)}


def commands(text, data):
    """The first ```sh block's commands, replaced; without those that need data of the reader's."""
    (block, *_) = re.findall(r"```sh\nsource .venv/bin/activate\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\s*#.*", "", line)
        line = re.sub(r"^(torchrun --nproc_per_node 8|python)", sys.executable, line)
        line = line.replace("OMP_NUM_THREADS=8", "OMP_NUM_THREADS=2")
        line = re.sub(r"Qwen/Qwen3-8B|deepseek-ai/\S+", str(ROOT / "toy/model"), line)
        line = line.replace("step_100", "step_2").replace("step_75", "step_3")
        script = re.search(r"\w+\.py|(?<=-m )extras\.\w+", line)
        if script:
            line = re.sub(r"\w+\.py", rf"{ROOT}/\g<0>", line, count=1)
            line += " " + SMALL[script[0]].format(**data)
        yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where the runs stay; default: a temporary one")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    data = dict(train=few(DATA / "train.jsonl", 60, folder), eval=few(DATA / "ood.jsonl", 4, folder))
    exports, env = "", dict(os.environ, PYTHONWARNINGS="ignore", PYTHONPATH=str(ROOT))
    for line in commands((ROOT / "README.md").read_text(), data):
        start = time.time()
        if not line.startswith(sys.executable):  # M=..., export ...
            exports += line + "\n"
            continue
        ended = subprocess.run(["bash", "-ec", exports + line], cwd=folder, text=True,
                               capture_output=True, env=env)
        print(f"{time.time() - start:4.0f} s  {'ran' if not ended.returncode else 'FAILED'}  {line}",
              flush=True)
        if ended.returncode:
            sys.exit(ended.stdout[-2000:] + ended.stderr[-4000:])
    pages = list(folder.glob("runs/report.html"))
    print(f"{pages[0]}: {pages[0].stat().st_size:,} bytes")
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
