// Start, keys, and the address: `#12` is the group at place 12.

const KEYS = [
  ["j k", "next, previous group"],
  ["h l", "previous, next sample of the group"],
  ["[ ]", "previous, next turn of the dialogue"],
  ["s", "siblings side by side"],
  ["v", "versions side by side: the other run, or another update"],
  ["t", "tokens or replies"],
  ["c", "next colour of the tokens"],
  [", .", "previous, next token with its numbers"],
  ["/", "search"],
  ["f", "filters"],
  ["m", "light or dark"],
  ["Esc", "close, back to the list"],
  ["?", "these keys"],
];

// The browser tells of a new address later, perhaps after the next key, so it is followed at once.
function goTo(place) {
  location.hash = place === null ? "" : `#${place}`;
  follow();
}

function follow() {
  const found = /^#(\d+)$/.exec(location.hash);
  const place = found && data.groups[Number(found[1])] ? Number(found[1]) : null;
  if (place !== list.current) view.other = null;
  list.current = place;
  list.address = location.hash;
  document.body.classList.toggle("has-detail", place !== null);
  followCurrent();
  return showDetail();
}

function stepTurn(step) {
  const about = data.groups[list.current];
  const next = about && about.dialogue[about.dialogue.indexOf(about) + step];
  if (next) goTo(next.place);
}

function stepSample(step) {
  const about = data.groups[list.current];
  if (!about) return;
  view.sample = Math.max(0, Math.min(about.samples.length - 1, view.sample + step));
  showDetail();
}

function setMode(mode) {
  view.mode = view.mode === mode ? "one" : mode;
  showDetail();
}

function nextLayer() {
  const names = Object.keys(LAYERS);
  if (view.tokens) view.layer = names[(names.indexOf(view.layer) + 1) % names.length];
  view.tokens = true;
  showDetail();
}

function switchTheme() {
  const isDark = getComputedStyle(document.documentElement).colorScheme.trim() === "dark";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
}

function toggleFilters() {
  const isHidden = document.body.classList.toggle("no-filters");
  byId("toggle-filters").setAttribute("aria-expanded", String(!isHidden));
  if (!isHidden) byId("filters").querySelector("select, input")?.focus();
  drawRows();
}

function goBack() {
  if (!byId("tip").hidden) hideTip();
  else if (document.activeElement.matches("input, select")) document.activeElement.blur();
  else goTo(null);
}

const ACTIONS = {
  j: () => stepGroup(1),
  ArrowDown: () => stepGroup(1),
  k: () => stepGroup(-1),
  ArrowUp: () => stepGroup(-1),
  h: () => stepSample(-1),
  ArrowLeft: () => stepSample(-1),
  l: () => stepSample(1),
  ArrowRight: () => stepSample(1),
  "[": () => stepTurn(-1),
  "]": () => stepTurn(1),
  s: () => setMode("siblings"),
  v: () => setMode("versions"),
  t: () => byId("tokens")?.click(),
  c: nextLayer,
  ",": () => stepToken(-1),
  ".": () => stepToken(1),
  "/": () => byId("search").focus(),
  f: toggleFilters,
  m: switchTheme,
  "?": () => byId("help").showModal(),
  Escape: goBack,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const isTyping = event.target.matches("input:not([type=checkbox]), select");
  if (isTyping && event.key !== "Escape") return;
  const isScrolling =
    event.key.startsWith("Arrow") && byId("detail").contains(document.activeElement);
  const action = isScrolling ? null : ACTIONS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

async function start() {
  await loadIndex();
  let hasPointed = false; // whether the mouse was used last, so that keys may leave a filter
  addEventListener(
    "pointerdown",
    () => {
      hasPointed = true;
    },
    true,
  );
  addEventListener(
    "keydown",
    () => {
      hasPointed = false;
    },
    true,
  );
  buildFilters(() => {
    byId("list").scrollTop = 0;
    showList();
    if (hasPointed && document.activeElement.matches("select")) document.activeElement.blur();
  });
  byId("help").append(
    el("h2", null, "Keys"),
    el(
      "table",
      null,
      KEYS.map(([key, text]) =>
        el("tr", null, el("th", { scope: "row" }, key), el("td", null, text)),
      ),
    ),
    ...data.notes.map((note) => el("p", { class: "quiet" }, note)),
    el("form", { method: "dialog" }, el("button", null, "Close")),
  );
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  byId("theme").addEventListener("click", switchTheme);
  byId("toggle-filters").addEventListener("click", toggleFilters);
  byId("list").addEventListener("scroll", drawRows);
  addEventListener("resize", drawRows);
  addEventListener("hashchange", () => {
    if (location.hash !== list.address) follow(); // by the buttons of the browser
  });
  addEventListener("keydown", onKey);
  byId("detail").addEventListener("scroll", placeTip);
  byId("detail").addEventListener("mouseover", (event) => {
    const span = event.target.closest(".t");
    if (span) showTip(span);
    else hideTip();
  });
  byId("detail").addEventListener("click", (event) => {
    const span = event.target.closest(".t");
    if (span) showTip(span);
  });
  if (matchMedia("(max-width: 760px)").matches) toggleFilters();
  showList();
  await follow();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("title").textContent = `This page cannot be shown: ${error.message}`;
  throw error;
});
