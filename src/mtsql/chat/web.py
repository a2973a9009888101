"""The conversation as a page for the browser of this machine.

The server is that of the standard library. It is bound to the loopback interface, every address
begins with a random token, and the page may load nothing but its own two files. What comes from a
database or a model is sent as JSON, and the page shows it as text.

Under the token: GET `` (the page), `page.css`, `page.js`, `state`, `export`, `csv?number=1`; POST
`ask` (a line of JSON for each event, as it happens), `stop`, `edit`, `undo`, `new` (the new state).
Those that change the conversation may name the `version` of the state that their page shows; if it
is not the newest one, because another tab has changed the conversation, they are refused.
"""

import json
import secrets
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mtsql.chat.session import Session, csv_text, event_as_data, rows_of, turn_as_data
from mtsql.files import print_line
from mtsql.run.signals import Terminated
from mtsql.sql.schema import schema_text

HOST = "127.0.0.1"
MAX_BODY = 1 << 20
"""Bytes of a request."""
PAGE = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
RELEASE_SECS = 1.0
"""How long a request waits for the one before, which sends its reply before it ends."""
BUSY = "the model is still answering: stop it, or wait"
STALE = "the conversation was changed in another tab, and is shown anew: look, and try again"


class ChatServer(ThreadingHTTPServer):
    """Serves one session. questions: examples that the page offers."""

    daemon_threads = True

    def __init__(self, session: Session, port: int, max_rows: int, questions: list[str]) -> None:
        """ValueError that names the port if it is taken."""
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ValueError(f"port {port}: cannot be used: {error.strerror}") from error
        self.session = session
        self.max_rows = max_rows
        self.questions = questions
        self.token = secrets.token_urlsafe(24)
        self.lock = threading.Lock()  # held by the one request that changes the conversation

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing if a browser has closed its connection, as it does at a reload."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Where the page is. Whoever knows it can talk to the model, and nobody else can."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def state(self) -> dict[str, Any]:
        """The whole conversation, as the page shows it."""
        conversation = self.session.conversation
        return {
            "database": conversation.database.path.name,
            "model": self.session.agent.config.model,
            "schema": schema_text(conversation.database.schema),
            "values": conversation.evidence,
            "questions": self.questions,
            "version": conversation.version,
            "dialogue": len(conversation.dialogues),
            "turns": [turn_as_data(turn, self.max_rows) for turn in conversation.turns],
            "memory": [
                {"question": one.question, "sql": one.sql, "clauses": list(one.clauses)}
                for one in conversation.memory()
            ],
        }


def serve(session: Session, port: int, max_rows: int, questions: list[str]) -> None:
    """Serve the page until Ctrl-C."""
    with ChatServer(session, port, max_rows, questions) as server:
        print_line(f"open {server.address}\nCtrl-C ends the conversation")
        try:
            server.serve_forever()
        except Terminated:
            raise
        except KeyboardInterrupt:
            session.agent.stop()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: ChatServer
    server_version = "mtsql"
    sys_version = ""

    def do_GET(self) -> None:
        """The page, its state, and files to save."""
        path = self._path()
        session = self.server.session
        if path is None:
            self._refuse(HTTPStatus.NOT_FOUND, "not found")
        elif path in PAGE:
            name, kind = PAGE[path]
            self._send(files("mtsql.chat").joinpath(name).read_bytes(), kind)
        elif path == "state":
            self._send_json(self.server.state())
        elif path == "export":
            self._send_file("dialogue.json", "application/json", session.conversation.sparc_text)
        elif path == "csv":
            self._send_file("result.csv", "text/csv; charset=utf-8", self._csv)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "not found")

    def do_POST(self) -> None:
        """Changes of the conversation. Only one at a time; `stop` is always possible."""
        path = self._path()
        if path not in ("ask", "stop", "edit", "undo", "new"):
            self._refuse(HTTPStatus.NOT_FOUND, "not found")
            return
        body = self._body()
        if body is None:
            self._refuse(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        elif path == "stop":
            self.server.session.agent.stop()
            self._send_json({})
        elif not self.server.lock.acquire(timeout=RELEASE_SECS):
            self._refuse(HTTPStatus.CONFLICT, BUSY)
        else:
            try:
                self._change(path, body)
            finally:
                self.server.lock.release()

    def _change(self, path: str, body: dict[str, Any]) -> None:
        conversation = self.server.session.conversation
        if body.get("version", conversation.version) != conversation.version:
            self._refuse(HTTPStatus.CONFLICT, STALE)  # the page shows another conversation
            return
        try:
            if path == "ask":
                self._ask(_text(body, "question"))
                return
            if path == "edit":
                conversation.edit(_whole(body.get("number")), _text(body, "sql"))
            elif path == "undo":
                conversation.undo()
            else:
                conversation.begin()
        except ValueError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        self._send_json(self.server.state())

    def _ask(self, question: str) -> None:
        """Send a line for each event. If the page is closed meanwhile, the question is answered all
        the same, and the page has it when it is opened again."""
        self._begin("application/x-ndjson", HTTPStatus.OK)
        is_open = True
        with closing(self.server.session.ask(question)) as events:
            while True:
                try:
                    data = event_as_data(next(events), self.server.max_rows)
                except StopIteration:
                    return
                except ValueError as error:  # also: stopped
                    data = {"kind": "error", "error": str(error)}
                if is_open:
                    is_open = self._write_line(data)

    def _write_line(self, data: dict[str, Any]) -> bool:
        """Whether the page is still there."""
        try:
            self.wfile.write(f"{json.dumps(data)}\n".encode())
            self.wfile.flush()
        except OSError:
            return False
        return True

    def _csv(self) -> str:
        number = parse_qs(urlsplit(self.path).query).get("number", [""])[0]
        return csv_text(rows_of(self.server.session.conversation.turn(_whole(number))))

    def _path(self) -> str | None:
        """The path after the token; None without it, or for another host than the loopback."""
        try:
            _, token, *rest = urlsplit(self.path).path.split("/")[:3]
        except ValueError:  # no path, or no address at all
            return None
        is_known = secrets.compare_digest(token.encode(), self.server.token.encode())
        hosts = (f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
        if not is_known or self.headers.get("Host") not in hosts or not rest:
            return None
        return rest[0]

    def _body(self) -> dict[str, Any] | None:
        """The JSON object of a request; None if there is none."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return None
        try:
            value = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def _send_file(self, name: str, kind: str, make: Callable[[], str]) -> None:
        try:
            text = make()
        except ValueError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        self._send(text.encode(), kind, {"Content-Disposition": f'attachment; filename="{name}"'})

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", status=status)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send_json({"error": reason}, status)

    def _send(
        self,
        content: bytes,
        kind: str,
        headers: dict[str, str] | None = None,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        self._begin(kind, status, {"Content-Length": str(len(content)), **(headers or {})})
        with suppress(OSError):  # the page was closed
            self.wfile.write(content)

    def _begin(self, kind: str, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        with suppress(OSError):  # the page was closed
            self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal shows the address only."""


def _text(body: dict[str, Any], key: str) -> str:
    """A text of a request. ValueError for anything else."""
    value = body.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a text")
    return value


def _whole(value: object) -> int:
    """The number of a question. ValueError for anything else."""
    text = str(value)
    if not text.isdecimal():
        raise ValueError("expected the number of a question")
    return int(text)
