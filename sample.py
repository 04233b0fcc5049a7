"""What does it say? Text from a run of train.py, or from released Ling weights.

    python sample.py                                     # the newest run, a prompt of its own
    python sample.py runs/toy --prompt "class " --tokens 200 --temperature 0.8
    python sample.py PATH/Ling-mini-2.0 --dtype bfloat16 < prompt.txt
    python sample.py --show-routing                      # colour each token by the expert that ran for it

The text streams to stdout as it comes; tokens per second go to stderr. Load -> prompt -> prefill -> decode -> stream.
"""
import argparse
import base64
import codecs
import json
import os
import sys
import time
import unicodedata
from pathlib import Path

import tiktoken
import torch

from ling import BadInput, KVCache, Ling, find_checkpoint, read_json

# ----------------------------------------------------------------------------------------------------------------------
# 1. Tokenizers. All are byte-level BPE, run by tiktoken: bytes -> rank, and the rank is the id.

# How Ling's releases cut text before merging: words with at most one leading sign, single digits, runs of signs, spaces.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
END = "<|endoftext|>"


class Tokenizer:
    """tiktoken with two rules: user text never becomes a special token, and what a release normalises (NFC) is normalised."""

    def __init__(self, encoding, nfc=False, file=None):
        self.encoding, self.nfc, self.size = encoding, nfc, encoding.n_vocab                 # size: largest id + 1
        self.end = encoding.encode_single_token(END) if END in encoding.special_tokens_set else None
        self.file = file                                                                     # (name, content) to keep beside weights

    @classmethod
    def from_ranks(cls, ranks):
        """ranks {bytes: rank} as in tiktoken's rank files; end of text follows the last rank."""
        lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
        encoding = tiktoken.Encoding("ling", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
        return cls(encoding, file=("tokenizer.tiktoken", b"".join(lines)))

    def encode(self, text):
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def bytes_of(self, token):
        """The bytes a token stands for; none for ids without a token (padding of the vocabulary) and for specials."""
        try:
            return b"" if self.encoding.is_special_token(token) else self.encoding.decode_single_token_bytes(token)
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
    if path.suffix == ".json" and path.exists():
        return released_tokenizer(path)
    if path.exists():
        return Tokenizer.from_ranks(read_ranks(path))
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
        pattern = next((step["pattern"]["Regex"] for step in steps if step["type"] == "Split"), PATTERN)
        nfc = "NFC" in json.dumps(raw.get("normalizer"))
        # GPT-2's alphabet: printable bytes stand for themselves, the rest for code points from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        to_bytes = lambda token: bytes(alphabet[c] for c in token)
        ranks = {to_bytes(token): rank for token, rank in vocab.items() if token not in specials}
        pairs = [(to_bytes(a), to_bytes(b)) for a, b in merges]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is not a byte-level BPE tokenizer.json ({type(error).__name__}: {error})") from None
    order = [ranks.get(a + b, -1) for a, b in pairs]
    if order != sorted(set(order)) or len(ranks) != 256 + len(pairs) or order[:1] == [-1]:
        raise BadInput(f"{path}: ids do not follow the order of the merges, so tiktoken would cut text differently; retrain or convert it")
    for a, b in pairs:
        if (reached := merge_below(a + b, ranks, ranks[a + b])) != [a, b]:
            raise BadInput(f"{path}: token {(a + b)!r} is reached as {reached}, not as its merge says; tiktoken would cut text differently")
    encoding = tiktoken.Encoding("ling", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
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
# 2. Generation

def next_token(logits, seen, generator, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Draw one id. logits (V,) fp32, seen (n,) ids so far. temperature 0: the likeliest. top_k 0, top_p 1, min_p 0: off.

    top_p keeps the fewest tokens whose probabilities reach it (arXiv 1904.09751), min_p those of at least min_p times the
    best's (arXiv 2407.01082); the penalty divides the positive logits of seen tokens and multiplies the negative (arXiv 1909.05858)."""
    if repetition_penalty != 1.0:
        old = logits[seen]
        logits = logits.index_put((seen,), torch.where(old > 0, old / repetition_penalty, old * repetition_penalty))
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / temperature                                           # so that a tiny temperature cannot overflow
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ordered, index = probs.sort(descending=True)
        probs = probs.index_fill(0, index[ordered.cumsum(0) - ordered >= top_p], 0.0)        # the one that crosses stays
    probs = probs.masked_fill(probs < min_p * probs.max(), 0.0)
    return int(torch.multinomial(probs.cpu(), 1, generator=generator))                       # on the CPU: same draw on every device


@torch.no_grad()
def generate(model, prompt, tokens, seed=0, stop_ids=(), **sampling):
    """Yield (id, load) for up to `tokens` new tokens after `prompt`, a list of ids; load (MoE layers, E) of the pass that
    produced it. Stops before an id of stop_ids. Raises BadInput when the text would outgrow the model's positions."""
    limit, device = model.config.max_position_embeddings, model.word_embeddings.weight.device
    if len(prompt) + tokens > limit:
        raise BadInput(f"{len(prompt)} tokens of prompt and {tokens} new ones exceed max_position_embeddings={limit}; "
                       f"shorten the prompt or ask for at most {max(0, limit - len(prompt))}")
    cache = KVCache(model.config, 1, len(prompt) + tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt], device=device)
    if len(prompt) > 1:
        model(ids[:, :-1], cache=cache, logits_to_keep=1)                                    # prefill
    for _ in range(tokens):
        out = model(ids[:, cache.length:], cache=cache)                                      # one token
        token = next_token(out.logits[0, -1], ids[0], generator, **sampling)                 # SYNC
        if token in stop_ids:
            return
        yield token, out.load
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)


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


def text_of(model, tokenizer, prompt, tokens, **kwargs):
    """The continuation of `prompt` as one string."""
    ids = tokenizer.encode(prompt) or [tokenizer.end or 0]
    return b"".join(tokenizer.bytes_of(t) for t, _ in generate(model, ids, tokens, **kwargs)).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------------------
# 3. Command line

def spellings(flag):
    """A flag as it is, and with hyphens for underscores."""
    return [flag, "--" + flag[2:].replace("_", "-")] if "_" in flag else [flag]


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_cli(prog, main):
    """Run a main(). A user's mistake, a full disk or too little memory ends it with one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                 # a terminal without UTF-8 shows ? and not a traceback
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
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"out of memory ({error}); for training lower --micro_batch_tokens, else use a smaller model or dtype"
    print("\n" * sys.stdout.isatty() + f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def pick_device(name):
    """A torch.device by name; the accelerator if there is one, else the CPU, by default. Raises BadInput."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}; use cpu, or a device torch can see") from None


def newest_run(root=Path("runs")):
    runs = [run for run in root.glob("*") if (run / "config.json").exists() and any(run.glob("step_*"))]
    if not runs:
        raise BadInput(f"no run with a checkpoint under {root}/; train one with python train.py, or give a folder")
    return max(runs, key=lambda run: max(step.stat().st_mtime for step in run.glob("step_*")))


def tokenizer_of(folder, given=None):
    """The tokenizer of a folder; `given` names one where the folder has none. Raises BadInput when they differ."""
    own = any((Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer.tiktoken"))
    tokenizer = load_tokenizer(given or str(folder))
    if own and given and load_tokenizer(str(folder)).file != tokenizer.file:
        raise BadInput(f"--tokenizer {given} is not the one in {folder}, which the weights were trained with; drop the flag")
    return tokenizer


def model_and_tokenizer(folder, tokenizer=None, dtype=None, device=None):
    """Load both and check that they belong together; the weights first. Raises BadInput."""
    model = Ling.from_pretrained(folder, dtype=dtype, device=device).eval()
    tokenizer = tokenizer_of(folder, tokenizer)
    if tokenizer.size > model.config.vocab_size:
        raise BadInput(f"the tokenizer has {tokenizer.size} tokens, the model's vocabulary {model.config.vocab_size}; "
                       "give the tokenizer the model was trained with")
    return model, tokenizer


def main(argv=None):
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="folder of a run or of a released checkpoint; default: the newest run")
    parser.add_argument("--prompt", help="text to continue; default: stdin if it is piped, else the beginning of a document")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument(*spellings("--top_k"), type=int, default=0, help="keep the k likeliest; 0: all")
    parser.add_argument(*spellings("--top_p"), type=float, default=1.0, help="keep the fewest tokens whose probabilities reach p")
    parser.add_argument(*spellings("--min_p"), type=float, default=0.05, help="keep tokens at least this fraction as likely as the likeliest")
    parser.add_argument(*spellings("--repetition_penalty"), type=float, default=1.0, help="above 1: seen tokens become less likely")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--tokenizer", help="needed only where the folder has none: bytes, a file, or a tiktoken name")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    parser.add_argument(*spellings("--show_routing"), action="store_true", help="colour each token by an expert that ran for it in the last MoE layer")
    args = parser.parse_args(argv)
    for ok, what in ((args.tokens >= 1, f"--tokens {args.tokens} must be at least 1"),
                     (0 <= args.temperature < float("inf"), f"--temperature {args.temperature} must be 0 or more"),
                     (args.top_k >= 0, f"--top_k {args.top_k} must be 0 (off) or more"),
                     (0 < args.top_p <= 1, f"--top_p {args.top_p} must be above 0 and at most 1"),
                     (0 <= args.min_p <= 1, f"--min_p {args.min_p} must be in 0..1"),
                     (0 <= args.seed < 1 << 63, f"--seed {args.seed} must be in 0..2^63 - 1"),
                     (args.repetition_penalty > 0, f"--repetition_penalty {args.repetition_penalty} must be above 0"),
                     (all(args.stop), "--stop must not be empty")):
        if not ok:
            raise BadInput(what)
    folder = Path(args.model) if args.model else newest_run()
    device = pick_device(args.device)
    model, tokenizer = model_and_tokenizer(folder, args.tokenizer, getattr(torch, args.dtype) if args.dtype else None, device)
    prompt = args.prompt if args.prompt is not None else "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    ids = tokenizer.encode(prompt) or ([tokenizer.end] if tokenizer.end is not None else None)
    if ids is None:
        raise BadInput("this tokenizer has no <|endoftext|> to start from; give a --prompt")
    stream, n = Stream(tuple(args.stop)), 0
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    stop_ids = {model.config.eos_token_id, tokenizer.end}
    for token, load in generate(model, ids, args.tokens, args.seed, stop_ids, temperature=args.temperature, top_k=args.top_k,
                                top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty):
        text, n = stream.push(tokenizer.bytes_of(token)), n + 1
        if args.show_routing and len(load) and text:
            text = f"\033[48;5;{17 + int(load[-1].argmax()) * 29 % 214}m{text}\033[0m"       # 256-colour background
        print(text, end="", flush=True)
        if stream.stopped:
            break
    seconds = time.perf_counter() - start
    print("" if stream.stopped else stream.push(b"", final=True), flush=True)
    print(f"{n} tokens in {seconds:.2f} s, {n / max(seconds, 1e-9):.1f} tokens/s ({folder}, prompt of {len(ids)})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_cli("sample.py", main))
