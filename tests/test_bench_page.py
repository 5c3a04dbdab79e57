"""The benchmark's page: what came out stands first, nothing is said twice, and it is legible on a phone."""

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from padfree_bench.measuring.results import FAULT, UPPER_BOUND, Result, Row, save
from padfree_bench.reports import report
from tiny_bench import CASE, NO_GPU, a_row, as_graph, result_of


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
        sdpa = a_row("sdpa", 0.272, **as_graph(0.27))
        said = self.said(a_row("padfree-skip", 0.8, **as_graph(0.07)), sdpa)
        assert "padfree-skip is the fastest at 0.07 ms (as a graph)" in said
        assert "launched by itself, host included, it loses: 0.8 ms, sdpa 0.272" in said
        assert "Of those won as a graph 1 are lost where each call is launched by itself." in said
        said = self.said(a_row("padfree-skip", 0.2, **as_graph(0.07)), sdpa)
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
        said = self.said(a_row("padfree", 1.0, spread=0.01), a_row("sdpa", 1.015, spread=0.01))
        assert "padfree at 1 ms and sdpa (the baseline) at 1.015 ms are level" in said

    def test_a_graph_decides_where_both_have_one(self) -> None:
        said = self.said(a_row("padfree", 3.0, **as_graph(0.5)), a_row("sdpa", 2.0, **as_graph(1.0)))
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
