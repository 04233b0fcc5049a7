"""Why is Ling fast? Every op of the model stands here twice: its definition in plain torch, and beside it the fast one.

    python kernels.py                       # parity and speed of every op on this machine, as a table
    python kernels.py --bench               # on a GPU: every kernel against its goal, its rivals and its floor; decoding, whole models
    python kernels.py --compile-check       # registers and spills of every GPU kernel, on a machine without a GPU
    python kernels.py --fingerprint a.json  # ten steps of two tiny models, the first op by op [--dtype bfloat16] [--device NAME]
    python kernels.py --compare a.json b.json   # two machines: the first op, layer and direction that more than rounding tells apart
    LING_KERNELS=auto|torch|fused           # auto: fast where it applies; torch: definitions only; fused: never fall back

An op is called like a function. `op.reference` is its definition: short, differentiable by autograd, true on every device.
`@op.fused(when=...)` adds a fast twin; `when` sees the actual arguments, so the choice is made by capability and the first
twin that says yes runs. There are two sets of twins: eager code for CPUs, and Triton for GPUs, whose kernels the test suite runs in
Triton's interpreter and --compile-check compiles. No kernel has run on a GPU yet: what a banner says of one is counted, not measured.

The rules on a CPU (two cores of an AMD EPYC, torch 2.13, 2026-11):
  - A matmul at 128 rows or more runs at full speed; everything else is memory traffic, so fewer and smaller passes win.
  - Passes over one expert's megabyte stay in cache. Over all experts at once they cost 1.3x with AVX2, nothing with AVX-512.
  - bf16 is emulated on most, tens of times slower than fp32: train in fp32.

Shapes: T tokens, D hidden, E experts, k chosen per token, F expert width, V vocabulary, B batch, S sequence, N heads, d head
width. A banner says: formula; dtypes; what autograd moves and what the twin moves; the measured gain (forward and backward,
fp32, the shapes of CASES).
"""
import argparse
import collections
import functools
import inspect
import json
import math
import os
import platform
import statistics
import sys
import time
import types
import zlib

import torch
import torch.nn.functional as F

try:                                                            # comes with torch where there is a GPU
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:
    triton, tl, jit = None, types.SimpleNamespace(constexpr=None), lambda kernel: kernel

MODE = os.environ.get("LING_KERNELS", "auto")
if MODE not in ("auto", "torch", "fused"):
    raise ValueError(f"LING_KERNELS={MODE} is none of auto, torch, fused")
OPS = {}                                                        # name -> op
CASES = {}                                                      # name -> inputs for parity and speed: (scale, dtype) -> args
RECORD = None                                                   # while --fingerprint watches: called in place of every op, with op and args


def op(reference):
    """Turn the definition of an op into an op: a function that runs the first fast twin whose predicate accepts the call."""
    twins = []

    @functools.wraps(reference)
    def call(*args, **named):
        if named:
            bound = inspect.signature(reference).bind(*args, **named)
            bound.apply_defaults()
            args = bound.args
        if RECORD is not None:
            return RECORD(call, args)
        if MODE != "torch":
            for when, twin in twins:
                if when(*args):
                    return twin(*args)
            if MODE == "fused":
                raise RuntimeError(f"LING_KERNELS=fused, but {reference.__name__} has no fast twin for these inputs; "
                                   "LING_KERNELS=auto would run its definition")
        return reference(*args)

    def fused(when):                                            # a twin is a function, or an autograd.Function
        return lambda twin: twins.append((when, getattr(twin, "apply", twin))) or twin

    call.reference, call.fused, call.twins = reference, fused, twins
    OPS[reference.__name__] = call
    return call


def case(name):
    return lambda make: CASES.setdefault(name, make)


def on_cpu(x):
    """The CPU twins are eager code for float32 and float64; torch.compile (but see generates_compiled) and autocast see the definitions."""
    return (x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
            and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"))


def trains(x):
    return on_cpu(x) and torch.is_grad_enabled()


def infers(x):
    """Without gradients nothing is gained by a hand-written backward, and plain calls cost less than an autograd.Function."""
    return not torch.is_grad_enabled() and on_cpu(x)


def generates_compiled(x):
    """Under torch.compile on a CPU without gradients: sample.py --compile, and the sample at the end of train.py --compile."""
    return (torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu"))


# ----------------------------------------------------------------------------------------------------------------------
# Triton, for the GPU twins: one source for NVIDIA and AMD. No atomics on floats, so equal inputs give equal bits; no sync with the
# host; no padding. Positions in memory have 64 bits wherever rows times columns enter. Sums in fp32, one rounding at the end.

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"         # the test suite: kernels run on a CPU, slowly, with small tiles

# Tiles of the grouped matmuls: (least rows per expert, BM rows, BN columns, BK depth, warps, stages), the first that applies. A
# static table: no autotuning pauses. Chosen by what spills no register in bf16 (--compile-check); not yet measured on a GPU.
TILES = {
    "hopper": {"up": ((384, 128, 128, 64, 8, 3), (0, 64, 64, 64, 4, 3)),
               "matmul": ((384, 128, 256, 64, 8, 3), (0, 64, 128, 64, 4, 3)),
               "down_backward": ((384, 128, 128, 64, 8, 3), (0, 64, 64, 64, 4, 3)),
               "weight_grad": ((0, 128, 256, 64, 8, 3),)},
    "ampere": {"up": ((384, 128, 64, 64, 8, 3), (0, 64, 64, 64, 4, 3)),
               "matmul": ((384, 128, 128, 64, 8, 3), (0, 64, 128, 64, 4, 3)),
               "down_backward": ((384, 128, 64, 64, 8, 3), (0, 64, 64, 64, 4, 3)),
               "weight_grad": ((0, 128, 128, 32, 8, 3),)},
    "amd": {"up": ((0, 64, 64, 64, 4, 2),), "matmul": ((0, 64, 128, 64, 4, 2),), "down_backward": ((0, 64, 64, 64, 4, 2),),
            "weight_grad": ((0, 128, 128, 32, 8, 2),)},         # 64 KB of shared memory
}


@functools.cache
def family():
    """Row of TILES for the GPU at hand: Hopper's also for B200, Ampere's for RTX 50, which has as little shared memory."""
    return "amd" if torch.version.hip else "hopper" if (9, 0) <= torch.cuda.get_device_capability() < (12, 0) else "ampere"


def tile(kernel, rows, dtype):
    """Tile of a grouped matmul with so many rows per expert, as keyword arguments of its launch."""
    if INTERPRETED:
        return dict(BM=16, BN=32, BK=16)
    row = "ampere" if family() == "hopper" and dtype.itemsize == 4 else family()             # Hopper's spill where no tensor core helps
    _, BM, BN, BK, warps, stages = next(entry for entry in TILES[row][kernel] if rows >= entry[0])
    return dict(BM=BM, BN=BN, BK=BK * 2 // dtype.itemsize, num_warps=warps, num_stages=stages)    # fp32 takes twice the shared memory


def launch(kernel, grid, *args, **constants):
    """The one place where kernels start; --compile-check puts its compiler here, so that it checks just what runs."""
    with torch.cuda.device_of(args[0]):                         # Triton launches on the current device
        kernel[grid](*args, **constants)


def on_gpu(x):
    """Where Triton runs. torch.compile sees the definitions, which its own compiler fuses."""
    return (triton is not None and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not torch.compiler.is_compiling())


def autocast(x):
    """What F.linear does to its inputs under autocast, which leaves hand-written Functions alone."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    return x.to(dtype)                                          # .to(None) changes nothing


def pow2(n):
    return 1 << (n - 1).bit_length()


def cdiv(a, b):
    return -(-a // b)


# ----------------------------------------------------------------------------------------------------------------------
# linear: y = x W^T + b, in x's dtype. A matmul is torch's business, but for a few rows on a CPU: generation reads every weight for
# every token, and matrix-vector products (MKL's, on an AMD EPYC) read them at a third of the speed of memory. While W fits the
# cache, a product over all of it and a sum take less time: 0.5 to 0.7 of it up to a million weights, more beyond.
# Time it over more matrices than the cache holds (one thread): 256 x 256 takes 31 us as a matvec and 20 so; again from L2, 5 and 10.
# Smaller ones than 32,768 weights belong to models that live in the cache, where the matvec is the quicker. Two to eight rows take
# 0.3 to 0.7 of the time as columns, (W x^T)^T: 2, 4 and 8 through 4096 x 256 took 797, 800 and 619 us, now 212, 229 and 428 (two threads).
# Of 2,048 columns, eight rows take 1.4 to 1.8 times as long so on one thread.

@op
def linear(x, weight, bias=None):
    """x (...,K), weight (N,K), bias (N,) or None -> (...,N)."""
    return F.linear(x, weight, bias)


def matvec(weight, x):
    """weight (N,K), x (K,) -> (N,)."""
    product_and_sum = torch.compiler.is_compiling() or 1 << 15 <= weight.numel() <= 1 << 20
    return torch.linalg.vecdot(weight, x) if product_and_sum else torch.mv(weight, x)


@linear.fused(when=lambda x, weight, bias=None: x.numel() == x.shape[-1] and weight.dtype == x.dtype
              and (infers(x) or generates_compiled(x)))
def _linear_one_row(x, weight, bias=None):
    y = matvec(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias)


@linear.fused(when=lambda x, weight, bias=None: 0 < x.numel() <= 8 * x.shape[-1] and x.shape[-1] <= 1024 and weight.numel() >= 1 << 17
              and weight.dtype == x.dtype and (infers(x) or generates_compiled(x)))
def _linear_few_rows(x, weight, bias=None):
    y = (weight @ x.reshape(-1, x.shape[-1]).mT).mT.contiguous().view(*x.shape[:-1], -1)     # or compiled SDPA is slow
    return y if bias is None else y.add_(bias)


linear.fused(when=lambda *_: True)(linear.reference)                                         # torch's matmul is the fast path


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


@rms_norm.fused(when=lambda x, weight, eps: on_gpu(x))
def _rms_norm_gpu(x, weight, eps):
    with torch.autocast(x.device.type, enabled=False):          # torch has the kernel, but for one dtype, and autocast's is fp32
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


@case("rms_norm")
def _(scale=1, dtype=torch.float32):
    return torch.randn(4096 // scale, 256, dtype=dtype), torch.rand(256, dtype=dtype) + 0.5, 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# rope: QK-norm per head where there is one, then the rotation of the first r of d dims, half-split (dim i pairs with i + r/2):
# y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, as full-width passes: y = x * [cos cos 1] + swap(x) * [-sin sin 0] (slices of 32
# floats vectorise badly). Tables fp32, result in x's dtype. The twin folds the norm's weight into the tables, saves x and one
# number per head, and turns the gradient back by the same two passes. Gain: 1.4x to 1.6x. GPU: one kernel each way reads the
# heads where the projection left them and keeps nothing but them.

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


@jit
def rope_kernel(x, cos, sin, weight, y, tokens, S, N, stride, eps, d: tl.constexpr, dp: tl.constexpr, r: tl.constexpr, NORM: tl.constexpr,
                BT: tl.constexpr):
    """BT tokens of one head: QK-norm, then the rotation. x's tokens are `stride` apart."""
    t, head, c = tl.program_id(0) * BT + tl.arange(0, BT)[:, None], tl.program_id(1), tl.arange(0, dp)[None, :]
    ok, partner = (t < tokens) & (c < d), tl.where(c < r // 2, c + r // 2, tl.where(c < r, c - r // 2, c))
    xs = x + t.to(tl.int64) * stride + head * d
    a, b = tl.load(xs + c, mask=ok, other=0.0).to(tl.float32), tl.load(xs + partner, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(a * a, 1, keep_dims=True) / d + eps)
        a *= rstd * tl.load(weight + head * d + c, mask=c < d, other=0.0).to(tl.float32)
        b *= rstd * tl.load(weight + head * d + partner, mask=c < d, other=0.0).to(tl.float32)
    angle = (t % S) * d + c
    out = a * tl.load(cos + angle, mask=ok, other=0.0) + b * tl.load(sin + angle, mask=ok, other=0.0)
    tl.store(y + (t.to(tl.int64) * N + head) * d + c, out, mask=ok)


@jit
def rope_backward_kernel(dy, x, cos, sin, weight, dx, dweight, tokens, S, N, stride, eps, d: tl.constexpr, dp: tl.constexpr,
                         r: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr):
    """Turned back, then through the norm; dweight (token blocks, N, d) holds one partial sum per program."""
    t, head, c = tl.program_id(0) * BT + tl.arange(0, BT)[:, None], tl.program_id(1), tl.arange(0, dp)[None, :]
    ok, partner = (t < tokens) & (c < d), tl.where(c < r // 2, c + r // 2, tl.where(c < r, c - r // 2, c))
    at, angle = (t.to(tl.int64) * N + head) * d, (t % S) * d + c
    g = tl.load(dy + at + c, mask=ok, other=0.0).to(tl.float32) * tl.load(cos + angle, mask=ok, other=0.0)
    g -= tl.load(dy + at + partner, mask=ok, other=0.0).to(tl.float32) * tl.load(sin + angle, mask=ok, other=0.0)
    if NORM:
        h = tl.load(x + t.to(tl.int64) * stride + head * d + c, mask=ok, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / d + eps)
        h *= rstd
        tl.store(dweight + (tl.program_id(0) * N + head) * d + c, tl.sum(g * h, 0, keep_dims=True), mask=c < d)
        g *= tl.load(weight + head * d + c, mask=c < d, other=0.0).to(tl.float32)
        g = rstd * (g - h * (tl.sum(g * h, 1, keep_dims=True) / d))
    tl.store(dx + at + c, g, mask=ok)


@rope.fused(when=lambda x, *_: on_gpu(x))
class _RopeGPU(torch.autograd.Function):
    BT = 4 if INTERPRETED else 32                               # tokens of a program

    @staticmethod
    def launch(kernel, tensors, x, r, weight, eps):
        (B, S, N, d), BT = x.shape, _RopeGPU.BT
        launch(kernel, (cdiv(B * S, BT), N), *tensors, B * S, S, N, x.stride(1), eps, d=d, dp=pow2(d), r=r, NORM=weight is not None, BT=BT)

    @staticmethod
    def forward(ctx, x, cos, sin, r, weight, eps):
        if x.stride() != (x.shape[1] * x.stride(1), x.stride(1), x.shape[3], 1):             # else a view of the fused projection
            x = x.contiguous().view(x.shape)                     # view: strides of its shape, also of a dimension of size 1
        ctx.save_for_backward(x, cos, sin, weight)
        ctx.r, ctx.eps, y = r, eps, x.new_empty(x.shape)
        _RopeGPU.launch(rope_kernel, (x, cos, sin, weight, y), x, r, weight, eps)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, cos, sin, weight = ctx.saved_tensors
        dx, dweight = x.new_empty(x.shape), None
        if weight is not None:
            dweight = x.new_empty(cdiv(x.shape[0] * x.shape[1], _RopeGPU.BT), *weight.shape, dtype=torch.float32)
        _RopeGPU.launch(rope_backward_kernel, (dy.contiguous(), x, cos, sin, weight, dx, dweight), x, ctx.r, weight, ctx.eps)
        return dx, None, None, None, dweight if weight is None else dweight.sum(0).to(weight.dtype), None


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
    Sq, Sk = q.shape[1], k.shape[1]
    return attend(q, k, v, torch.ones(Sq, Sk, dtype=torch.bool, device=q.device).triu(Sk - Sq + 1))


def attend(q, k, v, future):
    """The definition, for any mask: future (Sq,Sk) or (B,1,Sq,Sk), true where a query must not look."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)          # [GQA] arXiv 2305.13245
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    probs = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs.to(q.dtype), v)


@attention.fused(when=lambda q, k, v: True)                                                  # SDPA exists on every device
def _sdpa(q, k, v):
    (B, Sq, H, d), Sk, KV = q.shape, k.shape[1], k.shape[2]
    if Sq == 1:      # decoding: heads that share keys are as good as queries in a row, and each key is read once (up to 1.8x on a CPU)
        return F.scaled_dot_product_attention(q.reshape(B, KV, H // KV, d), k.transpose(1, 2), v.transpose(1, 2)).reshape(q.shape)
    mask = None
    if Sq < Sk:                                                                              # is_causal would align top-left
        mask = torch.ones(Sq, Sk, dtype=torch.bool, device=q.device).tril(Sk - Sq)
    if on_gpu(q) and H != KV and (mask is not None or q.dtype == torch.float32):             # flash takes neither, the next kernel no
        k, v = (x.repeat_interleave(H // KV, dim=2) for x in (k, v))                         # shared heads: left is one that writes scores
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=Sq == Sk, enable_gqa=H != k.shape[1])
    return y.transpose(1, 2)


@case("attention")
def _(scale=1, dtype=torch.float32):
    B, S = 16 // scale, 256 // scale
    return tuple(torch.randn(B, S, heads, 64, dtype=dtype) for heads in (4, 2, 2))


# ----------------------------------------------------------------------------------------------------------------------
# attention_by_table: attention in generation, where each request's keys and values lie wherever a shared buffer had room (sample.py).
# Softmax in fp32. Reading keys and values is all there is to it (2 KB a position and layer at Ling-mini-2.0), and for SDPA, which wants
# rows, they are read, written and read again. GPU: a kernel reads them where they are, once for all the heads that share them. A
# request's positions are cut into parts, which a second kernel joins (Flash-Decoding): one program for each request and key head would
# leave most of a GPU idle. Shapes follow from the table's and lengths are read on the device, as a CUDA graph needs it. Not
# yet measured on a GPU.

@op
def attention_by_table(q, keys, values, table, at):
    """q (N,n,H,d): the newest n tokens of N requests; keys and values (slots,KV,d); table (N,S) int64, the slot of each position of a
    request; at (N,n) int64, the position of each query, which sees those up to its own -> (N,n,H,d)."""
    future = torch.arange(table.shape[1], device=q.device) > at[:, None, :, None]          # (N,1,n,S)
    return attend(q, keys[table], values[table], future)


@jit
def attend_kernel(q, keys, values, table, at, out, weight, n, S, part, scale, H: tl.constexpr, KV: tl.constexpr, d: tl.constexpr,
                  dp: tl.constexpr, RP: tl.constexpr, BS: tl.constexpr):
    """One part of a request's positions, for the n * H / KV queries that share a key head: their mean value by softmax, and the log of
    its sum."""
    request, head, split, requests = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2), tl.num_programs(0)
    r, c, G = tl.arange(0, RP), tl.arange(0, dp), H // KV
    token, ok, cols = request * n + r // G, r < n * G, (c < d)[None, :]
    row = token * H + head * G + r % G                                                       # of q and of out
    queries = tl.load(q + row[:, None] * d + c[None, :], mask=ok[:, None] & cols, other=0.0)
    last = tl.load(at + token, mask=ok, other=-1)
    end = tl.minimum((split + 1) * part, tl.max(last, 0) + 1)
    top, total, acc = tl.full((RP,), -1e30, tl.float32), tl.zeros((RP,), tl.float32), tl.zeros((RP, dp), tl.float32)
    for start in range(split * part, end, BS):
        s = start + tl.arange(0, BS)
        slot = tl.load(table + request * S + s, mask=s < end, other=0)
        where, there = (slot[:, None] * KV + head) * d + c[None, :], (s < end)[:, None] & cols
        scores = tl.dot(queries, tl.trans(tl.load(keys + where, mask=there, other=0.0)), input_precision="ieee") * scale     # (RP,BS)
        scores = tl.where(s[None, :] <= last[:, None], scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp(scores - new[:, None]), tl.exp(top - new)                         # zeros for a query that sees nothing of it
        v = tl.load(values + where, mask=there, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top, total = new, total * shrink + tl.sum(p, 1)
    row += split.to(tl.int64) * requests * n * H
    tl.store(out + row[:, None] * d + c[None, :], acc / tl.maximum(total, 1e-30)[:, None], mask=ok[:, None] & cols)
    tl.store(weight + row, top + tl.log(tl.maximum(total, 1e-30)), mask=ok)


@jit
def join_kernel(out, weight, y, parts, d, dp: tl.constexpr, PP: tl.constexpr):
    """One query head: its parts' values, weighted by softmax."""
    row, rows, i, c = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, PP), tl.arange(0, dp)
    w = tl.load(weight + i * rows + row, mask=i < parts, other=-float("inf"))
    w = tl.exp(w - tl.max(w, 0))
    each = tl.load(out + (i[:, None] * rows + row) * d + c[None, :], mask=(i < parts)[:, None] & (c < d)[None, :], other=0.0)
    tl.store(y + row * d + c, tl.sum(w[:, None] * each, 0) / tl.sum(w, 0), mask=c < d)


@attention_by_table.fused(when=lambda q, *_: on_gpu(q) and not torch.is_grad_enabled())
def _attention_by_table_gpu(q, keys, values, table, at):
    (N, n, H, d), S, KV, BS = q.shape, table.shape[1], keys.shape[1], 64 if q.dtype.itemsize == 2 and not INTERPRETED else 16
    q, keys, values, table, at = (x.contiguous() for x in (q, keys, values, table, at))
    parts = min(32, max(1, 256 // (N * KV)), cdiv(S, 2 * BS))                                # about 256 programs, of two blocks at least
    part = cdiv(cdiv(S, parts), BS) * BS
    parts, y = cdiv(S, part), torch.empty_like(q)
    out, weight = q.new_empty(parts, *q.shape, dtype=torch.float32), q.new_empty(parts, N, n, H, dtype=torch.float32)
    RP = max(16, pow2(n * H // KV))                                                          # tl.dot takes no less
    launch(attend_kernel, (N, KV, parts), q, keys, values, table, at, out, weight, n, S, part, d ** -0.5, H=H, KV=KV, d=d,
           dp=max(16, pow2(d)), RP=RP, BS=BS, num_warps=4 if RP * q.dtype.itemsize <= 64 else 8, num_stages=2)
    launch(join_kernel, (N * n * H,), out, weight, y, parts, d, dp=pow2(d), PP=pow2(parts))
    return y


@attention_by_table.fused(when=lambda *_: True)
def _attention_by_copy(q, keys, values, table, at):
    seen = torch.arange(table.shape[1], device=q.device) <= at[:, None, :, None]             # (N,1,n,S)
    q, k, v = (x.transpose(1, 2) for x in (q, keys[table], values[table]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@case("attention_by_table")
def _(scale=1, dtype=torch.float32):
    N, S = 64 // scale, 512 // scale
    table, at = torch.randperm(N * S).view(N, S), S // 2 - 1 + torch.arange(N)[:, None]
    return torch.randn(N, 1, 4, 64, dtype=dtype), *(torch.randn(N * S, 2, 64, dtype=dtype) for _ in range(2)), table, at


# ----------------------------------------------------------------------------------------------------------------------
# swiglu: silu(gate) * up, the two halves of the last dimension [SwiGLU] arXiv 2002.05202 eq. 6. Result in the input's dtype.
# Autograd saves gate, up and silu(gate); the twin saves the input and writes both halves of its gradient in place. Gain: 1.1x, a third
# less memory. GPU: one pass each way.

@op
def swiglu(gate_up):
    """gate_up (..., 2F) -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


swiglu.fused(when=infers)(swiglu.reference)


@swiglu.fused(when=trains)
class _SwiGLU(torch.autograd.Function):
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


@jit
def swiglu_kernel(gate_up, y, N, F, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = i + i // F * F                                                                      # row * 2F + column
    gate = tl.load(gate_up + at, mask=i < N, other=0.0).to(tl.float32)
    tl.store(y + i, gate * tl.sigmoid(gate) * tl.load(gate_up + at + F, mask=i < N, other=0.0).to(tl.float32), mask=i < N)


@jit
def swiglu_backward_kernel(dy, gate_up, dx, N, F, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = i + i // F * F
    gate = tl.load(gate_up + at, mask=i < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + F, mask=i < N, other=0.0).to(tl.float32)
    dz, s = tl.load(dy + i, mask=i < N, other=0.0).to(tl.float32), tl.sigmoid(gate)
    tl.store(dx + at, dz * up * s * (1 + gate * (1 - s)), mask=i < N)
    tl.store(dx + at + F, dz * gate * s, mask=i < N)


@swiglu.fused(when=lambda x: on_gpu(x))
class _SwiGLUGPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        launch(swiglu_kernel, (cdiv(y.numel(), 1024),), gate_up, y, y.numel(), y.shape[-1], BLOCK=1024)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        dx = torch.empty_like(gate_up)
        launch(swiglu_backward_kernel, (cdiv(dy.numel(), 1024),), dy.contiguous(), gate_up, dx, dy.numel(), dy.shape[-1], BLOCK=1024)
        return dx


@case("swiglu")
def _(scale=1, dtype=torch.float32):
    return torch.randn(4096 // scale, 2 * 128, dtype=dtype),


# ----------------------------------------------------------------------------------------------------------------------
# route: scores of all experts, the k chosen ones, and their weights. fp32 in and out.
#   Ling 1: s = softmax(l) over all E; top-k of s; w = s_chosen / sum(s_chosen) if norm_topk_prob         [Ling1]
#   Ling 2: s = sigmoid(l); top-k of s + bias among the best groups; w = scale * s_chosen / sum(s_chosen)  [Ling2, DSv3 eq. 12-16]
# (T,E) is small on a CPU: about one percent of a step, so the definition serves. GPU: one kernel each way instead of fifteen launches,
# a few tokens a program, all experts in registers; the backward is the closed form from scores and choice.

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


@jit
def route_kernel(logits, bias, weights, chosen, scores, T, scale, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
                 GROUPS: tl.constexpr, GP: tl.constexpr, KEPT: tl.constexpr, SOFTMAX: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
                 BT: tl.constexpr):
    t, e = tl.program_id(0) * BT + tl.arange(0, BT)[:, None], tl.arange(0, EP)[None, :]
    at, ok = t.to(tl.int64) * E + e, (t < T) & (e < E)
    l = tl.load(logits + at, mask=ok, other=-float("inf"))
    if SOFTMAX:
        l = tl.exp(l - tl.where(t < T, tl.max(l, 1, keep_dims=True), 0.0))
        s = l / tl.where(t < T, tl.sum(l, 1, keep_dims=True), 1.0)
    else:
        s = tl.sigmoid(l)
    tl.store(scores + at, s, mask=ok)
    choice = s + tl.load(bias + e, mask=e < E, other=0.0) if BIAS else s
    choice = tl.where(ok, tl.where(choice == choice, choice, -1e30), -float("inf"))          # of NaN, argmax may name an expert past E
    if GROUPS > 1:
        group, g = e // (E // GROUPS), tl.arange(0, GP)[None, :]
        group_score = tl.full((BT, GP), -float("inf"), tl.float32)
        for i in tl.static_range(GROUPS):
            members = tl.where(group == i, choice, -float("inf"))
            best = tl.max(members, 1, keep_dims=True)
            if E > GROUPS:
                first = tl.argmax(members, 1, keep_dims=True)
                best += tl.max(tl.where(e == first, -float("inf"), members), 1, keep_dims=True)
            group_score = tl.where(g == i, best, group_score)
        kept = tl.zeros((BT, EP), tl.int1)
        for i in tl.static_range(KEPT):
            top = tl.argmax(group_score, 1, keep_dims=True)
            kept = kept | (group == top)
            group_score = tl.where(g == top, -float("inf"), group_score)
        choice = tl.where(kept, choice, -float("inf"))
    j, w, total = tl.arange(0, KP)[None, :], tl.zeros((BT, KP), tl.float32), tl.zeros((BT, 1), tl.float32)
    for i in tl.static_range(K):
        top = tl.argmax(choice, 1, keep_dims=True)
        picked = tl.sum(tl.where(e == top, s, 0.0), 1, keep_dims=True)
        tl.store(chosen + t.to(tl.int64) * K + i, top.to(tl.int64), mask=t < T)
        w, total, choice = tl.where(j == i, picked, w), total + picked, tl.where(e == top, -float("inf"), choice)
    if NORM:
        w = w / (total + 1e-20)
    tl.store(weights + t.to(tl.int64) * K + j, w * scale, mask=(t < T) & (j < K))


@jit
def route_backward_kernel(dweights, dscores, chosen, scores, dlogits, T, scale, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr,
                          SOFTMAX: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr):
    t, e = tl.program_id(0) * BT + tl.arange(0, BT)[:, None], tl.arange(0, EP)[None, :]
    at, pair, ok = t.to(tl.int64) * E + e, t.to(tl.int64) * K, (t < T) & (e < E)
    s, ds = tl.load(scores + at, mask=ok, other=0.0), tl.load(dscores + at, mask=ok, other=0.0)
    total, dot = tl.zeros((BT, 1), tl.float32), tl.zeros((BT, 1), tl.float32)
    if NORM:
        for i in tl.static_range(K):
            picked = tl.sum(tl.where(e == tl.load(chosen + pair + i, mask=t < T, other=0), s, 0.0), 1, keep_dims=True)
            total, dot = total + picked, dot + picked * tl.load(dweights + pair + i, mask=t < T, other=0.0)
        total += 1e-20
    for i in tl.static_range(K):
        dw = tl.load(dweights + pair + i, mask=t < T, other=0.0)
        if NORM:
            dw = (dw - dot / total) / total
        ds += tl.where(e == tl.load(chosen + pair + i, mask=t < T, other=0), dw * scale, 0.0)
    dl = s * (ds - tl.sum(ds * s, 1, keep_dims=True)) if SOFTMAX else ds * s * (1 - s)
    tl.store(dlogits + at, dl, mask=ok)


@route.fused(when=lambda logits, *_: on_gpu(logits))
class _RouteGPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, expert_bias, k, n_group, topk_group, score_function, norm_topk_prob, scale):
        (T, E), logits = logits.shape, logits.contiguous()
        weights, scores = logits.new_empty(T, k), torch.empty_like(logits)
        chosen = torch.empty(T, k, dtype=torch.int64, device=logits.device)
        ctx.constants = dict(E=E, EP=pow2(E), K=k, SOFTMAX=score_function == "softmax", NORM=norm_topk_prob and k > 1, BT=4)
        launch(route_kernel, (cdiv(T, 4),), logits, expert_bias, weights, chosen, scores, T, scale, KP=pow2(k), GROUPS=n_group,
               GP=pow2(n_group), KEPT=topk_group, BIAS=expert_bias is not None, **ctx.constants)
        ctx.save_for_backward(chosen, scores)
        ctx.scale = scale
        ctx.mark_non_differentiable(chosen)
        return weights, chosen, scores

    @staticmethod
    def backward(ctx, dweights, _, dscores):
        chosen, scores = ctx.saved_tensors
        dlogits, T = torch.empty_like(scores), len(scores)
        launch(route_backward_kernel, (cdiv(T, 4),), dweights.contiguous(), dscores.contiguous(), chosen, scores, dlogits, T, ctx.scale,
               **ctx.constants)
        return dlogits, *[None] * 7


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
def experts(x, weights, chosen, gate_up, down, shared=None):
    """x (T,D), weights and chosen (T,k), gate_up (E,2F,D), down (E,D,F), shared (T,D): what the shared experts add, or None -> (T,D)."""
    wide = torch.promote_types(x.dtype, weights.dtype)
    y = torch.zeros_like(x, dtype=wide) if shared is None else shared.to(wide)
    for e, (gate_up_, down_) in enumerate(zip(gate_up.unbind(), down.unbind())):             # gate_up[e] would cost E gradients of its size
        token, slot = torch.where(chosen == e)                                               # SYNC on a GPU
        h = F.linear(swiglu.reference(F.linear(x[token], gate_up_)), down_)
        y = y.index_add(0, token, h * weights[token, slot, None])
    return y.to(x.dtype)


@experts.fused(when=lambda x, *_: len(x) == 0)
def _experts_without_rows(x, weights, chosen, gate_up, down, shared=None):
    """A rank of expert parallelism that no token was sent to: no rows, whose gradients are zeros, as the other ranks wait for them."""
    return x + (weights.sum() + gate_up[0, 0, 0] + down[0, 0, 0]).to(x.dtype)


def few_rows(x, weights, chosen, gate_up, down, shared=None):
    """In generation, one token or a few: too few rows of an expert for a matmul to be worth its set-up."""
    return (len(x) == 1 or chosen.numel() <= 8) and infers(x) and down.dtype == x.dtype


@experts.fused(when=few_rows)
def _experts_by_row(x, weights, chosen, gate_up, down, shared=None):
    """A matrix-vector product each way for every chosen expert of every token: they read the chosen experts' weights and nothing else."""
    (T, k), rows = chosen.shape, chosen.flatten().tolist()
    h = swiglu(torch.stack([matvec(gate_up[e], x[i // k]) for i, e in enumerate(rows)])).mul_(weights.view(-1, 1))     # (T*k,F)
    y = torch.stack([matvec(down[e], h_) for e, h_ in zip(rows, h.unbind())]).view(T, k, -1).sum(1)
    return y if shared is None else y.add_(shared)


def by_grouped_mm(x, weights, chosen, gate_up, down, shared=None):
    """In generation, where the loop's call overhead would dominate, and on accelerators without Triton."""
    generates = x.device.type == "cpu" and chosen.numel() <= 512 and not torch.is_grad_enabled()
    elsewhere = x.device.type != "cpu" and not on_gpu(x)
    return (generates or elsewhere) and x.dtype != torch.float64 and x.shape[1] % 8 == down.shape[2] % 8 == 0


@torch.library.custom_op("ling::experts", mutates_args=())
def _experts_in_graph(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor,
                      down: torch.Tensor) -> torch.Tensor:
    """For torch.compile, whose graphs have no room for shapes that depend on the routing: one opaque node that runs the op as it is."""
    return experts(x, weights, chosen, gate_up, down)


@torch.library.custom_op("ling::experts_backward", mutates_args=())
def _experts_backward_in_graph(dy: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor,
                               down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.enable_grad():                                                                # the forward again: nothing opaque is saved
        inputs = [t.detach().requires_grad_() for t in (x, weights, gate_up, down)]
        return torch.autograd.grad(experts(*inputs[:2], chosen, *inputs[2:]), inputs, dy)


_experts_in_graph.register_fake(lambda x, weights, chosen, gate_up, down: torch.empty_like(x))
_experts_backward_in_graph.register_fake(lambda dy, x, weights, chosen, *matrices: tuple(map(torch.empty_like, (x, weights, *matrices))))


def _experts_graph_gradient(ctx, dy):
    dx, dweights, dgate_up, ddown = _experts_backward_in_graph(dy, *ctx.saved_tensors)
    return dx, dweights, None, dgate_up, ddown


_experts_in_graph.register_autograd(_experts_graph_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@experts.fused(when=lambda x, weights, chosen, gate_up, down, *_: chosen.numel() <= 128 and down.dtype == x.dtype and generates_compiled(x))
def _experts_by_gather(x, weights, chosen, gate_up, down, shared=None):
    """Never runs as written: the compiler makes of it loops that read the chosen experts' weights where they are. (32 texts at once,
    128 rows of small experts, still had 1.4 times the tokens a second of the opaque op below.)"""
    h = swiglu.reference((gate_up[chosen] * x[:, None, None]).sum(-1)) * weights.to(x.dtype).unsqueeze(-1)              # (T,k,F)
    y = (down[chosen] * h.unsqueeze(2)).sum(-1).sum(1)
    return y if shared is None else y + shared


@experts.fused(when=lambda *_: torch.compiler.is_compiling())
def _experts_compiled(x, weights, chosen, gate_up, down, shared=None):
    x, gate_up, down = map(autocast, (x, gate_up, down))
    y = _experts_in_graph(x, weights, chosen, gate_up, down)
    return y if shared is None else y + shared


@experts.fused(when=by_grouped_mm)
def _experts_grouped_mm(x, weights, chosen, gate_up, down, shared=None):
    """torch's own grouped matmul, which reads the active experts only."""
    dtype, (T, k) = x.dtype, chosen.shape
    x, gate_up, down = map(autocast, (x, gate_up, down))
    flat, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(flat, torch.arange(len(down), device=x.device), right=True, out_int32=True)
    h = F.grouped_mm(x.index_select(0, order // k), gate_up.transpose(1, 2), offs=ends)
    h = swiglu.reference(h) * weights.flatten().index_select(0, order).to(x.dtype).unsqueeze(-1)
    y = F.grouped_mm(h, down.transpose(1, 2), offs=ends)
    y = torch.zeros_like(y).index_copy(0, order, y).view(T, k, -1).sum(1).to(dtype)
    return y if shared is None else y + shared


@experts.fused(when=lambda x, *_: on_cpu(x))
class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, chosen, gate_up, down, shared=None):
        flat = chosen.flatten()                                                              # (T*k,)
        order = torch.from_numpy(flat.to(torch.int16).numpy().argsort(kind="stable"))        # a radix sort: a tenth of torch's time
        counts, token = torch.bincount(flat, minlength=len(down)).tolist(), order // chosen.shape[1]
        w = weights.to(x.dtype).flatten().index_select(0, order).unsqueeze(-1)               # (T*k,1)
        pre, y = x.new_empty(len(order), gate_up.shape[1]), torch.zeros_like(x) if shared is None else shared.to(x.dtype, copy=True)
        for t, w_, pre_, gate_up_, down_ in zip(                                             # one expert: t (n,), pre_ (n,2F)
                *(rows.split(counts) for rows in (token, w, pre)), gate_up.mT.unbind(), down.mT.unbind()):
            torch.mm(x.index_select(0, t), gate_up_, out=pre_)
            gate, up = pre_.chunk(2, dim=1)
            y.index_add_(0, t, torch.mm(F.silu(gate).mul_(up).mul_(w_), down_))              # weight F columns, not D
        ctx.save_for_backward(x, w, order, pre, gate_up, down)
        ctx.counts, ctx.k, ctx.dtype, ctx.shared = counts, chosen.shape[1], weights.dtype, shared is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, order, pre, gate_up, down = ctx.saved_tensors
        token, dx, dw = order // ctx.k, torch.zeros_like(x), torch.empty_like(w)
        dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
        for t, w_, pre_, dw_, gate_up_, down_, dgate_up_, ddown_ in zip(
                *(rows.split(ctx.counts) for rows in (token, w, pre, dw.squeeze(1))),
                *(m.unbind() for m in (gate_up, down, dgate_up, ddown))):
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
        return dx, dw, None, dgate_up, ddown, dy if ctx.shared else None


# On a GPU: a counting sort, then four grouped matmuls with the gathers in their prologues and SwiGLU, its gradient and the routing
# weight's in their epilogues, and a sum of k gathered rows. Saved: x, the pre-activations, the routing, and, under autocast without
# FSDP, the weights' 16-bit copies. The routing weight multiplies F columns before the down matmul, so one kernel sums rows forward
# (and the shared experts' output with them) and backward, and grouped_mm with its separate SwiGLU has no place left where Triton
# runs. Not yet measured on a GPU.

@jit
def count_kernel(keys, counts, R, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    r, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EP)
    key = tl.load(keys + r, mask=r < R, other=EP).to(tl.int32)
    hits = tl.sum((key[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + e * tl.num_programs(0) + tl.program_id(0), hits, mask=e < E)


@jit
def place_kernel(keys, ends, order, place, offsets, R, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    block, e = tl.program_id(0), tl.arange(0, EP)
    r = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + r, mask=r < R, other=EP).to(tl.int32)
    hit = (key[:, None] == e[None, :]).to(tl.int32)                                          # (BLOCK,EP)
    end = tl.load(ends + e * tl.num_programs(0) + block, mask=e < E, other=0).to(tl.int32)
    start = end - tl.sum(hit, 0)
    to = tl.sum(hit * (start[None, :] + tl.cumsum(hit, 0) - 1), 1)
    tl.store(order + to, r, mask=r < R)
    tl.store(place + r, to, mask=r < R)
    tl.store(offsets + e + 1, end, mask=(e < E) & (block == tl.num_programs(0) - 1))


def plan(chosen, E, BLOCK=64):
    """chosen (T,k) -> order (R,) int32, the R = T*k choices sorted by expert, stably; place (R,) int32, its inverse; offsets (E+1,)
    int32, where each expert's rows begin. No sync."""
    R, EP = chosen.numel(), pow2(E)
    blocks = cdiv(R, BLOCK)
    counts, offsets = chosen.new_empty(E, blocks, dtype=torch.int32), chosen.new_zeros(E + 1, dtype=torch.int32)
    order, place = chosen.new_empty(2, R, dtype=torch.int32)
    launch(count_kernel, (blocks,), chosen, counts, R, E=E, EP=EP, BLOCK=BLOCK)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    launch(place_kernel, (blocks,), chosen, ends, order, place, offsets, R, E=E, EP=EP, BLOCK=BLOCK)
    return order, place, offsets


@jit
def tile_rows(offsets, blocks, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """Rows sorted by expert are cut into tiles of BM that never straddle two experts, and these into blocks of columns -> of this
    program: expert (E or more: nothing to do), its first row, where the expert's rows end, its block of columns."""
    tile, e = tl.program_id(0) // blocks, tl.arange(0, EP)
    start = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = (end - start + BM - 1) // BM
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = e == expert
    first, end = tl.sum(tl.where(mine, start + (tile - upto + tiles) * BM, 0), 0), tl.sum(tl.where(mine, end, 0), 0)
    return expert, first, end, tl.program_id(0) % blocks


@jit
def up_kernel(x, order, weights, w, h, z, offsets, D: tl.constexpr, F: tl.constexpr, k: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
              EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """h = [x[token] gate^T, x[token] up^T], z = weight * silu(gate half) * up half."""
    expert, first, end, block = tile_rows(offsets, tl.cdiv(F, BN), E, EP, BM)
    if expert < E:
        m, n, c = first + tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, BK)
        choice = tl.load(order + m, mask=m < end, other=0)
        xs = x + (choice // k).to(tl.int64)[:, None] * D + c[None, :]
        ws = w + expert.to(tl.int64) * 2 * F * D + n[None, :] * D + c[:, None]
        gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for i in range(0, D, BK):
            inside = (c < D - i) | EVEN
            a = tl.load(xs + i, mask=(m < end)[:, None] & inside[None, :], other=0.0)
            b = inside[:, None] & ((n < F) | EVEN)[None, :]
            gate = tl.dot(a, tl.load(ws + i, mask=b, other=0.0), gate, input_precision="ieee")
            up = tl.dot(a, tl.load(ws + F * D + i, mask=b, other=0.0), up, input_precision="ieee")
        rows, ok = m.to(tl.int64)[:, None], (m < end)[:, None] & ((n < F) | EVEN)[None, :]
        hs = h + rows * (2 * F) + n[None, :]
        tl.store(hs, gate, mask=ok)
        tl.store(hs + F, up, mask=ok)
        weight = tl.load(weights + choice, mask=m < end, other=0.0)
        tl.store(z + rows * F + n[None, :], gate * tl.sigmoid(gate) * up * weight[:, None], mask=ok)


@jit
def matmul_kernel(a, w, y, offsets, K, N, w_n, w_k, E: tl.constexpr, EP: tl.constexpr, EVEN: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y = a w[expert]^T; w_n and w_k are w's strides, so that a transposed w needs no copy."""
    expert, first, end, block = tile_rows(offsets, tl.cdiv(N, BN), E, EP, BM)
    if expert < E:
        m, n, c = first + tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, BK)
        rows = m.to(tl.int64)[:, None]
        as_ = a + rows * K + c[None, :]
        ws = w + expert.to(tl.int64) * N * K + n[None, :] * w_n + c[:, None] * w_k
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(0, K, BK):
            inside = (c < K - i) | EVEN
            acc = tl.dot(tl.load(as_ + i, mask=(m < end)[:, None] & inside[None, :], other=0.0),
                         tl.load(ws + i * w_k, mask=inside[:, None] & ((n < N) | EVEN)[None, :], other=0.0), acc, input_precision="ieee")
        tl.store(y + rows * N + n[None, :], acc, mask=(m < end)[:, None] & ((n < N) | EVEN)[None, :])


@jit
def swiglu_grad_tile(dz, weight, h, dh, wz, F, rows, n, ok):
    """dz (BM,BN), the gradient before the routing weight -> writes dh and weight * z, returns d weight (BM,)."""
    hs = rows * (2 * F) + n[None, :]
    gate = tl.load(h + hs, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(h + hs + F, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    act = gate * s
    tl.store(wz + rows * F + n[None, :], act * up * weight, mask=ok)
    dweight = tl.sum(tl.where(ok, dz * act * up, 0.0), 1)
    dz = dz * weight
    tl.store(dh + hs, dz * up * (s + act * (1 - s)), mask=ok)
    tl.store(dh + hs + F, dz * act, mask=ok)
    return dweight


@jit
def down_backward_kernel(dy, order, weights, w, h, dh, wz, dweights, offsets, D, F, k: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
                         EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """dz = dy[token] w, then the gradient of the SwiGLU, of the routing weight (one partial sum per block of F), and weight * z again."""
    blocks = tl.cdiv(F, BN)
    expert, first, end, block = tile_rows(offsets, blocks, E, EP, BM)
    if expert < E:
        m, n, c = first + tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, BK)
        choice = tl.load(order + m, mask=m < end, other=0)
        weight = tl.load(weights + choice, mask=m < end, other=0.0)[:, None]
        ds = dy + (choice // k).to(tl.int64)[:, None] * D + c[None, :]
        ws = w + expert.to(tl.int64) * D * F + c[:, None].to(tl.int64) * F + n[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(0, D, BK):
            inside = (c < D - i) | EVEN
            acc = tl.dot(tl.load(ds + i, mask=(m < end)[:, None] & inside[None, :], other=0.0),
                         tl.load(ws + i * F, mask=inside[:, None] & ((n < F) | EVEN)[None, :], other=0.0), acc, input_precision="ieee")
        # Halves, one after the other: the whole tile's epilogue would spill hundreds of registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        half, rows = block * BN + tl.arange(0, BN // 2), m.to(tl.int64)[:, None]
        dweight = swiglu_grad_tile(left, weight, h, dh, wz, F, rows, half, (m < end)[:, None] & ((half < F) | EVEN)[None, :])
        half += BN // 2
        dweight += swiglu_grad_tile(right, weight, h, dh, wz, F, rows, half, (m < end)[:, None] & ((half < F) | EVEN)[None, :])
        tl.store(dweights + choice.to(tl.int64) * blocks + block, dweight, mask=m < end)


@jit
def weight_grad_kernel(a, b, order, dw, offsets, P, Q, k: tl.constexpr, GATHER_A: tl.constexpr, EVEN: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """dw[e] (P,Q) = sum over the rows of expert e of a[row]^T b[row], one of the two read by token. No rows: zeros."""
    expert, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(Q, BN)
    p = (tl.program_id(0) // blocks) * BM + tl.arange(0, BM)
    q = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(start, end, BK):
        row = i + tl.arange(0, BK)
        token = (tl.load(order + row, mask=row < end, other=0) // k).to(tl.int64)
        a_row, b_row = token if GATHER_A else row.to(tl.int64), row.to(tl.int64) if GATHER_A else token
        ok = (row < end)[:, None]
        acc = tl.dot(tl.trans(tl.load(a + a_row[:, None] * P + p[None, :], mask=ok & ((p < P) | EVEN)[None, :], other=0.0)),
                     tl.load(b + b_row[:, None] * Q + q[None, :], mask=ok & ((q < Q) | EVEN)[None, :], other=0.0), acc,
                     input_precision="ieee")
    out, ok = dw + expert * P * Q + p[:, None].to(tl.int64) * Q + q[None, :], ((p < P)[:, None] & (q < Q)[None, :]) | EVEN
    tl.store(out, acc, mask=ok)


@jit
def combine_kernel(y, place, shared, out, D, k: tl.constexpr, BD: tl.constexpr):
    """out[t] = shared[t] + sum_j y[place[t,j]], in fp32. Forward for the outputs, backward for dx."""
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    if shared is not None:
        acc += tl.load(shared + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    for j in tl.static_range(k):
        acc += tl.load(y + tl.load(place + t * k + j).to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + t * D + d, acc, mask=d < D)


def combine(y, place, k, shared=None):
    T, D, BD = len(y) // k, y.shape[1], min(512, pow2(y.shape[1]))
    out = y.new_empty(T, D)
    launch(combine_kernel, (T, cdiv(D, BD)), y, place, shared, out, D, k=k, BD=BD)
    return out


def grouped(name, kernel, columns, depth, args, rows, E, **constants):
    """Launch a grouped matmul: `rows` sorted by expert, cut into at most rows / BM + E tiles, times blocks of `columns`."""
    c = tile(name, rows // E, args[0].dtype)
    even = columns % c["BN"] == depth % c["BK"] == 0                                         # no column is masked: fewer registers
    launch(kernel, ((cdiv(rows, c["BM"]) + E) * cdiv(columns, c["BN"]),), *args, E=E, EP=pow2(E), EVEN=even, **constants, **c)


@jit
def up_decode_kernel(x, weights, chosen, w, z, D, F, k: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One choice of one token, BN columns of z: gate and up rows are streamed once, without tensor cores."""
    pair, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    rows = w + tl.load(chosen + pair) * 2 * F * D + n[:, None] * D
    gate, up = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for i in range(0, D, BK):
        c = i + tl.arange(0, BK)
        ok, a = (n < F)[:, None] & (c < D)[None, :], tl.load(x + pair // k * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(tl.load(rows + c[None, :], mask=ok, other=0.0).to(tl.float32) * a, 1)
        up += tl.sum(tl.load(rows + F * D + c[None, :], mask=ok, other=0.0).to(tl.float32) * a, 1)
    tl.store(z + pair * F + n, gate * tl.sigmoid(gate) * up * tl.load(weights + pair), mask=n < F)


@jit
def down_decode_kernel(z, chosen, w, shared, y, D, F, k: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """BN columns of one token's output: its k experts one after the other, summed in registers."""
    t, n, acc = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN), tl.zeros((BN,), tl.float32)
    if shared is not None:
        acc += tl.load(shared + t * D + n, mask=n < D, other=0.0).to(tl.float32)
    for j in tl.static_range(k):
        rows = w + tl.load(chosen + t * k + j) * D * F + n[:, None] * F
        for i in range(0, F, BK):
            c = i + tl.arange(0, BK)
            ok, a = (n < D)[:, None] & (c < F)[None, :], tl.load(z + (t * k + j) * F + c, mask=c < F, other=0.0).to(tl.float32)[None, :]
            acc += tl.sum(tl.load(rows + c[None, :], mask=ok, other=0.0).to(tl.float32) * a, 1)
    tl.store(y + t * D + n, acc, mask=n < D)


@experts.fused(when=lambda x, weights, chosen, *_: on_gpu(x) and chosen.numel() <= 64 and not torch.is_grad_enabled())
def _experts_decode_gpu(x, weights, chosen, gate_up, down, shared=None):
    """Generation: two launches of static shape, which a CUDA graph can hold, that read the chosen experts' weights once per choice."""
    x, (T, k), (_, D, width) = autocast(x.contiguous()), chosen.shape, down.shape
    weights, chosen, shared = (t if t is None else t.contiguous() for t in (weights, chosen, shared))
    z, y = x.new_empty(T * k, width), torch.empty_like(x)
    launch(up_decode_kernel, (T * k, cdiv(width, 16)), x, weights, chosen, gate_up, z, D, width, k=k, BN=16, BK=min(256, pow2(D)))
    launch(down_decode_kernel, (T, cdiv(D, 16)), z, chosen, down, shared, y, D, width, k=k, BN=16, BK=min(256, pow2(width)))
    return y


@experts.fused(when=lambda x, *_: on_gpu(x))
class _ExpertsGPU(torch.autograd.Function):
    """Casts for autocast itself, so that gradients of fp32 weights are written once, in fp32, straight from the accumulators: 4 bytes a
    weight instead of 8. Over micro-batches autograd adds them, 12 bytes more. A kernel that adds into .grad would move 8 instead of 16, but
    then autograd.grad would change .grad, and under FSDP2's mixed precision there is none to add to. Larger micro-batches cost nothing."""

    @staticmethod
    def forward(ctx, x, weights, chosen, gate_up, down, shared=None):
        ctx.dtypes, ctx.shared = (gate_up.dtype, down.dtype), shared is not None
        (E, D, width), R, k = down.shape, chosen.numel(), chosen.shape[1]
        x, weights = autocast(x.contiguous()), weights.contiguous()
        gate_up, down, (order, place, offsets) = gate_up.to(x.dtype), down.to(x.dtype), plan(chosen.contiguous(), E)
        h, z, y = x.new_empty(R, 2 * width), x.new_empty(R, width), x.new_empty(R, D)
        grouped("up", up_kernel, width, D, (x, order, weights, gate_up, h, z, offsets, D, width), R, E, k=k)
        grouped("matmul", matmul_kernel, D, width, (z, down, y, offsets, width, D, width, 1), R, E)
        ctx.save_for_backward(x, weights, gate_up, down, order, place, offsets, h)
        return combine(y, place, k, shared.contiguous() if ctx.shared else None)

    @staticmethod
    def backward(ctx, dy):
        x, weights, gate_up, down, order, place, offsets, h = ctx.saved_tensors
        (T, k), (E, D, width), R, dy = weights.shape, down.shape, len(h), dy.contiguous()
        dh, wz, da = torch.empty_like(h), x.new_empty(R, width), x.new_empty(R, D)
        blocks = cdiv(width, tile("down_backward", R // E, x.dtype)["BN"])
        dweights = torch.empty(T, k, blocks, dtype=torch.float32, device=x.device)           # no atomics: a partial sum per block
        tensors = dy, order, weights, down, h, dh, wz, dweights, offsets
        grouped("down_backward", down_backward_kernel, width, D, (*tensors, D, width), R, E, k=k)
        dgate_up, ddown = (torch.empty_like(w, dtype=dtype) for w, dtype in zip((gate_up, down), ctx.dtypes))
        c = tile("weight_grad", R // E, x.dtype)
        for dw, a, b, GATHER_A in ((ddown, dy, wz, True), (dgate_up, dh, x, False)):         # of a and b, the tokens' side is gathered
            P, Q = dw.shape[1:]
            launch(weight_grad_kernel, (cdiv(P, c["BM"]) * cdiv(Q, c["BN"]), E), a, b, order, dw, offsets, P, Q, k=k, GATHER_A=GATHER_A,
                   EVEN=P % c["BM"] == Q % c["BN"] == 0, **c)
        grouped("matmul", matmul_kernel, D, 2 * width, (dh, gate_up, da, offsets, 2 * width, D, 1, D), R, E)
        return combine(da, place, k), dweights.sum(-1).to(weights.dtype), None, dgate_up, ddown, dy if ctx.shared else None


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
# GPU: the same Function with up to 4 GiB of logits and one kernel, a row a program, that makes loss and gradient in two sweeps.
# (torch's own F.linear_cross_entropy adds its chunks' losses in the inputs' dtype, which in bf16 is off by percents.)
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


def softmax_gradient_cpu(logits, targets):
    """logits (n,V), overwritten by their gradient; targets (n,) -> 0-d sum of losses."""
    counted, t = (targets >= 0).to(logits.dtype), targets.clamp(min=0).unsqueeze(-1)
    at_target, top = logits.gather(1, t), logits.amax(1)
    probs = torch.softmax(logits, 1, out=logits)                                             # in place: a fresh 16 MiB is page faults
    # logsumexp from the largest probability (>= 1/V, so its log is exact enough) saves a pass of exp
    loss = (top - probs.amax(1).log() - at_target.squeeze(1)).dot(counted)
    probs.scatter_add_(1, t, torch.full_like(at_target, -1.0)).mul_(counted.unsqueeze(-1))
    return loss


@jit
def cross_entropy_kernel(logits, targets, losses, V, BV: tl.constexpr):
    """One row: its loss in fp32, and the logits overwritten by their gradient, softmax - onehot (zeros for an ignored target)."""
    t = tl.program_id(0).to(tl.int64)
    row, target, c = logits + t * V, tl.load(targets + t), tl.arange(0, BV)
    at_target = tl.load(row + tl.maximum(target, 0)).to(tl.float32)                          # now: another warp overwrites it below
    top, total = tl.full((BV,), -1e30, tl.float32), tl.zeros((BV,), tl.float32)
    for i in range(0, V, BV):                                                                # online softmax, a lane at a time
        l = tl.load(row + i + c, mask=i + c < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, l)
        top, total = new, total * tl.exp(top - new) + tl.exp(l - new)
    most = tl.max(top, 0)
    lse = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
    counted = target >= 0
    tl.debug_barrier()                                                                       # all have read before one writes
    tl.store(losses + t, tl.where(counted, lse - at_target, 0.0))
    for i in range(0, V, BV):
        l = tl.load(row + i + c, mask=i + c < V, other=-float("inf")).to(tl.float32)
        g = tl.where(counted, tl.exp(l - lse) - (i + c == target).to(tl.float32), 0.0)
        tl.store(row + i + c, g, mask=i + c < V)


def softmax_gradient_gpu(logits, targets):
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    launch(cross_entropy_kernel, (len(logits),), logits, targets, losses, logits.shape[1], BV=32 if INTERPRETED else 4096, num_warps=8)
    return losses.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, norm_head, softmax_gradient, chunk_bytes, least_rows):
        (T, _), V = x.shape, weight.shape[0]
        scale = norm_head_scale(weight) if norm_head else None
        x = (x * scale).to(x.dtype) if norm_head else x
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        dx, dweight = torch.empty_like(x) if wants_x else None, None
        loss, rows = 0, max(least_rows, chunk_bytes // (x.element_size() * V))
        for start in range(0, max(T, 1), rows):
            chunk = slice(start, start + rows)
            logits = torch.mm(x[chunk], weight.T)                                            # (rows,V)
            loss = loss + softmax_gradient(logits, targets[chunk])                           # and logits are their gradient now
            if wants_x:
                torch.mm(logits, weight, out=dx[chunk])
            if wants_weight:                                                                 # several chunks add up in fp32
                if dweight is None:
                    dweight = torch.mm(logits.T, x[chunk]).to(torch.promote_types(x.dtype, torch.float32) if T > rows else x.dtype)
                elif dweight.dtype == x.dtype:
                    dweight.addmm_(logits.T, x[chunk])
                else:
                    dweight += torch.mm(logits.T, x[chunk])
            del logits                                                                       # or the next chunk's are made beside it
        if norm_head and wants_x:
            dx.mul_(scale)                                                                   # dweight has it through x
        ctx.save_for_backward(dx, dweight if dweight is None else dweight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return dx if dx is None else dx * dloss, dweight if dweight is None else dweight * dloss, *[None] * 5


@linear_cross_entropy.fused(when=lambda x, weight, targets, norm_head: on_cpu(x) and weight.dtype == x.dtype)
def _linear_cross_entropy_cpu(x, weight, targets, norm_head):
    return _LinearCrossEntropy.apply(x, weight, targets, norm_head, softmax_gradient_cpu, 16 << 20, 128)


@linear_cross_entropy.fused(when=lambda x, *_: on_gpu(x))
def _linear_cross_entropy_gpu(x, weight, targets, norm_head):
    x, weight = map(autocast, (x, weight))
    return _LinearCrossEntropy.apply(x, weight, targets, norm_head, softmax_gradient_gpu, 4 << 30, 2048)   # small chunks ruin the matmuls


@case("linear_cross_entropy")
def _(scale=1, dtype=torch.float32):
    T, V = 4096 // scale, 4096 // scale
    targets = torch.randint(-1, V, (T,))                                                     # some ignored
    return torch.randn(T, 256, dtype=dtype), torch.randn(V, 256, dtype=dtype), targets, True


# ----------------------------------------------------------------------------------------------------------------------
# parity and speed

def leaves(args):
    """Copies of the arguments for a gradient of their own, and those that get one."""
    args = [a.detach().clone().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else a for a in args]
    return args, [a for a in args if torch.is_tensor(a) and a.requires_grad]


def grads(fn, args):
    """Outputs and gradients of fn for a fixed cotangent, as a flat list."""
    args, inputs = leaves(args)
    out = fn(*args)
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    return out + [g for g in torch.autograd.grad(out, inputs, cotangents, allow_unused=True) if g is not None]


def to_device(args, device):
    return [a.to(device) if torch.is_tensor(a) else a for a in args]


def parity(name, scale=8, device="cpu", dtype=torch.float32):
    """(error of the op, error of its definition) in dtype, both against the definition in fp64: max|d| / max|exact|, worst of
    all outputs and gradients. A twin is right when its error is of the size of the definition's own rounding."""
    torch.manual_seed(0)
    args = to_device(CASES[name](scale, dtype), device)
    to64 = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    ordered = lambda fn: lambda *args: (*in_order(fn(*args)).values(),)
    exact = grads(ordered(OPS[name].reference), to64)
    error = lambda got, want: float((got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-30))
    return tuple(max(map(error, grads(ordered(fn), args), exact)) for fn in (OPS[name], OPS[name].reference))


def bench(fns, repeats=15):
    """Median milliseconds of each function, taken in turn (A B A B ...) so that a noisy neighbour hits all alike. Each timed
    call follows one of the same function that is not timed, so that caches hold what they would in a loop."""
    torch.ones(31 << 20, dtype=torch.uint8)       # freed at once: raises malloc's threshold as a model's first step does, so
    times = {name: [] for name in fns}            # that ops are timed and not the page faults of their small outputs
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    for _ in range(repeats):
        for name, fn in fns.items():
            fn()
            wait()
            start = time.perf_counter()
            fn()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def step(fn, args):
    """A callable that runs fn forward and backward once."""
    args, inputs = leaves(args)

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
    for e, (gate_up_, down_) in enumerate(zip(gate_up.unbind(), down.unbind())):
        gate, up = gate_up_.chunk(2)
        h = rows[flat == e]
        y[flat == e] = F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down_)
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


# ----------------------------------------------------------------------------------------------------------------------
# --compile-check: what a GPU compiler makes of the kernels, on a machine without one

def gpu_twins(x, D=2048, E=256, k=8, width=512, V=157184):
    """Calls every GPU twin forward and backward, at Ling-mini-2.0's shapes; x (T,D) on any device, "meta" included."""
    T, new = len(x), lambda *shape, dtype=x.dtype: torch.empty(*shape, dtype=dtype, device=x.device)
    logits, chosen = new(T, E, dtype=torch.float32), new(T, k, dtype=torch.int64)
    experts_args = [(x, new(T, k, dtype=torch.float32), chosen, new(E, 2 * width, D, dtype=dtype), new(E, D, width, dtype=dtype), shared)
                    for dtype, shared in ((x.dtype, x), (torch.float32, None))]              # fp32 weights: training under autocast
    for scoring, bias in (("sigmoid", new(E, dtype=torch.float32)), ("softmax", None)):
        grads(_RouteGPU.apply, (logits, bias, k, 8 if bias is not None else 1, 4 if bias is not None else 1, scoring, True, 2.5))
    for args in experts_args:
        grads(_ExpertsGPU.apply, args)
    _experts_decode_gpu(*(t[:8] if len(t) == T else t for t in experts_args[0]))
    tables = new(4096, 128, dtype=torch.float32)
    for weight in (new(20, 128), None):
        grads(_RopeGPU.apply, (new(T // 4096, 4096, 20, 128), tables, tables, 64, weight, 1e-6))
    grads(_SwiGLUGPU.apply, (new(T, 2 * width),))
    slots, ids = new(T, 4, 128), lambda *shape: new(*shape, dtype=torch.int64)
    for n in (1, 4):                                             # 16 query heads on 4 keys; a token each, or four with speculation
        for dtype in (x.dtype, torch.float32):                   # a run of train.py is sampled in fp32
            _attention_by_table_gpu(new(32, n, 16, 128, dtype=dtype), slots.to(dtype), slots.to(dtype), ids(32, 4096), ids(32, n))
    grads(_linear_cross_entropy_gpu, (x, new(V, D), new(T, dtype=torch.int64), False))


def compile_one(job):
    """-> kernel, target, tile, registers, shared memory in KB, bytes or registers spilled, matrix instructions; an error as text."""
    import re
    import subprocess
    import tempfile
    from pathlib import Path
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    name, target, types_, constants, options = job
    kernel = globals()[name]
    aligned = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg, (_, divides) in types_.items() if divides}
    source = ASTSource(fn=kernel, signature={arg: types_[arg][0] if arg in types_ else "constexpr" for arg in kernel.arg_names},
                       constexprs=constants, attrs=aligned)
    backend, arch, warp = target
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    shape = " ".join(str(value) for key, value in constants.items() if key in ("BM", "BN", "BK")).replace(" ", "x")
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        most, mfma = lambda key: max(map(int, re.findall(rf"\.{key}:\s*(\d+)", text))), len(re.findall("v_mfma", text))
        return name, arch, shape, most("vgpr_count"), compiled.metadata.shared >> 10, most("vgpr_spill_count"), mfma
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        show = lambda flag: subprocess.run([tool, flag, f.name], capture_output=True, text=True, check=True).stdout
        usage, code = show("-res-usage"), show("-sass")
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    count = lambda pattern: len(re.findall(pattern, code))
    return name, f"sm_{arch}", shape, registers, compiled.metadata.shared >> 10, count(r"\bSTL\b"), count("HGMMA|UTCHMMA|HMMA")


def compile_check():
    """Cross-compile every kernel as it is launched at Ling-mini-2.0's shapes, with 256 and with 1024 rows per expert, and print
    registers, shared memory and spills. Returns 1 if one spills."""
    global launch, family
    if triton is None or INTERPRETED:
        print("--compile-check needs Triton (pip install --no-deps triton==3.7.1) and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    from concurrent.futures import ProcessPoolExecutor
    code = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    jobs, started = {}, time.perf_counter()

    def record(kernel, grid, *args, num_warps=4, num_stages=None, **constants):
        types_ = {}
        for parameter, value in zip(kernel.params, args):
            name = parameter.name
            if torch.is_tensor(value):
                types_[name] = code[value.dtype], True
            elif parameter.is_constexpr or value is None or value == 1 and type(value) is int:
                constants[name] = value
            else:
                types_[name] = ("fp32", False) if isinstance(value, float) else ("i32", value % 16 == 0)
        job = (kernel.__name__, target, types_, constants,
               dict(num_warps=num_warps, num_stages=num_stages or (2 if target[0] == "hip" else 3)))    # or Triton's default
        jobs[repr(job)] = job

    launch = record
    for name, target in (("ampere", ("cuda", 80, 32)), ("hopper", ("cuda", 90, 32)), ("hopper", ("cuda", 100, 32)),
                         ("amd", ("hip", "gfx942", 64))):
        family = lambda name=name: name
        for T in (8192, 32768):
            gpu_twins(torch.empty(T, 2048, dtype=torch.bfloat16, device="meta"))
    print(f"triton {triton.__version__}; T 8192 and 32768, D 2048, E 256, k 8, F 512, bf16\n"
          f"{'kernel':24}{'target':>8}{'tile':>12}{'registers':>11}{'shared KB':>11}{'spills':>8}{'matrix instructions':>21}")
    spilled = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name, target, shape, registers, shared, spills, matrix in pool.map(compile_one, jobs.values()):
            print(f"{name:24}{target:>8}{shape:>12}{registers:11}{shared:11}{spills:8}{matrix:21}", flush=True)
            spilled += spills > 0
    print(f"{len(jobs)} kernels in {time.perf_counter() - started:.0f} s, {spilled} of them spill")
    return int(spilled > 0)


# ----------------------------------------------------------------------------------------------------------------------
# --fingerprint and --compare: is a run on other chips the same run? Moving Ling between platforms, wrong gradients of NormHead and of the
# auxiliary losses were found only by laying two of them side by side, op by op [Ling1 6.2, fig. 20]. A tiny model of each generation takes
# ten steps; of the first, every output and input gradient of every op is noted, in the order in which they come, with two measures:
#   - error: the distance from the op's definition in float64 on the CPU, of the very same inputs and incoming gradients. Rounding of
#     earlier ops is not in it, so it is small in bfloat16 too; where it is not, this machine is wrong, in this op.
#   - projections on eight vectors of random signs: the root mean square of their differences estimates how far the tensors of two
#     machines are apart, though neither is kept. They see what no op does: residuals, embeddings, sums of gradients, the optimizer.

FORMAT, STEPS = 1, 10                                           # FORMAT of the files: raise it with every change of what is run or noted
# Relative distances that rounding explains: of an error or a loss; of two machines' tensors. About ten times (bfloat16: five and two times)
# the largest over threads, instruction sets, LING_KERNELS and interpreted GPU kernels on a CPU. In bfloat16 tokens near a tie change
# experts, which moves gradients by a third: what is no op is better compared in float32, where no choice of these models is near a tie.
ROUNDING = {"float32": (4e-6, 3e-5), "bfloat16": (3e-2, 0.6)}


def in_order(out):
    """Outputs by name. The order in which route lists a token's experts is the device's choice: made ascending, or nothing compares."""
    if not isinstance(out, tuple):
        return {"output": out}
    weights, chosen, scores = out
    chosen, order = chosen.sort(-1)
    return {"weights": weights.gather(-1, order), "experts": chosen, "scores": scores}


class Recorder:
    """Stands in for every op of a model: runs it, and keeps what went in and what came out, forward and backward."""

    def __init__(self, name, model):
        self.layer, self.calls, self.events = name, collections.Counter(), []
        enter = lambda layer: lambda *_: setattr(self, "layer", layer)
        for path, block in model.named_modules():
            if path.rpartition(".")[0] in ("layers", "mtp"):
                block.register_forward_pre_hook(enter(f"{name}/{path}"))
                block.register_forward_hook(enter(name))

    def __call__(self, op, args):
        global RECORD
        copy = lambda t: t.detach().to("cpu", copy=True) if torch.is_tensor(t) else t
        view = lambda t: t.view_as(t) if torch.is_tensor(t) and t.requires_grad else t       # whose gradient is of this op alone
        args = dict(zip(inspect.signature(op).parameters, map(view, args)))
        RECORD = None                                           # what an op calls is its own affair, and another twin calls other things
        out = {name: view(t) for name, t in in_order(op(*args.values())).items()}
        RECORD = self
        call = types.SimpleNamespace(op=op, where=f"{self.layer}, {op.__name__}.{self.calls[self.layer, op]}", incoming={}, exact=None,
                                     args={name: copy(a) for name, a in args.items()}, out={name: copy(t) for name, t in out.items()})
        self.calls[self.layer, op] += 1
        self.events += [(call, "forward", name, t) for name, t in call.out.items()]
        note = lambda name, g: self.events.append((call, "backward", name, g))
        for tensors, keep in ((out, call.incoming.__setitem__), (args, note)):
            for name, t in tensors.items():
                if torch.is_tensor(t) and t.requires_grad:      # a gradient that a twin forgets is None: zeros
                    t.register_hook(lambda g, name=name, keep=keep, shape=t.shape: keep(name, torch.zeros(shape) if g is None else copy(g)))
        return tuple(out.values()) if len(out) > 1 else out["output"]

    def entries(self):
        for call, direction, name, t in self.events:
            call.exact = call.exact or exact(call)
            want, tensors = call.exact[direction, name], filter(torch.is_tensor, (*call.args.values(), *call.out.values()))
            error = (t - want).norm() / want.norm().clamp(min=1e-30) if t.is_floating_point() else (t != want).double().mean()
            ran = "bfloat16" if any(x.dtype == torch.bfloat16 for x in tensors) else "float32"
            yield f"{call.where}, {direction}, {name}", summary(t) | {"error": float(error), "ran": ran}


def exact(call):
    """What an op's definition makes of a recorded call in float64 -> {(direction, name): output or input gradient}."""
    args = {name: a.double() if torch.is_tensor(a) and a.is_floating_point() else a for name, a in call.args.items()}
    if call.op is route:                                        # in a tie those that were chosen: the bias touches the choice alone
        args["expert_bias"] = 1e-6 * F.one_hot(call.out["experts"], args["logits"].shape[-1]).sum(1) + (
            0 if args["expert_bias"] is None else args["expert_bias"])
    values, inputs = leaves(args.values())
    out = in_order(call.op.reference(*values))
    gradients = torch.autograd.grad([out[name] for name in call.incoming], inputs, [g.double() for g in call.incoming.values()],
                                    allow_unused=True)
    names = [name for name, a in zip(args, values) if torch.is_tensor(a) and a.requires_grad]
    return {("forward", name): t.detach() for name, t in out.items()} | {("backward", name): g for name, g in zip(names, gradients)}


@functools.cache
def signs(n):
    return torch.randint(2, (8, n), generator=torch.Generator().manual_seed(n)).double() * 2 - 1


def summary(t):
    flat = t.detach().cpu().flatten()
    x = flat.double()
    return {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "crc": zlib.crc32(flat.view(torch.uint8).numpy()),
            "norm": float(x.norm()), "mean": float(x.mean()), "largest": float(x.abs().max()), "projections": (signs(len(x)) @ x).tolist()}


def fingerprint(file, dtype, device):
    global RECORD
    from ling import PRESETS, Ling, LingConfig, update_expert_bias, write_json
    from train import make_optimizer
    size = dict(vocab_size=250, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
                intermediate_size=96, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=40, initializer_range=0.1)
    models = {name: PRESETS[preset] | size for name, preset in (("ling1", "toy-lite"), ("ling2", "small"))}
    rows = torch.randint(size["vocab_size"], (4, 49), generator=torch.Generator().manual_seed(0))
    tokens, targets = rows[:, :-1].to(device), rows[:, 1:].clone().to(device)
    targets[0, -9:] = -1                                        # ignored
    entries, losses = {}, {}
    for name, fields in models.items():
        model = Ling(LingConfig(**fields)).to(device)
        for t in model.state_dict().values():
            if t.dim() == 1:                                    # norms of 1 and biases of 0 would not be missed
                t += torch.linspace(-0.1, 0.1, len(t)).to(device)
        optimizer = make_optimizer(model, types.SimpleNamespace(lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1))
        for group in optimizer.param_groups:
            group["eps"] = 1e-5                                 # at 1e-8 a weight whose gradient is nothing but rounding takes whole steps
        recorder = Recorder(name, model)
        for step in range(STEPS):
            RECORD = recorder if step == 0 else None
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                out = model(tokens, targets)
            RECORD = None
            out.loss.backward()
            if step == 0:
                entries |= recorder.entries()
                entries |= {f"{name}, {path}, backward, sum": summary(torch.zeros_like(p) if p.grad is None else p.grad)
                            for path, p in model.named_parameters()}
            for part, value in {"loss": out.loss, **out.parts}.items():
                losses.setdefault(f"{name}, {part}", []).append(float(value.detach()))
            optimizer.step()
            optimizer.zero_grad()
            update_expert_bias(model, out.load)
        entries |= {f"{name}, {path}, after {STEPS} steps": summary(t) for path, t in model.state_dict().items()}
    made = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(), "LING_KERNELS": MODE, "dtype": dtype,
            "device": getattr(torch.get_device_module(device), "get_device_name", lambda: str(device))()}
    body = {"format": FORMAT, "models": models, "made": made, "losses": losses, "entries": entries}
    write_json(file, body | {"crc": zlib.crc32(json.dumps(body).encode())})
    print(f"{file}: {len(entries)} tensors and the losses of {STEPS} steps, in {dtype} on {device}; "
          f"then python kernels.py --compare {file} OTHER")


def read_fingerprint(file):
    from ling import read_json, require
    body = read_json(file)
    require(isinstance(body, dict) and "format" in body, f"{file} is no fingerprint; make one with python kernels.py --fingerprint {file}")
    require(body["format"] == FORMAT,
            f"{file} has format {body['format']!r}, this program compares {FORMAT}; make both files with one version")
    crc = body.pop("crc", None)
    require(crc == zlib.crc32(json.dumps(body).encode()), f"{file} is damaged or was edited; make it again")
    return body


def distance(a, b):
    """How far the tensors of two machines are apart, in parts of the smaller one: an estimate."""
    square = statistics.fmean((p - q) ** 2 for p, q in zip(a["projections"], b["projections"]))
    return 0.0 if a["crc"] == b["crc"] else math.sqrt(square) / max(min(a["norm"], b["norm"]), 1e-30)


def faults(pairs, losses, dtype):
    """Where two fingerprints differ by more than rounding, the surest sign first. NaN always does."""
    wrong = lambda e: "error" in e and not e["error"] <= ROUNDING[e["ran"]][0]
    for where, a, b in pairs:
        if not (a and b):
            yield f"{where}: only in {'A' if a else 'B'}"
        elif bad := [who for who, e in (("A", a), ("B", b)) if wrong(e)]:
            ran = (a if "A" in bad else b)["ran"]
            yield (f"{where}: wrong in {' and '.join(bad)}. From the op's definition on the same inputs, A is {a['error']:.1e} away and B "
                   f"{b['error']:.1e}; rounding in {ran} explains {ROUNDING[ran][0]:.0e}")
    for where, a, b in pairs:
        kind_a, kind_b = (f"{e['dtype']} {e['shape']}" for e in (a, b))
        if kind_a != kind_b:
            yield f"{where}: {kind_a} in A, {kind_b} in B" + "; bfloat16 rounds to 3.9e-03" * ("bfloat16" in kind_a + kind_b)
        elif a["dtype"] != "int64" and not distance(a, b) <= ROUNDING[dtype][1]:             # other experts, each right where it is: a tie
            yield (f"{where}: A and B are {distance(a, b):.1e} apart, norms {a['norm']:.6g} and {b['norm']:.6g}; rounding in {dtype} "
                   f"explains {ROUNDING[dtype][1]:.0e}. Every op follows its definition: look at what comes before this and is no op")
    for where, d in losses.items():
        if not d <= ROUNDING[dtype][0]:
            yield (f"{where}: {d:.1e} apart over {STEPS} steps, rounding in {dtype} explains {ROUNDING[dtype][0]:.0e}; "
                   "of the first step, nothing is")


def compare(files):
    """Returns 0 if two fingerprints are equal but for rounding, 1 if not, and says where the first fault is."""
    from ling import require
    A, B = map(read_fingerprint, files)
    require(A["models"] == B["models"] and A["losses"].keys() == B["losses"].keys(),
            f"{files[0]} and {files[1]} are of different models; make both with one version of this program")
    print(f"A: {files[0]}\nB: {files[1]}")
    for what, value in A["made"].items():
        if value != B["made"][what]:
            print(f"{what}: {value} in A, {B['made'][what]} in B")
    losses = {where: sum(abs(p - q) for p, q in zip(a, B["losses"][where])) / sum(map(abs, a)) for where, a in A["losses"].items()}
    print(f"losses over {STEPS} steps apart by: " + "; ".join(f"{where} {d:.1e}" for where, d in losses.items()))
    pairs = [(where, A["entries"].get(where), B["entries"].get(where)) for where in A["entries"] | B["entries"]]
    if fault := next(faults(pairs, losses, A["made"]["dtype"] if A["made"]["dtype"] == B["made"]["dtype"] else "float32"), None):
        print(fault)
        return 1
    bits = sum(a["crc"] != b["crc"] for _, a, b in pairs)
    worst, where = max((distance(a, b), where) for where, a, b in pairs if a["dtype"] != "int64")
    print(f"equal within rounding: {bits} of {len(pairs)} tensors differ in bits, by at most {worst:.1e} ({where})" if bits else
          "equal bit for bit")
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser("kernels.py", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--bench", action="store_true")
    job.add_argument("--compile-check", action="store_true")
    job.add_argument("--fingerprint", nargs="?", const="fingerprint.json", metavar="FILE")
    job.add_argument("--compare", nargs=2, metavar="FILE")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of --fingerprint; bfloat16: autocast, as train.py on accelerators")
    parser.add_argument("--device", help="of --fingerprint; default: the accelerator if there is one, else cpu")
    args = parser.parse_args(argv)
    if (args.dtype or args.device) and not args.fingerprint:
        parser.error("--dtype and --device go with --fingerprint")
    if args.compile_check:
        return compile_check()
    if args.bench:
        if triton is None or not torch.cuda.is_available():
            print("--bench needs a GPU that Triton can use", file=sys.stderr)
            return 2
        from test_ling import gpu_bench                         # it needs whole models, which this file knows nothing of
        return gpu_bench()
    if args.fingerprint or args.compare:
        import kernels                                          # the one that ling imports; as a program this file has ops of its own
        from sample import pick_device, run_cli
        return run_cli("kernels.py", lambda: kernels.compare(args.compare) if args.compare else
                       kernels.fingerprint(args.fingerprint, args.dtype or "float32", pick_device(args.device)))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, LING_KERNELS={MODE}; fp32, forward and backward, "
          "medians taken in turn\n")
    print(f"{'op':22}{'error':>10}{'definition':>12}   {'ms':>8}{'definition':>12}{'gain':>8}")
    for name, fn in OPS.items():
        error, own = parity(name, device=device)
        torch.manual_seed(0)
        args = to_device(CASES[name](), device)
        ms = bench({"op": step(fn, args), "reference": step(fn.reference, args)})
        print(f"{name:22}{error:10.1e}{own:12.1e}   {ms['op']:8.2f}{ms['reference']:12.2f}{ms['reference'] / ms['op']:7.2f}x",
              flush=True)
    args = to_device(CASES["experts"](), device)
    ms = bench({"op": step(experts, args), "bare": bare_matmuls(*args), "official": step(official_experts, args)})
    flops = 18 * args[2].numel() * args[0].shape[1] * args[4].shape[2]                       # 3 matrices, 2 flops, 3 passes
    print(f"\nexperts: {flops / ms['op'] / 1e6:.0f} GFLOP/s, {100 * ms['bare'] / ms['op']:.0f} % of the speed of its bare matmuls "
          f"({flops / ms['bare'] / 1e6:.0f} GFLOP/s), {ms['official'] / ms['op']:.2f}x the official expert loop")


if __name__ == "__main__":
    sys.exit(main())
