"""The README's table is made from the result files: our best beside the best of the others."""

from dataclasses import replace
from pathlib import Path

import pytest

from padfree_bench.measuring.results import FAULT, OK, UPPER_BOUND, Result
from padfree_bench.reports import readme, report
from tiny_bench import ROOT, a_row, as_graph, result_of


def agrees(path: Path, results: list[tuple[str, Result]]) -> bool:
    """Whether this README says what the files say."""
    text = path.read_text()
    return readme.rewrite(text, readme.table(results)) == text


class TestReadme:
    def results(self) -> list[tuple[str, Result]]:
        rows = [a_row("padfree-skip", 0.07), a_row("sdpa", 0.21), a_row("sdpa-math", 0.9)]
        return [("gpu", replace(result_of(rows), suite="attention-imdb"))]

    def test_the_table_is_made_from_the_files(self) -> None:
        text = readme.rewrite(
            f"top\n{readme.BEGIN}\noutdated\n{readme.END}\nend\n", readme.table(self.results())
        )
        assert text.startswith("top\n") and text.endswith("\nend\n") and "outdated" not in text
        assert "| sdpa 0.21 ms | sdpa 0.21 ms | **padfree-skip 0.07 ms**" in text and "3.00x" in text

    def test_a_case_we_lose_stands_there_too(self) -> None:
        ((_, result),) = results = self.results()
        result.rows[0] = a_row("padfree-skip", 0.42)
        assert "0.50x" in readme.table(results)

    def test_a_case_measured_again_later_on_the_same_card_stands_once(self) -> None:
        ((_, first),) = results = self.results()
        first.environment["started"] = "2026-11-26T10:00:00+00:00"
        rows = [a_row("padfree-skip", 0.06), a_row("sdpa", 0.2)]
        later = replace(result_of(rows, started="2026-11-26T10:05:00+00:00"), suite="attention-table")
        text = readme.table([*results, ("gpu", later)])
        assert "**padfree-skip 0.06 ms**" in text and "0.07 ms" not in text
        assert "0.07 ms" in readme.table([*results, ("another card", later)])

    @pytest.mark.parametrize("kept", [["sdpa"], ["padfree-skip"], ["sdpa", "sdpa-math"]])
    def test_a_later_run_of_some_peers_replaces_no_case_that_it_cannot_stand_for(
        self, kept: list[str]
    ) -> None:
        ((_, first),) = results = self.results()
        first.environment["started"] = "2026-11-26T10:00:00+00:00"
        rows = [replace(row, ms_p50=0.06) for row in first.rows if row.peer in kept]
        later = replace(result_of(rows, started="2026-11-26T10:05:00+00:00"), suite="attention-some")
        assert "**padfree-skip 0.07 ms**" in readme.table([*results, ("gpu", later)])
        faulty = [replace(row, status=FAULT if row.peer == "padfree-skip" else OK) for row in first.rows]
        assert "**padfree-skip 0.07 ms**" in readme.table([*results, ("gpu", replace(later, rows=faulty))])

    def test_without_a_gpu_file_it_says_not_measured_yet(self) -> None:
        assert "On a GPU: not measured yet" in readme.table([])

    def test_rows_of_ours_alone_make_no_line(self) -> None:
        ((_, result),) = results = self.results()
        del result.rows[1:]
        assert readme.HEAD not in readme.table(results)
        result.rows[0] = a_row("sdpa", 1.0)
        assert readme.HEAD not in readme.table(results)

    def test_skipped_rows_are_owned_up_to_where_they_stand(self) -> None:
        ((_, result),) = results = self.results()
        assert "leave rows at padding uncomputed" in readme.table(results)
        result.rows[0] = a_row("padfree", 0.07)
        assert "uncomputed" not in readme.table(results)

    def test_a_changed_figure_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "README.md"
        path.write_text(f"{readme.BEGIN}\n{readme.table(self.results())}\n{readme.END}\n")
        assert agrees(path, self.results())
        path.write_text(path.read_text().replace("0.07 ms", "0.05 ms"))
        assert not agrees(path, self.results())

    def test_readme_and_the_committed_files_agree(self) -> None:
        path = ROOT / "README.md"
        if not path.exists() or readme.BEGIN not in path.read_text():
            pytest.skip("README.md holds no benchmark markers")
        assert agrees(path, report.collect(ROOT / "bench" / "results")), (
            "README differs from bench/results: run python -m bench report --readme README.md"
        )


class TestGraphsInReadme:
    def test_ratios_are_of_graph_to_graph_where_both_have_one(self) -> None:
        rows = [
            a_row("padfree", 0.02, **as_graph(0.01)),
            a_row("sdpa", 0.06, **as_graph(0.05)),
            a_row("eager", 0.03),
        ]
        table = readme.table([("gpu", result_of(rows))])
        assert "| sdpa 0.06 ms, graph 0.05 | eager 0.03 ms |" in table
        assert "**padfree 0.02 ms** [0.02, 0.02], graph **0.01** [0.01, 0.01] | 5.00x | 1.50x |" in table
        assert "cold L2" in table and "graph to graph" in table

    def test_the_best_other_is_not_one_that_our_host_time_makes_look_good(self) -> None:
        rows = [
            a_row("padfree", 0.8, **as_graph(0.07)),
            a_row("sdpa", 0.272, **as_graph(0.27)),
            a_row("varlen_attn+pack", 1.9),
        ]
        table = readme.table([("gpu", result_of(rows))])
        assert "| sdpa 0.272 ms, graph 0.27 | sdpa 0.272 ms, graph 0.27 |" in table
        assert "| 3.86x | 3.86x |" in table

    def test_an_upper_bound_stays_out(self) -> None:
        rows = [a_row("padfree", 1.0), a_row("sdpa", 2.0), a_row("flash", 0.5, status=UPPER_BOUND)]
        assert "flash" not in readme.table([("gpu", result_of(rows))])
