import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from vaetrain.evaluation.image_grid import save_labelled_grid
from vaetrain.evaluation.latent_figures import (
    decode,
    encode_moments,
    save_latent_interpolations,
    save_latent_pca,
    save_prior_comparison,
    save_traversals,
    slerp,
    unit_name,
)
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig

CELL = 80  # 16 pixels, enlarged fivefold


@pytest.fixture(scope="module", params=["map", "vector"])
def vae(request):
    torch.manual_seed(0)
    kind = {"latent": "spatial"} if request.param == "map" else {"latent": "vector", "variational": False}
    config = ModelConfig(
        image_size=16, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4, in_channels=1, **kind
    )
    return VAE(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (9, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kept_figures(monkeypatch):
    """The figures that were drawn."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        plt.close(figure)


def cells(file, rows, columns):
    """The picture, and whether it has about the size of so many cells with labels and margins around them."""
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return pixels, (0 < pixels.shape[0] - rows * CELL < 150 and 0 < pixels.shape[1] - columns * CELL < 350)


def holds(pixels, image):
    """Whether the picture holds an image, enlarged, pixel for pixel."""
    enlarged = image[0].numpy().repeat(5, 0).repeat(5, 1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], (CELL, CELL))
    corner = np.argwhere((windows[:, :, 0, 0] == enlarged[0, 0]) & (windows[:, :, -1, -1] == enlarged[-1, -1]))
    return any(np.array_equal(windows[y, x], enlarged) for y, x in corner)


def test_interpolations(vae, images, tmp_path):
    save_latent_interpolations(vae, images[:5], tmp_path / "a.png", num_steps=3)
    pixels, right_size = cells(tmp_path / "a.png", rows=4, columns=5)
    assert right_size
    codes, _ = encode_moments(vae, images[:2])
    for shown in (images[0], images[3], decode(vae, codes.mean(0, keepdim=True))[0]):
        assert holds(pixels, shown)
    assert not holds(pixels, images[4])
    save_latent_interpolations(vae, images[:1], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_great_circle_keeps_lengths():
    start, end = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0.0, 2, 0]])
    points = slerp(start, end, torch.linspace(0, 1, 5))
    assert points.norm(dim=2) == pytest.approx(torch.full((1, 5), 2.0).numpy())
    assert points[0, [0, -1]] == pytest.approx(torch.cat([start, end]).numpy(), abs=1e-6)
    assert points[0, 1, :2].tolist() == pytest.approx([2 * math.cos(math.pi / 8), 2 * math.sin(math.pi / 8)])
    parallel = slerp(start, 3 * start, torch.tensor([0.5]))
    assert parallel[0, 0] == pytest.approx([4.0, 0, 0])


def test_traversals_move_the_most_active_units(vae, images, tmp_path):
    save_traversals(vae, images, tmp_path / "a.png", num_units=2, num_steps=5)
    pixels, right_size = cells(tmp_path / "a.png", rows=2, columns=6)
    assert right_size
    means, latents = encode_moments(vae, images)
    unit = means.flatten(1).var(0).argmax()
    moved = means[:1].clone().flatten(1)
    moved[0, unit] = latents.flatten(1)[:, unit].mean() + 3 * latents.flatten(1)[:, unit].std()
    five = means[:1].flatten(1).repeat(5, 1)  # decoded together with others, as it was there
    five[4] = moved
    assert holds(pixels, decode(vae, five.reshape(-1, *vae.config.latent_shape))[4])
    assert unit_name(7, (4, 2, 2)) == "(1, 1, 1)"
    assert unit_name(7, (16,)) == "7"


def test_projection(vae, images, tmp_path):
    labels = torch.tensor([0, 1, 2] * 3)
    save_latent_pca(vae, images, labels, ("cat", "dog", "wild"), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 500
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 20


def test_classes_are_named_in_the_projection_whatever_they_are_called(vae, images, tmp_path, kept_figures):
    classes = ("Ba$$in", "A$^$B", "_background_", "plain", "猫\ue000", "w" * 500)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_latent_pca(vae, images, labels, classes, tmp_path / "a.png")
    [legend] = kept_figures[0].legends
    *names, shortened = [text.get_text() for text in legend.get_texts()][:6]
    assert names == ["Ba$$in", "A$^$B", "_background_", "plain", "class 4"]
    assert len(shortened) == 40
    assert len(legend.get_texts()) == (7 if vae.config.variational else 6), "the circles of N(0, I) have an entry"
    assert all(text.get_visible() and not text.get_parse_math() for text in legend.get_texts())
    colours = [handle.get_facecolor()[0].tolist() for handle in legend.legend_handles[:6]]
    assert colours == [list(plt.get_cmap("tab10")(label)) for label in range(6)]


@pytest.mark.parametrize("classes", [("w" * 500, "cat"), [f"class {label}" for label in range(64)]])
def test_long_or_many_names_take_no_room_from_the_projection(vae, tmp_path, kept_figures, classes):
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8)
    save_latent_pca(vae, images, torch.arange(64) % len(classes), classes, tmp_path / "a.png")
    [figure] = kept_figures
    [legend] = figure.legends
    figure.canvas.draw()
    plot, names = figure.axes[0].get_window_extent(), legend.get_window_extent()
    assert plot.width > 3.8 * figure.dpi
    assert names.x0 > plot.x1
    assert names.y0 > 0


@pytest.mark.parametrize("number", [1, 2, 3])
def test_few_images(vae, images, tmp_path, kept_figures, number):
    """What can be drawn is, what has no meaning is left out, and nothing is NaN, about which PyTorch and NumPy would warn."""
    few, labels = images[:number], torch.zeros(number, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_latent_interpolations(vae, few, tmp_path / "interpolations.png")
        save_traversals(vae, few, tmp_path / "traversals.png")
        save_latent_pca(vae, few, labels, ("cat",), tmp_path / "pca.png")
        save_prior_comparison({"standard": images}, tmp_path / "priors.png", real=few)
    drawn = {file.stem for file in tmp_path.glob("*.png")}
    assert drawn == {"priors"} | ({"interpolations", "traversals", "pca"} if number > 1 else set())
    for figure in kept_figures:
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert not [text for text in texts if "nan" in text]


def test_images_that_are_all_alike(vae, images, tmp_path):
    alike = images[:1].expand(3, -1, -1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_traversals(vae, alike, tmp_path / "traversals.png")
        save_latent_pca(vae, alike, torch.zeros(3, dtype=torch.int64), ("cat",), tmp_path / "pca.png")
    assert not (tmp_path / "pca.png").exists()


def test_priors_side_by_side(images, tmp_path):
    samples = {"standard\n−1.4 nats/dim": images[:4], "gmm": images[4:9]}
    save_prior_comparison(samples, tmp_path / "a.png", real=images[:9])
    pixels, right_size = cells(tmp_path / "a.png", rows=3, columns=4)
    assert right_size
    assert holds(pixels, images[7])
    assert not holds(pixels, images[8]), "all rows have the length of the shortest"


def test_grids_of_every_shape(tmp_path):
    for shape in ((1, 1, 1, 28, 28), (2, 3, 3, 128, 128), (1, 1, 3, 8, 8)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        save_labelled_grid(images, tmp_path / "a.png", title="A title much longer than one small picture is wide")
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width > max(shape[1] * shape[4], 300)
            if shape[-1] == 128:
                pixels = np.asarray(picture.convert("RGB"))
                rightmost = images[-1, -1].permute(1, 2, 0).numpy()
                windows = np.lib.stride_tricks.sliding_window_view(pixels, (128, 128, 3))[:, :, 0]
                assert any(
                    np.array_equal(windows[y, x], rightmost)
                    for y, x in np.argwhere((windows[:, :, 0, 0] == rightmost[0, 0]).all(2))
                )
