"use strict";
// The page of a latent.

const TOP = 20, GROUPS = 5, PER_GROUP = 5;

async function latentOf(index, sae, number, list, text) {
  const shard = await load(`${index.saes.indexOf(sae)}/${Math.floor(number / sae.shard)}`);
  const row = number % sae.shard;
  const largest = list.largest.values[number];
  const at = { sae, number, list, text, shard, row, largest };
  return [
    element("h1", {}, `Latent ${number}`),
    heading(at),
    ...(largest > 0 ? [
      section("Strongest contexts", examples(at, 0, TOP), "At most one per document. Stronger colour, thicker underline: more active."),
      section("Activations", [histogram(at), quantiles(at)]),
      ...groups(at),
      section("Where it is silent", examples(at, TOP + GROUPS * PER_GROUP, 5), "Random contexts without an activation."),
      section("What it writes", [lens(at), effect(at)]),
      section("Active together", partners(at)),
    ] : [element("p", { class: "lead" }, "It was never active on this text.")]),
    section("Nearest decoder rows", neighbours(at)),
    section("In the other SAEs", across(index, at), "The nearest decoder rows of each. Several near rows in a wider SAE: the feature was split."),
  ].filter(Boolean);
}

function section(title, content, note) {
  const parts = [content].flat().filter(Boolean);
  if (!parts.length) return null;
  return element("section", {}, element("h2", {}, title), note ? element("p", { class: "note" }, note) : null, parts);
}

function heading(at) {
  const { list, number, shard, row, sae } = at, note = list.notes[number] ?? {};
  const facts = [
    ["density", percent(list.density.values[number])],
    ["active at", `${shortNumber(shard.count.values[row])} of ${shortNumber(sae.tokens)} tokens`],
    ["largest", shortNumber(at.largest)],
    ["mean", shortNumber(shard.mean.values[row])],
    ["mean square", shortNumber(shard.mean_square.values[row])],
    ["skewness", shortNumber(shard.skewness.values[row])],
    ["kurtosis", shortNumber(shard.kurtosis.values[row])],
  ];
  if (sae.experts > 1) facts.push(["expert", String(list.expert.values[number])]);
  for (const key of ["detection", "fuzzing", "precision", "recall"])
    if (note[key] !== undefined && note[key] !== null) facts.push([key, shortNumber(note[key])]);
  if (note.labels) facts.push(["knows best", visible(note.labels.join(", "))]);
  const says = note.explanation ?? note.patterns?.join("   ");
  return [
    element("p", { class: "lead" }, topTokens(list, at.text, number)),
    says ? element("p", {}, "Explanation: ", element("bdi", {}, visible(says))) : null,
    element("dl", { class: "facts" }, facts.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
  ];
}

/** Contexts `first` … `first` + `count` − 1 of the examples. */
function examples(at, first, count) {
  const { shard, row, sae, text, largest } = at;
  const contexts = shard.example_context.row(row), positions = shard.example_position.row(row);
  const values = shard.example_value.row(row), acts = shard.example_acts.row(row);
  const lines = [];
  for (let place = first; place < first + count; place++) {
    if (!contexts[place]) continue;
    const ids = text.ids.row(contexts[place] - 1), position = positions[place];
    const start = Math.max(0, Math.min(position - Math.floor(sae.width / 2), ids.length - sae.width));
    const shown = [];
    let silent = ""; // tokens without an activation share an element: a page has thousands
    const flush = () => { if (silent) shown.push(element("bdi", {}, silent)); silent = ""; };
    for (let offset = 0; offset < sae.width; offset++) {
      const act = acts[place * sae.width + offset] / 255, peak = start + offset === position;
      const word = visible(text.words[ids[start + offset] - 1]);
      if (!act) { silent += word; continue; }
      flush();
      shown.push(element(peak ? "strong" : "span", { class: "heat", style: { "--a": act.toFixed(3) },
        title: `activation ${shortNumber(act * largest)}` }, element("bdi", {}, word)));
    }
    flush();
    const value = (values[place] / 65535) * largest;
    lines.push(element("li", {}, element("span", { class: "value" }, value ? shortNumber(value) : "0"),
      element("span", { class: "context" }, shown)));
  }
  return lines.length ? [element("ol", { class: "examples" }, lines)] : [];
}

function groups(at) {
  const names = ["weakest fifth", "second fifth", "middle fifth", "fourth fifth", "strongest fifth"];
  const parts = names.map((name, group) => {
    const lines = examples(at, TOP + group * PER_GROUP, PER_GROUP);
    return lines.length ? [element("h3", {}, name), lines] : [];
  }).reverse();
  return [section("Samples of its activations", parts.flat(2), "By rank: each fifth holds as many activations.")];
}

const SVG = "http://www.w3.org/2000/svg";

function histogram(at) {
  const counts = Array.from(at.shard.histogram.row(at.row)), most = Math.max(...counts);
  const chart = document.createElementNS(SVG, "svg");
  chart.setAttribute("viewBox", "0 0 400 92");
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", `Histogram of ${counts.reduce((a, b) => a + b, 0)} activations from 0 to ${shortNumber(at.largest)}`);
  counts.forEach((count, place) => {
    const box = document.createElementNS(SVG, "rect"), height = count ? Math.max(1, (80 * count) / most) : 0;
    for (const [key, value] of Object.entries({ x: place * 10 + 0.5, y: 80 - height, width: 9, height }))
      box.setAttribute(key, value);
    const title = document.createElementNS(SVG, "title");
    title.textContent = `${shortNumber((place / 40) * at.largest)} to ${shortNumber(((place + 1) / 40) * at.largest)}: ${count}`;
    box.append(title);
    chart.append(box);
  });
  const label = (x, words, anchor) => {
    const made = document.createElementNS(SVG, "text");
    for (const [key, value] of Object.entries({ x, y: 91, "text-anchor": anchor })) made.setAttribute(key, value);
    made.textContent = words;
    chart.append(made);
  };
  label(0, "0", "start");
  label(400, shortNumber(at.largest), "end");
  return element("div", { class: "chart" }, chart);
}

function quantiles(at) {
  const names = ["smallest", "25 %", "median", "75 %", "90 %", "99 %", "largest"];
  const values = Array.from(at.shard.quantiles.row(at.row), (share) => (share / 65535) * at.largest);
  return table(names, [values], "Quantiles of its positive activations");
}

function lens(at) {
  const { shard, row, text } = at;
  if (!shard.promoted) return null;
  const column = (name, sign) => Array.from(shard[name].row(row), (token, place) =>
    [tokenChip(text, token), sign * shard[`${name}_logit`].row(row)[place]]);
  const down = column("suppressed", 1);
  const rows = column("promoted", 1).map((up, place) => [...up, ...(down[place] ?? ["", ""])]);
  return table(["promotes", "logit", "suppresses", "logit"], rows,
    "Logit lens: change of each logit per unit, through the final norm's gain, less the mean");
}

function effect(at) {
  const found = at.list.ablation[at.number];
  if (!found) return null;
  const rows = found.tokens.map((each) => [tokenChip(at.text, each.token), percent(each.with), percent(each.without)]);
  return table(["next token", "with it", "without it"], rows,
    `Ablation at its strongest context: KL ${shortNumber(found.kl)} nats`);
}

/** A link to a latent, with its strongest tokens. */
function named(sae, list, text, number) {
  return element("span", {}, link(sae, number, String(number)), " ", topTokens(list, text, number));
}

function partners(at) {
  const { shard, row, sae, list, text } = at, found = Array.from(shard.coactive.row(row)).filter(Boolean);
  if (!found.length) return null;
  const rows = found.map((latent, place) => [named(sae, list, text, latent - 1),
    shard.coactive_correlation.row(row)[place], percent(shard.coactive_share.row(row)[place])]);
  return table(["latent", "correlation", "active at"], rows,
    "Latents whose activations correlate most over all tokens, and at which share of its tokens they are active");
}

function neighbours(at) {
  const { shard, row, sae, list, text } = at;
  const rows = Array.from(shard.nearest.row(row)).filter(Boolean).map((latent, place) =>
    [named(sae, list, text, latent - 1), shard.nearest_cosine.row(row)[place]]);
  return rows.length ? table(["latent", "cosine"], rows, "In the same SAE") : null;
}

function across(index, at) {
  const { shard, row, sae } = at, compared = sae.compared.map((number) => index.saes[number]);
  if (!compared.length) return null;
  const found = shard.across.row(row), cosines = shard.across_cosine.row(row), few = found.length / compared.length;
  const rows = compared.map((other, place) => {
    const cells = Array.from(found.subarray(place * few, (place + 1) * few), (latent, rank) => latent
      ? element("span", {}, link(other, latent - 1, String(latent - 1)), ` (${cosines[place * few + rank].toFixed(2)})`)
      : "–");
    return [link(other), other.n, ...cells];
  });
  return table(["SAE", "latents", "nearest", "second", "third"], rows, "Latents of other SAEs (cosine)");
}
