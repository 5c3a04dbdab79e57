"""Loops of a disassembled kernel and what they issue, from nvdisasm's text."""

import re
from collections import Counter
from dataclasses import dataclass

LINE = re.compile(
    r"^(?P<label>\.L_x_\d+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<rest>[^\n]*)",
    re.MULTILINE,
)
TARGET = re.compile(r"\(?(\.L_x_\d+)\)?")
# Classes of the report's instruction mix, by the first letters of the opcode.
CLASSES = {
    "wgmma": ("HGMMA", "UTCHMMA", "UTCQMMA"),
    "mma": ("HMMA", "QMMA"),
    "fma": ("FFMA", "FMUL", "FADD", "FMNMX", "FSETP", "FSEL", "HFMA2", "HADD2", "HMUL2", "FMNMX3", "FFMA2"),
    "mufu": ("MUFU",),
    "lds": ("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM"),
    "ldgsts": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "ldg": ("LDG", "STG"),
    "local": ("LDL", "STL"),
    "shuffle": ("SHFL",),
    "integer": (
        "IMAD",
        "IADD",
        "LEA",
        "ISETP",
        "LOP3",
        "SHF",
        "PRMT",
        "UIADD",
        "ULEA",
        "UMOV",
        "USHF",
        "ULOP3",
        "MOV",
        "SEL",
    ),
}


@dataclass(frozen=True)
class Loop:
    """One innermost loop: its instructions a warp and iteration, by opcode without suffixes."""

    instructions: int
    opcodes: Counter[str]
    ex2: int

    def mix(self) -> dict[str, int]:
        """Instructions by class; "other" holds the rest."""
        counts: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            counts[_class_of(opcode)] += count
        return dict(counts)


def _class_of(opcode: str) -> str:
    for name, prefixes in CLASSES.items():
        if opcode in prefixes:
            return name
    return next((name for name, prefixes in CLASSES.items() if opcode.startswith(prefixes)), "other")


def instruction_count(text: str) -> int:
    """All instructions of the kernel, without the padding after its end."""
    return sum(1 for match in LINE.finditer(text) if match["name"] and match["name"] != "NOP")


def innermost_loops(text: str) -> list[Loop]:
    """Loops that hold no other loop, in program order. A loop is a branch back to a label above it."""
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
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_loop(code[start:stop]) for start, stop in sorted(set(innermost))]


def _loop(code: list[tuple[str, str]]) -> Loop:
    opcodes = Counter(name.split(".")[0] for name, _ in code)
    return Loop(len(code), opcodes, sum(1 for name, _ in code if name.startswith("MUFU.EX2")))


def score_loops(text: str) -> list[Loop]:
    """The loops over score tiles, cheapest first: the full tiles' loop, then those with a mask."""
    return sorted(
        (loop for loop in innermost_loops(text) if loop.ex2 > 0), key=lambda loop: loop.instructions
    )
