"""What accelerate takes from the environment: each setting is taken and said, is without effect, or is refused.

accelerate reads its settings where it is made and where it wraps a model, without a word. A setting that would change
what a command computes must be one of the command's own options, since those are what a checkpoint records.
"""

import os

import accelerate
import torch
from accelerate.utils import DataLoaderConfiguration, TorchDynamoPlugin

from imdb_classifier.messages import UserError, note

# Beyond it a batch's padding alone fills any memory.
MAX_BATCH_SIZE = 1_000_000
# Of torch.compile: training and evaluation, each with `COMPILE_BUCKETS` shapes and those of their last batches, and room.
MAX_GRAPHS = 64
ON = ("1", "on", "t", "true", "y", "yes")
OFF = ("0", "off", "f", "false", "n", "no")

_ONE_DEVICE = "the model fits on one device, start it without"

# Each variable that is refused: the values with which it asks for nothing, and what to do in its place.
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), "pass --batch-size, the reviews of a step"),
    "ACCELERATE_GRADIENT_CLIPPING": (("", "none"), "gradients are not clipped"),
    "ACCELERATE_TORCH_DEVICE": (("",), "pass --cpu, or choose a GPU with CUDA_VISIBLE_DEVICES"),
    "ACCELERATE_FP8_BACKEND": (("", "no"), "pass --precision, which knows no fp8"),
    "ACCELERATE_DOWNCAST_BF16": (("", *OFF), "pass --precision"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": (("", *OFF), "the model is compiled as a whole"),
    "ACCELERATE_USE_DEEPSPEED": (("", *OFF), f"{_ONE_DEVICE} DeepSpeed"),
    "ACCELERATE_USE_FSDP": (("", *OFF), f"{_ONE_DEVICE} FSDP"),
    "ACCELERATE_USE_MEGATRON_LM": (("", *OFF), f"{_ONE_DEVICE} Megatron-LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("", *OFF), f"{_ONE_DEVICE} a parallelism configuration"),
    "ACCELERATE_USE_SAGEMAKER": (("", *OFF), "start it with torchrun or accelerate launch"),
}

# What is taken, and said where it changes anything: see `say_what_was_taken`.
FLAGS = (
    *("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_ENABLE_RICH"),
    *("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC"),
)
CHOICES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE")
COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
PROCESS_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")

# Without effect on a command's result, by name or by beginning: they concern messages, how processes reach each other,
# or qualify a setting that is refused.
INERT = (
    *("ACCELERATE_ALLOW_CP_STANDALONE", "ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_CONFIG_DS_FIELDS"),
    *("ACCELERATE_DEBUG_RDV_FILE", "ACCELERATE_DEEPSPEED_", "ACCELERATE_FP8_", "ACCELERATE_LOG_LEVEL"),
    *("ACCELERATE_INIT_INCLUDE_BUFFERS", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE"),
)


def make_accelerator(precision: str, cpu: bool, compiled: bool = False) -> accelerate.Accelerator:
    """Device, precision and processes; `split_batches` keeps the batch size the same for any number of processes.

    With `compiled`, torch.compile runs each model that is prepared, one graph for each shape that comes.

    Raises UserError where the precision cannot run here, or what a launcher set in the environment cannot be served.
    """
    mixed_precision = "no" if precision == "fp32" else precision
    check(mixed_precision)
    matmul = torch.backends.cuda.matmul
    asked = matmul.fp32_precision
    # accelerate looks for processes on the CPU only where it is told to stay there.
    alone_or_on_gpus = process_count() == 1 or torch.accelerator.is_available()
    try:
        accelerator = accelerate.Accelerator(
            mixed_precision=mixed_precision,
            cpu=cpu or not alone_or_on_gpus,
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, non_blocking=torch.cuda.is_available()
            ),
            dynamo_plugin=TorchDynamoPlugin(backend="inductor", dynamic=False) if compiled else None,
        )
    except (ValueError, ImportError, torch.distributed.DistError) as error:
        refused = "accelerate" if precision == "fp32" else f"precision {precision}"
        raise UserError(f"{refused} cannot run here: {str(error).splitlines()[0]}") from None
    # accelerate turns TF32 on beside torch.compile, by the older switch; --precision fp32 is no TF32. The newer one goes
    # back too: it alone can say that nothing was asked for, which padfree takes for three TF32 products.
    matmul.allow_tf32 = asked == "tf32"
    matmul.fp32_precision = asked
    check_processes(accelerator)
    if compiled:
        # Its own limit is 8, beyond which it would run uncompiled without a word.
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
    say_what_was_taken(accelerator, cpu, compiled)
    return accelerator


def check_batch_size(batch_size: int, accelerator: accelerate.Accelerator) -> None:
    """Raise UserError where the reviews of a batch cannot be shared out evenly among the processes."""
    if batch_size % accelerator.num_processes:
        shared = f"be a multiple of the {accelerator.num_processes} processes"
        raise UserError(f"--batch-size must {shared}, which share a batch, got {batch_size}")


def check(mixed_precision: str) -> None:
    """Raise UserError where the environment asks of accelerate what these commands do not do.

    That is a setting that is refused, or no value of its kind, or contradicts `mixed_precision`, accelerate's name for
    what --precision chose.
    """
    for name in sorted(os.environ):
        value = os.environ[name].lower()
        if name.startswith("ACCELERATE_") and not value.strip():
            # It asks for nothing, and accelerate would read a number or a flag from it.
            del os.environ[name]
            continue
        if name in REFUSED and value not in REFUSED[name][0]:
            raise UserError(f"{name}={os.environ[name]} is not supported: {REFUSED[name][1]}")
        if name in FLAGS and value not in ON + OFF:
            raise UserError(f"{name}={os.environ[name]}: expected true or false")
        if name in PROCESS_COUNTS and not value.isdecimal():
            raise UserError(f"{name}={os.environ[name]}: expected a number of processes")
        known = name in (*REFUSED, *FLAGS, *CHOICES) or name.startswith(INERT)
        if name.startswith("ACCELERATE_") and not known:
            raise UserError(f"{name} is not known here, so what it would change is not either: unset it")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    # `accelerate launch` always sets it, to "no" unless asked for more.
    if asked not in ("no", mixed_precision):
        differs = f"is not what --precision says, which is {mixed_precision}"
        raise UserError(f"ACCELERATE_MIXED_PRECISION={asked} {differs}: choose with --precision")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        mode = os.environ.get("ACCELERATE_DYNAMO_MODE", "default")
        backends = torch.compiler.list_backends(exclude_tags=())
        for kind, value, choices in (("BACKEND", backend, backends), ("MODE", mode, COMPILE_MODES)):
            if value not in choices:
                expected = f"expected one of {', '.join(sorted(choices))}"
                raise UserError(f"ACCELERATE_DYNAMO_{kind}={value}: {expected}")


def process_count() -> int:
    """The processes that a launcher has started, this one among them."""
    # The largest, since a launcher may stand inside another's only process.
    return max((int(os.environ[name]) for name in PROCESS_COUNTS if name in os.environ), default=1)


def check_processes(accelerator: accelerate.Accelerator) -> None:
    """Raise UserError where the processes of a launcher have not found each other: each would do the whole work."""
    started = process_count()
    if started > 1 and accelerator.num_processes == 1:
        raise UserError(
            f"this is one of {started} processes that did not find each other: start them with torchrun or "
            "accelerate launch, or add --cpu"
        )


def say_what_was_taken(accelerator: accelerate.Accelerator, cpu: bool, compiled: bool) -> None:
    """A note on standard error for each setting that changes how the command computes; `cpu` and `compiled` are options."""
    if not accelerator.is_main_process:
        return
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend.value != "NO" and not compiled:
        backend = plugin.backend.value.lower()
        note(f"torch.compile runs the model, backend {backend}, as ACCELERATE_DYNAMO_BACKEND says")
    if accelerator.device.type == "cpu" and not cpu:
        if os.environ.get("ACCELERATE_USE_CPU", "no").lower() in ON:
            note("stays on the CPU, as ACCELERATE_USE_CPU says")
        elif accelerator.num_processes > 1:
            note(f"no GPU here, {accelerator.num_processes} processes run on the CPU")
