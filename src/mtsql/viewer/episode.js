// One trajectory: how it was judged, gold beside its answer, and its replies one after another.

function chip(text, kind = "") {
  return el("span", { class: `chip ${kind}` }, text);
}

function summaryNode(sample) {
  const parts = [
    chip(sample.ex ? "EX right" : "EX wrong", sample.ex ? "right" : "wrong"),
    chip(sample.em ? "EM right" : "EM wrong", sample.em ? "right" : "wrong"),
    chip(sample.outcome, sample.outcome === "answered" ? "" : "wrong"),
  ];
  if (sample.error) parts.push(chip(`error: ${sample.error}`, "wrong"));
  const advantages = [...new Set(sample.replies.map((reply) => reply.advantage))];
  const facts = [];
  if (sample.reward !== null) {
    facts.push(["reward", shown(sample.reward)]);
    facts.push([
      "advantage",
      advantages[0] === null || !advantages.length
        ? "not trained on"
        : advantages.map((one) => shown(one, true)).join(" "),
    ]);
    if (sample.kl) facts.push(["KL", shown(sample.kl)]);
    for (const [name, value] of Object.entries(sample.components)) facts.push([name, shown(value)]);
  }
  const sampled = sample.loss_mask.reduce((sum, one) => sum + one, 0);
  facts.push(["tokens", `${sampled} sampled, ${sample.tokens.length - sampled} observed`]);
  return el(
    "div",
    { class: "summary" },
    el("div", { class: "chips" }, parts),
    el(
      "dl",
      null,
      facts.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value))),
    ),
  );
}

function repliesNode(sample) {
  return el(
    "ol",
    { class: "replies" },
    sample.replies.map((reply, number) => {
      const head = el(
        "div",
        { class: "reply-head" },
        el("b", null, `${number + 1} ${reply.action}`),
      );
      const verdicts = [
        ["exec_verify", reply.exec_verdict],
        ["memory_verify", reply.memory_verdict],
      ];
      for (const [name, verdict] of verdicts) {
        if (verdict)
          head.append(chip(`${name}: ${verdict}`, verdict === "pass" ? "right" : "wrong"));
      }
      if (reply.status) head.append(chip(reply.status, reply.status === "ok" ? "" : "wrong"));
      if (reply.advantage !== null)
        head.append(el("span", { class: "quiet" }, `advantage ${shown(reply.advantage, true)}`));
      if (reply.earned !== null)
        head.append(el("span", { class: "quiet" }, `earned so far ${shown(reply.earned)}`));
      const text = sample.tokens.slice(reply.start, reply.end).join("");
      const whole = () =>
        text.trim()
          ? el("pre", { class: "text" }, text)
          : el("p", { class: "quiet" }, `Only white space: ${JSON.stringify(text)}`);
      const hasParts = reply.think || reply.sql || reply.result;
      const observed =
        reply.observation &&
        folded(
          "Observation, as the model read it",
          () => el("pre", { class: "text" }, reply.observation),
          { open: !reply.result },
        );
      return el(
        "li",
        null,
        head,
        reply.think ? el("p", { class: "think" }, reply.think) : null,
        reply.sql ? sqlNode(reply.sql, "pre") : null,
        hasParts
          ? folded("Text of the reply", whole)
          : whole(),
        resultNode(reply.result, "Result"),
        observed || null,
      );
    }),
  );
}

function sampleNode(sample, group, view, scale) {
  const title = group.samples.length > 1 ? `Sample ${sample.sample}` : nameOf(group.about);
  const node = el(
    "section",
    { class: "sample", "aria-label": title },
    el("h3", null, title, view.note || null),
    summaryNode(sample),
  );
  node.append(clausesNode(sample, view.isMany));
  const gold = view.isMany ? null : resultNode(group.gold_result, "Gold result");
  const results = [gold, resultNode(sample.answer_result, "Result of the answer")];
  node.append(el("div", { class: "results" }, results.filter(Boolean)));
  if (view.tokens) node.append(tokensNode(sample, view.layer, scale));
  else node.append(repliesNode(sample));
  return node;
}
