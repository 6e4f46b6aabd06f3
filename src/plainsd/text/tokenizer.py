"""CLIP's byte-pair tokenizer: text to token ids and back (Sennrich et al. 2016; Radford et al. 2021).

Text is normalised (NFC), whitespace is collapsed, letters are lower-cased; a regular expression splits it into words,
single digits and runs of punctuation; each word becomes the symbols of its UTF-8 bytes, the last one marked `</w>`;
then the merges are applied in order. Any text has ids.

The ids are those of transformers' CLIPTokenizer 5.23. Two older behaviours differ from it and are not reproduced:
OpenAI's own code (and the old "slow" class with ftfy installed) first repaired garbled text and HTML entities (`&amp;`
to `&`, curly quotes to straight ones), and the old class without ftfy split around Chinese characters and dropped
control characters. As in transformers, the padding token `!` of SD 2 and of SDXL's second encoder is a special token,
so a `!` in a prompt has the padding's id 0, not the id of the word `!`; `reading_pad_as_word` is without this.
"""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from plainsd.disk import read_text_file, written_whole
from plainsd.errors import UserError, shortened
from plainsd.json_reader import BadJSON, parsed_json

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
TOKEN_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}  # and their defaults
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CLIP = Path(str(files("plainsd") / "assets" / "clip" / VOCABULARY))
CLIP_SIZE = 49_408
MOST_TOKENS = 2**24  # of any vocabulary


class Tokenizer:
    """Byte-pair encoding by a vocabulary (symbol -> id) and a list of merges, in CLIP's file format.

    `start`, `end` and `pad` are ids; SD 1.x pads with the end token, SD 2 and OpenCLIP with id 0 (`!`). `special` gives
    each role its token. `added` are tokens on top of the vocabulary, in the order of their ids.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, ...]],
        *,
        special: dict[str, AddedToken | str] | None = None,
        added: Iterable[AddedToken | str] = (),
        max_length: int = 77,
    ):
        self.vocabulary, self.merges, self.max_length = vocabulary, list(merges), max_length
        self.special: dict[str, AddedToken | str] = {**ROLES, **(special or {})}
        self._backend = _backend(vocabulary, self.merges, unknown=str(self.special["unk_token"]))
        self._backend.add_tokens(list(added))
        for role in ROLES:  # a role given as plain text is matched before lower-casing
            token = self.special[role]
            self._backend.add_special_tokens([AddedToken(token, special=True) if isinstance(token, str) else token])
        self.start, self.end, self.pad = (
            self._id_of(str(self.special[role])) for role in ("bos_token", "eos_token", "pad_token")
        )
        self._runs = self._find_runs()  # first id of a learned token -> the ids of all its vectors
        self._plain: Tokenizer | None = None  # see `reading_pad_as_word`

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """From the files in a folder, see `from_texts`."""
        return cls.from_texts(_texts(Path(folder)), folder)

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str | Path) -> "Tokenizer":
        """From the texts of `tokenizer.json`, or of `vocab.json` and `merges.txt`, with the files of special tokens.
        `where` is their source, for error messages. UserError where they hold something else."""
        try:
            return cls._from_texts(texts, where)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            what = shortened(f"{type(error).__name__}: {error}", 100)
            raise UserError(
                f"{where}: the tokenizer's files hold something else ({what}); download them again"
            ) from error

    @classmethod
    def _from_texts(cls, texts: Mapping[str, str], where: str | Path) -> "Tokenizer":
        added: dict[int, AddedToken | str] = {}
        if "tokenizer.json" in texts:  # all that transformers 5 writes; it takes precedence there too
            whole = _read_json(texts, "tokenizer.json", where)
            model = whole.get("model", {})
            if model.get("type", "BPE") != "BPE" or "vocab" not in model or "merges" not in model:
                raise UserError(f"{where}: tokenizer.json holds no byte-pair vocabulary; take CLIP's tokenizer")
            vocabulary = check_vocabulary(model["vocab"], where)
            merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
            if not all(len(pair) == 2 and all(isinstance(one, str) for one in pair) for pair in merges):
                raise UserError(f"{where}: tokenizer.json has merges that are not pairs of symbols; download it again")
            added = {token["id"]: _token(token) for token in whole.get("added_tokens", ())}
        else:
            vocabulary, merges = _read_vocabulary(texts, where)
        config = _read_json(texts, "tokenizer_config.json", where, missing={})
        roles = {role: _token(config[role]) for role in ROLES if config.get(role)}
        if "added_tokens_decoder" in config:  # newer files describe each token here, older ones there
            added |= {int(key): _token(token) for key, token in config["added_tokens_decoder"].items()}
        else:
            named = _read_json(texts, "special_tokens_map.json", where, missing={})
            roles |= {role: _token(named[role]) for role in ROLES if named.get(role)}
            extra = _read_json(texts, "added_tokens.json", where, missing={})
            known = {str(token) for token in roles.values()}
            added |= {
                key: AddedToken(text, normalized=text not in known, special=text in known)
                for text, key in extra.items()
            }
        described = {str(token): token for token in added.values()}
        roles = {role: described.get(str(token), token) for role, token in roles.items()}
        length = config.get("model_max_length", 77)
        return cls(
            vocabulary,
            merges,
            special=roles,
            added=[added[key] for key in sorted(added)],
            max_length=length if length < 1e6 else 77,
        )  # transformers writes a huge number where it is not set

    @classmethod
    def from_vocabulary(cls, path: str | Path, pad: str = END) -> "Tokenizer":
        """CLIP's 49,408 tokens from its vocabulary file, or from a folder with `vocab.json` and `merges.txt`."""
        path = Path(path)
        if path.is_dir():
            vocabulary, merges = _read_vocabulary(_texts(path), path)
        else:
            try:
                lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read the vocabulary {path}: {error}; download {VOCABULARY} again") from error
            symbols = byte_symbols()
            merges = [tuple(line.split()) for line in lines[1 : CLIP_SIZE - 2 * len(symbols) - 1]]
            words = [*symbols, *(symbol + WORD_END for symbol in symbols), *map("".join, merges), START, END]
            vocabulary = {word: key for key, word in enumerate(words)}
        marks = {role: AddedToken(text, special=True, normalized=True) for role, text in ROLES.items()}
        return cls(vocabulary, merges, special={**marks, "pad_token": pad})

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without start, end and padding. A learned token gives all of its ids."""
        return [key for unit in self.units(text) for key in unit]

    def units(self, text: str) -> list[list[int]]:
        """The same ids in groups: all vectors of one learned token together, any other id alone."""
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise UserError(f"the prompt {text!r} is not valid text; write it in UTF-8", field="prompt") from error
        return [self._runs.get(key, [key]) for key in ids]

    def has_learned(self, word: str) -> bool:
        """Whether the text is one learned token."""
        units = self.units(word)
        return len(units) == 1 and min(units[0]) >= len(self.vocabulary)

    def reading_pad_as_word(self) -> "Tokenizer":
        """The same, but that a padding token such as `!` in a text is a word, as for SD 2 and SDXL in A1111
        (modules/sd_hijack_open_clip.py, 1.10.1) and ComfyUI (comfy/sd1_clip.py, 0.8). For reading only."""
        pad = str(self.special["pad_token"])
        if self.pad in (self.start, self.end) or pad not in self.vocabulary:
            return self
        if self._plain is None or len(self._plain) != len(self):  # a word was learned since
            plain = copy(self)
            plain._plain, plain._backend = None, _backend(self.vocabulary, self.merges, str(self.special["unk_token"]))
            for _, token in sorted(self._backend.get_added_tokens_decoder().items()):
                if token.content != pad:
                    (plain._backend.add_special_tokens if token.special else plain._backend.add_tokens)([token])
            self._plain = plain
        return self._plain

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The tokens as readable text, `</w>` at the end of a word; bytes of an incomplete character as `\\xf0`."""
        return [self._readable(key) for key in ids]

    def text_of(self, ids: Iterable[int]) -> tuple[str, bool]:
        """What the tokens of a word say together, without `</w>`, and whether it ends with a whole character: the bytes
        of one may be spread over several tokens. Bytes that are none yet as `\\xf0`."""
        text, data = "", b""
        for key in ids:
            piece = self._backend.id_to_token(key)
            assert piece is not None, key
            word = piece.removesuffix(WORD_END)
            if SYMBOL_BYTES.keys() >= set(word):
                data += bytes(SYMBOL_BYTES[symbol] for symbol in word)
            else:  # a learned token may have any name
                text, data = text + data.decode("utf-8", errors="backslashreplace") + word, b""
        try:
            return text + data.decode("utf-8"), True
        except UnicodeDecodeError:
            return text + data.decode("utf-8", errors="backslashreplace"), False

    def add(self, token: str, count: int = 1) -> list[int]:
        """Add `token` with `count` new ids at the end of the vocabulary, for textual inversion.

        A name such as `<cat>` matches anywhere in a text, a name of letters and digits only as a whole word.
        """
        names = self.new_names(token, count)
        whole = token[0].isalnum() and token[-1].isalnum()
        self._backend.add_tokens([AddedToken(name, single_word=whole, normalized=True) for name in names])
        ids = [self._id_of(name) for name in names]
        self._runs[ids[0]] = ids
        return ids

    def new_names(self, token: str, count: int) -> list[str]:
        """What `add` calls the `count` tokens of a new word. A UserError where there is such a word."""
        names = [token, *(f"{token}_{index}" for index in range(1, count))]
        if not token.strip() or count < 1:
            raise UserError(f"cannot learn {count} vectors as {token!r}; give a name and at least one vector")
        if taken := [name for name in names if self._backend.token_to_id(name) is not None]:
            raise UserError(
                f"cannot learn the token {token!r}: the vocabulary has {taken[0]!r} already; "
                f"choose another name, such as '<my-{token.strip('<> ')}>'"
            )
        return names

    def save(self, folder: str | Path) -> None:
        """Writes its files into a folder, see `to_texts`; each is whole or absent."""
        for name, text in self.to_texts().items():
            with written_whole(Path(folder) / name) as draft:
                draft.write_text(text, encoding="utf-8", newline="\n")

    def to_texts(self) -> dict[str, str]:
        """The texts of `vocab.json`, `merges.txt`, `special_tokens_map.json` and `tokenizer_config.json`."""
        for key, run in self._find_runs().items():  # as whoever reads the files finds them
            if self._runs.get(key) != run:
                first, last = (self._backend.id_to_token(one) for one in (run[0], run[-1]))
                raise UserError(f"saved, the word {last!r} would be read as a vector of {first!r}; rename one of them")
        special = {role: str(token) for role, token in self.special.items()}
        added = sorted(self._backend.get_added_tokens_decoder().items())
        config = {
            "added_tokens_decoder": {str(key): _fields(token) for key, token in added},
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
            **special,
        }
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        return {
            "vocab.json": json.dumps(self.vocabulary, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + merges,
            "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }

    def _find_runs(self) -> dict[int, list[int]]:
        """In a saved folder, the vectors of one learned token are named `name`, `name_1`, `name_2`, ..."""
        ids = {token.content: key for key, token in self._backend.get_added_tokens_decoder().items()}
        runs = {}
        for name, key in ids.items():
            run = [key]
            while f"{name}_{len(run)}" in ids:
                run.append(ids[f"{name}_{len(run)}"])
            if len(run) > 1:
                runs[key] = run
        return runs

    def _id_of(self, token: str) -> int:
        """The id of a known token."""
        key = self._backend.token_to_id(token)
        assert key is not None, token
        return key

    def _readable(self, key: int) -> str:
        piece = self._backend.id_to_token(key)
        assert piece is not None, key
        word, mark = (piece[: -len(WORD_END)], WORD_END) if piece.endswith(WORD_END) else (piece, "")
        if not SYMBOL_BYTES.keys() >= set(word):
            return piece  # a learned token may have any name
        return bytes(SYMBOL_BYTES[symbol] for symbol in word).decode("utf-8", errors="backslashreplace") + mark


def byte_symbols() -> list[str]:
    """One visible character for each of the 256 bytes, in the order of CLIP's vocabulary.

    Visible Latin-1 bytes stand for themselves and come first; the 68 others follow as the characters from 256 on.
    """
    return [chr(byte) for byte in VISIBLE] + [chr(256 + index) for index in range(256 - len(VISIBLE))]


VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
SYMBOL_BYTES = dict(zip(byte_symbols(), VISIBLE + [byte for byte in range(256) if byte not in VISIBLE], strict=True))


def find_vocabulary(beside: str | Path | None = None) -> Path:
    """A path for `from_vocabulary`: the vocabulary beside a checkpoint, or else CLIP's, which the package has."""
    here = [] if beside is None else [Path(beside) if Path(beside).is_dir() else Path(beside).parent]
    for folder in (place / name for place in here for name in ("", "tokenizer")):
        if (folder / VOCABULARY).is_file():
            return folder / VOCABULARY
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    return CLIP


def _backend(vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]], unknown: str) -> Backend:
    try:
        model = BPE(
            vocab=vocabulary,
            merges=[(left, right) for left, right in merges],
            end_of_word_suffix=WORD_END,
            continuing_subword_prefix="",
            unk_token=unknown,
            fuse_unk=False,
        )
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"the vocabulary and the merges do not fit together: {error}; take both from one model"
        ) from error
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _read_vocabulary(texts: Mapping[str, str], where: str | Path) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    vocabulary = check_vocabulary(_read_json(texts, "vocab.json", where), where)
    lines = _text(texts, "merges.txt", where).split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if bad := next((pair for pair in merges if len(pair) != 2), None):
        raise UserError(
            f"{where}: merges.txt: {shortened(' '.join(bad), 60)!r} is not a pair of symbols; the file is damaged"
        )
    return vocabulary, merges


def check_vocabulary(vocabulary: object, where: str | Path) -> dict[str, int]:
    """UserError unless it gives every symbol an id that a text encoder can have."""
    if not isinstance(vocabulary, dict):
        raise UserError(f"{where}: the vocabulary is not a table of symbols; download it again")
    for symbol, key in vocabulary.items():
        if type(key) is not int or not 0 <= key < MOST_TOKENS:
            what = f"the vocabulary gives {shortened(symbol, 60)!r} the id {shortened(repr(key), 60)}"
            raise UserError(f"{where}: {what}; download it again")
    return vocabulary


def _token(value: str | dict) -> AddedToken | str:
    """A token from a JSON file: plain text, or its text with matching flags."""
    if isinstance(value, str):
        return value
    flags = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=value.get("special", True), **flags)


def _fields(token: AddedToken) -> dict:
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
    }


def _texts(folder: Path) -> dict[str, str]:
    """The texts of the tokenizer files in the folder."""
    return {name: read_text_file(folder / name) for name in FILES if (folder / name).is_file()}


def _text(texts: Mapping[str, str], name: str, where: str | Path) -> str:
    if name not in texts:
        raise UserError(f"{where} has no {name}, which a tokenizer needs; download it again")
    return texts[name]


def _read_json(texts: Mapping[str, str], name: str, where: str | Path, missing: dict | None = None) -> dict:
    if missing is not None and name not in texts:
        return missing
    try:
        content = parsed_json(_text(texts, name, where))
    except BadJSON as error:
        raise UserError(f"{where}: {name} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{where}: {name} holds a {type(content).__name__} where names with values are expected; download it again"
        )
    return content
