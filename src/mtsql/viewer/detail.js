// The group that is shown: its turn, its dialogue, and one or several trajectories side by side.

const view = { mode: "one", sample: 0, tokens: false, layer: "trained", other: null };
const MODES = {
  one: ["One", "One trajectory"],
  siblings: ["Siblings", "All trajectories of the group side by side (s)"],
  versions: ["Versions", "The same turn in another update or in the other run (v)"],
};

// A damaged record is named in place of its group; the others can be shown all the same.
function showDetail() {
  return drawDetail().catch((error) => {
    const about = data.groups[list.current];
    const text = `${about.turn_id} cannot be shown, because its records are damaged: `;
    byId("detail").replaceChildren(el("p", { class: "empty bad" }, text + error.message));
  });
}

async function drawDetail() {
  const box = byId("detail");
  const about = data.groups[list.current];
  const drawing = (view.drawing = {}); // a later call, which may end earlier, replaces it
  hideTip();
  if (!about) {
    box.replaceChildren(
      el(
        "p",
        { class: "empty quiet" },
        "Choose a group: j and k go down and up, ? lists all keys.",
      ),
    );
    return;
  }
  if (view.mode === "siblings" && about.samples.length < 2) view.mode = "one";
  if (view.mode === "versions" && about.versions.length < 2) view.mode = "one";
  view.sample = Math.min(view.sample, about.samples.length - 1);
  const group = { ...(await groupOf(about.place)), about };
  if (view.drawing !== drawing) return;
  const columns =
    view.mode === "siblings"
      ? group.samples.map((sample) => [sample, group])
      : [[group.samples[view.sample], group]];
  if (view.mode === "versions") {
    const other = otherVersion(about);
    const found = { ...(await groupOf(other.place)), about: other };
    if (view.drawing !== drawing) return;
    const pair = [
      [found.samples[Math.min(view.sample, found.samples.length - 1)], found],
      columns[0],
    ];
    const isFirst =
      other.run < about.run || (other.run === about.run && other.update <= about.update);
    columns.splice(0, 1, ...(isFirst ? pair : pair.reverse()));
  }
  const scale = scaleOf(
    view.mode === "versions" ? columns.map(([sample]) => sample) : group.samples,
    view.layer,
  );
  const isVersions = view.mode === "versions";
  const nodes = columns.map(([sample, one]) =>
    sampleNode(
      sample,
      one,
      {
        ...view,
        isMany: columns.length > 1,
        note:
          isVersions && one.samples.length > 1
            ? el("span", { class: "quiet" }, ` ${nameOf(one.about)}`)
            : null,
      },
      scale,
    ),
  );
  const top = box.scrollTop;
  box.replaceChildren(
    headNode(group, about, columns.length > 1),
    controlsNode(about),
    view.tokens ? layersNode(scale) : "",
    el("div", { class: `columns${columns.length > 1 ? " many" : ""}` }, nodes),
  );
  box.scrollTop = box.shown === about.place ? top : 0;
  box.shown = about.place;
}

function otherVersion(about) {
  const others = about.versions.filter((one) => one !== about);
  return others.find((one) => one.place === view.other) || counterpart(about) || others[0];
}

function headNode(group, about, isMany) {
  const turns = about.dialogue.map((one) =>
    el(
      "a",
      {
        href: `#${one.place}`,
        class: `turn${one === about ? " current" : ""}`,
        title: one.question,
      },
      `${one.turn + 1}`,
    ),
  );
  const history = group.history.length
    ? folded(`History: ${plural(group.history.length, "earlier question")}`, () =>
        el(
          "ol",
          { class: "history" },
          group.history.map((one) => el("li", null, one.question, sqlNode(one.sql, "pre"))),
        ),
      )
    : null;
  return el(
    "div",
    { class: "head" },
    el(
      "div",
      { class: "line" },
      el("button", { type: "button", id: "back", onclick: () => goTo(null) }, "‹ List"),
      el("b", null, about.turn_id),
      el("span", { class: "quiet" }, ` ${nameOf(about)}, ${about.hardness}, ${about.db_id}`),
      about.change ? chip(about.change, about.change) : null,
    ),
    el(
      "nav",
      { class: "line turns", "aria-label": "Turns of the dialogue" },
      el("span", { class: "quiet" }, "turns"),
      turns,
    ),
    el("h2", null, about.question),
    isMany || !group.samples[view.sample].answer
      ? el(
          "div",
          { class: "gold" },
          el("b", null, "Gold"),
          sqlNode(about.gold_sql, "pre"),
          isMany ? resultNode(group.gold_result, "Gold result") : null,
        )
      : null,
    history,
    folded("Prompt, as the model read it", () => el("pre", { class: "text" }, group.prompt)),
  );
}

function controlsNode(about) {
  const change = (values) => {
    Object.assign(view, values);
    showDetail();
  };
  const samples =
    view.mode === "siblings" || about.samples.length < 2
      ? []
      : about.samples.map((sample, number) =>
          el(
            "button",
            {
              type: "button",
              class: `pick ${sample.ex ? "right" : "wrong"}`,
              "aria-pressed": String(number === view.sample),
              onclick: () => change({ sample: number }),
              title: `${sample.outcome}${sample.ex ? ", right" : ", wrong"}`,
            },
            `${sample.sample}`,
            sample.reward === null ? null : el("small", null, ` ${shown(sample.reward, false, 2)}`),
          ),
        );
  const modes = Object.entries(MODES)
    .filter(
      ([mode]) =>
        mode === "one" ||
        (mode === "siblings" ? about.samples.length > 1 : about.versions.length > 1),
    )
    .map(([mode, [label, title]]) =>
      el(
        "button",
        {
          type: "button",
          title,
          "data-mode": mode,
          "aria-pressed": String(view.mode === mode),
          onclick: () => change({ mode }),
        },
        label,
      ),
    );
  const others = about.versions.filter((one) => one !== about);
  const select =
    view.mode !== "versions"
      ? null
      : el(
          "label",
          null,
          "with ",
          el(
            "select",
            { id: "other", onchange: (event) => change({ other: Number(event.target.value) }) },
            others.map((one) =>
              el(
                "option",
                { value: one.place, selected: one === otherVersion(about) },
                nameOf(one),
              ),
            ),
          ),
        );
  return el(
    "div",
    { class: "controls" },
    el("div", { role: "group", "aria-label": "View" }, modes.length > 1 ? modes : [], select),
    el("div", { role: "group", "aria-label": "Samples" }, samples),
    el(
      "button",
      {
        type: "button",
        id: "tokens",
        "aria-pressed": String(view.tokens),
        onclick: () => change({ tokens: !view.tokens }),
      },
      "Tokens",
    ),
  );
}

function layersNode(scale) {
  const buttons = Object.entries(LAYERS).map(([name, label]) =>
    el(
      "button",
      {
        type: "button",
        "data-layer": name,
        "aria-pressed": String(view.layer === name),
        onclick: () => {
          view.layer = name;
          showDetail();
        },
      },
      label,
    ),
  );
  return el(
    "div",
    { class: "layers" },
    el("div", { role: "group", "aria-label": "Colour" }, buttons),
    el("div", { class: "legend" }, legendNode(scale)),
  );
}
