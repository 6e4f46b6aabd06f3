"""The other end of the API: what `plainsd generate --server` uses."""

from io import BytesIO

import pytest
from PIL import Image
from serving import Brake, alike, base64_of, model_folder, open_service, served, until

import plainsd
from plainsd.errors import UserError
from plainsd.server.client import Finished, Progress, Remote

TOKEN = "a-token-for-clients"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = model_folder(tmp_path_factory.mktemp("models"))
    with served(open_service([model], tmp_path_factory.mktemp("data")), TOKEN) as server:
        yield server


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


def test_pictures_come_home(server):
    events = list(Remote(server.url, TOKEN).draw(prompt="a red apple", seed=3, count=2, steps=4))
    pictures = [event for event in events if isinstance(event, Finished)]
    sd = plainsd.load(server.service.models.known["tiny"].source, device="cpu", dtype="float32")
    expected = plainsd.final(plainsd.text_to_image(sd, "a red apple", seed=3, count=2, steps=4))
    assert all(
        alike(Image.open(BytesIO(event.png)), picture) for event, picture in zip(pictures, expected, strict=True)
    )
    assert [event.settings["seed"] for event in pictures] == [3, 4]
    assert isinstance(events[0], Progress) and events[0].share < 1
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    over = [
        event for event in Remote(server.url, TOKEN).draw(prompt="p", image=base64_of(image), strength=0.5, seed=1)
    ][-1]
    assert over.settings["strength"] == 0.5


def test_who_stops_listening_cancels(server, brake):
    events = Remote(server.url, TOKEN).draw(prompt="slow")
    assert isinstance(next(events), Progress)
    brake.wait()
    events.close()
    until(lambda: not server.service.queue.jobs)
    assert server.service.store.jobs(("cancelled",), 1)[0].each[0].prompt == "slow"


def test_errors_are_one_line(server):
    def said(remote, **fields):
        with pytest.raises(UserError) as refused:
            list(remote.draw(prompt="p", **fields))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "unknown sampler 'x'" in said(Remote(server.url, TOKEN), sampler="x")
    assert "the token is wrong" in said(Remote(server.url, "wrong"))
    assert "weight 1e+09" in said(Remote(server.url, TOKEN), negative="(a:1000000000)")
    assert "is `plainsd serve` running there?" in said(Remote("127.0.0.1:1"))
    with pytest.raises(UserError, match="is no address"):
        Remote("ftp://x")
    assert Remote("localhost:7860/some/path").url == "http://localhost:7860"
