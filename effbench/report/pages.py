"""Pages from records, and nothing but records: the same records always give the same bytes."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.paths import CHECKOUT, PUBLISHED
from effbench.core.usage import LONGEST, nearest
from effbench.records.record import Record
from effbench.records.store import Store, latest
from effbench.report import alarms, blocks, kernels
from effbench.report.choice import ALL, Choice
from effbench.report.differences import Kept, parse_kept, read_kept, write_kept
from effbench.report.groups import Table, group_records
from effbench.report.sheets import Sheet, Stale, cut_to_detail, make_sheets
from effbench.report.styles import csv, markdown, terminal, tex

FORMATS = ("md", "csv", "tex", "rich")
ADHOC = "adhoc"  # recipes from the command line; their tables are written only when asked for by name
ALARMS = Path("docs", "false-alarms.md")  # beside the README


def load(results: Path, suite: str | None = None) -> list[Record]:
    """The last attempt at every cell of a suite, or of all suites; files that are skipped are named on stderr.

    Raises `Usage` when there is none.
    """
    check_suite_name(suite)
    check_folder_name(results)
    try:
        records, notes = Store(results).read(suite)
    except OSError as error:
        raise Usage(f"results={str(results)[:LONGEST]}: cannot be read ({error.strerror})") from None
    for note in notes:
        print(note, file=sys.stderr)
    if not records:
        what = f"records of suite {suite!r}" if suite else "records"
        published = PUBLISHED is not None and results.resolve() != PUBLISHED
        other = f", or name the published ones: results={PUBLISHED}" if published else ""
        raise Usage(f"no {what} in {results / 'records'}; run `effbench run suite={suite or 'quant'}` first{other}")
    return list(latest(records).values())


def check_suite_name(suite: str | None) -> None:
    """Raise `Usage` for what cannot be the name of a suite."""
    if suite is not None and not re.fullmatch(r"[\w.-]{1,100}", suite):
        raise Usage(f"suite={suite[:100]!r}: not the name of a suite")


def check_folder_name(results: Path) -> None:
    """Raise `Usage` for what cannot be the name of a folder."""
    name = str(results)
    if not name.isprintable():
        raise Usage(f"results={name[:LONGEST]!r}: not the name of a folder")


def print_tables(
    records: Sequence[Record],
    style: str,
    detail: str | None = None,
    stale: Stale | None = None,
    choice: Choice = ALL,
) -> None:
    """Print the tables of every suite among the records, as csv all in one. Raises `Usage` for a name that no row or
    column has.
    """
    tables = group_records(records)
    choice.check(tables)
    if style == "csv":
        sys.stdout.write(csv.page(tables, choice))
        return
    names = sorted({record.cell.suite for record in records})
    sys.stdout.write("\n".join(filter(None, (render(records, name, style, detail, stale, choice) for name in names))))


def print_sheets(sheets: Sequence[Sheet], style: str, detail: str) -> None:
    """Print sheets as md, tex or rich, which shows the grid of one detail."""
    sys.stdout.write(_render_sheets(sheets, style, detail))


def select_records(records: Sequence[Record], **places: str | None) -> list[Record]:
    """The records of a tier or a model, by the name of a field of their cells. Raises `Usage` when there is none."""
    for field, value in places.items():
        known = dict.fromkeys(str(getattr(record.cell, field)) for record in records)
        if value is not None and value not in known:
            raise Usage(f"{field}={value[:LONGEST]}: no records of it{nearest(value, known)}")
        records = [record for record in records if value in (None, getattr(record.cell, field))]
    return list(records)


def render(
    records: Iterable[Record],
    suite: str,
    style: str = "md",
    detail: str | None = None,
    stale: Stale | None = None,
    choice: Choice = ALL,
) -> str:
    """The tables of one suite as md, csv, tex, paper (tex for a page of one column) or rich (for the terminal), all
    grids or those of one detail.

    With `stale`, captions say how many rows are of an older source. Empty where no row and column is chosen. Raises
    `Usage` without records.
    """
    records = list(records)
    chosen = [record for record in records if record.cell.suite == suite]
    if not chosen:
        raise Usage(f"no records of suite {suite!r}{nearest(suite, {record.cell.suite for record in records})}")
    tables = group_records(chosen)
    if style == "csv":
        return csv.page(tables, choice)
    sheets = make_sheets(tables, stale=stale, choice=choice, mark_best=style in ("tex", "paper"))
    return _render_sheets(sheets, style, detail) if sheets else ""


def read_tests(results: Path, suites: Iterable[str]) -> Kept:
    """The tests of rows that are kept with what was published of these suites."""
    return {key: row for name in suites for key, row in read_kept(results / "statistics" / f"{name}.json").items()}


def _render_sheets(sheets: Sequence[Sheet], style: str, detail: str | None = None) -> str:
    chosen = all(grid.detail == "chosen" for sheet in sheets for grid in sheet.grids)
    detail = "chosen" if chosen else detail
    if style == "rich":
        width = shutil.get_terminal_size((100, 24)).columns
        return terminal.page(sheets, width, detail or "summary", colour=sys.stdout.isatty())
    if style == "paper":
        return tex.write_paper([cut_to_detail(sheet, detail or "summary") for sheet in sheets])
    if detail is not None:
        sheets = [cut_to_detail(sheet, detail) for sheet in sheets]
    return tex.page(sheets) if style == "tex" else markdown.page(sheets, detail)


# ---- generated files ----------------------------------------------------------------------------


def write(results: Path, suite: str | None = None, readme: Path | None = None) -> list[Path]:
    """Bring the generated files of a suite, or of all of them, up to date; returns those that changed."""
    texts = render_pages(load(results, suite), results, suite, readme)
    changed = [(path, text) for path, text in texts.items() if find_difference(path, text)]
    for path, text in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return [path for path, _ in changed]


def check(
    results: Path, suite: str | None = None, readme: Path | None = None, records: Sequence[Record] | None = None
) -> list[str]:
    """The generated files that are not what the records say, each with its first differing line, and the blocks of the
    README that have too many rows.

    `records` are those of the folder, where they were read already.
    """
    texts = render_pages(load(results, suite) if records is None else records, results, suite, readme)
    return [*filter(None, (find_difference(path, text) for path, text in texts.items())), *blocks.find_crowded(readme)]


def count_stale(records: Iterable[Record], stale: Stale) -> list[str]:
    """A line for each suite of which some records were measured by an older source, with the mend."""
    counts: dict[str, list[bool]] = {}
    for record in records:
        counts.setdefault(record.cell.suite, []).append(stale(record))
    return [
        f"suite {name}: {sum(older)} of {len(older)} records were measured by an older source; "
        f"run it again and `effbench publish suite={name}`"
        for name, older in sorted(counts.items())
        if name != ADHOC and any(older)
    ]


def find_readme(results: Path) -> Path | None:
    """The README whose blocks are made from these results: that of the checkout, from what is published there."""
    published = CHECKOUT is not None and PUBLISHED is not None and results.resolve() == PUBLISHED.resolve()
    return CHECKOUT / "README.md" if CHECKOUT is not None and published else None


def render_pages(
    records: Iterable[Record], results: Path, suite: str | None = None, readme: Path | None = None
) -> dict[Path, str]:
    """Every generated file with the text it should have: tables of the suite or of all, their tests, the README.

    Raises `Usage` for a block of the README without records.
    """
    by_suite: dict[str, list[Record]] = {}
    for record in records:
        by_suite.setdefault(record.cell.suite, []).append(record)
    if suite is None:
        by_suite.pop(ADHOC, None)
    texts: dict[Path, str] = {}
    sources: dict[str, blocks.Source] = {}
    everything: list[Table] = []
    for name, chosen in sorted(by_suite.items()):
        tables, statistics = group_records(chosen), results / "statistics" / f"{name}.json"
        everything += tables
        texts[statistics] = write_kept(tables, read_kept(statistics))
        kept = parse_kept(texts[statistics])
        sheets = make_sheets(tables, kept)
        made = f"<!-- Generated by `effbench report suite={name} --write`; do not edit. -->"
        texts[results / "tables" / f"{name}.md"] = f"{made}\n\n{markdown.page(sheets)}"
        texts[results / "tables" / f"{name}.csv"] = csv.page(tables)  # LaTeX is made on demand
        sources[name] = blocks.Source(tables, kept, results / "tables" / f"{name}.md")
    if suite is None:
        texts |= kernels.tables(results)
    page = None if readme is None or suite is not None else readme.parent / ALARMS
    if page is not None and page.is_file():
        texts[page] = alarms.write_page(everything, page.read_text(encoding="utf-8"))
    documents = blocks.list_documents(readme)
    texts |= {path: blocks.fill_blocks(path, sources, suite) for path in documents}
    texts |= blocks.draw_plots(documents, sources, suite)
    return texts


def find_difference(path: Path, text: str) -> str:
    """Empty when the file has this text, else its name and the first line that differs."""
    if not path.is_file():
        return f"{path}: missing"
    present = path.read_bytes().decode(errors="replace")
    if present == text:
        return ""
    lines, due = present.split("\n"), text.split("\n")
    common = min(len(lines), len(due))
    first = next((i for i in range(common) if lines[i] != due[i]), common)
    here, there = (side[first] if first < len(side) else "(no such line)" for side in (lines, due))
    return f"{path}: line {first + 1} differs\n  is:        {here}\n  should be: {there}"
