"""The sheet of an X/Y grid, as it is checked before anything is drawn."""

from __future__ import annotations

from plainsd.pictures.images import sheet_layout
from plainsd.server.errors import APIError
from plainsd.server.jobs.job import Sheet
from plainsd.server.schema import JobRequest

SHEET_PIXELS = 178_956_970  # above it Pillow does not open a picture
LABEL = 40  # characters: a long one would widen all columns


def sheet_of(request: JobRequest) -> Sheet | None:
    if not request.grid:
        return None
    labels = [[short_label(f"{axis.name.replace('_', ' ')} {value}") for value in axis.values] for axis in request.grid]
    axes = [(axis.name, [str(value) for value in axis.values]) for axis in request.grid]
    return Sheet(labels[0], labels[1] if len(labels) > 1 else [], axes)


def short_label(text: str) -> str:
    return text if len(text) <= LABEL else f"{text[: LABEL - 3]}..."


def check_sheet(sheet: Sheet, sizes: list[tuple[int, int]]) -> None:
    """APIError if the sheet of pictures of these sizes could not be opened."""
    whole = sheet_layout(sizes, len(sheet.across), max(1, len(sheet.down)), sheet.across, sheet.down).size
    if whole[0] * whole[1] > SHEET_PIXELS:
        what = f"the sheet of this grid would have {whole[0]}x{whole[1]} pixels"
        why = f"at most {SHEET_PIXELS} can be opened, so ask for fewer or smaller pictures"
        raise APIError(422, f"{what}; {why}", "grid", list(whole))
