"""App. B.5's judge: its reply is read, a text asked once, the count kept; with a server of the
test's own in the judge's place."""
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import lines
from extras import judge

KEY = "sk-this-must-stay-unseen"
TEXTS = ["Wait. Hmm, wait.", "So 4.", "Hmm.", "Hmm."]


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    """ask(texts, *flags): (exit code, what is printed, the counts in the .judged file).

    The server counts `wait` and `hmm`, or has ask.trouble(text), (status, words), to say.
    """
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ask.bodies.append(body)
            text = body["messages"][-1]["content"]
            quotes = re.findall("wait|hmm", text.lower())
            status, said = ask.trouble(text) or (200, "Sure! ```json\n" + json.dumps(
                dict(count=len(quotes), examples=quotes)))
            reply = json.dumps(dict(choices=[dict(message=dict(content=said))])
                               if status == 200 else dict(error=dict(message=said))).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    def ask(texts, *flags):
        path, code = tmp_path / "a.jsonl", 0
        path.write_text("".join(json.dumps(dict(response=text)) + "\n" for text in texts))
        monkeypatch.setattr(sys, "argv", [
            "judge.py", str(path), "--url", f"http://127.0.0.1:{server.server_port}/v1",
            "--model", "m", *flags])
        try:
            judge.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert KEY not in out + err
        return code, out + err, sorted(row["count"] for row in lines(tmp_path / "a.judged"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    ask.trouble, ask.bodies = lambda _: None, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ask
        server.shutdown()


@pytest.mark.parametrize("reply, count", [
    ('Sure:\n```json\n{"count": 3, "examples": ["wait"]}\n```\nAnything else?', 3),
    ('{"count": 9, "examples": []} No, sorry: {"count": 3, "examples": []}', 3),
    ('{"count": 3, "examples": []}<think>{"count": 9}</think>', None),
    (r'{"count": 1, "examples": ["so \sin x might", "\"count\": 7, he said"]}', 1),
    ('{"count": 2.0}', 2), ('{"count": 2.5}', None), ("I count three.", None),
    ('{"count": "many"}', None), ("", None)])
def test_the_judges_reply(reply, count):
    assert judge.read_count(reply) == count


def test_nothing_is_asked_twice_and_another_judge_or_text_is(ask, tmp_path):
    code, said, counts = ask(TEXTS)
    assert code == 0 and counts == [0, 1, 3] and "1.25" in said  # like texts are asked once
    assert all(body["messages"][0]["content"] == judge.JUDGE_PROMPT for body in ask.bodies)
    assert [*tmp_path.glob("*.jsonl")] == [tmp_path / "a.jsonl"]  # eval/step_*.jsonl finds no other
    with open(tmp_path / "a.judged", "ab") as file:
        file.write(b'{"hash": "\xff\x00')  # half a row, left by a kill
    assert ask([*TEXTS, "hmm hmm"])[2] == [0, 1, 2, 3] and len(ask.bodies) == 4
    assert ask(TEXTS, "--model", "n")[0] == 0 and len(ask.bodies) == 7


@pytest.mark.parametrize("status, trouble, code, shown", [
    (200, "nonsense", 0, "2 of 3 responses"), (400, "too long", 0, "2 of 3 responses"),
    (401, f"wrong key {KEY}", 2, "wrong key ***")])
def test_without_a_count_the_others_are_kept(ask, status, trouble, code, shown):
    texts = ["hmm", "4", "last"]
    ask.trouble = lambda text: (status, trouble) if text == "last" else None
    ended, said, counts = ask(texts)
    assert ended == code and shown in said and counts == [0, 1]
    ask.trouble = lambda _: None
    assert ask(texts)[2] == [0, 0, 1]  # a second start asks again
