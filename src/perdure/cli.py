"""The command line. Commands import what they need when they run, so that help comes at once."""

from __future__ import annotations

import errno
import gc
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

SETTINGS: dict[str, Any] = {
    "name": "perdure",
    "help": "Keeps a pretrained transformer learning from a stream without forgetting.",
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # rich's help would take longer to import than everything else
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(**SETTINGS)
REFUSED_BY_THE_SYSTEM = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT}
"""Errors of files that are no defect of ours, whoever ran into them."""

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's name (see `perdure recipes`) or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as method=er training.learning_rate=1e-3 seed=2."),
]
Imports = Annotated[
    list[str] | None, typer.Option("--import", metavar="FILE.py", help="Python file that registers your own plug-ins.")
]
Quiet = Annotated[bool, typer.Option("--no-progress", help="No progress bars.")]


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False)  # `:bomb:` in a name is no picture


def _import(files: list[str] | None) -> None:
    from .registry import import_file

    for file in files or ():
        import_file(file)


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    imports: Imports = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every setting and its source; run nothing.")
    ] = False,
    no_progress: Quiet = False,
) -> None:
    """Runs a recipe, or goes on with a run that was interrupted."""
    from .recipe import annotated_yaml, load_recipe

    _import(imports)
    loaded = load_recipe(recipe, overrides or ())
    if print_config:
        typer.echo(annotated_yaml(loaded), nl=False)
        return
    from .report.terminal import print_run
    from .run import run_recipe

    report = run_recipe(loaded, progress=not no_progress)
    print_run(report, _console())
    page = loaded.folder / "report.html"
    if not page.is_file():  # of a finished run, taken away since
        from .report.html import render_run

        render_run(report, page)
    typer.echo(page)


@app.command()
def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Arms of the recipe or methods, either with +head. All arms when absent."),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N", help="Number of seeds, counted from the recipe's; or a list such as 0,3,5,")
    ] = "3",
    reference: Annotated[
        str | None, typer.Option(help="Arm that differences are taken to; the first when absent.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the comparison; runs/RECIPE when absent.")] = None,
    imports: Imports = None,
    no_progress: Quiet = False,
) -> None:
    """Runs arms over seeds, reuses what is finished, compares on a page.

    The page, `comparison.json`, `comparison.csv` and `comparison.tex` lie in the folder of the comparison.
    """
    from .recipe import load_recipe

    _import(imports)
    loaded = load_recipe(recipe, overrides or (), compared=True)
    _compare(loaded, _names(methods), _seeds(seeds, loaded.seed), reference, output_dir, not no_progress)


def _names(text: str | None, option: str = "--methods") -> list[str] | None:
    from .errors import BadInput

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise BadInput(f"{option}: found {text!r}; name arms or methods, such as lora,moram, or leave it out for all")
    return names


def _seeds(text: str, first: int) -> list[int]:
    from .errors import BadInput

    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadInput(f"--seeds: found {text!r}; give a number of seeds, or a list such as 0,1,2") from None
    if "," not in text:
        count = values[0] if values else 0
        if count < 1:
            raise BadInput(f"--seeds: found {text!r}; give at least 1")
        values = list(range(first, first + count))
    if not values or min(values) < 0:
        raise BadInput(f"--seeds: found {text!r}; seeds are 0 or more")
    return values


def _compare(
    recipe: Any, arms: list[str] | None, seeds: list[int], reference: str | None, output_dir: str | None, progress: bool
) -> None:
    from .comparison import compare as run_comparison
    from .comparison import forgot_too_much
    from .errors import ForgotTooMuch
    from .report.terminal import print_comparison

    console = _console()
    comparison, page = run_comparison(
        recipe,
        arms,
        seeds,
        reference,
        output_dir,
        progress=progress,
        say=lambda line: console.print(line, markup=False),
    )
    print_comparison(comparison, console)
    for line in _verdicts(comparison):
        console.print(line, markup=False)
    typer.echo(page)
    beyond = forgot_too_much(comparison)
    if beyond:
        raise ForgotTooMuch(beyond)


def _verdicts(comparison: dict[str, Any]) -> list[str]:
    """Where the arms with MoRAM stand against the rivals that matter, in plain words."""
    from .comparison import verdict

    arms = [row["arm"] for row in comparison["rows"]]
    lines = []
    for arm in arms:
        if not arm.startswith("moram"):
            continue
        head = "+ridge" if arm.endswith("+ridge") else ""
        for rival in ("finetune", "lora", "frozen", "frozen+ridge", "linear_probe", "linear_probe+ridge"):
            if rival in ("finetune", "lora") or rival.endswith("+ridge") == bool(head):
                line = verdict(comparison, arm, rival)
                lines += [line] if line else []
    return lines


@app.command()
def sweep(
    recipe: RecipeName,
    overrides: Overrides = None,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B", help="Arms of the recipe or methods. All arms when absent.")
    ] = None,
    experiences: Annotated[int, typer.Option(help="Experiences that a trial learns.")] = 3,
    first: Annotated[int, typer.Option(help="The first of them, counted from 0.")] = 0,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Values of a setting, or LOW..HIGH; the recipe's tuning.grid if absent."),
    ] = None,
    random: Annotated[int | None, typer.Option(metavar="N", help="Draw N points instead of the whole grid.")] = None,
    search_seed: Annotated[int, typer.Option(help="Seed of these draws.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each.")] = 2,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run them on the Ray cluster at this address (auto, or HOST:PORT)."),
    ] = None,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs, or part of one, for each process there.")] = 0.0,
    output_dir: Annotated[
        str | None, typer.Option("--out", "--output-dir", help="Folder of the trials; runs/RECIPE/sweep when absent.")
    ] = None,
    table: Annotated[str | None, typer.Option(help="Results table, added to; sweep.json in that folder.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the best values into the recipe file.")] = False,
    copy: Annotated[str | None, typer.Option(metavar="FILE", help="With --write: into a new copy of it.")] = None,
    imports: Imports = None,
    no_progress: Quiet = False,
) -> None:
    """Tries settings of every arm on the same grid, judged on validation rows of the first experiences.

    Trials that have ended are kept; the same command goes on after Ctrl-C or a crash.
    """
    from .sweep.command import Request, sweep

    _import(imports)
    request = Request(
        recipe, tuple(overrides or ()), _names(arms, "--arms"), experiences, first, tuple(grid or ()), random,
        search_seed, processes, ray, ray_gpus, output_dir, table, write, copy, tuple(imports or ()),
    )  # fmt: skip
    console = _console()
    typer.echo(sweep(request, console, progress=not no_progress))


@app.command()
def demo(
    overrides: Overrides = None,
    output_dir: Annotated[str, typer.Option(help="Folder of the comparison.")] = "runs/demo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all arms.")] = 0,
    no_progress: Quiet = False,
) -> None:
    """Learns the Python standard library, six methods side by side.

    Texts are read from the running interpreter; no data file is needed.
    """
    from .recipe import load_recipe

    loaded = load_recipe("demo/stdlib", overrides or (), compared=True)
    _compare(loaded, None, [seed], None, output_dir, not no_progress)


@app.command()
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Folders of runs or of comparisons.")
    ] = None,
    matrix: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Accuracy matrix of another tool, CSV or JSON; may be repeated."),
    ] = None,
    scale: Annotated[str, typer.Option(help="Of the matrices: fraction, percent or auto.")] = "auto",
    metric: Annotated[
        str | None, typer.Option(help="Of the matrices: accuracy, perplexity or score; accuracy when absent.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Arm that differences are taken to.")] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="Folder for the page that compares several runs; the one above them when absent.")
    ] = None,
) -> None:
    """Rebuilds the pages of runs, and of several one that compares them; or reports matrices of other tools."""
    from .comparison import COMPARISON_FILE, REPORT_FILE, rebuild
    from .errors import BadInput
    from .report import build
    from .report.terminal import print_comparison, print_run

    if matrix and runs:
        raise BadInput("report: runs and --matrix do not go together: a matrix has no protocol that could be compared")
    if not matrix and (scale != "auto" or metric is not None):
        raise BadInput("report: --scale and --metric are for files given with --matrix")
    if matrix:
        from .matrix_report import report_matrices

        pages = report_matrices(matrix, output_dir, scale=scale, metric=metric, reference=reference)
    else:
        pages = rebuild(runs or [], output_dir, reference)
    folder = pages[-1].parent
    if (folder / COMPARISON_FILE).is_file():
        print_comparison(build.read_comparison(folder / COMPARISON_FILE), _console())
    else:
        print_run(build.read_report(folder / REPORT_FILE), _console())
    for page in pages:
        typer.echo(page)


@app.command()
def undo(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")],
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="K", help="Back to before experience K, counted from 0; the last when absent."),
    ] = None,
) -> None:
    """Takes a run back to before an experience.

    The same `perdure run` then learns on from there.
    """
    from .run import undo as take_back

    at = take_back(run, to)
    typer.echo(f"{run} stands before experience {at}; `perdure run` with its recipe goes on from there")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of `save_pretrained`, or of a run.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="merged, peft or stacked.")] = "merged",
    imports: Imports = None,
) -> None:
    """Writes what was learnt for other programs: merged weights, a PEFT adapter, or stacked tensors of routed items."""
    from .export import export as write
    from .run import learner_of

    _import(imports)
    facts = write(learner_of(folder), out, to)
    typer.echo(f"{out}: {facts['form']}, of {' + '.join(each['name'] for each in facts['method'])}")
    for lost in facts["loses"]:
        typer.echo(f"not kept: {lost}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, head or preset, in detail.")] = None,
    imports: Imports = None,
) -> None:
    """Lists methods and heads, or explains one."""
    from .listing import explain, list_all

    _import(imports)
    if name is None:
        list_all()
    else:
        explain(name)


@app.command()
def recipes() -> None:
    """Lists the recipes that come with the package."""
    from . import yamltext
    from .recipe import RECIPES, recipe_names

    rows = []
    for name in recipe_names():
        path = RECIPES / f"{name}.yaml"
        data = yamltext.load(path.read_text(encoding="utf-8"), name)
        rows.append((name, str(data.get("description", "")).strip(), ", ".join(data.get("arms") or {}) or "–"))
    for name, description, arms in rows:
        typer.echo(f"{name}\n    {description}\n    arms: {arms}")


@app.command()
def doctor(
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure which ways to compute memories are faster on this machine.")
    ] = False,
) -> None:
    """Looks at versions, device, disk, data and weights. Ends with 1 where something is wrong."""
    from .doctor import examine, print_speed

    console = _console()
    if speed:
        print_speed(console)
        return
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]--[/]", "wrong": "[red]!![/]"}
    found = examine()
    width = max(len(each.what) for each in found)
    for each in found:
        console.print(f"{marks[each.state]} {each.what:<{width}}  ", end="")
        console.print(each.found, markup=False)
        if each.remedy:
            console.print(f"   {'':<{width}}  {each.remedy}", markup=False)
    if any(each.state == "wrong" for each in found):
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        from . import __version__

        typer.echo(f"perdure {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _needed(arguments: list[str]) -> typer.Typer:
    """The app with the one command that is asked for: typer would read the signatures of all before it starts one."""
    asked = [each for each in app.registered_commands if each.callback and [each.callback.__name__] == arguments[:1]]
    if not asked:
        return app
    small = typer.Typer(**SETTINGS)
    small.registered_callback, small.registered_commands = app.registered_callback, asked
    return small


def main(arguments: list[str] | None = None) -> None:
    """Entry point: ends the process with the exit code of `perdure.errors`; unknown errors keep their traceback."""
    from .errors import BAD_INPUT, CANNOT_WRITE, INTERRUPTED, PerdureError

    given = sys.argv[1:] if arguments is None else arguments
    light = given[:1] in ([], ["methods"], ["recipes"]) or not {"-h", "--help"}.isdisjoint(given)
    if light:
        gc.disable()  # they import much and leave no garbage; collecting takes a tenth of their time
    try:
        if given == ["methods"]:  # typer would load all of pydantic to read no argument
            from .listing import list_all

            list_all()
        else:
            _needed(given)(arguments)
    except PerdureError as error:
        _fail(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in REFUSED_BY_THE_SYSTEM:
            raise
        _fail(f"{error.filename or 'a file'}: {error.strerror}; check the name, its permissions and the disk")
        sys.exit(CANNOT_WRITE)
    except KeyboardInterrupt:
        _fail("interrupted")
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer takes the KeyboardInterrupt and says nothing
            _fail("interrupted; what was saved before stands, and the same command goes on from there")
        # Usage errors leave typer with 2.
        sys.exit(BAD_INPUT if end.code == 2 else end.code)
    finally:
        if light:
            gc.enable()


def _fail(message: str) -> None:
    typer.echo(f"perdure: {message}", err=True)
