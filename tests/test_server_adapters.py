"""Embeddings and refiners on the server: by name only, checked before queueing, each job with its own."""

import os
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_REFINER, TINY_XL, noise_picture, tiny_sd
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import Brake, alike, base64_of, embedding_file, lora_file, model_folder, open_service, served, until
from test_control_pictures import tiny_net
from webuiapi import WebUIApi

import plainsd
from plainsd.files.hashes import file_hash, weights_hash
from plainsd.pictures.control import Control
from plainsd.pictures.images import read_settings
from plainsd.server.embeddings import Embeddings
from plainsd.server.folders import read_cached


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (words := folder / "words" / "sub").mkdir(parents=True)
    embedding_file(words / "fluffy-one.safetensors", 1)
    embedding_file(words.parent / "cat.safetensors", 2, "<cat>")
    embedding_file(words.parent / "wide.safetensors", 3, width=48)
    embedding_file(words.parent / "a, b.safetensors", 4)
    embedding_file(words.parent / "x.safetensors", 5)  # a letter, which the vocabulary has
    (words / "broken.safetensors").write_bytes(b"no such thing")
    (words / "pickle.pt").write_bytes(b"")
    lora_file(model_folder(folder), words / "lora.safetensors", 1)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    models = [
        model_folder(folder), model_folder(folder, "other", 1),
        model_folder(folder, "base", 2, TINY_XL), model_folder(folder, "refiner", 3, TINY_REFINER),
    ]  # fmt: skip
    (loras := folder / "loras").mkdir()
    lora_file(models[0], loras / "paper.safetensors", 1)
    service = open_service(models, tmp_path_factory.mktemp("data"), loras=loras, embeddings=folder / "words")
    with served(service) as server:
        yield server


def refused(server, **body):
    answer = server.post("/api/jobs", {"prompt": "p"} | body)
    error = answer.json()["error"]
    assert "\n" not in error["message"]
    return answer.status_code, error["field"], error["message"]


def picture_of(server, **body):
    job = server.drawn(**({"seed": 3, "steps": 3} | body))
    return server.picture(job["images"][0]), server.get(f"/api/images/{job['images'][0]}").json()


def picture_file(server, told):
    return BytesIO(server.get(told["url"]).content)


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_a_word_in_a_prompt_is_used_and_only_there(server, folder):
    plain, told = picture_of(server, prompt="a drawing of a cat")
    assert told["settings"]["embeddings"] == []
    words = {"<cat>": "cat.safetensors", "fluffy-one": "sub/fluffy-one.safetensors"}
    for prompt, negative, used in (
        ("a drawing of <cat>", "", ["<cat>"]), ("a Fluffy-One", "blue", ["fluffy-one"]), ("a", "<cat>", ["<cat>"]),
        ("a not-fluffy-ones thing", "", []), ("fluffy-one, <cat>", "", ["<cat>", "fluffy-one"]),
    ):  # fmt: skip
        picture, told = picture_of(server, prompt=prompt, negative=negative, guidance=4)
        assert told["settings"]["embeddings"] == used == list(read_settings(picture_file(server, told)).embeddings)
        sd = plainsd.load(model_folder(folder), device="cpu", dtype="float32")
        for word in used:
            plainsd.add_embedding(sd, folder / "words" / words[word], word)
        again = plainsd.text_to_image(sd, prompt, negative, seed=3, steps=3, guidance=4)
        assert alike(picture, plainsd.final(again)[0])
        untaught = plainsd.load(model_folder(folder), device="cpu", dtype="float32")
        same = plainsd.final(plainsd.text_to_image(untaught, prompt, negative, seed=3, steps=3, guidance=4))[0]
        assert alike(picture, same) == (not used)
    assert alike(picture_of(server, prompt="a drawing of a cat")[0], plain, 0)  # the model has forgotten them


def test_a_picture_names_its_weights(server, folder):
    _, told = picture_of(server, prompt="<cat> on a mat", loras=[{"name": "paper", "strength": 0.5}])
    hashes = dict(read_settings(picture_file(server, told)).hashes)
    assert hashes.keys() == {"model", "lora:paper", "embed:<cat>"}
    assert hashes["model"] == weights_hash(Path(model_folder(folder)), "unet")
    models = {row["title"]: row["hash"] for row in server.get("/sdapi/v1/sd-models").json()}
    assert hashes["model"] in models.values()


# --- files that change -----------------------------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path):
    """A server whose files may be overwritten, and its folder."""
    model = model_folder(tmp_path)
    for place in ("loras", "words", "nets", "upscalers"):
        (tmp_path / place).mkdir()
    lora_file(model, tmp_path / "loras" / "ink.safetensors", 0)
    plainsd.save_control(tiny_net(tiny_sd()), tmp_path / "nets" / "edges.safetensors")
    service = open_service(
        [model], tmp_path / "data", loras=tmp_path / "loras", embeddings=tmp_path / "words", controls=tmp_path / "nets"
    )
    with served(service) as server:
        yield server, tmp_path


@pytest.mark.parametrize("what", ["lora", "control", "model"])
def test_a_file_that_was_replaced_is_read_again(changing, what):
    """Otherwise a picture is the old file's, and its text has the hash of the new one."""
    server, folder = changing
    ask: dict = {"prompt": "a boat"}
    if what == "lora":
        ask["loras"] = [{"name": "ink", "strength": 1}]
    elif what == "control":
        ask["controls"] = [{"name": "edges", "image": base64_of(noise_picture(64, 64))}]
    before, _ = picture_of(server, **ask)
    assert alike(before, picture_of(server, **ask)[0], 0)
    if what == "lora":
        lora_file(folder / "tiny", folder / "loras" / "ink.safetensors", 5)
    elif what == "control":
        plainsd.save_control(tiny_net(tiny_sd(), 1), folder / "nets" / "edges.safetensors")
    else:
        plainsd.save(tiny_sd(seed=7), folder / "tiny")
    after, told = picture_of(server, **ask)
    assert not alike(before, after)
    hashes = dict(read_settings(picture_file(server, told)).hashes)
    sd = plainsd.load(folder / "tiny", device="cpu", dtype="float32")
    if what == "lora":
        plainsd.add_lora(sd, folder / "loras" / "ink.safetensors")
    net = plainsd.load_control(folder / "nets" / "edges.safetensors", sd)
    more = {"control": [Control(net, noise_picture(64, 64))]} if what == "control" else {}
    assert alike(after, plainsd.final(plainsd.text_to_image(sd, "a boat", seed=3, steps=3, **more))[0])
    assert hashes["model"] == weights_hash(folder / "tiny", "unet")
    (folder / "tiny").rename(folder / "gone")
    assert alike(after, picture_of(server, **ask)[0], 0)  # what is in memory draws on


def test_a_model_that_is_still_being_copied_holds_nothing_up(changing, caplog):
    """What is in memory draws on, until the whole file is there."""
    server, folder = changing
    before, _ = picture_of(server, prompt="a boat")
    plainsd.save(tiny_sd(seed=7), folder / "new")
    (part,) = (folder / "tiny" / "unet").glob("*.safetensors")
    content = (folder / "new" / "unet" / part.name).read_bytes()
    for length in (0, 1000, len(content) // 2):
        part.write_bytes(content[:length])
        assert alike(before, picture_of(server, prompt="a boat")[0], 0)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "model tiny was changed on disk and cannot be read"
    ]
    part.write_bytes(content)
    after, told = picture_of(server, prompt="a boat")
    assert not alike(before, after)
    hashes = dict(read_settings(picture_file(server, told)).hashes)
    assert hashes["model"] == weights_hash(folder / "new", "unet")


@pytest.mark.parametrize("kind", ["deleted", "replaced"])
def test_a_picture_has_the_hashes_of_what_drew_it(changing, monkeypatch, kind):
    server, folder = changing
    brake = Brake(monkeypatch)
    embedding_file(folder / "words" / "cat.safetensors", 1)
    files = [folder / "loras" / "ink.safetensors", folder / "words" / "cat.safetensors"]
    expected = [file_hash(files[0], tensors_only=True)[:12], file_hash(files[1])[:12]]
    job = server.job(prompt="a cat", loras=[{"name": "ink"}], steps=2, seed=1)
    brake.wait()
    for file in files:
        file.unlink() if kind == "deleted" else save_file({"other": torch.zeros(1)}, file)
    brake.off()
    done = server.wait(job["id"])
    assert done["state"] == "done", done
    told = server.get(f"/api/images/{done['images'][0]}").json()
    hashes = dict(read_settings(picture_file(server, told)).hashes)
    assert [hashes["lora:ink"], hashes["embed:cat"]] == expected


def test_a_word_goes_before_the_name_of_another_file(tmp_path):
    embedding_file(tmp_path / "cat.safetensors", 1, "<kitty>")
    embedding_file(tmp_path / "fox.safetensors", 2, "<wolf>")
    embedding_file(tmp_path / "z.safetensors", 3, "cat")
    words = Embeddings(tmp_path)
    found = {wanted: words.get(wanted).name for wanted in ("cat", "Cat", "<KITTY>", "z", "Fox")}
    assert found == {"cat": "z", "Cat": "z", "<KITTY>": "cat", "z": "z", "Fox": "fox"}


def test_words_that_a_lora_brings_along_go_with_it(changing):
    server, folder = changing
    for name, count in (("cat", 2), ("cat3", 3)):
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        none = {f"{key}.lora_down.weight": torch.zeros(4, 32), f"{key}.lora_up.weight": torch.zeros(32, 4)}
        rows = torch.randn(count, 32, generator=torch.Generator().manual_seed(count)) * 3
        save_file(none | {"bundle_emb.<mycat>.clip_l": rows}, folder / "loras" / f"{name}.safetensors")
    plain, _ = picture_of(server, prompt="a <mycat>")
    two, _ = picture_of(server, prompt="a <mycat>", loras=[{"name": "cat"}])
    assert not alike(plain, two)
    assert alike(picture_of(server, prompt="a <mycat>")[0], plain, 0)
    three, _ = picture_of(server, prompt="a <mycat>", loras=[{"name": "cat3"}, {"name": "ink"}])
    assert not alike(three, two)
    assert alike(picture_of(server, prompt="a <mycat>", loras=[{"name": "cat"}])[0], two, 0)
    embedding_file(folder / "words" / "own.safetensors", 9, "<mycat>")
    own, told = picture_of(server, prompt="a <mycat>")
    assert told["settings"]["embeddings"] == ["<mycat>"] and not alike(own, two)
    (folder / "words" / "own.safetensors").unlink()
    assert alike(picture_of(server, prompt="a <mycat>")[0], plain, 0)


def test_another_autoencoder_for_all_models(folder, tmp_path):
    plainsd.save(tiny_sd(seed=5), tmp_path / "whole.safetensors")
    service = open_service([model_folder(folder)], tmp_path / "data", vae=tmp_path / "whole.safetensors")
    with served(service) as server:
        image, told = picture_of(server, prompt="a")
    sd = plainsd.load(model_folder(folder), vae=tmp_path / "whole.safetensors", device="cpu", dtype="float32")
    assert alike(image, plainsd.final(plainsd.text_to_image(sd, "a", seed=3, steps=3))[0])
    assert "VAE: whole.safetensors" in image.info["parameters"]
    assert weights_hash(tmp_path / "whole.safetensors", "vae") in str(told)


def test_an_autoencoder_from_the_hub_hides_no_change_of_a_model(folder, tmp_path, monkeypatch):
    """Its id is no path whose time could be looked at."""
    plainsd.save(tiny_sd(seed=5), tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / "snapshot"))
    with served(open_service([model_folder(folder)], tmp_path / "data", vae=Path("somebody/model"))) as server:
        before, told = picture_of(server, prompt="a")
        assert "VAE: model" in before.info["parameters"]
        plainsd.save(tiny_sd(seed=6), model_folder(folder))
        assert not alike(picture_of(server, prompt="a")[0], before)


def test_words_together_with_a_lora(server, folder):
    picture, told = picture_of(server, prompt="<cat> <lora:paper:0.8>")
    sd = plainsd.load(model_folder(folder), device="cpu", dtype="float32",
                      loras=[(folder / "loras" / "paper.safetensors", 0.8)])  # fmt: skip
    plainsd.add_embedding(sd, folder / "words" / "cat.safetensors")
    assert alike(picture, plainsd.final(plainsd.text_to_image(sd, "<cat>", seed=3, steps=3))[0])
    assert told["settings"]["embeddings"] == ["<cat>"] and told["loras"] == [{"name": "paper", "strength": 0.8}]


def test_what_the_history_tells_of_words_makes_the_picture_again(server):
    picture, told = picture_of(server, prompt="two <cat>")
    wanted = {name: value for name, value in told["settings"].items() if value is not None}
    assert wanted["embeddings"] == ["<cat>"] and alike(picture_of(server, **wanted)[0], picture, 0)


def test_loras_by_their_trainers_names(folder, tmp_path):
    """As A1111 does by default; an unclear name is none."""
    names = {"paper": "", "epoch1": "ink", "epoch2": "ink", "v3": "chalk", "v4": "paper", "v5": "a:b", "a:b": "wool"}
    for name, alias in names.items():
        lora_file(model_folder(folder), tmp_path / "it.safetensors", len(name))
        save_file(load_file(tmp_path / "it.safetensors"), tmp_path / f"{name}.safetensors",
                  {"ss_output_name": alias} if alias else None)  # fmt: skip
    (tmp_path / "it.safetensors").unlink()
    with served(open_service([model_folder(folder)], tmp_path / "data", loras=tmp_path)) as server:
        told = {row["name"]: row["alias"] for row in server.get("/sdapi/v1/loras").json()}
        assert told == {name: "chalk" if name == "v3" else name for name in names if name != "a:b"}
        loras = server.service.models.loras
        assert loras.path("chalk") == tmp_path / "v3.safetensors" and "a:b" in loras.unusable
        assert loras.path("paper") == tmp_path / "paper.safetensors"  # a file's own name comes first
        by_alias, told = picture_of(server, prompt="a boat <lora:chalk:0.8>")
        assert alike(by_alias, picture_of(server, prompt="a boat <lora:v3:0.8>")[0], 0)
        assert read_settings(picture_file(server, told)).prompt == "a boat <lora:chalk:0.8>"
        assert refused(server, prompt="a boat <lora:ink:1>") == (
            422, "loras", "loras: 2 LoRAs are called 'ink'; name one by its file: epoch1, epoch2"
        )  # fmt: skip


def test_folders_of_loras_by_their_names(folder, tmp_path):
    """As diffusers and PEFT save them, and as on the command line; nothing hides anything else."""
    places = {"ink": "ink/pytorch_lora_weights", "wool": "sets/wool/adapter_model", "v1.5": "v1.5/adapter_model",
              "chalk": "chalk", "chalk/adapter_model": "chalk/adapter_model",
              "twice/adapter_model": "twice/adapter_model", "pytorch_lora_weights": "pytorch_lora_weights",
              "twice/pytorch_lora_weights": "twice/pytorch_lora_weights"}  # fmt: skip
    for number, place in enumerate(places.values()):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        lora_file(model_folder(folder), tmp_path / f"{place}.safetensors", number)
    with served(open_service([model_folder(folder)], tmp_path / "data", loras=tmp_path)) as server:
        loras = server.service.models.loras
        first = {name: tmp_path / f"{place}.safetensors" for name, place in places.items()}
        clear = [name for name in first if name.rpartition("/")[2] not in ("adapter_model", "pytorch_lora_weights")]
        assert {name: loras.known()[name] for name in clear} == {name: first[name] for name in clear}
        assert sorted(loras.known().values()) == sorted(first.values())
        assert {row["name"]: row["alias"] for row in server.get("/sdapi/v1/loras").json()} == {
            name: name for name in loras.known()
        }
        by_name, told = picture_of(server, prompt="a boat <lora:ink:0.8>")
        assert read_settings(picture_file(server, told)).prompt == "a boat <lora:ink:0.8>"
        first["ink"].rename(tmp_path / "other.safetensors")
        assert alike(by_name, picture_of(server, prompt="a boat <lora:other:0.8>")[0], 0)


def test_a_lora_of_a_folder_by_its_files_name(folder, tmp_path):
    """As pictures that were drawn before have it."""
    (tmp_path / "ink").mkdir()
    lora_file(model_folder(folder), tmp_path / "ink" / "pytorch_lora_weights.safetensors", 1)
    with served(open_service([model_folder(folder)], tmp_path / "data", loras=tmp_path)) as server:
        loras = server.service.models.loras
        assert loras.path("pytorch_lora_weights") == loras.path("ink") == loras.known()["ink"]
        assert loras.aliases() == {"ink": "ink"}


@pytest.mark.parametrize(("names", "says"), [
    (["dog"], "unknown embedding 'dog'; choose from"), (["../cat"], "unknown embedding"),
    (["/etc/passwd"], "unknown embedding"), (["wide"], "vectors of 48 numbers"), (["pickle"], "unknown embedding"),
    (["broken"], "'broken' cannot be used"), (["lora"], "'lora' cannot be used"),
    (["x"], "is a word of this model already"),
    (["a, b"], "cannot be written in a prompt"),
])  # fmt: skip
def test_a_word_that_is_not_there_or_does_not_fit_is_refused(server, names, says):
    answer = server.post("/api/jobs", {"prompt": "p", "embeddings": names})
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (422, "embeddings") and says in error["message"]
    assert str(server.service.models.embeddings.folder) not in error["message"]
    assert not server.get("/api/jobs").json()["active"]


def test_words_are_told_for_each_model(server):
    told = {model["name"]: model["embeddings"] for model in server.get("/api/models").json()["models"]}
    assert told["tiny"] == told["other"] == ["<cat>", "fluffy-one"] and told["base"] == []
    api = WebUIApi(port=int(server.url.rpartition(":")[2]))
    listed = api.get_embeddings()
    assert listed["loaded"].keys() == {"<cat>", "fluffy-one"} and listed["skipped"].keys() == {"wide", "x"}
    assert listed["loaded"]["<cat>"] == {
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "shape": 32,
        "vectors": 2,
    }
    assert server.post("/sdapi/v1/refresh-embeddings").status_code == 200


def test_a_file_that_comes_later_is_a_word_and_one_that_went_is_none(server, folder):
    path = folder / "words" / "late.safetensors"
    before, _ = picture_of(server, prompt="late light")
    embedding_file(path, 7)
    first, told = picture_of(server, prompt="late light")
    assert told["settings"]["embeddings"] == ["late"] and not alike(first, before)
    time.sleep(0.01)
    embedding_file(path, 8)
    second, _ = picture_of(server, prompt="late light")
    assert not alike(second, first)
    path.unlink()
    assert alike(picture_of(server, prompt="late light")[0], before, 0)


def test_without_a_folder_there_are_none(folder, tmp_path):
    with served(open_service([model_folder(folder)], tmp_path)) as server:
        assert "start the server with --embeddings FOLDER" in refused(server, embeddings=["<cat>"])[2]
        assert picture_of(server, prompt="<cat>")[1]["settings"]["embeddings"] == []


# --- refiners --------------------------------------------------------------------------------------------------------


def refined(folder, prompt, model="base", refiner="refiner", **more):
    sd, sd.refiner = (
        (sd := plainsd.load(folder / model, device="cpu", dtype="float32")),
        plainsd.load(folder / refiner, device="cpu", dtype="float32"),
    )
    return plainsd.final(plainsd.text_to_image(sd, prompt, seed=3, **more))[0]


@pytest.mark.filterwarnings("ignore")
def test_a_refiner_draws_the_last_part(server, folder):
    wanted = {"prompt": "a boat", "model": "base", "size": [32, 32], "steps": 4, "seed": 3}
    plain, told = picture_of(server, **wanted)
    assert told["settings"]["refiner"] is None
    picture, told = picture_of(server, **wanted, refiner="refiner", handover=0.6)
    assert (told["settings"]["refiner"], told["settings"]["handover"]) == ("refiner", 0.6)
    assert "Refiner: refiner, Refiner switch at: 0.6" in told["parameters"]
    assert alike(picture, refined(folder, "a boat", size=(32, 32), steps=4, handover=0.6))
    assert not alike(picture, plain)
    again = {name: value for name, value in told["settings"].items() if value is not None}
    assert alike(picture_of(server, **again)[0], picture, 0)
    assert picture_of(server, **wanted, refiner="refiner")[1]["settings"]["handover"] == 0.8
    assert alike(picture_of(server, **wanted)[0], plain, 0)


def test_a_model_with_a_lora_and_another_to_refine_it(server, folder):
    picture, _ = picture_of(server, prompt="a boat <lora:paper:1>", refiner="other", handover=0.5, steps=4)
    swapped, _ = picture_of(server, prompt="a boat", model="other", refiner="tiny", handover=0.5, steps=4)
    assert alike(swapped, refined(folder, "a boat", "other", "tiny", steps=4, handover=0.5))  # no LoRA is left
    assert not alike(picture, swapped)


def test_words_and_refiners_in_one_batch_and_after_a_restart(folder, tmp_path, monkeypatch):
    models = [model_folder(folder), model_folder(folder, "other", 1)]
    wanted = [dict(prompt=prompt, seed=seed, steps=4, refiner="other", handover=0.5, guidance=4)
              for seed, prompt in enumerate(("a <cat>", "two <cat>", "a boat", "<cat>"))]  # fmt: skip
    brake = Brake(monkeypatch)
    with served(open_service(models, tmp_path / "one", embeddings=folder / "words")) as server:
        blocker = server.job(prompt="first")
        brake.wait()
        jobs = [server.job(**fields)["id"] for fields in wanted]
        brake.step(2)
        threading.Thread(target=lambda: (until(lambda: server.service.queue.stopping), brake.off())).start()
    with served(open_service(models, tmp_path / "one", embeddings=folder / "words")) as server:
        together = [server.wait(id) for id in (blocker["id"], *jobs)]
        assert [job["state"] for job in together] == ["done"] * 5
        assert server.service.worker.batches == {1: 2, 3: 1}  # the three with the word are one batch
        pictures = [server.picture(job["images"][0]) for job in together[1:]]
    with served(open_service(models, tmp_path / "two", embeddings=folder / "words")) as server:
        for fields, picture in zip(wanted, pictures, strict=True):
            assert alike(picture_of(server, **fields)[0], picture)


def test_refiners_are_told_and_refused(server):
    told = {model["name"]: model["refiners"] for model in server.get("/api/models").json()["models"]}
    assert told["base"] == ["tiny", "other", "refiner"] and "base" not in told["base"]
    assert refused(server, refiner="refinr")[:2] == (404, "refiner")
    assert refused(server, refiner="../refiner")[:2] == (404, "refiner")
    assert refused(server, refiner="tiny") == (
        422,
        "refiner",
        "refiner 'tiny' is the model itself; choose another, or leave it out",
    )
    assert refused(server, handover=0.5)[:2] == (422, "handover")
    assert refused(server, refiner="other", handover=2)[:2] == (422, "handover")
    grid = [{"name": "handover", "values": [0.2, 0.8]}]
    assert len(server.drawn(prompt="p", refiner="other", grid=grid, steps=3)["images"]) == 3
    assert refused(server, grid=[{"name": "refiner", "values": ["other"]}])[:2] == (422, "grid")


def test_a_refiner_through_a1111(server, folder):
    asked = {"prompt": "a boat", "seed": 3, "steps": 4, "width": 64, "height": 64, "refiner_checkpoint": "other [0a1b]",
             "refiner_switch_at": 0.5}  # fmt: skip
    api = WebUIApi(port=int(server.url.rpartition(":")[2]))
    answer = api.post_and_get_api_result(f"{api.baseurl}/txt2img", asked, False)
    assert alike(answer.image, refined(folder, "a boat", "tiny", "other", steps=4, handover=0.5, like="a1111"))
    assert answer.info["extra_generation_params"]["Refiner"] == "other"
    same = server.post("/sdapi/v1/txt2img", asked | {"refiner_checkpoint": "tiny"})
    assert same.status_code == 200 and "Refiner" not in same.json()["info"]
    assert server.post("/sdapi/v1/txt2img", asked | {"refiner_checkpoint": "none such"}).status_code == 404
    assert server.post("/sdapi/v1/txt2img", asked | {"refiner_switch_at": 3}).status_code == 422


def test_latents_that_differ_are_refused_and_memory_holds_two_at_a_time(folder, tmp_path):
    strange = replace(TINY, vae=replace(TINY.vae, scaling_factor=0.5))
    models = [model_folder(folder), model_folder(folder, "other", 1), model_folder(folder, "strange", 1, strange)]
    with served(open_service(models, tmp_path, memory=0)) as server:
        assert "their latents differ" in refused(server, refiner="strange")[2]
        assert picture_of(server, prompt="p", refiner="other")[0].size == (64, 64)
        known = server.service.models.known
        assert known["tiny"].sd and known["other"].sd
        assert isinstance(picture_of(server, prompt="p", model="strange")[0], Image.Image)
        assert not known["tiny"].sd and not known["other"].sd


BAD = {
    "cut": b"\x10\x00\x00\x00\x00\x00\x00\x00{", "huge": (2**62).to_bytes(8, "little") + b"{}",
    "empty": b"", "text": b"hello " * 9,
    "nested": (200_002).to_bytes(8, "little") + b'{"a":' + b"[" * 199_990 + b"       ",
    "types": (38).to_bytes(8, "little") + b'{"a":{"dtype":7,"shape":"x","data":3}}',
}  # fmt: skip


def test_any_error_is_one_of_the_file_alone(tmp_path):
    def read(path):
        raise RuntimeError("odd")

    assert read_cached(read, tmp_path / "odd.safetensors", 0) == (None, "it cannot be read (RuntimeError: odd)")


def test_a_bad_file_is_passed_over_named_once_and_shown(folder, tmp_path, caplog):
    """Whatever is wrong with one file, the others are there, and so is the page."""
    (loras := tmp_path / "loras").mkdir()
    (words := tmp_path / "words").mkdir()
    lora_file(model_folder(folder), loras / "paper.safetensors", 1)
    embedding_file(words / "good.safetensors", 1)
    for place in (loras, words):
        for name, content in BAD.items():
            (place / f"{name}.safetensors").write_bytes(content)
        (place / "gone.safetensors").symlink_to(place / "nowhere")
        with open(os.path.join(os.fsencode(place), b"\xff.safetensors"), "wb") as file:
            file.write(b"x")
    lora_file(model_folder(folder), words / "no word.safetensors", 1)
    embedding_file(loras / "no adapter.safetensors", 1)
    service = open_service([model_folder(folder)], tmp_path / "data", loras=loras, embeddings=words)
    with served(service) as server:
        for _ in range(2):
            info = server.get("/api/info").json()
            assert info["loras"] == ["paper"] and info["models"][0]["embeddings"] == ["good"]
            assert info["unusable"]["loras"].keys() == {*BAD, "?", "no adapter"}
            assert info["unusable"]["embeddings"].keys() == {*BAD, "?", "no word"}
            assert all(
                why and len(why) <= 300 and str(tmp_path) not in why for why in info["unusable"]["loras"].values()
            )
        assert server.drawn(prompt="good <lora:paper:1>", steps=1)["state"] == "done"
        for body, field in (({"loras": [{"name": "cut"}]}, "loras"), ({"embeddings": ["cut"]}, "embeddings")):
            answer = server.post("/api/jobs", {"prompt": "p"} | body)
            assert answer.status_code == 422 and answer.json()["error"]["field"] == field
            assert "'cut' cannot be used" in answer.json()["error"]["message"]
        assert {one["name"] for one in server.get("/sdapi/v1/loras").json()} == {"paper"}
    named = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(named) == len(set(named)) == 2 * len(BAD) + 4
    (loras / "cut.safetensors").unlink()
    lora_file(model_folder(folder), loras / "cut.safetensors", 2)
    assert set(service.models.loras.known()) == {"cut", "paper"}  # it is read again when it was changed
