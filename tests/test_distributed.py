"""Two processes equal one with the same global batch: gloo on the CPU, started as torchrun starts them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_sd
from safetensors.torch import load_file
from test_finetune import write_pictures

import plainsd
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.train.checkpoints import checkpoints
from plainsd.train.data.examples import Examples
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.pictures import read_pictures
from plainsd.train.job import TrainJob
from plainsd.train.log import read_log
from plainsd.train.loop import fit
from plainsd.train.methods.full import full
from plainsd.train.objective import NoisyLatents
from plainsd.train.options import FitOptions, Telling, TrainOptions, with_defaults, with_loss_defaults
from plainsd.train.processes import World, world_of_torchrun
from plainsd.train.trainer import Trainer

FAST = ["--device", "cpu", "--dtype", "float32", "--log-every", "1", "--save-dtype", "float32"]


def test_every_process_takes_its_share_of_a_step():
    picks = list(range(8))
    whole = [picks[:4], picks[4:]]
    assert [World(rank, 2).share(whole) for rank in (0, 1)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert [World(rank, 2).share([picks]) for rank in (0, 1)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert [World(rank, 4).share(whole) for rank in (0, 3)] == [[[0], [4]], [[3], [7]]]
    assert World().share(whole) == whole


def test_a_step_that_cannot_be_shared():
    World(0, 2).check(batch=1, accumulate=4)
    with pytest.raises(UserError, match="3 processes cannot share 4 micro-batches of 1"):
        World(0, 3).check(batch=1, accumulate=4)


@pytest.mark.parametrize(
    "world, more, says",
    [
        (World(0, 3), {}, "3 processes cannot share 4 micro-batches of 1"),
        (World(0, 2, sharded=True), {"save_results_every": 5}, "--shard keeps them in parts; leave out --save-results"),
        (World(0, 2, sharded=True), {"save_epochs": 5}, "--shard keeps them in parts; leave out --save-results"),
        (World(0, 2), {"save_epochs": 5}, None),
    ],
    ids=["share", "steps", "epochs", "whole"],
)
def test_what_several_processes_cannot_do_is_said_at_once(world, more, says):
    options = TrainOptions("full", ("x",), Path("y"), telling=Telling(**more))
    options = replace(options, pace=with_defaults("full", options.pace), loss=with_loss_defaults(options))
    with pytest.raises(UserError, match=says) if says else nullcontext():
        TrainJob(options, world, torch.float32).check_means()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    plainsd.save(tiny_sd(), folder / "base")
    write_pictures(folder / "pictures", count=6)
    (folder / "prompts.txt").write_text("colour 1\n")
    return folder


def started(arguments, processes, module=("-m", "plainsd"), own=()):
    """The command in as many processes, with the environment that torchrun gives them; `own`: arguments of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *module, *arguments]
    return [
        subprocess.Popen(
            [*command, *(own[rank] if own else ())],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from plainsd.train.loop import FitOptions, Trainer, fit
from plainsd.train.shard import gather, shard
from plainsd.train.processes import world_of_torchrun
from test_distributed import float64_method
with world_of_torchrun(torch.device("cpu"), shard={shard}) as world:
    method = float64_method({place!r})
    if world.sharded:
        shard(method.sd.unet)
    options = FitOptions(steps=3, batch={batch}, accumulate={accumulate}, lr=1e-3, warmup=0, ema=0.5)
    trainer = Trainer(method, options, world)
    losses = [report.loss for report in fit(method, 6, options, trainer=trainer)]
    with trainer.ema:
        gather(method.sd.unet)
        if world.first:
            torch.save([losses, method.sd.unet.state_dict()], {out!r})
"""


def float64_method(place):
    """Full training of a UNet in double precision, where rounding does not tell one process from two. The first weights
    come from a file: `tiny_sd` scales them by norms, whose last digits depend on the number of threads."""
    sd = plainsd.load(Path(place) / "base", device="cpu", dtype="float32").to(dtype=torch.float64)
    pictures = read_pictures(Path(place) / "pictures", 64)
    vae = plainsd.load(Path(place) / "base", device="cpu", dtype="float32").vae
    examples = Examples(pictures, cache_latents(vae, pictures, Path(place) / "cache"))

    class Wide:
        def draw(self, *arguments):
            batch = examples.draw(*arguments)
            return batch._replace(x0=batch.x0.double(), noise=NoisyLatents(*(noise.double() for noise in batch.noise)))

    return full(sd, Wide())


@pytest.mark.parametrize("batch, accumulate, shard", [(4, 1, False), (1, 4, False), (2, 2, True)])
def test_two_processes_make_the_same_steps_as_one(place, tmp_path, batch, accumulate, shard):
    script = SCRIPT.format(
        tests=os.path.dirname(__file__),
        place=str(place),
        batch=batch,
        accumulate=accumulate,
        shard=shard,
        out=str(tmp_path / "two.pt"),
    )
    codes, outputs = finished(started(["-c", script], 2, module=()))
    assert codes == [0, 0], outputs
    losses, weights = torch.load(tmp_path / "two.pt", weights_only=True)
    method = float64_method(place)
    options = FitOptions(steps=3, batch=4, lr=1e-3, warmup=0, ema=0.5)
    trainer = Trainer(method, options)
    assert [report.loss for report in fit(method, 6, options, trainer=trainer)] == pytest.approx(losses, rel=1e-12)
    with trainer.ema:
        for name, tensor in method.sd.unet.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-9)


def finished(runs):
    outputs = [run.communicate(timeout=900) for run in runs]
    return [run.returncode for run in runs], outputs


@pytest.mark.parametrize(
    "method, batch, more",
    [
        ("lora", (1, 4), ["--text-encoder"]),
        ("lora", (2, 2), ["--shard", "--text-encoder", "--checkpointing"]),
        ("full", (4, 1), ["--shard", "--text-encoder"]),
    ],
)
def test_the_command_on_two_processes(place, tmp_path, method, batch, more):
    arguments = [
        "train",
        "--method",
        method,
        "--base",
        str(place / "base"),
        "--data",
        str(place / "pictures"),
        "--heldout",
        str(place / "pictures"),
        "--prompts",
        str(place / "prompts.txt"),
        "--steps",
        "3",
        "--lr",
        "1e-4",
        "--batch",
        str(batch[0]),
        "--accumulate",
        str(batch[1]),
        *FAST,
    ]
    if "--shard" in more:  # in two parts; the second goes on from the first
        codes, outputs = finished(started([*arguments, *more, "--save-every", "2", "--out", str(tmp_path / "two")], 2))
        assert codes == [0, 0], outputs
        last = checkpoints(tmp_path / "two" / "checkpoints")[-1]
        assert not (last / "state.pt").exists() and ".metadata" in json.loads((last / "sums-0.json").read_text())
        shutil.rmtree(last)
    codes, outputs = finished(started([*arguments, *more, "--save-every", "2", "--out", str(tmp_path / "two")], 2))
    assert codes == [0, 0], outputs
    assert outputs[1][0] == ""  # the second process says nothing
    assert main([*arguments, *(option for option in more if option != "--shard"), "--out", str(tmp_path / "one")]) == 0
    for a, b in zip(results(tmp_path / "one"), results(tmp_path / "two"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-4 if method == "full" else 1e-5)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for name in {"step", "loss", "validation", "grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.parametrize("shard", [False, True])
def test_machines_with_folders_of_their_own_say_so(place, tmp_path, shard):
    """Where the states are plain files, as soon as a run goes on; where each process writes its part, at the first."""
    pictures = ["--base", str(place / "base"), "--data", str(place / "pictures"), "--method", "full"]
    arguments = ["train", *pictures, "--steps", "3", "--save-every", "2", *FAST, *(["--shard"] if shard else [])]
    own = [["--out", str(tmp_path / name)] for name in "ab"]
    if not shard:
        codes, outputs = finished(started([*arguments, *own[0]], 2))
        assert codes == [0, 0], outputs
        shutil.rmtree(checkpoints(tmp_path / "a" / "checkpoints")[-1])
    codes, outputs = finished(started(arguments, 2, own=own))
    assert 0 not in codes
    says = "has not all processes' parts" if shard else "the processes resume from different states"
    assert says in outputs[0][1]
    assert len(checkpoints(tmp_path / "a" / "checkpoints")) == (0 if shard else 1)


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with (
        pytest.raises(UserError, match="3 or more processes on a machine with 2 GPUs"),
        world_of_torchrun(torch.device("cuda")),
    ):
        pass


def results(out):
    """What a run has made: all tensors of the model or the LoRA."""
    files = sorted([*out.glob(f"{out.name}/*/*.safetensors"), *out.glob("*.safetensors")])
    assert files
    return [tensor for file in files for _, tensor in sorted(load_file(file).items())]


def test_sharding_needs_several_processes(place, tmp_path, capsys):
    assert (
        main(
            [
                "train",
                "--method",
                "full",
                "--base",
                str(place / "base"),
                "--data",
                str(place / "pictures"),
                "--out",
                str(tmp_path),
                "--shard",
            ]
        )
        == 2
    )
    assert "start them with torchrun" in capsys.readouterr().err
