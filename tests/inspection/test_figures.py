# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Figures show the numbers of their reading, at their positions, whatever the length and the tokens."""

import io
import warnings

import matplotlib.pyplot
import numpy as np
import pytest
import torch

from ham_hf import HAMConfig
from ham_hf.configuration_ham import ROUTERS
from ham_hf.inspection import (
    attention_figure,
    decay_figure,
    drawings,
    kept_figure,
    read,
    score_figure,
    usage_figure,
)
from ham_hf.inspection.figures import MAX_COLUMNS, drawable
from tests.inspection.test_readings import model_of
from tests.inspection.texts import made_up, passage


def panels(figure):
    """The axes of a figure without its colour bars."""
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def image(axis):
    (found,) = axis.get_images()
    return torch.from_numpy(np.ma.filled(found.get_array(), np.nan)).float()


def dots(axis, filled):
    """The points of each head, in the order of the heads."""
    lines = [x for x in axis.get_lines() if x.get_linestyle() == "None"]
    return [x for x in lines if (x.get_fillstyle() == "full") == filled]


def test_scores_are_drawn_at_their_positions():
    reading = made_up(40, thresholds=torch.tensor([[0.5, 0.5], [0.25, 2.0]]))
    reading = reading.part(10, 35)
    axes = panels(score_figure(reading))
    assert [axis.get_ylabel().split("\n")[0] for axis in axes] == ["layer 0", "layer 2"]
    for row, axis in enumerate(axes):
        for filled in (True, False):
            for head, line in enumerate(dots(axis, filled)):
                (there,) = np.nonzero((reading.kept[row, :, head] == filled).numpy())
                assert line.get_xdata().tolist() == (10 + there).tolist()
                assert line.get_ydata().tolist() == reading.scores[row, there, head].tolist()
    dashed = [[x.get_ydata()[0] for x in axis.get_lines() if x.get_linestyle() == "--"] for axis in axes]
    assert dashed == [[0.5, 0.5], [0.25]]
    assert "head 1, threshold 2" in [x.get_text() for x in axes[1].get_legend().get_texts()]
    assert axes[-1].get_xlim() == (9.5, 34.5)


def test_chosen_layers_and_heads():
    reading = made_up(30, layers=(1, 2, 4, 5, 7), heads=6, left_out=((0, "full_attention"),))
    (axis,) = panels(score_figure(reading, layers=[4], heads=[5, 1]))
    assert axis.get_ylabel().startswith("layer 4\n")
    for line, head in zip(dots(axis, True), (5, 1), strict=True):
        assert line.get_ydata().tolist() == reading.scores[2, reading.kept[2, :, head], head].tolist()
    assert len(panels(score_figure(reading))) == 3
    assert len(dots(panels(score_figure(reading))[0], True)) == 4
    above, below = panels(decay_figure(reading, layers=[7], heads=[3]))
    torch.testing.assert_close(image(above), reading.scores[4].T[[3]])
    torch.testing.assert_close(image(below), reading.decay[4].T[[3]])


def test_kept_tokens_are_the_share_of_heads():
    reading = made_up(40, heads=4)
    (axis,) = panels(kept_figure(reading))
    torch.testing.assert_close(image(axis), 100 * reading.kept.float().mean(2))
    assert [x.get_text() for x in axis.get_yticklabels()] == ["0", "2"]
    assert "%" in kept_figure(reading).axes[-1].get_ylabel()
    assert not axis.collections, "no window and no sinks"


def test_window_and_sinks_are_marked():
    model = model_of(HAMConfig(**SHAPE, attention_window=[6, 0], attention_sinks=[2, 3]))
    reading = read(model, passage(40), threshold=0.5)
    edges = [x.get_segments() for x in panels(kept_figure(reading))[0].collections]
    # White under orange, for each layer: behind the sinks, and before the 5 tokens that the window still holds.
    assert len(edges) == 4
    assert [[x[0][0] for x in found] for found in edges] == [[1.5, 34.5]] * 2 + [[2.5]] * 2
    legends = [axis.get_legend() for axis in panels(score_figure(reading))]
    labels = [[x.get_text() for x in legend.get_texts()][2:] for legend in legends]
    assert labels == [["sinks, held at any score", "window, held at any score"], ["sinks, held at any score"]]
    inside = panels(kept_figure(reading.part(10, 38)))[0]
    assert [x[0][0] for x in inside.collections[0].get_segments()] == [34.5]


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_usage_is_that_of_the_cache():
    model = model_of(HAMConfig(**SHAPE, attention_window=6))
    reading = read(model, passage(40), threshold=0.5)
    with torch.no_grad():
        cache = model(passage(40).ids, use_cache=True, threshold=0.5).cache
    kept, held = panels(usage_figure(reading))
    torch.testing.assert_close(image(kept), 100 * cache.kept_tokens()[:, 0].T / 40)
    torch.testing.assert_close(image(held), 100 * cache.kv_usage()[:, 0].T)
    assert [x.get_text() for x in kept.texts] == [f"{x:.0f}" for x in image(kept).flatten().tolist()]
    assert len(panels(usage_figure(made_up(20)))) == 1, "without a window both are the same"


def test_attention_of_the_query_over_the_tokens_that_it_sees():
    reading = made_up(40, texts=tuple(f"<{i}>" for i in range(40))).part(5, 40)
    above, below = panels(attention_figure(reading, 2))
    seen = reading.visible[1].T.repeat_interleave(2, 0)
    expected = (100 * reading.attention[1]).masked_fill(~seen, torch.nan)
    torch.testing.assert_close(image(above), expected, equal_nan=True)
    mean = (100 * reading.attention[1]).mean(0)
    best = mean.argsort(descending=True)[:10].tolist()
    torch.testing.assert_close(torch.tensor([float(bar.get_width()) for bar in below.patches]), mean[best])
    assert [x.get_text() for x in below.get_yticklabels()] == [f"{i + 5}  “<{i + 5}>”" for i in best]
    # An earlier query: what comes after it is not drawn.
    early = made_up(40, query=3)
    assert image(panels(attention_figure(early))[0]).shape == (4, 4)


def test_long_texts_are_drawn_in_columns():
    reading = made_up(2 * MAX_COLUMNS + 501)
    (axis,) = panels(kept_figure(reading))
    drawn, share = image(axis), 100 * reading.kept.float().mean(2)
    assert drawn.shape[1] == 834
    torch.testing.assert_close(drawn[:, :-1], share[:, :2499].unflatten(1, (-1, 3)).mean(2))
    torch.testing.assert_close(drawn[:, -1], share[:, 2499:].mean(1))
    assert axis.get_images()[0].get_extent()[:2] == [-0.5, 834 * 3 - 0.5]
    assert axis.get_xlim() == (-0.5, 2500.5)
    assert "each column is the mean of 3 tokens" in axis.get_xlabel()
    curve = panels(score_figure(reading, heads=[1]))[1].get_lines()[0]
    torch.testing.assert_close(
        torch.tensor(curve.get_ydata())[:-1], reading.scores[1, :2497, 1][: 227 * 11].view(-1, 11).mean(1)
    )
    assert curve.get_xdata()[:2].tolist() == [5, 16]
    above = panels(attention_figure(reading))[0]
    torch.testing.assert_close(image(above).nan_to_num().sum(1), torch.full((4,), 100.0))
    assert "sum of 3 tokens" in above.get_xlabel()


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_has_its_caption(router):
    scores = torch.arange(20.0).expand(2, 2, 20).mT / 2**24
    reading = made_up(20, router=router, scores=scores)
    figure = score_figure(reading)
    assert repr(router) in figure.get_supxlabel()
    low, high = panels(figure)[0].get_ylim()
    assert high < 1e-5 if router == "recency" else (low, high) == (-0.02, 1.02)


def test_any_token_can_be_drawn_and_pyplot_stays_as_it_was():
    odd = ("$x$", "$", "鯨\N{WHALE}", "\x07\n", "<&>", "\\frac", "a" * 90, "_^{")
    before = matplotlib.pyplot.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_figure(made_up(8, texts=odd)).savefig(io.BytesIO(), format="png", dpi=30)
    assert matplotlib.pyplot.get_fignums() == before
    assert drawable("鯨\n\x07é") == "“□⏎□é”"
    assert len(drawable("a" * 90)) == 27


def test_every_drawing_has_a_caption_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ham_hf.inspection.figures.DPI", 30)
    drawn = drawings(made_up(12, layers=(2,)))
    assert [x.name for x in drawn] == ["kept", "usage", "scores", "decay", "attention-layer-2"]
    assert all(x.caption.endswith(".") and x.figure.get_suptitle() for x in drawn)
    assert drawn[0].write(tmp_path, "first") == ["first.png", "first.svg"]
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "first.svg").read_text() == drawn[0].svg
    assert drawings(made_up(12, layers=(2,)))[0].svg == drawn[0].svg, "the same file each time"
    assert len(drawings(made_up(12, query=None))) == 4


def test_refused_figures():
    reading = made_up(12)
    for figure in (score_figure, decay_figure):
        with pytest.raises(ValueError, match=r"hybrid layers 0, 2, got 1, which is of type 'linear_attention'"):
            figure(reading, layers=[1])
        with pytest.raises(ValueError, match=r"hybrid layers 0, 2, got 9\."):
            figure(reading, layers=[9])
        with pytest.raises(ValueError, match="from 0 to 1, got 2"):
            figure(reading, heads=[2])
    with pytest.raises(ValueError, match="got 9"):
        attention_figure(reading, 9)
    with pytest.raises(ValueError, match="give `read` a `query`"):
        attention_figure(made_up(12, query=None))
    with pytest.raises(ValueError, match="at or before its query 3, got 5"):
        attention_figure(made_up(12, query=3).part(5, 12))
