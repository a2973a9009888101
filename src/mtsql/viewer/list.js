// The list of groups: only the rows that can be seen exist.

const ROW_HEIGHT = 62;
const list = { groups: [], current: null, address: "" };

function showList() {
  list.groups = listedGroups();
  byId("rows").style.height = `${list.groups.length * ROW_HEIGHT}px`;
  const all = data.groups.length;
  const trajectories = list.groups.reduce((sum, group) => sum + group.samples.length, 0);
  const found =
    list.groups.length === all
      ? plural(all, "group")
      : `${list.groups.length.toLocaleString("en")} of ${plural(all, "group")}`;
  byId("title").replaceChildren(
    data.runs
      .map((name, number) => (data.runs.length > 1 ? `${runName(number)}: ${name}` : name))
      .join(", "),
    el(
      "span",
      { class: "quiet" },
      ` ${found}, ${plural(trajectories, "trajectory", "trajectories")}`,
    ),
  );
  drawRows();
}

function drawRows() {
  const box = byId("list");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW_HEIGHT) - 5);
  const last = Math.min(list.groups.length, first + Math.ceil(box.clientHeight / ROW_HEIGHT) + 10);
  const seen = list.groups.slice(first, last);
  byId("rows").replaceChildren(...seen.map((group, number) => rowNode(group, first + number)));
  if (!list.groups.length)
    byId("rows").append(el("p", { class: "empty quiet" }, "No group passes these filters."));
}

function rowNode(group, number) {
  const marks = group.samples.map((sample) => {
    const isListed = samplePasses(group, sample);
    return el("span", {
      class: `dot ${sample.ex ? "right" : "wrong"}${isListed ? "" : " faint"}`,
      title:
        `sample ${sample.sample}: ${sample.ex ? "right" : "wrong"}, ${sample.outcome}` +
        (sample.reward === null ? "" : `, reward ${shown(sample.reward)}`),
    });
  });
  const change =
    group.change === "mended" || group.change === "broken"
      ? el("span", { class: `chip ${group.change}` }, group.change)
      : null;
  const rewards = group.samples.map((one) => one.reward).filter((one) => one !== null);
  const mean = rewards.length
    ? shown(rewards.reduce((sum, one) => sum + one, 0) / rewards.length, false, 2)
    : "";
  const row = el(
    "a",
    {
      class: `row${list.current === group.place ? " current" : ""}`,
      href: `#${group.place}`,
      tabindex: "-1",
    },
    el(
      "div",
      { class: "line" },
      el("span", { class: "name" }, `${group.turn_id}`),
      change,
      el("span", { class: "marks" }, marks),
      el("span", { class: "reward" }, mean),
    ),
    el("div", { class: "line question" }, group.question),
    el("div", { class: "line quiet" }, `${nameOf(group)}, ${group.hardness}, ${group.db_id}`),
  );
  row.style.top = `${number * ROW_HEIGHT}px`;
  return row;
}

// Make the current row visible and mark it.
function followCurrent() {
  const number = list.groups.findIndex((group) => group.place === list.current);
  const box = byId("list");
  if (number >= 0) {
    const top = number * ROW_HEIGHT;
    if (top < box.scrollTop) box.scrollTop = top;
    if (top + ROW_HEIGHT > box.scrollTop + box.clientHeight)
      box.scrollTop = top + ROW_HEIGHT - box.clientHeight;
  }
  drawRows();
}

function stepGroup(step) {
  if (!list.groups.length) return;
  const now = list.groups.findIndex((group) => group.place === list.current);
  const next = now < 0 ? (step > 0 ? 0 : list.groups.length - 1) : now + step;
  if (next >= 0 && next < list.groups.length) goTo(list.groups[next].place);
}
