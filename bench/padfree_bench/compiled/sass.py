"""Loops of a disassembled kernel and what they issue, from nvdisasm's text."""

import re
from collections import Counter
from functools import cache
from typing import NamedTuple

LINE = re.compile(
    r"^(?P<label>\.L_x_\d+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<rest>[^\n]*)",
    re.MULTILINE,
)
TARGET = re.compile(r"\(?(\.L_x_\d+)\)?")
# Classes of the report's instruction mix, by the first letters of the opcode.
CLASSES = {
    "wgmma": "HGMMA UTCHMMA UTCQMMA",
    "mma": "HMMA QMMA",
    "fma": "FFMA FMUL FADD FMNMX FSETP FSEL HFMA2 HADD2 HMUL2 FMNMX3 FFMA2",
    "mufu": "MUFU",
    "lds": "LDS LDSM STS STSM LDTM STTM",
    "ldgsts": "LDGSTS UBLKCP UTMALDG",
    "ldg": "LDG STG",
    "local": "LDL STL",
    "shuffle": "SHFL",
    "integer": "IMAD IADD LEA ISETP LOP3 SHF PRMT UIADD ULEA UMOV USHF ULOP3 MOV SEL",
}


class Loop(NamedTuple):
    """One innermost loop: its instructions a warp and iteration, exp2 among them, and their mix by class."""

    instructions: int
    ex2: int
    mix: dict[str, int]


@cache
def class_of(opcode: str) -> str:
    """The class that names the whole opcode, else the first one that names its beginning, else "other"."""
    whole = [name for name, opcodes in CLASSES.items() if opcode in opcodes.split()]
    begun = [name for name, opcodes in CLASSES.items() if opcode.startswith(tuple(opcodes.split()))]
    return [*whole, *begun, "other"][0]


def instruction_count(text: str) -> int:
    """All instructions of the kernel, without the padding after its end."""
    return sum(1 for match in LINE.finditer(text) if match["name"] and match["name"] != "NOP")


def score_loops(text: str) -> list[Loop]:
    """The loops over score tiles, cheapest first: the full tiles' loop, then those with a mask.

    They hold an exp2 and no other loop. A loop is a branch back to a label above it.
    """
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for match in LINE.finditer(text):
        if match["label"]:
            labels[match["label"]] = len(code)
        else:
            code.append((match["name"], match["rest"]))
    spans = []
    for at, (name, rest) in enumerate(code):
        target = TARGET.search(rest) if name.startswith("BRA") else None
        # A branch to itself is the trap after the kernel's end.
        if target and labels.get(target[1], at) < at:
            spans.append((labels[target[1]], at + 1))
    innermost = {s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)}
    loops = [loop_of([name for name, _ in code[start:stop]]) for start, stop in sorted(innermost)]
    return sorted((loop for loop in loops if loop.ex2), key=lambda loop: loop.instructions)


def loop_of(names: list[str]) -> Loop:
    ex2 = sum(name.startswith("MUFU.EX2") for name in names)
    return Loop(len(names), ex2, dict(Counter(class_of(name.split(".")[0]) for name in names)))
