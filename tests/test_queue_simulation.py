"""bench/queue_simulation.py: its waits are those of queueing theory where that has them, and no picture is lost."""

import importlib.util
import statistics
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "bench" / "queue_simulation.py"


@pytest.fixture(scope="module")
def simulation():
    spec = importlib.util.spec_from_file_location("queue_simulation", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_one_worker_is_m_d_1(simulation):
    """Pollaczek-Khinchine for constant service: a mean wait of load / (2 (1 - load)) services; 20,000 jobs are within
    a tenth of it."""
    world = simulation.World(1, 0.5, (2.0,), batch=1, jobs=20_000, mixed=False)
    found = simulation.Simulation(world).run()
    assert statistics.fmean(found.waits) == pytest.approx(2.0 * 0.5 / (2 * 0.5), rel=0.1)
    assert found.busy / found.end == pytest.approx(0.5, rel=0.03) and found.pictures == len(found.times) == 20_000


def test_batches_are_those_of_the_queue(simulation):
    """Jobs arrive faster than pictures can be drawn one by one; batches of four keep up."""
    single = simulation.World(2, 1.5, (1.0,), batch=1, jobs=500)
    fours = simulation.World(2, 1.5 * 1.6 / 4, (1.0, 1.2, 1.4, 1.6), batch=4, jobs=500)  # at the same rate
    waits = [simulation.quantile(simulation.Simulation(world).run().waits, 0.5) for world in (single, fours)]
    assert waits[1] < waits[0] / 5


def test_failures_draw_again_and_lose_nothing(simulation):
    world = simulation.World(5, 0.5, (1.0, 1.5, 2.0, 2.5), jobs=1000, between_failures=30.0, restart=5.0)
    found = simulation.Simulation(world).run()
    assert len(found.times) == len(found.waits) == 1000 and found.failures > 10
    assert found.lost >= found.failures and found.pictures > 1000


def test_a_slow_front_is_the_limit(simulation):
    """100 workers of 1 s each could draw 100 pictures a second; the front stores 20."""
    world = simulation.World(100, 1.0, (1.0,), batch=1, jobs=2000, front=0.05, mixed=False)
    found = simulation.Simulation(world).run()
    assert found.pictures / found.end == pytest.approx(20, rel=0.05)
    free = simulation.Simulation(simulation.World(100, 1.0, (1.0,), batch=1, jobs=2000, mixed=False)).run()
    assert free.pictures / free.end > 80


def test_its_table_prints(simulation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--workers", "2", "--loads", "0.5", "--hours-between-failures", "1"])
    simulation.main()
    head, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert head.count("|") == row.count("|") and row.startswith("| 2 | 0.5 |")
