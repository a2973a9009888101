// The token layer: every token of a trajectory, coloured by what the learner or the engine knows.

const LAYERS = {
  trained: "trained or not",
  logprob: "log-prob when sampled",
  entropy: "entropy in learning",
  ratio: "ratio to the old policy",
  advantage: "advantage",
  credit: "credit of the reply",
};

// One value a token, or null where there is none.
function layerValues(sample, layer) {
  const replyOf = new Array(sample.tokens.length).fill(null);
  sample.replies.forEach((reply, number) => {
    for (let place = reply.start; place < reply.end; place++) replyOf[place] = number;
  });
  const credit = sample.replies.map((reply, number) =>
    reply.earned === null ? null : reply.earned - (number ? sample.replies[number - 1].earned : 0),
  );
  return sample.tokens.map((_, place) => {
    const reply = replyOf[place];
    if (reply === null || !sample.loss_mask[place]) return null;
    if (layer === "trained") return sample.replies[reply].advantage === null ? 0 : 1;
    if (layer === "logprob") return sample.logprobs[place];
    if (layer === "entropy") return sample.entropies[place] ?? null;
    if (layer === "ratio") return sample.ratios[place] ?? null;
    return layer === "advantage" ? sample.replies[reply].advantage : credit[reply];
  });
}

// The same scale for all siblings, so that their colours can be compared.
function scaleOf(samples, layer) {
  const values = samples
    .flatMap((sample) => layerValues(sample, layer))
    .filter((one) => one !== null);
  if (layer === "trained") return { hasValues: true, kind: "trained" };
  const size = layer === "ratio" ? (one) => Math.abs(Math.log(Math.max(one, 1e-9))) : Math.abs;
  const top = values.reduce((most, one) => Math.max(most, size(one)), 0);
  const kind = layer === "logprob" || layer === "entropy" ? "sequence" : "around";
  return { hasValues: values.length > 0, kind, layer, size, top };
}

function colourOf(value, scale) {
  if (value === null) return "";
  if (scale.kind === "trained") return value ? "var(--trained)" : "var(--untrained)";
  const share = scale.top ? Math.min(1, scale.size(value) / scale.top) : 0;
  const percent = Math.round(75 * Math.sqrt(share));
  const isLow = scale.layer === "ratio" ? value < 1 : value < 0;
  const colour = scale.kind === "around" && !isLow ? "--high" : "--low";
  return percent ? `color-mix(in srgb, var(${colour}) ${percent}%, transparent)` : "";
}

function legendNode(scale) {
  const box = (colour, text) => {
    const mark = el("span", { class: "box" });
    mark.style.background = colour;
    return el("span", { class: "key" }, mark, text);
  };
  if (scale.kind === "trained") {
    return [
      box("var(--trained)", "sampled and trained on"),
      box("var(--untrained)", "sampled, not trained on"),
      el("span", { class: "key quiet" }, "plain: written by the environment"),
    ];
  }
  if (!scale.hasValues)
    return [el("span", { class: "quiet" }, "not computed for these trajectories")];
  const limit = scale.layer === "ratio" ? Math.exp(scale.top) : scale.top;
  const full = "color-mix(in srgb, var(--low) 75%, transparent)";
  if (scale.kind === "sequence") {
    return [
      box(full, `${scale.layer === "logprob" ? "−" : ""}${shown(limit)}`),
      el("span", { class: "key quiet" }, "plain: 0"),
    ];
  }
  const low = scale.layer === "ratio" ? 1 / limit : -limit;
  return [
    box(full, shown(low)),
    box("color-mix(in srgb, var(--high) 75%, transparent)", shown(limit)),
    el("span", { class: "key quiet" }, scale.layer === "ratio" ? "plain: 1" : "plain: 0"),
  ];
}

// A line end has a mark, because a token may be nothing else.
function withLineEnds(text) {
  const lines = text.split("\n");
  const ends = lines.slice(1).map((line) => [el("span", { class: "end" }, "↵"), "\n", line]);
  return [lines[0], ends];
}

function tokensNode(sample, layer, scale) {
  const values = layerValues(sample, layer);
  const node = el("pre", { class: "tokens" });
  sample.tokens.forEach((text, place) => {
    if (text === "") return;
    const span = el(
      "span",
      { class: sample.loss_mask[place] ? "t" : "t env", "data-place": place },
      withLineEnds(text),
    );
    const colour = colourOf(values[place], scale);
    if (colour) span.style.background = colour;
    node.append(span);
  });
  if (!sample.tokens.length) node.append(el("span", { class: "quiet" }, "No token was sampled."));
  node.sample = sample;
  return node;
}

function tokenFacts(sample, place) {
  const facts = [
    ["token", `${JSON.stringify(sample.tokens[place])}, id ${sample.ids[place]}, place ${place}`],
  ];
  if (!sample.loss_mask[place])
    return [...facts, ["", "written by the environment, not trained on"]];
  const value = (layer) => layerValues(sample, layer)[place];
  const logprob = value("logprob");
  facts.push(["log-prob", `${shown(logprob, false, 4)} (p ${shown(Math.exp(logprob), false, 4)})`]);
  for (const layer of ["entropy", "ratio", "advantage", "credit"]) {
    const number = value(layer);
    if (number !== null)
      facts.push([layer, shown(number, layer === "advantage" || layer === "credit", 4)]);
  }
  facts.push(["", value("trained") ? "sampled and trained on" : "sampled, not trained on"]);
  return facts;
}

function showTip(span) {
  const sample = span.closest(".tokens").sample;
  const tip = byId("tip");
  tip.replaceChildren(
    ...tokenFacts(sample, Number(span.dataset.place)).map(([name, text]) =>
      el("div", null, name ? el("b", null, `${name} `) : null, text),
    ),
  );
  tip.hidden = false;
  document.querySelectorAll(".t.here").forEach((one) => one.classList.remove("here"));
  span.classList.add("here");
  placeTip();
}

// Beside its token, also while the page scrolls.
function placeTip() {
  const span = document.querySelector(".t.here");
  if (!span) return;
  const tip = byId("tip");
  const at = span.getClientRects()[0] || span.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 8))}px`;
  const isLow = at.bottom + size.height + 10 > innerHeight;
  tip.style.top = `${isLow ? Math.max(4, at.top - size.height - 6) : at.bottom + 6}px`;
}

function hideTip() {
  byId("tip").hidden = true;
  document.querySelectorAll(".t.here").forEach((one) => one.classList.remove("here"));
}

// The next token to the left or right of the one whose numbers are shown.
function stepToken(step) {
  const spans = [...byId("detail").querySelectorAll(".t")];
  if (!spans.length) return;
  const now = spans.findIndex((one) => one.classList.contains("here"));
  const next = spans[Math.max(0, Math.min(spans.length - 1, now < 0 ? 0 : now + step))];
  next.scrollIntoView({ block: "nearest" });
  showTip(next);
}
