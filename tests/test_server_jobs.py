"""Queue, store and worker, without HTTP."""

import errno
import os
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, noise_picture, tiny_sd
from PIL import Image, ImageFont
from serving import Brake, alike, base64_of, lora_file, model_folder, open_service, until

import plainsd
from plainsd.adapters.lora import inject, save_lora
from plainsd.device import can_pack
from plainsd.errors import UserError
from plainsd.models.forms import OtherForm
from plainsd.models.variants import ScheduleConfig
from plainsd.pictures.images import read_settings
from plainsd.server import pool
from plainsd.server.errors import APIError
from plainsd.server.jobs import drawing, migrations
from plainsd.server.jobs import worker as worker_module
from plainsd.server.jobs.job import CANCELLED, DONE, FAILED, QUEUED, RUNNING
from plainsd.server.jobs.migrations import MIGRATIONS
from plainsd.server.jobs.queue import Place
from plainsd.server.jobs.worker import Worker
from plainsd.server.limits import Limits
from plainsd.server.pool import Models, PoolOptions
from plainsd.server.requests import new_job
from plainsd.server.restore import picture_as_json, settings_in_file
from plainsd.server.schema import JobRequest
from plainsd.speed.model import faster
from plainsd.text.wildcards import settled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def opened(folder, tmp_path):
    """Makes services; what is open at the end is closed."""
    services = []

    def make(*models, data="data", limits=Limits(), start=True, **more):
        service = open_service(list(models) or [model_folder(folder)], tmp_path / data, limits, **more)
        services.append(service)
        if start:
            service.worker.start()
        return service

    yield make
    for service in services:
        service.close()


@pytest.fixture
def brake(monkeypatch):
    brake = Brake(monkeypatch)
    yield brake
    brake.off()


def ask(service, prompt="a red apple", client="me", **more):
    job = new_job(JobRequest(prompt=prompt, **more), service.models, service.limits, client, "jobs")
    service.queue.add(job)
    return job


def ended(job):
    until(lambda: not job.active, 60)
    return job


def stop(service):
    """As a crash leaves it: nothing is put back, nothing is closed properly."""
    service.queue.stop()
    if service.worker.is_alive():
        service.worker.join(30)
    service.store.close()
    service.close = lambda: None


# --- pictures --------------------------------------------------------------------------------------------------------


def test_requests_that_agree_run_as_one_batch_and_each_picture_is_as_alone(opened, folder):
    service = opened(start=False, batch=8)
    wanted = [("a red apple", 7, "anna", {}), ("a (blue:1.2) pear [x|y]", 100, "bert", {}), ("", 2**40, "carl", {}),
              ("word " * 120, 5, "anna", {"negative": "blue"}), ("weak", 8, "bert", {"guidance": 2})]  # fmt: skip
    jobs = [ask(service, prompt, client, seed=seed, **more) for prompt, seed, client, more in wanted]
    other, unguided = ask(service, "a red apple", steps=3, seed=7), ask(service, "a red apple", guidance=1, seed=7)
    service.worker.start()
    for job in [*jobs, other, unguided]:
        assert ended(job).state == DONE, job.error
    assert service.worker.batches == {5: 1, 1: 2}
    sd = plainsd.load(model_folder(folder), device="cpu", dtype="float32")
    for job, (prompt, seed, _, more) in zip(jobs, wanted, strict=True):
        row = service.store.picture(job.picture_id(0))
        alone = plainsd.final(plainsd.text_to_image(sd, prompt, seed=seed, **more))[0]
        path = service.store.path(row)
        assert alike(Image.open(path), alone), prompt
        assert read_settings(path).seed == seed and read_settings(path).prompt == prompt
    assert not alike(
        Image.open(service.store.path(service.store.picture(jobs[0].picture_id(0)))),
        Image.open(service.store.path(service.store.picture(other.picture_id(0)))),
        8,
    )


def test_a_count_has_one_seed_after_the_other(opened):
    service = opened()
    job = ended(ask(service, count=3, seed=11))
    assert [service.store.picture(job.picture_id(i)).settings.seed for i in range(3)] == [11, 12, 13]
    one = ended(ask(service, seed=12))
    files = [service.store.path(service.store.picture(id)) for id in (job.picture_id(1), one.picture_id(0))]
    assert alike(*(Image.open(file) for file in files))


def test_random_and_long_seeds(opened):
    service = opened(start=False)
    either = [
        ask(service, seed=seed, variation_seed=seed, variation_strength=0.5).settings[0] for seed in (-1, "random")
    ]
    drawn = [one.seed for one in either] + [one.variation_seed for one in either]
    assert len(set(drawn)) == 4 and all(0 <= seed < 2**32 for seed in drawn)
    assert ask(service, seed=5).notes == []
    long = ask(service, seed=2**64 - 1)
    assert long.settings[0].seed == 2**64 - 1 and service.as_json(long)["notes"] == long.notes
    assert long.notes[0].startswith("seed 18446744073709551615 draws the same as 4294967295: ")


def test_guidance_0_is_off_and_this_is_said(opened):
    service = opened(start=False)
    off = ask(service, guidance=0)
    assert off.settings[0].guidance == 1 and off.notes[0].startswith("guidance 0 is off, as 1 is")
    cells = ask(service, grid=[{"name": "guidance", "values": [0, 2]}])
    assert [one.guidance for one in cells.settings] == [1, 2] and cells.notes == off.notes
    theirs = ask(service, guidance=0, like="a1111")
    assert theirs.settings[0].guidance == 0 and theirs.notes == []


def test_without_a_seed_each_job_draws_one_and_keeps_it(opened):
    service = opened(start=False)
    assert ask(service).settings[0].seed != ask(service).settings[0].seed


def test_a_seed_of_0_is_read_from_a_file(opened):
    service = opened()
    row = service.store.picture(ended(ask(service, seed=0)).picture_id(0))
    told = settings_in_file(service.store.path(row).read_bytes(), service.limits, service.models)
    assert told["seed"] == 0


def test_a_grid_of_one_setting_twice_is_refused(opened):
    with pytest.raises(APIError, match="both axes of the grid are steps"):
        ask(opened(start=False), grid=[{"name": "steps", "values": [1, 2]}, {"name": " steps", "values": [3, 4]}])


def test_a_grid_of_a_switch(opened):
    values = [True, False, "true", "off"]
    cells = ask(opened(start=False), grid=[{"name": "tiling", "values": values}])
    assert [one.tiling for one in cells.settings] == [True, False] * 2


def test_a_grid_is_its_cells_and_a_sheet(opened):
    service = opened(batch=3)
    job = ended(
        ask(service, seed=4, grid=[{"name": "guidance", "values": [1, 3, "7.5"]}, {"name": "steps", "values": [2, 3]}])
    )
    assert job.state == DONE, job.error
    rows = sorted(service.store.pictures(job=job.id), key=lambda row: row.index)
    assert [(row.settings.guidance, row.settings.steps) for row in rows[:6]] == [
        (1, 2),
        (3, 2),
        (7.5, 2),
        (1, 3),
        (3, 3),
        (7.5, 3),
    ]
    sheet = Image.open(service.store.path(rows[6]))
    assert len(rows) == 7 and sheet.width > 3 * 64 and sheet.height > 2 * 64
    wide = max(64, round(ImageFont.load_default(12).getlength("guidance 7.5")) + 12)
    left = sheet.width - wide + (wide - 64) // 2
    cell = sheet.crop((left, sheet.height - 64, left + 64, sheet.height))
    assert alike(cell, Image.open(service.store.path(rows[5])), 0)


def test_a_sheet_of_samplers_comes_again(opened):
    """Of the spacing that belongs to each sampler the sheet says nothing: it is not one for all."""
    service = opened()
    grid = [{"name": "sampler", "values": ["ddim", "dpmpp_2m"]}]
    job = ended(ask(service, seed=4, grid=grid))
    assert len({job.settings_of(index).spacing for index in range(2)}) == 2
    row = next(row for row in service.store.pictures(job=job.id) if row.index == 2)
    told = picture_as_json(row)["settings"]
    assert told.get("spacing") is None and told["grid"] == grid
    kept = ("prompt", "seed", "steps", "guidance", "spacing", "noise", "grid")
    again = ended(ask(service, **{name: told[name] for name in kept if told.get(name) is not None}))
    assert [one.spacing for one in again.settings] == [one.spacing for one in job.settings]
    same = ended(ask(service, seed=4, grid=[{"name": "steps", "values": [1, 2]}]))
    assert same.settings_of(2).spacing == same.settings_of(0).spacing


def test_a_sheet_that_could_not_be_opened_is_refused(opened):
    service = opened(start=False, limits=Limits(pixels=2**24))
    sides = [{"name": "guidance", "values": [1, 3, 5]}, {"name": "steps", "values": [2, 3, 4, 5]}]
    with pytest.raises(APIError, match=r"would have \d+x\d+ pixels; at most 178956970 can"):
        ask(service, size=(4096, 4096), grid=sides)
    assert ask(service, size=(4096, 2048), grid=sides).sheet


def test_long_labels_of_a_sheet_are_cut(opened):
    service = opened(start=False)
    job = ask(service, grid=[{"name": "guidance", "values": ["2." + "0" * 50, 3]}])
    assert job.sheet.across == ["guidance 2." + "0" * 26 + "...", "guidance 3"] and job.settings[0].guidance == 2


def test_switches_of_a_grid(opened):
    service = opened(start=False)
    job = ask(service, grid=[{"name": "tiling", "values": ["true", "Off", "on"]}])
    assert [one.tiling for one in job.settings] == [True, False, True]
    with pytest.raises(APIError, match="grid tiling has a value that cannot be read"):
        ask(service, grid=[{"name": "tiling", "values": ["maybe"]}])


def test_random_seeds_of_a_grid_are_written_as_drawn(opened):
    service = opened()
    grid = [{"name": "seed", "values": ["random", -1, 7]}, {"name": "steps", "values": [1, 2]}]
    job = ended(ask(service, "{red|green|blue|black|white} boat", grid=grid))
    seeds = [one.seed for one in job.settings]
    assert seeds[:3] == seeds[3:] and seeds[2] == 7 and seeds[0] != seeds[1] and min(seeds) >= 0
    assert job.sheet.across == [f"seed {seed}" for seed in seeds[:3]]
    prompts = [one.prompt for one in job.settings]
    assert prompts == [settled("{red|green|blue|black|white} boat", seed) for seed in seeds]


def test_names_of_files_come_from_nothing_dangerous(opened):
    service = opened()
    job = ended(ask(service, "../../etc/passwd <script>\n\u202e.exe \N{SNOWMAN} a\\b:c", seed=1))
    row = service.store.picture(job.picture_id(0))
    path = service.store.path(row)
    assert path.is_relative_to(service.store.folder / "pictures")
    assert path.parent.name == time.strftime("%Y-%m-%d", time.localtime(job.created))
    assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and path.name.count(".") == 1
    with service.store.transaction() as db:
        db.execute("UPDATE images SET file = 'pictures/../../../outside.png' WHERE id = ?", (row.id,))
    with pytest.raises(FileNotFoundError):
        service.store.path(service.store.picture(row.id))


# --- turns -----------------------------------------------------------------------------------------------------------


def test_clients_take_turns_picture_by_picture(opened, brake):
    service = opened(batch=2)
    greedy = ask(service, "greedy", "greedy", count=6, seed=0)
    assert brake.wait() == 2
    modest = ask(service, "modest", "modest", seed=0)
    brake.step(5)
    brake.wait()
    brake.off()
    ended(greedy), ended(modest)
    assert {one.prompt for one in brake.batches[1]} == {"modest", "greedy"}
    assert modest.finished < greedy.finished


def test_the_queue_is_bounded_and_no_client_fills_it_alone(opened):
    service = opened(limits=Limits(queue=4), start=False)
    ask(service), ask(service)
    with pytest.raises(APIError, match="queue is full with 2 jobs, 2 of them yours; try again in") as refused:
        ask(service)
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
    ask(service, client="b"), ask(service, client="c")
    with pytest.raises(APIError, match="none of them yours"):
        ask(service, client="d")
    assert len(service.store.unfinished()) == 4


def test_a_full_queue_says_when_to_come_back(opened, brake, monkeypatch):
    """A quarter of the time that its pictures take, by what one took: an average that each batch moves by a fifth. A
    full disk does not count, and each worker has its part."""
    now, follow = [1000.0], Worker.follow

    def slowly(worker, events, units):
        now[0] += 400
        return follow(worker, events, units)

    monkeypatch.setattr(Worker, "follow", slowly)
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    service = opened(limits=Limits(queue=6), batch=2, start=False)
    write, mark_alone = service.store.write, service.store.mark_alone

    def late(written):
        def write_late(*given):
            now[0] += 1e5
            return written(*given)

        return write_late

    monkeypatch.setattr(service.store, "write", late(write))
    monkeypatch.setattr(service.store, "mark_alone", late(mark_alone))
    ask(service, steps=1, count=2)
    service.worker.start()
    assert brake.wait() == 2
    brake.step(2)  # and its pictures
    until(lambda: service.queue.seconds_per_picture != 1)
    assert service.queue.seconds_per_picture == pytest.approx(1 + 0.2 * (400 / 2 - 1))
    for count in (1, 1, 3):
        ask(service, count=count)
    with pytest.raises(APIError, match="try again in 51 s") as refused:  # 40.8 * 5 / 4
        ask(service)
    assert refused.value.headers == {"Retry-After": "51"}
    service.queue.workers = 3
    with pytest.raises(APIError, match="try again in 17 s"):
        ask(service)


# --- cancelling, failing ---------------------------------------------------------------------------------------------


def test_cancel_while_queued_and_while_running(opened, brake):
    service = opened(batch=1)
    running, queued = ask(service, count=2), ask(service, "never drawn")
    brake.wait()
    assert service.queue.cancel(queued.id).state == CANCELLED
    brake.step(5)  # the first picture is finished
    brake.wait()
    brake.step()
    assert service.queue.cancel(running.id).state == CANCELLED
    brake.off()
    until(lambda: not running.drawing or service.queue.waiting(Place()) == [])
    assert [row.id for row in service.store.pictures()] == [running.picture_id(0)]
    assert service.store.job(running.id).state == CANCELLED
    with pytest.raises(APIError, match="is already cancelled") as refused:
        service.queue.cancel(running.id)
    assert refused.value.status == 409 and service.queue.cancel("nobody") is None
    assert ended(ask(service)).state == DONE  # the worker goes on


def test_one_job_of_a_batch_is_cancelled_and_the_others_are_not(opened, brake):
    service = opened(start=False)
    jobs = [ask(service, f"apple {i}", seed=i) for i in range(3)]
    service.worker.start()
    assert brake.wait() == 3
    brake.step(2)
    service.queue.cancel(jobs[1].id)
    brake.off()
    assert [ended(job).state for job in jobs] == [DONE, CANCELLED, DONE]
    assert {row.job for row in service.store.pictures()} == {jobs[0].id, jobs[2].id}
    assert len(list(service.store.folder.rglob("pictures/*/*.png"))) == 2


def test_a_failure_is_the_failure_of_one(opened, monkeypatch):
    batch = drawing.batch

    def failing(sd, each, *more, **named):
        if any(one.prompt == "bad" for one in each):
            raise UserError("the picture is not finite")
        return batch(sd, each, *more, **named)

    monkeypatch.setattr(drawing, "batch", failing)
    service = opened(start=False)
    good, bad, fine = ask(service, seed=1), ask(service, "bad"), ask(service, "fine", seed=2)
    service.worker.start()
    assert [ended(job).state for job in (good, bad, fine)] == [DONE, FAILED, DONE]
    assert "not finite" in bad.error and bad.bad_request
    assert service.worker.failures == 1 and service.worker.pictures == 2


def test_a_full_disk_holds_a_picture_up_and_loses_nothing(opened, monkeypatch, brake):
    monkeypatch.setattr(worker_module, "RETRY", 0.01)
    brake.off()
    service = opened()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        job, other = ask(service), ask(service, "cancelled meanwhile", seed=2)
        until(lambda: job.notes)
        assert "No space left" in job.notes[0] and str(service.store.folder) not in job.notes[0]
        assert job.active and service.worker.is_alive()
        service.queue.cancel(other.id)
    assert ended(job).state == DONE and len(job.notes) == 1
    assert [one.prompt for each in brake.batches for one in each].count("a red apple") == 1  # it was drawn once
    assert [row.job for row in service.store.pictures()] == [job.id]


def test_a_server_stops_while_its_disk_is_full_and_draws_at_the_next_start(opened, monkeypatch):
    service = opened()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        job = ask(service)
        until(lambda: job.notes)
        stop(service)
    again = opened()
    assert ended(again.queue.get(job.id)).state == DONE


def test_pictures_may_be_a_link_to_another_disk(opened, tmp_path):
    other = tmp_path / "other disk"
    other.mkdir()
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    (folder / "pictures").symlink_to(other)
    service = opened()
    job = ended(ask(service))
    path = service.store.path(service.store.picture(job.picture_id(0)))
    assert path.is_file() and path.resolve().is_relative_to(other)
    day = path.parent
    (tmp_path / "moved").mkdir()
    moved = day.resolve().rename(tmp_path / "moved" / day.name)
    day.symlink_to(moved)
    assert service.store.path(service.store.picture(job.picture_id(0))).is_file()


def test_a_history_that_cannot_be_written_holds_the_worker_up_and_loses_nothing(opened, monkeypatch):
    monkeypatch.setattr(worker_module, "RETRY", 0.01)
    service = opened(start=False)
    job, refusals = ask(service), []

    def full(*given):
        refusals.append(1)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(service.store, "mark_started", full)
        service.worker.start()
        until(lambda: len(refusals) >= 2)
        assert service.worker.is_alive() and job.state == QUEUED
    assert ended(job).state == DONE


@pytest.mark.parametrize("write", ["add_picture", "mark_alone"])
def test_a_row_that_cannot_be_written_holds_a_picture_up_and_draws_it_once(opened, monkeypatch, brake, write):
    monkeypatch.setattr(worker_module, "RETRY", 0.01)
    brake.off()
    service = opened(start=False)
    job, refusals, written = ask(service), [], getattr(service.store, write)

    def full(*given):
        if len(refusals) < 2:
            refusals.append(1)
            raise sqlite3.OperationalError("database or disk is full")
        return written(*given)

    monkeypatch.setattr(service.store, write, full)
    service.worker.start()
    assert ended(job).state == DONE and len(refusals) == 2 and len(brake.batches) == 1
    (note,) = job.notes
    assert "database or disk is full" in note and service.worker.pictures == 1


def test_a_job_has_a_time_limit(opened, brake):
    service = opened(limits=Limits(seconds=0.2))
    job = ask(service)
    brake.wait()
    time.sleep(0.3)
    brake.off()
    assert ended(job).state == FAILED and "longer than 0.2 s; ask for fewer steps" in job.error
    assert service.store.pictures() == []


def test_a_picture_that_is_written_while_its_job_is_cancelled_leaves_no_file(opened, monkeypatch):
    service = opened(start=False)
    job, write = ask(service), service.store.write

    def write_and_cancel(*given):
        file = write(*given)
        if job.active:
            service.queue.cancel(job.id)
        return file

    monkeypatch.setattr(service.store, "write", write_and_cancel)
    service.worker.start()
    assert ended(job).state == CANCELLED
    following = ended(ask(service, "the next"))  # by then the worker is done with the first
    assert [row.job for row in service.store.pictures()] == [following.id] and service.worker.pictures == 1
    assert len(list(service.store.folder.rglob("pictures/*/*"))) == 1


# --- nothing is lost -------------------------------------------------------------------------------------------------


def test_after_a_crash_everything_is_drawn_exactly_once(opened, brake):
    service = opened(batch=1)
    first, second = ask(service, count=3, seed=5), ask(service, "second", client="b", seed=9)
    brake.wait()
    brake.step(5)
    brake.wait()  # one picture is finished, another begun
    before = {row.id: service.store.path(row).read_bytes() for row in service.store.pictures()}
    assert len(before) == 1
    service.queue.stopping = True
    brake.step()
    stop(service)

    again = opened(batch=4)
    jobs = {job.id: job for job in again.queue.jobs.values()}
    assert set(jobs) == {first.id, second.id} and sum(job.attempts for job in jobs.values()) == 1
    brake.off()
    for job in jobs.values():
        assert ended(job).state == DONE
    rows = again.store.pictures()
    assert sorted(row.id for row in rows) == sorted([*(first.picture_id(i) for i in range(3)), second.picture_id(0)])
    assert all(again.store.path(again.store.picture(id)).read_bytes() == content for id, content in before.items())
    assert sum(len(each) for each in brake.batches) == 1 + 1 + 3  # drawn, given up, the rest
    assert len(list(again.store.folder.rglob("pictures/*/*"))) == 4


def test_the_last_row_and_the_end_of_its_job_are_one_transaction(opened):
    """A crash right after a picture is entered, and a disk that is full amid it."""
    service = opened(start=False)
    job = ask(service, count=2)
    service.store.add_picture(job, 0, "pictures/a.png", (64, 64))
    job.done.add(0)
    assert service.store.job(job.id).state == QUEUED
    with service.store.transaction() as db:
        db.execute("CREATE TRIGGER full BEFORE UPDATE ON jobs BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(sqlite3.Error, match="disk is full"):
        service.store.add_picture(job, 1, "pictures/b.png", (64, 64))
    assert [row.index for row in service.store.pictures()] == [0]  # neither the row nor the end
    with service.store.transaction() as db:
        db.execute("DROP TRIGGER full")
    service.store.add_picture(job, 1, "pictures/b.png", (64, 64))
    stop(service)
    found = opened(start=False).store.job(job.id)
    assert (found.state, found.done) == (DONE, {0, 1}) and found.finished >= found.created


def test_a_picture_costs_three_flushes_of_the_disk(opened, monkeypatch):
    """One each as its job comes, starts, and ends with its picture: they are what limits a front."""
    service, transactions = opened(start=False), []
    whole = service.store.transaction
    monkeypatch.setattr(service.store, "transaction", lambda: transactions.append(1) or whole())
    jobs = [ask(service, client=name) for name in "ab"]
    service.worker.start()
    assert [ended(job).state for job in jobs] == [DONE, DONE] and service.worker.batches == {2: 1}
    assert len(transactions) == 6
    assert [service.store.job(job.id).state for job in jobs] == [DONE, DONE]


def test_a_job_that_ends_the_server_again_and_again_is_given_up(opened):
    service = opened(start=False)
    job = ask(service)
    for _ in range(3):
        assert service.queue.jobs[job.id].active
        service.store.mark_started(job, 1.0)
        service.store.mark_alone(job, True)
        stop(service)
        service = opened(start=False)
    found = service.store.job(job.id)
    assert found.state == FAILED and "crashed 3 times" in found.error and not service.queue.jobs


@pytest.mark.parametrize("remote", [False, True])
def test_a_sheet_that_ends_the_server_counts_against_its_job(opened, monkeypatch, remote):
    """Whoever draws its pictures: the sheet is made in this process."""
    service, alone = opened(start=False), []
    service.worker.drawer.remote = remote
    job = ask(service, grid=[{"name": "steps", "values": [1, 2]}])
    grid = worker_module.grid

    def look(*given):
        alone.append(service.store.db.execute("SELECT alone FROM jobs").fetchone()[0])
        return grid(*given)

    monkeypatch.setattr(worker_module, "grid", look)
    service.worker.start()
    assert ended(job).state == DONE and alone == [1]
    assert service.store.db.execute("SELECT alone, attempts FROM jobs").fetchone()[:] == (0, 0)


def test_only_drawing_alone_counts_as_the_cause_of_an_end(opened, brake):
    """A server that is killed while it loads a model, or draws two jobs together, says nothing about one of them."""
    service = opened()
    jobs = [ask(service, client=name) for name in "ab"]
    alone = {}
    while not alone:
        brake.wait()
        with service.store.transaction() as db:
            alone = dict(db.execute("SELECT id, alone FROM jobs").fetchall())
        if len(brake.batches[-1]) == 1:  # the first was taken before the second came
            assert sorted(alone.values()) == [0, 1]
            jobs.append(ask(service, client="c"))
            brake.step(5)
            alone = {}
    assert set(alone.values()) == {0}
    service.queue.stopping = True
    brake.step()
    stop(service)
    again = opened(start=False)
    assert all(job.attempts == 0 for job in again.queue.jobs.values()) and again.queue.jobs
    assert all(job.alone for job in again.queue.jobs.values() if again.store.job(job.id).state == RUNNING)


def test_what_a_killed_server_had_not_finished_writing_is_swept(opened, tmp_path):
    day = tmp_path / "data" / "pictures" / "2026-05-14"
    day.mkdir(parents=True)
    (tmp_path / "data" / "inputs").mkdir()
    drafts = [
        day / ".153012-a-0.png.plainsd-0123abcd-4711.part",
        tmp_path / "data" / "inputs" / ".ab.png.plainsd-0123abcd-1.part",
    ]
    kept = [day / "a.png", day / ".note.part", day / "b.part"]
    for path in drafts + kept:
        path.write_bytes(b"x")
    opened(start=False)
    assert not any(path.exists() for path in drafts) and all(path.exists() for path in kept)


# --- the database ----------------------------------------------------------------------------------------------------


def test_a_bad_row_is_marked_and_stands_alone(opened):
    service = opened()
    good, bad = ended(ask(service, seed=1)), ended(ask(service, seed=2))
    stop(service)
    service = opened(start=False)
    waiting, foreign = ask(service, seed=3), ask(service, seed=4)
    with service.store.transaction() as db:
        db.execute("UPDATE images SET settings = '{' WHERE job = ?", (bad.id,))
        db.execute("UPDATE jobs SET pictures = 'null', loras = x'ff' WHERE id = ?", (bad.id,))
        db.execute("UPDATE jobs SET pictures = '[{}]' WHERE id = ?", (waiting.id,))
        (pictures,) = db.execute("SELECT pictures FROM jobs WHERE id = ?", (foreign.id,)).fetchone()
        newer = pictures.replace('"seed"', '"sparkle": 0.5, "seed"')
        db.execute("UPDATE jobs SET pictures = ? WHERE id = ?", (newer, foreign.id))
        db.execute("UPDATE images SET settings = ? WHERE job = ?", (newer[1:-1], good.id))
    stop(service)
    service = opened(start=False)
    first, second = service.store.pictures()
    assert "cannot be read" in first.problem and first.job == bad.id and service.store.path(first).is_file()
    assert second.problem is None and ("sparkle", "0.5") in second.settings.other
    assert picture_as_json(first)["problem"] == first.problem and picture_as_json(second)["problem"] is None
    jobs = {job.id: job for job in service.store.jobs((DONE, FAILED))}
    assert jobs[bad.id].problem and service.as_json(jobs[bad.id])["error"] == jobs[bad.id].problem
    assert jobs[waiting.id].state == FAILED and "cannot be read" in jobs[waiting.id].error
    assert jobs[foreign.id].state == FAILED and "which knows 'sparkle'" in jobs[foreign.id].error
    assert not service.queue.jobs and jobs[good.id].problem is None


def test_databases_of_other_versions(opened, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with closing(sqlite3.connect(folder / "plainsd.sqlite")) as db, db:  # as before versions were counted
        db.executescript(MIGRATIONS[0])
    service = opened()
    assert ended(ask(service)).state == DONE
    with service.store.transaction() as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
        db.execute("PRAGMA user_version = 99")
    stop(service)
    with pytest.raises(UserError, match="of version 99, this plainsd knows up to .*; update it, or choose another"):
        opened(start=False)


def test_a_migration_is_whole_or_not_at_all(opened, monkeypatch):
    stop(opened(start=False))
    monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, "ALTER TABLE jobs ADD COLUMN new TEXT; NONSENSE;"))
    with pytest.raises(UserError, match="cannot use the data folder .*syntax error"):
        opened(start=False)
    monkeypatch.undo()
    service = opened(start=False)
    with service.store.transaction() as db:
        assert "new" not in [row[1] for row in db.execute("PRAGMA table_info(jobs)")]


@pytest.mark.parametrize("where", [0, 4096])
def test_an_unreadable_database_is_one_line(opened, tmp_path, where):
    service = opened(start=False)
    for seed in range(40):
        ask(service, seed=seed)
    stop(service)
    path = tmp_path / "data" / "plainsd.sqlite"
    content = bytearray(path.read_bytes())
    content[where:] = b"\xa5" * (len(content) - where)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot (use|read) the .*choose another place with --data"):
        opened(start=False)


def test_a_proper_stop_counts_no_attempt(opened, brake):
    service = opened()
    job = ask(service)
    brake.wait()
    brake.step()
    service.queue.stop()
    brake.step()
    service.close()
    service.close = lambda: None
    again = opened(start=False)
    assert again.store.job(job.id).state == QUEUED and again.queue.jobs[job.id].attempts == 0


def test_a_stop_that_cannot_be_written_closes_everything(opened, monkeypatch, caplog):
    service = opened(start=False)

    def full():
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(service.store, "requeue_running", full)
        service.close()
    assert [record.getMessage().count("database or disk is full") for record in caplog.records] == [1]
    opened(start=False)  # nothing holds the folder


def test_inputs_live_as_long_as_their_jobs(opened, brake):
    service = opened(batch=1)
    image = noise_picture(64, 64)
    inputs = service.store.folder / "inputs"
    jobs = [ask(service, image=base64_of(image), strength=0.9, seed=i) for i in range(2)]
    assert len(list(inputs.iterdir())) == 1  # the same picture lies there once
    brake.wait()
    service.queue.cancel(jobs[1].id)
    assert len(list(inputs.iterdir())) == 1
    brake.off()
    assert ended(jobs[0]).state == DONE
    assert list(inputs.iterdir()) == []


def test_two_servers_do_not_share_a_data_folder(opened):
    opened(start=False)
    with pytest.raises(UserError, match="another server uses it; stop that one, or choose another place with --data"):
        opened(start=False)


def test_an_unusable_data_folder_is_one_line(opened, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the data folder .*choose another place with --data"):
        opened(data="file", start=False)


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_share_a_budget_and_the_least_recently_used_goes_first(opened, folder):
    paths = [model_folder(folder, name, seed) for seed, name in enumerate(("one", "two", "three"))]
    probe = opened(*paths, data="probe", start=False)
    room = 2.5 * probe.models["one"].bytes
    service = opened(*paths, memory=room)
    for name in ("one", "two", "one", "three", "one", "two"):
        job = ended(ask(service, model=name, seed=3))
        assert job.state == DONE and service.models.bytes() <= room
    assert service.models.loads == 4  # "two" made room for "three", and comes back
    assert [model.name for model in service.models.known.values() if model.sd] == ["one", "two"]
    sd = plainsd.load(paths[1], device="cpu", dtype=torch.float32)
    assert alike(
        Image.open(service.store.path(service.store.pictures()[0])),
        plainsd.final(plainsd.text_to_image(sd, "a red apple", seed=3))[0],
    )


@pytest.mark.parametrize("loaded_before", [False, True])
@pytest.mark.parametrize("look", [lambda models: new_job(JobRequest(), models, Limits(), "me", "jobs"),
                                  lambda models: models.resident(models.default)])  # fmt: skip
def test_a_model_that_is_replaced_while_it_is_not_in_memory_is_read_anew(tmp_path, look, loaded_before):
    """By whoever looks first: the front of a cluster, which loads none, or a worker."""
    models = Models([model_folder(tmp_path)], PoolOptions("cpu", "float32"))
    (model,) = models.known.values()
    if loaded_before:
        models.unload(models.resident(model.name))
    before = model.bytes
    schedule = ScheduleConfig(zero_terminal_snr=True)
    variant = replace(TINY, prediction="v_prediction", schedule=schedule, spacing="trailing")
    plainsd.save(tiny_sd(variant, channels=(32, 128)), tmp_path / "tiny")
    found = look(models)
    assert model.bare.prediction == "v_prediction" and model.bytes > before
    assert found is model or found.settings[0].spacing == "trailing"


def test_a_job_of_a_model_that_is_gone_says_so(opened, folder):
    service = opened(model_folder(folder, "one"), model_folder(folder, "two", 1), start=False)
    job = ask(service, model="two")
    service.close()
    service.close = lambda: None
    again = opened(model_folder(folder, "one"))
    until(lambda: again.store.job(job.id).state == FAILED)
    assert "model 'two' is not served any more" in again.store.job(job.id).error


def test_a_model_that_says_what_it_was_trained_on_gives_ideas(opened, folder, tmp_path):
    path = tmp_path / "taught"
    shutil.copytree(model_folder(folder), path)
    (path / "concepts.json").write_text(
        '{"concepts": [{"phrase": "a taco"}, {"phrase": "grapes"}], '
        '"backgrounds": {"red": [1, 2, 3], "orange": [1, 2, 3]}}'
    )
    assert opened(str(path), start=False).models["taught"].example_prompts == [
        "a taco on a red background", "grapes on an orange background"]  # fmt: skip
    (path / "concepts.json").write_text('{"concepts": [{}], "backgrounds": []}')
    assert opened(str(path), data="other", start=False).models["taught"].example_prompts == []


def test_unknown_models_and_two_of_one_name(opened, folder, tmp_path):
    with pytest.raises(APIError, match="unknown model 'tinny'; did you mean 'tiny'") as refused:
        ask(opened(start=False), model="tinny")
    assert refused.value.status == 404
    with pytest.raises(UserError, match="two models are called 'tiny'"):
        opened(model_folder(folder), model_folder(folder), data="other", start=False)
    with pytest.raises(UserError, match="no model"):
        opened("nowhere at all", data="other", start=False)


def test_states_are_written_before_they_are_told(opened, brake):
    service = opened()
    job = ask(service)
    assert service.store.job(job.id).state in (QUEUED, RUNNING)
    brake.wait()
    assert service.store.job(job.id).state == RUNNING
    brake.off()
    ended(job)
    assert service.store.job(job.id).state == DONE and service.store.job(job.id).done == {0}


@pytest.mark.parametrize("plain", [False, True])
def test_a_server_packs_its_models_and_draws_as_the_command_line(opened, folder, plain):
    service = opened(plain=plain)
    job = ended(ask(service, seed=3))
    sd = plainsd.load(model_folder(folder), device="cpu", dtype="float32")
    if not plain:
        faster(sd)
    drawn = Image.open(service.store.path(service.store.picture(job.picture_id(0))))
    assert drawn.tobytes() == plainsd.final(plainsd.text_to_image(sd, "a red apple", seed=3))[0].tobytes()
    packed = any(isinstance(module, OtherForm) for module in service.models.known["tiny"].sd.unet.modules())
    assert packed == (not plain and can_pack(torch.float32))


# --- LoRAs -----------------------------------------------------------------------------------------------------------


def test_loras_come_and_go_with_their_jobs(opened, folder, tmp_path):
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    for seed, name in enumerate(("paper", "sub/ink")):
        lora_file(model_folder(folder), tmp_path / "loras" / f"{name}.safetensors", seed)
    service = opened(loras=tmp_path / "loras", start=False)
    assert sorted(service.models.loras.known()) == ["ink", "paper"]
    wanted = [("", []), ("<lora:paper:0.8>", [("paper", 0.8)]), ("<lora:ink>", [("ink", 1.0)]), ("", [])]
    jobs = [ask(service, f"a boat {tags}", seed=3) for tags, _ in wanted]
    jobs.append(ask(service, "a boat", seed=3, loras=[{"name": "paper", "strength": 0.8}]))
    service.worker.start()
    assert [ended(job).state for job in jobs] == [DONE] * 5, [job.error for job in jobs]
    assert service.worker.batches == {2: 2, 1: 1}  # those with the same LoRAs together
    rows = [service.store.picture(job.picture_id(0)) for job in jobs]
    pictures = [Image.open(service.store.path(row)) for row in rows]
    for (_, loras), picture, row in zip(wanted, pictures, rows, strict=False):
        sd = plainsd.load(model_folder(folder), device="cpu", dtype="float32",
                          loras=[(service.models.loras.path(name), strength) for name, strength in loras])  # fmt: skip
        assert alike(picture, plainsd.final(plainsd.text_to_image(sd, "a boat", seed=3))[0])
        assert row.loras == [(name, strength, strength) for name, strength in loras]
    assert not alike(pictures[0], pictures[1], 8) and alike(pictures[1], pictures[4])
    told = settings_in_file(service.store.path(rows[4]).read_bytes(), service.limits, service.models)
    assert told["prompt"] == "a boat" and told["loras"] == [{"name": "paper", "strength": 0.8}]
    assert "<lora:paper:0.8>" in pictures[4].info["parameters"]


def test_two_strengths_of_a_lora(opened, folder, tmp_path):
    """On UNet and text encoders: in a tag, in a list, in the picture's text and back."""
    (tmp_path / "loras").mkdir()
    made = plainsd.load(model_folder(folder), device="cpu", dtype="float32")
    lora = inject(made, rank=2, text=True, generator=torch.Generator().manual_seed(0))
    for parameter in lora.parameters():
        parameter.data += 0.3
    save_lora(made, tmp_path / "loras" / "ink.safetensors")
    service = opened(loras=tmp_path / "loras")
    tagged = ended(ask(service, "a boat <lora:ink:0.25:0.75>", seed=3))
    listed = ended(ask(service, "a boat", seed=3, loras=[{"name": "ink", "strength": 0.75, "text_strength": 0.25}]))
    one = ended(ask(service, "a boat", seed=3, loras=[{"name": "ink", "strength": 0.75}]))
    rows = [service.store.picture(job.picture_id(0)) for job in (tagged, listed, one)]
    pictures = [Image.open(service.store.path(row)) for row in rows]
    sd = plainsd.load(model_folder(folder), device="cpu", dtype="float32")
    plainsd.add_lora(sd, tmp_path / "loras" / "ink.safetensors", 0.75, 0.25)
    expected = plainsd.final(plainsd.text_to_image(sd, "a boat", seed=3))[0]
    assert alike(pictures[0], expected) and alike(pictures[0], pictures[1], 0) and not alike(pictures[0], pictures[2])
    entry = {"name": "ink", "strength": 0.75, "text_strength": 0.25}
    assert picture_as_json(rows[0])["loras"] == [entry]
    assert "<lora:ink:0.25:0.75>" in pictures[0].info["parameters"]
    told = settings_in_file(service.store.path(rows[0]).read_bytes(), service.limits, service.models)
    assert told["prompt"] == "a boat" and told["loras"] == [entry]


@pytest.mark.parametrize("plain", [False, True])
def test_a_model_with_loras_has_the_bits_of_the_command_line(opened, folder, tmp_path, monkeypatch, plain):
    """Whatever was on it before, and packed in between. Only another set of LoRAs costs unpacking."""
    (tmp_path / "loras").mkdir()
    for seed, name in enumerate(("paper", "ink")):
        lora_file(model_folder(folder), tmp_path / "loras" / f"{name}.safetensors", seed)
    service, forms, make_plain = opened(loras=tmp_path / "loras", plain=plain), [], pool.make_plain
    monkeypatch.setattr(pool, "make_plain", lambda network: forms.append(make_plain(network)))
    for loras, adapted in ((["paper"], 1), (["ink", "paper"], 2), ([], 3), ([], 3), (["paper"], 4)):
        job = ended(ask(service, "a boat", seed=3, loras=[{"name": name, "strength": 0.8} for name in loras]))
        assert job.state == DONE, job.error
        drawn = Image.open(service.store.path(service.store.picture(job.picture_id(0))))
        sd = plainsd.load(model_folder(folder), device="cpu", dtype="float32",
                          loras=[(service.models.loras.path(name), 0.8) for name in loras])  # fmt: skip
        if not plain:
            faster(sd)
        assert drawn.tobytes() == plainsd.final(plainsd.text_to_image(sd, "a boat", seed=3))[0].tobytes()
        assert len(forms) == 2 * adapted  # UNet and text encoder


def test_a_lora_that_is_not_there_or_does_not_fit_is_refused_at_the_door(opened, folder, tmp_path):
    (tmp_path / "loras").mkdir()
    wide = model_folder(folder, "wide", depth=(2, 1))
    lora_file(wide, tmp_path / "loras" / "wide.safetensors", 0)
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"no such thing")
    (tmp_path / "loras" / "pickle.pt").write_bytes(b"")
    service = opened(loras=tmp_path / "loras", start=False)
    for name, says in (
        ("wide:20000", "20000.* is out of bounds"),
        ("wild", "did you mean 'wide'"),
        ("wide", "wide"),
        ("broken", "broken"),
        ("pickle", "unknown LoRA 'pickle'"),
    ):
        with pytest.raises(APIError, match=says) as refused:
            ask(service, f"a boat <lora:{name}>")
        assert refused.value.status == 422
    assert service.queue.jobs == {}
