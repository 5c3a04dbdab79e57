"""The benchmark's page: what came out first, nothing said twice or drawn that was not measured, legible on a phone."""

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from padfree_bench.measuring.results import FAULT, NOT_RUN, OK, UPPER_BOUND, Result, Row, save
from padfree_bench.reports import drawing, plots, report

NO_GPU = "no GPU: padfree's kernel did not run"
CASE = "B64-H12-D64-S400-imdb-bf16"


def a_row(peer: str, ms: float | None, case: str = CASE, direction: str = "forward", **other: Any) -> Row:
    batch, heads, head_dim, seq = (int(number) for number in re.findall(r"\d+", case)[:4])
    row = Row(
        "attention", case, "imdb", direction, peer, OK, dtype=case.split("-")[-1], batch=batch, heads=heads,
        head_dim=head_dim, seq=seq, lengths=case.split("-")[-2], valid_fraction=0.6,
    )  # fmt: skip
    if ms is None:
        return replace(row, **{"status": NOT_RUN, "reason": NO_GPU} | other)
    timed = {"ms_p20": ms * 0.99, "ms_p50": ms, "ms_p80": ms * 1.01, "tokens_per_s": 1e6 / ms, "peak_mib": ms}
    return replace(row, **timed | {"tflops": 0.1 / ms, "gb_per_s": 1.0 / ms} | other)


def result_of(rows: list[Row], device: str = "GPU", **environment: Any) -> Result:
    kind = "cpu" if device.startswith("CPU") else "cuda"
    facts = {
        "device": device, "device_type": kind, "cpu": "a CPU", "cores": 2, "load_before": 0.5,
        "versions": {"torch": "2", "triton": "3"}, "command": "python -m bench attention", "commit": "d" * 40,
        "started": "2026-11-28T10:00:00+00:00",
    }  # fmt: skip
    ceilings = {"bytes_per_s": 1e11, "flops_per_s": {"fp32": 2e11, "bf16": 2e11}, "exp2_per_s": 1e9}
    return Result("attention", facts | environment, rows, ceilings)


def rendered(*results: Result) -> str:
    return report.render([(f"device-{index}", result) for index, result in enumerate(results)], {})


def words(html: str) -> str:
    """The text as it is read: without style, tags and line breaks."""
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", "", html, flags=re.DOTALL)).split())


class TestConclusion:
    def said(self, *rows: Row, device: str = "GPU") -> str:
        html = rendered(result_of(list(rows), device))
        start = html.index("id='conclusion'")
        assert start < html.index("<table"), "the conclusion stands before every table"
        return words(html[start : html.index("<section id='legend'")])

    def test_what_wins_as_a_graph_and_loses_as_a_call_says_so(self) -> None:
        def as_graph(peer: str, ms: float, graph: float) -> Row:
            return replace(a_row(peer, ms), graph_p20=graph, graph_ms=graph, graph_p80=graph)

        said = self.said(as_graph("padfree-skip", 0.8, 0.07), as_graph("sdpa", 0.272, 0.27))
        assert "padfree-skip is the fastest at 0.07 ms (as a graph)" in said
        assert "launched by itself, host included, it loses: 0.8 ms, sdpa 0.272" in said
        assert "Of those won as a graph 1 are lost where each call is launched by itself." in said
        said = self.said(as_graph("padfree-skip", 0.2, 0.07), as_graph("sdpa", 0.272, 0.27))
        assert "loses" not in said and "lost where each call" not in said

    def test_who_won_and_by_how_much_comes_first(self) -> None:
        said = self.said(a_row("padfree-skip", 1.0), a_row("sdpa", 3.0), a_row("sdpa-cudnn", 2.0))
        assert "B64 H12 D64 S400, IMDB lengths, bf16, forward: padfree-skip is the fastest at 1 ms" in said
        assert (
            "the next best, sdpa-cudnn, takes 2.00x as long; sdpa (the baseline) takes 3.00x as long" in said
        )
        assert "every timed case and direction: 1 won, 0 level within the spread, 0 lost" in said

    def test_a_case_that_ours_loses_says_so(self) -> None:
        said = self.said(a_row("padfree", 4.0), a_row("sdpa", 3.0), a_row("sdpa-cudnn", 2.0))
        assert "padfree loses: 4 ms, 2.00x as long as sdpa-cudnn, the fastest, at 2 ms" in said
        assert "0 won, 0 level within the spread, 1 lost" in said

    def test_what_the_spread_does_not_tell_apart_is_level(self) -> None:
        said = self.said(a_row("padfree", 1.0), a_row("sdpa", 1.015))
        assert "padfree at 1 ms and sdpa (the baseline) at 1.015 ms are level" in said

    def test_a_graph_decides_where_both_have_one(self) -> None:
        graph = {"graph_p20": 0.5, "graph_ms": 0.5, "graph_p80": 0.5}
        said = self.said(
            a_row("padfree", 3.0, **graph), a_row("sdpa", 2.0, graph_ms=1.0, graph_p20=1.0, graph_p80=1.0)
        )
        assert "padfree is the fastest at 0.5 ms (as a graph)" in said and "takes 2.00x" in said

    def test_without_ours_the_best_is_named_and_padfree_said_not_to_have_run(self) -> None:
        case = "B16-H12-D64-S400-imdb-fp32"
        rows = [a_row("padfree", None, case), a_row("sdpa", 2.0, case), a_row("eager", 5.0, case)]
        said = self.said(*rows, device="CPU, 2 cores")
        assert "No GPU was measured yet" in said and f"padfree: not run on a CPU. {NO_GPU}" in said
        assert (
            "fp32, forward: sdpa (the baseline) is the fastest at 2 ms; the next best, eager, takes 2.50x"
            in said
        )
        assert "attention (1 case, 2026-11-28, a CPU)" in said

    def test_a_case_that_two_groups_share_is_not_mixed_from_both(self) -> None:
        rows = [a_row("padfree", 2.0), a_row("sdpa", 3.0)]
        rows += [
            a_row("padfree", 1.0, group="batch"),
            a_row("sdpa", None, group="batch", reason="out of memory"),
        ]
        assert "padfree is the fastest at 2 ms; the next best, sdpa (the baseline), takes 1.50x" in self.said(
            *rows
        )
        html = rendered(result_of(rows))
        assert [html.count(f"<summary>{CASE}, forward (group {name})") for name in ("imdb", "batch")] == [
            1,
            1,
        ]

    @pytest.mark.parametrize("status", [FAULT, UPPER_BOUND])
    def test_neither_a_fault_nor_an_upper_bound_wins(self, status: str) -> None:
        said = self.said(
            a_row("padfree", 2.0), a_row("sdpa", 3.0), a_row("sdpa-cudnn-nomask", 1.0, status=status)
        )
        assert "padfree is the fastest at 2 ms" in said
        assert ("FAULT: 1 figures" in said) == (status == FAULT)

    def test_whole_models_stand_there_by_name(self) -> None:
        rows = [a_row(peer, ms, direction="step") for peer, ms in (("notebook", 9.0), ("ours-sdpa", 3.0))]
        rows = [replace(row, suite="train", case="notebook-B64-S400-8-batches-fp32") for row in rows]
        result = replace(result_of(rows), suite="train")
        said = words(rendered(result))
        assert (
            "notebook, B64 H12 D64 S400, IMDB lengths, bf16, step: ours-sdpa is the fastest at 3 ms" in said
        )

    def test_what_was_not_reached_is_told_once_in_the_conclusion(self) -> None:
        result = replace(result_of([a_row("sdpa", 1.0)]), not_reached=["B1-late", "B2-late"])
        html = rendered(result)
        assert "Not reached within the time given: 2 cases of attention" in words(html)
        assert html.count("B2-late") == 1


class TestNotRun:
    def test_each_reason_stands_once_a_device_however_many_tables_there_are(self) -> None:
        ways = ("forward", "backward", "both")
        rows = [
            a_row(peer, ms, direction=way)
            for way in ways
            for peer, ms in (("padfree", None), ("padfree-qkv", None), ("sdpa", 1.0))
        ]
        rows += [a_row("xformers", None, direction=way, reason="xformers is not installed") for way in ways]
        html = rendered(result_of(rows), result_of(rows, "another"))
        assert html.count("xformers is not installed") == 2
        assert html.count("<li><b>padfree, padfree-qkv</b>: no GPU") == 2

    def test_who_ran_elsewhere_is_listed_with_the_cases_that_it_missed(self) -> None:
        late = CASE.replace("S400", "S800")
        rows = [a_row(peer, 1.0) for peer in ("sdpa", "eager", "sdpa-math")]
        rows += [a_row(peer, None, late, reason="out of memory") for peer in ("eager", "sdpa-math")]
        assert f"eager, sdpa-math (only in {late}): out of memory" in words(rendered(result_of(rows)))

    def test_a_table_without_any_figure_leads_to_the_reasons(self) -> None:
        html = rendered(result_of([a_row("padfree", None)]))
        assert "Nothing ran: <a href='#device-0'>" in html and "<section id='device-0'>" in html


class TestWarningsAndWords:
    def test_a_busy_machine_is_owned_up_to_beside_its_name(self) -> None:
        rows = [a_row("sdpa", 1.0)]
        runs = [result_of(rows, load_before=load) for load in (5.2, 0.1, 3.0)]
        runs = [
            replace(run, suite=name) for run, name in zip(runs, ("attention", "hf", "train"), strict=True)
        ]
        busy = "attention (load 5.2 on 2 cores), train (load 3.0 on 2 cores): these figures say little"
        html = report.render([("device", run) for run in runs], {})
        assert busy in words(html) and html.index(busy) < html.index("Who won")
        assert "busy" not in rendered(result_of([a_row("sdpa", 1.0)], load_before=2.0))
        assert "load before the run: 2.0" in words(rendered(result_of([a_row("sdpa", 1.0)], load_before=2.0)))

    def test_a_file_from_before_loads_were_noted_is_not_called_calm(self) -> None:
        result = result_of([a_row("sdpa", 1.0)])
        del result.environment["load_before"]
        assert "load before the run: not noted" in words(rendered(result))

    @pytest.mark.parametrize(
        "term",
        ["B, H, D, S", "imdb", "scaled", "full", "both", "step", "extra", "upper bound", "FAULT", "not run"],
    )
    def test_every_word_of_a_case_and_of_a_row_is_explained(self, term: str) -> None:
        terms = re.findall(r"<dt>(.*?)</dt>", rendered(result_of([a_row("sdpa", 1.0)])))
        assert any(term in each for each in terms)


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


class TestDocument:
    def built(self, tmp_path: Path) -> str:
        heads = [
            a_row(peer, 1.0, case, note="x")
            for case in ("B16-H4-D8-S400-imdb-fp32", "B16-H12-D64-S400-imdb-fp32")
            for peer in ("padfree", "sdpa")
        ]
        for name in ("one", "two"):
            save(result_of(heads, f"GPU {name}"), tmp_path / name)
        return report.build_page(tmp_path).read_text()

    def test_only_the_box_of_a_table_scrolls_sideways_and_it_can_by_keyboard(self, tmp_path: Path) -> None:
        html = self.built(tmp_path)
        assert "content='width=device-width, initial-scale=1'" in html
        boxes = re.findall(
            r"<div class='scroll' role='region' aria-label='[^']+' tabindex='0'>\s*<table", html
        )
        assert len(boxes) == html.count("<table") == 4
        assert ".scroll { overflow-x: auto" in html and "max-width: 100%" in html

    def test_a_table_names_its_columns_and_rows(self, tmp_path: Path) -> None:
        html = self.built(tmp_path)
        assert html.count("<th scope='row'>padfree</th>") == 4
        assert not re.search(r"<th(?! scope)[ >]", html)

    def test_a_picture_says_in_words_what_it_shows(self, tmp_path: Path) -> None:
        labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', self.built(tmp_path))
        assert len(labels) == 4
        assert "roofline: forward of every case, useful work only, fp32, GPU one" in labels

    def test_two_devices_share_no_id(self, tmp_path: Path) -> None:
        ids = re.findall(r"\bid=['\"]([^'\"]+)['\"]", self.built(tmp_path))
        assert len(ids) == len(set(ids)) > 100

    def test_it_needs_no_script_and_nothing_from_elsewhere(self, tmp_path: Path) -> None:
        html = self.built(tmp_path)
        assert "<script" not in html
        assert not re.search(r"(?:src|href)=['\"]https?:|url\(['\"]?https?:|@import", html)
