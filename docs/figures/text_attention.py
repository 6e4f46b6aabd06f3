"""What each token of a prompt looks at: the four heads of the embedded text encoder's second layer."""

import style
import torch

import plainsd

PROMPT, LAYER = "a red apple on a blue background", 1


def draw() -> str:
    sd = plainsd.load(device="cpu", dtype="float32")
    tokenizer, encoder = sd.tokenizers[0], sd.text_encoders[0]
    words = ["start", *PROMPT.split(), "end"]
    ids = torch.tensor([[tokenizer.start, *tokenizer.encode(PROMPT), tokenizer.end]])
    attention, seen = encoder.blocks[LAYER].attn, []
    hook = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        encoder(ids)
        hook.remove()
        q, k = (
            part(seen[0]).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (attention.q, attention.k)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        maps = (scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)).softmax(-1)[0].numpy()
    figure, axes = style.panels(1, 4, 2.5, left=0.11, right=0.99, bottom=0.24, top=0.9, wspace=0.06)
    for head, one in enumerate(axes.flat):
        one.imshow(maps[head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        one.set_title(f"head {head + 1}")
        one.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        one.set_yticks(range(len(words)), words if head == 0 else [], fontsize=7)
        one.grid(False)
        one.tick_params(length=0)
    return style.svg(figure, "Attention weights of four heads: a row is a token that looks, a column one looked at")


if __name__ == "__main__":
    style.write(__file__, draw())
