"""PEFT's settings: the rank and alpha of each module, and whatever else the tensors do not show.

PEFT writes them to `adapter_config.json` next to its `adapter_model`, diffusers into the file's metadata, each prefixed
with the network's name. A pattern in them is a regular expression for a module's name, or for its end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plainsd.adapters.patterns import BadPattern, Patterns
from plainsd.errors import UserError, shortened
from plainsd.files.tensorfile import TensorFile
from plainsd.files.unusable import damaged
from plainsd.json_reader import parsed_json

METADATA_KEY = "lora_adapter_metadata"  # in the metadata of diffusers' files: PEFT's settings, as JSON
SETTINGS_FILE = "adapter_config.json"  # in the folder of PEFT's adapter_model
OWN = "base_model.model."  # prefix of every name in PEFT's own files

MOST_PATTERNS = 5000  # one a module, of the largest models
PEFT_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")  # peft_type
PLAIN = ("gaussian", "eva", "orthogonal", "mica")  # initialisations that leave the base unchanged
AS_LOADED = ("pissa", "olora")  # initialisations from the base, which can be recomputed
UNSUPPORTED_SETTINGS = (  # settings that change the meaning of LoRA tensors
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
REMEDY = "merge it into its model with PEFT (merge_and_unload), save that, and load the model"


class PeftSettings:
    """The settings of one file; empty where it has none. beside: the file that holds them, if separate."""

    def __init__(self, file: TensorFile):
        """UserError for unsupported kinds that tensor names do not reveal."""
        self.path, self.patterns = file.path, Patterns()
        self.values: dict[str, Any] = {}
        self.beside: Path | None = None
        beside = file.path.parent / SETTINGS_FILE
        if METADATA_KEY in file.metadata:
            text = file.metadata[METADATA_KEY]
        elif beside.is_file() and (file.path.stem == "adapter_model" or any(OWN in name for name in file.tensors)):
            text, self.beside = beside.read_text("utf-8-sig", errors="replace"), beside
        else:
            return
        try:
            values = parsed_json(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise damaged(self.path, f"PEFT's settings ({METADATA_KEY} or {SETTINGS_FILE}) are not a JSON table")
        self.values = values
        for name, value in self.values.items():
            self._check(name.rpartition(".")[2], value)

    def _check(self, name: str, value: Any) -> None:
        if name == "peft_type" and value not in PEFT_TYPES:
            raise UserError(f"{self.path} is an adapter of a kind that is not supported, {value} of PEFT; {REMEDY}")
        if name in UNSUPPORTED_SETTINGS and value:
            raise UserError(f"{self.path} is a LoRA of a kind that is not supported, PEFT's {name}; {REMEDY}")
        if name == "init_lora_weights" and isinstance(value, str) and value.lower() not in (*PLAIN, *AS_LOADED):
            raise UserError(
                f"{self.path} is a LoRA that changes the model which it is put on, PEFT's init_lora_weights "
                f"{value!r}, and does not tell how; convert it with PEFT (path_initial_model_for_weight_conversion)"
            )

    def table(self, name: str) -> dict[str, Any]:
        """The settings for the network of module `name` (as in the file)."""
        return {key.removeprefix(f"{name.partition('.')[0]}."): value for key, value in self.values.items()}

    def of(self, name: str, pattern: str, *otherwise: str) -> Any:
        """The module's entry in `pattern`, or else the first of the other settings that is present."""
        table = self.table(name)
        exceptions = table.get(pattern) or {}
        if not isinstance(exceptions, dict):
            raise damaged(self.path, f"PEFT's settings have a {pattern} that is not a table")
        if len(exceptions) > MOST_PATTERNS:
            raise damaged(
                self.path, f"PEFT's settings have {len(exceptions)} patterns, at most {MOST_PATTERNS} are read"
            )
        for key, value in exceptions.items():
            if self.fits(key, name):
                return value
        return next((table[key] for key in otherwise if table.get(key) is not None), None)

    def rank(self, name: str) -> int | None:
        rank = self.of(name, "rank_pattern", "r")
        if not (rank is None or isinstance(rank, int) and rank > 0):
            raise damaged(self.path, f"PEFT's settings give {rank!r} as a rank")
        return rank

    def alpha(self, name: str, rank: int | None) -> float | None:
        """The alpha of a module of that rank, so that alpha / rank is the scale. None: not given."""
        alpha = self.of(name, "alpha_pattern", "lora_alpha", "alpha")  # the last for LoHa and LoKr
        if alpha is None:
            return None
        if not isinstance(alpha, int | float):
            raise damaged(self.path, f"PEFT's settings give {alpha!r} as an alpha")
        return float(alpha) * ((rank or 1) ** 0.5 if self.table(name).get("use_rslora") else 1.0)  # alpha / sqrt(r)

    def start(self, name: str) -> str | None:
        """The LoRA's initialisation, if it took a part of the base: "pissa" or "olora"."""
        value = self.table(name).get("init_lora_weights")
        return value.lower() if isinstance(value, str) and value.lower() in AS_LOADED else None

    def feedforward(self, name: str) -> bool:
        """Whether an IA3 multiplies the inputs of that module rather than its outputs."""
        modules = self.table(name).get("feedforward_modules")
        if modules is None:
            raise UserError(
                f"{self.path} is an IA3 that does not tell whether it multiplies inputs or outputs at {name!r}; put "
                f"the {SETTINGS_FILE} that came with it beside it"
            )
        if isinstance(modules, str):
            return self.fits(modules, name, behind=False)
        if not (isinstance(modules, list) and all(isinstance(ending, str) for ending in modules)):
            raise damaged(self.path, "PEFT's settings have feedforward_modules that are not a list of names")
        return any(one.endswith(ending) for one in module_names(name) for ending in modules)

    def fits(self, pattern: str, name: str, *, behind: bool = True) -> bool:
        """Whether a pattern fits a module's name; `behind`: or its end behind a point."""
        try:
            each = module_names(name)
            return any((self.patterns.fits_end if behind else self.patterns.fits)(pattern, one) for one in each)
        except BadPattern as error:
            what = shortened(pattern, 60)
            raise damaged(
                self.path, f"PEFT's settings have the pattern {what!r}, which cannot be read ({error})"
            ) from None


def module_names(name: str) -> set[str]:
    """A module's name within its network, with and without `text_model.`."""
    inner = re.sub(r"^(unet|text_encoder|text_encoder_2)\.", "", name)
    bare = inner.removeprefix("text_model.")
    return {inner, bare} | ({f"text_model.{bare}"} if bare.startswith(("encoder.", "embeddings.", "final_")) else set())


def start_of(weight: Tensor, kind: str, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, i) and B (o, r) whose product B A is the part of the base that initialised the LoRA: for PiSSA (Meng et al.
    2024, arXiv:2404.02948) the r largest singular values, for OLoRA (Buyukakyuz 2024, arXiv:2406.01775) the first r
    columns of the QR decomposition. In at least float32."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
