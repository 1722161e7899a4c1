"""The examples of an SAE against the same figures from a dense matrix of activations, and a planted latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from harness.quality import examples
from harness.quality.features import coactive, codes, latents
from harness.quality.features.lens import final_gain
from harness.quality.features.token_text import token_texts
from harness.quality.metric import Outcome, Subject
from harness.quality.refinement import effective
from harness.quality.shared import Shared
from harness.record.quality import read_table, write_quality
from tests.activations.conftest import TINY, WORDS
from tests.quality.planted import orthonormal, planted, planted_words


def subject(sae: Any, shared: Shared, name: str = "planted") -> Subject:
    return Subject(name, shared.out / name, "0" * 64, shared.cfg, shared.out, 1, lambda: sae)


def outcome_of(sae: Any, shared: Shared) -> Outcome:
    [(_, outcome)] = examples.run([subject(sae, shared)], shared)
    return outcome


def dense(sae: Any, shared: Shared) -> tuple[np.ndarray, np.ndarray]:
    """Activations (judged tokens, n), and the flat positions of these tokens."""
    text = shared.text
    place = text.kept.flatten().nonzero().flatten()
    found = sae.encode(text.hidden.flatten(0, 1)[place])
    matrix = torch.zeros(len(place), sae.sae.n_latents).scatter(1, found.index, effective(found).clamp_min(0))
    return matrix.double().numpy(), place.numpy()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and blocks, as a long text and a wide SAE have."""
    monkeypatch.setattr(codes, "_CHUNK", 100)
    monkeypatch.setattr(coactive, "_TOKENS", 64)
    monkeypatch.setattr(examples, "_ROWS", 5)
    monkeypatch.setattr(examples, "_TOKENS", 48)


@pytest.mark.usefixtures("small_pieces")
def test_figures_are_those_of_the_dense_matrix(shared: Shared) -> None:
    sae = planted(orthonormal(16), k=3)
    outcome = outcome_of(sae, shared)
    table, (matrix, place) = outcome.per_latent, dense(sae, shared)
    active = matrix > 0
    assert outcome.tokens == len(matrix) and (table["count"] == active.sum(axis=0)).all()
    np.testing.assert_allclose(table["density"], active.mean(axis=0))
    for name, power in (("mean", 1), ("mean_square", 2)):
        np.testing.assert_allclose(table[name], (matrix**power).mean(axis=0), rtol=1e-5)
    correlation = np.corrcoef(matrix.T)
    together = active.T.astype(float) @ active
    length, ids = shared.text.ids.shape[1], shared.text.ids.numpy()
    owner = shared.text.document.numpy()
    for latent in range(16):
        own = matrix[active[:, latent], latent]
        np.testing.assert_allclose(table["quantiles"][latent], np.quantile(own, latents.QUANTILES), rtol=1e-5)
        assert table["histogram"][latent].sum() == len(own)
        # the strongest context of each document, the strongest first
        where = place[active[:, latent]]
        best: dict[int, float] = {}
        for value, flat in zip(own, where, strict=True):
            document = int(owner[flat // length])
            best[document] = max(best.get(document, 0.0), value)
        wanted = sorted(best.values(), reverse=True)[: latents.TOP]
        np.testing.assert_allclose(table["example_value"][latent][: len(wanted)], wanted, rtol=1e-6)
        # each fifth by rank
        ranked = np.array_split(np.sort(own), latents.GROUPS)
        for group, values in enumerate(ranked):
            start = latents.TOP + group * latents.PER_GROUP
            shown = table["example_value"][latent][start : start + latents.PER_GROUP]
            shown = shown[table["example_place"][latent][start : start + latents.PER_GROUP] >= 0]
            assert len(shown) == min(len(values), latents.PER_GROUP)
            assert (shown >= values.min() - 1e-6).all() and (shown <= values.max() + 1e-6).all()
        silent = table["example_place"][latent][-latents.SILENT :]
        assert not np.isin(silent[silent >= 0] // length, where // length).any()
        # partners
        partners = [other for other in table["coactive"][latent] if other >= 0]
        assert latent not in partners and len(partners) == min(coactive.PARTNERS, (together[latent] > 0).sum() - 1)
        row = np.where(together[latent] > 0, correlation[latent], -np.inf)
        row[latent] = -np.inf
        np.testing.assert_allclose(
            table["coactive_correlation"][latent][: len(partners)], np.sort(row)[::-1][: len(partners)], atol=1e-5
        )
        for rank, other in enumerate(partners):
            assert table["coactive_share"][latent][rank] == pytest.approx(together[latent, other] / len(own))
        # the window around the strongest activation
        acts = table["example_acts"][latent].reshape(latents.EXAMPLES, -1)[0]
        start = latents.window_start(table["example_place"][latent][:1], length, len(acts))[0]
        full = np.zeros(ids.size)
        full[place] = matrix[:, latent]
        exact = full[start : start + len(acts)] * 255 / own.max()
        assert ((acts >= exact - 0.01) & (acts < exact + 1.01)).all() and ((acts > 0) == (exact > 0)).all()
        weights = np.bincount(ids.reshape(-1)[where], own)
        np.testing.assert_allclose(weights[table["top_tokens"][latent][0]], weights.max())
    assert outcome.curves["ablation"] and all(line["kl"] > 0 for line in outcome.curves["ablation"])


def test_pieces_do_not_matter(shared: Shared, small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # rows of an orthonormal matrix are all equally near, and rounding would order them
    sae = planted(functional.normalize(orthonormal(16, seed=3) + 0.1 * orthonormal(16, seed=4)), k=2)
    small = outcome_of(sae, shared).per_latent
    monkeypatch.undo()
    large = outcome_of(sae, shared).per_latent
    for name, column in large.items():
        np.testing.assert_allclose(small[name], column, rtol=1e-5, atol=1e-6, err_msg=name)


def test_nothing_is_left_on_the_disk(shared: Shared) -> None:
    outcome_of(planted(orthonormal(16), k=1), shared)
    assert not list((shared.out / "_quality").glob(".examples-*"))


def test_tables_come_back_from_the_disk(shared: Shared, tmp_path: Path) -> None:
    outcome = outcome_of(planted(orthonormal(16), k=3), shared)
    about = {"metric": "examples", "version": 1, "settings": {}, "weights": "0", "tokens": outcome.tokens}
    write_quality(tmp_path, about, outcome.values, outcome.per_latent, {}, outcome.curves, outcome.tables)
    table = read_table(tmp_path, "examples", "per_latent")
    for name, column in outcome.per_latent.items():
        np.testing.assert_array_equal(table[name], column, err_msg=name)
    assert read_table(tmp_path, "examples", "tokens")["text"] == outcome.tables["tokens"]["text"]
    assert list(read_table(tmp_path, "examples", "per_latent", ["count"])) == ["count"]


def test_a_planted_latent(embedding_shared: Shared) -> None:
    """Latent 0 is active on the word w7 alone, latent 2 is its twin, latent 1 of another word, latent 3 of none."""
    shared = embedding_shared
    outcome = outcome_of(planted_words(shared), shared)
    table, kept, ids = outcome.per_latent, shared.text.kept, shared.text.ids
    w7 = shared.tokenizer.convert_tokens_to_ids("w7")
    here = (ids == w7) & kept
    assert table["count"][0] == int(here.sum()) and table["count"][3] == 0
    assert table["top_tokens"][0].tolist() == [w7, -1, -1, -1, -1]
    shown = table["example_place"][0]
    active = shown[: -latents.SILENT][shown[: -latents.SILENT] >= 0]
    assert here.flatten()[torch.tensor(active)].all()
    silent = shown[-latents.SILENT :]
    assert not here[torch.tensor(silent[silent >= 0]) // ids.shape[1]].any()
    assert table["coactive"][0][0] == 2 and table["coactive_correlation"][0][0] == pytest.approx(1)
    assert table["nearest"][0][0] == 2 and table["nearest_cosine"][0][0] == pytest.approx(1)
    assert table["promoted"][0][0] == w7  # the head is the embedding
    assert (table["example_place"][3][: -latents.SILENT] == -1).all()


def test_an_encoder_has_no_lens(encoder_shared: Shared) -> None:
    outcome = outcome_of(planted(orthonormal(16), k=3), encoder_shared)
    assert outcome.tokens > 0 and "promoted" not in outcome.per_latent and outcome.curves == {"ablation": []}


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "GPT2", "GPTNeoX"])
def test_the_gain_of_the_final_norm(kind: str) -> None:
    further = {"n_embd": 16, "n_head": 2, "n_layer": 3} if kind == "GPT2" else TINY
    if kind in ("Llama", "Gemma"):
        further = {**further, "num_key_value_heads": 1, "head_dim": 8}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**further, vocab_size=20)
    )
    norm = [module for module in model.base_model.children() if "Norm" in type(module).__name__][-1]
    torch.nn.init.normal_(norm.weight)
    if getattr(norm, "bias", None) is not None:
        torch.nn.init.normal_(norm.bias)
    gain, centred = final_gain(model.base_model, model.get_output_embeddings().weight.detach())
    expected = norm.weight.detach() + (1 if kind == "Gemma" else 0)
    torch.testing.assert_close(gain, expected, atol=1e-3, rtol=1e-3)
    assert centred == (kind in ("GPT2", "GPTNeoX"))


def test_texts_of_tokens(shared: Shared) -> None:
    ids = shared.tokenizer("w1 w2", add_special_tokens=False)["input_ids"]
    assert [text.strip() for text in token_texts(shared.tokenizer, ids)] == WORDS[1:3]
