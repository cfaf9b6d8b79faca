"""The first quarter of an hour on a GPU: what no CPU can prove, item by item, and how fast training is there.

python tools/gpu_check.py [--json FILE]              one GPU; ends with 0 when every item passes, 1 when one fails
python tools/gpu_check.py --show FILE                what it wrote, as the tables of docs/benchmarks.md
python tools/gpu_check.py --device cpu --tiny True   a rehearsal: the same code on a small model, and no result
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vaetrain.command_line import parse


@dataclass(frozen=True)
class GpuCheckConfig:
    """A shipped network on images of noise."""

    training: Path = Path("configs/afhq.yaml")
    """Configuration whose network is taken."""

    json: Path = Path("gpu_check.json")
    """File for the results."""

    show: Path | None = None
    """Measure nothing: print the tables of such a file."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a rehearsal."""

    tiny: bool = False
    """A network and batches that a CPU computes in seconds."""

    micro_batch_sizes: tuple[int, ...] = (16, 128)
    """Images at a time, smallest first; the network is compiled once at the first and once at the last."""

    steps: int = 20
    """Steps timed for each speed."""

    minutes: float = 12.0
    """Time after which no further item or speed is begun."""


if __name__ == "__main__":
    CONFIG = parse(GpuCheckConfig, __doc__)  # before the imports below, which take seconds

import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_bench import Bench, speeds, train
from vaetrain.distributed.processes import device_name
from vaetrain.distributed.randomness import noise_of_training
from vaetrain.training.async_writer import SnapshotWriter, Tensors
from vaetrain.training.checkpoint import load_into, plain_tensors
from vaetrain.training.memory import GIB, peak_memory
from vaetrain.training.meters import Meters
from vaetrain.training.spikes import SpikeDetector

ROOT = Path(__file__).parents[1]
REHEARSAL = "a rehearsal on a CPU: shows that the code runs, and nothing else"


class Skipped(Exception):
    """An item that cannot be checked here, and why."""


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises RuntimeError."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def step_without_waiting(bench: Bench, reader: str, precision: str) -> str:
    """A third step, after the allocators and the optimizer have made what they keep."""
    size = bench.sizes[0]
    step = bench.step(bench.training(precision, size))
    step.spikes = SpikeDetector(100.0, bench.device)
    meters = Meters(step.names_of_sums, bench.accelerator)
    with bench.batches(size, reader) as batches:
        seen = train(step, batches, 0, 2, meters)
        with refusing_to_wait(bench.device):
            train(step, batches, seen, 1, meters)
    loss = meters.fetch().means["loss"]
    assert loss is not None, "every step was skipped"
    return f"loss {loss:,.0f} nats"


def gradient(bench: Bench, precision: str) -> Tensor:
    """Of the first step, all weights in one vector."""
    step = bench.step(bench.training(precision, bench.sizes[0]))
    if precision == "fp16":  # a scale as in training: at 1, where the memory probe keeps it, small gradients would be 0
        step.engine.scaler = torch.amp.GradScaler(bench.device.type, init_scale=4096.0)  # type: ignore[misc]
    with bench.batches(bench.sizes[0]) as batches:
        step.accumulate(batches, 0, 1.0)
    found = torch.cat([weight.grad.flatten().double() for weight in step.vae.parameters() if weight.grad is not None])
    return found / (4096.0 if precision == "fp16" else 1.0)


def backward(bench: Bench, precision: str) -> str:
    """Gradients point where those of fp32 do."""
    exact, found = gradient(bench, "fp32"), gradient(bench, precision)
    assert torch.isfinite(found).all(), "gradients are not finite"
    cosine = float(torch.nn.functional.cosine_similarity(exact, found, dim=0))
    assert cosine > 0.98, f"the cosine between the gradients of fp32 and {precision} is {cosine:.4f}"
    return f"cosine with fp32 {cosine:.6f}, norms {float(found.norm() / exact.norm()):.4f}"


def noise_of_any_cut(bench: Bench) -> str:
    """Noise and mirrors of 64 images do not depend on who draws them."""
    draw = partial(noise_of_training, 0, shape=(16, 16, 16), device=bench.device)
    whole = draw(slice(16, 80))
    for cuts in ((16, 80), (16, 32, 80), (16, 21, 53, 80)):
        parts = [draw(slice(*pair)) for pair in itertools.pairwise(cuts)]
        for number, name in enumerate(("noise", "mirrors")):
            together = torch.cat([part[number] for part in parts])
            assert torch.equal(together, whole[number]), f"{name} cut at {cuts} differ"
    return "3 cuts of 64 images"


def trained(bench: Bench, name: str, *arguments: str) -> dict[str, Tensor]:
    """Weights after the command `vaetrain/train.py` has trained on eight batches."""
    size, run = bench.sizes[0], bench.folder / name
    command = [
        sys.executable, "vaetrain/train.py", "--config", str(bench.folder / "training.yaml"),
        "--run-dir", str(run), "--train.global-batch-size", str(size), "--train.num-images", str(8 * size),
        "--train.precision", "fp32" if bench.device.type == "cpu" else "bf16", "--train.compile", "False",
        "--train.deterministic", "True", "--checkpoint.every-steps", "2", "--checkpoint.keep-last", "9", "--log.num-pictures", "1",
        *arguments,
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, f"train.py ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}"
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def exact_rerun_and_resume(bench: Bench) -> str:
    """With --train.deterministic: the same command twice, and once more from the middle of the first."""
    first = trained(bench, "first")
    middle = bench.folder / "first" / "checkpoints" / "step-00000004"
    for name, arguments in (("rerun", ()), ("resume", ("--resume", str(middle)))):
        other = trained(bench, name, *arguments)
        differ = [key for key in first if not torch.equal(first[key], other[key])]
        assert not differ, f"the {name} ends with other weights: {len(differ)} of {len(first)} tensors differ"
    return f"{len(first)} tensors equal to the bit, twice"


def flat(files: Tensors) -> dict[str, Tensor]:
    """Copies on the host, by FILE/NAME."""
    return {f"{file}/{name}": tensor.cpu().clone() for file, group in files.items() for name, tensor in group.items()}


def save_beside_training(bench: Bench) -> str:
    """A snapshot taken while steps go on is what a copy made in peace would be."""
    step, writer = bench.step(bench.training("bf16", bench.sizes[0])), SnapshotWriter()
    written: dict[str, Tensor] = {}
    with bench.batches(bench.sizes[0]) as batches:
        seen = train(step, batches, 0, 2)
        bench.synchronize()
        state = step.optimizer.optimizer.state_dict()["state"]
        moments = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
        tensors = {"model": step.vae.state_dict(), "optimizer": moments}
        expected = flat(tensors)
        start = time.perf_counter()
        writer.start(tensors, lambda copies: written.update(flat(copies)))
        step.accumulate(batches, seen, 1.0)
        writer.wait_for_copy()
        queued_s = time.perf_counter() - start
        step.update(1e-3, seen + bench.sizes[0])
        train(step, batches, seen + bench.sizes[0], 2)
    writer.finish()
    differ = [name for name, value in expected.items() if not torch.equal(written[name], value)]
    assert not differ, f"{len(differ)} of {len(expected)} tensors differ, such as {differ[0]}"
    return f"{sum(value.nbytes for value in expected.values()) / 2**20:,.0f} MiB; queued in {1e3 * queued_s:.0f} ms"


def memory_as_estimated(bench: Bench) -> str:
    """Training takes no more than the probe that advises on batch sizes says."""
    if bench.device.type == "cpu":
        raise Skipped("a CPU's memory is not counted")
    size = bench.sizes[-1]
    config = bench.training("bf16", size)
    estimate = peak_memory(config, bench.accelerator, size)
    assert estimate is not None, f"{size} images do not fit"
    step = bench.step(config)
    with bench.batches(size) as batches:
        train(step, batches, 0, 5)
        taken = torch.cuda.max_memory_reserved() / GIB
    assert taken <= 1.05 * estimate + 0.1, f"training took {taken:.2f} GiB, the estimate was {estimate:.2f}"
    return f"{taken:.2f} GiB with {size} images, estimated {estimate:.2f}"


def layout_after_loading(bench: Bench) -> str:
    """Kernels are channels last after loading, and so are their moments."""
    step = bench.step(bench.training("bf16", bench.sizes[0]))
    file = bench.folder / "weights.safetensors"
    save_file(plain_tensors(step.vae), file)
    load_into(step.vae, file)
    with bench.batches(bench.sizes[0]) as batches:
        train(step, batches, 0, 1)
    kernels = [weight for weight in step.vae.parameters() if weight.ndim == 4]
    moments = [step.optimizer.optimizer.state[weight]["exp_avg"] for weight in kernels]
    wrong = [t for t in (*kernels, *moments) if not t.is_contiguous(memory_format=torch.channels_last)]
    assert not wrong, f"{len(wrong)} of {2 * len(kernels)} are not channels last"
    return f"{len(kernels)} kernels"


ITEMS: tuple[tuple[str, Callable[[Bench], str]], ...] = (
    *(
        (f"no wait in a step: {reader}, {precision}", partial(step_without_waiting, reader=reader, precision=precision))
        for reader in ("resident", "indexed", "stream")
        for precision in ("fp32", "bf16", "fp16")
    ),
    *((f"gradients in {precision}", partial(backward, precision=precision)) for precision in ("tf32", "bf16", "fp16")),
    ("noise of any cut", noise_of_any_cut),
    ("layout after loading", layout_after_loading),
    ("save beside training", save_beside_training),
    ("memory as estimated", memory_as_estimated),
    ("rerun and resume, exact", exact_rerun_and_resume),
)


def checked(bench: Bench, name: str, item: Callable[[Bench], str]) -> dict[str, Any]:
    """Whether an item passes, what it found, and its seconds."""
    start = time.monotonic()
    try:
        if start > bench.deadline:
            raise Skipped("time was up")
        verdict, found = "pass", item(bench)
    except Skipped as reason:
        verdict, found = "skipped", str(reason)
    except Exception as error:  # one item must not keep the others from being checked
        verdict, found = "FAIL", f"{type(error).__name__}: {error}".splitlines()[0]
    return {"item": name, "verdict": verdict, "found": found, "seconds": round(time.monotonic() - start, 1)}


def show(result: dict[str, Any]) -> str:
    """The two tables, as Markdown."""
    lines = [f"{result['machine']}, {result['date']}.", ""]
    if result["rehearsal"]:
        lines.insert(0, f"**{REHEARSAL[0].upper()}{REHEARSAL[1:]}.**\n")
    lines += ["| item | | found |", "|---|---|---|"]
    lines += [f"| {row['item']} | {row['verdict']} | {row['found']} |" for row in result["items"]]
    columns = ("arithmetic", "images at a time", "compiled", "checkpointed", "images/s", "MFU", "GiB", "data wait")
    lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in result["speeds"]:
        figures = [row["note"], "", "", ""] if "note" in row else [
            f"{row['images_per_s']:,.0f}", "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['gib']:.2f}", f"{row['data_wait']:.1%}",
        ]  # fmt: skip
        how = [row["precision"], row["micro_batch"], row["compiled"] or "no", "yes" if row["checkpointed"] else "no"]
        lines.append(f"| {' | '.join(map(str, [*how, *figures]))} |")
    return "\n".join(lines)


def main(options: GpuCheckConfig) -> int:
    """Check and measure, or show; returns the exit code."""
    if options.show is not None:
        print(show(json.loads(options.show.read_text())))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: no CUDA device is here; --device cpu --tiny True rehearses without one", file=sys.stderr)
        return 2
    if options.device == "cpu":
        print(REHEARSAL)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        machine = f"{device_name(bench.device)}, {platform.machine()}, torch {torch.__version__}, {options.training}"
        result: dict[str, Any] = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "items": [], "speeds": []}
        result["rehearsal"] = options.device == "cpu"
        items = (("items", checked(bench, name, item)) for name, item in ITEMS)
        for kind, row in itertools.chain(items, (("speeds", row) for row in speeds(bench))):
            result[kind].append(row)
            options.json.write_text(json.dumps(result, indent=2) + "\n")  # each time: the machine may be taken away
            print(*row.values(), sep="  ", flush=True)
    print(f"\n{show(result)}\n\nwritten to {options.json}")
    return int(any(row["verdict"] == "FAIL" for row in result["items"]))


if __name__ == "__main__":
    raise SystemExit(main(CONFIG))
