"""The files of launch/: what accelerate and Slurm make of them, and training as they start it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch.distributed.run import config_from_args

from launching import LAUNCH, NO_GPU, ROOT, TINY, end, finish, free_port, start
from together import script_succeeds
from vaetrain.distributed import processes
from vaetrain.training.checkpoint import list_checkpoints

SBATCH = ROOT / "launch" / "slurm.sbatch"
HOSTS, FIRST_HOST = Path("/etc/netns"), "first-host"
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.mark.parametrize(
    ("name", "kind", "num_machines", "num_processes"),
    [
        ("gpu1", "NO", 1, 1),
        ("cpu2", "MULTI_GPU", 1, 2),
        ("node8", "MULTI_GPU", 1, 8),
        ("multinode", "MULTI_GPU", 2, 16),
    ],
)
def test_accelerate_reads_every_file(name, kind, num_machines, num_processes):
    assert len(list((ROOT / "launch").glob("*.yaml"))) == 4
    config = load_config_from_file(str(ROOT / "launch" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == (
        kind, num_machines, num_processes,
    )  # fmt: skip
    # "all" and not a list of ids, which would be wrong on every machine but one; no CPU where there are GPUs; and the
    # precision is the run's to choose.
    assert (config.gpu_ids or "all", config.use_cpu, config.mixed_precision) == ("all", False, "no")


def told_torchrun(monkeypatch, arguments):
    """What `accelerate launch ARGUMENTS`, called in the repository's root, makes torchrun start, and the command line."""
    monkeypatch.chdir(ROOT)
    with patch("torch.distributed.run.run") as torchrun:
        launch_command(launch_command_parser().parse_args(arguments))
    config, _, command = config_from_args(torchrun.call_args.args[0])
    assert config.min_nodes == config.max_nodes
    return config, command


@pytest.mark.parametrize(
    ("arguments", "num_machines", "processes_per_machine"),
    [
        ("launch/cpu2.yaml", 1, 2),
        ("launch/node8.yaml", 1, 8),
        ("launch/node8.yaml --num_processes 4", 1, 4),
        ("launch/multinode.yaml --num_machines 4 --num_processes 32 --machine_rank 3", 4, 8),
        ("launch/multinode.yaml --num_machines 1 --num_processes 1", 1, 1),  # sbatch --nodes=1 --gpus-per-node=1
    ],
)
def test_processes_that_each_file_starts(monkeypatch, arguments, num_machines, processes_per_machine):
    config, _ = told_torchrun(monkeypatch, ["--config_file", *arguments.split(), "vaetrain/train.py"])
    assert (config.min_nodes, config.nproc_per_node) == (num_machines, processes_per_machine)


@pytest.mark.parametrize(("name", "set_by_user", "num_threads"), [("gpu1", "3", "3"), ("cpu2", None, "1")])
def test_a_launcher_with_a_file_prints_nothing_of_its_own(tmp_path, name, set_by_user, num_threads):
    """No list of values that it was not passed, no advice about OMP_NUM_THREADS, of which the user's value stays."""
    script = tmp_path / "script.py"
    script.write_text("import os\nif os.environ.get('RANK', '0') == '0':\n    print(os.environ['OMP_NUM_THREADS'])\n")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | NO_GPU
    if set_by_user:
        environment["OMP_NUM_THREADS"] = set_by_user
    result = subprocess.run(
        [sys.executable, *LAUNCH, f"launch/{name}.yaml", "--main_process_port", str(free_port()), script],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{num_threads}\n", "")


def train_tiny(shards, run_dir):
    return ("vaetrain/train.py", "--data.train", shards, *TINY, "--train.epochs", 1, "--run-dir", run_dir)


@pytest.fixture
def hosts():
    """Two network namespaces that see each other through a virtual cable only, as two machines would."""
    if IP is None:
        pytest.skip("two hosts need the command ip (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("two hosts need root, to make network namespaces")
    names = [f"vaetrain-{uuid.uuid4().hex[:8]}-{rank}" for rank in range(2)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"192.168.213.{rank + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
            # `ip netns exec` shows it as /etc/hosts: the first host takes its own name for loopback, as Debian's do. Of two gloo
            # processes the one with the higher address connects, so only addresses above 127 need the right one.
            own_hosts = HOSTS / name / "hosts"
            own_hosts.parent.mkdir(parents=True)
            own_hosts.write_text(f"127.0.0.1 localhost\n{'192.168.213.1' if rank else '127.0.1.1'} {FIRST_HOST}\n")
    except subprocess.CalledProcessError as error:
        remove_hosts(made)
        pytest.skip(f"two hosts need network namespaces, which cannot be made here: {error.stderr.strip()}")
    yield names
    remove_hosts(made)


def remove_hosts(names):
    for name in names:
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", name)
        shutil.rmtree(HOSTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # another test's are in it
        HOSTS.rmdir()


def ip(*arguments):
    return subprocess.run([IP, *arguments], check=True, capture_output=True, text=True).stdout


def bytes_sent(host):
    return json.loads(ip("-n", host, "-s", "-j", "link", "show", "cable"))[0]["stats64"]["tx"]["bytes"]


def training_losses(run_dir):
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["train/loss"]) for record in records if record["split"] == "train"]


def test_two_hosts_train_like_one_process(tiny_shards, tmp_path, hosts):
    """launch/multinode.yaml on two hosts with a shared run directory, against one process on the same images.

    The first takes its own name for loopback, over which gloo would wait for the second for ever.
    """
    alone, together = tmp_path / "alone", tmp_path / "together"
    script_succeeds(*train_tiny(tiny_shards, alone))
    processes = []
    for rank, host in enumerate(hosts):
        processes.append(
            start(
                *LAUNCH, "launch/multinode.yaml", "--num_machines", 2, "--num_processes", 2, "--machine_rank", rank,
                "--main_process_ip", FIRST_HOST, "--main_process_port", 29500, *train_tiny(tiny_shards, together),
                within=(IP, "netns", "exec", host),
                environment=NO_GPU,
                python=sys.executable,
            )
        )  # fmt: skip
    printed = []
    try:
        for process in processes:
            result = finish(process)
            assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
            printed.append(result.stdout)
    finally:
        for process in processes:
            end(process)
    assert ["validation" in lines for lines in printed] == [True, False], "only the main process speaks"
    for run_dir, num_processes in ((alone, 1), (together, 2)):
        assert json.loads((run_dir / "provenance.json").read_text())["num_processes"] == num_processes
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == 2
    (steps, losses), (steps_alone, losses_alone) = (
        zip(*training_losses(run_dir), strict=True) for run_dir in (together, alone)
    )
    assert steps == steps_alone == (1, 2, 4, 5)
    assert losses == pytest.approx(losses_alone, rel=1e-5)
    # The gradients of all five steps went over the cable, in both directions.
    weights = load_file(list_checkpoints(together / "checkpoints")[-1] / "model.safetensors")
    gradient_bytes = 5 * sum(tensor.nbytes for tensor in weights.values())
    assert min(map(bytes_sent, hosts)) > gradient_bytes


@pytest.fixture
def cluster(tmp_path):
    """A folder to submit from, with stand-ins for Slurm's commands and for accelerate that write down what they are told."""
    commands = {
        "bin/scontrol": """
            [[ $1 == requeue ]] && echo "$@" >> "$RECORDS/requeue" && exit
            [[ "$*" == "show hostnames gpu[07-09]" ]] && printf 'gpu%s\\n' 07 08 09""",
        "bin/scancel": """
            echo "$@" >> "$RECORDS/scancel"
            kill -USR1 $(cat "$RECORDS"/pid*)""",
        "bin/srun": """
            while [[ $1 == --* ]]; do echo "$1" >> "$RECORDS/srun"; shift; done
            for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || exit; done""",
        "checkout/.venv/bin/accelerate": """
            printf '%s\\0' "$PWD" "$OMP_NUM_THREADS" "$@" > "$RECORDS/node$SLURM_NODEID" """,
    }
    for name, script in commands.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash{script}\n")
        file.chmod(0o755)
    (tmp_path / "records").mkdir()
    return tmp_path


def submit(cluster, *arguments, **variables):
    """Run slurm.sbatch as Slurm does: a copy of it, on the first node, with these variables set."""
    spooled = shutil.copy(SBATCH, cluster / "slurm_script")
    environment = {
        "PATH": f"{cluster}/bin:{os.environ['PATH']}", "RECORDS": f"{cluster}/records",
        "SLURM_SUBMIT_DIR": f"{cluster}/checkout", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu[07-09]",
        "SLURM_NNODES": "3", "SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4", **variables,
    }  # fmt: skip
    return subprocess.run(
        ["bash", spooled, *arguments], cwd=cluster, env={k: v for k, v in environment.items() if v is not None},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_slurm_starts_one_launcher_on_every_node(cluster, monkeypatch):
    training = ["vaetrain/train.py", "--config", "configs/a b.yaml", "--run-dir", "runs/$HOME; \"x\" 'y' *", ""]
    result = submit(cluster, *training)
    assert result.returncode == 0, result.stderr
    assert (cluster / "records" / "srun").read_text().split() == ["--kill-on-bad-exit=1", "--cpus-per-task=32"]
    for rank in range(3):
        folder, threads, *told = (cluster / "records" / f"node{rank}").read_text().removesuffix("\0").split("\0")
        assert (folder, threads) == (f"{cluster}/checkout", "8")
        assert told == [
            "launch", "--config_file", "launch/multinode.yaml", "--num_machines", "3", "--num_processes", "12",
            "--machine_rank", str(rank), "--main_process_ip", "gpu07", "--main_process_port", "24567", *training,
        ]  # fmt: skip
        config, command = told_torchrun(monkeypatch, told[1:])
        assert (config.min_nodes, config.nproc_per_node, config.rdzv_configs["rank"]) == (3, 4, rank)
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "gpu07:24567")
        assert command == ["-u", *training]


LAUNCHER_TOLD_TO_STOP = """#!/usr/bin/env bash
# Ignores the signal itself, and so do its children until one asks for it: the training, which ends the launcher with 1.
echo $$ > "$RECORDS/pid$SLURM_NODEID"
[[ $SLURM_NODEID == 2 ]] && kill -%s "$(cat "$RECORDS/script")"
[[ $SLURM_NODEID == 2 && %s == USR1 ]] && while ! [[ -f "$RECORDS/scancel" ]]; do sleep 0.05; done
sleep 0.2
exit %d
"""


@pytest.mark.parametrize(
    ("signal_name", "exit_code", "requeued"),
    [("USR1", 1, True), ("USR1", 0, False), ("TERM", 1, False)],
    ids=["out of time", "done just in time", "preempted or cancelled"],
)
def test_slurm_puts_a_job_that_ran_out_of_time_back_into_the_queue(cluster, signal_name, exit_code, requeued):
    """The last node's launcher signals the batch script, as Slurm would."""
    launcher = cluster / "checkout" / ".venv" / "bin" / "accelerate"
    launcher.write_text(LAUNCHER_TOLD_TO_STOP % (signal_name, signal_name, exit_code))
    srun = cluster / "bin" / "srun"
    srun.write_text(srun.read_text().replace("|| exit; done", "|| code=$?; done; exit ${code:-0}"))
    srun.write_text(srun.read_text().replace("bash\n", 'bash\necho $PPID > "$RECORDS/script"\n', 1))
    result = submit(cluster, "vaetrain/train.py")
    assert result.returncode == exit_code, result.stderr
    told = cluster / "records" / "scancel"
    assert (told.read_text().split() if told.exists() else []) == (
        ["--signal=USR1", "1234567"] if signal_name == "USR1" else []
    )
    assert (cluster / "records" / "requeue").exists() == requeued


@pytest.mark.parametrize(
    ("missing", "message"),
    [("SLURM_SUBMIT_DIR", "start this with sbatch"), ("SLURM_GPUS_ON_NODE", "Slurm gave this job no GPUs")],
)
def test_slurm_script_says_what_is_missing(cluster, missing, message):
    result = submit(cluster, "vaetrain/train.py", **{missing: None})
    assert result.returncode != 0
    assert message in result.stderr
    assert not list((cluster / "records").iterdir())


def test_slurm_script_stops_when_a_command_fails(cluster):
    assert submit(cluster, "vaetrain/train.py", SLURM_JOB_NODELIST="other").returncode != 0
    assert not list((cluster / "records").iterdir())
    (cluster / "checkout" / ".venv" / "bin" / "accelerate").write_text("#!/usr/bin/env bash\nexit 7\n")
    assert submit(cluster, "vaetrain/train.py").returncode == 7


def test_a_cluster_user_edits_two_lines():
    text = SBATCH.read_text()
    assert subprocess.run(["bash", "-n", SBATCH], capture_output=True).returncode == 0
    assert [line.split("=")[0] for line in text.splitlines() if "EDIT" in line] == ["#SBATCH --partition", "VENV"]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1"  # the launcher starts the processes, Slurm only the launcher
    assert options.keys() >= {"nodes", "gpus-per-node", "cpus-per-task", "time"}
    first_command = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert "#SBATCH" not in text.partition(first_command)[2]  # sbatch would not read it


@pytest.fixture
def announced():
    """Set the variables of a launcher; they, and what Accelerate made of them, are forgotten afterwards."""
    states = AcceleratorState, PartialState
    before = [dict(state._shared_state) for state in states]  # other tests share an Accelerator
    with patch.dict(os.environ):
        AcceleratorState._reset_state(reset_partial_state=True)
        yield os.environ.update
        AcceleratorState._reset_state(reset_partial_state=True)
    for state, content in zip(states, before, strict=True):
        state._shared_state.update(content)


def test_one_of_two_does_not_train_alone(announced, monkeypatch):
    """On GPUs Accelerate takes a process without LOCAL_RANK for the only one; so does this one, left without cpu=True."""
    monkeypatch.setattr(processes, "PartialState", lambda cpu, **options: PartialState(**options))
    announced({"WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"announced 2 processes \(WORLD_SIZE\) but 1 joined; start with `accelerate"):
        processes.start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU; the test above is about it")
def test_one_of_two_does_not_train_alone_on_the_cpu(announced):
    announced({"WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="MASTER_ADDR"):  # Accelerate's own message
        processes.start()
