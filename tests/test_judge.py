"""App. B.5's judge: what it says is read, asked once, kept; against a server of the test's own and
against vLLM's."""
import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import judge
import kill
from common import FORKS, ROOT, free_port, lines

KEY = "sk-this-must-stay-unseen"
TEXTS = ["Wait. Hmm, wait.", "So 4.", "Hmm.", "Hmm."]


def reply(content):
    return dict(id="1", object="chat.completion", created=1, model="m", choices=[dict(
        index=0, finish_reason="stop", message=dict(role="assistant", content=content))])


class Server(ThreadingHTTPServer):
    """Counts `wait` and `hmm`, if trouble(text, attempt) is not the (status, body) to answer."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.asked, self.bodies = lambda *_: None, Counter(), []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        """A client that has given up."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        self.server.asked[text] += 1
        self.server.bodies.append((self.path, self.headers["Authorization"], body))
        quotes = re.findall("wait|hmm", text.lower())
        good = reply("Sure! ```json\n" + json.dumps(dict(count=len(quotes), examples=quotes)))
        status, answer = self.server.trouble(text, self.server.asked[text]) or (200, good)
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(data)),
                            ("retry-after-ms", "1")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01)).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(server, tmp_path, capsys):
    """ask(texts, *flags): (exit code, what is printed, {expression count of each judgement})."""
    def run(texts, *flags):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(dict(response=text)) + "\n" for text in texts))
        code = 0
        try:
            judge.main([str(path), "--url", server.url, "--model", "m", *flags])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert KEY not in out + err
        judged = tmp_path / "a.judged.jsonl"
        rows = lines(judged) if judged.exists() else []
        return code, out + err, sorted(row["count"] for row in rows)
    return run


@pytest.mark.parametrize("said, expected", [
    ('Sure:\n```json\n{"count": 3, "examples": ["wait"]}\n```\nAnything else?', (3, ["wait"])),
    ('{"count": 9, "examples": []} No, sorry: {"count": 3, "examples": []}', (3, [])),
    ('{"count": 3, "examples": []}<think>{"count": 9}</think>', None),
    (r'{"count": 1, "examples": ["so \sin x might", 4]}', (1, [r"so \sin x might"])),
    ('{"count": 2.0, "examples": "wait"}', (2, ["wait"])),
    ("I count three.", None), ('{"count": "many"}', None), ("", None), ("[1] {" * 4000, None)])
def test_judgement(said, expected):
    assert judge.judgement(said) == expected


def test_what_is_asked_and_what_is_shown(ask, server):
    code, said, counts = ask(TEXTS)
    assert code == 0 and counts == [0, 1, 3]  # texts that are alike are asked once
    table = {line[:28].strip(): line[28:].split() for line in said.splitlines() if line[28:]}
    assert table["mean (Table 5)"] == ["1.25"] and table["responses"] == ["4"]
    assert table["least, quartiles, most"] == ["0", "1", "1", "1", "3"]
    for path, authorization, body in server.bodies:
        assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
        assert body["messages"][0] == dict(role="system", content=judge.JUDGE_PROMPT)
        assert set(body) == {"model", "messages"}  # sampling is the server's


def test_nothing_is_asked_twice_and_another_judge_or_text_is(ask, server, tmp_path):
    judged = tmp_path / "a.judged.jsonl"
    ask(TEXTS)
    with judged.open("ab") as file:
        file.write(b'{"hash": "\xff\x00')  # torn by a kill
    assert ask([*TEXTS, "hmm hmm"])[2] == [0, 1, 2, 3] and sum(server.asked.values()) == 4
    assert ask(TEXTS, "--model", "n")[0] == 0 and server.asked["Hmm."] == 2
    judged.write_text('{"count": 1}\n')  # something else, which is kept
    code, said, _ = ask(TEXTS)
    assert code == 2 and "a.judged.jsonl:1: not a judgement" in said
    assert judged.read_text() == '{"count": 1}\n' and sum(server.asked.values()) == 7


@pytest.mark.parametrize("answer", [
    (200, reply("nonsense")), (200, reply(None)), (400, dict(error=dict(message="too long")))])
def test_a_response_without_a_judgement_is_left_out(ask, server, answer):
    server.trouble = lambda text, _: answer if "Wait" in text else None
    code, said, counts = ask(TEXTS)
    assert code == 0 and counts == [0, 1] and "3 of 4 responses are judged" in said
    # a second start asks again, and again while the server is busy
    server.asked.clear()
    server.trouble = lambda _, n: (429, dict(error=dict(message="busy"))) if n <= 2 else None
    assert ask(TEXTS)[2] == [0, 1, 3] and set(server.asked.values()) == {3}


def test_what_cannot_work_is_one_line_and_keeps_what_there_is(ask, server):
    server.trouble = lambda text, _: text != "hmm" and (
        401, dict(error=dict(message=f"Wrong\nkey {KEY}")))
    code, said, counts = ask(["hmm", *map(str, range(50))])
    assert code == 2 and counts == [1] and "Error code: 401" in said and "***" in said
    assert said.count("judge.py: error") == 1
    assert ask(TEXTS, "--field", "draft")[1].count("no field draft") == 1


def test_a_killed_run_resumes(ask, server, tmp_path):
    texts, judged = [f"hmm {i}" for i in range(60)], tmp_path / "a.judged.jsonl"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    server.trouble = lambda *_: time.sleep(0.1)
    job = subprocess.Popen([sys.executable, ROOT / "judge.py", tmp_path / "a.jsonl", "--url",
                            server.url, "--model", "m"])
    while not judged.exists() or judged.read_bytes().count(b"\n") < 5:
        assert job.poll() is None
        time.sleep(0.02)
    job.kill()
    job.wait()
    server.trouble = lambda *_: None
    assert ask(texts)[2] == [1] * 60 and sum(server.asked.values()) < 90


def serve(folder, port):
    """vLLM's own server of the toy."""
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "fork"  # else it imports all again
    sys.argv = ["vllm", *map(str, (
        "--host", "127.0.0.1", "--port", port, "--model", ROOT / "toy/model", "--dtype", "float32",
        "--served-model-name", "toy", "--enforce-eager", "--kv-cache-memory-bytes", 2**28))]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


@pytest.mark.vllm
def test_vllms_own_server(tmp_path, capsys, monkeypatch):
    """The toy answers nonsense; its real answers are what it is asked about."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = free_port()
    server = FORKS.Process(target=serve, args=(tmp_path, port))
    server.start()
    try:
        for _ in range(1200):  # a busy machine takes its time
            assert server.is_alive(), (tmp_path / "log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(dict(response=t)) + "\n" for t in (
            "Wait, 3.", "wait " * 5000)))  # the last is longer than its context
        for name, said in (("toy", "0 of 2 responses are judged"), ("another", "Error code: 404")):
            with pytest.raises(SystemExit) as ended:
                judge.main([str(path), "--url", f"http://127.0.0.1:{port}/v1", "--model", name])
            shown = capsys.readouterr()
            assert ended.value.code == 2 and said in shown.out + shown.err
        assert lines(tmp_path / "a.judged.jsonl") == []
    finally:
        kill.kill_family(server.pid)
        server.join()
