"""What a reconstruction costs the language model: next-token losses with the value at the hook replaced by x̂.

ΔCE = CE(x̂) − CE(clean), in nats per token, may be negative. KL = mean of Σ_v p·(log p − log q), p clean and q spliced,
never is. Loss recovered = (CE(ablated) − CE(x̂)) / (CE(ablated) − CE(clean)), for ablation to zero and to the mean.

By the policy, position 0, special tokens and massive rows keep their own value; `…_all` replaces everything. With
per-token normalisation x̂ is brought back with the mean and norm of the token's own row, which is information that the
codes do not have. No logits are kept: the clean ones of a batch serve all SAEs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from harness.quality.clusters import by_document, ratio
from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Shared, Text
from harness.record.quality import Value

VERSION = 1
GROUP_BYTES = 2**31
"""Most bytes of weights that are judged in one pass."""
FEW = slice(None, None, 4)
"""Contexts that carry the calibration and the splices of everything."""
RANKS = (1 / 32, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 11 / 16)
"""Of the PCA calibration, as shares of d."""
NOISES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""fvu of the noise calibration."""

Splice = Callable[[Float[Tensor, "rows d"], Int[Tensor, " rows"]], Float[Tensor, "rows d"]]
"""Rows at the hook and their places in the flattened text → the rows that replace them."""
Sums = dict[str, Float64[Tensor, " documents"]]
"""Per document: ce, kl, error Σ‖x − x̂‖² and variance of the replaced rows, tokens with a target, positions."""


class Clean(NamedTuple):
    """What the unchanged model predicts in a batch."""

    logits: Float[Tensor, "contexts length v"]
    probabilities: Float[Tensor, "contexts length v"]
    negative_entropy: Float[Tensor, "contexts length"]
    """Σ_v p·log p at each position."""


def clean_of(logits: Float[Tensor, "contexts length v"]) -> Clean:
    probabilities = torch.softmax(logits, dim=-1)
    return Clean(logits, probabilities, _expected(probabilities, logits))


def _expected(p: Float[Tensor, "contexts length v"], logits: Float[Tensor, "contexts length v"]) -> Tensor:
    """Σ_v p·log q at each position, without a table of log q."""
    rows = [
        torch.linalg.vecdot(one, other) - torch.logsumexp(other, dim=-1) for one, other in zip(p, logits, strict=True)
    ]
    return torch.stack(rows)


def losses(
    logits: Float[Tensor, "contexts length v"], clean: Clean, ids: Int[Tensor, "contexts length"]
) -> tuple[Float[Tensor, "contexts targets"], Float[Tensor, "contexts length"]]:
    """Cross-entropy at each position that has a next token, and KL(clean‖spliced) at each position; fp32."""
    kl = clean.negative_entropy - _expected(clean.probabilities, logits)
    told = logits[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    normaliser = torch.stack([torch.logsumexp(each[:-1], dim=-1) for each in logits])
    return normaliser - told, kl


def of_rows(replace: Callable[[Float[Tensor, "rows d"]], Float[Tensor, "rows d"]]) -> Splice:
    """A splice that needs only the rows."""
    return lambda rows, _places: replace(rows)


def spliced_sums(
    shared: Shared,
    splices: Mapping[str, Splice],
    *,
    everything: bool = False,
    contexts: slice | Tensor = slice(None),
    label: str = "",
) -> dict[str, Sums]:
    """Sums per document for each splice, and for `clean`. `everything` replaces all positions; `contexts` says which
    contexts are taken. Raises `Interrupted`."""
    text, model, device = shared.text, shared.model, shared.device
    chosen = torch.arange(len(text.ids))[contexts]
    places = torch.arange(text.ids.numel()).reshape(text.ids.shape)
    names = ("ce", "kl", "error", "variance", "tokens", "positions")
    zero = torch.zeros(text.documents, dtype=torch.float64)
    sums = {name: {key: zero.clone() for key in names} for name in (*splices, "clean")}
    mean = shared.reference.mean
    batches = shared.batches(len(chosen), text.ids.shape[1])
    if label:
        shared.progress.start(label, chosen.numel() * text.ids.shape[1])
    for start, end in batches:
        place = chosen[start:end]
        ids, hidden = text.ids[place].to(device), text.hidden[place]
        replaced = torch.ones_like(text.kept[place]) if everything else text.kept[place]
        clean = clean_of(model.logits(ids, hidden.to(device)))
        rows = hidden[replaced]
        for name in sums:
            if name == "clean":
                logits, error = clean.logits, torch.zeros(len(rows))
            else:
                new = splices[name](rows, places[place][replaced]).to(hidden.dtype).cpu()
                value = hidden.clone()
                value[replaced] = new
                logits, error = model.logits(ids, value.to(device)), (rows - new).square().sum(dim=1)
            _add(
                sums[name], text, place, losses(logits, clean, ids), error, (rows - mean).square().sum(dim=1), replaced
            )
        shared.tick(end * text.ids.shape[1])
    return sums


def _add(
    sums: Sums,
    text: Text,
    place: Tensor,
    of_losses: tuple[Tensor, Tensor],
    error: Tensor,
    variance: Tensor,
    replaced: Tensor,
) -> None:
    """CE counts where the target is content, KL where the predicting token is."""
    ce, kl = (part.cpu() for part in of_losses)
    content = text.content[place]
    of_context = text.document[place][:, None].expand(content.shape)
    of_row = of_context[replaced]
    parts = {
        "ce": (ce[content[:, 1:]], of_context[:, 1:][content[:, 1:]]),
        "kl": (kl[content], of_context[content]),
        "tokens": (content[:, 1:].flatten().double(), of_context[:, 1:].flatten()),
        "positions": (content.flatten().double(), of_context.flatten()),
        "error": (error, of_row),
        "variance": (variance, of_row),
    }
    for name, (values, owner) in parts.items():
        sums[name] += by_document(values, owner, text.documents)


def calibration_splices(shared: Shared) -> dict[str, Splice]:
    """PCA of several ranks and isotropic noise of several sizes: what errors that no dictionary makes would cost."""
    mean, directions, _ = shared.reference
    rows = shared.text.hidden[shared.text.kept]
    variance = float((rows - mean).square().sum(dim=1).mean())
    d = len(mean)

    def pca(rank: int) -> Splice:
        basis = directions[:rank]
        return of_rows(lambda rows: (rows - mean) @ basis.T @ basis + mean)

    def noise(fvu: float) -> Splice:
        generator = torch.Generator().manual_seed(0)
        size = (fvu * variance / d) ** 0.5
        return of_rows(lambda rows: rows + size * torch.randn(rows.shape, generator=generator))

    ranks = sorted({max(1, round(share * d)) for share in RANKS})
    return {f"pca-{rank}": pca(rank) for rank in ranks} | {f"noise-{fvu:g}": noise(fvu) for fvu in NOISES}


def ablation_splices(shared: Shared) -> dict[str, Splice]:
    mean = shared.reference.mean
    return {"zero": of_rows(torch.zeros_like), "mean": of_rows(mean.expand_as)}


def references(shared: Shared) -> dict[str, Sums]:
    """Sums of what no SAE is needed for: `zero` and `mean`, `zero_all` and `mean_all` on fewer contexts, and the
    points of the calibration on as few. Computed once."""

    def make() -> dict[str, Tensor]:
        found = spliced_sums(shared, ablation_splices(shared), label="ablations")
        everything = spliced_sums(shared, ablation_splices(shared), everything=True, contexts=FEW, label="all ablated")
        found |= {f"{name}_all": sums for name, sums in everything.items()}
        points = spliced_sums(shared, calibration_splices(shared), contexts=FEW, label="calibration")
        found |= {name: sums for name, sums in points.items() if name != "clean"}
        found["clean_few"] = points["clean"]
        shared.progress.finish("")
        return {f"{name}/{key}": value for name, sums in found.items() for key, value in sums.items()}

    tensors = shared.cached(f"references-{shared.text_key}", make)
    found: dict[str, Sums] = {}
    for name, value in tensors.items():
        splice, _, key = name.partition("/")
        found.setdefault(splice, {})[key] = value
    return found


def delta_ce(spliced: Sums, clean: Sums) -> Value:
    return ratio(spliced["ce"] - clean["ce"], clean["tokens"])


def point(spliced: Sums, clean: Sums) -> dict[str, float]:
    """A point of a calibration curve."""
    values = {"fvu": ratio(spliced["error"], spliced["variance"]), "delta_ce": delta_ce(spliced, clean)}
    values["kl"] = ratio(spliced["kl"], spliced["positions"])
    return {name: value.value for name, value in values.items()}


def calibration(found: Mapping[str, Sums]) -> dict[str, list[dict[str, Any]]]:
    """The curves `pca` and `noise`: fvu, delta_ce and kl of each point, by rising fvu."""
    curves: dict[str, list[dict[str, Any]]] = {"pca": [], "noise": []}
    for name, sums in found.items():
        kind, _, setting = name.partition("-")
        if kind in curves:
            curves[kind].append({"setting": float(setting), **point(sums, found["clean_few"])})
    return {kind: sorted(points, key=lambda each: each["fvu"]) for kind, points in curves.items()}


def _at(curve: Sequence[Mapping[str, float]], fvu: float) -> float:
    """KL of a curve at `fvu`: log-log interpolation, and extrapolation by the last piece."""
    known = [(np.log(each["fvu"]), np.log(each["kl"])) for each in curve if each["fvu"] > 0 and each["kl"] > 0]
    if len(known) < 2 or fvu <= 0:
        return float("nan")
    x, y = np.array(known).T
    place = int(np.clip(np.searchsorted(x, np.log(fvu)), 1, len(x) - 1))
    slope = (y[place] - y[place - 1]) / (x[place] - x[place - 1])
    return float(np.exp(y[place] + slope * (np.log(fvu) - x[place])))


def outcome(shared: Shared, found: Mapping[str, Sums], own: Mapping[str, Sums]) -> Outcome:
    """`found`: `references`; `own`: sums of the SAE by the policy (`policy`, `clean`) and of all (`all`,
    `clean_all`)."""
    spliced, clean = own["policy"], own["clean"]
    fvu = ratio(spliced["error"], spliced["variance"])
    curves = calibration(found)
    kl = ratio(spliced["kl"], spliced["positions"])
    values = {
        "kl": kl,
        "delta_ce": delta_ce(spliced, clean),
        "ce": ratio(spliced["ce"], clean["tokens"]),
        "clean_ce": ratio(clean["ce"], clean["tokens"]),
        "fvu": fvu,
        "kl_over_noise": Value(kl.value / _at(curves["noise"], fvu.value)),
        "kl_over_pca": Value(kl.value / _at(curves["pca"], fvu.value)),
        "kept_share": Value(float(shared.text.kept.double().mean())),
    }
    for name in ("zero", "mean"):
        ablated = found[name]["ce"]
        values[f"loss_recovered_{name}"] = ratio(ablated - spliced["ce"], ablated - clean["ce"])
        ablated = found[f"{name}_all"]["ce"]
        values[f"loss_recovered_{name}_all"] = ratio(ablated - own["all"]["ce"], ablated - own["clean_all"]["ce"])
    values["kl_all"] = ratio(own["all"]["kl"], own["all"]["positions"])
    values["delta_ce_all"] = delta_ce(own["all"], own["clean_all"])
    per_document = {name: spliced[name].numpy() for name in ("kl", "ce", "positions", "tokens", "error", "variance")}
    per_document["clean_ce"] = clean["ce"].numpy()
    return Outcome(int(clean["tokens"].sum()), values, per_document=per_document, curves=curves)


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    found = references(shared)
    for group in groups(subjects):
        splices = {str(subject.directory): of_rows(subject.load().forward) for subject in group}
        label = f"downstream of {len(group)} SAEs"
        own = spliced_sums(shared, splices, label=label)
        of_all = spliced_sums(shared, splices, everything=True, contexts=FEW, label=f"{label}, everything spliced")
        for subject in group:
            name = str(subject.directory)
            parts = {"policy": own[name], "clean": own["clean"]}
            parts |= {"all": of_all[name], "clean_all": of_all["clean"]}
            yield subject, outcome(shared, found, parts)


def groups(subjects: Sequence[Subject]) -> Iterator[list[Subject]]:
    """Subjects whose weights fit into `GROUP_BYTES` together: the clean forward of a batch serves all of them."""
    group: list[Subject] = []
    size = 0
    for subject in subjects:
        if group and size + subject.weight_bytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(subject)
        size += subject.weight_bytes
    if group:
        yield group
