"""Many runs, arms x seeds, and what they show together: does a change help, and how sure is that?

    python -m iar_jax.study --config=configs/studies/ablation.py:mnist --workdir=runs/ablation
    python -m iar_jax.study --config=configs/studies/ablation.py:mnist --workdir=runs/ablation --workers=2
    python -m iar_jax.study --config=configs/studies/ablation.py:mnist --workdir=runs/ablation --list
    python -m iar_jax.study --config=configs/studies/ablation.py:mnist --workdir=runs/ablation --run=iar/3

The first makes all that is missing, one piece after the other as processes of their own, and leaves study.json,
report.html and curves; the second makes two at once, each on half of the cores. --list names the pieces, one a line,
and --run makes one of them with all that it needs: an array of jobs takes a line each, and the first form then finds
all of it done. Killed anywhere, the same command goes on.

The config is an experiment's, with its arms in config.study: names with overrides, as they stand on a command line.
"""

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from iar_jax.config import command_line
from iar_jax.config.fields import SECTIONS
from iar_jax.runtime.files import write_bytes, write_json
from iar_jax.runtime.progress import say
from iar_jax.study import drive, page
from iar_jax.study.answer import answer
from iar_jax.study.plan import Plan, plan_of


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """What the options ask for."""
    options = flags.FLAGS
    plan = plan_of(config)
    runs = epath.Path(config.study.runs).expanduser() if config.study.runs else workdir
    pieces = drive.pieces_of(plan, runs)
    if options.list:
        for piece in pieces:
            say(piece.name)
    elif options.run:
        drive.make_piece(pieces, options.run)
    else:
        command_line.save_config(config, workdir)
        if options.make:
            drive.make_all(pieces, runs, options.workers)
        tell(plan, runs, workdir)


def tell(plan: Plan, runs: epath.Path, workdir: epath.Path) -> None:
    """Leaves the answer of all runs that are finished in the workdir, and says it."""
    content = answer(plan, runs)
    write_json(workdir / "study.json", content)
    write_bytes(workdir / "report.html", page.page(f"Study {workdir.name}", content, runs).encode(errors="replace"))
    for name, png in page.figure_files(content).items():
        write_bytes(workdir / f"{name}.png", png)
    say("")
    for line in page.text_table(page.verdicts(content)):
        say(line)
    say(f"answer            {workdir / 'study.json'}")
    say(f"report            {workdir / 'report.html'}")


if __name__ == "__main__":
    flags.DEFINE_bool("list", False, "Name the pieces of the study, one a line, and make none.")
    flags.DEFINE_string("run", "", "Make one piece, and what it needs, and no answer.")
    flags.DEFINE_integer("workers", 1, "Pieces that are made at once, each on its share of the cores.", lower_bound=1)
    flags.DEFINE_bool("make", True, "--nomake tells what is finished so far, and makes none.")
    command_line.main(run, tuple(SECTIONS))
