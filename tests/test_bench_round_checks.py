"""The GPU round's checks can fail, its counters are read, and the cache that travels with it gives hits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import padfree
from imdb_classifier.training.watch import Watch
from padfree_bench.gpu_round import agreement, checks, counters, steps
from tiny_bench import CPU

CACHE = """
import sys
from pathlib import Path
from padfree_bench.gpu_round import carry, warm
if len(sys.argv) > 1:
    assert carry.unpack(Path(sys.argv[1]), Path(sys.argv[2])) == []
hits, _ = warm.compile_item(next(item for item in warm.items("smoke") if item[0] == "case one token"))
print(hits)
"""
from tiny_models import own_registration


def test_a_packed_cache_gives_hits_in_another_folder(tmp_path: Path) -> None:
    from padfree_bench.gpu_round import carry

    def hits(cache: Path, *arguments: str) -> list[bool]:
        environment = steps.our_environment() | {"TRITON_CACHE_DIR": str(cache)}
        command = [sys.executable, "-c", CACHE, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        answer: list[bool] = json.loads(done.stdout.lower())
        return answer

    made = hits(tmp_path / "made")
    assert made and not any(made)
    assert carry.pack(tmp_path / "made", tmp_path / "cache.tar.xz")
    assert hits(tmp_path / "elsewhere", str(tmp_path / "cache.tar.xz"), str(tmp_path / "elsewhere")) == [
        True
    ] * len(made)


def test_a_cache_of_another_compiler_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from padfree_bench.gpu_round import carry

    monkeypatch.setattr(carry, "compiler", lambda: {"triton": "3.6.0", "ptxas": "12.9"})
    assert carry.pack(tmp_path, tmp_path / "cache.tar.xz") == 0
    assert carry.unpack(tmp_path / "cache.tar.xz", tmp_path / "here") == []
    monkeypatch.setattr(carry, "compiler", lambda: {"triton": "3.6.0", "ptxas": "13.0"})
    assert carry.unpack(tmp_path / "cache.tar.xz", tmp_path / "here") == ["ptxas 12.9, here 13.0"]


def test_a_cache_that_is_broken_costs_no_more_than_its_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from padfree_bench.gpu_round import warm

    monkeypatch.setattr(steps, "CARRY", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for content in (b"", b"\xfd7zXZ\x00 and no more"):
        (tmp_path / "triton-cache.tar.xz").write_bytes(content)
        warm.take_along()
        assert "is of no use" in capsys.readouterr().out


def test_every_row_that_hopper_uses_has_a_case() -> None:
    from padfree._triton.configs import ANY, TABLE

    for (passname, kind, head_dim), rows in TABLE.items():
        used = []
        for row in rows:
            if (not row.arch or 90 in row.arch) and (not used or used[-1].max_length < ANY):
                used.append(row)
        for row in used:
            dtypes = agreement.DTYPES[kind]
            named = [
                case for case in agreement.table_cases(90)
                if case.name.startswith(passname) and case.head_dim == head_dim and case.dtype in dtypes
                and case.name.endswith(f" {tuple(row.config)}")
            ]  # fmt: skip
            assert len(named) >= len(dtypes), (passname, kind, head_dim, row.config)


@pytest.mark.parametrize(
    "name",
    [
        "one token",
        "packed, D 8",
        "one qkv buffer, D 8",
        "padding holes, skipped, float32 D 32",
        "dropout, D 8",
    ],
)
def test_agreement_passes_the_right_answer_and_no_wrong_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in agreement.all_cases(90) if case.name == name)
    assert 0 < agreement.check_case(case, CPU, "reference") <= 1
    right = agreement.FORMS[case.form]

    def off(*tensors: Any, **options: Any) -> Any:
        result = right(*tensors, **options)
        return (result[0] * 1.02, result[1]) if isinstance(result, tuple) else result * 1.02

    monkeypatch.setitem(agreement.FORMS, case.form, off)
    with pytest.raises(AssertionError, match="exceeds"):
        agreement.check_case(case, CPU, "reference")


def test_agreement_sees_padding_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        out, lse = padfree.attention(query, key, value, mask, **options)
        return out + 0 * value.mean(2, keepdim=True), lse

    monkeypatch.setitem(agreement.FORMS, "padded", leaky)
    case = next(case for case in agreement.all_cases(90) if case.name == "padding right, float32 D 32")
    with pytest.raises(AssertionError, match="changes with NaN in padding"):
        agreement.check_case(case, CPU, "reference")


def test_repeats_see_one_changed_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_repeats(CPU) == []
    calls = iter(range(100))
    right = padfree.attention

    def sometimes(*tensors: Any, **options: Any) -> Any:
        out, lse = right(*tensors, **options)
        if next(calls) == 2:
            out.data = out.data.nextafter(out.new_tensor(2.0))
        return out, lse

    monkeypatch.setattr(checks, "attention", sometimes)
    assert [line.split(":")[0] for line in checks.check_repeats(CPU)] == ["H12 D64 launched"]


RAW_PAGE = """==PROF== Connected
"ID","Process ID","Kernel Name","gpu__time_duration.sum","sm__throughput.avg.pct_of_peak_sustained_elapsed","launch__uses_cdp","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","ns","%","",""
"0","7","attention_forward_kernel","61,408","41.5","0","1.25"
"1","7","key_gradient_kernel","9,000","","0","0.5"
"""


def test_the_counters_that_say_what_binds_a_kernel_are_kept_in_base_units() -> None:
    forward, key_gradient = counters.read_counters(RAW_PAGE)
    waits = "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
    busy = "sm__throughput.avg.pct_of_peak_sustained_elapsed [%]"
    duration = "gpu__time_duration.sum [ns]"
    assert forward == {"kernel": "attention_forward_kernel", duration: 61408.0, busy: 41.5, waits: 1.25}
    assert key_gradient == {"kernel": "key_gradient_kernel", duration: 9000.0, waits: 0.5}


def test_a_machine_without_nsight_compute_has_no_counters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    assert counters.main(str(tmp_path)) == 1 and "ncu is not installed" in capsys.readouterr().out


def test_the_training_step_keeps_its_promises_and_a_broken_one_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with own_registration():
        assert checks.check_steps(CPU) == []
        monkeypatch.setattr(Watch, "_tell", lambda self, optimizer, *_: None)
        changed, *_ = checks.check_steps(CPU)
        assert changed.startswith("a step that was not finite changed embedding.weight")
        monkeypatch.setattr(Watch, "look", lambda self, *_: None)
        assert any(line.startswith("the watch read Reading(") for line in checks.check_steps(CPU))
