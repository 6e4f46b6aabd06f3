"""Reads a state that was saved in parts (--shard) without running code of its files.

PyTorch's own reader takes any pickle as the table of parts, and any for what is no tensor. Here the table may name the
classes that it is made of, and nothing else.
"""

import pickle
import re
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

LARGEST_TABLE = 2**27  # bytes; about 60 for each part of a tensor
TABLE_NAMES = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(_MEM_FORMAT_ENCODING|BytesStorageMetadata|ChunkStorageMetadata"
    r"|Metadata|MetadataIndex|StorageMeta|TensorProperties|TensorStorageMetadata)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|torch\.Size|torch\.serialization\._get_layout|collections\.OrderedDict|pathlib(\._local)?\.(Posix|Windows)Path"
)


class TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if not TABLE_NAMES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"its table of parts asks for {module}.{name}, which could run code")
        return super().find_class(module, name)


def read_table(file: BinaryIO) -> Any:
    content = file.read(LARGEST_TABLE + 1)
    if len(content) > LARGEST_TABLE:
        raise pickle.UnpicklingError(f"its table of parts has more than {LARGEST_TABLE} bytes")
    return TableUnpickler(BytesIO(content)).load()


class SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **named: Any) -> Metadata:
        with open(Path(self._get_metadata_path(named.get("rank"))), "rb") as file:
            metadata = read_table(file)
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("its table of parts is none")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """A number, a text or the like, read as plain data before PyTorch reads it."""
        try:
            torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(f"its {read_item.dest_index.fqn!r} is no plain value") from error
        value.seek(0)
        super().load_bytes(read_item, value)
