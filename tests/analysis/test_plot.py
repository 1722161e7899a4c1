"""Pictures: functions on `Axes` that show what was fitted, what was not, and where the data end."""

import itertools
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from analysis import FitResult, RunTable, fit, load, plot
from analysis.questions.isoflop import isoflop
from analysis.report.plot.style import k_style, log_axes
from harness.errors import UserError
from tests.analysis.generate import grid_frame, write_sweep
from tests.analysis.test_comparisons import _curve_runs

N, K = 2 ** np.arange(8, 15), np.array([8, 16, 32, 64])
ROLES = {"n": "n_latents", "k": "k", "loss": "fvu"}


@pytest.fixture(scope="module")
def table():
    return RunTable(grid_frame(N, K, 0.005), dict(ROLES))


@pytest.fixture(scope="module")
def law(table):
    return fit(table)


def _axes(height=3.9) -> Any:
    return plot.figure(height).subplots()


def _names(ax: Any):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_settings_are_left_alone_and_axes_come_back(table, law):
    before = dict(matplotlib.rcParams)
    for draw in (
        lambda ax: plot.loss_against_n(ax, table, [law]),
        lambda ax: plot.residuals_against_n(ax, table, [law]),
        lambda ax: plot.profile(ax, law, "beta_n"),
    ):
        ax = _axes()
        assert draw(ax) is ax
        ax.figure.draw_without_rendering()
    assert dict(matplotlib.rcParams) == before


def test_levels_of_k_differ_without_colour():
    """By lightness in steps that black and white keeps, and by marker."""
    styles = [k_style(list(K), k) for k in K]
    light = [np.dot(to_rgb(style["color"]), (0.2126, 0.7152, 0.0722)) for style in styles]
    assert np.all(np.diff(light) > 0.08) and len({style["marker"] for style in styles}) == len(K)
    assert colormaps["viridis"](0.0)[:3] == to_rgb(styles[0]["color"])


def test_extrapolation_is_shaded_from_the_last_fitted_size_on(table, law):
    ax: Any = plot.loss_against_n(_axes(), table, [law], extend=4)
    shade = next(patch for patch in ax.patches if patch.get_label() == "extrapolated")
    left, right = shade.get_extents().transformed(ax.transData.inverted()).intervalx
    assert left == pytest.approx(N[-1], rel=1e-6) and right == pytest.approx(4 * N[-1], rel=1e-6)
    assert "extrapolated" not in _names(plot.loss_against_n(_axes(), table, [law]))


def test_held_out_runs_are_hollow_and_lie_in_the_shade(table):
    largest = table.values("n") == N[-1]
    seen, held = table.keep(~largest, "held out"), table.keep(largest, "fitted")
    seen.excluded = table.excluded
    ax: Any = plot.loss_against_n(_axes(), seen, [fit(seen, ci="wald")], held_out=held)
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert len(hollow) == len(K) and all(list(line.get_xdata()) == [N[-1]] for line in hollow)
    assert {"hollow: not fitted", "extrapolated"} <= set(_names(ax))


def test_the_band_of_a_new_run_surrounds_that_of_the_mean(table, law):
    ax: Any = plot.loss_against_n(_axes(), table, [law])
    bands = [shape for shape in ax.collections if len(shape.get_paths()) and len(shape.get_paths()[0].vertices) > 4]
    assert len(bands) == 2 * len(K)
    for new, mean in zip(bands[::2], bands[1::2], strict=True):
        wide, narrow = (np.ptp(shape.get_paths()[0].vertices[:, 1]) for shape in (new, mean))
        assert wide > narrow and new.get_alpha() < mean.get_alpha()


def test_a_colour_bar_names_every_k_with_its_marker(table, law):
    ax: Any = plot.loss_against_n(_axes(), table, [law])
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["8", "16", "32", "64"]
    assert [line.get_marker() for line in bar.lines] == [k_style(list(K), k)["marker"] for k in K]


def test_left_out_runs_are_crosses_with_their_reason(table):
    part = table.keep(table.values("n") != N[2], "trained on another machine")
    assert "left out (4): trained on another machine" in _names(plot.loss_against_n(_axes(), part, [fit(part)]))


@pytest.mark.parametrize("name", ["alpha", "gamma", "eta"])
def test_a_profile_crosses_its_limit_at_the_interval(law, name):
    ax: Any = plot.profile(_axes(), law, name)
    curve, critical = ax.lines[0], ax.lines[2].get_ydata()[0]
    x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    low, high = law.intervals[name]
    at_best = int(np.argmin(y))
    assert y[at_best] < 1e-4 and x[at_best] == pytest.approx(law.values[name], rel=1e-6)
    assert np.interp(critical, y[at_best:], x[at_best:]) == pytest.approx(high, rel=0.02)
    assert np.interp(critical, y[at_best::-1], x[at_best::-1]) == pytest.approx(low, rel=0.02)


def test_a_profile_needs_the_runs(law, tmp_path):
    law.to_json(tmp_path / "fit.json")
    with pytest.raises(UserError, match="a fit read from JSON has none"):
        plot.profile(_axes(), FitResult.from_json(tmp_path / "fit.json"), "alpha")


def test_isoflop_stars_are_hollow_where_not_bracketed(tmp_path):
    profiles = isoflop(_curve_runs(tmp_path, 2 ** np.arange(8, 14), 2**16), 6)
    assert 0 < profiles.minima["bracketed"].sum() < len(profiles.minima)
    ax: Any = plot.isoflop_profiles(_axes(), profiles)
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    faces = [line.get_markerfacecolor() == "white" for line in stars]
    assert faces == [not flag for flag in profiles.minima["bracketed"]]
    below = plot.isoflop_minima(_axes(), profiles)
    assert {"best n", "at the edge of the sizes"} <= set(_names(below))


def test_frontier_lies_over_grey_curves(tmp_path):
    from analysis.questions.frontier import frontier
    from analysis.runs.curves import evaluations

    table = load(write_sweep(tmp_path / "quick"))
    curves = evaluations(table)
    ax: Any = plot.loss_against_flops(_axes(), table, curves, frontier(table, curves))
    grey = [line for line in ax.lines if line.get_color() == "0.82"]
    front = next(line for line in ax.lines if line.get_label() == "frontier")
    assert len(grey) == 30 and all(line.get_zorder() < front.get_zorder() for line in grey)


@pytest.mark.parametrize("low", [2.2e11, 9e10, 1.3e5])
@pytest.mark.parametrize("decades", [0.1, 0.3, 0.5, 0.8, 1.5, 2.5, 4.5, 9.0])
def test_labels_of_an_axis_of_flops_do_not_overlap(low, decades):
    ax = _axes()
    ax.plot([low, low * 10**decades], [0.5, 0.2])
    log_axes(ax, "FLOPs", "fvu")
    ax.figure.canvas.draw()
    inside = [
        label for label in ax.get_xticklabels() if ax.get_xlim()[0] <= label.get_position()[0] <= ax.get_xlim()[1]
    ]
    boxes = [label.get_window_extent() for label in inside if label.get_text()]
    assert 2 <= len(boxes) <= 6
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
