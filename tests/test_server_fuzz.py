"""Every route of our own OpenAPI description, with bodies that fit it and bodies that do not: no answer is a 5xx."""

import os
import subprocess
import sys

import pytest
from serving import model_folder, open_service, served

from plainsd.server.limits import Limits

TINY = Limits(pixels=64 * 64, steps=2, count=2, prompt=60, queue=6, upload=100_000)


@pytest.mark.parametrize("examples", [2, pytest.param(60, marks=pytest.mark.full)])
def test_schemathesis_finds_no_server_error(tmp_path, examples):
    model = model_folder(tmp_path)
    with served(open_service([model], tmp_path / "data", TINY, batch=6)) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json", "--checks",
                   "not_a_server_error",
                   "--max-examples", str(examples), "--phases", "examples,coverage,fuzzing", "--seed", "1",
                   "--no-color",
                   "--request-timeout", "60", "--exclude-path-regex", "/events$", "--generation-database",
                   "none"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1500,
                              env=os.environ | {"NO_PROXY": "*", "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)},
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.get("/healthz").json() == {"status": "ok"}
