"""Captioned pictures as rows of a table, through the `datasets` library: parquet files, tar shards in the webdataset
form, pictures with metadata.csv, datasets on the hub.

A picture column is one of that type, or with one of the names in PICTURE_COLUMNS; a text column has a caption, a list
of them, or (tar) a table with one; a column `mask` holds pictures whose dark parts do not
count, and a column `cond`, or `conditioning_image`, the maps of a ControlNet. With `stream` a dataset is not fetched
as a whole: its first `limit` rows are read one after the other and kept in the cache folder.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from plainsd.disk import written_whole
from plainsd.errors import UserError, shortened
from plainsd.listing import lies_in, others
from plainsd.pictures.conditioning import Size
from plainsd.pictures.images import open_picture
from plainsd.train.data.folders import MAPS, PICTURES, TEXT_COLUMNS, Reading, spoken
from plainsd.train.data.pictures import file_mark

PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")
MAP_COLUMN = re.compile(rf"({'|'.join(MAPS)})(\.\w+)?", re.IGNORECASE)
GONE = (400, 401, 403, 404, 410, 451)  # HTTP's answers for what is not there, or not for us
TAR_END = bytes(1024)  # two empty blocks of 512 bytes
SPLITS = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}  # other words for them in names of files, as `datasets` has it
SPLIT_WORD = re.compile(r"(?<![^\W\d_])(train|validation|test|" + "|".join(SPLITS) + r")(?![^\W\d_])", re.IGNORECASE)
MASK_COLUMN = re.compile(r"mask(\.\w+)?", re.IGNORECASE)  # in tar files with the ending: 0.mask.png


class Bytes(BytesIO):
    """A picture in memory, with the name that messages give it."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class DatasetRow:
    """A picture in a row of a `datasets.Dataset`, with decoding turned off."""

    table: Any
    number: int
    column: str
    texts: tuple[str, ...]
    origin: str
    repeats: int = 1
    size: Size | None = None
    mask: str | None = None  # the column with its mask
    map: str | None = None  # likewise, its map for a ControlNet

    @property
    def masked(self) -> bool:
        return self.mask is not None

    @property
    def mapped(self) -> bool:
        return self.map is not None

    @property
    def computed(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"{self.origin} row {self.number + 1}"

    def mark(self) -> str:
        return f"{self.origin} {self.table._fingerprint} {self.number}"

    @property
    def place(self) -> None:
        return None

    def content(self) -> bytes:
        source = self._source(self.table[self.number][self.column])
        return source.getvalue() if isinstance(source, Bytes) else Path(source).read_bytes()

    def open(self) -> Image.Image:
        return self._picture(self.column, "white")

    def open_mask(self) -> Image.Image:
        assert self.mask is not None  # of those that are `masked`
        return self._picture(self.mask, "black")

    def open_map(self) -> Image.Image:
        assert self.map is not None  # of those that are `mapped`
        return self._picture(self.map, "black")

    def _picture(self, column: str, background: str) -> Image.Image:
        return open_picture(self._source(self.table[self.number][column]), background)

    def _source(self, cell: dict | None) -> Bytes | str:
        if not cell or not (cell.get("bytes") or cell.get("path")):
            raise UserError(f"{self.name} has no picture")
        return Bytes(cell["bytes"], self.name) if cell.get("bytes") else cell["path"]


# ---- the table


def by_split(place: Path, files: list[str], split: str) -> list[str] | dict[str, list[str]]:
    """Of a folder's files those of each split that is asked for, where their names say it, such as
    data/test-00000-of-00001.parquet; all of them where no two splits are named."""
    named = {file: split_of(Path(file).relative_to(place)) if place.is_dir() else None for file in files}
    if len({*named.values()} - {None}) < 2:
        return files
    asked = {word: SPLITS.get(word, word) for word in re.findall(r"[A-Za-z_]\w*", split)}
    found = {word: [file for file in files if named[file] == name] for word, name in asked.items()}
    if missing := [word for word, these in found.items() if not these]:
        there = ", ".join(sorted({name for name in named.values() if name}))
        raise UserError(f"{place} has no files of split {missing[0]}, but of {there}; give --split one of them")
    return found


def split_of(file: Path) -> str | None:
    """The split that a file's name, or else that of a folder around it, says."""
    for part in reversed(file.parts):
        if found := SPLIT_WORD.findall(part):
            word = found[-1].lower()
            return SPLITS.get(word, word)
    return None


def check_whole_tar(file: Path) -> None:
    """UserError for one that is cut short: `datasets` would read as far as it goes, without a word."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - len(TAR_END)))
        if opened.read() != TAR_END:
            raise UserError(f"{file} is cut short: a tar file ends with {len(TAR_END)} empty bytes; download it again")


def _opened(place: str, kind: str | None, files: list[str], cache: Path, reading: Reading, stream: bool):
    """The dataset, with pictures left as bytes; the names of its picture and text columns."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading parquet files, tar shards and the hub needs the datasets library; pip install 'plainsd[train]'"
        ) from None
    for file in files if kind == "webdataset" else ():
        check_whole_tar(Path(file))
    options: dict[str, Any] = {"split": reading.split, "streaming": stream, "cache_dir": str(cache / "datasets")}
    try:
        if kind is None:
            name, _, revision = place.partition("@")  # see HUB_NAME
            table = datasets.load_dataset(name, revision=revision or None, **options)
        elif kind == "imagefolder":
            table = datasets.load_dataset("imagefolder", data_dir=files[0], **options)
        else:
            table = datasets.load_dataset(kind, data_files=by_split(Path(place), files, reading.split), **options)
        if table.features is None:  # streams do not always tell before the first row
            table = table._resolve_features()
    except Exception as error:  # builders raise anything on damaged files
        raise UserError(_unreadable(place, error)) from error
    picture = _column(
        table,
        place,
        "picture",
        reading.picture_column,
        [
            *(
                name
                for name, feature in table.features.items()
                if isinstance(feature, datasets.Image)
                and not (MASK_COLUMN.fullmatch(name) or MAP_COLUMN.fullmatch(name))
            ),
            *PICTURE_COLUMNS,
        ],
    )
    text = (
        None
        if reading.caption
        and not reading.text_column
        and not set(TEXT_COLUMNS) & {name.lower() for name in table.features}
        else _column(table, place, "text", reading.text_column, TEXT_COLUMNS)
    )
    for column in {picture, _named(table, MASK_COLUMN), _named(table, MAP_COLUMN)} - {None}:
        table = table.cast_column(column, datasets.Image(decode=False))
    return table, picture, text


def _unreadable(place: str, error: Exception) -> str:
    return f"cannot read {place!r}: {said(error.__cause__ or error)}; check the name and the files"


def said(error: BaseException) -> str:
    """An error's words, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _column(table, place: str, what: str, wanted: str | None, names: Iterable[str]) -> str:
    there = list(table.features)
    usual = {name.lower(): name for name in reversed(there)}  # tar files have columns after their files' endings
    if wanted:
        found = wanted if wanted in there else None
    else:
        found = next((usual[name.lower()] for name in names if name.lower() in usual), None)
    if found is None:
        raise UserError(
            f"{place}: no {what} column{f' {wanted!r}' if wanted else ''}; it has {', '.join(there)}; "
            f"name one with --{what}-column"
        )
    return found


def _named(table, pattern: re.Pattern) -> str | None:
    return next((name for name in table.features if pattern.fullmatch(name)), None)


def dataset_rows(place: str, kind: str | None, files: list[str], cache: Path, reading: Reading) -> list[DatasetRow]:
    table, picture, text = _opened(place, kind, files, cache, reading, stream=False)
    mask, map, count = _named(table, MASK_COLUMN), _named(table, MAP_COLUMN), len(table)
    texts = list(table[text]) if text else [None] * count
    pictures = table.select_columns([name for name in (picture, mask, map) if name])
    there = {
        name: pictures.data.column(name).is_valid().to_pylist() if name else [False] * count for name in (mask, map)
    }
    wanted: Sequence[int] = range(count)
    if kind == "imagefolder" and (apart := others(Path(place), reading.without)):
        wanted = [i for i, cell in enumerate(pictures[picture]) if not lies_in(Path(cell["path"]).resolve(), apart)]
    return [
        DatasetRow(
            pictures,
            i,
            picture,
            _captions(texts[i], reading.caption),
            place,
            mask=mask if there[mask][i] else None,
            map=map if there[map][i] else None,
        )
        for i in wanted[: reading.limit]
    ]


def _captions(value: Any, caption: str | None) -> tuple[str, ...]:
    """A caption, a list of them, or a table that has one under a usual name. None of bytes that are not UTF-8."""
    if isinstance(value, dict):
        value = next((value[name] for name in TEXT_COLUMNS if value.get(name)), None)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return ()
    values = value if isinstance(value, list) else [value]
    found = spoken(text.removeprefix("\ufeff") for text in values if isinstance(text, str))
    return found or ((caption,) if caption else ())


# ---- streaming


def fetched_rows(place: str, kind: str | None, files: list[str], cache: Path, reading: Reading) -> Path:
    """The first rows of a dataset as a folder with metadata.jsonl. An interrupted one is continued."""
    if not reading.limit:
        raise UserError("streaming needs --limit, the number of pictures to take from the dataset")
    columns = {"picture": reading.picture_column, "text": reading.text_column}
    asked = "".join(f"-{what}-{name}" for what, name in columns.items() if name)
    name = re.sub(r"[^\w.-]", "_", f"{place}-{reading.split}-{reading.limit}{asked}")
    if kind in ("parquet", "webdataset"):  # others under the same names are other pictures
        name += "-" + hashlib.sha256("\n".join(file_mark(Path(file)) for file in files).encode()).hexdigest()[:16]
    folder = cache / f"stream-{name}"
    if (folder / "whole").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    metadata = folder / "metadata.jsonl"
    whole = metadata.read_bytes() if metadata.is_file() else b""
    whole = whole[: whole.rfind(b"\n") + 1]  # the last line may be cut short
    with written_whole(metadata) as unfinished:
        unfinished.write_bytes(whole)
    done = whole.count(b"\n")
    table, picture, text = _opened(place, kind, files, cache, reading, stream=True)
    mask, map, rows = _named(table, MASK_COLUMN), _named(table, MAP_COLUMN), table.skip(done).take(reading.limit - done)
    with open(metadata, "a", encoding="utf-8") as file:
        for number, row in enumerate(tqdm(_told(rows, place), "fetching pictures", leave=False, disable=None), done):
            line: dict[str, str | list[str]] = {"text": list(_captions(row[text] if text else None, None))}
            for key, column, end in (("file_name", picture, ""), ("mask", mask, ".mask"), ("cond", map, ".cond")):
                if cell := row.get(column):
                    name = f"{number:08d}{end}" + _ending(cell.get("path") or "")
                    line[key] = name
                    with suppress(FileNotFoundError):  # the scan says that it is missing
                        (folder / name).write_bytes(cell.get("bytes") or _fetched(cell["path"], number))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    (folder / "whole").touch()
    return folder


def _told(rows: Iterable[dict], place: str) -> Iterator[dict]:
    """The rows. UserError where they break off."""
    try:
        yield from rows
    except Exception as error:  # builders raise anything on damaged files
        raise UserError(_unreadable(place, error)) from error


def _ending(path: str) -> str:
    """A picture's file ending, as in its path or address."""
    ending = Path(path.partition("?")[0]).suffix.lower()
    return ending if ending in PICTURES else ".png"


def _fetched(path: str, number: int) -> bytes:
    """FileNotFoundError for a picture that is not there any more. UserError where it cannot be fetched now."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except Exception as error:  # each kind of place has its own
        if getattr(error, "status", 500) in GONE:
            raise FileNotFoundError(path) from error
        raise UserError(
            f"cannot fetch the picture of row {number + 1}, {shortened(path, 100)}: {said(error)}; "
            "run the same command again to go on from there"
        ) from error
