"""What is said of files that are no weights, or damaged ones."""

from pathlib import Path

from plainsd.errors import UserError

NOT_WEIGHTS = {  # first bytes of files that are no weights, and what to do
    b"version https://git-lfs": "is a Git LFS pointer and holds no weights; run `git lfs pull` there, or download it",
    b"gguf": "is a GGUF file, whose weights are quantised for other programs; give the model as .safetensors",
    b"<!doctype html": "is a web page, not a model; the download went wrong, or asks for a login: download it again",
    b"<html": "is a web page, not a model; the download went wrong, or asks for a login: download it again",
}


def check_kind(path: Path, head: bytes) -> None:
    """UserError for files that are neither safetensors nor PyTorch's, by their first bytes."""
    if what := next((what for begins, what in NOT_WEIGHTS.items() if head.lstrip().lower().startswith(begins)), None):
        raise UserError(f"{path} {what}")


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; download or save it again")
