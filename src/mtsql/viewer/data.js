// The index of all groups, and the groups themselves, which are unpacked when they are shown.

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const data = { runs: [], groups: [], packed: [], recent: new Map() };

async function loadIndex() {
  const index = await unpack(byId("index").textContent.trim());
  data.runs = index.runs;
  data.notes = index.notes;
  data.groups = index.groups;
  // Runs of train_rl.py; those of eval.py are of no update.
  data.trained = new Set(
    data.groups.filter((one) => one.part === "train" || one.update).map((one) => one.run),
  );
  data.packed = byId("groups").textContent.trim().split("\n");
  byId("groups").remove();
  data.groups.forEach((group, place) => {
    group.place = place;
    group.right = group.samples.filter((one) => one.ex).length / group.samples.length;
    group.words = [group.turn_id, group.db_id, group.question, group.gold_sql]
      .concat(group.samples.map((one) => one.answer))
      .join("\n")
      .toLowerCase();
  });
  linkTurns();
}

// What belongs together: the versions of a turn (other updates, the other run), and the turns of a
// dialogue that were played together.
function linkTurns() {
  const versions = new Map();
  const dialogues = new Map();
  const put = (map, key, group) => {
    if (!map.has(key)) map.set(key, []);
    map.get(key).push(group);
    return map.get(key);
  };
  for (const group of data.groups) {
    group.versions = put(
      versions,
      JSON.stringify([group.part, group.turn_id, group.question]),
      group,
    );
    const dialogue = [group.run, group.part, group.update, group.dialogue_id];
    group.dialogue = put(dialogues, JSON.stringify(dialogue), group);
  }
  for (const turns of dialogues.values()) turns.sort((a, b) => a.turn - b.turn);
  for (const group of data.groups) group.change = changeOf(group);
}

// What a group is compared with: in two runs the other run's version of the same update, or else
// its last one; in one run the earliest version.
function counterpart(group) {
  if (data.runs.length > 1) {
    const others = group.versions.filter((one) => one.run !== group.run);
    return others.find((one) => one.update === group.update) || others.at(-1) || null;
  }
  const first = group.versions[0];
  return first === group ? null : first;
}

function changeOf(group) {
  const other = counterpart(group);
  if (!other) return "";
  const isLater = data.runs.length < 2 || group.run === 1;
  const [before, after] = isLater ? [other, group] : [group, other];
  if (after.right > before.right) return "mended";
  if (after.right < before.right) return "broken";
  return after.right > 0 ? "still right" : "still wrong";
}

async function groupOf(place) {
  if (!data.recent.has(place)) {
    data.recent.set(place, await unpack(data.packed[place]));
    if (data.recent.size > 60) data.recent.delete(data.recent.keys().next().value);
  }
  return data.recent.get(place);
}

function runName(number) {
  return data.runs.length > 1 ? "AB"[number] : "";
}

function nameOf(group) {
  const parts = [group.part];
  if (data.trained.has(group.run)) parts.push(`update ${group.update}`);
  if (group.curriculum_stage !== null) parts.push(`stage ${group.curriculum_stage + 1}`);
  if (data.runs.length > 1) parts.unshift(`run ${runName(group.run)}`);
  return parts.join(", ");
}
