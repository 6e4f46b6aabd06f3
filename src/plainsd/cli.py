"""The `plainsd` command: finds the sub-command, reads its flags, and turns errors into one line and an exit code.

0 done; 1 from verify: something differs, and from train: the disk is full; 2 wrong input, an unreadable or an
unwritable file; 130 interrupted; 141 when stdout is closed, as after `plainsd ... | head`. PLAINSD_DEBUG=1 shows the
traceback.

A sub-command is a dataclass with a `run()` that returns an exit code, or None for 0. It is imported only when called,
and imports torch only in `run()`, so that help is instant.
"""

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from plainsd import __version__
from plainsd.commands.parsing import parsed
from plainsd.errors import UserError, unknown

COMMANDS = {                          # name: module, class, what it does
    "generate": ("plainsd.commands.generate", "Generate", "generate pictures from a prompt and, if given, a picture"),
    "info": ("plainsd.commands.inspect", "Info", "show what a model or adapter is, without reading its weights"),
    "convert": ("plainsd.commands.inspect", "Convert", "convert a model from one file layout to another"),
    "merge": ("plainsd.commands.merge", "Merge", "merge two or three models into one"),
    "extract-lora": ("plainsd.commands.merge", "ExtractLora", "extract a LoRA from a fine-tuned model and its base"),
    "upscale": ("plainsd.commands.upscale", "Upscale", "enlarge pictures with an ESRGAN-type upscaler"),
    "tokens": ("plainsd.commands.inspect", "Tokens", "show a prompt's tokens, chunks and weights"),
    "explain": ("plainsd.commands.explain", "Explain", "write an HTML page that shows how a picture was generated"),
    "verify": ("plainsd.commands.inspect", "Verify", "compare a model numerically with diffusers and transformers"),
    "eval": ("plainsd.commands.evaluate", "Evaluate", "score pictures by CLIP, or a model trained on emoji"),
    "embed": ("plainsd.commands.embed", "Embed", "CLIP embeddings of pictures, and near-duplicates among them"),
    "train": ("plainsd.commands.train", "Train", "train a model, from scratch or from another"),
    "bench": ("plainsd.commands.bench", "Bench", "compare speed with diffusers and OpenVINO on this machine"),
    "serve": ("plainsd.commands.serve", "Serve", "serve a web page and three HTTP APIs"),
}  # fmt: skip
HELP = ("-h", "--help")
KEEPS_MEMORY = ("generate", "upscale", "explain", "eval", "train", "serve")  # gain from keeping freed memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *args, **kwargs: print(f"plainsd: {message}", file=sys.stderr)
        try:
            code = exit_code(lambda: run(arguments))
            sys.stdout.flush()  # a closed pipe shows here, not when Python exits
            return code
        except BrokenPipeError:
            return broken_pipe()


def entry() -> int:
    """`main` of a process that ends then: without a last search for reference cycles, which takes torch 0.3 s."""
    code = main()
    gc.freeze()
    return code


def exit_code(action: Callable[[], int | None], program: str = "plainsd") -> int:
    """What `action` returns, or the code of its error, which becomes one line that begins with `program`."""
    try:
        return action() or 0
    except UserError as error:
        return complain(str(error), program)
    except BrokenPipeError:
        raise
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        return complain(f"{path}{error.strerror or error}; choose another path, or free disk space", program)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def broken_pipe() -> int:
    """Exit code when stdout is a closed pipe. Discards what is still buffered, so that no further write fails."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(devnull, stream.fileno())
    return 141  # 128 + SIGPIPE, by convention


def complain(message: str, program: str) -> int:
    if os.environ.get("PLAINSD_DEBUG") == "1":
        traceback.print_exc()
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def run(arguments: list[str]) -> int | None:
    name, *rest = arguments or ["--help"]
    if name in HELP:
        print(overview())
        return 0
    if name == "--version":
        print(f"plainsd {__version__}")
        return 0
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    module, kind, _ = COMMANDS[name]
    kind = getattr(import_module(module), kind)
    if name == "train":
        from plainsd.train.config import with_config

        rest = with_config(rest, kind)
    if name in ("generate", "serve") and "--fast" in rest:
        print("note: --fast is the default now, and --plain turns it off; leave --fast out", file=sys.stderr)
        rest = [argument for argument in rest if argument != "--fast"]
    command = parsed(kind, name, rest)
    if command is None:
        return 0
    if name in KEEPS_MEMORY:
        from plainsd.allocator import keep_freed_memory

        keep_freed_memory()
    return command.run()


def overview() -> str:
    lines = ["usage: plainsd COMMAND ...", "", "Stable Diffusion in plain PyTorch.", "", "commands"]
    lines += [f"  {name:14}{summary}" for name, (_, _, summary) in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "plainsd COMMAND --help shows the flags of a command, plainsd --version the version."]
    )
