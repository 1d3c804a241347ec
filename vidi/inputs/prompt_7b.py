"""The question as Vidi 7B takes it (its spec §2): another text, the checkpoint's own chat template, other tokens around it.

The video's length stands in the question, so the ids are known only when the file is open. Each side of the placeholder is
tokenised alone, and one bos stands in front.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stageparity import strict
from vidi.config import VidiConfig
from vidi.inputs import template_child
from vidi.inputs.prompt import PLACEHOLDER_WORD, PromptError, library, load_tokenizer

__all__ = ["Chat", "load", "tiny_files", "user_text"]

CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
MAX_BYTES = 16 << 20
WAIT_SEC = 5  #: for a template's process, which may compute for `template_child.SECONDS` of them
_QUESTION = (
    "Given the frames from a video, answer the time range in percentage that corresponds to query text split by comma. "
    "Video length is: {duration_sec:.2f} and text query is: {query}."
)


def user_text(query: str, duration_sec: float) -> str:
    """The user's message; one trailing "." of ``query`` removed. Raises PromptError where no word is left."""
    query = query.removesuffix(".")
    if not query.strip():
        raise PromptError(f"the query {query!r} is empty; say what to look for, such as 'a red car'")
    return f"{PLACEHOLDER_WORD}\n" + _QUESTION.format(duration_sec=duration_sec, query=query)


class Chat:
    """A tokenizer with the chat template that its checkpoint brings."""

    def __init__(self, tokenizer: Tokenizer, template: str, bos: str, eos: str) -> None:
        """Raises PromptError for a template that is none, or takes too much to be read."""
        self.tokenizer, self.template, self.bos, self.eos = tokenizer, template, bos, eos
        _run_template(template, None)

    def ids(self, query: str, duration_sec: float, config: VidiConfig) -> list[int]:
        """bos, the text before the placeholder, the placeholder's id, the text after it. Raises PromptError for a query that
        is empty or steers the model, and for a template that loses the placeholder."""
        special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        if found := sorted(word for word in {PLACEHOLDER_WORD, *special} if word in query):
            raise PromptError(
                f"the query holds {', '.join(found)}, which steers the model; write it without these marks"
            )
        text = self.render(user_text(query, duration_sec))
        sides = text.replace(self.bos, "").split(PLACEHOLDER_WORD)
        if len(sides) != 2:
            raise PromptError(
                f"the chat template gives {PLACEHOLDER_WORD} {len(sides) - 1} times, not once: {text!r:.200}"
            )
        with library("the question cannot be tokenised"):
            before, after = (self.tokenizer.encode(side, add_special_tokens=False).ids for side in sides)
        return [config.bos_id, *before, config.image_placeholder, *after]

    def render(self, user: str) -> str:
        """One user turn through the template. Raises PromptError where it refuses it, or takes too much."""
        turn = [{"role": "user", "content": user}]
        values = {"messages": turn, "add_generation_prompt": False, "bos_token": self.bos, "eos_token": self.eos}
        return _run_template(self.template, values)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens).strip()

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=with_added_tokens)


def _run_template(template: str, values: dict[str, Any] | None) -> str:
    """What a chat template makes of ``values`` (none: it is only read), in a process with limits (`template_child`)."""
    # -P: beside the script lie modules of this package that are called as some of Python's own.
    command = [sys.executable, "-P", template_child.__file__]
    request = json.dumps({"template": template, "values": values})
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, encoding="utf-8", timeout=WAIT_SEC, check=False
        )
    except subprocess.TimeoutExpired:
        raise PromptError(f"the chat template took more than {WAIT_SEC} s; {_ENDLESS}") from None
    if done.returncode:
        raise PromptError(f"the chat template ended its process ({_ended(done)}); {_ENDLESS}")
    told = json.loads(done.stdout)
    if "unreadable" in told:
        raise PromptError(strict.one_line(f"the chat template cannot be read: {told['unreadable']}"))
    if "refused" in told:
        raise PromptError(strict.one_line(f"the chat template refuses one user turn: {told['refused']}"))
    return str(told["text"])


_ENDLESS = f"it may compute for {template_child.SECONDS} s in {template_child.MEMORY_BYTES >> 20} MiB; use the checkpoint's own"


def _ended(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended, in one line: the signal that stopped it, or the last thing it said."""
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    said = done.stderr.strip().splitlines() or [""]
    return strict.printable(f"status {done.returncode}: {said[-1][:200]}")


def load(folder: str | Path, config: VidiConfig) -> Chat:
    """Tokenizer and chat template of a checkpoint folder, checked against ``config``. Raises PromptError naming the file."""
    folder = Path(folder)
    tokenizer, file = load_tokenizer(folder), folder / CONFIG_NAME
    said = _json(file)
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if template is None and (folder / TEMPLATE_NAME).is_file():
        template = _text(folder / TEMPLATE_NAME)
    words = {name: _word(said.get(f"{name}_token")) for name in ("bos", "eos")}
    if not isinstance(template, str) or None in words.values():
        raise PromptError(f"{file}: chat_template, bos_token and eos_token are needed; copy the checkpoint's own")
    wanted = {"bos": config.bos_id, "eos": config.end_of_turn_id}
    found = {name: tokenizer.token_to_id(str(words[name])) for name in wanted}
    wrong = [f"{words[n]} is {found[n]}, not {token}" for n, token in wanted.items() if found[n] != token]
    if (size := tokenizer.get_vocab_size(with_added_tokens=True)) > config.decoder.vocab_size:
        wrong.append(f"{size} tokens, but the checkpoint embeds {config.decoder.vocab_size}")
    if wrong:
        raise PromptError(
            f"{file}: tokenizer and config.json do not match: {'; '.join(wrong)}; use the checkpoint's own"
        )
    return Chat(tokenizer, template, str(words["bos"]), str(words["eos"]))


def _word(token: Any) -> str | None:
    """A special token, as a string or as the object that Hugging Face writes."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _text(file: Path) -> str:
    try:
        return strict.read_bytes(file, limit=MAX_BYTES, hub_cache=True).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: not readable as text ({strict.reason(error)}); copy it again") from None
    except strict.Refused as error:
        raise PromptError(f"{error}; the checkpoint's chat template stands there") from None


def _json(file: Path) -> dict[str, Any]:
    # Not the strict reader: what is written by default as the longest text, 10^30, is no number for that.
    try:
        said = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"{file}: not readable as JSON ({strict.reason(error)}); copy it again") from None
    if not isinstance(said, dict):
        raise PromptError(f"{file}: a JSON object is expected, found {type(said).__name__}")
    return said


_TINY_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4}


def tiny_files(vocab_size: int = 512) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of the tiny checkpoint: bytes from id 5 on, the template of Mistral v0.3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = dict(_TINY_SPECIAL) | {char: len(_TINY_SPECIAL) + n for n, char in enumerate(alphabet)}
    vocab |= {f"<unused{token}>": token for token in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _TINY_SPECIAL])
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }}[/INST]{% endfor %}"
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    return {"tokenizer.json": tokenizer.to_str(pretty=True), CONFIG_NAME: json.dumps(said, indent=1) + "\n"}
