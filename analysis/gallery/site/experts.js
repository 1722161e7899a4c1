"use strict";
// The experts of a Switch SAE.

function expertsOf(sae, list, text) {
  const rows = list.experts.map((expert, number) => [
    element("a", { href: `${address(sae)}/experts/${number}` }, `expert ${number}`),
    bar(expert.load, Math.max(...list.experts.map((each) => each.load))),
    `${expert.live} of ${expert.latents}`,
    element("span", { class: "tokens" }, expert.tokens.map((each) => [tokenChip(text, each.token), " "])),
  ]);
  const shown = [
    element("h1", {}, "Experts of ", visible(sae.name)),
    element("p", {}, `Load is the share of all activations; 1/${sae.experts} = ${percent(1 / sae.experts)} is even. Tokens ` +
      "are those that are the strongest token of an expert's latents more often than elsewhere."),
    table(["expert", "load", "active latents", "tokens"], rows, "Load and tokens of each expert"),
  ];
  if (list.expert_map.length) shown.push(expertMap(list.expert_map));
  return shown;
}

function bar(value, largest) {
  return element("span", { class: "bar" },
    element("span", { class: "fill", style: { width: `${Math.max(2, (70 * value) / (largest || 1))}px` } }), percent(value));
}

function expertMap(cosines) {
  const rows = cosines.map((row, number) => [
    `expert ${number}`,
    ...row.map((value) => element("span", { class: "heat", style: { "--a": Math.max(0, Math.min(1, value)).toFixed(3) } },
      value.toFixed(2))),
  ]);
  return table(["from", ...cosines.map((_, number) => `to ${number}`)], rows,
    "Mean over the rows of one expert of the largest cosine with another row of each");
}
