"""How a script starts and ends: the ranks that were asked for, errors in one line, Ctrl-C and
SIGTERM, exit codes.

`accelerate launch --num_processes N` without a GPU starts one process whatever N is (Accelerate
1.15; only its GPU launchers and mpirun start more). Our scripts notice, and launch the N ranks
themselves.
"""

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from mtsql.files import WriteError, in_one_line
from mtsql.run.checkpoint import clean, what_is_kept
from mtsql.run.config import parse_config
from mtsql.run.locks import RunLock
from mtsql.run.runlog import NotFinite
from mtsql.run.signals import (
    LAUNCHERS,
    PEER_SECS,
    exit_code,
    follow_launcher,
    ignore_stops,
    name_of,
    stoppable,
)

RANK_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
ADVICE = "start them with: accelerate launch --multi_gpu --num_machines 1 --num_processes N SCRIPT"
LAST_LINE = str(Path(__file__).with_name("last_line.py"))
NOTHING_LEARNED = 3
"""Exit code of a training in which no optimizer step was taken."""
PATIENCE = timedelta(hours=3)
"""How long a rank waits for the others at a meeting point: their rollouts may take far longer than
its own."""


def run_script(
    main: Callable, kind: type, description: str, presets: dict[str, dict] | None = None
) -> None:
    """Read the flags and call `main` with the configuration.

    Exit codes: 0; 1 for the user's mistakes (ValueError), in one line; NOTHING_LEARNED, with a line
    that says why; 130 for Ctrl-C and 143 for SIGTERM.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    with stoppable(on_sigterm=is_main):  # only the main rank has something to write then
        try:
            follow_launcher()
            config = parse_config(kind, sys.argv[1:], description, presets)
            if hasattr(config, "completed"):
                config = (
                    config.completed()
                )  # a mistake is named before any other process is started
            start_missing_ranks()
            main(config)
        except ValueError as error:
            end_with(in_one_line(f"error: {error}"), 1)
        except NothingLearned as error:
            leave_group()
            end_with(f"warning: {error}", NOTHING_LEARNED)
        except KeyboardInterrupt as stop:
            ignore_stops()
            sys.stdout.flush()
            line = f"{name_of(stop)}: {stop}" if str(stop) else name_of(stop)
            # Another rank may be waiting in a collective: no clean-up can be agreed on.
            end_with(
                line, exit_code(stop), os._exit if torch.distributed.is_initialized() else sys.exit
            )
        leave_group()


def on_main(accelerator: Accelerator, function: Callable, *arguments: Any) -> None:
    """Call a function on the main rank while the others wait. A ValueError of it ends them all: the
    main rank with that error, the others without a word."""
    error = None
    if accelerator.is_main_process:
        try:
            function(*arguments)
        except ValueError as raised:
            error = raised
    is_bad = [error is not None]
    broadcast_object_list(is_bad)
    if error is not None:
        raise error
    if is_bad[0]:
        time.sleep(PEER_SECS)  # the launcher ends the main rank when this one has ended
        raise SystemExit(1)


def from_main(accelerator: Accelerator, function: Callable, *arguments: Any) -> Any:
    """What a function returns on the main rank, on all ranks: they must not decide differently by
    what each sees in a folder."""
    value = [function(*arguments) if accelerator.is_main_process else None]
    broadcast_object_list(value)
    return value[0]


@contextmanager
def run_folder(
    accelerator: Accelerator,
    folder: Path,
    can_resume: bool = True,
    purpose: str = "run",
    wait: bool = False,
    kept: Callable[[Path], str] = what_is_kept,
) -> Iterator[None]:
    """Hold the lock of a run folder inside the `with`; no rank reads or writes the run outside of
    it.

    ValueError, on the main rank, if another process has the run. What a killed process left half
    written is deleted. A run that is stopped, or that cannot go on because a file cannot be written
    or a number is not finite, says what is kept and, if it `can_resume`, how to go on, in the words
    of `kept`. `purpose` and `wait` as in `RunLock`.
    """
    lock = RunLock(folder, purpose, wait)

    def take() -> None:
        lock.acquire()
        clean(folder)

    try:
        on_main(accelerator, take)
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
    """A training ended in which no optimizer step was taken. The text says why."""


def end_with(line: str, code: int, leave: Callable[[int], Any] = sys.exit) -> None:
    """Print a line as the last one and leave with this exit code.

    `accelerate launch` prints a traceback of its own after a script that ends with an error, so
    last_line.py waits until it has ended and prints the line again. With `accelerate launch -q`
    one process of a script needs that only after Ctrl-C, which ends the launcher in a traceback all
    the same.
    """
    ignore_stops()  # the launcher ends all ranks when one has ended: this line comes first
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first or code == 1:  # a mistake may concern one rank only
        launcher = find_launcher()
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if launcher is not None and not (launcher.is_quiet and is_alone and code < 128):
            subprocess.Popen(
                [sys.executable, "-P", LAST_LINE, str(launcher.pid), line, str(code)],
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # not ended together with the ranks
            )
        print(line, file=sys.stderr, flush=True)
    leave(code)


@dataclass(frozen=True)
class Launcher:
    """The `accelerate launch` that started this process, directly or not."""

    pid: int
    words: tuple[str, ...]
    """What follows `launch` on its command line."""
    num_threads: int | None
    """Threads that its user asked for with OMP_NUM_THREADS. None: not asked."""

    @property
    def is_quiet(self) -> bool:
        """Whether it prints no traceback."""
        return any(word in ("-q", "--quiet") for word in self.words)


def find_launcher() -> Launcher | None:
    """Look for `accelerate launch` among the processes that this one comes from. None if it is not
    there or cannot be looked at."""
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
    """Leave the ranks' process group; to be called when nothing holds the wrapped policy any more.

    A DDP reducer that outlives the group takes its threads down with it while it holds the
    interpreter's lock, which one of them may be waiting for: the rank would hang at its very end,
    or abort (seen with torch 2.13 and gloo).
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The Accelerator of a script, on the GPU if there is one. ValueError if the launcher wants
    another precision."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed_precision):
        raise ValueError(
            f"accelerate's --mixed_precision is {asked}, but model.dtype means {mixed_precision}: set model.dtype only"
        )
    has_gpu, plugin = torch.cuda.is_available(), _sharding(mixed_precision)
    if not has_gpu:
        keep_freed_memory()
    if not has_gpu and os.environ.get("OMP_NUM_THREADS") == "1" and not _asked_for_threads():
        # What `accelerate launch` sets unasked; a CPU run wants every core.
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    accelerator = Accelerator(
        cpu=not has_gpu,
        mixed_precision=mixed_precision,
        fsdp_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if plugin and not accelerator.is_fsdp2:
        if accelerator.num_processes == 1:
            raise ValueError(
                "--use_fsdp shards over several processes: set --num_processes 2 or more, "
                "or leave it out"
            )
        # Without a GPU Accelerate forgets the flag and would train whole copies; its own FSDP2 code runs there too.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def _asked_for_threads() -> bool:
    """Whether the user said how many threads a process gets, and not `accelerate launch` alone."""
    launcher = find_launcher()
    if launcher is None:
        return "ACCELERATE_MIXED_PRECISION" not in os.environ
    flag = "--num_cpu_threads_per_process"
    return launcher.num_threads is not None or any(
        word.replace("-", "_").startswith(flag.replace("-", "_")) for word in launcher.words
    )


def _sharding(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as `accelerate launch --use_fsdp --fsdp_version 2` asks for it, None without.
    ValueError naming what we do not support or have a key of our own for.

    Decoder layers are sharded one by one unless another wrap policy is named. Gradients are added
    up in float32 and log-probs leave the model as they are (Accelerate would round both to
    bfloat16); every rank reads the weights itself (the launcher's default, loading on rank 0 only,
    unties tied embeddings).
    """
    asks = lambda name: os.environ.get(name, "false").lower() == "true"  # noqa: E731
    if asks("ACCELERATE_USE_DEEPSPEED") or asks("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "--use_deepspeed and --use_megatron_lm are not supported: "
            "shard with --use_fsdp --fsdp_version 2"
        )
    if not asks("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("--use_fsdp needs --fsdp_version 2: FSDP1 is not supported")
    if asks("FSDP_OFFLOAD_PARAMS"):
        raise ValueError(
            "--fsdp_offload_params is not supported: set optim.offload, "
            "which keeps Adam's averages in host memory"
        )
    if asks("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError(
            "--fsdp_activation_checkpointing is not supported: set model.gradient_checkpointing"
        )
    computed = torch.bfloat16 if mixed_precision == "bf16" else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=computed, reduce_dtype=torch.float32
        ),
    )


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next tensor of that size (glibc only; elsewhere
    nothing happens).

    It gives large pieces back to the system at once, and each page that comes again has to be
    cleared: a tenth of the time of an update (LOG.md). The process keeps the memory of its greatest
    need from then on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no piece is mapped on its own
        mallopt(
            -1, -1
        )  # M_TRIM_THRESHOLD: what lies free at the end of the heap is kept, however much it is


def start_missing_ranks() -> None:
    """Launch the ranks `accelerate launch` was asked for where it started only this process, and
    exit when they have.

    It leaves a meeting point (MASTER_ADDR) and no rank in the environment then; the number stands
    on its command line or in its config file. ValueError, saying what to do instead, if they cannot
    be read. A failed rank has shown its traceback by then, and has ended the others.
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
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import (
        launch_command_parser,
    )  # slow to import, and only this case needs them
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = launch_command_parser().parse_args(list(launcher.words))
    file = asked.config_file or (
        default_config_file if os.path.isfile(default_config_file) else None
    )
    saved = load_config_from_file(file) if file else None
    num_machines = asked.num_machines or getattr(saved, "num_machines", None) or 1
    num_processes = asked.num_processes or getattr(saved, "num_processes", None) or num_machines
    flags = ["--nproc_per_node", str(num_processes // num_machines)]
    if num_machines > 1:
        rank = (
            asked.machine_rank
            if asked.machine_rank is not None
            else getattr(saved, "machine_rank", 0)
        )
        flags += [
            "--nnodes",
            str(num_machines),
            "--node_rank",
            str(rank),
            "--master_addr",
            env["MASTER_ADDR"],
            "--master_port",
            env["MASTER_PORT"],
        ]
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
