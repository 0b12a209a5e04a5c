"""The `raylign` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from raylign import __version__
from raylign.config import RunConfig, load_config, merge_config, to_yaml
from raylign.errors import ConfigError, RaylignError, TrainingError

CONFIGS = Path(__file__).parent / "configs"


class Commands(click.Group):
    """Turns errors made for users into one line and exit code 2 (configuration) or 1 (everything else)."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except RaylignError as error:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            click.secho(f"{type(error).__name__}: {error}{notes}", fg="red", err=True)
            raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="raylign")
def main() -> None:
    """Safety alignment of language models on Ray: re-ranked off-policy training, and the online baselines beside it."""


def config_options(command: Any) -> Any:
    """`--config FILE`, `--print-config` and dotted overrides, the same for every command that reads a config."""
    command = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")(command)
    command = click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")(command)
    return click.option(
        "--config", "path", metavar="FILE", help="YAML file, or the name of a shipped one (see launch/configs)."
    )(command)


def resolve(path: str | None, overrides: tuple[str, ...], print_config: bool) -> RunConfig:
    """Load the configuration, looking a bare name up among the shipped files; print it and exit when asked to."""
    config = load_config(None if path is None else shipped(path), overrides)
    if print_config:
        click.echo(to_yaml(config), nl=False)
        raise SystemExit(0)
    return config


def shipped(path: str) -> str:
    """The path itself, or that of the shipped file of this name."""
    return str(CONFIGS / path) if not Path(path).exists() and (CONFIGS / path).exists() else path


def connect(verbose: bool) -> None:
    """Join the cluster of RAY_ADDRESS (set inside a Ray job) or the one running here, or start Ray on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        # Ray Data's actors make Ray's core print a false alarm to the terminal (ray issue 53727).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import logging

    import ray
    import ray.data

    with contextlib.nullcontext() if verbose else _silent_stderr():  # the core announces the level it was given
        ray.init(
            include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    if not verbose:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what C++ code writes to file descriptor 2; errors still arrive as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@main.command()
@config_options
@click.option("--verbose", is_flag=True, help="Show Ray's own progress and the output of its workers.")
def align(path: str | None, overrides: tuple[str, ...], print_config: bool, verbose: bool) -> None:
    """Run the main job: ingest, features, reward, rank, train, evaluate, report.

    Without arguments it aligns the embedded tiny model on the embedded data, offline, on two CPU cores.
    """
    config = resolve(path, overrides, print_config)
    from raylign.runtime.phases import run_directory

    run_directory(config)  # refuses a directory in use before anything starts
    connect(verbose)
    from raylign.runtime.pipeline import align as run_align

    result = run_align(config)
    click.echo(result.table)
    click.echo(f"checkpoint  {result.checkpoint}")
    click.echo(f"report      {result.report}")


@main.command()
@click.option(
    "--config", "path", metavar="FILE", required=True, help="YAML file with a section compare, or a shipped name."
)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--verbose", is_flag=True, help="Show Ray's own progress and the output of its workers.")
def compare(path: str, overrides: tuple[str, ...], verbose: bool) -> None:
    """Train several methods on the same prompts, reward and evaluation, over seeds, and price them on one ledger."""
    from raylign.compare_config import load_comparison

    comparison = load_comparison(shipped(path), overrides)
    connect(verbose)
    from raylign.runtime.compare import compare as run_compare
    from raylign.runtime.compare import write_comparison

    written = write_comparison(comparison, run_compare(comparison))
    click.echo(written.text)
    click.echo(f"report      {written.html}")


@main.command()
@click.option(
    "--config", "path", metavar="FILE", required=True, help="YAML file with a section calibrate, or a shipped name."
)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--verbose", is_flag=True, help="Show Ray's own progress and the output of its workers.")
def calibrate(path: str, overrides: tuple[str, ...], verbose: bool) -> None:
    """Fit reward models under label noise, and see what they know and what their maximum is worth to the judge."""
    from raylign.calibrate_config import load_calibration

    calibration = load_calibration(shipped(path), overrides)
    connect(verbose)
    from raylign.runtime.calibrate import calibrate as run_calibrate
    from raylign.runtime.calibrate import write_calibration

    written = write_calibration(calibration, run_calibrate(calibration))
    click.echo(written.text)
    click.echo(f"report      {written.html}")


@main.command()
@click.option(
    "--space", required=True, metavar="SPACE", help="YAML file of axes, or a shipped space, see tuning/spaces."
)
@click.option("--config", "path", metavar="FILE", help="YAML file, or the name of a shipped one (see launch/configs).")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Continue a sweep that was killed or stopped; finished trials are kept.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the points, and stop.")
@click.option("--verbose", is_flag=True, help="Show Ray's own progress and the output of its workers.")
def sweep(space: str, path: str | None, overrides: tuple[str, ...], resume: bool, dry_run: bool, verbose: bool) -> None:
    """Search a space of config keys: features once, cheap axes without training, trainings by Ray Tune."""
    from tuning.sweep_config import load_sweep, point_name

    found = load_sweep(space, None if path is None else shipped(path), overrides, is_resumed=resume)
    if dry_run:
        lines = [point_name(keys) for keys in found.points] or ["found by Optuna as it goes"]
        click.echo("\n".join([f"{len(found.points)} points x {len(found.sweep.seeds)} seed(s)", *lines]))
        return
    connect(verbose)
    from tuning.report import write_sweep
    from tuning.run import failure, run_sweep

    result = run_sweep(found)
    written = write_sweep(result, found.directory)
    click.echo(written.text)
    click.echo(f"checkpoint  {written.best or 'none: no point has finished with all of its seeds'}")
    click.echo(f"report      {written.html}")
    failed = [cause for point in result.points for cause in point.failed.values()]
    if failed:
        raise TrainingError(failure(failed, found))


@main.command()
@config_options
def check(path: str | None, overrides: tuple[str, ...], print_config: bool) -> None:
    """Validate a configuration, the data path and the model directory without starting Ray.

    A file with a section compare is checked method by method, one with a section calibrate reward by reward.
    """
    sections = merge_config(None if path is None else shipped(path), overrides)
    if "compare" in sections:
        _check_comparison(path, overrides, print_config)
        return
    if "calibrate" in sections:
        _check_calibration(path, overrides, print_config)
        return
    config = resolve(path, overrides, print_config)
    from raylign.runtime.check import check_config

    for line in check_config(config):
        click.echo(line)
    click.echo("ok")


def _check_comparison(path: str | None, overrides: tuple[str, ...], print_config: bool) -> None:
    """Check, or print, what each method runs with the first seed; other seeds differ in nothing else."""
    from raylign.compare_config import load_comparison

    comparison = load_comparison(None if path is None else shipped(path), overrides)
    trials = [trial for trial in comparison.trials if trial.seed == comparison.compare.seeds[0]]
    if print_config:
        click.echo("---\n".join(f"# {trial.method}\n{to_yaml(trial.config)}" for trial in trials), nl=False)
        return
    from raylign.runtime.check import check_config

    for trial in trials:
        click.echo(trial.method)
        for line in check_config(trial.config):
            click.echo(f"  {line}")
    click.echo("ok")


def _check_calibration(path: str | None, overrides: tuple[str, ...], print_config: bool) -> None:
    """Check what all rewards share and what each of them is, or print each with the first seed."""
    from raylign.calibrate_config import load_calibration

    calibration = load_calibration(None if path is None else shipped(path), overrides)
    if print_config:
        seed = calibration.calibrate.seeds[0]
        trials = [trial for trial in calibration.trials if trial.seed == seed]
        click.echo("---\n".join(f"# {trial.name}\n{to_yaml(trial.config)}" for trial in trials), nl=False)
        return
    from raylign.runtime.check import check_calibration

    for line in check_calibration(calibration):
        click.echo(line)
    click.echo("ok")


@main.group()
def data() -> None:
    """Look at preference data."""


@data.command("inspect")
@config_options
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1, 100), help="Pairs to show.")
def inspect_data(path: str | None, overrides: tuple[str, ...], print_config: bool, rows: int) -> None:
    """Show the first pairs with their token masks: prompt, scored response, end of response."""
    config = resolve(path, overrides, print_config)
    from raylign.data.inspect import inspect_source
    from raylign.models.loading import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(config.policy.model), trust_remote_code=config.policy.trust_remote_code)
    click.echo(
        inspect_source(config.data, tokenizer, num_rows=rows, use_color=sys.stdout.isatty(), seed=config.run.seed)
    )


@main.command()
@click.argument("checkpoint")
@config_options
def evaluate(checkpoint: str, path: str | None, overrides: tuple[str, ...], print_config: bool) -> None:
    """Judge a HF or PEFT CHECKPOINT on safety and benign prompts; prints JSON with intervals."""
    config = resolve(path, overrides, print_config)
    connect(verbose=False)
    from raylign.report.data import to_plain
    from raylign.runtime.evaluate_job import run_evaluation
    from raylign.runtime.run_phases import actor_options

    result = run_evaluation(checkpoint, config=config.evaluate, seed=config.run.seed, options=actor_options(config))
    click.echo(json.dumps({"checkpoint": checkpoint, **to_plain(result.summary)}, indent=2))


@main.command()
@click.argument("checkpoint")
@click.argument("output")
@click.option("--trust-remote-code", is_flag=True, help="Run code shipped inside the model directories.")
def merge(checkpoint: str, output: str, trust_remote_code: bool) -> None:
    """Write the model that a LoRA CHECKPOINT makes of its base to OUTPUT, for example for a next run."""
    from raylign.models.averaging import merge_adapter

    click.echo(f"merged   {merge_adapter(checkpoint, output, trust_remote_code=trust_remote_code)}")


@main.command()
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://127.0.0.1:8265",
    show_default=True,
    help="Job server of the cluster: its dashboard's address.",
)
@click.option("--working-dir", default=".", show_default=True, metavar="DIR", help="What the job ships and runs in.")
@click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="A variable the job sees; secrets by name only.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Files not to ship, beside .gitignore, .rayignore.")
@click.option("--submission-id", metavar="ID", help="Name of the job; Ray makes one otherwise.")
@click.option("--wait", "wait_s", default=0.0, metavar="SECONDS", help="Wait so long for the cluster to hold the job.")
@click.option("--dry-run", is_flag=True, help="Print the `ray job submit` line that does the same, and stop.")
@click.option("--no-follow", is_flag=True, help="Return when the job is submitted.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def submit(
    address: str,
    working_dir: str,
    env: tuple[str, ...],
    exclude: tuple[str, ...],
    submission_id: str | None,
    wait_s: float,
    dry_run: bool,
    no_follow: bool,
    arguments: tuple[str, ...],
) -> None:
    """Run a command of raylign as a job of a Ray cluster, follow its log and end with its exit code.

    raylign submit --address http://head:8265 -- align --config my.yaml run.storage=/shared/runs
    """
    from launch.submit import Options, run_submit

    options = Options(
        address=address,
        working_dir=Path(working_dir),
        env=env,
        exclude=exclude,
        submission_id=submission_id,
        wait_s=wait_s,
        is_dry_run=dry_run,
        is_followed=not no_follow,
    )
    raise SystemExit(run_submit(main, arguments, options))


@main.command()
def env() -> None:
    """Print versions, devices and known conflicts of this installation."""
    from raylign.runtime.check import environment

    click.echo(json.dumps(environment(), indent=2))


@main.group()
def assets() -> None:
    """The embedded model, judge and data."""


@assets.command("build", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def build(arguments: tuple[str, ...]) -> None:
    """Train the embedded model and judge from a corpus; `raylign assets build --help` lists the options."""
    from launch.build_assets import main as build_main

    build_main(list(arguments))


if __name__ == "__main__":
    main()
