"""What is Ling? Ant Group's Mixture-of-Experts language models, both generations, in one file read top to bottom.

A Ling model is a pre-norm decoder like Llama in which most MLPs are replaced by a layer of many small experts, of which each
token uses a few. A 16-billion-parameter Ling-mini-2.0 spends 1.4 billion on a token.

            tokens (B,S)
               |  word_embeddings
               v
    x (B,S,D) -+-> RMSNorm -> Attention: fused QKV, [QK-norm], RoPE, grouped-query, causal ---+-> x
               |______________________________________________________________________________|
    x (B,S,D) -+-> RMSNorm -> router: scores (T,E) -> k experts and their weights (T,k) each token
               |                 -> sum_j w_j expert_j(x), each a SwiGLU of width F   (E of them, k run)
               |              +  shared expert(s): a SwiGLU every token passes through
               |______________________________________________________________________________+-> x
      x L blocks (the first `first_k_dense_replace` have a plain SwiGLU of width intermediate_size)
               v
            RMSNorm -> [NormHead] lm_head -> logits (B,S,V)        MTP: one more block predicts the token after next

What differs from a Llama-style dense model:
  - The router, and what keeps the load of its experts even: an auxiliary loss (Ling 1), or a bias on the choice (Ling 2).
  - Shared experts besides the routed ones. Nothing is ever dropped: an expert takes any number of tokens, none included.
  - Ling 1 normalises the columns of the output matrix (NormHead). Ling 2 normalises each query and key head, rotates only
    half of each head's dims, and can predict several tokens ahead (MTP).

                        Ling 1 (lite, plus)                           Ling 2 (mini, flash, 1T)
    score_function      softmax over all experts                      sigmoid per expert
    choice              top-k                                         top-k of score + expert_bias, among the best groups
    weights             chosen scores [over their sum]                chosen scores over their sum, times routed_scaling_factor
    even load           balance loss, routing warm-up                 expert_bias moved by the sign of each expert's error
    small logits        z-loss 1e-4                                   z-loss 3.5e-6
    norm_head           yes                                           no
    use_qk_norm         no                                            yes
    rotary width        all of head_dim                               the first half of it
    next tokens         1                                             1 + num_nextn_predict_layers

References, quoted beside the line that implements them:
  [Ling1] Every FLOP Counts, arXiv 2503.05139       [Ling2] Every Activation Boosted, arXiv 2510.22115
  [DSv3] DeepSeek-V3, arXiv 2412.19437              [LossFree] Auxiliary-loss-free balancing, arXiv 2408.15664
  [Switch] Switch Transformers, arXiv 2101.03961    [STMoE] ST-MoE, arXiv 2202.08906
  [RoPE] arXiv 2104.09864    [YaRN] arXiv 2309.00071    [GQA] arXiv 2305.13245

Shapes: B batch, S sequence, T = B*S tokens, D hidden_size, V vocabulary, L blocks, E experts, k experts per token, F expert
width, H query heads, KV key/value heads, d head_dim, r rotary width. A linear map stores (out, in), as in the releases.
Tensors are named as in the released files, but for what `released_table` (section 8) lists: experts are stacked, E matrices in one
tensor; a SwiGLU's gate and up are one matrix; MTP blocks have a list of their own.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernels import attention, autocast, experts, linear, linear_cross_entropy, norm_head_scale, rms_norm, rope, route, swiglu


class BadInput(ValueError):
    """Something the user gave cannot work. The message names the value, the limit and the remedy in one line."""


def require(ok, message):
    if not ok:
        raise BadInput(message)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration: the fields of a released config.json

def option(default, help, **kwargs):
    """A field whose help text stands beside its default; train.py makes its flags from these."""
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class LingConfig:
    """Field names are the released JSON keys. The last block shapes training only and is in no released file."""
    vocab_size: int = option(2048, "V, rows of the embedding")
    hidden_size: int = option(192, "D, width of the residual stream")
    num_hidden_layers: int = option(4, "L, blocks")
    num_attention_heads: int = option(6, "H, query heads")
    num_key_value_heads: int = option(2, "KV, key/value heads, each shared by H/KV query heads")
    head_dim: int = option(None, "d; absent or 0: hidden_size / heads. heads * head_dim need not equal hidden_size")
    intermediate_size: int = option(512, "width of the MLP in dense layers")
    first_k_dense_replace: int = option(0, "the first so many layers are dense")
    # experts
    num_experts: int = option(16, "E, routed experts per MoE layer")
    num_experts_per_tok: int = option(2, "k, routed experts each token uses")
    moe_intermediate_size: int = option(128, "F, width of one expert")
    num_shared_experts: int = option(1, "experts every token uses; together one MLP of so many times F")
    score_function: str = option("sigmoid", "router score", choices=("softmax", "sigmoid"))
    norm_topk_prob: bool = option(True, "divide the chosen scores by their sum")
    routed_scaling_factor: float = option(1.0, "multiplies the routed weights, not the shared experts")
    n_group: int = option(1, "groups the experts are split into")
    topk_group: int = option(1, "groups a token may choose experts from")
    moe_router_enable_expert_bias: bool = option(True, "keep the load even by moving a bias (sigmoid router only)")
    # attention, norms, head
    use_qk_norm: bool = option(True, "RMSNorm on each query and key head, before the rotation")
    partial_rotary_factor: float = option(0.5, "part of each head that is rotated")
    rotary_dim: int = option(None, "r, dims rotated; overrides partial_rotary_factor")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    rope_scaling: dict = option(None, "JSON, e.g. {\"type\": \"yarn\", \"factor\": 4}", type=json.loads)
    max_position_embeddings: int = option(4096, "longest sequence the model is meant for")
    rms_norm_eps: float = option(1e-6, "epsilon of every RMSNorm")
    use_bias: bool = option(False, "bias on the attention output projection")
    use_qkv_bias: bool = option(False, "bias on the QKV projection")
    tie_word_embeddings: bool = option(False, "lm_head shares the embedding matrix")
    norm_head: bool = option(False, "NormHead: columns of lm_head divided by their norms")
    initializer_range: float = option(0.006, "std of the initial weights")
    pad_token_id: int = option(None, "kept for other engines; loss and load go by the targets alone")
    eos_token_id: int = option(None, "end of text")
    # multi-token prediction
    num_nextn_predict_layers: int = option(0, "MTP blocks, each predicting one token further; give mtp_loss_scaling_factor too")
    mtp_loss_scaling_factor: float = option(0.0, "weight of the MTP loss")
    # training only
    router_aux_loss_coef: float = option(0.0, "weight of the balance loss; Ling 1: 0.015")
    router_z_loss_coef: float = option(0.0, "weight of the router z-loss; Ling 1: 1e-4, Ling 2: 3.5e-6")
    router_warmup_steps: int = option(0, "W, steps of stochastic routing warm-up")
    expert_bias_update_rate: float = option(1e-3, "u, step of the expert bias")

    def __post_init__(self):
        self.head_dim, self.rotary_dim = self.head_dim or None, self.rotary_dim or None          # some releases say 0
        may_be_zero = ("first_k_dense_replace", "num_shared_experts", "num_nextn_predict_layers", "router_warmup_steps")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            least = int(f.type is int and f.name not in may_be_zero and not f.name.endswith("_id"))
            if f.type is bool:
                require(isinstance(value, bool), f"{f.name}={value!r} must be true or false")
            elif f.type in (int, float) and not (value is None and f.default is None):
                require(isinstance(value, (int, f.type)) and not isinstance(value, bool),
                        f"{f.name}={value!r} must be a number ({f.type.__name__})")
                require(least <= value < math.inf, f"{f.name}={value} must be at least {least} and finite")
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        H, KV, E, k, G, r = (self.num_attention_heads, self.num_key_value_heads, self.num_experts, self.num_experts_per_tok, self.n_group,
                             self.rotary_width)
        require(H % KV == 0, f"num_attention_heads={H} is not a multiple of num_key_value_heads={KV}; choose a divisor of {H}")
        require(k <= E, f"num_experts_per_tok={k} exceeds num_experts={E}; lower it to {E} or less")
        require(E % G == 0, f"num_experts={E} does not divide into n_group={G} equal groups; choose a divisor of {E}")
        require(self.topk_group <= G, f"topk_group={self.topk_group} exceeds n_group={G}; lower it to {G} or less")
        require(self.topk_group * (E // G) >= k, f"topk_group={self.topk_group} groups of {E // G} experts hold fewer than "
                f"num_experts_per_tok={k}; raise topk_group to {-(-k * G // E)} or more")
        require(self.score_function in ("softmax", "sigmoid"), f"score_function={self.score_function!r} is neither softmax nor sigmoid")
        require(self.first_k_dense_replace <= self.num_hidden_layers,
                f"first_k_dense_replace={self.first_k_dense_replace} exceeds num_hidden_layers={self.num_hidden_layers}")
        require(0 < r <= self.head_dim,
                f"rotary width {r} is outside 1..head_dim={self.head_dim}; set partial_rotary_factor in (0, 1] or rotary_dim")
        if self.rotary_dim:                                      # Ling-1T's file has only this; other engines look for the factor first
            factor = r / self.head_dim
            self.partial_rotary_factor = factor if int(self.head_dim * factor) == r else math.nextafter(factor, 1)
        require(r % 2 == 0,
                f"rotary width {r} (of head_dim={self.head_dim}) is odd, but dims rotate in pairs; set rotary_dim to an even number")
        require(self.rope_theta > 1 and self.rms_norm_eps > 0,
                f"rope_theta={self.rope_theta} must be above 1, rms_norm_eps={self.rms_norm_eps} above 0")
        if self.rope_scaling is not None:
            require(isinstance(self.rope_scaling, dict), f"rope_scaling={self.rope_scaling!r} must be a JSON object or null")
            kind = rope_type(self)
            require(kind in ("default", "linear", "yarn"), f"rope_scaling type {kind!r} is not supported; use linear, yarn or null")
            for key, least in dict(factor=1, original_max_position_embeddings=1, beta_fast=0, beta_slow=0, mscale=0, mscale_all_dim=0,
                                   attention_factor=0).items():
                value = self.rope_scaling.get(key)
                absent = value is None and (key != "factor" or kind == "default")
                require(absent or type(value) in (int, float) and least <= value < math.inf,
                        f"rope_scaling {key} {value!r} must be a finite number of at least {least}")

    @property
    def rotary_width(self):
        return self.rotary_dim or int(self.head_dim * self.partial_rotary_factor)

    @property
    def is_ling1(self):
        return self.score_function == "softmax"

    @classmethod
    def from_dict(cls, d):
        """A released config.json. Raises BadInput on a value the model cannot honour; warns of keys it does not know."""
        require(isinstance(d, dict), "config.json must hold a JSON object")
        d = dict(d)
        for old, new in (("n_routed_experts", "num_experts"), ("n_shared_experts", "num_shared_experts")):    # Ling-plus-base
            if old in d:
                d.setdefault(new, d.pop(old))
        missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts",
                                   "num_experts_per_tok", "moe_intermediate_size") if d.get(key) is None]
        require(not missing, f"config.json has no {', '.join(missing)}: not the configuration of a Ling model")
        quantized = d["quantization_config"] if isinstance(d.get("quantization_config"), dict) else {}
        for key, want in (("hidden_act", "silu"), ("norm_softmax", False), ("use_rmsnorm", True), ("quant_method", "fp8"),
                          ("weight_block_size", [BLOCK, BLOCK]), ("moe_shared_expert_intermediate_size", d["moe_intermediate_size"])):
            require((found := quantized.get(key, d.get(key))) in (None, want),
                    f"{key}={found!r} in config.json: only {want!r}, as in Ling's releases, is implemented; use an unmodified release")
        # model_type is bailing_moe in both generations, so `architectures` decides. "Ling" is a mix only this repository runs: each
        # field is taken at its word, as also where there is no architecture but a score_function, which Ling 1 does not know.
        architecture = (d.get("architectures") or ["Ling" if "score_function" in d else LING1])[0]
        if architecture == LING1:       # what the official Ling-1 code does whatever the file says
            d |= dict(score_function="softmax", use_qk_norm=False, partial_rotary_factor=1.0, rotary_dim=None, n_group=1, topk_group=1,
                      routed_scaling_factor=1.0, num_nextn_predict_layers=0, moe_router_enable_expert_bias=False)
            d.setdefault("rms_norm_eps", 1e-5)                   # the official class's, where the key is absent
        elif architecture == LING2:     # the official gate ignores score_function and norm_topk_prob: always sigmoid, always normalised
            d |= dict(score_function="sigmoid", norm_topk_prob=True, norm_head=False)
            # Where a key is absent, the official class's own; a file may bring rotary_dim instead of the factor (Ling-1T).
            d = dict(partial_rotary_factor=1.0, rope_theta=600000.0, max_position_embeddings=32768) | d
        elif architecture != "Ling":
            raise BadInput(f"architecture {architecture!r} is neither Ling 1 ({LING1}) nor Ling 2 ({LING2})")
        d["num_key_value_heads"] = d.get("num_key_value_heads") or d["num_attention_heads"]
        d["num_shared_experts"] = d.get("num_shared_experts") or 0                           # absent or null: none
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(d.keys() - names - IGNORED):
            warnings.warn(f"config.json: ignored unknown keys {', '.join(unknown)}", stacklevel=2)
        return cls(**{key: value for key, value in d.items() if key in names and value is not None})

    def to_dict(self):
        """What other engines read, provided the fields are those of one generation and not a mix."""
        d = {"architectures": [LING1 if self.is_ling1 else LING2], "model_type": "bailing_moe", "hidden_act": "silu",
             "moe_shared_expert_intermediate_size": self.moe_intermediate_size, **dataclasses.asdict(self)}
        return d if LingConfig.from_dict(d) == self else d | {"architectures": ["Ling"]}


LING1, LING2 = "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"        # the official class names
IGNORED = set("""architectures model_type moe_shared_expert_intermediate_size auto_map hidden_act torch_dtype dtype transformers_version
    use_cache norm_softmax use_rmsnorm attention_dropout embedding_dropout output_dropout hidden_dropout pretraining_tp
    output_router_logits output_attentions router_dtype output_hidden_states max_window_layers use_sliding_window sliding_window
    bos_token_id return_dict router_type _name_or_path attn_implementation quantization_config""".split())

_LING1 = dict(score_function="softmax", use_qk_norm=False, partial_rotary_factor=1.0, norm_head=True, router_aux_loss_coef=0.015,
              router_z_loss_coef=1e-4, router_warmup_steps=2000, moe_router_enable_expert_bias=False)
_LING1_RELEASE = dict(_LING1, vocab_size=126464, rope_theta=600000.0, max_position_embeddings=16384, num_experts=64,
                      pad_token_id=126081, eos_token_id=126081)
_LING2 = dict(score_function="sigmoid", use_qk_norm=True, n_group=8, topk_group=4, routed_scaling_factor=2.5, router_z_loss_coef=3.5e-6)
_LING2_RELEASE = dict(_LING2, vocab_size=157184, rope_theta=600000.0, max_position_embeddings=32768, num_experts=256,
                      num_experts_per_tok=8, head_dim=128, num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.1,
                      pad_token_id=156892, eos_token_id=156892)
_TOY = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3, num_experts=12, num_experts_per_tok=2,
            moe_intermediate_size=96, num_shared_experts=1, initializer_range=0.02)
PRESETS = {
    # for two CPU cores and five minutes; the vocabulary is the tokenizer's. With three heads of 32 and a tied embedding each of three seeds
    # learned to copy from its context within 900 steps; with two heads of 64 and an lm_head of its own it was up to the seed.
    # u is large: at 0.002 the last layer sent nearly all tokens to the same two experts for 150 steps, three times as long (128 wide).
    "toy": _LING2 | _TOY | dict(n_group=1, topk_group=1, routed_scaling_factor=1.0, expert_bias_update_rate=0.01, tie_word_embeddings=True),
    "toy-lite": _LING1 | _TOY | dict(router_warmup_steps=75, router_aux_loss_coef=0.03),       # a short run needs a firmer hand
    # for one GPU and an evening
    "small": dict(_LING2, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1536,
                  first_k_dense_replace=1, num_experts=64, num_experts_per_tok=6, moe_intermediate_size=192, initializer_range=0.02,
                  num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.1),
    # the releases
    "ling-lite": dict(_LING1_RELEASE, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=4,
                      num_experts_per_tok=6, num_shared_experts=2, moe_intermediate_size=1408, intermediate_size=5632),
    "ling-plus": dict(_LING1_RELEASE, hidden_size=5376, num_hidden_layers=88, num_attention_heads=56, num_key_value_heads=8,
                      head_dim=128, num_experts_per_tok=4, moe_intermediate_size=3072, intermediate_size=12288),
    "ling-mini-2.0": dict(_LING2_RELEASE, hidden_size=2048, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=4,
                          moe_intermediate_size=512, intermediate_size=5120, first_k_dense_replace=1),
    "ling-flash-2.0": dict(_LING2_RELEASE, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=4,
                           moe_intermediate_size=1024, intermediate_size=9216, first_k_dense_replace=1),
    "ling-1t": dict(_LING2_RELEASE, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                    moe_intermediate_size=2048, intermediate_size=18432, first_k_dense_replace=4, rotary_dim=64),
}


# ----------------------------------------------------------------------------------------------------------------------
# 2. RMSNorm and rotary positions

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rope_type(config):
    scaling = config.rope_scaling or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def rope_frequencies(config):
    """The r/2 rotary frequencies (fp32) and the factor on cos and sin. [RoPE] 3.2.2; [YaRN] 3.2 and 3.4."""
    r, theta, scaling = config.rotary_width, config.rope_theta, config.rope_scaling or {}
    inv_freq = 1.0 / theta ** (torch.arange(0, r, 2, dtype=torch.float32, device="cpu") / r)                   # (r/2,)
    factor = scaling.get("factor") or 1.0
    if rope_type(config) == "linear":
        return inv_freq / factor, 1.0
    if rope_type(config) != "yarn":
        return inv_freq, 1.0
    # YaRN: dims that turn often within the original context keep their frequency, slow ones are interpolated by
    # `factor`, with a ramp between the two dims that turn beta_fast and beta_slow times.
    context = scaling.get("original_max_position_embeddings") or (4096 if config.is_ling1 else config.max_position_embeddings)
    dim_of = lambda turns: r * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
    floor, ceil = (math.floor, math.ceil) if config.is_ling1 or scaling.get("truncate", True) else (float, float)
    low, high = max(floor(dim_of(scaling.get("beta_fast") or 32)), 0), min(ceil(dim_of(scaling.get("beta_slow") or 1)), r - 1)
    ramp = ((torch.arange(r // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)  # 1 = slow
    # The official Ling 1 reads mscale with or without mscale_all_dim, Ling 2 (transformers) only the two together.
    growth = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if config.is_ling1:
        attention_factor = growth(1 if mscale is None else mscale) / growth(all_dim or 0)
    else:
        both = growth(mscale) / growth(all_dim) if mscale and all_dim else growth(1)
        attention_factor = both if scaling.get("attention_factor") is None else scaling["attention_factor"]
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), attention_factor


class RoPETables:
    """cos and sin of every position so far, made on first use: no state to save, nothing to initialise on the meta device."""

    def __init__(self, config):
        self.config, self.cos, self.sin = config, torch.empty(0), None

    def __call__(self, positions, device):
        """-> cos, sin: fp32 (S,d) of positions, a slice or int64 (S,), laid out for y = x * cos + swap(x) * sin."""
        end = positions.stop if isinstance(positions, slice) else self.config.max_position_embeddings
        if end > len(self.cos) or self.cos.device != device:
            with torch.inference_mode(False):    # training may use these tables next, and what inference mode makes no backward can keep
                inv_freq, factor = rope_frequencies(self.config)
                angle = torch.outer(torch.arange(1 << (end - 1).bit_length(), dtype=torch.float32, device=device), inv_freq.to(device))
                cos, sin, rest = angle.cos() * factor, angle.sin() * factor, (0, self.config.head_dim - self.config.rotary_width)
                self.cos = F.pad(torch.cat([cos, cos], dim=1), rest, value=1.0)              # dims past r pass through
                self.sin = F.pad(torch.cat([-sin, sin], dim=1), rest)
        return self.cos[positions], self.sin[positions]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Attention

class KVCache:
    """What generation keeps between calls: keys and values of every layer, (L,B,max_length,KV,d) each, how many positions are
    filled, and NormHead's scale. Made on first use, in the dtype and on the device of the first keys. All sequences of the batch
    have the same length; sample.py's `Segments` answers the same three calls for sequences of any lengths."""

    def __init__(self, config, batch_size, max_length):
        self.shape = (config.num_hidden_layers, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.keys = self.values = self.head_scale = None
        self.length = 0

    def positions(self, S):
        """Where the next S tokens stand, as RoPETables takes it."""
        return slice(self.length, self.length + S)

    def advance(self, S):
        """All layers have written S more tokens."""
        self.length += S

    def attend(self, layer, q, k, v):
        """Append k, v (B,S,KV,d) of one layer, and let q (B,S,H,d) look at all so far -> (B,S,H,d)."""
        end = self.length + k.shape[1]
        require(end <= self.shape[2], f"the cache holds {self.shape[2]} positions, {end} are needed; make KVCache with max_length >= {end}")
        if self.keys is None:
            self.keys, self.values = k.new_empty(self.shape), k.new_empty(self.shape)
        self.keys[layer, :, self.length:end], self.values[layer, :, self.length:end] = k, v
        return attention(q, self.keys[layer, :, :end], self.values[layer, :, :end])


class Attention(nn.Module):
    """Grouped-query attention [GQA]; the rows of the fused projection are all Q heads, then all K, then all V."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.d, self.r, self.eps = layer, config.head_dim, config.rotary_width, config.rms_norm_eps
        self.H, self.KV = config.num_attention_heads, config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, (self.H + 2 * self.KV) * self.d, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.H * self.d, config.hidden_size, bias=config.use_bias)
        self.query_layernorm = RMSNorm(self.d, self.eps) if config.use_qk_norm else None
        self.key_layernorm = RMSNorm(self.d, self.eps) if config.use_qk_norm else None

    def forward(self, x, cos_sin, cache):                                                    # x (B,S,D)
        H, KV, d = self.H, self.KV, self.d
        qk, v = linear(x, self.query_key_value.weight, self.query_key_value.bias).split([(H + KV) * d, KV * d], dim=-1)
        qk_weight = None
        if self.query_layernorm is not None:                     # QK-norm [Ling2] bounds the logits; rope() applies it, then rotates
            qk_weight = torch.cat([self.query_layernorm.weight.expand(H, d), self.key_layernorm.weight.expand(KV, d)])   # (H+KV,d)
        q, k = rope(qk.unflatten(-1, (H + KV, d)), *cos_sin, self.r, qk_weight, self.eps).split([H, KV], dim=2)     # (B,S,H,d), (B,S,KV,d)
        v = v.unflatten(-1, (KV, d))
        y = attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)       # (B,S,H,d)
        return linear(y.flatten(2), self.dense.weight, self.dense.bias)                      # (B,S,D)


# ----------------------------------------------------------------------------------------------------------------------
# 4. The router: which experts, with which weights, and what keeps their load even

class Warmup(NamedTuple):
    """Stochastic routing warm-up [Ling1]: early in training, before scores mean anything, experts are chosen by noise that is
    gradually replaced by the router, so that no expert starves because of its initial weights."""
    alpha: float                                                 # min(step / W, 1): 0 = noise only, 1 = router only
    seeds: list                                                  # one int per sequence of the batch: noise follows the sample,
                                                                 # whatever rank or micro-batch it lands in

    def mix(self, logits, layer):
        """l' = alpha l + (1 - alpha)(mu + sigma eps), mu and sigma those of each token's own logits.

        [Ling1] mixes with running statistics of the score. Per token, they need no state, no reduction over ranks and no
        care on resuming, and on logits the result is still a distribution after the softmax. logits (T,E) -> (T,E)."""
        S, E = len(logits) // len(self.seeds), logits.shape[1]
        noise = [torch.randn(S, E, generator=torch.Generator().manual_seed(seed * 1009 + layer)) for seed in self.seeds]
        std, mean = torch.std_mean(logits.detach(), dim=1, keepdim=True)
        return self.alpha * logits + (1 - self.alpha) * (mean + std * torch.cat(noise).to(logits.device, non_blocking=True))


class Routing(NamedTuple):
    """What one MoE layer reports: the experts chosen (T,k) int64; counted (T,) bool: the tokens that count, None: all; balance and z: 0-d
    sums over these, None if unused."""
    chosen: torch.Tensor
    counted: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor


def rows_per_expert(chosen, counted, E):
    """chosen (T,k), counted (T,) bool or None: all -> (E,) int64. Ignored targets (padding) count in no load, as in no loss."""
    hits = torch.ones_like(chosen) if counted is None else counted.to(chosen.dtype).unsqueeze(1).expand_as(chosen)
    return chosen.new_zeros(E).scatter_add_(0, chosen.flatten(), hits.flatten())             # bincount would sync


class Router(nn.Module):
    """All fp32, whatever the dtype of the model: a rounding error here sends a token to another expert."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", None if config.is_ling1 else torch.zeros(config.num_experts))    # also where off: files have it

    def forward(self, x, counted, warmup, fraction=None):
        """x (T,D) -> weights (T,k), Routing. counted (T,) bool: tokens whose target is scored; None: no targets.
        fraction (E,): f of the balance loss; None: that of this batch."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):                                   # or mixed precision would undo .float()
            logits = linear(x.float(), self.weight.float())                                  # (T,E)
        mixed = logits if warmup is None else warmup.mix(logits, self.layer)
        weights, chosen, scores = route(mixed, self.expert_bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.score_function,
                                        c.norm_topk_prob, c.routed_scaling_factor)
        balance = z = None
        if counted is not None and c.router_aux_loss_coef:
            # [Switch] eq. 4-6: E * sum_e f_e P_e, 1 when even: f the share of routed rows, P the mean score (here their sum: Ling.forward
            # divides by the count). Only P has a gradient. f of one micro-batch would ask every few sequences to be even, and change
            # with the split; train.py --balance global gives that of the whole step before. Sigmoid scores are divided by their
            # sum [DSv3 eq. 19], or lowering them all would pay.
            if fraction is None:
                load = rows_per_expert(chosen, counted, c.num_experts)
                fraction = load / load.sum().clamp(min=1)
            P = scores / scores.sum(-1, keepdim=True)
            balance = c.num_experts * (fraction * (P * counted.unsqueeze(1)).sum(0)).sum()
        if counted is not None and c.router_z_loss_coef:
            z = (logits.logsumexp(-1).square() * counted).sum()                              # [STMoE] eq. 5, on the router's own logits
        return weights, Routing(chosen, counted, balance, z)


@torch.no_grad()
def update_expert_bias(model, load):
    """Once per optimizer step: b += u (sign(e) - mean sign(e)), e = mean load - own load, so that an idle expert is chosen
    more often [LossFree alg. 1], zero-mean as in [Ling2]. load: (MoE layers, E), summed over the step and over all ranks."""
    config = model.config
    if config.is_ling1 or not config.moe_router_enable_expert_bias:
        return
    load, blocks = load.float(), model.moe_blocks()
    require(len(load) == len(blocks), f"load has {len(load)} rows, the model {len(blocks)} MoE layers, MTP's among them; take the load "
            "of a call with targets")
    direction = (load.mean(1, keepdim=True) - load).sign()                                   # (MoE layers, E)
    step = config.expert_bias_update_rate * (direction - direction.mean(1, keepdim=True))
    for block, change in zip(blocks, step):
        block.mlp.gate.expert_bias += change


# ----------------------------------------------------------------------------------------------------------------------
# 5. MLP and experts, on one rank or shared out over several

class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), gate over up in one matrix."""

    def __init__(self, D, width):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.empty(2 * width, D)), nn.Parameter(torch.empty(D, width))

    def forward(self, x):                                                                    # (...,D) -> (...,D)
        return linear(swiglu(linear(x, self.gate_up)), self.down)


def local(p):
    """What this rank holds of a tensor: all of it, unless it is a DTensor."""
    return p.to_local() if hasattr(p, "to_local") else p


def part_of(p, coordinate=None):
    """Which part of a tensor the rank at a coordinate of its mesh (None: this one) holds, as a range per dimension. All of it,
    unless it is a DTensor; those are cut into equal pieces, the last ones shorter or empty."""
    part = [range(n) for n in p.shape]
    for i, placement in reversed([*enumerate(getattr(p, "placements", ()))]):                # mesh (edp, ep): edp cuts what ep dealt out
        if not placement.is_replicate():
            piece = -(-len(part[placement.dim]) // p.device_mesh.size(i))
            rank = p.device_mesh.get_local_rank(i) if coordinate is None else coordinate[i]
            part[placement.dim] = part[placement.dim][piece * rank:piece * (rank + 1)]
    return part


def slices(part):
    return tuple(slice(r.start, r.stop) for r in part)


def local_matrices(p):
    """Yields (expert, what this rank holds of its matrix, that part of the whole as slices), or (None, ...) once if p is no stack."""
    part = part_of(p)
    if p.dim() < 3:
        yield None, local(p), slices(part)
    else:
        for e, matrix in zip(part[0], local(p)):
            yield e, matrix, slices(part[1:])


class AllToAll(torch.autograd.Function):
    """Rows between the ranks of a group: the first sends[0] rows of x go to its rank 0, the next sends[1] to rank 1 ..., and
    receives[r] rows come from rank r. Gradients travel back the same way."""
    timer = contextlib.nullcontext                               # train.py times the exchange

    @staticmethod
    def forward(ctx, x, sends, receives, group):
        ctx.route = receives, sends, group
        out = x.new_empty(sum(receives), *x.shape[1:])
        with AllToAll.timer():
            dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
        return out

    @staticmethod
    def backward(ctx, dy):
        return AllToAll.apply(dy, *ctx.route), None, None, None


class Experts(nn.Module):
    """E SwiGLUs of width F, stacked. Where train.py has set `group`, each of its ranks holds E / ranks of them."""

    def __init__(self, config):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up, self.down = nn.Parameter(torch.empty(E, 2 * width, D)), nn.Parameter(torch.empty(E, D, width))
        self.group = None

    def forward(self, x, weights, chosen, shared):                                           # (T,D), (T,k), (T,k), (T,D) or None -> (T,D)
        if self.group is None:
            return experts(x, weights, chosen, self.gate_up, self.down, shared)
        # Expert parallelism, dropless: rows go to the rank that holds their expert, whatever number that is, and come back. A rank
        # without a row still takes part in every exchange.
        (T, k), E, x = chosen.shape, len(self.gate_up), autocast(x)
        order = chosen.flatten().argsort(stable=True)                                        # 1 sort: T*k rows by expert
        load = rows_per_expert(chosen, None, E)                                              # (E,), of all ranks' experts
        arriving = torch.empty_like(load)                                                    # (ranks * my experts,)
        with AllToAll.timer():
            dist.all_to_all_single(arriving, load, group=self.group)
        ranks = dist.get_world_size(self.group)
        sends, receives = torch.stack([load, arriving]).view(2, ranks, -1).sum(2).tolist()   # SYNC: the layer's only one
        rows = AllToAll.apply(x[order // k], sends, receives, self.group)                    # 2 send: (R,D), by sender, then by expert
        scale = AllToAll.apply(weights.flatten()[order], sends, receives, self.group)        # (R,)
        mine = torch.arange(E // ranks, device=x.device).repeat(ranks).repeat_interleave(arriving, output_size=len(rows))   # (R,)
        y = experts(rows, scale.unsqueeze(1), mine.unsqueeze(1), self.gate_up.to_local(), self.down.to_local())   # 3 compute, weighted
        y = AllToAll.apply(y, receives, sends, self.group)                                   # 4 return: (T*k,D)
        y = torch.empty_like(y).index_copy(0, order, y).view(T, k, -1)
        y = y.sum(1, dtype=y.dtype)                              # 5 sum of each token's k rows; on CUDA autocast would make it fp32
        return y if shared is None else y + shared


class MoE(nn.Module):
    """y = sum_j w_j expert_j(x) + shared(x) [Ling1], [DSv3 eq. 12]."""

    def __init__(self, config, layer):
        super().__init__()
        self.gate, self.experts = Router(config, layer), Experts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x, counted, warmup, fraction):
        h = x.flatten(0, 1)                                                                  # (T,D), T = B*S
        weights, routing = self.gate(h, counted, warmup, fraction)                           # 1 route: (T,k), chosen (T,k)
        shared = None if self.shared_experts is None else self.shared_experts(h)             # 2 shared: weight 1, never scaled
        y = self.experts(h, weights, routing.chosen, shared)                                 # 3 sort, matmuls, weighted sum, added: (T,D)
        return y.view_as(x), routing


# ----------------------------------------------------------------------------------------------------------------------
# 6. Blocks, multi-token prediction, Ling

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.attention = RMSNorm(D, eps), Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MLP(D, config.intermediate_size) if layer < config.first_k_dense_replace else MoE(config, layer)

    def forward(self, x, cos_sin, counted=None, cache=None, warmup=None, fraction=None):
        """x (B,S,D) -> x (B,S,D), Routing (None in a dense layer)."""
        x = x + self.attention(self.input_layernorm(x), cos_sin, cache)
        h = self.post_attention_layernorm(x)
        y, routing = self.mlp(h, counted, warmup, fraction) if isinstance(self.mlp, MoE) else (self.mlp(h), None)
        return x + y, routing


class MTP(Block):
    """Predicts one token further [DSv3 2.2, eq. 21-25]: joins the last hidden state at t with the embedding of token t+1 (or t+m
    at depth m), runs a block of its own, and shares embedding and lm_head with the model."""

    def __init__(self, config, layer):
        super().__init__(config, layer)                          # layer >= L: never dense
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.final_layernorm = RMSNorm(D, eps), RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)

    def forward(self, h, embedding, cos_sin, counted=None, cache=None, warmup=None, fraction=None):     # both (B,S,D)
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(h)], dim=-1))          # embedding first: [DSv3] writes it second
        x, routing = super().forward(x, cos_sin, counted, cache, warmup, fraction)
        return self.final_layernorm(x), routing


class Output(NamedTuple):
    logits: torch.Tensor        # (B,S,V) fp32, or None when targets were given
    loss: torch.Tensor          # 0-d fp32, the training objective, or None
    parts: dict                 # its terms before weighting: ce, mtp, balance, z; a term the model does not have is absent
    load: torch.Tensor          # (MoE layers, E) int64: routed rows per expert; MTP's layers last, where there are targets


def shift(x, by, fill):
    """x (B,S) moved left: result[:, t] = x[:, t + by], `fill` past the end."""
    return F.pad(x[:, by:], (0, min(by, x.shape[1])), value=fill)


def count_targets(config, targets):
    """How many targets the CE and each MTP depth score in this batch: int64 (1 + MTP depth,). Sum it over a step's
    micro-batches and ranks and pass it to Ling.forward, and the micro-batches' losses and gradients add up."""
    return torch.stack([(shift(targets, m, -1) >= 0).sum() for m in range(1 + config.num_nextn_predict_layers)])


class Ling(nn.Module):
    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        # nn.Embedding(V, D) would load torch._dynamo on the meta device, for numbers we replace: a second.
        self.word_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        L = config.num_hidden_layers
        self.mtp = nn.ModuleList(MTP(config, L + m) for m in range(config.num_nextn_predict_layers))
        self.rope = RoPETables(config)
        if not self.norm.weight.is_meta:                         # on the meta device there is nothing to fill yet
            self.init_weights(seed)

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.word_embeddings.weight

    @torch.no_grad()
    def init_weights(self, seed):
        """By role: norms 1, biases 0, matrices N(0, initializer_range), and those that write into the residual stream smaller by
        sqrt(2L), as 2L of them add up. Each tensor (each expert) draws from a seed of its own, made of the run's seed and its
        name, so that every parallel layout starts from the same weights; a rank holds no more than one matrix it does not keep."""
        for name, p in [*self.named_parameters(), *self.named_buffers()]:
            std = self.config.initializer_range
            if name.endswith(("attention.dense.weight", "mlp.down", "experts.down")):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            if name.endswith("norm.weight"):
                local(p).fill_(1.0)
            elif name.endswith("bias"):
                local(p).zero_()
            else:
                for e, matrix, part in local_matrices(p):
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{e or 0}".encode()))
                    matrix.copy_(torch.empty(p.shape[-2:], dtype=torch.float32, device="cpu").normal_(0, std, generator=generator)[part])

    def trunk(self, tokens, cache=None, counted=None, warmup=None, fractions={}):
        """tokens (B,S) -> x (B,S,D) after the final norm, and each block's Routing or None.
        fractions {block: (E,)}; the rest as in forward."""
        S = tokens.shape[1]
        require(S > 0, "tokens (B,S) must have at least one position")
        cos_sin = self.rope(slice(0, S) if cache is None else cache.positions(S), tokens.device)
        x, routings = autocast(self.word_embeddings(tokens)), []                             # the residual stream in the activations' dtype
        for block in self.layers:
            x, routing = block(x, cos_sin, counted, cache, warmup, fractions.get(block))     # (B,S,D)
            routings.append(routing)
        if cache is not None:
            cache.advance(S)
        return self.norm(x), routings

    def draft(self, x, tokens, cache):
        """The first MTP block in generation: x (B,S,D) of trunk, and the tokens (B,S) that follow each position -> (B,S,D), whose
        logits guess the token after. cache: sample.py's Segments with L + 1 layers; a KVCache has none for this block."""
        x, _ = self.mtp[0](x, self.word_embeddings(tokens), self.rope(cache.positions(tokens.shape[1]), x.device), cache=cache)
        return x

    def moe_blocks(self):
        """The blocks that route, in the order of the rows of Output.load."""
        return [block for block in [*self.layers, *self.mtp] if isinstance(block.mlp, MoE)]

    def forward(self, tokens, targets=None, cache=None, *, counts=None, warmup=None, fractions=None, logits_to_keep=0):
        """tokens (B,S) int64, targets (B,S) int64 already shifted by one, negative = ignored -> Output.

        There is no attention mask: pad on the right, where causal attention never looks, and ignore the padding's targets.
        cache: a KVCache that tokens continue. counts: count_targets() of the whole step, if this batch is only a part of it.
        warmup: a Warmup, or None. fractions (MoE layers, E): f of the balance losses, if not this batch's.
        logits_to_keep: only the last so many positions' logits (0: all)."""
        c, fractions = self.config, {} if fractions is None else dict(zip(self.moe_blocks(), fractions, strict=True))
        require(targets is None or targets.shape == tokens.shape, "targets must have the shape of tokens, (B,S)")
        require(targets is None or cache is None or not self.mtp, "the MTP loss takes whole sequences: give targets or a cache, not both")
        counted = None if targets is None else (targets >= 0).flatten()                      # (T,)
        x, routings = self.trunk(tokens, cache, counted, warmup, fractions)
        if targets is None:
            return Output(self.logits(x[:, -logits_to_keep:], cache), None, {}, self.stack_loads(routings))

        # Every term is a sum over this batch divided by the count of the whole step, so gradients of micro-batches simply add.
        counts = (count_targets(c, targets) if counts is None else counts).clamp(min=1)
        head = lambda h, t: linear_cross_entropy(h.flatten(0, 1), self.lm_head.weight, t.flatten(), c.norm_head)
        parts = {"ce": head(x, targets) / counts[0]}                                         # mean of -log p(target)
        if self.mtp:
            losses, h, cos_sin = [], x, self.rope(slice(0, tokens.shape[1]), x.device)
            for m, block in enumerate(self.mtp, start=1):
                # Past the end of the window token and target are unknown: unscored, never wrapped to another row.
                embedding, further = self.word_embeddings(shift(tokens, m, 0)), shift(targets, m, -1)
                h, routing = block(h, embedding, cos_sin, (further >= 0).flatten(), None, warmup, fractions.get(block))
                losses.append(head(h, further) / counts[m])
                routings.append(routing)
            parts["mtp"] = torch.stack(losses).mean()                                        # [DSv3 eq. 25]
        for m, routing in enumerate(routings, start=1 - len(self.layers)):                   # m > 0: the MTP depth
            for name in ("balance", "z"):                                                    # summed over MoE layers, MTP's too
                if (value := getattr(routing, name, None)) is not None:                      # None: a dense layer's routing, too
                    parts[name] = parts.get(name, 0.0) + value / counts[max(m, 0)]
        scale = {"ce": 1.0, "mtp": c.mtp_loss_scaling_factor, "balance": c.router_aux_loss_coef, "z": c.router_z_loss_coef}
        loss = sum(scale[name] * part for name, part in parts.items())
        return Output(None, loss, parts, self.stack_loads(routings))

    def stack_loads(self, routings):
        loads = [rows_per_expert(routing.chosen, routing.counted, self.config.num_experts) for routing in routings if routing is not None]
        return torch.stack(loads) if loads else torch.zeros(0, self.config.num_experts, dtype=torch.int64, device=self.norm.weight.device)

    def logits(self, x, cache=None):
        """x (B,S,D) after the final norm -> (B,S,V) fp32. NormHead [Ling1 eq. 4] divides each column of W (V,D), a hidden channel's, by its
        norm over the vocabulary (not rows, as Baichuan2 does); the norm gets no gradient. Scaling x is the same product and copies no W."""
        if self.config.norm_head:
            scale = norm_head_scale(self.lm_head.weight) if cache is None or cache.head_scale is None else cache.head_scale
            x = (x * scale).to(x.dtype)
            if cache is not None:
                cache.head_scale = scale
        return linear(x, self.lm_head.weight).float()

    # Reading and writing weights: section 8.

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, path, dtype=None, device=None, progress=None):
        """A model from a folder with config.json and *.safetensors (a release, or save_pretrained's), or from a run of train.py.

        dtype None keeps what is stored: a run's fp32; FP8 becomes config.json's torch_dtype, or else bf16; where files mix dtypes, all
        matrices get the widest. expert_bias stays fp32: in bf16 its updates of 1e-3 would vanish. progress(done, total), in bytes, is
        called after each tensor of a release.
        Raises BadInput when a tensor is missing, unexpected, or of the wrong shape or dtype, or a file is damaged."""
        with torch.device("meta"):
            model = cls(read_config(path))
        source, file = open_weights(path, model), read_json(Path(path) / "config.json")
        of_fp8 = next((t for t in FLOATS if str(t) == f"torch.{file.get('torch_dtype') or file.get('dtype')}"), torch.bfloat16)
        widest = {}                                              # dtype stored; what multiplies the activations needs one for all
        for names, own, _ in released_table(model):
            key = own if own.endswith(("norm.weight", "mlp.gate.weight", "expert_bias")) else "matmuls"
            for tensor in filter(None, map(source.get, names) if isinstance(source, dict) else ()):
                found = of_fp8 if tensor.dtype == FP8 else tensor.dtype
                widest[key] = torch.promote_types(widest.get(key, found), found)
        for own, p in [*model.named_parameters(), *model.named_buffers()]:
            kept = torch.float32 if own.endswith("expert_bias") else dtype or widest.get(own) or widest.get("matmuls", torch.float32)
            module, leaf = model.get_submodule(own.rpartition(".")[0]), own.rpartition(".")[2]
            new = torch.empty(p.shape, dtype=kept, device=device)
            if new.device.type == "cpu":    # numpy's memory has huge pages on Linux; in small ones, page faults took longer than reading
                raw = np.empty(new.nbytes + 64, np.uint8)
                new = torch.from_numpy(raw[-raw.ctypes.data % 64:][:new.nbytes]).view(kept).view(new.shape)   # aligned as torch does
            setattr(module, leaf, new if leaf == "expert_bias" else nn.Parameter(new))
        model.tie()
        model.load_pretrained(path, source, progress)
        return model

    @torch.no_grad()
    def load_pretrained(self, path, source=None, progress=None):
        """Fill the weights from a folder of from_pretrained's kinds, whatever their dtype, device and layout: of a sharded model, each
        rank reads what it holds. source: open_weights(path, self), if it is at hand. Raises BadInput as from_pretrained does."""
        source, jobs = source or open_weights(path, self), []
        if not isinstance(source, dict):
            return load_checkpoint(source, {"model": self.state_dict()})
        for own, rows in itertools.groupby(released_table(self), key=lambda row: row[1]):
            rows = {e: names for names, _, e in rows}
            for e, matrix, (mine, *others) in local_matrices(self.own_tensor(own).detach()):
                at = -mine.start                                 # our row where the next stored matrix begins; < 0: above our part
                for stored in map(source.get, rows[e]):                                      # gate over up, or one matrix
                    if stored is None:
                        matrix.zero_()                                                       # an expert_bias that is off
                        break
                    jobs.append((stored, matrix[max(at, 0):max(at + stored.shape[0], 0)], max(-at, 0), others))
                    at += stored.shape[0]
        jobs.sort(key=lambda job: job[0][:2])                                                # in the order of the files: disks like that
        total = sum(target.numel() * stored.dtype.itemsize for stored, target, *_ in jobs)
        with ThreadPoolExecutor(READERS) as pool:
            for done in itertools.accumulate(pool.map(lambda job: Stored.read(*job), jobs)):
                if progress:
                    progress(done, total)

    def own_tensor(self, name):
        return functools.reduce(getattr, name.split("."), self)

    @torch.no_grad()
    def save_pretrained(self, path, max_shard_bytes=10 << 30, dtype=None):
        """Write config.json and model.safetensors (or shards and an index), under the released names. What the folder held stays until
        all of it is written.

        Of a sharded model every rank calls this; the ranks write the shards in turn, and none holds more than one matrix it does
        not keep. dtype None: that of the weights; expert_bias is always fp32."""
        path = Path(path)
        require(not checkpoints(path), f"{path} is a run of train.py, which would go on loading its checkpoints; save elsewhere")
        path.mkdir(parents=True, exist_ok=True)
        dtype_of = lambda own: torch.float32 if own.endswith("expert_bias") else dtype or self.own_tensor(own).dtype
        shards, room = [[]], max_shard_bytes                                                 # each a list of (name, own, e, i of n, shape)
        for names, own, e in released_table(self):
            for i, name in enumerate(names):
                shape = list(self.own_tensor(own).shape[-2:])
                shape[0] //= len(names)
                size = math.prod(shape) * dtype_of(own).itemsize
                if shards[-1] and size > room:
                    shards, room = [*shards, []], max_shard_bytes
                shards[-1].append((name, own, e, i, len(names), shape))
                room -= size
        files = (["model.safetensors"] if len(shards) == 1 else
                 [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))])
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        whole = functools.lru_cache(1)(lambda own, e: whole_matrix(self.own_tensor(own), e))  # gate and up are of one matrix: gathered once
        for i, (file, shard) in enumerate(zip(files, shards)):
            layout = {name: (dtype_of(own), shape) for name, own, _, _, _, shape in shard}
            data = (whole(own, e).chunk(n)[j].to(dtype_of(own)) for _, own, e, j, n, _ in shard)
            if rank == i % ranks:
                write_safetensors(path / f"{file}.new", layout, data)
            else:
                collections.deque(data, maxlen=0)                                            # take part in gathering, keep nothing
        if dist.is_initialized():
            dist.barrier()
        if rank:
            return
        (path / "config.json").unlink(missing_ok=True)           # until it is back this is no model, and never two mixed
        for file in files:
            os.replace(path / f"{file}.new", path / file)
        for pattern in ("model*.safetensors", "model*.safetensors.new*", "model.safetensors.index.json"):
            for old in {*path.glob(pattern)} - {path / file for file in files}:
                old.unlink()                                     # of an earlier save, cut differently or cut short
        if len(shards) > 1:
            total = sum(math.prod(shape) * dtype_of(own).itemsize for shard in shards for _, own, _, _, _, shape in shard)
            write_json(path / "model.safetensors.index.json", {
                "metadata": {"total_size": total}, "weight_map": {entry[0]: file for file, shard in zip(files, shards) for entry in shard}})
        main = str(dtype_of("word_embeddings.weight")).removeprefix("torch.")
        write_json(path / "config.json", {**self.config.to_dict(), "torch_dtype": main})


# ----------------------------------------------------------------------------------------------------------------------
# 7. Counting

class Component(NamedTuple):
    total: int = 0                                               # parameters
    active: int = 0                                              # of these, those a token uses: k of E experts
    flops: int = 0                                               # a token, forward plus backward, as in flops_per_token


def components(config, seq_len=0):
    """{name: Component}: what count_params and flops_per_token add up, the MTP blocks being one component. Nothing is allocated."""
    c, depth, sizes = config, config.num_nextn_predict_layers, collections.Counter()
    with torch.device("meta"):
        model = Ling(config)
    kinds = {"mtp.": "mtp", "word_embeddings": "embedding", "lm_head": "lm_head", "norm.weight": "norms", "attention.": "attention",
             "mlp.gate.": "router", ".experts.": "experts", "shared_experts": "shared experts", "mlp.": "dense MLP"}
    for name, p in model.named_parameters():
        sizes[next(kind for part, kind in kinds.items() if part in name)] += p.numel()       # the first part that occurs
    unused = c.num_experts - c.num_experts_per_tok
    idle = {"experts": sizes["experts"] // c.num_experts * unused, "mtp": depth * 3 * c.moe_intermediate_size * c.hidden_size * unused}
    table = {kind: Component(n, active := n - idle.get(kind, 0), 6 * active) for kind, n in sizes.items()}
    head, attend = 6 * c.vocab_size * c.hidden_size, 6 * seq_len * c.num_attention_heads * c.head_dim
    table["embedding"] = table["embedding"]._replace(flops=0)                                # a look-up
    table["lm_head"] = table.get("lm_head", Component())._replace(flops=head)                # also if it is the embedding's matrix
    table["attention scores"] = Component(flops=c.num_hidden_layers * attend)
    if depth:
        table["mtp"] = table["mtp"]._replace(flops=table["mtp"].flops + depth * (head + attend))
    return table


def count_params(config):
    """Parameters by kind. total and active include both embeddings, as the published figures do; active counts k of E experts.
    MTP blocks are counted apart. Nothing is allocated."""
    table = components(config)
    mtp = table.pop("mtp", Component()).total
    total, active, _ = (sum(column) for column in zip(*table.values()))
    embeddings = table["embedding"].total + table["lm_head"].total                           # a tied one is counted once
    return {"total": total, "active": active, "active_non_embedding": active - embeddings, "mtp": mtp}


def flops_per_token(config, seq_len):
    """Training FLOPs per token, forward plus backward: 6 for each weight a token is multiplied with (active experts, router,
    lm_head, and for each MTP depth its block and lm_head again; not the embedding look-up), plus causal attention,
    6 * seq_len * H * d per layer, the mean query seeing half the window. Recomputation is not counted."""
    return sum(component.flops for component in components(config, seq_len).values())


# ----------------------------------------------------------------------------------------------------------------------
# 8. Weights on disk. Nothing here unpickles what a file brings: safetensors is raw numbers, and a run's metadata passes a
#    reader that knows a dozen classes.

def released_table(model):
    """Yields (released names, our name, expert): all that differs between the released files and this model. The matrices of two
    names lie one over the other in ours; an expert's is matrix `expert` of a stack (None: not a stack)."""
    c = model.config
    for own, p in [*model.named_parameters(), *model.named_buffers()]:
        released = own if own.startswith("lm_head") else "model." + own
        if own.startswith("mtp."):
            _, depth, rest = own.split(".", 2)
            released = f"model.layers.{c.num_hidden_layers + int(depth)}.{rest}"
        stem, _, leaf = released.rpartition(".")
        parts = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}.get(leaf)
        if parts is None:
            yield [released], own, None
        else:
            for e in range(c.num_experts) if p.dim() == 3 else [None]:
                yield [f"{stem}.{part}.weight" if e is None else f"{stem}.{e}.{part}.weight" for part in parts], own, e


def check_table(path, model, tensors):
    """Names and shapes agree, or BadInput. Tolerated: MTP blocks the model does not want, rotary tables of old releases, the empty
    matrices of no shared experts, a stored copy of a tied lm_head, and an absent expert_bias (zero) where the config says it is off."""
    c, table = model.config, list(released_table(model))
    expected = {name for names, *_ in table for name in names}
    optional = {name for name in expected if name.endswith("expert_bias") and not c.moe_router_enable_expert_bias}
    layer_of = lambda name: int((re.match(r"model\.layers\.(\d{1,9})\.", name) or (0, -1))[1])               # -1: of none
    is_extra = lambda name: (name.endswith("rotary_emb.inv_freq") or 0 in tensors[name].shape or
                             (name == "lm_head.weight" and c.tie_word_embeddings) or
                             (not c.num_nextn_predict_layers and layer_of(name) >= c.num_hidden_layers))
    missing = sorted(expected - tensors.keys() - optional)
    surplus = sorted(name for name in tensors.keys() - expected if not is_extra(name))
    for kind, names in (("has no tensor", missing), ("has an unexpected tensor", surplus)):
        require(not names, f"{path} {kind} {names[0] if names else ''}" + f" and {len(names) - 1} more" * (len(names) > 1) +
                "; config.json and the weights must come from the same model")
    for names, own, e in table:
        first, *rest = model.own_tensor(own).shape[-2:]
        for name in names:
            if (tensor := tensors.get(name)) is not None:
                want = [first // len(names), *rest]
                require(list(tensor.shape) == want, f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for {want}")
                require(tensor.dtype in FLOATS or tensor.dtype == FP8 and rest, f"{path}: {name} is stored as {tensor.dtype}; only "
                        "float32, bfloat16 and float16 weights can be read, and float8_e4m3fn matrices")
                scale, blocks = tensor.scale, [-(-n // BLOCK) for n in want]
                require(tensor.dtype != FP8 or scale and scale.dtype in FLOATS and scale.shape == blocks,
                        f"{path}: {name}_scale_inv {f'is {scale.dtype} {scale.shape}' if scale else 'is missing'}, but {name} is FP8 and "
                        f"needs one of {blocks}, float32 or bfloat16; get the files again, or the bf16 release")
    return tensors


def whole_matrix(p, e):
    """A tensor, or matrix e of a stack (None: it is no stack), on the CPU. A DTensor's is put together from what the ranks hold:
    all of them must ask for it."""
    if not hasattr(p, "placements"):
        return (p if e is None else p[e]).detach().cpu()
    held, mesh = local(p), p.device_mesh.mesh
    whole, done = torch.empty(p.shape[-2:], dtype=p.dtype, device=held.device), []
    for coordinate in np.ndindex(*mesh.shape):
        part = part_of(p, coordinate)
        if part in done or not all(part) or (e is not None and e not in part[0]):
            continue                                                                         # a replica, empty, or without this expert
        done.append(part)
        target = whole[slices(part if e is None else part[1:])]
        piece = torch.empty_like(target, memory_format=torch.contiguous_format)
        if dist.get_rank() == mesh[coordinate]:
            piece.copy_(held if e is None else held[e - part[0].start])
        dist.broadcast(piece, int(mesh[coordinate]))
        target.copy_(piece)
    return whole.cpu()


def write_beside(path, write):
    """Durably replace a file: write(f) into a temporary one beside it, fsync, rename. A crash leaves the old or the new."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(path):
    """Keep other commands from writing this file or folder too. Raises BadInput if one does. Nothing on systems without flock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDONLY)                          # a process that dies lets go
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{path}: another process is writing there; wait until it is done, or give another --out") from None
        except OSError:                                          # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def write_json(path, value):
    write_beside(path, lambda f: f.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None


def read_config(folder):
    """LingConfig of a released checkpoint or of a run."""
    require(Path(folder).is_dir(), f"{folder} is not a folder; give one that holds config.json and weights")
    require((Path(folder) / "config.json").exists(), f"{folder} has no config.json; give the folder of a released Ling model or of a run")
    return LingConfig.from_dict(read_json(Path(folder) / "config.json"))


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS, FP8, BLOCK = (torch.float32, torch.bfloat16, torch.float16), torch.float8_e4m3fn, 128    # BLOCK x BLOCK weights share a scale
E4M3 = torch.arange(256, dtype=torch.uint8, device="cpu").view(FP8).float()    # what each byte means: torch's conversion is 4 times slower
READERS, STAGING = 4, 1 << 20       # threads that load (from a disk twice as fast as one), and how many bytes each converts at a time


class Stored(NamedTuple):
    """A tensor in a safetensors file, not read yet. scale: of an FP8 one, (rows / BLOCK, columns / BLOCK), rounded up."""
    path: Path
    start: int                  # byte of the file
    dtype: torch.dtype
    shape: list
    scale: "Stored" = None

    @torch.inference_mode()     # a thread has no mode but its own
    def read(self, target, first=0, others=()):
        """Fill target, of any dtype and device, with the rows from `first` on and the slices `others` of further dimensions -> bytes.
        Straight into its memory if that holds what is stored. (A memory map is slower, and its pages count as held.)"""
        alike = (target.device.type, target.dtype, [*target.shape[1:]]) == ("cpu", self.dtype, self.shape[1:])
        straight = alike and self.scale is None and target.is_contiguous()
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        pieces = [target] if straight else target.split(max(1, STAGING // row))
        room = target if straight else torch.empty(len(pieces[0]), *self.shape[1:], dtype=self.dtype, device="cpu")
        if self.scale:
            self.scale.read(scale := torch.empty(self.scale.shape, dtype=torch.float32, device="cpu"))
        with open(self.path, "rb") as f:
            f.seek(self.start + first * row)
            for piece in pieces:
                values = room[:len(piece)]
                require(f.readinto(values.view(-1).view(torch.uint8).numpy()) == values.nbytes,
                        f"{self.path} ends early: it is being changed")
                if self.scale:
                    rows = scale[torch.arange(first, first + len(piece), device="cpu") // BLOCK].repeat_interleave(BLOCK, dim=1)
                    values = E4M3.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape).mul_(rows[:, :self.shape[1]])
                    first += len(piece)
                if not straight:
                    piece.copy_(values[(slice(None), *others)])
        return target.numel() * self.dtype.itemsize


def open_weights(folder, model):
    """The newest intact checkpoint of a run, as a path; of a release, {name: Stored} as the model asks for. Raises BadInput."""
    return find_checkpoint(folder) or check_table(folder, model, open_safetensors(folder))


def open_safetensors(folder):
    """All tensors of a folder's *.safetensors as {name: Stored}, the scales of FP8 ones with them. Nothing but the headers is read."""
    index, tensors = Path(folder) / "model.safetensors.index.json", {}
    if index.exists():
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        require(isinstance(weight_map, dict)
                and all(isinstance(file, str) and file and Path(file).name == file for file in weight_map.values()),
                f"{index}: weight_map must map tensor names to file names in the same folder")
        files = {file: open_safetensors_file(index.with_name(file)) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            require(name in files[file], f"{index.with_name(file)} lacks {name}, which the index places there")
            tensors[name] = files[file][name]
    for file in [] if index.exists() else sorted(Path(folder).glob("*.safetensors")):
        own = open_safetensors_file(file)
        twice = sorted(tensors.keys() & own.keys())
        require(not twice, f"{file} repeats {twice[:1]}; remove the surplus *.safetensors or add the index")
        tensors |= own
    require(tensors, f"{folder} has no weights: neither *.safetensors nor an intact checkpoint of a run")
    scale_of = {name: f"{name}_scale_inv" for name, tensor in tensors.items() if tensor.dtype == FP8}
    return {name: tensors[name]._replace(scale=tensors.get(scale_of.get(name))) for name in tensors.keys() - scale_of.values()}


def open_safetensors_file(path):
    """One file as {name: Stored}. The format: u64 header length, JSON {name: {dtype, shape, data_offsets}}, raw bytes.
    Length, JSON and offsets are validated against the file's size before any byte of data is touched."""
    check = lambda ok, why: require(ok, f"{path} is damaged or not safetensors: {why}")
    require(path.is_file(), f"{path} is missing")
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        check(8 + length <= size and length <= 100_000_000,
              f"its header claims {length} bytes; the file has {size}, and the format allows 100 MB")
        raw = f.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)
        header.pop("__metadata__", None)
        entries = [(start, end, name, str(entry["dtype"]), entry["shape"])
                   for name, entry in header.items() for start, end in [entry["data_offsets"]]]
        entries.sort(key=lambda entry: entry[:2])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        check(False, f"its header does not parse ({type(error).__name__}: {error})")
    data, tensors, position = size - 8 - length, {}, 0                                       # bytes
    is_size = lambda n: type(n) is int and n >= 0
    for start, end, name, dtype, shape in entries:
        check(dtype in DTYPES, f"{name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        check(isinstance(shape, list) and all(map(is_size, [start, end, *shape])), f"{name} has shape {shape} at bytes {start}..{end}")
        check(start == position and end - start == math.prod(shape) * DTYPES[dtype].itemsize and end <= data,
              f"{name}, {dtype} {shape}, lies at bytes {start}..{end} of {data}; expected to start at {position}")
        tensors[name], position = Stored(path, 8 + length + start, DTYPES[dtype], shape), end
    check(position == data, f"{data - position} bytes at its end belong to no tensor")
    return tensors


def unique_keys(pairs):
    require(len(dict(pairs)) == len(pairs), "a key appears twice")
    return dict(pairs)


def write_safetensors(path, layout, tensors):
    """layout {name: (dtype, shape)}, and an iterable of these tensors in that order, on the CPU -> one file, through a temporary
    beside it. One tensor at a time is in memory, never the model."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)                                                            # data aligned to 8 bytes

    def write(f):
        f.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            f.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    write_beside(path, write)


def checkpoints(run):
    """The folders of a run's checkpoints, oldest first."""
    found = (folder for folder in Path(run).glob("step_*") if re.fullmatch(r"step_\d{8,}", folder.name) and folder.is_dir())
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def find_checkpoint(run, folders=None, share=slice(None), agree=lambda damage: damage):
    """The newest intact checkpoint of a run folder, or None. A damaged one is named in a warning and passed over.
    Several processes may each check a share of the files of the same folders, and agree on what they found."""
    for folder in reversed(checkpoints(run) if folders is None else folders):
        if damage := agree(checkpoint_damage(folder, share)):
            warnings.warn(f"checkpoint {folder} is damaged ({damage}); trying the one before it", stacklevel=2)
        else:
            return folder
    return None


def checkpoint_damage(folder, share=slice(None)):
    """What is wrong with a checkpoint, in words, or None: every file against the size and CRC-32 of its manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, (size, crc) in sorted(manifest.items())[share]:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if file_crc(folder / name) != crc:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"manifest.json or a file it lists: {error}"
    return None


def file_crc(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def verify_checksums(folder):
    """Raises BadInput unless the *.safetensors of a folder are those that its SHA256SUMS lists, with their digests."""
    sums = Path(folder) / "SHA256SUMS"
    require(sums.exists(), f"{sums} does not exist; where the files are known to be good, make it: sha256sum *.safetensors > SHA256SUMS")
    lines = re.findall(r"^(\w{64}) [ *](?:\./)?([^/\n]+\.safetensors)$", sums.read_text(errors="replace"), re.M)
    listed = {name: digest.lower() for digest, name in lines}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as f:
            found, want = hashlib.file_digest(f, "sha256").hexdigest(), listed.pop(path.name, "nothing of it")
        require(found == want, f"{path} has SHA-256 {found}, SHA256SUMS says {want}; get the file again, or its list")
    require(not listed, f"{folder} lacks {', '.join(listed)} of its SHA256SUMS; get what is missing")


class TensorMetadataOnly(pickle.Unpickler):
    """torch.distributed.checkpoint keeps its index as a pickle and loads it without a guard. This one refuses every class
    but those an index of tensors is made of, so that a checkpoint from a stranger cannot run code."""
    MODULES = {"torch.distributed.checkpoint.metadata": {"Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata",
                                                         "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"},
               "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "torch.serialization": {"_get_layout"},
               "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "strided"},
               "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"},
               "pathlib._local": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"}}

    def find_class(self, module, name):
        if name in self.MODULES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a checkpoint")


def check_metadata(folder):
    """Raise unless a checkpoint's index holds tensors only; then nothing else in it is ever unpickled."""
    try:
        index = TensorMetadataOnly(io.BytesIO((folder / ".metadata").read_bytes())).load()
        require(all(type(entry).__name__ == "TensorStorageMetadata" for entry in index.state_dict_metadata.values()), "it holds objects")
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise BadInput(f"checkpoint {folder} cannot be read: its index is not one of tensors ({error})") from None


def load_checkpoint(folder, state):
    """Fill the tensors of `state`, a dict (nested, or with dotted names), in place from a checkpoint of train.py. Raises BadInput."""
    import torch.distributed.checkpoint as dcp                   # here, as it costs 50 MB that models without runs need not pay
    check_metadata(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")                        # one process needs no process group
            dcp.load(state, checkpoint_id=folder)
    except (OSError, dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise BadInput(f"checkpoint {folder} cannot be read: {reason.strip()}") from None
