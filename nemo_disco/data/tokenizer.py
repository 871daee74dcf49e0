"""Loading of a Hugging Face directory's tokenizer, exactly as its tokenizer.json defines it, and its stop tokens.

Reads local files only. chat.py encodes questions with it.
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
_VOCABULARY = re.compile("token|vocab|tekken|bpe|spm")  # in the names of files with a vocabulary
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TRANSFORMERS_5_CLASS = "TokenizersBackend"
# Texts that tell tokenizers apart: code, digits, spaces, line ends, normal forms, scripts.
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

    transformers rebuilds some classes from the vocabulary, and the result can differ from the directory's
    tokenizer.json; then the file is loaded as it is, with a warning.
    Raises UserError if there is no tokenizer, if it does not agree with tokenizer.json, or if it has no EOS token, no
    chat template, or several without a default.
    """
    if not Path(path).is_dir():
        raise UserError(f"{path}: there is no such directory; model.path is a Hugging Face directory with a tokenizer")
    from transformers import AutoTokenizer

    check_directory(path)
    if not any(_VOCABULARY.search(file.name) for file in Path(path).iterdir() if file.name not in _SETTINGS):
        # transformers would make an empty tokenizer
        raise UserError(f"{path}: no tokenizer there; fetch its tokenizer.json")

    # Set here because tokenizers otherwise warns about each process that is forked after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _loading_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
        remote_code = type(tokenizer).__module__.startswith("transformers_modules")
        if (Path(path) / "tokenizer.json").exists() and not remote_code:
            tokenizer = _match_tokenizer_json(tokenizer, Path(path))
        _check_complete(tokenizer, path)
    return tokenizer


def adapt_tokenizer_config(directory: Path) -> None:
    """Change an exported model's tokenizer_config.json so that transformers 4 and 5 load its tokenizer.json as it is.

    `tokenizer_class` becomes PreTrainedTokenizerFast if transformers 5 would rebuild another tokenizer, or alone knows
    the class. A list in `extra_special_tokens`, on which transformers 4 fails, becomes `additional_special_tokens`.
    A tokenizer with its own code, or one that load_tokenizer refuses to read, is left unchanged.
    """
    from transformers import AutoTokenizer

    file, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    try:
        settings = _read_object(config)
        if not file.exists() or "auto_map" in settings:
            return
        with _loading_errors(directory):
            loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
            differs = bool(_first_difference(loaded, _read_tokenizer_json(file)))
    except UserError:
        return
    adapted = dict(settings)
    if differs or settings.get("tokenizer_class") == _TRANSFORMERS_5_CLASS:
        adapted["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        adapted["additional_special_tokens"] = adapted.pop("extra_special_tokens")
    if adapted != settings:
        config.write_text(json.dumps(adapted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_token_ids(tokenizer: Tokenizer, model_dir: str | Path) -> tuple[int, ...]:
    """Ids of the tokens that end a response, ascending: the tokenizer's EOS and the `eos_token_id` of
    generation_config.json and of config.json.

    If generation_config.json names some, ordinary tokens of config.json do not count: a derived model may keep its base
    model's id there. Raises UserError for an id that is not a token, or that has no row in the model's embedding.
    """
    directory = Path(model_dir)
    config = _read_object(directory / "config.json")
    generation_ids = _read_eos_ids(directory / "generation_config.json", tokenizer)
    model_ids = _read_eos_ids(directory / "config.json", tokenizer)
    if generation_ids:
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        model_ids = [i for i in model_ids if i in special]
    stop = sorted({int(tokenizer.eos_token_id), *generation_ids, *model_ids})
    if isinstance(rows := config.get("vocab_size"), int):
        check_vocabulary(tokenizer, stop, rows, f"{directory}: an end of sequence")
    return tuple(stop)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id. An embedding may have more rows (Qwen2.5: 151936 for 151665); those are no
    tokens, and a response must not contain them."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return 1 + max(ids.values())


def check_vocabulary(tokenizer: Tokenizer, token_ids: Sequence[int], rows: int, where: str) -> None:
    """Raise UserError if a token has no row in an embedding of `rows` rows. where: begins the message."""
    if token_ids and (largest := max(token_ids)) >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{where} has token {largest} ({token!r}), but the model's embedding has {rows} rows (vocab_size of "
            "config.json): tokens were added to the tokenizer only, or it is another model's; use the model's own"
        )


@contextlib.contextmanager
def _loading_errors(path: str | Path) -> Iterator[None]:
    """Turn every exception of transformers and tokenizers in this context into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise every kind, down to bare Exception
        remote = "trust_remote_code" in str(error)
        remedy = "set model.trust_remote_code=true if you trust it" if remote else "it needs a sound tokenizer.json"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise UserError(f"{path}: no usable tokenizer there: {reason}; {remedy}") from error


def _match_tokenizer_json(tokenizer: Any, directory: Path) -> Any:
    """`tokenizer` if it agrees with the directory's tokenizer.json, else one that is loaded from that file alone."""
    from transformers import PreTrainedTokenizerFast

    file = directory / "tokenizer.json"
    original = _read_tokenizer_json(file)
    difference = _first_difference(tokenizer, original)
    if not difference:
        return tokenizer
    direct = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    if remaining := _first_difference(direct, original):
        raise UserError(
            f"{file}: what transformers loads is another tokenizer ({remaining}): tokenizer_config.json changes it; "
            "make the two files agree"
        )
    if os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: transformers' %s is another tokenizer than this file (%s); the file is used as it is",
            *(file, type(tokenizer).__name__, difference),
        )
    return direct


def _read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without truncation and padding."""
    from tokenizers import Tokenizer as FileTokenizer

    try:
        original = FileTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file}: cannot be read: {error}; it needs a sound tokenizer.json") from error
    original.no_truncation()
    original.no_padding()
    return original


def _first_difference(tokenizer: Any, original: tokenizers.Tokenizer) -> str:
    """Describe the first difference of a loaded tokenizer from that of its tokenizer.json; "" if there is none."""
    vocabulary = tokenizer.get_vocab()
    for token, number in original.get_vocab().items():
        if vocabulary.get(token) != number:
            return f"token {token!r} is {vocabulary.get(token)}, not {number}"
    special = [token.content for token in original.get_added_tokens_decoder().values()]
    for text in (*PROBES, f"a{'b'.join(special)}c"):  # no spaces: the two may strip them differently by design
        expected = original.encode(text, add_special_tokens=False).ids
        if (ids := tokenizer(text, add_special_tokens=False)["input_ids"]) != expected:
            return f"{text[:24]!r} gives {len(ids)} tokens {str(ids[:4])[:-1]}, ..., not {str(expected[:4])[:-1]}, ..."
        decoded = tokenizer.decode(expected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != (expected_text := original.decode(expected, skip_special_tokens=False)):
            return f"{expected_text[:24]!r} is decoded as {decoded[:24]!r}"
    return ""


def _check_complete(tokenizer: Tokenizer, path: str | Path) -> None:
    """Raise UserError if the tokenizer gives no tokens, or lacks an EOS token or a chat template."""
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


def _read_object(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty if there is no such file."""
    try:
        return read_json(path, dict[str, Any], links=True) if path.exists() else {}
    except FileError as fault:
        raise UserError(f"{fault}; the model directory is damaged") from None


def _read_eos_ids(path: Path, tokenizer: Tokenizer) -> list[int]:
    value = _read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(tokenizer) for i in ids):
        raise UserError(f"{path}: `eos_token_id` is {value}; the tokenizer has ids from 0 to {len(tokenizer) - 1}")
    return ids
