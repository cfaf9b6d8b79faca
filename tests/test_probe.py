"""The micro-batch probe: its knee and limits, and what running out of memory does to it."""

from __future__ import annotations

import pytest

from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.scaling import probe as module
from vaetrain.scaling.config import ProbeConfig
from vaetrain.scaling.probe import Measurement, Probe, probe


def of(*points: tuple[int, float | None, float | None], safe: float = 10.0) -> Probe:
    return Probe("fp32", False, tuple(Measurement(*point) for point in points), 12.0, safe)


def test_the_knee_is_the_smallest_fast_enough_and_safe_size():
    found = of((1, 0.1, 1.0), (2, 0.11, 2.0), (4, 0.12, 4.0), (8, 0.235, 8.0), (16, 0.4, 11.0), (32, None, None))
    assert found.largest_safe == 8
    assert found.knee.micro_batch_size == 4  # 33.3 images/s of at most 34
    assert of((1, None, None)).knee is None
    assert of((1, 0.1, 11.0)).largest_safe is None


def test_sizes_between_are_on_the_line():
    found = of((1, 0.1, 1.0), (2, 0.2, 1.0), (4, 0.6, 1.0), (8, None, None))
    assert found.step_s(2) == 0.2
    assert found.step_s(3) == pytest.approx(0.4)
    assert found.step_s(8) == 0.6


@pytest.fixture
def config(tiny_shards):
    from launching import TINY

    return parse(Config, None, [*TINY, "--data.train", str(tiny_shards)])


def test_real_steps_are_timed(config, accelerator):
    [found] = probe(config, ProbeConfig(largest=4, num_steps=2, cpu_memory_gib=100.0), accelerator)
    assert [m.micro_batch_size for m in found.measurements] == [1, 2, 4]
    assert all(m.step_s > 0 and m.peak_gib > 0.1 for m in found.measurements)
    assert found.largest_safe == 4
    both = probe(
        config, ProbeConfig(largest=1, num_steps=1, precisions=("fp32", "bf16"), cpu_memory_gib=100.0), accelerator
    )
    assert [each.precision for each in both] == ["fp32", "bf16"]


def test_running_out_of_memory_is_survived_and_narrowed_down(config, accelerator, monkeypatch):
    tried = []

    def steps(config, accelerator, size, num_steps):
        tried.append(size)
        if size > 6:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return [1.0] * num_steps

    monkeypatch.setattr(module, "train_on_dummies", steps)
    [found] = probe(config, ProbeConfig(num_steps=1, cpu_memory_gib=1000.0), accelerator)
    assert tried == [1, 2, 4, 8, 6]
    assert [(m.micro_batch_size, m.step_s) for m in found.measurements] == [(1, 1), (2, 1), (4, 1), (6, 1), (8, None)]
    assert found.largest_safe == 6


def test_on_a_cpu_it_stops_below_the_bound_it_was_given(config, accelerator, monkeypatch):
    sizes = []
    monkeypatch.setattr(module, "train_on_dummies", lambda *_, num_steps: [1.0] * num_steps)
    monkeypatch.setattr(module, "peak_rss_gib", lambda: (sizes.append(0), 1 + 0.1 * 2 ** (len(sizes) - 1))[1])
    [found] = probe(config, ProbeConfig(num_steps=1, cpu_memory_gib=4.0), accelerator)
    assert found.measurements[-1].peak_gib == pytest.approx(2.6)  # 16 images; 32 would take 4.2
    assert found.measurements[-1].micro_batch_size == 16
