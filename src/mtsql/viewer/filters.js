// Which groups are listed. A group is listed if one of its trajectories passes every filter.

const FILTERS = {
  run: { label: "Run", of: (group) => runName(group.run) },
  part: { label: "Part", of: (group) => group.part },
  update: { label: "Update", of: (group) => String(group.update) },
  stage: {
    label: "Stage",
    of: (group) => (group.curriculum_stage === null ? "" : String(group.curriculum_stage + 1)),
  },
  hardness: { label: "Hardness", of: (group) => group.hardness },
  turn: { label: "Turn", of: (group) => String(group.turn + 1) },
  database: { label: "Database", of: (group) => group.db_id },
  ending: { label: "Ending", of: (_, sample) => sample.outcome },
  right: { label: "Answer", of: (_, sample) => (sample.ex ? "right by EX" : "wrong by EX") },
  error: { label: "Error", of: (_, sample) => sample.error },
  change: { label: "Change", of: (group) => group.change },
};
const HARDNESS = ["easy", "medium", "hard", "extra", "unparsed"];

const filters = { values: {}, least: null, most: null, spread: false, words: [] };

function inOrder(name, values) {
  const number = (text) => Number(text);
  if (name === "hardness") return values.sort((a, b) => HARDNESS.indexOf(a) - HARDNESS.indexOf(b));
  return values.every((one) => one !== "" && !Number.isNaN(number(one)))
    ? values.sort((a, b) => number(a) - number(b))
    : values.sort();
}

function buildFilters(onChange) {
  const form = byId("filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const [name, { label, of }] of Object.entries(FILTERS)) {
    const counts = new Map();
    for (const group of data.groups) {
      for (const value of new Set(group.samples.map((sample) => of(group, sample)))) {
        if (value) counts.set(value, (counts.get(value) || 0) + 1);
      }
    }
    if (counts.size < 2 && !(name === "change" && counts.size)) continue;
    const options = inOrder(name, [...counts.keys()]).map((value) =>
      el("option", { value }, `${value} (${counts.get(value)})`),
    );
    const select = el(
      "select",
      {
        name,
        onchange: () => {
          filters.values[name] = select.value;
          onChange();
        },
      },
      el("option", { value: "" }, "all"),
      options,
    );
    form.append(el("label", null, label, select));
  }
  const rewards = data.groups
    .flatMap((group) => group.samples.map((one) => one.reward))
    .filter((one) => one !== null);
  if (rewards.length) {
    const [low, high] = rewards.reduce(
      ([a, b], one) => [Math.min(a, one), Math.max(b, one)],
      [Infinity, -Infinity],
    );
    const bound = (name, label, hint) => {
      const input = el("input", {
        name,
        type: "number",
        step: "any",
        placeholder: shown(hint),
        oninput: () => {
          filters[name] = input.value === "" ? null : Number(input.value);
          onChange();
        },
      });
      return el("label", null, label, input);
    };
    form.append(bound("least", "Reward from", low), bound("most", "to", high));
    const box = el("input", {
      type: "checkbox",
      name: "spread",
      onchange: () => {
        filters.spread = box.checked;
        onChange();
      },
    });
    form.append(el("label", { class: "check" }, box, "unequal rewards only"));
  }
  form.append(
    el(
      "button",
      {
        type: "button",
        id: "clear",
        onclick: () => {
          form.reset();
          byId("search").value = "";
          Object.assign(filters, { values: {}, least: null, most: null, spread: false, words: [] });
          onChange();
        },
      },
      "Clear",
    ),
  );
  byId("search").addEventListener("input", (event) => {
    filters.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    onChange();
  });
}

function samplePasses(group, sample) {
  for (const [name, wanted] of Object.entries(filters.values)) {
    if (wanted && FILTERS[name].of(group, sample) !== wanted) return false;
  }
  if (filters.least !== null && !(sample.reward >= filters.least)) return false;
  return !(filters.most !== null && !(sample.reward <= filters.most));
}

function listedGroups() {
  return data.groups.filter((group) => {
    if (!filters.words.every((word) => group.words.includes(word))) return false;
    const rewards = group.samples.map((one) => one.reward);
    if (filters.spread && rewards.every((one) => one === rewards[0])) return false;
    return group.samples.some((sample) => samplePasses(group, sample));
  });
}
