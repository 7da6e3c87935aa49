"""If these fail, a typo trains for hours on the wrong thing, or a user sees a stack trace."""

import importlib
import io
import pathlib
import re
import runpy
import tokenize

import pytest

from iar_jax.config.checks import check_config
from iar_jax.config.describe import markdown
from iar_jax.config.field import leaves
from iar_jax.config.fields import SECTIONS, default_config
from iar_jax.runtime.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def get_config(name, arg=""):
    return runpy.run_path(str(CONFIGS / name))["get_config"](arg)


@pytest.mark.parametrize(
    ("name", "arg"),
    [("mnist.py", ""), ("mnist.py", "baseline"), ("folder.py", "/pictures"), ("folder.py", "/pictures,small")]
    + [("folder.py", f"/a,b,{size}") for size in ("tiny", "B", "L")],
)
def test_shipped_configs_pass(name, arg):
    check_config(get_config(name, arg))


def test_the_baseline_differs_in_lambda_alone():
    ours, baseline = get_config("mnist.py").to_dict(), get_config("mnist.py", "baseline").to_dict()
    assert ours["training"].pop("cluster_weights") == (1.0,)
    assert baseline["training"].pop("cluster_weights") == (0.0,)
    assert ours == baseline


IMAGENET = runpy.run_path(str(CONFIGS / "imagenet.py"))


@pytest.mark.parametrize("word", ["", ",baseline", ",best"])
@pytest.mark.parametrize("resolution", [256, 384])
@pytest.mark.parametrize("name", IMAGENET["NAMES"])
def test_recipes_for_imagenet_pass(name, resolution, word):
    if name.startswith("masked") and word == ",best":
        with pytest.raises(UserError, match="which masked models do not have; leave it out"):
            IMAGENET["get_config"](f"{name},{resolution}{word}")
    else:
        check_config(IMAGENET["get_config"](f"{name},{resolution}{word}"))


def test_recipes_for_imagenet_differ_in_what_they_say():
    def differences(word):
        iar, other = (IMAGENET["get_config"](f"B,256{end}").to_dict() for end in ("", word))
        sections = (part for part, fields in iar.items() if isinstance(fields, dict))
        return {f"{part}.{name}" for part in sections for name in iar[part] if iar[part][name] != other[part][name]}

    assert differences(",baseline") == {"training.cluster_weights"}
    assert differences(",best") == IMAGENET["BEST"].keys()


@pytest.mark.parametrize("arg", ["", "B", "B,512", "C,256", "B,256,beste", "B,256,best,baseline"])
def test_no_such_recipe_for_imagenet(arg):
    with pytest.raises(UserError, match="the argument is MODEL,RESOLUTION and, behind another comma"):
        IMAGENET["get_config"](arg)


def test_a_folder_with_a_comma_keeps_its_name():
    config = get_config("folder.py", "/a,b,tiny")
    assert config.data.source == "folder:/a,b"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "codebook.cluster_sizes",
            (100,),
            r"cluster_sizes is \(100,\): 100 does not divide .*codebook_size \(16384\); 64 or 128",
        ),
        ("model.num_heads", 5, r"num_heads is 5, which does not divide config.model.dim \(768\); 4 or 6 would"),
        ("model.num_heads", 384, "makes heads of 2; the rotary embedding of rows and columns needs a multiple of 4"),
        ("model.dim", 0, "config.model.dim is 0; allowed are integers from 1 on"),
        ("model.ffn_dropout_rate", 1.0, r"ffn_dropout_rate is 1.0; allowed are numbers in \[0, 1\)"),
        ("sampling.top_p", 0.0, r"top_p is 0.0; allowed are numbers in \(0, 1\]"),
        ("sampling.top_k", -1, "top_k is -1; allowed are integers from 0 on"),
        ("sampling.temperature", 0.0, r"temperature is 0.0; allowed are numbers in \(0, inf\)"),
        ("training.schedule", "step", "'step'; allowed are 'constant', 'cosine', 'linear', 'wsd'"),
        ("model.kind", "diffusion", "config.model.kind is 'diffusion'; allowed are 'autoregressive'"),
        (
            "model.attention",
            "flash",
            "config.model.attention is 'flash'; allowed are 'auto', 'fused', 'splash', 'cudnn', 'blocks'",
        ),
        ("data.source", "zip:a", "'zip:a'; allowed are 'mnist5k', 'folder:PATH', 'tfds:NAME', 'parquet:PATH'"),
        ("evaluation.features", "clip", "'clip'; allowed are 'classifier', 'inception'"),
        ("codebook.cluster_sizes", (8, 12), r"cluster_sizes is \(8, 12\): 8 does not divide 12"),
        (
            "training.cluster_weights",
            (1.0, 0.5),
            r"cluster_weights is \(1.0, 0.5\) and config.codebook.cluster_sizes is \(128,\): give one weight for each",
        ),
        ("training.cluster_weights", (-1.0,), r"allowed is a tuple of numbers in \[0, inf\)"),
        ("training.cluster_weights_end", (1.0, 0.5), r"cluster_weights_end is \(1.0, 0.5\) and config.training.clus"),
        ("model.num_kv_heads", 5, r"num_kv_heads is 5, which does not divide config.model.num_heads \(12\); 4 or 6"),
        ("training.decay_steps", 2_000_000, "are more than config.training.num_steps"),
        ("tokenizer.channel_multipliers", (), "allowed is a tuple of integers from 1 on"),
        ("tokenizer.local_encoder", True, "local_encoder is set, which goes with one level"),
        ("model.scan_unroll", 13, "allowed are 1 to config.model.num_layers"),
        ("data.resolution", 33, "the tokenizer turns 16 x 16 pixels into a code"),
        ("data.resolution", 16, "a single code of the tokenizer; 32 at least"),
        ("training.learning_rate", float("nan"), "learning_rate is nan"),
        ("training.neighbour_count", 1, "neighbour_count is 1; a code has 2 to 16384 near ones, itself among them"),
        ("training.context_noise", 1.5, r"context_noise is 1.5; allowed are numbers in \[0, 1\]"),
        ("training.context_noise_draw", "near", "allowed are 'uniform', 'cluster', 'neighbours'"),
        ("codebook.points", "lpips", "codebook.points is 'lpips'; allowed are 'codes', 'pixels'"),
        ("codebook.assignment", "average", "allowed are 'average_linkage', 'greedy', 'optimal', 'random'"),
    ],
)
def test_impossible_values_name_the_field_the_value_and_what_is_allowed(field, value, message):
    config = default_config()
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"codebook.assignment": "average_linkage", "codebook.cluster_sizes": (8, 64)},
            r"whose clusters are one level; config.codebook.cluster_sizes is \(8, 64\): give the mean",
        ),
        (
            {"codebook.assignment": "average_linkage", "training.label_smoothing": 0.1},
            "label_smoothing is 0.1, which is of equal clusters",
        ),
        ({"model.kind": "masked", "training.lookahead_weight": 2.0}, "lookahead_weight is 2, which holds an autoregr"),
        ({"model.kind": "masked", "training.regression_weight": 0.5}, "regression_weight is 0.5, which holds an autor"),
        ({"model.num_layers": 1, "training.lookahead_weight": 2.0}, "config.model.num_layers is 1: 2 at least"),
    ],
)
def test_variants_that_exclude_each_other_are_refused_with_the_reason(fields, message):
    config = default_config()
    for field, value in fields.items():
        section, name = field.split(".")
        config[section][name] = value
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_unknown_and_missing_fields_in_a_file_are_named():
    config = default_config()
    with config.unlocked():
        config.model.dmi = 3
    with pytest.raises(UserError, match=r"config.model.dmi: no such field; did you mean 'dim'\?"):
        check_config(config)
    config = default_config()
    with config.unlocked():
        del config.model.dim
    with pytest.raises(UserError, match=r"config\.model\.dim is missing"):
        check_config(config)


def test_a_value_of_the_wrong_type_is_named():
    config = default_config()
    with config.unlocked(), config.ignore_type():
        config.model.dim = "wide"
    with pytest.raises(UserError, match=r"config.model.dim is 'wide', of type str; allowed is an integer"):
        check_config(config)


def test_every_default_is_allowed_and_every_choice_is_served():
    for name, field in leaves(SECTIONS):
        assert field.allowed.admits(field.default), name
        assert str(field.allowed), name
        assert field.meaning.endswith((".", ")")), name


def test_the_page_of_fields_is_not_stale():
    page = (CONFIGS.parent / "docs" / "config.md").read_text()
    assert page == markdown(), "make it again: python -m iar_jax.config.describe > docs/config.md"


STAGES = {
    "train_tokenizer": "train_tokenizer.py",
    "rearrange_codebook": "rearrange_codebook.py",
    "extract_codes": "extract_codes.py",
    "train": "train.py",
    "sample": "sample.py",
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_lists_the_sections_that_it_reads(stage):
    source = (CONFIGS.parent / "iar_jax" / STAGES[stage]).read_text()
    read = set(re.findall(r"\bconfig\.([a-z_]+)\b(?!\()", re.sub(r"iar_jax\.config\.\w+", "", code_of(source))))
    assert read & SECTIONS.keys() == set(importlib.import_module(f"iar_jax.{stage}").READS)


def code_of(source):
    """Without docstrings, comments and texts."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return tokenize.untokenize(t for t in tokens if t.type not in (tokenize.STRING, tokenize.COMMENT))
