"""The question as token ids: Gemma 2 chat turn, split at the placeholder (spec §2).

The placeholder "<image>" is no token: the text is split there, each side is tokenised on its own without special
tokens, one bos stands in front and ``-200`` between the sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stageparity.strict import Missing, Refused, one_line, reason
from vidi.config import VidiConfig
from vidi.inputs import tokenizer_file

__all__ = ["CONTROL_WORDS", "PLACEHOLDER_WORD", "PromptError", "build_ids", "check_tokenizer", "decode"]
__all__ += ["library", "load_tokenizer", "tiny_files", "tiny_tokenizer", "user_text", "write_tiny_tokenizer"]

PLACEHOLDER_WORD = "<image>"
#: Strings that steer the model; a question that holds one is refused rather than silently changed.
CONTROL_WORDS = (PLACEHOLDER_WORD, "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

_CHAT_TURN = "<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n"


class PromptError(ValueError):
    """A question or tokenizer that cannot be used; the text says why and what to do, in one line."""

    def __init__(self, problem: str) -> None:
        super().__init__(one_line(problem))


def user_text(query: str) -> str:
    """The user's message: the placeholder and the question, one trailing "." of ``query`` removed (spec §2).

    Nothing else of the query is changed. Raises PromptError where no word is left, or where the query holds one of
    CONTROL_WORDS: a second placeholder or the end of the turn inside it would make another conversation.
    """
    query = query.removesuffix(".")
    if query != query.encode("utf-8", "replace").decode("utf-8"):
        raise PromptError(f"the query {query!r} holds bytes that are no UTF-8; write it in the terminal's own encoding")
    if not query.strip():
        raise PromptError(f"the query {query!r} is empty; say what to look for, such as 'a red car'")
    if found := [word for word in CONTROL_WORDS if word in query]:
        raise PromptError(f"the query holds {', '.join(found)}, which steers the model; write it without these marks")
    return f"{PLACEHOLDER_WORD}\nDuring which time segments in the video can we see {query}?"


def build_ids(tokenizer: Tokenizer, query: str, *, bos_id: int = 2, image_placeholder: int = -200) -> list[int]:
    """The prompt's ids: bos, the text before the placeholder, ``image_placeholder``, the text after it (spec §2).

    Raises PromptError as ``user_text`` does, and for further special tokens of this tokenizer inside the query.
    """
    text = user_text(query)
    with library("the question cannot be tokenised"):
        return _ids(tokenizer, query, text, bos_id, image_placeholder)


def _ids(tokenizer: Tokenizer, query: str, text: str, bos_id: int, image_placeholder: int) -> list[int]:
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if found := sorted(word for word in special if word in query):
        raise PromptError(f"the query holds {', '.join(found)}, special tokens of the tokenizer; write it without them")
    before, after = _CHAT_TURN.format(user=text).split(PLACEHOLDER_WORD)
    before_ids, after_ids = (tokenizer.encode(side, add_special_tokens=False).ids for side in (before, after))
    return [bos_id, *before_ids, image_placeholder, *after_ids]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Generated ids -> text, without special tokens. Raises PromptError for ids that the tokenizer does not hold."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise PromptError(f"ids {wrong[:5]} are outside the tokenizer's {size}; tokenizer and checkpoint do not match")
    with library("the answer cannot be turned into text"):
        return tokenizer.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(path: str | Path, config: VidiConfig | None = None) -> Tokenizer:
    """Read ``tokenizer.json`` (or the folder that holds it), checked against ``config`` where that is given.

    Only what such a tokenizer needs is read, see `tokenizer_file`. Raises PromptError naming the file.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        checked = tokenizer_file.read(path)
    except Missing:
        text = "no such file; a checkpoint folder holds tokenizer.json beside config.json"
        raise PromptError(f"{path}: {text}") from None
    except Refused as error:
        raise PromptError(str(error)) from None
    with library(f"{path}: no readable tokenizer.json", "; copy it again"):
        tokenizer = Tokenizer.from_str(checked)
    if config is not None:
        try:
            check_tokenizer(tokenizer, config)
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from None
    return tokenizer


@contextmanager
def library(problem: str, remedy: str = "; tokenizer.json is damaged: copy it again") -> Iterator[None]:
    """What the library raises in the block, as PromptError: bare Exceptions, and panics that derive from BaseException."""
    try:
        yield
    except PromptError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PromptError(f"{problem} ({reason(error)}){remedy}") from None


def check_tokenizer(tokenizer: Tokenizer, config: VidiConfig) -> None:
    """Raise PromptError unless the ids that the configuration names are this tokenizer's, and all ids are embedded."""
    expected = {"<bos>": config.bos_id, "<pad>": config.pad_id, "<end_of_turn>": config.end_of_turn_id}
    found = {word: tokenizer.token_to_id(word) for word in expected}
    wrong = [f"{word} is {found[word]}, not {token}" for word, token in expected.items() if found[word] != token]
    if tokenizer.token_to_id("<start_of_turn>") is None:
        wrong.append("<start_of_turn> is missing")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.decoder.vocab_size:
        wrong.append(f"{size} tokens, but the checkpoint embeds {config.decoder.vocab_size}")
    if wrong:
        raise PromptError(f"tokenizer and config.json do not match: {'; '.join(wrong)}; use the checkpoint's own")


# Byte pairs that the tiny tokenizer merges. The first bites where a prompt is not split at the placeholder: both
# sides carry a line end there.
_TINY_MERGES = ("\n\n", "th", "in", "er", "an", "me", "se", "re", "st", "en", "on", "ed", "ch", "de", "ti", "time")
_TINY_SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107}


def tiny_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """A byte-level tokenizer for the tiny checkpoint, special ids where Gemma 2 has them.

    256 bytes from id 108 on, then a few merges, then unused tokens up to ``vocab_size``, so that every id decodes.
    Any text without a special token round-trips. Raises ValueError below 400 ids.
    """
    if vocab_size < 400:
        raise ValueError(f"vocab_size is {vocab_size}: special ids, 256 bytes and merges need 400")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = dict(_TINY_SPECIAL) | {char: 108 + index for index, char in enumerate(alphabet)}
    merges = []
    for word in _TINY_MERGES:
        symbols = "".join(piece for piece, _ in byte_level.pre_tokenize_str(word))
        left = next(n for n in range(len(symbols) - 1, 0, -1) if symbols[:n] in vocab and symbols[n:] in vocab)
        merges.append((symbols[:left], symbols[left:]))
        vocab[symbols] = 108 + len(alphabet) + len(merges) - 1
    taken = set(vocab.values())
    vocab |= {f"<unused{token}>": token for token in range(vocab_size) if token not in taken}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _TINY_SPECIAL])
    return tokenizer


def tiny_files() -> dict[str, str]:
    """What stands beside the tiny checkpoint's shards, by file name."""
    return {"tokenizer.json": tiny_tokenizer().to_str(pretty=True)}


def write_tiny_tokenizer(folder: str | Path, vocab_size: int = 512) -> Path:
    """Write ``tokenizer.json`` of the tiny tokenizer into ``folder`` and return its path."""
    path = Path(folder) / "tokenizer.json"
    tiny_tokenizer(vocab_size).save(str(path))
    return path
