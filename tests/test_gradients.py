"""One step of fine-tuning equals the same step taken with diffusers, transformers and peft, in float64 to 1e-10."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_XL, tiny_sd
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import plainsd
from plainsd.adapters.lora import save_lora
from plainsd.diffusion.denoiser import min_snr_weight
from plainsd.files.folder import read_network
from plainsd.files.tensorfile import TensorFile, stored
from plainsd.speed.training import autocast
from plainsd.train.data.examples import ExampleBatch
from plainsd.train.gradient_checkpointing import checkpointing
from plainsd.train.methods.full import full
from plainsd.train.methods.inversion import inversion
from plainsd.train.methods.lora import lora
from plainsd.train.objective import NoisyLatents, Objective
from plainsd.train.options import FitOptions
from plainsd.train.order import Pick
from plainsd.train.trainer import Trainer

TOLERANCE = 1e-10
CAPTIONS = ["a red <cat>", "", "two apples"]
TIMESTEPS = torch.tensor([3, 512, 990])
SIZES = torch.tensor([[64.0, 80, 0, 8, 64, 64], [64, 64, 0, 0, 64, 64], [500, 300, 40, 0, 64, 64]])
OPTIONS = FitOptions(steps=1, batch=3, lr=1e-3, warmup=0, cosine=False, clip=0.5, ema=0)


OPTIONS_OF_INVERSION = replace(OPTIONS, weight_decay=0.0, clip=1e-3)


class Given:
    """Instead of examples drawn at random, these."""

    def __init__(self, captions=CAPTIONS):
        generator = torch.Generator().manual_seed(7)
        draw = lambda: torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)  # noqa: E731
        self.x0, noise = draw(), draw()
        self.batch = ExampleBatch(list(captions), TIMESTEPS, self.x0, NoisyLatents(noise, noise), None, SIZES)

    def draw(self, picks, steps, objective):
        return self.batch


def model(variant=TINY):
    return tiny_sd(variant).to(dtype=torch.float64)


def one_step(method, options=OPTIONS):
    """Our own step; the loss."""
    trainer = Trainer(method, options)
    loss, _, norm = trainer.update([Pick(i, i, torch.Generator()) for i in range(3)])
    assert norm > options.clip  # so that clipping takes part
    return loss


class Reference:
    """The same model in diffusers' and transformers' modules, and the step as their training scripts write it."""

    def __init__(self, sd, folder):
        plainsd.save(sd, folder)
        self.sd = sd
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float64)
        xl = sd.variant.unet.vector is not None
        kinds = [CLIPTextModel, CLIPTextModelWithProjection][: 1 + xl]
        names = ["text_encoder", "text_encoder_2"]
        self.encoders = [
            kind.from_pretrained(folder / name, torch_dtype=torch.float64)
            for kind, name in zip(kinds, names, strict=False)
        ]
        self.xl = xl
        for network in (self.unet, *self.encoders):
            network.requires_grad_(False)

    def ids(self, tokenizer, captions):
        rows = [[tokenizer.start, *tokenizer.encode(caption), tokenizer.end] for caption in captions]
        return torch.tensor([row + [tokenizer.pad] * (77 - len(row)) for row in rows])

    def conditions(self, captions):
        outputs = [
            encoder(self.ids(tokenizer, captions), output_hidden_states=True)
            for tokenizer, encoder in zip(self.sd.tokenizers, self.encoders, strict=True)
        ]
        if not self.xl:
            return {"encoder_hidden_states": outputs[0].last_hidden_state}
        said = torch.tensor([bool(caption) for caption in captions], dtype=torch.float64)
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1) * said[:, None, None]
        pooled = outputs[1].text_embeds * said[:, None]
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": SIZES}}

    def step(self, given, parameters, *, prediction="epsilon", weight=None, decay=0.01, clip=OPTIONS.clip):
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alpha_bar = torch.tensor(np.cumprod(1 - betas))[TIMESTEPS].view(-1, 1, 1, 1)
        noise = given.batch.noise.target
        noisy = alpha_bar.sqrt() * given.x0 + (1 - alpha_bar).sqrt() * noise
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * given.x0
        target = {"epsilon": noise, "v_prediction": velocity}[prediction]
        output = self.unet(noisy, TIMESTEPS, **self.conditions(given.batch.captions)).sample
        errors = (output - target).square().mean(dim=(1, 2, 3))
        loss = (errors * (1 if weight is None else weight)).mean()
        loss.backward()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.requires_grad_(False)
        parameters = [p for p in parameters if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, clip)
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        torch.optim.AdamW(groups, lr=OPTIONS.lr, betas=(0.9, 0.999), eps=1e-8).step()
        return loss.item()


def moved_over(network, reference, *, conv):
    """The reference's weights under our names."""
    tensors = {name: stored(tensor) for name, tensor in reference.state_dict().items()}
    stored_ones = TensorFile("reference", tensors, {})
    return read_network(stored_ones, type(network), network.config, conv=conv).build(torch.device("cpu"), torch.float64)


def assert_same(mine, theirs, before):
    """Equal after the step, and not because nothing moved."""
    assert mine.keys() == theirs.keys()
    assert max((mine[name] - before[name]).abs().max() for name in mine) > 0.5 * OPTIONS.lr
    assert max((mine[name] - theirs[name]).abs().max() for name in mine) < TOLERANCE


def weights(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_full(tmp_path, prediction):
    sd, given = model(), Given()
    sd.prediction = prediction
    reference, before = Reference(sd, tmp_path), weights(sd.unet)
    reference.unet.requires_grad_(True)
    loss = one_step(full(sd, given))
    theirs = reference.step(given, list(reference.unet.parameters()), prediction=prediction)
    assert loss == pytest.approx(theirs, rel=1e-12)
    assert_same(weights(sd.unet), weights(moved_over(sd.unet, reference.unet, conv=True)), before)


def test_full_with_min_snr(tmp_path):
    """Weights min(SNR, 5) / SNR, as diffusers' training scripts compute them for epsilon."""
    from diffusers.training_utils import compute_snr

    class Scheduler:
        alphas_cumprod = torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))

    snr = compute_snr(Scheduler, TIMESTEPS).double()
    weight = torch.minimum(snr, torch.full_like(snr, 5)) / snr
    ours = min_snr_weight("epsilon", Scheduler.alphas_cumprod[TIMESTEPS])
    torch.testing.assert_close(weight, ours, rtol=1e-6, atol=0)
    weight = min_snr_weight("epsilon", Scheduler.alphas_cumprod[TIMESTEPS])
    sd, given = model(), Given()
    reference, before = Reference(sd, tmp_path), weights(sd.unet)
    reference.unet.requires_grad_(True)
    one_step(full(sd, given, objective=Objective(min_snr=5.0)))
    reference.step(given, list(reference.unet.parameters()), weight=weight)
    assert_same(weights(sd.unet), weights(moved_over(sd.unet, reference.unet, conv=True)), before)


def test_full_sdxl_with_its_text_encoders(tmp_path):
    sd, given = model(TINY_XL), Given()
    reference = Reference(sd, tmp_path)
    before = [weights(network) for network in (sd.unet, *sd.text_encoders)]
    moving = [reference.unet, *reference.encoders]
    for network in moving:
        network.requires_grad_(True)
    one_step(full(sd, given, text_encoder=True))
    reference.step(given, [p for network in moving for p in network.parameters()])
    for mine, theirs, old in zip((sd.unet, *sd.text_encoders), moving, before, strict=True):
        assert_same(weights(mine), weights(moved_over(mine, theirs, conv=False)), old)


@pytest.mark.parametrize("kind", ["attention", "convolutions", "dora"])
def test_lora(tmp_path, kind):
    sd, given = model(), Given()
    reference = Reference(sd, tmp_path / "model")
    method = lora(sd, given, rank=3, alpha=6, conv=kind == "convolutions", dora=kind == "dora", seed=1)
    adapters = list(method.modules["lora"])
    with torch.no_grad():
        for adapter in adapters:  # else A gets no gradient in the first step
            adapter.up.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    save_lora(sd, tmp_path / "before.safetensors", "peft")
    state = unet_part(tmp_path / "before.safetensors")
    names = {name.split(".lora_")[0] for name in state}
    reference.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, use_dora=kind == "dora", target_modules=sorted(names)))
    reference.unet.to(torch.float64)
    set_peft_model_state_dict(reference.unet, state)
    one_step(method)
    reference.step(given, [p for p in reference.unet.parameters() if p.requires_grad])
    save_lora(sd, tmp_path / "after.safetensors", "peft")
    theirs = {name.removesuffix(".weight"): p for name, p in get_peft_model_state_dict(reference.unet).items()}
    mine = {name.removesuffix(".weight"): p for name, p in unet_part(tmp_path / "after.safetensors").items()}
    assert_same(mine, theirs, {name.removesuffix(".weight"): p for name, p in state.items()})


def unet_part(path):
    return {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}


def test_inversion(tmp_path):
    sd = model()
    reference = Reference(sd, tmp_path)
    given = Given(["a red <cat>", "<cat>", "two apples"])
    table = sd.text_encoders[0].token.weight.detach().clone()
    method = inversion(sd, given, "<cat>", vectors=2, initial="ox")
    embedding = reference.encoders[0].resize_token_embeddings(len(table) + 2)
    with torch.no_grad():
        embedding.weight[: len(table)] = table
        embedding.weight[len(table) :] = before = method.modules["words"][0].detach().clone()
    embedding.weight.requires_grad_(True)
    embedding.weight.register_hook(lambda grad: grad * (torch.arange(len(grad)) >= len(table))[:, None])
    one_step(method, OPTIONS_OF_INVERSION)
    reference.step(given, [embedding.weight], decay=0.0, clip=OPTIONS_OF_INVERSION.clip)
    assert_same(
        {"rows": method.modules["words"][0].detach()},
        {"rows": embedding.weight[len(table) :].detach()},
        {"rows": before},
    )
    assert torch.equal(sd.text_encoders[0].token.weight[: len(table)], table)


@pytest.mark.parametrize("arithmetic", ["plain", "float32", "bfloat16", "flash"])
@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=["sd1", "sdxl"])
def test_checkpointing_changes_no_gradient(variant, arithmetic):
    """In the trainer's arithmetic too, where attention is another function."""
    found = []
    for wanted in (False, True):
        sd = model(variant) if arithmetic == "plain" else tiny_sd(variant)
        given = Given()
        if arithmetic != "plain":
            noise = given.batch.noise.target.float()
            given.batch = given.batch._replace(x0=given.x0.float(), noise=NoisyLatents(noise, noise))
        method = full(sd, given)
        with ExitStack() as stack:
            stack.enter_context(checkpointing(sd.unet, wanted))
            if arithmetic != "plain":
                stack.enter_context(autocast("cpu", arithmetic == "bfloat16", long_attention=arithmetic == "flash"))
            method.loss([None] * 3)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in sd.unet.parameters()]))
    assert torch.equal(*found) and found[0].norm() > 0
    assert "forward" not in sd.unet.mid.__dict__
