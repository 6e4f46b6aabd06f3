"""plainsd: Stable Diffusion, written plainly.

    import plainsd
    sd = plainsd.load()                                          # the embedded model
    pictures = plainsd.final(plainsd.text_to_image(sd, "a red apple", count=4))
    pictures[0].save("apple.png")

The names below are loaded when they are first used, so that `import plainsd` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "load": "checkpoint", "save": "checkpoint", "load_control": "checkpoint", "save_control": "checkpoint",
    "Control": "pictures.control", "ImagePrompt": "pictures.image_prompt", "load_image_prompt": "checkpoint",
    "StableDiffusion": "pictures.model", "text_to_image": "generate", "image_to_image": "generate",
    "inpaint": "generate", "outpaint": "generate", "final": "generate", "Pictures": "generate",
    "add_lora": "adapters.lora", "save_lora": "adapters.lora",
    "add_embedding": "adapters.embeddings", "save_embedding": "adapters.embeddings",
    "explain": "reports.explain",
    "Step": "diffusion.samplers", "Settings": "pictures.settings", "UserError": "errors",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'plainsd' has no attribute {name!r}")
    return getattr(import_module(f"plainsd.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
