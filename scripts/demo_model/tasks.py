"""The demo model's world: checkable string tasks, the standard library's text, the tokenizer, and what is held out.

Every prompt and every text file is assigned to one split by a hash of itself, so training, calibration, validation and
evaluation can be drawn anywhere, in any order, and never overlap.
"""

import hashlib
import random
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Split = Literal["evaluation", "calibration", "validation", "train"]

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
CONTEXT_LENGTH = 256
# Three of sixteen hash buckets are held out, one for each purpose.
_HELD_OUT: dict[int, Split] = {0: "evaluation", 1: "calibration", 2: "validation"}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def split_of(key: str) -> Split:
    """The split a prompt (its text) or a file (its path below the library folder) belongs to."""
    return _HELD_OUT.get(hashlib.sha256(key.encode()).digest()[0] % 16, "train")


def _letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    return f"{a}+{b}", str(a + b)


def _sums(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(4, 7))]
    return " ".join(map(str, numbers)), " ".join(str(sum(numbers[: i + 1])) for i in range(len(numbers)))


def _sort(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 6, 12)
    return text, "".join(sorted(text))


def _reverse(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 5, 12)
    return text, text[::-1]


def _tally(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(rng.sample(string.ascii_lowercase, 4), k=rng.randint(6, 12)))
    return text, "".join(f"{letter}{text.count(letter)}" for letter in sorted(set(text)))


def _look(rng: random.Random) -> tuple[str, str]:
    table = {key: rng.choice(string.digits) for key in rng.sample(string.ascii_lowercase, rng.randint(4, 7))}
    keys = rng.sample(sorted(table), rng.randint(3, len(table)))
    return "".join(k + v for k, v in table.items()) + " " + "".join(keys), "".join(table[key] for key in keys)


def _next(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 5, 12)
    return text, "".join(chr((ord(letter) - 96) % 26 + 97) for letter in text)


def _max(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(100, 999) for _ in range(rng.randint(3, 4))]
    return " ".join(map(str, numbers)), str(max(numbers))


def _seq(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(0, 60), rng.randint(1, 9)
    return " ".join(str(start + i * step) for i in range(3)), " ".join(str(start + i * step) for i in range(3, 7))


def _zip(rng: random.Random) -> tuple[str, str]:
    size = rng.randint(3, 6)
    a, b = _letters(rng, size, size), _letters(rng, size, size)
    return f"{a} {b}", "".join(x + y for x, y in zip(a, b, strict=True))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": _add,
    "sums": _sums,
    "sort": _sort,
    "reverse": _reverse,
    "tally": _tally,
    "look": _look,
    "next": _next,
    "max": _max,
    "seq": _seq,
    "zip": _zip,
}


def examples(split: Split, seed: int, tasks: Sequence[str] = tuple(TASKS)) -> Iterator[tuple[str, str, str]]:
    """Endless `(task, prompt, answer)` of one split, the named tasks in turn."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        for task in tasks:
            while True:
                question, answer = TASKS[task](rng)
                prompt = f"{task} {question}="
                if split_of(prompt) == split:
                    break
            yield task, prompt, answer


def library_files(split: Split) -> list[bytes]:
    """The standard library's source and its English documentation (`pydoc_data`): one split's files, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts) and split_of(name) == split:
            found.append(path.read_bytes())
    return found


def library_text(split: Split) -> bytes:
    """One split's files as one text."""
    return b"\n\n".join(library_files(split))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the two special tokens: tasks on letters and digits need no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, PADDING, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING, model_max_length=CONTEXT_LENGTH
    )
