"""What the pages in docs/ say is so: tables and names are complete, quotations are what is said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import pytest
import typer
from doc_pages import ROOT, read, rows_of

import blockswap
from blockswap import _C, errors, memory
from blockswap.cli import app
from blockswap.report import Timeline

pytestmark = [  # of diffusers and of torch, about the models
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


# What pages say holds ----------------------------------------------------------------------------


def test_every_option_stands_in_the_table_with_its_default() -> None:
    defaults = {}
    for field in fields(blockswap.SwapConfig):
        default = field.metadata.get("default", field.default)
        assert default is not MISSING
        defaults[f"`{field.name}`"] = default
    rows = {cells[0]: cells for cells in rows_of(read("attach.md"), "option")}
    assert rows.keys() == defaults.keys()
    for name, default in defaults.items():
        assert ast.literal_eval(rows[name][2].strip("`")) == default, name
        assert all(rows[name]), f"{name} has an empty cell"


@pytest.mark.parametrize(
    ("page", "cls"),
    [
        ("attach.md", blockswap.Session),
        ("pipelines.md", blockswap.PipelineSession),
    ],
)
def test_every_method_of_a_session_is_named_on_its_page(page: str, cls: type) -> None:
    hears_only_hooks = {"abort", "enter", "leave", "relieve", "fetch_whole", "log_run"}
    hears_only_hooks |= {"binding", "token", "units"}
    public = {name for name in vars(cls) if not name.startswith("_")} - hears_only_hooks
    assert not {name for name in public if not re.search(rf"\b{name}\b", read(page))}


def test_every_command_has_a_section_and_every_section_is_a_command() -> None:
    group: Any = typer.main.get_command(app)
    sections = re.findall(r"^## (.*)$", read("command-line.md"), re.MULTILINE)
    assert sorted(sections) == sorted(group.commands)


def test_every_exit_code_of_the_command_line_is_explained() -> None:
    from blockswap import cli

    told = {cells[0] for cells in rows_of(read("command-line.md"), "exit code")}
    assert told == set(re.findall(r"\b(\d+) [a-z]", str(cli.__doc__).partition("Exit codes:")[2]))


def test_every_error_class_is_named_where_troubles_are_shot() -> None:
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.BlockswapError):
            assert f"`{name}`" in read("troubleshooting.md").replace("blockswap.", "")


def test_every_doctor_severity_is_explained() -> None:
    from typing import get_args

    from blockswap.doctor import Severity

    for severity in get_args(Severity):
        assert f'"{severity}"' in read("command-line.md")


def test_fields_of_report_and_timeline_named_in_text_exist() -> None:
    pages = read("understand.md") + read("pipelines.md")
    for owner, cls in (("report", blockswap.Report), ("timeline", Timeline)):
        known = {field.name for field in fields(cls)} | set(vars(cls))
        named = set(re.findall(rf"\b{owner}\.([a-z_]+)", pages))
        assert named - {"png", "txt", "json"} <= known  # those are files


def test_every_figure_and_function_of_the_pool_is_explained() -> None:
    page = read("memory.md")
    told = {name for cells in rows_of(page, "figure of `stats()`") for name in cells[0].split(", ")}
    assert told == {f"`{name}`" for name in _C.PoolStats.FIELDS}
    own = {n for n, f in vars(memory).items() if getattr(f, "__module__", "") == memory.__name__}
    functions = {name for name in own if not name.startswith("_")}
    assert not {name for name in functions if not re.search(rf"\b{name}\b", page)}


def test_the_page_of_families_is_the_one_that_the_script_draws() -> None:
    pytest.importorskip("diffusers")
    from tests.families.page import make_page

    assert read("families.md") == make_page(), "run `python -m tests.families.page`"


# Quotations --------------------------------------------------------------------------------------


def texts_of_python(source: str) -> Iterator[str]:
    """Return every text of a module; what a run fills in is a line break."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "\n" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def texts_of_cpp(source: str) -> Iterator[str]:
    """Return the texts of each statement."""
    source = re.sub(r'"\s*\n\s*"', "", source)
    for statement in source.split(";\n"):
        yield "\n".join(re.findall(r'"((?:[^"\\]|\\.)*)"', statement))


def says(texts: list[str], quotation: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, quotation.split("..."))), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def quotations() -> list[str]:
    found = re.findall(r"^### `(.*)`", read("troubleshooting.md"), re.MULTILINE)
    found += [cells[0].strip("`") for cells in rows_of(read("understand.md"), "it says")]
    return [quotation for quotation in found if not quotation.startswith("torch.")]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    texts: list[str] = []
    for path in sorted((ROOT / "blockswap").rglob("*.py")):
        texts += texts_of_python(path.read_text("utf-8"))
    for path in sorted((ROOT / "csrc").rglob("*.cpp")):
        texts += texts_of_cpp(path.read_text("utf-8"))
    return texts


@pytest.mark.parametrize("quotation", quotations())
def test_quoted_message_is_one_that_blockswap_says(quotation: str, messages: list[str]) -> None:
    assert says(messages, quotation)


def test_a_message_that_nobody_says_is_found_out(messages: list[str]) -> None:
    assert not says(messages, "the smallest plan needs ... but the moon is ...")
