"""App. B.5's judge: a server that misbehaves, a file that survives it, and vLLM's own server."""
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import epistemic
import kill
from common import ROOT, lines
from epistemic import JUDGE_PROMPT, judgement

KEY = "sk-this-must-stay-unseen"


def reply(content, **more):
    return dict(more, id="1", object="chat.completion", created=1, model="m", choices=[dict(
        index=0, finish_reason="stop", message=dict(role="assistant", content=content))])


def good(text, say="Sure! ```json\n{}\n```"):
    quotes = re.findall("wait|hmm", text.lower())
    return say.replace("{}", json.dumps(dict(count=len(quotes), examples=quotes[:5])))


class Judge(ThreadingHTTPServer):
    """Counts `wait` and `hmm`, if trouble(text, attempt) is not the (status, body) to answer."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.asked, self.requests = lambda *_: None, Counter(), []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        """A client that has given up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        judge, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with judge.lock:
            judge.requests.append((self.path, self.headers["Authorization"], body))
            judge.asked[text] += 1
            attempt, judge.now = judge.asked[text], judge.now + 1
            judge.most = max(judge.most, judge.now)
        status, answer = judge.trouble(text, attempt) or (200, reply(good(text)))
        with judge.lock:
            judge.now -= 1
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", len(data))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Judge() as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01)).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(judge, tmp_path, capsys):
    """ask(texts, *flags): (exit code, stdout, stderr, judgements) of the command on their file."""
    def run(texts, *flags, url=None):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(dict(response=text)) + "\n" for text in texts))
        code = 0
        try:
            epistemic.main([str(path), "--judge", url or judge.url, "--judge_model", "m", *flags])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert KEY not in out + err and err.count("\n") == bool(code)
        judged = tmp_path / "a.judged.jsonl"
        return code, out, err, lines(judged) if judged.exists() else []
    return run


def counts(rows):
    return {row["index"]: row["count"] for row in rows}


def table(out):
    return {line[:28].strip(): line[28:].split() for line in out.splitlines() if len(line) > 28}


# ---------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("said, expected", [
    ('{ "count": 3, "examples": ["wait", "hmm"] }', (3, ["wait", "hmm"])),
    ('{"examples": [], "count": 0}', (0, [])),
    ('Sure:\n```json\n{"count": 3, "examples": ["wait"]}\n```\nAnything else?', (3, ["wait"])),
    ('<think>{"count": 9}</think>{"count": 3, "examples": []}', (3, [])),
    ('{"count": 9, "examples": []} No, sorry: {"count": 3, "examples": []}', (3, [])),
    ('As asked, { "count": <integer> }: {"count": 3, "examples": ["a {b"]} {', (3, ["a {b"])),
    ('{"result": {"count": 3, "examples": ["wait"]}}', (3, ["wait"])),
    ('{"count": "3", "examples": "wait"}', (3, ["wait"])),
    ('{"count": 3.0, "examples": [1, null, {"text": "wait"}, "hmm"]}', (3, ["hmm"])),
    ('{"count": 3, "examples": null, "confidence": "high"}', (3, [])),
    ('{"count": 3}', (3, [])),
    (r'{"count": 1, "examples": ["so \sin x, \(y\), \u12"]}', (1, [r"so \sin x, \(y\), \u12"])),
    (r'{"count": 1, "examples": ["\"hm\\\" \u2026"]}', (1, ['"hm\\" …'])),
    ('{"count": 1, "examples": ["wait\nno"]}', (1, ["wait\nno"])),
    ('{"count": 12, "examples": ["wait", "hm', None),  # cut off
    ('{"count": 2, "examples": ["he said "wait" so"]}', None),
    ("{'count': 3, 'examples': []}", None), ('{"count": -1, "examples": []}', None),
    ('{"count": true}', None), ('{"count": 3.5}', None), ('{"count": null}', None),
    ('{"count": [3]}', None), ('{"number": 3}', None), ("[3]", None), ("3", None), ("", None),
    ('{"count": 1' + "0" * 10_000 + "}", None), ('{"count": ' * 100_000, None),
    ("{" * 10**6, None), ('{"' * 10**6, None), ("\\" * 10**6, None), ('{"a":' * 10**5 + "1", None),
])
def test_judgement(said, expected):
    start = time.process_time()
    assert judgement(said) == expected
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------- the command

TEXTS = ["Wait. Hmm, wait.", "So 4.", "Hmm.", "Wait \ud83d no", "", "So 4."]


def test_rows_table_and_what_is_sent(ask, judge):
    code, out, _, rows = ask(TEXTS)
    assert code == 0 and counts(rows) == {0: 3, 1: 0, 2: 1, 3: 1, 4: 0, 5: 0}
    assert sorted(rows[0]) == ["count", "expressions", "hash", "index", "model"]
    (row,) = [row for row in rows if row["index"] == 0]
    assert row["expressions"] == ["wait", "hmm", "wait"] and row["model"] == "m"
    shown = table(out)
    assert shown["mean (Table 5)"] == ["0.83"] and shown["responses"] == ["6"]
    assert shown["least, quartiles, most"] == ["0", "0", "0", "1", "3"]
    assert shown["“wait”"] == ["0.50"] and shown["“hmm”"] == ["0.33"]
    assert judge.asked == {"Wait. Hmm, wait.": 1, "So 4.": 1, "Hmm.": 1, "Wait ? no": 1}
    for path, authorization, body in judge.requests:
        assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
        assert body["model"] == "m" and body["messages"][0] == dict(
            role="system", content=JUDGE_PROMPT)
        assert set(body) == {"model", "messages"}  # sampling is the server's


def test_nothing_is_asked_twice(ask, judge):
    ask(TEXTS)
    first = ask(TEXTS)[3]
    assert sum(judge.asked.values()) == 4 and len(first) == 6
    code, out, _, rows = ask([*TEXTS, "hmm hmm", "Hmm."])  # FILE has grown
    assert counts(rows) == counts(first) | {6: 2, 7: 1} and sum(judge.asked.values()) == 5
    assert "1 requests, about" in out
    rows = ask(["new", *TEXTS[1:]])[3]  # and one is another: the last row of an index counts
    assert counts(rows)[0] == 0 and sum(judge.asked.values()) == 6
    assert ask(TEXTS, "--judge_model", "n")[0] == 0  # another judge
    assert judge.asked["Hmm."] == 2


@pytest.mark.parametrize("torn", [b'{"index": 1, "mod', b'\xff\x00', b'{"index": 1, "model": "m"}'])
def test_a_torn_last_line(ask, judge, tmp_path, torn):
    ask(TEXTS[:1])
    with (tmp_path / "a.judged.jsonl").open("ab") as file:
        file.write(torn)
    code, _, _, rows = ask(TEXTS[:3])
    assert code == 0 and counts(rows) == {0: 3, 1: 0, 2: 1} and judge.asked[TEXTS[0]] == 1


def test_a_repeated_response_whose_rows_were_torn_apart(ask, judge, tmp_path):
    ask(["hmm"] * 3)
    path = tmp_path / "a.judged.jsonl"
    path.write_bytes(path.read_bytes().splitlines(True)[0])
    assert counts(ask(["hmm"] * 3)[3]) == {0: 1, 1: 1, 2: 1} and judge.asked["hmm"] == 1


BAD = [reply(None), reply("I count three."), reply('{"count": "many"}'), b"not json", b"", {},
       dict(choices=[]), dict(choices=None), dict(choices=[{}]), [], "text", reply([1]), b"null",
       dict(error=dict(message="no"))]


@pytest.mark.parametrize("status, body", [
    *[(status, dict(error=dict(message="busy"))) for status in (408, 409, 429, 500, 502, 503)],
    (500, b"<html>"), *[(200, body) for body in BAD]])
def test_what_goes_wrong_once_or_twice_is_asked_again(ask, judge, status, body):
    judge.trouble = lambda text, attempt: (status, body) if attempt <= 2 else None
    code, _, _, rows = ask(TEXTS[:3])
    assert code == 0 and counts(rows) == {0: 3, 1: 0, 2: 1}
    assert set(judge.asked.values()) == {3}


def test_a_timeout_is_asked_again(ask, judge, monkeypatch):
    monkeypatch.setattr(epistemic, "JUDGE_TIMEOUT", 1.0)
    judge.trouble = lambda text, attempt: time.sleep(2) if attempt == 1 else None
    assert counts(ask(TEXTS[:1])[3]) == {0: 3} and judge.asked[TEXTS[0]] == 2


@pytest.mark.parametrize("status, body", [
    (200, reply("nonsense")), (400, dict(error=dict(message=f"too long for {KEY}")))])
def test_a_response_that_gets_no_judgement_is_left_out(ask, judge, status, body):
    judge.trouble = lambda text, _: (status, body) if "Wait" in text else None
    code, out, _, rows = ask(TEXTS[:3])
    assert code == 0 and counts(rows) == {1: 0, 2: 1}
    assert "1 not judged, as" in out
    judge.trouble = lambda *_: None
    assert counts(ask(TEXTS[:3])[3]) == {0: 3, 1: 0, 2: 1}  # another day


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_what_cannot_work_ends_in_one_line_and_keeps_what_there_is(ask, judge, status):
    texts = ["hmm", *map(str, range(50))]
    judge.trouble = lambda text, _: text != "hmm" and (
        status, dict(error=dict(message=f"Wrong\nkey {KEY}")))
    code, _, err, rows = ask(texts, "--concurrency", "2")
    assert code == 2 and counts(rows) == {0: 1}
    assert f"Error code: {status}" in err and "***" in err
    assert len(judge.asked) < 8  # it gives up
    judge.trouble = lambda *_: None
    assert len(ask(texts)[3]) == 51 and judge.asked["hmm"] == 1


def test_no_server(ask, monkeypatch):
    import openai
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        code, _, err, _ = ask(TEXTS, url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    assert code == 2 and "Connection error" in err


def test_the_limit_on_concurrency_is_kept_and_used(ask, judge):
    judge.trouble = lambda *_: time.sleep(0.1)
    assert len(ask(map(str, range(12)), "--concurrency", "3")[3]) == 12
    assert judge.most == 3


def test_a_dry_run_asks_nothing(ask, judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    code, out, _, rows = ask(["wait " * 1000, *TEXTS], "--dry_run")
    assert code == 0 and rows == [] and not judge.requests
    assert "5 requests, about" in out and JUDGE_PROMPT in out and "wait wait" in out
    tokens = int(re.search(r"about ([\d,]+) tokens", out)[1].replace(",", ""))
    assert tokens == pytest.approx((5 * len(JUDGE_PROMPT) + 5045) / 4, abs=10)


def test_several_files_one_table(judge, tmp_path, capsys):
    for name, texts in dict(grpo=["hmm hmm", "wait"], sdpo=["so", "4"]).items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(dict(responses=texts)))
    epistemic.main([*map(str, tmp_path.glob("*.jsonl")), "--judge", judge.url,
                    "--judge_model", "m"])
    shown = table(capsys.readouterr().out)
    assert sorted(shown["mean (Table 5)"]) == ["0.00", "1.50"] and len(shown["“hmm”"]) == 2


@pytest.mark.parametrize("flags, said", [
    (["--judge", "localhost"], "needs a URL"), (["--judge", "http://u:p@h/v1"], "needs a URL"),
    (["--judge", "http://h:port/v1"], "needs a URL"), (["--judge", ""], "needs a URL"),
    (["--judge_model", ""], "--judge_model"), (["--concurrency", "0"], "concurrency"),
    (["--field", "draft"], "no field draft"),
])
def test_bad_input_is_one_line_and_exit_code_2(ask, judge, flags, said):
    code, _, err, rows = ask(TEXTS, *flags)
    assert code == 2 and said in err and rows == [] and not judge.requests


def test_bad_files(ask, judge, tmp_path):
    code, _, err, _ = ask([])
    assert code == 2 and "a.jsonl" in err
    for other in ("other\n", '{"response": "wait"}\n', "[1]\n"):
        (tmp_path / "a.judged.jsonl").write_text(other)
        with contextlib.suppress(json.JSONDecodeError):
            code, _, err, _ = ask(TEXTS)
            assert code == 2 and "a.judged.jsonl" in err
        assert (tmp_path / "a.judged.jsonl").read_text() == other
    assert not judge.requests


def test_a_killed_run_goes_on(judge, tmp_path):
    path, judged = tmp_path / "a.jsonl", tmp_path / "a.judged.jsonl"
    path.write_text("".join(json.dumps(dict(text=f"hmm {i}")) + "\n" for i in range(40)))
    judge.trouble = lambda *_: time.sleep(0.1)
    command = [sys.executable, str(ROOT / "epistemic.py"), str(path), "--judge", judge.url,
               "--judge_model", "m", "--concurrency", "2"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not judged.exists() or judged.read_bytes().count(b"\n") < 5:
        assert job.poll() is None
        time.sleep(0.02)
    job.kill()
    job.wait()
    judge.trouble = lambda *_: None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert counts(lines(judged)) == {i: 1 for i in range(40)}
    assert len(lines(judged)) == 40 and sum(judge.asked.values()) <= 42  # two were under way


# ---------------------------------------------------------------------------------- vLLM


@pytest.mark.vllm
def test_vllms_own_server(tmp_path, capsys):
    """The toy answers nonsense, which is the point; its real answers are what it is asked about."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
               "--port", str(port), "--model", str(ROOT / "toy/model"), "--dtype", "float32",
               "--served-model-name", "toy", "--enforce-eager", "--kv-cache-memory-bytes",
               str(2**28)]
    env = dict(os.environ, OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR", NO_PROXY="127.0.0.1")
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 600  # a busy machine takes its time
        while time.monotonic() < end:
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(dict(response=t)) + "\n" for t in (
            "Wait, 3.", "Hmm.", "4", "wait " * 5000)))  # the last is longer than its context
        flags = [str(path), "--judge", f"http://127.0.0.1:{port}/v1", "--judge_model"]
        with pytest.raises(SystemExit) as ended:
            epistemic.main([*flags, "toy"])
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and "4 not judged, as" in out and err.count("\n") == 1
        assert lines(tmp_path / "a.judged.jsonl") == []
        with pytest.raises(SystemExit):
            epistemic.main([*flags, "another"])
        assert "Error code: 404" in capsys.readouterr().err
    finally:
        kill.kill_family(server.pid)
        server.wait()
