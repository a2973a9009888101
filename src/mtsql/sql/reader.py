"""Read SQL of the kind in SParC, CoSQL and Spider.

`read_sql` resolves names as SQLite does: from the inside to the outside, and a text in double
quotes is a column if there is one of that name, else a literal. It raises `Unreadable` for
everything that it does not know for sure (comments, USING, an ambiguous column, rowid, ...), so it
never guesses.
"""

import re
from typing import cast

from mtsql.sql.schema import Schema, fold
from mtsql.sql.statement import Select, Source, Span, Statement, Token, TokenKind, Unreadable

KEYWORDS = frozenset(
    "select distinct all from as join inner left right full outer cross natural on using where and "
    "or not in like glob between is null exists group by having order asc desc limit offset union "
    "intersect except case when then else end cast collate escape with values".split()
)
MAX_DEPTH = 50
"""Limit of queries within queries."""
SET_OPERATORS = ("union", "intersect", "except")
CLAUSE_HEADS = ("from", "where", "group", "having", "order", "limit")
_NOT_READ = frozenset("as case cast collate escape natural using values with".split())
_JOIN_WORDS = frozenset("join inner left right full outer cross natural ,".split())
_READ_JOINS = (",", "join", "inner join", "left join", "left outer join")
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
    """Read one statement. The schema must be the database's own. Raises Unreadable."""
    tokens = _tokens(text.rstrip(" \t\r\n;"))
    statement = Statement(schema, tokens, roles=["sign"] * len(tokens))
    _Reader(statement).query((0, len(tokens)), None)
    return statement


def _tokens(text: str) -> list[Token]:
    tokens = []
    at = 0
    while at < len(text):
        blanks = _BLANKS.match(text, at)
        before = blanks[0] if blanks else ""
        match = _TOKEN.match(text, at + len(before))
        if match is None or match[0] in ("--", "/*", ";"):
            raise Unreadable(f"at {text[at : at + 20]!r}")
        kind = cast(TokenKind, match.lastgroup)  # the groups are named after the kinds
        tokens.append(Token(match[0], kind, before))
        at = match.end()
    return tokens


class _Reader:
    """Fills a statement: the roles and targets of its tokens, and its SELECTs."""

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.tokens = statement.tokens
        self.roles = statement.roles
        self.targets = statement.targets
        self.tables: dict[str, tuple[str, ...]] = {}
        for table in statement.schema.tables:
            self.tables[fold(table.name)] = tuple(fold(column.name) for column in table.columns)
        self.depth = 0
        column_names = {name for names in self.tables.values() for name in names}
        self.ambiguous_keywords = KEYWORDS & column_names

    def word(self, at: int) -> str:
        """The word or sign at a place."""
        return self.statement.word(at)

    def expect(self, at: int, word: str) -> None:
        """Read a keyword that must stand at a place."""
        if self.word(at) != word:
            raise Unreadable(f"{word} expected")
        self.roles[at] = "keyword"

    def query(self, span: Span, outer: Select | None) -> Select:
        """Read the SELECTs that set operators connect; return the first one."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        arms = self.arms(span)
        selects = [self.select(arm, outer, len(arms) > 1) for arm in arms]
        if len(arms) > 1 and any({"order", "limit"} & select.clauses.keys() for select in selects):
            raise Unreadable("an order of several SELECTs together")
        self.depth -= 1
        return selects[0]

    def arms(self, span: Span) -> list[Span]:
        """Split a query at its set operators."""
        arms = []
        start = span[0]
        for at in self.statement.outside_brackets(span):
            if self.word(at) in SET_OPERATORS:
                arms.append((start, at))
                self.roles[at] = "keyword"
                start = at + 1
                if self.word(start) == "all":
                    self.roles[start] = "keyword"
                    start += 1
        arms.append((start, span[1]))
        return arms

    def select(self, span: Span, outer: Select | None, is_arm: bool) -> Select:
        """Read one SELECT. FROM is read first, because the other clauses name its columns."""
        self.expect(span[0], "select")
        select = Select(*span, outer, is_arm)
        self.statement.selects.append(select)
        self.clauses(select)
        if "from" in select.clauses:
            self.sources(select)
        self.items(select)
        for source in select.sources:
            if source.on:
                self.expression(source.on, select, "on")
        for clause, tokens in select.clauses.items():
            if clause not in ("select", "from"):
                self.expression(tokens, select, clause)
        return select

    def clauses(self, select: Select) -> None:
        """Split a SELECT into its clauses."""
        head = "select"
        start = select.start + 1
        for at in self.statement.outside_brackets((start, select.end)):
            word = self.word(at)
            if word not in CLAUSE_HEADS or self.word(at - 1) == ".":
                continue
            if word in select.clauses or word == head:
                raise Unreadable(f"{word} twice")
            select.clauses[head] = (start, at)
            self.roles[at] = "keyword"
            head = word
            start = at + 1
            if word in ("group", "order"):
                self.expect(start, "by")
                start += 1
        select.clauses[head] = (start, select.end)
        if any(first >= end for first, end in select.clauses.values()):
            raise Unreadable("an empty clause")

    def sources(self, select: Select) -> None:
        """Read FROM: tables and sub-queries with their joins and ON conditions."""
        at, end = select.clauses["from"]
        join = ""
        while True:
            source = self.source(at, join, select)
            select.sources.append(source)
            at = source.span[1]
            if at < end and self.word(at) == "on":
                self.expect(at, "on")
                source.on = (at + 1, self.end_of_condition(at + 1, end))
                at = source.on[1]
            if at == end:
                return
            words = []
            while self.word(at) in _JOIN_WORDS:
                self.roles[at] = "sign" if self.word(at) == "," else "keyword"
                words.append(self.word(at))
                at += 1
            join = " ".join(words)
            if join not in _READ_JOINS:
                raise Unreadable(f"connected by {join!r}")

    def end_of_condition(self, start: int, end: int) -> int:
        """The place of the next join outside of brackets, or the end of FROM."""
        places = self.statement.outside_brackets((start, end))
        return next((at for at in places if self.word(at) in _JOIN_WORDS), end)

    def source(self, start: int, join: str, select: Select) -> Source:
        """Read a table or a sub-query with its alias."""
        end = select.clauses["from"][1]
        at = start
        if self.word(at) == "(":
            at = self.statement.closing(at) + 1
            inner = self.query((start + 1, at - 1), select.outer)
            source = Source(join, (start, at), None, tuple(inner.result_names))
        else:
            table = self.tokens[at].name if at < end else None
            if table not in self.tables:
                raise Unreadable(f"no table {table}")
            self.roles[at] = "table"
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
            self.roles[at] = "alias"
            source.alias = self.tokens[at].name
            source.alias_at = at
            at += 1
        source.span = (start, at)
        return source

    def items(self, select: Select) -> None:
        """Read what SELECT returns, and note the names of the results."""
        start, end = select.clauses["select"]
        if self.word(start) in ("distinct", "all"):
            self.roles[start] = "keyword"
            start += 1
        for at in self.statement.outside_brackets((start, end)):
            if self.word(at) == ",":
                select.items.append((start, at))
                start = at + 1
        select.items.append((start, end))
        aliases: list[str] = []
        for first, last in select.items:
            if first >= last:
                raise Unreadable("an empty column")
            if self.word(last - 2) == "as" and last - 2 > first:
                self.expect(last - 2, "as")
                self.roles[last - 1] = "column"
                self.targets[last - 1] = None
                aliases.append(self.tokens[last - 1].name or "")
                self.expression((first, last - 2), select, "select")
            else:
                self.expression((first, last), select, "select")
                select.result_names += self.plain_names(first, last, select)
        select.result_names += aliases

    def plain_names(self, first: int, last: int, select: Select) -> list[str]:
        """The names of the results of an item without AS: known for `a`, `t.a`, `*` and `t.*`."""
        is_short = last - first == 1
        is_qualified = last - first == 3 and self.word(first + 1) == "."
        is_star = self.word(last - 1) == "*"
        if is_short and is_star:
            return [name for source in select.sources for name in source.columns]
        qualified = self.targets.get(first)
        if is_qualified and is_star and qualified is not None:
            return list(qualified.columns)
        name = self.tokens[last - 1].name
        if (is_short or is_qualified) and self.roles[last - 1] == "column" and name is not None:
            return [name]
        return []

    def expression(self, span: Span, select: Select, clause: str) -> None:
        """Give each token of an expression its role, sub-queries included."""
        at = span[0]
        while at < span[1]:
            token = self.tokens[at]
            name = token.name
            word = self.word(at)
            if word == "(" and self.word(at + 1) == "select":
                closing = self.statement.closing(at)
                self.query((at + 1, closing), select)
                at = closing
            elif token.kind in ("string", "number"):
                self.roles[at] = "literal"
            elif token.kind == "word" and word in KEYWORDS:
                self.roles[at] = "keyword"
                if word in _NOT_READ or word in self.ambiguous_keywords:
                    raise Unreadable(word)
            elif token.kind == "word" and self.word(at + 1) == "(":
                self.roles[at] = "function"
            elif name is not None and self.word(at + 1) == ".":
                at = self.qualified_column(at, name, span[1], select)
            elif name is not None:
                self.bare_column(at, name, select, clause)
            at += 1

    def qualified_column(self, at: int, qualifier: str, end: int, select: Select) -> int:
        """Read `t.a` or the `t` of `t.*`; return the place of its last token."""
        source = self.source_named(qualifier, select)
        self.roles[at] = "qualifier"
        self.targets[at] = source
        last = at + 2
        if last >= end or self.word(last) != "*":
            name = self.tokens[last].name if last < end else None
            if name not in source.columns:
                raise Unreadable(f"no column {name}")
            self.roles[last] = "column"
            self.targets[last] = source
        return last

    def bare_column(self, at: int, name: str, select: Select, clause: str) -> None:
        """Read `a`, which is a literal if it stands in double quotes and names no column."""
        try:
            self.targets[at] = self.source_of(name, select, clause)
            self.roles[at] = "column"
        except LookupError:
            if self.tokens[at].kind != "double":
                raise Unreadable(f"no column {name}") from None
            self.roles[at] = "literal"

    def source_named(self, name: str, select: Select | None) -> Source:
        """The source that a qualifier names, in this SELECT or in an outer one."""
        while select is not None:
            found = [source for source in select.sources if source.visible_name == name]
            if len(found) == 1:
                return found[0]
            if found:
                break
            select = select.outer
        raise Unreadable(f"no table {name} in sight")

    def source_of(self, name: str, select: Select, clause: str) -> Source | None:
        """The source of a column; None for the name of a result. LookupError for neither."""
        if clause == "order" and name in select.result_names:
            sources = [source for source in select.sources if name in source.columns]
            return sources[0] if len(sources) == 1 and not self.is_alias(name, select) else None
        level: Select | None = select
        while level is not None:
            sources = [source for source in level.sources if name in source.columns]
            if len(sources) > 1:
                raise Unreadable(f"the column {name} is ambiguous")
            if sources:
                return sources[0]
            if name in level.result_names and clause != "select":
                return None
            level = level.outer
        raise LookupError(name)

    def is_alias(self, name: str, select: Select) -> bool:
        """Whether AS gave this name to a result."""
        ends = [last for _, last in select.items]
        return any(self.word(e - 2) == "as" and self.tokens[e - 1].name == name for e in ends)
