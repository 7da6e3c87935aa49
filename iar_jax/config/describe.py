"""The fields of the config for people: the text of --help, and docs/config.md.

python -m iar_jax.config.describe > docs/config.md
"""

import textwrap
from collections.abc import Iterator, Sequence

from iar_jax.config.field import Field, leaves
from iar_jax.config.fields import SECTIONS

WIDTH = 110


def help_text(about: str, options: Sequence[tuple[str, str]], sections: Sequence[str]) -> str:
    """What a stage does, its own options, and the fields that it reads."""
    lines = [about.strip(), ""]
    if options:
        lines += ["Options:", *(line for option, meaning in options for line in _entry(option, meaning)), ""]
    lines.append("Fields of the config that are read here; set by --config.section.field=value:")
    for name, field in fields_of(sections):
        lines += _entry(f"--config.{name}={shown(field.default)}", f"{field.meaning} Allowed: {field.allowed}.")
    return "\n".join(lines)


def fields_of(sections: Sequence[str]) -> Iterator[tuple[str, Field]]:
    """The fields of some sections (or single ones), by their full names."""
    for name in sections:
        found = SECTIONS[name]
        yield from [(name, found)] if isinstance(found, Field) else leaves(found, f"{name}.")


def shown(value: object) -> str:
    """A value as it is set on a command line."""
    return (",".join(map(str, value)) or "'()'") if isinstance(value, tuple) else str(value)


def markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Every field of the config",
        "",
        "This page is made from `iar_jax/config/fields.py` by `python -m iar_jax.config.describe > docs/config.md`.",
        "A field is set by `--config.section.field=value` or in a file of `configs/`. A field that says *may change*",
        "may differ between two parts of a run; of the others, those of the schedule may change as long as no step",
        "that is done would have been another. `python -m iar_jax.<stage> --help` lists the fields that a stage reads.",
    ]
    for section, content in SECTIONS.items():
        lines += ["", f"## {section}", "", "| field | default | meaning | allowed |", "|---|---|---|---|"]
        for name, field in [(section, content)] if isinstance(content, Field) else content.items():
            meaning = field.meaning if field.matters else f"{field.meaning} *May change.*"
            cells = (f"`{name}`", f"`{field.default!r}`", meaning, str(field.allowed))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _entry(head: str, text: str) -> list[str]:
    return [f"  {head}", *textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")]


if __name__ == "__main__":
    print(markdown(), end="")
