# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Model cards say what checkpoint and measurements say, in the Hub's form, and what nobody stated."""

import functools
import json
import re
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import jinja2
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData, constants, repocard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import get_session

from ham_hf import HAMForCausalLM, HAMForSequenceClassification
from ham_hf.hub.card import build_card, card_in, missing_from
from ham_hf.hub.checkpoint import read_checkpoint
from ham_hf.hub.sources import read_sources

ROOT = Path(__file__).parents[2]
HAM_TINY = ROOT / "ham_hf/checkpoints/ham-tiny"
HAM_TINY_SOURCES = ROOT / "model_cards/ham_tiny"
CONVERSION = {
    "source": {"name": "owner/llama", "commit": None, "model_type": "llama", "architecture": "LlamaForCausalLM"},
    "script": "convert_llama_to_ham.py",
    "command": "python convert_llama_to_ham.py owner/llama my-ham",
    "date": "2026-11-25",
    "verification": {
        "tokens": 4096,
        "dtype": "float32",
        "max_abs_logit_error": 3.25e-5,
        "mean_abs_logit_error": 1.5e-6,
        "top1_agreement": 0.9975,
        "tolerance": 1e-4,
        "source_code": "transformers 5.23.0",
    },
    "notes": ["The sliding window was dropped."],
}


@pytest.fixture(autouse=True)
def strict_template(monkeypatch):
    """A variable that the template asks for and nobody sets is an error, not an empty place."""
    strict = functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined)
    monkeypatch.setattr(jinja2, "Template", strict)


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    """A folder that holds a model and nothing that anyone wrote about it."""
    HAMForCausalLM(tiny_config()).save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def sources(tmp_path):
    """A copy of what the card of ham-tiny is made of."""
    return shutil.copytree(HAM_TINY_SOURCES, tmp_path / "sources")


def make(checkpoint, sources=None, **arguments):
    return build_card(read_checkpoint(checkpoint), read_sources(sources or checkpoint), "a-model", **arguments)


def section(card, title):
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """The tables of a text without their heads: the first cell of each row and the others."""
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {first: others[0] if len(others) == 1 else others for first, *others in cells if first}


def test_the_committed_card_is_the_one_that_is_made():
    card = build_card(read_checkpoint(HAM_TINY), read_sources(HAM_TINY_SOURCES), "ham-tiny")
    committed = ModelCard.load(HAM_TINY_SOURCES / "README.md")
    assert card.text == committed.text
    assert card.data.to_dict() == committed.data.to_dict()


def test_a_loss_moves_its_row_and_its_metric_alone(sources):
    before = make(HAM_TINY, sources)
    usage = json.loads((sources / "usage.json").read_text())
    changed = next(x for x in usage["results"] if x["kv_usage"] == 0.25)
    changed |= {"loss": 1.2345, "usage": 0.111, "held": 0.111, "kv_bytes": 7 * 1024}
    (sources / "usage.json").write_text(json.dumps(usage))
    after = make(HAM_TINY, sources)
    old, new = rows(section(before, "Loss and memory")), rows(section(after, "Loss and memory"))
    assert {name for name in new if new[name] != old[name]} == {"25%"}
    assert (new["25%"][0], new["25%"][1], new["25%"][5]) == ("11.1%", "1.2345", "7")
    metrics = zip(before.data.eval_results, after.data.eval_results, strict=True)
    moved = [x for y, x in metrics if x != y]
    assert [x.metric_value for x in moved] == [1.2345]
    assert "keep 25%, 11.1% of the tokens kept" in moved[0].metric_name


def test_tables_of_the_architecture_and_the_router(tmp_path, tiny_config):
    config = tiny_config(
        num_hidden_layers=4,
        layer_types=["hybrid", "linear_attention", "full_attention", "hybrid"],
        head_dim=6,
        value_head_dim=10,
        router="learned_error",
        kv_output_norm=True,
        attention_window=[64, 0, 0, 9],
        attention_sinks=4,
        threshold=0.3,
        target_kv_usage=0.25,
        output_gate=False,
        attention_bias=True,
        attention_conv=False,
        tie_word_embeddings=True,
    )
    model = HAMForCausalLM(config)
    for number, layer in enumerate(x for x in model.model.layers if x.mixer.layer_type == "hybrid"):
        layer.mixer.threshold.data = torch.tensor([0.25, 0.5]) + number / 8
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    card = make(tmp_path)
    count = sum(x.numel() for x in model.parameters())
    assert f"with {count:,} parameters" in card.text
    table = rows(section(card, "Model"))
    assert table["layers"] == (
        "2 hybrid, 1 Gated DeltaNet only (`linear_attention`), 1 attention to every token only (`full_attention`)"
    )
    assert table["width"] == "32"
    assert table["heads"] == "4 query heads, 2 key/value heads, keys of 6 and values of 10"
    assert table["MLP"] == "48, gated, `silu`"
    assert table["positions"] == "RoPE, `default`, base 10,000"
    assert table["convolution"] == "4 tokens, of queries, keys and values, those of the RNN alone"
    assert table["norms and gates"] == (
        "norm of queries and keys, norm of the RNN's output, norm of the attention's output, "
        "biases of q, k, v and output"
    )
    assert table["always held"] == "the last 9 or 64 tokens, by layer, and the first 4 tokens"
    assert table["vocabulary"] == "97 tokens, embeddings tied to the output layer"
    # Transformers' own `to` leaves some parameters in float32 in newer releases.
    dtypes = Counter({x.dtype: 0 for x in model.parameters()})
    for x in model.parameters():
        dtypes[x.dtype] += x.numel()
    assert table["parameters"] == ", ".join(f"{n:,} in {str(x)[6:]}" for x, n in dtypes.most_common())
    router = rows(section(card, "Router and thresholds"))
    assert router["router"].startswith("`learned_error`")
    assert router["learned thresholds"] == ("from 0.250 to 0.625, one for each of 2 key/value heads in 2 layers")
    assert router["default threshold"] == "`0.3`, in the place of the learned ones"
    assert router["target of training"] == "25% of the tokens kept, measured per head"
    assert router["score quantiles"].startswith("not calibrated")
    assert "kv_usage=" not in card.text


def test_dtypes_are_counted_apart(checkpoint):
    half = HAMForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half.save_pretrained(checkpoint)
    wide = sum(x.numel() for x in half.parameters() if x.dtype == torch.float32)
    narrow = sum(x.numel() for x in half.parameters() if x.dtype == torch.bfloat16)
    assert wide > 0
    table = rows(section(make(checkpoint), "Model"))
    assert table["parameters"] == f"{narrow:,} in bfloat16, {wide:,} in float32"


def test_a_calibrated_checkpoint_says_so(checkpoint):
    model = HAMForCausalLM.from_pretrained(checkpoint)
    for layer in model.model.layers:
        layer.mixer.score_quantiles.fill_(0.5)
    model.save_pretrained(checkpoint)
    assert rows(section(make(checkpoint), "Router and thresholds"))["score quantiles"].startswith("calibrated")


def test_without_a_hybrid_layer_there_is_nothing_to_choose(tmp_path, tiny_config):
    HAMForCausalLM(tiny_config(layer_types=["linear_attention"] * 2)).save_pretrained(tmp_path)
    card = make(tmp_path)
    assert section(card, "Router and thresholds").strip().startswith("No layer is hybrid")
    assert "How to choose" not in card.text


def test_another_head_is_loaded_and_listed_as_what_it_is(tmp_path, tiny_config):
    HAMForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
    card = make(tmp_path)
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained(" in card.text
    assert "generate(" not in card.text


def test_a_class_of_someone_elses_is_loaded_as_the_decoder_in_it(checkpoint):
    broken(checkpoint / "config.json", lambda x: x.update(architectures=["SomeonesHAM"]))
    card = make(checkpoint)
    assert "AutoModel.from_pretrained(" in card.text
    assert "pipeline_tag" not in card.data.to_dict()


def test_the_name_on_the_hub_is_in_every_example(checkpoint):
    assert make(checkpoint).text.count('"OWNER/a-model"') == 4
    card = make(checkpoint, repo_id="someone/else")
    assert card.text.count('"someone/else"') == 4
    assert "OWNER" not in card.text


def test_what_nobody_stated_is_called_so(checkpoint):
    card = make(checkpoint)
    for title in ("Training data", "Recipe", "Limits", "Licence"):
        assert section(card, title).strip() == "Not stated."
    assert section(card, "Loss and memory").strip() == "Not measured."
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    missing = " ".join(missing_from(read_sources(checkpoint), None))
    for name in ("data.md", "recipe.md", "limits.md", "license", "language", "usage.json", "name on the Hub"):
        assert name in missing


def test_losses_without_a_data_set_stay_out_of_the_metadata(sources):
    metadata = json.loads((sources / "card.json").read_text())
    del metadata["evaluation"]["type"]
    (sources / "card.json").write_text(json.dumps(metadata))
    (sources / "usage.png").unlink()
    card = make(HAM_TINY, sources)
    assert "model-index" not in card.data.to_dict()
    assert "![" not in card.text
    missing = " ".join(missing_from(read_sources(sources), "owner/name"))
    assert "`evaluation`" in missing
    assert "usage.png" in missing


def test_prose_is_taken_as_it_is(checkpoint):
    """Text that looks like the template's own language is not run."""
    (checkpoint / "limits.md").write_text("Braces {{ name }} and {% if x %}.\n\n---\nno metadata: here\n---\n")
    card = make(checkpoint)
    assert section(card, "Limits").strip() == (checkpoint / "limits.md").read_text().strip()
    assert "no metadata" not in card.data.to_dict()


def test_conversion(checkpoint):
    assert "## Conversion" not in make(checkpoint).text
    (checkpoint / "conversion.json").write_text(json.dumps(CONVERSION))
    card = make(checkpoint)
    text = section(card, "Conversion")
    assert rows(text) == {
        "tokens compared": "4,096",
        "dtype": "float32",
        "largest difference of a logit": "3.2e-05",
        "mean difference of a logit": "1.5e-06",
        "same likeliest token": "99.75%",
        "tolerance": "1.0e-04",
    }
    for part in ("`owner/llama`", "`LlamaForCausalLM`", "2026-11-25", CONVERSION["command"], "- The sliding window"):
        assert part in text
    assert card.data.base_model == "owner/llama"


def test_a_conversion_that_missed_its_tolerance_says_so(checkpoint):
    missed = CONVERSION["verification"] | {"max_abs_logit_error": 0.5}
    (checkpoint / "conversion.json").write_text(json.dumps(CONVERSION | {"verification": missed, "notes": []}))
    assert rows(section(make(checkpoint), "Conversion"))["tolerance"] == "1.0e-04: **exceeded**"


def test_a_conversion_that_nobody_verified_says_so(checkpoint):
    (checkpoint / "conversion.json").write_text(json.dumps(CONVERSION | {"verification": None, "seconds": 5}))
    text = section(make(checkpoint), "Conversion")
    assert "were not compared" in text
    assert rows(text) == {}
    assert "- The sliding window" in text


@pytest.mark.parametrize("name", ["/models/llama", "./llama", "llama", "models/llama"])
def test_a_conversion_of_a_local_folder_names_no_base_model(checkpoint, tmp_path, monkeypatch, name):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    source = CONVERSION["source"] | {"name": name}
    (checkpoint / "conversion.json").write_text(json.dumps(CONVERSION | {"source": source}))
    card = make(checkpoint)
    assert f"Converted from `{name}`" in card.text
    assert card.data.base_model is None


def test_metadata_survives_the_hubs_own_reader(tmp_path, sources):
    metadata = {"datasets": ["owner/text"], "tags": ["ham", "story"]}
    (sources / "card.json").write_text(json.dumps(json.loads((sources / "card.json").read_text()) | metadata))
    card = make(HAM_TINY, sources)
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert str(loaded) == str(card)
    expected = {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ham", "hybrid-associative-memory", "gated-deltanet", "kv-cache", "story"],
        "datasets": ["owner/text"],
    }
    assert expected.items() <= loaded.data.to_dict().items()


def test_model_index_round_trip(sources):
    card = make(HAM_TINY, sources)
    index = card.data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "a-model"
    assert eval_results_to_model_index(name, results) == index
    usage = json.loads((sources / "usage.json").read_text())["results"]
    assert [x.metric_value for x in results] == [round(x["loss"], 4) for x in usage]
    assert len({x.metric_name for x in results}) == len(usage), "metrics of one name would hide each other"
    assert {(x.task_type, x.dataset_type, x.dataset_split) for x in results} == {
        ("text-generation", "ham-tiny-corpus", "held_out")
    }


class Validator(BaseHTTPRequestHandler):
    """The Hub's address that judges cards, judging by huggingface_hub's own reading of the metadata."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        header = body["content"].split("---\n")[1]
        try:
            data = ModelCard(f"---\n{header}---\n").data
            assert isinstance(data, ModelCardData)
            assert self.path == "/api/validate-yaml"
            assert body["repoType"] == "model"
            status, answer = 200, b"{}"
        except (ValueError, AssertionError) as error:
            status, answer = 400, str(error).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


def test_cards_pass_huggingface_hubs_validation(sources, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Validator)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def post(url, **arguments):
        return get_session().post(f"http://127.0.0.1:{server.server_port}{urlsplit(url).path}", **arguments)

    monkeypatch.setattr(repocard, "get_session", lambda: SimpleNamespace(post=post))
    try:
        card = make(HAM_TINY, sources)
        card.validate()
        card.data.eval_results[0].dataset_name = None
        with pytest.raises(ValueError, match="model_index"):
            card.validate()
    finally:
        server.shutdown()
        server.server_close()


def broken(path, change):
    """Rewrites a JSON file with `change` applied to what it holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("usage.json", lambda x: x.pop("context"), "context"),
        ("usage.json", lambda x: x.update(results=[]), "1.0"),
        ("usage.json", lambda x: x["results"][0].pop("loss"), "'loss'"),
        ("usage.json", lambda x: x["results"][0].update(loss="low"), "`loss`.*'low'"),
        ("usage.json", lambda x: x["results"][0].update(loss=float("nan")), "`loss`.*nan"),
        ("usage.json", lambda x: x["results"][0].update(loss=float("inf")), "`loss`.*inf"),
        ("usage.json", lambda x: x["results"][0].update(kv_usage=True), "`kv_usage`.*True"),
        ("usage.json", lambda x: x["results"][0].update(kv_bytes=0.5), "`kv_bytes`.*0.5"),
        ("usage.json", lambda x: x["results"][0]["losses"].pop(), "losses"),
        ("usage.json", lambda x: x["results"][0].update(speed=1.0), "speed"),
        ("card.json", lambda x: x.update(licence="mit"), "licence"),
        ("card.json", lambda x: x.update(language="en"), "`language`.*'en'"),
        ("card.json", lambda x: x["evaluation"].update(dataset=7), "`dataset`.*7"),
    ],
)
def test_refused_sources(sources, name, change, expected):
    broken(sources / name, change)
    with pytest.raises(ValueError, match=expected) as error:
        read_sources(sources)
    assert str(sources / name) in str(error.value)


def test_refused_files(sources, checkpoint):
    for content in (b"{", b"\xff", b"[]"):
        (sources / "usage.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"usage\.json"):
            read_sources(sources)
    with pytest.raises(ValueError, match="nowhere"):
        read_sources(sources / "nowhere")
    (checkpoint / "conversion.json").write_text(json.dumps(CONVERSION | {"date": 2026}))
    with pytest.raises(ValueError, match=r"conversion\.json: `date`.*2026"):
        read_checkpoint(checkpoint)


def test_what_linear_layers_have_of_their_own(tmp_path, tiny_config):
    config = tiny_config(
        num_hidden_layers=2,
        layer_types=["hybrid", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=10,
        output_gate=False,
        linear_output_gate="silu",
        attention_post_norm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    HAMForCausalLM(config).save_pretrained(tmp_path / "hybrid")
    table = rows(section(make(tmp_path / "hybrid"), "Model"))
    assert table["heads of linear layers"] == "2 key heads, 4 value heads, keys of 6 and values of 10"
    assert "output gate of linear layers, norms after attention and MLP" in table["norms and gates"]
    assert table["positions"].endswith(", of 50% of a head")


def test_names_break_out_of_nothing(checkpoint):
    """Whoever named things: no line, block or call in the card ends where it should not."""
    name = 'a"); import os\n## Heading\n```\n---\nlicense: mit'
    conversion = json.loads(json.dumps(CONVERSION).replace("owner/llama", json.dumps(name)[1:-1]))
    (checkpoint / "conversion.json").write_text(json.dumps(conversion))
    (checkpoint / "card.json").write_text(json.dumps({"license": name}))
    card = build_card(read_checkpoint(checkpoint), read_sources(checkpoint), name)
    reread = ModelCard(str(card))
    assert reread.data.license == name
    lines = reread.text.splitlines()
    assert not [line for line in lines if line in ("## Heading", "---", "license: mit")]
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    calls = [line for line in lines if "from_pretrained(" in line]
    assert calls
    assert all('("OWNER/NAME"' in line and "import os" not in line for line in calls)


def test_strangers_html_is_shown_and_not_run(checkpoint):
    """Outside of code, where Markdown would hand it to the browser; in code it stands as it is."""
    evil = "<script>alert(1)</script> & <img src=x onerror=y> ![x](http://127.0.0.1/x) | cell"
    conversion = json.loads(json.dumps(CONVERSION | {"notes": [evil], "date": evil, "script": evil}))
    conversion["verification"] |= {"dtype": evil, "source_code": evil}
    (checkpoint / "conversion.json").write_text(json.dumps(conversion))
    card_json = {"license": evil, "evaluation": {"dataset": evil}}
    (checkpoint / "card.json").write_text(json.dumps(card_json))
    shutil.copy(HAM_TINY_SOURCES / "usage.json", checkpoint)
    card = build_card(read_checkpoint(checkpoint), read_sources(checkpoint), evil)
    outside_code = re.sub(r"```.*?```|`[^`]*`|<!-- .*? -->", "", card.text, flags=re.DOTALL)
    assert "<" not in outside_code
    assert not re.search(r"(?<!\\)\]\(http://127", outside_code)
    # Title, first sentence, date, source code, dtype, note, data set, licence.
    shown = (
        r"&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;img src=x onerror=y&gt; !\[x\](http://127.0.0.1/x) \| cell"
    )
    assert outside_code.count(shown) == 8
    assert f"`{evil}`" in card.text


@pytest.mark.parametrize("depth", [101, 400, 1000, 100_000])
def test_what_is_nested_too_deep_is_refused(checkpoint, depth):
    """In each file that is read; Python itself gives up somewhere on the way."""
    nested = "[" * depth + "]" * depth
    whole = json.dumps(CONVERSION)[:-1]
    for name, text in (
        ("card.json", f'{{"tags": {nested}}}'),
        ("conversion.json", f'{whole}, "more": {nested}}}'),
        ("config.json", f'{{"model_type": "ham", "more": {nested}}}'),
    ):
        before = (checkpoint / name).read_bytes() if (checkpoint / name).exists() else None
        (checkpoint / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} is nested more than 100 deep"):
            make(checkpoint)
        (checkpoint / name).unlink()
        if before is not None:
            (checkpoint / name).write_bytes(before)
    if depth <= 1000:
        (checkpoint / "README.md").write_text(f"---\ntags: {nested}\n---\n# A model\n")
        with pytest.raises(ValueError, match=r"README\.md is not a model card"):
            card_in(checkpoint)


def test_refused_checkpoints(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        read_checkpoint(tmp_path / "empty")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="whole safetensors"):
        read_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_checkpoint(checkpoint)
    for shard in ("lost.safetensors", "../bare/config.json"):
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
        with pytest.raises(ValueError, match=re.escape(shard)):
            read_checkpoint(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "model.safetensors").write_bytes(weights)
    broken(checkpoint / "config.json", lambda x: x.update(layer_types=["hybrid", "linear_attention"]))
    with pytest.raises(ValueError, match=r"2 thresholds.*1 hybrid"):
        read_checkpoint(checkpoint)
    broken(checkpoint / "config.json", lambda x: x.update(model_type="bert"))
    with pytest.raises(ValueError, match="'bert'"):
        read_checkpoint(checkpoint)
