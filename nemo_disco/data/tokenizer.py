"""The tokenizer of a Hugging Face directory, as its tokenizer.json says, and the tokens that end a response.

Reads local files alone. Knows nothing of questions; what a chat template makes of them is chat.py's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import FileError, check_directory, read_json

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = logging.getLogger(__name__)
_VOCABULARY = re.compile("token|vocab|tekken|bpe|spm")  # in the name of a file that a tokenizer is made of
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TRANSFORMERS_5_CLASS = "TokenizersBackend"
# Texts on which different tokenizers differ: code, digits, spaces, line ends, normal forms, scripts.
PROBES = (
    'def f(x):\n    return {"a": [x ** 2, -1.5e-3]}  # TODO\n\tif x != 0:\r\n',
    "12345678 + 987.65 = 0.1, 3/4; 2^{10} \\le \\frac{1}{2}",
    "  two  spaces,   three\n\n\nempty lines \t tab ",
    "Größe, naïve, Ångström, e\u0301, \ufb01, Ⅷ, ½",
    "数学の問題 한국어 العربية עברית हिन्दी ไทย",
    "🙂👩\u200d👩\u200d👧🇫🇷 ∀x∃y √2 ≤ π",
    "I'm you're WE'LL don't Let's",
    "<b>&amp;</b> https://a.b/c?d=e_f#g @x",
)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    transformers builds some classes anew from the vocabulary, as another tokenizer than the directory's tokenizer.json:
    then that file is taken as it is, and a warning says so.
    Raises UserError: none there, one that is not its tokenizer.json, no EOS, no chat template or several without a
    default.
    """
    if not Path(path).is_dir():
        raise UserError(f"{path}: there is no such directory; model.path is a Hugging Face directory with a tokenizer")
    from transformers import AutoTokenizer

    check_directory(path)
    if not any(_VOCABULARY.search(file.name) for file in Path(path).iterdir() if file.name not in _SETTINGS):
        # transformers would make an empty one
        raise UserError(f"{path}: no tokenizer there; fetch its tokenizer.json")

    # Explicit, since tokenizers otherwise warns of each process that is forked after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _usable(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
        own = type(tokenizer).__module__.startswith("transformers_modules")
        if (Path(path) / "tokenizer.json").exists() and not own:
            tokenizer = _as_the_file_says(tokenizer, Path(path))
        _refuse_incomplete(tokenizer, path)
    return tokenizer


def adapt_tokenizer_config(directory: Path) -> None:
    """Let transformers 4 and 5 read a written model's tokenizer.json as it is, by changing tokenizer_config.json. A
    tokenizer with code of its own and one that cannot be read (load_tokenizer says why) stay as they are.

    `tokenizer_class` becomes one that takes the file where transformers 5 rebuilds it as another tokenizer, and where
    its name is transformers 5's own. A list in `extra_special_tokens`, which transformers 4 fails on, becomes
    `additional_special_tokens`, which both read. All else stays.
    """
    from transformers import AutoTokenizer

    file, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    try:
        settings = _json_object(config)
        if not file.exists() or "auto_map" in settings:
            return
        with _usable(directory):
            read = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
            differs = bool(_difference(read, _original(file)))
    except UserError:
        return
    both = dict(settings)
    if differs or settings.get("tokenizer_class") == _TRANSFORMERS_5_CLASS:
        both["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    if both != settings:
        config.write_text(json.dumps(both, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_token_ids(tokenizer: Tokenizer, model_dir: str | Path) -> tuple[int, ...]:
    """The tokens that end a response, rising: the tokenizer's EOS, those of generation_config.json, and those of
    config.json; of the last, where generation_config.json has some, only special tokens (a derived model may keep its
    base's number, which is an ordinary token here).

    Raises UserError for an id that is not a token, or one that the model's embedding has no row for.
    """
    directory = Path(model_dir)
    config = _json_object(directory / "config.json")
    named = _eos(_json_object(directory / "generation_config.json"), directory / "generation_config.json", tokenizer)
    also = _eos(config, directory / "config.json", tokenizer)
    if named:
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        also = [i for i in also if i in special]
    stop = sorted({int(tokenizer.eos_token_id), *named, *also})
    if isinstance(rows := config.get("vocab_size"), int):
        check_vocabulary(tokenizer, stop, rows, f"{directory}: an end of sequence")
    return tuple(stop)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """How many ids, counted from 0, are tokens. A model may have more rows than that (Qwen2.5: 151936 for 151665): they
    stand for nothing, and a response must not have them."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return 1 + max(ids.values())


def check_vocabulary(tokenizer: Tokenizer, token_ids: Sequence[int], rows: int, where: str) -> None:
    """Raises UserError if a token has no row in an embedding of so many `rows`."""
    if token_ids and (most := max(token_ids)) >= rows:
        token = tokenizer.convert_ids_to_tokens(most)
        raise UserError(
            f"{where} has token {most} ({token!r}), but the model's embedding has {rows} rows (vocab_size of "
            "config.json): tokens were added to the tokenizer alone, or it is another model's; take the model's own"
        )


@contextlib.contextmanager
def _usable(path: str | Path) -> Iterator[None]:
    """Whatever the libraries make of a tokenizer in here is raised as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise every kind, down to bare Exception
        remote = "trust_remote_code" in str(error)
        mend = "set model.trust_remote_code=true if you trust it" if remote else "it needs a sound tokenizer.json"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise UserError(f"{path}: no usable tokenizer there: {reason}; {mend}") from error


def _as_the_file_says(tokenizer: Any, directory: Path) -> Any:
    """`tokenizer`, or tokenizer.json taken as it is where `tokenizer` is another one."""
    from transformers import PreTrainedTokenizerFast

    file = directory / "tokenizer.json"
    original = _original(file)
    difference = _difference(tokenizer, original)
    if not difference:
        return tokenizer
    direct = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    if remaining := _difference(direct, original):
        raise UserError(
            f"{file}: what transformers loads is another tokenizer ({remaining}): tokenizer_config.json changes it; "
            "make the two files agree"
        )
    if os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: transformers' %s is another tokenizer than this file (%s); the file is taken as it is",
            *(file, type(tokenizer).__name__, difference),
        )
    return direct


def _original(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, whole texts in and out."""
    from tokenizers import Tokenizer as FileTokenizer

    try:
        original = FileTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file}: cannot be read: {error}; it needs a sound tokenizer.json") from error
    original.no_truncation()
    original.no_padding()
    return original


def _difference(tokenizer: Any, original: tokenizers.Tokenizer) -> str:
    """The first thing in which a loaded tokenizer is not the one of its file; "" if there is none."""
    ours = tokenizer.get_vocab()
    for token, number in original.get_vocab().items():
        if ours.get(token) != number:
            return f"token {token!r} is {ours.get(token)}, not {number}"
    special = [token.content for token in original.get_added_tokens_decoder().values()]
    for text in (*PROBES, f"a{'b'.join(special)}c"):  # no spaces: what strips them may differ by design
        expected = original.encode(text, add_special_tokens=False).ids
        if (ids := tokenizer(text, add_special_tokens=False)["input_ids"]) != expected:
            return f"{text[:24]!r} gives {len(ids)} tokens {str(ids[:4])[:-1]}, ..., not {str(expected[:4])[:-1]}, ..."
        said = tokenizer.decode(expected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if said != (meant := original.decode(expected, skip_special_tokens=False)):
            return f"{meant[:24]!r} is decoded as {said[:24]!r}"
    return ""


def _refuse_incomplete(tokenizer: Tokenizer, path: str | Path) -> None:
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{path}: the tokenizer makes no tokens of a text; it needs a sound tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token; set `eos_token` in tokenizer_config.json")
    template = tokenizer.chat_template
    if isinstance(template, dict) and template:
        if "default" not in template:
            raise UserError(
                f"{path}: the tokenizer has several chat templates ({', '.join(sorted(template))}) and none is named "
                "`default`; put the one to use in chat_template.jinja"
            )
        template = template["default"]
    if not template or not isinstance(template, str):
        raise UserError(
            f"{path}: the tokenizer has no chat template; put one in chat_template.jinja, or in `chat_template` of "
            "tokenizer_config.json"
        )


def _json_object(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        return read_json(path, dict[str, Any], links=True) if path.exists() else {}
    except FileError as fault:
        raise UserError(f"{fault}; the model directory is damaged") from None


def _eos(config: dict[str, Any], path: Path, tokenizer: Tokenizer) -> list[int]:
    listed = config.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(tokenizer) for i in ids):
        raise UserError(f"{path}: `eos_token_id` is {listed}; the tokenizer has ids from 0 to {len(tokenizer) - 1}")
    return ids
