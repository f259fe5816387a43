"""App. B.5's judge: its reply is read, a text asked once, the count kept; with a client of the
test's own, and against vLLM's server."""
import contextlib
import json
import os
import re
import runpy
import sys
import urllib.request
from types import SimpleNamespace

import httpx
import openai
import pytest

import kill
from common import FORKS, ROOT, free_port, lines
from extras import judge

KEY = "sk-this-must-stay-unseen"
TEXTS = ["Wait. Hmm, wait.", "So 4.", "Hmm.", "Hmm."]
TOO_LONG = openai.BadRequestError("too long", body=None, response=httpx.Response(
    400, request=httpx.Request("POST", "http://here")))


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    """ask(texts, *flags): (exit code, what is printed, the counts in the .judged file).

    The client counts `wait` and `hmm`, or says or raises ask.trouble(text).
    """
    def create(**body):
        ask.bodies.append(body)
        text = body["messages"][-1]["content"]
        quotes = re.findall("wait|hmm", text.lower())
        said = ask.trouble(text) or "Sure! ```json\n" + json.dumps(
            dict(count=len(quotes), examples=quotes))
        if isinstance(said, Exception):
            raise said
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=said))])

    def client(base_url, api_key, max_retries, timeout):
        assert (base_url, api_key) == ("http://here/v1", KEY)
        return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))

    def ask(texts, *flags):
        path, code = tmp_path / "a.jsonl", 0
        path.write_text("".join(json.dumps(dict(response=text)) + "\n" for text in texts))
        monkeypatch.setattr(sys, "argv", ["judge.py", str(path), "--url", "http://here/v1",
                                          "--model", "m", *flags])
        try:
            judge.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert KEY not in out + err
        return code, out + err, sorted(row["count"] for row in lines(tmp_path / "a.judged"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai, "OpenAI", client)
    ask.trouble, ask.bodies = lambda _: None, []
    return ask


@pytest.mark.parametrize("reply, count", [
    ('Sure:\n```json\n{"count": 3, "examples": ["wait"]}\n```\nAnything else?', 3),
    ('{"count": 9, "examples": []} No, sorry: {"count": 3, "examples": []}', 3),
    ('{"count": 3, "examples": []}<think>{"count": 9}</think>', None),
    (r'{"count": 1, "examples": ["so \sin x might", "\"count\": 7, he said"]}', 1),
    ('{"count": 2.0}', 2), ('{"count": 2.5}', None), ("I count three.", None),
    ('{"count": "many"}', None), ("", None)])
def test_the_judges_reply(reply, count):
    assert judge.read_count(reply) == count


def test_what_is_asked_and_what_is_shown(ask):
    code, said, counts = ask(TEXTS)
    assert code == 0 and counts == [0, 1, 3]  # texts that are alike are asked once
    table = {line[:28].strip(): line[28:].split() for line in said.splitlines() if line[28:]}
    assert table["mean (Table 5)"] == ["1.25"] and table["responses"] == ["4"]
    assert table["least, quartiles, most"] == ["0", "1", "1", "1", "3"]
    for body in ask.bodies:
        assert body["messages"][0] == dict(role="system", content=judge.JUDGE_PROMPT)
        assert set(body) == {"model", "messages"}  # sampling is the server's


def test_nothing_is_asked_twice_and_another_judge_or_text_is(ask, tmp_path):
    ask(TEXTS)
    assert [*tmp_path.glob("*.jsonl")] == [tmp_path / "a.jsonl"]  # eval/step_*.jsonl finds no other
    with open(tmp_path / "a.judged", "ab") as file:
        file.write(b'{"hash": "\xff\x00')  # half a row, left by a kill
    assert ask([*TEXTS, "hmm hmm"])[2] == [0, 1, 2, 3] and len(ask.bodies) == 4
    assert ask(TEXTS, "--model", "n")[0] == 0 and len(ask.bodies) == 7


@pytest.mark.parametrize("trouble, code, shown", [
    ("nonsense", 0, "2 of 3 responses"), (TOO_LONG, 0, "2 of 3 responses"),
    (ValueError(f"Wrong\nkey {KEY}"), 2, "error: Wrong key ***")])
def test_without_a_count_the_others_are_kept(ask, trouble, code, shown):
    texts = ["hmm", "4", "last"]
    ask.trouble = lambda text: trouble if text == "last" else None
    ended, said, counts = ask(texts)
    assert ended == code and shown in said and counts == [0, 1]
    ask.trouble = lambda _: None
    assert ask(texts)[2] == [0, 0, 1]  # a second start asks again


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
            server.join(0.5)
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(dict(response=t)) + "\n" for t in (
            "Wait, 3.", "wait " * 5000)))  # the last is longer than its context
        for name, said in (("toy", "0 of 2 responses"), ("another", "Error code: 404")):
            monkeypatch.setattr(sys, "argv", [
                "judge.py", str(path), "--url", f"http://127.0.0.1:{port}/v1", "--model", name])
            with pytest.raises(SystemExit) as ended:
                judge.main()
            shown = capsys.readouterr()
            assert ended.value.code == 2 and said in shown.out + shown.err
        assert lines(tmp_path / "a.judged") == []
    finally:
        kill.kill_family(server.pid)
        server.join()
