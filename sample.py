"""What does it say? Text from a run of train.py, or from released Ling weights.

    python sample.py                                     # the newest run, a prompt of its own
    python sample.py runs/toy --prompt "class " --tokens 200 --temperature 0.8
    python sample.py PATH/Ling-mini-2.0 --dtype bfloat16 < prompt.txt
    python sample.py --show-routing                      # colour each token by the expert that ran for it
    python sample.py PATH/Ling-mini-2.0 --chat           # talk; /reset, /quit, Ctrl-C stops a reply
    python sample.py PATH/Ling-mini-2.0 --prompts in.jsonl --out out.jsonl     # many at once; again: only what is missing
    python sample.py PATH/Ling-mini-2.0 --score in.jsonl                       # log-likelihoods of given continuations
    python sample.py PATH/Ling-mini-base-2.0 --speculate                       # the MTP block guesses, the model checks
    python sample.py PATH/Ling-mini-2.0 --compile --chat                       # on a CPU: wait a minute, then twice as fast

Text streams to stdout as it comes; tokens per second go to stderr. All of these are one loop, `Engine.serve`: requests of any
length share each pass through the model, and their keys and values one buffer.
"""
import argparse
import base64
import codecs
import collections
import contextlib
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

import kernels
from kernels import attention, attention_by_table, pow2
from ling import BadInput, Ling, checkpoints, hold, read_json, require, verify_checksums, write_beside

# ----------------------------------------------------------------------------------------------------------------------
# 1. Tokenizers. All are byte-level BPE, run by tiktoken: bytes -> rank, and the rank is the id.

# How Ling's releases cut text before merging: words with at most one leading sign, single digits, runs of signs, spaces.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
END, ROLE_END = "<|endoftext|>", "<|role_end|>"
TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")          # special tokens a reader wants to see


class Tokenizer:
    """tiktoken with two rules: user text never becomes a special token, and what a release normalises (NFC) is normalised."""

    def __init__(self, encoding, nfc=False, file=None):
        self.encoding, self.nfc, self.size = encoding, nfc, encoding.n_vocab                 # size: largest id + 1
        self.specials = {name: encoding.encode_single_token(name) for name in sorted(encoding.special_tokens_set)}
        self.end = self.specials.get(END)
        self.file = file                                                                     # (name, content) to keep beside weights

    @classmethod
    def from_ranks(cls, ranks):
        """ranks {bytes: rank} as in tiktoken's rank files; end of text follows the last rank."""
        lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
        encoding = tiktoken.Encoding("ling", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
        return cls(encoding, file=("tokenizer.tiktoken", b"".join(lines)))

    def encode(self, text):
        """Raises BadInput on a text whose longest piece is too much for tiktoken."""
        try:
            return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)
        except BaseException as error:                           # a panic in tiktoken's regex is no Exception
            require(type(error).__name__ != "PanicException", f"tiktoken cannot cut a text of {len(text)} characters ({error}): "
                    "break up its longest run of blanks, which may have some hundred thousand")
            raise

    def encode_chat(self, pieces):
        """pieces [(text, is it the template's own?)] -> ids. Special tokens are looked for in the template's own text alone;
        text between two of them is cut as one, whoever wrote it, as the official tokenizer does."""
        marks = re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or "(?!)")
        ids, text = [], ""
        for piece, own in pieces:
            while own and (mark := marks.search(piece)):
                ids += [*self.encode(text + piece[:mark.start()]), self.specials[mark[0]]]
                piece, text = piece[mark.end():], ""
            text += piece
        return ids + self.encode(text)

    def bytes_of(self, token):
        """The bytes a token stands for; none for ids without a token (padding of the vocabulary) and for specials but TOOL_MARKS."""
        try:
            data = self.encoding.decode_single_token_bytes(token)
            return data if not self.encoding.is_special_token(token) or data.decode() in TOOL_MARKS else b""
        except KeyError:
            return b""


def load_tokenizer(spec):
    """`bytes`, a .tiktoken rank file, a released tokenizer.json, a folder that holds either, or a name tiktoken knows."""
    path = Path(spec)
    if spec == "bytes":
        return Tokenizer.from_ranks({bytes([b]): b for b in range(256)})
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.tiktoken"):
            if (path / name).exists():
                return load_tokenizer(str(path / name))
        if (path / "train.json").exists():
            return load_tokenizer(str(read_json(path / "train.json").get("tokenizer")))
        raise BadInput(f"{path} has no tokenizer.json or tokenizer.tiktoken; name one with --tokenizer")
    if path.exists():
        return released_tokenizer(path) if path.suffix == ".json" else Tokenizer.from_ranks(read_ranks(path))
    require(not re.fullmatch(r"bpe\d+", spec), f"tokenizer {spec!r} is learned in a run and kept with it; give the run, or its file")
    if spec not in tiktoken.list_encoding_names():
        raise BadInput(f"tokenizer {spec!r} is not a file, bytes, bpeN or one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        return Tokenizer(tiktoken.get_encoding(spec))
    except Exception as error:      # tiktoken fetches named encodings with whatever client it has, and raises that client's errors
        raise BadInput(f"tiktoken cannot fetch {spec!r} ({type(error).__name__}); give a file, or use bpe2048 or bytes") from None


def read_ranks(path):
    """A tiktoken rank file: one `base64 rank` a line, ranks 0, 1, 2 ... in any order, all 256 bytes among them."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} is not a tiktoken rank file ({error}); each line is a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise BadInput(f"{path}: ranks must be 0..{len(ranks) - 1} without gaps or repeats, and cover all 256 bytes")
    return ranks


def released_tokenizer(path):
    """A Hugging Face tokenizer.json of byte-level BPE as a tiktoken encoding, refused unless the two agree on every text.

    They do iff ids follow the order of the merges, and merging a token's bytes by lower ranks ends in just the pair its merge
    lists; otherwise one of them reaches tokens the other cannot."""
    raw = read_json(path)
    try:
        vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
        specials = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
        steps = raw["pre_tokenizer"].get("pretokenizers", [raw["pre_tokenizer"]])
        patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]   # without one, ByteLevel has GPT-2's
        require(len(patterns) == 1, f"it cuts text by {len(patterns)} patterns of its own, Ling's by one")
        cut, *rest = steps
        require(cut.get("behavior") == "Isolated" and not cut.get("invert") and [step["type"] for step in rest] == ["ByteLevel"]
                and not rest[0].get("add_prefix_space") and not rest[0].get("use_regex", True),
                "it cuts text otherwise than Ling's, whose two steps are Split (Isolated) and a bare ByteLevel")
        normalizer = raw.get("normalizer") or {"normalizers": []}
        nfc = bool(kinds := [step["type"] for step in normalizer.get("normalizers", [normalizer])])
        require({*kinds} <= {"NFC"}, f"it normalises by {', '.join(kinds)}; Ling's by NFC or not at all")
        # GPT-2's alphabet: printable bytes stand for themselves, the rest for code points from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        to_bytes = lambda token: bytes(alphabet[c] for c in token)
        ranks = {to_bytes(token): rank for token, rank in vocab.items() if token not in specials}
        pairs = [(to_bytes(a), to_bytes(b)) for a, b in merges]
        require(all(bytes([b]) in ranks for b in range(256)), "not every byte is a token")
        require(len({*specials.values(), *ranks.values()}) == len(specials) + len(ranks), "two tokens have one id")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is not a byte-level BPE tokenizer.json ({type(error).__name__}: {error})") from None
    order = [ranks.get(a + b, -1) for a, b in pairs]
    if order != sorted(set(order)) or len(ranks) != 256 + len(pairs) or order[:1] == [-1]:
        raise BadInput(f"{path}: ids do not follow the order of the merges, so tiktoken would cut text differently; retrain or convert it")
    for a, b in pairs:
        if (reached := merge_below(a + b, ranks, ranks[a + b])) != [a, b]:
            raise BadInput(f"{path}: token {(a + b)!r} is reached as {reached}, not as its merge says; tiktoken would cut text differently")
    encoding = tiktoken.Encoding("ling", pat_str=patterns[0], mergeable_ranks=ranks, special_tokens=specials)
    return Tokenizer(encoding, nfc, file=("tokenizer.json", path.read_bytes()))


def merge_below(token, ranks, limit):
    """BPE of `token` with the merges below rank `limit` -> list of pieces."""
    pieces = [token[i:i + 1] for i in range(len(token))]
    while len(pieces) > 1:
        rank, i = min((ranks.get(pieces[i] + pieces[i + 1], limit), i) for i in range(len(pieces) - 1))
        if rank >= limit:
            break
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


# ----------------------------------------------------------------------------------------------------------------------
# 2. Chat templates. Yields (text, is it the template's own?): what a user, a tool or the model wrote can hold no special token.

def json_beside(folder, name):
    """The JSON object in a file of the folder; {} if there is no such file."""
    found = read_json(Path(folder) / name) if (Path(folder) / name).exists() else {}
    require(isinstance(found, dict), f"{Path(folder) / name} must hold a JSON object")
    return found


def chat_style(folder, config, tokenizer):
    """-> ("v1" or "v2", whether it thinks by default), by the template beside the weights if there is one, else by the model.
    Ling 1 and Ling 2's base models have the plain v1, in which only the next role ends a turn."""
    require("<role>" in tokenizer.specials, f"the tokenizer of {folder} has no <role> token: not a model one can chat with; use --prompt")
    file = Path(folder) / "chat_template.jinja"
    template = file.read_text("utf-8") if file.exists() else str(json_beside(folder, "tokenizer_config.json").get("chat_template") or "")
    is_v2 = ROLE_END in template if template else ROLE_END in tokenizer.specials and not config.is_ling1
    return "v2" if is_v2 else "v1", bool(re.search(r"thinking_option\s*=\s*['\"]on|detailed thinking on", template))


def render(messages, style, thinking=False, tools=()):
    """The prompt for the assistant's next turn. messages: dicts as in OpenAI's API, {"role": system, user, assistant or tool, "content"},
    an assistant's also with "tool_calls" and "reasoning_content". Raises BadInput."""
    require(isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages),
            "messages must be a list of objects, and not empty")
    require(isinstance(tools, (list, tuple)), "tools must be a list of functions")
    for m in messages:
        require(m.get("role") in ("system", "user", "assistant", "tool"),
                f"a message's role is {m.get('role')!r}; known are system, user, assistant and tool")
        require(all(isinstance(m.get(key) or "", str) for key in ("content", "reasoning_content")), "a message's content must be a string")
        require(are_calls(m.get("tool_calls") or []),
                'tool_calls must be a list of {"name": ..., "arguments": ...}, or of {"function": {...}}')
    return [*(render_v2 if style == "v2" else render_v1)(messages, thinking, tools), ("<role>ASSISTANT</role>", True)]


def render_v1(messages, thinking, tools):
    require(not tools and not thinking and not any(message.get("tool_calls") for message in messages),
            "the chat template of Ling 1 and of base models knows no tools and no thinking; leave them out")
    for message in messages:
        role = message["role"].upper()
        yield f"<role>{'HUMAN' if role == 'USER' else role}</role>", True
        yield message.get("content") or "", False


def render_v2(messages, thinking, tools):
    dump = lambda value: json.dumps(value, ensure_ascii=False)
    yield "<role>SYSTEM</role>", True
    if messages[0]["role"] == "system":
        yield (messages[0].get("content") or "") + "\n", False
    if tools:
        yield ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
               "You are provided with function signatures within <tools></tools> XML tags:\n<tools>", True)
        yield "".join("\n" + dump(tool) for tool in tools), False
        yield ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
               '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
               "</tool_call>\n", True)
    yield f"detailed thinking {'on' if thinking else 'off'}{ROLE_END}", True
    last_query = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages))
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "system" and i == 0:
            continue
        if role == "tool":                                                                   # answers in a row share one turn
            if i == 0 or messages[i - 1]["role"] != "tool":
                yield "<role>OBSERVATION</role>", True
            yield "\n<tool_response>\n", True
            yield content, False
            yield "\n</tool_response>", True
            if i + 1 < len(messages) and messages[i + 1]["role"] == "tool":
                continue
        else:
            yield f"<role>{'HUMAN' if role == 'user' else role.upper()}</role>", True
            if role == "assistant":
                thought, content = split_thought(message)
                if thought and i > last_query:                                               # of earlier turns only the answer is kept
                    thought, content = f"\n<think>\n{thought}\n</think>\n\n", content.lstrip("\n")
                    yield thought, False
            yield content, False
            for j, call in enumerate(message.get("tool_calls") or () if role == "assistant" else ()):
                call = call.get("function") or call
                arguments = call["arguments"] if isinstance(call["arguments"], str) else dump(call["arguments"])
                yield "\n" * bool(j or content) + "<tool_call>\n", True
                yield f'{{"name": {dump(call["name"])}, "arguments": {arguments}}}', False
                yield "\n</tool_call>", True
        yield ROLE_END, True


def are_calls(calls):
    bodies = [call.get("function") or call if isinstance(call, dict) else None for call in calls] if isinstance(calls, list) else [None]
    return all(isinstance(body, dict) and isinstance(body.get("name"), str) and "arguments" in body for body in bodies)


def split_thought(message):
    """What an assistant's message thought, and what it said."""
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return message["reasoning_content"].strip("\n"), content
    thought, mark, answer = content.rpartition("</think>")
    return (thought.split("<think>")[-1].strip("\n"), answer.lstrip("\n")) if mark else ("", content)


def split_calls(text):
    """An assistant's text -> {"content", "tool_calls"} of its message. What is in a thought, or no call in JSON, or followed by more than
    calls, stays text."""
    thought, mark, answer = text.partition("</think>")
    if not mark or "<tool_call>" in thought and "<think>" not in thought:                    # none, or in an argument of a call
        thought, mark, answer = "", "", text
    content, *calls = re.split(r"\n?<tool_call>\n?", answer)
    try:
        calls = [json.loads(call.strip().removesuffix("</tool_call>")) for call in calls]
    except (ValueError, RecursionError):
        calls = None
    return {"content": thought + mark + content, "tool_calls": calls} if calls and are_calls(calls) else {"content": text}


# ----------------------------------------------------------------------------------------------------------------------
# 3. One token

def next_tokens(logits, uniform, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0):
    """Draw an id for each row. logits (n,V) fp32; uniform, n numbers in [0, 1), decide -> (n,) int64. temperature 0: the likeliest.
    top_k 0, top_p 1, min_p 0: off.

    top_p keeps the fewest tokens whose probabilities reach it (arXiv 1904.09751), min_p those of at least min_p times the
    best's (arXiv 2407.01082)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature      # below 0, so that a small temperature cannot overflow
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ordered, index = probs.sort(descending=True)
        probs = probs.scatter(1, index, ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0))     # the one that crosses stays
    probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    reach = (probs if probs.is_cuda else probs.cpu()).double().cumsum(-1)                    # MPS has no double
    wanted = reach[:, -1:] * torch.tensor([*uniform], dtype=torch.float64, device=reach.device).unsqueeze(1)
    return torch.searchsorted(reach, wanted, right=True).squeeze(1).clamp(max=reach.shape[1] - 1)    # right: never one of probability 0


def penalise(logits, seen, penalty):
    """Divide the positive logits of seen tokens and multiply the negative (arXiv 1909.05858). (V,), (n,) -> (V,)"""
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old > 0, old / penalty, old * penalty))


class Stream:
    """Token bytes in, printable text out: holds back half a character, and what may be the beginning of a stop string."""

    def __init__(self, stops=()):
        self.decoder, self.held, self.stops, self.stopped = codecs.getincrementaldecoder("utf-8")("replace"), "", stops, False

    def push(self, data, final=False):
        self.held += self.decoder.decode(data, final)
        hits = [i for i in (self.held.find(stop) for stop in self.stops) if i >= 0]
        if hits:
            self.stopped, ready, self.held = True, self.held[:min(hits)], ""
            return ready
        keep = 0 if final else max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        ready, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return ready


# ----------------------------------------------------------------------------------------------------------------------
# 4. Many requests through one model

@dataclass(eq=False)
class Request:
    """A prompt to continue by up to `tokens`, or (tokens 0) a text to score from position `score_from` on, and what came of it."""
    ids: list                                                    # the prompt; what is generated is appended
    tokens: int = 0
    score_from: int = 1
    seed: str = "0"                                              # with the position, decides each draw, whatever else is in the batch
    sampling: dict = field(default_factory=dict)                 # of next_tokens, and repetition_penalty
    stop_ids: frozenset = frozenset()
    bytes_of: object = None                                      # token -> bytes; None: no text is wanted
    stream: Stream = field(default_factory=Stream)
    where: str = ""                                              # of which file and line, for messages
    text: str = ""                                               # the continuation so far, as far as it may be printed
    finish: str = None                                           # "stop" or "length" once it is complete
    logprobs: list = field(default_factory=list)                 # of ids[score_from:], natural logarithms
    greedy: bool = True                                          # whether each of those was the likeliest
    guess: list = field(default_factory=list)                    # the MTP block's next token, not in ids yet
    done: int = 0                                                # so many of ids have their keys and values in the buffer

    def __post_init__(self):
        self.limit = len(self.ids) + self.tokens                 # positions it may come to need
        self.hold(np.zeros(0, np.int64))

    def hold(self, slots):
        """slots (n,) int64: where positions 0..n - 1 lie or will lie, and the same as ranges."""
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        self.slots, self.ranges = slots, [(int(run[0]), int(run[-1]) + 1) for run in np.split(slots, cuts) if len(run)]

    def ranges_to(self, end):
        """The ranges that positions 0..end - 1 lie in."""
        found = []
        for a, b in self.ranges:
            found.append((a, min(b, a + end)))
            end -= b - a
            if end <= 0:
                return found

    @property
    def target(self):
        """How many of ids have to run: a text to score needs nothing of what follows its last token."""
        return len(self.ids) if self.tokens else len(self.ids) - 1

    @property
    def first(self):
        """The first position whose logits are wanted."""
        return len(self.ids) - 1 if self.tokens else self.score_from - 1

    def push(self, token):
        """Take the next token; sets finish."""
        if token in self.stop_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            if self.bytes_of:
                self.text += self.stream.push(self.bytes_of(token))
            self.finish = "stop" if self.stream.stopped else "length" if len(self.ids) >= self.limit else None
        if self.finish and not self.stream.stopped:
            self.text += self.stream.push(b"", final=True)


class Segments:
    """Keys and values of requests of any lengths in one buffer of slots, after the segment cache of Flood [Ling1 section 5]: positions that
    lie in a row are read where they are. Requests that begin alike share slots, so a slot counts its users."""

    def __init__(self, config, slots, layers, device):
        self.shape, self.device = (layers, 1, slots + 1, config.num_key_value_heads, config.head_dim), device
        self.keys = self.values = self.head_scale = None
        self.users = np.zeros(slots, np.int32)                   # the last slot is nobody's: rows of padding write there
        self.by_table = 4 if device.type != "cpu" else 0         # so many tokens of a request, at most, go by table

    def take(self, n, after):
        """n free slots, or None. First those that follow slot `after` (extend), else the smallest run that holds them (allocate), else
        the longest ones (append)."""
        free = np.flatnonzero(self.users == 0)
        if len(free) < n:
            return None
        runs = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1)
        runs.sort(key=lambda run: (run[0] != after + 1, len(run) < n, len(run) if len(run) >= n else -len(run)))
        slots = np.concatenate(runs)[:n]
        self.users[slots] += 1
        return slots

    def plan(self, work):
        """The next pass writes positions start..end - 1 of each request, work [(request, start, end)], one after the other."""
        rows = [request.slots[start:end] for request, start, end in work]                    # slot and
        at = [np.arange(start, end) for _, start, end in work]                               # position of each token
        self.spans, self.table, n, few = [], None, len(at[0]), 0
        if n <= self.by_table:                                   # the first requests, as far as they have equally few tokens
            few = next((i for i, each in enumerate(at) if len(each) != n), len(work))
            # Where they are all, as many rows, and columns, as the next power of two: few shapes, each worth a graph.
            ends = [end for _, _, end in work[:few]]
            nobody, N, columns = self.shape[2] - 1, pow2(few) if few == len(work) else few, pow2(max(256, *ends))
            if self.device.type == "cpu" and N * columns > 4096 + 4 * sum(ends):             # SDPA would take copies of the longest's size
                few = 0
        if few:
            table = np.full((N, columns), nobody)
            for row, (request, _, end) in zip(table, work):
                row[:end] = request.slots[:end]
            rows, at = [*rows, np.full((N - few) * n, nobody)], [*at, np.zeros((N - few) * n, np.int64)]
            self.table = torch.from_numpy(table).to(self.device)
        row = few * n
        for request, start, end in work[few:]:
            self.spans.append((row, row := row + end - start, request.ranges_to(end)))
        self.rows, self.at = (torch.from_numpy(np.concatenate(parts)).to(self.device) for parts in (rows, at))      # (T,) each

    def positions(self, S):
        return self.at

    def advance(self, S):
        pass

    def attend(self, layer, q, k, v):                                                        # (1,T,H,d), (1,T,KV,d) -> (1,T,H,d)
        if self.keys is None:
            # Zeros, as what is masked must not be NaN; a tensor for each layer, as compiled code writes into those it is given.
            self.keys, self.values = ([k.new_zeros(self.shape[1:]) for _ in range(self.shape[0])] for _ in "kv")
        keys, values = self.keys[layer], self.values[layer]                                  # (1,slots,KV,d)
        keys.index_copy_(1, self.rows, k)
        values.index_copy_(1, self.rows, v)
        join = lambda x, runs: x[:, slice(*runs[0])] if len(runs) == 1 else torch.cat([x[:, i:j] for i, j in runs], dim=1)
        y = [attention(q[:, i:j], join(keys, runs), join(values, runs)) for i, j, runs in self.spans]
        if self.table is not None:                               # before them a few tokens of each of N requests, at once
            N, T = len(self.table), self.spans[0][0] if self.spans else q.shape[1]
            y.insert(0, attention_by_table(q[0, :T].unflatten(0, (N, -1)), keys[0], values[0], self.table,
                                           self.at[:T].view(N, -1)).flatten(0, 1).unsqueeze(0))
        return y[0] if len(y) == 1 else torch.cat(y, dim=1)


class Engine:
    """Continuous batching: every pass carries the next token of each request that generates and a stretch of those that are still
    read; a finished one makes room at once. slots: positions the buffer holds. batch: requests at a time. chunk: tokens a pass.
    speculate: the MTP block guesses a token more, which the next pass checks: what is drawn never depends on the guess.
    compile: torch.compile for passes by table, on a CPU."""

    AHEAD = 64                                                   # slots to reserve beyond what is needed now, if there are any
    ALIKE = 32                                                   # a common beginning of fewer tokens is not worth sharing

    def __init__(self, model, slots, batch=64, chunk=None, speculate=False, compile=False):
        c = model.config
        require(not speculate or len(model.mtp),
                "this model has no MTP block to guess with (num_nextn_predict_layers is 0); leave --speculate out")
        self.model, self.batch, self.chunk, self.speculate = model, batch, chunk or max(512, 2 * batch), speculate
        self.device = model.word_embeddings.weight.device
        self.cache = Segments(c, slots, c.num_hidden_layers + speculate, self.device)
        if compile:
            self.cache.by_table = 1 + speculate
        self.compiled = {fn.__name__: torch.compile(fn) for fn in (model.trunk, model.draft, model.logits)} if compile else {}
        self.kept = []                                           # finished requests, oldest first, whose keys a later prompt may begin with
        self.passes = self.read = self.shared = self.drawn = self.guessed = self.accepted = 0   # for reports
        self.routings, self.graphs, self.stream = [], {}, None
        if self.device.type == "cuda":                           # cuDNN's attention, the first choice on H100 and later, makes a plan for
            torch.backends.cuda.enable_cudnn_sdp(False)          # every new length: long pauses. Off for the process, training in it too

    def warm_up(self):
        """With --compile, compile what one request needs, before a clock runs. Raises BadInput where torch.compile does not work."""
        slots = len(self.cache.users)
        if not self.compiled or slots < 2:                       # 0: every prompt has its answer already
            return
        print("compiling: 10 seconds to a minute, less the next time", file=sys.stderr)
        try:
            for ids in ([0], [0], [0, 0]):                       # the first one makes the buffer; two tokens: as with a guess
                for _ in self.serve([Request(ids, min(3, slots - len(ids)))]):
                    pass
        except Exception as error:                               # whatever a compiler says
            if isinstance(error, (BadInput, MemoryError)) or "allocate memory" in str(error):
                raise
            raise BadInput(f"--compile failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); it needs a C++ "
                           "compiler and Python's headers; leave it out, or install them") from error
        while self.kept:
            self.release(self.kept.pop())
        self.passes = self.read = self.shared = self.drawn = self.guessed = self.accepted = 0

    def check(self, request):
        """Raises BadInput if a request could never run."""
        where = request.where
        require(request.ids and request.limit > 1, f"{where}a prompt needs a token, and a text to score two")
        limit, slots = self.model.config.max_position_embeddings, len(self.cache.users)
        require(request.limit <= limit, f"{where}{len(request.ids)} tokens of prompt and {request.tokens} new ones exceed "
                f"max_position_embeddings={limit}; shorten the prompt or ask for at most {max(0, limit - len(request.ids))}")
        require(request.limit <= slots,
                f"{where}a request of up to {request.limit} tokens does not fit the {slots} positions of the cache; raise --cache_gb")

    def room(self, request, n):
        """Slots for n more positions and some ahead, if need be from requests that are only kept. -> whether there are."""
        after = request.slots[-1] if len(request.slots) else -2
        while True:
            for count in (min(n + self.AHEAD, request.limit - len(request.slots)), n):
                if (slots := self.cache.take(count, after)) is not None:
                    request.hold(np.concatenate([request.slots, slots]))
                    return True
            if not self.kept:
                return False
            self.release(self.kept.pop(0))

    def release(self, request):
        self.cache.users[request.slots] -= 1
        request.hold(request.slots[:0])
        request.done, request.guess = 0, []

    def admit(self, request, running):
        """Give a request slots for its prompt, the first ones shared with the request that begins most alike. -> whether it may run now."""
        best, n = None, self.ALIKE - 1 + self.speculate
        for other in running + self.kept:
            if other.ids[:n + 1] == request.ids[:n + 1]:
                common = len(os.path.commonprefix([other.ids, request.ids[:request.first]]))
                if common > max(n, other.done + self.ALIKE) and other in running:
                    return False                                 # it is just being read: wait for it
                best, n = max((best, n), (other, min(common, other.done)), key=lambda pair: pair[1])
        if best is not None:
            request.done = n - self.speculate                    # the last one's MTP key joins the token after it, which may differ
            request.hold(best.slots[:request.done].copy())
            self.cache.users[request.slots] += 1
        if self.room(request, request.target - request.done):
            self.shared += request.done
            return True
        self.release(request)
        return False

    @torch.inference_mode()                                      # a fifth faster than no_grad where calls are what takes the time
    def serve(self, requests):
        """Yields a request whenever it has a new token in ids, or `finish` is set. Raises BadInput if one cannot fit, before any work."""
        waiting, running, work, crowded = collections.deque(requests), [], [], False
        for request in waiting:
            self.check(request)
        try:
            while waiting or running:
                while waiting and len(running) < self.batch and not crowded and self.admit(waiting[0], running):
                    running.append(waiting.popleft())
                work, left = [], self.chunk
                for request in sorted(running, key=lambda r: r.target - r.done):             # those that generate before those being read
                    end = min(request.target, request.done + left)
                    end += len(request.guess) if end == len(request.ids) else 0
                    if end > request.done and (end <= len(request.slots) or self.room(request, end - len(request.slots))):
                        work.append((request, request.done, end))
                        left = max(0, left - (end - request.done))
                if not work:                                     # all wait for slots: the youngest gives its own up and starts again later
                    crowded = True                               # (never one that is scored: it had slots for all its text from the start)
                    waiting.appendleft(running.pop())
                    self.release(waiting[0])
                    continue
                yield from self.step(work)
                finished = [request for request in running if request.finish]
                running = [request for request in running if not request.finish]
                self.keep(finished)
                crowded = crowded and not finished
        finally:                                                 # the caller has seen enough
            for request, start, _ in work if self.speculate else ():
                request.done = min(request.done, start)          # what this pass has read has no MTP keys yet
            self.keep(running)

    def guesses(self):
        """What there is to report about speculation."""
        return (f"; {self.accepted} of {self.guessed} guesses right ({self.accepted / self.guessed:.0%}), "
                f"{self.drawn / self.passes:.2f} tokens a pass" if self.guessed else "")

    def keep(self, requests):
        self.kept += requests
        while len(self.kept) > self.batch:
            self.release(self.kept.pop(0))

    def row(self, numbers):
        """As a row of the pass that is planned, padded to its length: (1,T)."""
        return torch.tensor([numbers + [0] * (len(self.cache.rows) - len(numbers))], device=self.device)

    def run(self, fn, *args):
        """A method of the model over the planned pass. Compiled, a layer of one token is two fused loops, SDPA and topk, instead of some
        hundred calls. Passes that read a prompt are matmuls, of a new shape each time, and stay as they are."""
        cache = self.cache
        if not self.compiled or cache.table is None or cache.spans or cache.keys is None:
            return fn(*args, cache)
        torch._dynamo.mark_dynamic(cache.table, 1)               # or it would be compiled again for a longer text
        return self.compiled[fn.__name__](*args, cache)

    def trunk(self, tokens):
        """Ling.trunk over the planned pass. On CUDA, a pass by table is one graph for each of its few shapes: hundreds of launches take
        longer than what they launch. (Not yet run on a GPU.)"""
        cache, inputs = self.cache, (tokens, self.cache.rows, self.cache.at, self.cache.table)
        if cache.table is None or cache.spans or not kernels.on_gpu(self.model.norm.weight) or kernels.MODE == "torch":    # that one syncs
            return self.run(self.model.trunk, tokens)
        if (shape := (tokens.shape, cache.table.shape)) not in self.graphs:
            self.stream = stream = self.stream or torch.cuda.Stream()    # one: cuBLAS keeps a workspace for each
            still, graph, pool = [t.clone() for t in inputs], torch.cuda.CUDAGraph(), next(iter(self.graphs.values()), None)
            cache.rows, cache.at, cache.table = still[1:]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):                      # what is made on first use is made here, and with it a compiled block is
                for _ in range(2):                               # another; keys are written again, the same
                    self.model.trunk(still[0], cache)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool and pool[0].pool(), stream=stream):       # never two at a time, so they share memory
                out = self.model.trunk(still[0], cache)
            self.graphs[shape] = graph, still, out
        graph, still, out = self.graphs[shape]
        for mine, new in zip(still, inputs):
            mine.copy_(new)
        graph.replay()
        return out

    def choose(self, logits, after):
        """logits (n,V), which follow position p of a request, after[i] = (request, p) -> n ids. Requests that draw alike do so together:
        what each draws is up to its seed and the position."""
        if not after:
            return []
        low, high = logits.aminmax()                                                         # NaN, if there is one
        require(bool((high - low).isfinite()), "the model's logits are not finite: its weights are broken, or --dtype is too narrow for "
                "them; try bfloat16 or float32")                 # SYNC
        chosen, alike = [0] * len(after), collections.defaultdict(list)
        for i, (request, p) in enumerate(after):
            sampling = dict(request.sampling) if request.tokens else {"temperature": 0}
            if (penalty := sampling.pop("repetition_penalty", 1.0)) != 1.0:
                seen = torch.tensor((request.ids + request.guess)[:p + 1], device=logits.device)
                logits[i] = penalise(logits[i], seen, penalty)
            alike[tuple(sampling.items())].append(i)
        for sampling, rows in alike.items():
            uniform = (random.Random(f"{request.seed}/{p + 1}").random() for request, p in (after[i] for i in rows))
            drawn = next_tokens(logits if len(alike) == 1 else logits[rows], uniform, **dict(sampling)).tolist()     # SYNC
            for i, token in zip(rows, drawn):
                chosen[i] = token
        return chosen

    def step(self, work):
        """One pass over positions start..end - 1 of each request, and what follows from its logits."""
        model, cache = self.model, self.cache
        cache.plan(work)
        tokens = [token for request, start, end in work
                  for token in request.ids[start:end] + request.guess[:max(0, end - len(request.ids))]]
        x, self.routings = self.trunk(self.row(tokens))                                      # (1,T,D)
        rows, wanted, row = [], [], 0                                                        # rows whose logits are needed
        for request, start, end in work:
            wanted.append(range(max(start, request.first), end))
            rows += [row + position - start for position in wanted[-1]]
            row += end - start
        logits = self.run(model.logits, x[:, rows])[0] if rows else x.new_empty(0, 1)        # (rows,V) fp32
        best, row = self.choose(logits, [(request, p) for (request, *_), each in zip(work, wanted) for p in each]), 0
        self.passes, self.read = self.passes + 1, self.read + len(tokens)
        for (request, start, end), positions in zip(work, wanted):
            mine, top, row = logits[row:row + len(positions)], best[row:row + len(positions)], row + len(positions)
            if request.tokens == 0:
                request.done = end
                if positions:
                    target = request.ids[positions.start + 1:end + 1]
                    request.logprobs += (-F.cross_entropy(mine, mine.new_tensor(target, dtype=torch.int64),
                                                          reduction="none")).tolist()        # SYNC
                    request.greedy &= target == top
                if end == request.target:
                    request.finish = "length"
                    yield request
                continue
            guess, request.guess, request.done = request.guess, [], min(end, len(request.ids))
            for i in range(len(positions)):
                request.push(token := top[i])
                self.drawn += 1
                yield request
                if request.finish or token not in guess[i:i + 1]:
                    break
                request.done += 1                                # the guess was right: its keys are good, and so are the logits after it
                self.accepted += 1
            self.guessed += len(guess)
        if self.speculate:
            self.guess(x, work)

    def guess(self, x, work):
        """Run the MTP block over the positions of this pass that stand, and let it guess a token after each newest one."""
        spans, rows, tokens, last, row = [], [], [], [], 0
        for request, start, end in work:
            if request.finish:
                request.done = start                             # the rest has no MTP keys, should a later prompt begin alike
            elif request.done > start:
                spans.append((request, start, request.done))
                rows += range(row, row + request.done - start)
                tokens += request.ids[start + 1:request.done + 1]
                last.append(len(rows) - 1)
            row += end - start
        if spans:
            self.cache.plan(spans)
            h = self.run(self.model.draft, x[:, self.row(rows)[0]], self.row(tokens))
            ready = [(request, i) for (request, _, end), i in zip(spans, last) if end + 1 == len(request.ids) and request.limit - end > 2]
            if ready:
                best = self.run(self.model.logits, h[:, [i for _, i in ready]])[0].argmax(-1).tolist()           # SYNC
                for (request, _), token in zip(ready, best):
                    request.guess = [token]


def generate(model, prompt, tokens, seed=0, stop_ids=(), **sampling):
    """Yield up to `tokens` new ids after `prompt`, a list of ids. Stops before an id of stop_ids. Raises BadInput when the text would
    outgrow the model's positions."""
    request = Request([*prompt], tokens, seed=str(seed), sampling=sampling, stop_ids=frozenset(stop_ids))
    for n, _ in enumerate(Engine(model, request.limit, batch=1).serve([request]), start=len(prompt) + 1):
        if len(request.ids) == n:
            yield request.ids[-1]


def text_of(model, tokenizer, prompt, tokens, **kwargs):
    """The continuation of `prompt` as one string."""
    ids = tokenizer.encode(prompt) or [tokenizer.end or 0]
    return b"".join(tokenizer.bytes_of(t) for t in generate(model, ids, tokens, **kwargs)).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------------------
# 5. From text to requests

SETTINGS = {                     # flags that a line of --prompts may also set for itself: type, default, help, limits
    "tokens": (int, 200, "how many tokens to generate", lambda n: n >= 1, "at least 1"),
    "temperature": (float, 0.8, "0 takes the likeliest token", lambda t: t == 0 or 1e-6 <= t <= 1e6, "0, or in 1e-6..1e6"),
    "top_k": (int, 0, "keep the k likeliest; 0: all", lambda k: k >= 0, "0 (off) or more"),
    "top_p": (float, 1.0, "keep the fewest tokens whose probabilities reach p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "min_p": (float, 0.05, "keep tokens at least this fraction as likely as the likeliest", lambda p: 0 <= p <= 1, "in 0..1"),
    "repetition_penalty": (float, 1.0, "above 1: seen tokens become less likely", lambda r: 0.01 <= r <= 100, "in 0.01..100"),
    "seed": (int, 0, "same seed, same text", lambda seed: 0 <= seed < 1 << 63, "in 0..2^63 - 1"),
}


def settings(args, given={}, where="--"):
    """-> SETTINGS and the texts to stop at: those of `given`, else of the flags. Raises BadInput."""
    chosen = {key: given.get(key, getattr(args, key)) for key in SETTINGS}
    for key, (kind, _, _, holds, words) in SETTINGS.items():
        value = chosen[key]
        require(isinstance(value, (int, kind)) and not isinstance(value, bool) and holds(value),
                f"{where}{key} {value} must be {words}" + " and whole" * (kind is int))
    stops = [given["stop"]] if isinstance(given.get("stop"), str) else given.get("stop", args.stop)
    require(isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops),
            f"{where}stop must be texts that are not empty")
    return chosen, tuple(stops)


class Desk:
    """Makes requests of text: knows the model, its tokenizer, its chat template, and the flags."""

    def __init__(self, folder, model, tokenizer, args):
        self.folder, self.model, self.tokenizer, self.args = folder, model, tokenizer, args
        self.style, eos = None, json_beside(folder, "generation_config.json").get("eos_token_id")
        self.stop_ids = frozenset([tokenizer.end, *map(tokenizer.specials.get, (ROLE_END, "<role>")), model.config.eos_token_id,
                                   *(eos if isinstance(eos, list) else [eos])]) - {None}     # <role>: in v1 only the next role ends a turn

    def engine(self, positions, chunk=None):
        """One whose cache holds so many positions, or as many as --cache_gb allows."""
        c, weight = self.model.config, self.model.word_embeddings.weight
        each = 2 * (c.num_hidden_layers + self.args.speculate) * c.num_key_value_heads * c.head_dim * weight.element_size()
        slots, args = min(positions, int(self.args.cache_gb * 1e9) // each), self.args
        return Engine(self.model, slots, args.batch, chunk, args.speculate, args.compile)

    def encode(self, text):
        require(text or self.tokenizer.end is not None, "this tokenizer has no <|endoftext|> to start from; give a text that is not empty")
        return self.tokenizer.encode(text) or [self.tokenizer.end]

    def encode_chat(self, messages, tools=()):
        self.style = self.style or chat_style(self.folder, self.model.config, self.tokenizer)
        style, thinks = self.style
        return self.tokenizer.encode_chat(render(messages, style, self.args.think if self.args.think is not None else thinks, tools))

    def request(self, ids, given={}, where="--", name=None):
        """A request to continue ids; `given` may set SETTINGS and "stop", where the flags do not hold. Raises BadInput."""
        chosen, stops = settings(self.args, given, where)
        seed = str(chosen.pop("seed")) + ("" if name is None else "/" + name.encode(errors="backslashreplace").decode())
        return Request(ids, chosen.pop("tokens"), seed=seed, sampling=chosen, stop_ids=self.stop_ids, bytes_of=self.tokenizer.bytes_of,
                       stream=Stream(stops), where=where if given else "")

    def prompt_job(self, line, where, name):
        """A line of --prompts -> [request], and what to report of it when it is finished."""
        require(("prompt" in line) != ("messages" in line), 'must have either "prompt" or "messages"')
        require(isinstance(line.get("prompt", ""), str), "prompt must be a string")
        ids = self.encode(line["prompt"]) if "prompt" in line else self.encode_chat(line["messages"], line.get("tools") or ())
        request, n = self.request(ids, line, where, name), len(ids)
        return [request], lambda: {"text": request.text, "tokens": len(request.ids) - n, "finish": request.finish}

    def score_job(self, line, where, name):
        """A line of --score -> its requests, and what to report: natural-log probabilities, summed over each text's tokens."""
        texts = line.get("choices", [line.get("continuation", line.get("text"))])
        context, limit, groups = line.get("context", ""), self.model.config.max_position_embeddings, []
        require(isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts) and isinstance(context, str),
                'must have "text", or "context" and "continuation", or "context" and a list "choices", none of them empty')
        require("text" not in line or not {"context", "continuation", "choices"} & line.keys(),
                '"text" is scored from its start; give "continuation" with a "context"')
        answer = line.get("answer", 0) if "choices" in line else 0
        require(type(answer) is int and 0 <= answer < len(texts),
                f"answer {answer!r} must be the number of a choice, 0..{len(texts) - 1}")
        words = context.rstrip()                                                             # a blank belongs to the word after it
        before = self.encode(words)
        for text in texts:
            ids = self.tokenizer.encode(context + text)
            if ids[:len(before)] != before or len(ids) == len(before):                       # no context, or a token across the boundary
                ids = before + self.tokenizer.encode(context[len(words):] + text)
            # A text that outgrows the model is read in windows that share one token, a continuation must fit.
            require("text" in line or len(ids) <= limit,
                    f"{len(ids)} tokens exceed max_position_embeddings={limit}; shorten the context")
            groups.append([Request(ids[i:i + limit], score_from=len(before) if i == 0 else 1, where=where)
                           for i in range(0, len(ids) - 1, limit - 1)])

        def report():
            rows = [{"logprob": sum(sum(request.logprobs) for request in group), "tokens": sum(len(request.logprobs) for request in group),
                     "bytes": len((context[len(words):] + text).encode(errors="replace")),
                     "greedy": all(request.greedy for request in group)}
                    for group, text in zip(groups, texts)]
            if "choices" not in line:
                return rows[0] | {"bits_per_byte": -rows[0]["logprob"] / rows[0]["bytes"] / math.log(2)}
            best = max(range(len(rows)), key=lambda i: rows[i]["logprob"])
            per_byte = max(range(len(rows)), key=lambda i: rows[i]["logprob"] / rows[i]["bytes"])
            return {"choices": rows, "best": best, "best_per_byte": per_byte} | ({"correct": best == answer} if "answer" in line else {})
        return [request for group in groups for request in group], report


# ----------------------------------------------------------------------------------------------------------------------
# 6. What the command does: one text, a chat, or a file of requests

def one_text(desk, prompt, show_routing):
    ids = desk.encode(prompt)
    request, n = desk.request(ids), len(ids)
    engine = desk.engine(request.limit, max(1, n - 1) if show_routing else None)             # the pass that draws is its own
    engine.check(request)
    engine.warm_up()
    print(prompt, end="", flush=True)
    start, shown = time.perf_counter(), 0
    for _ in engine.serve([request]):
        text, shown = request.text[shown:], len(request.text)
        if show_routing and text and len(load := desk.model.stack_loads(engine.routings)):
            text = f"\033[48;5;{17 + int(load[-1].argmax()) * 29 % 214}m{text}\033[0m"       # 256-colour background
        print(text, end="", flush=True)
    seconds, new = time.perf_counter() - start, len(request.ids) - n
    print(flush=True)
    print(f"{new} tokens in {seconds:.2f} s, {new / max(seconds, 1e-9):.1f} tokens/s ({desk.folder}, prompt of {n}){engine.guesses()}",
          file=sys.stderr)


def chat(desk, tools):
    """Turns on stdin, replies on stdout. What earlier turns left in the cache is not read again."""
    try:
        import readline                                          # noqa: F401  line editing in input(), where there is one
    except ImportError:
        pass
    opening = [{"role": "system", "content": desk.args.system}] if desk.args.system else []
    desk.encode_chat([*opening, {"role": "user", "content": ""}], tools)                     # a model that cannot chat says so now
    limit, messages, terminal = desk.model.config.max_position_embeddings, [*opening], sys.stdin.isatty()
    engine = desk.engine(limit)
    engine.warm_up()
    print("/reset forgets the conversation, /tool TEXT answers a tool call, /quit ends; Ctrl-C stops a reply", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except KeyboardInterrupt:                                # perhaps meant for a reply that has just ended
            line = "" if terminal else "/quit"
            print("\n" * terminal, end="")
        except EOFError:
            line = "/quit"
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = [*opening]
        if not line or line == "/reset":
            continue
        role, text = ("tool", line.removeprefix("/tool ")) if line.startswith("/tool ") else ("user", line)
        turn = [*messages, {"role": role, "content": text}]
        try:
            ids = desk.encode_chat(turn, tools)
            require(len(ids) < limit, f"the conversation has {len(ids)} tokens, the model can read {limit - 1}; /reset starts a new one")
            request = desk.request(ids, {"tokens": min(desk.args.tokens, limit - len(ids))}, "")
            start, n, shared, shown = time.perf_counter(), len(ids), engine.shared, 0
            with contextlib.suppress(KeyboardInterrupt), contextlib.closing(engine.serve([request])) as news:
                for _ in news:
                    new, shown = request.text[shown:], len(request.text)
                    thinks = sys.stdout.isatty() and "</think>" not in request.text and "<think>" in request.text
                    print(f"\033[2m{new}\033[0m" if thinks and new else new, end="", flush=True)
        except BadInput as error:
            print(f"{error}", file=sys.stderr)
            continue
        print(flush=True)
        new, seconds = len(request.ids) - n, time.perf_counter() - start
        print(f"[{new} tokens, {new / max(seconds, 1e-9):.1f} tokens/s; read {n - engine.shared + shared} of {n}{engine.guesses()}]",
              file=sys.stderr)
        marked = desk.tokenizer.specials.get("<tool_call>") in (None, *request.ids[n:])       # else it wrote about a call, and made none
        said = split_calls(request.text) if marked and desk.style[0] == "v2" else {"content": request.text}
        messages = [*turn, {"role": "assistant", **said}]


def read_lines(path, lines=None):
    """Yields (line number, object) of a file of JSON lines, or of `lines` of it in bytes."""
    number = 0
    try:                                                         # split at \n alone: a text may hold what splitlines() takes for an end
        for number, line in enumerate(Path(path).read_bytes().split(b"\n") if lines is None else lines, 1):
            if line.strip():
                yield number, json.loads(line)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} line {number}: not JSON ({error})") from None


def answer_file(desk, path, out, make, held):
    """One line of JSON in `out` (None: stdout) for each line of `path`, as it is finished: "id", what `make` reports, whatever else the
    line held, and a checksum of the request. Run again after whatever happened, only what is missing is done; at the end lines are in
    order. held: an ExitStack, for the lock of `out`."""
    if old := bool(out) and Path(out).is_file():
        held.enter_context(hold(out))
    known = {*SETTINGS, "prompt", "messages", "tools", "stop", "context", "continuation", "choices", "text", "request"}
    weights = [(str(file), file.stat().st_mtime_ns) for file in sorted(desk.folder.resolve().glob("*"))
               if file.suffix in (".safetensors", ".jinja", ".tiktoken")
               or file.name in ("latest", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")]
    flags = [weights, make.__name__] + [getattr(desk.args, name) for name in (*SETTINGS, "stop", "think", "dtype", "tokenizer")]
    answers, heads, jobs = answers_so_far(out), {}, []
    for number, line in read_lines(path):
        where = f"{path} line {number}: "
        require(isinstance(line, dict), f"{where}must be a JSON object")
        name = str(line.setdefault("id", number))
        require(name not in heads, f"{where}id {name!r} is that of an earlier line; make it another")
        mark = f"{zlib.crc32(json.dumps([flags, line], sort_keys=True).encode()):08x}"
        heads[name] = {"id": line["id"], "request": mark, **{key: value for key, value in line.items() if key not in known}}
        if name not in answers:
            try:
                jobs.append((name, *make(line, where, name)))
            except BadInput as error:
                raise BadInput(where + str(error).removeprefix(where)) from None
        require(name not in answers or answers[name]["request"] == mark,
                f"{out} has an answer to {name!r} from another prompt, model or setting; give another --out, or remove it")
    owner = {request: job for job in jobs for request in job[1]}
    engine = desk.engine(sum(sorted((request.limit for request in owner), reverse=True)[:2 * desk.args.batch]))
    for request in owner:
        engine.check(request)                                    # before --out is there
    engine.warm_up()
    there, start = len(heads) - len(jobs), time.perf_counter()
    told, file, utf8 = start, sys.stdout, bool(out) or (sys.stdout.encoding or "").lower().startswith("utf")
    if out:                                                      # x: another command may have made it meanwhile
        file = open(os.path.realpath(out), "a" if old else "x", encoding="utf-8", errors="backslashreplace")
        if not old:
            held.enter_context(hold(out))
    for request in engine.serve(owner):
        name, group, report = owner[request]
        if request.finish and all(other.finish for other in group):
            answers[name] = {**heads[name], **report()}
            file.write(json.dumps(answers[name], ensure_ascii=not utf8) + "\n")              # at once
            file.flush()
        if time.perf_counter() > told + 5:
            told = time.perf_counter()
            print(f"{sum(name in answers for name in heads)} of {len(heads)} done, {engine.read / (told - start):,.0f} tokens/s",
                  file=sys.stderr)
    if out:
        file.close()
        rows = (json.dumps(answers[name], ensure_ascii=False) + "\n" for name in heads | answers)
        write_beside(os.path.realpath(out), lambda f: f.writelines(row.encode(errors="backslashreplace") for row in rows))
    seconds = time.perf_counter() - start
    print(f"{len(jobs)} done, {there} were there already; {engine.drawn} tokens generated in {seconds:.2f} s, "
          f"{engine.drawn / seconds:,.1f} tokens/s; {engine.read} read, {engine.read / max(1, engine.passes):.1f} a pass, "
          f"{engine.shared} shared{engine.guesses()}", file=sys.stderr)
    if right := [answers[name]["correct"] for name in heads if type(answers[name].get("correct")) is bool]:
        print(f"{sum(right)} of {len(right)} correct, {sum(right) / len(right):.1%}", file=sys.stderr)


def answers_so_far(out):
    """{id: answer} of an earlier run; a line that a kill cut short is removed."""
    if out is None or not Path(out).exists():
        return {}
    require(Path(out).is_file(), f"--out {out} is not a file; leave it out to write to stdout")
    *whole, rest = Path(out).read_bytes().split(b"\n")
    lines = [line for _, line in read_lines(out, whole)]
    begun = rest.startswith(b'{"id": ') and b'"request": "' in rest                          # the first answer, cut short
    require((lines or not rest or begun) and all(isinstance(line, dict) and {"id", "request"} <= line.keys() for line in lines),
            f"{out} holds something else than answers; give another --out")
    if rest:
        os.truncate(out, os.path.getsize(out) - len(rest))
    return {str(line["id"]): line for line in lines}


# ----------------------------------------------------------------------------------------------------------------------
# 7. Command line

def spellings(flag):
    """A flag as it is, and with hyphens for underscores."""
    return [flag, "--" + flag[2:].replace("_", "-")] if "_" in flag else [flag]


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_cli(prog, main):
    """Run a main(). A user's mistake, a full disk or too little memory ends it with one line on stderr and exit code 2."""
    sys.stdin = sys.stdin or open(os.devnull)                    # closed, as under a service
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                 # a terminal without UTF-8 shows ? and not a traceback
    try:
        return main()
    except BrokenPipeError:                                      # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except BadInput as error:
        message = str(error)
    except OSError as error:                                     # no space, no permission: not the program's fault either
        message = f"{error}; mend this and run the same command again, nothing saved before was touched"
    except (MemoryError, RuntimeError) as error:                 # torch's allocator for CPUs raises the latter
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        message = (f"out of memory ({error}); lower --micro_batch_tokens of train.py, --cache_gb or --batch of sample.py, "
                   "or take a smaller model or dtype")
    print("\n" * sys.stdout.isatty() + f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def pick_device(name):
    """A torch.device by name; the accelerator if there is one, else the CPU, by default. Raises BadInput."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if device.index is not None and device.type != "cpu":
            torch.accelerator.set_device_index(device.index)     # where streams and graphs are made, whatever they hold
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}; use cpu, or a device torch can see") from None


def newest_run(root=Path("runs")):
    runs = [run for run in root.glob("*") if (run / "config.json").exists() and checkpoints(run)]
    require(runs, f"no run with a checkpoint under {root}/; train one with python train.py, or give a folder")
    return max(runs, key=lambda run: max(step.stat().st_mtime for step in checkpoints(run)))


def tokenizer_of(folder, given=None):
    """The tokenizer of a folder; `given` names one where the folder has none. Raises BadInput when they differ."""
    own = any((Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer.tiktoken", "train.json"))
    tokenizer = load_tokenizer(given or str(folder))
    same = lambda a, b: (a.file, a.encoding.name) == (b.file, b.encoding.name)
    if own and given and not same(tokenizer, load_tokenizer(str(folder))):
        raise BadInput(f"--tokenizer {given} is not the one in {folder}, which the weights were trained with; drop the flag")
    return tokenizer


class Progress:
    """A line on a terminal's stderr while weights are read, rewritten twice a second; none for what takes no second."""

    def __init__(self):
        self.start = self.told = time.perf_counter()

    def __call__(self, done, total):
        now = time.perf_counter()
        if sys.stderr.isatty() and (now > self.told + 0.5 or (done == total and self.told > self.start)):
            self.told = now
            print(f"\rloading {done / 1e9:.1f} of {total / 1e9:.1f} GB, {done / 1e9 / (now - self.start):.1f} GB/s",
                  end="\n" * (done == total), file=sys.stderr, flush=True)


def model_and_tokenizer(folder, tokenizer=None, dtype=None, device=None):
    """Load both and check that they belong together; the weights first. Raises BadInput."""
    model = Ling.from_pretrained(folder, dtype=dtype, device=device, progress=Progress()).eval()
    tokenizer = tokenizer_of(folder, tokenizer)
    if tokenizer.size > model.config.vocab_size:
        raise BadInput(f"the tokenizer has {tokenizer.size} tokens, the model's vocabulary {model.config.vocab_size}; "
                       "give the tokenizer the model was trained with")
    return model, tokenizer


def main(argv=None):
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = lambda flag, **kwargs: parser.add_argument(*spellings("--" + flag), **kwargs)
    parser.add_argument("model", nargs="?", help="folder of a run or of a released checkpoint; default: the newest run")
    add("prompt", help="text to continue; default: stdin if it is piped, else the beginning of a document")
    for name, (kind, default, words, _, _) in SETTINGS.items():
        add(name, type=kind, default=default, help=f"{words} ({default})")
    add("stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("chat", action="store_true", help="talk, with the chat template of the model")
    add("system", help="with --chat: the system prompt")
    add("tools", metavar="FILE", help="with --chat: a JSON list of functions the model may call")
    add("think", action=argparse.BooleanOptionalAction, help="let the model think before it answers, or not; default: as its template says")
    add("prompts", metavar="FILE",
        help='continue many: lines of {"prompt": ...} or {"messages": [...]}, with "id", "stop" or sampling of their own')
    add("score", metavar="FILE", help='log-likelihoods: lines of {"text"}, {"context", "continuation"} or {"context", "choices", "answer"}')
    add("out", metavar="FILE",
        help="with --prompts or --score: where the answers go, and what is there already is not done again; default: stdout")
    add("batch", type=int, default=64, help="requests that share a pass (64)")
    add("cache_gb", type=float, default=4.0, help="largest size of the buffer for keys and values, in GB (4)")
    add("speculate", action="store_true", help="let the MTP block guess one token more a pass; in fp32 what comes out is the same")
    add("compile", action="store_true", help="on a CPU: one text or chat at twice the speed, after a wait for torch.compile")
    add("tokenizer", help="needed only where the folder has none: bytes, a file, or a tiktoken name")
    add("checksums", action="store_true", help="first compare the weights' files with the SHA256SUMS beside them")
    add("dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    add("device", help="default: the accelerator if there is one, else cpu")
    add("show_routing", action="store_true", help="colour each token by an expert that ran for it in the last MoE layer")
    args = parser.parse_args(argv)
    modes = [name for name in ("prompt", "chat", "prompts", "score") if getattr(args, name) not in (None, False)]
    require(len(modes) < 2, f"--{' and --'.join(modes)} exclude each other; give one")
    for flag, with_ in (("system", ["chat"]), ("tools", ["chat"]), ("think", ["chat", "prompts"]), ("out", ["prompts", "score"])):
        require(getattr(args, flag) is None or modes and modes[0] in with_, f"--{flag} goes with --{' or --'.join(with_)}")
    require(args.batch >= 1 and 0 < args.cache_gb <= 1e6,
            f"--batch {args.batch} must be at least 1, --cache_gb {args.cache_gb} above 0 and at most 1e6")
    require(not (args.speculate and (args.score or args.show_routing)), "--speculate goes with neither --score nor --show_routing")
    require(not (args.compile and args.score), "--compile does not go with --score, which generates nothing")
    require(not args.show_routing or modes in ([], ["prompt"]), f"--show_routing does not go with --{''.join(modes)}")
    tools = read_json(args.tools) if args.tools else []
    require(isinstance(tools, list), f"{args.tools} must hold a JSON list of functions")
    settings(args)                                               # wrong flags are told before the weights are read
    folder = Path(args.model) if args.model else newest_run()
    device = pick_device(args.device)
    require(not args.compile or device.type == "cpu" and kernels.MODE == "auto", "--compile is for CPUs (a GPU replays its passes without "
            f"it) and for LING_KERNELS=auto, not {kernels.MODE}; leave it out")
    if args.checksums:
        verify_checksums(folder)
    model, tokenizer = model_and_tokenizer(folder, args.tokenizer, getattr(torch, args.dtype) if args.dtype else None, device)
    desk = Desk(folder, model, tokenizer, args)
    if args.chat:
        return chat(desk, tools)
    for path, make in ((args.prompts, desk.prompt_job), (args.score, desk.score_job)):
        if path is not None:
            with contextlib.ExitStack() as held:
                return answer_file(desk, path, args.out, make, held)
    prompt = args.prompt if args.prompt is not None else "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    return one_text(desk, prompt, args.show_routing)


if __name__ == "__main__":
    sys.exit(run_cli("sample.py", main))
