"use strict";
// Addresses: # all SAEs, #sae its latents, #sae/7 a latent, #sae/experts, #sae/experts/2 the latents of an expert.

const state = {};

async function show() {
  const main = document.getElementById("main");
  const wanted = location.hash;
  try {
    const index = await load("index");
    document.getElementById("written").textContent = `Written ${index.written}.`;
    const [name, part, further] = wanted.slice(1).split("/").map(decodeURIComponent);
    const sae = index.saes.find((each) => each.name === name);
    const content = sae ? await pageOf(index, sae, part, further) : overview(index);
    if (location.hash !== wanted) return; // the reader has gone on
    main.replaceChildren(...content.flat(Infinity).filter(Boolean));
    document.title = visible([sae ? name : index.title, part].filter(Boolean).join(" · "));
    path(index, sae, part, further);
    scrollTo(0, 0);
  } catch (problem) {
    main.replaceChildren(element("p", { role: "alert" }, visible(String(problem.message ?? problem))));
  }
  document.body.dataset.shown = wanted;
}

async function pageOf(index, sae, part, further) {
  const list = await load(`${index.saes.indexOf(sae)}/list`), text = await load(`text${sae.text}`);
  state.sae = sae;
  state.latent = undefined;
  if (part === "experts" && further === undefined) return expertsOf(sae, list, text);
  if (part === "experts") state[sae.name] = { ...SETTINGS, order: "dense", expert: further };
  if (part === undefined || part === "" || part === "experts") return listOf(sae, list, text, state);
  const number = Number(part);
  if (!Number.isInteger(number) || number < 0 || number >= sae.n)
    throw new Error(`${sae.name} has latents 0 to ${sae.n - 1}, and no ${part}`);
  state.latent = number;
  return latentOf(index, sae, number, list, text);
}

function path(index, sae, part, further) {
  const parts = [element("a", { href: "#" }, visible(index.title))];
  if (sae) parts.push(link(sae));
  if (sae && part) parts.push(part === "experts" ? element("a", { href: `${address(sae)}/experts` }, "experts") : `latent ${part}`);
  if (further !== undefined) parts.push(visible(`expert ${further}`));
  document.getElementById("path").replaceChildren(...parts.flatMap((each, place) => (place ? [" › ", each] : [each])));
}

function step(by) {
  const order = state.order?.includes(state.latent) ? state.order : null;
  const next = order ? order[order.indexOf(state.latent) + by] : state.latent + by;
  if (next !== undefined && next >= 0 && next < state.sae.n) location.hash = address(state.sae, next);
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest?.("input, select, textarea");
  if (field) {
    if (event.key === "Escape") field.blur();
    return;
  }
  const search = document.getElementById("search");
  if (event.key === "/" && search) { event.preventDefault(); search.focus(); }
  else if (event.key === "j" && state.latent !== undefined) step(1);
  else if (event.key === "k" && state.latent !== undefined) step(-1);
  else if (event.key === "u") location.hash = state.latent !== undefined ? address(state.sae) : "#";
});
addEventListener("hashchange", show);
show();
