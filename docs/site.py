"""What the documentation site takes from outside its folder, and what it makes of the code."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("first_attack", "own_model", "calibrate_and_serve")
# Documents of the repository that are pages as well.
PAGES = {
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
PAGES |= {f"examples/{name}.ipynb": f"examples/{name}.md" for name in NOTEBOOKS}
PICTURES = ("model_store/cifar10/ablation.png",)
OPEN = """\
To run it, open `{}` with the Python of `.venv`, such as by
`.venv/bin/python -m pip install notebook && .venv/bin/jupyter notebook examples/`.
"""
# Links to what is no page are shown as the name of the file.
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add pages and pictures from outside `docs/`, and what the code says of itself."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        home = (ROOT / source).parent
        text = notebook(text, source) if source.endswith(".ipynb") else linked(text, home, page)
        files.append(File.generated(config, page, content=text))
    for picture in PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    reference = "reference/command-line.md"
    files.append(File.generated(config, reference, content=command_line()))
    files.append(File.generated(config, "reference/card.md", content=card()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links that leave `docs/` into links to pages."""
    if page.file.generated_by:
        return markdown
    source = ROOT / "docs" / page.file.src_uri
    return linked(markdown, source.parent, page.file.src_uri)


def on_post_page(output: str, **_: Any) -> str:
    """Name the theme's search dialog for screen readers."""
    return output.replace(' role="dialog">', ' role="dialog" aria-label="Search">', 1)


def on_post_template(output_content: str, **_: Any) -> str:
    """The page for a wrong address is none of the pages."""
    return on_post_page(output_content)


def linked(text: str, home: Path, page: str) -> str:
    """`text` of a file in `home` with links as the site's `page` has them."""
    up = "../" * page.count("/")

    def of(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups(default="")
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (home / target).resolve()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if name.startswith("docs/"):
            return f"{mark}[{words}]({up}{name.removeprefix('docs/')}{anchor})"
        if name in PAGES:
            return f"{mark}[{words}]({up}{PAGES[name]}{anchor})"
        if name in PICTURES:
            return f"{mark}[{words}]({up}{name})"
        if name == "README.md":
            return f"{mark}[{words}]({up}index.md)"
        return f"{words} (`{name}`)" if name else match[0]

    return LINK.sub(of, text)


def notebook(text: str, source: str) -> str:
    """A notebook without output as a page, with how to run it below its title."""
    first, *rest = json.loads(text)["cells"]
    parts = ["".join(first["source"]), OPEN.format(source)]
    for cell in rest:
        own = "".join(cell["source"])
        parts.append(own if cell["cell_type"] == "markdown" else f"```python\n{own}\n```")
    return "\n\n".join(parts)


def command_line() -> str:
    """Every command with its arguments and options, as a page."""
    from rampart.cli import app

    group = typer.main.get_command(app)
    parts = ["# Command line", "", inspect.cleandoc(group.help or ""), ""]
    for name, command in group.commands.items():
        if not command.hidden:
            parts += [f"## {name}", "", *described(name, command), ""]
    return "\n".join(parts)


def card() -> str:
    """What a card may hold, out of its schema, as a page."""
    schema = json.loads((ROOT / "hardening/report/card.schema.json").read_text(encoding="utf-8"))
    parts = ["# Card", "", schema["description"], ""]
    parts += ["| entry | what it holds |", "| --- | --- |"]
    for name, entry in schema["properties"].items():
        always = ", always" if name in schema["required"] else ""
        parts.append(f"| `{name}` | {entry['description']}{always} |")
    figure = schema["$defs"]["metric"]
    parts += ["", "## A figure of `metrics`", "", figure["description"], ""]
    parts += ["| entry | what it holds |", "| --- | --- |"]
    parts += [f"| `{name}` | {e['description']} |" for name, e in figure["properties"].items()]
    return "\n".join(parts)


def described(name: str, command: Any) -> Iterator[str]:
    """One command: what it does, how it is called, its arguments and options."""
    yield inspect.cleandoc(command.help or "")
    yield ""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [p.name.upper() for p in arguments]
    yield f"    rampart {' '.join([name, *words])} [OPTIONS]"
    yield ""
    rows = [(p, ", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts))) for p in command.params]
    yield "| | | default |"
    yield "| --- | --- | --- |"
    for parameter, names in rows:
        if parameter in arguments:
            names = f"`{parameter.name.upper()}`"
        text = " ".join((parameter.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
        choices = getattr(getattr(parameter, "type", None), "choices", None)
        if choices:
            text += f" ({', '.join(map(str, choices))})"
        yield f"| {names} | {text} | {shown(parameter)} |"


def shown(parameter: Any) -> str:
    """The default of a parameter, as the help shows it."""
    if parameter.required:
        return "required"
    default = (
        parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    )
    if default in (None, False, "", ()) or callable(default):
        return ""
    return f"`{default}`"
