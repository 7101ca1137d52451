"""The pages in docs/ work: their commands and code run, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from doc_pages import DOCS, NAMES, PAGES, ROOT, Block, blocks_of, prose_of, read
from typer.testing import CliRunner

from blockswap.cli import app

pytestmark = [  # of diffusers and of torch, about the models
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MAX_COLUMNS = 125
MAX_LINES = 170

#: What needs a network, root, a GPU or another operating system; all other commands run here.
NO_RUN = (
    "pip install ",
    "pip wheel ",
    "BLOCKSWAP_BUILD=cpu pip install ",
    "docker run ",
    "make acceptance ",
    "wsl --shutdown",
    "blockswap demo --model sdxl --size full",
    "blockswap bench --model flux,sdxl",
)


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
        cannot_break = line.startswith("| ") or re.fullmatch(r"\[[^]]*\]\([^)]*\)", line)
        assert len(line) <= MAX_COLUMNS or cannot_break, f"{name}:{number}"
