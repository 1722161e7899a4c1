"use strict";
// Every SAE of the sweep with its figures.

const QUALITIES = [
  ["downstream.kl", "KL"],
  ["downstream.delta_ce", "ΔCE"],
  ["probes.loss", "probe loss"],
  ["explanations.precision", "precision"],
  ["explanations.recall", "recall"],
  ["geometry.duplicates", "duplicates"],
  ["examples.live", "live latents"],
];

function overview(index) {
  const known = QUALITIES.filter(([name]) => index.saes.some((sae) => name in sae.values));
  const rows = index.saes.map((sae) => [
    link(sae), visible(String(sae.sae)), sae.n, sae.k ?? "–", sae.experts > 1 ? sae.experts : "–", sae.fvu ?? "–",
    ...known.map(([name]) => sae.values[name] ?? "–"),
  ]);
  const headers = ["SAE", "architecture", "latents", "k", "experts", "fvu", ...known.map(([, words]) => words)];
  const tokens = Math.max(...index.saes.map((sae) => sae.tokens));
  return [
    element("h1", {}, visible(index.title)),
    element("p", {}, `${index.saes.length} SAEs, looked at on ${shortNumber(tokens)} tokens of held-out text. ` +
      "Choose one to see its latents."),
    table(headers, rows, "SAEs of the sweep"),
  ];
}
