"""Advice follows from what it is told: perfect networks scale until the critical batch, slow ones stop earlier, and say why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vaetrain.config import OptimConfig
from vaetrain.scaling.advice import Measurements, advise, images_needed, stops_helping, table, verdict
from vaetrain.scaling.all_reduce import Interconnect

FACTS = Measurements(
    step_s=lambda size: 0.001 + 0.001 * size, knee=32, all_reduce_s=lambda _: 0.0, critical_batch=None,
    base_batch=32, optim=OptimConfig(), total_images=100_000, dataset_images=50_000, rule="none",
)  # fmt: skip


def test_without_costs_processes_scale_perfectly():
    advice = advise(FACTS, (4, 1, 2))
    assert [each.num_processes for each in advice] == [1, 2, 4]
    for each in advice:
        assert each.efficiency == pytest.approx(1, abs=0.05)
        assert each.micro_batch_size <= 32
        assert each.global_batch_size == each.num_processes * each.micro_batch_size * each.grad_accum_steps
        assert each.total_images == 100_000
    assert stops_helping(advice) is None
    assert verdict(advice) == "up to 4 processes each works at 50% of perfect speed-up or more"


def test_beyond_the_critical_batch_more_processes_stop_helping_and_it_says_so():
    advice = advise(replace(FACTS, critical_batch=16.0, base_batch=4), (1, 2, 4, 8, 16, 64))
    hours = [each.hours for each in advice]
    assert hours == sorted(hours, reverse=True)
    assert stops_helping(advice) in (8, 16)
    assert (
        f"stops helping between {stops_helping(advice) // 2} and {stops_helping(advice)}: at the critical batch of 16 images; "
        in verdict(advice)
    )
    assert any("above the critical batch of 16 images" in limit for limit in advice[-1].limits)
    assert advice[-1].total_images > advice[0].total_images


def test_a_slow_network_is_the_limit_and_larger_batches_soften_it():
    network = Interconnect(bytes_per_s=1e9, latency_s=1e-5, source="")
    slow = replace(FACTS, all_reduce_s=lambda count: network.all_reduce_s(4e8, count))
    one, eight = advise(slow, (1, 8))
    assert one.communication == 0
    assert eight.grad_accum_steps > 1  # steps are made rarer
    [with_noise] = advise(replace(slow, critical_batch=256.0), (64,))
    assert "communication" in with_noise.limits
    assert "communication" in table([with_noise])


def test_the_square_root_rule_bounds_the_batch():
    [each] = advise(replace(FACTS, rule="sqrt"), (8,))
    assert each.global_batch_size <= 10 * 32  # β1 = 0.9
    assert each.optim.lr == pytest.approx(1e-3 * (each.global_batch_size / 32) ** 0.5)
    [many] = advise(replace(FACTS, rule="sqrt"), (1024,))
    assert many.global_batch_size == 1024
    assert "beyond the square-root rule: not scaled" in many.limits
    assert many.optim == FACTS.optim


def test_no_batch_is_below_the_base_above_the_data_set_or_too_large_for_the_training():
    knee = replace(FACTS, step_s=lambda size: 0.001 * size, critical_batch=19.0)
    assert [each.global_batch_size for each in advise(knee, (1, 2, 3, 64))] == [32, 32, 33, 64]
    free = replace(FACTS, step_s=lambda size: 1.0, all_reduce_s=lambda _: 1.0, rule="linear")
    assert advise(free, (1,))[0].global_batch_size == 512  # 100,000 images in 100 steps
    assert advise(replace(free, total_images=10**7, dataset_images=300), (1,))[0].global_batch_size == 256
    assert advise(replace(free, total_images=64, dataset_images=40), (1, 40))[0].global_batch_size == 32


def test_a_base_batch_that_divides_badly_is_rounded_up_to_whole_micro_batches():
    [three] = advise(replace(FACTS, base_batch=200, critical_batch=1.0), (3,))
    assert (three.global_batch_size, three.micro_batch_size, three.grad_accum_steps) == (288, 32, 3)


def test_hours_count_whole_steps_and_an_unknown_critical_batch_is_said():
    [each] = advise(replace(FACTS, total_images=100, critical_batch=1e9), (1,))
    assert each.hours == pytest.approx(4 * 0.033 / 3600)
    assert "critical batch not known" not in each.limits
    assert "critical batch not known" in advise(FACTS, (1,))[0].limits
    assert "10,000" in table([replace(each, optim=OptimConfig(warmup_images=10_000))])


def test_images_needed_are_mccandlishs():
    facts = replace(FACTS, critical_batch=32.0)
    assert images_needed(facts, 32) == 100_000
    assert images_needed(facts, 96) == 200_000  # (1 + 3) / (1 + 1)
    assert images_needed(facts, 1) == pytest.approx(51_562, abs=1)


def test_a_ring_moves_each_byte_nearly_twice():
    network = Interconnect(bytes_per_s=100.0, latency_s=0.5, source="")
    assert network.all_reduce_s(1000.0, 1) == 0.0
    assert network.all_reduce_s(1000.0, 2) == pytest.approx(2 * (500 / 100 + 0.5))
    assert network.all_reduce_s(1000.0, 10) == pytest.approx(18 * (100 / 100 + 0.5))
