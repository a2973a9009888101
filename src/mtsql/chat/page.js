"use strict";

// Everything from a database or a model becomes text by textContent, never markup.

const byId = (id) => document.getElementById(id);
let isUnfolded = false;
let isBusy = false;
let version = 0; // of the conversation that the page shows
let shown = []; // what stands on the page of each turn: its JSON and its element

// Characters that show nothing, or that turn the direction of the text around them, as escapes. The
// joiner of emoji stays.
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (char) => {
    if ("\n\t\u200d".includes(char)) return char;
    const code = char.codePointAt(0);
    const size = code < 0x100 ? 2 : code < 0x10000 ? 4 : 8;
    return `\\${{ 2: "x", 4: "u", 8: "U" }[size]}${code.toString(16).padStart(size, "0")}`;
  });
}

function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = visible(text);
  return element;
}

function showError(text) {
  byId("error").textContent = visible(text);
}

// The fetch fails, or the lines of an answer end too early, if the server has gone.
const ENDED = "the conversation has ended: mtsql chat no longer runs";

async function send(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  }).catch(() => {
    throw new Error(ENDED);
  });
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

function stepElement(step) {
  const details = step.text || step.sql;
  const outer = make(details ? "details" : "div", "step");
  const line = make(details ? "summary" : "div");
  line.append(make("span", "name", step.name));
  const kind = step.is_good === null ? "" : step.is_good ? " good" : " bad";
  line.append(make("span", "summary" + kind, shortened(step.summary)));
  outer.append(line);
  if (details) {
    outer.open = isUnfolded;
    if (step.sql) outer.append(make("pre", "sql", step.sql));
    if (step.text) outer.append(make("pre", "", step.text));
  }
  return outer;
}

function shortened(text) {
  return text.length > 160 ? text.slice(0, 157) + "..." : text;
}

function tableElement(turn) {
  const outer = make("div", "table");
  const table = make("table");
  const head = make("tr");
  for (const name of turn.columns) head.append(make("th", "", name));
  table.append(make("thead"));
  table.tHead.append(head);
  const body = make("tbody");
  for (const row of turn.rows) {
    const line = make("tr");
    for (const cell of row) {
      const kind = cell === null ? "null" : typeof cell === "number" ? "number" : "";
      const text = cell === null ? "NULL" : String(cell);
      const one = make("td", kind, shortened(text));
      if (text.length > 40) one.title = text;
      line.append(one);
    }
    body.append(line);
  }
  table.append(body);
  outer.append(table);
  return outer;
}

function answerElement(turn, number) {
  const answer = make("div", "answer");
  if (turn.sql === null) {
    answer.append(make("p", "note", "no answer: " + turn.ending));
  } else {
    answer.append(make("pre", "sql", turn.sql));
    if (turn.columns.length) answer.append(tableElement(turn));
    const more = turn.num_rows - turn.rows.length;
    const rest = more > 0 ? `, ${more} not shown: save them as CSV` : "";
    answer.append(make("p", "note", turn.summary + rest));
  }
  const tools = make("div", "tools");
  const edit = make("button", "", turn.sql === null ? "Give SQL" : "Edit SQL");
  edit.type = "button";
  edit.addEventListener("click", () => openEditor(answer, turn, number, edit));
  tools.append(edit);
  if (turn.columns.length) {
    const link = make("a", "", "CSV");
    link.href = `csv?number=${number}`;
    link.download = "result.csv";
    tools.append(link);
  }
  const cost = turn.is_edited
    ? "edited by you"
    : `${turn.num_sampled} tokens, ${turn.secs.toFixed(1)} s`;
  tools.append(make("span", "note", cost));
  answer.append(tools);
  return answer;
}

function openEditor(answer, turn, number, button) {
  if (answer.querySelector("textarea")) return;
  const text = make("textarea", "edit");
  text.value = turn.sql || "";
  text.rows = 3;
  text.setAttribute("aria-label", "SQL");
  const save = make("button", "save", "Use this SQL");
  save.type = "button";
  const submit = () => change("edit", { number, sql: text.value });
  save.addEventListener("click", submit);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      submit();
    } else if (event.key === "Escape") {
      text.remove();
      save.remove();
      button.focus();
    }
  });
  answer.append(text, save);
  text.focus();
}

function turnElement(turn, number) {
  const element = make("section", "turn");
  element.append(make("h2", "", turn.question));
  const steps = turn.steps.filter((step) => step.name !== "answer"); // it stands below
  element.append(...steps.map(stepElement));
  element.append(answerElement(turn, number));
  return element;
}

function showState(state) {
  version = state.version;
  byId("database").textContent = visible(state.database);
  byId("model").textContent = visible(state.model);
  const values = state.values ? `\n\nvalues: ${state.values}` : "";
  byId("schema").textContent = visible(state.schema + values);
  // A turn that has not changed keeps its element, and with it the steps that are open.
  shown = state.turns.map((turn, i) => {
    const json = JSON.stringify(turn);
    const isSame = shown[i]?.json === json;
    return { json, element: isSame ? shown[i].element : turnElement(turn, i + 1) };
  });
  byId("turns").replaceChildren(...shown.map((one) => one.element));
  byId("memory").replaceChildren(...state.memory.map(memoryElement));
  byId("memory-box").hidden = !state.memory.length;
  byId("export").hidden = !state.turns.length && state.dialogue === 1;
  const examples = state.turns.length ? [] : state.questions;
  byId("examples").replaceChildren(...examples.map(exampleElement));
}

function memoryElement(entry) {
  const item = make("li", "", entry.question);
  item.append(make("pre", "sql", entry.sql || "(no SQL)"));
  item.append(make("p", "note", entry.clauses.join("; ")));
  return item;
}

function exampleElement(question) {
  const button = make("button", "", question);
  button.type = "button";
  button.addEventListener("click", () => ask(question));
  return button;
}

function fold() {
  isUnfolded = !isUnfolded;
  byId("fold").textContent = isUnfolded ? "Fold steps" : "Unfold steps";
  for (const step of document.querySelectorAll("details.step")) step.open = isUnfolded;
}

async function change(path, body) {
  if (isBusy) {
    showError("the model is still answering: stop it, or wait");
    return;
  }
  showError("");
  try {
    showState(await (await send(path, { ...body, version })).json());
  } catch (error) {
    if (await refresh()) showError(error.message);
  }
}

function setBusy(value) {
  isBusy = value;
  byId("stop").hidden = !value;
  for (const id of ["ask", "undo", "new"]) byId(id).disabled = value;
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function ask(question) {
  if (isBusy || !question.trim()) return;
  showError("");
  setBusy(true);
  byId("examples").replaceChildren();
  const element = make("section", "turn");
  element.append(make("h2", "", question));
  const live = make("pre", "live", "");
  element.append(live);
  byId("turns").append(element);
  window.scrollTo(0, document.body.scrollHeight);
  let failed = null;
  try {
    for await (const event of linesOf(await send("ask", { question, version }))) {
      const isAtEnd = innerHeight + scrollY > document.body.scrollHeight - 200;
      if (event.kind === "reading") {
        live.textContent = `reading ${event.num_done} of ${event.num_all} tokens`;
        live.dataset.isReading = "1";
      } else if (event.kind === "sampled") {
        if (live.dataset.isReading) live.textContent = "";
        delete live.dataset.isReading;
        live.append(visible(event.text));
        live.scrollTop = live.scrollHeight;
      } else if (event.kind === "did") {
        live.textContent = "";
        if (event.step.name !== "answer") live.before(stepElement(event.step));
      } else if (event.kind === "error") {
        failed = event.error;
      }
      if (isAtEnd) window.scrollTo(0, document.body.scrollHeight);
    }
  } catch (error) {
    failed = error.message;
  }
  const isThere = await refresh();
  setBusy(false);
  if (failed !== null || !isThere) {
    byId("question").value ||= question;
    if (isThere) showError(failed);
  }
  byId("question").focus();
}

// Show the conversation as it is now. Returns whether the server is there.
async function refresh() {
  try {
    showState(await (await fetch("state")).json());
    return true;
  } catch {
    showError(ENDED);
    return false;
  }
}

const stop = () => send("stop", {}).catch((error) => showError(error.message));

function submitQuestion() {
  const box = byId("question");
  const question = box.value;
  if (isBusy || !question.trim()) return;
  box.value = "";
  ask(question);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submitQuestion();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submitQuestion();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && isBusy) stop();
});
byId("stop").addEventListener("click", stop);
// Another tab may have changed the conversation.
addEventListener("focus", () => {
  if (!isBusy) refresh();
});
byId("fold").addEventListener("click", fold);
byId("undo").addEventListener("click", () => change("undo", {}));
byId("new").addEventListener("click", () => change("new", {}));
refresh();
