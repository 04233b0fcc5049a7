"""How does a run go? One story, from the command line to the last checkpoint.

    python train.py                                # train the toy on Python's own standard library, then sample from it
    python train.py                                # again: continue where it stopped, or say that it is finished
    python train.py --fresh                        # start over, in a new folder
    python train.py --preset toy-lite              # the same blocks with Ling 1's router and a head of its own
    python train.py --dense                        # a dense model of equal active parameters, for comparison
    python train.py --data "src/**/*.py" notes.txt --tokenizer bpe4096 --out runs/mine
    python train.py --data fineweb_*.bin --tokenizer gpt2 --preset small --batch_tokens 524288
    python train.py --init PATH/Ling-mini-base-2.0 --data corpus/ --lr 3e-5 --out runs/tuned
    python train.py --report runs/toy              # where the time went, who held up the others, what to try
    python train.py --plan --preset ling-1t --tokens 20T --device h200,mine=989/141/2.5      # parameters, FLOPs, memory, hours, money
    python train.py --budget 1e21 --preset small   # batch size, learning rate and tokens for so many FLOPs, by Ling's scaling laws
    python train.py --plot runs/toy                # pictures (needs matplotlib); --tensorboard writes for that while training
    python train.py --study lever                  # do experts pay? Small runs, MoE and dense, over budgets; or: --study routers
    python train.py --out runs/toy --merge 8       # average the last checkpoints instead of decaying (train with --decay 0 --keep 8)
    torchrun --nproc-per-node 8 --max-restarts 9 train.py --preset ling-mini-2.0 --data corpus/ --tokenizer PATH/tokenizer.json
    torchrun --nproc-per-node 8 train.py --out runs/ling-mini-2.0 --export my-ling      # its weights, in the released format
    torchrun --nnodes 2 ... train.py --sync edit --sync_seconds 60 ...   # slow links, uneven hosts: local steps, and a sync now and then

Every field of TrainConfig and LingConfig is a flag. Defaults < preset < flags; a run that continues takes its own.

runs/NAME/ holds config.json (model), train.json (run), metrics.jsonl (one JSON object a line), ledger.jsonl (spikes, and what became of
their samples), trace/ (seconds by phase), plan.json (what was planned, what happened), the tokenizer, data/ (the corpus as token ids) and
checkpoints step_00001234/ with `latest` naming the newest. SIGINT (Ctrl-C), SIGTERM or SIGUSR1 finishes the step and saves.
Many processes do what one does: the same samples, the same sums (but for --sync edit), the same checkpoints, which any number continues.
"""
import argparse
import collections
import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import glob
import hashlib
import heapq
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
import timeit
import types
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint as recomputed

from ling import (PRESETS, AllToAll, BadInput, Ling, LingConfig, MoE, Warmup, check_metadata, components, count_params, count_targets,
                  checkpoints, file_crc, find_checkpoint, checkpoint_damage, flops_per_token, hold, load_checkpoint, local, option,
                  read_config, read_json, require, update_expert_bias, write_beside, write_json)
from sample import PATTERN, Parser, Tokenizer, load_tokenizer, pick_device, run_cli, spellings, text_of, tokenizer_of

# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration

def amount(text):
    """A number as people write large ones: 1e18, 300B, 1.5T."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1)
    n = float(text[:-1] if scale > 1 else text) * scale
    if not 1 <= n < 1e30:
        raise argparse.ArgumentTypeError(f"{text} must be in 1..1e30")
    return n


DECAY = {"sqrt": lambda x: 1 - math.sqrt(x), "linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}     # 1 .. 0
RECOMPUTE = ("none", "moe", "block")


@dataclass
class TrainConfig:
    preset: str = option("toy", "shape of the model, see PRESETS in ling.py", choices=tuple(PRESETS))
    data: list = option((), "text files, folders, globs, or .bin shards of token ids; default: Python's standard library", nargs="+")
    tokenizer: str = option("bpe2048", "bpeN (learned from the training files), bytes, a tiktoken name, a .tiktoken file or tokenizer.json")
    out: str = option("", "run folder; default: runs/PRESET")
    init: str = option("", "start from the weights in this folder: a release or a run")
    fresh: bool = option(False, "start over in a new folder")
    dense: bool = option(False, "replace the experts by a dense MLP of equal active parameters")
    seed: int = option(0, "of the weights, the order of the data and the routing warm-up")
    steps: int = option(900, "optimizer steps")
    seq_len: int = option(256, "tokens per sequence")
    batch_tokens: int = option(4096, "tokens per optimizer step, over all micro-batches")
    micro_batch_tokens: int = option(4096, "tokens per forward pass, at most; lower it when memory runs out")
    batch_warmup_steps: int = option(0, "the batch grows linearly to batch_tokens over so many steps")
    batch_start: float = option(0.25, "part of batch_tokens it starts with")
    lr: float = option(3e-3, "peak learning rate")
    warmup_steps: int = option(50, "linear warm-up of the learning rate")
    halve_at: float = option(0.0, "part of the run after which the learning rate is halved (Ling 1: 0.6); 0: never")
    decay: float = option(0.2, "last part of the run, over which the learning rate falls to final_lr; 0: constant")
    final_lr: float = option(0.0, "learning rate at the end, as a part of lr")
    weight_decay: float = option(0.1, "on matrices, embeddings included; never on norms and biases")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    clip: float = option(1.0, "gradients are scaled down to this global norm")
    eval_every: int = option(200, "steps between evaluations on the held-out files; 0: only at the end")
    eval_tokens: int = option(1 << 19, "held-out tokens an evaluation reads, evenly many of all")
    save_every: int = option(200, "steps between checkpoints; 0: only at the end")
    keep: int = option(2, "checkpoints to keep")
    device: str = option("", "default: the accelerator if there is one, else cpu")
    balance: str = option("global", "f of the balance loss: global, the load of the whole step before; "
                          "micro, of each micro-batch by itself", choices=("global", "micro"))
    # a run that looks after itself
    spike_z: float = option(6.0, "a loss or gradient norm so many robust standard deviations above the recent median is a spike; "
                            "0: none is")
    spike_width: int = option(2, "spikes in a row from which on updates are skipped and their samples come back later")
    spike_limit: int = option(30, "spikes in a row, after which the run stops")
    report: str = option("", "print where the time of this run went, which rank held up the others, and what to try; and stop")
    profile: int = option(0, "write a Chrome trace of the three steps after this one, of every rank, into the run's folder; 0: none")
    merge: int = option(0, "average the last N checkpoints of the run, as if the learning rate had decayed over them, into --export; "
                        "and stop")
    merge_shape: str = option("sqrt", "the decay that --merge stands for: 1 - sqrt(x), 1 - x or (1 + cos(pi x)) / 2", choices=tuple(DECAY))
    # many processes
    sync: str = option("step", "step: gradients of all ranks, every step; edit: --replicate copies train on their own between syncs",
                       choices=("step", "edit"))
    sync_every: int = option(16, "edit: steps of a copy between syncs")
    sync_seconds: float = option(0.0, "edit: sync after so many seconds instead, so that a slow copy does fewer steps")
    sync_warmup: int = option(50, "edit: steps with gradients of all ranks before the first on their own")
    outer_lr: float = option(0.8, "edit: step size of a sync; 1 with --outer_momentum 0 moves to the weighted mean")
    outer_momentum: float = option(0.5, "edit: Nesterov momentum from sync to sync")
    outer_clip: float = option(10.0, "edit: largest norm of a layer's mean change")
    sync_z: float = option(3.0, "edit: a copy whose change is so many standard deviations larger than it used to be is left out; "
                           "0: only if not finite")
    sync_temperature: float = option(1.0, "edit: copies are weighted by softmax(-norm of their change / this); 0: all alike")
    replicate: int = option(0, "copies of the dense weights: all ranks (DDP) .. 1 (FSDP), between them HSDP; "
                            "0: by memory (edit: one a node)")
    ep: int = option(0, "ranks that share out the routed experts and send each other tokens; 1: none; 0: by what moves fewer bytes")
    recompute: str = option("none", "activations computed again in the backward pass", choices=RECOMPUTE)
    compile: bool = option(False, "torch.compile each block")
    timeout: int = option(600, "seconds without progress after which a hang is named and ended")
    export: str = option("", "write the newest checkpoint of the run to this folder in the released format, and stop")
    # what it costs, what it shows
    plan: bool = option(False, "count what this run would take on each --device (names of DEVICES, NAME=TFLOPS/GB/PRICE, or all), and stop")
    tokens: float = option(0.0, "tokens to train on, e.g. 300B: sets --steps", type=amount)
    mfu: float = option(0.3, "part of a device's peak that a plan reckons with")
    ranks: int = option(0, "processes of a plan; 0: the least that hold the model")
    budget: float = option(0.0, "FLOPs to spend: print batch size, learning rate and tokens by Ling's scaling laws, and stop", type=amount)
    plot: str = option("", "draw what this run's metrics.jsonl and ledger.jsonl hold, into its folder (needs matplotlib), and stop")
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, into the run's folder")
    study: str = option("", "train a table of small models, compare them and draw it: lever (MoE against dense), routers; and stop",
                        choices=("", "lever", "routers"))

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), {list: (list, tuple), float: (int, float)}.get(f.type, f.type)
            require(isinstance(value, kind), f"--{f.name} {value!r} must be of type {f.type.__name__}")
            require(value in f.metadata.get("choices", [value]),
                    f"--{f.name} {value!r} is none of {', '.join(f.metadata.get('choices', ()))}")
        self.data = list(self.data)
        if self.tokens and self.batch_tokens >= self.seq_len > 0 <= self.batch_warmup_steps:
            self.steps, self.tokens = steps_of(self, self.tokens), 0.0
        for name, least in dict(steps=1, seq_len=2, batch_tokens=1, micro_batch_tokens=1, batch_warmup_steps=0, warmup_steps=0,
                                eval_every=0, eval_tokens=1, save_every=0, keep=1, seed=0, replicate=0, ep=0, timeout=1, spike_width=1,
                                spike_limit=1, profile=0, merge=0, sync_every=1, sync_warmup=0, ranks=0).items():
            require(least <= getattr(self, name) < 1 << 40, f"--{name} {getattr(self, name)} must be at least {least} and below 2^40")
        for name in ("lr", "weight_decay", "clip", "spike_z", "sync_seconds", "outer_lr", "outer_clip", "sync_z", "sync_temperature"):
            require(0 <= getattr(self, name) < math.inf, f"--{name} {getattr(self, name)} must be a finite number of at least 0")
        require(0 < self.mfu <= 1, f"--mfu {self.mfu} must be above 0 and at most 1")
        require(self.clip > 0, "--clip 0 would stop all learning; raise it above 0")
        for name in ("batch_start", "halve_at", "decay", "final_lr", "beta1", "beta2", "outer_momentum"):
            require(0 <= getattr(self, name) <= 1, f"--{name} {getattr(self, name)} must be in 0..1")
        require(max(self.beta1, self.beta2, self.outer_momentum) < 1, "--beta1, --beta2 and --outer_momentum must be below 1")
        require(self.sync_seconds < self.timeout,
                f"--sync_seconds {self.sync_seconds} must be below --timeout {self.timeout}: waiting for a sync would be a hang")
        require(self.outer_clip > 0, "--outer_clip 0 would stop all learning; raise it above 0")
        require(self.batch_tokens % self.seq_len == 0, f"--batch_tokens {self.batch_tokens} is not a multiple of --seq_len {self.seq_len}; "
              f"try {max(1, round(self.batch_tokens / self.seq_len)) * self.seq_len}")
        require(self.micro_batch_tokens >= self.seq_len, f"--micro_batch_tokens {self.micro_batch_tokens} is below one sequence of "
              f"--seq_len {self.seq_len}; raise it to {self.seq_len} or more")


TRAINING_ONLY = {"router_aux_loss_coef", "router_z_loss_coef", "router_warmup_steps", "expert_bias_update_rate", "mtp_loss_scaling_factor"}
MAY_CHANGE = {"steps", "eval_every", "eval_tokens", "save_every", "keep", "micro_batch_tokens", "device", "out", "fresh", "replicate",
              "ep", "recompute", "compile", "timeout", "export", "merge", "merge_shape", "profile", "spike_z", "spike_width",
              "spike_limit", "sync", "sync_every", "sync_seconds", "sync_warmup", "sync_z", "sync_temperature", "outer_lr",
              "outer_momentum", "outer_clip", "plan", "tokens", "mfu", "ranks", "budget", "tensorboard"}    # on resuming


def parse_args(argv):
    """The flags that were given, as {name: value}, for TrainConfig and for LingConfig."""
    parser = Parser(prog="train.py", description="Train a Ling model.", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for cls, preset in ((TrainConfig, {}), (LingConfig, PRESETS[TrainConfig.preset])):
        group = parser.add_argument_group(cls.__name__, f"defaults: those of --preset {TrainConfig.preset}" if preset else None)
        for f in dataclasses.fields(cls):
            kwargs = {"action": argparse.BooleanOptionalAction} if f.type is bool else {} if f.type is list else {"type": f.type}
            kwargs |= dict(f.metadata, help=f"{f.metadata['help']} [{preset.get(f.name, f.default)}]".replace("%", "%%"))
            group.add_argument(*spellings(f"--{f.name}"), **kwargs)
    given = vars(parser.parse_args(argv))
    return tuple({f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given} for cls in (TrainConfig, LingConfig))


def dense_twin(fields):
    """Fields of a dense model with as many active parameters as the MoE of these fields: each layer's MLP is as wide as the experts
    a token uses together, and wider by the router's E * D weights, rounded up to a multiple of 8, which matmuls like."""
    c = LingConfig(**fields)
    width = (c.num_experts_per_tok + c.num_shared_experts) * c.moe_intermediate_size + c.num_experts / 3
    return fields | dict(first_k_dense_replace=c.num_hidden_layers, intermediate_size=8 * math.ceil(width / 8), num_nextn_predict_layers=0)


def resolve(given_train, given_model):
    """-> run folder, TrainConfig, LingConfig (of a new run: before the vocabulary is known), whether the run continues. Reads only."""
    preset = given_train.get("preset", "toy")
    run = Path(given_train.get("out") or f"runs/{preset}{'-dense' if given_train.get('dense') else ''}")
    if given_train.get("fresh"):
        base, n = run.resolve(), 1
        while run.exists():
            run, n = base.with_name(f"{base.name}-{n + 1}"), n + 1
    elif (run / "config.json").exists():
        saved, config = read_json(run / "train.json"), read_config(run)
        require(isinstance(saved, dict), f"{run}/train.json must hold a JSON object; get it back, or start over with --fresh")
        was, same = saved | dataclasses.asdict(config), None
        with contextlib.suppress(BadInput):
            same = dataclasses.replace(config, **given_model) == config                      # --head_dim 0, say
        for key, value in {**given_train, **given_model}.items():
            require(key in MAY_CHANGE or value == was.get(key) or key in given_model and same, f"--{key} {value}: the run in {run} was "
                    f"started with {was.get(key)!r}; drop the flag to continue it, or add --fresh")
        names = {f.name for f in dataclasses.fields(TrainConfig)}
        return run, TrainConfig(**{name: value for name, value in {**saved, **given_train}.items() if name in names}), config, True
    train = TrainConfig(**given_train)
    if train.init:
        config = read_config(train.init)
        for key in ("preset", "dense"):
            require(key not in given_train, f"--{key} cannot go with --init: the weights in {train.init} bring their own shape")
        for key, value in given_model.items():
            require(key in TRAINING_ONLY or value == getattr(config, key),
                    f"--{key} {value}: the weights in {train.init} have {key}={getattr(config, key)!r}, which cannot change")
        config = dataclasses.replace(config, **given_model)
        train.tokenizer = given_train.get("tokenizer", train.init)
        tokenizer_of(train.init, given_train.get("tokenizer"))                               # raises if they differ
    else:
        fields = {**PRESETS[train.preset], **given_model}
        for key in ("first_k_dense_replace", "intermediate_size", "num_nextn_predict_layers"):
            require(not (train.dense and key in given_model), f"--{key} cannot go with --dense, which sets it")
        config = LingConfig(**(dense_twin(fields) if train.dense else fields))
    require(train.seq_len <= config.max_position_embeddings, f"--seq_len {train.seq_len} exceeds max_position_embeddings="
            f"{config.max_position_embeddings}; lower one or raise the other")
    return run, train, config, False


# ----------------------------------------------------------------------------------------------------------------------
# 2. Processes. The environment is read here and nowhere else.

class Team:
    """The processes of a run, and what they tell each other outside the model. One process is a team of one, without a group."""

    def __init__(self, device):
        """Raises BadInput where the device is not there."""
        variable = lambda name, default: int(os.environ.get(name, default))
        self.rank, self.size, self.local_rank = variable("RANK", 0), variable("WORLD_SIZE", 1), variable("LOCAL_RANK", 0)
        self.local_size, self.told = variable("LOCAL_WORLD_SIZE", 1), 0
        count = torch.accelerator.device_count() if self.size > 1 and device != "cpu" else 0
        require(not count or self.local_rank < count,
                f"--nproc-per-node {self.local_size}: this machine has {count} devices; start at most {count} processes")
        if count:                                                # first: what pick_device tries would be made on device 0, by every rank
            torch.accelerator.set_device_index(self.local_rank)
        self.device = torch.device(pick_device(device.partition(":")[0]).type, self.local_rank) if count else pick_device(device)
        # torchrun, or a study; a shell may go, and a run in its background stay
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LING_PARENT") == str(os.getppid()) else None
        self.restarts = variable("TORCHELASTIC_MAX_RESTARTS", 0)
        self.nodes = variable("GROUP_WORLD_SIZE", self.size // self.local_size)
        self.replicas, self.replica, self.ranks, self.within, self.across = 1, 0, self.size, None, None   # until split()

    @property
    def memory(self):
        """Bytes that this process may use."""
        if self.device.type in ("cuda", "xpu"):
            return torch.get_device_module(self.device).get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.local_size if hasattr(os, "sysconf") else 16e9

    def autocast(self):
        """bf16 matmuls on an accelerator, fp32 weights and optimizer; on a CPU fp32 throughout, which is faster there."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu")

    def connect(self, timeout):
        """Join the others; from here on only rank 0 speaks."""
        if self.size == 1:
            return
        if self.rank:
            sys.stdout = open(os.devnull, "w")
            warnings.simplefilter("ignore")
        patience = datetime.timedelta(seconds=timeout + 60)                                  # Watch comes first, and says more
        self.store = self.open_store(patience)
        backend = "gloo" if self.device.type == "cpu" else f"cpu:gloo,{self.device.type}:{dist.get_default_backend_for_device(self.device)}"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=patience)

    def open_store(self, patience):
        """Where the ranks find each other. torchrun's own store outlives a restart, and in it restarted ranks find the addresses of
        dead ones, and hang (pytorch#135712): so rank 0 opens a store for this attempt alone, and leaves its address there."""
        require({"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(), "WORLD_SIZE is set, MASTER_ADDR or MASTER_PORT is not: start with "
                "torchrun, or unset WORLD_SIZE")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return dist.TCPStore(host, port, self.size, self.rank == 0, timeout=patience)
        agent, deadline = dist.TCPStore(host, port, timeout=patience), time.monotonic() + patience.total_seconds()
        if self.rank == 0:
            with socket.create_connection((host, port)) as way:                              # the address others reach this machine by
                mine = way.getsockname()[0]
            store = dist.TCPStore(mine, 0, is_master=True, wait_for_workers=False, timeout=patience)
            agent.set("ling", f"{mine} {store.port}")
            return store
        while True:
            host, port = agent.get("ling").decode().split()
            with contextlib.suppress(OSError):                   # of a rank 0 that is dead: the new one is not up yet
                socket.create_connection((host, int(port)), 5).close()
                return dist.TCPStore(host, int(port), timeout=patience)
            require(time.monotonic() < deadline, f"rank {self.rank} finds no rank 0 at {host}:{port}; is a firewall between the nodes?")
            time.sleep(0.1)

    def first(self, work):
        """Rank 0 does it, all get the result, which must be JSON. A user's mistake or a full disk ends all, and only rank 0 says so."""
        if self.size == 1:
            return work()
        key, self.told = f"told/{self.told}", self.told + 1
        if self.rank == 0:
            try:
                result = work()
            except (BadInput, OSError, MemoryError):
                self.store.set(key, "")
                raise
            self.store.set(key, json.dumps([result]))
            return result
        self.store.wait([key], datetime.timedelta(days=7))                                   # preparing a large corpus takes its time
        answer = self.store.get(key)
        return json.loads(answer)[0] if answer else sys.exit(2)

    def split(self, replicas):
        """Into replicas of neighbouring ranks that train on their own between syncs (--sync edit): this rank's is `replica`, with the
        group `within`; `across` joins the ranks at its place in all replicas."""
        self.replicas, self.ranks = replicas, self.size // replicas
        mesh = init_device_mesh(self.device.type, (self.replicas, self.ranks), mesh_dim_names=("across", "within"))
        self.replica, self.within, self.across = self.rank // self.ranks, mesh["within"].get_group(), mesh["across"].get_group()

    def sum(self, tensor, group=None):
        """In place, over a group, by default all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, group=group)
        return tensor

    def gather(self, value, group=None):
        """Every rank's value, in a list on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def close(self):
        """After success only: in failure a rank would wait here for one that is gone."""
        if self.size > 1:
            dist.barrier()                                                                   # rank 0 holds the store: it leaves last
            dist.destroy_process_group()


class Watch:
    """Knows where every rank is. When this one has made no progress for `timeout` seconds, says which ranks hold it up and where,
    and ends the process, so that torchrun can start again: a collective would wait for ever."""

    def __init__(self, team, timeout, trace):
        self.team, self.timeout, self.trace, self.count, self.place, self.since = team, timeout, trace, 0, "start", time.monotonic()
        self.heard, self.saving = {}, False                      # what others said last and when; whether this rank waits for a save
        self.done = threading.Event()
        # Two: a store whose host is stopped answers never, nor does it say so, and whoever asked waits.
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.speak, self.watch) if team.size > 1]
        if team.size > 1:
            self.store = dist.TCPStore(team.store.host, team.store.port, timeout=datetime.timedelta(seconds=10))   # a connection of its own
        for thread in self.threads:
            thread.start()

    def at(self, step, phase):
        """Called by all ranks in the same order, so that the least count is the furthest behind (--sync edit: at each sync anew)."""
        self.count, self.place, self.since = self.count + 1, f"step {step}, {phase}", time.monotonic()
        self.trace.mark(phase)

    def stop(self):
        """Before the process ends: a thread inside the store would be an abort then."""
        self.done.set()
        for thread in self.threads:
            thread.join(10)

    def speak(self):
        beat = 0
        while not self.done.wait(0.5 * (beat > 0)):
            beat += 1
            with contextlib.suppress(dist.DistError):
                self.store.set(f"at/{self.team.rank}", f"{self.count} {time.monotonic() - self.since:.1f} {beat} {self.place}")
                self.listen() if self.saving else self.heard.clear()

    def listen(self):
        """A slow disk is no hang, as long as the others live: rank 0 hears all of them, they hear rank 0."""
        for rank in range(self.team.size) if self.team.rank == 0 else [0]:
            if (said := self.store.get(f"at/{rank}")) != self.heard.get(rank, (None,))[0]:
                self.heard[rank] = said, time.monotonic()
        self.since = max(self.since, min(when for _, when in self.heard.values()))

    def watch(self):
        while time.monotonic() - self.since <= self.timeout:
            if self.done.wait(0.5):
                return
        time.sleep(2)                                                                        # for the others to have said where they are
        behind = []
        ask = threading.Thread(target=lambda: behind.extend(self.behind()), daemon=True)
        ask.start()
        ask.join(10)
        print(f"train.py: error: hang: rank {self.team.rank} waits at {self.place} since {time.monotonic() - self.since:.0f} s (--timeout "
              f"{self.timeout}); behind: {'; '.join(behind) or 'rank 0, which does not answer'}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)

    def behind(self):
        """The ranks that are furthest behind, in words."""
        with contextlib.suppress(dist.DistError):
            said = [self.store.get(key).decode() if self.store.check([key]) else "-1 0 0 start"
                    for key in (f"at/{rank}" for rank in range(self.team.size))]
            places = [(rank, int(count), float(waited), place)
                      for rank, (count, waited, _, place) in enumerate(line.split(" ", 3) for line in said)]
            least = min(count for _, count, *_ in places)
            last = [entry for entry in places if entry[1] == least]
            silent = [entry for entry in last if entry[2] < self.timeout / 2]                # of those in one phase: who waits says so
            return [f"rank {rank}, last heard at {place}" for rank, *_, place in silent or last]
        return []


# ----------------------------------------------------------------------------------------------------------------------
# 3. Data: files -> tokens, and the order in which a run sees them

HELD_OUT = 50               # one file in so many is held out, by a checksum of its name, so that the choice never moves


def standard_library():
    """Python's own source without tests and generated tables (character maps), which would flood the samples."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "_bundled", "__pycache__"}
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)}


def find_files(patterns):
    """{name: path} of all files meant by files, folders and globs; a file given twice counts once."""
    if not patterns:
        return standard_library()
    found = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            hits = [p for p in sorted(path.rglob("*"))
                    if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            hits = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()]
        require(hits, f"--data {pattern}: no such file, no file in that folder, or nothing matches; check the path")
        found |= {p.as_posix(): p for p in hits}
    return found


def read_text(path):
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"--data {path} is not UTF-8 text (byte {error.start}); leave it out, "
                       "e.g. with a glob like 'folder/**/*.txt'") from None
    require("\0" not in text, f"--data {path} looks binary (it has NUL bytes); leave it out, e.g. with a glob like 'folder/**/*.txt'")
    return text


def open_shard(path, vocab_size):
    """A .bin of token ids, memory-mapped. Recognises the 1 KiB header of llm.c and modded-nanogpt (FineWeb); without one, ids
    are uint16 if the vocabulary fits, else uint32. Raises BadInput when an id is beyond the vocabulary."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype=np.int32, count=3) if size >= 1024 else [0]
    dtype = {20240520: np.uint16, 20240801: np.uint32}.get(int(header[0]))                   # llm.c: GPT-2, Llama 3
    offset = 1024 if dtype else 0
    dtype = np.dtype(dtype or (np.uint16 if vocab_size <= 1 << 16 else np.uint32))
    if (size - offset) % dtype.itemsize or size == offset:
        raise BadInput(f"{path} has {size} bytes, which is not a positive number of {dtype} token ids")
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=offset)
    if offset and header[2] != len(tokens):
        raise BadInput(f"{path} holds {len(tokens)} tokens but its header promises {header[2]}; it was cut short")
    require(offset or dtype != np.uint16 or len(tokens) < 100 or tokens[1:1 << 20:2].any(), f"{path} has no header and looks like 32-bit "
            f"token ids: every second of its 16-bit numbers is 0; write those of a vocabulary of {vocab_size} as uint16")
    for start in range(0, len(tokens), 1 << 24):
        if (largest := int(tokens[start:start + (1 << 24)].max())) >= vocab_size:
            raise BadInput(f"{path} has token id {largest}, beyond the vocabulary of {vocab_size}; name its tokenizer with --tokenizer")
    return tokens


# Python's re knows no \p{L}; the classes below mean the same up to rare signs, which only shifts merge counts a little.
CHUNKS = re.compile(PATTERN.replace(r"[^\r\n\p{L}\p{N}]?+", r"(?:[^\r\n\w]|_)?").replace(r"[^\s\p{L}\p{N}]++", r"(?:[^\s\w]|_)+")
                    .replace(r"\p{L}", r"[^\W\d_]").replace(r"\p{N}", r"\d"))


def learn_bpe(texts, size):
    """Byte-pair encoding (arXiv 1508.07909) -> {bytes: rank} of `size` ranks, or fewer when no pair is left that occurs twice.

    Works on distinct chunks weighted by their counts, laid end to end in one array; a heap of pair counts, corrected only where a
    merge changed something, replaces the recount after every merge."""
    chunks = Counter(chain.from_iterable(CHUNKS.findall(text) for text in texts))
    pieces = [*(b"\xff" + chunk.encode() for chunk in chunks), b"\xff\xff"]                 # no UTF-8 has that byte
    ids = np.frombuffer(b"".join(pieces), dtype=np.uint8).astype(np.int32)
    ids[ids == 255] = -1                                                                     # -1 separates chunks
    weight = np.repeat(np.array([*chunks.values(), 0], np.int64), [len(piece) for piece in pieces])

    def pairs_at(at):
        """{(left, right): weight} of the pairs that begin at these positions."""
        at = np.unique(at)
        at = at[(ids[at] >= 0) & (ids[at + 1] >= 0)]
        keys, inverse = np.unique(ids[at].astype(np.int64) << 32 | ids[at + 1], return_inverse=True)
        sums = np.bincount(inverse, weight[at], minlength=len(keys)).astype(np.int64)
        return {(key >> 32, key & 0xFFFFFFFF): n for key, n in zip(keys.tolist(), sums.tolist())}

    counts = Counter(pairs_at(np.arange(len(ids) - 1)))
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:
            continue                                                                         # stale: its count changed since
        if -n < 2:
            break
        at = np.flatnonzero((ids[:-1] == pair[0]) & (ids[1:] == pair[1]))
        if pair[0] == pair[1]:                                                               # "aaa" holds one "aa", not two
            run = np.cumsum(np.diff(at, prepend=-2) != 1)
            first = np.concatenate([[0], np.flatnonzero(np.diff(run)) + 1])
            at = at[(np.arange(len(at)) - first[run - run[0]]) % 2 == 0]
        before = pairs_at(np.concatenate([at - 1, at, at + 1]))
        ids[at] = len(tokens)
        ids, weight = np.delete(ids, at + 1), np.delete(weight, at + 1)
        at = at - np.arange(len(at))                                                         # the same places, after the deletions
        after = pairs_at(np.concatenate([at - 1, at]))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for changed in before.keys() | after.keys():
            counts[changed] += after.get(changed, 0) - before.get(changed, 0)
            if counts[changed] > 0:
                heapq.heappush(heap, (-counts[changed], changed))
            else:
                del counts[changed]
    return {token: rank for rank, token in enumerate(tokens)}


def split(sizes):
    """sizes {name: how large} -> {"train": names, "val": names held out, of a tenth of the data at most (none when there are too few
    files: then the tail of the data is)}."""
    parts = {"train": [], "val": []}
    for name in sizes:
        parts["train" if zlib.crc32(os.fsencode(name)) % HELD_OUT else "val"].append(name)
    return parts if 0 < sum(sizes[name] for name in parts["val"]) <= sum(sizes.values()) / 10 else {"train": [*sizes], "val": []}


def hold_out_tail(arrays):
    if not arrays["val"]:
        last = arrays["train"][-1]
        cut = max(2, len(last) // HELD_OUT)
        arrays["train"][-1], arrays["val"] = last[:-cut], [last[-cut:]]
    return arrays


def open_shards(files, vocab_size):
    opened = {name: open_shard(path, vocab_size) for name, path in files.items()}
    sizes = {name: len(array) for name, array in opened.items()}
    return hold_out_tail({part: [opened[name] for name in names] for part, names in split(sizes).items()})


def prepare(train, config, given_model):
    """What a new run needs, read and checked, nothing written -> Tokenizer, LingConfig with its vocabulary, {"train", "val"}: lists of
    arrays of token ids, and whether these are shards that stay where they are."""
    files = find_files(train.data)
    require(files, "this Python comes without its library's source; name your text with --data")
    are_shards = {path.suffix == ".bin" for path in files.values()}
    require(len(are_shards) == 1, "--data mixes .bin shards with text files; give one kind")
    shards, learned = are_shards.pop(), re.fullmatch(r"bpe(\d+)", train.tokenizer)
    require(not (shards and learned), f"--data {next(iter(files))} is already token ids; name the tokenizer that made it with --tokenizer")
    if learned and not 257 <= int(learned[1]) <= 1 << 20:
        raise BadInput(f"--tokenizer {train.tokenizer}: N must be in 257..{1 << 20} (256 bytes, merges, end of text)")
    tokenizer = None if learned else load_tokenizer(train.tokenizer)
    if not shards:
        texts = {name: text for name, path in files.items() if (text := read_text(path))}
        require(texts, f"--data {' '.join(train.data)}: nothing but empty files ({len(files)}); give files with text")
        parts = split({name: len(text) for name, text in texts.items()})
    if learned:
        start, size = time.perf_counter(), int(learned[1])
        print(f"tokenizer: learning {size - 257} byte pairs from {sum(len(texts[name]) for name in parts['train']) / 1e6:.1f} MB",
              end="", flush=True)
        tokenizer = Tokenizer.from_ranks(learn_bpe((texts[name] for name in parts["train"]), size - 1))
        print(f", {time.perf_counter() - start:.1f} s")
    config = with_vocabulary(train, config, given_model, tokenizer)
    require(tokenizer.size <= config.vocab_size, f"tokenizer {train.tokenizer} has {tokenizer.size} tokens, more than "
            f"vocab_size={config.vocab_size}; raise --vocab_size to {tokenizer.size} or choose a smaller tokenizer")
    if shards:
        arrays = open_shards(files, config.vocab_size)
    else:
        dtype, end = np.uint16 if config.vocab_size <= 1 << 16 else np.uint32, [] if tokenizer.end is None else [tokenizer.end]
        ids = {part: [np.array(tokenizer.encode(texts[name]) + end, dtype=dtype) for name in names] for part, names in parts.items()}
        arrays = hold_out_tail({part: [np.concatenate(each)] if each else [] for part, each in ids.items()})
    Data(arrays, train)                                                                      # raises if it is too short
    return tokenizer, config, arrays, shards


def with_vocabulary(train, config, given_model, tokenizer=None):
    """config with its tokenizer's vocabulary, unless preset, flags or weights bring one.
    No tokenizer: its size alone, as a plan needs it."""
    known = "vocab_size" in {**PRESETS[train.preset], **given_model}
    if train.init or known and tokenizer is None:
        return config
    if tokenizer is None and (learned := re.fullmatch(r"bpe(\d+)", train.tokenizer)):
        return dataclasses.replace(config, vocab_size=int(learned[1]))
    tokenizer = tokenizer or load_tokenizer(train.tokenizer)
    end = tokenizer.end if config.eos_token_id is None else config.eos_token_id
    return dataclasses.replace(config, eos_token_id=end, **({} if known else {"vocab_size": tokenizer.size}))


def write_data(run, arrays):
    """Keep the corpus as token ids in the run: a resumed run sees the same samples, whatever happened to the files."""
    (run / "data").mkdir(exist_ok=True)
    for part, (array,) in arrays.items():
        write_beside(run / "data" / f"{part}.{array.dtype}", lambda f: f.write(array.data))


def read_data(run, train, config):
    """The arrays of a run that continues."""
    if not (run / "data").exists():
        arrays = open_shards(find_files(train.data), config.vocab_size)
    else:
        paths = {part: next((run / "data").glob(f"{part}.*"), None) for part in ("train", "val")}
        require(all(paths.values()), f"{run}/data is incomplete; start over with --fresh")
        try:
            arrays = {part: [np.memmap(path, dtype=np.dtype(path.suffix[1:]), mode="r")] for part, path in paths.items()}
        except (ValueError, TypeError) as error:
            raise BadInput(f"{run}/data is damaged ({error}); restore it or start over with --fresh") from None
    size, saved = sum(map(len, arrays["train"])), read_json(run / "train.json")
    was = saved.get("train_tokens")
    require(size == was, f"{run} was started on {was} training tokens, now there are {size}; restore the data or start over with --fresh")
    require(saved.get("train_crc") in (None, crc_of(arrays)),
            f"{run} was started on other files, or in another order; restore the data or start over with --fresh")
    return arrays


def crc_of(arrays):
    """Of the training data, as far as it is cheap: the length, the beginning and the end of each array, in their order."""
    return functools.reduce(lambda crc, part: zlib.crc32(b"%d" % len(part) + part[:1 << 16].tobytes() + part[-1 << 16:].tobytes(), crc),
                            arrays["train"], 0)


def permute(i, n, key):
    """A permutation of 0..n-1, computed for one i: a four-round Feistel network on the bits of i, walked until it lands below n.
    Needs no memory, so that sample number a billion is as cheap as sample 0."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            digest = hashlib.blake2s(f"{key}/{r}/{right}".encode(), digest_size=8).digest()  # not a CRC: those are linear
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        i = left << half | right
        if i < n:
            return i


class Data:
    """Windows of seq_len + 1 tokens. Sample number k of a run is a pure function of the seed and k: the order depends neither on
    the batch size nor on the number of processes, and resuming needs no state but k."""

    def __init__(self, arrays, train):
        self.S, self.seed, self.train, self.val = train.seq_len, train.seed, arrays["train"], arrays["val"]
        self.every = -(-sum(map(len, self.val)) // train.eval_tokens)                        # of so many held-out windows one is read
        self.ends = np.cumsum([max(0, len(part) - 1) // self.S for part in self.train])      # windows up to each part
        require(all(len(part) > 1 for part in self.val), "a held-out part of the data has less than two tokens; add data")
        require(self.ends[-1] >= 1, f"the training data has {sum(map(len, self.train))} tokens, less than one window of "
                f"--seq_len {self.S} + 1; add data or lower --seq_len")

    def window(self, k):
        epoch, i = divmod(k, int(self.ends[-1]))
        i = permute(i, int(self.ends[-1]), f"{self.seed}/{epoch}")                           # each epoch in another order
        part = int(np.searchsorted(self.ends, i, side="right"))
        start = (i - (int(self.ends[part - 1]) if part else 0)) * self.S
        return self.train[part][start:start + self.S + 1]

    def batch(self, samples, device):
        """Numbers of samples, -1: an ignored one -> tokens, targets (len(samples),S) int64."""
        return self.stack([self.window(k) if k >= 0 else [] for k in samples], device)

    def stack(self, windows, device):
        """Windows of at most S + 1 tokens -> tokens, targets (len(windows),S); past the end of a window, targets are -1: ignored."""
        rows = np.full((len(windows), self.S + 1), -1, dtype=np.int64)
        for row, window in zip(rows, windows):
            row[:len(window)] = window
        rows = torch.from_numpy(rows).to(device)
        return rows[:, :-1].clamp(min=0), rows[:, 1:]

    def held_out(self, rows, device, rank=0, ranks=1):
        """Held-out windows, all or --eval_tokens of them, in batches of `rows`, each rank every so many; all ranks get as many batches."""
        windows = [part[start:start + self.S + 1] for part in self.val for start in range(0, len(part) - 1, self.S)][::self.every]
        for first in range(0, len(windows), rows * ranks):
            mine = windows[first + rank * rows:first + (rank + 1) * rows]
            yield self.stack(mine + [[]] * (min(rows, len(windows) - first) - len(mine)), device)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Layout: who holds what

def choose_layout(train, config, team, counts=None):
    """-> train with replicate and ep filled in, and why. Raises BadInput when what was asked for does not divide up. team: a Team, or
    what a plan says of one; counts: count_params(config), if at hand."""
    world, E, reasons, counts = team.size, config.num_experts, [], counts or count_params(config)
    require(train.replicate == 0 or world % train.replicate == 0,
            f"--replicate {train.replicate} does not divide the {world} ranks; choose a divisor")
    require(train.ep == 0 or world % train.ep == 0 and E % train.ep == 0,
            f"--ep {train.ep} must divide the {world} ranks and num_experts={E}; try {math.gcd(world, E)}")
    moe = config.num_hidden_layers > config.first_k_dense_replace or config.num_nextn_predict_layers > 0
    require(train.ep <= 1 or moe, f"--ep {train.ep}: this model has no routed experts; drop the flag")
    replicate, ep, room = train.replicate, train.ep, team.memory / 2
    if train.sync == "edit":
        replicate = replicate or (team.nodes if team.nodes > 1 else world)
        require(world % replicate == 0,
                f"--sync edit: {world} ranks cannot form {replicate} equal copies; choose a --replicate that divides them")
        least = int(batch_schedule(train, 1)[1])                                             # it only grows
        require(least >= replicate,
                f"--sync edit: a batch of {least} sequences cannot be shared out to {replicate} copies; raise --batch_tokens")
        require(replicate > 1, "--sync edit needs at least two copies that train on their own; "
                f"{world} ranks with --replicate {replicate} are one")
        inner = world // replicate                               # each copy is FSDP over its ranks
        require(inner % max(1, ep) == 0, f"--ep {ep} must divide the {inner} ranks of each of the {replicate} copies")
        ep = ep or 1
    if not replicate:
        needs = {r: sum(memory_per_rank(config, counts, world, r, ep or 1)[kind] for kind in ("weights", "gradients", "optimizer"))
                 for r in (world, world // team.local_size, 1) if world % r == 0}            # hosts need not be alike
        replicate = next((r for r in needs if needs[r] <= room), 1)
        reasons.append(f"replicate {replicate}: training state of {needs[replicate] / 1e9:.2f} GB a rank, "
                       f"where half of memory is {room / 1e9:.0f} GB")
    if not ep:
        # Gathering a layer's experts twice and reducing their gradients, 2 + 2 + 4 bytes each; against four trips of k rows a token.
        gather = 8 * 3 * E * config.hidden_size * config.moe_intermediate_size
        send = 4 * 2 * config.num_experts_per_tok * config.hidden_size * (train.micro_batch_tokens // train.seq_len) * train.seq_len
        ep = math.gcd(team.local_size, E, world) if moe and replicate < world and send < gather else 1
        reasons.append(f"ep {ep}: " + ("experts are not sharded" if replicate == world or not moe else
                       f"a layer sends {send / 1e6:.0f} MB of tokens, or gathers {gather / 1e6:.0f} MB of experts"))
    train = dataclasses.replace(train, replicate=replicate, ep=ep)
    copies = f"--sync edit: {replicate} copies of {world // replicate} ranks each," if train.sync == "edit" else f"--replicate {replicate}"
    needs = needs_of(train, config, counts, world, team.device.type == "cpu")
    counted = "GB a rank, counted: " + ", ".join(f"{kind} {n / 1e9:.2g}" for kind, n in needs.items())
    return train, "\n        ".join([f"{world} ranks, {copies} --ep {ep}", *reasons, counted])


def needs_of(train, config, counts, world, cpu):
    """memory_per_rank of a run whose layout is chosen."""
    edit = train.sync == "edit" and world > 1
    tokens = min(train.micro_batch_tokens, max(train.seq_len, train.batch_tokens // world))
    needs = memory_per_rank(config, counts, *((world // train.replicate, 1) if edit else (world, min(world, train.replicate or 1))),
                            train.ep or 1, tokens, train.recompute, 4 if cpu else 2)
    if edit:
        needs["anchor, outer momentum, change"] = 3 * needs["weights"]
        needs["host copy for saving"] += needs["weights"]
    return needs


def memory_per_rank(config, counts, world, replicate, ep, tokens=0, recompute="none", bytes_each=2):
    """Bytes a rank needs by component, for a micro-batch of `tokens`; counts: count_params(config). Weights, gradients and both moments are
    fp32 and exact; what is in flight (two gathered blocks, and embedding and head) and the activations, in bytes_each, are counted from
    shapes: of every tensor that autograd keeps, and the chunk of logits that linear_cross_entropy works on."""
    c, D, I = config, config.hidden_size, config.intermediate_size
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    moe = layers - c.first_k_dense_replace
    expert_layer = 3 * c.num_experts * D * c.moe_intermediate_size
    dense = counts["total"] + counts["mtp"] - moe * expert_layer
    head = (1 if c.tie_word_embeddings else 2) * c.vocab_size * D
    held = dense * replicate / world + moe * expert_layer / (world if ep > 1 else world / replicate)
    block = (dense - head) / layers + (expert_layer / ep if moe else 0)
    q, kv, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.num_experts_per_tok
    # numbers a token keeps: each norm's input and output; qkv, rotated q and k, the output of attention; pre-activations, routing,
    # shared experts
    attention = 2 * D + 3 * (q + kv) + 2 * c.num_attention_heads
    routed = 2 * D + (2 * k + 3 * c.num_shared_experts) * c.moe_intermediate_size + 2 * c.num_experts + 6 * k
    routed += 2 * D * (bytes_each == 2) + k * D * (ep > 1)       # the router's fp32 copy; rows that came from other ranks
    plain = (2 * D + 3 * I) * (layers > moe)
    inside = {"none": moe * routed + (layers - moe) * plain, "moe": moe * 2 * D + (layers - moe) * plain, "block": 0}[recompute]
    kept = inside + (layers * attention if recompute != "block" else layers * D) + 2 * D + c.num_nextn_predict_layers * 6 * D
    # of one block, while it is done again
    again = {"none": 0, "moe": routed * (moe > 0), "block": attention + max(routed * (moe > 0), plain)}[recompute]
    chunk = min(tokens * c.vocab_size * bytes_each, 16 << 20 if bytes_each == 4 else 4 << 30)
    return {"weights": 4 * held, "gradients": 4 * held, "optimizer": 8 * held,
            "in flight": 2 * bytes_each * (2 * block + head) if world > 1 else 2 * held * (bytes_each == 2),     # autocast's copies
            "activations": bytes_each * tokens * (kept + again) + chunk, "host copy for saving": 12 * held}


def prepare_blocks(model, train):
    """Recomputation and compilation, block by block."""
    blocks = [*model.layers, *model.mtp]
    for module in {"none": [], "moe": [block.mlp for block in model.moe_blocks()], "block": blocks}[train.recompute]:
        module.forward = functools.partial(recomputed, module.forward, use_reentrant=False, preserve_rng_state=False)    # nothing is random
    for block in blocks if train.compile else []:
        block.compile()


def parallelize(model, train, team):
    """Lay a model over all ranks, in place: two meshes over the same ranks, (replicate, shard) for the dense parameters and (edp, ep)
    for the routed experts where --ep cuts them. DDP, FSDP, HSDP and expert parallelism are shapes of these meshes, not code paths.
    With --sync edit, each replica has two such meshes of its own.

    The loss is a sum over a rank's tokens divided by the count of all ranks' (section 9), so every gradient is a plain sum: the factor
    that FSDP divides by is 1 everywhere, and no mesh has a scale of its own. (With FSDP's averages, experts come out ep times too
    large.)"""
    # Imported here, and dcp in Saver.write: they take a second and 50 MB, and what only plans or reports needs neither.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    device, copies = team.device.type, train.replicate // team.replicas
    mesh = lambda *names, sizes: init_device_mesh(device, (team.replicas, *sizes), mesh_dim_names=("across", *names))[names]
    dense = mesh("replicate", "shard", sizes=(copies, team.ranks // copies))
    sparse = mesh("edp", "ep", sizes=(team.ranks // train.ep, train.ep))
    # On an accelerator weights travel and work in bf16, gradients are summed in fp32. On a CPU all is fp32, as without ranks.
    low = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device != "cpu" else {}

    def shard(module, mesh, policy=low):
        pieces = mesh.size(mesh.ndim - 1)

        def placement(p):
            """Rows, unless there are more ranks than experts: then columns, so that every rank holds something."""
            narrow = p.dim() == 3 and local(p).shape[0] < pieces and p.shape[1] % pieces == 0
            return Shard(1 if narrow else 0)
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy, cast_forward_inputs=False), shard_placement_fn=placement,
                    # None: all but the root, whose head comes first in backward. Of one piece only a 16-bit copy is let go
                    reshard_after_forward=None if pieces > 1 or low else False)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)

    blocks, units = [*model.layers, *model.mtp], []
    for block in blocks:
        units.append([block])
        if isinstance(block.mlp, MoE) and train.ep > 1:
            experts = block.mlp.experts
            for name, p in [*experts.named_parameters()]:
                setattr(experts, name, torch.nn.Parameter(distribute_tensor(p.detach(), sparse["ep"], [Shard(0)], src_data_rank=None)))
            experts.group = sparse["ep"].get_group()
            shard(experts, sparse["edp"])
            units[-1].append(experts)
        if isinstance(block.mlp, MoE) and low:
            shard(block.mlp.gate, dense, {})                                                 # the router's weight stays fp32 on its way,
            units[-1].append(block.mlp.gate)                                                 # and does not queue behind the next block's
        shard(block, dense)
    shard(model, dense)
    for (this, *_), following in pairwise([[model], *units]):    # the host waits for --ep's counts: gather the next block before that
        this.set_modules_to_forward_prefetch(following)
    for (this, *_), before in pairwise([[model], *reversed(units)]):     # by itself FSDP would gather one of a block's two or three parts
        this.set_modules_to_backward_prefetch(before)


def grad_norm(model, team):
    """L2 norm of the whole gradient (of this replica's), 0-d: the squares of what each rank holds over how many hold the same,
    and one sum."""
    held = {}
    for p in model.parameters():
        if p.grad is not None:
            copies = math.prod(p.device_mesh.size(i) for i, placement in enumerate(getattr(p, "placements", ()))
                               if placement.is_replicate())
            held.setdefault(copies, []).append(local(p.grad))
    squares = [torch.nn.utils.get_total_norm(grads).square() / copies for copies, grads in held.items()]
    return team.sum(torch.stack(squares).sum(), team.within).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# 5. Optimizer and schedules: both pure functions of the step

def make_optimizer(model, train):
    """AdamW with decay on matrices, embeddings and head included as in Megatron, which Ling is trained with. Vectors (norms,
    biases) never decay: under NormHead the final norm alone carries the scale of the logits."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": train.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=1e-8, fused=device in ("cpu", "cuda", "mps", "xpu"))


def lr_at(step, train):
    """Warm-up, stable, decay (WSD). Linear up; constant, halved after halve_at; then down as 1 - sqrt(part of the decay done), the
    shape that [WSM] arXiv 2507.17634 found best."""
    lr, decay_start = train.lr, train.steps * (1 - train.decay)
    if train.halve_at and step >= train.halve_at * train.steps:
        lr /= 2
    if step < train.warmup_steps:
        return lr * (step + 1) / train.warmup_steps
    if step <= decay_start or train.decay == 0:
        return lr
    return lr * max(train.final_lr, DECAY["sqrt"](min(1.0, (step - decay_start) / (train.steps - decay_start))))


def merge_weights(n, shape):
    """Of n checkpoints, oldest first, so that their mean is what decay would have left: (n,), sum 1. [WSM] A change made between
    checkpoints j-1 and j is in all from j on; its weight, the sum of theirs, is to be the decay at j / n."""
    return [DECAY[shape](j / n) - DECAY[shape]((j + 1) / n) for j in range(n)]


def batch_schedule(train, steps):
    """-> (steps + 1,) int64: number of the first sample of each step; the last entry is the number of samples in the run."""
    full = train.batch_tokens // train.seq_len
    part = np.minimum(1.0, train.batch_start + (1 - train.batch_start) * np.arange(steps) / max(1, train.batch_warmup_steps))
    part = part if train.batch_warmup_steps else np.ones(steps)
    return np.concatenate([[0], np.cumsum(np.maximum(1, np.round(full * part)).astype(np.int64))])


def steps_of(train, tokens):
    """How many steps take so many tokens, the batch's warm-up among them."""
    warm, samples = batch_schedule(train, train.batch_warmup_steps), math.ceil(tokens / train.seq_len)
    after = math.ceil((samples - int(warm[-1])) / (train.batch_tokens // train.seq_len))
    return train.batch_warmup_steps + after if after > 0 else int(np.searchsorted(warm, samples))


def samples_of(step, first):
    """Numbers of the samples of a step; past the end of the schedule (a replica ahead of the others) batches stay as they were."""
    beyond = max(0, step - len(first) + 2)
    last = step - beyond
    shift = beyond * int(first[last + 1] - first[last])
    return range(int(first[last]) + shift, int(first[last + 1]) + shift)


def sequence_seed(seed, step, k):
    """Of the routing noise: follows the sample, so it is the same for every batch split, and changes with the step."""
    return zlib.crc32(f"{seed}/{step}/{k}".encode())


# ----------------------------------------------------------------------------------------------------------------------
# 6. Checkpoints: staged in memory, written beside in the background, made durable, renamed, then pointed to

def training_state(model, optimizer, load, replica=0, outer=None):
    """Everything a step changes, as {name: tensor} and nothing else, so that nothing needs pickling. The moments of other
    replicas than the first have keys of their own; what all share is saved once."""
    state = {"load": load} | {f"model.{name}": t for name, t in model.state_dict().items()}
    state |= {f"outer.{name}": t for name, t in (outer or {}).items()}
    for name, p in model.named_parameters():
        moments = optimizer.state[p]
        if not moments:                                                                      # before the first step: as AdamW makes it
            moments["step"] = torch.zeros((), dtype=torch.float32, device=p.device if optimizer.defaults["fused"] else "cpu")
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state |= {f"{f'replica{replica}' if replica else 'optimizer'}.{name}.{key}": t for key, t in moments.items()}
    return state


class Saver:
    """Writes checkpoints while training goes on. A save that fails leaves what was there before, and is tried again at the next one."""

    def __init__(self, run, state, team, watch, keep):
        self.run, self.state, self.team, self.watch, self.keep = run, state, team, watch, keep
        self.staged = self.thread = self.error = self.saved = None
        self.group = (dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))     # the thread's: training's would mix messages,
                      if team.size > 1 else None)                                            # and a slow disk is no hang

    def save(self, step, about):
        """Copy the state (what training waits for), then write it in the background, with `about`, a dict for JSON."""
        self.wait()
        if not self.staged:                                                                  # once: fresh memory is slow to touch
            self.staged = {key: torch.empty_like(t, device="cpu") for key, t in self.state.items()}
        for key, t in self.state.items():
            local(self.staged[key]).copy_(local(t))
        self.saved, self.error = None, f"cannot save a checkpoint of step {step} in {self.run} (its thread died)"  # until it says otherwise
        self.thread = threading.Thread(target=self.write, args=(step, about))
        self.thread.start()

    def wait(self):
        """Until the last save is done -> its number of steps, or None if it failed, which is said."""
        if self.join() and self.error:
            warnings.warn(f"{self.error}; training goes on, and the next save tries again", stacklevel=2)
        return self.saved

    def join(self):
        """Until the thread has ended -> whether there was one."""
        thread, self.thread = self.thread, None
        if thread is not None:
            self.watch.saving = True
            thread.join()
            self.watch.saving = False
        return thread is not None

    def finish(self, step, about):
        """The last save of a run, which must succeed. Raises BadInput."""
        if self.wait() != step:
            self.save(step, about)
            self.join()
            require(not self.error, f"{self.error}: make room and run the same command to continue")

    def write(self, step, about):
        import torch.distributed.checkpoint as dcp
        final, temporary = self.run / f"step_{step:08d}", self.run / f"tmp_{step:08d}"
        failure, sums = None, {}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is")                    # one process needs no process group
                # 0: what is staged is on the CPU, and reading ahead would go to CUDA, where a new thread is on device 0
                dcp.save(self.staged, storage_writer=dcp.FileSystemWriter(temporary, per_thread_copy_ahead=0), process_group=self.group)
            if self.team.rank == 0:
                check_metadata(temporary)                                                    # readable again, also on another torch
                write_json(temporary / "state.json", {"step": step, "torch": torch.__version__, **about})
            mine = [*temporary.glob(f"__{self.team.rank}_*"),
                    *(temporary / name for name in (".metadata", "state.json") if self.team.rank == 0)]
            sums = {path.name: [path.stat().st_size, file_crc(path)] for path in mine}       # each rank reads what it wrote
        except (OSError, dcp.api.CheckpointException, RuntimeError, BadInput) as error:
            causes = error.failures.values() if isinstance(error, dcp.api.CheckpointException) else [error]
            failure = "; ".join(dict.fromkeys(str(getattr(c, "__cause__", None) or (c[0] if isinstance(c, tuple) else c)) for c in causes))
        told = self.team.gather((failure, sums), self.group)
        failure = next((failure for failure, _ in told if failure), None)
        if self.team.rank == 0 and not failure:
            try:
                write_json(temporary / "manifest.json", {name: entry for _, sums in told for name, entry in sums.items()})
                sync_folder(temporary)
                shutil.rmtree(final, ignore_errors=True)                                     # there only if it was found damaged
                temporary.rename(final)
                sync_folder(self.run)
                write_beside(self.run / "latest", lambda f: f.write(final.name.encode()))
                sync_folder(self.run)
                steps = checkpoints(self.run)
                later = steps.index(final) + 1                   # a later one was found damaged, or training would not be here
                for old in [*steps[:max(0, later - self.keep)], *steps[later:]]:
                    shutil.rmtree(old, ignore_errors=True)
            except OSError as error:
                failure = str(error)
        failure = self.team.gather(failure, self.group)[0]
        if failure and self.team.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self.error = failure and (f"cannot save a checkpoint of step {step} in {self.run} ({failure}; "
                                  f"{shutil.disk_usage(self.run).free / 1e6:.0f} MB free); earlier ones are intact")
        self.saved = None if failure else step


def sync_folder(path):
    """Make renames in a folder durable (a no-op where folders cannot be opened, as on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


# ----------------------------------------------------------------------------------------------------------------------
# 7. A run that looks after itself: spikes, slow links, stragglers

class Spikes:
    """Loss spikes [Ling1, sections 3.4.4 and 6.1; no thresholds are published]. A step stands out by its loss or gradient norm, measured
    against the median of those accepted lately. Narrow spikes heal by themselves and pass. From the second in a row on, or if a number is
    not finite, nothing is updated: neither weights nor moments nor bias; and the samples come back, each at a random later step, where
    others dilute it. Their loss is measured apart: if it spikes again, it weighs less, and that step is taken at a lower learning rate.

    The numbers judged are those of all ranks, so all ranks agree without a message."""
    WINDOW, LEAST = 128, 64                                      # accepted steps to compare with, and how many there must be
    LOSS, NORM = 0.01, 0.5                                       # least spread, in parts of the median: a norm doubles harmlessly
    # of such a step's learning rate; of its returned samples' gradient, which Adam's moments would spread over later steps
    LOWER, WEIGHT = 0.8, 0.1

    def __init__(self, train, saved=None):
        self.train = train
        # accepted: [loss, norm]; waiting: [sample, times skipped, step it returns in];
        # row: [step, first sample, last] of the spikes in a row
        self.accepted, self.waiting, self.row = saved or ([], [], [])
        self.events = []                                         # what was decided, for ledger.jsonl

    def state(self):
        """For JSON, which keeps every bit of a float."""
        return [self.accepted, self.waiting, self.row]

    def returning(self, step):
        """Samples that are due, each handed out once."""
        due = [entry for entry in self.waiting if entry[2] <= step]
        self.waiting = [entry for entry in self.waiting if entry[2] > step]
        return due

    def stands_out(self, value, which, least, share=1.0):
        """Against the accepted steps' losses (which 0) or norms (1). share: of a batch that was averaged over; fewer samples vary more."""
        if not self.train.spike_z or len(self.accepted) < self.LEAST:
            return False
        past = [pair[which] for pair in self.accepted]
        median = statistics.median(past)
        spread = 1.4826 * statistics.median(abs(x - median) for x in past)                   # a normal distribution's standard deviation
        return value > median + self.train.spike_z * max(spread, least * abs(median)) / math.sqrt(share)

    def weight(self, loss, share):
        """Of returned samples with this mean loss, a share of the batch."""
        return self.WEIGHT if self.stands_out(loss, 0, self.LOSS, share) else 1.0

    def judge(self, step, loss, norm, samples, returned=(), again=False, alone=False):
        """-> what becomes of a step: "" and "narrow": it is done; "lower"; "skip". samples: numbers of the batch, whose mean loss is
        `loss`; returned: entries of those that were skipped before, `again` whether these spike; norm: of the gradient of both.
        alone: a replica between syncs, where a finite spike is left to the sync."""
        finite = math.isfinite(loss + norm)
        spike = not finite or not alone and (self.stands_out(loss, 0, self.LOSS) or self.stands_out(norm, 1, self.NORM))
        if not (spike or again):
            self.accepted, self.row = [*self.accepted[1 - self.WINDOW:], [loss, norm]], []
            return ""
        verdict = "lower"
        if spike:
            self.row = [*self.row, [step + 1, min(samples, default=-1), max(samples, default=-1)]]
            verdict = "narrow" if finite and len(self.row) < self.train.spike_width else "skip"
        both, times = [*samples, *(k for k, *_ in returned)], {k: n for k, n, _ in returned}
        event = {"step": step + 1, "verdict": verdict, "loss": loss if finite else None, "grad_norm": norm if finite else None,
                 "samples": both}
        if verdict == "skip":
            left = max(1, self.train.steps - step - 1)
            back = [[k, n + 1, step + 1 + sequence_seed(self.train.seed, n, k) % left] for k in both for n in [times.get(k, 0)]]
            self.waiting, event["again"] = self.waiting + back, [due + 1 for _, _, due in back]
        self.events.append(event)
        return verdict

    def hopeless(self, row):
        """Why a row of spikes should stop the run, or None."""
        if len(row) > (self.train.spike_limit if self.train.spike_z else 0):
            (first, low, _), (last, _, high) = row[0], row[-1]
            if not self.train.spike_z:
                return (f"step {last}, samples {row[-1][1]} to {high}: the loss or its gradient is not finite, and --spike_z 0 skips no "
                        f"step; look at these samples, lower --lr from {self.train.lr}, or leave --spike_z at its default")
            return (f"steps {first} to {last}, samples {low} to {high}: {len(row)} spikes in a row, see ledger.jsonl; the last "
                    f"checkpoint is intact: look at these samples, lower --lr from {self.train.lr} and start over with --fresh, "
                    f"or raise --spike_limit from {self.train.spike_limit}")


class EDiT:
    """Replicas that train on their own and are brought together now and then, layer by layer [EDiT] arXiv 2412.07210.

    A replica's change of a layer is its pseudo-gradient; its norm decides: far above what it used to be (an EMA of mean and variance) or
    not finite, and the replica is left out; the others are weighted by softmax(-norm). Their mean, clipped, is the gradient of an outer
    SGD with Nesterov momentum. A layer's sum is waited for just before the layer is needed in the next forward pass.

    Four rules are not in the paper. The loss is tested like a norm: a replica fed garbage makes steps of the usual size. A replica off in
    most layers is off in all: they adapt to each other. Where most replicas are off in some layer, all go back to where they started
    from. A replica that was off takes over the moments of one that was not, as a NaN there would never leave."""
    ALPHA, LEAST = 0.02, 8      # of the EMA, a plain mean before; syncs before anyone is judged

    def __init__(self, model, optimizer, train, team, trace, saved=None):
        blocks = [*model.layers, *model.mtp]
        inside = {p for block in blocks for p in block.parameters()}
        self.units = [[p for p in model.parameters() if p not in inside], *([*block.parameters()] for block in blocks)]
        self.biases = {i: block.mlp.gate.expert_bias for i, block in enumerate(blocks, 1)
                       if isinstance(block.mlp, MoE) and block.mlp.gate.expert_bias is not None}
        self.momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.velocity = {p: local(self.momentum[name]) for name, p in model.named_parameters()}
        self.optimizer, self.train, self.team, self.trace, self.anchor, self.flying = optimizer, train, team, trace, {}, collections.deque()
        shape = (team.replicas, len(self.units) + 1)             # each layer's norm, and the loss
        self.mean, self.variance, self.seen = torch.zeros(3, *shape, dtype=torch.float64)
        if saved and (history := torch.tensor(saved, dtype=torch.float64)).shape == (3, *shape):    # else their number has changed
            self.mean, self.variance, self.seen = history
        self.arrive = torch.compiler.disable(self.arrive)        # not as a decorator: that would import the compiler at every start
        # Ahead of FSDP's own hooks, which gather a block's weights, and the next one's; on an accelerator they do so on a stream that waits
        # for this one only at the start of the model.
        for i, module in enumerate([model, *blocks]):
            upto = i if team.ranks == 1 else i + (i > 0) if team.device.type == "cpu" else len(blocks)
            module.register_forward_pre_hook(lambda *_, upto=upto: self.arrive(upto), prepend=True)

    def state(self):
        return torch.stack([self.mean, self.variance, self.seen]).tolist()

    @torch.no_grad()
    def sum_gradients(self):
        """In the steps before replicas part."""
        for p in self.velocity:
            if p.grad is not None:
                self.team.sum(local(p.grad), self.team.across)

    @torch.no_grad()
    def leave(self):
        """Start a round: remember where from."""
        self.anchor, self.since, self.steps = {p: local(p).detach().clone() for p in self.velocity}, time.monotonic(), 0

    def due(self, seconds):
        """Whether this step, which took so long, is the last of the round: the first rank of a replica decides, by its clock."""
        if self.train.sync_seconds:
            return time.monotonic() - self.since + seconds / 2 >= self.train.sync_seconds
        return self.steps + 1 >= self.train.sync_every

    def judge(self, norms, loss, steps, lr, sick):
        """norms (replicas, layers) of the changes; of each replica, (replicas,), the round's mean loss, steps and mean learning rate, and
        whether it calls itself sick -> weights (replicas, layers), 1 in all for each layer; all 0: go back."""
        z, T, pace = self.train.sync_z, self.train.sync_temperature, lr * steps ** 0.75  # norms grow so: measured on the toy, 1 to 32 steps
        usual = torch.cat([norms / pace.clamp(min=1e-12).unsqueeze(1), loss.unsqueeze(1)], dim=1)               # (replicas, layers + 1)
        limit = self.mean + z * torch.maximum(self.variance.sqrt(), 0.1 * self.mean)
        bad = ~usual.isfinite() | sick.unsqueeze(1) | ((self.seen >= self.LEAST) & (usual > limit) & (z > 0))
        bad |= bad[:, -1:] | (bad.double().mean(1, keepdim=True) > 0.5)                      # its loss, or most of its layers
        rate = torch.clamp(1 / (self.seen + 1), min=self.ALPHA)
        change = torch.where(bad, 0, usual - self.mean)          # what is off raises no threshold
        self.mean, self.seen = self.mean + rate * change, self.seen + ~bad
        self.variance = torch.where(bad, self.variance, (1 - rate) * (self.variance + rate * change.square()))
        if (bad.double().mean(0) > 0.5).any():
            self.seen.zero_()                                    # perhaps it is the past that is wrong
            return torch.zeros_like(norms)
        score = -norms * (steps.mean() / steps).unsqueeze(1) / T if T else torch.zeros_like(norms)    # a slow replica's norm is small
        return torch.where(bad[:, :-1], -torch.inf, score).softmax(0)

    @torch.no_grad()
    def sync(self, report):
        """End a round: launch the sums of all layers.
        report: what this rank has to say -> what each replica says, weights (replicas, layers)."""
        team, places = self.team, range(len(self.units))
        changes = [torch.cat([(self.anchor[p] - local(p)).flatten() for p in unit]) for unit in self.units]
        squares = torch.stack([change.square().sum() for change in changes]).tolist()        # SYNC
        told = team.gather({**report, "squares": squares})
        norms = torch.tensor([each["squares"] for each in told],
                             dtype=torch.float64).unflatten(0, (team.replicas, team.ranks)).sum(1).sqrt()
        told = told[::team.ranks]
        tallies = [each["tally"] for each in told]
        loss, steps, lr = torch.tensor([[t["ce"] / t["finite"] if t["finite"] else math.nan, t["steps"], t["lr"] / t["steps"]]
                                        for t in tallies], dtype=torch.float64).T
        weights = self.judge(norms, loss, steps, lr, torch.tensor([each["sick"] for each in told]))
        off = weights.sum(1) == 0
        share = (weights if weights.any() else torch.full_like(weights, 1 / team.replicas))[team.replica].tolist()
        if self.biases:
            biases = team.sum(torch.stack([bias * share[i] for i, bias in self.biases.items()]), team.across)
            for bias, mean in zip(self.biases.values(), biases):
                bias.copy_(mean)
        for p in self.velocity if off.any() else ():             # moments first: behind the sums they would wait
            for t in self.optimizer.state[p].values():
                healthy = torch.zeros_like(local(t)) if off.all() else local(t).clone()
                dist.broadcast(healthy, int(off.long().argmin()) * team.ranks + team.rank % team.ranks, group=team.across)
                if off[team.replica]:
                    local(t).copy_(healthy)
        if off.all():                                                                        # back to where all started from
            for p, start in self.anchor.items():
                local(p).copy_(start)
        else:
            for i, change in zip(places, changes):
                change = change.mul_(share[i]) if share[i] else change.zero_()               # 0 * NaN would be NaN
                self.flying.append((i, change, dist.all_reduce(change, group=team.across, async_op=True)))
        self.since, self.steps = time.monotonic(), 0
        return told, weights

    @torch.no_grad()
    def arrive(self, last):
        """Wait for the layers up to `last`, and step: outer SGD, on each rank for what it holds."""
        lr, momentum, clip = self.train.outer_lr, self.train.outer_momentum, self.train.outer_clip
        while self.flying and self.flying[0][0] <= last:
            i, change, work = self.flying.popleft()
            with self.trace.inside("sync"):
                work.wait()
            norm = self.team.sum(change.square().sum(), self.team.within).sqrt()
            change.mul_(clip / norm.clamp(min=clip))
            for p, gradient in zip(self.units[i], change.split([local(p).numel() for p in self.units[i]])):
                start, velocity, gradient = self.anchor[p], self.velocity[p], gradient.view_as(self.anchor[p])
                velocity.mul_(momentum).add_(gradient)
                local(p).copy_(start.sub_(lr * (gradient + momentum * velocity)))            # Nesterov
            self.since = time.monotonic()                                                    # the round begins when the last has arrived


class Trace:
    """Where the time goes: seconds by phase, always on, one mark where a phase ends and the next begins. On an accelerator marks are events
    of its stream, read once they have passed, so that nothing waits for them. Each rank adds a line to a file of its own every
    20 steps, which --report reads; nothing is sent."""
    EVERY = 20

    def __init__(self, run, team):
        folder = run / "trace"
        folder.mkdir(exist_ok=True)
        self.device, self.stem = team.device, folder / f"rank_{team.rank:05d}"
        self.file, self.ranks = Log(self.stem.with_suffix(".jsonl")), team.size
        self.host, self.marks, self.seconds = socket.gethostname(), collections.deque(), Counter()
        self.steps, self.open, self.profiler = 0, contextlib.ExitStack(), None

    def mark(self, phase):
        if self.profiler:
            self.label(phase)
        if self.device.type == "cpu":
            now = time.perf_counter()
        else:
            now = torch.Event(self.device, enable_timing=True)
            now.record()
        self.marks.append((phase, now))
        while len(self.marks) > 1 and (self.device.type == "cpu" or self.marks[1][1].query()):
            (phase, start), end = self.marks.popleft(), self.marks[0][1]
            self.seconds[phase] += end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1e3

    @contextlib.contextmanager
    def inside(self, phase):
        """A phase in the midst of another."""
        outer = self.marks[-1][0] if self.marks else phase
        self.mark(phase)
        yield
        self.mark(outer)

    def label(self, phase):
        """Name the phase in the profile."""
        self.open.close()
        if phase:
            self.open.enter_context(torch.profiler.record_function(phase))

    def step(self, step, profile, last=False):
        """After a step. profile: the one after which to profile three, for chrome://tracing or Perfetto. last: write what there is."""
        self.steps += not last
        if self.steps == self.EVERY or last:
            self.file.write({"step": step, "steps": self.steps, "ranks": self.ranks, "host": self.host, "seconds": self.seconds})
            self.seconds, self.steps = Counter(), 0
        if self.profiler and (step >= profile + 3 or last):
            self.label(None)
            self.profiler.stop()
            self.profiler.export_chrome_trace(f"{self.stem}_step_{profile:08d}.json")
            self.profiler = None
        elif step == profile and not last:
            self.profiler = torch.profiler.profile(activities={torch.profiler.ProfilerActivity.CPU, *torch.profiler.supported_activities()})
            self.profiler.start()


WAITING = {"wait", "exchange", "reduce", "sync"}                # phases in which a rank waits for others: the slow one waits least
ADVICE = {"data": "move the data to a local disk, or see what else that one does",
          "forward": "look for heat, another job or a bad card; replace the host, or let it do fewer steps: --sync edit --sync_seconds 60",
          "wait": "see which rank takes longest before it",
          "exchange": "a smaller --ep keeps tokens within a node; 1 moves weights instead", "reduce": "raise --batch_tokens",
          "sync": "raise --sync_every", "checkpoint": "raise --save_every", "evaluation": "raise --eval_every"}
ADVICE |= {"backward": ADVICE["forward"], "optimizer": ADVICE["forward"]}


def report(run):
    """Print where the time of a run went, which rank the others waited for, and what to try."""
    traces = {int(path.stem[5:]): [*read_log(path)] for path in sorted((Path(run) / "trace").glob("rank_*.jsonl"))}
    newest = max((records[-1] for records in traces.values() if records), key=lambda record: record["step"], default={}).get("ranks")
    traces = {rank: found for rank, records in traces.items()                                # of as many ranks as it had last
              if (found := [record for record in records if record.get("ranks") == newest])}
    require(traces, f"--report {run}: no trace there yet; a run writes one after {Trace.EVERY} steps")
    steps = {rank: sum(record["steps"] for record in records) for rank, records in traces.items()}
    spent = {rank: sum((Counter(record["seconds"]) for record in records), Counter()) for rank, records in traces.items()}
    host, middle = {rank: records[-1]["host"] for rank, records in traces.items()}, statistics.median
    per_step = lambda phase, ranks: middle(spent[rank][phase] / max(1, steps[rank]) for rank in ranks)           # seconds
    share = {phase: middle(seconds[phase] / seconds.total() for seconds in spent.values())
             for seconds in spent.values() for phase in seconds}
    whole = middle(seconds.total() for seconds in spent.values())
    print(f"{run}: {len(traces)} ranks, {max(steps.values())} steps, {whole:.0f} s in training\n{'phase':12}{'share':>8}{'ms a step':>11}"
          + "   the slowest rank, over the others" * (len(traces) > 1))
    late = []                                                    # (seconds a step more than the others, rank, phase)
    for phase in sorted(share, key=share.get, reverse=True):
        line = f"{phase:12}{share[phase]:8.1%}{1e3 * per_step(phase, traces):11.2f}"
        if len(traces) > 1 and phase not in WAITING:
            slowest = max(traces, key=lambda rank: per_step(phase, [rank]))
            late.append((per_step(phase, [slowest]) - per_step(phase, traces.keys() - {slowest}), slowest, phase))
            line += f"   rank {slowest} ({host[slowest]}): {1e3 * late[-1][0]:+.1f} ms a step"
        print(line)
    extra, rank, phase = max(late, default=(0, None, None))
    if (cost := extra * max(steps.values())) > 0.03 * whole:
        print(f"slowest: rank {rank} ({host[rank]}) in {phase}, {1e3 * extra:.0f} ms a step more than the others, who waited "
              f"{cost:.1f} s for it, {cost / whole:.0%} of their time\nto try: {ADVICE[phase]}")
    else:
        phase = max(share.keys() - {"forward", "backward", "optimizer"}, key=share.get)
        print("no rank holds up the others" if len(traces) > 1 else "one rank: none waits for another", end="; ")
        print(f"{share[phase]:.0%} of the time is {phase}; to try: {ADVICE[phase]}" if share[phase] > 0.1 else
              "what is not computing takes less than 10 % each")


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluation and display

def token_sizes(tokenizer, config, device):
    """(V,) int64: bytes of text a token stands for."""
    return torch.tensor([len(tokenizer.bytes_of(t)) for t in range(config.vocab_size)], device=device)


@torch.no_grad()
def evaluate(model, data, token_bytes, rows, team, alive=lambda: None):
    """Over the held-out tokens: mean cross entropy in nats per token, and bits per byte of text, which compares tokenizers."""
    sums = torch.zeros(3, dtype=torch.float64)                                               # nats, tokens, bytes
    for x, y in data.held_out(rows, team.device, team.rank, team.size):
        alive()
        n = int((y >= 0).sum())
        sums += torch.tensor([float(model(x, y).parts["ce"]) * n, n, int(token_bytes[y[y >= 0]].sum())])
    for module in model.modules():
        if hasattr(module, "reshard"):                           # FSDP: without a backward pass, whole weights would stay, and go stale
            module.reshard()
    nats, tokens, size = team.sum(sums).tolist()
    return {"val_ce": nats / tokens, "val_bpb": nats / math.log(2) / max(1, size)}


def strip(load):
    """Loads of one layer's experts as block characters: the middle height is the even load."""
    bars = "▁▂▃▄▅▆▇█" if (sys.stdout.encoding or "").lower().startswith("utf") else "01234567"
    level = load.float() / load.float().mean().clamp(min=1e-9) * 4
    return "".join(bars[min(7, int(x))] for x in level.tolist()[:64])


def uneven_load(load):
    """load (MoE layers, E) -> (MoE layers,): largest over mean."""
    return load.amax(1) / load.float().mean(1).clamp(min=1e-9) if len(load) else torch.ones(1)


def tensorboard():
    """Its writer. Raises BadInput where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard needs a package: pip install tensorboard; metrics.jsonl holds the same numbers") from None
    return SummaryWriter


class Status:
    """One live line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self):
        self.live, self.last = sys.stdout.isatty(), -math.inf

    def update(self, line):
        if self.live:
            width = shutil.get_terminal_size().columns
            print("\r" + line[:width - 1].ljust(width - 1), end="", flush=True)
        elif time.perf_counter() - self.last > 10:
            self.last = time.perf_counter()
            print(line, flush=True)

    def note(self, line):
        """A line that stays."""
        print(("\r\033[K" if self.live else "") + line, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# 9. What a run costs: before it, by counting, and after it

class Device(NamedTuple):
    peak: float                  # dense bf16 FLOP/s; of a CPU fp32, measured; None: unknown, and an MFU is never guessed
    memory: float                # bytes
    price: float = None          # an hour
    currency: str = "USD"
    source: str = ""


LAMBDA, AKASH = "8 on demand, lambda.ai/instances, 2026-09-20", "from, akash.network/pricing/gpus, 2026-09-20"
DEVICES = {                      # peaks by data sheets. [Ling1]'s C is an A100 and its E an H20, by Flood's README; D has an H800's numbers
    **{name: Device(tflops * 1e12, gb * 1e9, price, "RMB", "[Ling1] table 1") for name, tflops, gb, price in (
        ("A", 370, 64, 7.0), ("B", 120, 96, 4.5), ("C", 312, 80, 10.0), ("D", 989, 80, 27.5), ("E", 147, 96, 5.64))},
    "A100": Device(312e12, 80e9, 2.79, source=LAMBDA), "H100-PCIe": Device(756e12, 80e9, 3.29, source="lambda.ai/pricing, 2026-09-25"),
    "H100": Device(989e12, 80e9, 3.99, source=LAMBDA), "H200": Device(989e12, 141e9, 4.45, source=AKASH),
    "B200": Device(2250e12, 180e9, 6.69, source=LAMBDA), "MI300X": Device(1307e12, 192e9, source="no price known here"),
}
REPORTED = {"ling-plus": (6.35e6, 5.08e6)}    # RMB for 1T tokens [Ling1]: on D, and on a "lower-specification system" it does not name


@functools.cache
def cpu_peak():
    """FLOP/s of the best of six fp32 matmuls."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024 ** 3 / min(timeit.repeat(lambda: a @ b, repeat=6, number=1))


def this_device(team):
    """The Device this process runs on."""
    if team.device.type == "cpu":
        return Device(cpu_peak(), team.memory)
    name = torch.cuda.get_device_name(team.device) if team.device.type == "cuda" else ""
    known = (d for key, d in DEVICES.items()
             if len(key) > 1 and "MIG" not in name and all(re.search(rf"\b{part}\b", name) for part in key.split("-")))
    return next(known, Device(None, team.memory))._replace(memory=team.memory)


def choose_devices(names):
    """"h200,mine=989/141/2.5", or "all" -> {name: Device}; a name that torch knows means all. Raises BadInput."""
    known, chosen, number = {key.lower(): key for key in DEVICES}, {}, r"(\d+(?:\.\d+)?)"
    for name in DEVICES if re.fullmatch(r"|all|(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?", names) else names.split(","):
        own = re.fullmatch(rf"(?!here=)(\w+)={number}/{number}/{number}", name)
        require(own and float(own[2]) * float(own[3]) > 0 or name.lower() in known, f"--device {name}: a plan knows {', '.join(DEVICES)}; "
                "describe others as NAME=TFLOPS/GB/PRICE, as in mine=989/141/2.5")
        key = own[1] if own else known[name.lower()]
        chosen[key] = Device(float(own[2]) * 1e12, float(own[3]) * 1e9, float(own[4]), "", "yours") if own else DEVICES[key]
    return chosen


def price(flops, mfu, device):
    """-> device-hours and cost of so many FLOPs, None for what is unknown."""
    hours = flops / (device.peak * mfu) / 3600 if device.peak else None
    return hours, hours and device.price and hours * device.price


def resident(most=False, reset=False):
    """Bytes of memory this process holds, or held at most since the last reset; None where the system does not say (Linux does)."""
    with contextlib.suppress(OSError, TypeError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(rf"Vm{'HWM' if most else 'RSS'}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak_memory(needs, train, base):
    """Bytes at the worst moment, of memory_per_rank's components: on a CPU (base: what the process held before) the forward pass once a
    copy for saving is staged; on an accelerator (None) without that copy."""
    staged, passing = needs["host copy for saving"], needs["gradients"] + needs["in flight"] + needs["activations"]
    state = sum(needs.values()) - staged - passing
    if base is None:
        return state + passing
    # What training imports, what malloc keeps in holes, and reading the corpus: fitted to seven runs of 0.6 to 3.5 GB, with glibc.
    heap = 150e6 + 0.4 * needs["activations"]
    midway = 0 < train.save_every < train.steps
    return base + heap + state + (passing + staged if midway else max(passing, staged))


def forecast(train, config, team, base):
    """What a plan says of a run on this machine -> {"memory" bytes, "tokens_per_s", "peak", "price"}, None for what cannot be said."""
    device, cpu = this_device(team), team.device.type == "cpu"
    needs = needs_of(train, config, count_params(config), team.size, cpu)
    speed = device.peak and train.mfu * device.peak * team.size / flops_per_token(config, train.seq_len)
    return {"memory": None if cpu and not base else peak_memory(needs, train, base if cpu else None), "tokens_per_s": speed,
            "peak": device.peak, "price": device.price, "currency": device.currency}


def settle(run, train, config, team, promised, tokens, seconds):
    """At the end of a run: what the plan said against what happened, printed and kept in plan.json."""
    allocated = getattr(torch.get_device_module(team.device), "max_memory_allocated", lambda device: None)
    memory = resident(most=True) if team.device.type == "cpu" else allocated(team.device)
    speed, flops = tokens / seconds, flops_per_token(config, train.seq_len)
    rate = promised["price"] and promised["price"] * team.size / 3600                        # a second
    happened = {"memory": memory, "tokens_per_s": speed, "mfu": promised["peak"] and speed * flops / (promised["peak"] * team.size),
                "seconds": seconds, "tokens": tokens}
    write_json(run / "plan.json", {"planned": {**promised, "mfu": train.mfu}, "happened": happened})
    said = []
    if memory and promised["memory"]:
        said.append(f"memory {promised['memory'] / 1e9:.2f} GB, {memory / 1e9:.2f} measured ({memory / promised['memory'] - 1:+.0%})")
    if promised["tokens_per_s"]:
        said.append(f"{promised['tokens_per_s']:,.0f} tokens/s at MFU {train.mfu:.2f}, {speed:,.0f} at {happened['mfu']:.2f} measured "
                    f"(of {short(promised['peak'], billion='G')}FLOP/s)")
        said += [f"{promised['currency']} {rate * tokens / promised['tokens_per_s']:.2f}, {rate * seconds:.2f} spent"] if rate else []
    print("plan and run: " + "; ".join(said or ["nothing that could be measured here"]))


def short(n, digits=3, billion="B"):
    """1230000 -> 1.23M; billion: the letter for 1e9, G for bytes and FLOPs."""
    scale, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")) if n >= s), (1, ""))
    return f"{n / scale:.{max(0, digits - len(str(int(n / scale))))}f}{unit}" if n >= 1 else f"{n:.2g}"


def scaling_law(compute):
    """[SL] arXiv 2507.17702: the best learning rate and batch size (tokens) for so many FLOPs, non-embedding compute C = M * tokens."""
    return 1.1576 * compute ** -0.1529, 0.0694 * compute ** 0.3644


def law_flops(config, seq_len, counts=None):
    """M of [SL]: FLOPs a token without embedding and head, attention uncut by causality.
    With it, C of Ling 2.0's models comes out as published."""
    return (6 * (counts or count_params(config))["active_non_embedding"]
            + 12 * config.num_hidden_layers * seq_len * config.num_attention_heads * config.head_dim)


def leverage(config, compute):
    """[SL] efficiency leverage: how much more compute a dense model needs for the same loss. A^(a + d log10 C + g (log2 G)^2 + b log2 G)
    with A the part of experts that is active, G = 2 D / F; the bases of the logarithms are inferred from the optimum the paper states."""
    active = (config.num_experts_per_tok + config.num_shared_experts) / (config.num_experts + config.num_shared_experts) + 0.0163
    G = math.log2(2 * config.hidden_size / config.moe_intermediate_size)
    return active ** (1.23 - 7.61e-2 * math.log10(compute) + 1.67e-2 * G ** 2 - 1.17e-1 * G)


def extrapolated(compute):
    return "" if 1.3e23 <= compute <= 6.6e24 else "   (extrapolated: Ling 2.0's choices confirm the law from 1.4e23 to 6.5e24 FLOPs)"


def as_flags(fields):
    """{name: value} -> a command line."""
    for name, value in fields.items():
        yield "--" + "no-" * (value is False) + name
        yield from ([] if isinstance(value, bool) else map(str, value) if isinstance(value, list) else
                    [json.dumps(value) if isinstance(value, dict) else str(value)])


def lever_of(config, compute):
    dense = config.first_k_dense_replace == config.num_hidden_layers
    return "none, it is dense" if dense else f"{leverage(config, compute):.2f} times its compute for a dense model of the same loss"


def budget(train, config, given):
    """Print what to do with --budget FLOPs. given: the flags, for the next command."""
    C, M, S = train.budget, law_flops(config, train.seq_len), train.seq_len
    lr, batch = scaling_law(C)
    rounded = max(1, round(batch / S)) * S
    kept = {name: value for name, value in given.items() if name not in ("budget", "plan", "tokens", "fresh", "out")}
    kept |= {"micro_batch_tokens": train.micro_batch_tokens} if train.micro_batch_tokens != TrainConfig.micro_batch_tokens else {}
    print(
        f"C = {C:.4g} FLOPs, by the scaling laws of Ling, arXiv 2507.17702{extrapolated(C)}\n"
        f"  learning rate  1.1576 C^-0.1529 = {lr:.4g}\n"
        f"  batch size     0.0694 C^0.3644 = {batch:,.0f} tokens, {batch / S:,.1f} sequences of {S}\n"
        f"  tokens         C / M = {short(C / M)}, M = {short(M, billion='G')}FLOP a token (6 N + 12 L s H d, no embedding)\n"
        f"  leverage       {lever_of(config, C)}\n"
        "next: python train.py "
        f"{shlex.join(as_flags({**kept, 'batch_tokens': rounded, 'lr': float(f'{lr:.4g}'), 'steps': max(1, math.ceil(C / M / rounded))}))}")


def smallest(train, config, counts, device, cpu, choices, base):
    """The first number of ranks, then the least recomputation, that leave a tenth of a device's memory free, or the last that was tried
    -> TrainConfig, ranks, {recompute: needs_of}, bytes at most. Raises BadInput if no number of ranks can be laid out.
    base: as in peak_memory."""
    found = error = None
    for ranks in choices:
        team = types.SimpleNamespace(size=ranks, local_size=min(8, ranks), nodes=-(-ranks // 8), memory=device.memory,
                                     device=torch.device("cpu" if cpu else "cuda"))
        try:
            require(ranks > 1 or len(choices) == 1 or train.sync == "step", "--sync edit needs several ranks")
            layout = (choose_layout(train, config, team, counts)[0] if ranks > 1 else
                      dataclasses.replace(train, replicate=1, ep=1, sync="step"))
        except BadInput as reason:
            error = reason
            continue
        layouts = {how: dataclasses.replace(layout, recompute=how) for how in RECOMPUTE}
        needs = {how: needs_of(each, config, counts, ranks, cpu) for how, each in layouts.items()}
        for how in RECOMPUTE[RECOMPUTE.index(train.recompute):]:
            found = layouts[how], ranks, needs, peak_memory(needs[how], train, base)
            if found[-1] < 0.9 * device.memory:
                return found
    if not found:
        raise error
    return found


def tokens_of(train):
    """Of a whole run."""
    rising = min(train.steps, train.batch_warmup_steps)
    start = int(batch_schedule(train, rising)[-1]) * train.seq_len if rising else 0
    return start + (train.steps - rising) * train.batch_tokens


def plan(train, config, base, reported=None):
    """Print what training this would take. Nothing is allocated but, for this machine's speed, two small matrices. base: as in peak_memory;
    reported: what the report paid for 1T tokens."""
    table, counts, S = components(config, train.seq_len), count_params(config), train.seq_len
    tokens, devices = tokens_of(train), choose_devices(train.device)
    flops, mtp = sum(row.flops for row in table.values()), "mtp" in table
    columns(["component", "parameters", "active", "FLOPs a token"], [
        *([name, *(f"{n:,}" for n in row)] for name, row in sorted(table.items(), key=lambda entry: -entry[1].flops)),
        ["all but mtp" if mtp else "all", f"{counts['total']:,}", f"{counts['active']:,}", f"{flops:,}" + " (mtp too)" * mtp],
        ["", short(counts["total"], 4), short(counts["active"], 4), short(flops, 4, "G")]])
    C, kv = law_flops(config, S, counts) * tokens, 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    lr, batch = scaling_law(C)
    print(f"\n{short(tokens)} tokens in sequences of {S}: {flops * tokens:.3g} FLOPs\n"
          f"by scaling law: batches of {batch / S:,.0f} sequences ({short(batch)} tokens), learning rate {lr:.3g}{extrapolated(C)}\n"
          f"lever by that law: {lever_of(config, C)}\nsampling: {short(kv)}B of keys and values a token in bf16, "
          f"{short(kv * config.max_position_embeddings, billion='G')}B for {config.max_position_embeddings:,}")

    here, memory, money = Team(""), [], []
    on_cpu = here.device.type == "cpu"
    for name, device in {"here": this_device(here), **devices}.items():
        cpu, choices = on_cpu and name == "here", [1] if name == "here" else [train.ranks] if train.ranks else [1 << i for i in range(13)]
        layout, ranks, needs, most = smallest(train, config, counts, device, cpu, choices, (base or 0) if cpu else None)
        gb = lambda kind, way=layout.recompute: f"{needs[way][kind] / 1e9:.3g}"
        memory.append([name, ranks, layout.replicate, layout.ep, layout.recompute,
                       *map(gb, ("weights", "gradients", "optimizer", "in flight")), *(gb("activations", way) for way in RECOMPUTE),
                       f"{most / 1e9:.3g}", f"{device.memory / 1e9:.0f}" + " (too little)" * (most > 0.9 * device.memory)])
        hours, cost = price(flops * tokens, train.mfu, device)
        busy = min(ranks, train.batch_tokens // S)               # more ranks than sequences in a batch have nothing to do
        money.append([name, device.peak and f"{device.peak / 1e12:.3g}", hours and short(tokens / hours / 3600), hours and short(hours),
                      hours and f"{short(hours / busy)} on {busy}", device.price and f"{device.price:g} {device.currency}",
                      cost and f"{short(cost)} {device.currency}", device.source])
    print(f"\nGB a rank, micro-batches of {train.micro_batch_tokens} tokens; none, moe, block: activations by --recompute"
          + "; the sum here has the process and the copy for saving in it" * on_cpu)
    columns(["device", "ranks", "replicate", "ep", "recompute", "weights", "gradients", "moments", "in flight", *RECOMPUTE,
             "sum", "has"], memory)
    print(f"\nat --mfu {train.mfu} of the peak")
    columns(["device", "TFLOP/s", "tokens/s each", "device-hours", "hours", "price an hour", "cost", "price by"], money)

    if reported:
        costs = [rmb * tokens / 1e12 for rmb in reported]
        mean = lambda device, cost: (f"{short(cost)} RMB", short(cost / device.price), f"{price(flops * tokens, 1, device)[1] / cost:.1%}")
        print(f"\nThe report paid {short(costs[0])} RMB for so many tokens on D, and {short(costs[1])} ({costs[1] / costs[0] - 1:+.1%}) "
              "on a \"lower-specification system\" it does not name, nor the MFU of either. What each would mean:")
        columns(["device", *["cost", "device-hours", "MFU"] * 2],
                [[name, *mean(d, costs[0]), *mean(d, costs[1])] for name, d in DEVICES.items() if d.currency == "RMB"])


def columns(heads, rows):
    """Print a table, numbers to the right."""
    cells = [*zip(*(["-" if cell is None else str(cell) for cell in row] for row in (heads, *rows)))]      # by column
    right = [all(cell[:1].isdigit() or cell in ("-", "") for cell in column[1:]) for column in cells]
    widths = [max(map(len, column)) for column in cells]
    for row in zip(*cells):
        print("  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip())


# ----------------------------------------------------------------------------------------------------------------------
# 10. What runs show: pictures of one, comparisons of many

def pyplot(size, across=1, down=1):
    """matplotlib's figure and axes (down, across). Raises BadInput where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure                     # no pyplot: nothing opens a window
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=size, dpi=90, layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False)


def save_picture(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"drawn: {path}")


def kind_of(token):
    """What sort of text a token's bytes are."""
    text = token.decode("utf-8", "replace")
    word = text.strip(" ").isidentifier() and not text.strip(" ").isdigit()
    return ("space" if text.isspace() else "word" if word and text[0] == " " else "part of a word" if word else
            "digits" if text.strip().isdigit() else "no whole character" if "\ufffd" in text else "signs")


@torch.no_grad()
def routing_by_kind(run, train, config):
    """Of the newest checkpoint, on held-out text -> kinds of tokens, and rows routed (kinds, MoE layers, E) int64."""
    model, tokenizer = Ling.from_pretrained(run), load_tokenizer(str(run))
    names = [kind_of(tokenizer.bytes_of(t)) for t in range(config.vocab_size)]
    kinds = [kind for kind, _ in Counter(names).most_common()]
    kind_at, load = torch.tensor([kinds.index(name) for name in names]), 0
    of = lambda kind, x, y: torch.where((y >= 0) & (kind_at[x] == kind), x, -1)              # targets: ignored ones count in no load
    for x, y in islice(Data(read_data(run, train, config), train).held_out(1, "cpu"), 256):  # enough
        load = load + torch.stack([model(x, of(kind, x, y)).load for kind in range(len(kinds))])
    return kinds, load


def draw(run):
    """--plot: pictures of a run, into its folder."""
    require((run / "metrics.jsonl").exists(), f"--plot {run}: no metrics.jsonl there; train first")
    records, saved, config = [*read_log(run / "metrics.jsonl")], read_json(run / "train.json"), read_config(run)
    train = TrainConfig(**{f.name: saved[f.name] for f in dataclasses.fields(TrainConfig) if f.name in saved})
    steps = [r for r in records if r.get("ce") is not None]
    require(steps, f"--plot {run}: no steps in metrics.jsonl yet")
    draw_loss(run, steps, [r for r in records if "val_ce" in r], [*read_log(run / "ledger.jsonl")])
    if loads := [r for r in steps if r.get("load")]:
        draw_load(run, loads)
    draw_cost(run, flops_per_token(config, train.seq_len) * float(steps[-1]["tokens"]), train.mfu)
    if config.num_hidden_layers > config.first_k_dense_replace and checkpoints(run):
        draw_routing(run, *routing_by_kind(run, train, config))


def draw_loss(run, steps, scores, events):
    """Against tokens and time, with what the ledger says of spikes."""
    tokens, loss = np.array([r["tokens"] for r in steps]), np.array([r["ce"] for r in steps])
    minutes = np.cumsum(np.diff(tokens, prepend=0) / np.array([r["tokens_per_s"] for r in steps])) / 60    # no evaluation, no pause
    at, width = {r["step"]: i for i, r in enumerate(steps)}, max(1, len(loss) // 50)
    smooth = np.convolve(loss, np.ones(width) / width, "valid")                              # mean of the last so many steps
    places = lambda records, key: [at[r[key]] for r in records if r[key] in at]
    marked = places(events, "logged")
    figure, axes = pyplot((9, 3.2), across=2)
    for axis, x, label in zip(axes[0], (tokens / 1e6, minutes), ("million tokens", "minutes of training")):
        axis.plot(x, loss, color="C0", alpha=0.25, lw=0.7)
        axis.plot(x[width - 1:], smooth, color="C0", label="training")
        axis.plot(x[places(scores, "step")], [r["val_ce"] for r in scores if r["step"] in at], "o", color="C1", label="held out")
        for verdict, color in (("narrow", "C2"), ("lower", "C4"), ("skip", "C3")):
            hits = [event for event in events if event["verdict"] == verdict]
            axis.plot(x[places(hits, "logged")], loss[places(hits, "logged")], "v", color=color, label=f"{len(hits)} spikes: {verdict}")
        axis.set(xlabel=label, ylabel="nats per token", ylim=(None, 1.02 * max(float(np.quantile(loss, 0.98)), *loss[marked], 0)))
        axis.legend()
    save_picture(figure, run / "loss.png")


def draw_load(run, loads):
    """Every layer's experts, over time."""
    load = np.array([r["load"] for r in loads], dtype=float)                                 # (times, MoE layers, E)
    load *= load.shape[2] / np.maximum(1, load.sum(2, keepdims=True))
    figure, axes = pyplot((9, 1.2 + 1.1 * load.shape[1]), down=load.shape[1])
    for i, axis in enumerate(axes[:, 0]):
        image = axis.pcolormesh([0, *(r["step"] for r in loads)], np.arange(load.shape[2] + 1) - 0.5, load[:, i].T,
                                cmap="RdBu_r", vmin=0, vmax=2)
        axis.set(ylabel=f"MoE layer {i}\nexpert", xlabel="step" if i == load.shape[1] - 1 else None)
    figure.colorbar(image, ax=axes, label="load over the mean")
    save_picture(figure, run / "load.png")


def draw_cost(run, flops, mfu):
    """What the run would have cost on each device."""
    rows = [[name, f"{d.peak / 1e12:g}", f"{d.price:g} {d.currency}", short(hours), f"{short(cost)} {d.currency}"]
            for name, d in DEVICES.items() for hours, cost in [price(flops, mfu, d)] if cost]
    figure, ((axis,),) = pyplot((7, 0.6 + 0.26 * len(rows)))
    axis.axis("off")
    axis.set_title(f"{flops:.3g} FLOPs at MFU {mfu}", fontsize=10)
    axis.table(rows, colLabels=["device", "TFLOP/s", "an hour", "device-hours", "cost"], loc="center")
    save_picture(figure, run / "cost.png")


def draw_routing(run, kinds, load):
    """Which tokens go to which experts, against an even split."""
    kinds, load = zip(*((kind, rows.double()) for kind, rows in zip(kinds, load) if rows.sum()))
    share = torch.stack([rows / rows.mean(1, keepdim=True) for rows in load])                # (kinds, MoE layers, E)
    figure, axes = pyplot((9, 1.0 + 0.25 * len(kinds) * share.shape[1]), down=share.shape[1])
    for i, axis in enumerate(axes[:, 0]):
        image = axis.imshow(share[:, i], aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axis.set(title=f"MoE layer {i}", xlabel="expert" if i == share.shape[1] - 1 else None)
        axis.set_yticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=axes, label="share over an even one")
    save_picture(figure, run / "routing.png")


def train_all(root, jobs):
    """Train {name: flags} into root/name, each by a process of its own: on a CPU as many at once as there are cores, with a thread each;
    on an accelerator one after the other. What is finished is kept, what was stopped goes on. -> {name: records of its metrics.jsonl}"""
    cpu, start, alive = pick_device("").type == "cpu", time.monotonic(), {}
    environment = {**os.environ, "LING_PARENT": str(os.getpid()),                            # when we are gone they save and stop
                   **({"OMP_NUM_THREADS": "1"} if cpu else {})}
    root.mkdir(parents=True, exist_ok=True)

    def work(name):
        run, log = root / name, root / f"{name}.log"
        with open(log, "wb") as output:
            alive[name] = subprocess.Popen([sys.executable, __file__, "--out", str(run), "--keep", "1", *jobs[name]],
                                           stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        code, records = alive[name].wait(), [*read_log(run / "metrics.jsonl")]
        require(code == 0, f"{run} failed, see {log}: {' '.join(log.read_text(errors='replace').splitlines()[-1:])}; "
                "mend it and run the same command again")
        require(records and "val_bpb" in records[-1], f"{run} was stopped; the same command goes on")
        print(f"{(time.monotonic() - start) / 60:6.1f} min  {name}: {records[-1]['val_bpb']:.4f} bits per byte", flush=True)
        return records

    pool, before = ThreadPoolExecutor((os.cpu_count() or 1) if cpu else 1), signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return dict(zip(jobs, pool.map(work, jobs)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in [*alive.values()]:
            process.terminate()                                  # saves; nothing, to one that has finished
        pool.shutdown()
        signal.signal(signal.SIGTERM, before)


SEEDS = 3


def study(train, given_train, given_model):
    """--study: flags that were given besides go to every run, but for those the study is about."""
    root, picture = Path(train.out or f"runs/{train.study}"), Path(train.out or "assets") / f"{train.study}.png"
    common = {name: value for name, value in {**given_train, **given_model}.items() if name not in ("study", "out", "budget")}
    if train.study == "routers":
        common.pop("steps", None)                                # each of its runs has so many

    def flags(**fields):
        clash = common.keys() & (fields.keys() | {"preset", "dense", "tokens", "fresh", "plan", "export", "merge", "init"})
        require(not clash, f"--study {train.study} decides on --{min(clash, default='')} itself; drop the flag")
        return [*as_flags({**fields, **common})]
    toy = {**PRESETS["toy"], **given_model}
    toy["vocab_size"] = with_vocabulary(train, LingConfig(**toy), given_model).vocab_size
    show = {"lever": lever, "routers": routers}[train.study](root, train, toy, flags)
    try:
        show(picture)
    except BadInput as error:                                    # no matplotlib
        print(f"no picture: {error}")


def lever(root, train, toy, flags):
    """MoE and dense models of equal FLOPs a token, over budgets from an eighth of --budget (1,000 of the toy's steps) up. Width goes with
    the fourth root of the budget, so that tokens and active parameters grow alike; batch and learning rate go from the toy's by the
    exponents of [SL]."""
    jobs, rows = {}, []
    top = train.budget or flops_per_token(LingConfig(**toy), train.seq_len) * 1000 * 4096
    for part, seed, dense in product((1, 1 / 2, 1 / 4, 1 / 8), range(SEEDS), (False, True)):
        width = 12 * round(toy["hidden_size"] / 12 * part ** 0.25)                           # three heads, half of each rotated in pairs
        batch = train.seq_len * max(1, round(4096 / train.seq_len * part ** 0.3644))
        shape = dict(hidden_size=width, moe_intermediate_size=width)
        cost = batch * flops_per_token(LingConfig(**(dense_twin(toy | shape) if dense else toy | shape)), train.seq_len)
        steps = max(1, round(top * part / cost))
        name = f"{'dense' if dense else 'moe'}-{top * part:.2e}-seed{seed}"
        jobs[name] = flags(**shape, dense=dense, seed=seed, batch_tokens=batch, micro_batch_tokens=batch, steps=steps,
                           lr=TrainConfig.lr * part ** -0.1529, eval_every=0)
        rows.append([dense, part, steps * cost])
    print(f"lever: {len(jobs)} runs, {sum(row[2] for row in rows):.2g} FLOPs in all, into {root}", flush=True)
    rows = [(*row, records[-1]["val_bpb"]) for row, records in zip(rows, train_all(root, jobs).values())]    # dense, part, FLOPs, bpb
    parts = sorted({part for _, part, *_ in rows})
    budgets = top * np.array(parts)
    of = lambda dense, rows=rows: np.array([(C, bpb) for d, _, C, bpb in rows if d == dense]).T
    fit = lambda dense, rows: np.polyfit(*np.log(of(dense, rows)), 1)                        # log loss = a log C + b

    def levers(rows):
        """C of a dense model over C of an MoE, at each budget, for the loss that the MoE reaches there."""
        moe, (slope, offset) = fit(False, rows), fit(True, rows)
        return np.exp((np.polyval(moe, np.log(budgets)) - offset) / slope) / budgets
    groups, draw_from = [[row for row in rows if row[:2] == key] for key in sorted({row[:2] for row in rows})], np.random.default_rng(0)
    draws = [levers([group[i] for group in groups for i in draw_from.integers(len(group), size=len(group))]) for _ in range(1000)]
    best, (low, high) = levers(rows), np.quantile(draws, (0.05, 0.95), axis=0)               # bootstrap, over the seeds of each budget
    law = [leverage(LingConfig(**toy), C) for C in budgets]
    seeds = lambda dense, part: [bpb for d, p, _, bpb in rows if (d, p) == (dense, part)]
    columns(["FLOPs", f"MoE, bits per byte of {SEEDS} seeds", "dense", "lever", "90 % of bootstraps", "by the law, extrapolated"], [
        [f"{C:.2e}", *(f"{statistics.mean(values):.4f} ({min(values):.3f} to {max(values):.3f})"
                       for values in (seeds(False, part), seeds(True, part))),
         f"{best[i]:.2f}", f"{low[i]:.2f} to {high[i]:.2f}", f"{law[i]:.2f}"] for i, (part, C) in enumerate(zip(parts, budgets))])
    write_json(root / "lever.json", {"budgets": budgets.tolist(), "lever": best.tolist(), "low": low.tolist(), "high": high.tolist(),
                                     "runs": dict(zip(jobs, rows))})

    def show(path):
        figure, ((left, right),) = pyplot((9, 3.6), across=2)
        for dense, color in ((False, "C0"), (True, "C1")):
            left.plot(*of(dense), "o", color=color, label="dense" if dense else "MoE", ms=4)
            left.plot(budgets, np.exp(np.polyval(fit(dense, rows), np.log(budgets))), color=color)
        left.set(xscale="log", xlabel="FLOPs", ylabel="held-out bits per byte", title="equal FLOPs a token",
                 xticks=budgets, xticklabels=[f"{C:.1e}" for C in budgets])
        left.minorticks_off()
        left.legend()
        C = np.geomspace(1e12, 1e24, 50)
        right.errorbar(budgets, best, (np.maximum(0, best - low), np.maximum(0, high - best)), fmt="o", ms=4, label="measured here")
        right.plot([1e21, 1e24], [3, 3.5], "s", label="Ling 1's report: about 3, above 3.5")
        for preset, style in (("toy", ":"), ("ling-mini-2.0", "--")):
            right.plot(C, [leverage(LingConfig(**PRESETS[preset]), x) for x in C], style, color="gray",
                       label=f"law of 2507.17702, {preset}")
        right.set(xscale="log", yscale="log", xlabel="FLOPs", title="lever: compute of dense over MoE, equal loss",
                  yticks=[1, 2, 4, 8], yticklabels=[1, 2, 4, 8])
        right.legend(fontsize=7)
        save_picture(figure, path)
    return show


SOFTMAX = dict(score_function="softmax", moe_router_enable_expert_bias=False, router_aux_loss_coef=0.03, router_z_loss_coef=1e-4)
ROUTERS = {                      # the toy, but for its router
    "sigmoid, never balanced": dict(moe_router_enable_expert_bias=False), "sigmoid, bias (Ling 2)": {},
    "sigmoid, bias, 2 of 4 groups": dict(n_group=4, topk_group=2),
    "softmax, balance loss": SOFTMAX, "softmax, balance loss, warm-up (Ling 1)": SOFTMAX | dict(router_warmup_steps=75)}


def routers(root, train, toy, flags):
    """The toy with other routers: held-out loss, the worst layer's load over time, time a step."""
    jobs = {f"{'-'.join(re.findall('[a-z0-9]+', label.lower()))}-{train.steps}-seed{seed}":
            flags(**router, seed=seed, steps=train.steps, eval_every=0)
            for label, router in ROUTERS.items() for seed in range(SEEDS)}
    results, table, curves = [*train_all(root, jobs).values()], [], {}
    for i, label in enumerate(ROUTERS):
        runs = results[i * SEEDS:(i + 1) * SEEDS]
        bpb, steps = [run[-1]["val_bpb"] for run in runs], [[r for r in run if "loss" in r] for run in runs]
        curve = curves[label] = np.mean([[r["imbalance"] for r in run] for run in steps], axis=0)
        tenth = max(1, len(curve) // 10)
        ms = statistics.median(1e3 * (b["tokens"] - a["tokens"]) / b["tokens_per_s"] for run in steps for a, b in pairwise(run))
        table.append([label, f"{statistics.mean(bpb):.4f} ({min(bpb):.3f} to {max(bpb):.3f})",
                      *(f"{part.mean():.2f}" for part in (curve[:tenth], curve[tenth:-tenth], curve[-tenth:])), f"{ms:.0f}"])
    columns(["router", f"bits per byte of {SEEDS} seeds", "load, first tenth", "between", "last tenth", "ms a step"], table)

    def show(path):
        figure, ((axis,),) = pyplot((7, 3.4))
        for label, curve in curves.items():
            width = max(1, len(curve) // 40)
            axis.plot(np.convolve(curve, np.ones(width) / width, "valid"), label=label)
        axis.set(xlabel="step", ylabel="worst layer's load over the mean", yscale="log")
        axis.legend(fontsize=8)
        save_picture(figure, path)
    return show


# ----------------------------------------------------------------------------------------------------------------------
# 11. The run

def build(train, config, team, resumed):
    """The model on its device and in its layout, with its first weights, or none yet if the run is resumed."""
    with torch.device("meta"):                                   # nothing exists whole, then each rank makes its part
        model = Ling(config)
    prepare_blocks(model, train)
    if team.ranks > 1:
        parallelize(model, train, team)
    model.to_empty(device=team.device)
    model.tie()
    if resumed is None:
        model.load_pretrained(train.init) if train.init else model.init_weights(train.seed)
    return model


def train_run(run, train, config, team, tokenizer, arrays, resumed, layout, promised):
    device = team.device
    resident(reset=True)
    data, first_sample = Data(arrays, train), batch_schedule(train, train.steps)
    token_bytes = token_sizes(tokenizer, config, device)
    model = build(train, config, team, resumed)
    optimizer = make_optimizer(model, train)
    load = torch.zeros(len(model.moe_blocks()), config.num_experts, dtype=torch.int64, device=device)     # of the last step, or round
    about = read_json(resumed / "state.json") if resumed else {}
    step, tokens_done, saved = (about.get(key, default) for key, default in (("step", 0), ("tokens", None), ("spikes", [])))
    tokens_done = int(first_sample[step]) * train.seq_len if tokens_done is None else tokens_done
    trace = Trace(run, team)
    if 0 < train.profile <= step:
        warnings.warn(f"--profile {train.profile}: the run is at step {step} already; give a later one", stacklevel=2)
    edit = EDiT(model, optimizer, train, team, trace, about.get("edit")) if team.replicas > 1 else None
    replica = team.replica if team.replica < len(saved) else 0                               # whose moments; a new replica has the first's
    if resumed:
        load_checkpoint(resumed, training_state(model, optimizer, load, replica, edit and about.get("edit") and edit.momentum))
    state = training_state(model, optimizer, load, team.replica, edit and edit.momentum)
    # Each replica between syncs has its own spikes, and may be ahead of the run's step or behind it.
    apart = edit is not None and len(saved) == team.replicas
    spikes = Spikes(train, saved[team.replica] if apart else saved and [saved[0][0], sum((each[1] for each in saved), []), saved[0][2]])
    ahead = about["ahead"][team.replica] if apart else 0
    if any(lost := about.get("ahead", [])) and not apart:
        warnings.warn(f"the {len(lost)} copies were {lost} steps ahead of step {step}; those ahead see these samples again, "
                      "and some are not seen", stacklevel=2)
    params, flops, peak = count_params(config), flops_per_token(config, train.seq_len), promised["peak"] if device.type != "cpu" else None
    rows = train.micro_batch_tokens // train.seq_len
    tokens_total = int(first_sample[-1]) * train.seq_len
    print(f"model: {params['total'] / 1e6:.2f}M parameters, {params['active'] / 1e6:.2f}M active per token; "
          f"{flops / 1e6:.1f} MFLOP per token\n"
          f"data: {sum(map(len, data.train)) / 1e6:.2f}M tokens to train on, {sum(map(len, data.val)) / 1e3:.0f}k held out" +
          f" (1 of {data.every} evaluated)" * (data.every > 1) + f"; vocabulary {tokenizer.size}\n" +
          (f"layout: {layout}\n" if team.size > 1 else "") +
          f"run: {run}, {train.steps} steps of {train.batch_tokens} tokens ({tokens_total / 1e6:.2f}M), on {device}, "
          f"torch {torch.__version__}" + (f", continuing at step {step}" if step else ""), flush=True)
    stop = {}                                                                                # signal -> when it came

    def on_signal(number, frame):
        if stop and time.monotonic() - min(stop.values()) > 3:   # again, by someone out of patience; torchrun
            os._exit(128 + number)                               # repeats a Ctrl-C at once, meaning nothing by it
        stop.setdefault(number, time.monotonic())
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    signals = {number: signal.signal(number, on_signal) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}    # nohup's
    logs = (run / "metrics.jsonl", run / "ledger.jsonl") if team.rank == 0 else (os.devnull, os.devnull)
    metrics, ledger = map(Log, logs)
    status, board = Status(), tensorboard()(run / "tensorboard") if train.tensorboard and team.rank == 0 else None

    def log(record):
        metrics.write(record)
        for key, value in record.items() if board else ():
            if isinstance(value, (int, float)) and key != "step":
                board.add_scalar(key, value, record["step"])
    if not train.compile:
        AllToAll.timer = lambda: trace.inside("exchange")
    watch = Watch(team, train.timeout, trace)
    saver = Saver(run, state, team, watch, train.keep)
    saver.saved, seconds_mean, stopping = step if resumed else None, None, False
    round_start, told = time.perf_counter(), None
    began, tokens_before = round_start, tokens_done
    tally, round_load, before = Counter(), torch.zeros_like(load, device="cpu"), step
    describe = lambda: {"tokens": tokens_done, "spikes": [each["spikes"] for each in told],
                        "ahead": [each["cursor"] - step for each in told]} | ({"edit": edit.state()} if edit else {})
    while step < train.steps and not stopping:
        start = time.perf_counter()
        watch.at(step + 1, "data")

        # 1. learning rate and batch size; this rank's sequences, an equal number on each, at the end filled up with ignored ones
        lr = lr_at(step, train)
        alpha = min(1.0, step / config.router_warmup_steps) if config.router_warmup_steps else 1.0
        alone = edit is not None and step >= train.sync_warmup   # this replica takes its own steps, on its part of the batch
        if alone and not apart:
            spikes.waiting, apart = spikes.waiting[team.replica::team.replicas], True
        if alone and not edit.anchor:
            edit.leave()
        samples = samples_of(step + ahead, first_sample)
        if alone:
            samples = samples[len(samples) * team.replica // team.replicas:len(samples) * (team.replica + 1) // team.replicas]
        returned = spikes.returning(step + ahead)                # of skipped steps: in micro-batches of their own
        group, rank, ranks = (team.within, team.rank % team.ranks, team.ranks) if alone else (None, team.rank, team.size)
        mine, micro = [], []
        for numbers in (samples, [k for k, *_ in returned]):
            first, each = len(mine), max(-(-len(numbers) // ranks), not mine)
            mine += [*numbers[rank * each:(rank + 1) * each], *[-1] * each][:each]
            micro += [slice(i, min(i + rows, first + each)) for i in range(first, first + each, rows)]
        returned_from = first                                    # mine[returned_from:] are of skipped steps
        tokens, targets = data.batch(mine, device)

        # 2. micro-batches: each loss is a sum over its tokens divided by the count of the whole step, so gradients add up
        watch.at(step + 1, "wait")
        counts, parts = team.sum(count_targets(config, targets), group), Counter()
        n_all, nats_again, n_again, weight = counts[0].clamp(min=1), 0.0, 0.0, 1.0            # the last three: of returned samples
        # The load of the whole batch is only known after it; the step before's differs little, needs no messages, and is the same for
        # every split into ranks and micro-batches. Before the first step: even, a loss without a gradient.
        fractions = None if train.balance == "micro" else (load + (step == 0)) / (load + (step == 0)).sum(1, keepdim=True).clamp(min=1)
        load_now = torch.zeros_like(load)
        for part in micro:
            if team.ranks > 1:
                # Whole gradients (DDP) stay where they are until the last micro-batch; sharded ones are reduced each time, as there is no
                # room for them, but summed over replicas only once.
                hold = model.set_requires_gradient_sync if train.replicate == team.size else model.set_requires_all_reduce
                hold(part is micro[-1])
            seeds = [sequence_seed(train.seed, step, k) for k in mine[part]]
            watch.at(step + 1, "forward")
            with team.autocast():
                out = model(tokens[part], targets[part], counts=counts, fractions=fractions,
                            warmup=None if alpha == 1 else Warmup(alpha, seeds))
            if part.start >= returned_from:
                watch.at(step + 1, "wait")
                nats, n = team.sum(torch.stack([out.parts["ce"].detach() * counts[0], (targets[part] >= 0).sum()]), group).tolist()   # SYNC
                nats_again, n_again = nats_again + nats, n_again + n
                weight = min(weight, spikes.weight(nats / max(1.0, n), max(1.0, n) / int(n_all)))
            watch.at(step + 1, "backward")
            (out.loss * weight).backward()
            for name, value in {"loss": out.loss, **out.parts}.items():
                parts[name] += value.detach()
            load_now += out.load

        # 3. loss, load and gradient norm of the whole step, whether anyone was asked to stop, and whether it ends a round
        watch.at(step + 1, "reduce")
        if edit and not alone:
            edit.sum_gradients()
        orphaned = team.parent not in (None, os.getppid())                                   # torchrun is gone: no one would restart us
        due = alone and rank == 0 and edit.due(time.perf_counter() - start)
        flags = (torch.full((), float(flag), device=device) for flag in (bool(stop) or orphaned, due))   # a copy would wait for backward
        sums = team.sum(torch.stack([*parts.values(), *flags]), group)
        load_now = team.sum(load_now, group)
        norm = grad_norm(model, team)
        *values, asked, due = sums.tolist()                                                  # SYNC
        parts, stopping, norm, load_here = dict(zip(parts, values)), asked > 0, float(norm), load_now.cpu()

        # 4. spike?
        n_all = int(n_all)
        loss = (parts["ce"] - nats_again / n_all) * n_all / max(1.0, n_all - n_again)        # of the samples that are new
        verdict = spikes.judge(step + ahead, loss, norm, samples, returned, weight < 1, alone)

        # 5. clip and step
        watch.at(step + 1, "optimizer")
        for each in optimizer.param_groups:
            each["lr"] = lr * (spikes.LOWER if verdict == "lower" else 1.0)
        if verdict != "skip":
            for p in model.parameters():
                if p.grad is not None and norm > train.clip:
                    local(p.grad).mul_(train.clip / norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 6. rebalance the experts
        if verdict != "skip":
            load.copy_(load_now)
            update_expert_bias(model, load)
        step += 1

        # 7. log: a step, or with --sync edit all that the replicas did since they parted
        n, finite = (len(samples) + len(returned)) * train.seq_len, math.isfinite(parts["loss"] + norm)
        tally.update({"steps": 1, "lr": lr, "seen": n, "tokens": n * (verdict != "skip"), "skipped": int(verdict == "skip")})
        tally.update({"finite": 1, **parts, "grad_norm": norm} if finite else {})
        round_load += load_here
        trace.step(step, train.profile)
        seconds = time.perf_counter() - start
        seconds_mean = seconds if seconds_mean is None else 0.95 * seconds_mean + 0.05 * seconds
        eta = (train.steps - step) * seconds_mean
        uneven = uneven_load(load_here)
        status.update(f"step {step}/{train.steps}  loss {parts['loss']:.3f}  lr {lr:.1e}  "
                      f"{n * team.size / ranks / seconds_mean:,.0f} tok/s  left {int(eta) // 60}:{int(eta) % 60:02d}" +
                      (f"  load {strip(load_here[uneven.argmax()])} {float(uneven.max()):.2f}" if len(load) else ""))
        told, weights = [{"tally": tally, "spikes": spikes.state(), "events": spikes.events, "cursor": step + ahead, "asked": stopping,
                          "sick": 2 * tally["skipped"] > tally["steps"], "at": watch.count}], None
        if alone:
            edit.steps += 1
            if not (due or stopping or step >= train.steps):
                continue
            watch.at(step, "sync")
            round_load = team.sum(round_load.to(device), team.across).cpu()          # first: behind the layers' it would wait
            load.copy_(round_load)
            told, weights = edit.sync(*told)
            watch.count = max(each["at"] for each in told)
        crossed = lambda every: every and step // every > before // every
        totals = sum((Counter(each["tally"]) for each in told), Counter())
        step, stopping = sum(each["cursor"] for each in told) // len(told), any(each["asked"] for each in told)
        ahead = told[team.replica if alone else 0]["cursor"] - step
        tokens_done, speed = tokens_done + totals["tokens"], totals["seen"] / (time.perf_counter() - round_start)
        log({"step": step, "tokens": tokens_done,
             **{key: totals[key] / totals["finite"] if totals["finite"] else None for key in (*parts, "grad_norm")},
             "lr": optimizer.param_groups[0]["lr"], "tokens_per_s": speed, "mfu": speed * flops / (peak * team.size) if peak else None,
             "imbalance": float(uneven_load(round_load).max()), "skipped": totals["skipped"]} |
            ({"load": round_load.tolist()} if len(load) and (step >= train.steps or crossed(max(1, train.steps // 100))) else {}) |
            ({"steps": [each["tally"]["steps"] for each in told], "weights": weights.mean(1).tolist()} if alone else {}))
        for replica, each in enumerate(told):
            for event in each["events"]:
                ledger.write({**event, "replica": replica, "logged": step})
        spikes.events, tally, round_load = [], Counter(), torch.zeros_like(load, device="cpu")
        if hopeless := next(filter(None, (spikes.hopeless(each["spikes"][2]) for each in told)), None):
            saver.wait()
            watch.stop()
            raise BadInput(hopeless)

        # 8. evaluate, checkpoint
        if alone and (stopping or step >= train.steps or crossed(train.save_every)):
            edit.arrive(last=len(edit.units))
        if step >= train.steps or crossed(train.eval_every):
            with team.autocast():
                score = evaluate(model, data, token_bytes, rows, team, lambda: watch.at(step, "evaluation"))
            log({"step": step, **score})
            status.note(f"step {step}  held-out: {score['val_ce']:.4f} nats per token, {score['val_bpb']:.4f} bits per byte")
        if step < train.steps and crossed(train.save_every):
            watch.at(step, "checkpoint")
            saver.save(step, describe())
        before, round_start = step, time.perf_counter()

    seconds = time.perf_counter() - began
    watch.at(step, "last checkpoint")
    saver.finish(step, describe())
    trace.step(step, train.profile, last=True)
    watch.stop()
    AllToAll.timer = contextlib.nullcontext
    for file in filter(None, (metrics, ledger, trace.file, board)):
        file.close()
    for number, handler in signals.items():
        signal.signal(number, handler)
    if team.rank == 0 and tokens_done > tokens_before:
        settle(run, train, config, team, promised, tokens_done - tokens_before, seconds)
    if step < train.steps:
        why = ", ".join(signal.Signals(number).name for number in stop) or "another rank was stopped"
        return status.note(f"{why}: saved step {step}; continue with: python train.py --out {shlex.quote(str(run))}")
    if team.size == 1 and config.max_position_embeddings > 8:    # a sharded model would gather all its weights for every token
        prompt = "" if train.data else "def read"
        text = text_of(model, tokenizer, prompt, min(200, config.max_position_embeddings - 8), temperature=0.8, min_p=0.05,
                       stop_ids=(tokenizer.end,))
        print(f"\nsample, after {prompt!r}:\n{prompt}{text}\n")
    finished(run, step)


@torch.no_grad()
def export(run, train, config, team, resumed):
    """Write the newest checkpoint in the released format, or the mean of the last --merge ones, and say what that did to the
    held-out loss."""
    model, tokenizer, out = build(train, config, team, resumed), load_tokenizer(str(run)), train.export or f"{run}-merged"
    state = {"model": model.state_dict()}
    load_checkpoint(resumed, state)
    if train.merge:
        folders, data = [f for f in checkpoints(run) if f <= resumed][-train.merge:], Data(read_data(run, train, config), train)
        require(len(folders) == train.merge, f"--merge {train.merge}: {run} has {len(folders)} good checkpoints; "
                f"train with --keep {train.merge} and --decay 0")
        for folder in folders:
            require(not (damage := checkpoint_damage(folder)), f"--merge {train.merge}: {folder} is damaged ({damage}); merge fewer")
        sizes = token_sizes(tokenizer, config, team.device)

        def score():
            with team.autocast():
                return evaluate(model, data, sizes, train.micro_batch_tokens // train.seq_len, team)["val_bpb"]
        last, mean = score(), [torch.zeros_like(local(t)) for t in state["model"].values()]
        for folder, weight in zip(folders, merge_weights(train.merge, train.merge_shape)):
            load_checkpoint(folder, state)
            for total, t in zip(mean, state["model"].values()):
                total.add_(local(t), alpha=weight)
        for total, t in zip(mean, state["model"].values()):
            local(t).copy_(total)
        print(f"held-out bits per byte: {last:.4f} of the last checkpoint, {score():.4f} of the mean of {train.merge}, "
              f"{folders[0].name} to {folders[-1].name}")
    model.save_pretrained(out)
    if team.rank == 0:
        keep_tokenizer(Path(out), tokenizer, run)
    print(f"exported {resumed.name if not train.merge else f'the mean of the last {train.merge} checkpoints'} of {run} to {out}")


def finished(run, step):
    print(f"finished: {step} steps\n  checkpoint {run}/step_{step:08d}\n  metrics    {run}/metrics.jsonl\n"
          f"next: python sample.py {run} --prompt def   (train on: python train.py --out {run} --steps N)")


def keep_tokenizer(folder, tokenizer, source):
    """Beside weights: the tokenizer, and what else chat and other engines read of the release or run they come from ("": of none)."""
    for name in ("tokenizer.json", "tokenizer.tiktoken"):        # of a start that was killed, or an earlier export
        (folder / name).unlink(missing_ok=True)
    files = dict([tokenizer.file] if tokenizer.file else [])
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json") if source else ():
        if (Path(source) / name).exists():
            files[name] = (Path(source) / name).read_bytes()
    for name, content in files.items():
        write_beside(folder / name, lambda f: f.write(content))


class Log:
    """A file of JSON lines, each written at once. A full disk costs lines, and a warning, but not the run."""

    def __init__(self, path):
        self.path, self.file, self.torn = path, open(path, "ab", buffering=0), False

    def write(self, record):
        line, written, why = b"\n" * self.torn + json.dumps(record).encode() + b"\n", 0, "no room"
        try:
            written = self.file.write(line)
        except OSError as error:
            why = error
        if written < len(line) and not self.torn:
            warnings.warn(f"{self.path} lacks lines from here on ({why}); make room; training goes on", stacklevel=2)
        self.torn = written < len(line)

    def close(self):
        self.file.close()


def read_log(path):
    """The objects of a file of JSON lines that a run wrote; a line cut short by a kill is passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def trim_logs(run, step):
    """Drop what was logged after the checkpoint: the steps will be logged again."""
    for path in (run / "metrics.jsonl", run / "ledger.jsonl"):
        kept = [record for record in read_log(path) if record.get("logged", record.get("step", math.inf)) <= step]
        write_beside(path, lambda f: f.write(b"".join(json.dumps(record).encode() + b"\n" for record in kept)))


def start_run(run, train, config, given_model, continues, replicas, lock):
    """What one process does for all before a run starts or goes on: read and check the data, lock and write the run's folder."""
    if continues:
        lock()
        write_json(run / "train.json", {**read_json(run / "train.json"), **dataclasses.asdict(train)})      # --steps may have changed
        for leftover in run.glob("tmp_*"):
            shutil.rmtree(leftover)
        return
    ours = ("data", "train.json", "tokenizer.*", "step_*", "metrics.jsonl", "ledger.jsonl", "plan.json", "trace")
    foreign = next(chain.from_iterable(map(run.glob, ours)), None)
    require(not foreign or "train_tokens" in (read_json(run / "train.json") if (run / "train.json").exists() else {}),
            f"--out {run}: {foreign} is there, but no run of train.py, which would write there; choose another folder")
    require(train.steps <= 10 ** 8, f"--steps {train.steps} must be at most 10^8; raise --batch_tokens")
    tokenizer, config, arrays, shards = prepare(train, config, given_model)
    # fp32 weights and two moments; with --sync edit moments of each replica, and the outer momentum
    size = (12 if replicas == 1 else 8 + 8 * replicas) * sum(count_params(config)[kind] for kind in ("total", "mtp"))
    room = shutil.disk_usage(next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())).free
    require(room >= size * (train.keep + 1), f"{run}: {train.keep} checkpoints of {size / 1e9:.2f} GB and one being written need more "
            f"than the {room / 1e9:.2f} GB free; make room, lower --keep, or choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    lock()
    require(not (run / "config.json").exists(), f"{run}: another command has started a run there meanwhile; the same command again would "
            "continue it, another --out starts one of your own")
    # train.json first: what is there from then on is ours
    write_json(run / "train.json", {**dataclasses.asdict(train), "fresh": False, "torch": torch.__version__,
                                    "train_tokens": sum(map(len, arrays["train"])), "train_crc": crc_of(arrays)})
    shutil.rmtree(run / "data", ignore_errors=True)                                          # of a start that was killed
    keep_tokenizer(run, tokenizer, train.init)
    if not shards:
        write_data(run, arrays)
    write_json(run / "config.json", config.to_dict())                                        # last: its presence makes this a run


def look_ahead(given_train, given_model, base):
    """--plan and --budget: of a run that is there and named, or of a new one.
    A release is planned as it was trained: 4K, 1T tokens or more."""
    preset, new = given_train.get("preset", "toy"), not (Path(given_train.get("out", "/")) / "config.json").exists()
    given = dict(given_train)
    if new:
        given = {"fresh": True, **({"seq_len": 4096} if "vocab_size" in PRESETS[preset] else {}), **given}
        S = max(1, given.get("seq_len", TrainConfig.seq_len))
        given = {"batch_tokens": max(S, TrainConfig.batch_tokens // S * S),
                 "micro_batch_tokens": max(S, TrainConfig.micro_batch_tokens), **given}
    _, train, config, _ = resolve(given, given_model)
    if new:
        config = with_vocabulary(train, config, given_model)
    if train.budget:
        return budget(train, config, given_train | given_model | {"seq_len": train.seq_len})
    if new and "vocab_size" in PRESETS[preset] and "steps" not in given and not train.init:
        tokens = given.get("tokens", 1e12)
        batch = (given_train.get("batch_tokens") or
                 round(scaling_law(law_flops(config, train.seq_len) * tokens)[1] / train.seq_len) * train.seq_len)
        train = dataclasses.replace(train, batch_tokens=max(batch, train.seq_len), tokens=tokens)
    plan(train, config, base, None if given_model.keys() - {"head_dim"} or train.init or train.dense else REPORTED.get(train.preset))


def main(argv=None):
    warnings.showwarning = lambda message, *args, **kwargs: print(f"warning: {message}", file=sys.stderr)
    given_train, given_model = parse_args(sys.argv[1:] if argv is None else argv)
    require(not {"tokens", "steps"} <= given_train.keys(), "--tokens and --steps both say how long to train; give one")
    if given_train.get("report"):
        return report(given_train["report"])
    if given_train.get("plot"):
        return draw(Path(given_train["plot"]))
    if given_train.get("study"):
        return study(TrainConfig(**given_train), given_train, given_model)
    base = resident()
    if given_train.get("plan") or given_train.get("budget"):
        return look_ahead(given_train, given_model, base)
    run, train, config, continues = resolve(given_train, given_model)
    if train.tensorboard:
        tensorboard()                                            # raises before anything is written
    if train.export or train.merge:
        train = dataclasses.replace(train, sync="step")
    team, layout, asked = Team(train.device), "", train   # what was asked for is what a run keeps: another number of ranks fills it in anew
    require(team.size > 1 or train.sync == "step", "--sync edit is for copies that train on their own: "
            "start several processes with torchrun, or go on with --sync step")
    require(not (train.fresh and team.restarts), "--fresh would start over at each restart by torchrun; give a new --out instead")
    if team.size > 1:
        train, layout = choose_layout(train, config, team)                                   # raises before anything is connected
    team.connect(train.timeout)
    replicate, ep, layout = team.first(lambda: [train.replicate, train.ep, layout])          # hosts may differ in memory: one decides
    train = dataclasses.replace(train, replicate=replicate, ep=ep)
    if train.sync == "edit":
        team.split(train.replicate)
    run = Path(team.first(lambda: str(run)))                                                 # of --fresh there may be two minds
    resumed, step = None, 0
    if continues:
        share = slice(team.rank, None, team.size)                                            # each rank checks some of the files
        folders = [Path(name) for name in team.first(lambda: [str(folder) for folder in checkpoints(run)])]      # as rank 0 sees the disk
        resumed = find_checkpoint(run, folders, share, lambda damage: next(filter(None, team.gather(damage)), None))
        require(resumed or not folders, f"no checkpoint in {run} is intact; start over with --fresh")
        step = read_json(resumed / "state.json")["step"] if resumed else 0
    require(resumed or not (train.export or train.merge), f"--export, --merge: {run} has no checkpoint yet; train first")
    if train.export or train.merge:
        export(run, train, config, team, resumed)
    elif step >= train.steps:
        finished(run, step)
    else:
        with contextlib.ExitStack() as held:
            lock = lambda: held.enter_context(hold(run)) if team.size == 1 else None         # torchrun's dead may not let go at once
            team.first(lambda: start_run(run, asked, config, given_model, continues, team.replicas, lock) or trim_logs(run, step))
            config = read_config(run)
            train_run(run, train, config, team, load_tokenizer(str(run)), read_data(run, train, config), resumed, layout,
                      forecast(train, config, team, base))
    team.close()


if __name__ == "__main__":
    sys.exit(run_cli("train.py", main))
