// SQL in colours, and results as tables.

const SQL_WORDS = new Set(
  (
    "select distinct from where group by having order limit offset join inner left right " +
    "outer full cross natural on using as and or not in exists between like glob is null " +
    "case when then else end " +
    "union all intersect except asc desc with recursive values cast collate"
  ).split(" "),
);
const SQL_TOKEN =
  /(--[^\n]*|\/\*[\s\S]*?(?:\*\/|$))|('(?:[^']|'')*'?)|("(?:[^"]|"")*"?|`[^`]*`?|\[[^\]]*\]?)|(\b\d+(?:\.\d+)?\b)|([A-Za-z_][\w$]*)(?=(\s*\()?)|\s+|[\s\S]/g;

function sqlNode(text, tag = "code") {
  const node = el(tag, { class: "sql" });
  let plain = "";
  const flush = () => {
    if (plain) node.append(visible(plain));
    plain = "";
  };
  for (const found of text.slice(0, 20000).matchAll(SQL_TOKEN)) {
    const [word, comment, string, name, number, plainWord, bracket] = found;
    let kind = "";
    if (comment) kind = "sql-comment";
    else if (string) kind = "sql-string";
    else if (name) kind = "sql-name";
    else if (number) kind = "sql-number";
    else if (plainWord && SQL_WORDS.has(word.toLowerCase())) kind = "sql-word";
    else if (plainWord && bracket) kind = "sql-call";
    if (kind) {
      flush();
      node.append(el("span", { class: kind }, word));
    } else plain += word;
  }
  flush();
  return node;
}

function resultNode(result, title) {
  if (!result) return null;
  const head = el("div", { class: "result-title" }, title);
  if (result.status !== "ok") {
    const text = `${result.status}: ${result.message}`;
    return el("div", { class: "result" }, head, el("p", { class: "bad" }, text));
  }
  const size = plural(result.num_rows, "row");
  const left = result.num_columns - result.columns.length;
  const rest =
    result.num_rows > result.rows.length ? `, the first ${result.rows.length} are shown` : "";
  head.append(
    el(
      "span",
      { class: "quiet" },
      ` ${size}${rest}${left ? `; ${plural(left, "more column")}` : ""}`,
    ),
  );
  const isNumber = result.columns.map(
    (_, place) =>
      result.rows.some((row) => row[place] !== null) &&
      result.rows.every(
        (row) => row[place] === null || /^-?\d+(\.\d+)?(e[-+]?\d+)?$/i.test(row[place]),
      ),
  );
  const cell = (value, place) =>
    el(
      "td",
      { class: isNumber[place] ? "number" : null },
      value === null ? el("i", { class: "quiet" }, "NULL") : value,
    );
  return el(
    "div",
    { class: "result" },
    head,
    el(
      "div",
      { class: "wide" },
      el(
        "table",
        null,
        el(
          "thead",
          null,
          el(
            "tr",
            null,
            result.columns.map((name) => el("th", { scope: "col" }, name)),
          ),
        ),
        el(
          "tbody",
          null,
          result.rows.map((row) => el("tr", null, row.map(cell))),
        ),
      ),
    ),
  );
}

// Gold and answer, clause by clause. `clauses` are [name, gold, answer, differs]. A short table has
// only those that differ.
function clausesNode(sample, isShort) {
  if (!sample.answer) return el("p", { class: "quiet" }, "No answer.");
  const listed = sample.clauses.filter(([, , , differs]) => differs || !isShort);
  const same = sample.clauses.length - listed.length;
  const rest = same ? el("p", { class: "quiet" }, `${plural(same, "clause")} as in gold`) : null;
  const answer = isShort ? sqlNode(sample.answer, "pre") : null;
  if (!listed.length) return el("div", { class: "clauses" }, answer, rest);
  const rows = listed.map(([name, gold, answer, differs]) => {
    const side = (text) => (text ? sqlNode(text) : el("span", { class: "quiet" }, "–"));
    const mark = el(
      "span",
      { class: "mark", title: differs ? "differs" : "same" },
      differs ? "≠" : "=",
    );
    return el(
      "tr",
      { class: differs ? "differs" : null },
      el("th", { scope: "row" }, mark, " ", name),
      el("td", null, side(gold)),
      el("td", null, side(answer)),
    );
  });
  return el(
    "div",
    { class: "clauses wide" },
    answer,
    el(
      "table",
      null,
      el(
        "thead",
        null,
        el(
          "tr",
          null,
          ["", "Gold", "Answer"].map((text) => el("th", { scope: "col" }, text)),
        ),
      ),
      el("tbody", null, rows),
    ),
    rest,
  );
}
