"""What a kernel costs, read from its compiled code: instructions, cycles of a tile, how many programs fit at once."""

from dataclasses import dataclass
from typing import NamedTuple

from padfree_bench.compiled.aot import SHARED_LIMIT, Arch, Compiled
from padfree_bench.compiled.sass import instruction_count, score_loops

EX2_PER_CLOCK, SCHEDULERS = 16, 4
# Dots of a tile, by kernel.
DOTS = {
    "attention_forward_kernel": 2,
    "query_gradient_kernel": 3,
    "key_gradient_kernel": 4,
    "attn_mask_gradient_kernel": 2,
}
# 16-bit products that take the matrix units as long as one of fp32.
PRODUCTS = {"ieee": 0, "tf32": 2, "tf32x3": 6}


class Gpu(NamedTuple):
    """Rates of one GPU: sustained clock in GHz, 16-bit FLOP a clock and multiprocessor, bytes a second."""

    name: str
    multiprocessors: int
    clock_ghz: float
    flop_per_clock: int
    bytes_per_second: float
    l2_bytes: float
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


GPUS: dict[Arch, Gpu] = {
    80: Gpu("A100", 108, 1.41, 2048, 1.6e12, 40e6, 164 * 1024),
    # Clock and copies as measured.
    90: Gpu("H200", 132, 1.98, 4096, 4.3e12, 50e6, 228 * 1024),
    100: Gpu("B200", 148, 1.8, 8192, 7.0e12, 126e6, 228 * 1024),
}
# The H200's processor with slower memory: 3.35e12 by its data sheet, of which copies reach the share that they did there.
H100 = GPUS[90]._replace(name="H100", bytes_per_second=3.0e12)


@dataclass(frozen=True)
class Costs:
    """What a kernel issues a warp, and cycles of one multiprocessor for a tile of scores.

    `masked_loop` is the loop of tiles in which keys may be hidden: where a sequence ends, and all of one with holes.
    `repeats`: exp2 results per score of a tile; 2 where two groups of warps compute the same rows. `ctas` fit at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ctas: int
    loop: int
    masked_loop: int
    outside: int
    repeats: float
    mufu: float
    matrix: float
    mix: dict[str, int]

    def issue(self, instructions: float) -> float:
        """Cycles in which a multiprocessor issues these to all warps of a program."""
        return instructions * self.num_warps / SCHEDULERS

    @property
    def bound(self) -> str:
        """The unit that a full tile needs for longest."""
        cycles = {"issue": self.issue(self.loop), "mufu": self.mufu, "matrix": self.matrix}
        return max(cycles, key=cycles.__getitem__)


def costs_of(compiled: Compiled) -> Costs | None:
    """Costs of a kernel's loops over full tiles, the cheapest, and masked ones; None where none holds an exp2."""
    loops, tile, warps = score_loops(compiled.sass), compiled.tile, compiled.num_warps
    if not loops or tile is None or compiled.name not in DOTS:
        return None
    # By cost: full tiles, then the edges; a kernel with one loop for all has no other.
    full, masked = loops[0], loops[min(1, len(loops) - 1)]
    scores = tile.BLOCK_M * tile.BLOCK_N
    repeats = full.ex2 * warps * 32 / scores
    products = 1 if is_half(compiled) else PRODUCTS[tile.PRECISION]
    flop = 2 * scores * tile.BLOCK_D * DOTS[compiled.name] * products
    return Costs(
        block_m=tile.BLOCK_M,
        block_n=tile.BLOCK_N,
        num_warps=warps,
        num_stages=compiled.kernel.metadata.num_stages,
        ctas=occupancy(compiled.arch, compiled.resources["registers"], warps, compiled.shared_bytes),
        loop=full.instructions,
        masked_loop=masked.instructions,
        outside=instruction_count(compiled.sass) - sum(loop.instructions for loop in loops),
        repeats=repeats,
        mufu=full.ex2 * warps * 32 / EX2_PER_CLOCK,
        matrix=flop / GPUS[compiled.arch].flop_per_clock * max(1, int(repeats)),
        mix=full.mix,
    )


def is_half(compiled: Compiled) -> bool:
    """Whether its products are of 16-bit numbers."""
    return "xbf16>" in compiled.ttir or "xf16>" in compiled.ttir


def occupancy(arch: Arch, registers: int, num_warps: int, shared_bytes: int) -> int:
    """CTAs that fit on one multiprocessor; 0 where not even one does, and for AMD, which this does not model."""
    gpu = GPUS.get(arch)
    if gpu is None:
        return 0
    # Registers are dealt in 256 a warp; each CTA holds 1 KB of shared memory for the system.
    by_registers = gpu.registers // (-(-registers * 32 // 256) * 256 * num_warps)
    by_shared = gpu.shared_bytes // (shared_bytes + 1024)
    return min(by_registers, by_shared, gpu.threads // (32 * num_warps), gpu.blocks)


def excluded(compiled: Compiled) -> str:
    """Why the model says nothing of a kernel, "" where it does.

    Where a tile reads memory on the stack, serialized wgmma wait for each other in it, or products in fp32 for their operands
    in shared memory (an H200 took 2 to 5 times what the model says): it knows none of these. What only the frame of a
    program keeps on the stack is counted as instructions.
    """
    usage = compiled.resources
    on_stack = usage["stack"] or usage["spills"]
    in_tiles = on_stack and any("local" in loop.mix for loop in score_loops(compiled.sass))
    faults = {
        "products in fp32": not is_half(compiled),
        f"{usage['stack']} bytes on the stack": usage["stack"] and in_tiles,
        f"{usage['spills']} bytes spilled": usage["spills"] and in_tiles,
        f"{compiled.shared_bytes} bytes of shared memory": compiled.shared_bytes
        > SHARED_LIMIT[compiled.arch],
        f"wgmma serialized ({compiled.serialized})": compiled.serialized,
    }
    return ", ".join(name for name, fault in faults.items() if fault)
