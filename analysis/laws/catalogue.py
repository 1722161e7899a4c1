"""The laws by name.

Sources: L(n, k) — Gao et al. 2024; E + A·N^−α + B·D^−β — Hoffmann et al. 2022; the law in the number of experts
(without E) — Clark et al. 2022; the smoothly broken power law — Caballero et al. 2022.

The form of a law without its floor is among its nested forms.
"""

from __future__ import annotations

from analysis.laws.law import Entry, Law, SmoothBreak
from harness.errors import UserError

_BILINEAR = (Entry("alpha"), Entry("beta_k", ("k",)), Entry("beta_n", ("n",)), Entry("gamma", ("k", "n")))
_ADDITIVE = _BILINEAR[:3]
_EXPERTS = (Entry("a", ("n",)), Entry("b", ("experts",)), Entry("c", ("experts", "n")), Entry("d"))
_CHINCHILLA = ((Entry("A"), Entry("alpha", ("n",), -1.0)), (Entry("B"), Entry("beta", ("d",), -1.0)))
_FLOOR_K = (Entry("zeta"), Entry("eta", ("k",)))
_TOKENS = (Entry("delta"), Entry("delta_k", ("k",)), Entry("delta_n", ("n",)), Entry("beta_d", ("d",), -1.0))
_POWER = (Entry("A"), Entry("a", ("x",), -1.0))

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("power", "A·x^−a", ("x",), (_POWER,), ("A",), scale_input="x", min_levels={"x": 2}),
        Law(
            "power_floor",
            "E + A·x^−a",
            ("x",),
            ((Entry("E"),), _POWER),
            ("E", "A"),
            floor=0,
            scale_input="x",
            nested=("power",),
            min_levels={"x": 3},
        ),
        Law(
            "sae_nk",
            "exp(alpha + beta_k·ln k + beta_n·ln n + gamma·ln k·ln n) + exp(zeta + eta·ln k)",
            ("n", "k"),
            (_BILINEAR, _FLOOR_K),
            floor=1,
            nested=("sae_nk_constant_floor", "sae_nk_no_interaction", "sae_nk_no_floor"),
            min_levels={"n": 3, "k": 2},
        ),
        Law(
            "sae_nk_constant_floor",
            "exp(alpha + beta_k·ln k + beta_n·ln n + gamma·ln k·ln n) + exp(zeta)",
            ("n", "k"),
            (_BILINEAR, (Entry("zeta"),)),
            floor=1,
            nested=("sae_nk_no_floor",),
            min_levels={"n": 3, "k": 2},
        ),
        Law(
            "sae_nk_no_interaction",
            "exp(alpha + beta_k·ln k + beta_n·ln n) + exp(zeta + eta·ln k)",
            ("n", "k"),
            (_ADDITIVE, _FLOOR_K),
            floor=1,
            nested=("sae_nk_no_interaction_no_floor",),
            min_levels={"n": 3, "k": 2},
        ),
        Law(
            "sae_nk_no_interaction_no_floor",
            "exp(alpha + beta_k·ln k + beta_n·ln n)",
            ("n", "k"),
            (_ADDITIVE,),
            min_levels={"n": 2, "k": 2},
        ),
        Law(
            "sae_nk_no_floor",
            "exp(alpha + beta_k·ln k + beta_n·ln n + gamma·ln k·ln n)",
            ("n", "k"),
            (_BILINEAR,),
            min_levels={"n": 2, "k": 2},
        ),
        Law(
            "sae_nkd",
            "sae_nk + exp(delta + delta_k·ln k + delta_n·ln n − beta_d·ln d)",
            ("n", "k", "d"),
            (_BILINEAR, _FLOOR_K, _TOKENS),
            floor=1,
            nested=("sae_nkd_no_floor",),
            min_levels={"n": 3, "k": 2, "d": 3},
        ),
        Law(
            "sae_nkd_no_floor",
            "sae_nk_no_floor + exp(delta + delta_k·ln k + delta_n·ln n − beta_d·ln d)",
            ("n", "k", "d"),
            (_BILINEAR, _TOKENS),
            min_levels={"n": 2, "k": 2, "d": 3},
        ),
        Law(
            "chinchilla",
            "E + A·N^−alpha + B·D^−beta",
            ("n", "d"),
            ((Entry("E"),), *_CHINCHILLA),
            ("E", "A", "B"),
            floor=0,
            nested=("chinchilla_no_floor",),
            min_levels={"n": 3, "d": 3},
        ),
        Law(
            "chinchilla_no_floor",
            "A·N^−alpha + B·D^−beta",
            ("n", "d"),
            _CHINCHILLA,
            ("A", "B"),
            min_levels={"n": 3, "d": 3},
        ),
        Law(
            "bilinear_experts",
            "E + exp(a·ln n + b·ln experts + c·ln n·ln experts + d)",
            ("n", "experts"),
            ((Entry("E"),), _EXPERTS),
            ("E",),
            floor=0,
            nested=("bilinear_experts_no_floor",),
            min_levels={"n": 3, "experts": 2},
        ),
        Law(
            "bilinear_experts_no_floor",
            "exp(a·ln n + b·ln experts + c·ln n·ln experts + d)",
            ("n", "experts"),
            (_EXPERTS,),
            min_levels={"n": 2, "experts": 2},
        ),
        Law(
            "monomial",
            "D0·n^p",
            ("n",),
            ((Entry("D0"), Entry("p", ("n",))),),
            ("D0",),
            min_levels={"n": 2},
        ),
        SmoothBreak(
            "bnsl1",
            "E + A·x^−a·(1 + (x/x1)^(1/f))^(−c·f)",
            ("x",),
            ((Entry("E"),), (*_POWER, Entry("c", ("x",), -1.0))),
            ("E", "A", "x1", "f"),
            floor=0,
            scale_input="x",
            nested=("bnsl1_no_floor",),
            min_levels={"x": 6},
        ),
        SmoothBreak(
            "bnsl1_no_floor",
            "A·x^−a·(1 + (x/x1)^(1/f))^(−c·f)",
            ("x",),
            ((*_POWER, Entry("c", ("x",), -1.0)),),
            ("A", "x1", "f"),
            scale_input="x",
            min_levels={"x": 6},
        ),
    )
}


OLD_NAMES = {"tokens_to_convergence": "monomial"}
"""Earlier names, which command lines, study files and stored fits may still use."""


def get(name: str) -> Law:
    """The law of that name, or of that earlier name. Raises `UserError` if there is none."""
    name = OLD_NAMES.get(name, name)
    if name not in LAWS:
        raise UserError(f"law {name!r} is not known; choose one of: {', '.join(LAWS)}")
    return LAWS[name]
