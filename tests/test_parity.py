"""One and two processes do the same: losses, weights, and validation of each image exactly once."""

import json

import pytest

import parity_scenarios
from lpips_weights import write_random_lpips_weights
from together import succeed_together


@pytest.fixture(scope="module")
def results(tiny_shards, tmp_path_factory):
    """What parity_scenarios.py saw on one and on two processes."""
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    lpips = tmp_path_factory.mktemp("lpips")
    write_random_lpips_weights(lpips, "alex")
    for num_processes, folder in enumerate(folders, start=1):
        succeed_together(parity_scenarios.scenarios, str(tiny_shards), folder, lpips, num_processes=num_processes)
    one, two = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    return one, two


def check_parity(one, two):
    """The same losses within 1e-5, the same validation, and the same weights on both processes to the bit."""
    assert len(one["losses"]) == 20
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    # AdamW forgives a gradient of the wrong scale; clipping and other optimizers do not.
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-4)
    assert two["elbos"] == pytest.approx(one["elbos"], rel=1e-5)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert two["apart"] == 0


@pytest.mark.parametrize(
    "scenario",
    ["plain", "accumulated", "perceptual", "perceptual, accumulated", "adversarial", "adversarial, accumulated"],
)
def test_two_processes_train_like_one(results, scenario):
    one, two = results
    check_parity(one[scenario], two[scenario])


@pytest.mark.parametrize("scenario", ["perceptual", "perceptual, accumulated"])
def test_the_perceptual_term_is_the_same_on_two_processes_and_counts(results, scenario):
    one, two = (result[scenario] for result in results)
    for name, length in (("perceptual", 20), ("lpips", 1)):
        assert len(one[name]) == length
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    assert one["norm"] != results[0]["plain"]["norm"]


@pytest.mark.parametrize("scenario", ["adversarial", "adversarial, accumulated"])
def test_the_adversarial_term_is_the_same_on_two_processes_and_counts(results, scenario):
    one, two = (result[scenario]["adversarial"] for result in results)
    assert len(one) == 20
    begun = [step for step in one if step[0] is not None]
    assert 18 <= len(begun) < 20
    assert begun[0][1] == 0 < begun[-1][1]
    for mine, theirs in zip(one, two, strict=True):
        assert theirs == (mine if mine[0] is None else pytest.approx(mine, rel=1e-4, abs=1e-5))
    assert results[0][scenario]["norm"] != results[0]["plain"]["norm"]


def test_accumulation_trains_like_a_whole_batch(results):
    one, _ = results
    assert one["accumulated"]["losses"] == pytest.approx(one["plain"]["losses"], rel=1e-5)
    assert one["accumulated"]["grad_norms"] == pytest.approx(one["plain"]["grad_norms"], rel=1e-4)


def test_gradients_are_reduced_in_place_and_buffers_are_left_alone(results):
    _, two = results
    assert two["reduction"] == {"into views of buckets": True, "with buffers": False}


def test_compressed_gradients_differ_a_little_between_processes_and_weights_do_not(results):
    one, two = results
    assert one["compressed"]["losses"] == one["plain"]["losses"]  # nobody to send them to
    assert two["compressed"]["losses"] == pytest.approx(two["plain"]["losses"], rel=1e-2)
    assert two["compressed"]["losses"] != pytest.approx(two["plain"]["losses"], rel=1e-6)
    assert two["compressed"]["apart"] == 0


def test_training_moves(results):
    one, _ = results
    assert one["plain"]["losses"][-1] < 0.9 * one["plain"]["losses"][0]


def test_calling_the_unwrapped_model_is_caught(results):
    one, two = results
    assert two["unwrapped"]["apart"] > 0  # each process has gone its own way
    with pytest.raises(AssertionError):
        check_parity(one["unwrapped"], two["unwrapped"])


def test_every_validation_image_exactly_once(results):
    for result in results:
        assert len(result["validation"]) == 14
        for name, seen in result["validation"].items():
            assert sorted(seen["indices"]) == list(range(23)), name


def test_validation_scores_do_not_depend_on_processes_workers_or_batches(results):
    one, two = results
    expected = one["validation"]["resident, 0 workers, batches of 23"]["scores"]
    for result in (one, two):
        for name, seen in result["validation"].items():
            assert seen["scores"] == pytest.approx(expected, rel=1e-5), name
