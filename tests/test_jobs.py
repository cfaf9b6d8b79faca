"""Jobs: why one failed, in its own words and not its launcher's, and which GPUs each may see."""

from __future__ import annotations

import json
import sys

import pytest

from launching import LAUNCH, ROOT, TWO_PROCESSES, free_port, warm_python
from vaetrain.sweeps.jobs import MAX_WORDS, Job, error_summary, run_jobs

ONE_PROCESS = (*LAUNCH, "launch/gpu1.yaml")
TWO = (*TWO_PROCESSES, "--main_process_port", str(free_port()))
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "1")
NO_SHARDS = ("vaetrain/train.py", "--data.train", "nowhere")
BAD_RATE = "Error parsing optim: --optim.lr is -1.0; it must be positive"
KILLED = "import os, signal; print('step 1', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
RAISES = "raise RuntimeError('odd shape\\nof two lines')"


def job_of(folder, command, **fields) -> Job:
    return Job("job", tuple(command), folder / "job.json", folder / "job.log", **fields)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((*TWO, *NO_SHARDS, "--optim.lr=-1"), BAD_RATE),
        ((*ONE_PROCESS, *NO_SHARDS), "error: shard set nowhere does not exist; make one with"),
        ((*ONE_PROCESS, *NO_SHARDS, "--optim.lrr=1"), "Unrecognized options: --optim.lrr=1 ("),
        ((*TORCHRUN, "{folder}/raises.py"), "RuntimeError: odd shape ("),
        ((*ONE_PROCESS, "{folder}/killed.py"), "ended by SIGKILL ("),
        ((*TORCHRUN, "{folder}/killed.py"), "ended by SIGKILL ("),
    ],
)
def test_the_reason_is_the_trainings_own_and_not_its_launchers(tmp_path, monkeypatch, command, reason):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("VAETRAIN_TRACEBACK", raising=False)
    (tmp_path / "raises.py").write_text(RAISES)
    (tmp_path / "killed.py").write_text(KILLED)
    job = job_of(tmp_path, [warm_python(), *(word.replace("{folder}", str(tmp_path)) for word in command)])
    run_jobs([job], processes=1, root=ROOT)
    assert job.reason.startswith(reason)
    assert job.reason.endswith(f"(exit code 1; {job.log_file})")


def test_a_message_that_the_option_parser_wraps_is_whole_and_a_long_one_is_cut(tmp_path):
    words = "invalid choice 'xyz' for argument '--optim.schedule'. Expected one of ('cosine', 'constant')."
    framed = """note: before
╭─ Invalid choice ───────────────────────────────────────────────╮
│ invalid choice 'xyz' for argument '--optim.schedule'. Expected │
│ one of ('cosine', 'constant').                                 │
│ ────────────────────────────────────────────────────────────── │
│ For full helptext, run vaetrain/train.py --help                │
╰────────────────────────────────────────────────────────────────╯
"""
    not_utf8 = """note: before
 Invalid choice
 ----------------------------------------------------------------
  invalid choice 'xyz' for argument '--optim.schedule'. Expected
  one of ('cosine', 'constant').
  ----------------------------------------------------------------
  For full helptext, run vaetrain/train.py --help
"""
    assert [error_summary(framed), error_summary(not_utf8)] == [words, words]
    long = error_summary(f"error: {'x' * 1000}\n")
    assert (len(long), long[-1]) == (MAX_WORDS, "…")
    assert error_summary("") == "it said nothing"
    assert error_summary("one\ntwo  \n\n") == "two"


def test_the_reason_is_of_the_last_start_alone(tmp_path):
    (tmp_path / "job.log").write_text("error: of yesterday\n")
    job = job_of(tmp_path, (sys.executable, "-c", "raise SystemExit('today')"))
    run_jobs([job], processes=1, root=ROOT)
    assert job.reason.startswith("today")
    assert json.loads(job.record_file.read_text())["reason"] == job.reason


@pytest.mark.parametrize(
    ("visible", "num_gpus", "processes", "shares"),
    [
        (None, 4, 2, {"0,2", "1,3"}),
        (None, 4, 3, {"0,3", "1", "2"}),
        (None, 1, 2, {"0"}),
        ("5,GPU-ab", 4, 2, {"5", "GPU-ab"}),
        ("3,-1,2", 4, 2, {"3"}),
        ("", 4, 2, {""}),
        (None, 0, 2, {"unset"}),
        (None, 4, 1, {"unset"}),
    ],
)
def test_jobs_at_a_time_share_the_gpus(tmp_path, monkeypatch, visible, num_gpus, processes, shares):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\nfor n in $(seq 0 {num_gpus - 1}); do echo "GPU $n: NVIDIA X (UUID: GPU-$n)"; done\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    # Each waits for its neighbours, so that all places are taken; twice as many jobs take the places again.
    jobs = []
    for n in range(2 * processes):
        last = n // processes * processes + processes - 1
        code = f"echo ${{CUDA_VISIBLE_DEVICES-unset}}; touch {n}; until test -e {last}; do sleep 0.05; done"
        jobs.append(Job(str(n), ("sh", "-c", code), tmp_path / f"{n}.json", tmp_path / f"{n}.log"))
    run_jobs(jobs, processes=processes, root=tmp_path)
    seen = [job.log_file.read_text().strip() for job in jobs]
    assert set(seen) == shares
    assert sorted(seen[:processes]) == sorted(seen[processes:])
