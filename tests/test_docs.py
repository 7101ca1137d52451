"""The pages in docs/ are true: their commands and code run, their tables and quotations hold."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import blockswap
from blockswap import errors
from blockswap.cli import app
from blockswap.report import Timeline

pytestmark = [  # of diffusers and of torch, about the models
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NAMES = [page.name for page in PAGES]
MAX_COLUMNS = 125
MAX_LINES = 170

#: What needs a network, root, a GPU or another operating system; all other commands run here.
NO_RUN = (
    "pip install ",
    "pip wheel ",
    "BLOCKSWAP_BUILD=cpu pip install ",
    "docker run ",
    "wsl --shutdown",
    "blockswap demo --model sdxl --size full",
    "blockswap bench --model flux,sdxl",
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what its fence says, its text, and the line where that begins."""

    language: str
    options: tuple[str, ...]
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]

    @property
    def exit_codes(self) -> set[int]:
        claims = [option for option in self.options if option.startswith("exit=")]
        return {int(code) for code in (claims or ["exit=0"])[0][5:].split("|")}


def blocks_of(page: str) -> list[Block]:
    found: list[Block] = []
    head: list[str] | None = None
    begin, lines = 0, []
    for number, line in enumerate(page.splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif head is None:
            head, begin, lines = line[3:].split(), number + 1, []
        else:
            assert line == "```", f"line {number}: a fence inside a fence"
            language = head[0] if head else ""
            found.append(Block(language, tuple(head[1:]), "\n".join(lines), begin))
            head = None
    assert head is None, f"the block of line {begin} is not closed"
    return found


def prose_of(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first heading is that."""
    lines = page.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" |")])
    return rows


def parses(command: str) -> None:
    """Refuse a blockswap command whose name or options do not exist."""
    name, *arguments = shlex.split(command)[1:]
    group: Any = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Toy models are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What pages show runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_code_block_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("diffusers", "transformers", "peft"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(read(name)):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # tracebacks name the page's line
            exec(compile(source, str(DOCS / name), "exec"), namespace)
        elif block.language == "bash" and "no-run" not in block.options:
            for command in block.commands:
                run(command, block)


def run(command: str, block: Block) -> None:
    program, *arguments = shlex.split(command)
    assert program == "blockswap", f"{command}: mark what cannot run here as no-run"
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in block.exit_codes, f"{command}: {result.output}"


@pytest.mark.parametrize("name", NAMES)
def test_fences_of_a_page_say_what_is_done_with_them(name: str) -> None:
    for block in blocks_of(read(name)):
        assert block.language in ("python", "bash", "text"), (name, block.line)
        if block.language != "bash":
            assert not block.options, f"{name}:{block.line}: nothing but commands may not run"
        for option in block.options:
            assert option == "no-run" or re.fullmatch(r"exit=\d+(\|\d+)*", option), option


@pytest.mark.parametrize("name", NAMES)
def test_commands_that_do_not_run_are_on_the_list_and_parse(name: str) -> None:
    for block in blocks_of(read(name)):
        if "no-run" not in block.options:
            continue
        for command in block.commands:
            assert command.startswith(NO_RUN), f"{name}:{block.line}: {command} can run here"
            if command.startswith("blockswap "):
                parses(command)


def test_commands_in_running_text_parse() -> None:
    for page in [*PAGES, ROOT / "README.md"]:
        for command in re.findall(r"`(blockswap [a-z]+ --[^`]+)`", page.read_text("utf-8")):
            if not command.endswith("--help"):
                parses(command)


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
    hears_only_hooks = {"abort", "enter", "leave", "fetch_whole", "log_run"}
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


# Links and shape ---------------------------------------------------------------------------------


def anchors_of(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page.read_text("utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors_of(file.read_text("utf-8")), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_index_and_the_index_from_the_readme() -> None:
    index = read("index.md")
    assert not {name for name in NAMES if name != "index.md" and f"({name})" not in index}
    assert "(docs/index.md)" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_page_is_short_and_its_lines_are_too(name: str) -> None:
    lines = read(name).splitlines()
    assert len(lines) <= MAX_LINES
    for number, line in enumerate(lines, 1):
        assert len(line) <= MAX_COLUMNS or line.startswith("| "), f"{name}:{number}"
