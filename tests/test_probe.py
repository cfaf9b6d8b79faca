"""The micro-batch probe: its knee and limits, and what running out of memory does to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from launching import TINY
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.model.autoencoder import VAE
from vaetrain.scaling import probe as module
from vaetrain.scaling.config import ProbeConfig
from vaetrain.scaling.probe import Measurement, Probe, probe
from vaetrain.training.throughput import forget_peak_rss, peak_rss_gib


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


@pytest.mark.parametrize("own", ["fp32", "bf16"])
def test_each_probe_runs_in_its_own_arithmetic_whatever_the_config_trains_in(config, accelerator, monkeypatch, own):
    # As `--train.precision` would have started it; there is one Accelerate in a process.
    monkeypatch.setattr(accelerator, "native_amp", own != "fp32")
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "no" if own == "fp32" else own)
    seen: list[object] = []
    forward = VAE.forward

    def watched(self, x, noise):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return forward(self, x, noise)

    monkeypatch.setattr(VAE, "forward", watched)
    config = replace(config, train=replace(config.train, precision=own))
    for precisions in (("fp32", "bf16"), ("bf16", "fp32"), ()):
        seen.clear()
        probe(config, ProbeConfig(largest=1, num_steps=1, precisions=precisions, cpu_memory_gib=100.0), accelerator)
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        assert seen == [dtypes[precision] for precision in precisions or (own,) for _ in range(3)]


def test_fp16_is_scaled_and_no_step_skipped(config, accelerator, monkeypatch):
    config = replace(config, train=replace(config.train, precision="fp16"))
    scales = []
    update = torch.amp.GradScaler.update

    def watched(self):
        update(self)
        scales.append(self.get_scale() if self.is_enabled() else None)

    monkeypatch.setattr(torch.amp.GradScaler, "update", watched)
    probe(config, ProbeConfig(largest=1, num_steps=1, cpu_memory_gib=100.0), accelerator)
    assert scales == [1.0] * 3  # a step that overflows is skipped, and halves it


needs_reset = pytest.mark.skipif(not forget_peak_rss(), reason="no /proc/self/clear_refs")


@needs_reset
def test_the_second_arithmetic_on_a_cpu_is_not_charged_with_the_first_ones_memory(config, accelerator, monkeypatch):
    def steps(config, accelerator, size, num_steps):
        mib = size * (64 if config.train.precision == "fp32" else 32)
        torch.ones(mib * 2**20, dtype=torch.uint8)
        return [1.0] * num_steps

    monkeypatch.setattr(module, "train_on_dummies", steps)
    forget_peak_rss()
    bound = peak_rss_gib() + 0.6
    options = ProbeConfig(num_steps=1, precisions=("fp32", "bf16"), cpu_memory_gib=bound, safe_fraction=1.0)
    fp32, bf16 = probe(config, options, accelerator)
    assert (fp32.largest_safe, bf16.largest_safe) == (8, 16)
    for small, large in zip(fp32.measurements, bf16.measurements[1:], strict=True):
        assert small.peak_gib == pytest.approx(large.peak_gib, abs=0.03)


def test_where_the_peak_cannot_be_reset_that_is_said(config, accelerator, monkeypatch, capsys):
    monkeypatch.setattr(module, "train_on_dummies", lambda *_, num_steps: [1.0] * num_steps)
    monkeypatch.setattr(module, "forget_peak_rss", lambda: False)
    options = ProbeConfig(largest=1, num_steps=1, cpu_memory_gib=100.0)
    probe(config, options, accelerator)
    assert capsys.readouterr().err == ""
    probe(config, replace(options, precisions=("fp32", "bf16")), accelerator)
    assert "run each arithmetic by itself to compare memory" in capsys.readouterr().err
