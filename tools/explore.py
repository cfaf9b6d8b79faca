"""A page to play with a trained VAE: samples by prior, class, guidance and temperature, a slider for each direction, interpolation.

python tools/explore.py RUN          RUN: a run directory or an export; needs gradio (pip install 'vaetrain[explore]')
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from vaetrain.command_line import parse, user_errors

if TYPE_CHECKING:
    import gradio

    from vaetrain.exploration.explorer import Explorer

ANY_CLASS = "any"
FARTHEST = 3.0
"""Standard deviations that a slider moves at most, either way."""

PRIVATE = {
    "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ALLOWED_PATHS": "", "no_proxy": "*",
}  # fmt: skip
"""What gradio reads as it is imported: it tells nobody of itself, serves no files but this page's
pictures, and asks nobody but its own address, which no proxy knows."""


@dataclass(frozen=True)
class ExploreArguments:
    """Which model, what its directions are measured on, and where the page is."""

    run: tyro.conf.Positional[Path]
    """Run directory or export of the trained model."""

    checkpoint: Literal["best", "last"] = "best"
    """Of a run: checkpoint with the best validation score, or the newest. EMA weights either way."""

    data: str | None = None
    """Shard set on whose training images directions are measured; None: the run's own, where it found them."""

    num_images: int = 1000
    """So many of them, drawn at random."""

    num_directions: int = 8
    """Sliders at most."""

    host: str = "127.0.0.1"
    """Address to listen on: by default only this machine reaches the page; with 0.0.0.0 all that reach this machine do."""

    port: int = 7860
    """TCP port to listen on."""

    device: str | None = None
    """cpu or cuda; None: the GPU where there is one."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name, least in (("num_images", 2), ("num_directions", 0), ("port", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")


def import_gradio(folder: str) -> Any:
    """gradio, made to keep to itself, with its uploads and pictures in `folder`."""
    os.environ.update(PRIVATE, GRADIO_TEMP_DIR=folder)
    try:
        import gradio
    except ImportError as error:
        raise ValueError("explore.py needs gradio; install vaetrain[explore]") from error
    return gradio


def page(gr: Any, explorer: Explorer) -> gradio.Blocks:
    """The page: what it shows is a function of its controls."""
    from vaetrain.exploration.explorer import Draw, tiled
    from vaetrain.priors.config import FlowSettings

    def draw(
        prior: str, class_: str, guidance: float, steps: float, solver: str, temperature: float, seed: float, num: float,
        *shifts: float,
    ) -> Any:  # fmt: skip
        try:
            own = (None if class_ == ANY_CLASS else class_, guidance, int(steps), solver)
            flow = FlowSettings(*own) if prior == "flow-matching" else FlowSettings()
            temperature = temperature if has_temperature(prior) else 1.0
            images = explorer.samples(
                Draw(prior, int(seed), temperature, flow), int(num), [float(each) for each in shifts]
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return tiled(images, columns=max(1, round(int(num) ** 0.5)))

    def interpolate(first: str | None, second: str | None, num: float, path: str) -> Any:
        if first is None or second is None:
            return None  # until both are there
        try:
            ends = [explorer.prepared(Path(file)) for file in (first, second)]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        between = explorer.interpolation(*ends, int(num), path)
        return tiled(torch.cat([ends[0][None], between, ends[1][None]]), columns=len(between) + 2)

    def has_temperature(prior: str) -> bool:
        return prior not in ("mean-code", "random-code")

    def shown(prior: str) -> list[Any]:
        flows = prior == "flow-matching"
        visible = (flows and bool(explorer.classes), flows and explorer.can_guide, flows, flows, has_temperature(prior))
        return [gr.update(visible=each) for each in visible]

    import torch

    picture: dict[str, Any] = {
        "format": "png",
        "interactive": False,
        "buttons": ["download", "fullscreen"],
    }  # and not "share"
    with gr.Blocks(title="vaetrain explore", analytics_enabled=False, delete_cache=(300, 300)) as blocks:
        gr.Markdown(f"## {explorer.name}\n{', '.join(explorer.priors)} · latent {explorer.vae.config.latent_shape}")
        with gr.Tab("Samples"), gr.Row():
            with gr.Column(scale=2, min_width=320):
                first = explorer.best_prior
                flows = first == "flow-matching"
                prior = gr.Dropdown(list(explorer.priors), value=first, label="Prior")
                class_ = gr.Dropdown(
                    [ANY_CLASS, *explorer.classes],
                    value=ANY_CLASS,
                    label="Class",
                    visible=flows and bool(explorer.classes),
                )
                guidance = gr.Slider(
                    0.0, 8.0, 1.0, step=0.1, label="Guidance", info="1: as learned; above: more typical, less varied",
                    visible=flows and explorer.can_guide,
                )  # fmt: skip
                with gr.Row():
                    steps = gr.Slider(1, 50, 10, step=1, label="Steps", info="sample.py takes 30", visible=flows)
                    solver = gr.Dropdown(["heun", "euler"], value="heun", label="Solver", visible=flows)
                temperature = gr.Slider(
                    0.0, 1.5, 1.0, step=0.05, label="Temperature", info="below 1: safer, more alike"
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
                    num = gr.Slider(1, 64, 16, step=1, label="Images")
                names = explorer.directions.names
                what = "Most active units" if len(explorer.vae.config.latent_shape) == 1 else "Principal directions"
                with gr.Accordion(f"{what}, in standard deviations"):
                    gr.Markdown(
                        f"Of the posterior means of {explorer.measured_on}."
                        + ("" if names else " None of them varies: the latent says nothing about the image.")
                    )
                    sliders = [gr.Slider(-FARTHEST, FARTHEST, 0.0, step=0.1, label=name) for name in names]
                    reset = gr.Button("All to 0", visible=bool(names))
            with gr.Column(scale=3):
                grid = gr.Image(show_label=False, elem_id="grid", **picture)
        with gr.Tab("Interpolation"):
            with gr.Row():
                ends = [
                    gr.Image(label=label, type="filepath", image_mode=None, sources=["upload"], height=260)
                    for label in ("From", "To")
                ]
            with gr.Row():
                between = gr.Slider(2, 16, 8, step=1, label="Images between, with both reconstructions")
                path = gr.Radio(["straight", "spherical"], value="straight", label="Path")
            strip = gr.Image(show_label=False, elem_id="strip", **picture)

        inputs = [prior, class_, guidance, steps, solver, temperature, seed, num, *sliders]
        # One picture at a time, and of a slider that is dragged the last place: the model computes on a CPU.
        how: dict[str, Any] = {
            "trigger_mode": "always_last", "concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal",
            "api_visibility": "private",
        }  # fmt: skip
        drawn: dict[str, Any] = {"fn": draw, "inputs": inputs, "outputs": grid, **how}
        blocks.load(**drawn)
        for control in inputs:
            control.input(**drawn)
        prior.input(shown, prior, [class_, guidance, steps, solver, temperature], api_visibility="private")
        reset.click(lambda: [0.0] * len(sliders), None, sliders, api_visibility="private").then(**drawn)
        for control in (*ends, between, path):
            control.change(interpolate, [*ends, between, path], strip, **how)
    return blocks


def main(arguments: ExploreArguments) -> None:
    """Open the model and serve the page until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="vaetrain-explore-") as folder:
        gr = import_gradio(folder)  # before the model, which takes longer

        import torch

        from vaetrain.exploration.explorer import Explorer

        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        explorer = Explorer.open(
            arguments.run, checkpoint=arguments.checkpoint, data=arguments.data, num_images=arguments.num_images,
            num_directions=arguments.num_directions, device=torch.device(device),
        )  # fmt: skip
        print(f"directions are those of {explorer.measured_on}", flush=True)
        blocks = page(gr, explorer)
        blocks.launch(
            server_name=arguments.host, server_port=arguments.port, share=False, quiet=True, inbrowser=False,
            prevent_thread_lock=True, allowed_paths=[], max_file_size="64mb", footer_links=[], run_history=False,
            enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
            theme=gr.themes.Base(font=FONT, font_mono=FONT_MONO),
        )  # fmt: skip
        print(f"exploring {explorer.name} at http://{arguments.host}:{arguments.port}/ (Ctrl-C ends it)", flush=True)
        blocks.block_thread()


FONT, FONT_MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
"""The browser's own: gradio's themes load theirs from other hosts."""

if __name__ == "__main__":
    ARGUMENTS = parse(ExploreArguments, __doc__, flags=True)
    with user_errors():
        main(ARGUMENTS)
