# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The page shows the tokens as they are, holds the numbers of every setting, and needs nothing from anywhere."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from ham_hf.inspection import Drawing, attention_figure, html_page, kept_figure
from ham_hf.inspection.page import SHOWN_TOKENS, passages, shade_step
from tests.inspection.texts import made_up

ODD = (" plain", "<script>alert(1)</script>", "</b>", "&amp;", '"', "'", "$text", "\n", "\x07", "]]>", "-->", "鯨")
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """What a browser finds: elements with their attributes, the text of each, and that all are closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, i in self.open:
            self.texts[i] = self.texts.get(i, "") + data

    def all(self, tag):
        return [(attrs, self.texts.get(i, "")) for i, (name, attrs) in enumerate(self.elements) if name == tag]

    def tokens(self):
        return [(attrs, text) for attrs, text in self.all("b") if "title" in attrs]

    def data(self):
        ((_, script),) = self.all("script")
        return json.loads(re.search(r"const data = (.*);\n", script)[1])


def page_of(*readings, figures=()):
    drawn = [[Drawing(f.__name__, f(reading), f"See <{f.__name__}>.") for f in figures] for reading in readings]
    return html_page(readings, drawn, "a <model> & a text")


def test_tokens_are_escaped_and_none_is_lost():
    reading = made_up(len(ODD), texts=ODD)
    page = Page(page_of(reading, figures=[attention_figure]))
    shown = "".join(text for _, text in page.tokens())
    assert shown == "".join(ODD).replace("\n", "⏎\n").replace("\x07", "␇")
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "a <model> & a text" in "".join(text for _, text in page.all("p"))
    ((_, caption),) = page.all("figcaption")
    assert caption == "See <attention_figure>."


def test_nothing_comes_from_a_network():
    text = page_of(made_up(20), figures=[kept_figure, attention_figure])
    assert "http" not in text
    assert "@import" not in text
    page = Page(text)
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "a")
        assert not {"src", "srcset", "action", "onclick", "onload"} & attrs.keys()
        for name in ("href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert all(x.startswith("#") for x in re.findall(r"url\(([^)]*)\)", text))


def test_names_are_unique_and_found():
    reading = made_up(20)
    page = Page(page_of(reading, reading, figures=[kept_figure, attention_figure]))
    names = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(names) == len(set(names))
    used = [attrs["xlink:href"][1:] for _, attrs in page.elements if attrs.get("xlink:href", "").startswith("#")]
    used += re.findall(r"url\(#([^)]*)\)", str(page.elements))
    assert used
    assert set(used) <= set(names)


def test_every_setting_has_its_numbers_and_figures():
    readings = [made_up(30), made_up(30, setting="kv-usage <0.1>", kept=made_up(31).scores[:, :30] > 0.9)]
    page = Page(page_of(*readings, figures=[kept_figure]))
    assert [text for _, text in page.all("option")] == ["threshold 0.5", "kv-usage <0.1>"]
    assert [attrs["data-setting"] for attrs, _ in page.all("section")] == ["0", "1"]
    assert len(page.all("figure")) == 2
    data = page.data()
    assert (data["first"], data["layers"], data["heads"]) == (0, [0, 2], 2)
    for setting, reading in zip(data["settings"], readings, strict=True):
        bits = [[int(x, 16) >> bit & 1 for bit in range(4)] for x in setting["kept"]]
        assert torch.equal(torch.tensor(bits).view(30, 2, 2).transpose(0, 1).bool(), reading.kept)
        scores = 100 * reading.scores.mean((0, 2))
        torch.testing.assert_close(torch.tensor(setting["scores"]).float(), scores, atol=0.5, rtol=0)
    with pytest.raises(ValueError, match="readings of the same tokens"):
        page_of(made_up(30), made_up(31))
    with pytest.raises(ValueError, match="one or more"):
        html_page([], [], "")


def test_a_token_tells_its_heads_and_its_score():
    reading = made_up(30, windows=(0, 4), sinks=(0, 2)).part(1, 30)
    counts = reading.kept.sum((0, 2)).tolist()
    for i, (attrs, _) in enumerate(Page(page_of(reading)).tokens()):
        assert attrs["title"] == f"{i + 1}: {counts[i]} of 4 heads, mean score {reading.scores[:, i].mean():.2f}"
        kinds = attrs["class"].split()
        assert kinds[0] == f"k{shade_step(counts[i], 4)}"
        assert kinds[1:] == (["sink"] if i + 1 < 2 else ["window"] if i + 1 >= 27 else [])
    assert [shade_step(x, 90) for x in (0, 1, 45, 89, 90)] == [0, 1, 4, 8, 9]
    assert shade_step(1, 1) == 9


def test_long_texts_are_sampled_and_the_page_stays_small():
    reading = made_up(10_000, texts=("<&>",) * 10_000)
    text = page_of(reading, figures=[kept_figure, attention_figure])
    assert len(text) < 2 * 2**20
    page = Page(text)
    assert len(page.tokens()) == SHOWN_TOKENS
    assert "The text has 10,000 tokens; 10 passages of 400 tokens are shown here." in text
    places = [int(attrs["title"].split(":")[0]) for attrs, _ in page.tokens()]
    assert places == [i for span in passages(10_000) for i in span]
    assert (places[0], places[-1]) == (0, 9999)
    assert places == sorted(set(places))
    gaps = [int(text.split()[1].replace(",", "")) for attrs, text in page.all("span") if attrs.get("class") == "gap"]
    assert sum(gaps) == 10_000 - SHOWN_TOKENS
    assert len(page.data()["settings"][0]["kept"]) == SHOWN_TOKENS


# The least of a browser: two settings, the tokens' elements, and events that the test sends.
BROWSER = """
const element = (over = {}) => ({ on: {}, style: { setProperty(name, x) { this[name] = x; } },
  addEventListener(name, f) { this.on[name] = f; }, scrollIntoView() {},
  classList: { add() {}, remove() {} }, ...over });
const TOKENS = COUNT.map(title => element({ className: "k0 sink", title }));
const byId = { setting: element({ value: "0" }), zoom: element({ value: "300" }), told: element(),
  text: element({ getElementsByTagName: () => TOKENS }) };
const sections = [element({ dataset: { setting: "0" } }), element({ dataset: { setting: "1" } })];
const document = { getElementById: id => byId[id], querySelectorAll: () => sections, body: element() };
"""
EVENTS = """
const press = key => byId.text.on.keydown({ key, preventDefault() {} });
press("ArrowRight"); press("ArrowDown"); press("ArrowLeft");
byId.setting.value = "1"; byId.setting.on.change(); byId.zoom.on.input();
console.log(JSON.stringify([TOKENS.map(x => [x.className, x.title]), byId.told.textContent,
  sections.map(x => x.hidden), document.body.style["--zoom"]]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_script_switches_settings_zooms_and_tells_a_token(tmp_path):
    readings = [made_up(30), made_up(30, kept=made_up(31).scores[:, :30] > 0.7)]
    page = Page(page_of(*readings))
    ((_, script),) = page.all("script")
    titles = [attrs["title"] for attrs, _ in page.tokens()]
    (tmp_path / "page.js").write_text(
        BROWSER.replace("COUNT", json.dumps(titles)) + script.replace('"use strict";', "") + EVENTS
    )
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    tokens, told, hidden, zoom = json.loads(done.stdout)
    counts = readings[1].kept.sum((0, 2)).tolist()
    scores = readings[1].scores.mean((0, 2)).tolist()
    assert tokens == [
        [f"k{shade_step(x, 4)} sink", f"{i}: {x} of 4 heads, mean score {scores[i]:.2f}"] for i, x in enumerate(counts)
    ]
    kept = [(n, x.nonzero().flatten().tolist()) for n, x in zip((0, 2), readings[1].kept[:, 9], strict=True)]
    heads = [f"layer {n}: {', '.join(map(str, found))}" for n, found in kept if found]
    assert told == f"Token {tokens[9][1]} — " + (f"heads of {'; '.join(heads)}" if heads else "no head")
    assert hidden == [True, False]
    assert zoom == 3
