"""Starting and ending a script: launching ranks, one-line errors, Ctrl-C and SIGTERM, exit codes,
leaving the process group.

Without a GPU, `accelerate launch --num_processes N` starts one process, whatever N is (Accelerate
1.15; only its GPU launchers and mpirun start more). Our scripts notice this and launch the N ranks
themselves.
"""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from mtsql.files import WriteError, fault_of_name, in_one_line, prepare_output
from mtsql.run.checkpoint import clean, what_is_kept
from mtsql.run.config import parse_config
from mtsql.run.locks import RunLock
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import NotFinite
from mtsql.run.signals import (
    LAUNCHERS,
    exit_code,
    follow_launcher,
    ignore_stops,
    name_of,
    stoppable,
)
from mtsql.run.trackers import Tracker, require_trackers

RANK_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
ADVICE = "start them with: accelerate launch --multi_gpu --num_machines 1 --num_processes N SCRIPT"
LAST_LINE = str(Path(__file__).with_name("last_line.py"))
QUIET_HINT = "A traceback of the launcher follows; `accelerate launch -q` prints none."
NOTHING_LEARNED = 3
"""Exit code of a training in which no optimizer step was taken."""
MAX_WAIT = timedelta(hours=3)
"""How long a rank waits for the others in a collective: their rollouts may take far longer than its
own."""


def run_script(main: Callable, kind: type, description: str, presets: Path | None = None) -> None:
    """Read the flags and call `main` with the configuration, completed if it has a method
    `completed()`.

    Exit codes: 0; 1 for the user's mistakes (ValueError), in one line; NOTHING_LEARNED, with a line
    that says why; 130 for Ctrl-C and 143 for SIGTERM.
    """
    grow_gpu_memory_in_place()
    is_main = os.environ.get("RANK", "0") == "0"
    with stoppable(on_sigterm=is_main):  # only the main rank has files to write then
        try:
            follow_launcher()
            prepare_output()
            config = parse_config(kind, sys.argv[1:], description, presets)
            # A dry run completes its configuration itself, when it has a model to look at.
            if hasattr(config, "completed") and not getattr(config, "dry_run", False):
                config = config.completed()  # names mistakes before other processes are started
            start_missing_ranks()
            main(config)
        except ValueError as error:
            end_with(in_one_line(f"error: {error}"), 1)
        except OSError as error:
            fault = fault_of_name(error)
            if fault is None:
                raise
            end_with(f"error: {fault}", 1)
        except NothingLearned as error:
            leave_group()
            end_with(f"warning: {error}", NOTHING_LEARNED)
        except KeyboardInterrupt as stop:
            ignore_stops()
            sys.stdout.flush()
            line = f"{name_of(stop)}: {stop}" if str(stop) else name_of(stop)
            # Another rank may be waiting in a collective: no clean-up is possible.
            end_with(line, exit_code(stop), at_once=torch.distributed.is_initialized())
        leave_group()


@contextmanager
def run_folder(
    ranks: Ranks,
    folder: Path,
    can_resume: bool = True,
    purpose: str = "run",
    wait: bool = False,
    kept: Callable[[Path], str] = what_is_kept,
) -> Iterator[None]:
    """Hold the lock of a run folder inside the `with`. No rank reads or writes the run outside of
    it.

    ValueError, on the main rank, if another process has the lock. Files that a killed process left
    half written are deleted. A run can end early: by a signal, because a file cannot be written, or
    because a number is not finite. Then `kept(folder)` completes the message, which says what is
    kept and how to continue. `can_resume` is False for a run that keeps nothing. `purpose` and
    `wait` are those of `RunLock`.
    """
    lock = RunLock(folder, purpose, wait)

    def take() -> None:
        lock.acquire()
        clean(folder)

    try:
        ranks.on_main(take)
        yield
    except KeyboardInterrupt as stop:
        if str(stop) or not can_resume:
            raise
        raise type(stop)(kept(folder)) from None
    except (WriteError, NotFinite) as error:
        raise ValueError(f"{error}; {kept(folder) if can_resume else 'nothing is kept'}") from error
    finally:
        lock.release()


class NothingLearned(Exception):
    """A training ended without any optimizer step. The text says why."""


def end_with(line: str, code: int, at_once: bool = False) -> NoReturn:
    """Print a line as the last one and leave with this exit code, `at_once` without any clean-up.

    `accelerate launch` prints a traceback of its own after a script that ends with any exit code
    but 0, and after Ctrl-C, which the launcher gets, too. This process cannot prevent that.
    So last_line.py waits until the launcher has ended and prints the line after the traceback. The
    launcher's flag -q turns the traceback off, but only with one process and not after Ctrl-C;
    QUIET_HINT says so to users who did not give the flag.
    """
    ignore_stops()  # when one rank has ended, the launcher ends the others: print this line first
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first or code == 1:  # a mistake may concern one rank only
        launcher = find_launcher()
        is_stop = code >= 128  # then the launcher's traceback comes first, and one line is enough
        can_be_quiet = os.environ.get("WORLD_SIZE", "1") == "1" and not is_stop
        comes_again = launcher is not None and not (launcher.is_quiet and can_be_quiet)
        if not (comes_again and is_stop):
            print(line, file=sys.stderr, flush=True)
        if comes_again and can_be_quiet:
            print(QUIET_HINT, file=sys.stderr, flush=True)
        if launcher is not None and comes_again:
            subprocess.Popen(
                [sys.executable, "-P", LAST_LINE, str(launcher.pid), line, str(code)],
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # so that it is not ended together with the ranks
            )
    if at_once:
        os._exit(code)
    sys.exit(code)


@dataclass(frozen=True)
class Launcher:
    """The `accelerate launch` that started this process, directly or not."""

    pid: int
    words: tuple[str, ...]
    """What follows `launch` on its command line."""
    num_threads: int | None
    """Threads that its user set by OMP_NUM_THREADS. None: the user did not set it."""

    @property
    def is_quiet(self) -> bool:
        """Whether the launcher prints no traceback."""
        return any(word in ("-q", "--quiet") for word in self.words)


def find_launcher() -> Launcher | None:
    """Look for `accelerate launch` among the ancestors of this process. None if it is not there or
    cannot be inspected."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # every launch sets it
        return None
    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            found = [i for i, word in enumerate(words) if Path(word).name in LAUNCHERS]
            if found:
                asked = process.environ().get("OMP_NUM_THREADS", "")
                num_threads = int(asked) if asked.isdigit() else None
                return Launcher(process.pid, tuple(words[found[0] + 1 :]), num_threads)
    except psutil.Error:
        pass
    return None


def leave_group() -> None:
    """Leave the ranks' process group. Call it when nothing refers to the wrapped policy any more.

    If DDP's reducer is freed after the process group, it joins gloo's threads while holding the
    GIL. A thread that waits for the GIL then deadlocks, or the process aborts (seen with torch
    2.13).
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_accelerator(
    mixed_precision: str, trackers: Sequence[Tracker] = (), run: str = ""
) -> Accelerator:
    """The Accelerator of a script, on the GPU if there is one, with trackers that may write to the
    folder `run`. ValueError if the launcher was given another precision than `mixed_precision`, or
    for a tracker that is not installed."""
    require_trackers(trackers)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed_precision):
        raise ValueError(
            f"accelerate's --mixed_precision is {asked}, but model.dtype means {mixed_precision}: "
            "set model.dtype only"
        )
    has_gpu = torch.cuda.is_available()
    plugin = _sharding(mixed_precision)
    if not has_gpu:
        keep_freed_memory()
    if not has_gpu and os.environ.get("OMP_NUM_THREADS") == "1" and not _asked_for_threads():
        # `accelerate launch` sets this by itself, but a run on a CPU needs all cores.
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    accelerator = Accelerator(
        cpu=not has_gpu,
        mixed_precision=mixed_precision,
        fsdp_plugin=plugin,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(logging_dir=os.path.join(run, "tensorboard")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=MAX_WAIT)],
    )
    if plugin and not accelerator.is_fsdp2:
        if accelerator.num_processes == 1:
            raise ValueError(
                "--use_fsdp shards over several processes: set --num_processes 2 or more, "
                "or leave it out"
            )
        # Without a GPU, Accelerate ignores the flag and would train whole copies, although its own
        # FSDP2 code runs there too.
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def _asked_for_threads() -> bool:
    """Whether the user, and not only `accelerate launch`, has set the number of threads."""
    launcher = find_launcher()
    if launcher is None:
        return "ACCELERATE_MIXED_PRECISION" not in os.environ
    flag = "__num_cpu_threads_per_process"
    words = [word.replace("-", "_") for word in launcher.words]
    return launcher.num_threads is not None or any(word.startswith(flag) for word in words)


def _sharding(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 if `accelerate launch --use_fsdp --fsdp_version 2` was given, else None. ValueError
    that names a flag which we do not support or have a key of our own for.

    Decoder layers are sharded one by one unless another wrap policy is named. Gradients are summed
    in float32 and log-probs keep their type (Accelerate would round both to bfloat16). Every rank
    reads the weights itself: loading on rank 0 only, the launcher's default, unties tied
    embeddings.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED") or _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "--use_deepspeed and --use_megatron_lm are not supported: "
            "shard with --use_fsdp --fsdp_version 2"
        )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("--use_fsdp needs --fsdp_version 2: FSDP1 is not supported")
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise ValueError(
            "--fsdp_offload_params is not supported: set optim.offload, "
            "which keeps Adam's averages in host memory"
        )
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError(
            "--fsdp_activation_checkpointing is not supported: set model.gradient_checkpointing"
        )
    compute_dtype = torch.bfloat16 if mixed_precision == "bf16" else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy=os.environ.get(  # type: ignore[arg-type]  # Accelerate checks the name
            "FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"
        ),
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32
        ),
    )


def _is_set(name: str) -> bool:
    """Whether an environment variable is "true"."""
    return os.environ.get(name, "false").lower() == "true"


def keep_freed_memory() -> None:
    """Have malloc keep freed memory for the next tensors (glibc only; elsewhere nothing happens).

    By default malloc returns large pieces to the system at once, and the system clears each page
    that is used again: a tenth of the time of an update (LOG.md). With this the process keeps the
    memory of its peak until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: map no piece on its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep all free memory at the end of the heap


def grow_gpu_memory_in_place() -> None:
    """Have torch enlarge the pieces of GPU memory that it holds, unless the user has configured its
    allocator. By default it takes new pieces: if one tensor stays in the piece of a freed cache,
    the next cache does not fit into it.

    torch reads the variable when CUDA is first asked for anything, such as what the GPU can
    compute. So call this before the flags are read.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def start_missing_ranks() -> None:
    """If `accelerate launch` was given several processes and started only this one, launch the
    ranks and exit when they have ended.

    In that case its environment has a MASTER_ADDR and no rank. The number of processes is read
    from its command line or its config file. ValueError that says what to do instead if it cannot
    be read. A rank that fails has printed its traceback and ended the other ranks.
    """
    env = os.environ
    if (
        "ACCELERATE_MIXED_PRECISION" not in env
        or "MASTER_ADDR" not in env
        or any(n in env for n in RANK_VARIABLES)
    ):
        return
    if torch.cuda.is_available():
        raise ValueError(
            "accelerate was asked for several processes and found one GPU; "
            f"if you mean it, {ADVICE}"
        )
    launcher = find_launcher()
    if launcher is None:
        raise ValueError(f"accelerate started one process only; {ADVICE}")

    # Slow to import, and only needed here.
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = launch_command_parser().parse_args(list(launcher.words))
    file = asked.config_file
    if not file and os.path.isfile(default_config_file):
        file = default_config_file
    saved = load_config_from_file(file) if file else None
    num_machines = asked.num_machines or getattr(saved, "num_machines", None) or 1
    num_processes = asked.num_processes or getattr(saved, "num_processes", None) or num_machines
    flags = ["--nproc_per_node", str(num_processes // num_machines)]
    if num_machines > 1:
        rank = asked.machine_rank
        if rank is None:
            rank = getattr(saved, "machine_rank", 0)
        flags += ["--nnodes", str(num_machines), "--node_rank", str(rank)]
        flags += ["--master_addr", env["MASTER_ADDR"], "--master_port", env["MASTER_PORT"]]
    else:
        flags.append("--standalone")
    ranks = torchrun.get_args_parser().parse_args([*flags, sys.argv[0]])
    ranks.training_script_args = sys.argv[1:]
    try:
        torchrun.run(ranks)
    except ChildFailedError as error:
        raise SystemExit(max(failure.exitcode for failure in error.failures.values())) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    raise SystemExit(0)
