"""The benchmark's pictures: nothing drawn that was not measured, legible on a phone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from padfree_bench.measuring.results import UPPER_BOUND, Result, Row
from padfree_bench.reports import drawing, plots
from tiny_bench import a_row, result_of


def figures(result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `draw_all` draws, by file name; nothing is written."""
    drawn: dict[str, Any] = {}

    def keep(figure: Any, stem: Path) -> Path:
        drawn[stem.name] = figure
        return stem

    monkeypatch.setattr(drawing, "save_figure", keep)
    plots.draw_all(result, folder)
    return drawn


def text_of(figure: Any) -> str:
    shown = [
        figure.get_suptitle(),
        *(text.get_text() for legend in figure.legends for text in legend.get_texts()),
    ]
    return "\n".join(shown)


class TestPictures:
    HEADS = ("B16-H4-D8-S400-imdb-fp32", "B16-H8-D16-S400-imdb-fp32", "B16-H12-D64-S400-imdb-fp32")

    def by_heads(self) -> list[Row]:
        return [
            a_row(peer, 1.0 + index, case)
            for case in self.HEADS
            for index, peer in enumerate(("sdpa", "eager"))
        ]

    def by_length(self) -> list[Row]:
        cases = [f"B1-H4-D8-S{seq}-scaled-fp32" for seq in (128, 256, 512)]
        return [replace(a_row("sdpa", 1.0, case), group="length") for case in cases]

    def test_no_line_joins_categories_and_one_joins_numbers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn = figures(result_of([*self.by_heads(), *self.by_length()]), tmp_path, monkeypatch)
        (heads,) = drawn["attention-speed-head-dim-fp32"].axes
        lines = [line for line in heads.get_lines() if len(line.get_xdata()) > 1]
        assert len(lines) == 2 and {line.get_linestyle() for line in lines} == {"None"}
        (lengths,) = drawn["attention-speed-length-fp32"].axes
        assert {line.get_linestyle() for line in lengths.get_lines()} == {"-"}

    def test_the_roofline_has_the_roof_of_exp2_where_it_binds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At 1e9 exp2/s a head_dim of 8 gets no further than 32e9 FLOP/s, one of 64 than the matrix units' 200e9."""
        figure = figures(result_of(self.by_heads()), tmp_path, monkeypatch)["attention-roofline-fp32"]
        roofs = {line.get_label(): line.get_ydata()[-1] for line in figure.axes[0].get_lines()}
        assert roofs == {
            "bandwidth, uncached": pytest.approx(0.2),
            "exp2, D8": pytest.approx(0.032),
            "exp2, D16": pytest.approx(0.064),
            "matrix units": pytest.approx(0.2),
        }

    def test_a_picture_without_padfree_says_that_it_did_not_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = [a_row("padfree", None, case) for case in self.HEADS]
        step = [
            replace(row, direction="step", case="notebook-B16") for row in self.by_heads()[:1] + missing[:1]
        ]
        drawn = figures(result_of([*self.by_heads(), *missing, *step]), tmp_path, monkeypatch)
        assert {"attention-roofline-fp32", "attention-notebook-B16-step"} < set(drawn)
        for name, figure in drawn.items():
            assert "padfree: not run (no GPU)" in text_of(figure), name
        ran = [a_row("padfree", 1.0, case) for case in self.HEADS]
        for figure in figures(result_of([*self.by_heads(), *ran]), tmp_path, monkeypatch).values():
            assert "not run" not in text_of(figure)

    def test_pictures_are_as_narrow_as_a_phone_and_cut_no_word(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        peers = (
            "nn.MultiheadAttention",
            "padfree-varlen+pack",
            "sdpa-cudnn-nomask",
            "varlen_attn+pack",
            "sdpa",
        )
        rows = [a_row(peer, 1.0, case, status=UPPER_BOUND) for case in self.HEADS for peer in peers]
        rows += [a_row(f"{peer} too", 1.0, case) for case in self.HEADS for peer in peers]
        drawn = figures(result_of(rows, "NVIDIA H100 80GB HBM3 with a long name"), tmp_path, monkeypatch)
        assert len(drawn) == 2
        for name, figure in drawn.items():
            assert figure.get_size_inches()[0] * 72 <= 320, name
            figure.canvas.draw()
            for shown in (*figure.legends, figure._suptitle):
                box = shown.get_window_extent()
                assert box.x0 >= 0 and box.x1 <= figure.bbox.width, (name, shown)
            smallest = min(text.get_fontsize() for legend in figure.legends for text in legend.get_texts())
            assert smallest >= 9
