"""Bugs of compilers and processes that other libraries had: each docstring links the report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import padfree
from drawn import normal
from known_bugs import assert_same_bits, kernel_results
from padfree._dispatch import why_not_interpreter
from padfree._triton import attn_mask_gradient, forward, key_gradient, query_gradient, single_query
from padfree._triton.configs import TABLE, choose
from padfree.testing import assert_within_reference_error, make_inputs

ROOT = Path(__file__).resolve().parents[1]
COMPILE = """
import json, os, sys
import torch
from padfree_bench.compiled.aot import compile_only
import padfree
from padfree._triton import operators

found = []
def compile_kernels(arch, dtype, names, length=64):
    with compile_only(arch, names) as compiled:
        q = torch.zeros(2, 2, length, 16, dtype=dtype)
        call = (q, q, q, *[None] * 7, length, length, 0.2, 0.0, -1, -1, False)
        out, lse2, _ = operators._forward(*call)
        operators._backward(out, lse2, out, None, *call, False)
    return compiled

forward, gradients = ("attention_forward_kernel",), ("query_gradient_kernel", "key_gradient_kernel")
for arch, dtype, names in ((100, torch.float32, forward), (90, torch.float16, gradients)):
    compiled = compile_kernels(arch, dtype, names)
    found += [{"name": c.name, "arch": arch, "dtype": str(dtype), "ptx": c.kernel.asm["ptx"]} for c in compiled]

by_length = [c for n in (2, 15, 16, 17, 128) for c in compile_kernels(90, torch.float16, forward, n)]
print(json.dumps({"kernels": found, "compilations": len({c.kernel.hash for c in by_length})}))
"""


def compiler_environment(cache: Path) -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "bench", "tests"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the compiler makes of the kernels for a GPU that is not there."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], check=False, capture_output=True, text=True,
        env=compiler_environment(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_fp32_product_is_compiled_to_tf32(compiled: dict[str, Any]) -> None:
    """triton#1671, triton#8654: ieee products became tcgen05.mma kind::tf32 on sm_100."""
    ptx = {(k["name"], k["arch"]): k["ptx"] for k in compiled["kernels"] if k["dtype"] == "torch.float32"}
    assert len(ptx) == 1
    assert not [kernel for kernel, text in ptx.items() if "tf32" in text]


def test_the_half_precision_kernels_use_matrix_instructions(compiled: dict[str, Any]) -> None:
    """triton#5895: the text that the assertions on PTX read is the compiler's, and names its instructions."""
    halves = [k["ptx"] for k in compiled["kernels"] if k["dtype"] == "torch.float16"]
    assert len(halves) == 2 and all(re.search(r"\bw?g?mma\b|wgmma|mma\.sync", text) for text in halves)


def test_no_kernel_holds_an_atomic(compiled: dict[str, Any]) -> None:
    """FA#414, FA#429, FA#1766: dq summed by atomics differed from run to run."""
    assert not [
        k["name"] for k in compiled["kernels"] if re.search(r"\b(atom|red)\.(global|shared|async)", k["ptx"])
    ]


def test_sequence_lengths_cause_a_bounded_number_of_compilations(compiled: dict[str, Any]) -> None:
    """fla#533, fla#1147, xformers#1037, vllm-ascend#13637: a compilation for every new length."""
    assert 1 <= compiled["compilations"] <= 3


def test_results_repeat_bit_for_bit_in_any_program_order(sanitizer_report: Any) -> None:
    """FA#414, FA#429, fla#1228: the order in which programs ran showed in dq."""
    inputs = make_inputs(2, 4, 70, 70, 16, kv_heads=2, dtype=torch.float16, padding="holes")
    # every launch runs its programs in an order of its own
    assert_same_bits(kernel_results(inputs), kernel_results(inputs))


def test_no_kernel_is_tuned_while_it_runs() -> None:
    """triton#6547, triton#4217, triton#781: autotuning ran a kernel many times into the same outputs."""
    modules = (forward, query_gradient, key_gradient, attn_mask_gradient, single_query)
    kernels = {n: k for m in modules for n, k in vars(m).items() if n.endswith("_kernel")}
    assert len(kernels) >= 6
    assert not [name for name, kernel in kernels.items() if isinstance(kernel, triton.runtime.Autotuner)]


DIGEST = """
import hashlib, padfree, torch
from padfree.testing import make_inputs, run
from functools import partial
from sanitizer import sanitize
with sanitize():
    results = run(partial(padfree.attention, impl="triton"), make_inputs(2, 2, 33, 33, 16, padding="right"))
print(hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in results[:5])).hexdigest())
"""


def test_a_fresh_process_computes_the_same_bytes() -> None:
    """vllm#42425, Megatron#6966, triton#9368, torchtitan#4454: each process tuned itself to another configuration."""
    environment = compiler_environment(Path(os.environ.get("TMPDIR", "/tmp"))) | {"TRITON_INTERPRET": "1"}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", DIGEST], check=False, capture_output=True, text=True, env=environment
        )
        for _ in range(2)
    )
    assert len(first.stdout.split()) == 1, first.stderr[-2000:]
    assert first.stdout == second.stdout


KEYS = """
import sys
from padfree._triton import forward, key_gradient, call, query_gradient
kernels = {
    "f": forward.attention_forward_kernel,
    "q": query_gradient.query_gradient_kernel,
    "k": key_gradient.key_gradient_kernel,
}
if sys.argv[2:]:
    call.settle_cache_keys()
print(sorted((name, kernels[name].cache_key) for name in sys.argv[1]))
"""


def test_a_kernels_key_on_disk_does_not_depend_on_which_came_first(tmp_path: Path) -> None:
    """Triton 3.6 and 3.7 merge what a callee uses before it was hashed: what one process compiled, another missed."""

    def keys(order: str, *settled: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", KEYS, order, *settled], check=True, capture_output=True, text=True,
            env=compiler_environment(tmp_path),
        ).stdout  # fmt: skip

    assert len({keys(order, "settled") for order in ("fqk", "qkf", "kfq")}) == 1
    assert keys("fqk") != keys("qkf"), "Triton has mended it: settle_cache_keys can go"


def test_every_key_of_the_table_has_a_fallback_for_any_length() -> None:
    """vllm#42425: the configuration is a function of pass, dtype, head_dim and length, and of nothing measured."""
    for passname in {key[0] for key in TABLE}:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for head_dim in (1, 16, 17, 64, 256):
                chosen = {
                    choose(passname, dtype, head_dim, length, torch.device("cpu")) for length in (0, 1, 2**31)
                }
                assert 1 <= len(chosen) <= 2


STORM = """
import os, torch
from padfree_bench.compiled.aot import compile_only
from padfree._triton import operators

children = []
for _ in range(4):
    pid = os.fork()
    if not pid:
        with compile_only(90, ("attention_forward_kernel",)) as compiled:
            q = torch.zeros(1, 1, 16, 16, dtype=torch.float16)
            operators._forward(q, q, q, *[None] * 7, 16, 16, 0.2, 0.0, -1, -1, False)
        os._exit(0 if len(compiled) == 1 else 1)
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


def test_processes_may_fill_one_empty_cache_together(tmp_path: Path) -> None:
    """triton#11512, triton#2688, triton#4295, vllm#6180, torch#173679: processes that shared a cache crashed."""
    done = subprocess.run(
        [sys.executable, "-c", STORM],
        check=False,
        capture_output=True,
        text=True,
        env=compiler_environment(tmp_path),
    )
    assert done.stdout.strip() == "[0, 0, 0, 0]", done.stderr[-2000:]


def test_only_known_good_compiler_versions_are_installed() -> None:
    """triton#11373, fla#1262, triton#10486: later versions were slower, or compiled wrong code."""
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    low, high = re.search(r"triton>=(\d+\.\d+),<(\d+\.\d+)", " ".join(declared)).groups()  # type: ignore[union-attr]
    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    assert tuple(map(int, low.split("."))) <= version < tuple(map(int, high.split(".")))


@pytest.mark.parametrize("fault", ["nan", "inf", "shape", "dtype", "nan truth", "one wrong row"])
def test_the_comparator_rejects_what_passed_elsewhere_by_accident(fault: str) -> None:
    """triton#9230, cubecl#1070: a NaN reference accepted anything, and a mean hid one wrong row."""
    truth = normal(64, 16, seed=0, dtype=torch.float64)
    low = truth.float()
    actual = low.clone()
    assert_within_reference_error(actual, low, truth)
    if fault in ("nan", "inf"):
        actual[3, 3] = float(fault)
    elif fault == "shape":
        actual = actual[:, :8]
    elif fault == "dtype":
        actual = actual.double()
    elif fault == "nan truth":
        truth[3, 3] = float("nan")
    else:
        actual[3] += 1e-5
    with pytest.raises(AssertionError):
        assert_within_reference_error(actual, low, truth)


def test_padfree_exports_what_its_documentation_names() -> None:
    """ModernBERT#40: the mask was accepted by an outer layer and never passed on."""
    import inspect

    for name in ("attention", "reference", "attention_qkvpacked", "attention_weights"):
        assert "key_padding_mask" in inspect.signature(getattr(padfree, name)).parameters


@pytest.mark.parametrize(
    ("triton_release", "numpy_release", "refused"),
    [
        ("3.6.0", "2.5.2", True),
        ("3.6.0", "2.4.0", True),
        ("3.6.0", "2.3.5", False),
        ("3.7.1", "2.5.2", False),
    ],
)
def test_an_interpreter_that_its_numpy_breaks_is_refused_in_one_line(
    triton_release: str, numpy_release: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """triton 3.6.0 with NumPy 2.4: "only 0-dimensional arrays can be converted to Python scalars", from deep inside."""
    releases = {"triton": triton_release, "numpy": numpy_release}
    monkeypatch.setattr(padfree._dispatch, "version", releases.__getitem__)
    reason = why_not_interpreter.__wrapped__()  # what it finds out anew
    assert (reason is not None) == refused
    assert reason is None or reason.endswith("use NumPy < 2.4 or Triton 3.7")
    monkeypatch.setattr(padfree._dispatch, "why_not_interpreter", lambda: reason)
    query = torch.zeros(1, 1, 3, 8, device="cpu")
    if reason is not None:
        with pytest.raises(
            RuntimeError, match=f"Triton {triton_release}'s interpreter does not work with NumPy"
        ):
            padfree.attention(query, query, query, impl="triton")
