# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Checks that a decoding step never waits for the host, and compares its replay with the model's own step."""

import copy
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import ham_kernels
from ham_hf import HAMCache, HAMForCausalLM, cuda_graph_ham, paged_store_ham
from ham_hf.cuda_graph_ham import CapturedStep
from ham_hf.evaluation import calibrate

# The package gives the function this name.
attention = importlib.import_module("ham_kernels.ragged_decode_attention")
OPS = ("decode_update", "decode_mix_append", "ragged_decode_attention", "slab_table")
# Operations for which the host reads values: the result itself, or those that determine its shape.
NEED_THE_HOST = (
    *("_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "unique", "_unique2", "equal"),
    *("unique_consecutive", "unique_dim", "histc", "is_nonzero"),
)
PROMPT = 21


class WithoutHost(TorchDispatchMode):
    """Fails on operations that need the host, also on masks as indices and repeats without their total.

    On a CPU some ways to the host are no operations, so these methods of a tensor fail too, except inside the kernels,
    which the interpreter runs on the host.
    """

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("cpu", "tolist", "numpy"):
            self.patch.setattr(torch.Tensor, name, outside_kernels(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        needs = name in NEED_THE_HOST
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            needs = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name == "repeat_interleave":
            needs = kwargs.get("output_size") is None
        assert not needs, f"{name} needs the host"
        return func(*args, **kwargs)


KERNELS_RUNNING: list[str] = []


def outside_kernels(name, method):
    def checked(tensor, *args, **kwargs):
        assert KERNELS_RUNNING, f"{name} needs the host"
        return method(tensor, *args, **kwargs)

    return checked


@pytest.fixture
def on_kernels(choose_kernels):
    """Makes the model decode with kernels, on a CPU too, and lists the requested ones."""
    names = []

    def kernel(op, *tensors):
        if op not in OPS:
            return None
        names.append(op)

        def run(*args, **kwargs):
            KERNELS_RUNNING.append(op)
            try:
                return getattr(ham_kernels, op)(*args, **kwargs)
            finally:
                KERNELS_RUNNING.pop()

        return run

    choose_kernels(kernel)
    return names


@pytest.fixture
def small_pages(monkeypatch):
    """Slabs of few pages, so that a short text fills several."""
    monkeypatch.setattr(paged_store_ham, "MIN_SLAB_PAGES", 1)


def make_model(tiny_config, device, **overrides):
    torch.manual_seed(5)
    settings = {"head_dim": 8, "value_head_dim": 12, "layer_types": ["hybrid", "linear_attention"]}
    return HAMForCausalLM(tiny_config(**(settings | overrides))).eval().to(device)


def prompted(model, ids, **options):
    """A cache that has seen the prompt, the first row padded on the left if there are several."""
    cache = HAMCache(model.config)
    mask = torch.ones_like(ids[:, :PROMPT])
    if len(ids) > 1:
        mask[0, :5] = 0
    with torch.no_grad():
        model(ids[:, :PROMPT], attention_mask=mask, cache=cache, **options)
    return cache


def stored(cache):
    """All numbers of a cache, by name, with the kept tokens in order."""
    found = {}
    for i, layer in enumerate(cache.layers):
        found |= {f"{i}.{name}": x for name, x in layer.state_dict().items()}
        found[f"{i}.seen_tokens"] = torch.tensor(layer.seen_tokens)
    return found


def assert_same_caches(found, expected):
    found, expected = stored(found), stored(expected)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if x.is_floating_point():
            assert found[name].shape == x.shape, name
            # Scores of sinks are infinite.
            torch.testing.assert_close(found[name], x, atol=2e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(found[name], x), name


# --- a step without the host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "cosine"},
        {"router": "learned_error"},
        {"router": "random"},
        {"attention_window": 5, "attention_sinks": 2},
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_host(settings, tiny_config, on_kernels, device):
    model = make_model(tiny_config, device, **settings)
    ids = torch.randint(1, 97, (2, PROMPT + 3), device=device)
    cache = prompted(model, ids)
    embedded = model.get_input_embeddings()(ids)  # on a CPU the model reads the ids, to refuse those out of range
    kept = cache.kept_tokens()
    cache.reserve()
    with torch.no_grad(), WithoutHost():
        for t in range(PROMPT, PROMPT + 3):
            model(inputs_embeds=embedded[:, t : t + 1], cache=cache)
    assert on_kernels.count("decode_mix_append") == 2 * 3
    assert cache.get_seq_length() == PROMPT + 3
    assert (cache.kept_tokens() >= kept).all()


def test_nor_does_a_step_that_uses_up_the_room(tiny_config, on_kernels, device, monkeypatch):
    model = make_model(tiny_config, device, layer_types=["hybrid", "hybrid"])
    cache = prompted(model, torch.randint(1, 97, (1, PROMPT), device=device))
    cache.reserve()
    for layer in cache.layers:
        layer.store.reserved_steps = 1
    monkeypatch.setattr(paged_store_ham.PagedStore, "shortage", lambda *arguments: pytest.fail("the host looked"))
    step = {"inputs_embeds": torch.randn(1, 1, 32, device=device), "cache": cache}
    with torch.no_grad():
        model(**step)
        with pytest.raises(pytest.fail.Exception, match="the host looked"):
            model(**step)


@pytest.mark.parametrize("op", ["nonzero", "_local_scalar_dense"])
def test_the_step_of_the_host_does(op, tiny_config, on_kernels, device, monkeypatch):
    """The check of the test above fails where the host appends."""
    model = make_model(tiny_config, device)
    ids = torch.randint(1, 97, (2, PROMPT + 1), device=device)
    cache = prompted(model, ids, threshold=0.0)
    embedded = model.get_input_embeddings()(ids)
    monkeypatch.setitem(globals(), "NEED_THE_HOST", (op,))
    with torch.no_grad(), WithoutHost(), pytest.raises(AssertionError, match=f"{op} needs the host"):
        model(inputs_embeds=embedded[:, PROMPT:], cache=cache, kv_budget=200)


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x[x > 1],
        lambda x: x.__setitem__(x > 1, 0),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: int(x[1]),
        lambda x: bool(x[1]),
        lambda x: torch.repeat_interleave(x),
        lambda x: torch.equal(x, x),
    ],
    ids=["mask", "mask assigned", "cpu", "tolist", "int", "bool", "repeat_interleave", "equal"],
)
def test_ways_to_the_host_are_noticed(way):
    x = torch.arange(3)
    with WithoutHost(), pytest.raises(AssertionError, match="needs the host"):
        way(x)


def test_between_growths_the_host_looks_seldom_and_launches_are_the_same(tiny_config, on_kernels, device, monkeypatch):
    model = make_model(tiny_config, device, num_hidden_layers=1, layer_types=["hybrid"])
    cache, prompt, steps = HAMCache(model.config), 31, 18
    with torch.no_grad():
        model(torch.randint(1, 97, (1, prompt), device=device), cache=cache, threshold=0.0)
    embedded = torch.randn(1, 1, 32, device=device)
    store, looked, capacities, sizes = cache.layers[0].store, [], [], []
    plain = attention.split_sizes
    monkeypatch.setattr(attention, "split_sizes", lambda *numbers: sizes.append(numbers) or plain(*numbers))
    for step in range(steps):
        if not store.reserved_steps:
            looked.append(step)
        with torch.no_grad():
            model(inputs_embeds=embedded, cache=cache, threshold=0.0)
        capacities.append((store.capacity, store.num_streams))
    # Both heads keep everything and have 15 tokens in their open pages; two of the slab's four pages are free: a step
    # to the end of the open pages and 15 more.
    assert looked == [0, 16]
    assert [numbers[:2] for numbers in sizes] == capacities
    assert sizes[15] == sizes[0], "pages became full, and the launches' sizes must not tell"
    assert cache.kept_tokens().tolist() == [[[prompt + steps] * 2]]


def test_an_offloaded_layer_s_pages_are_left_to_the_host(tiny_config, on_kernels, device):
    model = make_model(tiny_config, device)
    ids = torch.randint(1, 97, (1, PROMPT + 2), device=device)
    caches = [HAMCache(model.config, offloading=offloading) for offloading in (True, False)]
    with torch.no_grad():
        found, wanted = (
            [model(x, cache=cache).logits for x in (ids[:, :PROMPT], ids[:, -2:-1], ids[:, -1:])] for cache in caches
        )
    assert on_kernels.count("decode_update") == 2 * 2 * 2
    assert on_kernels.count("decode_mix_append") == 2 * 2
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    caches[1].layers[0].offload()
    caches[1].layers[1].offload()
    assert_same_caches(*caches)


# --- what the device appended is there for the host ------------------------------------------------------------------


def refused_crop(cache):
    with pytest.raises(ValueError, match="reaches past the 0 tokens recorded"):
        cache.crop(-1)


# Done to a cache of three rows by the host.
CHANGES = {
    "nothing": lambda cache: None,
    "prune": lambda cache: cache.prune(0.5),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1], device=cache.layers[0].real_tokens.device)),
    "crop": refused_crop,
}


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 5])
def test_everything_that_the_host_does_goes_on_from_what_the_device_did(
    window, tiny_config, on_kernels, device, choose_kernels, small_pages, tmp_path
):
    """Rows at thresholds of their own, one padded, over seals and growth; then pruning, reordering, files, turns."""
    steps = 13 + window  # tokens move to pages when they come of age
    model = make_model(tiny_config, device, attention_window=window)
    ids = torch.randint(1, 97, (3, PROMPT + steps + 6), device=device)
    threshold = torch.tensor([0.45, 0.0, 2.0], device=device)

    def run():
        cache = prompted(model, ids, threshold=threshold)
        slabs = len(cache.layers[0].store.slabs)
        logits = []
        with torch.no_grad():
            for t in range(PROMPT, PROMPT + steps):
                logits.append(model(ids[:, t : t + 1], cache=cache, threshold=threshold).logits)
        assert len(cache.layers[0].store.slabs) > slabs
        return torch.cat(logits, 1), cache

    def go_on(cache):
        end = PROMPT + steps
        with torch.no_grad():
            return [
                model(ids[:, begin:stop], cache=cache, threshold=threshold).logits
                for begin, stop in ((end, end + 4), (end + 4, end + 5), (end + 5, end + 6))
            ]

    logits, cache = run()
    assert on_kernels.count("decode_mix_append") == 2 * steps
    choose_kernels(lambda op, *tensors: None)
    expected, wanted = run()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    some, everything, nothing = cache.kept_tokens()[0]
    assert (some > 0).all()
    assert (everything == PROMPT + steps).all()
    assert (nothing == 0).all()
    assert_same_caches(cache, wanted)

    def on_kernels_again():
        choose_kernels(lambda op, *x: getattr(ham_kernels, op) if op in OPS else None)

    for name, change in CHANGES.items():
        found, other = copy.deepcopy(cache), copy.deepcopy(wanted)
        change(found)
        change(other)
        assert_same_caches(found, other)
        on_kernels_again()
        after = go_on(found)
        choose_kernels(lambda op, *tensors: None)
        for x, y in zip(after, go_on(other), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert_same_caches(found, other)
    cache.save(tmp_path / "cache.safetensors")
    assert_same_caches(HAMCache.load(tmp_path / "cache.safetensors", model.config, device), wanted)


# --- the captured step -----------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch, device):
    """Graphs without a GPU: a capture restores the device's tensors, a replay the host's counters."""
    caches, captures = [], []

    class Graph:
        def replay(self):
            before = [(layer.seen_tokens, layer.store and layer.store.reserved_steps) for layer in caches[-1].layers]
            logits = self.step._step()
            for layer, (seen, steps) in zip(caches[-1].layers, before, strict=True):
                layer.seen_tokens = seen
                if layer.store is not None:
                    layer.store.reserved_steps = steps
            self.step._recording.logits.copy_(logits)

    class Capture:
        def __init__(self, graph, capture_error_mode):
            assert capture_error_mode == "thread_local", "other threads may allocate"
            self.graph = graph

        def __enter__(self):
            captures.append(self.graph)
            self.tensors = [(x, x.clone()) for layer in caches[-1].layers for x in layer.tensors()]

        def __exit__(self, *error):
            for x, before in self.tensors:
                x.copy_(before)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(cuda_graph_ham, "DEVICE", device)

    def make(model, cache, *arguments, **options):
        caches.append(cache)
        Graph.step = CapturedStep(model, cache, *arguments, **options)
        return Graph.step

    return make, captures


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def generated(tiny_config, on_kernels, graphs, small_pages, device, monkeypatch):
    """A function: what `generate` makes, as the model's own steps do, and how many captures and replays it took."""
    make, captures = graphs
    monkeypatch.setattr(cuda_graph_ham, "CapturedStep", make)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    model = make_model(tiny_config, device)
    calibrate(model, [torch.randint(1, 97, (2, 40), device=device)])
    ids = torch.randint(1, 97, (2, PROMPT), generator=torch.Generator().manual_seed(3)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def run(rows=2, change=None, new_tokens=7, **options):
        if change is not None:
            change(model)
        found = []
        for disable in (False, True):
            torch.manual_seed(0)
            settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0} | options
            # 97 is no token, so that no row ends unless the options say so.
            settings = {"eos_token_id": 97} | settings
            text = model.generate(ids[:rows], attention_mask=mask[:rows], disable_compile=disable, **settings)
            found.append((text, len(captures), len(replays)))
            captures.clear()
            replays.clear()
        (text, captured, replayed), (wanted, *nothing) = found
        assert nothing == [0, 0]
        assert torch.equal(text, wanted)
        return text, captured, replayed

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": torch.tensor([0.45, 0.0])},
        {"kv_usage": 0.5, "do_sample": True, "top_k": 20},
        {"rows": 1},
    ],
    ids=["a threshold a row", "sampling at a usage", "learned thresholds"],
)
def test_generate_replays_steps(options, generated):
    text, captured, replayed = generated(**options)
    assert text.shape[1] == PROMPT + 7
    # The prompt, a step of the model's own, and one that rehearses; after growth one rehearses, too.
    assert 1 <= captured <= 2
    assert 3 <= replayed <= 4


@pytest.mark.slow
def test_generate_captures_again_when_the_cache_has_grown(generated):
    _, captured, replayed = generated(threshold=0.0, new_tokens=40)
    assert 2 <= captured <= 6
    assert replayed >= 25


def test_rows_that_have_ended_are_left_to_the_model(generated):
    text, _, _ = generated(threshold=0.0)
    last = text[0, PROMPT + 3].item()
    text, _, replayed = generated(threshold=0.0, eos_token_id=last)
    assert (text[0, PROMPT + 4 :] == 0).all()
    assert replayed <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"kv_budget": 9},
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "offloaded"},
        {"change": lambda model: model.lm_head.register_forward_hook(lambda *_: None)},
        {"change": lambda model: setattr(model.lm_head, "forward", model.lm_head.forward)},
        {"change": lambda model: setattr(model, "hf_quantizer", object())},
        {"prefill_chunk_size": 16},
        {"change": lambda model: setattr(model.config, "output_hidden_states", True)},
        {"rows": 1, "prompt_lookup_num_tokens": 2},
        {"rows": 1, "position_ids": 2 * torch.arange(PROMPT)[None]},
    ],
    ids=[
        "budget",
        "beams",
        "no cache",
        "offloaded",
        "hook",
        "forward",
        "quantised",
        "chunks",
        "hidden states",
        "drafts",
        "positions",
    ],
)
def test_what_a_graph_does_not_cover_is_left_to_the_model(options, generated):
    assert generated(threshold=0.45, new_tokens=4, **options)[1:] == (0, 0)


# --- a step of the user's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [{}, {"attention_window": 5, "attention_sinks": 2}], ids=str)
@pytest.mark.slow
def test_replays_equal_the_model_s_own_steps(window, tiny_config, on_kernels, graphs, small_pages, device):
    make, captures = graphs
    model = make_model(tiny_config, device, **window)
    steps = 15
    ids = torch.randint(1, 97, (2, PROMPT + steps + 2), device=device)
    options = {"threshold": torch.tensor([0.45, 0.0], device=device)}
    cache, expected = (prompted(model, ids, **options) for _ in range(2))
    step, logits = make(model, cache, **options), []
    for t in range(PROMPT, PROMPT + steps):
        logits.append(step(ids[:, t]).clone())
    with torch.no_grad():
        wanted = [
            model(ids[:, t : t + 1], cache=expected, **options).logits[:, 0] for t in range(PROMPT, PROMPT + steps)
        ]
    torch.testing.assert_close(torch.stack(logits), torch.stack(wanted), atol=1e-5, rtol=0)
    assert_same_caches(cache, expected)
    assert cache.get_seq_length() == PROMPT + steps
    assert 2 <= len(captures) <= 4, "captured again when the cache has grown, and replayed in between"

    cache.prune(0.5)  # the store is another one now
    expected.prune(0.5)
    before = len(captures)
    found = [step(ids[:, t]).clone() for t in (-2, -1)]
    with torch.no_grad():
        wanted = [model(ids[:, t, None], cache=expected, **options).logits[:, 0] for t in (-2, -1)]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-5, rtol=0)
    assert len(captures) == before + 1


@pytest.mark.slow
def test_a_step_made_in_inference_mode_goes_on_outside(tiny_config, on_kernels, graphs, device):
    make, captures = graphs
    model = make_model(tiny_config, device)
    ids = torch.randint(1, 97, (2, PROMPT + 3), device=device)
    cache, expected = (prompted(model, ids) for _ in range(2))
    with torch.inference_mode():
        step = make(model, cache)
    found = torch.stack([step(ids[:, t]).clone() for t in range(PROMPT, PROMPT + 3)], 1)
    assert len(captures) == 1
    with torch.no_grad():
        wanted = [model(ids[:, t : t + 1], cache=expected).logits for t in range(PROMPT, PROMPT + 3)]
    torch.testing.assert_close(found, torch.cat(wanted, 1), atol=1e-5, rtol=0)


def test_what_cannot_be_captured_is_refused(tiny_config, on_kernels, graphs, monkeypatch, choose_kernels, device):
    make, _ = graphs
    model = make_model(tiny_config, device)
    ids = torch.randint(1, 97, (2, PROMPT), device=device)
    cache = prompted(model, ids)

    def refused(message, model=model, cache=cache, error=ValueError, **options):
        with pytest.raises(error, match=message):
            CapturedStep(model, cache, **options)

    refused("`model` must be a HAMForCausalLM, got HAMModel", model=model.model, error=TypeError)
    refused("`model` must be in evaluation mode", model=make_model(tiny_config, device).train())
    full = make_model(tiny_config, device, layer_types=["hybrid", "full_attention"])
    refused("no 'full_attention' layers", model=full)
    refused("`qk_norm` per head or none", model=make_model(tiny_config, device, qk_norm="projection"))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused("constant frequencies, got 'dynamic'", model=make_model(tiny_config, device, rope_parameters=rope))
    refused("`cache` must be a HAMCache, got tuple", cache=(), error=TypeError)
    refused("`cache` must hold a prompt", cache=HAMCache(model.config))
    offloaded, recording = prompted(model, ids), prompted(model, ids)
    offloaded.offload_layers = True
    recording.activate_past_recording()
    refused("neither offloaded nor recording", cache=offloaded)
    refused("neither offloaded nor recording", cache=recording)
    refused("at most one of `threshold` and `kv_usage`", threshold=0.5, kv_usage=0.5)
    with monkeypatch.context() as patch:
        choose_kernels(lambda op, *tensors: None, patch)
        refused("`model` must run on the kernels")
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph_ham, "DEVICE", "cuda")
        refused("`model` must be on one CUDA device, got cpu", model=make_model(tiny_config, "cpu"))

    step = make(model, cache)
    with pytest.raises(ValueError, match=r"`tokens` must be \[2\] of torch.int64 on .*, got \[2, 1\]"):
        step(ids[:, :1])
    with pytest.raises(TypeError, match="`tokens` must be a tensor"):
        step([1, 2])
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="neither offloaded nor recording"):
        step(ids[:, 0])
    cache.batch_select_indices(torch.tensor([0], device=device))
    with pytest.raises(ValueError, match="`cache` must hold 2 rows as it did, got 1"):
        step(ids[:, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_the_model_s_own_steps(tiny_config):
    steps = 200
    model = make_model(tiny_config, "cuda", head_dim=16, value_head_dim=32)
    ids = torch.randint(1, 97, (2, PROMPT + steps), device="cuda")
    options = {"threshold": torch.tensor([0.0, 0.45], device="cuda")}
    cache, expected = (prompted(model, ids, **options) for _ in range(2))
    step, recordings = CapturedStep(model, cache, **options), []
    with torch.no_grad():
        for t in range(PROMPT, PROMPT + steps):
            found = step(ids[:, t])
            wanted = model(ids[:, t : t + 1], cache=expected, **options).logits[:, 0]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            if step._recording is not None and all(step._recording is not x for x in recordings):
                recordings.append(step._recording)
    assert 2 <= len(recordings) < steps // 4, "captured again when the cache has grown, and replayed in between"
    assert_same_caches(cache, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampling"])
def test_generate_makes_the_same_text_from_graphs(options, tiny_config):
    model = make_model(tiny_config, "cuda", head_dim=16, value_head_dim=32)
    ids = torch.randint(1, 97, (2, PROMPT), device="cuda")
    texts = []
    for disable in (False, True):
        torch.manual_seed(0)
        settings = {"max_new_tokens": 200, "eos_token_id": 97, "pad_token_id": 0, "threshold": 0.45} | options
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), disable_compile=disable, **settings))
    assert torch.equal(*texts)
