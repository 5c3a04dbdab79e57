"""What `make demo` shows a newcomer: no raw warning of a library, nothing but our own lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Python's `file.py:12: UserWarning: ...` and torch's log lines, `W1127 16:00:10.215000 ...`
RAW = re.compile(r"Warning: |^[WE]\d{4} ", re.MULTILINE)


def test_the_first_benchmark_says_nothing_in_a_librarys_words(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench",
        "attention",
        "--quick",
        "--directions",
        "forward",
        "--no-pictures",
    ]
    case = ["--shapes", "B8-H4-D8-S64-imdb-fp32", "--peers", "nested,sdpa", "--label", "quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *case, "--output", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "nested" in done.stdout, done.stderr
    assert not RAW.search(done.stderr), done.stderr


def test_the_readme_says_which_sign_attn_mask_has_where_it_first_names_it() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    first = text[text.index("attn_mask") :]
    assert first[: first.index(".")].count("**True = not allowed**") == 1, first[:200]
