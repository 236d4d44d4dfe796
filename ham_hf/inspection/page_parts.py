# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Frame, style and script of the page; the script chooses the setting, zooms and explains a token."""

# The steps of matplotlib's YlGnBu, from no head to every head.
SHADES = ("#ffffff", "#f7fccc", "#e4f4b6", "#c7e9b4", "#93d4b8", "#5fc0c2", "#36a9c3", "#1f80b8", "#23499e", "#081d58")
FIRST_DARK = 7

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What a HAM kept</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>What a HAM kept</h1>
<p>$source</p>
<p><label>Setting <select id="setting">$settings</select></label>
<label>Zoom of the figures <input id="zoom" type="range" min="100" max="600" step="50" value="100"></label></p>
</header>
<main>
<h2>The text</h2>
<p>A token is darker the more of all key/value heads keep it: <b class="k0">none</b><b class="k1">few</b><b
class="k5">half</b><b class="k9">all</b>. Underlined: <b class="k0 sink">sinks</b> and the <b
class="k0 window">window</b>, which are held at any score. Point at a token, or move through the text with the arrow
keys, to see which heads keep it. $note</p>
<p id="told" role="status" aria-live="polite">No token is chosen.</p>
<div id="text" tabindex="0" role="group" aria-label="the text, token by token">$text</div>
$sections
</main>
<script>
$script</script>
</body>
</html>
"""

STYLE = """\
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 76rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #999; z-index: 1; }
h1 { margin: .4rem 0 0; font-size: 1.2rem; }
header p { margin: .3rem 0; overflow-wrap: anywhere; }
label { display: inline-block; margin-right: 1.5rem; }
select, input { font: inherit; vertical-align: middle; max-width: 100%; }
b { font-weight: normal; }
#text { max-height: 32rem; overflow: auto; border: 1px solid #999; padding: .6rem; line-height: 1.9;
  white-space: pre-wrap; overflow-wrap: anywhere; }
#told { min-height: 3em; margin: .3rem 0; overflow-wrap: anywhere; }
.gap { display: block; color: #555; text-align: center; }
.sink { text-decoration: underline double; }
.window { text-decoration: underline dotted; }
.chosen { outline: 3px solid #D55E00; }
figure { margin: 1.5rem 0; }
.scroll { overflow-x: auto; border: 1px solid #ccc; }
.scroll svg { display: block; height: auto; width: calc(var(--zoom, 1) * 100%); min-width: 44rem; }
:focus-visible { outline: 3px solid #D55E00; outline-offset: 2px; }
""" + "".join(
    f".k{step} {{ background: {shade}; color: {'#fff' if step >= FIRST_DARK else '#1a1a1a'}; }}\n"
    for step, shade in enumerate(SHADES)
)

SCRIPT = """\
"use strict";
const data = DATA;
const choice = document.getElementById("setting"), zoom = document.getElementById("zoom");
const text = document.getElementById("text"), told = document.getElementById("told");
const tokens = [...text.getElementsByTagName("b")];
const all = data.layers.length * data.heads;
let chosen = -1;

function headsOf(kept) {
  const bits = [...BigInt("0x" + kept).toString(2)].reverse();
  return data.layers.map((_, row) => [...Array(data.heads).keys()].filter(h => bits[row * data.heads + h] === "1"));
}

function tell() {
  if (chosen < 0) return;
  const setting = data.settings[choice.value];
  const heads = headsOf(setting.kept[chosen]);
  const kept = heads.map((x, row) => x.length ? `layer ${data.layers[row]}: ${x.join(", ")}` : "").filter(x => x);
  told.textContent = `Token ${tokens[chosen].title} — ${kept.length ? "heads of " + kept.join("; ") : "no head"}`;
}

function choose(token) {
  if (token < 0 || token >= tokens.length) return;
  if (chosen >= 0) tokens[chosen].classList.remove("chosen");
  chosen = token;
  tokens[chosen].classList.add("chosen");
  tell();
}

function show() {
  const setting = data.settings[choice.value];
  tokens.forEach((token, i) => {
    const count = headsOf(setting.kept[i]).flat().length;
    const step = count === all ? 9 : Math.min(8, Math.ceil(8 * count / all));
    token.className = token.className.replace(/\\bk\\d/, "k" + step);
    const position = token.title.split(":")[0], score = (setting.scores[i] / 100).toFixed(2);
    token.title = `${position}: ${count} of ${all} heads, mean score ${score}`;
  });
  for (const x of document.querySelectorAll("section")) x.hidden = x.dataset.setting !== choice.value;
  tell();
}

choice.addEventListener("change", show);
zoom.addEventListener("input", () => document.body.style.setProperty("--zoom", zoom.value / 100));
text.addEventListener("mouseover", event => choose(tokens.indexOf(event.target)));
text.addEventListener("click", event => choose(tokens.indexOf(event.target)));
text.addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 }[event.key];
  if (!step) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(tokens.length - 1, chosen + step)));
  tokens[chosen].scrollIntoView({ block: "nearest" });
});
show();
"""
