"""If these fail, a command of README or docs is refused by the program that it starts, or a link leads nowhere."""

import importlib
import re
import runpy
import shlex

import pytest

from iar_jax.config.checks import check_config, field_names
from iar_jax.config.fields import default_config
from iar_jax.generators import generator
from tests.stages import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# Placeholders of the pages, and what they are read as.
PLACEHOLDERS = {"<stage>": "train", "--config.section.field=value": "--config.seed=1"}


def commands():
    """(page, words) of every command in a block of bash, and of every `python -m` in the text."""
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield page.name, tuple(shlex.split(line, comments=True))
        for inline in re.findall(r"`((?:[A-Z_]+=\S+ )?(?:python|bash) [^`]+)`", text):
            yield page.name, tuple(shlex.split(inline.replace("\n", " ").partition(" > ")[0]))


COMMANDS = sorted({(page, words) for page, words in commands() if words})


def options_of(source):
    """Names of the options that a program defines by absl or argparse."""
    return set(re.findall(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?([\w-]+)"', source))


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:80])
def test_a_command_is_one_that_its_program_takes(page, words):
    words = [PLACEHOLDERS.get(word, word).replace("<stage>", "train") for word in words]
    while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] == "time"):
        words = words[1:]
    if words[0] in ("pip", "npm", "git", "cd"):
        return
    if words[0] in ("bash", "sbatch"):
        script = next(word for word in words[1:] if not word.startswith("-"))
        assert (ROOT / script).exists(), script
        if "python" in words:
            words = words[words.index("python") :]
        else:
            overrides = [word for word in words if word.startswith("--config.")]
            check_overrides(default_config(), overrides)
            return
    assert words[0] == "python", words
    if words[1] == "-m":
        module, arguments = words[2], words[3:]
        if module == "pytest":
            paths = [word for word in arguments if word.startswith("tests/")]
            assert paths
            assert all((ROOT / path.partition("::")[0]).exists() for path in paths)
            return
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        file = (
            spec.origin if not spec.submodule_search_locations else f"{spec.submodule_search_locations[0]}/__main__.py"
        )
    else:
        file, arguments = ROOT / words[1], words[2:]
        assert file.exists(), file
    with open(file) as content:
        source = content.read()
    config = default_config()
    known = options_of(source) | {"config", "workdir", "help"}
    overrides = []
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        assert argument.startswith("--"), argument
        if name.startswith("config."):
            overrides.append(argument)
            continue
        assert name in known, f"{file} has no option {name}"
        if name == "config":
            path, _, arg = value.partition(":")
            config = runpy.run_path(str(ROOT / path))["get_config"](*([arg] if arg else []))
    check_overrides(config, overrides)
    if module_reads(words) and "--help" not in arguments:
        assert "--config" in " ".join(arguments) or "--samples" in " ".join(arguments), "a stage without a config"


def module_reads(words):
    return words[1] == "-m" and words[2].startswith("iar_jax.") and words[2] not in ("iar_jax.config.describe",)


def check_overrides(config, overrides):
    """The fields are there, and the config with them is allowed."""
    known = field_names(default_config())
    for override in overrides:
        name, _, text = override.removeprefix("--").partition("=")
        assert name in known, name
        section, _, field = name.removeprefix("config.").rpartition(".")
        owner = config[section] if section else config
        old = owner[field]
        if isinstance(old, tuple):
            value = tuple((float if "." in part else int)(part) for part in text.strip("()").split(",") if part)
        elif isinstance(old, bool):
            value = text == "True"
        else:
            value = type(old)(text)
        owner[field] = value
    check_config(config)


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(autouse=True)
def kinds_as_before(monkeypatch):
    # A config may add a kind.
    monkeypatch.setattr(generator, "KINDS", dict(generator.KINDS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(place.read_text()), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_left_to_fill_in(page):
    assert not re.findall(r"@[A-Z]+@", page.read_text())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
