"""The conversation as a page: who may read it, what it sends, and what a browser shows."""

import http.client
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from helpers.browser import CHROMIUM, browser
from helpers.databases import snapshot
from helpers.episodes import answer, call
from helpers.runs import SCRIPTS, clean_environment
from helpers.told import told_session
from mtsql.agent.reply import Verdict, format_reply
from mtsql.chat.web import HEADERS, ChatServer
from mtsql.sql.dialogues import load_corpus

COUNT = "SELECT count(*) FROM singer"
NAMES = "SELECT name, age, NULL AS missing FROM singer"
HOSTILE = (
    'SELECT \'<img src=x onerror="document.title=1">\' AS "<b>x</b>", '
    "'</script><script>document.title=2</script>' AS s, x'3c62' AS b, 9e999 AS i, NULL AS n"
)


@pytest.fixture
def serve(tmp_path):
    """Starts servers of sessions with these episodes."""
    started = []
    (tmp_path / "db").mkdir()

    def start(*episodes, secs_per_word=0.0):
        session = told_session(tmp_path / "db", *episodes, secs_per_word=secs_per_word)
        server = ChatServer(session, 0, 20, ["how many ?"])
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def request(server, method, path, body=None, host=None, token=None):
    """(status, headers, body) of a request."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port)) as connection:
        headers = {"Host": host} if host else {}
        whole = f"/{server.token if token is None else token}/{path}"
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, whole, data, headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()


def ask(server, question):
    """The events of a question."""
    status, _, body = request(server, "POST", "ask", {"question": question})
    assert status == 200
    return [json.loads(line) for line in body.splitlines()]


def test_a_question_sends_its_events_as_they_happen(serve, tmp_path):
    server = serve([call(COUNT, think="all"), answer(NAMES, ran=Verdict.PASS)])
    before = snapshot(tmp_path / "db")
    events = ask(server, "who ?")
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "reading" and kinds[-1] == "ended" and "sampled" in kinds
    names = [event["step"]["name"] for event in events if event["kind"] == "did"]
    assert names == ["think", "propose", "execute", "verify", "answer"]
    turn = events[-1]["turn"]
    assert turn["rows"] == [["Ann", 41, None], ["Bob", 25, None]]
    state = json.loads(request(server, "GET", "state")[2])
    assert state["turns"] == [turn] and state["memory"][0]["sql"] == NAMES
    assert state["schema"].startswith("singer(name text") and state["questions"] == ["how many ?"]
    edited = request(server, "POST", "edit", {"number": 1, "sql": COUNT})
    assert edited[0] == 200 and json.loads(edited[2])["turns"][0]["is_edited"]
    status, headers, body = request(server, "GET", "export")
    assert status == 200 and headers["Content-Disposition"].startswith("attachment")
    (tmp_path / "dialogue.json").write_bytes(body)
    corpus = load_corpus(tmp_path / "dialogue.json", None, tmp_path / "db")
    assert [turn.sql for turn in corpus.turns] == [COUNT]
    assert request(server, "GET", "csv?number=1")[2] == b"count(*)\n2\n"
    for _ in range(2):
        status, _, body = request(server, "POST", "undo", {})
    assert status == 200 and json.loads(body)["turns"] == []
    assert snapshot(tmp_path / "db") == before


def test_nobody_without_the_token_gets_anything(serve):
    server = serve([answer(COUNT)])
    assert server.server_address[0] == "127.0.0.1" and len(server.token) >= 32
    assert server.address == f"http://127.0.0.1:{server.server_port}/{server.token}/"
    for token, host in [
        ("", None),
        ("x" * 32, None),
        (server.token[:-1], None),
        ("é%00..", None),
        (None, "evil.example"),
        (None, f"evil.example:{server.server_port}"),
    ]:
        for method, path in [("GET", ""), ("GET", "state"), ("POST", "ask"), ("GET", "../state")]:
            token_path = None if token is None else token.encode().hex() if "é" in token else token
            status, headers, body = request(server, method, path, {}, host, token_path)
            assert status == 404 and body == b'{"error": "not found"}', (token, host, path)
    assert server.session.conversation.is_empty
    status, headers, body = request(server, "GET", "")
    assert status == 200 and b"<!DOCTYPE html>" in body and server.token.encode() not in body
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "'unsafe" not in headers["Content-Security-Policy"]
    for name in ("page.html", "nothing", "page.css/x", "%2e%2e/state"):
        assert request(server, "GET", name)[0] in (404, 200) and name
    assert request(server, "GET", "page.html")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("ask", [], 400, "expected a JSON object"),
        ("ask", None, 400, "expected a JSON object"),
        ("edit", {"number": 1, "sql": "SELECT 1"}, 422, "nothing has been asked"),
        ("edit", {"number": "one"}, 422, "expected the number of a question"),
        ("undo", {}, 422, "nothing to undo"),
        ("new", {}, 422, "still empty"),
        ("drop", {}, 404, "not found"),
        ("ask", {"question": None}, 422, "question: expected a text"),
        ("edit", {"number": 1, "sql": {"a": 1}}, 422, "sql: expected a text"),
    ],
)
def test_wrong_requests_are_named(serve, path, body, status, words):
    found, _, text = request(serve([answer(COUNT)]), "POST", path, body)
    assert found == status and words in json.loads(text)["error"]


def test_a_tab_that_shows_another_conversation_changes_nothing(serve):
    server = serve([answer(COUNT)])
    ask(server, "how many ?")
    old = json.loads(request(server, "GET", "state")[2])["version"]
    assert request(server, "POST", "new", {"version": old})[0] == 200  # in the other tab
    ask(server, "who ?")
    for path, body in (
        ("edit", {"number": 1, "sql": NAMES}),
        ("undo", {}),
        ("new", {}),
        ("ask", {"question": "and ?"}),
    ):
        status, _, text = request(server, "POST", path, {**body, "version": old})
        assert status == 409 and "in another tab" in json.loads(text)["error"], path
    state = json.loads(request(server, "GET", "state")[2])
    assert state["dialogue"] == 2 and [one["sql"] for one in state["turns"]] == [COUNT]
    edit = {"number": 1, "sql": NAMES, "version": state["version"]}
    assert request(server, "POST", "edit", edit)[0] == 200


def raw(server, content, is_reset=False):
    """What comes back for these bytes; the connection may be reset at once."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(content)
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return b""
        return connection.recv(1000)


def test_a_connection_that_is_reset_and_a_broken_request_print_nothing(serve, capsys):
    server = serve([answer(COUNT)])
    host = f"Host: 127.0.0.1:{server.server_port}\r\n"
    for path in ("*", "http://[", f"http://[/{server.token}/state", "//["):
        assert b"404" in raw(server, f"GET {path} HTTP/1.1\r\n{host}\r\n".encode())
    for _ in range(5):
        raw(server, f"GET /{server.token}/state HTTP/1.1\r\n{host}\r\n".encode(), is_reset=True)
    body = b'{"question": "who ?"}'
    head = f"POST /{server.token}/ask HTTP/1.1\r\n{host}Content-Length: {len(body)}\r\n\r\n"
    raw(server, head.encode() + body, is_reset=True)
    end = time.monotonic() + 60
    while server.session.conversation.is_empty:  # the question is answered all the same
        assert time.monotonic() < end
        time.sleep(0.01)
    assert request(server, "GET", "state")[0] == 200
    assert capsys.readouterr().err == ""


def test_an_empty_question_is_an_event_with_an_error(serve):
    assert ask(serve([answer(COUNT)]), " ") == [{"kind": "error", "error": "the question is empty"}]


def test_one_question_at_a_time_and_stop_at_any_time(serve):
    server = serve([call(COUNT, think="so " * 4000)], secs_per_word=0.002)
    found = []
    asking = threading.Thread(target=lambda: found.extend(ask(server, "who ?")))
    asking.start()
    while not server.lock.locked():
        pass
    assert request(server, "POST", "undo", {})[0] == 409
    assert request(server, "POST", "ask", {"question": "and ?"})[0] == 409
    while asking.is_alive():  # the first one may come before the agent has begun
        assert request(server, "POST", "stop", {})[0] == 200
        asking.join(0.05)
    assert "stopped" in found[-1]["error"] and server.session.conversation.is_empty


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A browser on the page of a server in a process of its own, whose episodes are hostile."""
    monkeypatch.setattr("helpers.browser.SECS", 300.0)
    (tmp_path / "db").mkdir()
    hostile = [
        call(HOSTILE, think="<img src=x onerror='document.title=3'>"),
        answer(HOSTILE, ran=Verdict.NO_PASS),
    ]
    slow = [call(COUNT, think="so " * 3000)]
    plain = [answer("SELECT * FROM singer")]
    texts = [[format_reply(one) for one in episode] for episode in (hostile, plain, slow)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "told_chat.py"), "web", str(tmp_path / "db")],
        env={**clean_environment(), "TOLD": json.dumps(texts), "TOLD_SECS": "0.005"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().split()[1]
        with browser(tmp_path / "browser") as tab:
            tab.open(address, "document.querySelector('#examples button') !== null")
            yield tab
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def write(page, text):
    page.run(f"document.querySelector('#question').value = {json.dumps(text)}")
    page.point("#question", click=True)
    page.key("Enter")


IS_IDLE = "document.querySelector('#stop').hidden"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_every_control_works_in_a_browser_and_hostile_text_stays_text(page, tmp_path):
    count = "document.querySelectorAll('#turns .turn .answer').length"
    page.point("#examples button", click=True)
    page.wait(f"{count} === 1 && {IS_IDLE}")
    cells = page.run("[...document.querySelectorAll('td, th')].map(one => one.textContent)")
    assert cells[0] == "<b>x</b>" and cells[5].startswith("<img src=x")
    assert cells[-3:] == ["X'3C62'", "inf", "NULL"]
    assert page.run("document.querySelectorAll('main img, main script, main b').length") == 0
    assert page.run("document.title") == "mtsql chat"
    assert page.run("document.querySelector('.step').open") is False
    page.point(".step summary", click=True)
    assert page.run("document.querySelector('.step pre').textContent").startswith("<img")
    num_open = "document.querySelectorAll('details.step[open]').length"
    assert page.run(num_open) == 1
    write(page, "who is there ?")
    page.wait(f"{count} === 2 && {IS_IDLE}")
    assert page.run(num_open) == 1  # what was open stays open
    page.point("#fold", click=True)
    assert page.run("document.querySelectorAll('details.step:not([open])').length") == 0
    page.point("#fold", click=True)
    assert page.run(num_open) == 0
    # SQL by hand
    page.point("#turns .turn:last-child .tools button", click=True)
    page.run("document.querySelector('.edit').value = 'SELECT nme FROM singer'")
    page.point(".save", click=True)
    page.wait("document.querySelector('#error').textContent.includes('no such column: nme')")
    page.run(f"document.querySelector('.edit').value = {json.dumps(NAMES)}")
    page.key("Enter") if page.run("document.activeElement.className") == "edit" else page.point(
        ".save", click=True
    )
    page.wait("document.body.textContent.includes('edited by you')")
    # Stop, new dialogue, undo
    write(page, "why ?")
    page.wait("document.querySelector('.live')?.textContent.includes('so so so')")
    page.key("Escape")
    page.wait(f"{IS_IDLE} && document.querySelector('#error').textContent.includes('stopped')")
    assert page.run(count) == 2 and page.run("document.querySelector('#question').value") == "why ?"
    page.point("#new", click=True)
    page.wait(f"{count} === 0")
    page.point("#undo", click=True)
    page.wait(f"{count} === 2")
    page.point("#undo", click=True)
    page.wait("!document.body.textContent.includes('edited by you')")
    assert page.run("document.querySelector('#memory-box').hidden") is False
    for name, width, is_dark in (
        ("light", 1000, False),
        ("dark", 1000, True),
        ("phone", 360, True),
    ):
        page.resize(width, 800, is_dark)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), name
        page.screenshot(tmp_path / f"{name}.png")
    assert page.errors == [
        error for error in page.errors if "422" in error
    ]  # the browser notes the refused SQL
    hosts = {address.split("/")[2] for address in page.requests if address.startswith("http")}
    assert len(hosts) == 1 and hosts.pop().startswith("127.0.0.1:")
