"""Why is Ling fast? Every op of the model stands here twice: its definition in plain torch, and beside it the fast one.

    python kernels.py                       # parity and speed of every op on this machine, as a table
    LING_KERNELS=auto|torch|fused           # auto: fast where it applies; torch: definitions only; fused: never fall back

An op is called like a function. `op.reference` is its definition: short, differentiable by autograd, true on every device.
`@op.fused(when=...)` adds a fast twin; `when` sees the actual arguments, so the choice is made by capability and the first
twin that says yes runs. A GPU twin is one more registration in the op's block; no caller changes.

The twins below are for CPUs, where the rules are (two cores of an AMD EPYC, torch 2.13, 2026-11):
  - A matmul at 128 rows or more runs at full speed; everything else is memory traffic, so fewer and smaller passes win.
  - Passes over one expert's megabyte stay in cache. Over all experts at once they cost 1.3x with AVX2, nothing with AVX-512.
  - bf16 is emulated on most, tens of times slower than fp32: train in fp32.

Shapes: T tokens, D hidden, E experts, k chosen per token, F expert width, V vocabulary, B batch, S sequence, N heads, d head
width. A banner says: formula; dtypes; what autograd moves and what the twin moves; the measured gain (forward and backward,
fp32, the shapes of CASES).
"""
import functools
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

MODE = os.environ.get("LING_KERNELS", "auto")
if MODE not in ("auto", "torch", "fused"):
    raise ValueError(f"LING_KERNELS={MODE} is none of auto, torch, fused")
OPS = {}                                                        # name -> op
CASES = {}                                                      # name -> inputs for parity and speed: (scale, dtype) -> args


def op(reference):
    """Turn the definition of an op into an op: a function that runs the first fast twin whose predicate accepts the call."""
    twins = []

    @functools.wraps(reference)
    def call(*args):
        if MODE != "torch":
            for when, twin in twins:
                if when(*args):
                    return twin(*args)
            if MODE == "fused":
                raise RuntimeError(f"LING_KERNELS=fused, but {reference.__name__} has no fast twin for these inputs; "
                                   "LING_KERNELS=auto would run its definition")
        return reference(*args)

    def fused(when):
        return lambda twin: twins.append((when, twin)) or twin

    call.reference, call.fused, call.twins = reference, fused, twins
    OPS[reference.__name__] = call
    return call


def case(name):
    return lambda make: CASES.setdefault(name, make)


def on_cpu(x):
    """The CPU twins are eager code for float32 and float64; torch.compile and autocast see the definitions instead."""
    return (x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
            and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"))


def trains(x):
    return on_cpu(x) and torch.is_grad_enabled()


def infers(x):
    """Without gradients nothing is gained by a hand-written backward, and plain calls cost less than an autograd.Function."""
    return not torch.is_grad_enabled() and on_cpu(x)


# ----------------------------------------------------------------------------------------------------------------------
# linear: y = x W^T + b, in x's dtype. A matmul is torch's business, but for one row on a CPU: generation reads every weight for
# every token, and matrix-vector products (MKL's, on an AMD EPYC) read them at a third of the speed of memory. While W fits the
# cache, a product over all of it and a sum take less time: 0.5 to 0.7 of it up to a million weights, more beyond.

@op
def linear(x, weight, bias=None):
    """x (...,K), weight (N,K), bias (N,) or None -> (...,N)."""
    return F.linear(x, weight, bias)


def matvec(weight, x):
    """weight (N,K), x (K,) -> (N,)."""
    return torch.linalg.vecdot(weight, x) if weight.numel() <= 1 << 20 else torch.mv(weight, x)


@linear.fused(when=lambda x, weight, bias=None: x.numel() == x.shape[-1] and infers(x) and weight.dtype == x.dtype)
def _linear_one_row(x, weight, bias=None):
    y = matvec(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias)


linear.fused(when=lambda x, *_: on_cpu(x))(linear.reference)


@case("linear")
def _(scale=1, dtype=torch.float32):
    return torch.randn(4096 // scale, 256, dtype=dtype), torch.randn(512, 256, dtype=dtype) / 16, torch.randn(512, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. fp32 inside, result in x's dtype.
# Autograd keeps four intermediates and walks x about ten times; the twin saves x and one number per row. Backward is the
# native layer-norm kernel with mean 0, which subtracts mean(dy * w) per row; adding it back makes it exact. Gain: 1.5x to 2.1x.

@op
def rms_norm(x, weight, eps):
    """x (..., D), weight (D,) -> (..., D) in x's dtype."""
    h = x.float() if x.dtype != torch.float64 else x
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h.to(x.dtype) * weight).to(x.dtype)


@rms_norm.fused(when=lambda x, weight, eps: infers(x) and x.dtype == weight.dtype == torch.float32)
def _rms_norm(x, weight, eps):
    return (x * rstd_of(x, eps)).mul_(weight)


def rstd_of(x, eps):
    """1 / sqrt(mean(x^2) + eps) over the last dimension, (..., 1), in one pass over x."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


@rms_norm.fused(when=lambda x, weight, eps: trains(x) and weight.dtype == x.dtype)
class _RMSNorm(torch.autograd.Function):
    def __new__(cls, *args):
        return cls.apply(*args)

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = rstd_of(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_backward(dy, x, rstd, weight)
        return dx, dweight, None


def rms_backward(dy, x, rstd, weight=None):
    """Gradient of rms_norm through the native layer-norm kernel. Returns (dx, dweight)."""
    D, dy, x = x.shape[-1], dy.contiguous(), x.contiguous()
    dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(dy, x, [D], torch.zeros_like(rstd), rstd, weight, None,
                                                               [True, weight is not None, False])
    mean = dy.mean(-1, keepdim=True) if weight is None else (dy @ weight).unsqueeze(-1) / D
    return dx.addcmul_(rstd, mean), dweight


@case("rms_norm")
def _(scale=1, dtype=torch.float32):
    return torch.randn(4096 // scale, 256, dtype=dtype), torch.rand(256, dtype=dtype) + 0.5, 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# rope: QK-norm per head where there is one, then the rotation of the first r of d dims, half-split (dim i pairs with i + r/2):
# y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, as full-width passes: y = x * [cos cos 1] + swap(x) * [-sin sin 0] (slices of 32
# floats vectorise badly). Tables fp32, result in x's dtype. The twin folds the norm's weight into the tables, saves x and one
# number per head, and turns the gradient back by the same two passes. Gain: 1.4x to 1.6x.

def swap(x, r):
    """(..., d): exchange the two halves of the first r dims."""
    first, second, rest = x.split([r // 2, r // 2, x.shape[-1] - r], dim=-1)
    return torch.cat([second, first, rest], dim=-1)


@op
def rope(x, cos, sin, r, weight, eps):
    """x (B,S,N,d), cos and sin (S,d) fp32 with signs as above, weight (N,d) of the QK-norm or None -> (B,S,N,d)."""
    if weight is not None:
        x = rms_norm.reference(x, weight, eps)
    cos, sin = (t.detach().to(x.dtype).unsqueeze(1) for t in (cos, sin))                  # (S,1,d): one angle for all heads
    return x * cos + swap(x, r) * sin


@rope.fused(when=lambda x, *_: infers(x))
def _rope(x, cos, sin, r, weight, eps):
    x = x if weight is None else rms_norm(x, weight, eps)
    return (x * cos.unsqueeze(1)).addcmul_(swap(x, r), sin.unsqueeze(1))


@rope.fused(when=lambda x, *_: trains(x))
class _Rope(torch.autograd.Function):
    def __new__(cls, *args):
        return cls.apply(*args)

    @staticmethod
    def forward(ctx, x, cos, sin, r, weight, eps):
        cos, sin = (t.to(x.dtype).unsqueeze(1).expand(-1, *x.shape[2:]) for t in (cos, sin))  # (S,N,d)
        h, c, s, rstd, ctx.r = x, cos, sin, None, r
        if weight is not None:
            rstd = rstd_of(x, eps)
            h, c, s = x * rstd, cos * weight, sin * swap(weight, r)
        ctx.save_for_backward(x if weight is not None else None, rstd, cos, sin, weight)
        return (h * c).addcmul_(swap(h, r), s)

    @staticmethod
    def backward(ctx, dy):
        x, rstd, cos, sin, weight = ctx.saved_tensors
        dx = (dy * cos).addcmul_(swap(dy, ctx.r), sin, value=-1)                            # turned back
        if weight is None:
            return dx, None, None, None, None, None
        dweight = torch.linalg.vecdot((dx * rstd).flatten(0, 1), x.flatten(0, 1), dim=0)
        return rms_backward(dx * weight, x, rstd)[0], None, None, None, dweight, None


@case("rope")
def _(scale=1, dtype=torch.float32):
    S, r = 256 // scale, 32
    angle = torch.outer(torch.arange(S), 1e4 ** (-torch.arange(r // 2) / (r // 2)))
    cos, sin = (F.pad(table, (0, 64 - r), value=value) for table, value in
                ((angle.cos().repeat(1, 2), 1.0), (torch.cat([-angle.sin(), angle.sin()], 1), 0.0)))
    return torch.randn(16, S, 6, 64, dtype=dtype), cos, sin, r, torch.rand(6, 64, dtype=dtype) + 0.5, 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# attention: softmax(q k^T / sqrt(d) + causal mask) v, each kv head shared by H/KV query heads. Softmax in fp32. The queries
# are the last Sq of Sk positions (Sq < Sk only with a cache). Scores are S^2 per head, and SDPA never writes them. Gain: 1.5x.

@op
def attention(q, k, v):
    """q (B,Sq,H,d), k and v (B,Sk,KV,d) -> (B,Sq,H,d)."""
    repeat, Sq, Sk = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)          # [GQA] arXiv 2305.13245
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(Sq, Sk, dtype=torch.bool, device=q.device).triu(Sk - Sq + 1)
    probs = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs.to(q.dtype), v)


@attention.fused(when=lambda q, k, v: True)                                                  # SDPA exists on every device
def _sdpa(q, k, v):
    Sq, Sk = q.shape[1], k.shape[1]
    mask = None
    if 1 < Sq < Sk:                                                                          # is_causal would align top-left
        mask = torch.ones(Sq, Sk, dtype=torch.bool, device=q.device).tril(Sk - Sq)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < Sq == Sk, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


@case("attention")
def _(scale=1, dtype=torch.float32):
    B, S = 16 // scale, 256 // scale
    return tuple(torch.randn(B, S, heads, 64, dtype=dtype) for heads in (4, 2, 2))


# ----------------------------------------------------------------------------------------------------------------------
# swiglu: silu(gate) * up, the two halves of the last dimension [SwiGLU] arXiv 2002.05202 eq. 6. Result in the input's dtype.
# Autograd saves gate, up and silu(gate); the twin saves the input and writes both halves of its gradient in place. Gain: 1.1x, a third less memory.

@op
def swiglu(gate_up):
    """gate_up (..., 2F) -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


swiglu.fused(when=infers)(swiglu.reference)


@swiglu.fused(when=trains)
class _SwiGLU(torch.autograd.Function):
    def __new__(cls, *args):
        return cls.apply(*args)

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        return swiglu_backward(dy, gate_up, F.silu(gate_up.chunk(2, dim=-1)[0]))


def swiglu_backward(dy, gate_up, activation):
    """dy (..., F), gate_up (..., 2F), activation = silu(gate) (..., F), overwritten -> gradient (..., 2F)."""
    (gate, up), dx = gate_up.chunk(2, dim=-1), torch.empty_like(gate_up)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.mul(dy, activation, out=dup)
    torch.ops.aten.silu_backward.grad_input(torch.mul(dy, up, out=activation), gate, grad_input=dgate)
    return dx


@case("swiglu")
def _(scale=1, dtype=torch.float32):
    return torch.randn(4096 // scale, 2 * 128, dtype=dtype),


# ----------------------------------------------------------------------------------------------------------------------
# route: scores of all experts, the k chosen ones, and their weights. fp32 in and out.
#   Ling 1: s = softmax(l) over all E; top-k of s; w = s_chosen / sum(s_chosen) if norm_topk_prob         [Ling1]    
#   Ling 2: s = sigmoid(l); top-k of s + bias among the best groups; w = scale * s_chosen / sum(s_chosen)  [Ling2, DSv3 eq. 12-16]
# (T,E) is small on a CPU: about one percent of a step, so the definition serves. A GPU wants one kernel instead of fifteen.

@op
def route(logits, expert_bias, k, n_group, topk_group, score_function, norm_topk_prob, scale):
    """logits (T,E) fp32, expert_bias (E,) or None -> weights (T,k), experts (T,k) int64, scores (T,E)."""
    scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    # The bias enters the choice and nothing else: weights come from the raw scores, so it steers load without
    # distorting the output, and it gets no gradient [LossFree] arXiv 2408.15664.
    choice = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    if n_group > 1:                                                                          # keep the best groups of experts
        groups = choice.unflatten(-1, (n_group, -1))                                         # (T,G,E/G)
        group_score = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)           # (T,G): its two best [DSv3]
        kept = group_score.topk(topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(-1, kept, False)
        # -inf and not 0: with a negative bias a dropped expert at 0 would beat a kept one.
        choice = groups.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(-2)
    experts = choice.topk(k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, experts)
    if norm_topk_prob and k > 1:                                                             # k = 1 keeps its size: else no gradient
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, experts, scores


route.fused(when=lambda logits, *_: logits.device.type == "cpu")(route.reference)


@case("route")
def _(scale=1, dtype=torch.float32):
    return torch.randn(4096 // scale, 16, dtype=dtype), 0.1 * torch.randn(16, dtype=dtype), 4, 4, 2, "sigmoid", True, 2.5


# ----------------------------------------------------------------------------------------------------------------------
# experts: y_t = sum_j w_tj * down[e_tj] (silu(gate[e_tj] x_t) * (up[e_tj] x_t)), gate over up in one tensor [Ling1].
# Dropless: any number of rows per expert, none included. Weights fp32; the rest in x's dtype.
# One stable sort by expert, then expert by expert: gather, one gate_up matmul, SwiGLU times the routing weight, down matmul, add
# to the tokens' rows. Between forward and backward only x and the pre-activations live, 2F per row instead of about
# 2D + 6F; the backward gathers x again and recomputes the activation. The same Function on grouped_mm over all rows at once made
# a whole training step 3 % slower. Gain: 1.1x to 1.4x; 62 to 79 % of the bare matmuls' speed.

@op
def experts(x, weights, chosen, gate_up, down):
    """x (T,D), weights and chosen (T,k), gate_up (E,2F,D), down (E,D,F) -> (T,D)."""
    y = torch.zeros_like(x, dtype=weights.dtype)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(chosen == e)                                               # SYNC on a GPU
        h = F.linear(swiglu.reference(F.linear(x[token], gate_up[e])), down[e])
        y = y.index_add(0, token, h * weights[token, slot, None])
    return y.to(x.dtype)


@experts.fused(when=lambda x, weights, chosen, gate_up, down: len(x) == 1 and infers(x) and down.dtype == x.dtype)
def _experts_one_token(x, weights, chosen, gate_up, down):
    """Generation, batch 1: k matrix-vector products each way, which read the chosen experts' weights and nothing else."""
    chosen = chosen[0].tolist()
    h = swiglu(torch.stack([matvec(gate_up[e], x[0]) for e in chosen])).mul_(weights.T)                            # (k,F)
    return sum(matvec(down[e], h_) for e, h_ in zip(chosen, h.unbind())).unsqueeze(0)


def few_rows(x, weights, chosen, gate_up, down):
    return (x.device.type == "cpu" and x.dtype == down.dtype != torch.float64 and chosen.numel() <= 512 and not torch.is_grad_enabled()
            and x.shape[1] % 8 == down.shape[2] % 8 == 0 and not torch.compiler.is_compiling())


@experts.fused(when=few_rows)
def _experts_decode(x, weights, chosen, gate_up, down):
    """Generation: the loop's call overhead would dominate; grouped_mm is one call and reads the active experts only."""
    flat, order = chosen.flatten().sort()
    ends = torch.searchsorted(flat, torch.arange(gate_up.shape[0]), right=True, out_int32=True)
    h = F.grouped_mm(x.index_select(0, order // chosen.shape[1]), gate_up.transpose(1, 2), offs=ends)
    h = swiglu.reference(h) * weights.flatten().index_select(0, order).to(x.dtype).unsqueeze(-1)
    y = F.grouped_mm(h, down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add_(0, order // chosen.shape[1], y)


@experts.fused(when=lambda x, *_: on_cpu(x))
class _Experts(torch.autograd.Function):
    def __new__(cls, *args):
        return cls.apply(*args)

    @staticmethod
    def forward(ctx, x, weights, chosen, gate_up, down):
        flat = chosen.flatten()                                                              # (T*k,)
        order = torch.from_numpy(flat.to(torch.int16).numpy().argsort(kind="stable"))        # a radix sort: a tenth of torch's time
        counts, token = torch.bincount(flat, minlength=len(down)).tolist(), order // chosen.shape[1]
        w = weights.to(x.dtype).flatten().index_select(0, order).unsqueeze(-1)               # (T*k,1)
        pre, y = x.new_empty(len(order), gate_up.shape[1]), torch.zeros_like(x)
        for t, w_, pre_, gate_up_, down_ in zip(                                             # one expert: t (n,), pre_ (n,2F)
                *(rows.split(counts) for rows in (token, w, pre)), gate_up.mT.unbind(), down.mT.unbind()):
            torch.mm(x.index_select(0, t), gate_up_, out=pre_)
            gate, up = pre_.chunk(2, dim=1)
            y.index_add_(0, t, torch.mm(F.silu(gate).mul_(up).mul_(w_), down_))              # weight F columns, not D
        ctx.save_for_backward(x, w, order, pre, gate_up, down)
        ctx.counts, ctx.k, ctx.dtype = counts, chosen.shape[1], weights.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, order, pre, gate_up, down = ctx.saved_tensors
        token, dx, dw = order // ctx.k, torch.zeros_like(x), torch.empty_like(w)
        dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
        for t, w_, pre_, dw_, gate_up_, down_, dgate_up_, ddown_ in zip(
                *(rows.split(ctx.counts) for rows in (token, w, pre, dw.squeeze(1))), *(m.unbind() for m in (gate_up, down, dgate_up, ddown))):
            dye = dy.index_select(0, t)                                                      # (n,D)
            gate, up = pre_.chunk(2, dim=1)
            activation, dh = F.silu(gate), torch.mm(dye, down_)                              # (n,F); dh before the weight
            h = activation * up
            torch.linalg.vecdot(dh, h, out=dw_)
            torch.mm(dye.T, h.mul_(w_), out=ddown_)                                          # no rows: zeros
            dpre = swiglu_backward(dh.mul_(w_), pre_, activation)
            torch.mm(dpre.T, torch.index_select(x, 0, t, out=dye), out=dgate_up_)
            dx.index_add_(0, t, torch.mm(dpre, gate_up_, out=dye))
        dw = torch.empty_like(dw).index_copy_(0, order, dw).view(-1, ctx.k).to(ctx.dtype)
        return dx, dw, None, dgate_up, ddown


@case("experts")
def _(scale=1, dtype=torch.float32, E=16, k=4, D=256, width=128):
    T, skew = 4096 // scale, torch.linspace(0, 0.5, E)                                       # mildly unequal loads
    chosen = (torch.rand(T, E) + skew).topk(k, dim=1).indices
    return (torch.randn(T, D, dtype=dtype), torch.rand(T, k, dtype=dtype), chosen,
            torch.randn(E, 2 * width, D, dtype=dtype) / D ** 0.5, torch.randn(E, D, width, dtype=dtype) / width ** 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# linear_cross_entropy: sum over targets >= 0 of -log softmax(W x)[target]. Loss in fp32, gradients in the inputs' dtypes.
# The logits are the largest tensor of a step (4096 x 4096 x 4 B = 64 MiB here, 16.6 GB at Ling-lite's vocabulary and 4 x 8k
# tokens). The twin makes about 16 MiB of them at a time and turns each chunk into its gradient at once. Gain: 1.4x to 1.5x.
# NormHead [Ling1 eq. 4] divides W's columns by their norms (dim 0: what every release is made with), norm detached; dividing x
# instead is the same product and never copies W.

NORM_HEAD_EPS = 1e-7


def norm_head_scale(weight):
    """weight (V,D) -> (D,) fp32: what NormHead multiplies hidden channels with. No gradient, as in the official code."""
    return (torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.promote_types(weight.dtype, torch.float32))
            + NORM_HEAD_EPS).reciprocal()


@op
def linear_cross_entropy(x, weight, targets, norm_head):
    """x (T,D), weight (V,D), targets (T,) int64, negative = ignored -> 0-d sum of losses, fp32."""
    if norm_head:
        weight = weight / (torch.linalg.vector_norm(weight.detach(), dim=0) + NORM_HEAD_EPS)
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="sum")


@linear_cross_entropy.fused(when=lambda x, weight, targets, norm_head: on_cpu(x) and weight.dtype == x.dtype)
class _LinearCrossEntropy(torch.autograd.Function):
    def __new__(cls, *args):
        return cls.apply(*args)

    @staticmethod
    def forward(ctx, x, weight, targets, norm_head):
        (T, _), V = x.shape, weight.shape[0]
        scale = norm_head_scale(weight) if norm_head else None
        x = x * scale if norm_head else x
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        dx, dweight = torch.empty_like(x) if wants_x else None, torch.zeros_like(weight) if wants_weight else None
        loss, rows = x.new_zeros(()), max(128, (16 << 20) // (4 * V))                        # the logits of a chunk: 16 MiB
        for start in range(0, T, rows):
            chunk, t = slice(start, start + rows), targets[start:start + rows]
            counted, t = (t >= 0).to(x.dtype), t.clamp(min=0).unsqueeze(-1)
            logits = torch.mm(x[chunk], weight.T)                                            # (rows,V)
            at_target, top = logits.gather(1, t), logits.amax(1)
            probs = torch.softmax(logits, 1, out=logits)                                     # in place: a fresh 16 MiB is page faults
            # logsumexp from the largest probability (>= 1/V, so its log is exact enough) saves a pass of exp
            loss += (top - probs.amax(1).log() - at_target.squeeze(1)).dot(counted)
            if wants_x or wants_weight:
                probs.scatter_add_(1, t, torch.full_like(at_target, -1.0)).mul_(counted.unsqueeze(-1))
                if wants_x:
                    torch.mm(probs, weight, out=dx[chunk])
                if wants_weight:
                    dweight.addmm_(probs.T, x[chunk])
        if norm_head and wants_x:
            dx.mul_(scale)                                                                   # dweight has it through x
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return dx if dx is None else dx * dloss, dweight if dweight is None else dweight * dloss, None, None


@case("linear_cross_entropy")
def _(scale=1, dtype=torch.float32):
    T, V = 4096 // scale, 4096 // scale
    targets = torch.randint(-1, V, (T,))                                                     # some ignored
    return torch.randn(T, 256, dtype=dtype), torch.randn(V, 256, dtype=dtype), targets, True


# ----------------------------------------------------------------------------------------------------------------------
# parity and speed

def grads(fn, args):
    """Outputs and gradients of fn for a fixed cotangent, as a flat list; the inputs are detached copies."""
    args = [a.detach().clone().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else a for a in args]
    out = fn(*args)
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    inputs = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    return out + [g for g in torch.autograd.grad(out, inputs, cotangents, allow_unused=True) if g is not None]


def parity(name, scale=8):
    """(error of the op, error of its definition) in fp32, both against the definition in fp64: max|d| / max|exact|, worst of
    all outputs and gradients. A twin is right when its error is of the size of the definition's own rounding."""
    torch.manual_seed(0)
    args = CASES[name](scale)
    to64 = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    exact = grads(OPS[name].reference, to64)
    worst = lambda got: max(float((g - e).detach().abs().max() / e.detach().abs().max().clamp(min=1e-30)) for g, e in zip(got, exact, strict=True))
    return worst(grads(OPS[name], args)), worst(grads(OPS[name].reference, args))


def bench(fns, repeats=15):
    """Median milliseconds of each function, taken in turn (A B A B ...) so that a noisy neighbour hits all alike. Each timed
    call follows one of the same function that is not timed, so that caches hold what they would in a loop."""
    torch.ones(31 << 20, dtype=torch.uint8)       # freed at once: raises malloc's threshold as a model's first step does, so
    times = {name: [] for name in fns}            # that ops are timed and not the page faults of their small outputs
    for _ in range(repeats):
        for name, fn in fns.items():
            fn()
            start = time.perf_counter()
            fn()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def step(fn, args):
    """A callable that runs fn forward and backward once."""
    args = [a.detach().clone().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else a for a in args]
    inputs = [a for a in args if torch.is_tensor(a) and a.requires_grad]

    def run():
        out = fn(*args)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, inputs, run.cotangent if out.dim() else None, allow_unused=True)

    out = fn(*args)
    run.cotangent = torch.randn_like(out[0] if isinstance(out, tuple) else out)
    return run


def official_experts(x, weights, chosen, gate_up, down):
    """The official modelling file's training path, as a yardstick: one row per choice, a boolean mask per expert."""
    rows, flat = x.repeat_interleave(chosen.shape[1], dim=0), chosen.flatten()
    y = torch.empty_like(rows)
    for e in range(gate_up.shape[0]):
        gate, up = gate_up[e].chunk(2)
        h = rows[flat == e]
        y[flat == e] = F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down[e])
    return (y.unflatten(0, chosen.shape) * weights.unsqueeze(-1)).sum(1)


def bare_matmuls(x, weights, chosen, gate_up, down):
    """Only the matmuls of experts(), forward and backward, on equal loads and preallocated memory: the ceiling."""
    (E, width, D), n = gate_up.shape, chosen.numel() // gate_up.shape[0]
    rows, pre, h = x.new_ones(n, D), x.new_ones(n, width), x.new_ones(n, width // 2)
    out = [torch.empty_like(t) for t in (pre, rows, h, down[0], gate_up[0], rows)]

    def run():
        for e in range(E):
            torch.mm(rows, gate_up[e].T, out=out[0]), torch.mm(h, down[e].T, out=out[1])
        for e in range(E):
            torch.mm(rows, down[e], out=out[2]), torch.mm(rows.T, h, out=out[3])
            torch.mm(pre.T, rows, out=out[4]), torch.mm(pre, gate_up[e], out=out[5])
    return run


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, LING_KERNELS={MODE}; fp32, forward and backward, "
          "medians taken in turn\n")
    print(f"{'op':22}{'error':>10}{'definition':>12}   {'ms':>8}{'definition':>12}{'gain':>8}")
    for name, fn in OPS.items():
        error, own = parity(name)
        torch.manual_seed(0)
        args = CASES[name]()
        ms = bench({"op": step(fn, args), "reference": step(fn.reference, args)})
        print(f"{name:22}{error:10.1e}{own:12.1e}   {ms['op']:8.2f}{ms['reference']:12.2f}{ms['reference'] / ms['op']:7.2f}x",
              flush=True)
    args = CASES["experts"]()
    ms = bench({"op": step(experts, args), "bare": bare_matmuls(*args), "official": step(official_experts, args)})
    flops = 18 * args[2].numel() * args[0].shape[1] * args[4].shape[2]                       # 3 matrices, 2 flops, 3 passes
    print(f"\nexperts: {flops / ms['op'] / 1e6:.0f} GFLOP/s, {100 * ms['bare'] / ms['op']:.0f} % of the speed of its bare matmuls "
          f"({flops / ms['bare'] / 1e6:.0f} GFLOP/s), {ms['official'] / ms['op']:.2f}x the official expert loop")


if __name__ == "__main__":
    sys.exit(main())
