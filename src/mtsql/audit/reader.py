"""Read SQL of the SParC, CoSQL and Spider kind.

`read_sql` resolves names as SQLite does: inside out, and text in double quotes is a column where
there is one and a literal elsewhere. It raises `Unreadable` for everything that it does not know
for sure (comments, USING, an ambiguous column, rowid, ...), so that nothing is guessed.
"""

import re

from mtsql.audit.statement import Select, Source, Span, Statement, Token, Unreadable
from mtsql.sql.schema import Schema, fold

KEYWORDS = frozenset(
    "select distinct all from as join inner left right full outer cross natural on using where and "
    "or not in like glob between is null exists group by having order asc desc limit offset union "
    "intersect except case when then else end cast collate escape with values".split()
)
MAX_DEPTH = 50
"""Queries within queries."""
SET_OPERATORS = ("union", "intersect", "except")
CLAUSE_HEADS = ("from", "where", "group", "having", "order", "limit")
_NOT_READ = frozenset("as case cast collate escape natural using values with".split())
_JOIN_WORDS = frozenset("join inner left right full outer cross natural ,".split())
_TOKEN = re.compile(
    r"""(?P<string>'(?:[^']|'')*')
      | (?P<double>"(?:[^"]|"")*")
      | (?P<quoted>`(?:[^`]|``)*` | \[[^\]]*\])
      | (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?!\w))
      | (?P<word>[^\W\d][\w$]*)
      | (?P<sign>--|/\*|<>|==|[<>!]\s*=|\|\||[-+*/%<>=(),.;])""",
    re.VERBOSE,
)
_BLANKS = re.compile(r"\s*")


def read_sql(text: str, schema: Schema) -> Statement:
    """Read one statement. Its schema must be the database's own. Raises Unreadable."""
    tokens, at = [], 0
    text = text.rstrip(" \t\r\n;")
    while at < len(text):
        before = _BLANKS.match(text, at)[0]
        match = _TOKEN.match(text, at + len(before))
        if match is None or match[0] in ("--", "/*", ";"):
            raise Unreadable(f"at {text[at : at + 20]!r}")
        tokens.append(Token(match[0], match.lastgroup, before))
        at = match.end()
    statement = Statement(schema, tokens, roles=["sign"] * len(tokens))
    _Reader(statement).query((0, len(tokens)), None)
    return statement


class _Reader:
    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.tokens = statement.tokens
        self.tables = {
            fold(table.name): tuple(fold(column.name) for column in table.columns)
            for table in statement.schema.tables
        }
        self.depth = 0
        self.unclear = KEYWORDS & {name for names in self.tables.values() for name in names}
        """Words that could be a column's name."""

    def query(self, span: Span, outer: Select | None) -> Select:
        """Read SELECTs and what connects them; -> the first one."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        arms, start = [], span[0]
        for at in self.statement.outside_brackets(span):
            if self.word(at) in SET_OPERATORS:
                arms.append((start, at))
                self.statement.roles[at] = "keyword"
                start = at + 1
                if self.word(start) == "all":
                    self.statement.roles[start] = "keyword"
                    start += 1
        arms.append((start, span[1]))
        selects = [self.select(arm, outer, len(arms) > 1) for arm in arms]
        if len(arms) > 1 and any({"order", "limit"} & select.clauses.keys() for select in selects):
            raise Unreadable("an order of several SELECTs together")
        self.depth -= 1
        return selects[0]

    def select(self, span: Span, outer: Select | None, is_arm: bool) -> Select:
        self.expect(span[0], "select")
        select = Select(*span, outer, is_arm)
        self.statement.selects.append(select)
        head, start = "select", span[0] + 1
        for at in self.statement.outside_brackets((start, span[1])):
            word = self.word(at)
            if word not in CLAUSE_HEADS or self.word(at - 1) == ".":
                continue
            if word in select.clauses or word == head:
                raise Unreadable(f"{word} twice")
            select.clauses[head] = (start, at)
            self.statement.roles[at] = "keyword"
            head, start = word, at + 1
            if word in ("group", "order"):
                self.expect(start, "by")
                start += 1
        select.clauses[head] = (start, span[1])
        if any(first >= end for first, end in select.clauses.values()):
            raise Unreadable("an empty clause")
        if "from" in select.clauses:
            self.sources(select)
        self.items(select)
        for source in select.sources:
            if source.on:
                self.expression(source.on, select, "on")
        for clause, span in select.clauses.items():
            if clause not in ("select", "from"):
                self.expression(span, select, clause)
        return select

    def sources(self, select: Select) -> None:
        at, end = select.clauses["from"]
        join = ""
        while True:
            source = self.source(at, join, select)
            select.sources.append(source)
            at = source.span[1]
            if at < end and self.word(at) == "on":
                self.expect(at, "on")
                places = self.statement.outside_brackets((at + 1, end))
                stop = next((i for i in places if self.word(i) in _JOIN_WORDS), end)
                source.on = (at + 1, stop)
                at = stop
            if at == end:
                return
            words = []
            while self.word(at) in _JOIN_WORDS:
                self.statement.roles[at] = "sign" if self.word(at) == "," else "keyword"
                words.append(self.word(at))
                at += 1
            join = " ".join(words)
            if join not in (",", "join", "inner join", "left join", "left outer join"):
                raise Unreadable(f"connected by {join!r}")

    def source(self, at: int, join: str, select: Select) -> Source:
        start, roles, end = at, self.statement.roles, select.clauses["from"][1]
        if self.word(at) == "(":
            at = self.statement.closing(at) + 1
            inner = self.query((start + 1, at - 1), select.outer)
            source = Source(join, (start, at), None, tuple(inner.result_names))
        else:
            table = self.tokens[at].name if at < end else None
            if table not in self.tables:
                raise Unreadable(f"no table {table}")
            roles[at] = "table"
            at += 1
            source = Source(join, (start, at), table, self.tables[table])
        has_as = self.word(at) == "as" and at < end
        if has_as:
            self.expect(at, "as")
            at += 1
        is_alias = at < end and self.word(at) not in KEYWORDS and self.tokens[at].name is not None
        if has_as and not is_alias:
            raise Unreadable("no alias behind AS")
        if is_alias:
            roles[at] = "alias"
            source.alias, source.alias_at = self.tokens[at].name, at
            at += 1
        source.span = (start, at)
        return source

    def items(self, select: Select) -> None:
        """Read what SELECT returns, and note the names of the results."""
        start, end = select.clauses["select"]
        if self.word(start) in ("distinct", "all"):
            self.statement.roles[start] = "keyword"
            start += 1
        places = self.statement.outside_brackets((start, end))
        commas = [at for at in places if self.word(at) == ","]
        firsts, ends = [start, *(at + 1 for at in commas)], [*commas, end]
        select.items = list(zip(firsts, ends, strict=True))
        aliases: list[str] = []
        for first, last in select.items:
            if first >= last:
                raise Unreadable("an empty column")
            if self.word(last - 2) == "as" and last - 2 > first:
                self.expect(last - 2, "as")
                self.statement.roles[last - 1] = "column"
                self.statement.targets[last - 1] = None
                aliases.append(self.tokens[last - 1].name or "")
                self.expression((first, last - 2), select, "select")
            else:
                self.expression((first, last), select, "select")
                select.result_names += self.plain_names(first, last, select)
        select.result_names += aliases

    def plain_names(self, first: int, last: int, select: Select) -> list[str]:
        """The names of the results of an item without AS: known for a column and for a star."""
        if self.word(last - 1) == "*" and last - first in (1, 3):
            of = select.sources if last - first == 1 else [self.statement.targets[first]]
            return [name for source in of for name in source.columns]
        is_column = last - first == 1 or (last - first == 3 and self.word(first + 1) == ".")
        is_column = is_column and self.statement.roles[last - 1] == "column"
        return [self.tokens[last - 1].name] if is_column else []

    def expression(self, span: Span, select: Select, clause: str) -> None:
        """Give each token of an expression its role, sub-queries included."""
        at, roles = span[0], self.statement.roles
        while at < span[1]:
            token, word = self.tokens[at], self.word(at)
            if word == "(" and self.word(at + 1) == "select":
                closing = self.statement.closing(at)
                self.query((at + 1, closing), select)
                at = closing
            elif token.kind in ("string", "number"):
                roles[at] = "literal"
            elif token.kind == "word" and word in KEYWORDS:
                roles[at] = "keyword"
                if word in _NOT_READ or word in self.unclear:
                    raise Unreadable(word)
            elif token.kind == "word" and self.word(at + 1) == "(":
                roles[at] = "function"
            elif token.name is not None and self.word(at + 1) == ".":
                roles[at] = "qualifier"
                source = self.qualified(token.name, select)
                self.statement.targets[at] = source
                at += 2
                if at >= span[1] or self.word(at) != "*":
                    name = self.tokens[at].name if at < span[1] else None
                    if name not in source.columns:
                        raise Unreadable(f"no column {name}")
                    roles[at] = "column"
                    self.statement.targets[at] = source
            elif token.name is not None:
                try:
                    self.statement.targets[at] = self.unqualified(token.name, select, clause)
                    roles[at] = "column"
                except LookupError:
                    if token.kind != "double":
                        raise Unreadable(f"no column {token.name}") from None
                    roles[at] = "literal"
            at += 1

    def qualified(self, name: str, select: Select | None) -> Source:
        while select is not None:
            found = [source for source in select.sources if source.visible_name == name]
            if len(found) == 1:
                return found[0]
            if found:
                break
            select = select.outer
        raise Unreadable(f"no table {name} in sight")

    def unqualified(self, name: str, select: Select | None, clause: str) -> Source | None:
        """The source of a column; None for the name of a result. LookupError for neither."""
        if clause == "order" and name in select.result_names:
            sources = [source for source in select.sources if name in source.columns]
            return sources[0] if len(sources) == 1 and not self.is_renamed(name, select) else None
        while select is not None:
            sources = [source for source in select.sources if name in source.columns]
            if len(sources) > 1:
                raise Unreadable(f"the column {name} is ambiguous")
            if sources:
                return sources[0]
            if name in select.result_names and clause != "select":
                return None
            select = select.outer
        raise LookupError(name)

    def is_renamed(self, name: str, select: Select) -> bool:
        """Whether a result was given this name by AS."""
        ends = [last for _, last in select.items]
        return any(self.word(e - 2) == "as" and self.tokens[e - 1].name == name for e in ends)

    def word(self, at: int) -> str:
        return self.statement.word(at)

    def expect(self, at: int, word: str) -> None:
        if self.word(at) != word:
            raise Unreadable(f"{word} expected")
        self.statement.roles[at] = "keyword"
