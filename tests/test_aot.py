"""What the compiler made of the kernels, read from its own output, for GPUs that need not be there.

Kernels are compiled in a process of their own, because this one may interpret them: by the Triton installed, and by
each that `make triton-3.6.0` and the like put beside it. What was found is kept per kernel source in pytest's cache, so
that a rerun costs nothing.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import triton

from padfree._triton.arguments import View
from padfree._triton.configs import TABLE
from padfree_bench.compiled.aot import ARCHS, Arch
from padfree_bench.compiled.aot_calls import KERNELS, SHAPES, VARIANTS, Target, table_targets, variants_of
from padfree_bench.compiled.aot_facts import ATOMICS, narrow_offsets
from padfree_bench.compiled.compile_report import VARIANT_HEAD_DIMS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    [*ROOT.glob("kernels/padfree/_triton/*.py"), *ROOT.glob("bench/padfree_bench/compiled/*.py")]
)
PASSES = tuple(KERNELS)
# {version: a folder that holds it, or None for the installed one}
COMPILERS = {
    triton.__version__: None,
    **{path.name.removeprefix("triton-"): path for path in sorted(Path(sys.prefix).glob("triton-*.*.*"))},
}


def commit_targets() -> list[Target]:
    """What every commit compiles: each kernel for each architecture, the main head dims, one variant with everything."""

    def target(arch: Arch, name: str, dtype: str, head_dim: int) -> Target:
        return Target(arch, name, dtype, head_dim, variant=variants_of(name, ("padded",))[0])

    targets = [target(90, name, "bfloat16", dim) for name in PASSES for dim in (8, 16, 64, 128)]
    targets += [
        Target(90, name, "bfloat16", 64, variant=variant)
        for name in ("forward", "query_gradient", "key_gradient")
        for variant in ("keys", "lengths", "packed", "window", "dense", "dropout", "bool", "bias")
    ]
    targets += [Target(90, name, "bfloat16", 64, variant="everything") for name in PASSES]
    targets += [Target(90, "forward", "bfloat16", 64, shape=shape) for shape in ("ones", "neither")]
    targets += [target(arch, name, "float32", 64) for arch in (90, 100) for name in PASSES]
    targets += [
        replace(target(90, name, "float32", dim), precision="tf32x3")
        for name in PASSES if name != "single_query" for dim in (8, 64)
    ]  # fmt: skip
    targets += [target(80, name, "float16", 32) for name in PASSES]
    return targets + [target("gfx942", name, "bfloat16", 64) for name in PASSES]


def all_targets() -> list[Target]:
    """Every row, dtype and architecture; on sm_90 also every variant and shape kind at the main head dims.

    Elsewhere one variant with everything stands for them. fp16 differs from bf16 in the operand type of its matrix
    instructions alone, so variants are compiled for one of them.
    """
    variants = [
        target for target in table_targets(ARCHS, tuple(VARIANTS))
        if target.head_dim in VARIANT_HEAD_DIMS and target.dtype != "float16"
        and (target.arch == 90 or target.variant == "everything")
    ]  # fmt: skip
    shapes = [
        replace(target, shape=shape) for target in variants for shape in SHAPES
        if target.arch == 90 and target.variant in ("padded", "everything")
    ]  # fmt: skip
    return list(dict.fromkeys([*table_targets(ARCHS), *variants, *shapes]))


def run_compiler(question: str, version: str, kernels: Path) -> str:
    """Facts as JSON of the targets in `question`, compiled from the sources in `kernels` by a process of its own."""
    folder = COMPILERS[version]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [kernels, ROOT / "bench", *([folder] if folder else [])]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [sys.executable, "-m", "padfree_bench.compiled.aot_facts"],
        input=question, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def compile_facts(targets: list[Target], version: str, cache: Path) -> list[dict[str, Any]]:
    """Facts of the targets' kernels from a process that compiles, or from its last answer to the same question."""
    question = json.dumps([asdict(target) for target in targets])
    digest = hashlib.sha256(f"{question}{version}".encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    answer = cache / f"{digest.hexdigest()[:32]}.json"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answer.exists():
            answer.write_text(run_compiler(question, version, ROOT / "kernels"))
    facts = json.loads(answer.read_text())
    assert {fact["triton"] for fact in facts} == {version}
    return facts


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((targets, version), id=f"{name}-{version}", marks=marks)
        for version in COMPILERS
        for name, targets, marks in (
            ("commit", commit_targets, ()),
            ("all", all_targets, pytest.mark.soak),
        )
    ],
)
def facts(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    targets, version = request.param
    return compile_facts(targets(), version, Path(request.config.cache.mkdir("padfree-aot")))


def kernel_name(fact: dict[str, Any]) -> str:
    tile = f"{fact['block_m']}x{fact['block_n']} w{fact['num_warps']} s{fact['num_stages']}"
    words = (
        fact["kernel"],
        fact["arch"],
        fact["dtype"],
        f"D{fact['head_dim']}",
        fact["precision"],
        fact["variant"],
        fact["shape"],
        tile,
    )
    return " ".join(map(str, words))


def assert_none(broken: Callable[[dict[str, Any]], object], facts: list[dict[str, Any]]) -> None:
    """`broken` says what is wrong with a kernel, or something false."""
    assert facts
    offenders = [f"{kernel_name(fact)}: {broken(fact)}" for fact in facts if broken(fact)]
    assert not offenders, "\n".join([f"{len(offenders)} of {len(facts)} kernels", *offenders])


pytestmark = pytest.mark.timeout(3 * 3600)


def test_every_kernel_of_the_library_is_compiled(facts: list[dict[str, Any]]) -> None:
    assert {key[0] for key in TABLE} == set(KERNELS)
    expected = {name for names in KERNELS.values() for name in names}
    assert {fact["kernel"] for fact in facts} == expected
    assert {fact["arch"] for fact in facts} == set(ARCHS)


def test_each_kernel_is_compiled_for_the_architecture_it_is_reported_for(facts: list[dict[str, Any]]) -> None:
    assert_none(lambda fact: fact["target"] if fact["target"] != str(fact["arch"]) else "", facts)


# Bytes a thread of variants and shapes in which ptxas keeps two to ten registers outside the loop on the stack, whatever
# number of registers it is allowed (NOTES.md, 2026-11-24); more by three TF32 products, whose operands come in two parts,
# and most where rows are not aligned beside. A row's own variant is never here.
CORNERS = {
    "3.7.1": {
        ("query_gradient", 80, "float32", 16, "everything", "sixteens"): 16,
        ("query_gradient", 80, "float32", 64, "everything", "sixteens"): 24,
        ("query_gradient", 90, "tf32x3", 64, "bool", "sixteens"): 16,
        ("query_gradient", 90, "tf32x3", 64, "bias", "sixteens"): 16,
        ("query_gradient", 90, "tf32x3", 64, "everything", "sixteens"): 24,
        ("key_gradient", 90, "float32", 16, "grouped", "sixteens"): 8,
        ("key_gradient", 90, "float32", 64, "everything", "sixteens"): 32,
        ("key_gradient", 90, "tf32x3", 64, "dropout", "sixteens"): 8,
        ("key_gradient", 90, "tf32x3", 64, "grouped", "sixteens"): 8,
        ("key_gradient", 90, "tf32x3", 64, "everything", "sixteens"): 64,
        ("attn_mask_gradient", 90, "tf32x3", 64, "everything", "sixteens"): 40,
        ("single_query", 90, "float32", 16, "causal", "sixteens"): 8,
        ("query_gradient", 100, "float32", 64, "everything", "sixteens"): 16,
        ("attn_mask_gradient", 100, "float32", 64, "everything", "sixteens"): 24,
        ("query_gradient", 90, "tf32x3", 64, "padded", "neither"): 56,
        ("query_gradient", 90, "tf32x3", 64, "everything", "ones"): 24,
        ("query_gradient", 90, "tf32x3", 64, "everything", "neither"): 144,
        ("key_gradient", 90, "float32", 64, "everything", "ones"): 32,
        ("key_gradient", 90, "tf32x3", 64, "padded", "neither"): 32,
        ("key_gradient", 90, "tf32x3", 64, "everything", "ones"): 64,
        ("key_gradient", 90, "tf32x3", 64, "everything", "neither"): 40,
        ("attn_mask_gradient", 90, "bfloat16", 64, "everything", "neither"): 16,
        ("attn_mask_gradient", 90, "float32", 64, "everything", "neither"): 16,
        ("attn_mask_gradient", 90, "tf32x3", 64, "everything", "neither"): 504,
        ("single_query", 90, "bfloat16", 64, "padded", "ones"): 8,
    },
    "3.6.0": {
        ("query_gradient", 80, "float32", 16, "everything", "sixteens"): 8,
        ("query_gradient", 80, "float32", 64, "everything", "sixteens"): 24,
        ("forward", 90, "float32", 16, "dropout", "sixteens"): 8,
        ("forward", 90, "float32", 64, "bias", "sixteens"): 8,
        ("forward", 90, "float32", 64, "everything", "sixteens"): 16,
        ("query_gradient", 90, "tf32x3", 64, "bool", "sixteens"): 16,
        ("query_gradient", 90, "tf32x3", 64, "bias", "sixteens"): 16,
        ("query_gradient", 90, "tf32x3", 64, "everything", "sixteens"): 24,
        ("key_gradient", 90, "float32", 16, "dense", "sixteens"): 8,
        ("key_gradient", 90, "float32", 64, "grouped", "sixteens"): 24,
        ("key_gradient", 90, "tf32x3", 64, "dropout", "sixteens"): 8,
        ("key_gradient", 90, "tf32x3", 64, "grouped", "sixteens"): 8,
        ("key_gradient", 90, "tf32x3", 64, "everything", "sixteens"): 64,
        ("attn_mask_gradient", 90, "tf32x3", 64, "everything", "sixteens"): 32,
        ("single_query", 90, "float32", 16, "packed", "sixteens"): 8,
        ("key_gradient", 100, "float32", 64, "everything", "sixteens"): 16,
        ("attn_mask_gradient", 100, "float32", 64, "everything", "sixteens"): 16,
        ("forward", 90, "float32", 64, "everything", "ones"): 16,
        ("query_gradient", 90, "float32", 16, "everything", "neither"): 8,
        ("query_gradient", 90, "tf32x3", 64, "padded", "neither"): 72,
        ("query_gradient", 90, "tf32x3", 64, "everything", "ones"): 24,
        ("query_gradient", 90, "tf32x3", 64, "everything", "neither"): 144,
        ("key_gradient", 90, "tf32x3", 64, "padded", "neither"): 32,
        ("key_gradient", 90, "tf32x3", 64, "everything", "ones"): 64,
        ("key_gradient", 90, "tf32x3", 64, "everything", "neither"): 48,
        ("attn_mask_gradient", 90, "bfloat16", 64, "everything", "neither"): 8,
        ("attn_mask_gradient", 90, "float32", 64, "everything", "neither"): 16,
        ("attn_mask_gradient", 90, "tf32x3", 64, "everything", "neither"): 472,
    },
}
# Stated in README's limits: the query gradient's three fp32 dots over 256 columns spill in every tile. (NVIDIA, AMD)
WIDE = {"3.7.1": (296, 0), "3.6.0": (280, 2)}


def corner_of(fact: dict[str, Any]) -> tuple[Any, ...]:
    dtype = "tf32x3" if fact["precision"] == "tf32x3" else fact["dtype"]
    return fact["passname"], fact["arch"], dtype, fact["head_dim"], fact["variant"], fact["shape"]


def stack_allowed(fact: dict[str, Any]) -> int:
    if (fact["passname"], fact["dtype"], fact["head_dim"]) == ("query_gradient", "float32", 256):
        return WIDE[fact["triton"]][fact["arch"] == "gfx942"]
    return CORNERS[fact["triton"]].get(corner_of(fact), 0)


def test_no_kernel_uses_the_stack_or_spills_registers(facts: list[dict[str, Any]]) -> None:
    assert_none(
        lambda fact: {k: fact[k] for k in ("stack", "spills") if fact[k] > stack_allowed(fact)}, facts
    )


def test_what_is_allowed_of_the_stack_is_used(facts: list[dict[str, Any]]) -> None:
    used: dict[tuple[Any, ...], int] = {}
    for fact in facts:
        used[corner_of(fact)] = max(used.get(corner_of(fact), 0), fact["stack"])
    allowed = {corner: size for corner, size in CORNERS[facts[0]["triton"]].items() if corner in used}
    assert {corner: used[corner] for corner in allowed} == allowed


def test_no_kernel_holds_an_atomic_operation(facts: list[dict[str, Any]]) -> None:
    assert_none(lambda fact: fact["atomics"], facts)


def test_shared_memory_and_registers_leave_room_for_a_block(facts: list[dict[str, Any]]) -> None:
    def broken(fact: dict[str, Any]) -> str:
        too_much = fact["shared"] > fact["shared_limit"] or (fact["arch"] != "gfx942" and fact["ctas"] < 1)
        return (
            f"{fact['shared']} bytes of {fact['shared_limit']}, {fact['registers']} registers"
            if too_much
            else ""
        )

    assert_none(broken, facts)


def test_sixteen_bit_dots_use_wgmma_on_hopper(facts: list[dict[str, Any]]) -> None:
    # The 64 rows that wgmma needs would spill at a head_dim of 256, and beside the sum of attn_mask's gradient.
    on_hopper = [
        f
        for f in facts
        if f["arch"] == 90
        and f["half_dots"]
        and f["head_dim"] <= 128
        and f["kernel"] != "attn_mask_gradient_kernel"
    ]
    assert_none(lambda f: f"{f['mma_sync']} mma.sync" if f["mma_sync"] or not f["wgmma"] else "", on_hopper)


def test_kernels_that_meet_in_a_weight_round_it_alike(facts: list[dict[str, Any]]) -> None:
    # Where the compiler may choose, it fuses a product and a sum in one kernel and not in another: dS of a bias was off by
    # 2.5 times eager's error (NOTES.md, 2026-11-27). A gradient's weight takes two fused steps: the bias, then the LSE.
    def broken(fact: dict[str, Any]) -> str:
        steps = {"attention_forward_kernel": 1 if fact["dtype"] == "bfloat16" else 0.5}.get(fact["kernel"], 2)
        expected = steps * fact["exponents"]
        return f"{fact['fused']} fused, expected {expected:g}" if fact["fused"] != expected else ""

    with_bias = [
        f
        for f in facts
        if f["variant"] in ("bias", "everything") and not f["kernel"].startswith("single_query")
    ]
    assert_none(broken, with_bias)


def test_no_wgmma_waits_for_the_one_before_it(facts: list[dict[str, Any]]) -> None:
    # ptxas judges a whole function: one loop that it cannot overlap serializes every loop of the kernel.
    on_hopper = [fact for fact in facts if fact["arch"] == 90 and fact["wgmma"]]
    assert_none(lambda fact: fact["serialized"], on_hopper)


@pytest.mark.parametrize("version", COMPILERS)
def test_a_planted_branch_around_the_products_is_found(version: str, tmp_path: Path) -> None:
    # It leaves out edge tiles in which no key is visible: what a padded batch would seem to want.
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "kernels/padfree/_triton/forward.py"
    head, products, tail = re.split(
        r"(?=    scores, factor = )|(?=    return Softmax\()",
        source.read_text(),
        maxsplit=2,
    )
    branch = (
        "    see = tl.max(keep_n.to(tl.int32), 0) > 0 if HIDDEN != NOTHING else True\n"
        "    acc, row_max, row_sum = state.acc, state.row_max, state.row_sum\n"
        "    if see:\n"
    )
    source.write_text(head + branch + textwrap.indent(products, "    ") + tail)
    question = json.dumps([asdict(Target(90, "forward", "bfloat16", 64, variant="window"))])
    (fact,) = json.loads(run_compiler(question, version, tmp_path / "kernels"))
    assert fact["serialized"] == "C7515"


def test_no_kernel_rounds_fp32_to_tf32_where_ieee_is_asked_for(facts: list[dict[str, Any]]) -> None:
    assert any(fact["dtype"] == "float32" and fact["arch"] == 100 for fact in facts)
    assert_none(lambda fact: fact["tf32"], [fact for fact in facts if fact["precision"] == "ieee"])


def test_three_tf32_products_are_all_wgmmas(facts: list[dict[str, Any]]) -> None:
    # mma.sync may sum otherwise, and the passes must agree about a weight.
    by_three = [fact for fact in facts if fact["precision"] == "tf32x3"]
    assert_none(lambda fact: fact["mma_sync"] or not fact["wgmma"] or fact["wgmma"] % 3, by_three)


def test_no_kernel_computes_in_fp64(facts: list[dict[str, Any]]) -> None:
    assert_none(lambda fact: fact["f64"], facts)


def test_offsets_are_products_in_64_bits(facts: list[dict[str, Any]]) -> None:
    assert_none(lambda fact: fact["narrow_offsets"], facts)


PLANTED = """
tt.func public @kernel(%q: !tt.ptr<bf16>, %q_0: i32, %q_1: i32) attributes {{noinline = false}} {{
    %row = tt.get_program_id x : i32
    {body}
}}
"""


@pytest.mark.parametrize(
    "body, caught",
    [
        ("%offset = arith.muli %row, %q_1 : i32", True),
        (
            "%stride = tt.splat %q_0 : i32 -> tensor<64xi32>\n    %o = arith.muli %rows, %stride : tensor<64xi32>",
            True,
        ),
        ("%a = arith.divsi %q_0, %c8_i32 : i32\n    %b = arith.muli %a, %row : i32", True),
        ("%a = arith.divsi %q_0, %c8_i32 : i32\n    %b = arith.muli %a, %c8_i32 : i32", False),
        ("%wide = arith.extsi %q_0 : i32 to i64\n    %o = arith.muli %wide, %row64 : i64", False),
    ],
)
def test_the_search_for_narrow_offsets_finds_a_planted_one(body: str, caught: bool) -> None:
    signature = {"q": View("*bf16", ("i32", "i32"))}
    assert bool(narrow_offsets(PLANTED.format(body=body), signature)) == caught


@pytest.mark.parametrize(
    "line",
    [
        "atom.global.add.f32 %f1, [%rd1], %f2;",
        "red.shared.add.u32 [%r1], 1;",
        "global_atomic_add_f32 v[0:1], v2, off",
    ],
)
def test_the_search_for_atomics_finds_a_planted_one(line: str) -> None:
    assert ATOMICS.search(line)
