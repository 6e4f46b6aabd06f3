#!/usr/bin/env bash
# Expected: importing Ray, without ray.init, leaves the log records of a program's own loggers as
# Python makes them; its record of when a line was written stays with Ray's own lines.
# What happens: the import replaces the process's log record factory, and every record of every
# logger has one more attribute, _ray_timestamp_ns. Formatters that print what is not a standard
# attribute take it for the program's own `extra`: structlog's ExtraAdder puts it into each line.
# Who meets it: services with structured logs that import Ray, even only in some of their processes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet ray==2.60.0 structlog==25.5.0
"$folder/bin/python" -W ignore - <<'EOF'
import json
import logging
from importlib.metadata import version
from io import StringIO

import structlog

print(*(f"{name} {version(name)}" for name in ("ray", "structlog")), sep=", ")
stream = StringIO()
handler = logging.StreamHandler(stream)
handler.setFormatter(
    structlog.stdlib.ProcessorFormatter(
        processor=structlog.processors.JSONRenderer(),
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
    )
)
log = logging.getLogger("shop")
log.addHandler(handler)
log.warning("before", extra={"order": 7})
import ray  # noqa: E402

assert not ray.is_initialized()
log.warning("after", extra={"order": 7})
before, after = (json.loads(line) for line in stream.getvalue().splitlines())
print(before, after, sep="\n")
assert before == {"order": 7, "event": "before"}
assert isinstance(after.pop("_ray_timestamp_ns"), int)
assert after == {"order": 7, "event": "after"}
EOF
