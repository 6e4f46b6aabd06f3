"""Our own API over HTTP."""

import base64
import json
import os
import threading
import time
from collections import defaultdict
from io import BytesIO

import pytest
from conftest import noise_picture
from PIL import Image, PngImagePlugin
from prometheus_client.parser import text_string_to_metric_families
from serving import Brake, alike, base64_of, from_base64, model_folder, open_service, png_bytes, served, until

import plainsd
from plainsd.errors import DiskError, UserError
from plainsd.pictures.texts.a1111 import parse_settings
from plainsd.server.jobs.drawing import LocalDrawer
from plainsd.server.jobs.queue import Place
from plainsd.server.jobs.worker import Worker
from plainsd.server.limits import Limits
from plainsd.server.uploads import opened


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    limits = Limits(pixels=128 * 128, steps=20, count=8, prompt=500, upload=300_000, upload_pixels=250_000, queue=40)
    with served(open_service([model], tmp_path_factory.mktemp("data"), limits)) as server:
        yield server


@pytest.fixture(scope="module")
def sd(model):
    return plainsd.load(model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def drawing():
    return noise_picture(64, 64)


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


PICTURE = base64_of(Image.new("RGB", (16, 16), "grey"))


def refusal(server, status, **body):
    answer = server.post("/api/jobs", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and "\n" not in error["message"]
    return error


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_picture_from_request_to_file(server, sd):
    answer = server.post(
        "/api/jobs", {"prompt": "a red apple", "seed": 5, "steps": 3, "guidance": 4, "sampler": "euler"}
    )
    assert answer.status_code == 202 and answer.headers["location"] == f"/api/jobs/{answer.json()['id']}"
    job = server.wait(answer.json()["id"])
    assert job["state"] == "done" and job["progress"] == 1 and job["seeds"] == [5] and len(job["images"]) == 1
    file = server.get(f"/api/images/{job['images'][0]}.png")
    assert file.headers["content-type"] == "image/png" and "immutable" in file.headers["cache-control"]
    picture = server.picture(job["images"][0])
    expected = plainsd.final(plainsd.text_to_image(sd, "a red apple", seed=5, steps=3, guidance=4, sampler="euler"))[0]
    assert alike(picture, expected)
    told = server.get(f"/api/images/{job['images'][0]}").json()
    assert picture.info["parameters"] == told["parameters"]
    assert told["settings"] | {"prompt": "a red apple", "steps": 3, "sampler": "euler", "seed": 5} == told["settings"]


def test_what_the_history_tells_makes_the_picture_again(server):
    first = server.drawn(
        prompt="a pear",
        negative="blue",
        seed=2**62,
        sampler="euler_a",
        spacing="karras",
        steps=3,
        clip_skip=2,
        rescale=0.5,
        cache=2,
    )
    told = server.get(f"/api/images/{first['images'][0]}").json()
    assert told["settings"]["seed"] == str(2**62)  # a number that JavaScript would round
    wanted = {name: value for name, value in told["settings"].items() if value is not None}
    again = server.drawn(**wanted)
    assert server.picture(first["images"][0]).tobytes() == server.picture(again["images"][0]).tobytes()


def test_over_a_picture_and_inside_a_mask(server, sd, drawing):
    job = server.drawn(prompt="p", image="data:image/png;base64," + base64_of(drawing), strength=0.8, seed=3)
    expected = plainsd.final(plainsd.image_to_image(sd, "p", drawing, 0.8, seed=3))[0]
    assert alike(server.picture(job["images"][0]), expected)

    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    job = server.drawn(prompt="p", image=base64_of(drawing), mask=base64_of(mask), seed=3)
    picture = server.picture(job["images"][0])
    assert alike(picture, plainsd.final(plainsd.inpaint(sd, "p", drawing, mask, seed=3))[0])
    assert picture.crop((0, 0, 64, 16)).tobytes() == drawing.crop((0, 0, 64, 16)).tobytes()

    soft = server.picture(
        server.drawn(prompt="p", image=base64_of(drawing), mask=base64_of(mask), mask_blur=3, seed=3)["images"][0]
    )
    assert soft.crop((0, 0, 64, 4)).tobytes() == drawing.crop((0, 0, 64, 4)).tobytes()  # out of the blur's reach
    assert not alike(soft.crop((0, 12, 64, 16)), drawing.crop((0, 12, 64, 16)), 0)  # within it


def test_a_picture_is_continued_past_its_edges(server, sd, drawing):
    job = server.drawn(prompt="p", image=base64_of(drawing), outpaint=[16, 0, 8, 24], seed=3)
    picture = server.picture(job["images"][0])
    assert alike(picture, plainsd.final(plainsd.outpaint(sd, "p", drawing, 16, 0, 8, 24, seed=3))[0])
    assert picture.size == (88, 88) and picture.crop((16, 0, 80, 64)).tobytes() == drawing.tobytes()
    told = server.get(f"/api/images/{job['images'][0]}").json()
    assert told["settings"]["outpaint"] == [16, 0, 8, 24] and told["settings"]["strength"] == 1
    soft = server.drawn(prompt="p", image=base64_of(drawing), outpaint=[16, 0, 8, 24], mask_blur=4, size=[44, 44])
    assert server.picture(soft["images"][0]).size == (44, 44)


def test_a_picture_is_scaled_to_the_size_that_is_asked_for(server, drawing):
    job = server.drawn(prompt="p", image=base64_of(drawing.resize((100, 80))), size=[96, 72], strength=0.5)
    assert server.picture(job["images"][0]).size == (96, 72)


def test_events_tell_progress_with_previews_and_the_end(server, brake):
    job = server.job(prompt="slow", count=2, steps=4)
    with server.get(f"/api/jobs/{job['id']}/events", stream=True) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = read_events(stream)
        brake.wait()
        brake.step()  # and no more, until its previews have come
        events, previews = [], {}
        while set(previews) != {"0", "1"}:
            events.append(next(told))
            previews |= events[-1][1]["previews"]
        brake.off()
        events += told
    names = [name for name, _ in events]
    assert set(names) == {"progress", "end"} and names[-1] == "end" and names.count("end") == 1
    assert from_base64(previews["0"].removeprefix("data:image/png;base64,")).size == (8, 8)
    shares = [event["progress"] for _, event in events]
    assert shares == sorted(shares) and shares[-1] == 1
    assert events[-1][1]["state"] == "done" and len(events[-1][1]["images"]) == 2
    late = list(read_events(server.get(f"/api/jobs/{job['id']}/events", stream=True)))
    assert [(name, event["state"]) for name, event in late] == [("end", "done")]


def test_an_event_stream_that_has_nothing_to_tell_stays_alive_and_ends_with_its_listener(server, brake, monkeypatch):
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.1)
    id = server.job(prompt="slow", steps=4)["id"]
    brake.wait()
    with server.get(f"/api/jobs/{id}/events", stream=True) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        while next(lines) != ": ping":
            pass
        assert len(server.service.queue.jobs[id].notifier.waiting) == 1
    until(lambda: server.service.queue.jobs[id].notifier.waiting == [])
    brake.off()
    assert server.wait(id)["state"] == "done"


def test_a_server_that_stops_lets_its_listeners_go_and_keeps_their_jobs(model, tmp_path, brake, caplog):
    service, answers = open_service([model], tmp_path), []
    with served(service) as stopping:

        def wait():
            answers.append(stopping.post("/v1/images/generations", {"prompt": "waited for"}))

        job = stopping.job(prompt="listened to")
        brake.wait()
        stream = stopping.get(f"/api/jobs/{job['id']}/events", stream=True)
        told = read_events(stream)
        assert next(told)[0] == "progress"
        waiting = threading.Thread(target=wait)
        waiting.start()
        until(lambda: len(service.queue.jobs) == 2)
        threading.Thread(target=lambda: (until(lambda: service.queue.stopping), brake.off())).start()
    assert "end" not in [name for name, _ in told]
    waiting.join(30)
    assert answers[0].status_code == 503 and "resumes when it runs again" in answers[0].text
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    again = open_service([model], tmp_path)
    assert {job.settings[0].prompt for job in again.queue.jobs.values()} == {"listened to", "waited for"}
    again.close()


def read_events(stream):
    name = None
    for line in stream.iter_lines(decode_unicode=True):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_cancel_and_the_list_of_jobs(server, brake):
    running = server.job(prompt="first")
    brake.wait()
    queued = [server.job(prompt=f"later {i}", steps=2) for i in range(2)]
    listed = server.get("/api/jobs").json()["active"]
    assert [job["id"] for job in listed] == [running["id"], *(job["id"] for job in queued)]
    assert [job["position"] for job in listed] == [None, 0, 1]
    assert server.post(f"/api/jobs/{queued[0]['id']}/cancel").json()["state"] == "cancelled"
    assert server.post(f"/api/jobs/{running['id']}/cancel").json()["state"] == "cancelled"
    again = server.post(f"/api/jobs/{running['id']}/cancel")
    assert again.status_code == 409 and "is already cancelled" in again.json()["error"]["what"]
    brake.off()
    assert server.wait(queued[1]["id"])["state"] == "done"
    assert server.get("/api/jobs").json()["ended"][-1]["id"] == queued[1]["id"]


def test_a_full_queue_says_when_to_come_back(server, brake):
    jobs = []
    while (answer := server.post("/api/jobs", {"prompt": "p", "steps": 2})).status_code == 202:
        jobs.append(answer.json())
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1 and len(jobs) == 20
    other = server.post("/api/jobs", {"prompt": "p", "steps": 2}, headers={"X-Client": "somebody else"})
    assert other.status_code == 202
    for job in jobs:
        server.post(f"/api/jobs/{job['id']}/cancel")
    brake.off()
    assert server.wait(other.json()["id"])["state"] == "done"


# --- history ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_no_fault_of_the_request(server, monkeypatch):
    """The picture that was sent is kept with its job; where it cannot be, nobody is told where it would have lain."""

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = refusal(server, 507, prompt="x", steps=2, image=PICTURE)
    assert error["message"] == "the server cannot write (No space left on device); make room in its data folder"


def test_the_history_is_searched_and_paged(server):
    for prompt in ("Grüne Äpfel 50%", "grüne birnen", "ein under_score"):
        server.drawn(prompt=prompt, steps=1)

    def found(search):
        return [
            row["settings"]["prompt"] for row in server.get("/api/images", params={"search": search}).json()["images"]
        ]

    assert found("ÄPFEL grüne") == ["Grüne Äpfel 50%"] and found("GRÜNE") == ["grüne birnen", "Grüne Äpfel 50%"]
    assert found("0%") == ["Grüne Äpfel 50%"] and found("r_s") == ["ein under_score"] and found("' OR 1=1 --") == []
    first = server.get("/api/images", params={"limit": 2}).json()
    second = server.get("/api/images", params={"limit": 2, "before": first["next"]}).json()
    numbers = [row["number"] for row in first["images"] + second["images"]]
    assert len(set(numbers)) == 4 and numbers == sorted(numbers, reverse=True)


def test_a_picture_is_deleted_with_its_files(server):
    id = server.drawn(prompt="short lived", size=[128, 128], steps=1)["images"][0]
    path = server.service.store.path(server.service.store.picture(id))
    assert path.exists() and server.get(f"/api/images/{id}/thumbnail").status_code == 200
    assert server.session.delete(f"{server.url}/api/images/{id}").status_code == 204
    assert not path.exists() and server.get(f"/api/images/{id}.png").status_code == 404
    assert server.session.delete(f"{server.url}/api/images/{id}").status_code == 404


def test_a_large_picture_is_deleted_with_its_thumbnail(server):
    store = server.service.store
    id = server.drawn(prompt="large and short lived", steps=1)["images"][0]
    row = store.picture(id)
    Image.new("RGB", (640, 480), "red").save(store.path(row))
    with store.transaction() as db:
        db.execute("UPDATE images SET width = 640, height = 480 WHERE id = ?", (id,))
    assert server.get(f"/api/images/{id}/thumbnail").headers["content-type"] == "image/webp"
    assert len(list(store.folder.glob(f"thumbnails/{id}*"))) == 1
    assert server.session.delete(f"{server.url}/api/images/{id}").status_code == 204
    assert not store.path(row).exists() and list(store.folder.glob(f"thumbnails/{id}*")) == []


def test_large_pictures_have_small_ones_for_the_gallery(server, monkeypatch):
    store = server.service.store
    id = server.drawn(prompt="large", steps=1)["images"][0]
    Image.new("RGB", (900, 600), "red").save(store.path(store.picture(id)))
    with store.transaction() as db:
        db.execute("UPDATE images SET width = 900, height = 600 WHERE id = ?", (id,))
    answer = server.get(f"/api/images/{id}/thumbnail")
    assert answer.headers["content-type"] == "image/webp"
    assert from_base64(base64.b64encode(answer.content)).size == (320, 213)
    (store.folder / "thumbnails" / f"{id}.webp").unlink()

    def full(path):
        raise DiskError(path, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("plainsd.server.jobs.store.written_whole", full)
        shown = server.get(f"/api/images/{id}/thumbnail")
    assert shown.status_code == 200 and shown.headers["content-type"] == "image/webp"
    assert shown.content == answer.content and list(store.folder.glob(f"thumbnails/{id}*")) == []
    store.path(store.picture(id)).write_bytes(b"no picture")
    broken = server.get(f"/api/images/{id}/thumbnail")
    assert broken.status_code == 500 and "is broken" in broken.json()["error"]["message"]
    store.path(store.picture(id)).unlink()
    gone = server.get(f"/api/images/{id}.png")
    assert gone.status_code == 404 and "is gone; delete it" in gone.json()["error"]["message"]


def test_settings_out_of_a_png_of_another_program(server, drawing):
    text = (
        "a <lora:paper:0.6> boat\nNegative prompt: rain\n"
        "Steps: 12, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 77, "
        "Size: 512x768, Refiner: xl, Refiner switch at: 0.8, Face restoration: CodeFormer, Version: v1.10.1"
    )
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    answer = server.post("/api/settings", {"image": base64.b64encode(png_bytes(drawing, pnginfo=info)).decode()})
    assert answer.json() == {
        "prompt": "a  boat", "negative": "rain", "size": [512, 768], "steps": 12, "guidance": 6.5,
        "sampler": "dpmpp_2m",
        "spacing": "karras", "seed": 77, "loras": [{"name": "paper", "strength": 0.6}], "like": "a1111",
        "noise": "nv", "settled": ["prompt", "negative"],
        "unused": ["Refiner: xl", "Refiner switch at: 0.8", "Face restoration: CodeFormer"],
    }  # fmt: skip
    strange = (
        "a boat\nSteps: 12, Sampler: Nonesuch, Hires upscale: 2, Hires upscaler: 4x-UltraSharp, Model: v1-5-pruned"
    )
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", strange)
    answer = server.post("/api/settings", {"image": base64.b64encode(png_bytes(drawing, pnginfo=info)).decode()}).json()
    assert answer.pop("unused") == ["Model: v1-5-pruned", "Hires upscaler: 4x-UltraSharp", "Sampler: Nonesuch"]
    assert server.drawn(**answer, size=[32, 32])["state"] == "done"  # all of the others are what a job takes
    none = server.post("/api/settings", {"image": base64_of(drawing)})
    assert none.status_code == 422 and "carries no settings" in none.json()["error"]["message"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "field", "says"),
    [
        ({"sampler": "eular"}, 422, "sampler", "unknown sampler 'eular'; did you mean 'euler'"),
        ({"spacing": "karas"}, 422, "spacing", "did you mean 'karras'"),
        ({"model": "tinny"}, 404, "model", "did you mean 'tiny'"),
        ({"steps": 0}, 422, "steps", "steps 0 is out of range; choose 1 to"),
        ({"steps": 21}, 422, "steps", "choose 1 to 20"),
        ({"steps": "many"}, 422, "steps", "steps: input should be a valid integer"),
        ({"count": 9}, 422, "count", "count 9 is out of range; choose 1 to 8"),
        ({"count": 0}, 422, "count", "choose 1 to 8"),
        ({"size": [60, 64]}, 422, "size", "multiples of 8"),
        ({"size": [136, 128]}, 422, "size", "8x8 to 16384 pixels"),
        ({"size": [64]}, 422, "size", "field required"),
        ({"hires": 2.5}, 422, "size", "size 160x160 is out of range"),
        ({"guidance": float("nan")}, 422, "guidance", "out of range"),
        ({"guidance": float("inf")}, 422, "guidance", "out of range"),
        ({"seed": -2}, 422, "seed", "out of range"),
        ({"seed": 2**64}, 422, "seed", "out of range"),
        ({"seed": 1.5}, 422, "seed", "fractional part"),
        ({"seed": "any"}, 422, "seed", "valid integer"),
        ({"like": "comfy"}, 422, "like", "a1111"),
        ({"eta": 0.5, "sampler": "heun"}, 422, "eta", "has no eta"),
        ({"clip_skip": 3}, 422, "clip_skip", "this model has 2 layers"),
        ({"variation_strength": 0.5}, 422, "variation_strength", "without a variation seed"),
        ({"prompt": "p" * 501}, 422, "prompt", "501 characters; at most 500"),
        ({"negative": "p" * 501}, 422, "negative", "501 characters"),
        ({"prompt": "nul \0"}, 422, "prompt", "control characters"),
        ({"prompt": "a (b:1000000000)"}, 422, "prompt", "prompt: the weight 1e+09 of 'b' is out of bounds"),
        ({"negative": "[a:(b:99999):0.5]"}, 422, "negative", "the weight 99999 of 'b' is out of bounds"),
        ({"prompt": "half \ud800"}, 422, "prompt", "broken Unicode"),
        ({"prompt": "<lora:x>"}, 422, "loras", "start the server with --loras"),
        ({"prompt": "<lora:x:y>"}, 422, "prompt", "is not a LoRA with one strength"),
        ({"loras": [{"name": "../x"}]}, 422, "loras", "there is no LoRA '../x'"),
        ({"promt": "typo"}, 422, "promt", "not permitted"),
        ({"strength": 0.5}, 422, "strength", "without an image"),
        ({"mask": "AAAA"}, 422, "mask", "without an image"),
        ({"outpaint": [8, 8, 8, 8]}, 422, "outpaint", "without an image"),
        ({"image": PICTURE, "outpaint": [0, 0, 0, 0]}, 422, "outpaint", "adds nothing"),
        ({"image": PICTURE, "outpaint": [-8, 0, 0, 0]}, 422, "outpaint", "greater than or equal to 0"),
        ({"image": PICTURE, "outpaint": [8, 8]}, 422, "outpaint", "field required"),
        ({"image": PICTURE, "outpaint": [8, 0, 0, 0], "mask": PICTURE}, 422, "outpaint", "do not go together"),
        ({"image": PICTURE, "outpaint": [65536, 65536, 65536, 65536]}, 422, "outpaint", "131088x131088 is out of"),
        ({"handover": 0.5}, 422, "handover", "without a refiner"),
        ({"refiner": "none"}, 404, "refiner", "unknown refiner 'none'"),
        ({"embeddings": ["none"]}, 422, "embeddings", "start the server with --embeddings"),
        ({"image": "https://example.com/a.png"}, 422, "image", "is a URL; send the picture itself"),
        ({"image": "file:///etc/passwd"}, 422, "image", "is a URL"),
        ({"image": "!!!"}, 422, "image", "is not base64"),
        ({"image": "AAAA"}, 422, "image", "not a PNG, JPEG or WebP"),
        ({"image": base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()}, 422, "image",
         "not a PNG, JPEG or WebP"),
        ({"grid": [{"name": "colour", "values": [1]}]}, 422, "grid", "unknown grid setting 'colour'"),
        ({"grid": [{"name": "steps", "values": ["x"]}]}, 422, "grid", "cannot be read"),
        ({"grid": [{"name": "steps", "values": [1, 2, 3]}, {"name": "guidance", "values": [1, 2, 3]}]}, 422, "grid",
         "grid has 9 pictures"),
        ({"grid": [{"name": "steps", "values": [50]}]}, 422, "steps", "steps 50"),
        ({"grid": [{"name": "steps", "values": [2]}], "count": 2}, 422, "count", "with a grid"),
    ],
)  # fmt: skip
def test_bad_fields_are_named_with_their_value_and_a_remedy(server, body, status, field, says):
    before = len(server.get("/api/jobs", params={"limit": 500}).json()["ended"])
    answer = server.session.post(server.url + "/api/jobs", data=json.dumps({"prompt": "p"} | body),
                                 headers={"Content-Type": "application/json"})  # fmt: skip
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (status, field), error
    assert says in error["message"] and (error["remedy"] or "<lora" in says or "control" in says)
    assert len(server.get("/api/jobs", params={"limit": 500}).json()["ended"]) == before


def test_bad_pictures(server, drawing):
    whole = png_bytes(drawing)
    bad = {
        "broken": base64.b64encode(whole[:-200]).decode(),
        "600x500 pixels; scale it": base64_of(Image.new("L", (600, 500))),
        "out of range": base64_of(Image.new("RGB", (256, 256))),
    }  # fmt: skip
    for says, image in bad.items():
        answer = server.post("/api/jobs", {"prompt": "p", "image": image})
        assert answer.status_code in (413, 422) and says in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["field"] == "image"
    frames = [Image.new("P", (64, 64), i) for i in range(3)]
    animated = base64.b64encode(png_bytes(frames[0], save_all=True, append_images=frames[1:])).decode()
    assert "animated" in refusal(server, 422, image=animated)["message"]
    other = refusal(server, 422, image=base64_of(drawing), mask=base64_of(drawing.resize((32, 64))))
    assert other["field"] == "mask" and "differ in size" in other["message"]
    dark = refusal(server, 422, image=base64_of(drawing), mask=base64_of(Image.new("L", (64, 64))))
    assert dark["field"] == "mask" and "dark everywhere" in dark["message"]
    assert list((server.service.store.folder / "inputs").iterdir()) == []


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI", "DDS"])
def test_only_png_jpeg_and_webp_are_decoded(server, drawing, kind):
    buffer = BytesIO()
    drawing.save(buffer, format=kind)
    text = base64.b64encode(buffer.getvalue()).decode()
    for body in ({"image": text}, {"image": base64_of(drawing), "mask": text, "strength": 0.5}):
        answer = server.post("/api/jobs", {"prompt": "p"} | body)
        assert answer.status_code == 422 and "is not a PNG, JPEG or WebP picture" in answer.json()["error"]["message"]
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = BytesIO()
        drawing.save(buffer, format=kind)
        opened(buffer.getvalue(), "image", Limits())


def test_bodies_that_are_not_requests(server):
    def send(data, **headers):
        return server.session.post(
            server.url + "/api/jobs", data=data, headers={"Content-Type": "application/json"} | headers
        )

    for data in (b"", b"{", b"[1]", b"null", b"\xff\xfe", b"9" * 5000, b'{"a":' * 20_000, b"[" * 100_000):
        answer = send(data)
        assert answer.status_code in (400, 422), (data[:20], answer.text)
        assert answer.json()["error"]["message"]
    assert send(b"x" * 300_001).status_code == 413
    assert send(iter([b'{"prompt": "', b"x" * 300_000, b'"}'])).status_code == 413  # chunked, its length not said
    assert (
        server.session.post(
            server.url + "/api/jobs", data=b'{"prompt": "p"}', headers={"Content-Type": "text/plain"}
        ).status_code
        == 415
    )
    assert server.session.post(server.url + "/api/jobs", data={"prompt": "p"}).status_code == 415


def test_what_there_is_not(server):
    for path in ("/api/jobs/nobody", "/api/jobs/nobody/events", "/api/images/none.png", "/api/images/none/thumbnail",
                 "/api/images/none", "/nowhere", "/page/nothing.js", "/page/..%2fapp.py",
                 "/page/%2e%2e%2fapp.py"):  # fmt: skip
        answer = server.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["remedy"], path
    assert server.post("/api/jobs/nobody/cancel").status_code == 404
    assert server.get("/api/images", params={"limit": 0}).status_code == 422
    assert server.session.put(server.url + "/api/jobs").status_code == 405


# --- about the server ------------------------------------------------------------------------------------------------


def test_info_is_what_a_form_needs(server):
    info = server.get("/api/info").json()
    assert info["models"][0]["size_multiple"] == 8
    assert info["default"] == "tiny" and info["models"][0]["defaults"] == {
        "size": [64, 64],
        "steps": 4,
        "guidance": 7.5,
        "sampler": "ddim",
        "spacing": None,
    }
    assert (
        info["samplers"]["dpmpp_2m"] == "DPM++ 2M"
        and "karras" in info["spacings"]
        and "distilled" not in info["spacings"]
    )
    assert info["limits"]["steps"] == 20 and info["loras"] == []
    text = server.get(f"/api/images/{server.drawn(prompt='last', steps=1)['images'][0]}").json()["parameters"]
    assert parse_settings(text).prompt == "last"


def metrics(server):
    """The values of `/metrics`, by name and labels."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_are_prometheus_and_count(server):
    before = defaultdict(float, metrics(server))
    server.drawn(prompt="counted", count=2, steps=1)
    until(lambda: metrics(server)["plainsd_pictures_total",] == before["plainsd_pictures_total",] + 2)
    after = metrics(server)
    assert after["plainsd_jobs_ended_total", "done"] == before["plainsd_jobs_ended_total", "done"] + 1
    assert after["plainsd_job_seconds_count",] == before["plainsd_job_seconds_count",] + 1
    assert after["plainsd_job_seconds_sum",] > before["plainsd_job_seconds_sum",]
    assert after["plainsd_queue_length",] == 0 and after["plainsd_model_bytes",] > 100_000
    assert after["plainsd_info", plainsd.__version__] == 1
    of = (server.service.models.default, "worker-0")
    for count, name in ((1, "plainsd_queue_wait_seconds"), (1, "plainsd_step_seconds")):
        assert after[(f"{name}_count", *of)] == before[(f"{name}_count", *of)] + count
        assert after[(f"{name}_bucket", "+Inf", *of)] == after[(f"{name}_count", *of)]
        assert before[(f"{name}_sum", *of)] < after[(f"{name}_sum", *of)] < before[(f"{name}_sum", *of)] + 60


def test_metrics_of_what_waits_and_of_what_fails(model, tmp_path, brake, monkeypatch):
    with served(open_service([model], tmp_path)) as server:
        jobs = [server.job(prompt="p", steps=2, count=3)["id"]]
        assert brake.wait() == 3
        jobs += [server.job(prompt="p", steps=steps)["id"] for steps in (3, 4)]
        during = metrics(server)
        brake.off()
        assert {server.wait(id)["state"] for id in jobs} == {"done"}

        def wrong(*_, **__):
            raise UserError("the picture is not finite")

        monkeypatch.setattr("plainsd.server.jobs.drawing.batch", wrong)
        assert server.wait(server.job(prompt="p")["id"])["state"] == "failed"
        after = metrics(server)
    assert (during["plainsd_queue_length",], during["plainsd_jobs_running",]) == (2, 1)
    assert (after["plainsd_queue_length",], after["plainsd_jobs_running",]) == (0, 0)
    assert (during["plainsd_failures_total",], after["plainsd_failures_total",]) == (0, 1)
    assert [after["plainsd_jobs_ended_total", state] for state in ("done", "failed", "cancelled")] == [3, 1, 0]
    batches = {name[1]: value for name, value in after.items() if name[0] == "plainsd_batches_total"}
    assert batches == {"1": 3, "3": 1}  # that which failed too
    assert after["plainsd_workers",] == after["plainsd_model_loads_total",] == 1


def test_histograms_are_by_model_and_worker(model, tmp_path):
    """Two models, two workers on one queue: each wait and each step is counted where it was."""
    other = model_folder(tmp_path, "other", 1)
    service = open_service([model, other], tmp_path / "data")
    drawer = LocalDrawer(service.models, Place("worker-1"))
    second = Worker(service.queue, drawer, service.store, service.limits, service.models.options, 4)
    with served(service) as server:
        names = [*service.models.known]
        for steps, name in enumerate(names, 2):
            server.drawn(prompt="p", model=name, steps=steps)
        service.queue.stop()
        service.worker.join(30)
        service.queue.stopping = False
        second.start()
        server.drawn(prompt="p", model=names[1], steps=4)
        text = server.get("/metrics").text
    second.join(30)
    for name, worker, steps in ((names[0], "worker-0", 2), (names[1], "worker-0", 3), (names[1], "worker-1", 4)):
        labels = f'{{model="{name}",worker="{worker}"}}'
        assert f"plainsd_queue_wait_seconds_count{labels} 1.0" in text
        assert f"plainsd_step_seconds_count{labels} {steps}.0" in text


def test_each_server_counts_for_itself(server, model, tmp_path):
    server.drawn(prompt="not yours", steps=1)
    with served(open_service([model], tmp_path)) as other:
        answer = other.get("/metrics", headers={"Accept": "text/plain;version=x"})
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "plainsd_pictures_total 0.0" in answer.text.splitlines()
    assert "plainsd_step_seconds_count" not in answer.text  # no step yet


def test_health(server, monkeypatch):
    assert server.get("/healthz").json() == {"status": "ok"}
    monkeypatch.setattr(server.service.worker, "is_alive", lambda: False)
    assert server.get("/healthz").status_code == 503


def test_the_openapi_page_describes_every_route(server):
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/metrics"} <= set(paths)
    assert server.get("/docs").headers["content-type"].startswith("text/html")


def test_time_left_is_told_once_there_is_something_to_go_by(server, brake):
    job = server.job(prompt="p", steps=4)
    brake.wait()
    assert server.get(f"/api/jobs/{job['id']}").json()["seconds_left"] is None
    brake.step(2)
    time.sleep(0.2)
    until(lambda: server.get(f"/api/jobs/{job['id']}").json()["step"] == 2)
    told = server.get(f"/api/jobs/{job['id']}").json()
    assert told["progress"] == 0.5 and told["seconds_left"] > 0.1
    brake.off()
    server.wait(job["id"])
