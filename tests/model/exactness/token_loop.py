# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""An independent implementation of the design: one token and one head at a time, in float64."""

import math

import torch

from ham_hf.configuration_ham import LEARNED_ROUTERS
from ham_hf.routing_ham import random_score


class TokenLoop:
    """The design's table of formulas, one token and one head at a time, in float64; only the hash is the package's."""

    def __init__(self, model, thresholds=None):
        self.config = model.config
        self.weights = {name: x.double() for name, x in model.state_dict().items()}
        self.thresholds = thresholds
        layers, kv_heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        self.time = 0
        self.inputs = [[] for _ in range(layers)]
        self.states = [[0.0] * max(kv_heads, self.config.linear_num_value_heads or 0) for _ in range(layers)]
        # Position, key and value, and whether it was kept, of every token.
        self.past = [[[] for _ in range(kv_heads)] for _ in range(layers)]
        self.kept_positions = [[[] for _ in range(kv_heads)] for _ in range(layers)]

    def norm(self, x, name):
        weight, eps = self.weights.get(f"{name}.weight"), self.config.rms_norm_eps
        if self.config.zero_centered_norms and not name.endswith(("rnn_norm", "kv_norm")):
            weight = None if weight is None else 1 + weight
        if name.endswith(("rnn_norm", "kv_norm")) and self.config.output_norm_eps is not None:
            eps = self.config.output_norm_eps
        return x if weight is None else weight * x / (x.square().mean() + eps).sqrt()

    def linear(self, x, name):
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def rotate(self, x):
        if self.config.rope_parameters is None:
            return x
        half = len(x) // 2
        turning = int(half * self.config.rope_parameters.get("partial_rotary_factor", 1.0))
        angle = torch.zeros(half).double()
        frequency = self.config.rope_parameters["rope_theta"] ** (-torch.arange(turning).double() / turning)
        angle[:turning] = self.time * frequency
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def shape(self, kind):
        """Numbers of queries, keys and values, and the sizes of a key and a value."""
        c = self.config
        if kind == "linear_attention" and c.linear_num_key_heads is not None:
            numbers = (c.linear_num_key_heads, c.linear_num_key_heads, c.linear_num_value_heads)
            return *numbers, c.linear_key_head_dim, c.linear_value_head_dim
        numbers = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        return *numbers, c.head_dim, c.value_head_dim

    def heads(self, x, kind):
        queries, keys, values, key_dim, value_dim = self.shape(kind)
        parts = x.split([key_dim] * (queries + keys) + [value_dim] * values)
        return parts[:queries], parts[queries : queries + keys], parts[queries + keys :]

    def normed(self, heads, name):
        """Queries or keys through the norm of each, or of all together."""
        if self.config.qk_norm == "projection":
            return self.norm(torch.cat(heads), name).split(len(heads[0]))
        return [self.norm(head, name) for head in heads]

    def score(self, name, layer, h, x, v, prediction, beta):
        router, error = self.config.router, v - prediction
        if router == "random":
            return random_score(torch.tensor([[self.time]]), layer, self.config.num_key_value_heads)[0, 0, h].double()
        if router == "recency":
            return torch.tensor(self.time / 2**24)
        # A prediction of which decay has left next to nothing has no direction.
        cosine = (1 - v @ prediction / (v.norm() * prediction.norm()).clamp(min=1e-8)) / 2
        if router == "cosine":
            return cosine
        if router == "l2":
            return error.norm() ** 2 / (v.norm() + prediction.norm()) ** 2
        if router == "residual":
            r = beta * error.norm() / v.norm()
            return r / (1 + r)
        up = self.linear(x, f"{name}.router.up_proj")
        logit = self.linear(up * up.sigmoid(), f"{name}.router.down_proj")[h]
        if router == "learned_error":
            logit = logit + self.weights[f"{name}.router.error_weight"][h] * cosine
        return logit.sigmoid()

    def take_in(self, layer, h, own, score):
        """Keys and values that a token with its `own` sees; it joins them for those to come."""
        c, past, hybrid = self.config, self.past[layer][h], self.config.layer_types[layer] == "hybrid"
        window = c.attention_window if hybrid else 0
        visible = [x for time, x, kept in past if kept or self.time - time < window] + [own]
        kept = not hybrid or score >= self.thresholds[layer][h] or self.time < c.attention_sinks
        past.append((self.time, own, kept))
        if kept:
            self.kept_positions[layer][h].append(self.time)
        return visible

    def mixer(self, layer, x):
        c, name, kind = self.config, f"model.layers.{layer}.mixer", self.config.layer_types[layer]
        raw = torch.cat([self.linear(x, f"{name}.{part}_proj") for part in "qkv"])
        convolved = raw
        if kind != "full_attention" or c.attention_conv:
            self.inputs[layer].append(raw)
            weight = self.weights[f"{name}.conv.weight"]
            window = self.inputs[layer][::-1][: weight.shape[1]]
            total = sum(weight[:, -1 - age] * past for age, past in enumerate(window))
            convolved = total * total.sigmoid()
        q, k, v = self.heads(convolved, kind)
        q_kv, k_kv, v_kv = self.heads(convolved if c.attention_conv else raw, kind)
        if kind != "linear_attention":
            q_kv, k_kv = self.normed(q_kv, f"{name}.q_norm"), self.normed(k_kv, f"{name}.k_norm")
        outs = max(len(q), len(v))
        outputs = []
        for h in range(len(v)):
            score = 1.0
            if kind != "full_attention":
                key = k[h * len(k) // len(v)]
                key = key / (key.square().sum() + 1e-6).sqrt()
                beta = self.linear(x, f"{name}.b_proj")[h].sigmoid() * (2 if c.allow_neg_eigval else 1)
                step = torch.log1p(torch.exp(self.linear(x, f"{name}.a_proj")[h] + self.weights[f"{name}.dt_bias"][h]))
                alpha = torch.exp(-torch.exp(self.weights[f"{name}.A_log"][h]) * step)
                state = self.states[layer][h] + torch.zeros(len(key), len(v[h])).double()
                prediction = alpha * (state.T @ key)
                self.states[layer][h] = alpha * state + beta * torch.outer(key, v[h] - prediction)
                if kind == "hybrid":
                    score = self.score(name, layer, h, x, v[h], prediction, beta)
            if kind != "linear_attention":
                value = v_kv[h] * score if kind == "hybrid" and c.router in LEARNED_ROUTERS else v_kv[h]
                visible = self.take_in(layer, h, (self.rotate(k_kv[h]), value), score)
            for head in range(h * outs // len(v), (h + 1) * outs // len(v)):
                o_rnn = o_kv = None
                if kind != "full_attention":
                    query = q[head * len(q) // outs]
                    query = query / (query.square().sum() + 1e-6).sqrt()
                    o_rnn = self.norm(self.states[layer][h].T @ query / math.sqrt(len(query)), f"{name}.rnn_norm")
                if kind != "linear_attention":
                    query = self.rotate(q_kv[head])
                    logits = torch.stack([query @ key for key, _ in visible]) / math.sqrt(c.head_dim)
                    o_kv = sum(w * value for w, (_, value) in zip(logits.softmax(0), visible, strict=True))
                    o_kv = self.norm(o_kv, f"{name}.kv_norm")
                if kind == "hybrid":
                    g_rnn = self.linear(x, f"{name}.rnn_gate_proj")[head].sigmoid()
                    g_kv = self.linear(x, f"{name}.kv_gate_proj")[head].sigmoid()
                    outputs.append(g_rnn * o_rnn + g_kv * o_kv)
                else:
                    outputs.append(o_kv if o_rnn is None else o_rnn)
        y = torch.cat(outputs)
        gate = c.output_gate
        if kind == "linear_attention" and c.linear_output_gate is not None:
            gate = c.linear_output_gate
        if gate:
            z = self.linear(x, f"{name}.z_proj")
            y = y * z.sigmoid() * (1 if gate == "sigmoid" else z)
        return self.linear(y, f"{name}.o_proj")

    def mlp(self, x, name):
        gate = self.linear(x, f"{name}.mlp.gate_proj")
        return self.linear(gate * gate.sigmoid() * self.linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def step(self, token):
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            if self.config.attention_post_norm and self.config.layer_types[layer] != "linear_attention":
                x = x + self.norm(self.mixer(layer, x), f"{name}.post_attention_layernorm")
                x = x + self.norm(self.mlp(x, name), f"{name}.post_feedforward_layernorm")
                continue
            x = x + self.mixer(layer, self.norm(x, f"{name}.input_layernorm"))
            x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), name)
        self.time += 1
        return self.weights["lm_head.weight"] @ self.norm(x, "model.norm")

    def run(self, tokens):
        with torch.no_grad():
            return torch.stack([self.step(token) for token in tokens])
