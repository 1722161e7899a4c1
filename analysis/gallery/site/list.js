"use strict";
// The latents of an SAE: searched, filtered, sorted, a page of rows at a time.

const ROWS = 100;
const DUPLICATE = 0.9;

/** Latent → the words it is found by: its explanation and its top tokens. */
function words(list, text) {
  if (!list.texts) {
    list.texts = Array.from({ length: list.density.values.length }, (_, latent) => {
      const note = list.notes[latent];
      const tokens = Array.from(list.words.row(latent)).filter(Boolean).map((token) => text.words[token - 1]);
      return [note?.explanation ?? "", ...(note?.patterns ?? []), ...tokens].join(" ").toLowerCase();
    });
  }
  return list.texts;
}

/** Detection score, or precision of its patterns where there is none; undefined without either. */
function score(list, latent) {
  const note = list.notes[latent];
  return note?.detection ?? note?.precision ?? undefined;
}

function topTokens(list, text, latent) {
  const tokens = Array.from(list.words.row(latent)).filter(Boolean);
  return element("span", { class: "tokens" }, tokens.map((token) => [tokenChip(text, token), " "]));
}

const ORDERS = {
  index: ["number", (list, a, b) => a - b],
  dense: ["most often active", (list, a, b) => list.density.values[b] - list.density.values[a]],
  rare: ["most rarely active", (list, a, b) => list.density.values[a] - list.density.values[b]],
  largest: ["largest activation", (list, a, b) => list.largest.values[b] - list.largest.values[a]],
  nearest: ["nearest to another row", (list, a, b) => list.nearest.values[b] - list.nearest.values[a]],
  score: ["best score", (list, a, b) => (score(list, b) ?? -1) - (score(list, a) ?? -1)],
};

const DENSITIES = {
  "": ["all", 0, 2], rare: ["below 0.1 %", 0, 0.001], seldom: ["0.1 to 1 %", 0.001, 0.01], often: ["1 to 10 %", 0.01, 0.1],
  dense: ["above 10 %", 0.1, 2],
};

const SCORES = {
  "": ["all", -1, 2], good: ["0.9 and above", 0.9, 2], fair: ["0.7 to 0.9", 0.7, 0.9], poor: ["below 0.7", 0, 0.7],
};

/** What a list shows at first. */
const SETTINGS = { search: "", order: "index", live: "live", density: "", score: "", expert: "", page: 0 };

/** Latents that the settings leave, in their order. */
function chosen(list, text, settings) {
  const wanted = settings.search.trim().toLowerCase();
  const texts = wanted ? words(list, text) : null;
  const found = [];
  for (let latent = 0; latent < list.density.values.length; latent++) {
    const density = list.density.values[latent];
    if (wanted && !texts[latent].includes(wanted) && String(latent) !== wanted) continue;
    const [, least, most] = DENSITIES[settings.density];
    if (density < least || density >= most) continue;
    const [, worst, best] = SCORES[settings.score], own = score(list, latent) ?? -1;
    if (own < worst || own >= best) continue;
    if (settings.live === "live" && density === 0) continue;
    if (settings.live === "silent" && density > 0) continue;
    if (settings.live === "duplicates" && list.nearest.values[latent] <= DUPLICATE) continue;
    if (settings.live === "scored" && score(list, latent) === undefined) continue;
    if (settings.expert !== "" && list.expert.values[latent] !== Number(settings.expert)) continue;
    found.push(latent);
  }
  return found.sort((a, b) => ORDERS[settings.order][1](list, a, b) || a - b);
}

function choice(label, options, value, change) {
  return element("label", {}, label, " ",
    element("select", { change: (event) => change(event.target.value) },
      options.map(([key, shown]) => element("option", { value: key, selected: key === value }, shown))));
}

function listOf(sae, list, text, state) {
  const settings = (state[sae.name] ??= { ...SETTINGS });
  const body = element("tbody", {}), status = element("p", { role: "status" });
  const pages = element("div", { class: "pages" });
  const scored = Object.keys(list.notes).some((latent) => score(list, latent) !== undefined);
  const columns = ["latent", "strongest tokens", "density", "largest", "nearest cosine"];
  if (scored) columns.push("score");
  if (sae.experts > 1) columns.push("expert");

  function show() {
    const found = chosen(list, text, settings);
    state.order = found;
    const last = Math.max(0, Math.ceil(found.length / ROWS) - 1);
    settings.page = Math.min(settings.page, last);
    const rows = found.slice(settings.page * ROWS, (settings.page + 1) * ROWS).map((latent) => {
      const note = list.notes[latent];
      const says = note?.explanation ?? note?.patterns?.join("  ");
      return element("tr", {},
        element("td", { class: "number" }, link(sae, latent, String(latent))),
        element("td", {}, topTokens(list, text, latent), says ? element("bdi", { class: "says" }, visible(says)) : null),
        element("td", { class: "number" }, percent(list.density.values[latent])),
        element("td", { class: "number" }, shortNumber(list.largest.values[latent])),
        element("td", { class: "number" }, list.nearest.values[latent].toFixed(2)),
        scored ? element("td", { class: "number" }, shortNumber(score(list, latent), 2)) : null,
        sae.experts > 1 ? element("td", { class: "number" }, String(list.expert.values[latent])) : null);
    });
    body.replaceChildren(...rows);
    const from = found.length ? settings.page * ROWS + 1 : 0;
    status.textContent = `${from}–${Math.min(found.length, (settings.page + 1) * ROWS)} of ${found.length} latents`;
    const turn = (by) => () => { settings.page += by; show(); scrollTo(0, 0); };
    pages.replaceChildren(
      element("button", { type: "button", disabled: settings.page === 0, click: turn(-1) }, "← previous"), " ",
      element("button", { type: "button", disabled: settings.page >= last, click: turn(1) }, "next →"));
  }
  const change = (name) => (value) => { settings[name] = value; settings.page = 0; show(); };
  const experts = Array.from({ length: sae.experts }, (_, expert) => [String(expert), `expert ${expert}`]);
  const controls = element("form", { class: "controls", submit: (event) => event.preventDefault() },
    element("label", {}, "Search ", element("input", {
      type: "search", id: "search", value: settings.search, placeholder: "token, explanation, number",
      autocomplete: "off", input: (event) => change("search")(event.target.value),
    })),
    choice("Order", Object.entries(ORDERS).map(([key, [shown]]) => [key, shown]), settings.order, change("order")),
    choice("Show", [["live", "active ones"], ["all", "all"], ["silent", "silent ones"],
      ["duplicates", `duplicates (cosine above ${DUPLICATE})`], ["scored", "with a score"]], settings.live, change("live")),
    choice("Density", Object.entries(DENSITIES).map(([key, [shown]]) => [key, shown]), settings.density, change("density")),
    scored ? choice("Score", Object.entries(SCORES).map(([key, [shown]]) => [key, shown]), settings.score, change("score")) : null,
    sae.experts > 1 ? choice("Expert", [["", "all"], ...experts], settings.expert, change("expert")) : null);
  show();
  return [
    element("h1", {}, visible(sae.name)),
    summary(sae),
    sae.experts > 1 ? element("p", {}, element("a", { href: `${address(sae)}/experts` }, "Experts and what they do")) : null,
    controls, status,
    element("div", { class: "scroll" }, element("table", { class: "latents" },
      element("thead", {}, element("tr", {}, columns.map((header) => element("th", { scope: "col" }, header)))), body)),
    pages,
  ].filter(Boolean);
}

function summary(sae) {
  const parts = [`${visible(String(sae.sae))}, n = ${sae.n}`];
  if (sae.k) parts.push(`k = ${shortNumber(sae.k)}`);
  if (sae.fvu) parts.push(`fvu ${shortNumber(sae.fvu)}`);
  if ("downstream.kl" in sae.values) parts.push(`KL ${shortNumber(sae.values["downstream.kl"])}`);
  parts.push(`${percent(sae.values["examples.live"] ?? 0)} of the latents active on ${shortNumber(sae.tokens)} tokens`);
  return element("p", {}, parts.join(" · "));
}
